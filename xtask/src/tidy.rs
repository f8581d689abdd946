//! `cargo xtask tidy`: the rules of the repository that neither compiler nor clippy checks: which crate may use which,
//! where `unsafe` may stand, how long a file may be, links that lead nowhere, words that do not belong here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::shell::{command, output, root};

/// The house, from the roof down: a crate may use only crates below it.
const HOUSE: &[&str] = &[
    "loam",
    "loam-bench",
    "loam-pool",
    "loam-image",
    "loam-nbd",
    "loam-attach",
    "loam-space",
    "loam-content",
    "loam-seed",
    "loam-block",
    "loam-sys",
];

/// Crates that may be used by tests alone.
const TEST_ONLY: &[&str] = &["loam-sim", "loam-e2e"];

/// A source file longer than this has more than one subject, most likely.
const FILE_LINES_MAX: usize = 700;

/// Longer files that were looked at and found to be one subject.
const LONG_FILES: &[&str] = &[];

/// Markers of unfinished work and of things that are true on one machine only. Written in two halves, so that this
/// file passes its own check.
const BANNED: &[(&str, &str)] = &[
    ("TO", "DO"),
    ("FIX", "ME"),
    ("XX", "X:"),
    ("dbg", "!("),
    ("#[ig", "nore]"),
    ("/wo", "rk/"),
    ("deb.deb", "ian.org"),
];

/// The keyword with one home, in two halves for the same reason.
const UNSAFE: &str = concat!("un", "safe");

/// The task: no options.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    if let Some(unknown) = arguments.first() {
        bail!("unknown option '{unknown}'");
    }
    Ok(if report() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints every finding and returns how many there are.
pub(crate) fn report() -> usize {
    let findings = match findings() {
        Ok(findings) => findings,
        Err(error) => vec![format!("{error:#}")],
    };
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    if findings.is_empty() {
        eprintln!("tidy: clean");
    }
    findings.len()
}

fn findings() -> Result<Vec<String>> {
    let mut findings = Vec::new();
    // A checkout that belongs to somebody else is still this repository.
    let list = ["-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"];
    let files = output(&mut command("git", &list))?;
    for name in files.lines() {
        let path = root().join(name);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (first, second) in BANNED {
            let word = format!("{first}{second}");
            for (number, _) in text.lines().enumerate().filter(|(_, line)| line.contains(&word)) {
                findings.push(format!("{name}:{}: '{word}' does not belong here", number + 1));
            }
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => check_source(name, &text, &mut findings),
            Some("md") => check_links(name, &path, &text, &mut findings),
            Some("toml") if name.ends_with("/Cargo.toml") => check_manifest(name, &text, &mut findings),
            _ => {}
        }
    }
    Ok(findings)
}

fn check_source(name: &str, text: &str, findings: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX && !LONG_FILES.contains(&name) {
        findings.push(format!("{name}: {lines} lines; split it by subject, or list it in xtask/src/tidy.rs"));
    }
    if !name.starts_with("crates/sys/") {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let openings = [" {", " fn", " impl"].map(|rest| format!("{UNSAFE}{rest}"));
            if openings.iter().any(|opening| code.contains(opening)) {
                findings.push(format!("{name}:{}: unsafe outside of crates/sys", number + 1));
            }
        }
    }
    if (name.ends_with("/lib.rs") || name.ends_with("/main.rs")) && !text.starts_with("//!") {
        findings.push(format!("{name}: does not begin with what the crate is"));
    }
}

fn check_manifest(name: &str, text: &str, findings: &mut Vec<String>) {
    let mut section = "";
    let mut package = "";
    let mut inherits_lints = false;
    for line in text.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
        }
        let (key, value) = line.split_once('=').map_or((line, ""), |(key, value)| (key.trim(), value.trim()));
        match section {
            "package" if key == "name" => package = value.trim_matches('"'),
            "lints" if key == "workspace" => inherits_lints = value == "true",
            "dependencies" if key.starts_with("loam") => {
                let dependency = key.split('.').next().unwrap_or(key);
                if let Some(finding) = check_direction(package, dependency) {
                    findings.push(format!("{name}: {finding}"));
                }
            }
            _ => {}
        }
    }
    if !inherits_lints && package != "loam-sys" {
        findings.push(format!("{name}: lacks `[lints] workspace = true`"));
    }
}

/// Why `package` may not use `dependency`, if it may not. Tests and xtask stand outside of the house.
fn check_direction(package: &str, dependency: &str) -> Option<String> {
    if package == "xtask" || TEST_ONLY.contains(&package) {
        return None;
    }
    if TEST_ONLY.contains(&dependency) {
        return Some(format!("{dependency} is for tests: it may only be a dev-dependency"));
    }
    let floor = |name: &str| HOUSE.iter().position(|crate_name| *crate_name == name);
    match (floor(package), floor(dependency)) {
        (None, _) => Some(format!("{package} has no place in the house (xtask/src/tidy.rs)")),
        (_, None) => Some(format!("{dependency} has no place in the house (xtask/src/tidy.rs)")),
        (Some(above), Some(below)) if below <= above => {
            Some(format!("{package} may not use {dependency}, which stands above it"))
        }
        _ => None,
    }
}

/// Relative links of a Markdown file must lead to a file.
fn check_links(name: &str, path: &Path, text: &str, findings: &mut Vec<String>) {
    let directory = path.parent().map(PathBuf::from).unwrap_or_default();
    for rest in text.split("](").skip(1) {
        let link = rest.split([')', ' ', '\n']).next().unwrap_or_default();
        let file = link.split('#').next().unwrap_or_default();
        if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
            continue;
        }
        if !directory.join(file).exists() {
            findings.push(format!("{name}: link to '{file}', which does not exist"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{UNSAFE, check_direction, check_manifest, check_source};

    #[test]
    fn dependencies_point_down() {
        assert_eq!(check_direction("loam-pool", "loam-seed"), None);
        assert!(check_direction("loam-seed", "loam-pool").is_some());
        assert!(check_direction("loam-pool", "loam-sim").is_some());
        assert!(check_direction("loam-new", "loam-block").is_some());
        assert_eq!(check_direction("xtask", "loam-e2e"), None);
    }

    #[test]
    fn a_manifest_is_read_section_by_section() {
        let mut findings = Vec::new();
        let manifest = "[package]\nname = \"loam-space\"\n[lints]\nworkspace = true\n[dependencies]\n\
                        loam-pool = { workspace = true }\n[dev-dependencies]\nloam-sim = { workspace = true }\n";
        check_manifest("x/Cargo.toml", manifest, &mut findings);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].contains("loam-pool"));
    }

    #[test]
    fn unsafe_has_one_home() {
        let text = format!("fn f() {{ {UNSAFE} {{ g() }} }}");
        let (mut elsewhere, mut home) = (Vec::new(), Vec::new());
        check_source("crates/block/src/x.rs", &text, &mut elsewhere);
        check_source("crates/sys/src/x.rs", &text, &mut home);
        assert_eq!((elsewhere.len(), home.len()), (1, 0));
    }
}

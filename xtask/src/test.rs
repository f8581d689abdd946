//! `cargo xtask test`: everything a change has to pass, cheapest first. The end-to-end tests drive the real binary on
//! the real kernel and need root; asked for without root they fail, they are never skipped in silence. They run here, and
//! again in virtual machines with other kernels.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::shell::{cargo, describe, is_root, status, target};
use crate::vm::Version;
use crate::{setup, test_vm, tidy};

struct Options {
    unit: bool,
    /// The end-to-end tests on this machine's own kernel.
    host: bool,
    /// And those in virtual machines, with these kernels.
    kernels: Vec<Version>,
    release: bool,
    filters: Vec<String>,
}

fn parse(arguments: &[String]) -> Result<Options> {
    let mut chosen: Vec<&str> = Vec::new();
    let mut options = Options {
        unit: true,
        host: true,
        kernels: Version::ALL.to_vec(),
        release: false,
        filters: Vec::new(),
    };
    let mut words = arguments.iter();
    while let Some(argument) = words.next() {
        match argument.as_str() {
            part @ ("--unit" | "--e2e" | "--vm") => chosen.push(part),
            "--kernel" => options.kernels = vec![words.next().context("--kernel what?")?.parse()?],
            "--release" => options.release = true,
            option if option.starts_with('-') => bail!("unknown option '{option}'"),
            filter => options.filters.extend(["-E".into(), filterset(filter)]),
        }
    }
    match chosen[..] {
        [] => {}
        ["--unit"] => (options.host, options.kernels) = (false, Vec::new()),
        ["--e2e"] => (options.unit, options.kernels) = (false, Vec::new()),
        ["--vm"] => (options.unit, options.host) = (false, false),
        _ => bail!("--unit, --e2e and --vm exclude each other"),
    }
    Ok(options)
}

/// A part of a test's name, or an expression of nextest's (`binary(pool_life)`), as an expression.
fn filterset(filter: &str) -> String {
    if filter.contains('(') { filter.to_string() } else { format!("test({filter})") }
}

/// The task. Returns the exit code of the first step that failed.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    let options = parse(arguments)?;
    setup::run_setup()?;
    let started = Instant::now();
    let filters: Vec<&str> = options.filters.iter().map(String::as_str).collect();
    let mut steps: Vec<(&str, Vec<&str>)> = Vec::new();
    if options.unit {
        if filters.is_empty() {
            steps.push(("format", vec!["fmt", "--all", "--check"]));
            steps.push((
                "lints",
                vec!["clippy", "-q", "--workspace", "--all-targets", "--", "-D", "warnings"],
            ));
            steps.push(("docs", vec!["doc", "-q", "--workspace", "--no-deps", "--document-private-items"]));
            steps.push(("examples in docs", vec!["test", "-q", "--doc", "--workspace"]));
        }
        let mut nextest = vec![
            "nextest",
            "run",
            "--workspace",
            "--exclude",
            "loam-e2e",
            "--no-tests=pass",
            "--no-fail-fast",
        ];
        nextest.extend(&filters);
        steps.push(("unit tests", nextest));
    }
    for (name, arguments) in &steps {
        if let Some(code) = step(name, arguments, started, &[("RUSTDOCFLAGS", "-D warnings")])? {
            return Ok(code);
        }
    }
    if options.unit && filters.is_empty() && tidy::report() > 0 {
        return Ok(ExitCode::FAILURE);
    }
    if (options.host || !options.kernels.is_empty()) && !is_root() {
        bail!(
            "the end-to-end tests attach loop devices and mount: run as root, or `cargo xtask test --unit`"
        );
    }
    if options.host
        && let Some(code) = end_to_end(&options, &filters, started)?
    {
        return Ok(code);
    }
    let code = test_vm::run_tests(&options.kernels, &filters, started)?;
    eprintln!("test: [{:>4.0} s] done", started.elapsed().as_secs_f64());
    Ok(ExitCode::from(code))
}

fn end_to_end(options: &Options, filters: &[&str], started: Instant) -> Result<Option<ExitCode>> {
    let (profile, directory) = if options.release { ("release", "release") } else { ("dev", "debug") };
    let build = ["build", "-q", "--profile", profile, "--package", "loam"];
    if let Some(code) = step("the binary", &build, started, &[])? {
        return Ok(Some(code));
    }
    let binary = target().join(directory).join("loam").to_string_lossy().into_owned();
    let mut nextest = vec!["nextest", "run", "--package", "loam-e2e", "--no-tests=pass", "--no-fail-fast"];
    nextest.extend(filters);
    step("end-to-end tests", &nextest, started, &[("LOAM_BIN", &binary)])
}

/// Runs one cargo command; `Some` with its exit code if it failed.
fn step(
    name: &str,
    arguments: &[&str],
    started: Instant,
    environment: &[(&str, &str)],
) -> Result<Option<ExitCode>> {
    let mut command = cargo(arguments);
    command.envs(environment.iter().copied());
    eprintln!("test: [{:>4.0} s] {name}: {}", started.elapsed().as_secs_f64(), describe(&command));
    let status = status(&mut command)?;
    if status.success() {
        return Ok(None);
    }
    eprintln!("test: {name} failed: {}", describe(&command));
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(Some(ExitCode::from(code)))
}

#[cfg(test)]
mod tests {
    use super::{Version, parse};

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_string).collect()
    }

    #[test]
    fn everything_runs_unless_a_part_is_chosen() {
        let all = parse(&[]).unwrap();
        assert!(all.unit && all.host && all.kernels == Version::ALL);
        let machine = parse(&words("--vm --kernel 6.12 recovery binary(pool_life)")).unwrap();
        assert!(!machine.unit && !machine.host && machine.kernels == [Version::V6_12]);
        assert_eq!(machine.filters, ["-E", "test(recovery)", "-E", "binary(pool_life)"]);
        assert!(parse(&words("--unit")).unwrap().kernels.is_empty());
        assert!(parse(&words("--unit --vm")).is_err());
        assert!(parse(&words("--vm --kernel 5.4")).is_err());
    }
}

//! `cargo xtask test`: everything a change has to pass, cheapest first. The end-to-end tests drive the real binary on
//! the real kernel and need root; asked for without root they fail, they are never skipped in silence.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::shell::{cargo, describe, is_root, status, target};
use crate::{setup, tidy};

struct Options {
    unit: bool,
    e2e: bool,
    release: bool,
    filters: Vec<String>,
}

fn parse(arguments: &[String]) -> Result<Options> {
    let mut options = Options { unit: true, e2e: true, release: false, filters: Vec::new() };
    for argument in arguments {
        match argument.as_str() {
            "--unit" => options.e2e = false,
            "--e2e" => options.unit = false,
            "--release" => options.release = true,
            option if option.starts_with('-') => bail!("unknown option '{option}'"),
            filter => options.filters.push(filter.to_string()),
        }
    }
    if !options.unit && !options.e2e {
        bail!("--unit and --e2e exclude each other");
    }
    Ok(options)
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
    if options.e2e { end_to_end(&options, &filters, started) } else { Ok(ExitCode::SUCCESS) }
}

fn end_to_end(options: &Options, filters: &[&str], started: Instant) -> Result<ExitCode> {
    if !is_root() {
        bail!(
            "the end-to-end tests attach loop devices and mount: run as root, or `cargo xtask test --unit`"
        );
    }
    let (profile, directory) = if options.release { ("release", "release") } else { ("dev", "debug") };
    let build = ["build", "-q", "--profile", profile, "--package", "loam"];
    if let Some(code) = step("the binary", &build, started, &[])? {
        return Ok(code);
    }
    let binary = target().join(directory).join("loam").to_string_lossy().into_owned();
    let mut nextest = vec!["nextest", "run", "--package", "loam-e2e", "--no-tests=pass", "--no-fail-fast"];
    nextest.extend(filters);
    let code = step("end-to-end tests", &nextest, started, &[("LOAM_BIN", &binary)])?;
    Ok(code.unwrap_or(ExitCode::SUCCESS))
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

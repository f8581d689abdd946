//! `cargo xtask bench`: the commands behind the figures in docs/benchmarks, with the image and the web server that they
//! need.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::image::{self, Image};
use crate::nginx::Nginx;
use crate::setup;
use crate::shell::{describe, is_root, release_binary, run, target};

const BENCHES: [&str; 3] = ["start", "seed", "read"];

/// What the index with a trace is called, behind the tar's name.
const TRACED: &str = ".traced.loam";

/// The task. Options (`--quick`, `--rounds=N`) are those of `loam bench`.
pub(crate) fn run_task(arguments: &[String]) -> Result<()> {
    let (options, chosen): (Vec<&str>, Vec<&str>) =
        arguments.iter().map(String::as_str).partition(|argument| argument.starts_with('-'));
    if let Some(unknown) = chosen.iter().find(|bench| !BENCHES.contains(bench)) {
        bail!("no benchmark '{unknown}': there are {}", BENCHES.join(", "));
    }
    ensure!(is_root(), "the benchmarks mount and attach loop devices: run them as root");
    setup::run_setup()?;
    let binary = release_binary()?;
    let directory = target().join("bench");
    fs::create_dir_all(&directory)?;
    let mut results = Vec::new();
    for bench in BENCHES.iter().filter(|bench| chosen.is_empty() || chosen.contains(bench)) {
        let out = directory.join(format!("{bench}.jsonl"));
        let mut loam = Command::new(&binary);
        loam.args(["bench", bench, "--out"]).arg(&out).args(&options);
        match *bench {
            "start" => start(&binary, &mut loam)?,
            _ => show_and_run(&mut loam)?,
        }
        results.push(out);
    }
    let mut report = Command::new(&binary);
    report.args(["bench", "report"]).args(&results).arg("--html").arg(directory.join("report.html"));
    show_and_run(&mut report)
}

/// Cold start needs the image, its indexes and a server.
fn start(binary: &Path, loam: &mut Command) -> Result<()> {
    let image = Image::debian()?;
    image.compressed("gzip", "gz")?;
    image.compressed("xz", "xz")?;
    index(binary, &image)?;
    let nginx = Nginx::start(&image::directory().join("nginx"), &image::directory().join("www"))?;
    let name = image.name();
    loam.arg(format!("tar:{}", nginx.url(&name)));
    loam.args(["--traced", &nginx.url(&format!("{name}{TRACED}"))]);
    for suffix in ["", ".gz", ".xz"] {
        loam.args(["--download", &nginx.url(&format!("{name}{suffix}"))]);
    }
    show_and_run(loam)
}

/// What a publisher does: an index beside the tar, and another one with a trace of the program's first run.
fn index(binary: &Path, image: &Image) -> Result<()> {
    let directory = image::directory();
    let (mount, trace) = (directory.join("mnt"), directory.join("trace"));
    fs::create_dir_all(&mount)?;
    let loam = |arguments: &[&OsStr]| {
        run(Command::new(binary).args(arguments).env("LOAM_POOL", directory.join("pool")))
    };
    let tar = format!("tar:{}", image.tar.display());
    let traced = format!("{}{TRACED}", image.tar.display());
    let word = |text: &'static str| OsStr::new(text);
    loam(&[word("index"), tar.as_ref()])?;
    loam(&[word("mount"), tar.as_ref(), mount.as_os_str()])?;
    let ran = run(Command::new("chroot").arg(&mount).args(image.program));
    let taken = loam(&[word("trace"), mount.as_os_str(), word("-o"), trace.as_os_str()]);
    loam(&[word("umount"), mount.as_os_str()])?;
    ran.and(taken)?;
    loam(&[word("index"), tar.as_ref(), word("--trace"), trace.as_os_str(), word("-o"), traced.as_ref()])
}

fn show_and_run(command: &mut Command) -> Result<()> {
    eprintln!("bench: {}", describe(command));
    run(command)
}

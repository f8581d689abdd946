//! `cargo xtask bench`: the commands behind the figures in docs/benchmarks, with the image and the web server that they
//! need.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::image::{self, Image};
use crate::nginx::Nginx;
use crate::shell::{cargo, command, describe, is_root, output, release_binary, run, status, target};
use crate::vm::{self, Version};
use crate::{setup, test_vm};

const BENCHES: [&str; 6] = ["start", "seed", "read", "nbd", "zero", "quota"];

/// They only start servers and copiers.
const NO_ROOT: [&str; 2] = ["nbd", "zero"];

/// What the index with a trace is called, behind the tar's name.
const TRACED: &str = ".traced.loam";

/// The server that ublk is compared with.
const RUBLK_VERSION: &str = "0.2.15";

/// What a run in a virtual machine may take: the standard preset takes the better part of an hour.
const VM_TIMEOUT: Duration = Duration::from_secs(3 * 3600);

/// Where the guest keeps what direct reads are of: a disk, not memory.
const VM_SCRATCH: &str = "/scratch";

/// The task. Options (`--quick`, `--rounds=N`) are those of `loam bench`.
pub(crate) fn run_task(arguments: &[String]) -> Result<()> {
    if arguments.iter().any(|argument| argument == "--vm") {
        return read_in_vm(arguments);
    }
    let (options, chosen): (Vec<&str>, Vec<&str>) =
        arguments.iter().map(String::as_str).partition(|argument| argument.starts_with('-'));
    if let Some(unknown) = chosen.iter().find(|bench| !BENCHES.contains(bench)) {
        bail!("no benchmark '{unknown}': there are {}", BENCHES.join(", "));
    }
    let needs_root = |bench: &str| !NO_ROOT.contains(&bench);
    if chosen.is_empty() || chosen.iter().any(|bench| needs_root(bench)) {
        ensure!(is_root(), "these benchmarks mount and attach loop devices: run them as root");
    }
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
            "nbd" => {
                show_and_run(&mut loam)?;
                show_and_run(loam.arg("--copy"))?;
            }
            "quota" => quota(&binary, &out, &options)?,
            _ => show_and_run(&mut loam)?,
        }
        results.push(out);
    }
    let mut report = Command::new(&binary);
    report.args(["bench", "report"]).args(&results).arg("--html").arg(directory.join("report.html"));
    show_and_run(&mut report)
}

/// The test, the curves and the lazy pool, into one file.
fn quota(binary: &Path, out: &Path, options: &[&str]) -> Result<()> {
    for part in [None, Some("--curves"), Some("--lazy")] {
        let mut loam = Command::new(binary);
        loam.args(["bench", "quota", "--out"]).arg(out).args(options).args(part);
        show_and_run(&mut loam)?;
    }
    Ok(())
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

/// `read` in a virtual machine, whose kernel has ublk and RAM disks. Results go to a file of their own, which the next
/// run goes on with.
fn read_in_vm(arguments: &[String]) -> Result<()> {
    let mut kernel = Version::NEWEST;
    let mut options = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--vm" | "read" => {}
            "--kernel" => kernel = words.next().context("--kernel what?")?.parse()?,
            option if option.starts_with('-') => options.push(option.to_string()),
            other => bail!("'{other}': only `read` is run in a virtual machine; options as --NAME=VALUE"),
        }
    }
    ensure!(is_root(), "the virtual machine's disks are made as root");
    setup::run_setup()?;
    let results = target().join("bench/read-vm.jsonl");
    let share = target().join("vm/bench");
    if share.exists() {
        fs::remove_dir_all(&share)?;
    }
    fs::create_dir_all(&share)?;
    test_vm::strip(&release_binary()?, &share.join("loam"))?;
    test_vm::strip(&rublk()?, &share.join("rublk"))?;
    if results.exists() {
        fs::copy(&results, share.join("read.jsonl"))?;
    }
    let script = "export PATH=/share:$PATH; exec loam bench read --out read.jsonl \"$@\"";
    let mut command: Vec<String> = ["sh", "-euc", script, "sh"].map(str::to_string).to_vec();
    command.push(format!("--scratch={VM_SCRATCH}"));
    command.extend(options);
    let mut machine = vm::Options::new(kernel);
    (machine.timeout, machine.share) = (VM_TIMEOUT, Some(share.clone()));
    let code = vm::run(&machine, &command)?;
    if share.join("read.jsonl").exists() {
        fs::create_dir_all(target().join("bench"))?;
        fs::copy(share.join("read.jsonl"), &results)?;
    }
    ensure!(code == 0, "`loam bench read` ended with {code} in the virtual machine");
    let mut report = Command::new(release_binary()?);
    report.args(["bench", "report"]).arg(&results).arg("--html").arg(target().join("bench/read-vm.html"));
    show_and_run(&mut report)
}

/// rublk, built once. It needs libclang, which nothing else here does.
fn rublk() -> Result<PathBuf> {
    let root = target().join("rublk");
    let program = root.join("bin/rublk");
    if !program.exists() {
        let there =
            status(command("dpkg-query", &["-W", "libclang-dev"]).stdout(std::process::Stdio::null()))?;
        if !there.success() {
            eprintln!("bench: installing libclang-dev, which rublk is built with");
            let mut install =
                command("apt-get", &["install", "-y", "-q", "--no-install-recommends", "libclang-dev"]);
            output(install.env("DEBIAN_FRONTEND", "noninteractive"))?;
        }
        eprintln!("bench: building rublk {RUBLK_VERSION}");
        let install =
            ["install", "--locked", "rublk", "--version", RUBLK_VERSION, "--no-default-features", "--root"];
        run(cargo(&install).arg(&root))?;
    }
    Ok(program)
}

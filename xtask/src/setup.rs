//! `cargo xtask setup`: the Debian packages and cargo tools that tests, demo and benchmarks call.

use anyhow::{Result, bail};

use crate::shell::{cargo, command, installed, is_root, run};

/// A program that must be in PATH, and the Debian package that brings it.
const PACKAGES: &[(&str, &str)] = &[
    ("btrfs", "btrfs-progs"),
    ("runc", "runc"),
    ("nginx", "nginx-light"),
    ("debootstrap", "debootstrap"),
    ("fio", "fio"),
    ("setfattr", "attr"),
    ("setfacl", "acl"),
    ("curl", "curl"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("bzip2", "bzip2"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("cc", "build-essential"),
];

/// What only builds need.
const BUILD_ONLY: &[&str] = &["build-essential", "debootstrap"];

/// Programs and packages that a virtual machine's guest needs as well.
pub(crate) fn guest_packages() -> impl Iterator<Item = (&'static str, &'static str)> {
    PACKAGES.iter().copied().filter(|(_, package)| !BUILD_ONLY.contains(package))
}

/// Installs what is missing.
pub(crate) fn run_setup() -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(program, _)| !installed(program)).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        if !is_root() || !installed("apt-get") {
            bail!("missing: {}; install them, or run this as root on Debian", missing.join(" "));
        }
        eprintln!("setup: installing {}", missing.join(" "));
        run(&mut command("apt-get", &["update", "-q"]))?;
        let mut install =
            command("apt-get", &["install", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]);
        run(install.args(&missing).env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    if !installed("cargo-nextest")
        && cargo(&["nextest", "--version"]).output().is_ok_and(|o| !o.status.success())
    {
        eprintln!("setup: installing cargo-nextest");
        run(&mut cargo(&["install", "--locked", "cargo-nextest"]))?;
    }
    Ok(())
}

/// The task: no options.
pub(crate) fn run_task(arguments: &[String]) -> Result<()> {
    if let Some(unknown) = arguments.first() {
        bail!("unknown option '{unknown}'");
    }
    run_setup()?;
    eprintln!("setup: everything is there");
    Ok(())
}

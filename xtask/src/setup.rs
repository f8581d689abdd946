//! `cargo xtask setup`: the Debian packages and cargo tools that tests, demo and benchmarks call.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

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
    ("nbdkit", "nbdkit"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    ("qemu-img", "qemu-utils"),
    ("nbd-server", "nbd-server"),
    ("nbd-client", "nbd-client"),
    ("openssl", "openssl"),
];

/// What only builds and the tests on this machine need: NBD servers and copiers do not depend on the kernel.
const HOST_ONLY: &[&str] = &[
    "build-essential",
    "debootstrap",
    "libnbd-bin",
    "nbd-server",
    "nbdkit",
    "openssl",
    "python3-libnbd",
    "qemu-utils",
];

/// Programs and packages that a virtual machine's guest needs as well.
pub(crate) fn guest_packages() -> impl Iterator<Item = (&'static str, &'static str)> {
    PACKAGES.iter().copied().filter(|(_, package)| !HOST_ONLY.contains(package))
}

/// What package scripts ask before they start a service; 101 means no (`/usr/share/doc/init-system-helpers`).
const POLICY: &str = "/usr/sbin/policy-rc.d";
const NO_SERVICES: &str = "#!/bin/sh\nexit 101\n";

/// While it lives, packages that are installed start no services: tests start their own nginx and nbd-server.
struct NoServices {
    /// Not the administrator's.
    ours: bool,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            std::fs::write(POLICY, NO_SERVICES).with_context(|| format!("cannot write {POLICY}"))?;
            std::fs::set_permissions(POLICY, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(NoServices { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = std::fs::remove_file(POLICY)
        {
            eprintln!("setup: remove {POLICY}, which keeps services from starting: {error}");
        }
    }
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
        let _no_services = NoServices::begin()?;
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

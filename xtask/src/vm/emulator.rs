//! QEMU: found, or fetched with its libraries into a folder of its own; and whether KVM boots a kernel here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::kernel::Kernel;
use super::{cpio, whole};
use crate::shell::{describe, installed, output};

/// The oldest that will do: 7.2 crashes stock kernels under multi-threaded emulation.
const MAJOR_VERSION: u32 = 10;
const PROGRAM: &str = "qemu-system-x86_64";
/// Where QEMU 10 is for Debian 12.
const SUITE: &str = "bookworm-backports";

/// How long a kernel under KVM may take to say a word. It takes one second where KVM works.
const TRIAL: Duration = Duration::from_secs(10);
const TRIAL_WORD: &str = "kvm works";

/// Everything that QEMU emulates but fast string instructions, which it runs byte by byte: a kernel that is told that
/// they are fast copies with them. Without them reads from tmpfs are 2.5 (4 KiB) to 4 times (1 MiB) and reads of
/// /dev/zero 8 times as fast. Every side of a comparison has the same processor.
const TCG_PROCESSOR: &str = "max,-erms,-fsrm,-fsrs,-fzrm,-fsrc";

/// How processors are had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// Hardware.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// QEMU's options.
    pub(super) fn options(self) -> [&'static str; 4] {
        match self {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accelerator::Tcg => ["-accel", "tcg,thread=multi", "-cpu", TCG_PROCESSOR],
        }
    }
}

/// A QEMU that can be started.
pub(super) struct Emulator {
    program: PathBuf,
    /// Where it and its libraries were unpacked; none for one that is installed.
    unpacked: Option<PathBuf>,
    version: String,
}

impl Emulator {
    /// The installed one where it is new enough, else one that is fetched.
    pub(super) fn find(directory: &Path) -> Result<Emulator> {
        if installed(PROGRAM) {
            let emulator = Emulator { program: PROGRAM.into(), unpacked: None, version: String::new() };
            if let Ok(emulator) = emulator.asked() {
                return Ok(emulator);
            }
        }
        let unpacked = directory.join("qemu");
        if !unpacked.exists() {
            whole(&unpacked, |partial| {
                let apt = Apt::open(directory)?;
                eprintln!("vm: fetching QEMU");
                apt.unpack_closure("qemu-system-x86", SUITE, partial)
            })
            .context("fetching QEMU for the virtual machine")?;
        }
        let program = unpacked.join("usr/bin").join(PROGRAM);
        Emulator { program, unpacked: Some(unpacked), version: String::new() }.asked()
    }

    /// With its version, if that will do.
    fn asked(mut self) -> Result<Emulator> {
        let text = output(self.command().arg("--version"))?;
        self.version = text.lines().next().unwrap_or_default().to_string();
        match major_version(&text) {
            Some(major) if major >= MAJOR_VERSION => Ok(self),
            _ => bail!("QEMU {MAJOR_VERSION} or newer is needed, this is: {}", self.version),
        }
    }

    /// QEMU, which is killed when the thread that starts it ends: no virtual machine outlives its task.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program).stdin(Stdio::null());
        if let Some(unpacked) = &self.unpacked {
            let libraries =
                ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|part| unpacked.join(part));
            command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap_or_default());
            for data in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(unpacked.join(data));
            }
        }
        command
    }

    /// KVM where a kernel boots under it, which is tried once and remembered: a device node alone says nothing.
    pub(super) fn accelerator(&self, directory: &Path, kernel: &Kernel) -> Result<Accelerator> {
        if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Accelerator::Tcg);
        }
        let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let key = format!("{}, {}, on {}: ", self.version, kernel.release, host.trim());
        let path = directory.join("accelerator");
        let known = fs::read_to_string(&path).unwrap_or_default();
        let verdict = known.lines().find_map(|line| line.strip_prefix(&key));
        let works = match verdict {
            Some(verdict) => verdict == "kvm",
            None => {
                eprintln!("vm: trying KVM");
                let works = self.boots_under_kvm(directory, kernel)?;
                let line = format!("{known}{key}{}\n", if works { "kvm" } else { "tcg" });
                fs::write(&path, line)?;
                works
            }
        };
        Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
    }

    fn boots_under_kvm(&self, directory: &Path, kernel: &Kernel) -> Result<bool> {
        let mut archive = cpio::Archive::default();
        archive.file("init", true, format!("#!/bin/busybox sh\necho {TRIAL_WORD}\n").as_bytes());
        let initramfs = directory.join("trial.cpio");
        let base = fs::read(&kernel.initramfs)?;
        fs::write(&initramfs, [base, archive.finish()].concat())?;
        let mut qemu = self.command();
        qemu.args(Accelerator::Kvm.options());
        qemu.args(["-M", "q35", "-m", "512M", "-smp", "2", "-nodefaults", "-no-user-config", "-no-reboot"]);
        qemu.args(["-display", "none", "-serial"])
            .arg(format!("file:{}", directory.join("trial.log").display()));
        qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initramfs);
        qemu.args(["-append", "console=ttyS0 panic=-1 quiet"]).stderr(Stdio::null());
        let mut process = qemu.spawn().with_context(|| format!("cannot start `{}`", describe(&qemu)))?;
        let started = Instant::now();
        while started.elapsed() < TRIAL && process.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = process.kill();
        process.wait()?;
        let log = fs::read(directory.join("trial.log")).unwrap_or_default();
        Ok(String::from_utf8_lossy(&log).contains(TRIAL_WORD))
    }
}

/// The 10 of `QEMU emulator version 10.0.2 (Debian ...)`.
fn major_version(text: &str) -> Option<u32> {
    let version = text.split("version ").nth(1)?;
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::major_version;

    #[test]
    fn the_version_is_read_from_what_qemu_prints() {
        assert_eq!(major_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(major_version("something else"), None);
    }
}

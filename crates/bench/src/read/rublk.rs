//! rublk, the reference server of ublk, as a child in the foreground, so that its processor time is known.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::timed;

/// Device numbers from here on: other users of ublk count from 0.
const FIRST_NUMBER: u32 = 40;
const NUMBERS: u32 = 16;
/// How long a device may take to come, and its server to end.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// A device that rublk serves; removed when dropped.
pub(super) struct Rublk {
    process: Child,
    number: u32,
}

impl Rublk {
    /// `rublk add ARGUMENTS` with `queues` queues and blocks of 4 KiB.
    pub(super) fn start(queues: u16, arguments: &[&str]) -> Result<Self> {
        let found = Command::new("rublk").arg("--version").stdout(Stdio::null()).status();
        ensure!(found.is_ok_and(|status| status.success()), "rublk is not in PATH (cargo install rublk)");
        ensure!(Path::new("/dev/ublk-control").exists(), "no /dev/ublk-control (modprobe ublk_drv)");
        let taken = |number: &u32| !path(*number).exists();
        let number = (FIRST_NUMBER..FIRST_NUMBER + NUMBERS).find(taken).context("no free ublk number")?;
        let mut command = Command::new("rublk");
        command.arg("add").args(arguments).args(["--foreground", "--logical-block-size", "4096"]);
        command.args(["--number", &number.to_string(), "--queue", &queues.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let process = command.spawn().context("cannot start rublk")?;
        let mut rublk = Rublk { process, number };
        let started = Instant::now();
        while !rublk.is_there() {
            if let Some(status) = rublk.process.try_wait()? {
                let mut said = String::new();
                if let Some(stderr) = &mut rublk.process.stderr {
                    std::io::Read::read_to_string(stderr, &mut said)?;
                }
                bail!("rublk ended with {status}: {}", said.trim());
            }
            ensure!(started.elapsed() < PATIENCE, "rublk made no device");
            std::thread::sleep(POLL);
        }
        Ok(rublk)
    }

    fn is_there(&self) -> bool {
        let size = std::fs::read_to_string(format!("/sys/block/ublkb{}/size", self.number));
        size.is_ok_and(|size| size.trim() != "0") && std::fs::File::open(self.device()).is_ok()
    }

    pub(super) fn device(&self) -> PathBuf {
        path(self.number)
    }

    pub(super) fn process(&self) -> u32 {
        self.process.id()
    }
}

fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

impl Drop for Rublk {
    fn drop(&mut self) {
        let gone = timed(Command::new("rublk").args(["del", "-n", &self.number.to_string()]));
        let started = Instant::now();
        while gone.is_ok() && started.elapsed() < PATIENCE {
            if matches!(self.process.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        eprintln!("loam bench: rublk of {} had to be killed", self.device().display());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

//! The servers that are compared, each a process of its own on a Unix socket.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::wire;

/// How long a server may take until it answers, and to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(2);
/// The most characters of the first line that a server said.
const SAID_MAX: usize = 300;

/// The program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Kind {
    Loam,
    Nbdkit,
    QemuNbd,
    /// The bare loop, without a device.
    Echo,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Kind::Loam => "loam",
            Kind::Nbdkit => "nbdkit",
            Kind::QemuNbd => "qemu-nbd",
            Kind::Echo => "echo",
        })
    }
}

/// A server that runs; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts `command`, which is to serve an export "" on `socket`, and waits until it answers. What it says goes to a
    /// file beside the socket.
    pub(crate) fn start(mut command: Command, socket: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let said = socket.with_extension("said");
        let log = File::create(&said).with_context(|| format!("cannot make {}", said.display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().with_context(|| format!("cannot start {name}: is it installed?"))?;
        let mut server = Server { process, socket: socket.to_path_buf() };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Err(error) = wire::connect(socket, "", false) else { return Ok(server) };
            let ended = server.process.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let said = std::fs::read_to_string(&said).unwrap_or_default();
                let said: String = said.lines().next().unwrap_or_default().chars().take(SAID_MAX).collect();
                bail!("{name} does not serve ({error:#}): {said}");
            }
            std::thread::sleep(TICK);
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// As clients are given it.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.process.id()
    }

    /// Bytes of memory that it has now.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kilobytes.context("a process's status tells VmRSS")? * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        while Instant::now() < deadline {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(TICK);
        }
        eprintln!("loam bench: the server on {} did not end: killed", self.socket.display());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command of the binary that runs now.
pub(crate) fn loam() -> Result<Command> {
    Ok(Command::new(std::env::current_exe().context("this program's own path")?))
}

/// What is served: its bytes come from memory, from a file, or from nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Device {
    Memory(u64),
    File(PathBuf),
    Null(u64),
}

/// The command that serves a device to up to `connections` clients; `None` where the program has no such device.
pub(crate) fn command(
    kind: Kind,
    device: &Device,
    socket: &Path,
    connections: u32,
) -> Result<Option<Command>> {
    let mut command = match kind {
        Kind::Loam | Kind::Echo => loam()?,
        Kind::Nbdkit => Command::new("nbdkit"),
        Kind::QemuNbd => Command::new("qemu-nbd"),
    };
    let path = socket.as_os_str();
    match kind {
        Kind::Echo => {
            let Device::Null(size) = device else { return Ok(None) };
            command.args(["bench", "nbd-echo"]).arg(path).arg(size.to_string());
        }
        Kind::Loam => {
            let spec = match device {
                Device::Memory(size) => format!("memory:{size}"),
                Device::File(path) => format!("file:{}", path.display()),
                Device::Null(size) => format!("null:{size}"),
            };
            command.args(["serve", &spec, "--nbd", &format!("unix:{}", socket.display())]);
            command.arg(format!("--max-connections={connections}"));
        }
        Kind::Nbdkit => {
            command.args(["--foreground", "--unix"]).arg(path);
            match device {
                Device::Memory(size) => command.arg("memory").arg(size.to_string()),
                Device::File(path) => command.arg("file").arg(path),
                Device::Null(size) => command.arg("null").arg(size.to_string()),
            };
        }
        Kind::QemuNbd => {
            command.args(["--persistent", &format!("--shared={connections}"), "--socket"]).arg(path);
            match device {
                Device::Memory(_) => return Ok(None),
                Device::File(path) => command.args(["--format=raw", "--discard=unmap"]).arg(path),
                Device::Null(size) => {
                    command.arg("--image-opts").arg(format!("driver=null-co,size={size},read-zeroes=on"))
                }
            };
        }
    }
    Ok(Some(command))
}

//! The least that a FUSE server of one file can be: it answers every read from memory, straight out of the data, with
//! one read and one writev. What the transport costs at best; loam is measured against it.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use loam_attach::fuse::{self, Action, REPLY_BYTES, Session, wire};
use loam_sys::loopdev::{self, LoopConfig};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

/// The name of the one file.
const NAME: &str = "bare";
/// As loam's own transport has it.
const MAX_BACKGROUND: u16 = 256;

/// `loam bench bare-server`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Its bytes are served.
    data: PathBuf,
}

/// Serves until standard input ends; prints the block device first.
pub(crate) fn run(options: &Options) -> Result<()> {
    let data =
        std::fs::read(&options.data).with_context(|| format!("cannot read {}", options.data.display()))?;
    let size = data.len() as u64;
    let connection = fuse::connect()?;
    let shared =
        Arc::new((connection.channel, Session::new(NAME, size, fuse::MAX_READ, MAX_BACKGROUND), data));
    for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || serve(&shared.0, &shared.1, &shared.2));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(connection.mount.as_fd(), NAME, flags, Mode::empty())?;
    let device = loopdev::attach(&LoopConfig {
        backing: file.as_fd(),
        read_only: true,
        direct_io: true,
        autoclear: true,
        block_size: 4096,
        offset: 0,
        size_limit: 0,
    })?;
    println!("{}", device.path().display());
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn serve(channel: &OwnedFd, session: &Session, data: &[u8]) {
    let mut request = vec![0; wire::MIN_READ_BUFFER];
    let mut reply = [0; REPLY_BYTES];
    loop {
        let length = match rustix::io::read(channel, &mut request) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
            Err(_) => return,
        };
        let sent = match session.handle(&request[..length], &mut reply) {
            Action::Read { unique, offset, length } => {
                let bytes = &data[offset as usize..][..length as usize];
                let len = (size_of::<wire::OutHeader>() + bytes.len()) as u32;
                let header = wire::OutHeader { len, error: 0, unique };
                rustix::io::writev(channel, &[IoSlice::new(header.as_bytes()), IoSlice::new(bytes)])
            }
            Action::Reply(length) | Action::Begin(length, _) => rustix::io::write(channel, &reply[..length]),
            Action::Nothing | Action::Malformed => Ok(0),
        };
        if sent == Err(Errno::NODEV) {
            return;
        }
    }
}

/// The server in a process of its own, as a loam daemon is; it ends when dropped.
pub(crate) struct BareServer {
    process: Child,
    input: Option<ChildStdin>,
    device: PathBuf,
}

impl BareServer {
    /// Serves the bytes of `data`.
    pub(crate) fn start(data: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "bare-server"]).arg(data).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start the bare server")?;
        let input = process.stdin.take();
        let output = process.stdout.take().context("a pipe was asked for")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let server = BareServer { process, input, device: PathBuf::from(line.trim_end()) };
        ensure!(File::open(&server.device).is_ok(), "the bare server did not start");
        Ok(server)
    }

    /// Its block device.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for BareServer {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.process.wait();
    }
}

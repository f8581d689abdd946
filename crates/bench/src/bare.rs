//! The least that a FUSE server of one file can be: it answers every read from memory, straight out of the data, with
//! one read and one writev. What the transport costs at best; loam is measured against it.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use loam_attach::fuse::{self, Action, REPLY_BYTES, Session, wire};
use loam_sys::loopdev::{self, LoopConfig, LoopDevice};
use loam_sys::map_file::MappedFile;
use loam_sys::mount;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::serve::Server;

/// The name of the one file.
const NAME: &str = "bare";
/// As loam's own transport has it.
const MAX_BACKGROUND: u16 = 256;

/// `loam bench bare-server`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Its bytes are served.
    data: PathBuf,
    /// Mount the file system on this directory, instead of a loop device on its file.
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
}

/// Serves until standard input ends; prints the file or block device first.
pub(crate) fn run(options: &Options) -> Result<()> {
    let file = File::open(&options.data);
    let file = file.with_context(|| format!("cannot open {}", options.data.display()))?;
    let data = MappedFile::map(&file).with_context(|| format!("cannot map {}", options.data.display()))?;
    let connection = fuse::connect()?;
    let session = Session::new(NAME, data.len() as u64, fuse::MAX_READ, MAX_BACKGROUND);
    let shared = Arc::new((connection.channel, session, data));
    for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || serve(&shared.0, &shared.1, &shared.2));
    }
    match &options.mount {
        Some(directory) => {
            std::fs::create_dir_all(directory)?;
            mount::attach(connection.mount.as_fd(), directory)?;
            // A descriptor into it would keep it busy.
            drop(connection.mount);
            until_input_ends(&directory.join(NAME))?;
            Ok(mount::unmount(directory)?)
        }
        None => {
            let device = on_loop(connection.mount.as_fd())?;
            until_input_ends(&device.path())
        }
    }
}

/// A loop device on the file of a detached mount.
fn on_loop(mount: BorrowedFd<'_>) -> Result<LoopDevice> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(mount, NAME, flags, Mode::empty())?;
    Ok(loopdev::attach(&LoopConfig {
        backing: file.as_fd(),
        read_only: true,
        direct_io: true,
        autoclear: true,
        block_size: 4096,
        offset: 0,
        size_limit: 0,
    })?)
}

fn until_input_ends(served: &Path) -> Result<()> {
    println!("{}\n", served.display());
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

/// The server in a process of its own, as a loam daemon is.
pub(crate) struct BareServer;

impl BareServer {
    /// Serves the bytes of `data` as a loop device.
    pub(crate) fn on_loop(data: &Path) -> Result<Server> {
        Server::spawn(&["bare-server".into(), data.display().to_string()])
    }

    /// Serves the bytes of `data` as a file in `directory`.
    pub(crate) fn mounted(data: &Path, directory: &Path) -> Result<Server> {
        let directory = directory.display().to_string();
        Server::spawn(&["bare-server".into(), data.display().to_string(), "--mount".into(), directory])
    }
}

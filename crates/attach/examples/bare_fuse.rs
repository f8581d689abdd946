//! The least that a FUSE server can do, as a yardstick for loam's: threads that read a request and, when it is a READ,
//! answer with a buffer that never changes. No device, no look-up, no copying, no checks. The file is as large as
//! loam's and lies under a loop device that is set up in the same way.
//!
//! ```text
//! bare_fuse [THREADS]     serves until standard input is closed; prints the loop device
//! ```

use std::ffi::OsStr;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use loam_attach::fuse::wire::{InHeader, OutHeader, ReadIn, opcode};
use loam_attach::fuse::{Action, MAX_READ, REPLY_BYTES, Session, connect};
use loam_sys::loopdev::{self, LoopConfig};
use rustix::fs::{Mode, OFlags};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the file: 1 TiB and 4 EiB.
const SIZE: u64 = (1 << 40) + (1 << 62);
const NAME: &str = "bare";
/// As loam's server asks for.
const MAX_BACKGROUND: u16 = 256;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let threads = match std::env::args().nth(1) {
        Some(number) => number.parse()?,
        None => std::thread::available_parallelism()?.get().min(4),
    };
    let connection = connect()?;
    let channel = Arc::new(connection.channel);
    for _ in 0..threads {
        let channel = Arc::clone(&channel);
        std::thread::spawn(move || serve(&channel));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&connection.mount, OsStr::new(NAME), flags, Mode::empty())?;
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
    device.clear()?;
    Ok(())
}

fn serve(channel: &OwnedFd) {
    let session = Session::new(NAME, SIZE, MAX_READ, MAX_BACKGROUND);
    let data = vec![0x5a; MAX_READ as usize];
    let mut request = vec![0; 8192];
    let mut reply = [0; REPLY_BYTES];
    while let Ok(length) = rustix::io::read(channel, &mut request) {
        let message = &request[..length];
        let Ok((header, body)) = InHeader::read_from_prefix(message) else { return };
        if header.opcode == opcode::READ {
            let Ok((read, _)) = ReadIn::read_from_prefix(body) else { return };
            let bytes = &data[..read.size as usize];
            let answer = OutHeader { len: 16 + read.size, error: 0, unique: header.unique };
            let _ = rustix::io::writev(channel, &[IoSlice::new(answer.as_bytes()), IoSlice::new(bytes)]);
        } else if let Action::Reply(length) | Action::Begin(length, _) = session.handle(message, &mut reply) {
            let _ = rustix::io::write(channel, &reply[..length]);
        }
    }
}

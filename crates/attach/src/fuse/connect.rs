//! The kernel's side of a connection: a FUSE filesystem that is mounted nowhere. Only descriptors lead into it, so no
//! mount namespace can pin it and nothing is left to clean up when they are closed.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use loam_sys::mount::{FsContext, MountFlags};
use rustix::fs::{Mode, OFlags};

use crate::Result;

const DEVICE: &str = "/dev/fuse";

/// A connection whose server has yet to start.
#[derive(Debug)]
pub struct Connection {
    /// Where requests are read from and replies are written to.
    pub channel: OwnedFd,
    /// The detached mount.
    pub mount: OwnedFd,
}

/// Makes a connection. The filesystem lives as long as `mount`, or a file opened in it, is open; the connection as long
/// as a duplicate of `channel` is.
///
/// # Errors
/// Without CAP_SYS_ADMIN, without FUSE in the kernel, or before Linux 5.2.
pub fn connect() -> Result<Connection> {
    let channel = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| loam_sys::Error::new("open", DEVICE, error))?;
    let channel = OwnedFd::from(channel);
    let context = FsContext::open("fuse")?;
    context.set("source", "loam")?;
    context.set("fd", channel.as_raw_fd().to_string())?;
    context.set("rootmode", "40000")?;
    context.set("user_id", rustix::process::getuid().as_raw().to_string())?;
    context.set("group_id", rustix::process::getgid().as_raw().to_string())?;
    context.create()?;
    let flags = MountFlags { read_only: true, no_access_time: true, no_set_user_id: true, no_devices: true };
    let mount = context.mount(flags)?;
    Ok(Connection { channel, mount })
}

/// Opens the file. Its server must be running: this waits for its answers.
pub(crate) fn open_file(mount: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(mount.as_fd(), name, flags, Mode::empty());
    Ok(file.map_err(|error| loam_sys::Error::new("openat", format!("{name:?} of the FUSE mount"), error))?)
}

//! Changes that are asked for from within a subvolume that is at its limit.
//!
//! Newer kernels reserve the room that a change of the quota tree takes in the name of the subvolume that the descriptor lies
//! in, and refuse with `EDQUOT` when that is full: nobody could raise its limit. Asked through a descriptor of the top level
//! they comply. The top level need not be mounted anywhere: a mount of it that nothing is attached to will do.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use loam_sys::btrfs;
use loam_sys::mount::{FsContext, MountFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::error::{Error, Result};
use super::kernel;

/// Makes the call with `root`, and where the quota of the subvolume that it lies in forbids that, through the top level.
pub(super) fn at_limit_too<T>(
    path: &Path,
    root: &File,
    call: impl Fn(&File) -> loam_sys::Result<T>,
) -> Result<T> {
    match kernel(path, call(root)) {
        Err(error) if error.errno() == Some(Errno::DQUOT) => {
            let top_level = open(path, root)?;
            kernel(path, call(&top_level))
        }
        result => result,
    }
}

fn open(path: &Path, root: &File) -> Result<File> {
    let info = kernel(path, btrfs::filesystem_info(root))?;
    for id in 1..=info.max_device_id {
        let Some(device) = kernel(path, btrfs::device_info(root, id))? else { continue };
        let context = kernel(path, FsContext::open("btrfs"))?;
        kernel(path, context.set("source", &device.path))?;
        kernel(path, context.set("subvolid", btrfs::TOP_LEVEL.to_string()))?;
        kernel(path, context.create())?;
        let mount = kernel(path, context.mount(MountFlags::default()))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(mount.as_fd(), ".", flags, Mode::empty());
        let failed = |error: Errno| Error::Open { path: path.to_owned(), source: error.into() };
        return Ok(File::from(opened.map_err(failed)?));
    }
    let source = std::io::Error::other("the kernel names no device of this filesystem");
    Err(Error::Open { path: path.to_owned(), source })
}

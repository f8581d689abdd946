//! `loam range clone`: a file that is a run of addresses.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use loam_sys::btrfs;
use rustix::fs::{AtFlags, CWD, IFlags, OFlags};

use crate::client::Client;
use crate::directory::PoolDirectory;
use crate::error::{Context, Error, Result};
use crate::kernel::VIRTUAL_DATA;
use crate::protocol::Status;

/// Makes `file`, anywhere on the pool's filesystem, a clone of `length` bytes from `address`. The file has the same
/// no-checksum flag as the virtual region, without which btrfs refuses the clone; no data is read.
///
/// # Errors
/// [`Error::NotUp`]; addresses that are not multiples of 4096 or lie outside; a file that exists or lies elsewhere.
pub async fn clone_range(directory: &PoolDirectory, address: u64, length: u64, file: &Path) -> Result<()> {
    let status: Status = Client::new(directory).get("/status").await?;
    let mount = status.mount.ok_or_else(|| Error::NotUp(directory.root().to_owned()))?;
    let end = address.checked_add(length);
    if !address.is_multiple_of(loam_space::BLOCK)
        || length == 0
        || !length.is_multiple_of(loam_space::BLOCK)
        || end.is_none_or(|end| end > status.r#virtual.size)
    {
        let why = format!(
            "must be multiples of 4096 within the {} bytes of the address space",
            status.r#virtual.size
        );
        return Err(Error::invalid(format!("{length} bytes at {address}"), why));
    }
    let what = || format!("cloning {length} bytes at {address} to {}", file.display());
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The file gets its name only when it is whole.
    let clone = OpenOptions::new()
        .write(true)
        .mode(0o644)
        .custom_flags(OFlags::TMPFILE.bits() as i32)
        .open(parent)
        .step(what)?;
    let outside =
        |error| Error::step(what(), error).with_hint(format!("the file must lie below {}", mount.display()));
    btrfs::set_inode_flags(&clone, IFlags::NOCOW).map_err(outside)?;
    let data = File::open(mount.join(VIRTUAL_DATA)).step(what)?;
    btrfs::clone_range(&data, address, length, &clone, 0).map_err(outside)?;
    let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&clone));
    rustix::fs::linkat(CWD, descriptor.as_str(), CWD, file, AtFlags::SYMLINK_FOLLOW).step(what)
}

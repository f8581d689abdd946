//! What is done to single files: sharing of extents, and inode flags.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::IFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::{self, Request, WRITE};
use crate::{Error, Result};

pub use rustix::fs::IFlags as InodeFlags;

/// `struct file_clone_range` (`include/uapi/linux/fs.h`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FileCloneRange {
    source: i64,
    source_offset: u64,
    source_length: u64,
    destination_offset: u64,
}

const _: () = assert!(size_of::<FileCloneRange>() == 32);

const FICLONERANGE: Request<FileCloneRange> = Request::sized("FICLONERANGE", WRITE, 0x94, 13);

/// Makes `length` bytes of `destination` share the extents of `source`. All three numbers are multiples of the block
/// size, except that a length may reach to the unaligned end of the source.
///
/// # Errors
/// `EINVAL` for unaligned numbers, or when only one of the files has NODATASUM; `EXDEV` across filesystems; `EDQUOT`.
pub fn clone_range(
    source: impl AsFd,
    source_offset: u64,
    length: u64,
    destination: impl AsFd,
    destination_offset: u64,
) -> Result<()> {
    let mut arguments = FileCloneRange {
        source: i64::from(source.as_fd().as_raw_fd()),
        source_offset,
        source_length: length,
        destination_offset,
    };
    FICLONERANGE.call(destination.as_fd(), &mut arguments, || {
        let (from, to) = (ioctl::describe(source.as_fd()), ioctl::describe(destination.as_fd()));
        format!("{length} bytes at {source_offset} of {from} to {destination_offset} of {to}")
    })?;
    Ok(())
}

/// The flags of an inode, as `lsattr` shows them: NOCOW is what makes a btrfs file NODATASUM.
///
/// # Errors
/// `ENOTTY` where the filesystem has none.
pub fn inode_flags(file: impl AsFd) -> Result<IFlags> {
    rustix::fs::ioctl_getflags(file.as_fd())
        .map_err(|error| Error::new("FS_IOC_GETFLAGS", ioctl::describe(file.as_fd()), error))
}

/// Sets the flags of an inode. NOCOW takes effect on empty files, and on what is created in a directory that has it.
///
/// # Errors
/// `EPERM` for IMMUTABLE without CAP_LINUX_IMMUTABLE; `EOPNOTSUPP`.
pub fn set_inode_flags(file: impl AsFd, flags: IFlags) -> Result<()> {
    rustix::fs::ioctl_setflags(file.as_fd(), flags)
        .map_err(|error| Error::new("FS_IOC_SETFLAGS", ioctl::describe(file.as_fd()), error))
}

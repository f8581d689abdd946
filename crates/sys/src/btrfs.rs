//! btrfs ioctls (`include/uapi/linux/btrfs.h`): subvolumes and snapshots here, devices, quotas and clones in the
//! submodules. Each takes a descriptor of any file or directory of the filesystem unless it says otherwise.

mod device;
mod file;
pub mod quota;
mod search;

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub use device::{
    DeviceInfo, FilesystemInfo, add_device, device_info, filesystem_info, forget_device, scan_device, sync,
};
pub use file::{InodeFlags, clone_range, inode_flags, set_inode_flags};
pub use quota::{
    QgroupUsage, QuotaMode, disable_quota, enable_quota, limit_subvolume, qgroup_usage, quota_mode,
};
pub use search::{Item, Key, tree_search, tree_search_since};

use crate::ioctl::{self, READ, Request, WRITE};
use crate::{Error, Result};

const MAGIC: u8 = 0x94;
/// The longest name of a subvolume in bytes (BTRFS_VOL_NAME_MAX).
pub const NAME_MAX: usize = 255;
/// The longest name in struct btrfs_ioctl_vol_args_v2, which is more than a directory entry may have.
const SUBVOL_NAME_MAX: usize = 4039;
/// The most children of one subvolume that [`children`] lists.
const MAX_CHILDREN: usize = 1 << 20;
/// Entries in one answer of GET_SUBVOL_ROOTREF.
const ROOTREFS: usize = 255;
/// The id of the top-level subvolume (BTRFS_FS_TREE_OBJECTID).
pub const TOP_LEVEL: u64 = 5;
/// The inode number of every subvolume's root directory (BTRFS_FIRST_FREE_OBJECTID).
pub const ROOT_INODE: u64 = 256;

const SUBVOL_READ_ONLY: u64 = 1 << 1;
const SUBVOL_SPEC_BY_ID: u64 = 1 << 4;

/// `struct btrfs_ioctl_vol_args_v2`, with the union of names and ids as bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct VolArgs2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; SUBVOL_NAME_MAX + 1],
}

/// `struct btrfs_ioctl_timespec`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Timespec {
    seconds: u64,
    nanoseconds: u32,
    padding: u32,
}

/// `struct btrfs_ioctl_get_subvol_info_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SubvolInfoArgs {
    treeid: u64,
    name: [u8; NAME_MAX + 1],
    parent_id: u64,
    dirid: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    ctransid: u64,
    otransid: u64,
    stransid: u64,
    rtransid: u64,
    times: [Timespec; 4],
    reserved: [u64; 8],
}

/// `struct btrfs_ioctl_get_subvol_rootref_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RootrefArgs {
    min_treeid: u64,
    rootref: [[u64; 2]; ROOTREFS],
    num_items: u8,
    align: [u8; 7],
}

const _: () = assert!(size_of::<VolArgs2>() == 4096);
const _: () = assert!(size_of::<SubvolInfoArgs>() == 504);
const _: () = assert!(size_of::<RootrefArgs>() == 4096);

const SNAP_CREATE_V2: Request<VolArgs2> = Request::sized("BTRFS_IOC_SNAP_CREATE_V2", WRITE, MAGIC, 23);
const SUBVOL_CREATE_V2: Request<VolArgs2> = Request::sized("BTRFS_IOC_SUBVOL_CREATE_V2", WRITE, MAGIC, 24);
const SUBVOL_GETFLAGS: Request<u64> = Request::sized("BTRFS_IOC_SUBVOL_GETFLAGS", READ, MAGIC, 25);
const SUBVOL_SETFLAGS: Request<u64> = Request::sized("BTRFS_IOC_SUBVOL_SETFLAGS", WRITE, MAGIC, 26);
const GET_SUBVOL_INFO: Request<SubvolInfoArgs> = Request::sized("BTRFS_IOC_GET_SUBVOL_INFO", READ, MAGIC, 60);
const GET_SUBVOL_ROOTREF: Request<RootrefArgs> =
    Request::sized("BTRFS_IOC_GET_SUBVOL_ROOTREF", READ | WRITE, MAGIC, 61);
const SNAP_DESTROY_V2: Request<VolArgs2> = Request::sized("BTRFS_IOC_SNAP_DESTROY_V2", WRITE, MAGIC, 63);

/// What a subvolume is, from GET_SUBVOL_INFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubvolumeInfo {
    /// The number of its tree: unique for ever in this filesystem.
    pub id: u64,
    /// Its name in the directory that holds it; empty for the top level and for a deleted one.
    pub name: OsString,
    /// The subvolume that holds it; 0 for the top level and for a deleted one.
    pub parent_id: u64,
    /// The transaction of its last change.
    pub generation: u64,
    /// Read-only.
    pub read_only: bool,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// The UUID of the subvolume that it is a snapshot of; zeroes for none.
    pub parent_uuid: [u8; 16],
}

fn named(name: &OsStr, call: &'static str) -> Result<VolArgs2> {
    let bytes = name.as_bytes();
    let bad =
        bytes.is_empty() || bytes.len() > NAME_MAX || bytes.iter().any(|&byte| byte == 0 || byte == b'/');
    if bad {
        let subject = format!("the name {name:?}");
        return Err(Error::new(call, subject, std::io::Error::from_raw_os_error(libc::EINVAL)));
    }
    let mut arguments = VolArgs2::new_zeroed();
    for (place, byte) in arguments.name.iter_mut().zip(bytes) {
        *place = *byte;
    }
    Ok(arguments)
}

fn within(directory: &impl AsFd, name: &OsStr) -> String {
    format!("{name:?} in {}", ioctl::describe(directory.as_fd()))
}

/// Creates an empty subvolume `name` in `directory`.
///
/// # Errors
/// `EEXIST`; `EROFS` and `EDQUOT` of the filesystem; `EINVAL` for a name with a slash.
pub fn create_subvolume(directory: impl AsFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = name.as_ref();
    let mut arguments = named(name, "BTRFS_IOC_SUBVOL_CREATE_V2")?;
    SUBVOL_CREATE_V2.call(directory.as_fd(), &mut arguments, || within(&directory, name))?;
    Ok(())
}

/// Makes `name` in `directory` a snapshot of the subvolume whose root directory is `source`.
///
/// # Errors
/// As [`create_subvolume`]; `EINVAL` when `source` is not a subvolume's root.
pub fn snapshot(
    source: impl AsFd,
    directory: impl AsFd,
    name: impl AsRef<OsStr>,
    read_only: bool,
) -> Result<()> {
    let name = name.as_ref();
    let mut arguments = named(name, "BTRFS_IOC_SNAP_CREATE_V2")?;
    arguments.fd = i64::from(source.as_fd().as_raw_fd());
    arguments.flags = if read_only { SUBVOL_READ_ONLY } else { 0 };
    SNAP_CREATE_V2.call(directory.as_fd(), &mut arguments, || {
        format!("{} from {}", within(&directory, name), ioctl::describe(source.as_fd()))
    })?;
    Ok(())
}

/// Deletes the subvolume `name` in `directory`; one that holds others is refused. Space is freed in the background.
///
/// # Errors
/// `ENOENT`; `ENOTEMPTY` when it holds subvolumes; `EPERM` for the default subvolume.
pub fn delete_subvolume(directory: impl AsFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = name.as_ref();
    let mut arguments = named(name, "BTRFS_IOC_SNAP_DESTROY_V2")?;
    SNAP_DESTROY_V2.call(directory.as_fd(), &mut arguments, || within(&directory, name))?;
    Ok(())
}

/// Deletes the subvolume `id`, wherever it is. `filesystem` is a descriptor of a directory whose mount reaches it.
///
/// # Errors
/// As [`delete_subvolume`].
pub fn delete_subvolume_by_id(filesystem: impl AsFd, id: u64) -> Result<()> {
    let mut arguments = VolArgs2::new_zeroed();
    arguments.flags = SUBVOL_SPEC_BY_ID;
    for (place, byte) in arguments.name.iter_mut().zip(id.to_ne_bytes()) {
        *place = byte;
    }
    SNAP_DESTROY_V2.call(filesystem.as_fd(), &mut arguments, || {
        format!("subvolume {id} of {}", ioctl::describe(filesystem.as_fd()))
    })?;
    Ok(())
}

/// Whether the subvolume whose root directory is `subvolume` is read-only.
///
/// # Errors
/// `EINVAL` when it is not a subvolume's root.
pub fn is_read_only(subvolume: impl AsFd) -> Result<bool> {
    Ok(subvolume_flags(&subvolume)? & SUBVOL_READ_ONLY != 0)
}

/// Makes a subvolume read-only, or writable again.
///
/// # Errors
/// `EINVAL` when it is not a subvolume's root; `ETXTBSY` while files in it are open for writing.
pub fn set_read_only(subvolume: impl AsFd, read_only: bool) -> Result<()> {
    let flags = subvolume_flags(&subvolume)?;
    let mut flags = if read_only { flags | SUBVOL_READ_ONLY } else { flags & !SUBVOL_READ_ONLY };
    SUBVOL_SETFLAGS.call(subvolume.as_fd(), &mut flags, || ioctl::describe(subvolume.as_fd()))?;
    Ok(())
}

fn subvolume_flags(subvolume: &impl AsFd) -> Result<u64> {
    let mut flags = 0;
    SUBVOL_GETFLAGS.call(subvolume.as_fd(), &mut flags, || ioctl::describe(subvolume.as_fd()))?;
    Ok(flags)
}

/// What the subvolume is that the file or directory `file` lies in.
///
/// # Errors
/// `ENOTTY` when it is not btrfs.
pub fn subvolume_info(file: impl AsFd) -> Result<SubvolumeInfo> {
    let mut arguments = SubvolInfoArgs::new_zeroed();
    GET_SUBVOL_INFO.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd()))?;
    let name = arguments.name.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    Ok(SubvolumeInfo {
        id: arguments.treeid,
        name: OsString::from_vec(name),
        parent_id: arguments.parent_id,
        generation: arguments.generation,
        // The root item's own flag (BTRFS_ROOT_SUBVOL_RDONLY), not the ioctl's.
        read_only: arguments.flags & 1 != 0,
        uuid: arguments.uuid,
        parent_uuid: arguments.parent_uuid,
    })
}

/// The ids of the subvolumes that lie directly in the one that `file` belongs to, ascending.
///
/// # Errors
/// `EFBIG` when there are more than a million.
pub fn children(file: impl AsFd) -> Result<Vec<u64>> {
    let mut ids = Vec::new();
    let mut arguments = RootrefArgs::new_zeroed();
    loop {
        let describe = || ioctl::describe(file.as_fd());
        let result = GET_SUBVOL_ROOTREF.call(file.as_fd(), &mut arguments, describe);
        // EOVERFLOW: the answer is full and there is more, from `min_treeid` on.
        let more = match result {
            Ok(_) => false,
            Err(error) if error.errno() == Some(libc::EOVERFLOW) => true,
            Err(error) => return Err(error),
        };
        ids.extend(arguments.rootref.iter().take(usize::from(arguments.num_items)).map(|[id, _]| *id));
        if !more {
            ids.sort_unstable();
            ids.dedup();
            return Ok(ids);
        }
        if ids.len() > MAX_CHILDREN || arguments.num_items == 0 {
            let error = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::new("BTRFS_IOC_GET_SUBVOL_ROOTREF", describe(), error));
        }
    }
}

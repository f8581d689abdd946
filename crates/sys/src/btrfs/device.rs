//! Devices of a filesystem: making them known, adding them, asking about them.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::MAGIC;
use crate::ioctl::{self, READ, Request, WRITE};
use crate::{Error, Result};

/// The device through which others are made known.
const CONTROL: &str = "/dev/btrfs-control";
/// The longest path of a device in bytes (BTRFS_PATH_NAME_MAX).
const PATH_MAX: usize = 4087;

/// `struct btrfs_ioctl_vol_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [u8; PATH_MAX + 1],
}

/// `struct btrfs_ioctl_fs_info_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FsInfoArgs {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    nodesize: u32,
    sectorsize: u32,
    clone_alignment: u32,
    csum_type: u16,
    csum_size: u16,
    flags: u64,
    generation: u64,
    metadata_uuid: [u8; 16],
    reserved: [u8; 944],
}

/// `struct btrfs_ioctl_dev_info_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DevInfoArgs {
    devid: u64,
    uuid: [u8; 16],
    bytes_used: u64,
    total_bytes: u64,
    fsid: [u8; 16],
    unused: [u64; 377],
    path: [u8; 1024],
}

const _: () = assert!(size_of::<VolArgs>() == 4096);
const _: () = assert!(size_of::<FsInfoArgs>() == 1024);
const _: () = assert!(size_of::<DevInfoArgs>() == 4096);

const SCAN_DEV: Request<VolArgs> = Request::sized("BTRFS_IOC_SCAN_DEV", WRITE, MAGIC, 4);
const FORGET_DEV: Request<VolArgs> = Request::sized("BTRFS_IOC_FORGET_DEV", WRITE, MAGIC, 5);
const ADD_DEV: Request<VolArgs> = Request::sized("BTRFS_IOC_ADD_DEV", WRITE, MAGIC, 10);
const DEV_INFO: Request<DevInfoArgs> = Request::sized("BTRFS_IOC_DEV_INFO", READ | WRITE, MAGIC, 30);
const FS_INFO: Request<FsInfoArgs> = Request::sized("BTRFS_IOC_FS_INFO", READ, MAGIC, 31);
const SYNC: u32 = ioctl::plain(MAGIC, 8);

/// What a mounted filesystem is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesystemInfo {
    /// Its UUID.
    pub fsid: [u8; 16],
    /// Devices, seeds included.
    pub devices: u64,
    /// The highest device id.
    pub max_device_id: u64,
    /// Bytes of a tree node.
    pub node_size: u32,
    /// Bytes of a data block; clones must be aligned to it.
    pub sector_size: u32,
}

/// One device of a mounted filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number in the filesystem.
    pub id: u64,
    /// Its own UUID.
    pub uuid: [u8; 16],
    /// Bytes given to chunks.
    pub allocated_bytes: u64,
    /// Its size in bytes.
    pub total_bytes: u64,
    /// Its path when it was scanned.
    pub path: PathBuf,
}

fn arguments(path: &Path, call: &'static str) -> Result<VolArgs> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > PATH_MAX {
        let error = std::io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        return Err(Error::new(call, path.display().to_string(), error));
    }
    let mut arguments = VolArgs::new_zeroed();
    for (place, byte) in arguments.name.iter_mut().zip(bytes) {
        *place = *byte;
    }
    Ok(arguments)
}

fn control(request: &Request<VolArgs>, call: &'static str, device: &Path) -> Result<()> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL)
        .map_err(|error| Error::new("open", CONTROL, error))?;
    let mut arguments = arguments(device, call)?;
    request.call(control.as_fd(), &mut arguments, || device.display().to_string())?;
    Ok(())
}

/// Makes the kernel read the superblock of `device` and remember it, so that a mount of a filesystem it belongs to
/// finds it. This reads from the device.
///
/// # Errors
/// `EINVAL` when it holds no btrfs superblock.
pub fn scan_device(device: &Path) -> Result<()> {
    control(&SCAN_DEV, "BTRFS_IOC_SCAN_DEV", device)
}

/// Makes the kernel forget a device that it had scanned and that is not mounted.
///
/// # Errors
/// `ENOENT` when it does not know it, `EBUSY` while it is mounted.
pub fn forget_device(device: &Path) -> Result<()> {
    control(&FORGET_DEV, "BTRFS_IOC_FORGET_DEV", device)
}

/// Adds `device` to the mounted filesystem that `file` lies in (this turns a mounted seed into a writable sprout).
///
/// # Errors
/// `EBUSY` when it is in use; `EROFS` when the filesystem is read-only and no seed.
pub fn add_device(file: impl AsFd, device: &Path) -> Result<()> {
    let mut arguments = arguments(device, "BTRFS_IOC_ADD_DEV")?;
    ADD_DEV.call(file.as_fd(), &mut arguments, || {
        format!("{} with {}", ioctl::describe(file.as_fd()), device.display())
    })?;
    Ok(())
}

/// What the filesystem is that `file` lies in.
///
/// # Errors
/// `ENOTTY` when it is not btrfs.
pub fn filesystem_info(file: impl AsFd) -> Result<FilesystemInfo> {
    let mut arguments = FsInfoArgs::new_zeroed();
    FS_INFO.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd()))?;
    Ok(FilesystemInfo {
        fsid: arguments.fsid,
        devices: arguments.num_devices,
        max_device_id: arguments.max_id,
        node_size: arguments.nodesize,
        sector_size: arguments.sectorsize,
    })
}

/// What the device `id` of the filesystem that `file` lies in is; `None` when there is none of that number.
///
/// # Errors
/// `ENOTTY` when it is not btrfs.
pub fn device_info(file: impl AsFd, id: u64) -> Result<Option<DeviceInfo>> {
    let mut arguments = DevInfoArgs::new_zeroed();
    arguments.devid = id;
    match DEV_INFO.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd())) {
        Ok(_) => {}
        Err(error) if error.errno() == Some(libc::ENODEV) => return Ok(None),
        Err(error) => return Err(error),
    }
    let path = arguments.path.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    Ok(Some(DeviceInfo {
        id: arguments.devid,
        uuid: arguments.uuid,
        allocated_bytes: arguments.bytes_used,
        total_bytes: arguments.total_bytes,
        path: PathBuf::from(OsString::from_vec(path)),
    }))
}

/// Commits the running transaction: everything done before survives a crash.
///
/// # Errors
/// `EIO` when the filesystem cannot write.
pub fn sync(file: impl AsFd) -> Result<()> {
    ioctl::call_integer("BTRFS_IOC_SYNC", SYNC, file.as_fd(), 0, || ioctl::describe(file.as_fd()))?;
    Ok(())
}

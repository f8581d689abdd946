//! Loop devices (`drivers/block/loop.c`, `include/uapi/linux/loop.h`): take a free one, give it a file with every
//! setting in one atomic LOOP_CONFIGURE, find the one that holds a certain file, let go of it.
//!
//! Sysfs is asked rather than LOOP_GET_STATUS64 wherever it knows the answer: the ioctl stats the backing file, which
//! for a FUSE file whose server is gone may wait for ever.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::{self, Request};
use crate::{Error, Result};

/// How often a free device may be snatched away by another process before [`attach`] gives up.
const MAX_RACES: u32 = 64;
/// Major number of loop devices (`include/uapi/linux/major.h`).
const LOOP_MAJOR: u32 = 7;
/// Bytes of a name in [`Info`], its terminating 0 included (LO_NAME_SIZE).
const NAME_BYTES: usize = 64;
/// Where the control device is.
const CONTROL: &str = "/dev/loop-control";

const FLAG_READ_ONLY: u32 = 1;
const FLAG_AUTOCLEAR: u32 = 4;
const FLAG_DIRECT_IO: u32 = 16;

const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_SET_CAPACITY: u32 = 0x4c07;
const LOOP_SET_DIRECT_IO: u32 = 0x4c08;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;

/// `struct loop_info64`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232);
const _: () = assert!(size_of::<Config>() == 304);

// SAFETY: lo_ioctl copies exactly one struct loop_config in and nothing out.
const LOOP_CONFIGURE: Request<Config> = unsafe { Request::unsized_number("LOOP_CONFIGURE", 0x4c0a) };
// SAFETY: lo_ioctl copies exactly one struct loop_info64 out and nothing in.
const LOOP_GET_STATUS64: Request<Info> = unsafe { Request::unsized_number("LOOP_GET_STATUS64", 0x4c05) };

/// What a loop device is to be made of.
#[derive(Debug, Clone, Copy)]
pub struct LoopConfig<'a> {
    /// The backing file, opened for what the device shall allow. For `direct_io` it need not be O_DIRECT.
    pub backing: BorrowedFd<'a>,
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the page cache of the backing file. Where the file cannot, the kernel goes on buffered without saying
    /// so: see [`LoopDevice::direct_io`].
    pub direct_io: bool,
    /// Free the device when its last opener closes it.
    pub autoclear: bool,
    /// Logical block size in bytes, a power of two of 512 to the page size; 0 for the kernel's choice.
    pub block_size: u32,
    /// Byte of the backing file at which the device begins.
    pub offset: u64,
    /// Length of the device in bytes; 0 for all of the file.
    pub size_limit: u64,
}

/// What the kernel says of a configured device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The N of /dev/loopN.
    pub number: u32,
    /// Device number of the filesystem that the backing file is on, as `stat` gives it.
    pub backing_device: u64,
    /// Inode of the backing file.
    pub backing_inode: u64,
    /// First byte of the backing file.
    pub offset: u64,
    /// Length limit in bytes, 0 for none.
    pub size_limit: u64,
    /// Refuses writes.
    pub read_only: bool,
    /// Frees itself on last close.
    pub autoclear: bool,
    /// Bypasses the page cache of the backing file.
    pub direct_io: bool,
}

/// A loop device in use, as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The N of /dev/loopN.
    pub number: u32,
    /// The backing file's path as the kernel prints it: without the mount for a file of a detached mount, with
    /// " (deleted)" behind it for a deleted one.
    pub backing_file: PathBuf,
}

/// An open loop device. Dropping it closes the descriptor only.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    file: File,
}

/// Takes a free loop device and configures it, in one step as far as others can see.
///
/// # Errors
/// Where the control device cannot be opened, the kernel refuses the configuration, or others take each free device
/// first, 64 times.
pub fn attach(config: &LoopConfig<'_>) -> Result<LoopDevice> {
    let control = open_control()?;
    let mut races = 0;
    loop {
        let number = ioctl::call_integer("LOOP_CTL_GET_FREE", LOOP_CTL_GET_FREE, control.as_fd(), 0, || {
            CONTROL.into()
        })?;
        let outcome = LoopDevice::open(number as u32, !config.read_only)
            .and_then(|device| device.configure(config).map(|()| device));
        match outcome {
            Err(error) if error.errno() == Some(libc::EBUSY) && races < MAX_RACES => races += 1,
            outcome => return outcome,
        }
    }
}

fn open_control() -> Result<File> {
    let open = || OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(CONTROL);
    open().map_err(|error| Error::new("open", CONTROL, error))
}

/// The path of a loop device's node.
pub fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Every loop device that has a backing file, by number.
///
/// # Errors
/// Where /sys/block cannot be read. Devices that vanish meanwhile are left out.
pub fn list() -> Result<Vec<Entry>> {
    let directory = fs::read_dir("/sys/block").map_err(|error| Error::new("readdir", "/sys/block", error))?;
    let mut entries = Vec::new();
    for entry in directory.flatten() {
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok()) else {
            continue;
        };
        if let Some(backing_file) = backing_file(number) {
            entries.push(Entry { number, backing_file });
        }
    }
    entries.sort_by_key(|entry| entry.number);
    Ok(entries)
}

/// The backing file of a loop device as sysfs prints it; `None` when it has none, or does not exist.
pub fn backing_file(number: u32) -> Option<PathBuf> {
    let mut bytes = fs::read(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    (!bytes.is_empty()).then(|| PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

/// The devices whose backing file is printed exactly as `path`.
///
/// # Errors
/// As [`list`].
pub fn find(path: impl AsRef<OsStr>) -> Result<Vec<u32>> {
    let path = path.as_ref();
    Ok(list()?.into_iter().filter(|entry| entry.backing_file == path).map(|entry| entry.number).collect())
}

impl LoopDevice {
    /// Opens /dev/loop`number`, making the node where devtmpfs or udev have not (yet).
    ///
    /// # Errors
    /// Where the node can neither be opened nor made, or is something else than that loop device.
    pub fn open(number: u32, write: bool) -> Result<LoopDevice> {
        let path = path(number);
        let open = || OpenOptions::new().read(true).write(write).custom_flags(libc::O_CLOEXEC).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_node(&path, number)?;
                open()
            }
            result => result,
        };
        let file = file.map_err(|error| Error::new("open", path.display().to_string(), error))?;
        LoopDevice::from_file(number, file)
    }

    fn from_file(number: u32, file: File) -> Result<LoopDevice> {
        use std::os::unix::fs::MetadataExt;
        let describe = || path(number).display().to_string();
        let metadata = file.metadata().map_err(|error| Error::new("fstat", describe(), error))?;
        let major = rustix::fs::major(metadata.rdev());
        if !metadata.file_type().is_block_device() || major != LOOP_MAJOR {
            return Err(Error::new("open", describe(), io::Error::from_raw_os_error(libc::ENOTBLK)));
        }
        Ok(LoopDevice { number, file })
    }

    /// Takes a descriptor that was opened before (and passed on), checking that it is a loop device.
    ///
    /// # Errors
    /// Where it is not.
    pub fn from_fd(fd: OwnedFd) -> Result<LoopDevice> {
        use std::os::unix::fs::MetadataExt;
        let file = File::from(fd);
        let metadata = file.metadata().map_err(|e| Error::new("fstat", ioctl::describe(file.as_fd()), e))?;
        // With partitions a device has `max_part + 1` minors; the kernel's name is right in every case.
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let link = format!("/sys/dev/block/{major}:{minor}");
        let target = fs::read_link(&link).map_err(|error| Error::new("readlink", link, error))?;
        let name = target.file_name().and_then(OsStr::to_str).unwrap_or_default();
        match name.strip_prefix("loop").and_then(|number| number.parse().ok()) {
            Some(number) => LoopDevice::from_file(number, file),
            None => Err(Error::new("fstat", name, io::Error::from_raw_os_error(libc::ENOTBLK))),
        }
    }

    /// The N of /dev/loopN.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The node's path.
    pub fn path(&self) -> PathBuf {
        path(self.number)
    }

    fn describe(&self) -> String {
        self.path().display().to_string()
    }

    fn configure(&self, config: &LoopConfig<'_>) -> Result<()> {
        let mut arguments = Config::new_zeroed();
        arguments.fd = config.backing.as_raw_fd() as u32;
        arguments.block_size = config.block_size;
        arguments.info.offset = config.offset;
        arguments.info.size_limit = config.size_limit;
        for (wanted, flag) in [
            (config.read_only, FLAG_READ_ONLY),
            (config.direct_io, FLAG_DIRECT_IO),
            (config.autoclear, FLAG_AUTOCLEAR),
        ] {
            arguments.info.flags |= if wanted { flag } else { 0 };
        }
        LOOP_CONFIGURE.call(self.file.as_fd(), &mut arguments, || {
            format!("{} with {}", self.describe(), ioctl::describe(config.backing))
        })?;
        Ok(())
    }

    /// What the kernel says of the device. Asks the backing file's filesystem: do not call this on a device whose FUSE
    /// server may be gone.
    ///
    /// # Errors
    /// `ENXIO` when no file is attached.
    pub fn status(&self) -> Result<Status> {
        let mut info = Info::new_zeroed();
        LOOP_GET_STATUS64.call(self.file.as_fd(), &mut info, || self.describe())?;
        Ok(Status {
            number: info.number,
            backing_device: info.device,
            backing_inode: info.inode,
            offset: info.offset,
            size_limit: info.size_limit,
            read_only: info.flags & FLAG_READ_ONLY != 0,
            autoclear: info.flags & FLAG_AUTOCLEAR != 0,
            direct_io: info.flags & FLAG_DIRECT_IO != 0,
        })
    }

    /// Whether the page cache of the backing file is bypassed, as sysfs says: the kernel falls back silently.
    pub fn direct_io(&self) -> bool {
        let file = format!("/sys/block/loop{}/loop/dio", self.number);
        fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"1"))
    }

    /// Switches direct I/O.
    ///
    /// # Errors
    /// `EINVAL` where the backing file cannot do it with this block size.
    pub fn set_direct_io(&self, on: bool) -> Result<()> {
        ioctl::call_integer(
            "LOOP_SET_DIRECT_IO",
            LOOP_SET_DIRECT_IO,
            self.file.as_fd(),
            libc::c_ulong::from(on),
            || self.describe(),
        )?;
        Ok(())
    }

    /// Takes over a changed length of the backing file.
    ///
    /// # Errors
    /// `ENXIO` when no file is attached.
    pub fn refresh_size(&self) -> Result<()> {
        ioctl::call_integer("LOOP_SET_CAPACITY", LOOP_SET_CAPACITY, self.file.as_fd(), 0, || {
            self.describe()
        })?;
        Ok(())
    }

    /// Lets go of the backing file: at once when nobody else has the device open, else when the last one closes it.
    ///
    /// # Errors
    /// `ENXIO` when no file is attached.
    pub fn clear(&self) -> Result<()> {
        ioctl::call_integer("LOOP_CLR_FD", LOOP_CLR_FD, self.file.as_fd(), 0, || self.describe())?;
        Ok(())
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<LoopDevice> for OwnedFd {
    fn from(device: LoopDevice) -> OwnedFd {
        device.file.into()
    }
}

/// Waits until the device's backing file is no longer printed as `path`. Returns whether that happened in time.
pub fn wait_gone(number: u32, path: &Path, timeout: Duration) -> bool {
    const POLL: Duration = Duration::from_millis(2);
    let end = Instant::now() + timeout;
    while backing_file(number).as_deref() == Some(path) {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

/// Makes the node of a loop device with the number that sysfs gives it.
fn make_node(path: &Path, number: u32) -> Result<()> {
    let attribute = format!("/sys/block/loop{number}/dev");
    let text = fs::read_to_string(&attribute).map_err(|error| Error::new("read", &attribute, error))?;
    let numbers = text.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let Some((major, minor)) = numbers else {
        return Err(Error::new("read", attribute, io::Error::from(io::ErrorKind::InvalidData)));
    };
    let result = rustix::fs::mknodat(
        rustix::fs::CWD,
        path.as_os_str().as_bytes(),
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        rustix::fs::makedev(major, minor),
    );
    match result {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(Error::new("mknod", path.display().to_string(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_does_not_exist_has_no_backing_file() {
        assert_eq!(backing_file(u32::MAX), None);
        assert_eq!(find("/no/such/file").unwrap(), Vec::<u32>::new());
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(LoopDevice::from_fd(null.into()).is_err());
    }
}

//! Ordinary files as loop devices: a pool's local image, read-write.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use loam_sys::loopdev::{self, LoopConfig, LoopDevice};

use crate::loop_transport::{DETACH_TIMEOUT, check_unused};
use crate::{Error, Result};

/// How a file is attached.
#[derive(Debug, Clone)]
pub struct FileOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Logical block size of the loop device, in bytes.
    pub block_size: u32,
    /// Bypass the page cache, where the file's filesystem can.
    pub direct_io: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        FileOptions { read_only: false, block_size: 4096, direct_io: true }
    }
}

/// A file that is attached. The loop device stays while this is open or the device is mounted, and goes away with the
/// last of both.
#[derive(Debug)]
pub struct FileAttachment {
    device: Option<LoopDevice>,
    number: u32,
    direct_io: bool,
    file: PathBuf,
}

impl FileAttachment {
    /// Attaches `path` under a new loop device. One file must not have two: see [`FileAttachment::find`].
    ///
    /// # Errors
    /// [`Error::System`] when the file or a loop device cannot be opened.
    pub fn attach(path: &Path, options: &FileOptions) -> Result<FileAttachment> {
        let file = canonical(path)?;
        let backing = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .open(&file)
            .map_err(|error| loam_sys::Error::new("open", file.display().to_string(), error))?;
        let device = loopdev::attach(&LoopConfig {
            backing: backing.as_fd(),
            read_only: options.read_only,
            direct_io: options.direct_io,
            autoclear: true,
            block_size: options.block_size,
            offset: 0,
            size_limit: 0,
        })?;
        let attachment = FileAttachment::opened(device, file);
        if options.direct_io && !attachment.direct_io {
            tracing::warn!(
                file = %attachment.file.display(),
                "its filesystem cannot do direct I/O: data is cached twice"
            );
        }
        Ok(attachment)
    }

    /// The loop device that `path` is attached under already (by a process that has gone), if any.
    ///
    /// # Errors
    /// Where sysfs or the device cannot be read.
    pub fn find(path: &Path) -> Result<Option<FileAttachment>> {
        let file = canonical(path)?;
        let metadata = std::fs::metadata(&file)
            .map_err(|error| loam_sys::Error::new("stat", file.display().to_string(), error))?;
        for number in loopdev::find(&file)? {
            let device = LoopDevice::open(number, true)?;
            // The same path may be another file in another mount namespace, or have been one once.
            let same = device.status().is_ok_and(|status| {
                status.backing_inode == metadata.ino()
                    && status.backing_device == kernel_device(metadata.dev())
            });
            if same {
                return Ok(Some(FileAttachment::opened(device, file)));
            }
        }
        Ok(None)
    }

    fn opened(device: LoopDevice, file: PathBuf) -> FileAttachment {
        let (number, direct_io) = (device.number(), device.direct_io());
        FileAttachment { device: Some(device), number, direct_io, file }
    }

    /// The block device: "/dev/loopN".
    pub fn device_path(&self) -> PathBuf {
        loopdev::path(self.number)
    }

    /// Whether the page cache of the file is bypassed.
    pub fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// The loop device's descriptor; `None` once detached.
    pub fn loop_device(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref().map(AsFd::as_fd)
    }

    /// Removes the loop device. May be called again after an error.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is mounted; [`Error::StillOpen`] while it is open elsewhere.
    pub fn detach(&mut self) -> Result<()> {
        if let Some(device) = &self.device {
            check_unused(&self.device_path())?;
            device.clear()?;
        }
        self.device = None;
        if loopdev::wait_gone(self.number, &self.file, DETACH_TIMEOUT) {
            Ok(())
        } else {
            Err(Error::StillOpen { device: self.device_path() })
        }
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    let canonical = std::fs::canonicalize(path);
    Ok(canonical.map_err(|error| loam_sys::Error::new("realpath", path.display().to_string(), error))?)
}

/// A device number as the kernel's own ioctls give it (`huge_encode_dev`): the same packing as `stat`'s for numbers in
/// use today.
fn kernel_device(dev: u64) -> u64 {
    let (major, minor) = (u64::from(rustix::fs::major(dev)), u64::from(rustix::fs::minor(dev)));
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

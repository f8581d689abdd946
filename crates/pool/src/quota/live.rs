//! Accounts verified and explained: of an image, of a device, or of what is mounted.
//!
//! The trees of a mounted filesystem are read from its block devices past the page cache, which does not see what btrfs
//! writes. `loam_seed::quota::when_still` makes sure that what was read is one state.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use loam_seed::ReadAt;
use loam_seed::quota::{self as trees, LiveError};
use loam_seed::reader::Device;
use loam_sys::btrfs;

use super::error::{Error, Result};
use super::{ExplainOptions, Explanation, GroupId, Report, kernel, open};

/// Alignment of direct reads: of their place, length and memory, in bytes.
const DIRECT_ALIGNMENT: usize = 4096;

/// Where the trees of a filesystem are read from.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    devices: Vec<Raw>,
    /// A directory of the filesystem, where it is mounted, to commit what is pending.
    mounted: Option<File>,
}

impl Source {
    /// Image files or block devices, mounted somewhere or not: all devices of one filesystem, in any order. One path of a
    /// directory or file on a mounted btrfs stands for all of its devices.
    ///
    /// # Errors
    /// One cannot be opened; a directory is not on btrfs.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let Some(path) = paths.first().cloned() else {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "no device was given");
            return Err(Error::Open { path: PathBuf::new(), source });
        };
        let failed = |path: &Path, source| Error::Open { path: path.to_owned(), source };
        if paths.len() == 1 && path.is_dir() {
            return Source::of_mount(&path);
        }
        let devices = paths
            .iter()
            .map(|path| Raw::open(path).map_err(|source| failed(path, source)))
            .collect::<Result<_>>()?;
        Ok(Source { path, devices, mounted: None })
    }

    /// The devices of the filesystem that is mounted at `path`.
    ///
    /// # Errors
    /// No btrfs, or a device cannot be opened.
    pub fn of_mount(path: &Path) -> Result<Self> {
        let root = open(path)?;
        let info = kernel(path, btrfs::filesystem_info(&root))?;
        let mut devices = Vec::new();
        for id in 1..=info.max_device_id {
            let Some(device) = kernel(path, btrfs::device_info(&root, id))? else { continue };
            let opened = Raw::open(&device.path);
            devices.push(opened.map_err(|source| Error::Open { path: device.path.clone(), source })?);
        }
        Ok(Source { path: path.to_owned(), devices, mounted: Some(root) })
    }

    fn look<T>(&self, look: &mut dyn FnMut(&[Device<'_>]) -> loam_seed::Result<T>) -> Result<T> {
        let devices: Vec<Device<'_>> =
            self.devices.iter().map(|image| Device { name: "device", image }).collect();
        let mut refresh = || match &self.mounted {
            Some(root) => Ok(btrfs::sync(root)?),
            None => Ok(()),
        };
        let found = trees::when_still(&devices, &mut refresh, &mut || look(&devices));
        found.map_err(|source: LiveError| Error::Trees { path: self.path.clone(), source })
    }
}

/// Compares what is charged with what must be.
///
/// # Errors
/// The trees cannot be read, or do not keep still.
pub fn verify(source: &Source) -> Result<Report> {
    source.look(&mut |devices| trees::verify(devices))
}

/// Explains what a group is charged for; without one, that of the subvolume that a mounted `source` was opened by.
///
/// # Errors
/// As [`verify`]; there is no such group.
pub fn explain(source: &Source, group: Option<GroupId>, options: &ExplainOptions) -> Result<Explanation> {
    let group = match (group, &source.mounted) {
        (Some(group), _) => group,
        (None, Some(root)) => {
            let info = kernel(&source.path, btrfs::subvolume_info(root))?;
            GroupId::from_raw(info.id)
        }
        (None, None) => GroupId::from_raw(btrfs::TOP_LEVEL),
    };
    source.look(&mut |devices| trees::explain(devices, group, options))
}

/// An image file, or a block device that is read past the page cache.
#[derive(Debug)]
struct Raw {
    file: File,
    direct: bool,
}

impl Raw {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Raw { file, direct: false });
        }
        if !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "is neither an image file nor a block device",
            ));
        }
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(Raw { file, direct: true })
    }
}

impl ReadAt for Raw {
    fn length(&self) -> io::Result<u64> {
        ReadAt::length(&self.file)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.direct {
            return self.file.read_exact_at(buffer, offset);
        }
        let before = (offset % DIRECT_ALIGNMENT as u64) as usize;
        let length = (before + buffer.len()).next_multiple_of(DIRECT_ALIGNMENT);
        let mut memory = vec![0; length + DIRECT_ALIGNMENT];
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        let aligned = memory.get_mut(start..start + length).ok_or(io::ErrorKind::OutOfMemory)?;
        self.file.read_exact_at(aligned, offset - before as u64)?;
        buffer.copy_from_slice(&aligned[before..before + buffer.len()]);
        Ok(())
    }
}

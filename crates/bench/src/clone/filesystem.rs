//! A filesystem of each layout, mounted nowhere: its mount has no place in any directory, only a descriptor here. When
//! this process ends, however it ends, the kernel unmounts it, lets go of the loop devices, and the server sees its
//! standard input end.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use loam_attach::{FileAttachment, FileOptions};
use loam_seed::{Image, SeedOptions, VIRTUAL_BASE, VIRTUAL_DATA_NAME};
use loam_sys::btrfs;
use loam_sys::mount::{FsContext, MountFlags};
use rustix::fs::{Mode, OFlags};

use super::plan::Layout;
use super::stock;
use crate::process::Sandbox;
use crate::serve::{self, Content, Server, Transport};

/// Bytes of the local device, sparse.
const LOCAL_BYTES: u64 = 64 << 30;

/// What all filesystems of a run have in common.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The images lie below it.
    pub(super) scratch: PathBuf,
    /// How the kernel gets the virtual device.
    pub(super) transport: Transport,
    /// Of btrfs, as in fstab.
    pub(super) mount_options: Vec<String>,
}

/// A mounted filesystem whose data is on the virtual device.
pub(super) struct Filesystem {
    mount: Option<OwnedFd>,
    options: Vec<String>,
    local: FileAttachment,
    server: Server,
    // Last: the images lie in it.
    _sandbox: Sandbox,
}

/// The part of an image that is not a pattern.
struct Prefix(File);

impl Image for Prefix {
    fn set_length(&mut self, length: u64) -> io::Result<()> {
        self.0.set_length(length.min(VIRTUAL_BASE))
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
}

impl Filesystem {
    /// Formats, and mounts.
    pub(super) fn make(layout: Layout, size: u64, place: &Place) -> Result<Self> {
        let sandbox = Sandbox::new(&place.scratch)?;
        let (image, local) = (sandbox.path("virtual.img"), sandbox.path("local.img"));
        let device_size = match layout {
            Layout::Pair => format(loam_seed::Layout::Pair, size, &image, Some(&local))?,
            Layout::Single => format(loam_seed::Layout::Single, size, &image, None)?,
            Layout::MegaExtent => format(loam_seed::Layout::MegaExtent, size, &image, None)?,
            Layout::SmallExtents => stock::format(&image, size)?,
        };
        if layout != Layout::Pair {
            create(&local)?.set_len(LOCAL_BYTES)?;
        }
        let pattern_base = if layout == Layout::SmallExtents { 0 } else { VIRTUAL_BASE };
        let content = Content::Seed { size: device_size, pattern_base, image };
        let server = Server::start(&serve::Options {
            transport: place.transport,
            content,
            prefix: None,
            virtual_size: None,
            queues: None,
            data_path: None,
        })?;
        let local = FileAttachment::attach(&local, &FileOptions::default())?;
        let mut filesystem = Filesystem {
            mount: None,
            options: place.mount_options.clone(),
            local,
            server,
            _sandbox: sandbox,
        };
        if layout != Layout::Pair {
            filesystem.sprout()?;
        }
        filesystem.mount()?;
        Ok(filesystem)
    }

    /// Adds the local device to the seed.
    fn sprout(&self) -> Result<()> {
        let seed = mount(self.server.device(), None, &["ro"])?;
        let root = rustix::fs::openat(&seed, c".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(btrfs::add_device(&root, &self.local.device_path())?)
    }

    /// Mounts it; returns how long the kernel took.
    fn mount(&mut self) -> Result<Duration> {
        let started = Instant::now();
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        self.mount = Some(mount(&self.local.device_path(), Some(self.server.device()), &options)?);
        Ok(started.elapsed())
    }

    /// Unmounts and mounts again, so that nothing of it is in memory, neither data nor metadata. Everything that was
    /// opened in it must be closed. Returns how long mounting took.
    pub(super) fn remount(&mut self) -> Result<Duration> {
        self.mount = None;
        self.mount().context("cannot mount again")
    }

    /// Opens a file or directory.
    pub(super) fn open(&self, path: &str, flags: OFlags) -> Result<File> {
        let mount = self.mount.as_ref().context("not mounted")?;
        let opened = rustix::fs::openat(mount, path, flags | OFlags::CLOEXEC, Mode::empty());
        Ok(File::from(opened.with_context(|| format!("cannot open {path}"))?))
    }

    /// Its top-level directory.
    pub(super) fn root(&self) -> Result<File> {
        self.open(".", OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The file that is the virtual region.
    pub(super) fn virtual_data(&self) -> Result<File> {
        self.open(VIRTUAL_DATA_NAME, OFlags::RDONLY)
    }

    /// Bytes of tree blocks in use, as of the last commit.
    pub(super) fn metadata_bytes(&self) -> Result<u64> {
        let fsid = uuid(btrfs::filesystem_info(self.root()?)?.fsid);
        let path = PathBuf::from(format!("/sys/fs/btrfs/{fsid}/allocation/metadata/bytes_used"));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.trim().parse().with_context(|| format!("{} holds no number", path.display()))
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        self.mount = None;
        // The kernel remembers scanned devices by their numbers, which others get next.
        for device in [&self.local.device_path(), self.server.device()] {
            let _ = btrfs::forget_device(device);
        }
        if let Err(error) = self.local.detach() {
            eprintln!("loam bench: left behind: {error:#}");
        }
    }
}

/// Mounts the filesystem on `device`, and on `seed` if it is a pair, on no directory.
pub(crate) fn mount(device: &Path, seed: Option<&Path>, options: &[&str]) -> Result<OwnedFd> {
    let context = FsContext::open("btrfs")?;
    context.set("source", device)?;
    if let Some(seed) = seed {
        context.set("device", seed)?;
    }
    for option in options {
        context.set_option(option)?;
    }
    context.create()?;
    Ok(context.mount(MountFlags { no_access_time: true, ..MountFlags::default() })?)
}

fn create(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path);
    file.with_context(|| format!("cannot make {}", path.display()))
}

/// Returns the bytes of the virtual device.
fn format(layout: loam_seed::Layout, size: u64, image: &Path, local: Option<&Path>) -> Result<u64> {
    let mut options = SeedOptions::new(identity());
    (options.layout, options.virtual_size, options.local_size) = (layout, size, LOCAL_BYTES);
    let mut local = local.map(create).transpose()?;
    let local = local.as_mut().map(|file| file as &mut dyn Image);
    loam_seed::write(&options, &[], &mut Prefix(create(image)?), local)?;
    Ok(options.virtual_device_size())
}

/// One that no filesystem on this machine has: two of the same cannot be mounted at once.
fn identity() -> [u8; 32] {
    let mut identity = [0; 32];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    identity[..16].copy_from_slice(&now.to_le_bytes());
    identity[16..20].copy_from_slice(&std::process::id().to_le_bytes());
    identity
}

/// As sysfs writes it.
pub(crate) fn uuid(bytes: [u8; 16]) -> String {
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    for position in [20, 16, 12, 8] {
        text.insert(position, '-');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_sysfs_does() {
        let bytes = std::array::from_fn(|index| index as u8);
        assert_eq!(uuid(bytes), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}

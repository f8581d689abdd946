//! Files and file systems that targets are made of: each is made when a target first needs it, and kept until the end,
//! so that attaching the target again takes no time. What could not be made is not tried again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use loam_block::size::ByteSize;
use loam_seed::SeedOptions;
use rand::Rng;
use tempfile::TempDir;

use super::images;
use crate::process::timed;

/// RAM disks: of btrfs, of ext4, and one that is read itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RamDisk {
    Btrfs,
    Ext4,
    Raw,
}

/// How many there are.
const RAM_DISKS: u32 = 3;
/// What statfs calls file systems that are memory (`include/uapi/linux/magic.h`).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// The directories, and what was made in them.
pub(super) struct Lab {
    /// On a tmpfs.
    memory: TempDir,
    /// On a local disk.
    disk: TempDir,
    /// Bytes of every copy of the data, and of a RAM disk.
    size: u64,
    made: BTreeMap<String, Result<PathBuf, String>>,
    loaded_brd: bool,
}

impl Lab {
    pub(super) fn new(memory: &Path, disk: &Path, size: u64) -> Result<Self> {
        let directory = |parent: &Path| {
            let made = tempfile::Builder::new().prefix("loam-bench-").tempdir_in(parent);
            made.with_context(|| format!("no temporary directory in {}", parent.display()))
        };
        let (memory, disk) = (directory(memory)?, directory(disk)?);
        Ok(Lab { memory, disk, size, made: BTreeMap::new(), loaded_brd: false })
    }

    /// A directory to mount on.
    pub(super) fn mount_point(&self) -> PathBuf {
        self.memory.path().join("mnt")
    }

    /// Makes a thing once, at a path of this name in memory.
    fn once(&mut self, name: &str, make: impl FnOnce(&mut Self, &Path) -> Result<()>) -> Result<PathBuf> {
        if !self.made.contains_key(name) {
            eprintln!("making {name}");
            let path = self.memory.path().join(name);
            let made = make(self, &path).map(|()| path).map_err(|error| format!("{error:#}"));
            self.made.insert(name.to_string(), made);
        }
        self.made[name].clone().map_err(|reason| anyhow!(reason))
    }

    /// The pattern in a file on tmpfs.
    pub(super) fn data(&mut self, size: u64) -> Result<PathBuf> {
        self.once(&format!("data-{size}"), |_, path| images::pattern_file(path, size))
    }

    /// The pattern in a file on a disk.
    pub(super) fn data_on_disk(&mut self, size: u64) -> Result<PathBuf> {
        let name = format!("data-on-disk-{size}");
        self.once(&name, |lab, link| {
            let kind = rustix::fs::statfs(lab.disk.path())?.f_type;
            ensure!(
                kind != TMPFS_MAGIC && kind != RAMFS_MAGIC,
                "{} is memory; --scratch has to lie on a disk",
                lab.disk.path().display()
            );
            let path = lab.disk.path().join("data");
            images::pattern_file(&path, size)?;
            Ok(std::os::unix::fs::symlink(path, link)?)
        })
    }

    /// A directory for the chunk cache, and the file whose bytes it holds.
    pub(super) fn cache(&mut self, size: u64) -> Result<(PathBuf, PathBuf)> {
        Ok((self.disk.path().join(format!("cache-{size}")), self.data(size)?))
    }

    /// Writes out what was written to the disk, so that the kernel does not do so while something is measured.
    pub(super) fn settle(&self) -> Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(self.disk.path())?)?)
    }

    /// A btrfs with the data in it, as an image on tmpfs.
    pub(super) fn btrfs_image(&mut self, size: u64) -> Result<PathBuf> {
        let directory = self.mount_point();
        let name = format!("btrfs-{size}.img");
        self.once(&name, |_, image| images::image_with_data(image, &directory, size))
    }

    /// The virtual and the local image of a seed; both are where the layout has no local one.
    pub(super) fn seed(&mut self, options: &SeedOptions, clone_size: u64) -> Result<(PathBuf, PathBuf)> {
        let layout = format!("{:?}-{}-{clone_size}", options.layout, ByteSize(options.virtual_size));
        let mut options = options.clone();
        options.identity = rand::rng().random();
        let directory = self.once(&format!("seed-{layout}"), |_, directory| {
            fs::create_dir(directory)?;
            let (virtual_image, local) = (directory.join("virtual.img"), directory.join("local.img"));
            let local = (options.layout == loam_seed::Layout::Pair).then_some(local.as_path());
            images::seed(&options, clone_size, (&virtual_image, local))
        })?;
        Ok((directory.join("virtual.img"), directory.join("local.img")))
    }

    /// A btrfs of stock tools with a file of `virtual_size` bytes, as an image on tmpfs.
    pub(super) fn small_extents(&mut self, virtual_size: u64, clone_size: u64) -> Result<PathBuf> {
        let directory = self.mount_point();
        let name = format!("small-extents-{}-{clone_size}.img", ByteSize(virtual_size));
        self.once(&name, |_, image| images::small_extents(image, &directory, virtual_size, clone_size))
    }

    /// A RAM disk with the data, in a file system or as it is.
    pub(super) fn ram_disk(&mut self, disk: RamDisk) -> Result<PathBuf> {
        let device = PathBuf::from(format!("/dev/ram{}", disk as u32));
        let (directory, size) = (self.mount_point(), self.size);
        self.once(&format!("ram-disk-{disk:?}"), |lab, _| {
            lab.load_brd()?;
            check_unused(&device, 2 * size + images::SPARE)?;
            match disk {
                RamDisk::Btrfs => images::with_data("btrfs", &device, &directory, size),
                RamDisk::Ext4 => images::with_data("ext4", &device, &directory, size),
                RamDisk::Raw => {
                    let file = fs::OpenOptions::new().write(true).open(&device)?;
                    images::fill(&file, 0, 0, size)?;
                    Ok(file.sync_all()?)
                }
            }
        })?;
        Ok(device)
    }

    fn load_brd(&mut self) -> Result<()> {
        if !Path::new("/dev/ram0").exists() {
            let kibibytes = (2 * self.size + images::SPARE) >> 10;
            let arguments = [format!("rd_nr={RAM_DISKS}"), format!("rd_size={kibibytes}")];
            timed(Command::new("modprobe").arg("brd").args(arguments)).context("no RAM disk")?;
            self.loaded_brd = true;
        }
        Ok(())
    }
}

/// Somebody else's RAM disk may hold something.
fn check_unused(device: &Path, size: u64) -> Result<()> {
    let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
    let file = fs::OpenOptions::new().read(true).custom_flags(exclusive).open(device);
    let file = file.with_context(|| format!("cannot open {}", device.display()))?;
    let found = loam_seed::ReadAt::length(&file)?;
    ensure!(found >= size, "{} has {found} bytes, {size} are needed (rmmod brd)", device.display());
    let mut head = vec![0; 128 << 10];
    loam_seed::ReadAt::read_at(&file, 0, &mut head)?;
    ensure!(head.iter().all(|byte| *byte == 0), "{} is not empty (rmmod brd)", device.display());
    Ok(())
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.loaded_brd
            && let Err(error) = timed(Command::new("modprobe").args(["-r", "brd"]))
        {
            eprintln!("loam bench: left behind: {error:#}");
        }
    }
}

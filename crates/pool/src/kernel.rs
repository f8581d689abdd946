//! The btrfs side of a pool that is up: mounting the pair of devices (or sprouting a single seed), unmounting,
//! read-ahead, and what a subvolume has written.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use loam_seed::{Layout, VIRTUAL_BASE};
use loam_sys::btrfs::{self, Key};
use loam_sys::mount::{self, MountFlags};

use crate::busy::holders;
use crate::config::{Config, Purpose};
use crate::error::{Context, Error, Result};

/// The subvolume that `loam mount` shows.
pub(crate) const IMAGE_SUBVOLUME: &str = "image";

/// The file at the top level that spans the virtual region.
pub(crate) const VIRTUAL_DATA: &str = ".virtual-data";

/// Bytes that the kernel reads ahead, in KiB. btrfs asks for 4 MiB, which over a network is most of an image; the
/// daemon reads ahead itself where a reader proves to be sequential.
const READ_AHEAD_KIB: u32 = 64;

/// `EXTENT_DATA` items of file trees (`include/uapi/linux/btrfs_tree.h`).
const EXTENT_DATA_KEY: u8 = 108;

/// Items asked for in one tree search.
const SEARCH_ITEMS: u32 = 4096;

/// Mounts the pool's filesystem unless it is mounted there already.
pub(crate) fn mount_pool(
    config: &Config,
    virtual_device: &Path,
    local_device: &Path,
    mount_point: &Path,
) -> Result<()> {
    if !is_mounted(mount_point, &[virtual_device, local_device])? {
        refuse_unless_free(mount_point)?;
        if config.layout == Layout::Pair || has_superblock(local_device)? {
            mount_pair(config, virtual_device, local_device, mount_point)?;
        } else {
            sprout(config, virtual_device, local_device, mount_point)?;
        }
    }
    set_read_ahead(mount_point);
    Ok(())
}

fn refuse_unless_free(mount_point: &Path) -> Result<()> {
    let taken = mount::mounts().step(|| "reading the table of mounts".to_owned())?;
    if taken.iter().any(|entry| entry.mount_point == mount_point) {
        return Err(Error::step(format!("mounting on {}", mount_point.display()), "something is mounted there")
            .with_hint("unmount it, or choose another directory"));
    }
    fs::create_dir_all(mount_point).step(|| format!("making {}", mount_point.display()))
}

fn mount_pair(config: &Config, virtual_device: &Path, local_device: &Path, mount_point: &Path) -> Result<()> {
    let device = format!("device={}", virtual_device.display());
    let subvolume = format!("subvol={IMAGE_SUBVOLUME}");
    let mut options = vec![device.as_str()];
    if config.purpose == Purpose::Mount {
        options.push(&subvolume);
    }
    // Reading must not write: an access time would copy the metadata of everything that is read.
    let flags = MountFlags { no_access_time: true, ..MountFlags::default() };
    mount::mount("btrfs", local_device, mount_point, &options, flags)
        .map_err(|error| explain_mount(config, mount_point, error))
}

/// A seed with all its metadata on the virtual device becomes a pair when the local device is added to it.
fn sprout(config: &Config, virtual_device: &Path, local_device: &Path, mount_point: &Path) -> Result<()> {
    let flags = MountFlags { read_only: true, no_access_time: true, ..MountFlags::default() };
    mount::mount("btrfs", virtual_device, mount_point, &[], flags)
        .map_err(|error| explain_mount(config, mount_point, error))?;
    let sprouted = add_and_remount(local_device, mount_point);
    if sprouted.is_err() {
        let _ = mount::unmount(mount_point);
    }
    sprouted
}

fn add_and_remount(local_device: &Path, mount_point: &Path) -> Result<()> {
    let root = File::open(mount_point).step(|| format!("opening {}", mount_point.display()))?;
    btrfs::add_device(&root, local_device)
        .step(|| format!("adding {} to {}", local_device.display(), mount_point.display()))?;
    drop(root);
    rustix::mount::mount_remount(mount_point, rustix::mount::MountFlags::NOATIME, c"")
        .step(|| format!("remounting {} read-write", mount_point.display()))
}

fn explain_mount(config: &Config, mount_point: &Path, error: loam_sys::Error) -> Error {
    let failed = Error::step(format!("mounting on {}", mount_point.display()), error);
    match config.layout.kernel_limit(config.virtual_size) {
        Some(limit) => failed.with_hint(limit),
        None => failed.with_hint("dmesg has the kernel's reason; loam needs btrfs in the kernel (5.15 or newer)"),
    }
}

/// Whether the filesystem on these devices is what is mounted on top of `mount_point`.
pub(crate) fn is_mounted(mount_point: &Path, devices: &[&Path]) -> Result<bool> {
    let mounts = mount::mounts().step(|| "reading the table of mounts".to_owned())?;
    let top = mounts.iter().rev().find(|entry| entry.mount_point == mount_point);
    Ok(top.is_some_and(|entry| entry.kind == "btrfs" && devices.iter().any(|device| entry.source == **device)))
}

/// Unmounts, or says who is in the way.
pub(crate) fn unmount(mount_point: &Path) -> Result<()> {
    mount::unmount(mount_point).map_err(|error| {
        if error.errno() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
            Error::Busy { path: mount_point.to_owned(), holders: holders(mount_point) }
        } else {
            Error::step(format!("unmounting {}", mount_point.display()), error)
        }
    })
}

fn has_superblock(device: &Path) -> Result<bool> {
    const MAGIC_OFFSET: u64 = (64 << 10) + 64;
    let what = || format!("reading {}", device.display());
    let mut magic = [0; 8];
    File::open(device).step(what)?.read_exact_at(&mut magic, MAGIC_OFFSET).step(what)?;
    Ok(&magic == b"_BHRfS_M")
}

/// Best effort: a kernel that does not show the knob only reads more than it must.
fn set_read_ahead(mount_point: &Path) {
    let set = || -> std::io::Result<()> {
        let root = File::open(mount_point)?;
        let info = btrfs::filesystem_info(&root).map_err(std::io::Error::other)?;
        let fsid = uuid::Uuid::from_bytes(info.fsid);
        let knob = PathBuf::from(format!("/sys/fs/btrfs/{fsid}/bdi/read_ahead_kb"));
        fs::write(knob, READ_AHEAD_KIB.to_string())
    };
    if let Err(error) = set() {
        tracing::warn!("setting the read-ahead of {}: {error}", mount_point.display());
    }
}

/// Bytes of file data on the local device that a subvolume has got since transaction `since`: what a container has
/// written since it was made. The kernel skips all that is older, so this costs what has changed, not what is there.
pub(crate) fn written_bytes(subvolume: &Path, since: u64, virtual_size: u64) -> Result<u64> {
    let what = || format!("looking for what was written to {}", subvolume.display());
    let root = File::open(subvolume).step(what)?;
    let mut first = Key { objectid: 0, kind: 0, offset: 0 };
    let last = Key { objectid: u64::MAX, kind: u8::MAX, offset: u64::MAX };
    let mut bytes = 0;
    loop {
        let items = btrfs::tree_search_since(&root, 0, first, last, since, SEARCH_ITEMS).step(what)?;
        let Some(end) = items.last() else { return Ok(bytes) };
        let extents = items.iter().filter(|item| item.key.kind == EXTENT_DATA_KEY);
        bytes += extents.map(|item| local_bytes(&item.bytes, since, virtual_size)).sum::<u64>();
        match end.key.successor() {
            Some(next) => first = next,
            None => return Ok(bytes),
        }
    }
}

/// Of a `btrfs_file_extent_item`: its bytes, if it is newer than `since` and on the local device.
fn local_bytes(item: &[u8], since: u64, virtual_size: u64) -> u64 {
    const TYPE: usize = 20;
    const INLINE: u8 = 0;
    let number = |offset: usize| -> Option<u64> {
        Some(u64::from_le_bytes(item.get(offset..offset + 8)?.try_into().ok()?))
    };
    let (Some(generation), Some(ram_bytes)) = (number(0), number(8)) else { return 0 };
    if generation <= since {
        return 0;
    }
    if item.get(TYPE) == Some(&INLINE) {
        return ram_bytes;
    }
    match (number(21), number(45)) {
        // 0 is a hole. In the virtual region logical and physical are equal: lazy data, cloned.
        (Some(logical), Some(length)) if logical != 0 && !is_virtual(logical, virtual_size) => length,
        _ => 0,
    }
}

fn is_virtual(logical: u64, virtual_size: u64) -> bool {
    (VIRTUAL_BASE..VIRTUAL_BASE + virtual_size).contains(&logical)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(generation: u64, kind: u8, logical: u64, length: u64) -> Vec<u8> {
        let mut item = vec![0; 53];
        item[0..8].copy_from_slice(&generation.to_le_bytes());
        item[8..16].copy_from_slice(&100u64.to_le_bytes());
        item[20] = kind;
        item[21..29].copy_from_slice(&logical.to_le_bytes());
        item[45..53].copy_from_slice(&length.to_le_bytes());
        item
    }

    #[test]
    fn only_new_local_data_was_written() {
        let size = 4 << 60;
        let count = |item: &[u8]| local_bytes(item, 10, size);
        assert_eq!(count(&extent(11, 1, 256 << 20, 4096)), 4096);
        assert_eq!(count(&extent(10, 1, 256 << 20, 4096)), 0, "older than the container");
        assert_eq!(count(&extent(11, 1, VIRTUAL_BASE + 4096, 4096)), 0, "a clone of lazy data");
        assert_eq!(count(&extent(11, 1, VIRTUAL_BASE + size, 4096)), 4096, "a chunk behind the virtual region");
        assert_eq!(count(&extent(11, 1, 0, 4096)), 0, "a hole");
        assert_eq!(count(&extent(11, 0, 0, 0)), 100, "inline");
        assert_eq!(count(&[0; 7]), 0, "torn");
    }
}

//! The btrfs side of a pool that is up: mounting the pair of devices (or sprouting a single seed), unmounting,
//! read-ahead, and what a subvolume has written.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use loam_image::Run;
use loam_seed::{Layout, VIRTUAL_BASE};
use loam_sys::btrfs::{self, Key};
use loam_sys::mount::{self, MountFlags};

use crate::config::{Config, Purpose};
use crate::error::{Context, Error, Result};
use crate::format::{has_simple_quotas, kernel_release};

/// The subvolume that `loam mount` shows.
pub(crate) const IMAGE_SUBVOLUME: &str = "image";

/// The file at the top level that spans the virtual region.
pub(crate) const VIRTUAL_DATA: &str = ".virtual-data";

/// What the kernel reads ahead, in KiB. btrfs asks for 4 MiB, which over a network is most of an image; around each page
/// fault of a program that is being started, so much is read whether or not it is wanted. The daemon fetches ahead itself
/// where a reader proves to be sequential; what it costs sequential reads of local data is not settled
/// (docs/decisions/2026-11-21-traces.md).
const READ_AHEAD_KIB: u32 = 16;

/// For each extent that is written, btrfs looks for room in its block groups from the first one on, and those of the
/// virtual region come first: tens of thousands, all full. Only this option lets it begin where it found room last
/// (`fetch_cluster_info` in `fs/btrfs/extent-tree.c`): small files are written twenty times as fast (docs/benchmarks/clone.md).
const ALLOCATION: &str = "ssd_spread";

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
        return Err(Error::step(
            format!("mounting on {}", mount_point.display()),
            "something is mounted there",
        )
        .with_hint("unmount it, or choose another directory"));
    }
    fs::create_dir_all(mount_point).step(|| format!("making {}", mount_point.display()))
}

fn mount_pair(config: &Config, virtual_device: &Path, local_device: &Path, mount_point: &Path) -> Result<()> {
    // Not by the option `device`: kernels before 6.13 or so open it for writing, which the virtual device does not take.
    btrfs::scan_device(virtual_device).map_err(|error| explain_mount(config, mount_point, error))?;
    let subvolume = format!("subvol={IMAGE_SUBVOLUME}");
    let mut options = vec![ALLOCATION];
    if config.purpose == Purpose::Mount {
        options.push(subvolume.as_str());
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
    let options = std::ffi::CString::new(ALLOCATION).step(|| "mount options".to_owned())?;
    rustix::mount::mount_remount(mount_point, rustix::mount::MountFlags::NOATIME, options.as_c_str())
        .step(|| format!("remounting {} read-write", mount_point.display()))
}

fn explain_mount(config: &Config, mount_point: &Path, error: loam_sys::Error) -> Error {
    let failed = Error::step(format!("mounting on {}", mount_point.display()), error);
    let release = kernel_release();
    if config.simple_quota && !has_simple_quotas(&release) {
        return failed.with_hint(format!(
            "the pool was made with quotas (loam init --quota), which Linux {release} does not know; 6.7 and newer do"
        ));
    }
    match config.layout.kernel_limit(config.virtual_size) {
        Some(limit) => failed.with_hint(limit),
        None => {
            failed.with_hint("dmesg has the kernel's reason; loam needs btrfs in the kernel (5.15 or newer)")
        }
    }
}

/// Whether the filesystem on these devices is what is mounted on top of `mount_point`.
pub(crate) fn is_mounted(mount_point: &Path, devices: &[&Path]) -> Result<bool> {
    let mounts = mount::mounts().step(|| "reading the table of mounts".to_owned())?;
    let top = mounts.iter().rev().find(|entry| entry.mount_point == mount_point);
    Ok(top
        .is_some_and(|entry| entry.kind == "btrfs" && devices.iter().any(|device| entry.source == **device)))
}

/// Unmounts, or says who is in the way.
pub(crate) fn unmount(mount_point: &Path) -> Result<()> {
    mount::unmount(mount_point).map_err(|error| {
        if error.errno() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
            Error::busy(mount_point)
        } else {
            Error::step(format!("unmounting {}", mount_point.display()), error)
        }
    })
}

/// Whether a local device belongs to a filesystem yet.
pub(crate) fn has_superblock(device: &Path) -> Result<bool> {
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
    let mut bytes = 0;
    for_each_extent(subvolume, since, |_, extent| {
        // In the virtual region logical and physical are equal: lazy data, cloned.
        if extent.generation > since && !is_virtual(extent.logical, virtual_size) {
            bytes += extent.length;
        }
    })?;
    Ok(bytes)
}

/// The data of a file, from a `btrfs_file_extent_item` (`include/uapi/linux/btrfs_tree.h`).
struct Extent {
    generation: u64,
    /// 0 for inline data.
    logical: u64,
    /// Bytes into the extent at `logical`.
    offset: u64,
    /// Bytes in the file.
    length: u64,
}

impl Extent {
    /// `None` for a hole and for what is no such item.
    fn parse(item: &[u8]) -> Option<Extent> {
        const INLINE: u8 = 0;
        let number = |offset: usize| Some(u64::from_le_bytes(item.get(offset..offset + 8)?.try_into().ok()?));
        let (generation, ram_bytes) = (number(0)?, number(8)?);
        if *item.get(20)? == INLINE {
            return Some(Extent { generation, logical: 0, offset: 0, length: ram_bytes });
        }
        let (logical, offset, length) = (number(21)?, number(37)?, number(45)?);
        (logical != 0).then_some(Extent { generation, logical, offset, length })
    }
}

/// Shows every file extent of a subvolume that lies in a leaf written in or after transaction `since`.
fn for_each_extent(subvolume: &Path, since: u64, mut visit: impl FnMut(Key, Extent)) -> Result<()> {
    let what = || format!("reading the extents of {}", subvolume.display());
    let root = File::open(subvolume).step(what)?;
    let mut first = Key { objectid: 0, kind: 0, offset: 0 };
    let last = Key { objectid: u64::MAX, kind: u8::MAX, offset: u64::MAX };
    loop {
        let items = btrfs::tree_search_since(&root, 0, first, last, since, SEARCH_ITEMS).step(what)?;
        let Some(end) = items.last().map(|item| item.key) else { return Ok(()) };
        for item in items.iter().filter(|item| item.key.kind == EXTENT_DATA_KEY) {
            if let Some(extent) = Extent::parse(&item.bytes) {
                visit(item.key, extent);
            }
        }
        match end.successor() {
            Some(next) => first = next,
            None => return Ok(()),
        }
    }
}

/// Where the files of a subvolume have their data in the address space, by inode: ascending by file offset, neighbours
/// joined.
pub(crate) fn virtual_extents(subvolume: &Path, virtual_size: u64) -> Result<HashMap<u64, Vec<Run>>> {
    let mut found: HashMap<u64, Vec<Run>> = HashMap::new();
    for_each_extent(subvolume, 0, |key, extent| {
        if is_virtual(extent.logical, virtual_size) {
            let address = extent.logical - VIRTUAL_BASE + extent.offset;
            let run = Run { file_offset: key.offset, address, length: extent.length };
            push_run(found.entry(key.objectid).or_default(), run);
        }
    })?;
    Ok(found)
}

/// Adds a run behind others of the same file, joined with the last where both are one.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last)
            if last.file_offset + last.length == run.file_offset
                && last.address + last.length == run.address =>
        {
            last.length += run.length;
        }
        _ => runs.push(run),
    }
}

fn is_virtual(logical: u64, virtual_size: u64) -> bool {
    (VIRTUAL_BASE..VIRTUAL_BASE + virtual_size).contains(&logical)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_parsed_and_torn_ones_are_not() {
        let mut item = vec![0; 53];
        item[0..8].copy_from_slice(&11u64.to_le_bytes());
        item[8..16].copy_from_slice(&100u64.to_le_bytes());
        assert_eq!(Extent::parse(&item).map(|extent| extent.length), Some(100), "inline");
        item[20] = 1;
        assert!(Extent::parse(&item).is_none(), "a hole");
        item[21..29].copy_from_slice(&(VIRTUAL_BASE + 8192).to_le_bytes());
        item[37..45].copy_from_slice(&4096u64.to_le_bytes());
        item[45..53].copy_from_slice(&12288u64.to_le_bytes());
        let extent = Extent::parse(&item).unwrap();
        assert_eq!((extent.generation, extent.offset, extent.length), (11, 4096, 12288));
        assert!(Extent::parse(&item[..52]).is_none(), "torn");
    }

    #[test]
    fn the_virtual_region_ends() {
        let size = 4 << 60;
        assert!(!is_virtual(VIRTUAL_BASE - 1, size));
        assert!(is_virtual(VIRTUAL_BASE, size));
        assert!(!is_virtual(VIRTUAL_BASE + size, size), "a chunk behind the virtual region is local");
    }

    #[test]
    fn neighbouring_runs_are_joined() {
        let run = |file_offset, address, length| Run { file_offset, address, length };
        let mut runs = Vec::new();
        push_run(&mut runs, run(0, 4096, 4096));
        push_run(&mut runs, run(4096, 8192, 4096));
        push_run(&mut runs, run(8192, 4096, 4096));
        assert_eq!(runs, [run(0, 4096, 8192), run(8192, 4096, 4096)]);
    }
}

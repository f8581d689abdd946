//! A seed as anybody can make one: mkfs.btrfs, a file without checksums, fallocate. The extents that fallocate makes are
//! marked as unwritten, which read as zeroes whatever the device holds, so the mark is taken off in the tree blocks,
//! one extent after the other; what was allocated is what there is then.

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use loam_attach::{FileAttachment, FileOptions};
use loam_seed::VIRTUAL_DATA_NAME;
use loam_seed::disk::{FileExtentHead, HEADER_SIZE, Key, item, object};
use loam_seed::reader::{Device, Filesystem, TreeRoot, Walk};
use loam_sys::btrfs::{self, InodeFlags};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::filesystem;
use crate::process::timed;

/// Room for trees beside the data.
const TREES_BYTES: u64 = 8 << 30;
/// Where the checksum of a tree block begins to count.
const CHECKSUM_BYTES: usize = 32;
/// [`FileExtentHead::kind`].
const REGULAR: u8 = 1;
const UNWRITTEN: u8 = 2;

/// Makes the seed `image` whose `.virtual-data` has `size` bytes. Returns the bytes of the device.
pub(super) fn format(image: &Path, size: u64) -> Result<u64> {
    let length = size + TREES_BYTES;
    let file = File::options().read(true).write(true).create_new(true).open(image);
    let file = file.with_context(|| format!("cannot make {}", image.display()))?;
    file.set_len(length)?;
    timed(
        Command::new("mkfs.btrfs").args(["--quiet", "--metadata", "single", "--data", "single"]).arg(image),
    )?;
    let inode = allocate(image, size)?;
    mark_written(&file, inode, size)?;
    timed(Command::new("btrfstune").args(["-f", "-S", "1"]).arg(image))?;
    Ok(length)
}

/// Mounts the fresh image and allocates the file. Returns its inode.
fn allocate(image: &Path, size: u64) -> Result<u64> {
    let mut attachment = FileAttachment::attach(image, &FileOptions::default())?;
    let allocated = (|| {
        let mount = filesystem::mount(&attachment.device_path(), None, &["nodatasum"])?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o400);
        let file = File::from(rustix::fs::openat(&mount, VIRTUAL_DATA_NAME, flags, mode)?);
        btrfs::set_inode_flags(file.as_fd(), InodeFlags::NOCOW)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
            .with_context(|| format!("cannot allocate {size} bytes on {}", image.display()))?;
        btrfs::sync(&file)?;
        anyhow::Ok(file.metadata()?.ino())
    })();
    let inode = allocated?;
    attachment.detach()?;
    Ok(inode)
}

/// Takes the mark of unwritten extents off all `size` bytes of the file.
fn mark_written(file: &File, inode: u64, size: u64) -> Result<()> {
    let leaves = leaves(file, inode)?;
    let mut marked = 0;
    for leaf in leaves {
        let mut block = vec![0; leaf.length];
        file.read_exact_at(&mut block, leaf.physical)?;
        for extent in leaf.extents {
            let kind = block.get_mut(extent.kind_at).context("an extent lies outside of its block")?;
            ensure!(*kind == UNWRITTEN, "an extent of the file is of kind {kind}, not unwritten");
            *kind = REGULAR;
            marked += extent.bytes;
        }
        let checksum = crc32c::crc32c(&block[CHECKSUM_BYTES..]);
        block[..4].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&block, leaf.physical)?;
    }
    ensure!(marked == size, "the file has {marked} bytes of extents instead of {size}");
    Ok(())
}

/// A tree block with extents of the file.
struct Leaf {
    physical: u64,
    length: usize,
    extents: Vec<UnwrittenExtent>,
}

struct UnwrittenExtent {
    /// The byte of the block that says what it is.
    kind_at: usize,
    bytes: u64,
}

fn leaves(file: &File, inode: u64) -> Result<Vec<Leaf>> {
    let filesystem = Filesystem::open(&[Device { name: "seed", image: file }])?;
    let root: TreeRoot = filesystem.root(object::FS_TREE)?;
    let wanted = |key: Key| key.objectid == inode && key.kind == item::EXTENT_DATA;
    let mut leaves = Vec::new();
    let from = Key { objectid: inode, kind: item::EXTENT_DATA, offset: 0 };
    let mut walk = Walk::starting_at(&filesystem, root, from);
    while let Some(visited) = walk.next() {
        if let Some(fault) = visited.faults.first() {
            bail!("the fresh file system has a fault: {fault}");
        }
        let Some(block) = visited.block.filter(|block| block.is_leaf()) else { continue };
        let mut extents = Vec::new();
        for slot in 0..block.count() {
            let (Some(head), Some((key, body))) = (block.item_head(slot), block.item(slot)) else { continue };
            if wanted(key) {
                let kind_at = HEADER_SIZE + head.offset.get() as usize + offset_of!(FileExtentHead, kind);
                extents.push(UnwrittenExtent { kind_at, bytes: extent_bytes(body)? });
            }
        }
        if !extents.is_empty() {
            let chunk = filesystem.chunks().find(visited.bytenr).context("a tree block lies in no chunk")?;
            let place = chunk.stripes.first().context("a chunk without a place")?;
            let physical = place.physical + (visited.bytenr - chunk.logical);
            leaves.push(Leaf { physical, length: filesystem.node_size() as usize, extents });
        }
    }
    Ok(leaves)
}

/// Bytes of the file's part of an extent: the last word of its item.
fn extent_bytes(body: &[u8]) -> Result<u64> {
    let bytes = body.last_chunk().context("an extent without a length")?;
    Ok(u64::from_le_bytes(*bytes))
}

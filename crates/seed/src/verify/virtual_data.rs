//! The promise that a pool stands on: offset in `.virtual-data` = address = offset on the virtual device less 1 TiB.

use std::ops::ControlFlow;

use zerocopy::FromBytes;

use crate::disk::{FileExtentHead, FileExtentTail, InodeItem, Key, flag, item, object};
use crate::reader::Filesystem;
use crate::{VIRTUAL_BASE, VIRTUAL_DATA_INODE, VIRTUAL_DATA_NAME};

use super::blocks::Trees;
use super::finding::{Finding, Findings};
use super::names::entries;

pub(super) fn check(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    let Some(virtual_device) = filesystem.devices().first() else { return };
    let at = |key: Key, field: &str| Finding::new(field, "").tree(object::FS_TREE).key(key);
    let device = &virtual_device.superblock.device;
    let size = device.total_bytes.get().saturating_sub(VIRTUAL_BASE);
    let inode_key = Key::new(VIRTUAL_DATA_INODE, item::INODE, 0);
    let Some((root, _)) = trees.roots.iter().find(|(root, _)| root.id == object::FS_TREE) else { return };
    let (mut inode, mut named, mut end) = (None, false, 0);
    let mut wrong = Vec::new();
    let from = Key::new(object::FIRST_FREE, 0, 0);
    let result = filesystem.for_each_item(*root, from, &mut |key, body| {
        if key.objectid > VIRTUAL_DATA_INODE {
            return ControlFlow::Break(());
        }
        match (key.objectid, key.kind) {
            (object::FIRST_FREE, item::DIR_INDEX) => {
                let entries = entries(body).unwrap_or_default();
                named |= entries
                    .iter()
                    .any(|entry| entry.name == VIRTUAL_DATA_NAME.as_bytes() && entry.location() == inode_key);
            }
            (VIRTUAL_DATA_INODE, item::INODE) => inode = InodeItem::read_from_bytes(body).ok(),
            (VIRTUAL_DATA_INODE, item::EXTENT_DATA) => match linear_extent(key, body, end) {
                Ok(next) => end = next,
                Err(reason) => wrong.push(Finding { reason, ..at(key, "linear map") }),
            },
            _ => {}
        }
        ControlFlow::Continue(())
    });
    if let Err(error) = result {
        wrong.push(Finding { reason: error.to_string(), ..at(inode_key, "linear map") });
    }
    if !named {
        let reason =
            format!("inode {VIRTUAL_DATA_INODE} is not \"{VIRTUAL_DATA_NAME}\" of the top-level directory");
        wrong.push(Finding { reason, ..at(inode_key, "name") });
    }
    if let Some(inode) = inode {
        findings.expect_same(at(inode_key, "size"), inode.size.get(), size);
        let flags = flag::INODE_NODATASUM | flag::INODE_IMMUTABLE;
        findings.expect_same(at(inode_key, "flags"), inode.flags.get() & flags, flags);
    }
    wrong.into_iter().for_each(|finding| findings.add(finding));
    findings.expect_same(at(inode_key, "extents' end"), end, size);
    linear_chunks(filesystem, device.devid.get(), size, findings);
}

/// An extent of `.virtual-data` continues the one before, and the map; returns where it ends.
fn linear_extent(key: Key, body: &[u8], end: u64) -> Result<u64, String> {
    let Ok((head, rest)) = FileExtentHead::read_from_prefix(body) else {
        return Err("is cut off".to_owned());
    };
    let Ok(tail) = FileExtentTail::read_from_bytes(rest) else { return Err("is cut off".to_owned()) };
    let physical = tail.disk_bytenr.get().wrapping_add(tail.offset.get());
    if head.kind != 1 || head.compression != 0 || key.offset != end {
        return Err(format!("is no plain extent at {end}, where the one before ends"));
    }
    if Some(physical) != VIRTUAL_BASE.checked_add(key.offset) {
        return Err(format!("lies at {physical}, should at {VIRTUAL_BASE} + {}", key.offset));
    }
    key.offset.checked_add(tail.bytes.get()).ok_or_else(|| "has no end".to_owned())
}

/// The chunks of the region lie where their addresses say, on the virtual device.
fn linear_chunks(filesystem: &Filesystem<'_>, devid: u64, size: u64, findings: &mut Findings) {
    let end = VIRTUAL_BASE.saturating_add(size);
    let mut position = VIRTUAL_BASE;
    for chunk in filesystem.chunks().iter().filter(|chunk| chunk.end() > VIRTUAL_BASE && chunk.logical < end)
    {
        let key = Key::new(object::FIRST_FREE, item::CHUNK, chunk.logical);
        let at = |reason: String| Finding::new("linear map", reason).tree(object::CHUNK_TREE).key(key);
        if chunk.logical != position {
            findings.add(at(format!("begins at {}, should at {position}", chunk.logical)));
        }
        position = chunk.end();
        match chunk.stripes.as_slice() {
            [place] if place.devid == devid && place.physical == chunk.logical => {}
            _ => findings.add(at(format!("does not lie at the same place of device {devid}"))),
        }
    }
    if position != end {
        let reason = format!("chunks end at {position}, the region at {end}");
        findings.add(Finding::new("linear map", reason).tree(object::CHUNK_TREE));
    }
}

//! The top-level subvolume: `.virtual-data`, whose offsets are the addresses of the virtual region, and the
//! directory entries of the subvolumes.

use zerocopy::IntoBytes;

use crate::builder::{ItemSink, item_max};
use crate::disk::{FileExtentTail, InodeItem, InodeRef, Key, entry, flag, item, object};
use crate::options::VIRTUAL_BASE;
use crate::{Attributes, Error, Result, hash};

use super::Plan;
use super::fs_tree::{
    FIRST_INDEX, TYPE_DIRECTORY, TYPE_FILE, dir_entry, extent_head, inode_item, root_directory_ref,
};

/// The name of the file that spans the virtual region.
pub const VIRTUAL_DATA_NAME: &str = ".virtual-data";
/// Its inode number, in the top-level subvolume.
pub const VIRTUAL_DATA_INODE: u64 = object::FIRST_FREE + 1;

pub(super) fn top_level(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let root = object::FIRST_FREE;
    let file_entry = (VIRTUAL_DATA_NAME, Key::new(VIRTUAL_DATA_INODE, item::INODE, 0), entry::FILE);
    let subvolumes = plan.subvolumes.iter().enumerate().map(|(position, subvolume)| {
        let location = Key::new(plan.subvolume_id(position), item::ROOT, u64::MAX);
        (subvolume.name, location, entry::DIRECTORY)
    });
    let entries: Vec<_> = std::iter::once(file_entry).chain(subvolumes).collect();
    let size: usize = entries.iter().map(|(name, ..)| 2 * name.len()).sum();
    let inode = InodeItem {
        size: (size as u64).into(),
        ..inode_item(&plan.directory_attributes(), TYPE_DIRECTORY, 1)
    };
    sink.push(Key::new(root, item::INODE, 0), &[inode.as_bytes()])?;
    root_directory_ref(root, sink)?;

    let mut by_hash: Vec<_> =
        entries.iter().map(|entry @ (name, ..)| (hash::name(name.as_bytes()), entry)).collect();
    by_hash.sort_by_key(|(hash, _)| *hash);
    let mut body = Vec::new();
    for group in by_hash.chunk_by(|left, right| left.0 == right.0) {
        body.clear();
        for (_, (name, location, kind)) in group {
            body.extend_from_slice(dir_entry(*location, name.len(), *kind).as_bytes());
            body.extend_from_slice(name.as_bytes());
        }
        if body.len() > item_max(plan.options.node_size) {
            let reason = "too many subvolume names of one hash for a tree block".to_owned();
            return Err(Error::Subvolume { name: group[0].1.0.to_owned(), reason });
        }
        sink.push(Key::new(root, item::DIR_ITEM, group[0].0), &[&body])?;
    }
    for (position, (name, location, kind)) in entries.iter().enumerate() {
        let key = Key::new(root, item::DIR_INDEX, FIRST_INDEX + position as u64);
        sink.push(key, &[dir_entry(*location, name.len(), *kind).as_bytes(), name.as_bytes()])?;
    }
    virtual_data(plan, sink)
}

fn virtual_data(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let inode = VIRTUAL_DATA_INODE;
    let size = plan.options.virtual_size;
    let attributes = Attributes { mode: 0o400, ..plan.directory_attributes() };
    // NODATASUM because nobody knows the data yet; IMMUTABLE because NODATASUM alone lets root open it for writing.
    let body = InodeItem {
        size: size.into(),
        nbytes: size.into(),
        flags: (flag::INODE_NODATASUM | flag::INODE_IMMUTABLE).into(),
        ..inode_item(&attributes, TYPE_FILE, 1)
    };
    sink.push(Key::new(inode, item::INODE, 0), &[body.as_bytes()])?;
    let name = VIRTUAL_DATA_NAME.as_bytes();
    let head = InodeRef { index: FIRST_INDEX.into(), name_length: (name.len() as u16).into() };
    sink.push(Key::new(inode, item::INODE_REF, object::FIRST_FREE), &[head.as_bytes(), name])?;
    for (start, length) in plan.options.data_chunks() {
        let tail = FileExtentTail {
            disk_bytenr: start.into(),
            disk_bytes: length.into(),
            offset: 0.into(),
            bytes: length.into(),
        };
        let key = Key::new(inode, item::EXTENT_DATA, start - VIRTUAL_BASE);
        sink.push(key, &[extent_head(length, 1).as_bytes(), tail.as_bytes()])?;
    }
    Ok(())
}

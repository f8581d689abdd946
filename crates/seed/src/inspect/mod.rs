//! Shows what an image holds: superblocks, then tree after tree, block after block, item after item, each with the
//! names of its fields. Records stream to the caller; each can be printed or serialised.

mod record;

use std::str::FromStr;

use zerocopy::IntoBytes;

use crate::disk::{Header, KeyPointer, SuperBlock, item, object, pieces};
use crate::reader::{Block, Device, Filesystem, TreeRoot, Walk, check_superblock, read_superblock};
use crate::{Error, ReadAt, Result};

pub use record::{FieldValue, PieceValue, Record, Value};
use record::{field_values, piece_value};

/// Which trees to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TreeFilter {
    /// All.
    #[default]
    All,
    /// None: only the superblocks.
    None,
    /// The one with this id.
    One(u64),
}

/// Names that stand for tree ids.
const TREE_NAMES: [(&str, u64); 12] = [
    ("root", object::ROOT_TREE),
    ("extent", object::EXTENT_TREE),
    ("chunk", object::CHUNK_TREE),
    ("dev", object::DEV_TREE),
    ("fs", object::FS_TREE),
    ("csum", object::CSUM_TREE),
    ("quota", object::QUOTA_TREE),
    ("uuid", object::UUID_TREE),
    ("free-space", object::FREE_SPACE_TREE),
    ("block-group", object::BLOCK_GROUP_TREE),
    ("data-reloc", object::DATA_RELOC_TREE),
    ("default", object::FS_TREE),
];

impl FromStr for TreeFilter {
    type Err = String;

    /// "all", "none", a tree's name, or its id.
    fn from_str(text: &str) -> Result<Self, String> {
        match (text, TREE_NAMES.iter().find(|(name, _)| *name == text)) {
            ("all", _) => Ok(TreeFilter::All),
            ("none", _) => Ok(TreeFilter::None),
            (_, Some((_, id))) => Ok(TreeFilter::One(*id)),
            (_, None) => text.parse().map(TreeFilter::One).map_err(|_| {
                let names: Vec<&str> = TREE_NAMES.iter().map(|(name, _)| *name).collect();
                format!("\"{text}\" is no tree: give an id, all, none, or one of {}", names.join(", "))
            }),
        }
    }
}

/// Shows superblocks and trees of a file system given by its images: one or several, the last that of the file system,
/// seeds before it. A seed alone, or the local image of a pair alone, is fine: what lies elsewhere is said to.
///
/// # Errors
/// [`Error::Io`] if `show` fails or a superblock cannot be read; [`Error::Format`] if no superblock is good. Damaged
/// blocks are shown, with what is wrong with them.
pub fn inspect(
    images: &[(&'static str, &dyn ReadAt)],
    filter: TreeFilter,
    show: &mut dyn FnMut(&Record) -> std::io::Result<()>,
) -> Result<()> {
    let mut show = |record: Record| {
        show(&record).map_err(|source| Error::Io {
            operation: "output",
            device: "shown",
            offset: 0,
            length: 0,
            source,
        })
    };
    let devices: Vec<Device<'_>> = images.iter().map(|&(name, image)| Device { name, image }).collect();
    for device in &devices {
        superblocks(*device, &mut show)?;
    }
    if filter == TreeFilter::None {
        return Ok(());
    }
    let filesystem = Filesystem::open(&devices)?;
    let mut roots = vec![filesystem.chunk_root(), filesystem.root_tree()];
    match filesystem.roots() {
        Ok(listed) => roots.extend(listed.into_iter().map(|(root, _)| root)),
        Err(error) => {
            show(Record::Fault { block: filesystem.root_tree().bytenr, reason: error.to_string() })?
        }
    }
    for root in roots {
        if filter == TreeFilter::All || filter == TreeFilter::One(root.id) {
            tree(&filesystem, root, &mut show)?;
        }
    }
    Ok(())
}

fn superblocks(device: Device<'_>, show: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
    let superblock = read_superblock(device, 0)?;
    let faults = check_superblock(&superblock, 0);
    show(Record::Superblock {
        device: device.name,
        fields: field_values(SuperBlock::FIELDS, superblock.as_bytes()),
    })?;
    for fault in faults {
        show(Record::Fault { block: superblock.bytenr.get(), reason: fault.to_string() })?;
    }
    Ok(())
}

fn tree(
    filesystem: &Filesystem<'_>,
    root: TreeRoot,
    show: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let name = TREE_NAMES.iter().find(|(_, id)| *id == root.id).map(|(name, _)| *name);
    show(Record::Tree {
        id: root.id,
        name,
        root: root.bytenr,
        level: root.level,
        generation: root.generation,
    })?;
    let mut walk = Walk::new(filesystem, root);
    while let Some(visited) = walk.next() {
        if let Some(found) = visited.block {
            block(root.id, found, show)?;
        }
        for fault in visited.faults {
            show(Record::Fault { block: visited.bytenr, reason: fault.to_string() })?;
        }
    }
    Ok(())
}

fn block(tree: u64, block: &Block, show: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
    let header = block.header();
    show(Record::Block {
        tree,
        bytenr: block.bytenr(),
        fields: field_values(Header::FIELDS, header.as_bytes()),
    })?;
    for slot in 0..block.count() {
        if let Some(pointer) = block.pointer(slot) {
            show(Record::Child { tree, slot, fields: field_values(KeyPointer::FIELDS, pointer.as_bytes()) })?;
        }
    }
    for (slot, (key, body)) in block.items().enumerate() {
        let pieces = pieces(key.kind, body).iter().map(|piece| piece_value(piece, body)).collect();
        let kind = kind_name(key.kind).map_or_else(|| key.kind.to_string(), str::to_owned);
        show(Record::Item { tree, slot, objectid: key.objectid, kind, offset: key.offset, pieces })?;
    }
    Ok(())
}

/// The name of an item type.
fn kind_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        item::INODE => "inode",
        item::INODE_REF => "inode_ref",
        item::INODE_EXTREF => "inode_extref",
        item::XATTR => "xattr",
        item::ORPHAN => "orphan",
        item::DIR_ITEM => "dir_item",
        item::DIR_INDEX => "dir_index",
        item::EXTENT_DATA => "extent_data",
        item::EXTENT_CSUM => "extent_csum",
        item::ROOT => "root",
        item::ROOT_BACKREF => "root_backref",
        item::ROOT_REF => "root_ref",
        item::EXTENT => "extent",
        item::METADATA => "metadata",
        item::EXTENT_OWNER_REF => "extent_owner_ref",
        item::TREE_BLOCK_REF => "tree_block_ref",
        item::EXTENT_DATA_REF => "extent_data_ref",
        item::SHARED_BLOCK_REF => "shared_block_ref",
        item::SHARED_DATA_REF => "shared_data_ref",
        item::BLOCK_GROUP => "block_group",
        item::FREE_SPACE_INFO => "free_space_info",
        item::FREE_SPACE_EXTENT => "free_space_extent",
        item::FREE_SPACE_BITMAP => "free_space_bitmap",
        item::DEV_EXTENT => "dev_extent",
        item::DEV => "dev",
        item::CHUNK => "chunk",
        item::QGROUP_STATUS => "qgroup_status",
        item::QGROUP_INFO => "qgroup_info",
        item::QGROUP_LIMIT => "qgroup_limit",
        item::QGROUP_RELATION => "qgroup_relation",
        item::TEMPORARY => "temporary",
        item::PERSISTENT => "persistent",
        item::UUID_SUBVOL => "uuid_subvol",
        item::UUID_RECEIVED => "uuid_received",
        _ => return None,
    })
}

//! Goes through all trees once and gathers what the other checks compare.

use std::collections::HashMap;

use zerocopy::FromBytes;

use crate::disk::{
    BlockGroupItem, DevExtent, FileExtentHead, FileExtentTail, FreeSpaceInfo, Key, RootItem, item, object,
};
use crate::reader::{Block, Filesystem, TreeRoot, Walk};

use super::extents::{Backref, Extent, parse_extent};
use super::files::SubvolumeCheck;
use super::finding::{Finding, Findings};

/// Visits after which snapshots of snapshots are not followed any further; a hostile image could otherwise share one
/// subtree a million times.
const VISITS_MAX: u64 = 1 << 26;

/// A tree block that was found by walking.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockInfo {
    pub(super) owner: u64,
    pub(super) level: u8,
    pub(super) generation: u64,
}

/// A pointer to a tree block: from a node, or from a root item.
#[derive(Debug, Clone, Copy)]
pub(super) struct Edge {
    pub(super) child: u64,
    /// None if a root item points to it.
    pub(super) parent: Option<u64>,
    /// The tree, or the owner of the node.
    pub(super) owner: u64,
}

/// A file extent's pointer to a data extent.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataPointer {
    pub(super) bytenr: u64,
    pub(super) length: u64,
    pub(super) leaf: u64,
    pub(super) owner: u64,
    pub(super) inode: u64,
    /// File offset less offset in the extent.
    pub(super) offset: u64,
}

/// A block group item.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockGroup {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) used: u64,
    pub(super) flags: u64,
}

/// A device extent item.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceExtent {
    pub(super) devid: u64,
    pub(super) physical: u64,
    pub(super) item: DevExtent,
}

/// What the free space tree says.
#[derive(Debug, Default)]
pub(super) struct FreeSpace {
    /// Start, length and item of each block group.
    pub(super) infos: Vec<(u64, u64, FreeSpaceInfo)>,
    /// Free runs: start, length.
    pub(super) runs: Vec<(u64, u64)>,
    /// Starts of extents that are noted as bitmaps.
    pub(super) bitmaps: Vec<(u64, u64)>,
}

/// Everything that was gathered.
#[derive(Default)]
pub(super) struct Trees {
    pub(super) roots: Vec<(TreeRoot, RootItem)>,
    /// Items of the root tree that are about subvolumes' places: key and body.
    pub(super) root_refs: Vec<(Key, Vec<u8>)>,
    /// The directory in the root tree that names the default subvolume.
    pub(super) root_directory: Vec<(Key, Vec<u8>)>,
    /// Entries of directories that are subvolumes: tree, directory, index, subvolume, name.
    pub(super) subvolume_entries: Vec<(u64, u64, u64, u64, Vec<u8>)>,
    pub(super) uuids: Vec<(Key, Vec<u8>)>,
    pub(super) blocks: HashMap<u64, BlockInfo>,
    /// Blocks of each tree, shared ones too.
    pub(super) tree_blocks: HashMap<u64, u64>,
    pub(super) edges: Vec<Edge>,
    pub(super) data: Vec<DataPointer>,
    pub(super) extents: Vec<Extent>,
    pub(super) backrefs: Vec<Backref>,
    pub(super) block_groups: Vec<BlockGroup>,
    pub(super) dev_extents: Vec<DeviceExtent>,
    pub(super) free_space: FreeSpace,
    pub(super) quota: Vec<(Key, Vec<u8>)>,
    /// Checksum items: key and where their bodies lie is not kept, only the covered range and the checksums.
    pub(super) checksums: Vec<(u64, Vec<u8>)>,
    pub(super) inodes: u64,
    visits: u64,
}

pub(super) fn check(filesystem: &Filesystem<'_>, findings: &mut Findings) -> Trees {
    let mut trees = Trees::default();
    tree(filesystem, filesystem.chunk_root(), None, &mut trees, findings);
    tree(filesystem, filesystem.root_tree(), None, &mut trees, findings);
    let roots: Vec<(TreeRoot, Option<Key>)> =
        trees.roots.iter().map(|(root, item)| (*root, deletion_progress(item))).collect();
    for (root, progress) in roots {
        if progress.is_some() {
            findings
                .note(format!("subvolume {} is being deleted: what is left of it is not verified", root.id));
        }
        tree(filesystem, root, progress, &mut trees, findings);
    }
    trees
}

/// How far the deletion of a subvolume has come: what lies wholly below this key is gone. None: it is not deleted.
pub(super) fn deletion_progress(item: &RootItem) -> Option<Key> {
    (item.refs.get() == 0).then(|| item.drop_progress.into())
}

fn tree(
    filesystem: &Filesystem<'_>,
    root: TreeRoot,
    deleted_below: Option<Key>,
    trees: &mut Trees,
    findings: &mut Findings,
) {
    trees.edges.push(Edge { child: root.bytenr, parent: None, owner: root.id });
    let holds_files = root.is_subvolume() || root.id == object::DATA_RELOC_TREE;
    let whole = deleted_below.is_none();
    let from = deleted_below.unwrap_or_default();
    let mut files = (holds_files && whole).then(|| SubvolumeCheck::new(filesystem, root.id));
    let mut walk = Walk::starting_at(filesystem, root, from);
    let mut blocks = 0;
    while let Some(visited) = walk.next() {
        blocks += 1;
        trees.visits += 1;
        if trees.visits > VISITS_MAX {
            let reason = format!("more than {VISITS_MAX} visits: the rest of the tree is not verified");
            findings.add(Finding::new("sharing", reason).tree(root.id).block(visited.bytenr));
            break;
        }
        for fault in visited.faults {
            findings.add(Finding::fault(fault).tree(root.id).block(visited.bytenr));
        }
        let Some(block) = visited.block else { continue };
        if block.header().generation.get() > filesystem.superblock().generation.get() {
            let reason = format!("is {}, above the superblock's", block.header().generation);
            findings.add(Finding::new("header.generation", reason).tree(root.id).block(block.bytenr()));
        }
        let known = trees.blocks.contains_key(&block.bytenr());
        if known && !root.is_subvolume() {
            let reason = "another node, or another tree, has this block too";
            findings.add(Finding::new("sharing", reason).tree(root.id).block(block.bytenr()));
            walk.skip_children();
            continue;
        }
        if !known {
            enter(block, from, trees);
        }
        if block.is_leaf() {
            for (key, body) in block.items() {
                match &mut files {
                    Some(files) => files.item(key, body, findings),
                    None if holds_files => {}
                    None => gather(filesystem, root.id, block, key, body, trees, findings),
                }
            }
        }
    }
    *trees.tree_blocks.entry(root.id).or_default() += blocks;
    if let Some(files) = files {
        files.finish(trees, findings);
    }
}

/// Notes a block that is seen for the first time and what it points to, but for children that end below `from`.
fn enter(block: &Block, from: Key, trees: &mut Trees) {
    let header = block.header();
    let (bytenr, owner) = (block.bytenr(), header.owner.get());
    let info = BlockInfo { owner, level: header.level, generation: header.generation.get() };
    trees.blocks.insert(bytenr, info);
    for slot in 0..block.count() {
        let is_gone = block.key(slot + 1).is_some_and(|following| following <= from);
        if let Some(pointer) = block.pointer(slot).filter(|_| !is_gone) {
            trees.edges.push(Edge { child: pointer.bytenr.get(), parent: Some(bytenr), owner });
        }
    }
    let holds_files = owner == object::FS_TREE
        || owner == object::DATA_RELOC_TREE
        || (object::FIRST_FREE..=object::LAST_FREE).contains(&owner);
    if !block.is_leaf() || !holds_files {
        return;
    }
    for (key, body) in block.items().filter(|(key, _)| key.kind == item::EXTENT_DATA) {
        let Ok((head, rest)) = FileExtentHead::read_from_prefix(body) else { continue };
        let Ok((tail, _)) = FileExtentTail::read_from_prefix(rest) else { continue };
        if head.kind != 0 && tail.disk_bytenr.get() != 0 {
            trees.data.push(DataPointer {
                bytenr: tail.disk_bytenr.get(),
                length: tail.disk_bytes.get(),
                leaf: bytenr,
                owner,
                inode: key.objectid,
                offset: key.offset.wrapping_sub(tail.offset.get()),
            });
        }
    }
}

/// Sorts the items of all trees but the subvolumes.
fn gather(
    filesystem: &Filesystem<'_>,
    tree: u64,
    block: &Block,
    key: Key,
    body: &[u8],
    trees: &mut Trees,
    findings: &mut Findings,
) {
    let result = match (tree, key.kind) {
        (object::ROOT_TREE, _) => trees.root_item(key, body),
        (object::EXTENT_TREE | object::BLOCK_GROUP_TREE, item::BLOCK_GROUP) => trees.block_group(key, body),
        (object::EXTENT_TREE, _) => {
            parse_extent(key, body, filesystem.node_size().into(), &mut trees.extents, &mut trees.backrefs)
        }
        (object::DEV_TREE, item::DEV_EXTENT) => whole(body).map(|item| {
            trees.dev_extents.push(DeviceExtent { devid: key.objectid, physical: key.offset, item });
        }),
        (object::FREE_SPACE_TREE, _) => trees.free_space.item(key, body),
        (object::UUID_TREE, item::UUID_SUBVOL | item::UUID_RECEIVED) => {
            trees.uuids.push((key, body.to_vec()));
            Ok(())
        }
        (object::QUOTA_TREE, _) => {
            trees.quota.push((key, body.to_vec()));
            Ok(())
        }
        (object::CSUM_TREE, item::EXTENT_CSUM) => {
            trees.checksums.push((key.offset, body.to_vec()));
            Ok(())
        }
        _ => Ok(()),
    };
    if let Err(reason) = result {
        findings.add(Finding::new("item", reason).tree(tree).block(block.bytenr()).key(key));
    }
}

/// A record that is all of an item's body.
fn whole<T: FromBytes>(body: &[u8]) -> Result<T, String> {
    T::read_from_bytes(body).map_err(|_| format!("has {} bytes, should have {}", body.len(), size_of::<T>()))
}

impl Trees {
    fn root_item(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        match key.kind {
            item::ROOT => {
                let (root, _) =
                    RootItem::read_from_prefix(body).map_err(|_| format!("has only {} bytes", body.len()))?;
                self.roots.push((TreeRoot::of(key.objectid, &root), root));
            }
            item::ROOT_REF | item::ROOT_BACKREF => self.root_refs.push((key, body.to_vec())),
            _ if key.objectid == object::ROOT_TREE_DIR => self.root_directory.push((key, body.to_vec())),
            _ => {}
        }
        Ok(())
    }

    fn block_group(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        let group: BlockGroupItem = whole(body)?;
        let (used, flags) = (group.used.get(), group.flags.get());
        self.block_groups.push(BlockGroup { start: key.objectid, length: key.offset, used, flags });
        match group.chunk_objectid.get() {
            object::FIRST_FREE => Ok(()),
            other => Err(format!("chunk_objectid is {other}, should be 256")),
        }
    }
}

impl FreeSpace {
    fn item(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        match key.kind {
            item::FREE_SPACE_INFO => self.infos.push((key.objectid, key.offset, whole(body)?)),
            item::FREE_SPACE_EXTENT => self.runs.push((key.objectid, key.offset)),
            item::FREE_SPACE_BITMAP => {
                self.bitmaps.push((key.objectid, key.offset));
                bitmap_runs(key, body, &mut self.runs)?;
            }
            kind => return Err(format!("an item of type {kind} has no place in the free space tree")),
        }
        Ok(())
    }
}

/// The free runs of a bitmap: one bit for each sector, lowest first.
fn bitmap_runs(key: Key, bitmap: &[u8], runs: &mut Vec<(u64, u64)>) -> Result<(), String> {
    let sector = u64::from(crate::disk::SECTOR_SIZE);
    if key.offset.div_ceil(sector).div_ceil(8) != bitmap.len() as u64 {
        return Err(format!("{} bytes for {} bytes of space", bitmap.len(), key.offset));
    }
    let is_free = |index: u64| bitmap[(index / 8) as usize] >> (index % 8) & 1 == 1;
    let mut start = None;
    for index in 0..=key.offset / sector {
        let free = index < key.offset / sector && is_free(index);
        match (start, free) {
            (None, true) => start = Some(index),
            (Some(from), false) => {
                runs.push((key.objectid.saturating_add(from * sector), (index - from) * sector));
                start = None;
            }
            _ => {}
        }
    }
    Ok(())
}

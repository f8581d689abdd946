//! Extents and their references, both ways.
//!
//! Every pointer to a tree block, from a node or from a root item, and every pointer of a file extent to data asks for
//! one back reference. It names the pointing block's tree (and, for data, the file), unless that block's own extent is
//! flagged with full back references: then it names the block.

use std::collections::HashMap;

use zerocopy::FromBytes;

use crate::disk::{ExtentDataRef, ExtentItem, Key, SECTOR_SIZE, flag, item, object};
use crate::hash;
use crate::reader::Filesystem;

use super::blocks::{Trees, deletion_progress};
use super::finding::{Finding, Findings, Only, differences};

/// An extent item.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) bytenr: u64,
    pub(super) length: u64,
    pub(super) flags: u64,
    pub(super) refs: u64,
    pub(super) generation: u64,
    /// For a tree block.
    pub(super) level: u8,
    /// The subvolume that simple quotas charge for data.
    pub(super) owner: Option<u64>,
}

impl Extent {
    pub(super) fn is_tree(&self) -> bool {
        self.flags & flag::EXTENT_TREE_BLOCK != 0
    }

    fn key(&self) -> Key {
        match self.is_tree() {
            true => Key::new(self.bytenr, item::METADATA, self.level.into()),
            false => Key::new(self.bytenr, item::EXTENT, self.length),
        }
    }
}

/// A back reference; sorted by extent and then by what it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Backref {
    pub(super) bytenr: u64,
    /// The item type of the reference.
    kind: u8,
    /// The tree, or the block.
    root: u64,
    inode: u64,
    offset: u64,
    count: u64,
}

impl Backref {
    fn block(bytenr: u64, kind: u8, root: u64) -> Self {
        Backref { bytenr, kind, root, inode: 0, offset: 0, count: 1 }
    }

    fn data(bytenr: u64, data: &ExtentDataRef) -> Self {
        Backref {
            bytenr,
            kind: item::EXTENT_DATA_REF,
            root: data.root.get(),
            inode: data.objectid.get(),
            offset: data.offset.get(),
            count: data.count.get().into(),
        }
    }

    fn describe(&self) -> String {
        let count = self.count;
        match self.kind {
            item::TREE_BLOCK_REF => format!("from tree {}", self.root),
            item::SHARED_BLOCK_REF => format!("from block {}", self.root),
            item::SHARED_DATA_REF => format!("{count} from leaf {}", self.root),
            _ => format!(
                "{count} from tree {}, inode {}, offset {}",
                self.root, self.inode, self.offset as i64
            ),
        }
    }
}

/// Takes an item of the extent tree apart.
pub(super) fn parse_extent(
    key: Key,
    body: &[u8],
    node_size: u64,
    extents: &mut Vec<Extent>,
    backrefs: &mut Vec<Backref>,
) -> Result<(), String> {
    match key.kind {
        item::EXTENT | item::METADATA => parse_extent_item(key, body, node_size, extents, backrefs),
        item::TREE_BLOCK_REF | item::SHARED_BLOCK_REF if body.is_empty() => {
            backrefs.push(Backref::block(key.objectid, key.kind, key.offset));
            Ok(())
        }
        item::EXTENT_DATA_REF => {
            let data = ExtentDataRef::read_from_bytes(body).map_err(|_| format!("{} bytes", body.len()))?;
            let hash = hash::data_ref(data.root.get(), data.objectid.get(), data.offset.get());
            // A hash that was taken is counted up; how far cannot be known, so only what is impossible is refused.
            if key.offset < hash {
                return Err(format!("the key's hash is {}, should be {hash}", key.offset));
            }
            backrefs.push(Backref::data(key.objectid, &data));
            Ok(())
        }
        item::SHARED_DATA_REF => {
            let count = u32::from_le_bytes(body.try_into().map_err(|_| format!("{} bytes", body.len()))?);
            let parent = Backref::block(key.objectid, key.kind, key.offset);
            backrefs.push(Backref { count: count.into(), ..parent });
            Ok(())
        }
        _ => Err("an item of this type has no place in the extent tree".to_owned()),
    }
}

fn parse_extent_item(
    key: Key,
    body: &[u8],
    node_size: u64,
    extents: &mut Vec<Extent>,
    backrefs: &mut Vec<Backref>,
) -> Result<(), String> {
    let (head, mut rest) = ExtentItem::read_from_prefix(body).map_err(|_| format!("{} bytes", body.len()))?;
    let flags = head.flags.get();
    let is_tree = match flags & !flag::EXTENT_FULL_BACKREF {
        flag::EXTENT_TREE_BLOCK => true,
        flag::EXTENT_DATA if key.kind == item::EXTENT => false,
        _ => return Err(format!("flags are {flags:#x}")),
    };
    let (length, mut level) = match key.kind {
        item::METADATA => (node_size, key.offset),
        _ => (key.offset, 0),
    };
    if is_tree && key.kind == item::EXTENT {
        // Before `METADATA` items there was a first key and a level here.
        let (info, after) = rest.split_at_checked(18).ok_or("the tree block's key and level are missing")?;
        (level, rest) = (info[17].into(), after);
    }
    let sound = length > 0 && key.objectid.checked_add(length).is_some_and(|end| end <= i64::MAX as u64);
    if !sound || (is_tree && length != node_size) || level > 7 || !length.is_multiple_of(SECTOR_SIZE.into()) {
        return Err(format!("{length} bytes at level {level}"));
    }
    let owner = inline_refs(key.objectid, is_tree, rest, backrefs)?;
    extents.push(Extent {
        bytenr: key.objectid,
        length,
        flags,
        refs: head.refs.get(),
        generation: head.generation.get(),
        level: level as u8,
        owner,
    });
    Ok(())
}

/// Inline references ascend by type; returns the one that is none: who is charged.
fn inline_refs(
    bytenr: u64,
    is_tree: bool,
    mut rest: &[u8],
    backrefs: &mut Vec<Backref>,
) -> Result<Option<u64>, String> {
    let (mut owner, mut last) = (None, 0);
    while let Some((&kind, body)) = rest.split_first() {
        if kind < last {
            return Err(format!("inline reference of type {kind} after {last}"));
        }
        last = kind;
        let short = || format!("an inline reference of type {kind} is cut off");
        let for_tree = matches!(kind, item::TREE_BLOCK_REF | item::SHARED_BLOCK_REF);
        if for_tree != is_tree {
            return Err(format!("inline reference of type {kind} of the wrong kind of extent"));
        }
        if kind == item::EXTENT_DATA_REF {
            let (data, after) = ExtentDataRef::read_from_prefix(body).map_err(|_| short())?;
            backrefs.push(Backref::data(bytenr, &data));
            rest = after;
            continue;
        }
        let (number, after) = body.split_first_chunk().ok_or_else(short)?;
        let number = u64::from_le_bytes(*number);
        rest = after;
        match kind {
            item::EXTENT_OWNER_REF => owner = Some(number),
            item::SHARED_DATA_REF => {
                let (count, after) = rest.split_first_chunk().ok_or_else(short)?;
                let count = u32::from_le_bytes(*count).into();
                backrefs.push(Backref { count, ..Backref::block(bytenr, kind, number) });
                rest = after;
            }
            item::TREE_BLOCK_REF | item::SHARED_BLOCK_REF => {
                backrefs.push(Backref::block(bytenr, kind, number))
            }
            _ => return Err(format!("inline reference of unknown type {kind}")),
        }
    }
    Ok(owner)
}

pub(super) fn check(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    let at =
        |extent: &Extent, field: &str| Finding::new(field, "").tree(object::EXTENT_TREE).key(extent.key());
    let full: HashMap<u64, bool> = trees
        .extents
        .iter()
        .filter(|extent| extent.is_tree())
        .map(|extent| (extent.bytenr, extent.flags & flag::EXTENT_FULL_BACKREF != 0))
        .collect();
    let mut stated = trees.backrefs.clone();
    stated.sort_unstable();
    compare_refs(&stated, &asked_for(trees, &full), findings);
    let mut position = 0;
    for extent in &trees.extents {
        let of_extent = refs_of(&stated, &mut position, extent.bytenr);
        let total = of_extent.iter().fold(0u64, |sum, backref| sum.saturating_add(backref.count));
        findings.expect_same(at(extent, "refs"), extent.refs, total);
        if extent.generation > filesystem.superblock().generation.get() {
            let reason = format!("is {}, above the superblock's", extent.generation);
            findings.add(Finding { reason, ..at(extent, "generation") });
        }
        if extent.is_tree() {
            check_block(extent, of_extent, trees, findings);
        }
    }
    for pair in trees.extents.windows(2) {
        if pair[0].bytenr + pair[0].length > pair[1].bytenr {
            let reason = format!("begins inside of the extent at {}", pair[0].bytenr);
            findings.add(Finding { reason, ..at(&pair[1], "bytenr") });
        }
    }
    check_lengths(trees, findings);
}

/// A tree block is what its extent says.
fn check_block(extent: &Extent, refs: &[Backref], trees: &Trees, findings: &mut Findings) {
    let at = |field: &str| Finding::new(field, "").tree(object::EXTENT_TREE).key(extent.key());
    let Some(block) = trees.blocks.get(&extent.bytenr) else {
        findings.add(Finding { reason: "no tree has this block".to_owned(), ..at("block") });
        return;
    };
    findings.expect_same(at("level"), extent.level.into(), block.level.into());
    findings.expect_same(at("generation"), extent.generation, block.generation);
    // As long as a block's own tree refers to it, its references name trees, and this one among them; a deletion that is
    // under way is between the two.
    let deleted =
        |id: u64| trees.roots.iter().any(|(root, item)| root.id == id && deletion_progress(item).is_some());
    let named =
        refs.iter().any(|backref| backref.kind == item::TREE_BLOCK_REF && backref.root == block.owner);
    if extent.flags & flag::EXTENT_FULL_BACKREF == 0 && !named && !deleted(block.owner) {
        let reason = format!("no reference names tree {}, which the block's header does", block.owner);
        findings.add(Finding { reason, ..at("refs") });
    }
}

/// The references that the trees' pointers ask for, sorted and joined.
fn asked_for(trees: &Trees, full: &HashMap<u64, bool>) -> Vec<Backref> {
    let is_full = |block: u64| full.get(&block).copied().unwrap_or(false);
    let of_blocks = trees.edges.iter().map(|edge| match edge.parent {
        Some(parent) if is_full(parent) => Backref::block(edge.child, item::SHARED_BLOCK_REF, parent),
        _ => Backref::block(edge.child, item::TREE_BLOCK_REF, edge.owner),
    });
    let of_data = trees.data.iter().map(|data| match is_full(data.leaf) {
        true => Backref::block(data.bytenr, item::SHARED_DATA_REF, data.leaf),
        false => Backref {
            bytenr: data.bytenr,
            kind: item::EXTENT_DATA_REF,
            root: data.owner,
            inode: data.inode,
            offset: data.offset,
            count: 1,
        },
    });
    let mut refs: Vec<Backref> = of_blocks.chain(of_data).collect();
    refs.sort_unstable();
    // Several nodes of one tree that have the same child ask for one reference each, and there is only one: they are
    // left apart here, so that it is found. References of data are counted.
    refs.dedup_by(|next, kept| {
        let of_data = matches!(kept.kind, item::EXTENT_DATA_REF | item::SHARED_DATA_REF);
        let same = of_data && Backref { count: 0, ..*next } == Backref { count: 0, ..*kept };
        if same {
            kept.count += next.count;
        }
        same
    });
    refs
}

fn compare_refs(stated: &[Backref], asked_for: &[Backref], findings: &mut Findings) {
    let at = |backref: &Backref, what: &str| {
        let reason = format!("{what}: {}", backref.describe());
        Finding::new(format!("references of the extent at {}", backref.bytenr), reason)
            .tree(object::EXTENT_TREE)
    };
    differences(stated, asked_for, |only| {
        findings.add(match only {
            Only::Left(backref) => at(backref, "stated, but nobody refers to it so"),
            Only::Right(backref) => at(backref, "not stated, but somebody refers to it so"),
        });
    });
}

fn refs_of<'r>(refs: &'r [Backref], position: &mut usize, bytenr: u64) -> &'r [Backref] {
    let start = *position + refs[*position..].partition_point(|backref| backref.bytenr < bytenr);
    *position = start + refs[start..].partition_point(|backref| backref.bytenr == bytenr);
    &refs[start..*position]
}

/// File extents state the length of the data extent that they point to.
fn check_lengths(trees: &Trees, findings: &mut Findings) {
    for data in &trees.data {
        let index = trees.extents.partition_point(|extent| extent.bytenr < data.bytenr);
        let length =
            trees.extents.get(index).filter(|extent| extent.bytenr == data.bytenr && !extent.is_tree());
        let at = Finding::new("disk_bytes", "").tree(data.owner).block(data.leaf);
        let at = Finding {
            field: format!("disk_bytes of inode {}'s extent at {}", data.inode, data.bytenr),
            ..at
        };
        match length {
            Some(extent) => findings.expect_same(at, data.length, extent.length),
            None => findings.add(Finding { reason: "there is no such data extent".to_owned(), ..at }),
        }
    }
}

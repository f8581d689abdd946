//! Streams the extent tree and says of each extent who is charged for it.

use std::collections::BTreeMap;

use zerocopy::FromBytes;

use crate::Result;
use crate::disk::{ExtentItem, Key, flag, item, object};
use crate::reader::{Expected, Filesystem};

use super::is_subvolume;
use super::report::{Finding, Kind, Report};
use super::tree;

/// Bytes of the first key and level that an `EXTENT` item of a tree block has before its references.
const TREE_BLOCK_INFO: usize = 18;
/// The most owners that are counted apart; ids of subvolumes are never used again, so a filesystem of any age has fewer
/// that still own something.
const OWNERS_MAX: usize = 1 << 20;

/// An extent that a subvolume is charged for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Charged {
    /// Where it lies, logically.
    pub(super) bytenr: u64,
    /// Its bytes.
    pub(super) length: u64,
    /// The transaction that made it.
    pub(super) generation: u64,
    /// Who is charged.
    pub(super) owner: u64,
    /// A tree block.
    pub(super) is_tree: bool,
    /// Of the very transaction that enabled the quotas.
    pub(super) is_first: bool,
}

/// Sums of one subvolume, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) data: u64,
    pub(super) metadata: u64,
    /// Of `metadata`, what the transaction that enabled the quotas wrote.
    pub(super) first: u64,
}

impl Sum {
    pub(super) fn total(&self) -> u64 {
        self.data.saturating_add(self.metadata)
    }

    pub(super) fn add(&mut self, other: &Sum) {
        self.data = self.data.saturating_add(other.data);
        self.metadata = self.metadata.saturating_add(other.metadata);
        self.first = self.first.saturating_add(other.first);
    }
}

/// What all subvolumes must be charged.
#[derive(Debug, Default)]
pub(super) struct Charges {
    pub(super) sums: BTreeMap<u64, Sum>,
    /// Owners beyond those that are counted apart: only of a hostile image.
    pub(super) left_out: u64,
}

/// Who is said to have written data that is older than the quotas: quotas were on, off, and on again.
pub(super) type OlderOwners = BTreeMap<u64, u64>;

impl Charges {
    pub(super) fn add(&mut self, charged: &Charged) {
        if self.sums.len() >= OWNERS_MAX && !self.sums.contains_key(&charged.owner) {
            self.left_out += 1;
            return;
        }
        let (data, metadata) = if charged.is_tree { (0, charged.length) } else { (charged.length, 0) };
        let first = if charged.is_first { metadata } else { 0 };
        self.sums.entry(charged.owner).or_default().add(&Sum { data, metadata, first });
    }
}

/// Shows every extent that somebody is charged for, in order of addresses; returns how many extents of each owner are too
/// old for it.
pub(super) fn for_each(
    filesystem: &Filesystem<'_>,
    enabled: u64,
    report: &mut Report,
    visit: &mut dyn FnMut(Charged),
) -> Result<OlderOwners> {
    let mut older = OlderOwners::new();
    let root = filesystem.root(object::EXTENT_TREE)?;
    tree::for_each(filesystem, root, report, &mut |key, body, report| {
        if !matches!(key.kind, item::EXTENT | item::METADATA) {
            return Ok(());
        }
        match parse(key, body, filesystem.node_size().into()) {
            Ok(extent) => charge(filesystem, &extent, enabled, report, &mut older, visit),
            Err(reason) => {
                let message = format!("item {key} of the extent tree: {reason}");
                report.find(Finding::new(Kind::BadItem, None, message));
            }
        }
        Ok(())
    })?;
    Ok(older)
}

/// An item of the extent tree.
struct Extent {
    bytenr: u64,
    length: u64,
    generation: u64,
    /// The level of a tree block.
    level: Option<u8>,
    /// Whom data says it was written by.
    owner: Option<u64>,
}

fn charge(
    filesystem: &Filesystem<'_>,
    extent: &Extent,
    enabled: u64,
    report: &mut Report,
    older: &mut OlderOwners,
    visit: &mut dyn FnMut(Charged),
) {
    if extent.generation < enabled {
        if let Some(owner) = extent.owner.filter(|owner| is_subvolume(*owner))
            && (older.len() < OWNERS_MAX || older.contains_key(&owner))
        {
            *older.entry(owner).or_default() += 1;
        }
        report.counts.older_extents += 1;
        report.counts.older_bytes = report.counts.older_bytes.saturating_add(extent.length);
        return;
    }
    let owner = match extent.level {
        Some(level) => block_owner(filesystem, extent, level, report),
        None => extent.owner,
    };
    let Some(owner) = owner else {
        report.counts.unowned_extents += u64::from(extent.level.is_none());
        return;
    };
    if !is_subvolume(owner) {
        return;
    }
    match extent.level {
        Some(_) => report.counts.tree_blocks += 1,
        None => report.counts.data_extents += 1,
    }
    visit(Charged {
        bytenr: extent.bytenr,
        length: extent.length,
        generation: extent.generation,
        owner,
        is_tree: extent.level.is_some(),
        is_first: extent.generation == enabled,
    });
}

/// The owner in a tree block's header: its references name whoever shares it now, not always the one that is charged.
fn block_owner(filesystem: &Filesystem<'_>, extent: &Extent, level: u8, report: &mut Report) -> Option<u64> {
    let expected =
        Expected { level: Some(level), generation: Some(extent.generation), ..Expected::default() };
    let mut faults = Vec::new();
    let block = filesystem.read_block(extent.bytenr, &expected, &mut faults);
    for fault in faults {
        let message = format!("tree block {}, whose owner is charged: {fault}", extent.bytenr);
        report.find(Finding::new(Kind::Damaged, None, message));
    }
    block.map(|block| block.header().owner.get())
}

fn parse(key: Key, body: &[u8], node_size: u64) -> Result<Extent, String> {
    let (head, mut rest) =
        ExtentItem::read_from_prefix(body).map_err(|_| format!("has only {} bytes", body.len()))?;
    let is_tree = head.flags.get() & flag::EXTENT_TREE_BLOCK != 0;
    let (length, mut level) = match key.kind {
        item::METADATA if is_tree => (node_size, key.offset),
        item::METADATA => return Err("is no tree block".to_owned()),
        _ => (key.offset, 0),
    };
    if is_tree && key.kind == item::EXTENT {
        let info = rest.split_at_checked(TREE_BLOCK_INFO).ok_or("the tree block's level is missing")?;
        (level, rest) = (info.0[TREE_BLOCK_INFO - 1].into(), info.1);
    }
    if length == 0 || key.objectid.checked_add(length).is_none() || level > 7 {
        return Err(format!("{length} bytes at level {level}"));
    }
    Ok(Extent {
        bytenr: key.objectid,
        length,
        generation: head.generation.get(),
        level: is_tree.then_some(level as u8),
        owner: if is_tree { None } else { data_owner(rest)? },
    })
}

/// The inline `EXTENT_OWNER_REF`. References ascend by type and this is the lowest of them that data has, so it is first.
fn data_owner(references: &[u8]) -> Result<Option<u64>, String> {
    match references.split_first() {
        Some((&item::EXTENT_OWNER_REF, rest)) => {
            let (owner, _) = rest.split_first_chunk().ok_or("its owner is cut off")?;
            Ok(Some(u64::from_le_bytes(*owner)))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item_body(generation: u64, flags: u64, rest: &[u8]) -> Vec<u8> {
        let mut body: Vec<u8> =
            [1, generation, flags].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        body.extend(rest);
        body
    }

    #[test]
    fn owners_are_found_or_not_there() {
        let mut reference = vec![item::EXTENT_OWNER_REF];
        reference.extend(300u64.to_le_bytes());
        let key = Key::new(4096, item::EXTENT, 8192);
        let extent = parse(key, &item_body(9, flag::EXTENT_DATA, &reference), 16384).expect("sound");
        assert_eq!((extent.owner, extent.length, extent.generation), (Some(300), 8192, 9));
        let other = [item::EXTENT_DATA_REF; 29];
        let extent = parse(key, &item_body(9, flag::EXTENT_DATA, &other), 16384).expect("sound");
        assert_eq!(extent.owner, None);
        assert!(parse(key, &item_body(9, flag::EXTENT_DATA, &reference[..5]), 16384).is_err(), "cut off");
    }

    #[test]
    fn tree_blocks_have_the_size_of_nodes() {
        let key = Key::new(1 << 20, item::METADATA, 1);
        let extent = parse(key, &item_body(9, flag::EXTENT_TREE_BLOCK, &[]), 16384).expect("sound");
        assert_eq!((extent.level, extent.length), (Some(1), 16384));
        assert!(parse(key, &item_body(9, flag::EXTENT_DATA, &[]), 16384).is_err());
        let deep = Key::new(1 << 20, item::METADATA, 256);
        assert!(parse(deep, &item_body(9, flag::EXTENT_TREE_BLOCK, &[]), 16384).is_err());
        let far = Key::new(u64::MAX - 1, item::EXTENT, 4096);
        assert!(parse(far, &item_body(9, flag::EXTENT_DATA, &[]), 16384).is_err());
    }
}

//! The extent tree: every tree block, every data extent with its references, every block group.
//!
//! It describes its own blocks too, so their number must be known before the first is written. Leaves are packed as
//! full as they go, and adding an item to a sequence never lowers the number of leaves, so counting with the last
//! result until it stays the same finds the least number that is right.

use zerocopy::IntoBytes;

use crate::builder::{ItemSink, LeafCounter, fan_out, levels_in_order};
use crate::disk::{BlockGroupItem, ExtentDataRef, ExtentItem, Key, flag, item, object};
use crate::options::{GENERATION, VIRTUAL_BASE};
use crate::{Error, Result};

use super::refs::{self, DataRefs};
use super::small::Chunk;
use super::store::TreeBlocks;
use super::top_level::VIRTUAL_DATA_INODE;
use super::{Plan, TREE_CHUNKS};

/// How many times the number of blocks may be corrected; each round divides the error by about two hundred.
const ROUNDS_MAX: usize = 16;

/// Every tree block of an image, written or counted, in order of address.
pub(super) struct Census {
    /// Those of the SYSTEM chunk.
    pub(super) system: TreeBlocks,
    /// Those of the METADATA chunk.
    pub(super) metadata: Vec<TreeBlocks>,
}

impl Census {
    /// Adds the extent tree's own blocks after those that are known, and `after` behind them.
    pub(super) fn add_own(&mut self, plan: &Plan<'_>, after: TreeBlocks, data_refs: &DataRefs) -> Result<()> {
        let own = self.metadata.len();
        self.metadata.push((object::EXTENT_TREE, vec![0]));
        self.metadata.push(after);
        for _ in 0..ROUNDS_MAX {
            let mut counter = LeafCounter::new(plan.options.node_size);
            extent_tree(plan, self, data_refs, &mut counter)?;
            let levels = levels_in_order(counter.leaves(), fan_out(plan.options.node_size));
            let settled = levels.len() == self.metadata[own].1.len();
            self.metadata[own].1 = levels;
            if settled {
                return Ok(());
            }
        }
        Err(Error::Inconsistent("the number of extent tree blocks does not settle".to_owned()))
    }

    /// Blocks in the METADATA chunk.
    pub(super) fn metadata_blocks(&self) -> u64 {
        self.metadata.iter().map(|(_, levels)| levels.len() as u64).sum()
    }
}

/// Sends all items, in key order.
pub(super) fn extent_tree(
    plan: &Plan<'_>,
    census: &Census,
    data_refs: &DataRefs,
    sink: &mut dyn ItemSink,
) -> Result<()> {
    let node_size = u64::from(plan.options.node_size);
    let mut position = 0;
    for (index, chunk) in plan.chunks().enumerate() {
        match index {
            0 => blocks(chunk, node_size, std::slice::from_ref(&census.system), sink)?,
            1 => blocks(chunk, node_size, &census.metadata, sink)?,
            _ => {
                let of_chunk = data_refs.of_chunk(&mut position, (index - TREE_CHUNKS) as u32);
                data_extent(plan, chunk, refs::total(of_chunk), sink)?;
                refs::write(of_chunk, chunk.start, sink)?;
                block_group(chunk, sink)?;
            }
        }
    }
    Ok(())
}

/// The blocks of a chunk, and after the first of them, by key order, the block group.
fn blocks(chunk: Chunk, node_size: u64, trees: &[TreeBlocks], sink: &mut dyn ItemSink) -> Result<()> {
    let blocks = trees.iter().flat_map(|(owner, levels)| levels.iter().map(move |&level| (*owner, level)));
    for (index, (owner, level)) in blocks.enumerate() {
        let bytenr = chunk.start + index as u64 * node_size;
        let head = ExtentItem {
            refs: 1.into(),
            generation: GENERATION.into(),
            flags: flag::EXTENT_TREE_BLOCK.into(),
        };
        let key = Key::new(bytenr, item::METADATA, level.into());
        sink.push(key, &[head.as_bytes(), &[item::TREE_BLOCK_REF], &owner.to_le_bytes()])?;
        if index == 0 {
            block_group(chunk, sink)?;
        }
    }
    Ok(())
}

/// The one extent of a data chunk, with the reference of `.virtual-data` inline; `others` follow under their own keys.
fn data_extent(plan: &Plan<'_>, chunk: Chunk, others: u64, sink: &mut dyn ItemSink) -> Result<()> {
    let head = ExtentItem {
        refs: (1 + others).into(),
        generation: GENERATION.into(),
        flags: flag::EXTENT_DATA.into(),
    };
    let body = ExtentDataRef {
        root: object::FS_TREE.into(),
        objectid: VIRTUAL_DATA_INODE.into(),
        offset: (chunk.start - VIRTUAL_BASE).into(),
        count: 1.into(),
    };
    let key = Key::new(chunk.start, item::EXTENT, chunk.length);
    // Inline references are sorted by type, and the owner's type is the lowest.
    let owner = object::FS_TREE.to_le_bytes();
    let (owner_kind, owner): (&[u8], &[u8]) =
        if plan.options.simple_quota { (&[item::EXTENT_OWNER_REF], &owner) } else { (&[], &[]) };
    sink.push(key, &[head.as_bytes(), owner_kind, owner, &[item::EXTENT_DATA_REF], body.as_bytes()])
}

fn block_group(chunk: Chunk, sink: &mut dyn ItemSink) -> Result<()> {
    let body = BlockGroupItem {
        used: chunk.used.into(),
        chunk_objectid: object::FIRST_FREE.into(),
        flags: chunk.kind.into(),
    };
    sink.push(Key::new(chunk.start, item::BLOCK_GROUP, chunk.length), &[body.as_bytes()])
}

//! Builds B-trees from the bottom up out of items that come in key order.
//!
//! A [`TreeBuilder`] holds one block for each level and hands a block on as soon as nothing more fits, so its memory
//! does not depend on the number of items. Blocks are placed in post-order: a node directly after the last of its
//! children, the root last. A [`LeafCounter`] takes the same items and says in advance how many blocks they need;
//! that is how trees that describe their own blocks are planned.

use zerocopy::IntoBytes;

use crate::disk::{
    DiskKey, HEADER_SIZE, Header, ITEM_SIZE, Item, Key, KeyPointer, LEVEL_MAX, POINTER_SIZE, flag,
};
use crate::options::GENERATION;
use crate::{Error, Result};

/// Takes items in ascending key order.
pub(crate) trait ItemSink {
    /// Adds an item whose body is the concatenation of `parts`.
    fn push(&mut self, key: Key, parts: &[&[u8]]) -> Result<()>;
}

/// Bytes of items, heads and bodies, that a leaf takes.
pub(crate) fn leaf_capacity(node_size: u32) -> usize {
    node_size as usize - HEADER_SIZE
}

/// Children that a node takes.
pub(crate) fn fan_out(node_size: u32) -> usize {
    leaf_capacity(node_size) / POINTER_SIZE
}

/// The longest body of an item.
pub(crate) fn item_max(node_size: u32) -> usize {
    leaf_capacity(node_size) - ITEM_SIZE
}

/// Counts the leaves that items need.
#[derive(Debug)]
pub(crate) struct LeafCounter {
    capacity: usize,
    used: usize,
    leaves: u64,
}

impl LeafCounter {
    pub(crate) fn new(node_size: u32) -> Self {
        LeafCounter { capacity: leaf_capacity(node_size), used: 0, leaves: 1 }
    }

    /// Leaves so far; an empty tree has one.
    pub(crate) fn leaves(&self) -> u64 {
        self.leaves
    }
}

impl ItemSink for LeafCounter {
    fn push(&mut self, _key: Key, parts: &[&[u8]]) -> Result<()> {
        let bytes = ITEM_SIZE + parts.iter().map(|part| part.len()).sum::<usize>();
        if self.used + bytes > self.capacity {
            self.leaves += 1;
            self.used = 0;
        }
        self.used += bytes;
        Ok(())
    }
}

/// The levels of all blocks of a tree with so many leaves, in the order in which a [`TreeBuilder`] places them.
pub(crate) fn levels_in_order(leaves: u64, fan_out: usize) -> Vec<u8> {
    struct Levels {
        order: Vec<u8>,
        open: Vec<usize>,
        fan_out: usize,
    }
    impl Levels {
        fn add_child(&mut self, level: u8) {
            let index = usize::from(level) - 1;
            if self.open.len() == index {
                self.open.push(0);
            }
            if self.open[index] == self.fan_out {
                self.open[index] = 0;
                self.order.push(level);
                self.add_child(level + 1);
            }
            self.open[index] += 1;
        }
    }
    let mut levels = Levels { order: Vec::with_capacity(leaves as usize + 8), open: Vec::new(), fan_out };
    for _ in 1..leaves {
        levels.order.push(0);
        levels.add_child(1);
    }
    let mut level = 0;
    loop {
        levels.order.push(level);
        if levels.open.len() == usize::from(level) {
            return levels.order;
        }
        level += 1;
        levels.add_child(level);
    }
}

/// Gives blocks their addresses and takes them.
pub(crate) trait BlockSink {
    /// Places the next block of tree `owner`: completes its header (address, checksum), stores it and returns its
    /// logical address.
    fn place(&mut self, owner: u64, level: u8, block: &mut [u8]) -> Result<u64>;
}

/// Where a finished tree lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Root {
    /// Logical address of the root block.
    pub(crate) bytenr: u64,
    pub(crate) level: u8,
    pub(crate) blocks: u64,
}

/// The header fields that all blocks of an image share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockIdentity {
    pub(crate) fsid: [u8; 16],
    pub(crate) chunk_tree_uuid: [u8; 16],
}

struct Leaf {
    block: Vec<u8>,
    count: usize,
    /// Bodies grow down from the end: where the lowest begins.
    bodies: usize,
    first: Key,
}

struct Inner {
    block: Vec<u8>,
    count: usize,
    first: Key,
}

/// Builds one tree.
pub(crate) struct TreeBuilder<'s> {
    owner: u64,
    identity: BlockIdentity,
    sink: &'s mut dyn BlockSink,
    leaf: Leaf,
    inner: Vec<Inner>,
    last: Option<Key>,
    blocks: u64,
    node_size: usize,
}

impl<'s> TreeBuilder<'s> {
    pub(crate) fn new(
        owner: u64,
        node_size: u32,
        identity: BlockIdentity,
        sink: &'s mut dyn BlockSink,
    ) -> Self {
        let node_size = node_size as usize;
        let leaf = Leaf { block: vec![0; node_size], count: 0, bodies: node_size, first: Key::default() };
        TreeBuilder { owner, identity, sink, leaf, inner: Vec::new(), last: None, blocks: 0, node_size }
    }

    /// Writes what is left and returns where the root lies.
    pub(crate) fn finish(mut self) -> Result<Root> {
        let mut first = self.leaf.first;
        let mut bytenr = self.place_leaf()?;
        let mut level = 0;
        while self.inner.len() > usize::from(level) {
            level += 1;
            self.add_child(level, first, bytenr)?;
            first = self.inner[usize::from(level) - 1].first;
            bytenr = self.place_inner(level)?;
        }
        Ok(Root { bytenr, level, blocks: self.blocks })
    }

    fn place_leaf(&mut self) -> Result<u64> {
        let TreeBuilder { leaf, sink, .. } = self;
        write_header(&mut leaf.block, self.identity, self.owner, leaf.count, 0);
        let bytenr = sink.place(self.owner, 0, &mut leaf.block)?;
        leaf.block.fill(0);
        leaf.count = 0;
        leaf.bodies = self.node_size;
        self.blocks += 1;
        Ok(bytenr)
    }

    fn place_inner(&mut self, level: u8) -> Result<u64> {
        let inner = &mut self.inner[usize::from(level) - 1];
        write_header(&mut inner.block, self.identity, self.owner, inner.count, level);
        let bytenr = self.sink.place(self.owner, level, &mut inner.block)?;
        inner.block.fill(0);
        inner.count = 0;
        self.blocks += 1;
        Ok(bytenr)
    }

    fn add_child(&mut self, level: u8, first: Key, bytenr: u64) -> Result<()> {
        if level >= LEVEL_MAX {
            return Err(Error::Inconsistent(format!(
                "tree {} needs more than {LEVEL_MAX} levels",
                self.owner
            )));
        }
        let index = usize::from(level) - 1;
        if self.inner.len() == index {
            self.inner.push(Inner { block: vec![0; self.node_size], count: 0, first });
        }
        if HEADER_SIZE + (self.inner[index].count + 1) * POINTER_SIZE > self.node_size {
            let full_first = self.inner[index].first;
            let full = self.place_inner(level)?;
            self.add_child(level + 1, full_first, full)?;
        }
        let inner = &mut self.inner[index];
        if inner.count == 0 {
            inner.first = first;
        }
        let pointer = KeyPointer { key: first.into(), bytenr: bytenr.into(), generation: GENERATION.into() };
        let start = HEADER_SIZE + inner.count * POINTER_SIZE;
        inner.block[start..start + POINTER_SIZE].copy_from_slice(pointer.as_bytes());
        inner.count += 1;
        Ok(())
    }
}

impl ItemSink for TreeBuilder<'_> {
    fn push(&mut self, key: Key, parts: &[&[u8]]) -> Result<()> {
        if self.last.is_some_and(|last| last >= key) {
            return Err(Error::Inconsistent(format!("tree {}: key {key} is not above the last", self.owner)));
        }
        self.last = Some(key);
        let size = parts.iter().map(|part| part.len()).sum::<usize>();
        if size + ITEM_SIZE + HEADER_SIZE > self.node_size {
            return Err(Error::Inconsistent(format!("tree {}: item {key} has {size} bytes", self.owner)));
        }
        if HEADER_SIZE + (self.leaf.count + 1) * ITEM_SIZE + size > self.leaf.bodies {
            let first = self.leaf.first;
            let bytenr = self.place_leaf()?;
            self.add_child(1, first, bytenr)?;
        }
        let leaf = &mut self.leaf;
        if leaf.count == 0 {
            leaf.first = key;
        }
        leaf.bodies -= size;
        let mut position = leaf.bodies;
        for part in parts {
            leaf.block[position..position + part.len()].copy_from_slice(part);
            position += part.len();
        }
        let item = Item {
            key: DiskKey::from(key),
            offset: ((leaf.bodies - HEADER_SIZE) as u32).into(),
            size: (size as u32).into(),
        };
        let start = HEADER_SIZE + leaf.count * ITEM_SIZE;
        leaf.block[start..start + ITEM_SIZE].copy_from_slice(item.as_bytes());
        leaf.count += 1;
        Ok(())
    }
}

fn write_header(block: &mut [u8], identity: BlockIdentity, owner: u64, count: usize, level: u8) {
    let header = Header {
        checksum: [0; 32],
        fsid: identity.fsid,
        bytenr: 0.into(),
        flags: (flag::HEADER_WRITTEN | flag::HEADER_MIXED_BACKREF).into(),
        chunk_tree_uuid: identity.chunk_tree_uuid,
        generation: GENERATION.into(),
        owner: owner.into(),
        count: (count as u32).into(),
        level,
    };
    block[..HEADER_SIZE].copy_from_slice(header.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Placed {
        levels: Vec<u8>,
    }

    impl BlockSink for Placed {
        fn place(&mut self, _owner: u64, level: u8, _block: &mut [u8]) -> Result<u64> {
            self.levels.push(level);
            Ok(4096 * self.levels.len() as u64)
        }
    }

    fn build(node_size: u32, items: impl Iterator<Item = usize> + Clone) -> (Vec<u8>, Root, u64) {
        let identity = BlockIdentity { fsid: [1; 16], chunk_tree_uuid: [2; 16] };
        let mut placed = Placed::default();
        let mut builder = TreeBuilder::new(5, node_size, identity, &mut placed);
        let mut counter = LeafCounter::new(node_size);
        let body = vec![0xaa; node_size as usize];
        for (index, size) in items.enumerate() {
            let key = Key::new(index as u64, 1, 0);
            builder.push(key, &[&body[..size / 2], &body[size / 2..size]]).unwrap();
            counter.push(key, &[&body[..size]]).unwrap();
        }
        let root = builder.finish().unwrap();
        (placed.levels, root, counter.leaves())
    }

    #[test]
    fn the_plan_foretells_count_and_levels_of_blocks() {
        for count in [0, 1, 2, 5, 39, 40, 41, 119, 120, 121, 122, 4_000, 14_400, 20_000] {
            let (levels, root, leaves) = build(4096, (0..count).map(|index| 900 + index % 700));
            assert_eq!(levels_in_order(leaves, fan_out(4096)), levels, "{count} items");
            assert_eq!(root.blocks, levels.len() as u64);
            assert_eq!(root.bytenr, 4096 * root.blocks);
            assert_eq!(Some(&root.level), levels.iter().max());
        }
    }

    #[test]
    fn keys_out_of_order_and_items_too_long_are_refused() {
        let identity = BlockIdentity { fsid: [1; 16], chunk_tree_uuid: [2; 16] };
        let mut placed = Placed::default();
        let mut builder = TreeBuilder::new(5, 4096, identity, &mut placed);
        builder.push(Key::new(2, 1, 0), &[b"x"]).unwrap();
        assert!(builder.push(Key::new(2, 1, 0), &[b"x"]).is_err());
        assert!(builder.push(Key::new(1, 9, 9), &[b"x"]).is_err());
        let body = vec![0; item_max(4096) + 1];
        assert!(builder.push(Key::new(3, 1, 0), &[&body]).is_err());
        builder.push(Key::new(4, 1, 0), &[&body[1..]]).unwrap();
        assert_eq!(builder.finish().unwrap().blocks, 3);
    }
}

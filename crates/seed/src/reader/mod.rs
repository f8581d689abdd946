//! Reads a btrfs file system from its superblock on, knowing nothing of who wrote it: a fresh image, or one that a
//! kernel has mounted since (unmounted, or quiet).
//!
//! [`Filesystem::open`] reads superblocks and the chunk tree; [`Walk`] goes through the blocks of a tree and reports
//! what is wrong with each; [`Filesystem::for_each_item`] goes through its items and fails at the first fault. Input
//! is not trusted: nothing panics, a walk visits a block at most once since keys must ascend, and memory is bounded by
//! one block for each level.

mod block;
mod chunks;
mod crc;
mod superblock;
mod walk;

use std::ops::ControlFlow;

use zerocopy::FromBytes;

use crate::disk::{DevItem, Key, RootItem, SuperBlock, item, object};
use crate::{Error, ReadAt, Result};

pub use block::{Block, Expected, Fault, Uuids};
pub use chunks::{Chunk, ChunkMap, Place};
pub use superblock::{check_superblock, read_superblock, read_virtual_superblock};
pub use walk::{TreeRoot, Visited, Walk};

/// A device of a file system, as an image.
#[derive(Clone, Copy)]
pub struct Device<'a> {
    /// What to call it in messages.
    pub name: &'static str,
    /// Its bytes.
    pub image: &'a dyn ReadAt,
}

/// A device with the superblock that was read from it.
pub struct OpenDevice<'a> {
    /// The device.
    pub device: Device<'a>,
    /// Its superblock: the first good copy.
    pub superblock: Box<SuperBlock>,
}

/// A file system whose chunks are known.
pub struct Filesystem<'a> {
    devices: Vec<OpenDevice<'a>>,
    main: usize,
    chunk_tree_uuid: Option<[u8; 16]>,
    chunks: ChunkMap,
    device_items: Vec<DevItem>,
    chunk_faults: Vec<(u64, Fault)>,
}

impl<'a> Filesystem<'a> {
    /// Reads superblocks and chunk tree. The file system is that of the last device; seeds come before it.
    ///
    /// Faults of the chunk tree do not fail this as long as something can be read; see [`Filesystem::chunk_faults`].
    ///
    /// # Errors
    /// A device has no good superblock, or one that asks for what is not known here.
    pub fn open(devices: &[Device<'a>]) -> Result<Self> {
        let mut open = Vec::new();
        for &device in devices {
            open.push(OpenDevice { device, superblock: superblock::first_good(device)? });
        }
        let Some(main) = open.len().checked_sub(1) else {
            return Err(Error::Inconsistent("no device was given".to_owned()));
        };
        let superblock = &open[main].superblock;
        let format = |reason: String| Error::Format {
            what: "superblock",
            device: open[main].device.name,
            offset: superblock.bytenr.get(),
            reason,
        };
        superblock::supported(superblock).map_err(format)?;
        let used = (superblock.system_chunks_size.get() as usize).min(superblock.system_chunks.len());
        let chunks = ChunkMap::of_superblock(&superblock.system_chunks[..used]).map_err(format)?;
        let mut filesystem = Filesystem {
            devices: open,
            main,
            chunk_tree_uuid: None,
            chunks,
            device_items: Vec::new(),
            chunk_faults: Vec::new(),
        };
        filesystem.read_chunk_tree();
        Ok(filesystem)
    }

    fn read_chunk_tree(&mut self) {
        let (mut chunks, mut devices, mut faults) = (self.chunks.clone(), Vec::new(), Vec::new());
        let mut uuid = None;
        let mut walk = Walk::new(self, self.chunk_root());
        while let Some(visited) = walk.next() {
            let Some(block) = visited.block else { continue };
            uuid.get_or_insert(block.header().chunk_tree_uuid);
            for (key, body) in block.items() {
                let result = match key.kind {
                    item::CHUNK => Chunk::parse(key, body).and_then(|chunk| chunks.insert(chunk)),
                    item::DEV => match DevItem::read_from_bytes(body) {
                        Ok(device) => {
                            devices.push(device);
                            Ok(())
                        }
                        Err(_) => Err(format!("{} bytes", body.len())),
                    },
                    _ => Ok(()),
                };
                if let Err(reason) = result {
                    faults.push((block.bytenr(), Fault { field: "item".to_owned(), key: Some(key), reason }));
                }
            }
        }
        self.chunk_tree_uuid = uuid;
        (self.chunks, self.device_items, self.chunk_faults) = (chunks, devices, faults);
    }

    /// The superblock of the file system.
    pub fn superblock(&self) -> &SuperBlock {
        &self.devices[self.main].superblock
    }

    /// The devices that were given.
    pub fn devices(&self) -> &[OpenDevice<'a>] {
        &self.devices
    }

    /// The device items of the chunk tree.
    pub fn device_items(&self) -> &[DevItem] {
        &self.device_items
    }

    /// The chunk map.
    pub fn chunks(&self) -> &ChunkMap {
        &self.chunks
    }

    /// Chunk and device items that cannot be understood: block and fault.
    pub fn chunk_faults(&self) -> &[(u64, Fault)] {
        &self.chunk_faults
    }

    /// The UUID of the chunk tree, which all blocks carry; none before its first block was read.
    pub fn chunk_tree_uuid(&self) -> Option<[u8; 16]> {
        self.chunk_tree_uuid
    }

    /// Bytes of a tree block.
    pub fn node_size(&self) -> u32 {
        self.superblock().node_size.get()
    }

    /// The root of the chunk tree.
    pub fn chunk_root(&self) -> TreeRoot {
        let superblock = self.superblock();
        TreeRoot {
            id: object::CHUNK_TREE,
            bytenr: superblock.chunk_root.get(),
            level: superblock.chunk_root_level,
            generation: superblock.chunk_root_generation.get(),
        }
    }

    /// The root of the root tree.
    pub fn root_tree(&self) -> TreeRoot {
        let superblock = self.superblock();
        TreeRoot {
            id: object::ROOT_TREE,
            bytenr: superblock.root.get(),
            level: superblock.root_level,
            generation: superblock.generation.get(),
        }
    }

    /// All trees that the root tree lists, by id.
    ///
    /// # Errors
    /// The root tree cannot be read.
    pub fn roots(&self) -> Result<Vec<(TreeRoot, RootItem)>> {
        let mut roots = Vec::new();
        self.for_each_item(self.root_tree(), Key::default(), &mut |key, body| {
            if key.kind == item::ROOT
                && let Ok((root, _)) = RootItem::read_from_prefix(body)
            {
                roots.push((TreeRoot::of(key.objectid, &root), root));
            }
            ControlFlow::Continue(())
        })?;
        Ok(roots)
    }

    /// The root of a tree.
    ///
    /// # Errors
    /// The root tree cannot be read, or does not list the tree.
    pub fn root(&self, id: u64) -> Result<TreeRoot> {
        let root = self.roots()?.into_iter().find(|(root, _)| root.id == id);
        root.map(|(root, _)| root).ok_or_else(|| Error::Format {
            what: "root tree",
            device: self.devices[self.main].device.name,
            offset: self.root_tree().bytenr,
            reason: format!("there is no tree {id}"),
        })
    }

    /// Shows all items of a tree from the key `from` on, in order, until `visit` breaks.
    ///
    /// # Errors
    /// The first block with a fault.
    pub fn for_each_item(
        &self,
        root: TreeRoot,
        from: Key,
        visit: &mut dyn FnMut(Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut walk = Walk::starting_at(self, root, from);
        while let Some(visited) = walk.next() {
            if let Some(fault) = visited.faults.first() {
                return Err(Error::Format {
                    what: "tree block",
                    device: "file system's",
                    offset: visited.bytenr,
                    reason: format!("tree {}: {fault}", root.id),
                });
            }
            let Some(block) = visited.block else { continue };
            for (key, body) in block.items().filter(|(key, _)| *key >= from) {
                if visit(key, body).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Fills `buffer` from a logical address, from the first device at hand that has it, which is returned.
    ///
    /// # Errors
    /// Why it cannot be read, in words.
    pub fn read_logical(&self, logical: u64, buffer: &mut [u8]) -> Result<&OpenDevice<'a>, String> {
        let chunk = self.chunks.find(logical).ok_or("no chunk holds this address")?;
        let end = logical.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > chunk.end()) {
            return Err(format!("{} bytes reach beyond the chunk at {}", buffer.len(), chunk.logical));
        }
        if !chunk.is_linear() {
            return Err(format!("the chunk's profile {:#x} is not supported", chunk.flags));
        }
        let mut failure = "none of the chunk's devices was given".to_owned();
        for place in &chunk.stripes {
            let holds = |open: &&OpenDevice<'_>| open.superblock.device.devid.get() == place.devid;
            let Some(open) = self.devices.iter().find(holds) else { continue };
            let physical = place.physical + (logical - chunk.logical);
            match open.device.image.read_at(physical, buffer) {
                Ok(()) => return Ok(open),
                Err(error) => failure = format!("{} image at {physical}: {error}", open.device.name),
            }
        }
        Err(failure)
    }

    /// Reads and checks a block; what is wrong is added to `faults`. Nothing if its bytes cannot be read.
    pub(crate) fn read_block(
        &self,
        bytenr: u64,
        expected: &Expected,
        faults: &mut Vec<Fault>,
    ) -> Option<Block> {
        let mut data = vec![0; self.node_size() as usize].into_boxed_slice();
        let open = match self.read_logical(bytenr, &mut data) {
            Ok(open) => open,
            Err(reason) => {
                faults.push(Fault { field: "block".to_owned(), key: None, reason });
                return None;
            }
        };
        let block = Block::new(bytenr, data, faults);
        // What a seed holds keeps the seed's UUID.
        let superblock = &open.superblock;
        let metadata_uuid = superblock.metadata_uuid;
        let fsid = if metadata_uuid == [0; 16] { superblock.fsid } else { metadata_uuid };
        block.check(expected, &Uuids { fsid, chunk_tree: self.chunk_tree_uuid }, faults);
        Some(block)
    }
}

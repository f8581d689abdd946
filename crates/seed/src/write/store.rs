//! Places tree blocks one after another in the SYSTEM or METADATA chunk and writes them out in large pieces.

use crate::builder::BlockSink;
use crate::disk::{HEADER_SIZE, object};
use crate::options::{METADATA_BASE, METADATA_END, SYSTEM_BASE};
use crate::{Error, Image, Result};

/// Bytes that are gathered before they are written.
const BATCH: usize = 1 << 20;
/// Where the address stands in a block's header.
const BYTENR_OFFSET: usize = 48;
/// Where the part of a block begins that its checksum covers.
const CHECKED_FROM: usize = 32;

/// The blocks of one tree, by level, in order of address.
pub(super) type TreeBlocks = (u64, Vec<u8>);

/// Blocks of one chunk, placed without gaps from its start.
#[derive(Debug)]
pub(super) struct Region {
    next: u64,
    /// Where blocks have to end.
    end: u64,
    trees: Vec<TreeBlocks>,
}

impl Region {
    fn new(base: u64, end: u64) -> Self {
        Region { next: base, end, trees: Vec::new() }
    }

    /// The blocks placed so far, in order of address.
    pub(super) fn trees(&self) -> &[TreeBlocks] {
        &self.trees
    }

    fn take(&mut self, owner: u64, level: u8, bytes: u64) -> Option<u64> {
        let start = self.next;
        if bytes > self.end.checked_sub(start)? {
            return None;
        }
        self.next += bytes;
        match self.trees.last_mut() {
            Some((last, levels)) if *last == owner => levels.push(level),
            _ => self.trees.push((owner, vec![level])),
        }
        Some(start)
    }
}

/// Writes to the image that carries the trees, where logical addresses are offsets.
pub(super) struct BlockStore<'a> {
    image: &'a mut dyn Image,
    device: &'static str,
    pub(super) system: Region,
    pub(super) metadata: Region,
    batch: Vec<u8>,
    batch_start: u64,
}

impl<'a> BlockStore<'a> {
    /// `device` names the image in errors; trees must end before `end`.
    pub(super) fn new(image: &'a mut dyn Image, device: &'static str, end: u64) -> Self {
        BlockStore {
            image,
            device,
            system: Region::new(SYSTEM_BASE, METADATA_BASE),
            metadata: Region::new(METADATA_BASE, end.min(METADATA_END)),
            batch: Vec::with_capacity(BATCH),
            batch_start: 0,
        }
    }

    /// Writes out what was gathered.
    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.batch.is_empty() {
            write_image(self.image, self.device, self.batch_start, &self.batch)?;
            self.batch.clear();
        }
        Ok(())
    }
}

impl BlockSink for BlockStore<'_> {
    fn place(&mut self, owner: u64, level: u8, block: &mut [u8]) -> Result<u64> {
        let bytes = block.len() as u64;
        let region = if owner == object::CHUNK_TREE { &mut self.system } else { &mut self.metadata };
        let Some(bytenr) = region.take(owner, level, bytes) else {
            return Err(Error::NoRoom {
                device: self.device,
                needed: region.next + bytes,
                available: region.end,
                hint: "make the local device larger, or pre-clone fewer files",
            });
        };
        block[BYTENR_OFFSET..BYTENR_OFFSET + 8].copy_from_slice(&bytenr.to_le_bytes());
        let checksum = crc32c::crc32c(&block[CHECKED_FROM..]);
        block[..4].copy_from_slice(&checksum.to_le_bytes());
        if self.batch_start + self.batch.len() as u64 != bytenr || self.batch.len() + block.len() > BATCH {
            self.flush()?;
            self.batch_start = bytenr;
        }
        self.batch.extend_from_slice(block);
        Ok(bytenr)
    }
}

const _: () = assert!(BYTENR_OFFSET + 8 < HEADER_SIZE);

/// Writes to an image, naming it in the error.
pub(super) fn write_image(
    image: &mut dyn Image,
    device: &'static str,
    offset: u64,
    data: &[u8],
) -> Result<()> {
    image.write_at(offset, data).map_err(|source| Error::Io {
        operation: "write",
        device,
        offset,
        length: data.len() as u64,
        source,
    })
}

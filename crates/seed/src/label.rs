//! The label block: which virtual device a local image belongs to.
//!
//! btrfs leaves the first 64 KiB of a device alone. At 4 KiB of the local image of a pair lies one block of 4 KiB:
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 | 16 | magic `loam local image` |
//! | 16 | 4 | version, 1 |
//! | 20 | 4 | layout: 0 pair, 1 single, 2 mega-extent |
//! | 24 | 8 | virtual size in bytes |
//! | 32 | 32 | identity |
//! | 64 | 32 | content digest |
//! | 96 | 32 | seed identity, zero where it is the identity |
//! | 128 | 3964 | zero |
//! | 4092 | 4 | crc32c of bytes 0..4092 |
//!
//! Integers are little-endian.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Error, Layout, ReadAt, Result, SeedOptions};

/// Where the label block lies on the local image, in bytes.
pub const LABEL_OFFSET: u64 = 4096;
/// Bytes of the label block.
pub const LABEL_SIZE: usize = 4096;
const MAGIC: [u8; 16] = *b"loam local image";
const VERSION: u32 = 1;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Block {
    magic: [u8; 16],
    version: U32,
    layout: U32,
    virtual_size: U64,
    identity: [u8; 32],
    content_digest: [u8; 32],
    seed_identity: [u8; 32],
    reserved: [u8; 3964],
    checksum: U32,
}

const _: () = assert!(size_of::<Block>() == LABEL_SIZE);

/// What the label block of a local image says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Who carries the trees.
    pub layout: Layout,
    /// Bytes of the virtual region.
    pub virtual_size: u64,
    /// What the image's UUIDs were derived from.
    pub identity: [u8; 32],
    /// The caller's digest of what was pre-cloned.
    pub content_digest: [u8; 32],
    /// What the virtual device's UUIDs were derived from, if not from `identity`.
    pub seed_identity: Option<[u8; 32]>,
}

impl Label {
    pub(crate) fn of(options: &SeedOptions) -> Self {
        Label {
            layout: options.layout,
            virtual_size: options.virtual_size,
            identity: options.identity,
            content_digest: options.content_digest,
            seed_identity: options.seed_identity_of_pair().copied(),
        }
    }

    pub(crate) fn to_block(self) -> [u8; LABEL_SIZE] {
        let layout = match self.layout {
            Layout::Pair => 0,
            Layout::Single => 1,
            Layout::MegaExtent => 2,
        };
        let mut block = Block {
            magic: MAGIC,
            version: VERSION.into(),
            layout: U32::new(layout),
            virtual_size: self.virtual_size.into(),
            identity: self.identity,
            content_digest: self.content_digest,
            seed_identity: self.seed_identity.unwrap_or_default(),
            reserved: [0; 3964],
            checksum: 0.into(),
        };
        block.checksum = checksum(&block).into();
        let mut bytes = [0; LABEL_SIZE];
        bytes.copy_from_slice(block.as_bytes());
        bytes
    }

    fn from_block(block: &Block) -> Result<Self, String> {
        if block.magic != MAGIC {
            return Err("no loam label: the image was not made by this formatter".to_owned());
        }
        if block.checksum.get() != checksum(block) {
            return Err("the checksum does not match".to_owned());
        }
        if block.version.get() != VERSION {
            return Err(format!("version {}; this program knows {VERSION}", block.version));
        }
        let layout = match block.layout.get() {
            0 => Layout::Pair,
            1 => Layout::Single,
            2 => Layout::MegaExtent,
            other => return Err(format!("layout {other}; this program knows 0 to 2")),
        };
        Ok(Label {
            layout,
            virtual_size: block.virtual_size.get(),
            identity: block.identity,
            content_digest: block.content_digest,
            seed_identity: Some(block.seed_identity).filter(|identity| *identity != [0; 32]),
        })
    }
}

fn checksum(block: &Block) -> u32 {
    crc32c::crc32c(&block.as_bytes()[..LABEL_SIZE - 4])
}

/// Reads the label block of a local image.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] if there is no label, it is damaged, or of a newer version.
pub fn read_label(local: &dyn ReadAt) -> Result<Label> {
    let mut bytes = [0; LABEL_SIZE];
    local.read_at(LABEL_OFFSET, &mut bytes).map_err(|source| Error::Io {
        operation: "read",
        device: "local",
        offset: LABEL_OFFSET,
        length: LABEL_SIZE as u64,
        source,
    })?;
    let block = Block::ref_from_bytes(&bytes)
        .map_err(|error| Error::Inconsistent(format!("label block: {error}")))?;
    Label::from_block(block).map_err(|reason| Error::Format {
        what: "label block",
        device: "local",
        offset: LABEL_OFFSET,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, MemoryImage};

    #[test]
    fn round_trip_and_every_flipped_byte_is_found() {
        let label = Label {
            layout: Layout::Pair,
            virtual_size: 4 << 60,
            identity: [7; 32],
            content_digest: [9; 32],
            seed_identity: Some([8; 32]),
        };
        let block = label.to_block();
        let mut image = MemoryImage::new();
        image.set_length(1 << 20).unwrap();
        image.write_at(LABEL_OFFSET, &block).unwrap();
        assert_eq!(read_label(&image).unwrap(), label);
        for index in 0..LABEL_SIZE {
            let mut bad = block;
            bad[index] ^= 0x10;
            image.write_at(LABEL_OFFSET, &bad).unwrap();
            assert!(matches!(read_label(&image), Err(Error::Format { .. })), "byte {index}");
        }
        image.set_length(4096).unwrap();
        assert!(matches!(read_label(&image), Err(Error::Io { .. })));
    }
}

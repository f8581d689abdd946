//! Fixed parts of an index file; the byte map is `docs/formats/index.md`.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::column::Cursor;
use crate::{Error, Result};

/// First bytes of every index.
pub(crate) const MAGIC: [u8; 8] = *b"LOAMIDX\0";
/// The version that this code writes and reads.
pub const VERSION: u32 = 1;
/// Smallest chunk, bytes.
pub const CHUNK_BYTES_MIN: u32 = 4096;
/// Largest chunk, bytes.
pub const CHUNK_BYTES_MAX: u32 = 4 << 20;
/// Largest index file, bytes.
pub const INDEX_BYTES_MAX: u64 = 4 << 30;
/// Most pieces of one content.
pub const PIECES_MAX: u64 = 1 << 24;
/// Most chunks of one content.
pub const CHUNKS_MAX: u64 = 1 << 25;
/// Most blobs of one content.
pub const BLOBS_MAX: u64 = 1 << 22;
/// Most items of one block.
pub(crate) const BLOCK_ITEMS_MAX: u32 = 65_536;
/// Longest decoded block, bytes.
pub(crate) const BLOCK_DECODED_BYTES_MAX: u32 = 64 << 20;
/// Sections of version 1, in this order.
pub(crate) const SECTIONS: [(u32, &str); 5] =
    [(1, "blobs"), (2, "pieces"), (3, "chunks"), (4, "entries"), (5, "trace")];

/// The first 64 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) chunk_bytes: U32,
    pub(crate) content_length: U64,
    pub(crate) entries: U64,
    pub(crate) pieces: U64,
    pub(crate) blobs: U32,
    pub(crate) sections: U32,
    pub(crate) file_length: U64,
    pub(crate) reserved: U32,
    /// CRC32C of the 60 bytes before it and of the section table.
    pub(crate) checksum: U32,
}

/// One entry of the section table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Section {
    pub(crate) kind: U32,
    pub(crate) checksum: U32,
    pub(crate) offset: U64,
    pub(crate) length: U64,
    pub(crate) reserved: U64,
}

/// In front of each compressed block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct BlockHeader {
    pub(crate) items: U32,
    pub(crate) stored: U32,
    pub(crate) decoded: U32,
}

/// Bytes of header and section table.
pub(crate) const HEAD_BYTES: usize = size_of::<Header>() + SECTIONS.len() * size_of::<Section>();

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(size_of::<Section>() == 32);
const _: () = assert!(size_of::<BlockHeader>() == 12);

/// The header's checksum over itself and the section table.
pub(crate) fn head_checksum(header: &Header, table: &[u8]) -> u32 {
    let prefix = size_of::<Header>() - size_of::<U32>();
    crc32c::crc32c_append(crc32c::crc32c(&header.as_bytes()[..prefix]), table)
}

/// Appends a block of `items` items with the given decoded bytes.
pub(crate) fn put_block(out: &mut Vec<u8>, items: u32, decoded: &[u8], level: i32) -> Result<()> {
    debug_assert!(items > 0 && items <= BLOCK_ITEMS_MAX);
    if decoded.len() > BLOCK_DECODED_BYTES_MAX as usize {
        let what = "bytes of metadata in one block of an index".to_owned();
        return Err(Error::Limit { what, limit: u64::from(BLOCK_DECODED_BYTES_MAX) });
    }
    let frame = zstd::bulk::compress(decoded, level).map_err(|e| Error::os("compress", "index", e))?;
    let header = BlockHeader {
        items: items.into(),
        stored: (frame.len() as u32).into(),
        decoded: (decoded.len() as u32).into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&frame);
    Ok(())
}

/// Takes the next block off the front of a section: how many items, and the decoded bytes. `None` at the end.
pub(crate) fn take_block(section: &'static str, rest: &mut &[u8]) -> Result<Option<(u32, Vec<u8>)>> {
    if rest.is_empty() {
        return Ok(None);
    }
    let mut cursor = Cursor::new(section, rest);
    let header = cursor.take(size_of::<BlockHeader>())?;
    let header =
        BlockHeader::read_from_bytes(header).map_err(|_| Error::index(section, "no block header"))?;
    let (items, decoded) = (header.items.get(), header.decoded.get());
    if items == 0 || items > BLOCK_ITEMS_MAX {
        return Err(Error::index(section, format!("a block of {items} items")));
    }
    if decoded > BLOCK_DECODED_BYTES_MAX {
        return Err(Error::index(section, format!("a block of {decoded} decoded bytes")));
    }
    let frame = cursor.take(header.stored.get() as usize)?;
    let bytes = zstd::bulk::decompress(frame, decoded as usize)
        .map_err(|e| Error::index(section, format!("a block does not decompress: {e}")))?;
    if bytes.len() != decoded as usize {
        return Err(Error::index(section, "a block has another length than it says"));
    }
    *rest = cursor.rest();
    Ok(Some((items, bytes)))
}

/// Splits a decoded block into its columns, all of them and nothing behind.
pub(crate) fn columns<'a, const N: usize>(section: &'static str, block: &'a [u8]) -> Result<[Cursor<'a>; N]> {
    let mut cursor = Cursor::new(section, block);
    let mut columns = [Cursor::new(section, &[]); N];
    for column in &mut columns {
        *column = cursor.column()?;
    }
    cursor.finish()?;
    Ok(columns)
}

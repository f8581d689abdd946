//! The header of a content's table file, and where everything lies in it; `docs/formats/cache.md` draws it.
//!
//! ```text
//! table:  0      header, 4096 bytes
//!         4096   one state byte for each chunk, zeros up to a multiple of 4096
//!         then   one u32 checksum for each 4 KiB block of the content
//! header: 0  8   "LOAMCHNK"            24  4   salt of the checksums
//!         8  4   version, 1            28  4   bytes of the key
//!         12 4   bytes of a chunk      32 512  the key, zeros behind it
//!         16 8   bytes of the content  544 3548 zeros
//!                                      4092 4  CRC32C of bytes 0..4092
//! ```
//! Little-endian throughout. A header that does not check out makes the cached chunks worthless, never wrong.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chunk::BLOCK_BYTES;
use crate::{Digest, Error, Result};

const MAGIC: [u8; 8] = *b"LOAMCHNK";
const VERSION: u32 = 1;
/// The longest key, in bytes.
pub(crate) const KEY_BYTES_MAX: usize = 512;
/// The longest content: what ext4, the narrowest of the usual filesystems, takes as one file.
pub(crate) const CONTENT_BYTES_MAX: u64 = 16 << 40;
pub(crate) const HEADER_BYTES: usize = 4096;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    chunk_bytes: U32,
    length: U64,
    salt: U32,
    key_bytes: U32,
    key: [u8; KEY_BYTES_MAX],
    reserved: [u8; 3548],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// The measures of one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Bytes of the content: a multiple of 4 KiB, not 0.
    pub(crate) length: u64,
    /// Binary logarithm of the bytes of a chunk: 12 to 22.
    pub(crate) chunk_shift: u32,
}

impl Shape {
    pub(crate) fn new(length: u64, chunk_bytes: u32) -> Option<Shape> {
        let fits = chunk_bytes.is_power_of_two()
            && (4096..=4 << 20).contains(&chunk_bytes)
            && length.is_multiple_of(BLOCK_BYTES)
            && (1..=CONTENT_BYTES_MAX).contains(&length);
        fits.then_some(Shape { length, chunk_shift: chunk_bytes.trailing_zeros() })
    }

    pub(crate) fn chunk_bytes(&self) -> u64 {
        1 << self.chunk_shift
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.length.div_ceil(self.chunk_bytes())
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.length / BLOCK_BYTES
    }

    pub(crate) fn chunk_of(&self, offset: u64) -> u64 {
        offset >> self.chunk_shift
    }

    pub(crate) fn start(&self, chunk: u64) -> u64 {
        chunk << self.chunk_shift
    }

    /// Bytes of this very chunk: the last one may be short.
    pub(crate) fn bytes_of(&self, chunk: u64) -> u64 {
        self.chunk_bytes().min(self.length - self.start(chunk))
    }

    /// Where the state byte of a chunk lies in the table file.
    pub(crate) fn state_offset(chunk: u64) -> u64 {
        HEADER_BYTES as u64 + chunk
    }

    /// Where the checksum of a block lies in the table file.
    pub(crate) fn sum_offset(&self, block: u64) -> u64 {
        HEADER_BYTES as u64 + self.chunks().next_multiple_of(4096) + block * 4
    }

    pub(crate) fn table_bytes(&self) -> u64 {
        self.sum_offset(self.blocks())
    }
}

/// The directory of a content below the cache's own.
pub(crate) fn directory_name(key: &str) -> String {
    Digest::of(key.as_bytes()).to_string()[..32].to_owned()
}

/// The usual salt of a content's checksums: blocks that end up in another content's file do not check out.
pub(crate) fn salt_of(key: &str) -> u32 {
    let digest = Digest::of(key.as_bytes()).0;
    u32::from_le_bytes([digest[28], digest[29], digest[30], digest[31]])
}

/// # Errors
/// [`Error::Mismatch`] for a key that is empty or too long.
pub(crate) fn check_key(key: &str) -> Result<()> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        let what = format!("a key has 1 to {KEY_BYTES_MAX} bytes, not {}", key.len());
        return Err(Error::Mismatch { content: key.chars().take(64).collect(), what });
    }
    Ok(())
}

pub(crate) fn encode_header(key: &str, shape: Shape, salt: u32) -> [u8; HEADER_BYTES] {
    let mut raw = RawHeader {
        magic: MAGIC,
        version: VERSION.into(),
        chunk_bytes: (shape.chunk_bytes() as u32).into(),
        length: shape.length.into(),
        salt: salt.into(),
        key_bytes: (key.len() as u32).into(),
        key: [0; KEY_BYTES_MAX],
        reserved: [0; 3548],
        checksum: 0.into(),
    };
    raw.key[..key.len()].copy_from_slice(key.as_bytes());
    raw.checksum = crc32c::crc32c(&raw.as_bytes()[..HEADER_BYTES - 4]).into();
    zerocopy::transmute!(raw)
}

/// The key, the measures and the salt, if the header checks out.
pub(crate) fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Option<(String, Shape, u32)> {
    let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
    let sound = raw.magic == MAGIC
        && raw.version.get() == VERSION
        && raw.checksum.get() == crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    let key = raw.key.get(..raw.key_bytes.get() as usize).filter(|_| sound)?;
    let key = str::from_utf8(key).ok().filter(|key| !key.is_empty())?;
    let shape = Shape::new(raw.length.get(), raw.chunk_bytes.get())?;
    Some((key.to_owned(), shape, raw.salt.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips_and_any_flipped_bit_is_found() {
        let shape = Shape::new(10 << 20 | 4096, 65536).unwrap();
        let bytes = encode_header("index-abc", shape, 77);
        assert_eq!(decode_header(&bytes), Some(("index-abc".to_owned(), shape, 77)));
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_header(&bad), None, "bit {bit}");
        }
    }

    #[test]
    fn shapes() {
        let shape = Shape::new((65536 * 3) + 4096, 65536).unwrap();
        assert_eq!(
            (shape.chunks(), shape.bytes_of(3), shape.bytes_of(2), shape.blocks()),
            (4, 4096, 65536, 49)
        );
        assert_eq!(shape.sum_offset(1), 4096 + 4096 + 4);
        for (length, chunk) in
            [(0, 4096), (1, 4096), (4096, 0), (4096, 2048), (4096, 6144), (4096, 8 << 20), (u64::MAX, 4096)]
        {
            assert_eq!(Shape::new(length, chunk), None, "{length} {chunk}");
        }
    }
}

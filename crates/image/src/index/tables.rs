//! The tables of an index that are kept decoded: blobs and pieces.

use bytes::Bytes;
use loam_content::Digest;

use super::column::{join, put_varint, put_zigzag};
use super::format::{BLOBS_MAX, BLOCK_ITEMS_MAX, PIECES_MAX, columns, put_block, take_block};
use crate::decode::Compression;
use crate::entry::{BLOCK_BYTES, PATH_BYTES_MAX};
use crate::{Error, Result};

/// How the bytes of a blob become those that pieces speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobKind {
    /// An archive whose bytes are used as they are stored: any part can be read alone.
    Raw,
    /// An archive that must be decompressed from its beginning.
    Stream(Compression),
    /// One file below the source directory.
    TreeFile,
}

/// A thing that holds bytes of the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// How to read it.
    pub kind: BlobKind,
    /// A hint where it lies: last part of a path or URL; for [`BlobKind::TreeFile`] the path below the directory.
    pub name: Bytes,
    /// Bytes as stored.
    pub length: u64,
    /// BLAKE3 of the bytes as stored; none for files of a directory.
    pub digest: Option<Digest>,
}

/// A part of the content and where its bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address relative to the content's first, bytes.
    pub address: u64,
    /// First byte in the decoded blob.
    pub offset: u64,
    /// Bytes, at least 1.
    pub length: u64,
    /// Which blob.
    pub blob: u32,
}

impl Piece {
    /// Address behind the last byte.
    pub fn end(&self) -> u64 {
        self.address + self.length
    }
}

/// Archive members begin on multiples of this, bytes.
const ARCHIVE_BLOCK_BYTES: u64 = 512;
/// Nothing in an index lies beyond this byte, so that sums of two positions never overflow.
const POSITION_MAX: u64 = i64::MAX as u64;

fn kind_code(kind: BlobKind) -> u8 {
    match kind {
        BlobKind::Raw => 0,
        BlobKind::Stream(Compression::Gzip) => 1,
        BlobKind::Stream(Compression::Zstd) => 2,
        BlobKind::Stream(Compression::Xz) => 3,
        BlobKind::Stream(Compression::Bzip2) => 4,
        BlobKind::TreeFile => 5,
    }
}

fn kind_from_code(code: u8) -> Result<BlobKind> {
    Ok(match code {
        0 => BlobKind::Raw,
        1 => BlobKind::Stream(Compression::Gzip),
        2 => BlobKind::Stream(Compression::Zstd),
        3 => BlobKind::Stream(Compression::Xz),
        4 => BlobKind::Stream(Compression::Bzip2),
        5 => BlobKind::TreeFile,
        _ => return Err(Error::index("blobs", format!("unknown decode kind {code}"))),
    })
}

/// Whether a path is relative and stays below where it starts.
pub(crate) fn is_safe_path(path: &[u8]) -> bool {
    path.len() <= PATH_BYTES_MAX
        && !path.contains(&0)
        && path.split(|&b| b == b'/').all(|part| !part.is_empty() && part != b"." && part != b"..")
}

pub(crate) fn encode_blobs(blobs: &[Blob], level: i32) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for block in blobs.chunks(BLOCK_ITEMS_MAX as usize / 4) {
        let mut columns: [Vec<u8>; 6] = Default::default();
        for blob in block {
            columns[0].push(kind_code(blob.kind));
            put_varint(&mut columns[1], blob.length);
            put_varint(&mut columns[2], blob.name.len() as u64);
            columns[3].extend_from_slice(&blob.name);
            columns[4].push(u8::from(blob.digest.is_some()));
            if let Some(digest) = &blob.digest {
                columns[5].extend_from_slice(&digest.0);
            }
        }
        put_block(&mut out, block.len() as u32, &join(&columns), level)?;
    }
    Ok(out)
}

pub(crate) fn decode_blobs(mut section: &[u8], count: u64) -> Result<Vec<Blob>> {
    let mut blobs = Vec::new();
    if count > BLOBS_MAX {
        return Err(Error::Limit { what: "blobs in an index".to_owned(), limit: BLOBS_MAX });
    }
    while let Some((items, block)) = take_block("blobs", &mut section)? {
        if blobs.len() as u64 + u64::from(items) > count {
            return Err(Error::index("blobs", "more blobs than the header says"));
        }
        let [mut kinds, mut lengths, mut name_lengths, mut names, mut flags, mut digests] =
            columns::<6>("blobs", &block)?;
        for _ in 0..items {
            let kind = kind_from_code(kinds.byte()?)?;
            let length = lengths.at_most(POSITION_MAX, "blob length")?;
            let name_length = name_lengths.at_most(PATH_BYTES_MAX as u64, "blob name length")?;
            let name = Bytes::copy_from_slice(names.take(name_length as usize)?);
            if kind == BlobKind::TreeFile && !is_safe_path(&name) {
                return Err(Error::index("blobs", "a file's path leads out of its directory"));
            }
            let digest = match flags.byte()? {
                0 => None,
                1 => Some(Digest(digests.array()?)),
                flag => return Err(Error::index("blobs", format!("digest flag {flag}"))),
            };
            blobs.push(Blob { kind, name, length, digest });
        }
        for column in [kinds, lengths, name_lengths, names, flags, digests] {
            column.finish()?;
        }
    }
    if blobs.len() as u64 != count {
        return Err(Error::index("blobs", "fewer blobs than the header says"));
    }
    Ok(blobs)
}

pub(crate) fn encode_pieces(pieces: impl Iterator<Item = Piece>, level: i32) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut previous = Piece { address: 0, offset: 0, length: 0, blob: 0 };
    let mut pieces = pieces.peekable();
    while pieces.peek().is_some() {
        let mut columns: [Vec<u8>; 4] = Default::default();
        let mut items = 0;
        for piece in pieces.by_ref().take(BLOCK_ITEMS_MAX as usize / 4) {
            let expected = previous.end().next_multiple_of(BLOCK_BYTES);
            put_zigzag(&mut columns[0], piece.address.wrapping_sub(expected) as i64);
            put_zigzag(&mut columns[1], i64::from(piece.blob) - i64::from(previous.blob));
            put_zigzag(
                &mut columns[2],
                piece.offset.wrapping_sub(expected_offset(&previous, piece.blob)) as i64,
            );
            put_varint(&mut columns[3], piece.length);
            previous = piece;
            items += 1;
        }
        put_block(&mut out, items, &join(&columns), level)?;
    }
    Ok(out)
}

/// Where the next piece's bytes most likely begin.
fn expected_offset(previous: &Piece, blob: u32) -> u64 {
    if blob != previous.blob {
        return 0;
    }
    (previous.offset + previous.length).next_multiple_of(ARCHIVE_BLOCK_BYTES)
}

pub(crate) fn decode_pieces(
    mut section: &[u8],
    count: u64,
    content_length: u64,
    blobs: &[Blob],
) -> Result<Vec<Piece>> {
    let bad = |reason: &str| Error::index("pieces", reason);
    if count > PIECES_MAX {
        return Err(Error::Limit { what: "pieces in an index".to_owned(), limit: PIECES_MAX });
    }
    let mut pieces = Vec::new();
    let mut previous = Piece { address: 0, offset: 0, length: 0, blob: 0 };
    while let Some((items, block)) = take_block("pieces", &mut section)? {
        if pieces.len() as u64 + u64::from(items) > count {
            return Err(bad("more pieces than the header says"));
        }
        pieces.reserve(items as usize);
        let [mut addresses, mut blob_numbers, mut offsets, mut lengths] = columns::<4>("pieces", &block)?;
        for _ in 0..items {
            let expected = previous.end().next_multiple_of(BLOCK_BYTES);
            let address = expected.checked_add_signed(addresses.zigzag()?);
            let address = address.filter(|&a| a >= previous.end()).ok_or_else(|| bad("pieces overlap"))?;
            let blob = u64::from(previous.blob).checked_add_signed(blob_numbers.zigzag()?);
            let blob = blob.filter(|&b| b < blobs.len() as u64).ok_or_else(|| bad("no such blob"))? as u32;
            let offset = expected_offset(&previous, blob).checked_add_signed(offsets.zigzag()?);
            let offset = offset.filter(|&o| o <= POSITION_MAX).ok_or_else(|| bad("offset out of range"))?;
            let length = lengths.at_most(POSITION_MAX, "piece length")?;
            if length == 0 || address.checked_add(length).is_none_or(|end| end > content_length) {
                return Err(bad("a piece is empty or reaches beyond the content"));
            }
            let limit = match blobs[blob as usize].kind {
                BlobKind::Stream(_) => POSITION_MAX,
                BlobKind::Raw | BlobKind::TreeFile => blobs[blob as usize].length,
            };
            if offset + length > limit {
                return Err(bad("a piece reaches beyond its blob"));
            }
            previous = Piece { address, offset, length, blob };
            pieces.push(previous);
        }
        for column in [addresses, blob_numbers, offsets, lengths] {
            column.finish()?;
        }
    }
    if pieces.len() as u64 != count {
        return Err(bad("fewer pieces than the header says"));
    }
    Ok(pieces)
}

//! The image index: a compact, versioned file that says all of an image but its data. The byte map, and what a reader
//! checks, is `docs/formats/index.md`; [`Index`] reads it without trust, [`IndexWriter`] writes it.

mod column;
mod entries;
mod format;
mod tables;
mod trace;
mod write;

use std::ops::Range;

use bytes::Bytes;
use loam_content::Digest;
use zerocopy::{FromBytes, IntoBytes};

use crate::entry::{BLOCK_BYTES, ENTRIES_MAX};
use crate::trace::first_uses;
use crate::{Error, Result};
use format::{HEAD_BYTES, Header, MAGIC, SECTIONS, Section, head_checksum};

pub use entries::Entries;
pub use format::{
    BLOBS_MAX, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, CHUNKS_MAX, INDEX_BYTES_MAX, PIECES_MAX, VERSION,
};
pub(crate) use tables::is_safe_path;
pub use tables::{Blob, BlobKind, Piece};
pub use trace::TRACE_RUNS_MAX;
pub use write::{FileExtent, IndexWriter, NewEntry, NewKind};

/// A loaded index. Blobs, pieces (32 bytes each) and the trace are decoded; entries and digests stay as they are in the
/// file.
#[derive(Debug, Clone)]
pub struct Index {
    bytes: Bytes,
    digest: Digest,
    chunk_bytes: u32,
    content_length: u64,
    entries: u64,
    blobs: Vec<Blob>,
    pieces: Vec<Piece>,
    chunk_section: Range<usize>,
    entry_section: Range<usize>,
    trace: Vec<Range<u64>>,
}

impl Index {
    /// Takes the bytes of an index file after checking header, checksums, blobs, pieces and trace. Entries are checked
    /// when they are read.
    ///
    /// # Errors
    /// [`Error::Index`] naming the damaged part; [`Error::Version`] for a version that is not known; [`Error::Limit`].
    pub fn open(bytes: impl Into<Bytes>) -> Result<Index> {
        let bytes = bytes.into();
        let bad = |reason: &str| Error::index("header", reason);
        let (header, sections) = read_head(&bytes)?;
        let chunk_bytes = header.chunk_bytes.get();
        if !chunk_bytes.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
            return Err(bad("an impossible chunk size"));
        }
        let content_length = header.content_length.get();
        let chunks = content_length.div_ceil(u64::from(chunk_bytes));
        if content_length % BLOCK_BYTES != 0 || chunks > CHUNKS_MAX {
            return Err(bad("an impossible content length"));
        }
        let entries = header.entries.get();
        if entries == 0 {
            return Err(bad("no entries"));
        }
        if entries > ENTRIES_MAX {
            return Err(Error::Limit { what: "entries in an index".to_owned(), limit: ENTRIES_MAX });
        }
        let [blob_section, piece_section, chunk_section, entry_section, trace_section] = sections;
        if chunk_section.len() as u64 != chunks * 32 {
            return Err(Error::index("chunks", "another number of digests than the content has chunks"));
        }
        let blobs = tables::decode_blobs(&bytes[blob_section], u64::from(header.blobs.get()))?;
        let pieces =
            tables::decode_pieces(&bytes[piece_section], header.pieces.get(), content_length, &blobs)?;
        let trace = trace::decode_trace(&bytes[trace_section], content_length)?;
        let digest = Digest::of(&bytes);
        Ok(Index {
            digest,
            chunk_bytes,
            content_length,
            entries,
            blobs,
            pieces,
            chunk_section,
            entry_section,
            trace,
            bytes,
        })
    }

    /// BLAKE3 of the index file: what the index is called.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The file's bytes.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Length of the content's run of addresses, bytes; a multiple of 4096; 0 when every file is inline or empty.
    pub fn content_length(&self) -> u64 {
        self.content_length
    }

    /// Bytes of a chunk, a power of two.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Chunks in the content; the last may be short.
    pub fn chunk_count(&self) -> u64 {
        self.content_length.div_ceil(u64::from(self.chunk_bytes))
    }

    /// BLAKE3 of a materialised chunk; `None` beyond the last.
    pub fn chunk_digest(&self, chunk: u64) -> Option<Digest> {
        let digests = &self.bytes[self.chunk_section.clone()];
        let start = usize::try_from(chunk).ok()?.checked_mul(32)?;
        Some(Digest(digests.get(start..)?.first_chunk::<32>().copied()?))
    }

    /// Entries in the tree, the root included.
    pub fn entry_count(&self) -> u64 {
        self.entries
    }

    /// The entries, a directory before what is in it. Decodes one block at a time; may be called any number of times.
    pub fn entries(&self) -> Entries<'_> {
        Entries::new(&self.bytes[self.entry_section.clone()], &self.pieces, self.entries)
    }

    /// Where the content's bytes come from, by ascending address.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces that have bytes in `addresses`.
    pub fn pieces_in(&self, addresses: Range<u64>) -> &[Piece] {
        let first = self.pieces.partition_point(|piece| piece.end() <= addresses.start);
        let count = self.pieces[first..].partition_point(|piece| piece.address < addresses.end);
        &self.pieces[first..first + count]
    }

    /// What holds the bytes.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// What a run of this image read first, in that order: runs of the content's addresses, multiples of 4096 bytes,
    /// no address twice. Empty when nobody recorded one.
    pub fn trace(&self) -> &[Range<u64>] {
        &self.trace
    }

    /// The file of this index with `trace` in place of its own, and so with another digest. The runs are put in normal
    /// form by [`first_uses`]; none at all takes the trace away.
    ///
    /// # Errors
    /// [`Error::Index`] for a run that reaches beyond the content; [`Error::Limit`] beyond [`TRACE_RUNS_MAX`] runs.
    pub fn with_trace(&self, trace: &[Range<u64>]) -> Result<Bytes> {
        let trace = first_uses(trace.iter().cloned(), self.content_length)?;
        let (_, sections) = read_head(&self.bytes)?;
        let trace = trace::encode_trace(&trace, write::ZSTD_LEVEL)?;
        let mut contents = sections.map(|range| &self.bytes[range]);
        contents[SECTIONS.len() - 1] = &trace;
        let counts = write::Counts {
            chunk_bytes: self.chunk_bytes,
            content_length: self.content_length,
            entries: self.entries,
            pieces: self.pieces.len() as u64,
            blobs: self.blobs.len() as u32,
        };
        Ok(write::assemble(&counts, &contents)?.into())
    }

    /// Why this image cannot be read lazily, if so.
    pub fn not_lazy(&self) -> Option<String> {
        self.blobs.iter().find_map(|blob| match blob.kind {
            BlobKind::Stream(compression) => Some(format!(
                "{} is compressed with {compression}, which can only be read from its beginning: \
                 the first read of missing data fetches everything before it",
                String::from_utf8_lossy(&blob.name)
            )),
            BlobKind::Raw | BlobKind::TreeFile => None,
        })
    }
}

/// Checks header and section table and gives the place of each section, in order.
fn read_head(bytes: &Bytes) -> Result<(Header, [Range<usize>; SECTIONS.len()])> {
    let bad = |reason: String| Error::index("header", reason);
    let Ok((header, rest)) = Header::read_from_prefix(bytes) else {
        return Err(bad(format!("{} bytes are too few for an index", bytes.len())));
    };
    if header.magic != MAGIC {
        return Err(bad("this is not an index".to_owned()));
    }
    if header.version.get() != VERSION {
        return Err(Error::Version { found: header.version.get(), supported: VERSION });
    }
    if header.sections.get() as usize != SECTIONS.len() {
        return Err(bad(format!("{} sections", header.sections.get())));
    }
    let Ok((table, _)) = <[Section; SECTIONS.len()]>::read_from_prefix(rest) else {
        return Err(bad("ends within the section table".to_owned()));
    };
    if header.checksum.get() != head_checksum(&header, table.as_bytes()) {
        return Err(bad("checksum mismatch".to_owned()));
    }
    if header.file_length.get() != bytes.len() as u64 || bytes.len() as u64 > INDEX_BYTES_MAX {
        let says = header.file_length.get();
        return Err(bad(format!("the file has {} bytes but says {says}", bytes.len())));
    }
    let mut sections: [Range<usize>; SECTIONS.len()] = Default::default();
    let mut position = HEAD_BYTES as u64;
    for ((section, (kind, name)), range) in table.iter().zip(SECTIONS).zip(&mut sections) {
        let end = position.checked_add(section.length.get()).filter(|&end| end <= bytes.len() as u64);
        let (Some(end), true) = (end, section.kind.get() == kind && section.offset.get() == position) else {
            return Err(Error::index(name, "not where it has to be"));
        };
        *range = position as usize..end as usize;
        if crc32c::crc32c(&bytes[range.clone()]) != section.checksum.get() {
            return Err(Error::index(name, "checksum mismatch"));
        }
        position = end;
    }
    if position != bytes.len() as u64 {
        return Err(bad("bytes behind the last section".to_owned()));
    }
    Ok((header, sections))
}

//! Assembles the content of an image while its source streams by: bytes in, finished chunks and their digests out.

use loam_content::Digest;

use crate::entry::BLOCK_BYTES;
use crate::index::{CHUNKS_MAX, PIECES_MAX, Piece};
use crate::tar::Segment;
use crate::tree::FilePiece;
use crate::{Error, Result};

/// Takes each finished chunk, once, in order.
pub trait ChunkSink: Send {
    /// `bytes` are the materialised bytes of chunk `number`; the last chunk may be short.
    ///
    /// # Errors
    /// Whatever keeps the sink from taking it; ends the build.
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> Result<(), loam_content::Error>;
}

/// The run of addresses that is being filled. Holds one chunk.
pub(crate) struct Content {
    chunk: Vec<u8>,
    chunk_bytes: usize,
    digests: Vec<Digest>,
    pieces: Vec<FilePiece>,
    sink: Option<Box<dyn ChunkSink>>,
}

/// A file's place: its first piece and how many there are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) first: u64,
    pub(crate) count: u32,
}

/// Where a file's segments lie in their blob.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored {
    /// One behind the other, from this byte on.
    Packed(u64),
    /// At their offsets in the file.
    InPlace,
}

impl Content {
    pub(crate) fn new(chunk_bytes: u32, sink: Option<Box<dyn ChunkSink>>) -> Self {
        let chunk_bytes = chunk_bytes as usize;
        let chunk = Vec::with_capacity(chunk_bytes);
        Content { chunk, chunk_bytes, digests: Vec::new(), pieces: Vec::new(), sink }
    }

    /// The address behind the last byte.
    fn end(&self) -> u64 {
        self.digests.len() as u64 * self.chunk_bytes as u64 + self.chunk.len() as u64
    }

    /// Appends data.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let count = bytes.len().min(self.chunk_bytes - self.chunk.len());
            self.chunk.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if self.chunk.len() == self.chunk_bytes {
                self.finish_chunk()?;
            }
        }
        Ok(())
    }

    /// Appends zeroes up to `address`.
    fn pad_to(&mut self, address: u64) -> Result<()> {
        // Two blocks: a segment may begin late in the block behind the one that the last segment ended in.
        const ZEROES: [u8; 2 * BLOCK_BYTES as usize] = [0; 2 * BLOCK_BYTES as usize];
        self.write(&ZEROES[..(address - self.end()) as usize])
    }

    fn finish_chunk(&mut self) -> Result<()> {
        let number = self.digests.len() as u64;
        if number == CHUNKS_MAX {
            return Err(Error::Limit { what: "chunks of a content".to_owned(), limit: CHUNKS_MAX });
        }
        if let Some(sink) = &mut self.sink {
            sink.chunk(number, &self.chunk)?;
        }
        self.digests.push(Digest::of(&self.chunk));
        self.chunk.clear();
        Ok(())
    }

    /// Gives a file of these data segments its addresses, and calls `copy` for each segment to append its bytes, which
    /// are stored in blob `blob`.
    pub(crate) fn add_file(
        &mut self,
        segments: &[Segment],
        blob: u32,
        stored: Stored,
        mut copy: impl FnMut(&mut Content, Segment) -> Result<()>,
    ) -> Result<Placed> {
        let first = self.pieces.len();
        let mut packed = 0;
        self.pad_to(self.end().next_multiple_of(BLOCK_BYTES))?;
        for &segment in segments {
            let address = match self.pieces[first..].last() {
                Some(last) => continued_address(last, segment.offset),
                None => self.end() + segment.offset % BLOCK_BYTES,
            };
            self.pad_to(address)?;
            copy(self, segment)?;
            let offset = match stored {
                Stored::Packed(start) => start + packed,
                Stored::InPlace => segment.offset,
            };
            self.add_piece(first, segment.offset, Piece { address, offset, length: segment.length, blob })?;
            packed += segment.length;
        }
        let count = self.pieces.len() - first;
        Ok(Placed { first: first as u64, count: count as u32 })
    }

    /// Adds a piece to the file whose first piece is `first`, or makes the last one longer.
    fn add_piece(&mut self, first: usize, file_offset: u64, piece: Piece) -> Result<()> {
        if let Some(last) = self.pieces[first..].last_mut()
            && last.file_offset + last.piece.length == file_offset
            && last.piece.end() == piece.address
            && last.piece.offset + last.piece.length == piece.offset
        {
            last.piece.length += piece.length;
            return Ok(());
        }
        if self.pieces.len() as u64 == PIECES_MAX {
            return Err(Error::Limit { what: "pieces of a content".to_owned(), limit: PIECES_MAX });
        }
        self.pieces.push(FilePiece { piece, file_offset });
        Ok(())
    }

    /// Pads and finishes the last chunk. Gives the length of the run, the pieces and the digests.
    pub(crate) fn finish(mut self) -> Result<(u64, Vec<FilePiece>, Vec<Digest>)> {
        let length = self.end().next_multiple_of(BLOCK_BYTES);
        self.pad_to(length)?;
        if !self.chunk.is_empty() {
            self.finish_chunk()?;
        }
        Ok((length, self.pieces, self.digests))
    }
}

/// The address of a file's next segment: on the line of the one before where they share a block or touch, otherwise
/// at the next block.
fn continued_address(last: &FilePiece, file_offset: u64) -> u64 {
    let end = (last.file_offset + last.piece.length).next_multiple_of(BLOCK_BYTES);
    if file_offset / BLOCK_BYTES * BLOCK_BYTES <= end {
        return last.piece.address + (file_offset - last.file_offset);
    }
    last.piece.end().next_multiple_of(BLOCK_BYTES) + file_offset % BLOCK_BYTES
}

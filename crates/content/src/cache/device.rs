//! [`CachedDevice`]: one content as a read-only block device.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use loam_block::{
    Access, BlockDevice, Capabilities, Error as BlockError, Geometry, Io, Locality, Located, Ticket,
    check_extents_range, check_range,
};

use super::content::Content;
use super::counters::count;
use super::flight::Flight;
use super::proofs::Generation;
use super::store::Local;
use crate::chunk::BLOCK_BYTES;
use crate::{ChunkSource, Error, Result};

/// The longest read in one piece, in bytes.
const READ_BYTES_MAX: u32 = 4 << 20;
/// Chunks that one question for locality looks at before it answers with what it has.
const LOCALITY_CHUNKS_MAX: u64 = 64 << 10;

/// A content of the cache. Offsets and lengths of reads are multiples of 4 KiB, the unit that is verified. Cheap to
/// clone; the content is in use until the last clone goes.
pub struct CachedDevice {
    pub(super) content: Arc<Content>,
}

impl Clone for CachedDevice {
    fn clone(&self) -> CachedDevice {
        CachedDevice::new(self.content.clone())
    }
}

impl Drop for CachedDevice {
    fn drop(&mut self) {
        self.content.give_handle_back();
    }
}

impl CachedDevice {
    pub(super) fn new(content: Arc<Content>) -> CachedDevice {
        content.take_handle();
        CachedDevice { content }
    }

    /// What materialises the chunks.
    pub fn source(&self) -> &Arc<dyn ChunkSource> {
        &self.content.source
    }

    /// Bytes that are local.
    pub fn local_bytes(&self) -> u64 {
        self.content.shelf.store.present().1
    }

    /// Digests that were recorded because nobody gave them in advance.
    pub fn recorded_digests(&self) -> u64 {
        self.content.digests.len()
    }

    /// Stores a chunk that the caller has at hand, checked like one that was fetched. A chunk that is there already, or
    /// on the way, is left alone, and one that finds no room is not kept.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::OtherBytes`] for bytes that are not the chunk's; [`Error::OutOfBounds`].
    pub async fn fill(&self, chunk: u64, bytes: &[u8]) -> Result<()> {
        let content = &self.content;
        let chunks = content.shape().chunks();
        if chunk >= chunks {
            let shape = content.shape();
            let offset = chunk.saturating_mul(shape.chunk_bytes());
            let (url, length) = (content.name().to_owned(), bytes.len() as u64);
            return Err(Error::OutOfBounds { url, offset, length, end: shape.length });
        }
        let flight = {
            let mut flights = content.shelf.flights();
            if flights.contains_key(&chunk) || content.shelf.store.is_present(chunk) {
                return Ok(());
            }
            Flight::start(&content.shelf, &mut flights, chunk, false)
        };
        let waiter = flight.waiter();
        let (content, bytes) = (content.clone(), Bytes::copy_from_slice(bytes));
        // Spawned, so that a caller that goes away does not leave a record of digests half made.
        let landed = tokio::spawn(async move { content.land(vec![(flight, bytes)]).await });
        super::fetch::joined(landed.await, "storing a chunk")?;
        waiter.wait().await.map(|_| ())
    }

    /// Whether a request is one of blocks of the content, at least one.
    fn is_whole_blocks(&self, offset: u64, length: u64) -> bool {
        let end = offset.checked_add(length).filter(|end| *end <= self.content.shape().length);
        length > 0 && end.is_some() && (offset | length).is_multiple_of(BLOCK_BYTES)
    }

    /// The chunks that a range of bytes touches.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub(super) fn chunks(&self, range: &Range<u64>) -> Result<Range<u64>> {
        let shape = self.content.shape();
        if range.start > range.end || range.end > shape.length {
            let (offset, length) = (range.start, range.end.saturating_sub(range.start));
            let url = self.content.name().to_owned();
            return Err(Error::OutOfBounds { url, offset, length, end: shape.length });
        }
        if range.is_empty() {
            return Ok(0..0);
        }
        Ok(shape.chunk_of(range.start)..shape.chunk_of(range.end - 1) + 1)
    }
}

impl BlockDevice for CachedDevice {
    fn geometry(&self) -> Geometry {
        let shape = self.content.shape();
        Geometry {
            size: shape.length,
            minimum_block: BLOCK_BYTES as u32,
            preferred_block: shape.chunk_bytes() as u32,
            maximum_block: READ_BYTES_MAX,
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { multi_connection: true, lazy: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        if let Err(error) = check_range(&self.geometry(), "read", offset, buffer.len() as u64) {
            return Io::Ready(Err(error));
        }
        if buffer.is_empty() {
            return Io::Ready(Ok(()));
        }
        if self.content.shelf.store.try_read(offset, buffer) == Local::Hit {
            count(&self.content.shared.counters.hits, 1);
            return Io::Ready(Ok(()));
        }
        Io::pending(async move {
            let length = buffer.len();
            self.content.clone().read_slow(offset, buffer).await.map_err(|error| {
                let context = format!("read of {length} bytes at {offset} of {}", self.content.name());
                BlockError::with_source(error.kind(), context, error)
            })
        })
    }

    /// A chunk is local when it is stored; what is on its way is not yet.
    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        if let Err(error) = check_extents_range(&self.geometry(), offset, length) {
            return Io::Ready(Err(error));
        }
        let shape = self.content.shape();
        let end = offset + length;
        let mut runs: Vec<Locality> = Vec::new();
        let first = shape.chunk_of(offset);
        for chunk in (first..=shape.chunk_of(end - 1)).take(LOCALITY_CHUNKS_MAX as usize) {
            let local = self.content.shelf.store.is_present(chunk);
            let start = shape.start(chunk).max(offset);
            let stop = (shape.start(chunk) + shape.bytes_of(chunk)).min(end);
            let full = runs.len() >= limit.max(1);
            match runs.last_mut() {
                Some(run) if run.local == local => run.length += stop - start,
                _ if full => break,
                _ => runs.push(Locality { offset: start, length: stop - start, local }),
            }
        }
        Io::Ready(Ok(runs))
    }

    /// Fetches the chunks that are missing, as [`CachedDevice::prefetch`] does: in the background of reads that wait.
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = check_range(&self.geometry(), "prefetch", offset, length) {
            return Io::Ready(Err(error));
        }
        Io::pending(async move {
            let range = offset..offset + length;
            CachedDevice::prefetch(self, &[range], &|_| ()).await.map_err(|error| {
                let context = format!("prefetch of {length} bytes at {offset} of {}", self.content.name());
                BlockError::with_source(error.kind(), context, error)
            })
        })
    }

    /// Of local chunks. Unseen, only blocks that were read from the file and found right since the cache was opened; what is
    /// stored after the first request for unseen bytes of a content is read back at once.
    fn locate(&self, offset: u64, length: u64, access: Access) -> Option<Located<'_>> {
        let store = &self.content.shelf.store;
        if !self.is_whole_blocks(offset, length) {
            return None;
        }
        let (file, seen) = match access {
            Access::Seen => store.locate_seen(offset, length)?,
            Access::Unseen => store.locate_unseen(offset, length)?,
        };
        Some(Located { file, offset, ticket: Ticket::new(offset, length, seen.0)? })
    }

    fn settle(&self, ticket: Ticket, bytes: Option<&[u8]>) -> bool {
        let store = &self.content.shelf.store;
        let (offset, length, seen) = (ticket.offset, u64::from(ticket.length), Generation(ticket.proof));
        let right = self.is_whole_blocks(offset, length)
            && match bytes {
                Some(bytes) => bytes.len() as u64 == length && store.settle_seen(offset, bytes, seen),
                None => store.settle_unseen(offset, length, seen),
            };
        if right {
            count(&self.content.shared.counters.hits, 1);
        }
        right
    }
}

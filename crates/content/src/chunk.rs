//! [`ChunkSource`]: what materialises the chunks of one content, and [`WholeSource`], the simplest one.
//!
//! Chunks are handed over one by one through a bounded channel, in order, as soon as each is complete: the first of a
//! long run is served while the rest still travels, and no run is ever held in memory whole.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::{ByteSource, Digest, Error, Result, WireTotals};

/// Chunks that a fetch may run ahead of the cache.
const CHANNEL_CHUNKS: usize = 8;

/// Contents are cut, verified and padded in blocks of this many bytes.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// How expensive it is to fetch from the middle of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchCost {
    /// Any run costs about its own bytes.
    RandomAccess,
    /// A fetch reads everything before it too (a compressed tar): one fetch should cover all that is missing.
    WholeStream,
}

/// What materialises the chunks of one content. Chunk `n` covers bytes `n * chunk_bytes ..` of the content's run; the
/// last one may be shorter.
pub trait ChunkSource: Send + Sync {
    /// What the content is called in messages.
    fn name(&self) -> &str;

    /// Bytes of the content's run: a multiple of 4096, not 0.
    fn length(&self) -> u64;

    /// Bytes of a chunk: a power of two from 4 KiB to 4 MiB.
    fn chunk_bytes(&self) -> u32;

    /// The chunk's digest where it is known in advance. `None`: the cache records, durably, what comes first.
    fn digest(&self, chunk: u64) -> Option<Digest>;

    /// Sends the materialised bytes of `count` consecutive chunks from `first` to `out`, each as soon as it is
    /// complete, in order; one request where possible. A fetch whose bytes nobody wants any more is told so by `out`.
    /// The future is spawned: it may run for long, but must not block its thread (blocking code sends from a blocking
    /// thread by [`ChunkSender::blocking_send`]).
    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, Result<()>>;

    /// Whether a run in the middle is cheap.
    fn fetch_cost(&self) -> FetchCost;

    /// What has crossed the wire for this content so far.
    fn wire(&self) -> WireTotals;
}

/// Where a fetch puts its chunks.
#[derive(Debug, Clone)]
pub struct ChunkSender(mpsc::Sender<Bytes>);

/// Where the cache takes them from.
#[derive(Debug)]
pub struct ChunkReceiver(mpsc::Receiver<Bytes>);

/// A bounded channel for the chunks of one fetch.
pub fn chunk_channel() -> (ChunkSender, ChunkReceiver) {
    let (sender, receiver) = mpsc::channel(CHANNEL_CHUNKS);
    (ChunkSender(sender), ChunkReceiver(receiver))
}

impl ChunkSender {
    /// Hands over the next chunk; waits while the cache is busy with those before it.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`] when nobody wants more of this run: end the fetch with that error.
    pub async fn send(&self, chunk: Bytes) -> Result<()> {
        self.0
            .send(chunk)
            .await
            .map_err(|_| Error::ShuttingDown { what: "fetch of a run of chunks".to_owned() })
    }

    /// The same from a blocking thread.
    ///
    /// # Errors
    /// As [`ChunkSender::send`].
    pub fn blocking_send(&self, chunk: Bytes) -> Result<()> {
        self.0
            .blocking_send(chunk)
            .map_err(|_| Error::ShuttingDown { what: "fetch of a run of chunks".to_owned() })
    }
}

impl ChunkReceiver {
    /// The next chunk, or `None` when the fetch has ended.
    pub async fn receive(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }

    /// The next chunk if it is there already.
    pub(crate) fn try_receive(&mut self) -> Option<Bytes> {
        self.0.try_recv().ok()
    }
}

/// Fetches `count` chunks from `first` into memory: for tests and small runs.
///
/// # Errors
/// Those of the source; [`Error::Source`] when it sends another number of chunks than asked for.
pub async fn collect_chunks(source: &dyn ChunkSource, first: u64, count: u64) -> Result<Vec<Bytes>> {
    let (sender, mut receiver) = chunk_channel();
    let receive = async {
        let mut chunks = Vec::new();
        while let Some(chunk) = receiver.receive().await {
            chunks.push(chunk);
        }
        chunks
    };
    let (fetched, chunks) = tokio::join!(source.fetch(first, count, sender), receive);
    fetched?;
    if chunks.len() as u64 != count {
        let what = format!("{}: {} chunks came where {count} were asked for", source.name(), chunks.len());
        return Err(Error::Source { kind: loam_block::ErrorKind::Io, what });
    }
    Ok(chunks)
}

/// An object as it is: address equals byte offset, zeros up to a multiple of 4 KiB behind the end.
pub struct WholeSource {
    bytes: Arc<dyn ByteSource>,
    name: String,
    chunk_bytes: u32,
}

impl WholeSource {
    /// The content of `bytes` in chunks of `chunk_bytes` (a power of two from 4 KiB to 4 MiB).
    ///
    /// # Errors
    /// [`Error::Source`] for an empty object or another chunk size.
    pub fn new(bytes: Arc<dyn ByteSource>, chunk_bytes: u32) -> Result<WholeSource> {
        let name = bytes.url().shown();
        let refuse = |why: &str| {
            Err(Error::Source { kind: loam_block::ErrorKind::Invalid, what: format!("{name}: {why}") })
        };
        if !chunk_bytes.is_power_of_two() || !(4096..=4 << 20).contains(&chunk_bytes) {
            return refuse("chunks are powers of two from 4 KiB to 4 MiB");
        }
        if bytes.length() == 0 {
            return refuse("it is empty: there is nothing to map");
        }
        if bytes.length().checked_next_multiple_of(BLOCK_BYTES).is_none() {
            return refuse("it is too long");
        }
        Ok(WholeSource { bytes, name, chunk_bytes })
    }
}

impl ChunkSource for WholeSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.bytes.length().next_multiple_of(BLOCK_BYTES)
    }

    fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    fn digest(&self, _chunk: u64) -> Option<Digest> {
        None
    }

    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let chunk_bytes = u64::from(self.chunk_bytes);
            let start = first * chunk_bytes;
            let end = (start + count * chunk_bytes).min(self.length());
            let object_end = end.min(self.bytes.length());
            let mut stream = self.bytes.stream(start, object_end - start);
            let mut at = start;
            let mut chunk = BytesMut::new();
            while at < end {
                let chunk_end = (at + chunk_bytes).min(end);
                let size = (chunk_end - at) as usize;
                chunk.reserve(size.saturating_sub(chunk.len()));
                while (chunk.len() as u64) < chunk_end.min(object_end) - at {
                    match stream.next().await {
                        Some(piece) => chunk.extend_from_slice(&piece?),
                        None => return Err(self.short(at + chunk.len() as u64)),
                    }
                }
                if chunk_end == end {
                    chunk.resize(size, 0);
                }
                out.send(chunk.split_to(size).freeze()).await?;
                at = chunk_end;
            }
            Ok(())
        })
    }

    fn fetch_cost(&self) -> FetchCost {
        FetchCost::RandomAccess
    }

    fn wire(&self) -> WireTotals {
        self.bytes.wire()
    }
}

impl WholeSource {
    fn short(&self, at: u64) -> Error {
        Error::Malformed { url: self.name.clone(), why: format!("the stream ended at {at}") }
    }
}

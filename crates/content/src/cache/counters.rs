//! What the cache counts.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use loam_block::ErrorKind;
use serde::Serialize;

use super::sync::lock;

/// The same trouble is logged once in this time.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// The state of a cache at one instant. Bytes, and counts since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct CacheStats {
    /// Bytes of cached chunks.
    pub bytes: u64,
    /// The most bytes of chunks that are kept.
    pub limit: u64,
    /// Reads answered from local chunks.
    pub hits: u64,
    /// Reads that had to wait for at least one chunk.
    pub misses: u64,
    /// Bytes of bodies received from the sources of all contents opened so far.
    pub fetched_bytes: u64,
    /// Requests sent to them.
    pub requests: u64,
    /// Chunks fetched and found right.
    pub fetched_chunks: u64,
    /// Of these, those fetched before anyone asked.
    pub ahead_chunks: u64,
    /// Cached chunks that did not match their checksums: dropped and fetched again.
    pub bad_blocks: u64,
    /// Chunks dropped to make room.
    pub evicted_chunks: u64,
    /// Chunks that were served but could not be kept: no room under the limit, disk full, or its error.
    pub uncached_chunks: u64,
    /// Failed chunk fetches by class.
    pub errors: ErrorCounts,
}

/// Failed chunk fetches by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ErrorCounts {
    /// The source serves other bytes than it did before.
    pub changed: u64,
    /// The source's bytes do not match the index.
    pub corrupt: u64,
    /// The source cannot be reached or refuses.
    pub unavailable: u64,
    /// The source is too slow.
    pub timed_out: u64,
    /// Anything else.
    pub other: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) fetched_chunks: AtomicU64,
    pub(crate) ahead_chunks: AtomicU64,
    pub(crate) bad_blocks: AtomicU64,
    pub(crate) evicted_chunks: AtomicU64,
    pub(crate) uncached_chunks: AtomicU64,
    changed: AtomicU64,
    corrupt: AtomicU64,
    unavailable: AtomicU64,
    timed_out: AtomicU64,
    other: AtomicU64,
    /// When it was last said that chunks cannot be kept.
    full_logged: Mutex<Option<Instant>>,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn error(&self, kind: ErrorKind) {
        let counter = match kind {
            ErrorKind::Changed => &self.changed,
            ErrorKind::Corrupt => &self.corrupt,
            ErrorKind::Unavailable => &self.unavailable,
            ErrorKind::TimedOut => &self.timed_out,
            _ => &self.other,
        };
        count(counter, 1);
    }

    /// Counts a chunk that is served but not kept, and says so once in a while.
    pub(crate) fn uncached(&self, content: &str, why: &str) {
        count(&self.uncached_chunks, 1);
        let mut logged = lock(&self.full_logged);
        if logged.is_none_or(|at| at.elapsed() >= LOG_PERIOD) {
            *logged = Some(Instant::now());
            tracing::warn!(content, why, "chunks are served but not kept; reads will fetch them again");
        }
    }

    /// The counts; what is not counted here is 0.
    pub(crate) fn snapshot(&self) -> CacheStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheStats {
            hits: get(&self.hits),
            misses: get(&self.misses),
            fetched_chunks: get(&self.fetched_chunks),
            ahead_chunks: get(&self.ahead_chunks),
            bad_blocks: get(&self.bad_blocks),
            evicted_chunks: get(&self.evicted_chunks),
            uncached_chunks: get(&self.uncached_chunks),
            errors: ErrorCounts {
                changed: get(&self.changed),
                corrupt: get(&self.corrupt),
                unavailable: get(&self.unavailable),
                timed_out: get(&self.timed_out),
                other: get(&self.other),
            },
            ..CacheStats::default()
        }
    }
}

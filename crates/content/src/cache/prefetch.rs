//! Fetching before anyone reads: `prefetch` and `pin`. Bounded, in the background of what somebody waits for.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use loam_block::ErrorKind;

use super::content::Run;
use super::device::CachedDevice;
use super::fetch::joined;
use super::flight::{Flight, Waiter};
use crate::{Error, FetchCost, Result};

/// A background fetch looks this often, this many times at most, whether nobody waits for a fetch.
const QUIET_LOOK: Duration = Duration::from_millis(5);
const QUIET_LOOKS_MAX: u32 = 100;

/// How far a `pin` or `prefetch` has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are local by now, or were found to be.
    pub done_bytes: u64,
    /// Bytes of all chunks that are wanted.
    pub total_bytes: u64,
}

impl CachedDevice {
    /// Fetches the chunks of these byte ranges that are not local, in the background of reads that wait: in parallel,
    /// bounded by [`super::CacheOptions::background_fetches`]. They may be evicted again like any other.
    ///
    /// # Errors
    /// The first that a fetch met; what came before it stays.
    pub async fn prefetch(
        &self,
        ranges: &[Range<u64>],
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<()> {
        let mut chunks = Vec::new();
        for range in ranges {
            chunks.push(self.chunks(range)?);
        }
        let content = &self.content;
        let (shape, per_run) = (content.shape(), content.run_chunks_max());
        let bytes_of = |chunks: Range<u64>| chunks.map(|chunk| shape.bytes_of(chunk)).sum::<u64>();
        let total_bytes = chunks.iter().cloned().map(bytes_of).sum();
        let done = AtomicU64::new(0);
        let pieces = chunks.into_iter().flat_map(|chunks| {
            let starts = chunks.clone().step_by(per_run as usize);
            starts.map(move |start| start..chunks.end.min(start + per_run))
        });
        // A whole stream is read by one fetch at a time: two would read the same bytes twice.
        let parallel = match content.source.fetch_cost() {
            FetchCost::RandomAccess => content.shared.options.background_fetches.max(1),
            FetchCost::WholeStream => 1,
        };
        let mut fetches = stream::iter(pieces)
            .map(|chunks| async {
                let bytes = bytes_of(chunks.clone());
                self.bring(chunks).await.map(|()| bytes)
            })
            .buffer_unordered(parallel);
        while let Some(bytes) = fetches.next().await {
            let bytes = bytes?;
            let done_bytes = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress(Progress { done_bytes, total_bytes });
        }
        Ok(())
    }

    /// Fetches the chunks of these byte ranges and keeps them: they are never evicted, also after a restart. Durable when
    /// it returns.
    ///
    /// # Errors
    /// Those of [`CachedDevice::prefetch`], and [`Error::Source`] with `NoSpace` when not all could be kept. What was
    /// pinned so far stays pinned.
    pub async fn pin(
        &self,
        ranges: &[Range<u64>],
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<()> {
        self.set_pinned(ranges, true).await?;
        self.prefetch(ranges, progress).await?;
        let mut missing = 0;
        for range in ranges {
            missing +=
                self.chunks(range)?.filter(|chunk| !self.content.shelf.store.is_present(*chunk)).count();
        }
        if missing > 0 {
            let what = format!(
                "pinning {}: {missing} chunks found no room; raise the cache's limit, unpin others, or free disk space",
                self.content.name()
            );
            return Err(Error::Source { kind: ErrorKind::NoSpace, what });
        }
        self.set_pinned(ranges, true).await
    }

    /// Lets chunks be evicted again.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; [`Error::Io`].
    pub async fn unpin(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.set_pinned(ranges, false).await
    }

    async fn set_pinned(&self, ranges: &[Range<u64>], pinned: bool) -> Result<()> {
        let mut chunks = Vec::new();
        for range in ranges {
            chunks.push(self.chunks(range)?);
        }
        let content = self.content.clone();
        let set = tokio::task::spawn_blocking(move || {
            let store = &content.shelf.store;
            chunks.into_iter().filter(|chunks| !chunks.is_empty()).try_for_each(|chunks| {
                store.set_pinned(chunks.start, chunks.end - chunks.start, pinned).map_err(|error| {
                    Error::io(format!("writing pins to {}", store.directory().join("table").display()), error)
                })
            })
        });
        joined(set.await, "pinning")?
    }

    /// Brings one run's worth of chunks.
    async fn bring(&self, chunks: Range<u64>) -> Result<()> {
        let content = &self.content;
        let store = &content.shelf.store;
        if chunks.clone().all(|chunk| store.is_present(chunk)) {
            return Ok(());
        }
        let shared = &content.shared;
        let permit = shared.background.acquire().await;
        let _permit = permit.map_err(|_| Error::ShuttingDown { what: "prefetch".to_owned() })?;
        for _ in 0..QUIET_LOOKS_MAX {
            if shared.demand.load(Ordering::Relaxed) == 0 {
                break;
            }
            tokio::time::sleep(QUIET_LOOK).await;
        }
        let mut waiters = Vec::new();
        let mut run = Run { first: chunks.start, flights: Vec::new(), demanded: false };
        {
            let mut flights = content.shelf.flights();
            for chunk in chunks {
                let flying = flights.get(&chunk).map(Waiter::join);
                let start = flying.is_none() && !store.is_present(chunk);
                let flight = start.then(|| Flight::start(&content.shelf, &mut flights, chunk, false));
                waiters.extend(flying.or_else(|| flight.as_ref().map(Flight::waiter)));
                run.flights.push(flight);
            }
        }
        // The run passes over chunks that are there: cheap next to another request's round trip, and rare.
        let flown = tokio::spawn(content.clone().fly(run));
        for waiter in waiters {
            waiter.wait().await?;
        }
        joined(flown.await, "prefetch")
    }
}

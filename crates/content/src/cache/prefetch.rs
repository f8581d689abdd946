//! Fetching before anyone reads: `prefetch` and `pin`. Bounded, in the background of what somebody waits for.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
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

/// Within so much of a trace the order of addresses is kept instead of that of time: neighbours come by one request.
const REPLAY_WINDOW_BYTES: u64 = 1 << 20;

/// Each chunk once, where it comes first; `window` chunks at a time in the order of addresses, adjacent ones joined.
fn in_windows(trace: Vec<Range<u64>>, window: usize) -> Vec<Range<u64>> {
    let mut seen = HashSet::new();
    let chunks: Vec<u64> = trace.into_iter().flatten().filter(|chunk| seen.insert(*chunk)).collect();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for window in chunks.chunks(window) {
        let mut window = window.to_vec();
        window.sort_unstable();
        let begun = runs.len();
        for chunk in window {
            match runs.get_mut(begun..).and_then(<[_]>::last_mut) {
                Some(run) if run.end == chunk => run.end += 1,
                _ => runs.push(chunk..chunk + 1),
            }
        }
    }
    runs
}

/// As long as it lives, misses of the content are not widened.
struct Replaying<'a>(&'a AtomicUsize);

impl<'a> Replaying<'a> {
    fn new(replays: &'a AtomicUsize) -> Replaying<'a> {
        replays.fetch_add(1, Ordering::Relaxed);
        Replaying(replays)
    }
}

impl Drop for Replaying<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a fetch treats reads that wait for another.
#[derive(Debug, Clone, Copy)]
enum Manner {
    /// It lets them go first.
    Quiet,
    /// It runs beside them.
    Eager,
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
        // A whole stream is read by one fetch at a time: two would read the same bytes twice.
        let parallel = match self.content.source.fetch_cost() {
            FetchCost::RandomAccess => self.content.shared.options.background_fetches.max(1),
            FetchCost::WholeStream => 1,
        };
        self.bring_all(chunks, parallel, Manner::Quiet, progress).await
    }

    /// Fetches what a trace says will be read, in its order, and beside the reads that wait: a run of the same program is
    /// just about to ask for it. At most [`super::CacheOptions::replay_fetches`] at once.
    ///
    /// # Errors
    /// The first that a fetch met; what came before it stays. A source that can only be read as a whole stream is left
    /// alone.
    pub async fn replay(&self, trace: &[Range<u64>]) -> Result<()> {
        if self.content.source.fetch_cost() == FetchCost::WholeStream {
            return Ok(());
        }
        let chunks = trace.iter().map(|range| self.chunks(range)).collect::<Result<Vec<_>>>()?;
        let window = (REPLAY_WINDOW_BYTES / self.content.shape().chunk_bytes()).max(1) as usize;
        let parallel = self.content.shared.options.replay_fetches.max(1);
        let _replaying = Replaying::new(&self.content.replays);
        self.bring_all(in_windows(chunks, window), parallel, Manner::Eager, &|_| ()).await
    }

    async fn bring_all(
        &self,
        chunks: Vec<Range<u64>>,
        parallel: usize,
        manner: Manner,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<()> {
        let content = &self.content;
        let (shape, per_run) = (content.shape(), content.run_chunks_max());
        let bytes_of = |chunks: Range<u64>| chunks.map(|chunk| shape.bytes_of(chunk)).sum::<u64>();
        let total_bytes = chunks.iter().cloned().map(bytes_of).sum();
        let done = AtomicU64::new(0);
        let pieces = chunks.into_iter().flat_map(|chunks| {
            let starts = chunks.clone().step_by(per_run as usize);
            starts.map(move |start| start..chunks.end.min(start + per_run))
        });
        let mut fetches = stream::iter(pieces)
            .map(|chunks| async {
                let bytes = bytes_of(chunks.clone());
                self.bring(chunks, manner).await.map(|()| bytes)
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

    /// Waits for a turn in the background, and for a moment in which nobody waits for a fetch.
    async fn quiet(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        let shared = &self.content.shared;
        let permit = shared.background.acquire().await;
        let permit = permit.map_err(|_| Error::ShuttingDown { what: "prefetch".to_owned() })?;
        for _ in 0..QUIET_LOOKS_MAX {
            if shared.demand.load(Ordering::Relaxed) == 0 {
                break;
            }
            tokio::time::sleep(QUIET_LOOK).await;
        }
        Ok(permit)
    }

    /// Brings one run's worth of chunks.
    async fn bring(&self, chunks: Range<u64>, manner: Manner) -> Result<()> {
        let content = &self.content;
        let store = &content.shelf.store;
        if chunks.clone().all(|chunk| store.is_present(chunk)) {
            return Ok(());
        }
        let _permit = match manner {
            Manner::Eager => None,
            Manner::Quiet => Some(self.quiet().await?),
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_cut_into_windows() {
        let trace = vec![7..9, 2..3, 8..10, 3..4, 100..101, 9..10];
        assert_eq!(in_windows(trace.clone(), 100), [2..4, 7..10, 100..101]);
        assert_eq!(in_windows(trace.clone(), 3), [2..3, 7..9, 3..4, 9..10, 100..101]);
        assert_eq!(in_windows(Vec::new(), 3), []);
    }
}

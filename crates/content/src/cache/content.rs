//! [`Content`]: the way of a read that is not answered from local chunks at once: which chunks are there, which are on the
//! way, which must be fetched, and together with which others.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use loam_block::ErrorKind;

use super::counters::count;
use super::digests::DigestLog;
use super::flight::{Flight, Flights, Shelf, Waiter};
use super::readahead::Streams;
use super::store::Local;
use super::sync::lock;
use super::{Shared, layout::Shape};
use crate::{ChunkSource, Error, FetchCost, Result};

/// Failed chunks that are remembered at once, per content.
const FAILURES_MAX: usize = 4096;
/// Chunks of one fetch, at most.
pub(crate) const RUN_CHUNKS_MAX: u64 = 64 << 10;
/// Times that one read looks again because chunks were evicted or found bad under it.
const READ_ATTEMPTS: u32 = 6;

/// One content with its source.
pub(crate) struct Content {
    pub(crate) shared: Arc<Shared>,
    pub(crate) shelf: Arc<Shelf>,
    pub(crate) source: Arc<dyn ChunkSource>,
    pub(crate) digests: DigestLog,
    streams: Mutex<Streams>,
    failures: Mutex<HashMap<u64, (Instant, Error)>>,
    /// Traces that are being replayed.
    pub(crate) replays: AtomicUsize,
    /// Open devices; fetches that are still on the way hold the content too, but no device.
    handles: AtomicUsize,
}

/// A chunk as a read finds it.
pub(crate) enum Piece {
    /// Stored; to be read and verified.
    Local,
    /// On the way.
    Coming(Waiter),
}

/// Adjacent chunks that one fetch brings. `None`: passed over, since it is there or comes by another fetch.
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) flights: Vec<Option<Flight>>,
    /// Somebody waits for at least one of them.
    pub(crate) demanded: bool,
}

/// Collects new flights into runs of adjacent chunks.
struct Runs<'a> {
    shelf: &'a Arc<Shelf>,
    chunks_max: u64,
    runs: Vec<Run>,
}

impl Runs<'_> {
    fn add(&mut self, flights: &mut Flights, chunk: u64, suspect: bool, demanded: bool) -> Waiter {
        let mut flight = Flight::start(self.shelf, flights, chunk, demanded);
        flight.suspect = suspect;
        let waiter = flight.waiter();
        match self.runs.last_mut() {
            Some(run)
                if run.first + run.flights.len() as u64 == chunk
                    && (run.flights.len() as u64) < self.chunks_max =>
            {
                run.demanded |= demanded;
                run.flights.push(Some(flight));
            }
            _ => self.runs.push(Run { first: chunk, flights: vec![Some(flight)], demanded }),
        }
        waiter
    }
}

impl Content {
    pub(crate) fn new(
        shared: Arc<Shared>,
        shelf: Arc<Shelf>,
        source: Arc<dyn ChunkSource>,
        digests: DigestLog,
    ) -> Content {
        let streams = Streams::new(shared.options.read_ahead, shelf.store.shape().chunk_bytes());
        Content {
            shared,
            shelf,
            source,
            digests,
            streams: Mutex::new(streams),
            failures: Mutex::default(),
            replays: AtomicUsize::new(0),
            handles: AtomicUsize::new(0),
        }
    }

    pub(crate) fn handles(&self) -> usize {
        self.handles.load(Ordering::Acquire)
    }

    pub(crate) fn take_handle(&self) {
        self.handles.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn give_handle_back(&self) {
        self.handles.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shelf.store.shape()
    }

    pub(crate) fn name(&self) -> &str {
        self.source.name()
    }

    /// Chunks of a fetch that brings `run_bytes_max`.
    pub(crate) fn run_chunks_max(&self) -> u64 {
        match self.source.fetch_cost() {
            FetchCost::RandomAccess => {
                (self.shared.options.run_bytes_max / self.shape().chunk_bytes()).clamp(1, RUN_CHUNKS_MAX)
            }
            FetchCost::WholeStream => RUN_CHUNKS_MAX,
        }
    }

    /// Remembers a failed chunk for a while, so that a server in trouble is not asked by every reader anew.
    pub(crate) fn failed(&self, chunk: u64, error: &Error) {
        let mut failures = lock(&self.failures);
        if failures.len() >= FAILURES_MAX {
            failures.clear();
        }
        failures.insert(chunk, (Instant::now() + self.shared.options.failure_memory, error.clone()));
    }

    fn recent_failure(&self, chunks: RangeInclusive<u64>) -> Option<Error> {
        let mut failures = lock(&self.failures);
        if failures.is_empty() {
            return None;
        }
        let now = Instant::now();
        failures.retain(|_, (until, _)| *until > now);
        failures.iter().find(|(chunk, _)| chunks.contains(chunk)).map(|(_, (_, error))| error.clone())
    }

    /// Says for each chunk of `first..=last` where it is, and gets those under way that are neither here nor coming,
    /// read-ahead included. `suspects` are looked at again. `joined` is set where a fetch is waited for that no reader began.
    fn gather(
        self: &Arc<Self>,
        first: u64,
        last: u64,
        suspects: &[u64],
        joined: &mut bool,
    ) -> Result<Vec<Piece>> {
        if let Some(error) = self.recent_failure(first..=last) {
            return Err(error);
        }
        let store = &self.shelf.store;
        let mut runs = Runs { shelf: &self.shelf, chunks_max: self.run_chunks_max(), runs: Vec::new() };
        let mut flights = self.shelf.flights();
        let mut started = None;
        let pieces: Vec<Piece> = (first..=last)
            .map(|chunk| {
                let suspect = suspects.contains(&chunk);
                if let Some(flight) = flights.get(&chunk) {
                    *joined |= !flight.demanded;
                    Piece::Coming(Waiter::join(flight))
                } else if store.is_present(chunk) && !suspect {
                    Piece::Local
                } else {
                    started.get_or_insert(chunk);
                    Piece::Coming(runs.add(&mut flights, chunk, suspect, true))
                }
            })
            .collect();
        if pieces.iter().all(|piece| matches!(piece, Piece::Local)) {
            return Ok(pieces);
        }
        match (self.source.fetch_cost(), started) {
            (FetchCost::WholeStream, Some(started)) => self.whole_stream(&mut runs, &mut flights, started),
            (FetchCost::WholeStream, None) => {}
            (FetchCost::RandomAccess, _) => self.extend(&mut runs, &mut flights, first, last),
        }
        let runs = runs.runs;
        drop(flights);
        for run in runs {
            tokio::spawn(self.clone().fly(run));
        }
        Ok(pieces)
    }

    /// Adds what the reader will probably want next.
    fn extend(&self, runs: &mut Runs<'_>, flights: &mut Flights, first: u64, last: u64) {
        if self.replays.load(Ordering::Relaxed) > 0 {
            // A trace knows what comes next better than a guess.
            return;
        }
        let ahead = lock(&self.streams).asked(first, last);
        let end = ahead.end.min(self.shape().chunks());
        for chunk in (ahead.start..end).take(RUN_CHUNKS_MAX as usize) {
            if !flights.contains_key(&chunk) && !self.shelf.store.is_present(chunk) {
                runs.add(flights, chunk, false, false);
            }
        }
    }

    /// Makes one run of everything that is missing around `started`: the stream passes it anyway.
    fn whole_stream(&self, runs: &mut Runs<'_>, flights: &mut Flights, started: u64) {
        let mut demanded: HashMap<u64, Flight> = std::mem::take(&mut runs.runs)
            .into_iter()
            .flat_map(|run| run.flights.into_iter().flatten())
            .map(|flight| (flight.chunk(), flight))
            .collect();
        let from = started.saturating_sub(RUN_CHUNKS_MAX / 2);
        let to = self.shape().chunks().min(from + RUN_CHUNKS_MAX);
        let mut run = Run { first: from, flights: Vec::new(), demanded: true };
        for chunk in from..to {
            let flight = demanded.remove(&chunk).or_else(|| {
                let missing = !flights.contains_key(&chunk) && !self.shelf.store.is_present(chunk);
                missing.then(|| Flight::start(&self.shelf, flights, chunk, false))
            });
            run.flights.push(flight);
        }
        runs.runs.push(run);
        // A read longer than a run may reach beyond it; what is left over is a run of its own.
        let mut rest: Vec<Flight> = demanded.into_values().collect();
        rest.sort_by_key(Flight::chunk);
        for flight in rest {
            runs.runs.push(Run { first: flight.chunk(), flights: vec![Some(flight)], demanded: true });
        }
    }

    /// Reads what could not be read at once.
    pub(crate) async fn read_slow(self: Arc<Self>, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let shape = self.shape();
        let end = offset + buffer.len() as u64;
        let (first, last) = (shape.chunk_of(offset), shape.chunk_of(end - 1));
        let mut suspects = Vec::new();
        let mut missed = false;
        let mut joined = false;
        for _ in 0..READ_ATTEMPTS {
            let before = std::mem::replace(&mut joined, false);
            let pieces = self.gather(first, last, &suspects, &mut joined)?;
            let local = match self.assemble(offset, buffer, pieces, &mut missed).await {
                // A fetch ahead of readers may have used up its patience before this one came, who now tries for itself.
                Err(error) if joined && !before && is_passing(&error) => continue,
                other => other?,
            };
            match local {
                Local::Hit => {
                    let counters = &self.shared.counters;
                    count(if missed { &counters.misses } else { &counters.hits }, 1);
                    return Ok(());
                }
                Local::Suspect(block) => suspects.push(shape.chunk_of(block * crate::chunk::BLOCK_BYTES)),
                Local::Absent | Local::Slow => {}
            }
        }
        let what =
            format!("read of {} bytes at {offset} of {}: evicted again and again", end - offset, self.name());
        Err(Error::Source { kind: ErrorKind::Io, what })
    }

    async fn assemble(
        self: &Arc<Self>,
        offset: u64,
        buffer: &mut [u8],
        pieces: Vec<Piece>,
        missed: &mut bool,
    ) -> Result<Local> {
        let shape = self.shape();
        let end = offset + buffer.len() as u64;
        let first = shape.chunk_of(offset);
        let mut local_from = None;
        let mut coming = Vec::new();
        let mut local = Vec::new();
        for (chunk, piece) in (first..).zip(pieces) {
            match piece {
                Piece::Local => {
                    local_from.get_or_insert(chunk);
                }
                Piece::Coming(waiter) => {
                    coming.push((chunk, waiter));
                    local.extend(local_from.take().map(|from| from..chunk));
                }
            }
        }
        local.extend(local_from.map(|from| from..shape.chunk_of(end - 1) + 1));
        for run in local {
            let from = shape.start(run.start).max(offset);
            let to = shape.start(run.end).min(end);
            let content = self.clone();
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; (to - from) as usize];
                content.shelf.store.read(from, &mut bytes).map(|local| (local, bytes))
            });
            let (local, bytes) = match read.await {
                Ok(Ok(read)) => read,
                Ok(Err(error)) => {
                    return Err(Error::io(format!("reading the cache of {}", self.name()), error));
                }
                Err(_) => return Err(Error::ShuttingDown { what: format!("read of {}", self.name()) }),
            };
            if local != Local::Hit {
                return Ok(local);
            }
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&bytes);
        }
        for (chunk, waiter) in coming {
            *missed = true;
            let bytes = waiter.wait().await?;
            let from = shape.start(chunk).max(offset);
            let to = (shape.start(chunk) + shape.bytes_of(chunk)).min(end);
            let within = (from - shape.start(chunk)) as usize;
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&bytes[within..within + (to - from) as usize]);
        }
        Ok(Local::Hit)
    }

    /// Counts a fetch that somebody waits for, until the guard goes.
    pub(crate) fn demanding(self: &Arc<Self>) -> Demanding {
        self.shared.demand.fetch_add(1, Ordering::Relaxed);
        Demanding(self.shared.clone())
    }
}

/// Whether another attempt may go better.
fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::ShuttingDown)
}

/// See [`Content::demanding`].
pub(crate) struct Demanding(Arc<Shared>);

impl Drop for Demanding {
    fn drop(&mut self) {
        self.0.demand.fetch_sub(1, Ordering::Relaxed);
    }
}

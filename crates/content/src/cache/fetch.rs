//! Flying: how a run of chunks is fetched, checked against its digests, told to those who wait, and stored.

use std::sync::Arc;

use bytes::Bytes;
use loam_block::ErrorKind;

use super::Shared;
use super::content::{Content, Run};
use super::counters::count;
use super::flight::Flight;
use super::store::Local;
use crate::chunk::{ChunkReceiver, chunk_channel};
use crate::{Digest, Error, Result};

/// Chunks that are checked, recorded and stored in one go.
const BATCH_CHUNKS: usize = 16;

/// A chunk that has come, and what is to be thought of it.
struct Arrival {
    flight: Flight,
    bytes: Bytes,
    digest: Digest,
    verdict: Verdict,
}

enum Verdict {
    Right,
    /// Nobody vouched for it: its digest is recorded before it is served.
    FirstSeen,
    Wrong(Error),
}

impl Content {
    /// Brings the chunks of a run. Runs to its end, whoever waits or no longer does.
    pub(crate) async fn fly(self: Arc<Self>, mut run: Run) {
        let _demanding = run.demanded.then(|| self.demanding());
        if run.flights.iter().flatten().any(|flight| flight.suspect) {
            run = match self.clone().look_again(run).await {
                Some(run) => run,
                None => return,
            };
        }
        while run.flights.last().is_some_and(Option::is_none) {
            run.flights.pop();
        }
        let passed = run.flights.iter().take_while(|flight| flight.is_none()).count();
        run.flights.drain(..passed);
        run.first += passed as u64;
        if run.flights.is_empty() {
            return;
        }
        let (sender, receiver) = chunk_channel();
        let fetch = self.source.fetch(run.first, run.flights.len() as u64, sender);
        let demanded = run.demanded;
        let (fetched, arrived) = tokio::join!(fetch, self.arrivals(&mut run, receiver));
        if !demanded {
            count(&self.shared.counters.ahead_chunks, arrived);
        }
        let error = fetched.err().unwrap_or_else(|| Error::Source {
            kind: ErrorKind::Io,
            what: format!("{}: the source sent fewer chunks than it was asked for", self.name()),
        });
        let missing: Vec<Flight> = run.flights.into_iter().flatten().collect();
        if let Some(first) = missing.first() {
            tracing::warn!(content = self.name(), first = first.chunk(), chunks = missing.len(), %error, "fetch failed");
        }
        for flight in missing {
            // What was fetched ahead failed nobody: who wants it tries for itself.
            if demanded {
                self.failed(flight.chunk(), &error);
            }
            self.refuse(flight, error.clone());
        }
    }

    fn refuse(&self, flight: Flight, error: Error) {
        self.shared.counters.error(error.kind());
        flight.fail(error);
    }

    /// Reads suspects again, now that nobody drops or stores them: those that are right land, those that are not are
    /// dropped and stay in the run.
    async fn look_again(self: Arc<Self>, mut run: Run) -> Option<Run> {
        let looked = tokio::task::spawn_blocking(move || {
            let store = &self.shelf.store;
            for slot in &mut run.flights {
                let Some(flight) = slot.as_ref().filter(|flight| flight.suspect) else { continue };
                let (chunk, size) = (flight.chunk(), store.shape().bytes_of(flight.chunk()));
                if !store.is_present(chunk) {
                    continue;
                }
                let mut bytes = vec![0; size as usize];
                if let Ok(Local::Hit) = store.read(store.shape().start(chunk), &mut bytes) {
                    flight.land(Ok(bytes.into()));
                    *slot = None;
                    continue;
                }
                count(&self.shared.counters.bad_blocks, 1);
                tracing::error!(
                    content = self.name(),
                    chunk,
                    file = %store.directory().join("data").display(),
                    "a cached chunk is damaged: dropped, to be fetched again"
                );
                self.shared.room.release(store.drop_run(chunk, 1));
            }
            run
        });
        looked.await.ok()
    }

    /// Takes chunks as they come; gives how many were right.
    async fn arrivals(self: &Arc<Self>, run: &mut Run, mut receiver: ChunkReceiver) -> u64 {
        let mut next = 0;
        let mut right = 0;
        while let Some(bytes) = receiver.receive().await {
            let mut batch = Vec::new();
            let mut coming = Some(bytes);
            while let Some(bytes) = coming {
                // More chunks than were asked for are nobody's.
                let Some(slot) = run.flights.get_mut(next) else { return right };
                batch.extend(slot.take().map(|flight| (flight, bytes)));
                next += 1;
                coming = if batch.len() < BATCH_CHUNKS { receiver.try_receive() } else { None };
            }
            right += self.land(batch).await;
        }
        right
    }

    /// Checks, records, serves and stores chunks; gives how many were right.
    pub(crate) async fn land(self: &Arc<Self>, batch: Vec<(Flight, Bytes)>) -> u64 {
        if batch.is_empty() {
            return 0;
        }
        let content = self.clone();
        let checked = tokio::task::spawn_blocking(move || {
            let arrivals: Vec<_> =
                batch.into_iter().map(|(flight, bytes)| content.check(flight, bytes)).collect();
            if arrivals.iter().any(|arrival| matches!(arrival.verdict, Verdict::FirstSeen)) {
                Err(arrivals)
            } else {
                Ok(content.settle(arrivals))
            }
        });
        let mut arrivals = match checked.await {
            Ok(Ok(right)) => return right,
            Ok(Err(arrivals)) => arrivals,
            // The flights went with the task, and those who wait know.
            Err(_) => return 0,
        };
        let first_seen: Vec<_> = arrivals
            .iter()
            .filter(|arrival| matches!(arrival.verdict, Verdict::FirstSeen))
            .map(|arrival| (arrival.flight.chunk(), arrival.digest))
            .collect();
        if let Err(error) = self.digests.record(&first_seen).await {
            for arrival in &mut arrivals {
                if matches!(arrival.verdict, Verdict::FirstSeen) {
                    arrival.verdict = Verdict::Wrong(error.clone());
                }
            }
        }
        let content = self.clone();
        tokio::task::spawn_blocking(move || content.settle(arrivals)).await.unwrap_or(0)
    }

    fn check(&self, flight: Flight, bytes: Bytes) -> Arrival {
        let chunk = flight.chunk();
        let digest = Digest::of(&bytes);
        let content = || self.name().to_owned();
        let length = self.shape().bytes_of(chunk);
        let recorded = self.digests.get(chunk).filter(|recorded| *recorded != digest);
        let verdict = if bytes.len() as u64 != length {
            let what =
                format!("{}: chunk {chunk} came with {} bytes instead of {length}", content(), bytes.len());
            Verdict::Wrong(Error::Source { kind: ErrorKind::Io, what })
        } else if let Some(recorded) = recorded {
            Verdict::Wrong(Error::OtherBytes { content: content(), chunk, recorded, found: digest })
        } else {
            match self.source.digest(chunk) {
                Some(expected) if expected != digest => {
                    Verdict::Wrong(Error::Corrupt { content: content(), chunk, expected, found: digest })
                }
                Some(_) => Verdict::Right,
                None if self.digests.get(chunk).is_some() => Verdict::Right,
                None => Verdict::FirstSeen,
            }
        };
        Arrival { flight, bytes, digest, verdict }
    }

    /// Serves each right chunk before it is stored: a slow disk holds nobody up. The flight ends when it is stored.
    fn settle(&self, arrivals: Vec<Arrival>) -> u64 {
        let mut right = 0;
        for Arrival { flight, bytes, verdict, .. } in arrivals {
            match verdict {
                Verdict::Wrong(error) => {
                    tracing::error!(content = self.name(), chunk = flight.chunk(), %error, "refused a chunk");
                    self.failed(flight.chunk(), &error);
                    self.refuse(flight, error);
                }
                Verdict::Right | Verdict::FirstSeen => {
                    flight.land(Ok(bytes.clone()));
                    right += 1;
                    self.keep(flight.chunk(), &bytes);
                }
            }
        }
        count(&self.shared.counters.fetched_chunks, right);
        right
    }

    fn keep(&self, chunk: u64, bytes: &[u8]) {
        let Shared { room, counters, .. } = &*self.shared;
        let size = bytes.len() as u64;
        if !room.reserve(size, counters) {
            counters.uncached(self.name(), "nothing more can be evicted to stay under the cache's limit");
        } else if let Err(error) = self.shelf.store.fill(chunk, bytes) {
            // What was written of it takes room for nothing.
            self.shelf.store.drop_run(chunk, 1);
            room.release(size);
            counters.uncached(self.name(), &error.to_string());
        } else {
            self.shelf.store.read_back(chunk);
        }
    }
}

/// Turns the join error of a blocking task into ours.
pub(crate) fn joined<T>(result: Result<T, tokio::task::JoinError>, what: &str) -> Result<T> {
    result.map_err(|_| Error::ShuttingDown { what: what.to_owned() })
}

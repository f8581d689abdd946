//! Reading back everything that a content has in the cache.

use super::counters::count;
use super::device::CachedDevice;
use super::fetch::joined;
use super::flight::Flight;
use super::store::{Local, PRESENT};
use crate::{Digest, Error, Result};

/// Bad chunks that a report names.
const NAMED_MAX: usize = 1000;

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct CheckReport {
    /// Chunks read.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks that do not match their checksums or their digest.
    pub bad_chunks: u64,
    /// The numbers of the first 1000 of them.
    pub bad: Vec<u64>,
    /// Bad chunks that were dropped, to be fetched again when they are read.
    pub dropped: u64,
}

impl CachedDevice {
    /// Reads every local chunk and checks it against its checksums and its digest. With `repair`, bad ones are dropped.
    ///
    /// # Errors
    /// [`Error::Io`] when the table cannot be read; bad chunks are no error but in the report.
    pub async fn check(&self, repair: bool) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        let mut from = 0;
        while let Some(chunk) = self.content.shelf.store.next_with(from, PRESENT) {
            from = chunk + 1;
            let device = self.clone();
            let checked = tokio::task::spawn_blocking(move || device.check_chunk(chunk, repair));
            let Some((right, dropped)) = joined(checked.await, "check")?? else { continue };
            report.chunks += 1;
            report.bytes += self.content.shape().bytes_of(chunk);
            if !right {
                report.bad_chunks += 1;
                report.dropped += u64::from(dropped);
                if report.bad.len() < NAMED_MAX {
                    report.bad.push(chunk);
                }
            }
        }
        Ok(report)
    }

    /// Whether a chunk is right, and whether it was dropped; `None` if it went in the meantime.
    fn check_chunk(&self, chunk: u64, repair: bool) -> Result<Option<(bool, bool)>> {
        let store = &self.content.shelf.store;
        let mut bytes = vec![0; store.shape().bytes_of(chunk) as usize];
        let mut right = || {
            let read = store.read(store.shape().start(chunk), &mut bytes);
            let read = read.map_err(|error| Error::io(format!("checking {}", self.content.name()), error))?;
            let expected = self.content.source.digest(chunk).or_else(|| self.content.digests.get(chunk));
            Ok(match read {
                Local::Hit => Some(expected.is_none_or(|expected| expected == Digest::of(&bytes))),
                Local::Absent | Local::Slow => None,
                Local::Suspect(_) => Some(false),
            })
        };
        match right()? {
            Some(false) => {}
            other => return Ok(other.map(|right| (right, false))),
        }
        // Perhaps it was evicted while it was read. With its flight in hand nobody can do that.
        let flight = {
            let mut flights = self.content.shelf.flights();
            if flights.contains_key(&chunk) {
                return Ok(None);
            }
            Flight::start(&self.content.shelf, &mut flights, chunk, false)
        };
        match right()? {
            Some(false) => {}
            other => return Ok(other.map(|right| (right, false))),
        }
        if repair {
            count(&self.content.shared.counters.bad_blocks, 1);
            tracing::error!(content = self.content.name(), chunk, "a cached chunk is damaged: dropped");
            self.content.shared.room.release(store.drop_run(chunk, 1));
        }
        drop(flight);
        Ok(Some((false, repair)))
    }
}

//! Flights: what is being fetched, verified or stored just now, chunk by chunk. A flight is shared by everyone who wants
//! its chunk, and it is the chunk's lock: nobody else stores or drops the chunk while it is up.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::watch;

use super::store::Store;
use super::sync::lock;
use crate::{Error, Result};

type Outcome = Option<Result<Bytes>>;

/// The flights of one content, by chunk.
pub(crate) type Flights = HashMap<u64, Up>;

/// A flight as others see it.
#[derive(Debug)]
pub(crate) struct Up {
    outcome: watch::Receiver<Outcome>,
    /// Started by a reader, not ahead of one.
    pub(crate) demanded: bool,
}

/// One content's place in the cache.
#[derive(Debug)]
pub(crate) struct Shelf {
    pub(crate) store: Store,
    flights: Mutex<Flights>,
    /// Fetching one chunk again means fetching all: evicted last.
    pub(crate) whole_stream: AtomicBool,
}

impl Shelf {
    pub(crate) fn new(store: Store) -> Shelf {
        Shelf { store, flights: Mutex::default(), whole_stream: AtomicBool::new(false) }
    }

    /// While this is held no flight starts or ends. Never across an await, nor while a [`Flight`] is dropped.
    pub(crate) fn flights(&self) -> MutexGuard<'_, Flights> {
        lock(&self.flights)
    }
}

/// The right, and the duty, to bring one chunk. Dropped, it lets go of the chunk; whoever still waits is told that
/// nothing came.
#[derive(Debug)]
pub(crate) struct Flight {
    shelf: Arc<Shelf>,
    chunk: u64,
    outcome: watch::Sender<Outcome>,
    up: bool,
    /// The chunk is present, but a reader found that it does not match its checksums: look first.
    pub(crate) suspect: bool,
}

impl Flight {
    /// Starts a flight for a chunk that has none.
    pub(crate) fn start(shelf: &Arc<Shelf>, flights: &mut Flights, chunk: u64, demanded: bool) -> Flight {
        let (outcome, receiver) = watch::channel(None);
        let before = flights.insert(chunk, Up { outcome: receiver, demanded });
        assert!(before.is_none(), "a chunk has one flight at most");
        Flight { shelf: shelf.clone(), chunk, outcome, up: true, suspect: false }
    }

    pub(crate) fn chunk(&self) -> u64 {
        self.chunk
    }

    pub(crate) fn waiter(&self) -> Waiter {
        Waiter(self.outcome.subscribe())
    }

    /// Tells everyone who waits, and who comes while the flight is still up.
    pub(crate) fn land(&self, result: Result<Bytes>) {
        self.outcome.send_replace(Some(result));
    }
}

impl Flight {
    /// Tells everyone who waits that nothing came. Who comes from now on does not meet this flight any more.
    pub(crate) fn fail(mut self, error: Error) {
        self.let_go();
        self.land(Err(error));
    }

    /// Takes the flight out of the table, once: another of the same chunk may be up afterwards.
    fn let_go(&mut self) {
        if std::mem::take(&mut self.up) {
            self.shelf.flights().remove(&self.chunk);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.let_go();
        self.outcome.send_if_modified(|outcome| {
            let unheard = outcome.is_none();
            if unheard {
                let what = format!("fetch of chunk {} of {}", self.chunk, self.shelf.store.key());
                *outcome = Some(Err(Error::ShuttingDown { what }));
            }
            unheard
        });
    }
}

/// Somebody who waits for a flight. Dropping it changes nothing for the flight.
#[derive(Debug)]
pub(crate) struct Waiter(watch::Receiver<Outcome>);

impl Waiter {
    pub(crate) fn join(flight: &Up) -> Waiter {
        Waiter(flight.outcome.clone())
    }

    /// The chunk's verified bytes.
    pub(crate) async fn wait(mut self) -> Result<Bytes> {
        let gone = || Error::ShuttingDown { what: "fetch of a chunk".to_owned() };
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or_else(|| Err(gone())),
            Err(_) => Err(gone()),
        }
    }
}

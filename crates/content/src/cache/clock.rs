//! Room: every stored chunk is accounted for before it is written, and a clock (second chance) over the accessed bits
//! finds what goes. Contents whose chunks can only be had by reading a whole stream again go last, pinned chunks never.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

use super::counters::{Counters, count};
use super::flight::Shelf;
use super::store::{ACCESSED, PINNED, PRESENT};
use super::sync::{lock, read, write};

/// Adjacent chunks that are dropped by one call.
const DROP_RUN: u64 = 64;

/// What the clock's hand does with one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lap {
    /// Chunks that were read since the hand's last pass get a second chance.
    SecondChance,
    /// Whatever may go.
    All,
    /// Whatever may go, whole streams too.
    WholeStreams,
}

#[derive(Debug, Default)]
struct Hand {
    shelf: usize,
    chunk: u64,
}

/// The room for all contents.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) limit: u64,
    bytes: AtomicU64,
    hand: Mutex<Hand>,
    pub(crate) shelves: RwLock<Vec<Arc<Shelf>>>,
}

impl Room {
    pub(crate) fn new(limit: u64) -> Room {
        Room { limit, bytes: AtomicU64::new(0), hand: Mutex::default(), shelves: RwLock::default() }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Adds what is there already, whatever the limit.
    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives reserved bytes back.
    pub(crate) fn release(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Takes a content out of the clock's way, with its bytes.
    pub(crate) fn remove(&self, shelf: &Arc<Shelf>) {
        // The hand is held: an eviction works on its own copy of the list.
        let _hand = lock(&self.hand);
        write(&self.shelves).retain(|other| !Arc::ptr_eq(other, shelf));
        self.release(shelf.store.present().1);
    }

    /// Takes `bytes` under the limit, evicting where that makes them free. Blocks. Who calls holds no shelf's flights.
    pub(crate) fn reserve(&self, bytes: u64, counters: &Counters) -> bool {
        loop {
            let taken = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|used| *used <= self.limit)
            });
            if taken.is_ok() {
                return true;
            }
            if bytes > self.limit {
                return false;
            }
            // A little more than is needed, so that not every chunk pays for a walk.
            let keep = self.limit - bytes;
            let slack = (self.limit / 64).min(16 << 20).min(keep);
            if self.evict(keep - slack, counters) == 0 && self.bytes() > keep {
                return false;
            }
        }
    }

    /// Drops chunks until at most `keep` bytes are left, or nothing more may go; gives the bytes dropped. Blocks.
    pub(crate) fn evict(&self, keep: u64, counters: &Counters) -> u64 {
        let mut hand = lock(&self.hand);
        let shelves = read(&self.shelves).clone();
        let mut dropped = 0;
        // Two laps, since the first may do no more than take second chances away.
        for lap in [Lap::SecondChance, Lap::SecondChance, Lap::All, Lap::WholeStreams] {
            for _ in 0..=shelves.len() {
                if self.bytes() <= keep {
                    return dropped;
                }
                if hand.shelf >= shelves.len() {
                    *hand = Hand::default();
                }
                let Some(shelf) = shelves.get(hand.shelf) else { return dropped };
                if lap == Lap::WholeStreams || !shelf.whole_stream.load(Ordering::Relaxed) {
                    dropped += self.sweep(shelf, &mut hand.chunk, lap, keep, counters);
                }
                if self.bytes() > keep {
                    *hand = Hand { shelf: hand.shelf + 1, chunk: 0 };
                }
            }
        }
        dropped
    }

    /// Drops every chunk of one content that is not pinned; gives the bytes dropped. Blocks.
    pub(crate) fn evict_content(&self, shelf: &Shelf, counters: &Counters) -> u64 {
        let _hand = lock(&self.hand);
        self.sweep(shelf, &mut 0, Lap::WholeStreams, 0, counters)
    }

    fn sweep(&self, shelf: &Shelf, hand: &mut u64, lap: Lap, keep: u64, counters: &Counters) -> u64 {
        let store = &shelf.store;
        let mut dropped = 0;
        while self.bytes() > keep {
            let Some(first) = store.next_with(*hand, PRESENT) else { break };
            // Held until the hole is punched: nobody may store the chunk again before that.
            let flights = shelf.flights();
            let goes = |chunk: u64| {
                let state = store.take_accessed(chunk);
                let spared = lap == Lap::SecondChance && state & ACCESSED != 0;
                state & PRESENT != 0 && state & PINNED == 0 && !spared && !flights.contains_key(&chunk)
            };
            let wanted = self.bytes().saturating_sub(keep).div_ceil(store.shape().chunk_bytes());
            let end = (first + wanted.min(DROP_RUN)).min(store.shape().chunks());
            let count_of = (first..end).take_while(|chunk| goes(*chunk)).count() as u64;
            // The chunk that ended the run has had its look.
            *hand = end.min(first + count_of + 1);
            if count_of == 0 {
                continue;
            }
            let bytes = store.drop_run(first, count_of);
            drop(flights);
            self.release(bytes);
            count(&counters.evicted_chunks, count_of);
            dropped += bytes;
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::super::flight::Flight;
    use super::super::layout::Shape;
    use super::super::store::Store;
    use super::*;

    const CHUNK: u64 = 8192;

    fn room_with(directory: &std::path::Path, chunks: u64) -> (Room, Arc<Shelf>) {
        let shape = Shape::new(chunks * CHUNK, CHUNK as u32).unwrap();
        let shelf = Arc::new(Shelf::new(Store::create(directory, "k", shape).unwrap()));
        let room = Room::new(u64::MAX);
        for chunk in 0..chunks {
            shelf.store.fill(chunk, &[chunk as u8; CHUNK as usize]).unwrap();
            room.add(CHUNK);
        }
        room.shelves.write().unwrap().push(shelf.clone());
        (room, shelf)
    }

    fn left(shelf: &Shelf) -> Vec<u64> {
        (0..shelf.store.shape().chunks()).filter(|chunk| shelf.store.is_present(*chunk)).collect()
    }

    #[test]
    fn what_is_pinned_or_in_flight_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (room, shelf) = room_with(dir.path(), 10);
        shelf.store.set_pinned(7, 1, true).unwrap();
        let flight = Flight::start(&shelf, &mut shelf.flights(), 3, true);
        assert_eq!(room.evict(0, &Counters::default()), 8 * CHUNK);
        assert_eq!((left(&shelf), room.bytes()), (vec![3, 7], 2 * CHUNK));
        drop(flight);
        assert_eq!(room.evict(0, &Counters::default()), CHUNK);
        assert_eq!(left(&shelf), [7]);
    }

    #[test]
    fn what_was_read_gets_a_second_chance_and_no_third() {
        let dir = tempfile::tempdir().unwrap();
        let (room, shelf) = room_with(dir.path(), 10);
        let mut buffer = [0; CHUNK as usize];
        for chunk in [2, 5] {
            shelf.store.read(chunk * CHUNK, &mut buffer).unwrap();
        }
        room.evict(2 * CHUNK, &Counters::default());
        assert_eq!(left(&shelf), [2, 5]);
        room.evict(0, &Counters::default());
        assert_eq!((left(&shelf), room.bytes()), (vec![], 0));
    }

    #[test]
    fn whole_streams_go_last() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (room, stream) = room_with(a.path(), 4);
        stream.whole_stream.store(true, Ordering::Relaxed);
        let (_, other) = room_with(b.path(), 4);
        room.shelves.write().unwrap().push(other.clone());
        room.add(4 * CHUNK);
        room.evict(5 * CHUNK, &Counters::default());
        assert_eq!((left(&stream).len(), left(&other).len()), (4, 1));
        room.evict(CHUNK, &Counters::default());
        assert_eq!((left(&stream).len(), left(&other).len()), (1, 0));
    }
}

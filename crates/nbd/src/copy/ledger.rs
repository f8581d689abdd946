//! What is done: bytes, and the prefix without gaps. Pieces are done in any order, but only so many are in flight, so the
//! prefix is never far behind, and it is all that a later run has to know.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

#[derive(Debug)]
pub(super) struct Ledger {
    bytes: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// All before this is done.
    prefix: u64,
    /// Done, by first byte, and beyond a gap.
    beyond: BTreeMap<u64, u64>,
}

impl Ledger {
    /// Everything before `start` is done.
    pub(super) fn new(start: u64) -> Self {
        let state = State { prefix: start, beyond: BTreeMap::new() };
        Ledger { bytes: AtomicU64::new(start), state: Mutex::new(state) }
    }

    /// These bytes are done. Said once for each byte.
    pub(super) fn complete(&self, offset: u64, length: u64) {
        self.bytes.fetch_add(length, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if offset != state.prefix {
            state.beyond.insert(offset, offset + length);
            return;
        }
        let mut prefix = offset + length;
        while let Some(end) = state.beyond.remove(&prefix) {
            prefix = end;
        }
        state.prefix = prefix;
    }

    /// The length of the prefix that is done.
    pub(super) fn prefix(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).prefix
    }

    /// All that is done, beyond gaps too.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_grows_when_its_gap_is_filled() {
        let ledger = Ledger::new(10);
        ledger.complete(30, 10);
        ledger.complete(20, 10);
        assert_eq!((ledger.prefix(), ledger.bytes()), (10, 30));
        ledger.complete(10, 10);
        assert_eq!((ledger.prefix(), ledger.bytes()), (40, 40));
    }
}

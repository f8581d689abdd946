//! Counters of a server. Each thread has its own, on cache lines of its own: a hit touches nothing shared.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// What a server has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Reads answered in the thread that took them: the data was at hand.
    pub hits: u64,
    /// Reads that had to wait.
    pub misses: u64,
    /// Reads answered with an error.
    pub errors: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Requests that are not reads.
    pub other: u64,
    /// Messages that were no requests, and replies that the kernel refused.
    pub protocol_errors: u64,
    /// Reads that wait now.
    pub waiting: u64,
}

/// One thread's counters.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) other: AtomicU64,
    pub(crate) protocol_errors: AtomicU64,
    pub(crate) answered_misses: AtomicU64,
}

/// Adds to a counter. Counters order nothing.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(crate) fn sum<'a>(counters: impl Iterator<Item = &'a Counters>) -> Stats {
    let mut stats = Stats::default();
    for one in counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // Read before `misses`, which is counted first: the difference never goes below zero.
        let answered = get(&one.answered_misses);
        let misses = get(&one.misses);
        stats.hits += get(&one.hits);
        stats.misses += misses;
        stats.errors += get(&one.errors);
        stats.bytes += get(&one.bytes);
        stats.other += get(&one.other);
        stats.protocol_errors += get(&one.protocol_errors);
        stats.waiting += misses.saturating_sub(answered);
    }
    stats
}

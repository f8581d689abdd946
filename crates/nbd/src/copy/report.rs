//! What a copy did: the contract of `loam copy --json`.

use std::sync::atomic::{AtomicU64, Ordering};

use super::ZeroStrategy;

/// Requests made to both devices. A device may cut one into several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Commands {
    /// Reads of the source (and of the destination, for the edge of a block or to verify).
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Zeroings.
    pub zero: u64,
    /// Trims.
    pub trim: u64,
    /// Questions for extents, to both sides.
    pub block_status: u64,
}

/// How the zeroes of the source came to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroMethod {
    /// There were none to write.
    None,
    /// The destination was zero already and was not touched.
    KnownZero,
    /// The destination was zeroed first.
    Prezero,
    /// Each hole by itself, beside the data.
    PerHole,
    /// As data.
    Write,
}

/// What a copy did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CopyReport {
    /// Bytes copied, holes too: the size of the source, or what was left of it if the copy was resumed.
    pub bytes: u64,
    /// Of these, bytes that were written as data.
    pub data_bytes: u64,
    /// Of these, bytes that are zero and were zeroed, or left zero.
    pub zero_bytes: u64,
    /// Bytes that an earlier run had done.
    pub resumed_bytes: u64,
    /// Requests made.
    pub commands: Commands,
    /// What was asked for.
    pub strategy: ZeroStrategy,
    /// What was done.
    pub zero_method: ZeroMethod,
    /// Times that writes were lost and done again.
    pub redone: u32,
    /// Whether both ends were read back and compared.
    pub verified: bool,
    /// Wall time of all phases.
    pub seconds: f64,
}

/// Counts while the copy runs.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) read: AtomicU64,
    pub(super) write: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) block_status: AtomicU64,
    pub(super) data_bytes: AtomicU64,
    pub(super) zero_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn commands(&self) -> Commands {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Commands {
            read: get(&self.read),
            write: get(&self.write),
            zero: get(&self.zero),
            trim: 0,
            block_status: get(&self.block_status),
        }
    }
}

pub(super) fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

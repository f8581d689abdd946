//! What the planner and the workers of one pass share, and the requests they make: each counted, and each failure named.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use loam_block::{BlockDevice, Error, ErrorKind, Extent, WriteFlags, ZeroFlags};

use super::ZeroStrategy;
use super::check::Limits;
use super::error::{CopyError, Operation, Side};
use super::feed::Feed;
use super::ledger::Ledger;
use super::map::EXTENTS_MAX;
use super::report::{Counters, add};
use super::zeroes::Zeroes;

/// What a pass over the devices is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Copy,
    Verify,
}

/// A request that failed, before it is known how much is safe.
#[derive(Debug)]
pub(super) enum Fault {
    Device { side: Side, operation: Operation, offset: u64, length: u64, error: Error },
    Differs { offset: u64, wanted: u8, found: u8 },
    Internal(String),
}

impl Fault {
    /// Whether what was written since the last flush may be gone.
    pub(super) fn writes_lost(&self) -> bool {
        matches!(self, Fault::Device { side: Side::Destination, error, .. } if error.kind() == ErrorKind::WritesLost)
    }

    pub(super) fn into_error(self, done: u64) -> CopyError {
        match self {
            Fault::Device { side, operation, offset, length, error } => {
                CopyError::Device { side, operation, offset, length, done, source: error }
            }
            Fault::Differs { offset, wanted, found } => CopyError::Differs { offset, wanted, found },
            Fault::Internal(what) => CopyError::Internal(what),
        }
    }
}

pub(super) struct Job {
    pub(super) task: Task,
    pub(super) source: Arc<dyn BlockDevice>,
    pub(super) destination: Arc<dyn BlockDevice>,
    pub(super) limits: Limits,
    pub(super) strategy: ZeroStrategy,
    pub(super) allocate: bool,
    /// Where this pass begins.
    pub(super) start: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) zeroes: Zeroes,
    pub(super) feed: Feed,
    pub(super) ledger: Ledger,
    /// What is written where the destination cannot zero; made when it is first needed.
    pub(super) zero_bytes: OnceLock<Vec<u8>>,
}

impl Job {
    fn counted(&self, counter: &AtomicU64) {
        add(counter, 1);
    }

    pub(super) async fn read(&self, side: Side, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        self.counted(&self.counters.read);
        let length = buffer.len() as u64;
        let device = match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        };
        let read = device.read(offset, buffer).await;
        read.map_err(|error| Fault::Device { side, operation: Operation::Read, offset, length, error })
    }

    pub(super) async fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.counted(&self.counters.write);
        let length = data.len() as u64;
        let written = self.destination.write(offset, data, WriteFlags::default()).await;
        written.map_err(|error| Fault::Device {
            side: Side::Destination,
            operation: Operation::Write,
            offset,
            length,
            error,
        })
    }

    /// `Ok(false)`: the destination does not do this (or not fast, if that was asked for).
    pub(super) async fn zero(&self, offset: u64, length: u64, fast_only: bool) -> Result<bool, Fault> {
        self.counted(&self.counters.zero);
        let flags = ZeroFlags { fua: false, no_hole: self.allocate, fast_only };
        match self.destination.write_zeroes(offset, length, flags).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotSupported => Ok(false),
            Err(error) => {
                let (side, operation) = (Side::Destination, Operation::Zero);
                Err(Fault::Device { side, operation, offset, length, error })
            }
        }
    }

    pub(super) async fn source_extents(&self, offset: u64) -> Result<Vec<Extent>, Fault> {
        self.extents(Side::Source, offset, self.limits.size - offset).await
    }

    pub(super) async fn destination_extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Fault> {
        self.extents(Side::Destination, offset, length).await
    }

    async fn extents(&self, side: Side, offset: u64, length: u64) -> Result<Vec<Extent>, Fault> {
        self.counted(&self.counters.block_status);
        let device = match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        };
        let fault = |error| Fault::Device { side, operation: Operation::Extents, offset, length, error };
        let extents = device.extents(offset, length, EXTENTS_MAX).await.map_err(fault)?;
        let mut at = offset;
        for extent in &extents {
            if extent.offset != at || extent.length == 0 || extent.length > offset + length - at {
                let context = format!("extents from {offset}: {extent:?} where {at} comes next");
                return Err(fault(Error::new(ErrorKind::Io, context)));
            }
            at += extent.length;
        }
        if extents.is_empty() {
            return Err(fault(Error::new(ErrorKind::Io, format!("extents from {offset}: none"))));
        }
        Ok(extents)
    }
}

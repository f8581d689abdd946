//! Which parts of a content were read first, in order: what a publisher puts into an index so that other hosts fetch it
//! before it is asked for.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use loam_block::{
    Access, BlockDevice, Capabilities, Extent, Geometry, Io, Locality, Located, Ticket, WriteFlags, ZeroFlags,
};
use loam_content::CachedDevice;
use loam_space::BLOCK;

/// Runs that are remembered of one content; what is read first after that is not.
const RUNS_MAX: usize = 1 << 16;

/// A cached device that remembers in which order its blocks were first read.
pub(crate) struct Traced {
    device: CachedDevice,
    recorder: Recorder,
}

impl Traced {
    pub(crate) fn new(device: CachedDevice) -> Self {
        let recorder = Recorder::new(device.geometry().size);
        Traced { device, recorder }
    }

    /// The device itself.
    pub(crate) fn device(&self) -> &CachedDevice {
        &self.device
    }

    /// The runs of the content that were read, in the order in which they were first read.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        self.recorder.runs()
    }
}

/// Which blocks were read, and in which order first. A block that was read before costs one load.
struct Recorder {
    size: u64,
    /// A bit for each block of 4 KiB.
    seen: Box<[AtomicU64]>,
    runs: Mutex<Vec<Range<u64>>>,
}

impl Recorder {
    fn new(size: u64) -> Self {
        let words = size.div_ceil(BLOCK * 64) as usize;
        Recorder { size, seen: (0..words).map(|_| AtomicU64::new(0)).collect(), runs: Mutex::default() }
    }

    fn runs(&self) -> Vec<Range<u64>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size);
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let Some(word) = self.seen.get((block / 64) as usize) else { return };
            let bit = 1 << (block % 64);
            if word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
                self.remember(block * BLOCK);
            }
        }
    }

    fn remember(&self, start: u64) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let full = runs.len() >= RUNS_MAX;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += BLOCK,
            _ if full => {}
            _ => runs.push(start..start + BLOCK),
        }
    }
}

impl BlockDevice for Traced {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.device.capabilities()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.recorder.note(offset, buffer.len() as u64);
        self.device.read(offset, buffer)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.device.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.device.write_zeroes(offset, length, flags)
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.device.trim(offset, length)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.device.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.device.extents(offset, length, limit)
    }

    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        self.device.locality(offset, length, limit)
    }

    /// Not a read: what is brought near beforehand is no sign of what a program wants first.
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        BlockDevice::prefetch(&self.device, offset, length)
    }

    fn locate(&self, offset: u64, length: u64, access: Access) -> Option<Located<'_>> {
        let located = self.device.locate(offset, length, access)?;
        self.recorder.note(offset, length);
        Some(located)
    }

    fn settle(&self, ticket: Ticket, bytes: Option<&[u8]>) -> bool {
        self.device.settle(ticket, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reads_in_their_order_and_neighbours_joined() {
        let recorder = Recorder::new(100 * BLOCK);
        recorder.note(70 * BLOCK, 2 * BLOCK);
        recorder.note(0, 1);
        recorder.note(BLOCK + 5, BLOCK);
        recorder.note(71 * BLOCK, 2 * BLOCK);
        let blocks = |range: Range<u64>| range.start * BLOCK..range.end * BLOCK;
        assert_eq!(recorder.runs(), [70..72, 0..3, 72..73].map(blocks), "read again is not read first");
    }

    #[test]
    fn reads_at_and_past_the_end_stay_inside() {
        let recorder = Recorder::new(3 * BLOCK);
        recorder.note(2 * BLOCK, u64::MAX);
        recorder.note(9 * BLOCK, BLOCK);
        recorder.note(0, 0);
        assert_eq!(recorder.runs().first(), Some(&(2 * BLOCK..3 * BLOCK)));
        assert_eq!(recorder.runs().len(), 1);
        Recorder::new(0).note(0, BLOCK);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let recorder = Recorder::new((2 * RUNS_MAX as u64 + 4) * BLOCK);
        for block in 0..RUNS_MAX as u64 + 2 {
            recorder.note(2 * block * BLOCK, BLOCK);
        }
        assert_eq!(recorder.runs().len(), RUNS_MAX);
    }
}

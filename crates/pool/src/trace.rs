//! Which parts of a content were read first, in order: what a publisher puts into an index so that other hosts fetch it
//! before it is asked for.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use loam_block::{BlockDevice, Capabilities, Extent, Geometry, Io, WriteFlags, ZeroFlags};
use loam_content::CachedDevice;
use loam_space::BLOCK;

/// Runs that are remembered of one content; what is read first after that is not.
const RUNS_MAX: usize = 1 << 16;

/// A cached device that remembers in which order its blocks were first read. A block that was read before costs one load.
pub(crate) struct Traced {
    device: CachedDevice,
    /// A bit for each block of 4 KiB.
    seen: Box<[AtomicU64]>,
    runs: Mutex<Vec<Range<u64>>>,
}

impl Traced {
    pub(crate) fn new(device: CachedDevice) -> Self {
        let words = device.geometry().size.div_ceil(BLOCK * 64) as usize;
        Traced { device, seen: (0..words).map(|_| AtomicU64::new(0)).collect(), runs: Mutex::default() }
    }

    /// The device itself.
    pub(crate) fn device(&self) -> &CachedDevice {
        &self.device
    }

    /// The runs of the content that were read, in the order in which they were first read.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, offset: u64, length: u64) {
        let end = (offset + length).min(self.device.geometry().size);
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
        self.note(offset, buffer.len() as u64);
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
}

//! The `memory` device: sparse memory of any 64-bit size. Pages are allocated when something other than zeroes is
//! first written to them and freed by trims, so a device of 8 EiB costs what was written to it.
//!
//! Pages are spread over [`SHARDS`] maps by page number, each under its own reader-writer lock, so that readers meet
//! on a lock's cache line only when they read neighbouring pages at the same moment.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::device::check_extents_range;
use crate::{
    BlockDevice, Capabilities, Extent, ExtentKind, Geometry, Io, MAXIMUM_BLOCK, Result, WriteFlags,
    ZeroFlags, check_range,
};

/// Bytes in a page: large enough that the maps cost nothing, small enough that sparse writes stay sparse.
const PAGE: u64 = 32 << 10;
/// Locks. More than the threads that any machine of ours brings to one device.
const SHARDS: u64 = 64;
/// Pages that one `extents` request looks at (1 GiB) before it answers with what it has.
const EXTENT_PAGES_MAX: u64 = 32 << 10;

type Page = Box<[u8]>;
type Shard = BTreeMap<u64, Page>;

/// A read-write device in memory. What is written is lost with it, so `flush` has nothing to do.
#[derive(Debug)]
pub struct MemoryDevice {
    geometry: Geometry,
    shards: Vec<RwLock<Shard>>,
}

impl MemoryDevice {
    /// A device of `size` bytes, all zero; nothing is allocated for them.
    pub fn new(size: u64) -> Self {
        let geometry =
            Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK };
        MemoryDevice { geometry, shards: (0..SHARDS).map(|_| RwLock::default()).collect() }
    }

    /// A device that holds a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let device = MemoryDevice::new(bytes.len() as u64);
        device.store(0, bytes);
        device
    }

    /// Bytes of memory that hold data.
    pub fn allocated_bytes(&self) -> u64 {
        (0..SHARDS).map(|shard| self.shard(shard).len() as u64 * PAGE).sum()
    }

    // A panic cannot leave a page half-made, so a poisoned lock is as good as any.
    fn shard(&self, page: u64) -> RwLockReadGuard<'_, Shard> {
        self.shards[(page % SHARDS) as usize].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard_mut(&self, page: u64) -> RwLockWriteGuard<'_, Shard> {
        self.shards[(page % SHARDS) as usize].write().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, offset: u64, mut buffer: &mut [u8]) {
        for part in parts(offset, buffer.len() as u64) {
            let (bytes, rest) = std::mem::take(&mut buffer).split_at_mut(part.length);
            match self.shard(part.page).get(&part.page) {
                Some(page) => bytes.copy_from_slice(&page[part.start..][..part.length]),
                None => bytes.fill(0),
            }
            buffer = rest;
        }
    }

    fn store(&self, offset: u64, mut data: &[u8]) {
        for part in parts(offset, data.len() as u64) {
            let (bytes, rest) = data.split_at(part.length);
            let mut shard = self.shard_mut(part.page);
            let page = shard.entry(part.page).or_insert_with(empty_page);
            page[part.start..][..part.length].copy_from_slice(bytes);
            data = rest;
        }
    }

    fn zero(&self, offset: u64, length: u64, keep_allocated: bool) {
        if keep_allocated {
            for part in parts(offset, length) {
                let mut shard = self.shard_mut(part.page);
                shard.entry(part.page).or_insert_with(empty_page)[part.start..][..part.length].fill(0);
            }
            return;
        }
        // Frees by looking at what is allocated, not at each page of a range that may be exabytes long.
        let end = offset + length;
        for index in 0..SHARDS.min(end.div_ceil(PAGE)) {
            let mut shard = self.shard_mut(index);
            let mut whole = Vec::new();
            for (&page, bytes) in shard.range_mut(offset / PAGE..end.div_ceil(PAGE)) {
                let start = (page * PAGE).max(offset) - page * PAGE;
                let stop = (end - page * PAGE).min(PAGE);
                match stop - start == PAGE {
                    true => whole.push(page),
                    false => bytes[start as usize..stop as usize].fill(0),
                }
            }
            for page in whole {
                shard.remove(&page);
            }
        }
    }

    /// The first allocated page at or after `page` and before `end`.
    fn next_allocated(&self, page: u64, end: u64) -> Option<u64> {
        (0..SHARDS).filter_map(|shard| self.shard(shard).range(page..end).next().map(|(&page, _)| page)).min()
    }

    fn collect_extents(&self, offset: u64, length: u64, limit: usize) -> Vec<Extent> {
        let end = offset + length;
        let end_page = end.div_ceil(PAGE);
        let mut extents: Vec<Extent> = Vec::new();
        let (mut at, mut looked_at) = (offset, 0);
        while at < end && extents.len() < limit.max(1) && looked_at < EXTENT_PAGES_MAX {
            let page = at / PAGE;
            let (kind, stop_page) = match self.next_allocated(page, end_page) {
                Some(data) if data == page => {
                    let allocated = |&page: &u64| self.shard(page).contains_key(&page);
                    let last = end_page.min(page + EXTENT_PAGES_MAX);
                    let run = (page + 1..last).take_while(allocated).count() as u64;
                    looked_at += run;
                    (ExtentKind::Data, page + 1 + run)
                }
                Some(data) => (ExtentKind::Hole, data),
                None => (ExtentKind::Hole, end_page),
            };
            let stop = stop_page.saturating_mul(PAGE).min(end);
            match extents.last_mut().filter(|last| last.kind == kind) {
                Some(last) => last.length += stop - at,
                None => extents.push(Extent { offset: at, length: stop - at, kind }),
            }
            at = stop;
        }
        extents
    }

    fn check(&self, operation: &str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry, operation, offset, length)
    }
}

fn empty_page() -> Page {
    vec![0; PAGE as usize].into_boxed_slice()
}

/// The piece of one page that a request touches.
struct Part {
    page: u64,
    start: usize,
    length: usize,
}

fn parts(offset: u64, length: u64) -> impl Iterator<Item = Part> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let (page, start) = (at / PAGE, at % PAGE);
            let length = (PAGE - start).min(end - at);
            at += length;
            Part { page, start: start as usize, length: length as usize }
        })
    })
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write: true,
            trim: true,
            zero: true,
            fast_zero: true,
            extents: true,
            multi_connection: true,
            lazy: false,
            rotational: Some(false),
        }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        Io::Ready(self.check("read", offset, buffer.len() as u64).map(|()| self.load(offset, buffer)))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        Io::Ready(self.check("write", offset, data.len() as u64).map(|()| self.store(offset, data)))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let checked = self.check("write of zeroes", offset, length).and_then(|()| {
            // Keeping a range allocated costs what writing it costs, page by page, and memory without a bound.
            if flags.no_hole && flags.fast_only {
                return Err(not_fast(offset, length));
            }
            self.zero(offset, length, flags.no_hole);
            Ok(())
        });
        Io::Ready(checked)
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        Io::Ready(self.check("trim", offset, length).map(|()| self.zero(offset, length, false)))
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Ok(()))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        let checked = check_extents_range(&self.geometry, offset, length);
        Io::Ready(checked.map(|()| self.collect_extents(offset, length, limit)))
    }
}

fn not_fast(offset: u64, length: u64) -> crate::Error {
    let context =
        format!("fast zeroes of {length} bytes at {offset} without a hole: memory has to be written");
    crate::Error::new(crate::ErrorKind::NotSupported, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_exbibytes_cost_what_was_written() {
        let device = MemoryDevice::new(8 << 60);
        device.store((8 << 60) - 3, b"end");
        device.store(5, b"begin");
        assert_eq!(device.allocated_bytes(), 2 * PAGE);
        let extents = device.collect_extents(0, 8 << 60, 16);
        let kinds: Vec<_> = extents.iter().map(|extent| extent.kind).collect();
        assert_eq!(kinds, [ExtentKind::Data, ExtentKind::Hole, ExtentKind::Data]);
        device.zero(0, 8 << 60, false);
        assert_eq!(device.allocated_bytes(), 0);
    }

    #[test]
    fn threads_read_and_write_without_tearing_their_own_blocks() {
        let device = MemoryDevice::new(1 << 20);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let device = &device;
                scope.spawn(move || {
                    let offset = u64::from(thread) * 4096;
                    for round in 0..200u8 {
                        device.store(offset, &[thread ^ round; 4096]);
                        let mut back = [0; 4096];
                        device.load(offset, &mut back);
                        assert_eq!(back, [thread ^ round; 4096]);
                    }
                });
            }
        });
    }
}

//! Devices for tests of the copier: sparse memory, with capabilities taken away, requests counted and slowed down.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loam_block::{
    BlockDevice, Capabilities, Error, ErrorKind, Extent, Geometry, Io, MemoryDevice, Result, WriteFlags,
    ZeroFlags, check_range,
};

/// What a destination does with zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeroing {
    /// Advertised, and fast.
    Fast,
    /// Advertised, and FAST_ZERO is refused.
    NotFast,
    /// Advertised, without FAST_ZERO.
    NoFast,
    /// Advertised, but every request is refused.
    Liar,
    /// Not advertised.
    None,
}

/// Memory as a server would show it.
pub(crate) struct Shown {
    pub(crate) memory: Arc<MemoryDevice>,
    pub(crate) zeroing: Zeroing,
    pub(crate) extents: bool,
    pub(crate) minimum_block: u32,
    pub(crate) maximum_block: u32,
    pub(crate) write_delay: Duration,
    pub(crate) zero_delay: Duration,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) zeroes: AtomicU64,
    pub(crate) fast_zeroes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) asked: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    pub(crate) in_flight_max: AtomicU64,
    /// Longest write.
    pub(crate) write_max: AtomicU64,
    pub(crate) asked_ranges: Mutex<Vec<(u64, u64)>>,
}

impl Shown {
    pub(crate) fn new(memory: MemoryDevice) -> Self {
        Shown {
            memory: Arc::new(memory),
            zeroing: Zeroing::Fast,
            extents: true,
            minimum_block: 1,
            maximum_block: 32 << 20,
            write_delay: Duration::ZERO,
            zero_delay: Duration::ZERO,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            fast_zeroes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
            write_max: AtomicU64::new(0),
            asked_ranges: Mutex::default(),
        }
    }

    pub(crate) fn count(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::SeqCst)
    }

    fn enter(&self) {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.in_flight_max.fetch_max(now, Ordering::SeqCst);
    }

    /// `request`, after `delay`.
    fn slow<'a>(&'a self, delay: Duration, request: impl FnOnce() -> Io<'a, ()> + Send + 'a) -> Io<'a, ()> {
        if delay.is_zero() {
            return request();
        }
        Io::pending(async move {
            self.enter();
            tokio::time::sleep(delay).await;
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            request().await
        })
    }

    fn check(&self, operation: &str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry(), operation, offset, length)
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

impl BlockDevice for Shown {
    fn geometry(&self) -> Geometry {
        Geometry {
            minimum_block: self.minimum_block,
            preferred_block: self.minimum_block.max(4096),
            maximum_block: self.maximum_block,
            ..self.memory.geometry()
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            zero: self.zeroing != Zeroing::None,
            fast_zero: matches!(self.zeroing, Zeroing::Fast | Zeroing::NotFast | Zeroing::Liar),
            extents: self.extents,
            ..self.memory.capabilities()
        }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        add(&self.reads);
        if let Err(error) = self.check("read", offset, buffer.len() as u64) {
            return Io::Ready(Err(error));
        }
        self.memory.read(offset, buffer)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        add(&self.writes);
        self.write_max.fetch_max(data.len() as u64, Ordering::SeqCst);
        let mut checked = self.check("write", offset, data.len() as u64);
        if data.len() > self.maximum_block as usize {
            checked = Err(Error::new(ErrorKind::Invalid, "a write longer than the maximum"));
        }
        if let Err(error) = checked {
            return Io::Ready(Err(error));
        }
        self.slow(self.write_delay, move || self.memory.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        add(&self.zeroes);
        if flags.fast_only {
            add(&self.fast_zeroes);
        }
        let refused = match self.zeroing {
            Zeroing::Fast => false,
            Zeroing::NotFast => flags.fast_only,
            Zeroing::NoFast => {
                assert!(!flags.fast_only, "a flag that is not advertised");
                false
            }
            Zeroing::Liar => true,
            Zeroing::None => panic!("a command that is not advertised"),
        };
        if refused {
            return Io::Ready(Err(Error::new(ErrorKind::NotSupported, "zeroes: not here")));
        }
        if let Err(error) = self.check("write of zeroes", offset, length) {
            return Io::Ready(Err(error));
        }
        self.slow(self.zero_delay, move || self.memory.write_zeroes(offset, length, flags))
    }

    fn flush(&self) -> Io<'_, ()> {
        add(&self.flushes);
        self.memory.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        assert!(self.extents, "extents of a device that has none to tell");
        add(&self.asked);
        if let Err(error) = self.check("extents", offset, length) {
            return Io::Ready(Err(error));
        }
        let extents = self.memory.extents(offset, length, limit);
        Io::pending(async move {
            let extents = extents.await?;
            let told = extents.iter().map(|extent| extent.length).sum();
            self.asked_ranges.lock().expect("lock").push((offset, told));
            Ok(extents)
        })
    }
}

/// A source of `size` bytes whose every other `step` is a hole.
pub(crate) async fn striped(size: u64, step: u64) -> MemoryDevice {
    let memory = MemoryDevice::new(size);
    for (index, offset) in (0..size).step_by(step as usize).enumerate().step_by(2) {
        let length = step.min(size - offset) as usize;
        let byte = (index % 254 + 1) as u8;
        memory.write(offset, &vec![byte; length], WriteFlags::default()).await.expect("memory");
    }
    memory
}

/// All bytes.
pub(crate) async fn bytes_of(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.geometry().size as usize];
    device.read(0, &mut bytes).await.expect("read back");
    bytes
}

/// Fails unless `destination` begins with what `source` holds.
pub(crate) async fn assert_same(source: &dyn BlockDevice, destination: &dyn BlockDevice) {
    let (source, destination) = (bytes_of(source).await, bytes_of(destination).await);
    let wrong = source.iter().zip(&destination).position(|(a, b)| a != b);
    assert!(wrong.is_none() && destination.len() >= source.len(), "the copy differs at {wrong:?}");
}

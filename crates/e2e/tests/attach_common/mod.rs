//! What the tests of attaching share: a device that misbehaves on purpose, and direct reads.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use loam_block::{
    BlockDevice, Capabilities, Error, ErrorKind, Extent, Geometry, Io, PatternDevice, WriteFlags, ZeroFlags,
};
use tokio::runtime::Runtime;

/// Bytes before the virtual region.
pub const VIRTUAL_BASE: u64 = 1 << 40;
/// The size of a whole virtual device.
pub const HUGE: u64 = VIRTUAL_BASE + (1 << 62);

/// A runtime like that of a daemon.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Each 8 bytes hold their own big-endian offset; some reads are slow, or fail.
pub struct TestDevice {
    /// What is read.
    pub pattern: PatternDevice,
    /// Reads from here on wait for `delay`.
    pub slow_from: u64,
    /// How long these take.
    pub delay: Duration,
    /// Every read fails while this is set.
    pub broken: AtomicBool,
    /// Every read panics while this is set.
    pub panics: AtomicBool,
    /// Slow reads under way.
    pub under_way: AtomicU64,
    /// The most of them there ever were.
    pub most_under_way: AtomicU64,
}

impl TestDevice {
    /// One that behaves.
    pub fn new(size: u64) -> Self {
        TestDevice {
            pattern: PatternDevice::new(size),
            slow_from: u64::MAX,
            delay: Duration::ZERO,
            broken: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            under_way: AtomicU64::new(0),
            most_under_way: AtomicU64::new(0),
        }
    }
}

impl BlockDevice for TestDevice {
    fn geometry(&self) -> Geometry {
        self.pattern.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.pattern.capabilities()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        assert!(!self.panics.load(Ordering::Relaxed), "the test asks for a panic");
        if self.broken.load(Ordering::Relaxed) {
            return Io::Ready(Err(Error::new(ErrorKind::Corrupt, "the test asks for an error")));
        }
        if offset < self.slow_from {
            return self.pattern.read(offset, buffer);
        }
        Io::pending(async move {
            let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_under_way.fetch_max(now, Ordering::Relaxed);
            tokio::time::sleep(self.delay).await;
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            self.pattern.read(offset, buffer).await
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.pattern.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.pattern.write_zeroes(offset, length, flags)
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.pattern.trim(offset, length)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.pattern.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.pattern.extents(offset, length, limit)
    }
}

/// Opens a block device past the page cache.
pub fn open_direct(path: &Path) -> File {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().read(true).custom_flags(direct).open(path).unwrap()
}

/// A buffer that begins on a page.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// One of `length` bytes.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + 4095];
        let address = bytes.as_ptr().addr();
        Aligned { start: address.next_multiple_of(4096) - address, bytes, length }
    }

    /// All of it.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Reads and checks the pattern.
///
/// # Errors
/// What the read says; of another kind when the bytes are wrong.
pub fn read_pattern(file: &File, offset: u64, buffer: &mut Aligned) -> std::io::Result<()> {
    file.read_exact_at(buffer.bytes(), offset)?;
    PatternDevice::verify(offset, buffer.bytes()).map_err(std::io::Error::other)
}

/// How long the counts of [`resources`] have to stay the same.
const SETTLE: Duration = Duration::from_millis(100);

/// Descriptors and threads that this process has, once they stay the same: the kernel lists a thread that has been
/// joined for a moment longer.
pub fn resources() -> (usize, usize) {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let counts = || (count("/proc/self/fd"), count("/proc/self/task"));
    let (mut seen, mut since) = (counts(), Instant::now());
    while since.elapsed() < SETTLE {
        std::thread::sleep(SETTLE / 10);
        let now = counts();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    seen
}

//! The suite that every device and layer must pass: bounds, alignment, empty requests, read-after-write against a
//! model, extents, locality, zeroes, trims, refusals of read-only devices, lazy, cancel-safe futures, and locations that hold what
//! a read gives.
//!
//! A breach panics with the seed of the run, which replays it. Behind the feature `conformance`; meant for tests:
//!
//! ```
//! use loam_block::MemoryDevice;
//! use loam_block::conformance::{Contents, Profile, run};
//!
//! run(&MemoryDevice::new(1 << 20), &Profile { contents: Contents::Stored, ..Profile::default() });
//! ```

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::{Access, BlockDevice, ErrorKind, Extent, ExtentKind, Io, Locality, WriteFlags, ZeroFlags};

/// Bytes at the start and at the end of the device that the random operations play with.
const WINDOW: u64 = 256 << 10;
/// The longest random request.
const REQUEST_MAX: u64 = 96 << 10;

/// What reads of the device return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// What was written (and at first whatever the device was opened with).
    Stored,
    /// Always what the device was opened with: writes are refused or forgotten.
    Fixed,
}

/// What the suite may expect of a device.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// What reads return.
    pub contents: Contents,
    /// Of the random operations.
    pub seed: u64,
    /// How many random operations.
    pub operations: u32,
}

impl Default for Profile {
    fn default() -> Self {
        Profile { contents: Contents::Stored, seed: 1, operations: 400 }
    }
}

/// Runs the whole suite on `device`, which must be at least 64 KiB and a multiple of 4 KiB long.
///
/// # Panics
/// When the device breaks a rule of [`BlockDevice`].
pub fn run(device: &dyn BlockDevice, profile: &Profile) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime for the conformance suite");
    runtime.block_on(async {
        check_geometry(device);
        check_bounds(device).await;
        check_empty_requests(device).await;
        check_locations(device);
        if device.capabilities().write {
            check_laziness(device).await;
        } else {
            check_refusals(device).await;
        }
        Model::load(device, profile).await.play(profile.operations).await;
    });
}

fn check_geometry(device: &dyn BlockDevice) {
    let geometry = device.geometry();
    assert!(
        geometry.size >= 64 << 10 && geometry.size.is_multiple_of(4096),
        "a device to test: {geometry:?}"
    );
    let blocks = [geometry.minimum_block, geometry.preferred_block];
    assert!(blocks.iter().all(|block| block.is_power_of_two()), "{geometry:?}");
    assert!(geometry.minimum_block <= geometry.preferred_block, "{geometry:?}");
    assert!(geometry.preferred_block <= geometry.maximum_block, "{geometry:?}");
    assert!(geometry.minimum_block <= 4096, "{geometry:?}");
}

/// Every request on `length` bytes at `offset`, by name.
async fn every_request(
    device: &dyn BlockDevice,
    offset: u64,
    length: usize,
) -> [(&'static str, crate::Result<()>); 7] {
    let mut buffer = vec![0; length];
    [
        ("read", device.read(offset, &mut buffer).await),
        ("write", device.write(offset, &vec![0xee; length], WriteFlags::default()).await),
        ("write_zeroes", device.write_zeroes(offset, length as u64, ZeroFlags::default()).await),
        ("trim", device.trim(offset, length as u64).await),
        ("extents", device.extents(offset, length as u64, 1).await.map(drop)),
        ("locality", device.locality(offset, length as u64, 1).await.map(drop)),
        ("prefetch", device.prefetch(offset, length as u64).await),
    ]
}

async fn check_bounds(device: &dyn BlockDevice) {
    let geometry = device.geometry();
    let (size, block) = (geometry.size, u64::from(geometry.minimum_block));
    let mut before = vec![0; 4096];
    device.read(size - 4096, &mut before).await.expect("read of the last block");
    let outside =
        [(size, 4096), (size - block, 4096 + block as usize), (u64::MAX - 4095, 4096), (u64::MAX, 8192)];
    for (offset, length) in outside {
        for (name, result) in every_request(device, offset, length).await {
            let kind = result.expect_err(&format!("{name} of {length} at {offset} is outside")).kind();
            let refused = matches!(kind, ErrorKind::OutOfBounds | ErrorKind::ReadOnly | ErrorKind::Invalid);
            assert!(refused, "{name} outside: {kind:?}");
        }
    }
    if block > 1 {
        for (offset, length) in [(1, block as usize), (0, block as usize + 1), (block / 2, block as usize)] {
            for (name, result) in every_request(device, offset, length).await {
                assert!(
                    result.is_err(),
                    "{name} of {length} at {offset} breaks the minimum block of {block}"
                );
            }
        }
    }
    let mut after = vec![0; 4096];
    device.read(size - 4096, &mut after).await.expect("read of the last block");
    assert_eq!(before, after, "a request that fails changes nothing");
}

async fn check_empty_requests(device: &dyn BlockDevice) {
    let size = device.geometry().size;
    let write = device.capabilities().write;
    for offset in [0, size / 2 / 4096 * 4096, size] {
        device.read(offset, &mut []).await.expect("empty read");
        device.prefetch(offset, 0).await.expect("empty prefetch");
        if write {
            device.write(offset, &[], WriteFlags::default()).await.expect("empty write");
            device.write(offset, &[], WriteFlags { fua: true }).await.expect("empty write with fua");
            device.write_zeroes(offset, 0, ZeroFlags::default()).await.expect("empty zeroes");
            device.trim(offset, 0).await.expect("empty trim");
        }
    }
    let kind = device.extents(0, 0, 1).await.expect_err("an empty range has no extents").kind();
    assert_eq!(kind, ErrorKind::Invalid);
    let kind = device.locality(0, 0, 1).await.expect_err("an empty range is nowhere").kind();
    assert_eq!(kind, ErrorKind::Invalid);
    device.flush().await.expect("flush");
}

/// No location where a read would be refused.
fn check_locations(device: &dyn BlockDevice) {
    let geometry = device.geometry();
    let (size, block) = (geometry.size, u64::from(geometry.minimum_block));
    let mut refused = vec![(0, 0), (size, 0), (size, 4096), (size - 4096, 8192), (0, u64::MAX)];
    refused.extend([(u64::MAX - 4095, 4096), (u64::MAX, 8192)]);
    if block > 1 {
        refused.extend([(1, block), (0, block + 1), (block / 2, block)]);
    }
    for (offset, length) in refused {
        for access in [Access::Seen, Access::Unseen] {
            let located = device.locate(offset, length, access);
            assert!(located.is_none(), "{length} bytes at {offset} have a location: {located:?}");
        }
    }
}

/// The bytes that lie where `device` says that `length` bytes at `offset` lie; `None` where it does not say, or takes it
/// back when it is asked to settle.
///
/// # Panics
/// When the location cannot be read.
pub fn read_located(device: &dyn BlockDevice, offset: u64, length: usize, access: Access) -> Option<Vec<u8>> {
    const ALIGNMENT: usize = 4096;
    let located = device.locate(offset, length as u64, access)?;
    let mut memory = vec![0xa5; length + ALIGNMENT - 1];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let bytes = &mut memory[start..][..length];
    let mut done = 0;
    while done < length {
        let read = rustix::io::pread(located.file, &mut bytes[done..], located.offset + done as u64);
        done += read.ok().filter(|read| *read > 0).expect("a location that can be read to its end");
    }
    let shown = (access == Access::Seen).then_some(&*bytes);
    device.settle(located.ticket, shown).then(|| bytes.to_vec())
}

async fn check_refusals(device: &dyn BlockDevice) {
    let mut before = vec![0; 4096];
    device.read(0, &mut before).await.expect("read");
    let fua = WriteFlags { fua: true };
    let refused = [
        device.write(0, &[1; 4096], WriteFlags::default()).await,
        device.write(0, &[1; 4096], fua).await,
        device.write_zeroes(0, 4096, ZeroFlags::default()).await,
        device.trim(0, 4096).await,
    ];
    for result in refused {
        assert_eq!(result.expect_err("a read-only device").kind(), ErrorKind::ReadOnly);
    }
    let mut after = vec![0; 4096];
    device.read(0, &mut after).await.expect("read");
    assert_eq!(before, after);
}

/// Pending requests that are dropped before their first poll, and pending reads dropped after it.
async fn check_laziness(device: &dyn BlockDevice) {
    let mut before = vec![0; 8192];
    device.read(0, &mut before).await.expect("read");
    let other: Vec<u8> = before.iter().map(|byte| !byte).collect();
    let mut written = false;
    for fua in [false, true] {
        let request = device.write(0, &other, WriteFlags { fua });
        written |= request.is_ready();
        drop(request);
    }
    let zeroes = device.write_zeroes(0, 4096, ZeroFlags::default());
    written |= zeroes.is_ready();
    drop(zeroes);
    let trim = device.trim(0, 4096);
    written |= trim.is_ready();
    drop(trim);
    let mut after = vec![0; 8192];
    device.read(0, &mut after).await.expect("read");
    assert!(written || before == after, "a pending request was dropped unpolled and still changed bytes");
    let restore = device.write(0, &before, WriteFlags::default()).await;
    restore.expect("write");

    let mut buffer = vec![0x5a; 8192];
    if let Io::Pending(future) = device.read(0, &mut buffer) {
        let mut future = pin!(future);
        let _ = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }
    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    device.read(0, &mut buffer).await.expect("a read after an abandoned one");
}

/// The two windows of the device that random operations change, as they should read.
struct Model<'a> {
    device: &'a dyn BlockDevice,
    profile: &'a Profile,
    random: StdRng,
    windows: Vec<(u64, Vec<u8>)>,
}

impl<'a> Model<'a> {
    async fn load(device: &'a dyn BlockDevice, profile: &'a Profile) -> Self {
        let size = device.geometry().size;
        let length = WINDOW.min(size / 2 / 4096 * 4096);
        let mut windows = Vec::new();
        for start in [0, size - length] {
            let mut bytes = vec![0; length as usize];
            device.read(start, &mut bytes).await.expect("read of a whole window");
            windows.push((start, bytes));
        }
        Model { device, profile, random: StdRng::seed_from_u64(profile.seed), windows }
    }

    async fn play(mut self, operations: u32) {
        for operation in 0..operations {
            let window = self.random.random_range(0..2);
            let (start, bytes) = &self.windows[window];
            let (start, window_length) = (*start, bytes.len() as u64);
            let (offset, length) = self.random_range(window_length);
            let at = Place { window, offset, length, absolute: start + offset, operation };
            match self.random.random_range(0..10) {
                0..=2 => self.write(&at).await,
                3 => self.zero(&at).await,
                4 => self.trim(&at).await,
                5 => self.extents(&at).await,
                6 => self.locality(&at).await,
                _ => {}
            }
            self.compare(&at).await;
        }
        self.device.flush().await.expect("flush");
    }

    /// A range in a window of `window` bytes that keeps the minimum block.
    fn random_range(&mut self, window: u64) -> (u64, u64) {
        let block = u64::from(self.device.geometry().minimum_block);
        let coarse = self.random.random_bool(0.5);
        let unit = if coarse { 4096 } else { block };
        let offset = self.random.random_range(0..window / unit) * unit;
        let most = (window - offset).min(REQUEST_MAX) / unit;
        (offset, self.random.random_range(1..=most) * unit)
    }

    fn stores(&self) -> bool {
        self.profile.contents == Contents::Stored
    }

    async fn write(&mut self, at: &Place) {
        let mut data = vec![0; at.length as usize];
        self.random.fill(&mut data[..]);
        let flags = WriteFlags { fua: self.random.random_bool(0.1) };
        let result = self.device.write(at.absolute, &data, flags).await;
        if self.done(at, "write", result) {
            self.windows[at.window].1[at.range()].copy_from_slice(&data);
        }
    }

    async fn zero(&mut self, at: &Place) {
        let flags = ZeroFlags {
            fua: self.random.random_bool(0.1),
            no_hole: self.random.random_bool(0.3),
            fast_only: self.random.random_bool(0.3),
        };
        let result = self.device.write_zeroes(at.absolute, at.length, flags).await;
        let refused = result.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotSupported);
        let capabilities = self.device.capabilities();
        if refused && (flags.fast_only || (capabilities.write && !capabilities.zero)) {
            return; // nothing may have changed, which the comparison after it shows
        }
        if self.done(at, "write_zeroes", result) {
            self.windows[at.window].1[at.range()].fill(0);
        }
    }

    async fn trim(&mut self, at: &Place) {
        let result = self.device.trim(at.absolute, at.length).await;
        if !self.done(at, "trim", result) {
            return;
        }
        let mut now = vec![0; at.length as usize];
        self.device.read(at.absolute, &mut now).await.expect("read after trim");
        let model = &mut self.windows[at.window].1[at.range()];
        let fits = now.iter().zip(&*model).all(|(now, old)| *now == 0 || now == old);
        assert!(fits, "{}: trimmed bytes are neither old nor zero", self.describe(at));
        model.copy_from_slice(&now);
    }

    async fn extents(&mut self, at: &Place) {
        let limit = self.random.random_range(1..8);
        let extents = self.device.extents(at.absolute, at.length, limit).await.expect("extents");
        assert_extents(&extents, at.absolute, at.length, limit, &self.describe(at));
        let (start, bytes) = &self.windows[at.window];
        for extent in extents.iter().filter(|extent| extent.kind != ExtentKind::Data) {
            let from = (extent.offset - start) as usize;
            let zero = bytes[from..][..extent.length as usize].iter().all(|byte| *byte == 0);
            assert!(zero, "{}: {extent:?} does not read as zeroes", self.describe(at));
        }
    }

    async fn locality(&mut self, at: &Place) {
        let limit = self.random.random_range(1..8);
        let runs = self.device.locality(at.absolute, at.length, limit).await.expect("locality");
        let as_extent = |run: &Locality| Extent {
            offset: run.offset,
            length: run.length,
            kind: if run.local { ExtentKind::Data } else { ExtentKind::Hole },
        };
        let extents: Vec<_> = runs.iter().map(as_extent).collect();
        assert_extents(&extents, at.absolute, at.length, limit, &self.describe(at));
        if !self.device.capabilities().lazy {
            assert!(runs.iter().all(|run| run.local), "{}: not lazy and not local", self.describe(at));
        }
        if self.random.random_bool(0.3) {
            self.device.prefetch(at.absolute, at.length).await.expect("prefetch");
        }
    }

    /// Whether the model is to change: the request succeeded on a device that stores.
    fn done(&self, at: &Place, name: &str, result: crate::Result<()>) -> bool {
        match result {
            Ok(()) => self.stores(),
            Err(error) if !self.device.capabilities().write => {
                assert_eq!(error.kind(), ErrorKind::ReadOnly, "{}: {name}", self.describe(at));
                false
            }
            Err(error) => panic!("{}: {name}: {error:?}", self.describe(at)),
        }
    }

    async fn compare(&mut self, at: &Place) {
        let length = self.windows[at.window].1.len() as u64;
        let (offset, length) = self.random_range(length);
        let start = self.windows[at.window].0;
        let mut bytes = vec![0xa5; length as usize];
        self.device.read(start + offset, &mut bytes).await.expect("read");
        let expected = &self.windows[at.window].1[offset as usize..][..length as usize];
        if let Some(wrong) = bytes.iter().zip(expected).position(|(a, b)| a != b) {
            panic!(
                "{}: afterwards byte {} is {:#x} and should be {:#x}",
                self.describe(at),
                start + offset + wrong as u64,
                bytes[wrong],
                expected[wrong]
            );
        }
        for access in [Access::Seen, Access::Unseen] {
            let located = read_located(self.device, start + offset, length as usize, access);
            let same = located.is_none_or(|located| located == expected);
            assert!(same, "{}: a location {access:?} holds other bytes than a read gives", self.describe(at));
        }
    }

    fn describe(&self, at: &Place) -> String {
        let Place { operation, absolute, length, .. } = at;
        format!("seed {}, operation {operation} on {length} bytes at {absolute}", self.profile.seed)
    }
}

struct Place {
    window: usize,
    offset: u64,
    length: u64,
    absolute: u64,
    operation: u32,
}

impl Place {
    fn range(&self) -> std::ops::Range<usize> {
        self.offset as usize..(self.offset + self.length) as usize
    }
}

/// Checks the contract of [`BlockDevice::extents`] for one answer.
///
/// # Panics
/// When it is broken.
pub fn assert_extents(extents: &[Extent], offset: u64, length: u64, limit: usize, context: &str) {
    assert!(!extents.is_empty() && extents.len() <= limit.max(1), "{context}: {} extents", extents.len());
    let mut at = offset;
    for extent in extents {
        assert_eq!(extent.offset, at, "{context}: extents are adjacent: {extents:?}");
        assert!(extent.length > 0, "{context}: an empty extent: {extents:?}");
        at += extent.length;
    }
    assert!(at <= offset + length, "{context}: extents reach beyond the request: {extents:?}");
}

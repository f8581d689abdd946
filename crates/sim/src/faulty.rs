//! A layer that makes a good device bad: for tests of whatever stands on a device.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use loam_block::{
    BlockDevice, Capabilities, Error, ErrorKind, Extent, Geometry, Io, Locality, Result, WriteFlags,
    ZeroFlags,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `read`
    Read,
    /// `write`
    Write,
    /// `write_zeroes`
    WriteZeroes,
    /// `trim`
    Trim,
    /// `flush`
    Flush,
    /// `extents` and `locality`
    Extents,
    /// `prefetch`
    Prefetch,
}

const OPERATIONS: usize = 7;

/// A device with faults. Without any it is transparent. Faults are set with the `with_` methods before use and can be
/// switched off and on with [`FaultyDevice::set_faulty`]: a server that goes and comes back.
pub struct FaultyDevice {
    inner: Arc<dyn BlockDevice>,
    random: Mutex<StdRng>,
    faulty: AtomicBool,
    requests: [AtomicU64; OPERATIONS],
    nth: Vec<(Operation, u64, ErrorKind)>,
    ranges: Vec<(Range<u64>, ErrorKind)>,
    corrupt: Vec<Range<u64>>,
    rate: Option<(f64, ErrorKind)>,
    delay_max: Option<Duration>,
}

impl FaultyDevice {
    /// A layer over `inner`; `seed` decides all that is random.
    pub fn new(inner: Arc<dyn BlockDevice>, seed: u64) -> Self {
        FaultyDevice {
            inner,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            faulty: AtomicBool::new(true),
            requests: Default::default(),
            nth: Vec::new(),
            ranges: Vec::new(),
            corrupt: Vec::new(),
            rate: None,
            delay_max: None,
        }
    }

    /// The `n`th request (from 0) of a kind fails.
    #[must_use]
    pub fn with_nth_failing(mut self, operation: Operation, n: u64, kind: ErrorKind) -> Self {
        self.nth.push((operation, n, kind));
        self
    }

    /// Requests that touch `range` (bytes) fail.
    #[must_use]
    pub fn with_range_failing(mut self, range: Range<u64>, kind: ErrorKind) -> Self {
        self.ranges.push((range, kind));
        self
    }

    /// Any request fails with this probability.
    #[must_use]
    pub fn with_rate_failing(mut self, probability: f64, kind: ErrorKind) -> Self {
        self.rate = Some((probability, kind));
        self
    }

    /// Every request is pending first and waits for a random time up to `longest`.
    #[must_use]
    pub fn with_delays(mut self, longest: Duration) -> Self {
        self.delay_max = Some(longest);
        self
    }

    /// One bit of what is read from `range` (bytes) is wrong in each read that touches it.
    #[must_use]
    pub fn with_range_corrupt(mut self, range: Range<u64>) -> Self {
        self.corrupt.push(range);
        self
    }

    /// Switches all faults on or off.
    pub fn set_faulty(&self, faulty: bool) {
        self.faulty.store(faulty, Ordering::SeqCst);
    }

    /// How many requests of a kind there were.
    pub fn requests(&self, operation: Operation) -> u64 {
        self.requests[operation as usize].load(Ordering::SeqCst)
    }

    /// Counts a request and decides its fate: when it may go on, and with what result.
    fn fate(&self, operation: Operation, offset: u64, length: u64) -> (Option<Duration>, Result<()>) {
        let number = self.requests[operation as usize].fetch_add(1, Ordering::SeqCst);
        if !self.faulty.load(Ordering::SeqCst) {
            return (None, Ok(()));
        }
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let delay = self.delay_max.map(|longest| longest.mul_f64(random.random::<f64>()));
        let nth = self.nth.iter().find(|(of, n, _)| *of == operation && *n == number).map(|(.., kind)| *kind);
        let range = self.ranges.iter().find(|(range, _)| overlap(range, offset, length).is_some());
        let rate =
            self.rate.filter(|(probability, _)| random.random_bool(*probability)).map(|(_, kind)| kind);
        let result = match nth.or(range.map(|(_, kind)| *kind)).or(rate) {
            None => Ok(()),
            Some(kind) => {
                let context =
                    format!("{operation:?} {number} of {length} bytes at {offset}: a fault asked for");
                Err(Error::new(kind, context))
            }
        };
        (delay, result)
    }

    /// Lets `request` go on as fate has it.
    fn carry_out<'a, T: Send + Unpin + 'a>(
        &'a self,
        (delay, fate): (Option<Duration>, Result<()>),
        request: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        match (delay, fate) {
            (None, Ok(())) => request(),
            (None, Err(error)) => Io::Ready(Err(error)),
            (Some(delay), fate) => Io::pending(async move {
                tokio::time::sleep(delay).await;
                fate?;
                request().await
            }),
        }
    }

    fn corrupt(&self, offset: u64, buffer: &mut [u8]) {
        if !self.faulty.load(Ordering::SeqCst) {
            return;
        }
        for range in &self.corrupt {
            let Some(hit) = overlap(range, offset, buffer.len() as u64) else { continue };
            let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
            let at = random.random_range(hit) - offset;
            buffer[at as usize] ^= 1 << random.random_range(0..8);
        }
    }
}

fn overlap(range: &Range<u64>, offset: u64, length: u64) -> Option<Range<u64>> {
    let hit = range.start.max(offset)..range.end.min(offset.saturating_add(length));
    (!hit.is_empty()).then_some(hit)
}

impl BlockDevice for FaultyDevice {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let fate = self.fate(Operation::Read, offset, buffer.len() as u64);
        if self.corrupt.is_empty() {
            return self.carry_out(fate, move || self.inner.read(offset, buffer));
        }
        self.carry_out(fate, move || {
            Io::pending(async move {
                self.inner.read(offset, buffer).await?;
                self.corrupt(offset, buffer);
                Ok(())
            })
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        let fate = self.fate(Operation::Write, offset, data.len() as u64);
        self.carry_out(fate, move || self.inner.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let fate = self.fate(Operation::WriteZeroes, offset, length);
        self.carry_out(fate, move || self.inner.write_zeroes(offset, length, flags))
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        let fate = self.fate(Operation::Trim, offset, length);
        self.carry_out(fate, move || self.inner.trim(offset, length))
    }

    fn flush(&self) -> Io<'_, ()> {
        self.carry_out(self.fate(Operation::Flush, 0, 0), || self.inner.flush())
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        let fate = self.fate(Operation::Extents, offset, length);
        self.carry_out(fate, move || self.inner.extents(offset, length, limit))
    }

    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        let fate = self.fate(Operation::Extents, offset, length);
        self.carry_out(fate, move || self.inner.locality(offset, length, limit))
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        let fate = self.fate(Operation::Prefetch, offset, length);
        self.carry_out(fate, move || self.inner.prefetch(offset, length))
    }
}

impl std::fmt::Debug for FaultyDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyDevice").field("requests", &self.requests).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use loam_block::conformance::{Profile, run};
    use loam_block::{MemoryDevice, PatternDevice};

    #[test]
    fn delays_break_no_rule() {
        let inner = Arc::new(MemoryDevice::new(1 << 20));
        let device = FaultyDevice::new(inner, 7).with_delays(Duration::from_micros(20));
        run(&device, &Profile { operations: 100, ..Profile::default() });
    }

    #[tokio::test]
    async fn faults_strike_where_they_were_asked_for() {
        let device = FaultyDevice::new(Arc::new(PatternDevice::new(1 << 20)), 1)
            .with_nth_failing(Operation::Read, 1, ErrorKind::TimedOut)
            .with_range_failing(8192..8193, ErrorKind::Corrupt)
            .with_range_corrupt(65536..65540);
        let mut buffer = [0; 4096];
        device.read(0, &mut buffer).await.expect("the first read");
        let kind = |result: Result<()>| result.expect_err("a fault").kind();
        assert_eq!(kind(device.read(0, &mut buffer).await), ErrorKind::TimedOut);
        assert_eq!(kind(device.read(8192, &mut buffer).await), ErrorKind::Corrupt);
        assert_eq!(kind(device.read(8191, &mut buffer[..2]).await), ErrorKind::Corrupt);
        device.read(65536, &mut buffer).await.expect("wrong bytes, no error");
        let wrong = PatternDevice::verify(65536, &buffer);
        assert!(wrong.is_err() && PatternDevice::verify(65544, &buffer[8..]).is_ok());
        device.set_faulty(false);
        device.read(8192, &mut buffer).await.expect("no fault any more");
        assert_eq!(device.requests(Operation::Read), 6);
    }
}

//! How zeroes come to the destination: decided once, at the first zero, and corrected by what is measured after that.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::job::{Fault, Job};
use super::map::{DestinationMap, Survey};
use super::{ZeroMethod, ZeroStrategy};

/// Bytes zeroed by one command until it is known how long such a command takes. What a server does one after the other
/// inside of a command (a slow one cuts it into pieces and writes them) it does side by side for several commands.
const PIECE_FIRST: u64 = 1 << 20;
/// Most bytes zeroed by a command: such a command is cheaper than any measuring.
const PIECE_MAX: u64 = 16 << 30;
/// A command that takes no longer than this may be twice as long the next time.
const PIECE_QUICK: Duration = Duration::from_millis(2);
/// Zeroing and writing are compared after so many of each.
const SAMPLES_MIN: u64 = 8;
/// Only commands of at least so many bytes are compared: below, all is round trip.
const SAMPLE_BYTES_MIN: u64 = 256 << 10;
/// Zeroing is given up when a byte of it takes this many times what a byte of data takes.
const SLOWER_MAX: u64 = 2;

/// Time and bytes of commands of one kind.
#[derive(Debug, Default)]
struct Cost {
    commands: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Cost {
    fn add(&self, bytes: u64, taken: Duration) {
        self.commands.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.nanoseconds.fetch_add(taken.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Nanoseconds for a MiB, once enough of them were seen.
    fn of_a_mebibyte(&self) -> Option<u64> {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let known = get(&self.commands) >= SAMPLES_MIN;
        known
            .then(|| (u128::from(get(&self.nanoseconds)) << 20) / u128::from(get(&self.bytes).max(1)))
            .map(|nanoseconds| nanoseconds.min(u64::MAX.into()) as u64)
    }
}

#[derive(Debug)]
pub(super) struct Zeroes {
    /// From here on the destination is zero wherever this copy has not written.
    zero_from: AtomicU64,
    /// Zeroes are sent as data.
    as_data: AtomicBool,
    /// Long zeroes are cut: only `auto` does.
    cut: bool,
    piece: AtomicU64,
    zeroing: Cost,
    writing: Cost,
    method: AtomicU8,
}

const METHODS: [ZeroMethod; 5] =
    [ZeroMethod::None, ZeroMethod::Write, ZeroMethod::PerHole, ZeroMethod::KnownZero, ZeroMethod::Prezero];

impl Zeroes {
    pub(super) fn new(strategy: ZeroStrategy, advertised: bool, known_zero: bool) -> Self {
        Zeroes {
            zero_from: AtomicU64::new(if known_zero { 0 } else { u64::MAX }),
            as_data: AtomicBool::new(strategy == ZeroStrategy::Write || !advertised),
            cut: strategy == ZeroStrategy::Auto,
            piece: AtomicU64::new(PIECE_FIRST),
            zeroing: Cost::default(),
            writing: Cost::default(),
            method: AtomicU8::new(0),
        }
    }

    /// Whether zeroes at `offset` are there already.
    pub(super) fn are_there(&self, offset: u64) -> bool {
        self.zero_from.load(Ordering::Acquire) <= offset
    }

    /// Whether zeroes have to be sent as data.
    pub(super) fn are_data(&self) -> bool {
        self.as_data.load(Ordering::Relaxed)
    }

    /// The destination turned out not to zero at all.
    pub(super) fn give_up_zeroing(&self) {
        self.as_data.store(true, Ordering::Relaxed);
    }

    /// Bytes of the next command that zeroes.
    pub(super) fn piece(&self) -> u64 {
        if self.cut { self.piece.load(Ordering::Relaxed) } else { u64::MAX }
    }

    fn all_zero_from(&self, offset: u64, method: ZeroMethod) {
        self.used(method);
        self.zero_from.store(offset, Ordering::Release);
    }

    /// Remembers for the report what was done; the later of [`METHODS`] says more than the earlier.
    pub(super) fn used(&self, method: ZeroMethod) {
        let index = METHODS.iter().position(|known| *known == method).unwrap_or(0);
        self.method.fetch_max(index as u8, Ordering::Relaxed);
    }

    pub(super) fn method(&self) -> ZeroMethod {
        METHODS[usize::from(self.method.load(Ordering::Relaxed))]
    }

    /// A command that zeroed `bytes` began at `began` and is done.
    pub(super) fn zeroed(&self, bytes: u64, began: Instant) {
        if !self.cut {
            return;
        }
        let taken = began.elapsed();
        let piece = self.piece.load(Ordering::Relaxed);
        if taken <= PIECE_QUICK && bytes >= piece {
            self.piece.fetch_max((piece * 2).min(PIECE_MAX), Ordering::Relaxed);
        }
        if bytes >= SAMPLE_BYTES_MIN {
            self.zeroing.add(bytes, taken);
            self.compare();
        }
    }

    /// A command that wrote `bytes` began at `began` and is done.
    pub(super) fn wrote(&self, bytes: u64, began: Instant) {
        if self.cut && bytes >= SAMPLE_BYTES_MIN && !self.are_data() {
            self.writing.add(bytes, began.elapsed());
        }
    }

    fn compare(&self) {
        let costs = (self.zeroing.of_a_mebibyte(), self.writing.of_a_mebibyte());
        if let (Some(zeroing), Some(writing)) = costs
            && zeroing / SLOWER_MAX > writing
        {
            self.give_up_zeroing();
        }
    }
}

impl Job {
    /// Decides what to do about zeroes from `at` on, where nothing was written yet. `true`: ask `map` for each hole.
    pub(super) async fn decide_zeroes(&self, at: u64, map: &mut DestinationMap) -> Result<bool, Fault> {
        let zeroes = &self.zeroes;
        if zeroes.are_there(at) {
            zeroes.used(ZeroMethod::KnownZero);
            return Ok(false);
        }
        let can = self.destination.capabilities();
        match self.strategy {
            ZeroStrategy::Write | ZeroStrategy::Guess => Ok(false),
            ZeroStrategy::Prezero => self.prezero(at, can.zero, false).await.map(|()| false),
            ZeroStrategy::Fast => self.prezero(at, can.zero && can.fast_zero, true).await.map(|()| false),
            // What is zero may be a hole, and zeroing all to write most of it again would allocate it twice.
            ZeroStrategy::Auto if self.allocate => Ok(false),
            ZeroStrategy::Auto => {
                let survey = match can.extents {
                    true => map.survey(self, at).await?,
                    false => Survey::AllData,
                };
                match survey {
                    Survey::AllZero => zeroes.all_zero_from(at, ZeroMethod::KnownZero),
                    Survey::Mixed => return Ok(true),
                    Survey::AllData => self.prezero(at, can.zero && can.fast_zero, true).await?,
                }
                Ok(false)
            }
        }
    }

    /// Zeroes all from `at` by one request, if the destination `can` and, where only that helps, is fast at it.
    async fn prezero(&self, at: u64, can: bool, fast_only: bool) -> Result<(), Fault> {
        let end = self.limits.last_block_end();
        if can && at < end && self.zero(at, end - at, fast_only).await? {
            self.zeroes.all_zero_from(at, ZeroMethod::Prezero);
        }
        Ok(())
    }
}

//! The workers: they take pieces from the feed and keep as many in flight as they may, in any order, with buffers that
//! are allocated once.

use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::{FuturesUnordered, StreamExt, TryStreamExt, iter};
use tokio::time::MissedTickBehavior;

use super::ZeroMethod;
use super::error::Side;
use super::feed::Run;
use super::job::{Fault, Job, Task};
use super::report::add;
use super::stretch::{is_zero, stretches};
use super::window::{QUICK, Window};

/// Zeroes between data of one piece are left out if they are at least so long: a second write costs some microseconds,
/// and writing 16 KiB to memory does, too.
const WORTH_LEAVING_OUT: usize = 16 << 10;
/// Parts of one piece that are written side by side.
const PARTS_IN_FLIGHT: usize = 4;
/// Pieces that are carried out before other tasks of the thread have their turn.
const PIECES_IN_A_ROW: u32 = 16;

/// What became of a piece.
struct Ended {
    /// As [`Job::weight`] has it.
    bytes: u64,
    began: Instant,
    buffer: Vec<u8>,
    done: Result<(), Fault>,
}

/// Carries out pieces, as many at a time as `window` has room for, until the feed is closed and empty or one fails.
pub(super) async fn work(job: Arc<Job>, mut window: Window) -> Result<(), Fault> {
    let job = &*job;
    // A stack: the buffer that is warm in the cache is taken again first.
    let mut idle: Vec<Vec<u8>> = Vec::new();
    let mut in_flight = FuturesUnordered::new();
    let (mut ended, mut in_a_row) = (false, 0);
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + QUICK, QUICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some(piece) = in_flight.next(), if !in_flight.is_empty() => {
                let Ended { bytes, began, buffer, done } = piece;
                done?;
                idle.push(buffer);
                window.end(bytes, began);
            }
            piece = job.feed.take(|run| job.cut(run)), if !ended && window.has_room() => match piece {
                Some(piece) => {
                    let buffer = idle.pop().unwrap_or_default();
                    window.begin(job.weight(&piece));
                    in_flight.push(job.carry_out(piece, buffer));
                }
                None => ended = true,
            },
            _ = tick.tick(), if !in_flight.is_empty() => window.tick(),
            else => return Ok(()),
        }
        in_a_row += 1;
        if in_a_row == PIECES_IN_A_ROW {
            in_a_row = 0;
            tokio::task::yield_now().await;
        }
    }
}

impl Job {
    /// Bytes of the next piece of `run`.
    fn cut(&self, run: &Run) -> u64 {
        let limits = &self.limits;
        if run.zero && self.task == Task::Copy && !self.zeroes.are_data() {
            return self.zeroes.piece();
        }
        if run.length <= limits.whole_run { run.length } else { limits.request }
    }

    /// Bytes that a piece moves: zeroes, in one command, move none worth mentioning.
    fn weight(&self, piece: &Run) -> u64 {
        piece.length.min(self.limits.whole_run)
    }

    async fn carry_out(&self, piece: Run, mut buffer: Vec<u8>) -> Ended {
        let began = Instant::now();
        let done = match (self.task, piece.zero) {
            (Task::Copy, false) => self.copy_data(piece, self.room(&mut buffer)).await,
            (Task::Copy, true) => self.copy_zeroes(piece).await,
            (Task::Verify, false) => self.compare(piece, self.room(&mut buffer)).await,
            (Task::Verify, true) => self.compare_with_zero(piece, self.room(&mut buffer)).await,
        };
        if done.is_ok() {
            self.ledger.complete(piece.offset, piece.length);
        }
        Ended { bytes: self.weight(&piece), began, buffer, done }
    }

    /// The buffer at the size that any piece needs: memory that is not touched costs nothing.
    fn room<'a>(&self, buffer: &'a mut Vec<u8>) -> &'a mut [u8] {
        let longest = self.limits.whole_run as usize;
        let needed = if self.task == Task::Verify { 2 * longest } else { longest };
        if buffer.len() < needed {
            *buffer = vec![0; needed];
        }
        buffer
    }

    async fn copy_data(&self, piece: Run, buffer: &mut [u8]) -> Result<(), Fault> {
        let bytes = &mut buffer[..piece.length as usize];
        self.read(Side::Source, piece.offset, bytes).await?;
        let over = (piece.end() % self.limits.destination_block) as usize;
        let (bytes, rest) = bytes.split_at(bytes.len() - over);
        if !bytes.is_empty() {
            self.put(piece.offset, bytes).await?;
        }
        if !rest.is_empty() {
            self.put_edge(piece.offset + bytes.len() as u64, rest).await?;
        }
        Ok(())
    }

    /// Brings bytes to the destination, zeroes among them in the way that was decided.
    async fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let zeroes_help = !self.allocate && (self.zeroes.are_there(offset) || !self.zeroes.are_data());
        if !zeroes_help {
            return self.put_data(offset, bytes).await;
        }
        let found = stretches(bytes, offset, self.limits.granule, WORTH_LEAVING_OUT.max(self.limits.granule));
        let put = async |stretch: super::stretch::Stretch| {
            let at = offset + stretch.range.start as u64;
            match stretch.zero {
                true => self.put_zeroes(at, &bytes[stretch.range]).await,
                false => self.put_data(at, &bytes[stretch.range]).await,
            }
        };
        if let [only] = &found[..] {
            return put(only.clone()).await;
        }
        iter(found.into_iter().map(Ok)).try_for_each_concurrent(PARTS_IN_FLIGHT, put).await
    }

    async fn put_data(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let began = Instant::now();
        self.write(offset, bytes).await?;
        self.zeroes.wrote(bytes.len() as u64, began);
        add(&self.counters.data_bytes, bytes.len() as u64);
        Ok(())
    }

    /// Bytes that were read and are all zero.
    async fn put_zeroes(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let length = bytes.len() as u64;
        if self.zeroes.are_there(offset) {
            self.zeroes.used(ZeroMethod::KnownZero);
        } else if self.zeroes.are_data() || !self.zero_measured(offset, length).await? {
            self.zeroes.used(ZeroMethod::Write);
            return self.put_data(offset, bytes).await;
        }
        add(&self.counters.zero_bytes, length);
        Ok(())
    }

    /// Zeroes by a command. `false`: the destination does not, and is not asked again.
    async fn zero_measured(&self, offset: u64, length: u64) -> Result<bool, Fault> {
        let began = Instant::now();
        if !self.zero(offset, length, false).await? {
            self.zeroes.give_up_zeroing();
            return Ok(false);
        }
        self.zeroes.zeroed(length, began);
        self.zeroes.used(ZeroMethod::PerHole);
        Ok(true)
    }

    async fn copy_zeroes(&self, piece: Run) -> Result<(), Fault> {
        add(&self.counters.zero_bytes, piece.length);
        if !self.zeroes.are_data() && self.zero_measured(piece.offset, piece.length).await? {
            return Ok(());
        }
        self.zeroes.used(ZeroMethod::Write);
        let zeroes = self.zero_bytes.get_or_init(|| vec![0; self.limits.whole_run as usize]);
        let mut at = piece.offset;
        while at < piece.end() {
            let length = (piece.end() - at).min(zeroes.len() as u64);
            self.write(at, &zeroes[..length as usize]).await?;
            at += length;
        }
        Ok(())
    }

    /// Writes less than a block of the destination, at the end of the source: the rest of the block stays what it is.
    async fn put_edge(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut block = vec![0; self.limits.destination_block as usize];
        self.read(Side::Destination, offset, &mut block).await?;
        block[..bytes.len()].copy_from_slice(bytes);
        self.write(offset, &block).await?;
        add(&self.counters.data_bytes, bytes.len() as u64);
        Ok(())
    }

    async fn compare(&self, piece: Run, buffer: &mut [u8]) -> Result<(), Fault> {
        let (wanted, found) = buffer.split_at_mut(buffer.len() / 2);
        let wanted = &mut wanted[..piece.length as usize];
        let found = &mut found[..piece.length as usize];
        tokio::try_join!(self.read(Side::Source, piece.offset, wanted), self.read_back(piece.offset, found))?;
        if wanted == found {
            return Ok(());
        }
        Err(difference(piece.offset, wanted, found))
    }

    async fn compare_with_zero(&self, piece: Run, buffer: &mut [u8]) -> Result<(), Fault> {
        let found = &mut buffer[..piece.length as usize];
        self.read_back(piece.offset, found).await?;
        if is_zero(found) {
            return Ok(());
        }
        Err(difference(piece.offset, &vec![0; found.len()], found))
    }

    /// Reads from the destination, whose last block may be cut by the end of the source.
    async fn read_back(&self, offset: u64, found: &mut [u8]) -> Result<(), Fault> {
        let over = (offset + found.len() as u64) % self.limits.destination_block;
        if over == 0 {
            return self.read(Side::Destination, offset, found).await;
        }
        let mut whole = vec![0; found.len() + (self.limits.destination_block - over) as usize];
        self.read(Side::Destination, offset, &mut whole).await?;
        found.copy_from_slice(&whole[..found.len()]);
        Ok(())
    }
}

fn difference(offset: u64, wanted: &[u8], found: &[u8]) -> Fault {
    let at = wanted.iter().zip(found).position(|(wanted, found)| wanted != found).unwrap_or(0);
    Fault::Differs { offset: offset + at as u64, wanted: wanted[at], found: found[at] }
}

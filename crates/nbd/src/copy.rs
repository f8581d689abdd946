//! The copier: from any [`BlockDevice`] to any other, without doing slow work twice.
//!
//! A *planner* asks the source for its extents, once and while the copy is under way, and puts *runs* (data or zeroes)
//! into a bounded feed; *workers* cut pieces from them and keep many in flight, in any order, with buffers that are
//! allocated once. How zeroes come to the destination is decided at the first of them ([`ZeroStrategy`]); the decision
//! of `auto` is explained in `docs/decisions/2026-11-21-copy.md`.
//!
//! The destination may be larger than the source; what lies beyond stays as it is. It is always flushed at the end, and
//! from time to time before: what was flushed is never done twice, neither after [`ErrorKind::WritesLost`] (a server went
//! away and came back) nor, with a state file, after a crash.
//!
//! [`ErrorKind::WritesLost`]: loam_block::ErrorKind::WritesLost

mod check;
mod error;
mod feed;
mod job;
mod ledger;
mod map;
mod options;
mod pass;
mod plan;
mod progress;
mod report;
mod shape;
mod state;
mod stretch;
mod window;
mod work;
mod zeroes;

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Instant;

use loam_block::{Access, BlockDevice};

pub use error::{CopyError, Operation, Side};
pub use options::{
    CopyOptions, ParseZeroStrategyError, QUEUE_DEPTH_DEFAULT, QUEUE_DEPTH_MAX, REQUEST_BYTES_DEFAULT, Stop,
    WHOLE_RUN_BYTES, ZeroStrategy,
};
pub use progress::{NoProgress, Phase, Progress, ProgressState};
pub use report::{Commands, CopyReport, ZeroMethod};

use check::Limits;
use job::{Fault, Job, Task};
use pass::{Checkpoints, Ended, PassError, Teller, pass};
use report::Counters;
use state::{End, State};

/// Times that lost writes are done again before the copy gives up.
const LOST_MAX: u32 = 5;
/// Bytes at the end of the source that are read to see whether it is still all there.
const END_PROBE_BYTES: u64 = 4096;

/// Copies all of `source` to the start of `destination` and flushes it. Runs on the tokio runtime it is polled in, best
/// one with several threads. Dropping the future stops the copy where it is: the destination is then as after a crash,
/// and a state file tells the truth. [`CopyOptions::stop`] is the way to stop it with nothing done in vain.
///
/// # Errors
/// [`CopyError`] says which side failed, at what, and how far the copy is.
pub async fn copy(
    source: Arc<dyn BlockDevice>,
    destination: Arc<dyn BlockDevice>,
    options: &CopyOptions,
    progress: &dyn Progress,
) -> Result<CopyReport, CopyError> {
    let began = Instant::now();
    if !destination.capabilities().write {
        return Err(CopyError::ReadOnly);
    }
    check::refuse_same(&source, &destination, options)?;
    let limits = check::limits(&source.geometry(), &destination.geometry(), options)?;
    let mut copier =
        Copier { source, destination, options, limits, progress, counters: Arc::default(), redone: 0 };
    let mut checkpoints = copier.checkpoints()?;
    let resumed = checkpoints.safe;
    let job = copier.copy(&mut checkpoints).await?;
    if let Some((path, _)) = &checkpoints.file {
        State::remove(path)?;
    }
    let data_bytes = copier.counters.data_bytes.load(Ordering::Relaxed);
    let zero_bytes = copier.counters.zero_bytes.load(Ordering::Relaxed);
    if options.verify {
        copier.verify().await?;
    }
    Ok(CopyReport {
        bytes: limits.size - resumed,
        data_bytes,
        zero_bytes,
        resumed_bytes: resumed,
        commands: copier.counters.commands(),
        strategy: options.zero,
        zero_method: job.zeroes.method(),
        redone: copier.redone,
        verified: options.verify,
        seconds: began.elapsed().as_secs_f64(),
    })
}

struct Copier<'a> {
    source: Arc<dyn BlockDevice>,
    destination: Arc<dyn BlockDevice>,
    options: &'a CopyOptions,
    limits: Limits,
    progress: &'a dyn Progress,
    counters: Arc<Counters>,
    redone: u32,
}

impl Copier<'_> {
    /// Where the copy begins: at the start, or where the state file says.
    fn checkpoints(&self) -> Result<Checkpoints, CopyError> {
        let options = self.options;
        let mut checkpoints = Checkpoints { file: None, interval: options.checkpoint_interval, safe: 0 };
        let Some(path) = &options.resume else { return Ok(checkpoints) };
        let now = State {
            source: End { identity: options.source_identity.clone(), size: self.limits.size },
            destination: End {
                identity: options.destination_identity.clone(),
                size: self.destination.geometry().size,
            },
            done: 0,
        };
        if let Some(before) = State::load(path)? {
            before.check_ends(&now, path)?;
            let whole = before.done == self.limits.size;
            checkpoints.safe = if whole { before.done } else { before.done & !(self.limits.align - 1) };
        }
        checkpoints.file = Some((path.clone(), now));
        Ok(checkpoints)
    }

    fn job(&self, task: Task, start: u64) -> Arc<Job> {
        let options = self.options;
        let can_zero = self.destination.capabilities().zero;
        let known_zero = options.destination_is_zero && !options.allocate;
        Arc::new(Job {
            task,
            source: Arc::clone(&self.source),
            destination: Arc::clone(&self.destination),
            limits: self.limits,
            strategy: options.zero,
            allocate: options.allocate,
            start,
            counters: Arc::clone(&self.counters),
            zeroes: zeroes::Zeroes::new(options.zero, can_zero, known_zero),
            feed: feed::Feed::default(),
            ledger: ledger::Ledger::new(start),
            zero_bytes: OnceLock::new(),
        })
    }

    /// Copies from the last checkpoint on, again if writes are lost, until all is flushed.
    async fn copy(&mut self, checkpoints: &mut Checkpoints) -> Result<Arc<Job>, CopyError> {
        checkpoints.write().await.map_err(|error| error.into_error(checkpoints.safe))?;
        let teller = Teller { progress: self.progress, began: Instant::now(), resumed: checkpoints.safe };
        loop {
            let job = self.job(Task::Copy, checkpoints.safe);
            match self.copy_once(&job, checkpoints, &teller).await {
                Ok(Ended::Done) => return Ok(job),
                Ok(Ended::Stopped) => return Err(CopyError::Stopped { done: checkpoints.safe }),
                Err(PassError::Fault(fault)) if fault.writes_lost() => {
                    self.redone += 1;
                    if self.redone > LOST_MAX {
                        return Err(lost_too_often(fault, self.redone, checkpoints.safe));
                    }
                }
                Err(error) => {
                    // What is done so far is worth keeping, and if it cannot be kept the first error says why.
                    let _ = checkpoints.take(&job).await;
                    return Err(error.into_error(checkpoints.safe));
                }
            }
        }
    }

    async fn copy_once(
        &self,
        job: &Arc<Job>,
        checkpoints: &mut Checkpoints,
        teller: &Teller<'_>,
    ) -> Result<Ended, PassError> {
        let ended = pass(job, Phase::Copy, &self.options.stop, Some(checkpoints), teller).await?;
        if ended == Ended::Done {
            self.probe_end(job).await?;
            teller.tell(Phase::Flush, self.limits.size, self.limits.size);
        }
        checkpoints.take(job).await?;
        Ok(ended)
    }

    /// A file that was cut short has a hole where bytes were: only a read tells.
    async fn probe_end(&self, job: &Job) -> Result<(), Fault> {
        let block = u64::from(self.source.geometry().minimum_block);
        let length = END_PROBE_BYTES.next_multiple_of(block).min(self.limits.size);
        if self.source.locate(self.limits.size - length, length, Access::Unseen).is_none() {
            return Ok(());
        }
        job.read(Side::Source, self.limits.size - length, &mut vec![0; length as usize]).await
    }

    async fn verify(&self) -> Result<(), CopyError> {
        let size = self.limits.size;
        let job = self.job(Task::Verify, 0);
        let teller = Teller { progress: self.progress, began: Instant::now(), resumed: 0 };
        match pass(&job, Phase::Verify, &self.options.stop, None, &teller).await {
            Ok(Ended::Done) => Ok(()),
            Ok(Ended::Stopped) => Err(CopyError::Stopped { done: size }),
            Err(error) => Err(error.into_error(size)),
        }
    }
}

fn lost_too_often(fault: Fault, times: u32, done: u64) -> CopyError {
    match fault {
        Fault::Device { error, .. } => CopyError::LostTooOften { times, done, source: error },
        other => other.into_error(done),
    }
}

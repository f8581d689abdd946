//! One pass over the devices: planner and workers as tasks, progress, checkpoints, and an end in good order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::check::is_file;
use super::error::{CopyError, Operation, Side};
use super::job::{Fault, Job};
use super::options::Stop;
use super::plan::plan;
use super::progress::{Phase, Progress, ProgressState};
use super::state::State;
use super::window::{QUICK_BYTES, Window};
use super::work::work;

/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);
/// Tasks that carry out requests: more threads than that only wait for memory.
const WORKERS_MAX: usize = 4;
/// Processors for each of them where a server writes: it has as much to do as the copier, and where all are busy, a
/// second task of the copier's makes more wake-ups, and no more progress. A file is written by the copier itself.
const PROCESSORS_OF_A_WORKER: usize = 2;

/// How a pass ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    Stopped,
}

/// What is durable, and where that is written down.
pub(super) struct Checkpoints {
    /// The state file, and what it says next.
    pub(super) file: Option<(std::path::PathBuf, State)>,
    pub(super) interval: Duration,
    /// Bytes from the start that are copied and flushed.
    pub(super) safe: u64,
}

impl Checkpoints {
    /// Flushes the destination, after which all that was done before is safe, and writes that down.
    pub(super) async fn take(&mut self, job: &Job) -> Result<(), PassError> {
        let prefix = job.ledger.prefix();
        if let Err(error) = job.destination.flush().await {
            let (side, operation) = (Side::Destination, Operation::Flush);
            let (offset, length) = (self.safe, prefix.saturating_sub(self.safe));
            return Err(Fault::Device { side, operation, offset, length, error }.into());
        }
        self.safe = prefix;
        self.write().await
    }

    pub(super) async fn write(&mut self) -> Result<(), PassError> {
        let Some((path, state)) = &mut self.file else { return Ok(()) };
        state.done = self.safe;
        let (path, state) = (path.clone(), state.clone());
        let stored = tokio::task::spawn_blocking(move || state.store(&path)).await;
        match stored {
            Ok(stored) => stored.map_err(PassError::Copy),
            Err(gone) => Err(Fault::Internal(gone.to_string()).into()),
        }
    }
}

/// A fault of a device, or an error that is complete.
#[derive(Debug)]
pub(super) enum PassError {
    Fault(Fault),
    Copy(CopyError),
}

impl From<Fault> for PassError {
    fn from(fault: Fault) -> Self {
        PassError::Fault(fault)
    }
}

impl PassError {
    pub(super) fn into_error(self, done: u64) -> CopyError {
        match self {
            PassError::Fault(fault) => fault.into_error(done),
            PassError::Copy(error) => error,
        }
    }
}

/// What a pass tells about itself.
pub(super) struct Teller<'a> {
    pub(super) progress: &'a dyn Progress,
    pub(super) began: Instant,
    pub(super) resumed: u64,
}

impl Teller<'_> {
    pub(super) fn tell(&self, phase: Phase, done: u64, total: u64) {
        let elapsed = self.began.elapsed();
        self.progress.update(&ProgressState { phase, done, total, resumed: self.resumed, elapsed });
    }
}

/// Carries out `job`. `checkpoints` are taken on the way, if there are any.
pub(super) async fn pass(
    job: &Arc<Job>,
    phase: Phase,
    stop: &Stop,
    mut checkpoints: Option<&mut Checkpoints>,
    teller: &Teller<'_>,
) -> Result<Ended, PassError> {
    let mut tasks = start(job);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut checked = Instant::now();
    let mut stopping = false;
    let failed = loop {
        tokio::select! {
            biased;
            ended = tasks.join_next() => match ended {
                None => break None,
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(fault))) => break Some(PassError::Fault(fault)),
                Some(Err(gone)) => break Some(Fault::Internal(gone.to_string()).into()),
            },
            () = stop.stopped(), if !stopping => {
                stopping = true;
                job.feed.abandon();
            }
            _ = tick.tick() => {
                teller.tell(phase, job.ledger.bytes(), job.limits.size);
                let Some(checkpoints) = checkpoints.as_deref_mut() else { continue };
                if checked.elapsed() >= checkpoints.interval {
                    if let Err(error) = checkpoints.take(job).await {
                        break Some(error);
                    }
                    checked = Instant::now();
                }
            }
        }
    };
    // Nothing is under way any more when this returns: whoever goes on may write to the same places.
    tasks.shutdown().await;
    teller.tell(phase, job.ledger.bytes(), job.limits.size);
    match failed {
        Some(error) => Err(error),
        None if job.ledger.prefix() == job.limits.size => Ok(Ended::Done),
        None if stopping => Ok(Ended::Stopped),
        None => {
            let context = format!("{} of {} bytes are done", job.ledger.prefix(), job.limits.size);
            Err(Fault::Internal(context).into())
        }
    }
}

fn start(job: &Arc<Job>) -> JoinSet<Result<(), Fault>> {
    let mut tasks = JoinSet::new();
    let planner = Arc::clone(job);
    tasks.spawn(async move { plan(&planner).await });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = if is_file(job.destination.as_ref()) { threads } else { threads / PROCESSORS_OF_A_WORKER };
    let depth = job.limits.depth;
    let workers = workers.clamp(1, WORKERS_MAX).min(depth);
    for index in 0..workers {
        let share = depth / workers + usize::from(index < depth % workers);
        tasks.spawn(work(Arc::clone(job), Window::new(share, QUICK_BYTES / workers as u64)));
    }
    tasks
}

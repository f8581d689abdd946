//! The planner: asks the source what lies where, once and while the copy is under way, and feeds the workers.

use loam_block::ExtentKind;

use super::ZeroStrategy;
use super::feed::Run;
use super::job::{Fault, Job, Task};
use super::map::DestinationMap;
use super::report::add;
use super::shape::Shaper;

/// Feeds all runs of the job and closes the feed.
pub(super) async fn plan(job: &Job) -> Result<(), Fault> {
    let planned =
        Planner { job, map: DestinationMap::default(), decided: false, use_map: false }.plan().await;
    job.feed.close();
    planned
}

struct Planner<'a> {
    job: &'a Job,
    map: DestinationMap,
    /// Whether it is settled how zeroes come to the destination.
    decided: bool,
    /// Whether the destination is asked, hole by hole, what of it is zero already.
    use_map: bool,
}

impl Planner<'_> {
    async fn plan(&mut self) -> Result<(), Fault> {
        let job = self.job;
        let size = job.limits.size;
        let knows_extents = job.source.capabilities().extents;
        // Where nobody can say that a hole comes, it has to be settled before the first byte is written.
        let ahead = !knows_extents || matches!(job.strategy, ZeroStrategy::Prezero | ZeroStrategy::Fast);
        if job.task == Task::Copy && ahead && job.start < size {
            self.decide(job.start).await?;
        }
        let mut shaper = Shaper::new(job.start, size, job.limits.align);
        let mut runs = Vec::new();
        let mut at = job.start;
        while at < size {
            if knows_extents {
                for extent in job.source_extents(at).await? {
                    at += extent.length;
                    shaper.add(extent.length, extent.kind != ExtentKind::Data, &mut runs);
                }
            } else {
                shaper.add(size - at, false, &mut runs);
                at = size;
            }
            shaper.hurry(job.limits.whole_run, &mut runs);
            self.feed(&mut runs).await?;
        }
        shaper.finish(&mut runs);
        self.feed(&mut runs).await
    }

    async fn decide(&mut self, at: u64) -> Result<(), Fault> {
        self.use_map = self.job.decide_zeroes(at, &mut self.map).await?;
        self.decided = true;
        Ok(())
    }

    async fn feed(&mut self, runs: &mut Vec<Run>) -> Result<(), Fault> {
        for run in runs.drain(..) {
            match (run.zero, self.job.task) {
                (false, _) => self.job.feed.put(run).await,
                (true, Task::Copy) => self.feed_zeroes(run).await?,
                (true, Task::Verify) => self.feed_unlike_zero(run).await?,
            }
        }
        Ok(())
    }

    async fn feed_zeroes(&mut self, run: Run) -> Result<(), Fault> {
        if !self.decided {
            self.decide(run.offset).await?;
        }
        let job = self.job;
        if job.zeroes.are_there(run.offset) {
            add(&job.counters.zero_bytes, run.length);
            job.ledger.complete(run.offset, run.length);
        } else if self.use_map {
            let parts = self.map.not_zero(job, run).await?;
            if parts.is_empty() {
                job.zeroes.used(super::ZeroMethod::KnownZero);
            }
            self.feed_parts(run, &parts).await;
        } else {
            job.feed.put(run).await;
        }
        Ok(())
    }

    /// Verifying: zeroes of the source are compared with what the destination does not itself call zero.
    async fn feed_unlike_zero(&mut self, run: Run) -> Result<(), Fault> {
        if !self.job.destination.capabilities().extents {
            self.job.feed.put(run).await;
            return Ok(());
        }
        let parts = self.map.not_zero(self.job, run).await?;
        self.feed_parts(run, &parts).await;
        Ok(())
    }

    /// Feeds `parts` of `run`; the rest is done.
    async fn feed_parts(&self, run: Run, parts: &[Run]) {
        let job = self.job;
        let mut at = run.offset;
        let done_to = |at: &mut u64, to: u64| {
            if *at < to {
                add(&job.counters.zero_bytes, to - *at);
                job.ledger.complete(*at, to - *at);
            }
            *at = to;
        };
        for part in parts {
            done_to(&mut at, part.offset);
            job.feed.put(*part).await;
            at = part.end();
        }
        done_to(&mut at, run.end());
    }
}

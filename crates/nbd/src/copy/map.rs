//! What of the destination is zero already, by its own account, so that it need not be touched. Asked once, in order, a
//! window ahead of where it is needed.

use std::collections::VecDeque;

use loam_block::{Extent, ExtentKind};

use super::feed::Run;
use super::job::{Fault, Job};

/// Extents asked for at once.
pub(super) const EXTENTS_MAX: usize = 1024;
/// Questions until a destination that was all zero so far is taken for one of many pieces.
const SURVEY_QUESTIONS_MAX: usize = 64;

/// What a first look at the destination shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survey {
    /// Reads as zeroes, all of it.
    AllZero,
    /// Some does.
    Mixed,
    /// None does, or the destination cannot tell.
    AllData,
}

#[derive(Debug, Default)]
pub(super) struct DestinationMap {
    known: VecDeque<Extent>,
    asked_to: u64,
}

impl DestinationMap {
    /// Looks at what lies from `at` to the end.
    pub(super) async fn survey(&mut self, job: &Job, at: u64) -> Result<Survey, Fault> {
        self.known.clear();
        self.asked_to = at;
        let end = job.limits.last_block_end();
        for _ in 0..SURVEY_QUESTIONS_MAX {
            if self.asked_to >= end {
                break;
            }
            self.ask(job).await?;
            let zero = |extent: &Extent| extent.kind != ExtentKind::Data;
            if !self.known.iter().all(zero) {
                let some = self.known.iter().any(zero) || self.asked_to < end;
                return Ok(if some { Survey::Mixed } else { Survey::AllData });
            }
        }
        Ok(if self.asked_to >= end { Survey::AllZero } else { Survey::Mixed })
    }

    /// The parts of `run` that are not known to be zero. Runs are asked for in order.
    pub(super) async fn not_zero(&mut self, job: &Job, run: Run) -> Result<Vec<Run>, Fault> {
        let mut parts: Vec<Run> = Vec::new();
        let mut at = run.offset;
        while at < run.end() {
            while self.known.front().is_some_and(|extent| extent.offset + extent.length <= at) {
                self.known.pop_front();
            }
            let Some(extent) = self.known.front().copied() else {
                self.asked_to = self.asked_to.max(at);
                self.ask(job).await?;
                continue;
            };
            let end = (extent.offset + extent.length).min(run.end());
            if extent.kind == ExtentKind::Data {
                match parts.last_mut().filter(|last| last.end() == at) {
                    Some(last) => last.length += end - at,
                    None => parts.push(Run { offset: at, length: end - at, zero: true }),
                }
            }
            at = end;
        }
        Ok(parts)
    }

    async fn ask(&mut self, job: &Job) -> Result<(), Fault> {
        let length = job.limits.last_block_end() - self.asked_to;
        let extents = job.destination_extents(self.asked_to, length).await?;
        for extent in extents {
            self.asked_to += extent.length;
            self.known.push_back(extent);
        }
        Ok(())
    }
}

//! The queue between the planner, which learns what lies where, and the workers, which carry it out. Runs are cut when
//! they are taken, not when they are put in, so that a queue of some runs stands for any amount of bytes and the size of
//! a piece may follow what was measured until then.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Runs that wait at most; the planner waits for room.
const RUNS_MAX: usize = 256;

/// A part of the source that is data, or zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) zero: bool,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.length
    }
}

#[derive(Debug, Default)]
struct Queue {
    runs: VecDeque<Run>,
    closed: bool,
}

enum Taken {
    Run(Run),
    Nothing,
    Closed,
}

#[derive(Debug, Default)]
pub(super) struct Feed {
    queue: Mutex<Queue>,
    filled: Notify,
    room: Notify,
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a run; waits for room. Nothing is added to a feed that was closed.
    pub(super) async fn put(&self, run: Run) {
        loop {
            let room = self.room.notified();
            {
                let mut queue = self.lock();
                if queue.closed {
                    return;
                }
                if queue.runs.len() < RUNS_MAX {
                    queue.runs.push_back(run);
                    self.filled.notify_one();
                    return;
                }
            }
            room.await;
        }
    }

    /// There will be no more; what is there is still taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_waiters();
        self.room.notify_waiters();
    }

    /// There will be no more, and what is there is forgotten.
    pub(super) fn abandon(&self) {
        self.lock().runs.clear();
        self.close();
    }

    /// The next piece, as long as `cut` says of the run it comes from; `None` when all is taken and the feed closed.
    pub(super) async fn take(&self, cut: impl Fn(&Run) -> u64) -> Option<Run> {
        loop {
            let filled = self.filled.notified();
            tokio::pin!(filled);
            filled.as_mut().enable();
            match self.try_take(&cut) {
                Taken::Run(run) => return Some(run),
                Taken::Closed => return None,
                Taken::Nothing => filled.await,
            }
        }
    }

    fn try_take(&self, cut: impl Fn(&Run) -> u64) -> Taken {
        let mut queue = self.lock();
        let Some(first) = queue.runs.front_mut() else {
            return if queue.closed { Taken::Closed } else { Taken::Nothing };
        };
        let length = cut(first).clamp(1, first.length);
        let piece = Run { length, ..*first };
        first.offset += length;
        first.length -= length;
        if first.length == 0 {
            queue.runs.pop_front();
            self.room.notify_one();
        }
        if !queue.runs.is_empty() {
            // One call wakes one worker, and what is left may be enough for all of them.
            self.filled.notify_one();
        }
        Taken::Run(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn run(offset: u64, length: u64) -> Run {
        Run { offset, length, zero: false }
    }

    #[tokio::test]
    async fn runs_are_cut_when_they_are_taken() {
        let feed = Feed::default();
        feed.put(run(0, 10)).await;
        feed.put(run(20, 3)).await;
        feed.close();
        feed.put(run(90, 9)).await;
        assert_eq!(feed.take(|_| 4).await, Some(run(0, 4)));
        assert_eq!(feed.take(|_| 100).await, Some(run(4, 6)));
        assert_eq!(feed.take(|run| run.length).await, Some(run(20, 3)));
        assert_eq!(feed.take(|_| 1).await, None);
    }

    #[tokio::test]
    async fn the_planner_waits_for_room_and_workers_for_runs() {
        let feed = Arc::new(Feed::default());
        let worker = |feed: Arc<Feed>| async move {
            let mut bytes = 0;
            while let Some(run) = feed.take(|_| 7).await {
                bytes += run.length;
                tokio::task::yield_now().await;
            }
            bytes
        };
        let workers: Vec<_> = (0..3).map(|_| tokio::spawn(worker(Arc::clone(&feed)))).collect();
        for index in 0..3 * RUNS_MAX as u64 {
            feed.put(run(index * 10, 10)).await;
            assert!(feed.lock().runs.len() <= RUNS_MAX);
        }
        feed.close();
        let mut total = 0;
        for worker in workers {
            total += worker.await.expect("a worker");
        }
        assert_eq!(total, 30 * RUNS_MAX as u64);
    }

    #[tokio::test]
    async fn what_is_abandoned_is_not_taken() {
        let feed = Feed::default();
        feed.put(run(0, 10)).await;
        feed.abandon();
        assert_eq!(feed.take(|_| 4).await, None);
    }
}

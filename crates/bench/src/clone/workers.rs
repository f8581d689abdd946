//! The threads that create files, each by the calls with which an image's files are created: an unnamed file in a
//! directory without checksums, a clone, times, a name.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use loam_sys::btrfs;
use rustix::fs::{self, AtFlags, Mode, OFlags, Timespec, Timestamps};

use super::plan::{CLONE_BYTES, FILES_PER_DIRECTORY, Part, Point};
use crate::record::interrupted;

/// The time of all files.
const TIME: Timespec = Timespec { tv_sec: 1_700_000_000, tv_nsec: 0 };

/// What one thread works with.
pub(super) struct Tools {
    /// What is cloned from.
    pub(super) source: File,
    /// The address of the source's first byte.
    pub(super) base: u64,
    /// A directory without checksums, in the same subvolume as `directory`.
    pub(super) staging: File,
    /// The thread's own.
    pub(super) directory: File,
}

/// Time by step, in the order of the calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Steps {
    pub(super) create: Duration,
    pub(super) clone: Duration,
    pub(super) times: Duration,
    pub(super) link: Duration,
    pub(super) close: Duration,
}

/// How a thread spent its time, as the scheduler counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Scheduled {
    /// On a processor.
    pub(super) running: Duration,
    /// Ready to run with no processor free.
    pub(super) waiting: Duration,
}

impl Scheduled {
    /// `None` where the kernel does not count: both are zero then.
    fn since(self, before: Scheduled) -> Option<Scheduled> {
        let running = self.running.saturating_sub(before.running);
        let waiting = self.waiting.saturating_sub(before.waiting);
        (!self.running.is_zero()).then_some(Scheduled { running, waiting })
    }
}

/// What all threads came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Work {
    /// From the first thread's begin to the last one's end.
    pub(super) elapsed: Duration,
    /// Sums over threads.
    pub(super) in_threads: Duration,
    pub(super) steps: Steps,
    /// `None` where the kernel does not count.
    pub(super) scheduled: Option<Scheduled>,
}

/// What one thread came to.
struct Done {
    began: Instant,
    ended: Instant,
    steps: Steps,
    scheduled: Option<Scheduled>,
}

/// Runs all parts of a case at once, each in a thread of its own. `made` counts files.
pub(super) fn run(point: &Point, parts: &[Part], tools: &[Tools], made: &AtomicU64) -> Result<Work> {
    let barrier = Barrier::new(parts.len());
    let results: Vec<Result<Done>> = std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .iter()
            .zip(tools)
            .map(|(part, tools)| scope.spawn(|| Worker { point, part, tools, made }.run(&barrier)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    });
    sum(&results.into_iter().collect::<Result<Vec<_>>>()?).context("a case without threads")
}

fn sum(done: &[Done]) -> Option<Work> {
    let began = done.iter().map(|done| done.began).min()?;
    let ended = done.iter().map(|done| done.ended).max()?;
    let mut work = Work { elapsed: ended - began, ..Work::default() };
    for one in done {
        work.in_threads += one.ended - one.began;
        work.steps.create += one.steps.create;
        work.steps.clone += one.steps.clone;
        work.steps.times += one.steps.times;
        work.steps.link += one.steps.link;
        work.steps.close += one.steps.close;
    }
    let scheduled: Option<Vec<Scheduled>> = done.iter().map(|one| one.scheduled).collect();
    work.scheduled = scheduled.map(|all| Scheduled {
        running: all.iter().map(|one| one.running).sum(),
        waiting: all.iter().map(|one| one.waiting).sum(),
    });
    Some(work)
}

struct Worker<'a> {
    point: &'a Point,
    part: &'a Part,
    tools: &'a Tools,
    made: &'a AtomicU64,
}

impl Worker<'_> {
    fn run(&self, barrier: &Barrier) -> Result<Done> {
        barrier.wait();
        let before = scheduled();
        let began = Instant::now();
        let mut steps = Steps::default();
        let mut directory: Option<(u64, OwnedFd)> = None;
        for file in self.part.files.clone() {
            if interrupted() {
                bail!("interrupted; the same command goes on from here");
            }
            let number = file / FILES_PER_DIRECTORY;
            if directory.as_ref().is_none_or(|(current, _)| *current != number) {
                directory = Some((number, self.make_directory(number)?));
            }
            let Some((_, directory)) = &directory else { continue };
            self.make(file, directory, &mut steps).with_context(|| format!("cannot make file {file}"))?;
            self.made.fetch_add(1, Ordering::Relaxed);
        }
        let ended = Instant::now();
        let scheduled = before.zip(scheduled()).and_then(|(before, after)| after.since(before));
        Ok(Done { began, ended, steps, scheduled })
    }

    fn make_directory(&self, number: u64) -> Result<OwnedFd> {
        let name = number.to_string();
        fs::mkdirat(&self.tools.directory, &name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(fs::openat(&self.tools.directory, &name, flags, Mode::empty())?)
    }

    fn make(&self, file: u64, directory: &OwnedFd, steps: &mut Steps) -> Result<()> {
        let name = file.to_string();
        let offset = self.point.address(file) - self.tools.base;
        let start = Instant::now();
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = fs::openat(&self.tools.staging, c".", flags, Mode::from_raw_mode(0o644))?;
        let created = Instant::now();
        btrfs::clone_range(&self.tools.source, offset, CLONE_BYTES, &fd, 0)?;
        let cloned = Instant::now();
        fs::futimens(&fd, &Timestamps { last_access: TIME, last_modification: TIME })?;
        let timed = Instant::now();
        fs::linkat(&fd, c"", directory, Path::new(&name), AtFlags::EMPTY_PATH)?;
        let linked = Instant::now();
        drop(fd);
        steps.create += created - start;
        steps.clone += cloned - created;
        steps.times += timed - cloned;
        steps.link += linked - timed;
        steps.close += linked.elapsed();
        Ok(())
    }
}

/// What the scheduler counted for this thread so far.
fn scheduled() -> Option<Scheduled> {
    parse_schedstat(&std::fs::read_to_string("/proc/thread-self/schedstat").ok()?)
}

/// "running waiting timeslices", in nanoseconds (Documentation/scheduler/sched-stats.rst).
fn parse_schedstat(text: &str) -> Option<Scheduled> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let mut next = || Some(Duration::from_nanos(numbers.next()?.ok()?));
    Some(Scheduled { running: next()?, waiting: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduler_s_words() {
        let expected = Scheduled { running: Duration::from_nanos(111), waiting: Duration::from_nanos(22) };
        assert_eq!(parse_schedstat("111 22 3\n"), Some(expected));
        assert_eq!(parse_schedstat("x"), None);
        // A thread that has just begun has not been counted yet; a kernel that does not count never does.
        let nothing = parse_schedstat("0 0 0").unwrap();
        assert_eq!(expected.since(nothing), Some(expected));
        assert_eq!(nothing.since(nothing), None);
    }

    #[test]
    fn elapsed_is_of_all_threads_and_steps_are_summed() {
        let start = Instant::now();
        let done = |from: u64, to: u64, scheduled| Done {
            began: start + Duration::from_millis(from),
            ended: start + Duration::from_millis(to),
            steps: Steps { clone: Duration::from_millis(to - from), ..Steps::default() },
            scheduled,
        };
        let counted = Scheduled { running: Duration::from_millis(3), waiting: Duration::ZERO };
        let work = sum(&[done(5, 10, Some(counted)), done(0, 8, Some(counted))]).unwrap();
        assert_eq!((work.elapsed, work.in_threads), (Duration::from_millis(10), Duration::from_millis(13)));
        assert_eq!(work.steps.clone, Duration::from_millis(13));
        assert_eq!(work.scheduled.unwrap().running, Duration::from_millis(6));
        assert_eq!(sum(&[done(0, 1, None)]).unwrap().scheduled, None);
        assert!(sum(&[]).is_none());
    }
}

//! Who used the processors during a run: the servers, the readers, and everybody else, which is the kernel's own threads
//! when nothing else runs on the machine. Servers and the machine from /proc.
//!
//! The kernel counts a processor's busy time by sampling at clock ticks, but idle time and a process's time exactly; so
//! what is busy is taken as what is not idle, or the parts would not fit the whole.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// Processor time in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Times {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

impl Times {
    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }

    fn minus(self, before: Times) -> Times {
        Times { user: (self.user - before.user).max(0.0), system: (self.system - before.system).max(0.0) }
    }

    fn plus(self, other: Times) -> Times {
        Times { user: self.user + other.user, system: self.system + other.system }
    }
}

/// A look at the clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Snapshot {
    taken: Instant,
    servers: Times,
    /// Of children of this process that have ended.
    children: Times,
    machine: Idle,
}

/// What was used between two looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Used {
    /// Seconds that went by.
    pub(crate) elapsed: f64,
    /// By the servers, all their threads.
    pub(crate) servers: Times,
    /// By children that ended meanwhile: by fio, its start and end included.
    pub(crate) children: Times,
    /// By everybody.
    pub(crate) machine: f64,
}

impl Snapshot {
    /// Looks now; `servers` are process ids. One that has gone counts nothing.
    pub(crate) fn take(servers: &[u32]) -> Result<Self> {
        let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        let mut all = Times::default();
        for process in servers {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            all = all.plus(times(&stat, 0, tick).unwrap_or_default());
        }
        let own = fs::read_to_string("/proc/self/stat")?;
        let children = times(&own, 2, tick).context("/proc/self/stat is not understood")?;
        let stat = fs::read_to_string("/proc/stat")?;
        let machine = idle(&stat, tick).context("/proc/stat is not understood")?;
        Ok(Snapshot { taken: Instant::now(), servers: all, children, machine })
    }

    /// What was used since `before`.
    pub(crate) fn since(self, before: Snapshot) -> Used {
        let elapsed = self.taken.duration_since(before.taken).as_secs_f64();
        let idle = self.machine.seconds - before.machine.seconds;
        Used {
            elapsed,
            servers: self.servers.minus(before.servers),
            children: self.children.minus(before.children),
            machine: (elapsed * self.machine.processors as f64 - idle).max(0.0),
        }
    }
}

impl Used {
    /// What neither servers nor children used.
    pub(crate) fn rest(&self) -> f64 {
        (self.machine - self.servers.total() - self.children.total()).max(0.0)
    }
}

/// utime and stime (14th and 15th) of a process's stat, or, `skip` fields on, those of its children (proc_pid_stat(5)).
fn times(stat: &str, skip: usize, tick: f64) -> Option<Times> {
    // The second field is a name in parentheses, which may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11 + skip);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some(Times { user: next()? * tick, system: next()? * tick })
}

/// Time that processors had nothing to do, or that the machine below gave to others.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Idle {
    /// Of all processors together.
    seconds: f64,
    processors: usize,
}

/// Idle, waiting for I/O and stolen, of the line of all processors (proc_stat(5)).
fn idle(stat: &str, tick: f64) -> Option<Idle> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let one = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let processors = stat.lines().filter(one).count();
    Some(Idle { seconds: (ticks.get(3)? + ticks.get(4)? + ticks.get(7)?) * tick, processors })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) (b 1) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 5";
        assert_eq!(times(stat, 0, 0.01), Some(Times { user: 0.1, system: 0.2 }));
        assert_eq!(times(stat, 2, 0.01), Some(Times { user: 0.3, system: 0.4 }));
        assert_eq!(times("7 (a) S", 0, 0.01), None);
        let stat = "cpu  1 2 3 100 50 4 5 6 1 1\ncpu0 9\ncpu1 9\nintr 5\n";
        assert_eq!(idle(stat, 0.01), Some(Idle { seconds: 1.56, processors: 2 }));
    }

    #[test]
    fn what_is_used_is_found() {
        let before = Snapshot::take(&[std::process::id(), 0]).unwrap();
        let started = Instant::now();
        while started.elapsed().as_millis() < 300 {}
        let used = Snapshot::take(&[std::process::id(), 0]).unwrap().since(before);
        assert!(used.elapsed >= 0.3 && used.servers.total() > 0.02 && used.machine > 0.02, "{used:?}");
        assert!(used.rest() <= used.machine);
    }
}

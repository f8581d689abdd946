//! What the kernel counts: commits and their times (`/sys/fs/btrfs/UUID/commit_stats`, Linux 6.1), writes of the devices,
//! processor time in the kernel, block groups.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use loam_sys::btrfs::{self, Key};

use crate::clone::uuid;
use crate::record::Metrics;

/// The tree of chunks, and its items' object id and type (include/uapi/linux/btrfs_tree.h).
const CHUNK_TREE: u64 = 3;
const FIRST_CHUNK_TREE_OBJECTID: u64 = 256;
const CHUNK_ITEM: u8 = 228;

/// Where the kernel shows a mounted filesystem.
pub(super) struct Sysfs(PathBuf);

/// A look at the counters.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Look {
    commits: f64,
    commit_ms: f64,
    /// Of the last one.
    last_ms: f64,
    system_seconds: f64,
}

/// The longest commit of those that were seen. The kernel's own `max_commit_ms` goes back to the mount, and not everybody
/// may reset it.
#[derive(Debug, Default)]
pub(super) struct Longest {
    commits: f64,
    milliseconds: f64,
}

impl Longest {
    /// Of commits from here on.
    pub(super) fn from(look: &Look) -> Self {
        Longest { commits: look.commits, milliseconds: 0.0 }
    }

    /// To be told often: of two commits since the last time the first one is missed.
    pub(super) fn see(&mut self, look: &Look) {
        if look.commits > self.commits {
            self.milliseconds = self.milliseconds.max(look.last_ms);
            self.commits = look.commits;
        }
    }
}

impl Sysfs {
    /// Of the filesystem that `file` lies in.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        let fsid = uuid(btrfs::filesystem_info(file)?.fsid);
        Ok(Sysfs(PathBuf::from(format!("/sys/fs/btrfs/{fsid}"))))
    }

    fn commit_stats(&self) -> PathBuf {
        self.0.join("commit_stats")
    }

    pub(super) fn look(&self) -> Result<Look> {
        let path = self.commit_stats();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        let stat = fs::read_to_string("/proc/stat")?;
        let look = parse(&text).with_context(|| format!("{} is not understood", path.display()))?;
        let system_seconds = system_ticks(&stat).context("/proc/stat is not understood")? * tick;
        Ok(Look { system_seconds, ..look })
    }

    /// Writes that all its devices have been asked for.
    pub(super) fn device_writes(&self) -> Result<u64> {
        let path = self.0.join("devices");
        let mut writes = 0;
        for entry in fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))? {
            let stat = entry?.path().join("stat");
            let text = fs::read_to_string(&stat)?;
            // Documentation/block/stat.rst: the fifth number is of write requests.
            let number = text.split_whitespace().nth(4).and_then(|word| word.parse::<u64>().ok());
            writes += number.with_context(|| format!("{} is not understood", stat.display()))?;
        }
        Ok(writes)
    }
}

impl Look {
    /// What went on since `before`.
    pub(super) fn since(&self, before: &Look, longest: &Longest, metrics: &mut Metrics) {
        let commits = self.commits - before.commits;
        let total = self.commit_ms - before.commit_ms;
        metrics.insert("commits".into(), commits);
        metrics.insert("commit_mean_ms".into(), if commits > 0.0 { total / commits } else { 0.0 });
        metrics.insert("commit_max_ms".into(), longest.milliseconds);
        metrics.insert("commit_total_seconds".into(), total / 1e3);
        metrics.insert("system_cpu_seconds".into(), self.system_seconds - before.system_seconds);
    }
}

/// Lines of a name and a number.
fn parse(text: &str) -> Option<Look> {
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse::<f64>().ok()
    };
    Some(Look {
        commits: number("commits")?,
        commit_ms: number("total_commit_ms")?,
        last_ms: number("last_commit_ms")?,
        system_seconds: 0.0,
    })
}

/// Of all processors in the kernel, interrupts included (proc_stat(5): the 3rd, 6th and 7th number).
fn system_ticks(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    Some(ticks.get(2)? + ticks.get(5)? + ticks.get(6)?)
}

/// Block groups of the filesystem that `file` lies in, as of the last commit: each is of one chunk.
pub(super) fn block_groups(file: impl AsFd) -> Result<u64> {
    let mut from = Key { objectid: FIRST_CHUNK_TREE_OBJECTID, kind: CHUNK_ITEM, offset: 0 };
    let last = Key { offset: u64::MAX, ..from };
    let mut count = 0;
    loop {
        let items = btrfs::tree_search(&file, CHUNK_TREE, from, last, u32::MAX)?;
        count += items.len() as u64;
        match items.last().and_then(|item| item.key.successor()) {
            Some(next) if next <= last => from = next,
            _ => return Ok(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_counters_are_metrics() {
        let look = |commits: u32, last: u32, total: u32| {
            let rest = format!("last_commit_ms {last}\nmax_commit_ms 900\ntotal_commit_ms {total}\n");
            parse(&format!("commits {commits}\ncur_commit_ms 0\n{rest}")).unwrap()
        };
        let before = look(2, 90, 90);
        let mut longest = Longest::from(&before);
        for seen in [before, look(3, 50, 140), look(3, 50, 140), look(4, 20, 160)] {
            longest.see(&seen);
        }
        let mut metrics = Metrics::new();
        look(4, 20, 160).since(&before, &longest, &mut metrics);
        assert_eq!(
            (metrics["commits"], metrics["commit_mean_ms"], metrics["commit_max_ms"]),
            (2.0, 35.0, 50.0)
        );
        before.since(&before, &longest, &mut metrics);
        assert_eq!(metrics["commit_mean_ms"], 0.0);
        assert_eq!(parse("commits x\n"), None);
        assert_eq!(system_ticks("cpu  1 2 30 4 5 6 7 8\ncpu0 1\n"), Some(43.0));
    }
}

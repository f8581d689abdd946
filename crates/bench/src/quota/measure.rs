//! One case: fio writes, the probe waits, the kernel counts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use loam_sys::btrfs;

use super::counters::{Longest, Sysfs, block_groups};
use super::ground::Ground;
use super::load::Load;
use super::plan::Shape;
use super::probe::Probe;
use crate::record::Metrics;

/// How long fio may open files before it writes.
const START_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(1);

/// Runs one case.
pub(super) fn measure(ground: &mut dyn Ground, shape: &Shape) -> Result<Metrics> {
    let root = ground.root()?;
    let sysfs = Sysfs::of(&root)?;
    btrfs::sync(&root)?;
    let written = sysfs.device_writes()?;
    let mut load = Load::start(&ground.victim(), &ground.others(), shape.writes)?;
    let deadline = Instant::now() + START_MAX;
    while sysfs.device_writes()? == written && !load.has_ended()? {
        if Instant::now() > deadline {
            bail!("fio has not begun to write after {} s", START_MAX.as_secs());
        }
        std::thread::sleep(POLL);
    }
    let before = sysfs.look()?;
    let mut longest = Longest::from(&before);
    let probe = Probe::start(&ground.probed());
    let loaded = load.finish(|| {
        longest.see(&sysfs.look()?);
        Ok(())
    });
    // Ends what was written since the last commit, or a run with one commit less would seem to have cost less.
    let synced = btrfs::sync(&root);
    let (after, probed) = (sysfs.look(), probe.finish());
    let mut metrics = loaded?;
    metrics.extend(probed?);
    synced?;
    let after = after?;
    longest.see(&after);
    after.since(&before, &longest, &mut metrics);
    let all = metrics.get("all_writes").copied().unwrap_or_default();
    ensure!(all > 0.0, "fio wrote nothing");
    for (name, of) in
        [("commit_us_per_write", "commit_total_seconds"), ("system_us_per_write", "system_cpu_seconds")]
    {
        let seconds = metrics.get(of).copied().context("a metric of the counters")?;
        metrics.insert(name.into(), seconds * 1e6 / all);
    }
    metrics.insert("snapshot_seconds".into(), ground.snapshot_time().as_secs_f64());
    metrics.insert("block_groups".into(), block_groups(&root)? as f64);
    drop(root);
    ground.end(&mut metrics)?;
    Ok(metrics)
}

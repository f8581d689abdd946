//! How long others wait: two threads that make small files now and then, in a subvolume of their own where nothing is
//! shared. One creates and renames, which waits for nothing but a commit's critical section; the other one also writes a
//! block and calls fsync.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::plan::BLOCK;
use crate::clone::percentile;
use crate::record::Metrics;

/// Between one file and the next.
const PAUSE: Duration = Duration::from_millis(2);
/// Times that are kept: more than an hour's.
const SAMPLES_MAX: usize = 1 << 21;
const PERCENTILES: [f64; 5] = [50.0, 90.0, 95.0, 99.0, 99.9];
/// What takes longer than this waited for something.
const WAIT: Duration = Duration::from_millis(1);

type Times = Vec<Duration>;

/// The threads at work.
pub(super) struct Probe {
    stop: Arc<AtomicBool>,
    rename: JoinHandle<Result<Times>>,
    fsync: JoinHandle<Result<Times>>,
}

impl Probe {
    /// Starts both in `directory`.
    pub(super) fn start(directory: &Path) -> Probe {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |name: &str, each: fn(&Path, &Path) -> Result<()>| {
            let (stop, path) = (Arc::clone(&stop), directory.join(name));
            std::thread::spawn(move || repeat(&stop, &path, each))
        };
        let (rename, fsync) = (start("rename", create_and_rename), start("fsync", create_and_fsync));
        Probe { stop, rename, fsync }
    }

    /// Ends both: `rename_*` and `fsync_*`.
    pub(super) fn finish(self) -> Result<Metrics> {
        self.stop.store(true, Ordering::Relaxed);
        let mut metrics = Metrics::new();
        for (name, thread) in [("rename", self.rename), ("fsync", self.fsync)] {
            let times = thread.join().map_err(|_| anyhow!("the probe's thread panicked"))??;
            insert(name, times, &mut metrics);
        }
        Ok(metrics)
    }
}

fn repeat(stop: &AtomicBool, path: &Path, each: fn(&Path, &Path) -> Result<()>) -> Result<Times> {
    let renamed: PathBuf = path.with_extension("renamed");
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) && times.len() < SAMPLES_MAX {
        let started = Instant::now();
        each(path, &renamed)?;
        times.push(started.elapsed());
        fs::remove_file(&renamed)?;
        std::thread::sleep(PAUSE);
    }
    Ok(times)
}

fn create_and_rename(path: &Path, renamed: &Path) -> Result<()> {
    File::create_new(path)?;
    Ok(fs::rename(path, renamed)?)
}

fn create_and_fsync(path: &Path, renamed: &Path) -> Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&[1; BLOCK as usize])?;
    file.sync_all()?;
    Ok(fs::rename(path, renamed)?)
}

fn insert(name: &str, mut times: Times, metrics: &mut Metrics) {
    times.sort();
    let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
    let sum: Duration = times.iter().sum();
    let waited: Duration = times.iter().filter(|time| **time > WAIT).sum();
    metrics.insert(format!("{name}_count"), times.len() as f64);
    metrics.insert(format!("{name}_mean_us"), microseconds(sum) / times.len().max(1) as f64);
    metrics.insert(format!("{name}_waited_seconds"), waited.as_secs_f64());
    for rank in PERCENTILES {
        metrics.insert(format!("{name}_p{rank}_us"), microseconds(percentile(&times, rank)));
    }
    metrics.insert(format!("{name}_max_us"), microseconds(percentile(&times, 100.0)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_threads_leave_times_and_no_files() {
        let directory = tempfile::tempdir().unwrap();
        let probe = Probe::start(directory.path());
        std::thread::sleep(Duration::from_millis(50));
        let metrics = probe.finish().unwrap();
        assert!(metrics["rename_count"] >= 1.0 && metrics["fsync_count"] >= 1.0, "{metrics:?}");
        assert!(metrics["rename_max_us"] >= metrics["rename_p99.9_us"]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn waits_are_what_takes_long() {
        let mut metrics = Metrics::new();
        let times = [10, 20, 30_000, 50_000].map(Duration::from_micros);
        insert("x", times.to_vec(), &mut metrics);
        assert_eq!((metrics["x_waited_seconds"], metrics["x_mean_us"]), (0.08, 20_007.5));
        assert_eq!((metrics["x_p50_us"], metrics["x_max_us"]), (20.0, 50_000.0));
    }
}

//! fio: the measured writer and all others in one run, which ends with the measured one.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::plan::BLOCK;
use crate::read::{PERCENTILES, percentile_metric};
use crate::record::{Metrics, stop_if_interrupted};

const MEASURED: &str = "measured";
/// How long the other writers would go on.
const OTHERS_SECONDS: u32 = 3600;
/// How often its end is looked for.
const POLL: Duration = Duration::from_millis(5);

/// As the patch series' test has it: 4 KiB at random, each with fsync, a writer for each snapshot. Two operations on a file
/// before the next one: fio would write one and call fsync on another.
fn job_file(victim: &Path, others: &[PathBuf], writes: u32) -> String {
    let percentiles = PERCENTILES.map(|percentile| percentile.to_string()).join(":");
    let mut text = format!(
        "[global]\nrw=randwrite\nioengine=psync\nbs={BLOCK}\nfsync=1\noverwrite=1\nnorandommap=1\n\
         file_service_type=roundrobin:2\n\
         percentile_list={percentiles}\n[{MEASURED}]\nopendir={}\nio_size={}\nexitall=1\n",
        victim.display(),
        u64::from(writes) * BLOCK
    );
    for (number, other) in others.iter().enumerate() {
        let _ = write!(
            text,
            "[other{number}]\nopendir={}\ntime_based=1\nruntime={OTHERS_SECONDS}\n",
            other.display()
        );
    }
    text
}

/// A run that is under way.
pub(super) struct Load {
    child: Child,
    directory: tempfile::TempDir,
}

impl Load {
    /// Starts it; it opens thousands of files before it writes.
    pub(super) fn start(victim: &Path, others: &[PathBuf], writes: u32) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("loam-bench-fio-").tempdir()?;
        let file = |name: &str| directory.path().join(name);
        fs::write(file("jobs"), job_file(victim, others, writes))?;
        let child = Command::new("fio")
            .arg("--output-format=json")
            .arg(format!("--output={}", file("result").display()))
            .arg(file("jobs"))
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(file("said"))?)
            .spawn()
            .context("cannot start fio: is it installed?")?;
        Ok(Load { child, directory })
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&mut self) -> Result<bool> {
        stop_if_interrupted()?;
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end, calling `each` now and then: what the measured writer did, and how many `all_writes` there were.
    pub(super) fn finish(mut self, mut each: impl FnMut() -> Result<()>) -> Result<Metrics> {
        while !self.has_ended()? {
            each()?;
            std::thread::sleep(POLL);
        }
        let status = self.child.wait()?;
        let text = fs::read_to_string(self.directory.path().join("result")).unwrap_or_default();
        let said = fs::read_to_string(self.directory.path().join("said")).unwrap_or_default();
        ensure!(status.success(), "fio ended with {status}: {said}{text}");
        parse(&text)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Asked so, it ends its jobs first, which are processes of their own.
        if matches!(self.child.try_wait(), Ok(None)) {
            if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            }
            let _ = self.child.wait();
        }
    }
}

/// What fio's JSON says.
fn parse(text: &str) -> Result<Metrics> {
    // Notes to people may come before it.
    let json = text.find('{').map(|start| &text[start..]).context("fio printed no JSON")?;
    let result: Value = serde_json::from_str(json).context("what fio printed")?;
    let jobs = result["jobs"].as_array().context("fio lists no jobs")?;
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio gives no {what}"));
    let mut all = 0.0;
    for job in jobs {
        ensure!(job["error"].as_u64() == Some(0), "fio met error {} in {}", job["error"], job["jobname"]);
        all += number(&job["write"]["total_ios"], "total_ios")?;
    }
    let measured = jobs.iter().find(|job| job["jobname"] == MEASURED);
    let measured = measured.context("fio lists no measured writer")?;
    let (write, sync) = (&measured["write"], &measured["sync"]["lat_ns"]);
    let mut metrics = Metrics::from([
        ("all_writes".into(), all),
        ("writes".into(), number(&write["total_ios"], "total_ios")?),
        ("elapsed_seconds".into(), number(&write["runtime"], "runtime")? / 1e3),
        ("write_bytes_per_second".into(), number(&write["bw_bytes"], "bw_bytes")?),
        ("write_iops".into(), number(&write["iops"], "iops")?),
    ]);
    for (name, latencies) in [("write", &write["clat_ns"]), ("sync", sync)] {
        metrics.insert(format!("{name}_mean_us"), number(&latencies["mean"], "mean latency")? / 1e3);
        metrics.insert(format!("{name}_max_us"), number(&latencies["max"], "longest latency")? / 1e3);
        for percentile in PERCENTILES {
            let value = number(&latencies["percentile"][format!("{percentile:.6}")], "percentile")?;
            metrics.insert(format!("{name}_{}", percentile_metric(percentile)), value / 1e3);
        }
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies() -> String {
        let percentiles: Vec<String> =
            PERCENTILES.iter().map(|p| format!("\"{p:.6}\": {}", (p * 1e3) as u64)).collect();
        format!("{{\"mean\": 5000.0, \"max\": 2000000, \"percentile\": {{{}}}}}", percentiles.join(", "))
    }

    #[test]
    fn what_fio_prints_becomes_metrics() {
        let job = |name: &str, ios: u32| {
            format!(
                "{{\"jobname\": \"{name}\", \"error\": 0, \"write\": {{\"total_ios\": {ios}, \"runtime\": 2500, \
                 \"bw_bytes\": 4096, \"iops\": 1.0, \"clat_ns\": {0}}}, \"sync\": {{\"lat_ns\": {0}}}}}",
                latencies()
            )
        };
        let text = format!("note\n{{\"jobs\": [{}, {}]}}", job("other0", 5), job(MEASURED, 3));
        let metrics = parse(&text).unwrap();
        assert_eq!((metrics["all_writes"], metrics["writes"], metrics["elapsed_seconds"]), (8.0, 3.0, 2.5));
        assert_eq!((metrics["write_p99.9_us"], metrics["sync_max_us"]), (99.9, 2000.0));
        assert!(parse(&text.replace("\"error\": 0", "\"error\": 28")).is_err());
        assert!(parse(&text.replace(MEASURED, "else")).is_err());
    }

    #[test]
    fn the_run_ends_with_the_measured_writer() {
        let text = job_file(Path::new("/m/victim"), &["/m/o0".into(), "/m/o1".into()], 7);
        assert_eq!(text.matches("exitall=1").count(), 1);
        assert_eq!(text.matches("time_based=1").count(), 2);
        assert!(text.contains("fsync=1\n") && text.contains("roundrobin:2\n"), "{text}");
        assert!(text.contains("[measured]\nopendir=/m/victim\nio_size=28672\n"), "{text}");
    }
}

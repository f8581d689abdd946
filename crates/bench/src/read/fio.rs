//! One measurement: fio on one file or device, and what it cost.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::workload::{Engine, Workload};
use crate::cpu::Snapshot;
use crate::process::timed;
use crate::record::Metrics;

/// Percentiles of the time from submission to completion that are kept: enough to draw a curve.
pub(crate) const PERCENTILES: [f64; 14] =
    [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 99.95, 99.99];

/// The metric of a percentile: `p99.9_us`.
pub(crate) fn percentile_metric(percentile: f64) -> String {
    format!("p{percentile}_us")
}

/// What is read, and who serves it.
pub(super) struct Subject<'a> {
    pub(super) path: &'a Path,
    /// Bytes of it that are read.
    pub(super) size: u64,
    /// Process ids.
    pub(super) servers: &'a [u32],
}

/// Whether fio has the engine and the kernel allows it; the error says why not.
pub(super) fn probe(engine: Engine) -> Result<()> {
    let name = format!("--ioengine={}", engine.name());
    let file = if engine == Engine::Mmap { "/proc/self/exe" } else { "/dev/zero" };
    let file = std::fs::canonicalize(file)?;
    let mut fio = Command::new("fio");
    fio.args(["--name=probe", "--rw=randread", "--bs=4k", "--size=64k", "--readonly", &name]);
    timed(fio.arg(format!("--filename={}", file.display()))).map(drop)
}

/// Reads for `seconds`.
pub(super) fn measure(subject: &Subject<'_>, workload: &Workload, seconds: f64) -> Result<Metrics> {
    let percentiles = PERCENTILES.map(|percentile| percentile.to_string()).join(":");
    let mut command = Command::new("fio");
    command
        .args(["--name=read", "--rw=randread", "--bs=4k", "--readonly", "--time_based", "--norandommap"])
        .args(["--randrepeat=0", "--group_reporting", "--output-format=json"])
        .args(workload.fio())
        .arg(format!("--percentile_list={percentiles}"))
        .arg(format!("--runtime={}ms", (seconds * 1e3).round()))
        .arg(format!("--size={}", subject.size))
        .arg(format!("--filename={}", subject.path.display()));
    let before = Snapshot::take(subject.servers)?;
    let (text, _) = timed(&mut command)?;
    let used = Snapshot::take(subject.servers)?.since(before);
    let mut metrics = parse(&text)?;
    let reads = metrics.get("reads").copied().unwrap_or_default();
    ensure!(reads > 0.0, "fio read nothing");
    // fio's own start and end lie in these too, which take less than a tenth of a second of one processor.
    for (name, busy) in [
        ("server_user_cores", used.servers.user),
        ("server_system_cores", used.servers.system),
        ("kernel_cores", used.rest()),
    ] {
        metrics.insert(name.into(), busy / used.elapsed);
    }
    metrics.insert("cpu_us_per_read".into(), used.machine * 1e6 / reads);
    metrics.insert("server_cpu_us_per_read".into(), used.servers.total() * 1e6 / reads);
    Ok(metrics)
}

/// What fio's JSON says.
fn parse(text: &str) -> Result<Metrics> {
    // Notes to people may come before it.
    let json = text.find('{').map(|start| &text[start..]).context("fio printed no JSON")?;
    let result: Value = serde_json::from_str(json).context("what fio printed")?;
    let job = &result["jobs"][0];
    ensure!(job["error"].as_u64() == Some(0), "fio met error {}", job["error"]);
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio gives no {what}"));
    let read = &job["read"];
    let mut metrics = Metrics::from([
        ("iops".into(), number(&read["iops"], "iops")?),
        ("reads".into(), number(&read["total_ios"], "total_ios")?),
        ("mean_us".into(), number(&read["clat_ns"]["mean"], "mean latency")? / 1e3),
    ]);
    for percentile in PERCENTILES {
        let name = format!("{percentile:.6}");
        let value = number(&read["clat_ns"]["percentile"][&name], &name)?;
        metrics.insert(percentile_metric(percentile), value / 1e3);
    }
    // Percentages of the time of one job: as many cores as there are jobs, were they all busy.
    let jobs = number(&job["job options"]["numjobs"], "numjobs")
        .or_else(|_| job["job options"]["numjobs"].as_str().unwrap_or("1").parse().context("numjobs"))?;
    for (metric, field) in [("reader_user_cores", "usr_cpu"), ("reader_system_cores", "sys_cpu")] {
        metrics.insert(metric.into(), number(&job[field], field)? / 100.0 * jobs);
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fio_prints_becomes_metrics() {
        let percentiles: Vec<String> =
            PERCENTILES.iter().map(|p| format!("\"{p:.6}\": {}", (p * 1e3) as u64)).collect();
        let text = format!(
            "note: something\n{{\"jobs\": [{{\"error\": 0, \"job options\": {{\"numjobs\": \"2\"}}, \"usr_cpu\": 25.0, \
             \"sys_cpu\": 50.0, \"read\": {{\"iops\": 1000.5, \"total_ios\": 2001, \"clat_ns\": {{\"mean\": 5000.0, \
             \"percentile\": {{{}}}}}}}}}]}}",
            percentiles.join(", ")
        );
        let metrics = parse(&text).unwrap();
        assert_eq!(metrics["iops"], 1000.5);
        assert_eq!((metrics["p50_us"], metrics["p99.9_us"]), (50.0, 99.9));
        assert_eq!((metrics["reader_user_cores"], metrics["reader_system_cores"]), (0.5, 1.0));
        assert!(parse(&text.replace("\"error\": 0", "\"error\": 5")).is_err());
        assert!(parse("no JSON").is_err());
    }
}

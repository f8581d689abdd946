//! The benchmark of quotas on small numbers. Counts are looked at here, times are not.

use std::collections::BTreeSet;
use std::time::Duration;

use loam_e2e::{Loam, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MODES: [&str; 3] = ["none", "full", "simple"];

/// Runs `loam bench quota ARGUMENTS`, twice: what was measured is not measured again. Returns its results.
fn bench(loam: &Loam, arguments: &[&str]) -> Vec<Value> {
    let (out, directory) =
        (loam.path("quota.jsonl").display().to_string(), loam.path("").display().to_string());
    let common = [
        "--quick",
        "--rounds",
        "1",
        "--size",
        "2GiB",
        "--writes",
        "10",
        "--directory",
        &directory,
        "--out",
        &out,
    ];
    let command = [&["bench", "quota"], common.as_slice(), arguments].concat();
    loam.run(&command).ok();
    let lines = || std::fs::read_to_string(&out).unwrap();
    let measured = lines();
    loam.run(&command).ok();
    assert_eq!(lines(), measured);
    measured.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The text of the report; its page has charts.
fn report(loam: &Loam) -> String {
    let (results, html) = (loam.path("quota.jsonl").display().to_string(), loam.path("report.html"));
    let text = loam.run(["bench", "report", &results, "--html", &html.display().to_string()]).ok();
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
    text
}

fn number(record: &Value, metric: &str) -> f64 {
    record["metrics"][metric].as_f64().unwrap_or_else(|| panic!("no {metric} in {record}"))
}

/// What every case has to say.
fn check(record: &Value) {
    assert!(record["unavailable"].is_null(), "{record}");
    assert_eq!(number(record, "writes"), 10.0, "{record}");
    assert!(number(record, "all_writes") >= 10.0);
    for metric in ["elapsed_seconds", "write_iops", "write_p99_us", "sync_p99_us", "block_groups"] {
        assert!(number(record, metric) > 0.0, "{metric} of {record}");
    }
    for metric in ["rename", "fsync"] {
        assert!(number(record, &format!("{metric}_count")) >= 1.0, "{record}");
        assert!(number(record, &format!("{metric}_max_us")) >= number(record, &format!("{metric}_p99_us")));
    }
    for metric in ["commits", "commit_mean_ms", "commit_max_ms", "system_cpu_seconds"] {
        assert!(number(record, metric) >= 0.0, "{metric} of {record}");
    }
    for metric in ["mount_seconds", "umount_seconds", "snapshot_seconds"] {
        assert!(number(record, metric) > 0.0, "{metric} of {record}");
    }
}

#[test]
fn the_modes_are_measured_side_by_side_resumed_and_reported() {
    let loam = Loam::new();
    let records = bench(&loam, &["--files", "20", "--snapshots", "4", "--writers", "2"]);
    assert_eq!(records.len(), MODES.len());
    records.iter().for_each(check);
    let modes: BTreeSet<_> = records.iter().filter_map(|record| record["options"]["mode"].as_str()).collect();
    assert_eq!(modes, BTreeSet::from(MODES));
    let settings: BTreeSet<_> = records.iter().filter_map(|record| record["setting"].as_str()).collect();
    assert_eq!(settings.len(), 1, "{settings:?}");
    let report = report(&loam);
    for words in ["what commits cost", "4 snapshots, 2 + 1 writers", "+76.24 %", "commit_max_ms"] {
        assert!(report.contains(words), "{words} is not in the report: {report}");
    }
}

#[test]
fn curves_go_over_snapshots_and_extents() {
    let loam = Loam::new();
    let records = bench(&loam, &["--curves", "--files", "5", "--writers", "2", "--modes", "none,simple"]);
    // One and ten snapshots, one and ten extents.
    assert_eq!(records.len(), 4 * 2);
    records.iter().for_each(check);
    let report = report(&loam);
    assert!(report.contains("Quotas by snapshots") && report.contains("Quotas by extents"), "{report}");
}

#[test]
fn a_lazy_pool_is_written_to_without_fetching_it() {
    let loam = Loam::new();
    let records = bench(&loam, &["--lazy", "--files", "20", "--snapshots", "3", "--writers", "2"]);
    assert_eq!(records.len(), MODES.len());
    for record in &records {
        check(record);
        assert_eq!(number(record, "fetched_bytes"), 0.0, "whole blocks are overwritten: {record}");
    }
    assert!(report(&loam).contains("lazy pool: 20 files"));
}

/// Nothing may be left of a run that is interrupted while fio writes: the harness looks for it.
#[test]
fn an_interrupted_run_cleans_up_and_says_so() {
    let loam = Loam::new();
    let directory = loam.path("directory");
    std::fs::create_dir(&directory).unwrap();
    let out = loam.path("quota.jsonl");
    let mut command = loam.command(["bench", "quota", "--quick", "--writes", "10000000", "--directory"]);
    command.arg(&directory).arg("--out").arg(&out).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let is_making = || std::fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_some());
    wait_until("the run begins", Duration::from_secs(30), is_making);
    std::thread::sleep(Duration::from_secs(2));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("interrupted"), "{said}");
    assert_eq!(std::fs::read(&out).unwrap(), b"", "half a case is no result");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
}

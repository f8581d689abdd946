//! The benchmarks run, and what they write can be reported. Their figures are not looked at here.

use std::path::Path;

use loam_e2e::{FileServer, Loam, tarball};

#[test]
fn start_and_seed_write_results_that_can_be_reported() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    let results = ["start", "seed"].map(|name| loam.path(format!("{name}.jsonl")).display().to_string());
    let [start, seed] = results.each_ref().map(String::as_str);
    let program = ["sh", "-c", "echo 1"];
    let link = ["--link", "1ms,1000mbit", "--rounds", "1", "--out", start, "--"];
    loam.run([["bench", "start", source.as_str()].as_slice(), &link, &program].concat()).ok();
    loam.run(["bench", "seed", "--files", "1000", "--rounds", "1", "--out", seed]).ok();
    let html = loam.path("report.html");
    let report = loam.run(["bench", "report", start, seed, "--html", &html.display().to_string()]).ok();
    for case in ["loam mount", "loam pool", "curl | tar x", "1000 files"] {
        assert!(report.contains(case), "{case} is not in the report: {report}");
    }
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
}

#[test]
fn reads_are_checked_measured_resumed_and_reported() {
    let loam = Loam::new();
    let out = loam.path("read.jsonl").display().to_string();
    let targets = ["--transport", "ublk,loop", "--layout", "raw,pair", "--virtual-size", "275GiB"];
    let workloads = ["--reference", "tmpfs,fuse,fuse-loop", "--workload", "psync:2,io_uring:1x16,mmap:1"];
    let small = ["--size", "16MiB", "--runtime", "200ms", "--rounds", "1", "--out", &out];
    let command = [["bench", "read"].as_slice(), &targets, &workloads, &small].concat();
    loam.run(&command).ok();
    let lines = || std::fs::read_to_string(&out).unwrap();
    let measured = lines();
    // Seven targets by three workloads, whether they can run here or not.
    assert_eq!(measured.lines().count(), 21, "{measured}");
    let ublk = Path::new("/dev/ublk-control").exists();
    let fuse_is_not_mapped =
        |line: &str| line.contains("\"reference\":\"fuse\"") && line.contains("\"mmap\"");
    for line in measured.lines() {
        let expected = (ublk || !line.contains("\"transport\":\"ublk\"")) && !fuse_is_not_mapped(line);
        assert_eq!(line.contains("\"checked_reads\":"), expected, "{line}");
        assert_eq!(line.contains("\"unavailable\""), !expected, "{line}");
    }
    loam.run(&command).ok();
    assert_eq!(lines(), measured, "nothing was left to do");
    let html = loam.path("report.html");
    let report = loam.run(["bench", "report", &out, "--html", &html.display().to_string()]).ok();
    for text in ["loam loop pair memory 275GiB", "tmpfs", "fuse-loop", "What matters how much", "mmap, 1 job"]
    {
        assert!(report.contains(text), "{text} is not in the report: {report}");
    }
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
}

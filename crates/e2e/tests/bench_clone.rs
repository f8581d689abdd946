//! The benchmark of clones on small numbers: it checks what it reads, so a run that ends well has proved the bytes of
//! each layout. Its figures are not looked at here.

use std::path::Path;
use std::time::Duration;

use loam_e2e::{Loam, wait_until};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn clones_of_every_layout_are_measured_resumed_and_reported() {
    let loam = Loam::new();
    let (out, scratch) =
        (loam.path("clone.jsonl").display().to_string(), loam.path("").display().to_string());
    let matrix = ["--counts", "200", "--threads", "1,2", "--arrangements", "one-source,own-subvolume"];
    let common = ["--quick", "--rounds", "1", "--scratch", &scratch, "--out", &out];
    let command = [["bench", "clone"].as_slice(), &matrix, &common].concat();
    loam.run(&command).ok();
    let lines = || std::fs::read_to_string(&out).unwrap();
    let measured = lines();
    // Four layouts: one thread, and two threads in both arrangements.
    assert_eq!(measured.lines().count(), 12, "{measured}");
    loam.run(&command).ok();
    assert_eq!(lines(), measured, "what was measured is not measured again");

    let html = loam.path("report.html");
    let report = loam.run(["bench", "report", &out, "--html", &html.display().to_string()]).ok();
    for name in
        ["pair 4EiB, 2 threads, own-subvolume", "mega-extent 255TiB", "small-extents 275GiB", "Answers"]
    {
        assert!(report.contains(name), "{name} is not in the report: {report}");
    }
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
}

#[test]
fn ublk_serves_it_where_there_is_ublk() {
    let loam = Loam::new();
    let (out, scratch) =
        (loam.path("clone.jsonl").display().to_string(), loam.path("").display().to_string());
    let matrix =
        ["--transport", "ublk", "--counts", "200", "--threads", "1", "--layouts", "pair,small-extents"];
    let common = ["--quick", "--rounds", "1", "--scratch", &scratch, "--out", &out];
    let outcome = loam.run([["bench", "clone"].as_slice(), &matrix, &common].concat());
    if Path::new("/dev/ublk-control").exists() {
        outcome.ok();
    } else {
        assert!(outcome.fails().contains("ublk"));
    }
}

/// Nothing may be left of a run that is interrupted while it creates files: the harness looks for it.
#[test]
fn an_interrupted_run_cleans_up_and_says_so() {
    let loam = Loam::new();
    let scratch = loam.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let out = loam.path("clone.jsonl");
    let mut command =
        loam.command(["bench", "clone", "--counts", "100000000", "--layouts", "pair", "--scratch"]);
    command.arg(&scratch).arg("--out").arg(&out).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = Pid::from_child(&child);
    let is_making = || std::fs::read_dir(&scratch).is_ok_and(|mut entries| entries.next().is_some());
    wait_until("the run begins", Duration::from_secs(30), is_making);
    std::thread::sleep(Duration::from_millis(500));
    kill_process(pid, Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("interrupted"), "{said}");
    assert_eq!(std::fs::read(&out).unwrap(), b"", "half a case is no result");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
}

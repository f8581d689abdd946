//! The benchmarks run, and what they write can be reported. Their figures are not looked at here.

use loam_e2e::{FileServer, Loam, tarball};

#[test]
fn start_seed_and_read_write_results_that_can_be_reported() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    let results =
        ["start", "seed", "read"].map(|name| loam.path(format!("{name}.jsonl")).display().to_string());
    let [start, seed, read] = results.each_ref().map(String::as_str);
    let program = ["sh", "-c", "echo 1"];
    let link = ["--link", "1ms,1000mbit", "--rounds", "1", "--out", start, "--"];
    loam.run([["bench", "start", source.as_str()].as_slice(), &link, &program].concat()).ok();
    loam.run(["bench", "seed", "--files", "1000", "--rounds", "1", "--out", seed]).ok();
    loam.run(["bench", "read", "--size", "16MiB", "--runtime", "1", "--rounds", "1", "--out", read]).ok();
    let html = loam.path("report.html");
    let report = loam.run(["bench", "report", start, seed, read, "--html", &html.display().to_string()]).ok();
    for case in ["loam mount", "loam pool", "curl | tar x", "1000 files", "bare FUSE server", "loop on tmpfs"]
    {
        assert!(report.contains(case), "{case} is not in the report: {report}");
    }
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
}

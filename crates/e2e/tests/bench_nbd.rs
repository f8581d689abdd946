//! The benchmarks of NBD servers and of copies on small numbers: they check what they read and what was copied, so a run
//! that ends well has proved that. Counts are looked at here, times are not.

use loam_e2e::Loam;
use serde_json::Value;

/// Runs `loam bench ARGUMENTS`, twice: what was measured is not measured again. Returns its results.
fn bench(loam: &Loam, out: &str, arguments: &[&str]) -> Vec<Value> {
    let (out, scratch) = (loam.path(out).display().to_string(), loam.path("").display().to_string());
    let common = ["--quick", "--rounds", "1", "--scratch", &scratch, "--out", &out];
    let command = [&["bench"], arguments, &common].concat();
    loam.run(&command).ok();
    let lines = || std::fs::read_to_string(&out).unwrap();
    let measured = lines();
    loam.run(&command).ok();
    assert_eq!(lines(), measured);
    measured.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The text of the report; its page has charts.
fn report(loam: &Loam, results: &str) -> String {
    let (results, html) = (loam.path(results).display().to_string(), loam.path("report.html"));
    let text = loam.run(["bench", "report", &results, "--html", &html.display().to_string()]).ok();
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
    text
}

fn number(record: &Value, metric: &str) -> f64 {
    record["metrics"][metric].as_f64().unwrap_or_else(|| panic!("no {metric} in {record}"))
}

fn find<'a>(records: &'a [Value], setting: &str, case: &str) -> &'a Value {
    let found = records.iter().find(|record| record["setting"] == setting && record["case"] == case);
    found.unwrap_or_else(|| panic!("no '{setting}', '{case}' in {records:?}"))
}

#[test]
fn servers_answer_load_and_are_compared() {
    let loam = Loam::new();
    let records = bench(&loam, "nbd.jsonl", &["nbd", "--size", "4MiB", "--seconds", "0.05", "--idle", "20"]);
    // Six workloads on nine servers; three servers with idle connections.
    assert_eq!(records.len(), 6 * 9 + 3);
    for record in &records {
        assert!(record["unavailable"].is_null(), "{record}");
        if record["setting"] == "20 idle connections" {
            assert!(number(record, "resident_bytes") > 1e5);
            continue;
        }
        assert!(number(record, "requests") >= 1.0 && number(record, "errors") == 0.0, "{record}");
        assert!(number(record, "server_cpu_us") >= 0.0 && number(record, "client_cpu_us") >= 0.0);
    }
    let one = find(&records, "random reads of 4KiB, depth 1, 1 connection", "loam memory");
    assert!(number(one, "p50_us") > 0.0 && number(one, "p99_us") >= number(one, "p50_us"));
    let report = report(&loam, "nbd.jsonl");
    for words in ["Goals", "of echo", "20 idle connections", "qemu-nbd file", "memory: server CPU"] {
        assert!(report.contains(words), "{words} is not in the report: {report}");
    }
}

#[test]
fn copies_between_all_servers_are_made_and_compared() {
    let loam = Loam::new();
    let records = bench(&loam, "copy.jsonl", &["nbd", "--copy", "--size", "5MiB"]);
    // Three copiers from each of four ends to each.
    assert_eq!(records.len(), 3 * 16);
    for record in &records {
        assert!(record["unavailable"].is_null(), "{record}");
        assert!(number(record, "copy_seconds") > 0.0 && number(record, "total_cpu_seconds") >= 0.0);
    }
    let report = report(&loam, "copy.jsonl");
    assert!(report.contains("qemu-nbd to nbdkit") && report.contains("the others' faster"), "{report}");
}

/// Sixteen MiB, data and holes of 1 MiB: eight runs of data.
#[test]
fn the_case_study_counts_the_commands_of_each_strategy() {
    let loam = Loam::new();
    let records = bench(&loam, "zero.jsonl", &["zero", "--size", "16MiB", "--holes", "1MiB"]);
    // Seven copiers to two servers, each with three kinds of zeroing.
    assert_eq!(records.len(), 7 * 6);
    for server in ["loam", "nbdkit"] {
        let cell = |zeroing: &str, case: &str| {
            let record = find(&records, &format!("{server}, {zeroing} zeroing, holes of 1MiB"), case);
            assert!(record["unavailable"].is_null(), "{record}");
            assert_eq!(number(record, "data_runs"), 8.0);
            move |metric: &str| number(record, metric)
        };
        let written = cell("fast", "loam write");
        assert!(written("writes") >= 16.0 && written("zeroes") == 0.0, "{server}: all is written");
        for copier in ["loam auto", "loam fast", "loam prezero"] {
            let commands = cell("fast", copier)("commands");
            assert!(
                (9.0..=10.0).contains(&commands),
                "{server}, {copier}: {commands} commands for 8 runs of data"
            );
        }
        let guess = cell("fast", "loam guess");
        assert!(guess("writes") >= 8.0 && guess("zeroes") >= 8.0, "{server}: each hole is zeroed");
        let fast = cell("slow", "loam fast");
        assert!(
            fast("refused_zeroes") >= 1.0,
            "{server}: a server whose zeroing is slow refuses the fast one"
        );
        for copier in ["loam auto", "loam fast", "loam write", "nbdcopy", "qemu-img -W"] {
            let none = cell("no", copier);
            assert!(
                none("writes") >= 16.0 && none("zeroes") == 0.0,
                "{server}, {copier}: zeroes that are not offered"
            );
        }
    }
    let report = report(&loam, "zero.jsonl");
    assert!(report.contains("nbdkit, slow zeroing") && report.contains("loam auto"), "{report}");
}

#[test]
fn wrong_settings_are_refused_before_anything_runs() {
    let loam = Loam::new();
    let out = loam.path("out.jsonl").display().to_string();
    for (arguments, why) in [
        (["zero", "--servers", "qemu-nbd"], "only loam and nbdkit"),
        (["zero", "--holes", "1000"], "multiples of 4KiB"),
        (["nbd", "--size", "1MiB"], "4MiB at least"),
    ] {
        let said = loam.run([&["bench"], arguments.as_slice(), &["--out", &out]].concat()).fails();
        assert!(said.contains(why), "{said}");
    }
}

//! The report of servers under load: goals and whether they are reached, then for each workload all that was measured.

use std::fmt::Write as _;

use anyhow::Result;

use crate::chart::{self, Bar};
use crate::report::model::{Cell, Machine, quantile_of, ratios};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "nbd",
    text: |records| Ok(text(&Machine::all(records))),
    html: |records| html(&Machine::all(records)),
};

/// What the socket itself does.
const ECHO: &str = "echo";
/// Where the socket is the limit, this part of what the bare loop does is enough.
const PART_OF_ECHO: f64 = 0.9;

/// A ratio of loam to nbdkit that is wanted, over the same device and in the same round.
struct Goal {
    device: &'static str,
    setting: &'static str,
    metric: &'static str,
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    /// Or so much of the bare loop.
    AtLeast(f64),
    AtMost(f64),
}

const SMALL: [&str; 2] =
    ["random reads of 4KiB, depth 64, 1 connection", "random reads of 4KiB, depth 64, 4 connections"];
const LARGE: [&str; 2] = ["reads of 1MiB, depth 8, 1 connection", "writes of 1MiB, depth 8, 1 connection"];
/// The most memory that a server has with a thousand connections that do nothing.
const IDLE_SETTING: &str = "1000 idle connections";
const IDLE_BYTES_MAX: f64 = (50 << 20) as f64;

fn goals() -> Vec<Goal> {
    let mut goals = Vec::new();
    for device in ["memory", "file"] {
        for setting in SMALL {
            goals.push(Goal { device, setting, metric: "iops", limit: Limit::AtLeast(1.5) });
            goals.push(Goal { device, setting, metric: "server_cpu_us", limit: Limit::AtMost(0.6) });
        }
        let large = LARGE.map(|setting| Goal { device, setting, metric: "iops", limit: Limit::AtLeast(1.2) });
        goals.extend(large);
    }
    goals
}

/// A row of the table of goals; `None` where nothing was measured.
fn judge(machine: &Machine<'_>, goal: &Goal) -> Option<Vec<String>> {
    let loam = machine.cell(&format!("loam {}", goal.device), goal.setting)?;
    let nbdkit = machine.cell(&format!("nbdkit {}", goal.device), goal.setting)?;
    let found = ratios(loam, nbdkit, goal.metric);
    let median = quantile_of(&found, 0.5)?;
    let echo = machine.cell(ECHO, goal.setting);
    let of_echo = echo.and_then(|echo| quantile_of(&ratios(loam, echo, goal.metric), 0.5));
    let (is_met, wanted) = match goal.limit {
        Limit::AtLeast(limit) if median >= limit => (true, format!("at least {limit:.1}")),
        Limit::AtLeast(limit) => (
            of_echo.is_some_and(|part| part >= PART_OF_ECHO),
            format!("at least {limit:.1}, or {PART_OF_ECHO} of echo"),
        ),
        Limit::AtMost(limit) => (median <= limit, format!("at most {limit:.1}")),
    };
    let shown = |q| quantile_of(&found, q).map_or(String::new(), |ratio| format!("{ratio:.2}"));
    Some(vec![
        format!("{}: {}", goal.device, name(goal.metric)),
        goal.setting.to_string(),
        shown(0.5),
        shown(0.0),
        shown(1.0),
        of_echo.map_or(String::new(), |part| format!("{part:.2}")),
        found.len().to_string(),
        wanted,
        if is_met { "met" } else { "LOST" }.to_string(),
    ])
}

fn name(metric: &str) -> &str {
    if metric == "iops" { "requests/s" } else { "server CPU" }
}

fn goals_table(machine: &Machine<'_>) -> Table {
    let note = "loam in parts of nbdkit, and of a bare loop that answers without a device: medians of the rounds' own \
                ratios, minimum and maximum";
    let columns = ["", "workload", "of nbdkit", "min", "max", "of echo", "rounds", "goal", ""];
    let mut table = Table::new("Goals", note, &columns);
    table.rows = goals().iter().filter_map(|goal| judge(machine, goal)).collect();
    let idle = machine.cell("loam null", IDLE_SETTING).and_then(|cell| cell.median("resident_bytes"));
    if let Some(bytes) = idle {
        let verdict = if bytes <= IDLE_BYTES_MAX { "met" } else { "LOST" };
        let limit = format!("at most {}", mebibytes(IDLE_BYTES_MAX));
        let found = mebibytes(bytes);
        let row = ["memory", IDLE_SETTING, &found, "", "", "", "", &limit, verdict];
        table.rows.push(row.map(str::to_string).to_vec());
    }
    table
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / f64::from(1 << 20))
}

/// All cells of a workload, the fastest first.
fn sorted<'m, 'a>(machine: &'m Machine<'a>, setting: &str) -> Vec<&'m Cell<'a>> {
    let mut cells: Vec<_> = machine.cells.iter().filter(|cell| cell.setting == setting).collect();
    let rate = |cell: &Cell<'_>| cell.median("iops").unwrap_or_default();
    cells.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    cells
}

/// The median of the ratios to the cell of another case in the same rounds.
fn relative(machine: &Machine<'_>, cell: &Cell<'_>, case: &str) -> String {
    let other = machine.cell(case, cell.setting);
    let ratio = other.and_then(|other| quantile_of(&ratios(cell, other, "iops"), 0.5));
    ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"))
}

fn cells(machine: &Machine<'_>, setting: &str) -> Table {
    let columns = [
        "server",
        "requests/s",
        "min",
        "max",
        "n",
        "MiB/s",
        "p50 us",
        "p99 us",
        "server CPU s/M",
        "load's CPU s/M",
        "of nbdkit",
        "of echo",
    ];
    let note =
        "medians over the rounds; CPU in seconds for a million requests; of nbdkit: over the same device";
    let mut table = Table::new(setting, note, &columns);
    for cell in sorted(machine, setting) {
        let rate = |q| cell.quantile("iops", q).map_or(String::new(), |rate| show("iops", rate));
        let median = |metric: &str| cell.median(metric).map_or(String::new(), |value| format!("{value:.1}"));
        let mut row =
            vec![cell.case.to_string(), rate(0.5), rate(0.0), rate(1.0), cell.rounds.len().to_string()];
        row.extend(["mib_per_second", "p50_us", "p99_us", "server_cpu_us", "client_cpu_us"].map(median));
        row.push(relative(machine, cell, &format!("nbdkit {}", cell.option("device"))));
        row.push(relative(machine, cell, ECHO));
        table.rows.push(row);
    }
    table
}

fn idle(machine: &Machine<'_>, setting: &str) -> Table {
    let columns = ["server", "resident", "without connections", "bytes for each"];
    let mut table =
        Table::new(setting, "nbdkit with one thread for each connection, not its sixteen", &columns);
    for cell in machine.cells.iter().filter(|cell| cell.setting == setting) {
        let median = |metric| cell.median(metric).unwrap_or_default();
        let each = format!("{:.0}", median("each_connection_bytes"));
        let [all, before] =
            ["resident_bytes", "resident_before_bytes"].map(|metric| mebibytes(median(metric)));
        table.rows.push(vec![cell.case.to_string(), all, before, each]);
    }
    table
}

fn is_idle(machine: &Machine<'_>, setting: &str) -> bool {
    machine.cells.iter().any(|cell| cell.setting == setting && cell.median("resident_bytes").is_some())
}

fn tables(machine: &Machine<'_>) -> Vec<(Table, bool)> {
    let of_setting = |setting: &str| match is_idle(machine, setting) {
        true => (idle(machine, setting), false),
        false => (cells(machine, setting), true),
    };
    machine.settings().into_iter().map(of_setting).collect()
}

fn text(machines: &[Machine<'_>]) -> String {
    let mut text = String::new();
    for machine in machines {
        let _ = writeln!(text, "nbd: {}\n", machine.name);
        text.push_str(&goals_table(machine).text());
        text.extend(tables(machine).iter().map(|(table, _)| table.text()));
    }
    text
}

fn html(machines: &[Machine<'_>]) -> Result<String> {
    let mut page = String::new();
    for machine in machines {
        let _ = writeln!(page, "<h2>NBD servers: {}</h2>", escape(&machine.name));
        page.push_str(&goals_table(machine).html(3));
        for (table, has_charts) in tables(machine) {
            page.push_str(&table.html(3));
            if has_charts {
                page.push_str(&bars(machine, &table.title, "iops")?);
                let _ = writeln!(page, "<p>Seconds of the server's CPU for a million requests:</p>");
                page.push_str(&bars(machine, &table.title, "server_cpu_us")?);
            }
        }
    }
    Ok(page)
}

fn bars(machine: &Machine<'_>, setting: &str, metric: &str) -> Result<String> {
    let cells = sorted(machine, setting);
    let bar = |cell: &&Cell<'_>| {
        let [minimum, median, maximum] = [0.0, 0.5, 1.0].map(|q| cell.quantile(metric, q));
        Some(Bar { label: cell.case.to_string(), minimum: minimum?, median: median?, maximum: maximum? })
    };
    let bars: Vec<Bar> = cells.iter().filter_map(bar).collect();
    let peers = cells.iter().filter(|cell| cell.option("server") != "loam");
    let peers: Vec<String> = peers.map(|cell| cell.case.to_string()).collect();
    let as_text = |value: f64| if metric == "iops" { show(metric, value) } else { format!("{value:.1}") };
    chart::whiskers_beside(&bars, &peers, as_text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::nbd::plan::{Target, Workload, idle};
    use crate::record::Record;

    fn record(target: Target, workload: Workload, round: u32, iops: f64) -> Record {
        let metrics =
            [("iops", iops), ("mib_per_second", 1.0), ("server_cpu_us", 1e6 / iops), ("client_cpu_us", 2.0)];
        Record {
            bench: "nbd".into(),
            setting: workload.to_string(),
            case: target.to_string(),
            round,
            options: workload.options(target),
            metrics: metrics.map(|(name, value)| (name.to_string(), value)).into(),
            facts: BTreeMap::new(),
            unavailable: None,
            time: 0,
            kernel: "6.12".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    /// nbdkit at 100, loam at `loam`, the loop at 170, each round faster than the one before.
    fn records(loam: f64) -> Vec<Record> {
        let mut records = Vec::new();
        for round in 0..3 {
            for workload in Workload::ALL {
                for target in Target::ALL {
                    let rate = match target.to_string() {
                        name if name.starts_with("loam") => loam,
                        name if name == ECHO => 170.0,
                        _ => 100.0,
                    };
                    records.push(record(target, workload, round, rate * f64::from(round + 1)));
                }
            }
        }
        records
    }

    fn verdicts(loam: f64) -> (usize, usize) {
        let records = records(loam);
        let text = (SECTION.text)(&records.iter().collect::<Vec<_>>()).unwrap();
        let count = |word: &str| text.lines().filter(|line| line.ends_with(word)).count();
        (count("  met"), count("  LOST"))
    }

    #[test]
    fn every_goal_is_about_something_that_is_measured_and_can_be_lost() {
        assert_eq!(verdicts(168.0), (12, 0), "1.68 of nbdkit's requests, 0.595 of its CPU");
        assert_eq!(verdicts(156.0), (8, 4), "0.64 of nbdkit's CPU");
        assert_eq!(verdicts(110.0), (0, 12));
        let settings = Workload::ALL.map(|workload| workload.to_string());
        assert!(goals().iter().all(|goal| settings.iter().any(|setting| setting == goal.setting)));
        assert_eq!(idle(1000), IDLE_SETTING);
    }

    #[test]
    fn the_bare_loop_excuses_requests_but_not_processors() {
        let mut records = records(130.0);
        for record in records.iter_mut().filter(|record| record.case == ECHO) {
            record.metrics.insert("iops".into(), 140.0 * f64::from(record.round + 1));
        }
        let text = (SECTION.text)(&records.iter().collect::<Vec<_>>()).unwrap();
        let lost: Vec<&str> = text.lines().filter(|line| line.ends_with("LOST")).collect();
        assert!(lost.len() == 4 && lost.iter().all(|line| line.contains("server CPU")), "{text}");
        let html = (SECTION.html)(&records.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(html.matches("<svg").count(), 2 * Workload::ALL.len());
    }
}

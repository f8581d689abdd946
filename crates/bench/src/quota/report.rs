//! The report of quotas: the goal, then each test as the patch series has it (means, deviations, differences and whether
//! they are significant, beside what was published), and curves.

use std::fmt::Write as _;

use anyhow::Result;

use super::plan::{Mode, Series};
use super::statistics::{Sample, differ, interval};
use crate::chart::{self, Bar, Curve};
use crate::read::{PERCENTILES, percentile_metric};
use crate::report::model::{Cell, Machine};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "quota",
    text: |records| Ok(text(&Machine::all(records))),
    html: |records| html(&Machine::all(records)),
};

/// What simple quotas may cost commits, as a part of their time.
const GOAL: f64 = 0.03;
const COMMIT: &str = "commit_mean_ms";
/// What is compared with [`Mode::None`].
const COMPARED: [Mode; 2] = [Mode::Full, Mode::Simple];
const MODES: [Mode; 3] = [Mode::None, Mode::Full, Mode::Simple];

/// A line of the table; where the patch series' cover letter (v5, 27 July 2023) has it, its differences in per cent with
/// full qgroups and with simple quotas.
struct Line {
    metric: &'static str,
    published: Option<[f64; 2]>,
}

const fn line(metric: &'static str) -> Line {
    Line { metric, published: None }
}

const fn published(metric: &'static str, full: f64, simple: f64) -> Line {
    Line { metric, published: Some([full, simple]) }
}

const LINES: [Line; 35] = [
    published("elapsed_seconds", 34.26, 3.38),
    published("commits", 0.21, 0.69),
    published(COMMIT, 76.24, 1.25),
    published("commit_max_ms", 39.50, -2.35),
    line("commit_total_seconds"),
    line("commit_us_per_write"),
    line("rename_count"),
    published("rename_mean_us", 1347.61, -46.09),
    published("rename_p50_us", 3.06, 3.90),
    published("rename_p95_us", 2761.19, -99.98),
    published("rename_p99_us", 295.16, -26.37),
    published("rename_max_us", 120.07, -27.86),
    line("rename_waited_seconds"),
    line("fsync_count"),
    line("fsync_mean_us"),
    line("fsync_p50_us"),
    line("fsync_p99_us"),
    line("fsync_max_us"),
    published("write_bytes_per_second", -25.52, -3.33),
    published("write_iops", -25.52, -3.33),
    published("write_mean_us", 34.48, 3.61),
    published("write_p50_us", -0.79, -4.55),
    published("write_p99_us", 68.62, 2.21),
    published("write_max_us", 38.88, 8.38),
    line("sync_mean_us"),
    line("sync_p50_us"),
    line("sync_p99_us"),
    line("all_writes"),
    line("system_cpu_seconds"),
    line("system_us_per_write"),
    published("block_groups", 0.0, -100.0),
    published("umount_seconds", 3.93, 22.80),
    published("mount_seconds", -0.12, -0.75),
    line("snapshot_seconds"),
    line("fetched_bytes"),
];

/// Curves: a metric, and what it is called above its plot.
const CURVES: [(&str, &str); 5] = [
    (COMMIT, "mean time of a commit, ms"),
    ("commit_us_per_write", "time of commits for each write, us"),
    ("rename_mean_us", "creating and renaming beside it, mean, us"),
    ("rename_p99_us", "creating and renaming beside it, 99th percentile, us"),
    ("system_us_per_write", "processor time in the kernel for each write, us"),
];

fn sample(cell: &Cell<'_>, metric: &str) -> Option<Sample> {
    Sample::of(&cell.values(metric).into_values().collect::<Vec<_>>())
}

fn series<'a>(machine: &Machine<'a>, of: Series) -> Vec<&'a str> {
    let is_of = |setting: &&str| {
        machine.cells.iter().any(|cell| cell.setting == *setting && cell.option("series") == of.name())
    };
    machine.settings().into_iter().filter(is_of).collect()
}

fn percent(ratio: f64) -> String {
    format!("{:+.2} %", ratio * 100.0)
}

/// The difference to the other's mean, and `*` where it is significant.
fn difference(sample: &Sample, base: &Sample) -> (String, String) {
    let shown = if base.mean == 0.0 { String::new() } else { percent(sample.mean / base.mean - 1.0) };
    let mark = match differ(sample, base) {
        Some(true) => "*",
        Some(false) => "",
        None => "?",
    };
    (shown, mark.to_string())
}

fn goals(machine: &Machine<'_>) -> Table {
    let note = "time of a commit with quotas to that with none: difference of means, its 95 % confidence interval; open: \
                the interval has the goal in it";
    let columns = ["", "quotas", "rounds", "difference", "from", "to", "goal", ""];
    let mut table = Table::new("Quotas: what commits cost", note, &columns);
    for of in [Series::Unshare, Series::Lazy] {
        for setting in series(machine, of) {
            let Some(base) = machine.cell(Mode::None.name(), setting).and_then(|cell| sample(cell, COMMIT))
            else {
                continue;
            };
            for mode in COMPARED {
                let cell = machine.cell(mode.name(), setting);
                let Some(found) = cell.and_then(|cell| sample(cell, COMMIT)) else { continue };
                let ratio = found.mean / base.mean - 1.0;
                let ends = interval(&found, &base);
                let of_goal = mode == Mode::Simple;
                let verdict = match ends {
                    _ if !of_goal => "",
                    Some((_, high)) if high <= GOAL => "met",
                    Some((low, _)) if low > GOAL => "LOST",
                    _ if ratio <= GOAL => "met, open",
                    _ => "LOST, open",
                };
                table.rows.push(vec![
                    setting.to_string(),
                    mode.name().to_string(),
                    found.count.to_string(),
                    percent(ratio),
                    ends.map_or(String::new(), |(low, _)| percent(low)),
                    ends.map_or(String::new(), |(_, high)| percent(high)),
                    if of_goal { percent(GOAL) } else { String::new() },
                    verdict.to_string(),
                ]);
            }
        }
    }
    table
}

/// One test, all metrics, the three modes side by side.
fn comparison(machine: &Machine<'_>, setting: &str) -> Table {
    let note = "means and standard deviations over the rounds; *: differs from none with 95 % confidence (Welch's \
                t-test), ?: one round says nothing of that; published: the patch series' own difference, on other \
                hardware, where rename is its time in wait_current_trans";
    let mut columns = vec!["metric", "none", "sd"];
    for mode in COMPARED {
        columns.extend([mode.name(), "sd", "diff", "", "published"]);
    }
    let mut table = Table::new(setting, note, &columns);
    for line in &LINES {
        let of = |mode: Mode| sample(machine.cell(mode.name(), setting)?, line.metric);
        let base = of(Mode::None);
        if MODES.iter().all(|mode| of(*mode).is_none()) {
            continue;
        }
        let both = |sample: Option<Sample>| {
            let value = |value: f64| show(line.metric, value);
            [sample.map(|s| value(s.mean)), sample.map(|s| value(s.deviation))].map(Option::unwrap_or_default)
        };
        let mut row = vec![line.metric.to_string()];
        row.extend(both(base));
        for (index, mode) in COMPARED.into_iter().enumerate() {
            let found = of(mode);
            row.extend(both(found));
            let (shown, mark) =
                found.zip(base).map_or_else(Default::default, |(found, base)| difference(&found, &base));
            let published = line.published.map_or(String::new(), |both| percent(both[index] / 100.0));
            row.extend([shown, mark, published]);
        }
        table.rows.push(row);
    }
    table
}

/// The number that a curve goes over.
fn step(cell: &Cell<'_>, of: Series) -> u32 {
    let name = if of == Series::Snapshots { "snapshots" } else { "extents" };
    cell.option(name).parse().unwrap_or(0)
}

/// Cells of a series by step, the smallest first: those of each mode.
fn steps<'m, 'a>(machine: &'m Machine<'a>, of: Series) -> Vec<(u32, [Option<&'m Cell<'a>>; 3])> {
    let cells = || machine.cells.iter().filter(move |cell| cell.option("series") == of.name());
    let mut steps: Vec<u32> = cells().map(|cell| step(cell, of)).collect();
    steps.sort_unstable();
    steps.dedup();
    let all = |at: u32| {
        MODES.map(|mode| cells().find(|cell| step(cell, of) == at && cell.option("mode") == mode.name()))
    };
    steps.into_iter().map(|at| (at, all(at))).collect()
}

fn curve_table(machine: &Machine<'_>, of: Series) -> Table {
    let title = format!("Quotas {}", of.name());
    let note = "means over the rounds; in brackets the difference to none, * where it is significant (95 %)";
    let columns: Vec<String> = std::iter::once(of.name().trim_start_matches("by ").to_string())
        .chain(CURVES[..4].iter().flat_map(|(metric, _)| {
            MODES.map(|mode| if mode == Mode::None { format!("{metric}: none") } else { mode.name().into() })
        }))
        .collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new(title, note, &columns);
    for (at, cells) in steps(machine, of) {
        let mut row = vec![at.to_string()];
        for (metric, _) in &CURVES[..4] {
            let samples = cells.map(|cell| sample(cell?, metric));
            row.push(samples[0].map_or(String::new(), |base| show(metric, base.mean)));
            for found in &samples[1..] {
                row.push(match (found, &samples[0]) {
                    (Some(found), Some(base)) => {
                        let (shown, mark) = difference(found, base);
                        format!("{} ({shown}{mark})", show(metric, found.mean))
                    }
                    (Some(found), None) => show(metric, found.mean),
                    (None, _) => String::new(),
                });
            }
        }
        table.rows.push(row);
    }
    table
}

const TESTS: [Series; 2] = [Series::Unshare, Series::Lazy];
const OVER: [Series; 2] = [Series::Snapshots, Series::Extents];

fn text(machines: &[Machine<'_>]) -> String {
    let mut text = String::new();
    for machine in machines {
        let _ = writeln!(text, "quota: {}\n", machine.name);
        let goals = goals(machine);
        if !goals.rows.is_empty() {
            text.push_str(&goals.text());
        }
        for setting in TESTS.into_iter().flat_map(|of| series(machine, of)) {
            text.push_str(&comparison(machine, setting).text());
        }
        for of in OVER {
            let table = curve_table(machine, of);
            if !table.rows.is_empty() {
                text.push_str(&table.text());
            }
        }
    }
    text
}

fn html(machines: &[Machine<'_>]) -> Result<String> {
    let mut page = String::new();
    for machine in machines {
        let _ = writeln!(page, "<h2>What quotas cost: {}</h2>", escape(&machine.name));
        let goals = goals(machine);
        if !goals.rows.is_empty() {
            page.push_str(&goals.html(3));
        }
        for setting in TESTS.into_iter().flat_map(|of| series(machine, of)) {
            page.push_str(&comparison(machine, setting).html(3));
            for (metric, title) in CURVES {
                plot(&mut page, title, &bars(machine, setting, metric)?);
            }
            for (name, title) in [
                ("rename", "Creating and renaming beside it: us by percentile"),
                ("fsync", "Creating, writing and fsync beside it: us by percentile"),
                ("write", "The measured writer's writes: us by percentile"),
                ("sync", "The measured writer's fsync: us by percentile"),
            ] {
                plot(&mut page, title, &percentiles(machine, setting, name)?);
            }
        }
        for of in OVER {
            let table = curve_table(machine, of);
            if table.rows.is_empty() {
                continue;
            }
            page.push_str(&table.html(3));
            for (metric, title) in CURVES {
                plot(&mut page, title, &lines(machine, of, metric)?);
            }
        }
    }
    Ok(page)
}

/// Appends a plot; nothing where there is nothing to draw.
fn plot(page: &mut String, title: &str, svg: &str) {
    if !svg.is_empty() {
        let _ = writeln!(page, "<h4>{title}</h4>\n{svg}");
    }
}

fn bars(machine: &Machine<'_>, setting: &str, metric: &str) -> Result<String> {
    let bar = |mode: Mode| {
        let cell = machine.cell(mode.name(), setting)?;
        let [minimum, median, maximum] = [0.0, 0.5, 1.0].map(|quantile| cell.quantile(metric, quantile));
        Some(Bar { label: mode.name().into(), minimum: minimum?, median: median?, maximum: maximum? })
    };
    let bars: Vec<Bar> = MODES.into_iter().filter_map(bar).collect();
    if bars.is_empty() {
        return Ok(String::new());
    }
    chart::whiskers_beside(&bars, &[Mode::None.name().to_string()], |value| show(metric, value))
}

fn percentiles(machine: &Machine<'_>, setting: &str, name: &str) -> Result<String> {
    let curve = |mode: Mode| {
        let cell = machine.cell(mode.name(), setting)?;
        let point = |percentile: f64| {
            let metric = format!("{name}_{}", percentile_metric(percentile));
            Some((percentile, sample(cell, &metric)?.mean))
        };
        let points: Vec<(f64, f64)> = PERCENTILES.into_iter().filter_map(point).collect();
        (!points.is_empty()).then(|| Curve { label: mode.name().into(), points })
    };
    chart::curves(&MODES.into_iter().filter_map(curve).collect::<Vec<_>>())
}

fn lines(machine: &Machine<'_>, of: Series, metric: &str) -> Result<String> {
    let steps = steps(machine, of);
    let curve = |(index, mode): (usize, Mode)| Curve {
        label: mode.name().into(),
        points: (0..)
            .map(f64::from)
            .zip(&steps)
            .filter_map(|(at, (_, cells))| Some((at, sample(cells[index]?, metric)?.mean)))
            .collect(),
    };
    let curves: Vec<Curve> = MODES.into_iter().enumerate().map(curve).collect();
    let labels: Vec<String> = steps.iter().map(|(at, _)| at.to_string()).collect();
    chart::lines(&curves, &labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::plan::{Point, Shape};
    use crate::record::Record;

    fn record(shape: Shape, mode: Mode, round: u32, commit_ms: f64) -> Record {
        let case = Point { shape, mode }.case(round);
        let json = serde_json::json!({
            "bench": "quota", "setting": case.setting, "case": case.case, "round": round, "options": case.options,
            "metrics": { "commit_mean_ms": commit_ms, "rename_p99_us": 10.0, "rename_p50_us": 5.0 },
            "time": 0, "kernel": "6.18", "processors": 2, "loam": "0",
        });
        serde_json::from_value(json).unwrap()
    }

    fn shape(series: Series, snapshots: u32) -> Shape {
        Shape { series, files: 10, extents: 1, file_bytes: 4096, snapshots, writers: 1, writes: 5 }
    }

    #[test]
    fn differences_are_shown_marked_and_judged() {
        let mut records = Vec::new();
        for (round, jitter) in (0..).zip([-1.0, 0.0, 1.0]) {
            let unshare = shape(Series::Unshare, 100);
            records.push(record(unshare, Mode::None, round, 100.0 + jitter));
            records.push(record(unshare, Mode::Full, round, 180.0 + jitter));
            records.push(record(unshare, Mode::Simple, round, 100.5 - jitter));
        }
        let references: Vec<_> = records.iter().collect();
        let machines = Machine::all(&references);
        let goals = goals(&machines[0]);
        let last = |row: usize| goals.rows[row].last().unwrap().as_str();
        assert_eq!((goals.rows[0][3].as_str(), last(0)), ("+80.00 %", ""));
        assert_eq!((goals.rows[1][3].as_str(), last(1)), ("+0.50 %", "met"));
        let table = comparison(&machines[0], machines[0].settings()[0]);
        let row = table.rows.iter().find(|row| row[0] == COMMIT).unwrap();
        assert_eq!(
            row[1..],
            ["100", "1", "180", "1", "+80.00 %", "*", "+76.24 %", "100.50", "1", "+0.50 %", "", "+1.25 %"]
        );
        let page = (SECTION.html)(&references).unwrap();
        assert!(page.contains("<svg") && page.contains("+80.00 %"));
    }

    #[test]
    fn curves_have_a_row_and_a_point_for_each_step() {
        let records: Vec<Record> = [(1, 10.0), (100, 50.0), (10, 20.0)]
            .into_iter()
            .flat_map(|(snapshots, commit)| {
                MODES.map(|mode| record(shape(Series::Snapshots, snapshots), mode, 0, commit))
            })
            .collect();
        let references: Vec<_> = records.iter().collect();
        let machines = Machine::all(&references);
        let rows = curve_table(&machines[0], Series::Snapshots).rows;
        assert_eq!(rows.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), ["1", "10", "100"]);
        assert_eq!(rows[2][2], "50 (+0.00 %?)");
        let text = (SECTION.text)(&references).unwrap();
        assert!(text.contains("Quotas by snapshots") && !text.contains("unshare"), "{text}");
        // Of the metrics that curves are drawn of, these records have two.
        assert_eq!((SECTION.html)(&references).unwrap().matches("<svg").count(), 2);
    }
}

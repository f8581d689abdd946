//! The report of clones: the questions and their answers as ratios, how many were made in a second, what they cost
//! afterwards, and where the time of making one goes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

use crate::chart::{self, Bar, Stack};
use crate::record::{Metrics, Record};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "clone",
    text: |records| Ok(Machine::all(records).iter().map(text).collect()),
    html: |records| Machine::all(records).iter().map(html).collect(),
};

/// The steps of making one file, as they are drawn.
const STEPS: [&str; 4] = ["create", "clone", "link", "times and close"];

/// Ratios that answer something: what, of which case to which, and in which metrics. Processor time does not depend
/// on what else the machine does, as far as anything does not.
const QUESTIONS: [(&str, Is, Is, &[&str]); 8] = [
    ("one giant extent, to extents of 256 MiB", GIANT, Is("small-extents", 1, "one-source"), MAKING),
    ("one giant extent, to 32,768 of them used in turn", PAIR, Is("pair", 1, "many-extents"), MAKING),
    ("two devices, to a seed that was sprouted", PAIR, GIANT, MAKING),
    ("2 threads on one source, to 1", Is("pair", 2, "one-source"), PAIR, MAKING),
    ("2 threads with sources of their own, to 1", Is("pair", 2, "own-source"), PAIR, MAKING),
    ("2 threads with extents of their own, to 1", Is("pair", 2, "own-extent"), PAIR, MAKING),
    ("2 threads in subvolumes of their own, to 1", Is("pair", 2, "own-subvolume"), PAIR, MAKING),
    ("many block groups, to few", GIANT, Is("small-extents", 1, "one-source"), USING),
];
const PAIR: Is = Is("pair", 1, "one-source");
const GIANT: Is = Is("single", 1, "one-source");
const MAKING: &[&str] = &["clones_per_second", "running_us"];
const USING: &[&str] = &["overwrite_p50_us", "cold_read_p50_us"];

/// What a metric is called in a ratio.
fn spoken(metric: &str) -> &str {
    match metric {
        "clones_per_second" => "clones/s",
        "running_us" => "processor time of a clone",
        "overwrite_p50_us" => "overwrite",
        "cold_read_p50_us" => "cold read",
        other => other,
    }
}

/// A case: layout, threads, arrangement.
#[derive(Clone, Copy)]
struct Is(&'static str, u32, &'static str);

/// All of one machine, kernel, build, transport and place of the local device.
struct Machine<'a> {
    name: String,
    cells: Vec<Cell<'a>>,
}

/// One case in all its rounds.
struct Cell<'a> {
    layout: &'a str,
    size: &'a str,
    arrangement: &'a str,
    mount_options: &'a str,
    threads: u32,
    count: u64,
    rounds: BTreeMap<u32, &'a Metrics>,
}

/// Median and extremes of a metric over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    minimum: f64,
    median: f64,
    maximum: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (minimum, maximum) = (*sorted.first()?, *sorted.last()?);
        let median = f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Spread { minimum, median, maximum })
    }
}

impl<'a> Machine<'a> {
    fn all(records: &[&'a Record]) -> Vec<Machine<'a>> {
        let mut machines: BTreeMap<String, Vec<Cell<'a>>> = BTreeMap::new();
        for record in records {
            let option = |name: &str| record.options.get(name).map_or("", String::as_str);
            let Record { kernel, processors, loam, .. } = record;
            let name = format!(
                "Linux {kernel}, {processors} processors, loam {loam}, transport {}, local device on {}",
                option("transport"),
                option("local")
            );
            let cells = machines.entry(name).or_default();
            let new = Cell {
                layout: option("layout"),
                size: option("virtual_size"),
                arrangement: option("arrangement"),
                mount_options: option("mount_options"),
                threads: option("threads").parse().unwrap_or(0),
                count: option("clones").parse().unwrap_or(0),
                rounds: BTreeMap::new(),
            };
            let place = cells.iter().position(|cell| cell.key() == new.key()).unwrap_or_else(|| {
                cells.push(new);
                cells.len() - 1
            });
            cells[place].rounds.insert(record.round, &record.metrics);
        }
        let machine = |(name, mut cells): (String, Vec<Cell<'a>>)| {
            cells.sort_by(|a, b| a.key().cmp(&b.key()));
            Machine { name, cells }
        };
        machines.into_iter().map(machine).collect()
    }

    fn counts(&self) -> Vec<u64> {
        let mut counts: Vec<u64> = self.cells.iter().map(|cell| cell.count).collect();
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    /// The cell of a case at a number of clones, without mount options; of several sizes the one of the most rounds.
    fn cell(&self, Is(layout, threads, arrangement): Is, count: u64) -> Option<&Cell<'a>> {
        let is = |cell: &&Cell<'_>| {
            (cell.layout, cell.threads, cell.arrangement, cell.count) == (layout, threads, arrangement, count)
                && cell.mount_options.is_empty()
        };
        self.cells.iter().filter(is).max_by_key(|cell| cell.rounds.len())
    }
}

impl Cell<'_> {
    fn key(&self) -> (u64, &str, u32, &str, &str, &str) {
        (self.count, self.layout, self.threads, self.arrangement, self.mount_options, self.size)
    }

    fn spread(&self, metric: &str) -> Option<Spread> {
        Spread::of(self.rounds.values().filter_map(|metrics| metrics.get(metric).copied()))
    }

    fn median(&self, metric: &str) -> Option<f64> {
        self.spread(metric).map(|spread| spread.median)
    }

    /// Over the rounds that both have.
    fn ratio(&self, other: &Cell<'_>, metric: &str) -> Option<Spread> {
        let ratio = |(round, metrics): (&u32, &&Metrics)| {
            Some(metrics.get(metric)? / other.rounds.get(round)?.get(metric)?)
        };
        Spread::of(self.rounds.iter().filter_map(ratio))
    }

    fn name(&self) -> String {
        let threads = if self.threads == 1 { "thread" } else { "threads" };
        let options = if self.mount_options.is_empty() { "" } else { ", " };
        format!(
            "{} {}, {} {threads}, {}{options}{}",
            self.layout, self.size, self.threads, self.arrangement, self.mount_options
        )
    }

    /// What `running_us` and its like do not say themselves.
    fn show(&self, metric: &str) -> String {
        self.median(metric).map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
    }
}

fn text(machine: &Machine<'_>) -> String {
    let tables = [answers(machine), rates(machine), steps(machine), afterwards(machine)];
    let tables: String = tables.iter().map(Table::text).collect();
    format!("clone: {}\n\n{tables}", machine.name)
}

fn html(machine: &Machine<'_>) -> Result<String> {
    let mut page = format!("<h2>Clones: {}</h2>\n{}", escape(&machine.name), answers(machine).html(3));
    page.push_str(&rates(machine).html(3));
    for count in machine.counts() {
        let _ = writeln!(page, "<h4>{count} clones, made in a second</h4>");
        page.push_str(&bars(machine, count, "clones_per_second")?);
        let _ = writeln!(page, "<h4>{count} clones, us of overwriting 4 KiB with fsync (median)</h4>");
        page.push_str(&bars(machine, count, "overwrite_p50_us")?);
    }
    page.push_str(&steps(machine).html(3));
    page.push_str(&stacks(machine)?);
    page.push_str(&afterwards(machine).html(3));
    Ok(page)
}

/// The questions by number of clones.
fn answers(machine: &Machine<'_>) -> Table {
    let counts = machine.counts();
    let mut columns = vec!["ratio".to_owned()];
    columns.extend(counts.iter().map(|count| format!("{count} clones")));
    let note = "median (minimum .. maximum) of the rounds' own ratios";
    let mut table = Table { columns, ..Table::new("Answers", note, &[]) };
    let questions = QUESTIONS.iter().flat_map(|(text, of, to, metrics)| {
        metrics.iter().map(move |metric| (format!("{text}: {}", spoken(metric)), *of, *to, *metric))
    });
    for (question, of, to, metric) in questions {
        let ratio = |count: &u64| machine.cell(of, *count)?.ratio(machine.cell(to, *count)?, metric);
        let ratios: Vec<_> = counts.iter().map(ratio).collect();
        if ratios.iter().any(Option::is_some) {
            let cell = |ratio: &Option<Spread>| {
                ratio.map_or_else(String::new, |Spread { minimum, median, maximum }| {
                    format!("{median:.2} ({minimum:.2} .. {maximum:.2})")
                })
            };
            table.rows.push(std::iter::once(question).chain(ratios.iter().map(cell)).collect());
        }
    }
    table
}

fn rates(machine: &Machine<'_>) -> Table {
    let columns =
        ["case", "clones", "clones/s", "min", "max", "n", "metadata B/file", "commit ms", "snapshot ms"];
    let mut table = Table::new("Making clones", "medians over the rounds", &columns);
    for cell in &machine.cells {
        let Some(rate) = cell.spread("clones_per_second") else { continue };
        let milliseconds =
            |metric| cell.median(metric).map_or_else(String::new, |value| format!("{:.1}", value * 1e3));
        let mut row = vec![cell.name(), cell.count.to_string()];
        row.extend([rate.median, rate.minimum, rate.maximum].map(|rate| show("clones_per_second", rate)));
        row.push(cell.rounds.len().to_string());
        row.push(
            cell.median("metadata_bytes_per_file").map_or_else(String::new, |bytes| format!("{bytes:.0}")),
        );
        row.extend(["commit_seconds", "snapshot_seconds"].map(milliseconds));
        table.rows.push(row);
    }
    table
}

fn steps(machine: &Machine<'_>) -> Table {
    let columns =
        ["case", "clones", "create", "clone", "times", "link", "close", "running", "no processor", "asleep"];
    let note = "us of one file in its thread, medians over the rounds; running: on a processor; no processor: ready \
                to run, others were running; asleep: waiting for a lock or a device";
    let mut table = Table::new("Where the time goes", note, &columns);
    let metrics = [
        "create_us",
        "clone_us",
        "times_us",
        "link_us",
        "close_us",
        "running_us",
        "no_processor_us",
        "asleep_us",
    ];
    for cell in &machine.cells {
        let mut row = vec![cell.name(), cell.count.to_string()];
        row.extend(metrics.map(|metric| cell.show(metric)));
        table.rows.push(row);
    }
    table
}

fn afterwards(machine: &Machine<'_>) -> Table {
    let columns = [
        "case",
        "clones",
        "overwrite p50",
        "p90",
        "p99",
        "mount ms",
        "cold open p50",
        "p99",
        "cold read p50",
        "p99",
    ];
    let note = "us unless it says ms, medians over the rounds; overwrite: 4 KiB and fsync in a snapshot; cold: after \
                mounting again";
    let mut table = Table::new("What clones cost afterwards", note, &columns);
    for cell in machine.cells.iter().filter(|cell| cell.threads == 1) {
        let mut row = vec![cell.name(), cell.count.to_string()];
        row.extend(["overwrite_p50_us", "overwrite_p90_us", "overwrite_p99_us"].map(|m| cell.show(m)));
        row.push(
            cell.median("mount_seconds").map_or_else(String::new, |value| format!("{:.1}", value * 1e3)),
        );
        let cold = ["cold_open_p50_us", "cold_open_p99_us", "cold_read_p50_us", "cold_read_p99_us"];
        row.extend(cold.map(|metric| cell.show(metric)));
        table.rows.push(row);
    }
    table
}

fn bars(machine: &Machine<'_>, count: u64, metric: &str) -> Result<String> {
    let bar = |cell: &Cell<'_>| {
        let Spread { minimum, median, maximum } = cell.spread(metric)?;
        Some(Bar { label: cell.name(), minimum, median, maximum })
    };
    let bars: Vec<Bar> = machine.cells.iter().filter(|cell| cell.count == count).filter_map(bar).collect();
    chart::whiskers(&bars, |value| show(metric, value))
}

/// The steps of one file, at the largest number of clones for which threads were compared.
fn stacks(machine: &Machine<'_>) -> Result<String> {
    let threads =
        |count: &u64| machine.cells.iter().filter(|cell| cell.count == *count && cell.threads > 1).count();
    let count = machine.counts().into_iter().max_by_key(|count| (threads(count) > 2, *count));
    let stack = |cell: &Cell<'_>| {
        let parts =
            ["create_us", "clone_us", "link_us"].map(|metric| cell.median(metric).unwrap_or_default());
        let rest = ["times_us", "close_us"].iter().filter_map(|metric| cell.median(metric)).sum();
        Stack { label: cell.name(), parts: [parts.as_slice(), &[rest]].concat() }
    };
    let stacked: Vec<Stack> =
        machine.cells.iter().filter(|cell| Some(cell.count) == count).map(stack).collect();
    let title =
        count.map_or_else(String::new, |count| format!("<h4>{count} clones: us of one file by step</h4>\n"));
    Ok(title + &chart::stacks(&stacked, &STEPS)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::plan::{Arrangement, Layout, Point};

    fn record(layout: Layout, threads: u32, round: u32, rate: f64) -> Record {
        let arrangement = Arrangement::OneSource;
        let point = Point { count: 1000, layout, threads, arrangement, size: 4 << 60 };
        let json = serde_json::json!({
            "bench": "clone", "setting": "1000 clones", "case": point.name(), "round": round,
            "options": point.options(), "metrics": { "clones_per_second": rate, "clone_us": 9.5 },
            "time": 0, "kernel": "6.18", "processors": 2, "loam": "0",
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn ratios_are_of_rounds_that_both_have() {
        let records = [
            record(Layout::Single, 1, 0, 30_000.0),
            record(Layout::SmallExtents, 1, 0, 20_000.0),
            record(Layout::Single, 1, 1, 10_000.0),
            record(Layout::SmallExtents, 1, 1, 20_000.0),
            record(Layout::Single, 1, 2, 1.0),
        ];
        let references: Vec<_> = records.iter().collect();
        let machines = Machine::all(&references);
        let table = answers(&machines[0]);
        assert_eq!(table.rows.len(), 1);
        assert_eq!(table.rows[0][1], "1.00 (0.50 .. 1.50)");
    }

    #[test]
    fn a_report_names_every_case_in_tables_and_charts() {
        let records = [record(Layout::Pair, 1, 0, 30_000.0), record(Layout::Pair, 2, 0, 20_000.0)];
        let references: Vec<_> = records.iter().collect();
        let (text, html) = ((SECTION.text)(&references).unwrap(), (SECTION.html)(&references).unwrap());
        for name in ["pair 4EiB, 1 thread, one-source", "pair 4EiB, 2 threads, one-source"] {
            assert!(text.contains(name) && html.contains(name), "{text}");
        }
        assert!(text.contains("0.67") && html.contains("<svg") && html.contains("20.0 k"), "{text}");
    }
}

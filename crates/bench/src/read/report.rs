//! The report of reads: goals and whether they are reached, which option matters, the best by workload, and for each
//! workload all that was measured, as tables and charts.

mod effects;
mod goals;

use std::fmt::Write as _;

use anyhow::Result;

use super::fio::{PERCENTILES, percentile_metric};
use crate::chart::{self, Curve, Stack};
use crate::report::model::{Cell, Machine, quantile_of, ratios};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "read" && !record.options.is_empty(),
    text: |records| Ok(text(&Machine::all(records))),
    html: |records| html(&Machine::all(records)),
};

/// Who used the processors, in the order of [`cores`].
const CORES: [&str; 3] =
    ["readers, their system calls included", "server", "kernel threads and everything else"];

fn summaries(machine: &Machine<'_>) -> Vec<Table> {
    [goals::table(machine), effects::table(machine), effects::best(machine)].into_iter().flatten().collect()
}

fn text(machines: &[Machine<'_>]) -> String {
    let mut text = String::new();
    for machine in machines {
        let _ = writeln!(text, "read: {}\n", machine.name);
        for table in summaries(machine) {
            text.push_str(&table.text());
        }
        for setting in machine.settings() {
            text.push_str(&cells(machine, setting).text());
            text.extend(to_references(machine, setting).iter().map(Table::text));
        }
    }
    text
}

fn html(machines: &[Machine<'_>]) -> Result<String> {
    let mut page = String::new();
    for machine in machines {
        let _ = writeln!(page, "<h2>Random reads of 4 KiB: {}</h2>", escape(&machine.name));
        for table in summaries(machine) {
            page.push_str(&table.html(3));
        }
        for setting in machine.settings() {
            page.push_str(&cells(machine, setting).html(3));
            page.extend(to_references(machine, setting).iter().map(|table| table.html(4)));
            page.push_str(&charts(machine, setting)?);
        }
    }
    Ok(page)
}

fn cores(cell: &Cell<'_>) -> [f64; 3] {
    let median = |metric| cell.median(metric).unwrap_or_default();
    [
        median("reader_user_cores") + median("reader_system_cores"),
        median("server_user_cores") + median("server_system_cores"),
        median("kernel_cores"),
    ]
}

/// All cells of a workload, the fastest first.
fn sorted<'m, 'a>(machine: &'m Machine<'a>, setting: &str) -> Vec<&'m Cell<'a>> {
    let mut cells: Vec<_> = machine.cells.iter().filter(|cell| cell.setting == setting).collect();
    let rate = |cell: &Cell<'_>| cell.median("iops").unwrap_or_default();
    cells.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    cells
}

fn cells(machine: &Machine<'_>, setting: &str) -> Table {
    let columns = [
        "target",
        "reads/s",
        "min",
        "max",
        "n",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "CPU us/read",
        "readers",
        "server",
        "kernel",
        "data path",
    ];
    let note = "medians over the rounds; readers, server and kernel: processors in use";
    let mut table = Table::new(setting, note, &columns);
    for cell in sorted(machine, setting) {
        let quantile = |q| cell.quantile("iops", q).map_or(String::new(), |rate| show("iops", rate));
        let median = |metric: &str| cell.median(metric).map_or(String::new(), |value| format!("{value:.1}"));
        let mut row = vec![machine.label(cell), quantile(0.5), quantile(0.0), quantile(1.0)];
        row.push(cell.rounds.len().to_string());
        row.extend(["p50_us", "p99_us", "p99.9_us", "cpu_us_per_read"].map(median));
        row.extend(cores(cell).map(|cores| format!("{cores:.2}")));
        row.push(cell.facts.get("data_path").cloned().unwrap_or_default());
        table.rows.push(row);
    }
    table
}

/// Reads a second of loam's cells in parts of each reference's: devices beside devices, files beside files.
fn to_references(machine: &Machine<'_>, setting: &str) -> Vec<Table> {
    let cells = sorted(machine, setting);
    let mut tables = Vec::new();
    for (is_device, kind) in [(true, "devices"), (false, "files")] {
        let of = |is_loam| {
            cells.iter().filter(move |cell| cell.is_loam() == is_loam && cell.is_device() == is_device)
        };
        let references: Vec<&&Cell<'_>> = of(false).collect();
        let columns: Vec<&str> = std::iter::once("").chain(references.iter().map(|cell| cell.case)).collect();
        let title = format!("{setting}: {kind}, relative to");
        let mut table = Table::new(title, "medians of the rounds' own ratios", &columns);
        for cell in of(true) {
            let ratio = |reference: &&&Cell<'_>| {
                let ratio = quantile_of(&ratios(cell, reference, "iops"), 0.5);
                ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"))
            };
            table
                .rows
                .push(std::iter::once(machine.label(cell)).chain(references.iter().map(ratio)).collect());
        }
        if !table.rows.is_empty() && !references.is_empty() {
            tables.push(table);
        }
    }
    tables
}

fn charts(machine: &Machine<'_>, setting: &str) -> Result<String> {
    let cells = sorted(machine, setting);
    let mut page = String::new();
    let bars: Vec<chart::Bar> = cells
        .iter()
        .filter_map(|cell| {
            let [minimum, median, maximum] = [0.0, 0.5, 1.0].map(|q| cell.quantile("iops", q));
            Some(chart::Bar {
                label: machine.label(cell),
                minimum: minimum?,
                median: median?,
                maximum: maximum?,
            })
        })
        .collect();
    let references: Vec<String> =
        cells.iter().filter(|cell| !cell.is_loam()).map(|cell| machine.label(cell)).collect();
    page.push_str(&chart::whiskers_beside(&bars, &references, |rate| show("iops", rate))?);
    let curves: Vec<Curve> = cells
        .iter()
        .map(|cell| Curve {
            label: machine.label(cell),
            points: PERCENTILES
                .iter()
                .filter_map(|percentile| Some((*percentile, cell.median(&percentile_metric(*percentile))?)))
                .collect(),
        })
        .collect();
    let _ = writeln!(page, "<p>Latency in us by percentile:</p>");
    page.push_str(&chart::curves(&curves)?);
    let stacks: Vec<Stack> =
        cells.iter().map(|cell| Stack { label: machine.label(cell), parts: cores(cell).to_vec() }).collect();
    let _ = writeln!(page, "<p>Processors in use:</p>");
    page.push_str(&chart::stacks(&stacks, &CORES)?);
    Ok(page)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::read::target::{Reference, Target};
    use crate::record::Record;
    use loam_block::size::ByteSize;

    fn record(target: &Target, workload: &str, round: u32, iops: f64) -> Record {
        let workload: crate::read::workload::Workload = workload.parse().unwrap();
        let mut options = target.options();
        options.extend(workload.options());
        let mut metrics = BTreeMap::from([("iops".to_string(), iops)]);
        metrics
            .extend(PERCENTILES.map(|percentile| (percentile_metric(percentile), percentile + iops / 1e3)));
        Record {
            bench: "read".into(),
            setting: workload.to_string(),
            case: target.to_string(),
            round,
            options,
            metrics,
            facts: BTreeMap::new(),
            unavailable: None,
            time: 0,
            kernel: "6.12".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    /// What the standard preset measures, as it would be named.
    fn targets() -> [Target; 4] {
        let plan = crate::read::plan::standard_targets(ByteSize(1 << 20));
        let named = |name: &str| *plan.iter().find(|target| target.to_string() == name).unwrap();
        let reference = |kind| Target::Reference { kind, size: ByteSize(1 << 20) };
        let (memory, cache) = (named("loam ublk pair memory 4EiB"), named("loam ublk pair cache 4EiB"));
        [memory, cache, reference(Reference::BtrfsRublkLoop), reference(Reference::BtrfsBrd)]
    }

    #[test]
    fn a_lost_goal_comes_first_and_an_option_that_matters_is_named() {
        let mut records = Vec::new();
        for round in 0..6 {
            let drift = 1.0 + f64::from(round) / 10.0;
            for (target, rate) in targets().iter().zip([1000.0, 500.0, 900.0, 1200.0]) {
                for workload in ["psync:1", "io_uring:1x64"] {
                    records.push(record(target, workload, round, rate * drift));
                }
            }
        }
        let references: Vec<&Record> = records.iter().collect();
        let text = (SECTION.text)(&references).unwrap();
        let line = |start: &str| text.lines().position(|line| line.contains(start)).expect(start);
        assert!(line("LOST") < line("not measured"), "{text}");
        assert!(
            text.contains("1.11") && text.contains("0.83"),
            "ratios to rublk and to the RAM disk: {text}"
        );
        let effect = text.lines().find(|line| line.contains("content cache")).unwrap();
        assert!(effect.contains("0.50") && effect.ends_with("  matters"), "{effect}");
        let html = (SECTION.html)(&references).unwrap();
        assert!(html.matches("<svg").count() == 6 && html.contains("btrfs-brd"));
    }

    #[test]
    fn every_goal_is_about_cells_of_the_standard_preset() {
        let names: Vec<String> =
            crate::read::plan::standard_targets(ByteSize(1 << 20)).iter().map(Target::to_string).collect();
        for name in goals::names() {
            assert!(names.iter().any(|known| known == name), "{name} is not among {names:?}");
        }
    }
}

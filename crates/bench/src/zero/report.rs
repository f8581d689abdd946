//! The report of copies with holes: goals, then for each kind of server the time and the commands by size of hole.

use std::fmt::Write as _;

use anyhow::Result;
use loam_block::size::ByteSize;

use super::plan::{AUTO, Copier, PEERS, Zeroing, setting};
use crate::chart::{self, Curve};
use crate::nbd::server::Kind;
use crate::report::model::{Cell, Machine, quantile_of, ratios};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "zero",
    text: |records| Ok(text(&Machine::all(records))),
    html: |records| html(&Machine::all(records)),
};

const SERVERS: [Kind; 2] = [Kind::Loam, Kind::Nbdkit];
/// The case study: its size of hole and image, and the best time of others with each kind of zeroing.
const STUDY_HOLE: u64 = 1 << 20;
const STUDY_SIZE: &str = "104857600";
const STUDY: [(Zeroing, f64); 3] = [(Zeroing::Fast, 0.30), (Zeroing::Slow, 0.58), (Zeroing::None, 0.71)];
/// Commands beside one for each run of data, where zeroing is fast.
const COMMANDS_BESIDE: f64 = 2.0;

fn auto<'m, 'a>(machine: &'m Machine<'a>, setting: &str) -> Option<&'m Cell<'a>> {
    machine.cell(&Copier::Loam(AUTO).to_string(), setting)
}

/// The others' faster one, by medians.
fn best<'m, 'a>(machine: &'m Machine<'a>, setting: &str) -> Option<&'m Cell<'a>> {
    let cells = PEERS.iter().filter_map(|peer| machine.cell(&peer.to_string(), setting));
    let timed = cells.filter_map(|cell| Some((cell, cell.median("copy_seconds")?)));
    timed.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(cell, _)| cell)
}

/// Sizes of holes of which there is anything, the smallest first.
fn holes(machine: &Machine<'_>) -> Vec<u64> {
    let mut holes: Vec<u64> =
        machine.cells.iter().filter_map(|cell| cell.option("hole_bytes").parse().ok()).collect();
    holes.sort_unstable();
    holes.dedup();
    holes
}

fn goals(machine: &Machine<'_>) -> Table {
    let note = "loam auto; its time as a part of that of the faster of the others: median of the rounds' own ratios; \
                commands: the most of all rounds";
    let columns = ["server", "seconds", "goal", "others' faster", "of its time", "commands", "goal", ""];
    let mut table = Table::new("Zeroes: goals", note, &columns);
    for server in SERVERS {
        for (zeroing, seconds_max) in STUDY {
            for hole in holes(machine) {
                let setting = setting(server, zeroing, hole);
                let Some(cell) = auto(machine, &setting) else { continue };
                let seconds = cell.median("copy_seconds").unwrap_or(f64::INFINITY);
                let is_study = hole == STUDY_HOLE && cell.option("size_bytes") == STUDY_SIZE;
                let commands = cell.quantile("commands", 1.0).unwrap_or(f64::INFINITY);
                let most = cell.median("data_runs").unwrap_or_default() + COMMANDS_BESIDE;
                let is_fast = zeroing == Zeroing::Fast;
                let best = best(machine, &setting);
                let ratio = best.and_then(|best| quantile_of(&ratios(cell, best, "copy_seconds"), 0.5));
                let is_met = (!is_study || seconds <= seconds_max) && (!is_fast || commands <= most);
                let or_nothing = |is: bool, text: String| if is { text } else { String::new() };
                table.rows.push(vec![
                    setting.clone(),
                    format!("{seconds:.2}"),
                    or_nothing(is_study, format!("{seconds_max:.2}")),
                    best.map_or(String::new(), |best| best.case.to_string()),
                    ratio.map_or(String::new(), |ratio| format!("{ratio:.2}")),
                    format!("{commands}"),
                    or_nothing(is_fast, format!("{most}")),
                    match (is_study || is_fast, is_met) {
                        (false, _) => "",
                        (true, true) => "met",
                        (true, false) => "LOST",
                    }
                    .to_string(),
                ]);
            }
        }
    }
    table
}

/// Seconds and commands of all copiers, by size of hole.
fn all(machine: &Machine<'_>, server: Kind, zeroing: Zeroing) -> Table {
    let holes = holes(machine);
    let columns: Vec<String> = std::iter::once("holes of".to_string())
        .chain(Copier::all().iter().map(ToString::to_string))
        .collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let note = "medians of seconds; in brackets writes + zeroes, and how many of the zeroes were refused";
    let mut table = Table::new(format!("{server}, {zeroing}"), note, &columns);
    for hole in holes {
        let setting = setting(server, zeroing, hole);
        let cells: Vec<_> =
            Copier::all().iter().map(|copier| machine.cell(&copier.to_string(), &setting)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let shown = |cell: Option<&Cell<'_>>| cell.map_or(String::new(), show_cell);
        table
            .rows
            .push(std::iter::once(ByteSize(hole).to_string()).chain(cells.into_iter().map(shown)).collect());
    }
    table
}

fn show_cell(cell: &Cell<'_>) -> String {
    let median = |metric| cell.median(metric).unwrap_or_default();
    let refused = median("refused_zeroes");
    let refused = if refused > 0.0 { format!(", {refused}") } else { String::new() };
    format!(
        "{:.2} ({} + {}{refused})",
        median("copy_seconds"),
        median("writes"),
        median("zeroes") + median("trims")
    )
}

fn tables(machine: &Machine<'_>) -> Vec<(Kind, Zeroing, Table)> {
    let mut tables = Vec::new();
    for server in SERVERS {
        for zeroing in Zeroing::ALL {
            let table = all(machine, server, zeroing);
            if !table.rows.is_empty() {
                tables.push((server, zeroing, table));
            }
        }
    }
    tables
}

fn text(machines: &[Machine<'_>]) -> String {
    let mut text = String::new();
    for machine in machines {
        let _ = writeln!(text, "zero: {}\n", machine.name);
        text.push_str(&goals(machine).text());
        text.extend(tables(machine).iter().map(|(_, _, table)| table.text()));
    }
    text
}

fn html(machines: &[Machine<'_>]) -> Result<String> {
    let mut page = String::new();
    for machine in machines {
        let _ = writeln!(page, "<h2>Copies with holes: {}</h2>", escape(&machine.name));
        page.push_str(&goals(machine).html(3));
        for (server, zeroing, table) in tables(machine) {
            page.push_str(&table.html(3));
            page.push_str(&plot(machine, server, zeroing)?);
        }
    }
    Ok(page)
}

/// Seconds by size of hole; bars where there is but one size.
fn plot(machine: &Machine<'_>, server: Kind, zeroing: Zeroing) -> Result<String> {
    let holes = holes(machine);
    let copiers = Copier::all();
    if let [hole] = holes[..] {
        let setting = setting(server, zeroing, hole);
        let cells = copiers.iter().filter_map(|copier| machine.cell(&copier.to_string(), &setting));
        let bar = |cell: &Cell<'_>| {
            let [minimum, median, maximum] =
                [0.0, 0.5, 1.0].map(|q| cell.quantile("copy_seconds", q).unwrap_or_default());
            chart::Bar { label: cell.case.to_string(), minimum, median, maximum }
        };
        let bars: Vec<_> = cells.map(bar).collect();
        return chart::whiskers_beside(&bars, &PEERS.map(|peer| peer.to_string()), |s| {
            show("copy_seconds", s)
        });
    }
    let steps: Vec<String> = holes.iter().map(|hole| ByteSize(*hole).to_string()).collect();
    let point = |copier: &Copier, step: usize| {
        let cell = machine.cell(&copier.to_string(), &setting(server, zeroing, holes[step]))?;
        Some((step as f64, cell.median("copy_seconds")?))
    };
    let curve = |copier: &Copier| Curve {
        label: copier.to_string(),
        points: (0..holes.len()).filter_map(|step| point(copier, step)).collect(),
    };
    let curves: Vec<Curve> = copiers.iter().map(curve).collect();
    Ok(format!("<p>Seconds by size of hole:</p>\n{}", chart::lines(&curves, &steps)?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::record::Record;
    use crate::zero::plan::Point;

    fn record(point: Point, seconds: f64, commands: f64) -> Record {
        let case = point.case(0);
        let metrics = [
            ("copy_seconds", seconds),
            ("commands", commands),
            ("writes", commands - 1.0),
            ("zeroes", 1.0),
            ("data_runs", point.data_runs() as f64),
        ];
        Record {
            bench: case.bench.into(),
            setting: case.setting,
            case: case.case,
            round: 0,
            options: case.options,
            metrics: metrics.map(|(name, value)| (name.to_string(), value)).into(),
            facts: BTreeMap::new(),
            unavailable: None,
            time: 0,
            kernel: "6.12".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    fn report(hole: u64, seconds: f64, commands: f64) -> (String, String) {
        let mut records = Vec::new();
        for (server, zeroing) in [(Kind::Nbdkit, Zeroing::Fast), (Kind::Loam, Zeroing::Slow)] {
            for copier in Copier::all() {
                records.push(record(
                    Point { server, zeroing, hole, size: 100 << 20, copier },
                    seconds,
                    commands,
                ));
            }
        }
        let records: Vec<&Record> = records.iter().collect();
        ((SECTION.text)(&records).unwrap(), (SECTION.html)(&records).unwrap())
    }

    #[test]
    fn the_case_study_is_judged_by_time_and_commands() {
        let (text, html) = report(STUDY_HOLE, 0.29, 52.0);
        assert_eq!((text.matches("  met").count(), text.matches("LOST").count()), (2, 0), "{text}");
        assert_eq!(html.matches("<svg").count(), 2);
        let (text, _) = report(STUDY_HOLE, 0.29, 53.0);
        assert_eq!((text.matches("  met").count(), text.matches("LOST").count()), (1, 1), "{text}");
        let (text, _) = report(STUDY_HOLE, 0.57, 52.0);
        assert_eq!((text.matches("  met").count(), text.matches("LOST").count()), (1, 1), "{text}");
        let (text, _) = report(4 << 20, 9.0, 15.0);
        assert_eq!((text.matches("  met").count(), text.matches("LOST").count()), (1, 0), "{text}");
    }
}

//! The report of copies: for each pair of ends what each copier took, and loam's copier beside the faster of the others.

use std::fmt::Write as _;

use anyhow::Result;

use super::copy::Copier;
use crate::chart::{self, Bar};
use crate::report::model::{Cell, Machine, quantile_of, ratios};
use crate::report::{Section, Table, escape, show};

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "copy",
    text: |records| Ok(text(&Machine::all(records))),
    html: |records| html(&Machine::all(records)),
};

/// Of the time, and of all processors, of the faster of the others.
const SECONDS_MAX: f64 = 1.0;
const CPU_MAX: f64 = 0.8;

/// The others' faster one between a pair of ends, by medians.
fn best<'m, 'a>(machine: &'m Machine<'a>, setting: &str) -> Option<&'m Cell<'a>> {
    let own = Copier::Loam.to_string();
    let peers = machine.cells.iter().filter(|cell| cell.setting == setting && cell.case != own);
    let timed = peers.filter_map(|cell| Some((cell, cell.median("copy_seconds")?)));
    timed.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(cell, _)| cell)
}

fn goals(machine: &Machine<'_>) -> Table {
    let note = "loam copy in parts of the faster of the others: medians of the rounds' own ratios; CPU is that of copier \
                and servers together; goals: 1.00 of the time, 0.80 of the CPU";
    let columns = ["from, to", "the others' faster", "time", "CPU", "rounds", ""];
    let mut table = Table::new("Copies: goals", note, &columns);
    for setting in machine.settings() {
        let own = machine.cell(&Copier::Loam.to_string(), setting);
        let Some((own, best)) = own.zip(best(machine, setting)) else { continue };
        let ratio = |metric| quantile_of(&ratios(own, best, metric), 0.5);
        let (time, cpu) = (ratio("copy_seconds"), ratio("total_cpu_seconds"));
        let is_met = time.is_some_and(|time| time <= SECONDS_MAX) && cpu.is_some_and(|cpu| cpu <= CPU_MAX);
        let shown = |ratio: Option<f64>| ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let verdict = if is_met { "met" } else { "LOST" };
        let rounds = own.rounds.len().to_string();
        table.rows.push(vec![
            setting.to_string(),
            best.case.to_string(),
            shown(time),
            shown(cpu),
            rounds,
            verdict.to_string(),
        ]);
    }
    table
}

fn all(machine: &Machine<'_>) -> Table {
    let note =
        "medians of seconds; in brackets seconds of CPU: the copier's, and those of copier and servers";
    let columns: Vec<String> =
        std::iter::once("from, to".to_string()).chain(Copier::ALL.map(|copier| copier.to_string())).collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new("Copies of a half sparse image", note, &columns);
    for setting in machine.settings() {
        let shown = |copier: Copier| {
            let cell = machine.cell(&copier.to_string(), setting);
            let values = ["copy_seconds", "copier_cpu_seconds", "total_cpu_seconds"];
            let values = cell.map(|cell| values.map(|metric| cell.median(metric).unwrap_or_default()));
            values
                .map_or(String::new(), |[time, copier, total]| format!("{time:.2} ({copier:.2}, {total:.2})"))
        };
        table.rows.push(std::iter::once(setting.to_string()).chain(Copier::ALL.map(shown)).collect());
    }
    table
}

fn text(machines: &[Machine<'_>]) -> String {
    let mut text = String::new();
    for machine in machines {
        let _ = writeln!(text, "copy: {}\n", machine.name);
        text.push_str(&goals(machine).text());
        text.push_str(&all(machine).text());
    }
    text
}

fn html(machines: &[Machine<'_>]) -> Result<String> {
    let mut page = String::new();
    for machine in machines {
        let _ = writeln!(page, "<h2>Copies: {}</h2>", escape(&machine.name));
        page.push_str(&goals(machine).html(3));
        page.push_str(&all(machine).html(3));
        for metric in ["copy_seconds", "total_cpu_seconds"] {
            let what = if metric == "copy_seconds" { "Time" } else { "CPU of copier and servers" };
            let _ = writeln!(page, "<p>{what}:</p>");
            let (mut bars, mut peers) = (Vec::new(), Vec::new());
            for setting in machine.settings() {
                for cell in Copier::ALL.iter().filter_map(|copier| machine.cell(&copier.to_string(), setting))
                {
                    let [minimum, median, maximum] =
                        [0.0, 0.5, 1.0].map(|q| cell.quantile(metric, q).unwrap_or_default());
                    let label = format!("{setting}, {}", cell.case);
                    if cell.case != Copier::Loam.to_string() {
                        peers.push(label.clone());
                    }
                    bars.push(Bar { label, minimum, median, maximum });
                }
            }
            page.push_str(&chart::whiskers_beside(&bars, &peers, |value| show(metric, value))?);
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::record::Record;

    fn record(copier: Copier, setting: &str, round: u32, seconds: f64, cpu: f64) -> Record {
        let metrics =
            [("copy_seconds", seconds), ("copier_cpu_seconds", cpu / 2.0), ("total_cpu_seconds", cpu)];
        Record {
            bench: "copy".into(),
            setting: setting.into(),
            case: copier.to_string(),
            round,
            options: BTreeMap::new(),
            metrics: metrics.map(|(name, value)| (name.to_string(), value)).into(),
            facts: BTreeMap::new(),
            unavailable: None,
            time: 0,
            kernel: "6.12".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    #[test]
    fn loam_is_measured_by_the_faster_of_the_others() {
        let mut records = Vec::new();
        for round in 0..3 {
            records.push(record(Copier::Nbdcopy, "file to file", round, 2.0, 1.0));
            records.push(record(Copier::QemuImg, "file to file", round, 1.0, 4.0));
            records.push(record(Copier::Loam, "file to file", round, 0.9, 3.0));
            records.push(record(Copier::Nbdcopy, "loam to file", round, 1.0, 1.0));
            records.push(record(Copier::Loam, "loam to file", round, 0.9, 0.9));
        }
        let records: Vec<&Record> = records.iter().collect();
        let text = (SECTION.text)(&records).unwrap();
        let line =
            |start: &str| text.lines().find(|line| line.trim().starts_with(start)).unwrap().to_string();
        assert!(
            line("file to file").contains("qemu-img -W  0.90  0.75") && line("file to file").ends_with("met"),
            "{text}"
        );
        assert!(line("loam to file").ends_with("LOST"), "{text}");
        assert_eq!((SECTION.html)(&records).unwrap().matches("<svg").count(), 2);
    }
}

//! Reports: what results come to, as tables on the terminal and as one HTML file that needs nothing else. A kind of
//! benchmark that has more to say than medians brings a [`Section`] of its own; all others share the generic one.

mod generic;
pub(crate) mod model;
mod table;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::record::{Record, load};

pub(crate) use generic::{Comparison, Spread};
pub(crate) use table::Table;

/// `loam bench report`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files of JSON lines that benchmarks wrote.
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// Also write this file, with charts.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What a kind of benchmark brings to the report.
pub(crate) struct Section {
    /// Whether a record belongs to it. Records go to the first section that takes them.
    pub(crate) takes: fn(&Record) -> bool,
    /// For the terminal, from at least one record.
    pub(crate) text: fn(&[&Record]) -> Result<String>,
    /// For the page: headings from `<h2>` on, tables, inline SVG.
    pub(crate) html: fn(&[&Record]) -> Result<String>,
}

/// In the order of the report.
const SECTIONS: &[Section] = &[
    crate::read::SECTION,
    crate::clone::SECTION,
    crate::nbd::LOAD_SECTION,
    crate::nbd::COPY_SECTION,
    crate::zero::SECTION,
    crate::quota::SECTION,
    generic::SECTION,
];

/// Runs the report.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut records = Vec::new();
    for path in &options.results {
        records.extend(load(path)?);
    }
    if records.is_empty() {
        bail!("there are no results in {}", options.results[0].display());
    }
    for (section, taken) in sections(&records) {
        print!("{}", (section.text)(&taken)?);
    }
    for line in unavailable(&records) {
        println!("not available: {line}");
    }
    if let Some(path) = &options.html {
        report(&records, path)?;
        eprintln!("{}: written", path.display());
    }
    Ok(())
}

/// Writes the HTML report of `records` to `path`.
///
/// # Errors
/// The file cannot be written.
pub fn report(records: &[Record], path: &Path) -> Result<()> {
    std::fs::write(path, html(records)?).with_context(|| format!("cannot write {}", path.display()))
}

/// Each section that has records, with them.
fn sections(records: &[Record]) -> Vec<(&'static Section, Vec<&Record>)> {
    let mut taken: Vec<(&Section, Vec<&Record>)> =
        SECTIONS.iter().map(|section| (section, Vec::new())).collect();
    for record in records.iter().filter(|record| record.unavailable.is_none()) {
        if let Some((_, records)) = taken.iter_mut().find(|(section, _)| (section.takes)(record)) {
            records.push(record);
        }
    }
    taken.retain(|(_, records)| !records.is_empty());
    taken
}

/// What could not be run, and why: a line for each case and reason.
fn unavailable(records: &[Record]) -> Vec<String> {
    let mut lines = Vec::new();
    for record in records {
        let Some(reason) = &record.unavailable else { continue };
        let line = format!("{}, {} (Linux {}): {reason}", record.bench, record.case, record.kernel);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// A value for people, by the unit at the end of its metric's name.
pub(crate) fn show(metric: &str, value: f64) -> String {
    if metric.ends_with("_bytes") {
        return format!("{:.2} MB", value / 1e6);
    }
    if metric.ends_with("_seconds") {
        return if value < 0.1 { format!("{:.1} ms", value * 1e3) } else { format!("{value:.2} s") };
    }
    if metric.ends_with("_us") {
        return format!("{value:.1} us");
    }
    match value {
        10_000.0.. => format!("{:.1} k", value / 1e3),
        1_000.0.. => format!("{:.2} k", value / 1e3),
        _ => format!("{value:.2}").replace(".00", ""),
    }
}

/// What text means in HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn html(records: &[Record]) -> Result<String> {
    let mut page = String::from(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>loam benchmarks</title>\n<style>\n\
         body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }\n\
         table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }\n\
         td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f4f4f4; }\n\
         svg { max-width: 100%; height: auto; }\n</style>\n<h1>loam benchmarks</h1>\n",
    );
    let mut machines: Vec<String> = Vec::new();
    for Record { kernel, processors, loam, .. } in records {
        let machine = format!("Linux {kernel}, {processors} processors, loam {loam}");
        if !machines.contains(&machine) {
            machines.push(machine);
        }
    }
    let _ = writeln!(
        page,
        "<p>{}. Bars are medians, whiskers minimum and maximum; ratios are medians of the rounds' own.</p>",
        escape(&machines.join("; "))
    );
    for (section, taken) in sections(records) {
        page.push_str(&(section.html)(&taken)?);
    }
    let missing = unavailable(records);
    if !missing.is_empty() {
        let items: String = missing.iter().map(|line| format!("<li>{}\n", escape(line))).collect();
        let _ = writeln!(page, "<h2>Not available on this machine</h2>\n<ul>\n{items}</ul>");
    }
    page.push_str("</html>\n");
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Metrics;

    fn record(case: &str, round: u32, value: f64) -> Record {
        Record {
            bench: "start".into(),
            setting: "20ms,100mbit".into(),
            case: case.into(),
            round,
            options: std::collections::BTreeMap::new(),
            metrics: Metrics::from([("total_seconds".into(), value)]),
            facts: std::collections::BTreeMap::new(),
            unavailable: None,
            time: 0,
            kernel: "6.18".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    #[test]
    fn a_report_is_one_file_with_every_case_in_it() {
        let records = [record("a<b>", 0, 0.5), record("curl", 0, 8.0), record("curl", 1, 9.0)];
        let page = html(&records).unwrap();
        assert!(page.contains("<svg") && page.contains("a&lt;b&gt;") && page.contains("8.50 s"), "{page}");
        assert!(!page.contains("a<b>") && !page.contains("src="));
        let (section, taken) = &sections(&records)[0];
        assert!((section.text)(taken).unwrap().contains("0.50 s"));
    }
}

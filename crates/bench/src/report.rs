//! Reports: medians of each metric of each comparison, as tables on the terminal and as one HTML file that needs
//! nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::chart;
use crate::record::{Record, load};

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

/// The spread of one metric of one case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) minimum: f64,
    pub(crate) median: f64,
    pub(crate) maximum: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (minimum, maximum) = (*values.first()?, *values.last()?);
        let (upper, lower) = (values[values.len() / 2], values[(values.len() - 1) / 2]);
        Some(Spread { count: values.len(), minimum, median: f64::midpoint(lower, upper), maximum })
    }
}

/// One comparison: a metric of several cases under one setting.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) bench: String,
    pub(crate) setting: String,
    pub(crate) metric: String,
    /// In the order in which the cases were first measured.
    pub(crate) cases: Vec<(String, Spread)>,
}

/// Runs the report.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut records = Vec::new();
    for path in &options.results {
        records.extend(load(path)?);
    }
    if records.is_empty() {
        bail!("there are no results in {}", options.results[0].display());
    }
    let comparisons = compare(&records);
    print!("{}", table(&comparisons));
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
    let html = html(records, &compare(records))?;
    std::fs::write(path, html).with_context(|| format!("cannot write {}", path.display()))
}

/// Groups records by what can be compared, in the order in which it was first measured.
fn compare(records: &[Record]) -> Vec<Comparison> {
    type Values<'a> = Vec<(&'a str, Vec<f64>)>;
    let mut order = Vec::new();
    let mut groups: BTreeMap<(&str, &str, &str), Values<'_>> = BTreeMap::new();
    for record in records {
        for (metric, value) in &record.metrics {
            let key = (record.bench.as_str(), record.setting.as_str(), metric.as_str());
            let cases = groups.entry(key).or_insert_with(|| {
                order.push(key);
                Values::new()
            });
            match cases.iter_mut().find(|(case, _)| *case == record.case) {
                Some((_, values)) => values.push(*value),
                None => cases.push((&record.case, vec![*value])),
            }
        }
    }
    let comparison = |key: (&str, &str, &str)| Comparison {
        bench: key.0.to_string(),
        setting: key.1.to_string(),
        metric: key.2.to_string(),
        cases: groups[&key]
            .iter()
            .filter_map(|(case, values)| Some(((*case).to_string(), Spread::of(values.clone())?)))
            .collect(),
    };
    order.into_iter().map(comparison).collect()
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
    if value >= 10_000.0 { format!("{:.1} k", value / 1e3) } else { format!("{value:.2}").replace(".00", "") }
}

fn table(comparisons: &[Comparison]) -> String {
    let mut text = String::new();
    for comparison in comparisons {
        let Comparison { bench, setting, metric, cases } = comparison;
        let _ = writeln!(text, "{bench}, {setting}: {metric}");
        for (case, spread) in cases {
            let [low, middle, high] =
                [spread.minimum, spread.median, spread.maximum].map(|v| show(metric, v));
            let _ = writeln!(text, "  {case:<34} {middle:>12}  ({low} .. {high}, n = {})", spread.count);
        }
    }
    text
}

/// What text means in HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn html(records: &[Record], comparisons: &[Comparison]) -> Result<String> {
    let mut page = String::from(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>loam benchmarks</title>\n<style>\n\
         body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }\n\
         table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }\n\
         td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f4f4f4; }\n\
         svg { max-width: 100%; height: auto; }\n</style>\n<h1>loam benchmarks</h1>\n",
    );
    if let Some(first) = records.first() {
        let Record { kernel, processors, loam, .. } = first;
        let (kernel, loam) = (escape(kernel), escape(loam));
        let _ = writeln!(
            page,
            "<p>Linux {kernel}, {processors} processors, loam {loam}. Bars are medians, whiskers \
                                minimum and maximum.</p>"
        );
    }
    for comparison in comparisons {
        let Comparison { bench, setting, metric, cases } = comparison;
        let title = [bench, setting, metric].map(|part| escape(part));
        let _ = writeln!(page, "<h2>{}, {}: {}</h2>", title[0], title[1], title[2]);
        page.push_str(&chart::bars(comparison)?);
        page.push_str("<table><tr><th>case<th>median<th>min<th>max<th>n</tr>\n");
        for (case, spread) in cases {
            let [low, middle, high] =
                [spread.minimum, spread.median, spread.maximum].map(|v| show(metric, v));
            let case = escape(case);
            let _ = writeln!(page, "<tr><td>{case}<td>{middle}<td>{low}<td>{high}<td>{}</tr>", spread.count);
        }
        page.push_str("</table>\n");
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
            metrics: Metrics::from([("total_seconds".into(), value)]),
            time: 0,
            kernel: "6.18".into(),
            processors: 2,
            loam: "0".into(),
        }
    }

    #[test]
    fn a_spread_is_ordered_whatever_the_order_of_rounds() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!(spread, Spread { count: 4, minimum: 1.0, median: 2.5, maximum: 10.0 });
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn a_report_is_one_file_with_every_case_in_it() {
        let records = [record("a<b>", 0, 0.5), record("curl", 0, 8.0), record("curl", 1, 9.0)];
        let comparisons = compare(&records);
        assert_eq!(comparisons.len(), 1);
        let page = html(&records, &comparisons).unwrap();
        assert!(page.contains("<svg") && page.contains("a&lt;b&gt;") && page.contains("8.50 s"), "{page}");
        assert!(!page.contains("a<b>") && !page.contains("src="));
        assert!(table(&comparisons).contains("0.50 s"));
    }
}

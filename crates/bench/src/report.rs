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
    /// The median, over rounds, of this case's value divided by that of the first case in the same round.
    pub(crate) ratio: Option<f64>,
}

impl Spread {
    /// Of values by round; `first` are those of the case to compare with.
    fn of(values: &BTreeMap<u32, f64>, first: &BTreeMap<u32, f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.values().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let ratio = |(round, value): (&u32, &f64)| first.get(round).map(|first| value / first);
        let mut ratios: Vec<f64> =
            values.iter().filter_map(ratio).filter(|ratio| ratio.is_finite()).collect();
        ratios.sort_by(f64::total_cmp);
        Some(Spread {
            count: sorted.len(),
            minimum: *sorted.first()?,
            median: median(&sorted)?,
            maximum: *sorted.last()?,
            ratio: median(&ratios),
        })
    }

    /// For tables: `0.57 x`, or nothing where there is nothing to compare with.
    fn show_ratio(&self) -> String {
        self.ratio.map(|ratio| format!("{ratio:.2} x")).unwrap_or_default()
    }
}

/// Of sorted values.
fn median(sorted: &[f64]) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    Some(f64::midpoint(sorted[last / 2], sorted[sorted.len() / 2]))
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
    type Values<'a> = Vec<(&'a str, BTreeMap<u32, f64>)>;
    let mut order = Vec::new();
    let mut groups: BTreeMap<(&str, &str, &str), Values<'_>> = BTreeMap::new();
    for record in records {
        for (metric, value) in &record.metrics {
            let key = (record.bench.as_str(), record.setting.as_str(), metric.as_str());
            let cases = groups.entry(key).or_insert_with(|| {
                order.push(key);
                Values::new()
            });
            let position = cases.iter().position(|(case, _)| *case == record.case).unwrap_or_else(|| {
                cases.push((&record.case, BTreeMap::new()));
                cases.len() - 1
            });
            cases[position].1.insert(record.round, *value);
        }
    }
    let comparison = |key: (&str, &str, &str)| Comparison {
        bench: key.0.to_string(),
        setting: key.1.to_string(),
        metric: key.2.to_string(),
        cases: groups[&key]
            .iter()
            .filter_map(|(case, values)| Some(((*case).to_string(), Spread::of(values, &groups[&key][0].1)?)))
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
            let (count, ratio) = (spread.count, spread.show_ratio());
            let _ = writeln!(text, "  {case:<34} {middle:>12} {ratio:>9}  ({low} .. {high}, n = {count})");
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
            "<p>Linux {kernel}, {processors} processors, loam {loam}. Bars are medians, whiskers minimum and maximum; \
             ratios are medians of the rounds' own, to the first case.</p>"
        );
    }
    for comparison in comparisons {
        let Comparison { bench, setting, metric, cases } = comparison;
        let title = [bench, setting, metric].map(|part| escape(part));
        let _ = writeln!(page, "<h2>{}, {}: {}</h2>", title[0], title[1], title[2]);
        page.push_str(&chart::bars(comparison)?);
        page.push_str("<table><tr><th>case<th>median<th>ratio<th>min<th>max<th>n</tr>\n");
        for (case, spread) in cases {
            let [low, middle, high] =
                [spread.minimum, spread.median, spread.maximum].map(|v| show(metric, v));
            let (case, count, ratio) = (escape(case), spread.count, spread.show_ratio());
            let _ =
                writeln!(page, "<tr><td>{case}<td>{middle}<td>{ratio}<td>{low}<td>{high}<td>{count}</tr>");
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
        let values = |list: &[f64]| (0..).zip(list.iter().copied()).collect::<BTreeMap<u32, f64>>();
        let spread = Spread::of(&values(&[3.0, 1.0, 2.0, 10.0]), &values(&[6.0, 1.0, 2.0])).unwrap();
        let expected = Spread { count: 4, minimum: 1.0, median: 2.5, maximum: 10.0, ratio: Some(1.0) };
        assert_eq!(spread, expected);
        assert_eq!(Spread::of(&values(&[]), &values(&[1.0])), None);
        assert_eq!(Spread::of(&values(&[1.0]), &values(&[0.0])).unwrap().ratio, None);
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

//! The section of benchmarks that bring none of their own: each metric of each comparison, with its spread.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

use super::{Section, escape, show};
use crate::chart;
use crate::record::Record;

/// Takes whatever nobody else took.
pub(super) const SECTION: Section = Section {
    takes: |_| true,
    text: |records| Ok(table(&compare(records))),
    html: |records| html(&compare(records)),
};

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

/// Groups records by what can be compared, in the order in which it was first measured.
fn compare(records: &[&Record]) -> Vec<Comparison> {
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

/// A chart and a table for each comparison.
fn html(comparisons: &[Comparison]) -> Result<String> {
    let mut page = String::new();
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
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_ordered_whatever_the_order_of_rounds() {
        let values = |list: &[f64]| (0..).zip(list.iter().copied()).collect::<BTreeMap<u32, f64>>();
        let spread = Spread::of(&values(&[3.0, 1.0, 2.0, 10.0]), &values(&[6.0, 1.0, 2.0])).unwrap();
        let expected = Spread { count: 4, minimum: 1.0, median: 2.5, maximum: 10.0, ratio: Some(1.0) };
        assert_eq!(spread, expected);
        assert_eq!(Spread::of(&values(&[]), &values(&[1.0])), None);
        assert_eq!(Spread::of(&values(&[1.0]), &values(&[0.0])).unwrap().ratio, None);
    }
}

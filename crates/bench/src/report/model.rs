//! Records of a benchmark that runs a matrix, by machine and cell.

use std::collections::BTreeMap;

use crate::record::{Metrics, Record};

/// One target under one workload on one machine, in all its rounds.
#[derive(Debug, Clone)]
pub(crate) struct Cell<'a> {
    /// The target.
    pub(crate) case: &'a str,
    /// The workload.
    pub(crate) setting: &'a str,
    pub(crate) options: &'a BTreeMap<String, String>,
    pub(crate) rounds: BTreeMap<u32, &'a Metrics>,
    pub(crate) facts: &'a BTreeMap<String, String>,
}

impl Cell<'_> {
    /// A metric by round.
    pub(crate) fn values(&self, metric: &str) -> BTreeMap<u32, f64> {
        self.rounds.iter().filter_map(|(round, metrics)| Some((*round, *metrics.get(metric)?))).collect()
    }

    /// The `quantile` (0 to 1) of a metric over the rounds, interpolated.
    pub(crate) fn quantile(&self, metric: &str, quantile: f64) -> Option<f64> {
        let values: Vec<f64> = self.values(metric).into_values().collect();
        quantile_of(&values, quantile)
    }

    pub(crate) fn median(&self, metric: &str) -> Option<f64> {
        self.quantile(metric, 0.5)
    }

    pub(crate) fn option(&self, name: &str) -> &str {
        self.options.get(name).map_or("", String::as_str)
    }

    /// One of loam's devices, not a reference.
    pub(crate) fn is_loam(&self) -> bool {
        self.options.contains_key("transport")
    }

    /// A block device is read, no file.
    pub(crate) fn is_device(&self) -> bool {
        let raw = ["rublk-null", "rublk-null-zero-copy", "rublk-loop", "rublk-loop-direct"];
        let raw = [raw.as_slice(), &["brd", "loop-tmpfs", "fuse-loop", "dev-zero"]].concat();
        self.option("layout") == "raw" || raw.contains(&self.option("reference"))
    }
}

/// The `quantile` of values in any order, interpolated between neighbours.
pub(crate) fn quantile_of(values: &[f64], quantile: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = quantile * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(low + (high - low) * place.fract())
}

/// All cells of one machine under one kernel and one build of loam.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) name: String,
    pub(crate) cells: Vec<Cell<'a>>,
}

impl<'a> Machine<'a> {
    /// The machines of records, cells in an order that people expect.
    pub(crate) fn all(records: &[&'a Record]) -> Vec<Machine<'a>> {
        let mut machines: Vec<Machine<'a>> = Vec::new();
        for record in records {
            let Record { kernel, processors, loam, .. } = record;
            let name = format!("Linux {kernel}, {processors} processors, loam {loam}");
            let position = machines.iter().position(|machine| machine.name == name).unwrap_or_else(|| {
                machines.push(Machine { name, cells: Vec::new() });
                machines.len() - 1
            });
            let cells = &mut machines[position].cells;
            let same = |cell: &Cell<'_>| {
                cell.case == record.case && cell.setting == record.setting && *cell.options == record.options
            };
            let position = cells.iter().position(same).unwrap_or_else(|| {
                let (case, setting) = (record.case.as_str(), record.setting.as_str());
                let (options, facts) = (&record.options, &record.facts);
                cells.push(Cell { case, setting, options, rounds: BTreeMap::new(), facts });
                cells.len() - 1
            });
            cells[position].rounds.insert(record.round, &record.metrics);
        }
        for machine in &mut machines {
            machine.cells.sort_by_key(|cell| (order(cell), cell.case));
        }
        machines
    }

    /// Workloads in order.
    pub(crate) fn settings(&self) -> Vec<&'a str> {
        let mut settings: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !settings.contains(&cell.setting) {
                settings.push(cell.setting);
            }
        }
        settings
    }

    /// The cell of a target under a workload; the one of the most rounds where several sizes were read.
    pub(crate) fn cell(&self, case: &str, setting: &str) -> Option<&Cell<'a>> {
        let cells = self.cells.iter().filter(|cell| cell.case == case && cell.setting == setting);
        cells.max_by_key(|cell| cell.rounds.len())
    }

    /// What a cell is called beside others: with its size where sizes differ.
    pub(crate) fn label(&self, cell: &Cell<'_>) -> String {
        let twin = |other: &&Cell<'_>| other.case == cell.case && other.setting == cell.setting;
        match self.cells.iter().filter(twin).count() {
            0 | 1 => cell.case.to_string(),
            _ => format!("{}, {} read", cell.case, cell.option("clone_size")),
        }
    }
}

/// psync, io_uring, mmap; past the cache, through it; few jobs first.
fn order(cell: &Cell<'_>) -> (usize, bool, u32, u32) {
    let engine = ["psync", "io_uring", "mmap"].iter().position(|name| *name == cell.option("engine"));
    let number = |name| cell.option(name).parse().unwrap_or(0);
    // Not by `direct`: what takes no direct reads stands beside what it is compared with.
    (engine.unwrap_or(usize::MAX), cell.setting.ends_with("buffered"), number("jobs"), number("depth"))
}

/// Ratios of one cell's metric to another's in the rounds that both have.
pub(crate) fn ratios(numerator: &Cell<'_>, denominator: &Cell<'_>, metric: &str) -> Vec<f64> {
    let below = denominator.values(metric);
    let ratio = |(round, value): (u32, f64)| Some(value / below.get(&round)?);
    let ratios = numerator.values(metric).into_iter().filter_map(ratio);
    ratios.filter(|ratio| ratio.is_finite() && *ratio > 0.0).collect()
}

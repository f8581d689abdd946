//! Which option matters how much: cells that differ in one option and in nothing else are compared round by round.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::report::model::{Cell, Machine, ratios};
use crate::report::{Table, show};

/// An effect smaller than this is called none, however sure it is.
const SMALL: f64 = 0.05;
/// What is called sure: the chance that values without any effect look like this.
const SURE: f64 = 0.05;
/// Up to so many ratios all signs are tried, above it so many drawn ones.
const EXACT_MAX: usize = 14;
const DRAWN: u32 = 20_000;

/// One level of an option against another.
struct Effect {
    option: String,
    base: String,
    level: String,
    /// Geometric mean of the ratios.
    mean: f64,
    minimum: f64,
    maximum: f64,
    pairs: usize,
    rounds: usize,
    chance: f64,
}

/// What an option drags along: it is not held equal when that option is compared.
fn dragged(option: &str) -> &'static [&'static str] {
    match option {
        // Only a region has a size, only io_uring a depth, only files of memory are mapped, only ublk has data paths.
        "layout" => &["virtual_size"],
        "engine" => &["depth", "direct"],
        "transport" => &["data_path"],
        _ => &[],
    }
}

/// The options of loam's cells, the one with the largest effect first. `None` when no two cells differ in one alone.
pub(super) fn table(machine: &Machine<'_>) -> Option<Table> {
    let cells: Vec<&Cell<'_>> = machine.cells.iter().filter(|cell| cell.is_loam()).collect();
    let options: BTreeSet<&String> = cells.iter().flat_map(|cell| cell.options.keys()).collect();
    let mut effects: Vec<Effect> = options.iter().flat_map(|option| effects_of(option, &cells)).collect();
    effects.sort_by(|a, b| b.mean.ln().abs().total_cmp(&a.mean.ln().abs()));
    let note = "reads a second of cells that differ in this option alone, round by round: geometric mean of the \
                ratios, smallest and largest; chance: how often signs drawn by lot give as much (permutation test)";
    let columns = ["option", "instead of", "ratio", "min", "max", "pairs", "ratios", "chance", ""];
    let mut table = Table::new("What matters how much", note, &columns);
    for effect in &effects {
        let matters = match effect {
            Effect { chance, .. } if *chance > SURE => "not sure",
            Effect { mean, .. } if (mean - 1.0).abs() < SMALL => "hardly matters",
            _ => "matters",
        };
        table.rows.push(vec![
            format!("{} {}", effect.option, effect.level),
            effect.base.clone(),
            format!("{:.2}", effect.mean),
            format!("{:.2}", effect.minimum),
            format!("{:.2}", effect.maximum),
            effect.pairs.to_string(),
            effect.rounds.to_string(),
            format!("{:.3}", effect.chance),
            matters.to_string(),
        ]);
    }
    (!effects.is_empty()).then_some(table)
}

/// What a pool has, and the plainest workload: the others are compared with these.
const BASES: [(&str, &str); 9] = [
    ("transport", "ublk"),
    ("layout", "pair"),
    ("content", "memory"),
    ("virtual_size", "4EiB"),
    ("queues", "auto"),
    ("data_path", "auto"),
    ("engine", "psync"),
    ("jobs", "1"),
    ("direct", "true"),
];

/// Every level of an option against its base, or against the first level where that was not measured.
fn effects_of(option: &str, cells: &[&Cell<'_>]) -> Vec<Effect> {
    let having = cells.iter().filter(|cell| cell.options.contains_key(option));
    let levels: BTreeSet<&str> = having.map(|cell| cell.option(option)).collect();
    let usual = BASES.iter().find(|(name, base)| *name == option && levels.contains(base));
    let Some(base) = usual.map(|(_, base)| *base).or_else(|| levels.first().copied()) else {
        return Vec::new();
    };
    let others = levels.iter().filter(|level| **level != base);
    others.filter_map(|level| effect(option, base, level, cells)).collect()
}

fn effect(option: &str, base: &str, level: &str, cells: &[&Cell<'_>]) -> Option<Effect> {
    let rest = |cell: &Cell<'_>| {
        let held = |name: &&String| *name != option && !dragged(option).contains(&name.as_str());
        let names: Vec<&String> = cell.options.keys().filter(held).collect();
        names.into_iter().map(|name| (name.clone(), cell.options[name].clone())).collect::<Vec<_>>()
    };
    let of = |wanted| cells.iter().filter(move |cell| cell.option(option) == wanted);
    let (mut logs, mut pairs) = (Vec::new(), 0);
    for below in of(base) {
        for above in of(level).filter(|above| rest(above) == rest(below)) {
            let found = ratios(above, below, "iops");
            pairs += usize::from(!found.is_empty());
            logs.extend(found.into_iter().map(f64::ln));
        }
    }
    let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
    let extreme = |pick: fn(f64, f64) -> f64| logs.iter().copied().reduce(pick);
    Some(Effect {
        option: option.to_string(),
        base: base.to_string(),
        level: level.to_string(),
        mean: mean.exp(),
        minimum: extreme(f64::min)?.exp(),
        maximum: extreme(f64::max)?.exp(),
        pairs,
        rounds: logs.len(),
        chance: chance(&logs),
    })
}

/// How often the sum of these values is as far from 0 as it is, when their signs are drawn by lot (sign-flip test).
fn chance(values: &[f64]) -> f64 {
    let seen = values.iter().sum::<f64>().abs() - 1e-12;
    let flipped = |signs: u64| {
        let signed = |(index, value): (usize, &f64)| if signs >> index & 1 == 1 { -value } else { *value };
        values.iter().enumerate().map(signed).sum::<f64>().abs()
    };
    if values.len() <= EXACT_MAX {
        let all = 1_u64 << values.len();
        return (0..all).filter(|signs| flipped(*signs) >= seen).count() as f64 / all as f64;
    }
    let mut random = StdRng::seed_from_u64(1);
    let mut draw =
        || values.iter().map(|value| if random.random() { -value } else { *value }).sum::<f64>().abs();
    f64::from((0..DRAWN).filter(|_| draw() >= seen).count() as u32 + 1) / f64::from(DRAWN + 1)
}

/// The best of loam's configurations for each workload, by the 75th percentile over rounds, as the seed study did, and
/// the best of the others.
pub(super) fn best(machine: &Machine<'_>) -> Option<Table> {
    let columns = ["workload", "best of loam", "reads/s", "best of the others", "reads/s"];
    let mut table = Table::new("The best by workload", "75th percentiles over the rounds", &columns);
    for setting in machine.settings() {
        for (is_device, kind) in [(true, "device"), (false, "file")] {
            let group = |is_loam: bool| {
                let cells = machine.cells.iter().filter(|cell| {
                    cell.setting == setting && cell.is_loam() == is_loam && cell.is_device() == is_device
                });
                let rated = cells.filter_map(|cell| Some((cell.quantile("iops", 0.75)?, cell)));
                rated.max_by(|a, b| a.0.total_cmp(&b.0))
            };
            let Some((rate, cell)) = group(true) else { continue };
            let shown = |found: Option<(f64, &Cell<'_>)>| match found {
                Some((rate, cell)) => [machine.label(cell), show("iops", rate)],
                None => [String::new(), String::new()],
            };
            let mut row = vec![format!("{setting}: {kind}")];
            row.extend(shown(Some((rate, cell))).into_iter().chain(shown(group(false))));
            table.rows.push(row);
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_small_for_what_always_points_one_way() {
        assert_eq!(chance(&[0.5; 6]), 2.0 / 64.0);
        assert!(chance(&[0.5, -0.5, 0.4, -0.4]) > 0.5);
        assert!(chance(&[0.1; 40]) < 0.001);
        let mixed: Vec<f64> = (0..40).map(|n| if n % 2 == 0 { 0.1 } else { -0.1 }).collect();
        assert!(chance(&mixed) > 0.5);
    }
}

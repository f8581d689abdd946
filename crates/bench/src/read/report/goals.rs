//! What loam is to reach, and whether it does: ratios to references in the same run, what was lost first.

use crate::report::Table;
use crate::report::model::{Machine, quantile_of, ratios};

/// A ratio that is wanted.
struct Goal {
    what: &'static str,
    numerator: &'static str,
    denominator: &'static str,
    settings: &'static [&'static str],
    at_least: f64,
    /// Whether it has to be reached; else it is where we want to go.
    required: bool,
}

const PSYNC_DEVICE: &[&str] = &["psync, 1 job", "psync, 2 jobs"];
const DEVICE: &[&str] =
    &["psync, 1 job", "psync, 2 jobs", "io_uring, 1 job, depth 64", "io_uring, 2 jobs, depth 64"];
const PSYNC_FILE: &[&str] = &["psync, 1 job", "psync, 2 jobs", "psync, 6 jobs"];
const URING_FILE: &[&str] =
    &["io_uring, 1 job, depth 64", "io_uring, 2 jobs, depth 64", "io_uring, 4 jobs, depth 64"];

const GOALS: &[Goal] = &[
    Goal {
        what: "device: memory / rublk null",
        numerator: "loam ublk raw memory",
        denominator: "rublk-null",
        settings: DEVICE,
        at_least: 0.95,
        required: true,
    },
    Goal {
        what: "device: pattern / rublk null",
        numerator: "loam ublk raw pattern",
        denominator: "rublk-null",
        settings: DEVICE,
        at_least: 0.95,
        required: true,
    },
    Goal {
        what: "device: zero copy / rublk null",
        numerator: "loam ublk raw memory zero-copy",
        denominator: "rublk-null",
        settings: DEVICE,
        at_least: 1.0,
        required: true,
    },
    Goal {
        what: "btrfs: loam / rublk loop",
        numerator: "loam ublk pair memory 4EiB",
        denominator: "btrfs-rublk-loop",
        settings: PSYNC_FILE,
        at_least: 1.25,
        required: true,
    },
    Goal {
        what: "btrfs: loam / rublk loop",
        numerator: "loam ublk pair memory 4EiB",
        denominator: "btrfs-rublk-loop",
        settings: URING_FILE,
        at_least: 1.25,
        required: true,
    },
    Goal {
        what: "btrfs: cache / memory",
        numerator: "loam ublk pair cache 4EiB",
        denominator: "loam ublk pair memory 4EiB",
        settings: URING_FILE,
        at_least: 0.9,
        required: true,
    },
    Goal {
        what: "btrfs: loam / RAM disk",
        numerator: "loam ublk pair memory 4EiB",
        denominator: "btrfs-brd",
        settings: PSYNC_FILE,
        at_least: 0.73,
        required: false,
    },
    Goal {
        what: "btrfs: loam / RAM disk",
        numerator: "loam ublk pair memory 4EiB",
        denominator: "btrfs-brd",
        settings: URING_FILE,
        at_least: 1.0,
        required: false,
    },
    Goal {
        what: "device: ublk / loop transport",
        numerator: "loam ublk raw memory",
        denominator: "loam loop raw memory",
        settings: PSYNC_DEVICE,
        at_least: 1.0,
        required: false,
    },
];

/// How a goal stands, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Lost,
    Missed,
    Unmeasured,
    Met,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Lost => "LOST",
            Verdict::Missed => "below the aim",
            Verdict::Unmeasured => "not measured",
            Verdict::Met => "met",
        }
    }
}

/// All goals of a machine, the lost ones first. `None` when it was not measured for any.
pub(super) fn table(machine: &Machine<'_>) -> Option<Table> {
    let note = "medians of the rounds' own ratios of reads a second, minimum and maximum; aims are where we want to \
                go, goals have to be reached";
    let columns = ["", "workload", "ratio", "min", "max", "rounds", "goal", ""];
    let mut table = Table::new("Goals, the lost ones first", note, &columns);
    let mut rows: Vec<(Verdict, Vec<String>)> = Vec::new();
    for goal in GOALS {
        let of_goal: Vec<_> = goal.settings.iter().map(|setting| row(machine, goal, setting)).collect();
        if of_goal.iter().all(|(verdict, _)| *verdict == Verdict::Unmeasured) {
            rows.push(row(machine, goal, "all workloads"));
        } else {
            rows.extend(of_goal);
        }
    }
    if rows.iter().all(|(verdict, _)| *verdict == Verdict::Unmeasured) {
        return None;
    }
    rows.sort_by_key(|(verdict, _)| *verdict);
    table.rows = rows.into_iter().map(|(_, row)| row).collect();
    Some(table)
}

fn row(machine: &Machine<'_>, goal: &Goal, setting: &str) -> (Verdict, Vec<String>) {
    let cells = machine.cell(goal.numerator, setting).zip(machine.cell(goal.denominator, setting));
    let found = cells.map(|(above, below)| ratios(above, below, "iops")).unwrap_or_default();
    let quantile = |q| quantile_of(&found, q);
    let verdict = match quantile(0.5) {
        None => Verdict::Unmeasured,
        Some(ratio) if ratio >= goal.at_least => Verdict::Met,
        Some(_) if goal.required => Verdict::Lost,
        Some(_) => Verdict::Missed,
    };
    let shown = |q| quantile(q).map_or(String::new(), |ratio| format!("{ratio:.2}"));
    let kind = if goal.required { "goal" } else { "aim" };
    let row = vec![
        goal.what.to_string(),
        setting.to_string(),
        shown(0.5),
        shown(0.0),
        shown(1.0),
        found.len().to_string(),
        format!("{kind} {:.2}", goal.at_least),
        verdict.name().to_string(),
    ];
    (verdict, row)
}

/// The targets that goals are about.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    GOALS.iter().flat_map(|goal| [goal.numerator, goal.denominator])
}

//! Random reads of 4 KiB, of what is local: loam's devices, with and without a file system, in every variant that may
//! matter, beside what they are compared with over the same bytes, in the same run. fio reads and measures; what it
//! reads is checked beside it, and a wrong byte ends the benchmark.
//!
//! A round attaches one target after the other, in a shuffled order, and reads it by its workloads, shuffled as well: so
//! no idle server disturbs another target, and neither the first nor the last is always the same.

mod attach;
mod check;
mod fio;
mod guards;
mod images;
mod lab;
mod plan;
mod report;
mod rublk;
mod target;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Common;
use crate::record::{Case, Recorder, interrupted};
use fio::Subject;
pub(crate) use fio::{PERCENTILES, percentile_metric};
use lab::Lab;
use plan::{Lists, Plan, Preset};
pub(crate) use report::SECTION;
use target::{Reference, Target};
use workload::{Engine, Workload};

/// `loam bench read`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What to compare, unless targets are listed.
    #[arg(long, value_enum, default_value = "standard")]
    preset: Preset,
    #[command(flatten)]
    lists: Lists,
    /// `ENGINE:JOBS[xDEPTH][:buffered]` with the engines psync, io_uring, mmap [default: those of the preset].
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    workload: Vec<Workload>,
    /// Bytes that are read of each target [default: 256MiB; with --quick 64MiB]. Each copy of them takes memory.
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// Seconds of each measurement [default: 2; with --quick 1].
    #[arg(long, value_name = "S", value_parser = seconds)]
    runtime: Option<f64>,
    /// The order of things follows from this.
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// Where the cache and the file that is read from disk lie.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    /// A tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    memory: PathBuf,
    /// Say what would be measured by an empty results file, and how long it takes, and measure nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    common: Common,
}

/// What a run takes beside its runtime, before there is experience: fio's start and end, and the check.
const OVERHEAD: f64 = 1.0;
/// Queues of other servers: as loam's own default.
const QUEUES_MAX: usize = 4;

/// `2`, `2.5`, `2s`, `500ms`.
fn seconds(text: &str) -> Result<f64> {
    let (number, scale) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1e-3),
        (None, Some(number)) => (number, 1.0),
        (None, None) => (text, 1.0),
    };
    let seconds = number.parse::<f64>().with_context(|| format!("{text}: not a number of seconds"))? * scale;
    ensure!((0.1..=3600.0).contains(&seconds), "{text}: from 100ms to 3600s");
    Ok(seconds)
}

/// What a round needs.
struct Bench {
    lab: Lab,
    recorder: Recorder,
    runtime: f64,
    seed: u64,
    queues: u16,
    /// Engines that do not work here.
    engines: BTreeMap<Engine, String>,
    /// Targets that could not be attached: not tried again.
    refused: Vec<Target>,
    checked: Vec<Target>,
    progress: Progress,
}

/// Where the benchmark is.
struct Progress {
    started: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    fn step(&mut self) {
        self.done += 1;
        let each = self.started.elapsed().as_secs_f64() / self.done as f64;
        let left = Duration::from_secs_f64(each * self.all.saturating_sub(self.done) as f64);
        eprintln!("[{}/{}, {} min left]", self.done, self.all, left.as_secs().div_ceil(60));
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let quick = options.common.quick;
    let size = options.size.unwrap_or(ByteSize(if quick { 64 << 20 } else { 256 << 20 }));
    ensure!(size.0 > 0 && size.0.is_multiple_of(1 << 20), "--size {size}: has to be a multiple of 1 MiB");
    let plan = plan::plan(options.preset, quick, &options.lists, &options.workload, size);
    let runtime = options.runtime.unwrap_or(if quick { 1.0 } else { 2.0 });
    let rounds = options.common.rounds.unwrap_or(if quick { 2 } else { 5 });
    let announce = |runs: usize| {
        let minutes = (runs as f64 * (runtime + OVERHEAD) / 60.0).ceil();
        eprintln!("{} cells, {rounds} rounds: {runs} runs to do, about {minutes} min", plan.cells());
    };
    if options.dry_run {
        announce(plan.cells() * rounds as usize);
        for (target, workloads) in &plan.0 {
            let workloads: Vec<String> = workloads.iter().map(Workload::to_string).collect();
            println!("{target}: {}", workloads.join("; "));
        }
        return Ok(());
    }
    let recorder = Recorder::open(&options.common.out)?;
    let of_round = |round| pending(&plan, &recorder, round).iter().map(|p| p.1.len()).sum::<usize>();
    let all = (0..rounds).map(of_round).sum();
    announce(all);
    ensure!(rustix::process::geteuid().is_root(), "this mounts and attaches devices: run it as root");
    let mut bench = Bench {
        lab: Lab::new(&options.memory, &options.scratch, size.0)?,
        recorder,
        runtime,
        seed: options.seed,
        queues: std::thread::available_parallelism().map_or(1, usize::from).min(QUEUES_MAX) as u16,
        engines: BTreeMap::new(),
        refused: Vec::new(),
        checked: Vec::new(),
        progress: Progress { started: Instant::now(), done: 0, all },
    };
    bench.probe_engines(&plan);
    (0..rounds).try_for_each(|round| bench.round(&plan, round))
}

/// What a round has still to do.
fn pending(plan: &Plan, recorder: &Recorder, round: u32) -> Vec<(Target, Vec<Workload>)> {
    let mut pending = Vec::new();
    for (target, workloads) in &plan.0 {
        let lacks = |workload: &&Workload| !recorder.has(&case(target, workload, round));
        let workloads: Vec<Workload> = workloads.iter().filter(lacks).copied().collect();
        if !workloads.is_empty() {
            pending.push((*target, workloads));
        }
    }
    pending
}

fn case(target: &Target, workload: &Workload, round: u32) -> Case {
    let mut options = target.options();
    options.extend(workload.options());
    Case { bench: "read", setting: workload.to_string(), case: target.to_string(), round, options }
}

impl Bench {
    fn probe_engines(&mut self, plan: &Plan) {
        let engines: BTreeSet<Engine> = plan
            .0
            .iter()
            .flat_map(|(_, workloads)| workloads.iter().map(|workload| workload.engine))
            .collect();
        for engine in engines {
            if let Err(error) = fio::probe(engine) {
                self.engines.insert(engine, format!("fio cannot use {}: {error:#}", engine.name()));
            }
        }
    }

    fn round(&mut self, plan: &Plan, round: u32) -> Result<()> {
        let mut random = StdRng::seed_from_u64(self.seed ^ u64::from(round) << 32);
        let mut pending = pending(plan, &self.recorder, round);
        pending.shuffle(&mut random);
        for (target, mut workloads) in pending {
            workloads.shuffle(&mut random);
            if !self.refused.contains(&target) {
                self.target(&target, &workloads, round)?;
            }
        }
        Ok(())
    }

    /// Why a target cannot be read by a workload.
    fn why_not(&self, target: &Target, workload: &Workload) -> Option<String> {
        let kind = match target {
            Target::Reference { kind, .. } => Some(*kind),
            Target::Loam(_) => None,
        };
        match (workload.engine, kind) {
            (Engine::Mmap, Some(Reference::Fuse)) => {
                Some("a FUSE file that passes the page cache by takes no shared mapping".into())
            }
            (engine, _) => self.engines.get(&engine).cloned(),
        }
    }

    fn refuse(&mut self, target: &Target, workloads: &[Workload], round: u32, reason: &str) -> Result<()> {
        for workload in workloads {
            self.recorder.unavailable(&case(target, workload, round), reason)?;
            self.progress.step();
        }
        Ok(())
    }

    fn target(&mut self, target: &Target, workloads: &[Workload], round: u32) -> Result<()> {
        if interrupted() {
            anyhow::bail!("interrupted; the same command goes on from here");
        }
        let attached = match attach::attach(&mut self.lab, target, self.queues) {
            Ok(attached) => attached,
            Err(error) => {
                self.refused.push(*target);
                return self.refuse(target, workloads, round, &format!("{error:#}"));
            }
        };
        let size = target.size().0;
        if !self.checked.contains(target) {
            self.checked.push(*target);
            check::whole(&attached.path, size, attached.expected).with_context(|| target.to_string())?;
        }
        for workload in workloads {
            if let Some(reason) = self.why_not(target, workload) {
                self.refuse(target, &[*workload], round, &reason)?;
                continue;
            }
            let mut reads = *workload;
            // No character device takes direct reads.
            reads.direct &= !matches!(target, Target::Reference { kind: Reference::DevZero, .. });
            let subject = Subject { path: &attached.path, size, servers: &attached.servers };
            let (runtime, seed) = (self.runtime, self.seed ^ u64::from(round));
            self.recorder.measure_with_facts(&case(target, workload, round), &attached.facts, || {
                let checked = check::sample(&attached.path, size, attached.expected, &reads, seed)?;
                let mut metrics = fio::measure(&subject, &reads, runtime)?;
                metrics.insert("checked_reads".into(), checked.into());
                Ok(metrics)
            })?;
            self.progress.step();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_read_as_people_write_them() {
        assert_eq!(seconds("2").unwrap(), 2.0);
        assert_eq!(seconds("10s").unwrap(), 10.0);
        assert_eq!(seconds("500ms").unwrap(), 0.5);
        assert!(seconds("0").is_err() && seconds("1h").is_err());
    }
}

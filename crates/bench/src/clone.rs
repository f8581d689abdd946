//! Clones: how fast files are made of the virtual region, and what they cost afterwards, by layout, by their number and
//! by the number of threads. Answers whether one giant extent slows cloning down, and what threads wait for.

mod device;
mod filesystem;
mod measure;
mod percentile;
mod plan;
mod report;
mod stock;
mod workers;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use loam_block::size::ByteSize;

use crate::Common;
use crate::record::{Case, Recorder};
use crate::serve::Transport;
use filesystem::Place;
use measure::Samples;
use plan::{Arrangement, Layout, Matrix, THREADS_MAX};

pub(crate) use device::SeedDevice;
pub(crate) use filesystem::{mount as mount_detached, uuid};
pub(crate) use percentile::{median, percentile};
pub(crate) use report::SECTION;

/// `loam bench clone`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files to make, as list [default: 1000,10000,100000,1000000; with --quick 300].
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    counts: Vec<u64>,
    /// Threads that make them [default: 1, 2 and the number of processors].
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(THREADS_MAX)))]
    threads: Vec<u32>,
    /// How the virtual region is laid out [default: all].
    #[arg(long, value_name = "LAYOUT,...", value_delimiter = ',')]
    layouts: Vec<Layout>,
    /// What threads have in common [default: all that make a difference].
    #[arg(long, value_name = "HOW,...", value_delimiter = ',')]
    arrangements: Vec<Arrangement>,
    /// How the kernel gets the virtual device.
    #[arg(long, default_value = "loop")]
    transport: Transport,
    /// Bytes of the virtual region, where the layout can have them.
    #[arg(long, value_name = "SIZE", default_value = "4EiB")]
    virtual_size: ByteSize,
    /// Options of btrfs, as in fstab.
    #[arg(long, value_name = "OPTION,...", value_delimiter = ',')]
    mount_options: Vec<String>,
    /// Decides the order of cases and which files are sampled.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the local device is made.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    scratch: PathBuf,
    #[command(flatten)]
    common: Common,
}

impl Options {
    fn matrix(&self) -> Matrix {
        let or = |given: &[u64], default: &[u64]| if given.is_empty() { default } else { given }.to_vec();
        let counts: &[u64] = if self.common.quick { &[300] } else { &[1_000, 10_000, 100_000, 1_000_000] };
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let all = |given: &[_]| if given.is_empty() { Layout::value_variants() } else { given }.to_vec();
        Matrix {
            layouts: all(&self.layouts),
            counts: or(&self.counts, counts),
            threads: match self.threads.as_slice() {
                [] => vec![1, 2, processors.min(THREADS_MAX)],
                given => given.to_vec(),
            },
            arrangements: match self.arrangements.as_slice() {
                [] => Arrangement::value_variants().to_vec(),
                given => given.to_vec(),
            },
            virtual_size: self.virtual_size.0,
        }
    }

    fn samples(&self) -> Samples {
        match self.common.quick {
            true => Samples { snapshots: 1, overwrites: 20, reads: 100 },
            false => Samples { snapshots: 9, overwrites: 400, reads: 2000 },
        }
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let matrix = options.matrix();
    ensure!(rustix::process::geteuid().is_root(), "cloning mounts filesystems: run it as root");
    let place = Place {
        scratch: options.scratch.clone(),
        transport: options.transport,
        mount_options: options.mount_options.clone(),
    };
    let local = filesystem_kind(&options.scratch)?;
    let mut recorder = Recorder::open(&options.common.out)?;
    for round in 0..options.common.rounds() {
        for point in matrix.shuffled(options.seed, round) {
            let mut of_case = point.options();
            of_case.insert("transport".into(), plan::name(place.transport));
            of_case.insert("local".into(), local.clone());
            if !place.mount_options.is_empty() {
                of_case.insert("mount_options".into(), place.mount_options.join(","));
            }
            let case = Case {
                bench: "clone",
                setting: format!("{} clones", point.count),
                case: point.name(),
                round,
                options: of_case,
            };
            let seed = options.seed.wrapping_add(u64::from(round));
            recorder.measure_case(&case, || measure::measure(&point, &place, options.samples(), seed))?;
        }
    }
    Ok(())
}

/// What kind of filesystem the local device's file lies on.
pub(crate) fn filesystem_kind(directory: &Path) -> Result<String> {
    let found =
        rustix::fs::statfs(directory).with_context(|| format!("cannot ask {}", directory.display()))?;
    // include/uapi/linux/magic.h
    Ok(match found.f_type {
        0x0102_1994 => "tmpfs".to_owned(),
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        other => format!("{other:#x}"),
    })
}

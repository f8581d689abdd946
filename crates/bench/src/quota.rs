//! What quotas cost: the *unshare* test of the patch series that brought simple quotas (Boris Burkov, 2023), with no
//! quotas, full qgroups and simple quotas side by side. Files are written in a subvolume, snapshots of it are taken, and
//! fio overwrites blocks at random in all snapshots at once; what is measured is one of the writers, the commits
//! meanwhile, and how long others wait for them. Curves ask how that grows with snapshots and with extents, and `--lazy`
//! asks the same of a pool whose files are all shared, lazy data.

mod counters;
mod ground;
mod lazy;
mod load;
mod measure;
mod plain;
mod plan;
mod probe;
mod report;
mod statistics;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use loam_block::size::ByteSize;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Common;
use crate::clone::filesystem_kind;
use crate::nbd::allow_descriptors;
use crate::record::Recorder;
use plan::{Mode, Point, Series, Shape};
pub(crate) use report::SECTION;

/// Open files beside those of the writers.
const DESCRIPTORS: u64 = 1000;

/// `loam bench quota`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What is compared [default: all].
    #[arg(long, value_name = "MODE,...", value_delimiter = ',')]
    modes: Vec<Mode>,
    /// Instead of the test itself, what becomes of it with more snapshots and with more extents in each file.
    #[arg(long, conflicts_with = "lazy")]
    curves: bool,
    /// Instead of a plain btrfs, a pool: an image of such files, containers as its snapshots.
    #[arg(long)]
    lazy: bool,
    /// Files in the subvolume [default: 1000; with --quick 50].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    files: Option<u32>,
    /// Snapshots of it [default: 100; with --quick 10].
    #[arg(long, value_name = "N", conflicts_with = "curves", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    snapshots: Option<u32>,
    /// Snapshots that are written to at once [default: all; of curves and with --quick at most 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    writers: Option<u32>,
    /// Writes of 4 KiB, each with fsync, of the writer that is measured [default: 250; of curves and with --quick 300].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    writes: Option<u32>,
    /// Bytes of the filesystem, whose image is sparse.
    #[arg(long, value_name = "SIZE", default_value = "16GiB")]
    size: ByteSize,
    /// Where the image is made.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    directory: PathBuf,
    /// Decides the order of cases.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    common: Common,
}

impl Options {
    fn modes(&self) -> Vec<Mode> {
        if self.modes.is_empty() { Mode::value_variants().to_vec() } else { self.modes.clone() }
    }

    /// Of a curve or of the lazy pool fewer are enough to see the difference.
    fn rounds(&self) -> u32 {
        let default = match (self.common.quick, self.curves, self.lazy) {
            (true, false, false) => 2,
            (true, ..) => 1,
            (false, false, false) => 5,
            (false, true, _) => 1,
            (false, _, true) => 3,
        };
        self.common.rounds.unwrap_or(default)
    }

    /// What is measured with each mode.
    fn shapes(&self) -> Vec<Shape> {
        let quick = self.common.quick;
        let series = match (self.curves, self.lazy) {
            (true, _) => return self.curve_shapes(),
            (_, true) => Series::Lazy,
            _ => Series::Unshare,
        };
        let snapshots = self.snapshots.unwrap_or(if quick { 10 } else { 100 });
        vec![Shape {
            series,
            files: self.files.unwrap_or(if quick { 50 } else { 1000 }),
            extents: 1,
            file_bytes: plan::FILE_BYTES,
            snapshots,
            writers: self.writers.unwrap_or(if quick { 8 } else { snapshots }).min(snapshots),
            writes: self.writes.unwrap_or(if quick { 300 } else { 250 }),
        }]
    }

    fn curve_shapes(&self) -> Vec<Shape> {
        let quick = self.common.quick;
        let steps: &[u32] = if quick { &[1, 10] } else { &[1, 10, 100, 1000] };
        let writers = |snapshots: u32| self.writers.unwrap_or(8).min(snapshots);
        let writes = self.writes.unwrap_or(300);
        let by_snapshots = steps.iter().map(|&snapshots| Shape {
            series: Series::Snapshots,
            files: self.files.unwrap_or(if quick { 50 } else { 200 }),
            extents: 1,
            file_bytes: plan::FILE_BYTES,
            snapshots,
            writers: writers(snapshots),
            writes,
        });
        let by_extents = steps.iter().map(|&extents| {
            let snapshots = if quick { 8 } else { 100 };
            Shape {
                series: Series::Extents,
                files: self.files.unwrap_or(20),
                extents,
                file_bytes: u64::from(extents) * plan::BLOCK,
                snapshots,
                writers: writers(snapshots),
                writes,
            }
        });
        by_snapshots.chain(by_extents).collect()
    }

    /// The cases of a round in an order of its own: what is shuffled is the modes of each shape, which stay together, so
    /// that what is compared is measured within a minute.
    fn points(&self, round: u32) -> Vec<Point> {
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_add(u64::from(round)));
        let mut shapes = self.shapes();
        shapes.shuffle(&mut random);
        let mut points = Vec::new();
        for shape in shapes {
            let mut modes = self.modes();
            modes.shuffle(&mut random);
            points.extend(modes.into_iter().map(|mode| Point { shape, mode }));
        }
        points
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this mounts filesystems: run it as root");
    let most = options.shapes().iter().map(|shape| shape.files).max().unwrap_or(0);
    allow_descriptors(u64::from(most) + DESCRIPTORS)?;
    let local = filesystem_kind(&options.directory)?;
    let mut recorder = Recorder::open(&options.common.out)?;
    for round in 0..options.rounds() {
        for point in options.points(round) {
            let mut case = point.case(round);
            case.options.insert("local".into(), local.clone());
            if recorder.has(&case) {
                continue;
            }
            match ground::make(&point, &options.directory, options.size.0)? {
                Ok(mut ground) => {
                    recorder.measure_case(&case, || measure::measure(&mut *ground, &point.shape))?;
                }
                Err(reason) => recorder.unavailable(&case, &reason)?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        Line::try_parse_from(["x", "--out", "y"].into_iter().chain(line.split_whitespace())).unwrap().options
    }

    #[test]
    fn each_round_has_every_case_once_and_an_order_of_its_own() {
        let options = options("--curves");
        let rounds: Vec<Vec<String>> = (0..4)
            .map(|round| options.points(round).iter().map(|point| format!("{:?}", point.case(0))).collect())
            .collect();
        for round in &rounds {
            assert_eq!(round.len(), 8 * 3);
            assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), 8 * 3);
        }
        assert_eq!(rounds.iter().collect::<BTreeSet<_>>().len(), 4);
        assert_eq!(options.points(2).len(), options.points(2).len());
    }

    #[test]
    fn the_test_is_that_of_the_patch_series() {
        let shape = options("").shapes()[0];
        assert_eq!(
            (shape.files, shape.file_bytes, shape.snapshots, shape.writers),
            (1000, 128 << 10, 100, 100)
        );
        assert_eq!(options("").rounds(), 5);
        assert_eq!(options("--quick --lazy").rounds(), 1);
        assert_eq!(options("--snapshots 3").shapes()[0].writers, 3);
    }
}

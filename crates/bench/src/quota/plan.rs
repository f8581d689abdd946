//! What is compared with what, and what it is called in results.

use std::collections::BTreeMap;

use clap::ValueEnum;
use loam_block::size::ByteSize;

use crate::record::Case;

/// Bytes of a write.
pub(super) const BLOCK: u64 = 4096;
/// Bytes of a file, as in the patch series.
pub(super) const FILE_BYTES: u64 = 128 << 10;

/// How the filesystem counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(super) enum Mode {
    /// Not at all: what the others are compared with.
    None,
    /// Classic qgroups.
    Full,
    /// Simple quotas.
    Simple,
}

impl Mode {
    /// As on the command line, in results and in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mode::None => "none",
            Mode::Full => "full",
            Mode::Simple => "simple",
        }
    }
}

/// Which question a case belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Series {
    /// The test of the patch series.
    Unshare,
    /// The same with fewer and with more snapshots.
    Snapshots,
    /// The same with more extents in each file.
    Extents,
    /// The same with shared data that is lazy.
    Lazy,
}

impl Series {
    pub(super) fn name(self) -> &'static str {
        match self {
            Series::Unshare => "unshare",
            Series::Snapshots => "by snapshots",
            Series::Extents => "by extents",
            Series::Lazy => "lazy pool",
        }
    }
}

/// All of a case but the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    pub(super) series: Series,
    /// In the subvolume that snapshots are taken of.
    pub(super) files: u32,
    /// Of each file; one is written, more are allocated.
    pub(super) extents: u32,
    pub(super) file_bytes: u64,
    /// Beside the one that the measured writer writes to.
    pub(super) snapshots: u32,
    /// How many of the snapshots are written to meanwhile.
    pub(super) writers: u32,
    /// Of the measured writer.
    pub(super) writes: u32,
}

impl Shape {
    /// What cases that can be compared have in common.
    pub(super) fn setting(&self) -> String {
        let Shape { series, files, extents, file_bytes, snapshots, writers, writes } = *self;
        let extents = if extents == 1 { "1 extent".to_string() } else { format!("{extents} extents") };
        format!(
            "{}: {files} files of {} in {extents}, {snapshots} snapshots, {writers} + 1 writers, {writes} writes",
            series.name(),
            ByteSize(file_bytes)
        )
    }
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Point {
    pub(super) shape: Shape,
    pub(super) mode: Mode,
}

impl Point {
    pub(super) fn case(&self, round: u32) -> Case {
        let Shape { series, files, extents, snapshots, writers, .. } = self.shape;
        let numbers =
            [("files", files), ("extents", extents), ("snapshots", snapshots), ("writers", writers)];
        let mut options: BTreeMap<String, String> =
            numbers.iter().map(|(name, number)| ((*name).to_string(), number.to_string())).collect();
        options.insert("series".into(), series.name().into());
        options.insert("mode".into(), self.mode.name().into());
        Case {
            bench: "quota",
            setting: self.shape.setting(),
            case: self.mode.name().to_string(),
            round,
            options,
        }
    }
}

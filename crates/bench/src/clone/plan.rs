//! Which cases a run consists of, in which order, and where each of a case's files comes from and goes to.

use std::collections::BTreeMap;
use std::ops::Range;

use clap::ValueEnum;
use loam_block::size::ByteSize;
use loam_seed::KERNEL_CHUNK_MAX;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// Files in one directory.
pub(super) const FILES_PER_DIRECTORY: u64 = 1000;
/// Bytes that a file shares with the virtual region.
pub(super) const CLONE_BYTES: u64 = 64 << 10;
/// The most threads of a case.
pub(super) const THREADS_MAX: u32 = 256;
/// Bytes of the extents of [`Layout::SmallExtents`]: the longest that the kernel's fallocate makes on btrfs.
pub(super) const SMALL_EXTENT_BYTES: u64 = 256 << 20;
/// Bytes of the virtual region of [`Layout::SmallExtents`], which takes seconds to make at this size and hours at the
/// sizes of the others.
pub(super) const SMALL_EXTENTS_SIZE: u64 = 275 << 30;

/// Bytes of the virtual region of [`Layout::MegaExtent`]: what one chunk may have, in whole TiB.
pub(super) const MEGA_EXTENT_SIZE: u64 = KERNEL_CHUNK_MAX >> 40 << 40;

/// How the virtual region is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(super) enum Layout {
    /// Two devices; extents of 128 TiB.
    Pair,
    /// A seed that is sprouted; extents of 128 TiB.
    Single,
    /// A seed that is sprouted; one extent, as long as the kernel takes.
    MegaExtent,
    /// What mkfs.btrfs and fallocate make, as a seed that is sprouted; extents of 256 MiB.
    SmallExtents,
}

impl Layout {
    /// Bytes of the virtual region, where other layouts have `size`.
    pub(super) fn virtual_size(self, size: u64) -> u64 {
        match self {
            Layout::Pair | Layout::Single => size,
            Layout::MegaExtent => size.min(MEGA_EXTENT_SIZE),
            Layout::SmallExtents => size.min(SMALL_EXTENTS_SIZE),
        }
    }

    /// Bytes of an extent in a region of `size` bytes.
    pub(super) fn extent_bytes(self, size: u64) -> u64 {
        match self {
            Layout::Pair | Layout::Single => loam_seed::CHUNK_LENGTH.min(size),
            Layout::MegaExtent => size,
            Layout::SmallExtents => SMALL_EXTENT_BYTES,
        }
    }

    /// Whether a region of `size` bytes has many extents that are long enough for all clones of a thread.
    fn has_long_extents(self, size: u64) -> bool {
        self != Layout::SmallExtents && size > self.extent_bytes(size)
    }
}

/// What the threads of a case have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(super) enum Arrangement {
    /// One source file, successive addresses, one subvolume: as images are created.
    OneSource,
    /// As `one-source`, but each file from another extent than the one before.
    ManyExtents,
    /// Each thread clones from a file of its own, all of them on the same extents.
    OwnSource,
    /// Each thread clones from a file of its own with an extent of its own.
    OwnExtent,
    /// As `own-extent` (where there are any), each thread into a subvolume of its own.
    OwnSubvolume,
}

impl Arrangement {
    /// Whether it makes a case of its own.
    fn fits(self, layout: Layout, size: u64, threads: u32) -> bool {
        match self {
            Arrangement::OneSource => true,
            Arrangement::ManyExtents => layout.has_long_extents(size),
            Arrangement::OwnSource | Arrangement::OwnSubvolume => threads > 1,
            Arrangement::OwnExtent => threads > 1 && layout.has_long_extents(size),
        }
    }
}

/// The name of a value on the command line, in results and in reports.
pub(super) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What is measured with what.
#[derive(Debug, Clone)]
pub(super) struct Matrix {
    pub(super) layouts: Vec<Layout>,
    pub(super) counts: Vec<u64>,
    pub(super) threads: Vec<u32>,
    pub(super) arrangements: Vec<Arrangement>,
    /// Bytes of the virtual region, where the layout can have them.
    pub(super) virtual_size: u64,
}

impl Matrix {
    /// Every case once, the smaller ones first.
    fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for &count in &self.counts {
            for &layout in &self.layouts {
                let size = layout.virtual_size(self.virtual_size);
                for &threads in &self.threads {
                    let fitting = self.arrangements.iter().filter(|a| a.fits(layout, size, threads));
                    points.extend(fitting.map(|&arrangement| Point {
                        layout,
                        count,
                        threads,
                        arrangement,
                        size,
                    }));
                }
            }
        }
        points.sort();
        points.dedup();
        points
    }

    /// The cases of one round in an order of its own, the same for the same seed.
    pub(super) fn shuffled(&self, seed: u64, round: u32) -> Vec<Point> {
        let mut points = self.points();
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(u64::from(round)));
        points.shuffle(&mut random);
        points
    }
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Point {
    /// Files to be made.
    pub(super) count: u64,
    pub(super) layout: Layout,
    pub(super) threads: u32,
    pub(super) arrangement: Arrangement,
    /// Bytes of the virtual region.
    pub(super) size: u64,
}

/// The part of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// From 0.
    pub(super) thread: u32,
    /// Numbers of its files.
    pub(super) files: Range<u64>,
    /// The run of addresses that its source file has; `None` for `.virtual-data` itself.
    pub(super) source: Option<Range<u64>>,
}

impl Point {
    /// Names the case among those of the same number of clones.
    pub(super) fn name(&self) -> String {
        let threads = if self.threads == 1 { "thread" } else { "threads" };
        format!("{}, {} {threads}, {}", name(self.layout), self.threads, name(self.arrangement))
    }

    /// As [`crate::record::Record::options`].
    pub(super) fn options(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("layout".to_owned(), name(self.layout)),
            ("clones".to_owned(), self.count.to_string()),
            ("threads".to_owned(), self.threads.to_string()),
            ("arrangement".to_owned(), name(self.arrangement)),
            ("virtual_size".to_owned(), ByteSize(self.size).to_string()),
        ])
    }

    /// Subvolumes that are made.
    pub(super) fn subvolumes(&self) -> u32 {
        if self.arrangement == Arrangement::OwnSubvolume { self.threads } else { 1 }
    }

    /// The subvolume of a thread.
    pub(super) fn subvolume(&self, thread: u32) -> u32 {
        thread % self.subvolumes()
    }

    /// What each thread does: as many files as the others, or one more.
    pub(super) fn parts(&self) -> Vec<Part> {
        let threads = u64::from(self.threads);
        let first = |thread: u64| self.count * thread / threads;
        let part = |thread: u64| {
            let files = first(thread)..first(thread + 1);
            let source = self.source(files.clone());
            Part { thread: thread as u32, files, source }
        };
        (0..threads).map(part).collect()
    }

    /// The thread that makes a file.
    pub(super) fn thread_of(&self, file: u64) -> u32 {
        let threads = u64::from(self.threads);
        // The last thread whose first file is not beyond this one.
        ((file * threads + threads - 1) / self.count).min(threads - 1) as u32
    }

    fn source(&self, files: Range<u64>) -> Option<Range<u64>> {
        match self.arrangement {
            Arrangement::OneSource | Arrangement::ManyExtents => None,
            Arrangement::OwnSource => Some(0..(self.count * CLONE_BYTES).min(self.size)),
            Arrangement::OwnExtent | Arrangement::OwnSubvolume => {
                let start = self.address(files.start);
                let length = (files.end - files.start) * CLONE_BYTES;
                Some(start..start.saturating_add(length).min(self.size))
            }
        }
    }

    /// Where in the virtual region a file's bytes lie.
    pub(super) fn address(&self, file: u64) -> u64 {
        let extent = self.layout.extent_bytes(self.size);
        let extents = (self.size / extent).max(1);
        let slots = self.size / CLONE_BYTES;
        match self.arrangement {
            Arrangement::OneSource | Arrangement::OwnSource => file % slots * CLONE_BYTES,
            Arrangement::ManyExtents => {
                let slots = extent / CLONE_BYTES;
                file % extents * extent + file / extents % slots * CLONE_BYTES
            }
            Arrangement::OwnExtent | Arrangement::OwnSubvolume if self.layout.has_long_extents(self.size) => {
                let thread = u64::from(self.thread_of(file));
                let first = self.count * thread / u64::from(self.threads);
                thread % extents * extent + (file - first) * CLONE_BYTES
            }
            Arrangement::OwnExtent | Arrangement::OwnSubvolume => file % slots * CLONE_BYTES,
        }
    }

    /// The path of a file in its subvolume: the directory of its thread, one of many in it, its number.
    pub(super) fn path(&self, file: u64) -> String {
        format!("{}/{}/{file}", self.thread_of(file), file / FILES_PER_DIRECTORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Matrix {
        Matrix {
            layouts: Layout::value_variants().to_vec(),
            counts: vec![1000, 7, 1000],
            threads: vec![1, 2, 3],
            arrangements: Arrangement::value_variants().to_vec(),
            virtual_size: 4 << 60,
        }
    }

    #[test]
    fn a_matrix_has_every_case_once_and_none_that_is_another() {
        let points = matrix().points();
        let count = |layout, threads, arrangement| {
            let same = |p: &&Point| (p.layout, p.threads, p.arrangement) == (layout, threads, arrangement);
            points.iter().filter(same).count()
        };
        assert_eq!(count(Layout::Pair, 1, Arrangement::OneSource), 2);
        assert_eq!(count(Layout::Pair, 1, Arrangement::OwnSource), 0);
        assert_eq!(count(Layout::Pair, 2, Arrangement::OwnExtent), 2);
        assert_eq!(count(Layout::MegaExtent, 2, Arrangement::OwnExtent), 0);
        assert_eq!(count(Layout::MegaExtent, 1, Arrangement::ManyExtents), 0);
        assert_eq!(count(Layout::SmallExtents, 3, Arrangement::OwnSubvolume), 2);
    }

    #[test]
    fn each_round_has_all_cases_in_an_order_that_its_seed_repeats() {
        let sorted = |mut points: Vec<Point>| {
            points.sort();
            points
        };
        let rounds = [0, 1].map(|round| matrix().shuffled(7, round));
        assert_ne!(rounds[0], rounds[1]);
        assert_eq!(rounds[1], matrix().shuffled(7, 1));
        assert_eq!(sorted(rounds[0].clone()), sorted(rounds[1].clone()));
    }

    #[test]
    fn parts_cover_all_files_and_know_their_threads() {
        for point in matrix().points() {
            let mut next = 0;
            for part in point.parts() {
                assert_eq!(part.files.start, next);
                assert!(part.files.clone().all(|file| point.thread_of(file) == part.thread), "{point:?}");
                next = part.files.end;
            }
            assert_eq!(next, point.count);
        }
    }

    #[test]
    fn addresses_lie_in_the_region_and_in_the_thread_s_source() {
        for point in matrix().points() {
            for part in point.parts() {
                let source = part.source.unwrap_or(0..point.size);
                for file in part.files {
                    let address = point.address(file);
                    assert!(
                        source.start <= address && address + CLONE_BYTES <= source.end,
                        "{point:?} {file}"
                    );
                }
            }
        }
    }

    #[test]
    fn many_extents_are_as_many_as_there_are() {
        let point = Point {
            count: 40_000,
            layout: Layout::Pair,
            threads: 1,
            arrangement: Arrangement::ManyExtents,
            size: 4 << 60,
        };
        let extent = point.layout.extent_bytes(point.size);
        let used: std::collections::BTreeSet<_> =
            (0..point.count).map(|f| point.address(f) / extent).collect();
        assert_eq!(used.len(), 32_768);
        let addresses: std::collections::BTreeSet<_> = (0..point.count).map(|f| point.address(f)).collect();
        assert_eq!(addresses.len(), 40_000);
    }
}

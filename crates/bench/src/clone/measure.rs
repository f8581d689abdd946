//! One case from an empty filesystem to its figures: create, commit, snapshot, overwrite, mount again, read, check.

use std::fmt;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use loam_block::PatternDevice;
use loam_sys::btrfs::{self, InodeFlags};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::{Advice, Mode, OFlags};

use super::filesystem::{Filesystem, Place};
use super::percentile::{median, percentile};
use super::plan::{CLONE_BYTES, Layout, Part, Point};
use super::workers::{self, Tools, Work};
use crate::record::{Metrics, stop_if_interrupted};

/// Bytes of one overwrite and of one read.
const BLOCK: u64 = 4096;
/// How often progress is shown.
const PROGRESS: Duration = Duration::from_millis(500);

/// How much is sampled of each case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    pub(super) snapshots: u32,
    pub(super) overwrites: u32,
    pub(super) reads: u32,
}

/// What one sampled access touches: a file, and a block of it.
#[derive(Debug, Clone, Copy)]
struct Sample {
    file: u64,
    /// In the file, bytes.
    offset: u64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {}, byte {}", self.file, self.offset)
    }
}

/// Runs one case.
pub(super) fn measure(point: &Point, place: &Place, samples: Samples, seed: u64) -> Result<Metrics> {
    let mut filesystem = Filesystem::make(point.layout, point.size, place).context("cannot set up")?;
    let mut metrics = Metrics::new();
    create(point, &filesystem, &mut metrics)?;
    snapshot(&filesystem, samples.snapshots, &mut metrics)?;
    let mut random = StdRng::seed_from_u64(seed);
    let overwritten = choose(point, samples.overwrites, &mut random);
    overwrite(point, &filesystem, &overwritten, &mut metrics)?;
    let mounted = filesystem.remount()?;
    metrics.insert("mount_seconds".into(), mounted.as_secs_f64());
    let read = choose(point, samples.reads, &mut random);
    let blocks = read_cold(point, &filesystem, &read, &mut metrics)?;
    check(point, &filesystem, &read, &blocks, &overwritten)?;
    Ok(metrics)
}

/// Creates all files and commits them.
fn create(point: &Point, filesystem: &Filesystem, metrics: &mut Metrics) -> Result<()> {
    let parts = point.parts();
    let tools = prepare(point, filesystem, &parts)?;
    let root = filesystem.root()?;
    btrfs::sync(&root)?;
    let before = filesystem.metadata_bytes()?;
    let work = with_progress(point, |made| workers::run(point, &parts, &tools, made))?;
    let started = Instant::now();
    btrfs::sync(&root)?;
    metrics.insert("commit_seconds".into(), started.elapsed().as_secs_f64());
    let bytes = filesystem.metadata_bytes()?.saturating_sub(before);
    metrics.insert("metadata_bytes_per_file".into(), bytes as f64 / point.count as f64);
    insert_work(point.count, &work, metrics);
    Ok(())
}

fn insert_work(count: u64, work: &Work, metrics: &mut Metrics) {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / count as f64;
    let steps = &work.steps;
    metrics.insert("clones_per_second".into(), count as f64 / work.elapsed.as_secs_f64());
    for (name, time) in [
        ("create_us", steps.create),
        ("clone_us", steps.clone),
        ("times_us", steps.times),
        ("link_us", steps.link),
        ("close_us", steps.close),
    ] {
        metrics.insert(name.into(), each(time));
    }
    if let Some(scheduled) = work.scheduled {
        let asleep = work.in_threads.saturating_sub(scheduled.running + scheduled.waiting);
        metrics.insert("running_us".into(), each(scheduled.running));
        metrics.insert("no_processor_us".into(), each(scheduled.waiting));
        metrics.insert("asleep_us".into(), each(asleep));
    }
}

/// Makes subvolumes, sources and directories.
fn prepare(point: &Point, filesystem: &Filesystem, parts: &[Part]) -> Result<Vec<Tools>> {
    let root = filesystem.root()?;
    for number in 0..point.subvolumes() {
        btrfs::create_subvolume(&root, subvolume(number))?;
        let subvolume = filesystem.open(&subvolume(number), OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::mkdirat(&subvolume, "staging", Mode::from_raw_mode(0o700))?;
        let staging =
            rustix::fs::openat(&subvolume, "staging", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        btrfs::set_inode_flags(staging.as_fd(), InodeFlags::NOCOW)?;
    }
    let tools = |part: &Part| {
        let path = subvolume(point.subvolume(part.thread));
        let (source, base) = source(filesystem, part)?;
        let directory = format!("{path}/{}", part.thread);
        rustix::fs::mkdirat(&root, &directory, Mode::from_raw_mode(0o755))?;
        let open = |path: &str| filesystem.open(path, OFlags::RDONLY | OFlags::DIRECTORY);
        Ok(Tools { source, base, staging: open(&format!("{path}/staging"))?, directory: open(&directory)? })
    };
    parts.iter().map(tools).collect()
}

/// The file that a thread clones from, and the address of its first byte.
fn source(filesystem: &Filesystem, part: &Part) -> Result<(File, u64)> {
    let virtual_data = filesystem.virtual_data()?;
    let Some(run) = part.source.as_ref().filter(|run| !run.is_empty()) else { return Ok((virtual_data, 0)) };
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let name = format!("source{}", part.thread);
    let file = File::from(rustix::fs::openat(filesystem.root()?, name, flags, Mode::from_raw_mode(0o600))?);
    btrfs::set_inode_flags(&file, InodeFlags::NOCOW)?;
    btrfs::clone_range(&virtual_data, run.start, run.end - run.start, &file, 0)?;
    Ok((file, run.start))
}

fn subvolume(number: u32) -> String {
    format!("image{number}")
}

/// Shows on a terminal how far `work` is.
fn with_progress(point: &Point, work: impl FnOnce(&AtomicU64) -> Result<Work>) -> Result<Work> {
    let (made, done) = (AtomicU64::new(0), AtomicBool::new(false));
    if !std::io::stderr().is_terminal() {
        return work(&made);
    }
    std::thread::scope(|scope| {
        let shown = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::park_timeout(PROGRESS);
                eprint!("\r{}: {} of {} \x1b[K", point.name(), made.load(Ordering::Relaxed), point.count);
            }
            eprint!("\r\x1b[K");
        });
        let result = work(&made);
        done.store(true, Ordering::Relaxed);
        shown.thread().unpark();
        result
    })
}

/// Snapshots of the first subvolume, one after the other; the first is what is written to later.
fn snapshot(filesystem: &Filesystem, count: u32, metrics: &mut Metrics) -> Result<()> {
    let root = filesystem.root()?;
    let source = filesystem.open(&subvolume(0), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut times = Vec::new();
    for number in 0..count {
        let started = Instant::now();
        btrfs::snapshot(&source, &root, container(number), false)?;
        times.push(started.elapsed());
    }
    times.sort();
    metrics.insert("snapshot_seconds".into(), median(&times).as_secs_f64());
    Ok(())
}

fn container(number: u32) -> String {
    format!("container{number}")
}

/// Files of the first subvolume, and a block of each.
fn choose(point: &Point, count: u32, random: &mut StdRng) -> Vec<Sample> {
    let files: Vec<_> = point
        .parts()
        .into_iter()
        .filter(|part| point.subvolume(part.thread) == 0)
        .map(|part| part.files)
        .collect();
    let last = files.last().map_or(1, |range| range.end);
    let block = |random: &mut StdRng| random.random_range(0..CLONE_BYTES / BLOCK) * BLOCK;
    (0..count).map(|_| Sample { file: random.random_range(0..last), offset: block(random) }).collect()
}

/// What an overwritten block holds.
fn overwritten_block(sample: Sample) -> [u8; BLOCK as usize] {
    let mut block = [0xff; BLOCK as usize];
    block[..8].copy_from_slice(&sample.file.to_le_bytes());
    block[8..16].copy_from_slice(&sample.offset.to_le_bytes());
    block
}

/// Overwrites blocks in a snapshot, as a container does, each followed by fsync.
fn overwrite(
    point: &Point,
    filesystem: &Filesystem,
    samples: &[Sample],
    metrics: &mut Metrics,
) -> Result<()> {
    let mut times = Vec::with_capacity(samples.len());
    for &sample in samples {
        stop_if_interrupted()?;
        let file = open_in(&container(0), filesystem, point, sample, OFlags::WRONLY)?;
        let block = overwritten_block(sample);
        let started = Instant::now();
        file.write_all_at(&block, sample.offset)?;
        file.sync_data()?;
        times.push(started.elapsed());
    }
    insert_percentiles("overwrite", times, metrics);
    Ok(())
}

fn open_in(
    subvolume: &str,
    filesystem: &Filesystem,
    point: &Point,
    sample: Sample,
    flags: OFlags,
) -> Result<File> {
    filesystem.open(&format!("{subvolume}/{}", point.path(sample.file)), flags)
}

/// Reads blocks through clones that nobody has looked at since the filesystem was mounted.
fn read_cold(
    point: &Point,
    filesystem: &Filesystem,
    samples: &[Sample],
    metrics: &mut Metrics,
) -> Result<Vec<Vec<u8>>> {
    let (mut opens, mut reads, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
    for &sample in samples {
        stop_if_interrupted()?;
        let started = Instant::now();
        let file = open_in(&subvolume(0), filesystem, point, sample, OFlags::RDONLY)?;
        opens.push(started.elapsed());
        // One block is asked for: what the kernel would read around it is another question.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
        let mut block = vec![0; BLOCK as usize];
        let started = Instant::now();
        file.read_exact_at(&mut block, sample.offset)?;
        reads.push(started.elapsed());
        blocks.push(block);
    }
    insert_percentiles("cold_open", opens, metrics);
    insert_percentiles("cold_read", reads, metrics);
    Ok(blocks)
}

/// Checks what was read, and that overwritten files hold what was written and next to it what was there before.
fn check(
    point: &Point,
    filesystem: &Filesystem,
    samples: &[Sample],
    blocks: &[Vec<u8>],
    overwritten: &[Sample],
) -> Result<()> {
    let virtual_data = filesystem.virtual_data()?;
    for (&sample, block) in samples.iter().zip(blocks) {
        check_virtual(point, &virtual_data, sample, block)?;
    }
    for &sample in overwritten {
        stop_if_interrupted()?;
        let file = open_in(&container(0), filesystem, point, sample, OFlags::RDONLY)?;
        let mut block = vec![0; BLOCK as usize];
        file.read_exact_at(&mut block, sample.offset)?;
        ensure!(block == overwritten_block(sample), "{sample}: this is not what was written");
        let beside = Sample { offset: (sample.offset + BLOCK) % CLONE_BYTES, ..sample };
        let is_written = |other: &Sample| (other.file, other.offset) == (beside.file, beside.offset);
        if !overwritten.iter().any(is_written) {
            file.read_exact_at(&mut block, beside.offset)?;
            check_virtual(point, &virtual_data, beside, &block)?;
        }
    }
    Ok(())
}

/// Checks a block of a clone against the block of the virtual region that it shares, and that against the pattern.
fn check_virtual(point: &Point, virtual_data: &File, sample: Sample, block: &[u8]) -> Result<()> {
    let address = point.address(sample.file) + sample.offset;
    let mut expected = vec![0; BLOCK as usize];
    virtual_data.read_exact_at(&mut expected, address)?;
    ensure!(block == expected, "{sample}: these are not the bytes of address {address}");
    // mkfs decides where a file's blocks lie, so there the pattern only has to be one.
    let place = match point.layout {
        Layout::SmallExtents => block.first_chunk().map_or(0, |word| u64::from_be_bytes(*word)),
        _ => address,
    };
    ensure!(place.is_multiple_of(BLOCK), "{sample}: a block that begins with {place} is not of the pattern");
    PatternDevice::verify(place, block).with_context(|| sample.to_string())
}

fn insert_percentiles(name: &str, mut times: Vec<Duration>, metrics: &mut Metrics) {
    times.sort();
    let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
    for (label, rank) in [("p50", 50.0), ("p90", 90.0), ("p99", 99.0)] {
        metrics.insert(format!("{name}_{label}_us"), microseconds(percentile(&times, rank)));
    }
    metrics.insert(format!("{name}_max_us"), microseconds(percentile(&times, 100.0)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::plan::Arrangement;

    #[test]
    fn samples_lie_in_the_first_subvolume_and_repeat_with_their_seed() {
        let point = Point {
            count: 100,
            layout: Layout::Pair,
            threads: 4,
            arrangement: Arrangement::OwnSubvolume,
            size: 4 << 60,
        };
        let chosen = choose(&point, 500, &mut StdRng::seed_from_u64(1));
        assert!(chosen.iter().all(|s| s.file < 25 && s.offset < CLONE_BYTES && s.offset % BLOCK == 0));
        assert!(chosen.iter().any(|s| s.file > 20) && chosen.iter().any(|s| s.offset == CLONE_BYTES - BLOCK));
        let again = choose(&point, 500, &mut StdRng::seed_from_u64(1));
        assert!(chosen.iter().zip(&again).all(|(a, b)| (a.file, a.offset) == (b.file, b.offset)));
    }
}

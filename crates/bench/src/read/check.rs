//! That what is read is right. fio measures, but knows no pattern in which each word holds its own offset, so the same
//! target is read by this module outside the timed runs: once wholly, and before every run at random places with as
//! many reads under way as the run will have, because that is when bytes of one request end up in another's pages.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use loam_block::PatternDevice;
use loam_sys::map_file::MappedFile;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::workload::{Engine, Workload};

/// Bytes of a read, as fio's.
const BLOCK: usize = 4096;
/// Bytes of a piece when all is read.
const PIECE: usize = 1 << 20;
/// A file longer than this is read wholly only at its ends and where its quarters meet.
const WHOLE_MAX: u64 = 2 << 30;
/// Reads of one check before a run, how long it takes at most (each reader makes one in any case), and the most that are
/// under way.
const SAMPLES: u32 = 2048;
const SAMPLING_MAX: Duration = Duration::from_millis(500);
const UNDER_WAY_MAX: u32 = 64;

/// What the bytes have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// Each aligned 8 bytes hold their own offset, big-endian.
    Pattern,
    /// Zeroes.
    Zeroes,
    /// Whatever they are: a target that holds nothing (rublk's null leaves the buffer as it was).
    Anything,
}

impl Expected {
    fn check(self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Expected::Pattern => Ok(PatternDevice::verify(offset, bytes)?),
            Expected::Zeroes => match bytes.iter().position(|byte| *byte != 0) {
                Some(at) => Err(anyhow!("byte {} is not zero", offset + at as u64)),
                None => Ok(()),
            },
            Expected::Anything => Ok(()),
        }
    }
}

/// A wrong byte: this ends the benchmark.
#[derive(Debug, thiserror::Error)]
#[error("WRONG BYTES read from {path}")]
pub(super) struct WrongBytes {
    path: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn wrong(path: &Path, error: anyhow::Error) -> anyhow::Error {
    WrongBytes { path: path.display().to_string(), source: error.into() }.into()
}

/// A buffer that direct reads take: it begins on a page.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0xA5; length + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Aligned { bytes, start, length }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

fn open(path: &Path, direct: bool) -> Result<File> {
    let flags = if direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Reads all of the first `size` bytes, through the page cache, which holds none of them afterwards.
pub(super) fn whole(path: &Path, size: u64, expected: Expected) -> Result<()> {
    let file = open(path, false)?;
    let mut piece = Aligned::new(PIECE);
    let quarter = size / 4;
    let edges = [0, quarter, 3 * quarter, size];
    let near = |start: u64| edges.iter().any(|edge| edge.abs_diff(start) <= 16 * PIECE as u64);
    for start in (0..size).step_by(PIECE).filter(|start| size <= WHOLE_MAX || near(*start)) {
        let length = PIECE.min((size - start) as usize);
        let buffer = &mut piece.get()[..length];
        file.read_exact_at(buffer, start).with_context(|| format!("{}: byte {start}", path.display()))?;
        expected.check(start, buffer).map_err(|error| wrong(path, error))?;
    }
    // Advice: a file system that ignores it is measured warm, as it would be without.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    Ok(())
}

/// Reads blocks at random places as `workload` will. Returns how many.
pub(super) fn sample(
    path: &Path,
    size: u64,
    expected: Expected,
    workload: &Workload,
    seed: u64,
) -> Result<u32> {
    if workload.engine == Engine::Mmap && path.metadata()?.is_file() {
        return mapped(path, size, expected, seed);
    }
    let threads = (workload.jobs * workload.depth).clamp(1, UNDER_WAY_MAX);
    let started = Instant::now();
    let read = |thread: u32| {
        let mut random = StdRng::seed_from_u64(seed ^ u64::from(thread) << 32);
        let file = open(path, workload.direct)?;
        let mut block = Aligned::new(BLOCK);
        for done in 0..SAMPLES / threads {
            if done > 0 && started.elapsed() > SAMPLING_MAX {
                return Ok(done);
            }
            let offset = random.random_range(0..size / BLOCK as u64) * BLOCK as u64;
            let buffer = block.get();
            buffer.fill(0xA5);
            let read = file.read_exact_at(buffer, offset);
            read.with_context(|| format!("{}: byte {offset}", path.display()))?;
            expected.check(offset, buffer).map_err(|error| wrong(path, error))?;
        }
        Ok(SAMPLES / threads)
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || read(thread))).collect();
        let joined = readers.into_iter().map(|reader| reader.join());
        joined.map(|done| done.unwrap_or_else(|_| Err(anyhow!("a reader panicked")))).sum()
    })
}

fn mapped(path: &Path, size: u64, expected: Expected, seed: u64) -> Result<u32> {
    let map = MappedFile::map(&open(path, false)?)?;
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..SAMPLES {
        let offset = random.random_range(0..size / BLOCK as u64) * BLOCK as u64;
        let block = map.get(offset as usize..offset as usize + BLOCK).context("the file is too short")?;
        expected.check(offset, block).map_err(|error| wrong(path, error))?;
    }
    Ok(SAMPLES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_is_found_by_either_check() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let size = 4 * BLOCK as u64;
        let mut bytes: Vec<u8> = (0..size / 8).flat_map(|word| (word * 8).to_be_bytes()).collect();
        std::fs::write(&path, &bytes).unwrap();
        let workloads = ["psync:2:buffered", "mmap:1"].map(|text| text.parse::<Workload>().unwrap());
        whole(&path, size, Expected::Pattern).unwrap();
        for workload in &workloads {
            assert_eq!(sample(&path, size, Expected::Pattern, workload, 1).unwrap(), SAMPLES);
        }
        bytes.swap(100, 9000);
        bytes[100] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(whole(&path, size, Expected::Pattern).unwrap_err().is::<WrongBytes>());
        for workload in &workloads {
            assert!(sample(&path, size, Expected::Pattern, workload, 1).unwrap_err().is::<WrongBytes>());
        }
        assert!(whole(&path, size, Expected::Zeroes).is_err());
        assert!(whole(&path, size, Expected::Anything).is_ok());
    }
}

//! Measures a map of a million ranges: making, opening, looking up, memory.
//!
//! `cargo run --release -p loam-space --example map_million [DIRECTORY]`; the map is made in a temporary directory
//! unless one is named.

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_block::{BlockDevice, Io, NullDevice};
use loam_space::{Address, AddressSpace, Allocation, BLOCK, ContentId, Map, Resolver, Unmapped};

const RANGES: u64 = 1_000_000;
const LOOKUPS: u64 = 2_000_000;
const OPENS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir_in("/var/tmp")?;
    let path = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("map"), Into::into);
    let baseline = resident_bytes()?;

    let began = Instant::now();
    let map = Map::create(&path, 4 << 60)?;
    let content = map.add_content(b"example")?;
    let requests: Vec<_> = (0..RANGES)
        .map(|i| Allocation {
            content,
            content_offset: i * BLOCK,
            length: (1 + i % 7) * BLOCK,
            alignment: BLOCK,
        })
        .collect();
    for batch in requests.chunks(100_000) {
        map.allocate_batch(batch)?;
    }
    println!("made: {RANGES} ranges in {:?}", began.elapsed());
    drop((map, requests));

    let mut opens: Vec<Duration> = Vec::new();
    for _ in 0..OPENS {
        let began = Instant::now();
        black_box(Map::open(&path)?);
        opens.push(began.elapsed());
    }
    opens.sort();
    println!("open: median {:?}, worst {:?}", opens[OPENS / 2], opens[OPENS - 1]);

    let map = Map::open(&path)?;
    let grown = resident_bytes()?.saturating_sub(baseline);
    println!("resident: {:.1} MiB more than before, mapped table included", grown as f64 / (1 << 20) as f64);

    let mapped = map.stats().mapped_bytes;
    let mut state = 1u64;
    let began = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    for _ in 0..LOOKUPS {
        // A multiplicative generator: the next address depends on nothing that a look-up returns.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        black_box(map.lookup(Address((state >> 16) % mapped)).ok_or("unmapped")?);
    }
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime) - began;
    let nanoseconds = spent.tv_sec as u64 * 1_000_000_000 + spent.tv_nsec as u64;
    println!("look-up, random: {} ns of processor time", nanoseconds / LOOKUPS);

    println!("  (one random read of memory as large as the table: {} ns)", memory_latency());

    let space = AddressSpace::new(Arc::new(map), Arc::new(Nothing), Unmapped::Error);
    println!("read of 4 KiB of a content that costs nothing: {} ns", hit_time(&space, mapped)?);

    let map = space.map();
    let began = Instant::now();
    for _ in 0..20 {
        map.allocate(content, BLOCK, BLOCK)?;
    }
    println!("allocate, durably: {:?}", began.elapsed() / 20);
    Ok(())
}

/// Contents that are all zero and cost nothing to read.
struct Nothing;

impl Resolver for Nothing {
    fn resolve<'a>(&'a self, _content: ContentId, _spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>> {
        Io::Ready(Ok(Arc::new(NullDevice::new(1 << 40))))
    }
}

/// Processor time of a hit: map, slot, and the call, over random addresses that may straddle ranges.
fn hit_time(space: &AddressSpace, mapped: u64) -> Result<u64, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut buffer = [0; BLOCK as usize];
    runtime.block_on(space.read(0, &mut buffer))?;
    let mut state = 1u64;
    let began = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    for _ in 0..LOOKUPS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (state >> 16) % (mapped / BLOCK) * BLOCK;
        match space.read(offset, &mut buffer) {
            Io::Ready(result) => result?,
            Io::Pending(_) => return Err("a hit must be ready".into()),
        }
    }
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime) - began;
    Ok((spent.tv_sec as u64 * 1_000_000_000 + spent.tv_nsec as u64) / LOOKUPS)
}

/// What the machine takes for one read of a random word in 32 MiB, each depending on the one before: the floor under a
/// look-up, and a measure of how busy the machine is.
fn memory_latency() -> u64 {
    let words: Vec<u64> = (0..RANGES * 4).collect();
    let began = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let (mut state, mut found) = (1u64, 0);
    for _ in 0..LOOKUPS {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407 + found % 2);
        found = black_box(words[((state >> 16) % words.len() as u64) as usize]);
    }
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime) - began;
    (spent.tv_sec as u64 * 1_000_000_000 + spent.tv_nsec as u64) / LOOKUPS
}

/// Resident set of this process, from `/proc/self/statm` (proc(5)), in bytes.
fn resident_bytes() -> Result<u64, Box<dyn Error>> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).ok_or("statm has no second field")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

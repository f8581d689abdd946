//! Power is lost at every operation that changes the disk, and the disk keeps any mixture of what was not synced.
//! Whatever the map had answered with success must be there afterwards, and no address may be given out twice.

mod common;

use std::io;

use common::Sim;
use loam_sim::SimDisk;
use loam_space::{Address, Allocation, BLOCK, ContentId, Error, Map, Range};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 1 << 40;
const STEPS: u32 = 24;
/// Seed 0 drops all that was not synced, 1 keeps it, the others mix.
const POWER_SEEDS: u64 = 6;

/// What a user of the map has been told.
#[derive(Debug, Default, Clone)]
struct Told {
    created: bool,
    contents: Vec<Vec<u8>>,
    ranges: Vec<Range>,
    reserved: Vec<(Address, u64)>,
    failures: u32,
}

impl Told {
    /// Runs one call and notes what it answers.
    fn step(&mut self, map: &Map<Sim>, random: &mut StdRng) -> Result<(), Error> {
        let content = |random: &mut StdRng, told: &Told| {
            ContentId(random.random_range(0..told.contents.len().max(1)) as u32)
        };
        let length = random.random_range(1..20) * BLOCK;
        let alignment = BLOCK << random.random_range(0..4);
        match random.random_range(0..12) {
            0..=1 => {
                let spec: Vec<u8> = (0..random.random_range(0..1500)).map(|_| random.random()).collect();
                let id = map.add_content(&spec)?;
                assert_eq!(id.0 as usize, self.contents.len());
                self.contents.push(spec);
            }
            2..=5 => {
                let content = content(random, self);
                self.ranges.push(map.allocate(content, length, alignment)?);
            }
            6..=7 => {
                let requests: Vec<_> = (0..random.random_range(1..90))
                    .map(|i| Allocation {
                        content: content(random, self),
                        content_offset: i * BLOCK,
                        length,
                        alignment,
                    })
                    .collect();
                self.ranges.extend(map.allocate_batch(&requests)?);
            }
            8 => self.reserved.push((map.reserve(length, alignment)?, length)),
            9..=10 => {
                let Some((start, length)) = self.reserved.last().copied() else { return Ok(()) };
                let content = content(random, self);
                let range = Range { start, length, content, content_offset: 0 };
                if !self.ranges.iter().any(|known| known.start == start) {
                    map.add_ranges(&[range])?;
                    self.ranges.push(range);
                }
            }
            _ => map.compact()?,
        }
        Ok(())
    }

    /// A whole life of a map, up to the first failure or, where `tolerant`, through all of them.
    fn live(disk: &SimDisk, seed: u64, tolerant: bool) -> Told {
        let mut told = Told::default();
        let mut random = StdRng::seed_from_u64(seed);
        let Ok(mut map) = Map::create_in(Sim(disk.clone()), SIZE) else { return told };
        told.created = true;
        for step in 0..STEPS {
            if step == STEPS / 2 {
                drop(map);
                match Map::open_in(Sim(disk.clone())) {
                    Ok(reopened) => map = reopened,
                    Err(_) => return told,
                }
                // What a failed call left may be there, and then it stays.
                told.contents = map.contents().into_iter().map(|(_, spec)| spec).collect();
                told.ranges = map.ranges().collect();
            }
            if let Err(error) = told.step(&map, &mut random) {
                if told.contents.is_empty() && matches!(error, Error::UnknownContent(_)) {
                    continue;
                }
                told.failures += 1;
                if !tolerant {
                    return told;
                }
            }
        }
        told
    }

    /// Checks a map that was opened after the power came back, takes what it says as told, and gives out one range.
    fn check(&mut self, map: &Map<Sim>, context: &str) {
        self.adopt(map, context);
        self.use_again(map, context);
    }

    fn adopt(&mut self, map: &Map<Sim>, context: &str) {
        let contents: Vec<_> = map.contents().into_iter().map(|(_, spec)| spec).collect();
        let ranges: Vec<_> = map.ranges().collect();
        assert!(contents.starts_with(&self.contents), "{context}: a content is gone or changed");
        assert!(contents.len() <= self.contents.len() + 1, "{context}: contents out of nothing");
        for range in &self.ranges {
            assert_eq!(map.lookup(range.start), Some(*range), "{context}");
            let last = Address(range.end().0 - 1);
            assert_eq!(map.lookup(last), Some(*range), "{context}");
        }
        for pair in ranges.windows(2) {
            assert!(pair[0].end() <= pair[1].start, "{context}: {pair:?} overlap");
        }
        (self.contents, self.ranges) = (contents, ranges);
    }

    fn use_again(&mut self, map: &Map<Sim>, context: &str) {
        if self.contents.is_empty() {
            let id = map.add_content(b"after").expect("a content");
            self.contents.push(b"after".to_vec());
            assert_eq!(id, ContentId(0));
        }
        let new = map.allocate(ContentId(0), BLOCK, BLOCK).expect("a range after the crash");
        let taken = self.ranges.iter().map(|range| (range.start, range.length)).chain(self.reserved.clone());
        for (start, length) in taken {
            let apart = new.end() <= start || start.0 + length <= new.start.0;
            assert!(apart, "{context}: {new:?} was given out before, {length} bytes at {start}");
        }
        self.ranges.push(new);
    }
}

/// Opens and checks what a power failure left; then lets the power go again while that happens.
fn check_disk(disk: &SimDisk, told: &Told, power_seed: u64, context: &str) {
    let after = disk.power_cycle(power_seed);
    let mut told_after = told.clone();
    match Map::open_in(Sim(after.clone())) {
        Ok(map) => told_after.check(&map, context),
        Err(Error::Missing { .. }) if !told.created => return,
        Err(error) => panic!("{context}: {error}"),
    }
    // What was shown after the crash must outlive the next one.
    let again = after.power_cycle(0);
    let map = Map::open_in(Sim(again)).unwrap_or_else(|error| panic!("{context}, again: {error}"));
    told_after.check(&map, &format!("{context}, again"));
}

#[test]
fn power_is_lost_at_every_operation() {
    for seed in 0..6 {
        let whole = SimDisk::new();
        let told = Told::live(&whole, seed, false);
        assert_eq!(told.failures, 0);
        for crash in 0..whole.operations() {
            let disk = SimDisk::new();
            disk.crash_at(crash);
            let told = Told::live(&disk, seed, false);
            for power_seed in 0..POWER_SEEDS {
                let context = format!("seed {seed}, crash at {crash}, power seed {power_seed}");
                check_disk(&disk, &told, power_seed, &context);
            }
        }
    }
}

/// The page cache survives, so a new process sees records that nobody was told of and that are not durable. What it
/// shows must be.
#[test]
fn the_process_is_killed_at_every_operation() {
    for seed in 0..4 {
        let whole = SimDisk::new();
        Told::live(&whole, seed, false);
        for crash in 0..whole.operations() {
            for power_seed in 0..POWER_SEEDS {
                let disk = SimDisk::new();
                disk.crash_at(crash);
                let mut told = Told::live(&disk, seed, false);
                disk.revive();
                let context = format!("seed {seed}, killed at {crash}, power seed {power_seed}");
                match Map::open_in(Sim(disk.clone())) {
                    Ok(map) => told.adopt(&map, &context),
                    Err(Error::Missing { .. }) if !told.created => continue,
                    Err(error) => panic!("{context}: {error}"),
                }
                told.created = true;
                check_disk(&disk, &told, power_seed, &context);
            }
        }
    }
}

#[test]
fn power_is_lost_while_recovering() {
    let seed = 3;
    let whole = SimDisk::new();
    Told::live(&whole, seed, false);
    for crash in (0..whole.operations()).step_by(3) {
        let disk = SimDisk::new();
        disk.crash_at(crash);
        let told = Told::live(&disk, seed, false);
        let operations = {
            let after = disk.power_cycle(5);
            let _ = Map::open_in(Sim(after.clone()));
            after.operations()
        };
        for second in 0..operations {
            let after = disk.power_cycle(5);
            after.crash_at(second);
            let _ = Map::open_in(Sim(after.clone()));
            for power_seed in 0..POWER_SEEDS {
                let context = format!("crash at {crash}, then at {second}, power seed {power_seed}");
                check_disk(&after, &told, power_seed, &context);
            }
        }
    }
}

#[test]
fn an_operation_that_fails_loses_nothing_that_was_told() {
    for seed in 0..4 {
        let whole = SimDisk::new();
        Told::live(&whole, seed, false);
        for failing in 0..whole.operations() {
            let disk = SimDisk::new();
            disk.fail_at(failing, io::ErrorKind::Other);
            let told = Told::live(&disk, seed, true);
            for power_seed in 0..POWER_SEEDS {
                let context = format!("seed {seed}, failure at {failing}, power seed {power_seed}");
                check_disk(&disk, &told, power_seed, &context);
            }
        }
    }
}

#[test]
fn a_failed_sync_latches() {
    let disk = SimDisk::new();
    let map = Map::create_in(Sim(disk.clone()), SIZE).expect("create");
    let content = map.add_content(b"x").expect("content");
    disk.fail_at(disk.operations() + 1, io::ErrorKind::Other);
    assert!(matches!(map.allocate(content, BLOCK, BLOCK), Err(Error::Io { .. })));
    for _ in 0..2 {
        assert!(matches!(map.allocate(content, BLOCK, BLOCK), Err(Error::Latched { .. })));
        assert!(matches!(map.compact(), Err(Error::Latched { .. })));
    }
    assert_eq!(map.ranges().count(), 0);
}

#[test]
fn a_full_disk_refuses_and_recovers() {
    for room in 0..400 {
        let disk = SimDisk::new();
        let map = Map::create_in(Sim(disk.clone()), SIZE).expect("create");
        let content = map.add_content(b"x").expect("content");
        let kept = map.allocate(content, BLOCK, BLOCK).expect("range");
        let used = disk.open("log").and_then(|log| log.length()).expect("length") as usize;
        disk.set_capacity(Some(used + room));
        let request = Allocation { content, content_offset: 0, length: BLOCK, alignment: BLOCK };
        let refused = map.allocate_batch(&[request; 20]);
        assert!(matches!(refused, Err(Error::Io { .. })), "{room}: {refused:?}");
        assert!(map.compact().is_err());
        assert_eq!(map.ranges().collect::<Vec<_>>(), [kept]);
        disk.set_capacity(None);
        let ranges = map.allocate_batch(&[request; 20]).expect("room again");
        let told = Told { created: true, contents: vec![b"x".to_vec()], ranges, ..Told::default() };
        for power_seed in 0..POWER_SEEDS {
            check_disk(&disk, &told, power_seed, &format!("room {room}, power seed {power_seed}"));
        }
    }
}

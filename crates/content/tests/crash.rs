//! Power cuts and races: whatever is left of the cache's files, and whoever evicts, damages and reads at once, a reader
//! sees the content's bytes or an error, never others.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Fake;
use loam_block::conformance::{self, Contents, Profile};
use loam_block::{BlockDevice, ErrorKind, Locality};
use loam_content::{Cache, CacheOptions, CachedDevice, ReadAhead};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const CHUNK: u32 = 16 << 10;
const LENGTH: usize = 40 * CHUNK as usize + 4096;

fn options() -> CacheOptions {
    CacheOptions {
        read_ahead: ReadAhead { window_bytes_max: 0, demand_bytes: 0, ..ReadAhead::default() },
        failure_memory: Duration::ZERO,
        ..CacheOptions::default()
    }
}

fn content_directory(cache: &Path) -> PathBuf {
    let mut directories =
        fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    directories.next().unwrap()
}

async fn settled(device: &CachedDevice, bytes: u64) {
    while device.local_bytes() != bytes {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What is left of a file that was `old` when last synced and `new` when the power went: each sector is the old one, the
/// new one, zeros, or (rarely) rubbish.
fn torn(old: &[u8], new: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut left = new.to_vec();
    let calm = rng.random_range(1..20);
    for (sector, bytes) in left.chunks_mut(512).enumerate() {
        if rng.random_range(0..calm) != 0 {
            continue;
        }
        let old = old.get(sector * 512..sector * 512 + bytes.len());
        match (rng.random_range(0..20), old) {
            (0, _) => rng.fill(bytes),
            (1..=9, Some(old)) => bytes.copy_from_slice(old),
            _ => bytes.fill(0),
        }
    }
    left
}

#[tokio::test]
async fn torn_files_never_give_wrong_bytes() {
    let source = Arc::new(Fake::new(LENGTH, CHUNK, true));
    let whole = source.original();
    let dir = tempfile::tempdir().unwrap();
    // Half of it, then all of it with some evicted and fetched again.
    let snapshot =
        |names: [&str; 2]| names.map(|name| fs::read(content_directory(dir.path()).join(name)).unwrap());
    let (old, new) = {
        let cache = Cache::open(dir.path(), options()).unwrap();
        let device = cache.device("a", source.clone()).unwrap();
        let mut buffer = vec![0; LENGTH / 2 / 4096 * 4096];
        device.read(0, &mut buffer).await.unwrap();
        settled(&device, 20 * u64::from(CHUNK)).await;
        let old = snapshot(["data", "table"]);
        let mut buffer = vec![0; LENGTH];
        device.read(0, &mut buffer).await.unwrap();
        settled(&device, LENGTH as u64).await;
        cache.evict(LENGTH as u64 / 3);
        let half = &mut buffer[..LENGTH / 2 / 4096 * 4096];
        device.read(0, half).await.unwrap();
        let all_local = Locality { offset: 0, length: half.len() as u64, local: true };
        // A reader is answered before what was fetched for it is stored.
        while !device.locality(0, half.len() as u64, 1).await.unwrap()[0].eq(&all_local) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (old, snapshot(["data", "table"]))
    };
    let (mut bad, mut local) = (0, 0);
    for seed in 0..150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let content = dir.path().join(content_directory_name(&old));
        fs::create_dir(&content).unwrap();
        fs::write(content.join("data"), torn(&old[0], &new[0], &mut rng)).unwrap();
        fs::write(content.join("table"), torn(&old[1], &new[1], &mut rng)).unwrap();
        if rng.random_range(0..10) == 0 {
            let file = fs::File::options().write(true).open(content.join("data")).unwrap();
            file.set_len(rng.random_range(0..LENGTH as u64)).unwrap();
        }
        let cache = Cache::open(dir.path(), options()).unwrap();
        let device = cache.device("a", source.clone()).unwrap();
        local += cache.stats().bytes;
        for _ in 0..2 {
            let mut at = 0;
            while at < LENGTH {
                let length = (rng.random_range(1..12) * 4096).min(LENGTH - at);
                let mut buffer = vec![0xAA; length];
                device.read(at as u64, &mut buffer).await.unwrap();
                assert!(buffer == whole[at..at + length], "seed {seed}: wrong bytes at {at}");
                at += length;
            }
        }
        bad += cache.stats().bad_blocks;
    }
    assert!(
        bad > 100 && local > 0,
        "the simulation must damage what is believed to be there: {bad} bad, {local} local"
    );
}

fn content_directory_name(table: &[Vec<u8>; 2]) -> String {
    let key_bytes = u32::from_le_bytes(table[1][28..32].try_into().unwrap()) as usize;
    loam_content::Digest::of(&table[1][32..32 + key_bytes]).to_string()[..32].to_owned()
}

/// Readers, an evictor and a damager at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_see_right_bytes_while_chunks_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let limited = CacheOptions { limit_bytes: 12 * u64::from(CHUNK), ..CacheOptions::default() };
    let cache = Arc::new(Cache::open(dir.path(), limited).unwrap());
    let source = Arc::new(Fake::new(LENGTH, CHUNK, false));
    let device = cache.device("a", source.clone()).unwrap();
    let whole = Arc::new(source.original());
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..6u64)
        .map(|seed| {
            let (device, whole, stop) = (device.clone(), whole.clone(), stop.clone());
            tokio::spawn(async move {
                let mut rng = StdRng::seed_from_u64(seed);
                let mut reads = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let at = rng.random_range(0..LENGTH / 4096) * 4096;
                    let length = (rng.random_range(1..10) * 4096).min(LENGTH - at);
                    let mut buffer = vec![0xAA; length];
                    device.read(at as u64, &mut buffer).await.unwrap();
                    assert!(buffer == whole[at..at + length], "seed {seed}: wrong bytes at {at}");
                    reads += 1;
                    tokio::task::yield_now().await;
                }
                reads
            })
        })
        .collect();
    let evictor = {
        let (cache, stop) = (cache.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(99);
            while !stop.load(Ordering::Relaxed) {
                cache.evict(rng.random_range(0..12) * u64::from(CHUNK));
                std::thread::sleep(Duration::from_micros(rng.random_range(0..500)));
            }
        })
    };
    tokio::time::sleep(Duration::from_secs(2)).await;
    stop.store(true, Ordering::Relaxed);
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.unwrap();
    }
    tokio::task::spawn_blocking(|| evictor.join().unwrap()).await.unwrap();
    // What was fetched ahead still comes in, and its room is taken before it is there.
    let mut calm = 0;
    while calm < 50 {
        let before = cache.stats().bytes;
        tokio::time::sleep(Duration::from_millis(1)).await;
        calm = if before == cache.stats().bytes { calm + 1 } else { 0 };
    }
    let stats = cache.stats();
    assert_eq!(stats.bad_blocks, 0, "an eviction under a reader is no damage: {stats:?}");
    assert!(
        reads > 500 && stats.evicted_chunks > 100 && stats.bytes <= stats.limit,
        "{reads} reads, {stats:?}"
    );
    assert_eq!(stats.bytes, device.local_bytes());
}

/// The runtime ends in the middle of fetches whose digests nobody knew: what was served before is on disk.
#[test]
fn what_was_served_was_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Fake::new(LENGTH, CHUNK, false));
    let mut served = Vec::new();
    for round in 0..10u64 {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let got = Arc::new(std::sync::Mutex::new(Vec::new()));
        runtime.block_on(async {
            let cache = Cache::open(dir.path(), options()).unwrap();
            let device = cache.device("a", source.clone()).unwrap();
            for chunk in 0..40u64 {
                let (device, got) = (device.clone(), got.clone());
                tokio::spawn(async move {
                    let mut buffer = vec![0; CHUNK as usize];
                    if device.read(chunk * u64::from(CHUNK), &mut buffer).await.is_ok() {
                        got.lock().unwrap().push(chunk);
                    }
                });
            }
            tokio::time::sleep(Duration::from_micros(round * 400)).await;
        });
        runtime.shutdown_timeout(Duration::from_secs(5));
        served.extend(got.lock().unwrap().iter().copied());
    }
    assert!(!served.is_empty());
    // The source lies from now on: it is found out for every chunk that was served, once the bytes are gone.
    fs::remove_file(content_directory(dir.path()).join("table")).unwrap();
    for byte in source.bytes.lock().unwrap().iter_mut() {
        *byte ^= 1;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let cache = Cache::open(dir.path(), options()).unwrap();
        let device = cache.device("a", source.clone()).unwrap();
        for chunk in served {
            let mut buffer = vec![0; CHUNK as usize];
            let error = device.read(chunk * u64::from(CHUNK), &mut buffer).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Changed, "chunk {chunk}");
        }
    });
}

#[test]
fn the_device_conforms() {
    for (digests, limit_bytes) in [(true, 1 << 30), (false, 5 * u64::from(CHUNK))] {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), CacheOptions { limit_bytes, ..CacheOptions::default() }).unwrap();
        let device = cache.device("a", Arc::new(Fake::new(LENGTH, CHUNK, digests))).unwrap();
        conformance::run(&device, &Profile { contents: Contents::Fixed, ..Profile::default() });
    }
}

//! A chunk source whose bytes, digests and failures a test chooses, and what tests do with a cache.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use loam_block::{BlockDevice, ErrorKind};
use loam_content::{
    Cache, CacheOptions, CachedDevice, ChunkSender, ChunkSource, Digest, Error, FetchCost, ReadAhead, Result,
    WireTotals,
};

/// Bytes that differ in every block and do not compress to one another.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub struct Fake {
    pub bytes: Mutex<Vec<u8>>,
    pub length: u64,
    pub chunk_bytes: u32,
    /// Digests of the bytes as they were at first, or none.
    pub digests: Option<Vec<Digest>>,
    pub cost: FetchCost,
    pub delay: Mutex<Duration>,
    pub down: AtomicBool,
    pub fetches: AtomicU64,
    pub chunks: AtomicU64,
    pub log: Mutex<Vec<(u64, u64)>>,
}

impl Fake {
    pub fn new(length: usize, chunk_bytes: u32, digests: bool) -> Fake {
        let bytes = pattern(length, 42);
        let of = |bytes: &[u8]| bytes.chunks(chunk_bytes as usize).map(Digest::of).collect();
        Fake {
            length: length as u64,
            chunk_bytes,
            digests: digests.then(|| of(&bytes)),
            bytes: Mutex::new(bytes),
            cost: FetchCost::RandomAccess,
            delay: Mutex::default(),
            down: AtomicBool::new(false),
            fetches: AtomicU64::new(0),
            chunks: AtomicU64::new(0),
            log: Mutex::default(),
        }
    }

    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::SeqCst)
    }

    pub fn original(&self) -> Vec<u8> {
        pattern(self.length as usize, 42)
    }
}

impl ChunkSource for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    fn digest(&self, chunk: u64) -> Option<Digest> {
        self.digests.as_ref().map(|digests| digests[chunk as usize])
    }

    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.fetches.fetch_add(1, Ordering::SeqCst);
            self.log.lock().unwrap().push((first, count));
            let delay = *self.delay.lock().unwrap();
            tokio::time::sleep(delay).await;
            for chunk in first..first + count {
                if self.down.load(Ordering::SeqCst) {
                    return Err(Error::Source { kind: ErrorKind::Unavailable, what: "fake is down".into() });
                }
                let bytes = {
                    let bytes = self.bytes.lock().unwrap();
                    let start = chunk as usize * self.chunk_bytes as usize;
                    let end = bytes.len().min(start + self.chunk_bytes as usize);
                    Bytes::copy_from_slice(&bytes[start..end])
                };
                self.chunks.fetch_add(1, Ordering::SeqCst);
                out.send(bytes).await?;
            }
            Ok(())
        })
    }

    fn fetch_cost(&self) -> FetchCost {
        self.cost
    }

    fn wire(&self) -> WireTotals {
        let chunks = self.chunks.load(Ordering::SeqCst);
        WireTotals { requests: self.fetches(), bytes: chunks * u64::from(self.chunk_bytes) }
    }
}

/// No read-ahead, no memory of failures: what is asked for is what is fetched.
pub fn plain() -> CacheOptions {
    CacheOptions {
        read_ahead: ReadAhead { window_bytes_max: 0, demand_bytes: 0, ..ReadAhead::default() },
        failure_memory: Duration::ZERO,
        ..CacheOptions::default()
    }
}

pub async fn read(device: &CachedDevice, offset: u64, length: usize) -> loam_block::Result<Vec<u8>> {
    let mut buffer = vec![0xAA; length];
    device.read(offset, &mut buffer).await?;
    Ok(buffer)
}

/// Opens a cache that was just dropped: fetches that are still on the way hold its lock.
pub async fn reopen(directory: &Path, options: CacheOptions) -> Cache {
    for _ in 0..2000 {
        match Cache::open(directory, options.clone()) {
            Err(Error::InUse { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            other => return other.unwrap(),
        }
    }
    panic!("the lock was not let go");
}

/// The directory of the only content.
pub fn content_directory(cache: &Path) -> PathBuf {
    let mut directories =
        fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    directories.next().unwrap()
}

/// Waits until what was served is stored too.
pub async fn stored(device: &CachedDevice, bytes: u64) {
    for _ in 0..2000 {
        if device.local_bytes() == bytes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{} bytes are local, not {bytes}", device.local_bytes());
}

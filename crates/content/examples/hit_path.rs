//! What a local hit costs: nanoseconds for a verified 4 KiB read at a random place, by one thread, all chunks cached in a
//! directory on tmpfs (or the one given). `cargo run --release -p loam-content --example hit_path [DIRECTORY]`

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use loam_block::{BlockDevice, Io};
use loam_content::{Cache, CacheOptions, ChunkSender, ChunkSource, Digest, FetchCost, Result, WireTotals};

const CHUNK: usize = 64 << 10;
const LENGTH: u64 = 256 << 20;
const READS: u64 = 2_000_000;

/// Chunks that are all alike but for their first bytes.
struct Synthetic;

impl ChunkSource for Synthetic {
    fn name(&self) -> &str {
        "synthetic"
    }

    fn length(&self) -> u64 {
        LENGTH
    }

    fn chunk_bytes(&self) -> u32 {
        CHUNK as u32
    }

    fn digest(&self, chunk: u64) -> Option<Digest> {
        Some(Digest::of(&chunk_of(chunk)))
    }

    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            for chunk in first..first + count {
                out.send(Bytes::from(chunk_of(chunk))).await?;
            }
            Ok(())
        })
    }

    fn fetch_cost(&self) -> FetchCost {
        FetchCost::RandomAccess
    }

    fn wire(&self) -> WireTotals {
        WireTotals::default()
    }
}

fn chunk_of(chunk: u64) -> Vec<u8> {
    let mut bytes = vec![0x5A; CHUNK];
    bytes[..8].copy_from_slice(&chunk.to_le_bytes());
    bytes
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let parent = std::env::args().nth(1).unwrap_or("/dev/shm".to_owned());
    let directory = Path::new(&parent).join(format!("loam-hit-path-{}", std::process::id()));
    let measured = measure(&directory).await;
    std::fs::remove_dir_all(&directory)?;
    println!(
        "{} ns per 4 KiB hit, of which reading alone {} ns, checksum alone {} ns",
        measured?.0,
        plain(&parent)?,
        crc()
    );
    Ok(())
}

async fn measure(directory: &Path) -> std::result::Result<(u64,), Box<dyn std::error::Error>> {
    let cache = Cache::open(directory, CacheOptions::default())?;
    let device = cache.device("hit-path", Arc::new(Synthetic))?;
    device.prefetch(std::slice::from_ref(&(0..LENGTH)), &|_| {}).await?;
    let mut buffer = vec![0; 4096];
    let mut state = 1u64;
    let mut slow = 0;
    let begun = Instant::now();
    for _ in 0..READS {
        let offset = random(&mut state);
        match device.read(offset, &mut buffer) {
            Io::Ready(result) => result?,
            Io::Pending(pending) => {
                slow += 1;
                pending.await?;
            }
        }
    }
    let each = begun.elapsed().as_nanos() as u64 / READS;
    if slow > 0 {
        println!("{slow} of {READS} reads were not answered at once");
    }
    Ok((each,))
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) % (LENGTH / 4096) * 4096
}

/// `pread` alone, from a file of the same length.
fn plain(parent: &str) -> std::io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let path = Path::new(parent).join(format!("loam-hit-path-plain-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    std::fs::remove_file(&path)?;
    for at in (0..LENGTH).step_by(CHUNK) {
        file.write_all_at(&chunk_of(at), at)?;
    }
    let mut buffer = vec![0; 4096];
    let mut state = 1u64;
    let begun = Instant::now();
    for _ in 0..READS {
        file.read_exact_at(&mut buffer, random(&mut state))?;
    }
    Ok(begun.elapsed().as_nanos() as u64 / READS)
}

fn crc() -> u64 {
    let block = vec![0x5A; 4096];
    let begun = Instant::now();
    let mut sum = 0;
    for _ in 0..READS {
        sum = crc32c::crc32c_append(sum, std::hint::black_box(&block));
    }
    std::hint::black_box(sum);
    begun.elapsed().as_nanos() as u64 / READS
}

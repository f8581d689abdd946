//! Where cached chunks say that they lie, to whom, and what they settle.

#![allow(clippy::single_range_in_vec_init, reason = "a list of ranges may have one")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Fake, content_directory, plain, read, reopen, stored};
use loam_block::conformance::read_located;
use loam_block::{Access, BlockDevice};
use loam_content::{Cache, CachedDevice};

const CHUNK: u32 = 64 << 10;
const LENGTH: usize = 4 * CHUNK as usize;

/// A content of four chunks, all of them stored.
async fn cached(directory: &Path) -> (Cache, Arc<Fake>, CachedDevice) {
    let cache = Cache::open(directory, plain()).unwrap();
    let source = Arc::new(Fake::new(LENGTH, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    read(&device, 0, LENGTH).await.unwrap();
    stored(&device, LENGTH as u64).await;
    (cache, source, device)
}

fn damage(cache: &Path, at: u64) {
    let data = fs::OpenOptions::new().write(true).open(content_directory(cache).join("data")).unwrap();
    data.write_all_at(b"damage", at).unwrap();
}

fn has_location(device: &CachedDevice, offset: u64, length: u64, access: Access) -> bool {
    device.locate(offset, length, access).is_some()
}

#[tokio::test]
async fn present_chunks_have_a_location_and_missing_ones_none() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(LENGTH, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    assert!(!has_location(&device, 0, 4096, Access::Seen));
    read(&device, 65536, 65536).await.unwrap();
    stored(&device, 65536).await;
    let before = cache.stats();
    let located = |offset: u64, length| read_located(&device, offset, length, Access::Seen);
    for (offset, length) in [(65536, 4096), (65536, 65536), (126_976, 4096)] {
        let expected = &source.original()[offset..][..length];
        assert_eq!(located(offset as u64, length).as_deref(), Some(expected));
    }
    assert_eq!((cache.stats().hits - before.hits, cache.stats().misses), (3, before.misses));
    for (offset, length) in [(61_440, 8192), (65536, 65536 + 4096), (0, 4096), (65536, 2048), (65537, 4096)] {
        assert_eq!(located(offset, length), None, "{length} bytes at {offset}");
    }
}

#[tokio::test]
async fn unseen_only_what_was_found_right_in_the_file_since_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, source, device) = cached(dir.path()).await;
    let whole = source.original();
    assert!(!has_location(&device, 0, 4096, Access::Unseen), "stored, and not read back");
    read(&device, 8192, 8192).await.unwrap();
    let unseen = |offset, length| read_located(&device, offset, length, Access::Unseen);
    assert_eq!(unseen(8192, 8192).as_deref(), Some(&whole[8192..16384]));
    assert_eq!((unseen(4096, 8192), unseen(12288, 8192)), (None, None), "a block more was not read");
    read_located(&device, 0, LENGTH, Access::Seen).expect("right bytes");
    assert_eq!(unseen(0, LENGTH), Some(whole.clone()), "bytes that were settled were found right too");
    drop((device, cache));
    let cache = reopen(dir.path(), plain()).await;
    let device = cache.device("a", source.clone()).unwrap();
    assert!(!has_location(&device, 8192, 4096, Access::Unseen), "another start");
    assert!(!has_location(&device, 8192, 4096, Access::Seen), "its checksums would have to be waited for");
    assert!(device.check(false).await.unwrap().bad_chunks == 0);
    assert_eq!(read_located(&device, 0, LENGTH, Access::Unseen), Some(whole));
    assert_eq!(source.fetches(), 1);
}

#[tokio::test]
async fn what_is_fetched_where_somebody_reads_unseen_is_read_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(LENGTH, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    assert!(!has_location(&device, 0, 4096, Access::Unseen));
    device.prefetch(&[0..LENGTH as u64], &|_| {}).await.unwrap();
    stored(&device, LENGTH as u64).await;
    // The last chunk may be present an instant before it is proven.
    for _ in 0..2000 {
        if has_location(&device, 0, LENGTH as u64, Access::Unseen) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let hits = cache.stats().hits;
    assert_eq!(
        read_located(&device, 4096, 4096, Access::Unseen).as_deref(),
        Some(&source.original()[4096..8192])
    );
    assert_eq!(read_located(&device, 0, LENGTH, Access::Unseen), Some(source.original()));
    assert_eq!(cache.stats().hits, hits + 2);
}

#[tokio::test]
async fn what_is_read_back_does_not_count_as_read() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let device = cache.device("a", Arc::new(Fake::new(LENGTH, CHUNK, true))).unwrap();
    assert!(!has_location(&device, 0, 4096, Access::Unseen));
    device.prefetch(&[0..LENGTH as u64], &|_| {}).await.unwrap();
    stored(&device, LENGTH as u64).await;
    read(&device, 65536, 4096).await.unwrap();
    cache.evict(65536);
    assert!(has_location(&device, 65536, 4096, Access::Seen), "the one that was read stays");
}

#[tokio::test]
async fn a_damaged_block_is_not_settled_and_read_brings_the_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, source, device) = cached(dir.path()).await;
    read(&device, 0, LENGTH).await.unwrap();
    damage(dir.path(), 70_000);
    assert_eq!(read_located(&device, 65536, 8192, Access::Seen), None);
    assert!(!has_location(&device, 69_632, 4096, Access::Unseen), "it was proven, and is no longer");
    assert!(has_location(&device, 65536, 4096, Access::Unseen), "its neighbour still is");
    assert_eq!(read(&device, 65536, 8192).await.unwrap(), source.original()[65536..][..8192]);
    assert_eq!((cache.stats().bad_blocks, source.fetches()), (1, 2));
    stored(&device, LENGTH as u64).await;
    assert_eq!(read_located(&device, 0, LENGTH, Access::Seen), Some(source.original()));
}

#[tokio::test]
async fn what_is_evicted_in_between_is_not_settled() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, source, device) = cached(dir.path()).await;
    read(&device, 0, LENGTH).await.unwrap();
    let tickets = |access| {
        let ticket = |offset| device.locate(offset, 8192, access).expect("present and proven").ticket;
        [0, 61_440, 131_072].map(ticket)
    };
    let (seen, unseen) = (tickets(Access::Seen), tickets(Access::Unseen));
    let hits = cache.stats().hits;
    cache.evict(0);
    assert!(!has_location(&device, 0, 4096, Access::Seen) && !has_location(&device, 0, 4096, Access::Unseen));
    assert!(unseen.iter().all(|ticket| !device.settle(*ticket, None)));
    assert!(seen.iter().all(|ticket| !device.settle(*ticket, Some(&[0; 8192]))), "what a hole reads as");
    read(&device, 0, LENGTH).await.unwrap();
    stored(&device, LENGTH as u64).await;
    read(&device, 0, LENGTH).await.unwrap();
    assert!(has_location(&device, 0, LENGTH as u64, Access::Unseen), "there again, and proven");
    assert!(unseen.iter().all(|ticket| !device.settle(*ticket, None)), "and still it was away");
    let right = &source.original()[..8192];
    assert!(device.settle(seen[0], Some(right)), "bytes that are right are right");
    assert!(!device.settle(seen[0], Some(&right[..4096])), "half of them");
    assert!(!device.settle(seen[1], Some(right)), "those of another place");
    assert_eq!(cache.stats().hits, hits + 2, "the read and the one settled");
}

#[tokio::test]
async fn what_is_settled_counts_as_read_for_the_clock() {
    for access in [Access::Seen, Access::Unseen] {
        let dir = tempfile::tempdir().unwrap();
        let (cache, _, device) = cached(dir.path()).await;
        read(&device, 0, LENGTH).await.unwrap();
        // The first pass of the hand takes the marks of that read away, and one chunk with it.
        assert_eq!(cache.evict(3 * 65536), 65536);
        read_located(&device, 131_072, 4096, access).expect("present and proven");
        cache.evict(65536);
        assert!(has_location(&device, 131_072, 4096, access), "{access:?}: it was read last");
    }
}

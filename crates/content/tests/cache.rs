//! The cache over a source that a test controls: what is fetched, served, kept, dropped and refused.

#![allow(clippy::single_range_in_vec_init, reason = "a list of ranges may have one")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Fake, content_directory, pattern, plain, read, reopen, stored};
use futures_util::FutureExt;
use loam_block::{BlockDevice, ErrorKind, Io};
use loam_content::{Cache, CacheOptions, FetchCost};

const CHUNK: u32 = 64 << 10;

#[tokio::test]
async fn serves_any_aligned_range_and_hits_are_ready() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(10 * CHUNK as usize + 8192, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    let whole = source.original();
    assert_eq!(device.geometry().size, whole.len() as u64);
    for (offset, length) in
        [(0, 4096), (61440, 8192), (10 * 65536 + 4096, 4096), (4096, 5 * 65536), (0, whole.len())]
    {
        assert_eq!(
            read(&device, offset as u64, length).await.unwrap(),
            whole[offset..offset + length],
            "{offset}"
        );
    }
    assert_eq!(source.chunks.load(Ordering::SeqCst), 11, "each chunk came once");
    stored(&device, whole.len() as u64).await;
    let mut buffer = vec![0; whole.len()];
    assert!(matches!(device.read(0, &mut buffer), Io::Ready(Ok(()))));
    assert_eq!(buffer, whole);
    for (offset, length, kind) in [
        (0, 100, ErrorKind::Invalid),
        (512, 4096, ErrorKind::Invalid),
        (whole.len() as u64, 4096, ErrorKind::OutOfBounds),
        (u64::MAX - 4095, 4096, ErrorKind::OutOfBounds),
    ] {
        assert_eq!(read(&device, offset, length).await.unwrap_err().kind(), kind);
    }
    assert_eq!(
        device.write(0, &[0; 4096], Default::default()).await.unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    let stats = cache.stats();
    assert_eq!((stats.bytes, stats.hits), (whole.len() as u64, 1));
}

#[tokio::test]
async fn survives_a_restart_without_fetching() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Fake::new(5 * CHUNK as usize, CHUNK, true));
    {
        let cache = Cache::open(dir.path(), plain()).unwrap();
        assert!(Cache::open(dir.path(), plain()).is_err(), "one process at a time");
        let device = cache.device("a", source.clone()).unwrap();
        read(&device, 65536, 65536).await.unwrap();
        stored(&device, 65536).await;
    }
    let cache = reopen(dir.path(), plain()).await;
    assert_eq!(cache.stats().bytes, 65536);
    assert_eq!(cache.contents(), [("a".to_owned(), 65536)]);
    source.down.store(true, Ordering::SeqCst);
    let device = cache.device("a", source.clone()).unwrap();
    assert_eq!(read(&device, 69632, 4096).await.unwrap(), source.original()[69632..73728]);
    assert_eq!(read(&device, 0, 4096).await.unwrap_err().kind(), ErrorKind::Unavailable);
    source.down.store(false, Ordering::SeqCst);
    assert_eq!(read(&device, 0, 4096).await.unwrap(), source.original()[..4096]);
    let other = Arc::new(Fake::new(5 * CHUNK as usize, CHUNK / 2, true));
    drop(device);
    assert!(matches!(cache.device("a", other), Err(loam_content::Error::Mismatch { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_readers_of_missing_chunks_share_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, true));
    *source.delay.lock().unwrap() = Duration::from_millis(50);
    let device = cache.device("a", source.clone()).unwrap();
    let readers: Vec<_> = (0..64u64)
        .map(|n| {
            let device = device.clone();
            tokio::spawn(async move { read(&device, n % 16 * 4096, 4096).await })
        })
        .collect();
    // One that goes away takes nobody's fetch with it.
    assert!(read(&device, 65536, 4096).now_or_never().is_none());
    for (n, reader) in readers.into_iter().enumerate() {
        let at = n % 16 * 4096;
        assert_eq!(reader.await.unwrap().unwrap(), source.original()[at..at + 4096]);
    }
    stored(&device, 2 * 65536).await;
    assert_eq!(source.fetches(), 2, "one for the readers, one for who went away");
    source.down.store(true, Ordering::SeqCst);
    let readers: Vec<_> = (0..64u64)
        .map(|_| {
            let device = device.clone();
            tokio::spawn(async move { read(&device, 2 * 65536, 4096).await })
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert_eq!(source.fetches(), 3, "each is told of the one failure");
}

#[tokio::test]
async fn a_failure_is_remembered_for_a_moment() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { failure_memory: Duration::from_millis(200), ..plain() };
    let cache = Cache::open(dir.path(), options).unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    source.down.store(true, Ordering::SeqCst);
    for _ in 0..10 {
        assert_eq!(read(&device, 0, 4096).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert_eq!(source.fetches(), 1);
    source.down.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert!(read(&device, 0, 4096).await.is_ok());
}

#[tokio::test]
async fn a_failed_read_ahead_fails_nobody_who_reads_later() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { failure_memory: Duration::from_secs(60), ..CacheOptions::default() };
    let cache = Cache::open(dir.path(), options).unwrap();
    let source = Arc::new(Fake::new(40 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    source.down.store(true, Ordering::SeqCst);
    let whole = 0..device.geometry().size;
    assert!(device.prefetch(std::slice::from_ref(&whole), &|_| {}).await.is_err());
    *source.delay.lock().unwrap() = Duration::from_millis(50);
    let ahead = {
        let (device, whole) = (device.clone(), whole.clone());
        tokio::spawn(async move { device.prefetch(std::slice::from_ref(&whole), &|_| {}).await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    // Joins the prefetch, which fails; its own attempt finds the source up again.
    let late = tokio::spawn(async move { read(&device, 65536, 4096).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    source.down.store(false, Ordering::SeqCst);
    assert!(ahead.await.unwrap().is_err());
    assert_eq!(late.await.unwrap().unwrap(), source.original()[65536..69632]);
}

#[tokio::test]
async fn other_bytes_are_refused_with_and_without_digests() {
    for digests in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), plain()).unwrap();
        let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, digests));
        let device = cache.device("a", source.clone()).unwrap();
        assert!(read(&device, 0, 65536).await.is_ok());
        stored(&device, 65536).await;
        assert_eq!(device.recorded_digests(), u64::from(!digests));
        assert_eq!(cache.evict(0), 65536);
        source.bytes.lock().unwrap()[100] ^= 1;
        let error = read(&device, 4096, 4096).await.unwrap_err();
        assert_eq!(error.kind(), if digests { ErrorKind::Corrupt } else { ErrorKind::Changed });
        let errors = cache.stats().errors;
        assert_eq!((errors.corrupt, errors.changed), if digests { (1, 0) } else { (0, 1) });
        assert_eq!(device.local_bytes(), 0, "nothing of it is kept");
        // And after a restart, with the digest on disk.
        drop((device, cache));
        let cache = reopen(dir.path(), plain()).await;
        let device = cache.device("a", source.clone()).unwrap();
        assert!(read(&device, 0, 4096).await.is_err());
        source.bytes.lock().unwrap()[100] ^= 1;
        assert_eq!(read(&device, 0, 65536).await.unwrap(), source.original()[..65536]);
    }
}

#[tokio::test]
async fn recorded_digests_outlive_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, false));
    {
        let cache = Cache::open(dir.path(), plain()).unwrap();
        read(&cache.device("a", source.clone()).unwrap(), 0, 65536).await.unwrap();
    }
    fs::write(content_directory(dir.path()).join("table"), b"rubbish").unwrap();
    source.bytes.lock().unwrap()[0] ^= 1;
    let cache = reopen(dir.path(), plain()).await;
    let device = cache.device("a", source.clone()).unwrap();
    assert_eq!(read(&device, 0, 4096).await.unwrap_err().kind(), ErrorKind::Changed);
    drop(device);
    cache.forget("a").await.unwrap();
    assert!(read(&cache.device("a", source).unwrap(), 0, 4096).await.is_ok());
}

#[tokio::test]
async fn a_damaged_chunk_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    read(&device, 0, 4 * 65536).await.unwrap();
    stored(&device, 4 * 65536).await;
    let data = fs::OpenOptions::new().write(true).open(content_directory(dir.path()).join("data")).unwrap();
    data.write_all_at(&[1, 2, 3], 70000).unwrap();
    data.write_all_at(&[0; 65536], 3 * 65536).unwrap();
    let report = device.check(false).await.unwrap();
    assert_eq!((report.chunks, report.bad_chunks, report.dropped), (4, 2, 0));
    assert_eq!(report.bad, [1, 3]);
    let before = source.fetches();
    assert_eq!(read(&device, 0, 4 * 65536).await.unwrap(), source.original());
    assert_eq!((source.fetches() - before, cache.stats().bad_blocks), (2, 2));
    stored(&device, 4 * 65536).await;
    assert_eq!(device.check(false).await.unwrap().bad_chunks, 0);
    data.write_all_at(&[1, 2, 3], 70000).unwrap();
    let report = device.check(true).await.unwrap();
    assert_eq!((report.bad_chunks, report.dropped, device.local_bytes()), (1, 1, 3 * 65536));
    assert_eq!(cache.stats().bytes, 3 * 65536);
}

#[tokio::test]
async fn the_limit_is_kept_and_what_is_read_again_stays() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { limit_bytes: 16 * u64::from(CHUNK), ..plain() };
    let cache = Cache::open(dir.path(), options).unwrap();
    let source = Arc::new(Fake::new(100 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    let whole = source.original();
    for chunk in 0..100u64 {
        // Chunk 0 is read between all others.
        for at in [chunk * 65536, 0] {
            let bytes = read(&device, at, 65536).await.unwrap();
            assert_eq!(bytes, whole[at as usize..at as usize + 65536]);
        }
        assert!(cache.stats().bytes <= 16 * 65536);
    }
    let fetched = source.chunks.load(Ordering::SeqCst);
    assert!(fetched <= 102, "{fetched} chunks fetched: the one that is read all the time must stay");
    let data = fs::metadata(content_directory(dir.path()).join("data")).unwrap();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&data) * 512;
    assert!(allocated <= 17 * 65536, "{allocated} bytes on disk");
    assert!(cache.stats().evicted_chunks >= 80);
}

#[tokio::test]
async fn pinned_chunks_stay_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { limit_bytes: 8 * u64::from(CHUNK), ..plain() };
    let source = Arc::new(Fake::new(100 * CHUNK as usize, CHUNK, true));
    {
        let cache = Cache::open(dir.path(), options.clone()).unwrap();
        let device = cache.device("a", source.clone()).unwrap();
        let progress = std::sync::Mutex::new(Vec::new());
        device.pin(&[100..200, 65536 * 50..65536 * 53], &|p| progress.lock().unwrap().push(p)).await.unwrap();
        let last = *progress.lock().unwrap().last().unwrap();
        assert_eq!((last.done_bytes, last.total_bytes), (4 * 65536, 4 * 65536));
        assert_eq!(cache.evict(0), 0);
        let error = device.pin(&[65536 * 10..65536 * 20], &|_| {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        device.unpin(&[65536 * 10..65536 * 20]).await.unwrap();
    }
    let cache = reopen(dir.path(), options).await;
    let device = cache.device("a", source.clone()).unwrap();
    cache.evict(0);
    assert_eq!(device.local_bytes(), 4 * 65536);
    for chunk in 0..100 {
        read(&device, chunk * 65536, 4096).await.unwrap();
    }
    let before = source.fetches();
    read(&device, 0, 4096).await.unwrap();
    read(&device, 65536 * 50, 65536 * 3).await.unwrap();
    assert_eq!(source.fetches(), before);
    device.unpin(&[0..device.geometry().size]).await.unwrap();
    cache.evict(0);
    assert_eq!(device.local_bytes(), 0);
}

#[tokio::test]
async fn read_ahead_grows_for_a_sequential_reader_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), CacheOptions::default()).unwrap();
    let source = Arc::new(Fake::new(200 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    for chunk in 0..100u64 {
        read(&device, chunk * 65536, 65536).await.unwrap();
        // The reader is slower than the source: what was fetched ahead is there.
        for _ in 0..100 {
            if source.chunks.load(Ordering::SeqCst) * 65536 == device.local_bytes() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let log = source.log.lock().unwrap().clone();
    assert_eq!(log[..3], [(0, 2), (2, 5), (7, 9)]);
    assert!(log.iter().all(|(_, count)| *count <= 17), "{log:?}");
    assert!(log.len() < 20, "{} fetches for 100 chunks: {log:?}", log.len());
    assert!(cache.stats().fetched_chunks <= 120);
    let at_random = Arc::new(Fake::new(200 * CHUNK as usize, CHUNK, true));
    let device = cache.device("b", at_random.clone()).unwrap();
    for n in 0..50u64 {
        read(&device, n * 83 % 200 * 65536, 4096).await.unwrap();
    }
    assert!(at_random.log.lock().unwrap().iter().all(|(_, count)| *count <= 2));
}

#[tokio::test]
async fn a_whole_stream_is_read_once_for_all_that_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), CacheOptions::default()).unwrap();
    let mut source = Fake::new(40 * CHUNK as usize, CHUNK, true);
    source.cost = FetchCost::WholeStream;
    let source = Arc::new(source);
    let device = cache.device("a", source.clone()).unwrap();
    device.fill(0, &source.original()[..65536]).await.unwrap();
    assert_eq!(
        read(&device, 20 * 65536, 4096).await.unwrap(),
        source.original()[20 * 65536..20 * 65536 + 4096]
    );
    stored(&device, 40 * 65536).await;
    assert_eq!(source.log.lock().unwrap()[..], [(1, 39)]);
    // It goes last.
    let other = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, true));
    let small = cache.device("b", other).unwrap();
    read(&small, 0, 4 * 65536).await.unwrap();
    stored(&small, 4 * 65536).await;
    cache.evict(41 * 65536);
    assert_eq!((device.local_bytes(), small.local_bytes()), (40 * 65536, 65536));
}

#[tokio::test]
async fn filling_checks_what_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    assert!(device.fill(1, &pattern(65536, 9)).await.is_err());
    assert!(device.fill(1, &[0; 4096]).await.is_err());
    assert!(device.fill(4, &pattern(65536, 9)).await.is_err());
    device.fill(1, &source.original()[65536..131072]).await.unwrap();
    assert_eq!(read(&device, 65536, 65536).await.unwrap(), source.original()[65536..131072]);
    assert_eq!(source.fetches(), 0);
}

#[tokio::test]
async fn an_import_becomes_a_content() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(4 * CHUNK as usize + 4096, CHUNK, true));
    let whole = source.original();
    let mut import = cache.import(CHUNK).unwrap();
    for (chunk, bytes) in whole.chunks(CHUNK as usize).enumerate().filter(|(chunk, _)| *chunk != 2) {
        import.fill(chunk as u64, bytes).unwrap();
    }
    assert!(import.fill(1, &[0; 100]).is_err());
    assert!(import.fill(2, &[0; 4096]).is_err(), "the last chunk is the only short one");
    import.finish(&cache, "a", whole.len() as u64).unwrap();
    assert_eq!(cache.stats().bytes, whole.len() as u64 - 65536);
    let device = cache.device("a", source.clone()).unwrap();
    assert_eq!(read(&device, 0, whole.len()).await.unwrap(), whole);
    assert_eq!(source.log.lock().unwrap()[..], [(2, 1)]);
    // A length that does not fit what was stored is refused.
    let mut import = cache.import(CHUNK).unwrap();
    import.fill(0, &whole[..4096]).unwrap();
    assert!(import.finish(&cache, "b", 65536).is_err());
    // One that is given up leaves nothing.
    let mut import = cache.import(CHUNK).unwrap();
    import.fill(0, &whole[..65536]).unwrap();
    drop(import);
    assert_eq!(cache.stats().bytes, whole.len() as u64);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the lock and one content");
}

#[tokio::test]
async fn what_is_local_and_what_is_brought_near() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), plain()).unwrap();
    let source = Arc::new(Fake::new(9 * CHUNK as usize + 8192, CHUNK, true));
    let device = cache.device("a", source.clone()).unwrap();
    let device: &dyn BlockDevice = &device;
    assert!(device.capabilities().lazy);
    let size = device.geometry().size;
    let chunk = u64::from(CHUNK);
    let runs = async |offset, length, limit| {
        let runs = device.locality(offset, length, limit).await.unwrap();
        runs.iter().map(|run| (run.offset, run.length, run.local)).collect::<Vec<_>>()
    };
    assert_eq!(runs(0, size, 9).await, [(0, size, false)]);
    device.prefetch(2 * chunk + 4096, chunk).await.unwrap();
    device.prefetch(9 * chunk, 4096).await.unwrap();
    assert_eq!(source.chunks.load(Ordering::SeqCst), 3, "two chunks, and the short last one");
    let all = [
        (0, 2 * chunk, false),
        (2 * chunk, 2 * chunk, true),
        (4 * chunk, 5 * chunk, false),
        (9 * chunk, 8192, true),
    ];
    assert_eq!(runs(0, size, 9).await, all);
    assert_eq!(runs(0, size, 2).await, all[..2]);
    assert_eq!(
        runs(chunk + 4096, chunk, 9).await,
        [(chunk + 4096, chunk - 4096, false), (2 * chunk, 4096, true)]
    );
    let mut buffer = vec![0; 2 * CHUNK as usize];
    assert!(device.read(2 * chunk, &mut buffer).is_ready(), "brought near: answered at once");
    device.prefetch(0, size).await.unwrap();
    assert_eq!(runs(0, size, 9).await, [(0, size, true)]);
    source.down.store(true, Ordering::SeqCst);
    device.prefetch(0, size).await.unwrap();
    cache.evict(0);
    assert_eq!(device.prefetch(0, 4096).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(device.prefetch(1, 4096).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(device.prefetch(size, 4096).await.unwrap_err().kind(), ErrorKind::OutOfBounds);
}

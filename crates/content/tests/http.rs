//! HTTP sources against a server that fails, lies, stalls and goes away.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::pattern;
use common::server::{Fault, Server};
use futures_util::StreamExt;
use loam_block::{BlockDevice, ErrorKind};
use loam_content::{
    ByteSource, Cache, CacheOptions, Error, HttpClient, HttpOptions, HttpSource, Pin, ReadAhead, Result,
    SourceUrl, WholeSource, fetch_whole, open,
};

const LENGTH: usize = 1_000_000;

/// Limits for tests: everything fails fast.
fn quick() -> HttpOptions {
    HttpOptions {
        connect_timeout: Duration::from_millis(500),
        answer_timeout: Duration::from_millis(200),
        progress_window: Duration::from_millis(200),
        attempts_max: 5,
        patience: Duration::from_secs(3),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        ..HttpOptions::default()
    }
}

fn url(server: &Server) -> SourceUrl {
    server.url().parse().unwrap()
}

fn client() -> HttpClient {
    HttpClient::new(quick()).unwrap()
}

async fn set_up() -> (Server, HttpSource, Vec<u8>) {
    let bytes = pattern(LENGTH, 1);
    let server = Server::start(bytes.clone()).await;
    let source = HttpSource::pinned(&client(), &url(&server), Pin::of_length(LENGTH as u64)).unwrap();
    (server, source, bytes)
}

async fn collect(source: &dyn ByteSource, offset: u64, length: u64) -> Result<Vec<u8>> {
    let mut stream = source.stream(offset, length);
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

#[tokio::test]
async fn ranges_use_one_connection_and_opening_pinned_sends_nothing() {
    let (server, source, bytes) = set_up().await;
    assert_eq!(server.requests(), 0);
    for at in (0..900_000).step_by(50_000) {
        assert_eq!(source.read_at(at as u64, 5000).await.unwrap(), bytes[at..at + 5000]);
    }
    assert_eq!((server.requests(), server.connections()), (18, 1));
    assert_eq!((source.wire().requests, source.wire().bytes), (18, 18 * 5000));
    assert_eq!(source.pin().etag.as_deref(), Some("\"one\""));
    assert_eq!(source.read_at(0, 0).await.unwrap().len(), 0);
    assert!(matches!(source.read_at(LENGTH as u64, 1).await, Err(Error::OutOfBounds { .. })));
    assert_eq!(server.requests(), 18);
}

#[tokio::test]
async fn a_version_that_only_an_answer_made_known_is_unlearned_when_it_changes() {
    let (server, source, bytes) = set_up().await;
    source.read_at(0, 10).await.unwrap();
    *server.state.etag.lock().unwrap() = Some("\"two\"".into());
    assert!(matches!(source.read_at(0, 10).await, Err(Error::Changed { .. })), "the change is told once");
    assert_eq!(source.read_at(0, 10).await.unwrap(), bytes[..10]);
    assert_eq!(source.pin().etag.as_deref(), Some("\"two\""));
}

#[tokio::test]
async fn opening_learns_the_version_and_expects_it_later() {
    let bytes = pattern(LENGTH, 1);
    let server = Server::start(bytes.clone()).await;
    let source = open(&client(), &url(&server), None).await.unwrap();
    let pin = source.pin();
    assert_eq!((pin.length, pin.etag.as_deref(), server.requests()), (LENGTH as u64, Some("\"one\""), 1));
    assert_eq!(collect(&*source, 0, LENGTH as u64).await.unwrap(), bytes);
    assert_eq!((server.requests(), server.connections()), (2, 1));
    *server.state.etag.lock().unwrap() = Some("\"two\"".into());
    assert!(matches!(source.read_at(0, 10).await, Err(Error::Changed { .. })));
    let later = open(&client(), &url(&server), Some(&pin)).await.unwrap();
    let error = later.read_at(0, 10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed);
    assert!(error.to_string().contains("\"two\""), "{error}");
    let before = server.requests();
    server.state.bytes.lock().unwrap().push(0);
    *server.state.etag.lock().unwrap() = None;
    assert!(matches!(later.read_at(0, 10).await, Err(Error::Changed { .. })));
    assert_eq!(server.requests(), before + 1, "a change is not retried");
    let empty = Server::start(Vec::new()).await;
    assert_eq!(open(&client(), &url(&empty), None).await.unwrap().length(), 0);
}

#[tokio::test]
async fn broken_bodies_are_resumed_where_they_broke() {
    let (server, source, bytes) = set_up().await;
    server.fault([Fault::Truncate(30_000), Fault::Hang, Fault::Truncate(0), Fault::Half]);
    assert_eq!(source.read_at(1000, 100_000).await.unwrap(), bytes[1000..101_000]);
    let ranges: Vec<_> = server.state.ranges.lock().unwrap().iter().map(|range| range.unwrap()).collect();
    assert_eq!(ranges[0], (1000, 101_000));
    let broke = ranges[1].0;
    assert!((1000..=31_000).contains(&broke), "{ranges:?}");
    assert!(ranges[1..4].iter().all(|range| *range == (broke, 101_000)), "{ranges:?}");
    assert_eq!(ranges[4], (broke + (101_000 - broke).div_ceil(2), 101_000), "{ranges:?}");
    assert_eq!(ranges.len(), 5);
}

#[tokio::test]
async fn a_whole_stream_goes_on_even_without_ranges() {
    let (server, source, bytes) = set_up().await;
    server.fault([Fault::Truncate(300_000), Fault::NoRanges]);
    assert_eq!(collect(&source, 0, LENGTH as u64).await.unwrap(), bytes);
    assert_eq!(server.requests(), 2);
    assert_eq!(server.state.ranges.lock().unwrap()[0], None);
    // A part of it does not download the whole.
    server.fault([Fault::NoRanges]);
    let error = source.read_at(500, 10).await.unwrap_err();
    assert!(matches!(error, Error::NoRanges { .. }), "{error}");
    assert_eq!(server.requests(), 3);
    // Where a part happens to begin at 0, its bytes are right.
    server.fault([Fault::NoRanges]);
    assert_eq!(source.read_at(0, 10).await.unwrap(), bytes[..10]);
}

#[tokio::test]
async fn passing_trouble_is_retried_and_bounded() {
    let (server, source, bytes) = set_up().await;
    server.fault([Fault::Status(503, ""), Fault::Status(429, "retry-after: 0\r\n"), Fault::Status(500, "")]);
    assert_eq!(source.read_at(0, 10).await.unwrap(), bytes[..10]);
    assert_eq!(server.requests(), 4);
    *server.state.always.lock().unwrap() = Some(Fault::Status(502, ""));
    let error = source.read_at(0, 10).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { attempts: 5, .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("502"), "{error}");
    assert_eq!(server.requests(), 9);
    // A pause longer than anyone is ready to wait is not waited for.
    *server.state.always.lock().unwrap() = Some(Fault::Status(503, "retry-after: 9999\r\n"));
    let begun = Instant::now();
    assert!(source.read_at(0, 10).await.is_err());
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn final_answers_are_not_retried() {
    let (server, source, _) = set_up().await;
    type Check = fn(&Error) -> bool;
    let cases: [(Fault, Check); 8] = [
        (Fault::Status(404, ""), |error| matches!(error, Error::NotFound { .. })),
        (Fault::Status(401, ""), |error| matches!(error, Error::Denied { status: 401, .. })),
        (Fault::Status(403, ""), |error| matches!(error, Error::Denied { status: 403, .. })),
        (Fault::Status(418, ""), |error| matches!(error, Error::Status { status: 418, .. })),
        (Fault::Status(416, ""), |error| matches!(error, Error::Malformed { .. })),
        (Fault::WrongRange, |error| matches!(error, Error::Malformed { .. })),
        (Fault::Encoded, |error| matches!(error, Error::Malformed { .. })),
        (Fault::TooMany, |error| matches!(error, Error::Malformed { .. })),
    ];
    for (count, (fault, check)) in (1..).zip(cases) {
        server.fault([fault.clone()]);
        let error = source.read_at(500, 10).await.unwrap_err();
        assert!(check(&error), "{fault:?}: {error:?}");
        assert_eq!(server.requests(), count, "{fault:?}");
    }
}

#[tokio::test]
async fn redirects_are_followed_remembered_and_bounded() {
    let (server, source, bytes) = set_up().await;
    let other = Server::start(bytes.clone()).await;
    server.fault([Fault::Redirect("/y".into()), Fault::Redirect(other.url())]);
    assert_eq!(source.read_at(7, 10).await.unwrap(), bytes[7..17]);
    assert_eq!(source.read_at(8, 10).await.unwrap(), bytes[8..18]);
    assert_eq!((server.requests(), other.requests()), (2, 2), "the second read went straight to the end");
    // The address that was found expires: back to the origin.
    other.fault([Fault::Status(403, "")]);
    assert_eq!(source.read_at(9, 10).await.unwrap(), bytes[9..19]);
    assert_eq!((server.requests(), other.requests()), (3, 3));
    for to in [server.url(), "ftp://h/x".into(), "file:///etc/passwd".into(), "http://[".into()] {
        *server.state.always.lock().unwrap() = Some(Fault::Redirect(to.clone()));
        let error = source.read_at(7, 10).await.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{to}: {error:?}");
    }
    assert!(server.requests() <= 3 + 6 + 3);
}

#[tokio::test]
async fn silence_and_trickles_time_out() {
    let (server, source, bytes) = set_up().await;
    server.fault([Fault::Silent, Fault::Drip, Fault::Drip]);
    let begun = Instant::now();
    assert_eq!(source.read_at(0, 50_000).await.unwrap(), bytes[..50_000]);
    let elapsed = begun.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(2)).contains(&elapsed), "{elapsed:?}");
    *server.state.always.lock().unwrap() = Some(Fault::Drip);
    let error = source.read_at(0, 50_000).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_dead_server_is_an_error_in_time() {
    let (mut server, source, bytes) = set_up().await;
    server.down().await;
    let begun = Instant::now();
    let error = source.read_at(0, 10).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(4));
    server.up().await;
    assert_eq!(source.read_at(0, 10).await.unwrap(), bytes[..10]);
}

#[tokio::test]
async fn one_host_gets_so_many_requests_at_once() {
    let bytes = pattern(LENGTH, 1);
    let server = Server::start(bytes.clone()).await;
    *server.state.delay.lock().unwrap() = Duration::from_millis(5);
    let client = HttpClient::new(HttpOptions { requests_per_host: 3, ..quick() }).unwrap();
    let source = Arc::new(HttpSource::pinned(&client, &url(&server), Pin::of_length(LENGTH as u64)).unwrap());
    let reads: Vec<_> = (0..30)
        .map(|n| {
            let source = source.clone();
            tokio::spawn(async move { source.read_at(n * 1000, 1000).await })
        })
        .collect();
    for (n, read) in reads.into_iter().enumerate() {
        assert_eq!(read.await.unwrap().unwrap(), bytes[n * 1000..n * 1000 + 1000]);
    }
    assert!(server.state.busiest.load(Ordering::SeqCst) <= 3);
    assert!(server.connections() <= 3, "{}", server.connections());
}

#[tokio::test]
async fn whole_objects_are_bounded() {
    let (server, _, bytes) = set_up().await;
    let fetched = fetch_whole(&client(), &url(&server), LENGTH as u64).await.unwrap();
    assert_eq!((fetched.bytes.as_ref(), fetched.wire.requests), (&bytes[..], 1));
    assert_eq!(fetched.pin.etag.as_deref(), Some("\"one\""));
    let short = fetch_whole(&client(), &url(&server), LENGTH as u64 - 1).await;
    assert!(matches!(short, Err(Error::TooLong { .. })));
    server.fault([Fault::TooMany]);
    let chunked = fetch_whole(&client(), &url(&server), LENGTH as u64).await;
    assert!(matches!(chunked, Err(Error::TooLong { .. })));
    server.fault([Fault::Truncate(10), Fault::Status(500, "")]);
    let fetched = fetch_whole(&client(), &url(&server), LENGTH as u64).await.unwrap();
    assert_eq!((fetched.bytes.as_ref(), fetched.wire.requests), (&bytes[..], 3));
    server.fault([Fault::Status(404, "")]);
    assert!(matches!(fetch_whole(&client(), &url(&server), 10).await, Err(Error::NotFound { .. })));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("x"), &bytes).unwrap();
    let file = SourceUrl::File(dir.path().join("x"));
    assert_eq!(fetch_whole(&client(), &file, LENGTH as u64).await.unwrap().bytes, bytes);
    assert!(matches!(fetch_whole(&client(), &file, 10).await, Err(Error::TooLong { .. })));
}

#[tokio::test]
async fn prewarming_opens_connections_that_reads_use() {
    let (server, _, bytes) = set_up().await;
    let client = client();
    *server.state.delay.lock().unwrap() = Duration::from_millis(20);
    client.prewarm(&url(&server), 2).await;
    assert_eq!(server.connections(), 2);
    let source = HttpSource::pinned(&client, &url(&server), Pin::of_length(LENGTH as u64)).unwrap();
    let (a, b) = tokio::join!(source.read_at(0, 10), source.read_at(10, 10));
    assert_eq!((a.unwrap().as_ref(), b.unwrap().as_ref()), (&bytes[..10], &bytes[10..20]));
    assert_eq!(server.connections(), 2);
}

/// The whole way: a device over a cache over HTTP.
#[tokio::test]
async fn a_device_survives_its_server_and_refuses_another_version() {
    let bytes = pattern(LENGTH, 1);
    let mut server = Server::start(bytes.clone()).await;
    let patient = HttpClient::new(HttpOptions { attempts_max: 100, ..quick() }).unwrap();
    let source = open(&patient, &url(&server), None).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions {
        read_ahead: ReadAhead { window_bytes_max: 0, ..ReadAhead::default() },
        failure_memory: Duration::ZERO,
        ..CacheOptions::default()
    };
    let cache = Cache::open(dir.path(), options).unwrap();
    let whole = Arc::new(WholeSource::new(source, 65536).unwrap());
    let device = cache.device("x", whole).unwrap();
    let padded = LENGTH.next_multiple_of(4096);
    assert_eq!(device.geometry().size, padded as u64);
    let mut buffer = vec![1; 8192];
    // Gone in the middle of a read, and back before the reader's patience ends.
    *server.state.always.lock().unwrap() = Some(Fault::Truncate(10));
    let reader = {
        let device = device.clone();
        tokio::spawn(async move {
            let mut buffer = vec![1; 65536];
            device.read(0, &mut buffer).await.map(|()| buffer)
        })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    server.down().await;
    *server.state.always.lock().unwrap() = None;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.up().await;
    assert_eq!(reader.await.unwrap().unwrap(), bytes[..65536]);
    // The end of the object, and the zeros behind it.
    device.read(padded as u64 - 8192, &mut buffer).await.unwrap();
    let tail = LENGTH - (padded - 8192);
    assert_eq!(buffer[..tail], bytes[padded - 8192..]);
    assert!(buffer[tail..].iter().all(|byte| *byte == 0));
    // Other bytes under the same tag: refused by the recorded digest, after the chunk was evicted.
    for _ in 0..1000 {
        if device.local_bytes() > 65536 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    cache.evict(0);
    server.state.bytes.lock().unwrap()[5000] ^= 1;
    let error = device.read(0, &mut buffer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed, "{error:?}");
    assert_eq!(cache.stats().errors.changed, 1);
    // Another version under another tag: refused by the tag.
    *server.state.etag.lock().unwrap() = Some("\"two\"".into());
    let error = device.read(4 * 65536, &mut buffer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed, "{error:?}");
    *server.state.etag.lock().unwrap() = Some("\"one\"".into());
    server.state.bytes.lock().unwrap()[5000] ^= 1;
    device.read(0, &mut buffer).await.unwrap();
    assert_eq!(buffer, bytes[..8192]);
    let stats = cache.stats();
    assert!(stats.fetched_bytes >= 3 * 65536 && stats.requests >= 5, "{stats:?}");
}

//! Bad days of a copy: devices that fail, shrink, fill up, go away and come back, and copies that are stopped.

mod copy_support;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use copy_support::{Shown, Zeroing, assert_same, striped};
use loam_block::{
    BlockDevice, Capabilities, Error, ErrorKind, Extent, FileDevice, FileOptions, Geometry, Io, MemoryDevice,
    WriteFlags, ZeroFlags,
};
use loam_nbd::copy::{
    CopyError, CopyOptions, CopyReport, NoProgress, Operation, Progress, ProgressState, Side, Stop, copy,
};
use loam_sim::FaultyDevice;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

async fn source() -> Arc<MemoryDevice> {
    Arc::new(striped(SIZE, 256 * KIB).await)
}

/// Small requests, a few at a time, so that there is much that can go wrong.
fn small() -> CopyOptions {
    CopyOptions { request_bytes: Some(64 << 10), queue_depth: 4, ..CopyOptions::default() }
}

async fn run(
    source: Arc<dyn BlockDevice>,
    destination: Arc<dyn BlockDevice>,
    options: &CopyOptions,
) -> Result<CopyReport, CopyError> {
    let copying = copy(source, destination, options, &NoProgress);
    tokio::time::timeout(Duration::from_secs(30), copying).await.expect("a copy ends, one way or the other")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_any_command_ends_the_copy_and_is_named() {
    use loam_sim::Operation as Sim;
    let cases = [
        (Side::Source, Sim::Read, Operation::Read),
        (Side::Source, Sim::Extents, Operation::Extents),
        (Side::Destination, Sim::Write, Operation::Write),
        (Side::Destination, Sim::WriteZeroes, Operation::Zero),
        (Side::Destination, Sim::Extents, Operation::Extents),
        (Side::Destination, Sim::Flush, Operation::Flush),
    ];
    for (side, sim, operation) in cases {
        for kind in [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::TimedOut] {
            for n in [0, 5] {
                let full = MemoryDevice::from_bytes(&vec![0xEE; SIZE as usize]);
                let zeroing = if n == 0 { Zeroing::Fast } else { Zeroing::NoFast };
                let shown = Arc::new(Shown { zeroing, ..Shown::new(full) });
                let (good, bad): (Arc<dyn BlockDevice>, _) = match side {
                    Side::Source => (shown.clone(), source().await as Arc<dyn BlockDevice>),
                    Side::Destination => (source().await, shown.clone() as Arc<dyn BlockDevice>),
                };
                let faulty = Arc::new(FaultyDevice::new(bad, 1).with_nth_failing(sim, n, kind));
                let (from, to) = match side {
                    Side::Source => (faulty.clone() as Arc<dyn BlockDevice>, good),
                    Side::Destination => (good, faulty.clone() as Arc<dyn BlockDevice>),
                };
                let ended = run(from.clone(), to.clone(), &small()).await;
                if faulty.requests(sim) <= n {
                    ended.expect("nothing failed");
                    assert_same(from.as_ref(), to.as_ref()).await;
                    continue;
                }
                match ended.expect_err("a fault") {
                    CopyError::Device { side: s, operation: o, offset, length, source, .. } => {
                        assert_eq!((s, o, source.kind()), (side, operation, kind));
                        assert!(offset + length <= SIZE, "{offset} {length}");
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_thing_is_not_copied_onto_itself() {
    let refused = |ended: Result<CopyReport, CopyError>| {
        let error = ended.expect_err("refused");
        assert!(matches!(error, CopyError::SameDevice { .. }), "{error}");
    };
    let device = source().await;
    refused(run(device.clone(), device, &small()).await);
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("f");
    let one = Arc::new(FileDevice::create(&path, MIB, FileOptions::default()).expect("file"));
    let link = directory.path().join("link");
    std::fs::hard_link(&path, &link).expect("link");
    let two = Arc::new(FileDevice::open(&link, FileOptions::default()).expect("file"));
    refused(run(one, two, &small()).await);
    let same = Some("nbd://localhost/".to_owned());
    let options = CopyOptions { source_identity: same.clone(), destination_identity: same, ..small() };
    refused(run(source().await, Arc::new(MemoryDevice::new(SIZE)), &options).await);
}

#[tokio::test]
async fn what_does_not_fit_or_takes_no_writes_is_refused_before_anything_is_written() {
    let smaller = Arc::new(Shown::new(MemoryDevice::new(SIZE - 1)));
    let error = run(source().await, smaller.clone(), &small()).await.expect_err("too small");
    assert!(matches!(error, CopyError::TooSmall { .. }), "{error}");
    assert_eq!(Shown::count(&smaller.writes) + Shown::count(&smaller.zeroes), 0);
    let read_only = Arc::new(loam_block::PatternDevice::new(SIZE));
    let error = run(source().await, read_only, &small()).await.expect_err("read-only");
    assert!(matches!(error, CopyError::ReadOnly), "{error}");
}

#[tokio::test]
async fn a_source_that_shrinks_is_an_error() {
    for (cut_to, last_is_data) in [(MIB, true), (MIB, false), (3 * MIB, false)] {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("f");
        let device = FileDevice::create(&path, SIZE, FileOptions::default()).expect("file");
        device.write(0, &vec![1; 4 * MIB as usize], WriteFlags::default()).await.expect("data");
        if last_is_data {
            device.write(SIZE - 4096, &[1; 4096], WriteFlags::default()).await.expect("data");
        }
        std::fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(cut_to)).expect("cut");
        let ended = run(Arc::new(device), Arc::new(MemoryDevice::new(SIZE)), &small()).await;
        match ended.expect_err("the source is cut short") {
            CopyError::Device { side: Side::Source, source, .. } => {
                assert!(source.to_string().contains("cut short"), "{source}");
            }
            other => panic!("{other}"),
        }
    }
}

/// A write that was not flushed: its range, and its bytes or zeroes.
type Pending = (Range<u64>, Option<Vec<u8>>);

/// A server that keeps writes in memory until they are flushed, and now and then is killed and comes back.
struct Forgetful {
    kept: MemoryDevice,
    pending: Mutex<Vec<Pending>>,
    /// Killed after so many writes, again and again, `kills` times.
    writes_to_kill: u64,
    writes: AtomicU64,
    kills: AtomicU64,
    lost: AtomicBool,
}

impl Forgetful {
    fn new(size: u64, writes_to_kill: u64, kills: u64) -> Self {
        Forgetful {
            kept: MemoryDevice::from_bytes(&vec![0xEE; size as usize]),
            pending: Mutex::default(),
            writes_to_kill,
            writes: AtomicU64::new(0),
            kills: AtomicU64::new(kills),
            lost: AtomicBool::new(false),
        }
    }

    fn keep(&self, range: Range<u64>, bytes: Option<Vec<u8>>) {
        let mut pending = self.pending.lock().expect("lock");
        pending.push((range, bytes));
        let number = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let left = self.kills.load(Ordering::SeqCst);
        if number.is_multiple_of(self.writes_to_kill) && left > 0 {
            self.kills.store(left - 1, Ordering::SeqCst);
            pending.clear();
            self.lost.store(true, Ordering::SeqCst);
        }
    }
}

impl BlockDevice for Forgetful {
    fn geometry(&self) -> Geometry {
        self.kept.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { extents: false, ..self.kept.capabilities() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.kept.read(offset, buffer)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        self.keep(offset..offset + data.len() as u64, Some(data.to_vec()));
        Io::Ready(Ok(()))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        self.keep(offset..offset + length, None);
        Io::Ready(Ok(()))
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::pending(async move {
            let pending = std::mem::take(&mut *self.pending.lock().expect("lock"));
            for (range, bytes) in pending {
                match bytes {
                    Some(bytes) => self.kept.write(range.start, &bytes, WriteFlags::default()).await?,
                    None => {
                        let length = range.end - range.start;
                        self.kept.write_zeroes(range.start, length, ZeroFlags::default()).await?;
                    }
                }
            }
            if self.lost.swap(false, Ordering::SeqCst) {
                return Err(Error::new(ErrorKind::WritesLost, "the server went away and came back"));
            }
            Ok(())
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_writes_are_done_again() {
    for (writes_to_kill, kills) in [(1, 1), (10, 1), (40, 3), (65, 1)] {
        let source = source().await;
        let destination = Arc::new(Forgetful::new(SIZE, writes_to_kill, kills));
        let report = run(source.clone(), destination.clone(), &small()).await.expect("copied");
        assert_same(source.as_ref(), destination.as_ref()).await;
        assert!(report.redone >= 1, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_always_forgets_is_given_up() {
    let destination = Arc::new(Forgetful::new(SIZE, 3, u64::MAX));
    let error = run(source().await, destination, &small()).await.expect_err("never done");
    assert!(matches!(error, CopyError::LostTooOften { done: 0, .. }), "{error}");
}

/// Stops the copy once so many bytes are done.
struct StopAt(u64, Stop);

impl Progress for StopAt {
    fn update(&self, state: &ProgressState) {
        if state.done >= self.0 {
            self.1.stop();
        }
    }
}

fn resumable(state: &Path) -> CopyOptions {
    CopyOptions {
        resume: Some(state.to_owned()),
        source_identity: Some("source".to_owned()),
        destination_identity: Some("destination".to_owned()),
        checkpoint_interval: Duration::from_millis(100),
        ..small()
    }
}

fn slow_destination() -> Arc<Shown> {
    let full = MemoryDevice::from_bytes(&vec![0xEE; SIZE as usize]);
    Arc::new(Shown { write_delay: Duration::from_millis(20), ..Shown::new(full) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_stopped_goes_on_where_it_was() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let state = directory.path().join("state");
    let (source, destination) = (source().await, slow_destination());
    let options = resumable(&state);
    let stop_at = StopAt(SIZE / 4, options.stop.clone());
    let stopped = copy(source.clone(), destination.clone(), &options, &stop_at);
    let CopyError::Stopped { done } = stopped.await.expect_err("stopped") else { panic!("not stopped") };
    assert!(done > 0 && done < SIZE, "{done}");
    assert!(Shown::count(&destination.flushes) >= 1);

    let other = CopyOptions { source_identity: Some("other".to_owned()), ..resumable(&state) };
    let error = run(source.clone(), destination.clone(), &other).await.expect_err("another source");
    assert!(matches!(error, CopyError::State { .. }), "{error}");

    let report = run(source.clone(), destination.clone(), &resumable(&state)).await.expect("resumed");
    assert_eq!((report.resumed_bytes, report.bytes), (done, SIZE - done));
    assert_same(source.as_ref(), destination.as_ref()).await;
    assert!(!state.exists(), "the copy is done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_dropped_goes_on_from_its_checkpoint() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let state = directory.path().join("state");
    let (source, destination) = (source().await, slow_destination());
    let options = resumable(&state);
    let copying = copy(source.clone(), destination.clone(), &options, &NoProgress);
    tokio::time::timeout(Duration::from_millis(250), copying).await.expect_err("it takes longer");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let writes = Shown::count(&destination.writes);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(Shown::count(&destination.writes), writes, "nothing goes on after the drop");
    let report = run(source.clone(), destination.clone(), &options).await.expect("resumed");
    assert!(report.resumed_bytes > 0, "{report:?}");
    assert_same(source.as_ref(), destination.as_ref()).await;
}

#[tokio::test]
async fn verify_finds_what_is_wrong() {
    let options = CopyOptions { verify: true, ..small() };
    let (source, good) = (source().await, Arc::new(Shown::new(MemoryDevice::new(SIZE))));
    let report = run(source.clone(), good.clone(), &options).await.expect("good");
    assert!(report.verified);

    let bad = Arc::new(FaultyDevice::new(good, 3).with_range_corrupt(SIZE / 2..SIZE / 2 + 4));
    match run(source.clone(), bad, &options).await.expect_err("a wrong bit") {
        CopyError::Differs { offset, .. } => assert!((SIZE / 2..SIZE / 2 + 4).contains(&offset), "{offset}"),
        other => panic!("{other}"),
    }
    // A hole of the source over which the destination lies about itself having nothing.
    let lying = Arc::new(Liar(MemoryDevice::from_bytes(&vec![0xEE; SIZE as usize])));
    let options = CopyOptions { destination_is_zero: true, ..options };
    let error = run(source, lying, &options).await.expect_err("not zero at all");
    assert!(matches!(error, CopyError::Differs { offset, wanted: 0, found: 0xEE } if offset >= 256 * KIB));
}

/// Memory that knows no extents.
struct Liar(MemoryDevice);

impl BlockDevice for Liar {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { extents: false, ..self.0.capabilities() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.0.read(offset, buffer)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.0.write(offset, data, flags)
    }

    fn extents(&self, _offset: u64, _length: u64, _limit: usize) -> Io<'_, Vec<Extent>> {
        Io::Ready(Err(Error::new(ErrorKind::NotSupported, "asked for what is not advertised")))
    }
}

#[tokio::test]
async fn the_edge_of_a_larger_block_is_read_and_written_back() {
    let bytes: Vec<u8> = (0..100_001u32).map(|at| (at % 251) as u8).collect();
    let source = Arc::new(MemoryDevice::from_bytes(&bytes));
    let memory = MemoryDevice::from_bytes(&vec![0xEE; 25 * 4096]);
    let destination = Arc::new(Shown { minimum_block: 4096, ..Shown::new(memory) });
    let options = CopyOptions { verify: true, ..small() };
    run(source.clone(), destination.clone(), &options).await.expect("copied");
    assert_same(source.as_ref(), destination.as_ref()).await;
    assert_eq!(
        copy_support::bytes_of(destination.as_ref()).await[100_001..],
        vec![0xEE; 25 * 4096 - 100_001]
    );

    let short = Arc::new(Shown { minimum_block: 4096, ..Shown::new(MemoryDevice::new(100_001)) });
    let error = run(source, short, &small()).await.expect_err("the last block cannot be reached");
    assert!(matches!(error, CopyError::BlockSize { .. }), "{error}");
}

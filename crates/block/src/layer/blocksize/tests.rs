//! Pieces, edges, and writers that meet in one block.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::layer::forward::forward;
use crate::layer::stats::{Report, counted};
use crate::layer::{LayerSpec, Operation, wrap_all};
use crate::{BlockDevice, ErrorKind, ExtentKind, Io, MemoryDevice, WriteFlags, ZeroFlags};

fn layers(layers: &[&str], inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    let layers: Vec<LayerSpec> = layers.iter().map(|layer| layer.parse().expect(layer)).collect();
    wrap_all(&layers, inner).expect("layers")
}

fn requests(report: &Report, operation: Operation) -> (u64, u64) {
    report.operation(operation).map_or((0, 0), |report| (report.requests, report.bytes))
}

#[tokio::test]
async fn requests_go_down_in_pieces_and_small_ones_whole() {
    let (counting, statistics) = counted(Arc::new(MemoryDevice::new(64 << 20)));
    let device = layers(&["blocksize,maximum=256K,maximum-length=1M"], counting);
    assert!(device.write(0, &[1; 4096], WriteFlags::default()).is_ready());
    let data = vec![7; 1 << 20];
    device.write(512, &data, WriteFlags::default()).await.expect("write");
    let mut back = vec![0; 1 << 20];
    assert!(device.read(512, &mut back).is_ready(), "reads of what is at hand are ready in pieces too");
    assert!(back == data);
    device.write_zeroes(0, (3 << 20) + 1, ZeroFlags::default()).await.expect("zeroes");
    device.trim(0, 2 << 20).await.expect("trim");
    let report = statistics.report();
    assert_eq!(requests(&report, Operation::Write), (5, (1 << 20) + 4096));
    assert_eq!(requests(&report, Operation::Read), (4, 1 << 20));
    assert_eq!(requests(&report, Operation::Zero), (4, (3 << 20) + 1));
    assert_eq!(requests(&report, Operation::Trim), (2, 2 << 20));
    let extents = device.extents(0, 64 << 20, 9).await.expect("extents");
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 1 << 20, "no longer question either");
}

#[tokio::test(start_paused = true)]
async fn pieces_wait_one_after_the_other_or_some_at_once() {
    for (parallel, milliseconds) in [("", 80), (",parallel=2", 40), (",parallel=64", 20)] {
        let split = format!("blocksize,maximum=256K{parallel}");
        let device = layers(&[&split, "delay,read=20ms,write=20ms"], Arc::new(MemoryDevice::new(4 << 20)));
        let start = Instant::now();
        let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 9) as u8).collect();
        device.write(0, &data, WriteFlags::default()).await.expect("write");
        assert_eq!(start.elapsed().as_millis(), milliseconds, "{split}");
        let mut back = vec![0; 1 << 20];
        device.read(0, &mut back).await.expect("read");
        assert_eq!(start.elapsed().as_millis(), 2 * milliseconds, "{split}");
        assert!(back == data, "{split}: each piece in its place");
    }
}

#[tokio::test]
async fn parts_of_blocks() {
    let memory = Arc::new(MemoryDevice::from_bytes(&[7; 64 << 10]));
    // Two: the lower one refuses what is not aligned, the upper one aligns.
    let device = layers(&["blocksize,minimum=4K", "blocksize,offer=4K"], memory);
    assert_eq!(device.geometry().minimum_block, 1);
    device.write(4095, &[1, 2, 3], WriteFlags { fua: true }).await.expect("write");
    device.write_zeroes(8190, 4, ZeroFlags::default()).await.expect("zeroes in two blocks");
    device.write_zeroes(10_000, 10_000, ZeroFlags::default()).await.expect("edges and a middle");
    device.trim(20_481, 8192).await.expect("a trim of one block");
    device.trim(30_000, 10).await.expect("a trim of nothing");
    let mut expected = vec![7; 64 << 10];
    expected[4095..4098].copy_from_slice(&[1, 2, 3]);
    expected[8190..8194].fill(0);
    expected[10_000..20_000].fill(0);
    expected[24_576..28_672].fill(0);
    let mut back = vec![0; 64 << 10];
    device.read(0, &mut back).await.expect("read");
    assert!(back == expected);
    let mut part = [0; 5];
    assert!(device.read(4094, &mut part).is_ready());
    assert_eq!(part, [7, 1, 2, 3, 7]);
    let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
    let refused = device.write_zeroes(1, 4096, fast).await.expect_err("bytes would be written");
    assert_eq!(refused.kind(), ErrorKind::NotSupported);
    device.write_zeroes(32_768, 4096, fast).await.expect("a whole block");
    let extents = device.extents(32_769, 7, 1).await.expect("extents");
    assert_eq!((extents[0].offset, extents[0].length), (32_769, 7));
    assert!(device.read(65_536, &mut part).await.is_err());
}

/// Writers of parts of a block, and of whole blocks, on a device that takes its time between reading and writing: no
/// byte of one is lost by another.
#[tokio::test(start_paused = true)]
async fn writers_of_one_block_lose_nothing() {
    let memory = Arc::new(MemoryDevice::from_bytes(&[0xff; 16 << 10]));
    let device = layers(&["blocksize,minimum=4K", "delay,read=3ms,write=5ms"], memory.clone());
    let part = |index: u64| {
        let device = device.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(index % 7)).await;
            device.write(index * 100, &[index as u8; 100], WriteFlags::default()).await.expect("write");
        }
    };
    let parts = futures_util::future::join_all((0..120).map(part));
    let whole = async {
        tokio::time::sleep(Duration::from_millis(4)).await;
        device.write(12 << 10, &[0xaa; 4096], WriteFlags::default()).await.expect("write");
    };
    tokio::join!(parts, whole);
    let mut bytes = vec![0; 16 << 10];
    memory.read(0, &mut bytes).await.expect("read");
    for (at, byte) in bytes.iter().enumerate() {
        let expected = match at {
            0..12_000 => (at / 100) as u8,
            12_288.. => 0xaa,
            _ => 0xff,
        };
        assert_eq!(*byte, expected, "at {at}");
    }
}

/// A whole block is written while an edge of it is being changed: whichever comes second finds the other's bytes.
#[tokio::test(start_paused = true)]
async fn a_whole_block_waits_for_one_whose_edge_is_changed() {
    let memory = Arc::new(MemoryDevice::new(16 << 10));
    let device = layers(&["blocksize,minimum=4K", "delay,read=10ms,write=10ms"], memory.clone());
    let edge = device.write(4090, &[1; 12], WriteFlags::default());
    let whole = async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        device.write(4096, &[2; 4096], WriteFlags::default()).await
    };
    let (edge, whole) = tokio::join!(edge, whole);
    edge.and(whole).expect("writes");
    let mut bytes = vec![0; 4096];
    memory.read(4096, &mut bytes).await.expect("read");
    assert!(bytes == [2; 4096], "the later write is whole");
}

/// Memory whose writes go on when nobody waits for them any more, as those of a file do. The first takes its time.
struct GoesOn {
    memory: Arc<MemoryDevice>,
    writes: AtomicU64,
}

impl BlockDevice for GoesOn {
    forward!(memory: geometry, capabilities, read);

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        let first = self.writes.fetch_add(1, Ordering::Relaxed) == 0;
        let (memory, data) = (self.memory.clone(), data.to_vec());
        Io::pending(async move {
            let write = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(if first { 30 } else { 1 })).await;
                memory.write(offset, &data, flags).await
            });
            write.await.expect("a task")
        })
    }
}

/// The caller goes away while an edge is being written; who writes there next must wait for what goes on, which holds
/// the block as it was.
#[tokio::test(start_paused = true)]
async fn an_abandoned_change_of_an_edge_does_not_undo_what_comes_after_it() {
    let memory = Arc::new(MemoryDevice::new(16 << 10));
    let below = Arc::new(GoesOn { memory: memory.clone(), writes: AtomicU64::new(0) });
    let device = layers(&["blocksize,minimum=4K"], below);
    let abandoned = device.write(100, &[1; 10], WriteFlags::default());
    let gone = tokio::time::timeout(Duration::from_millis(5), abandoned).await;
    assert!(gone.is_err());
    device.write(200, &[2; 10], WriteFlags::default()).await.expect("write");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut bytes = [0; 10];
    memory.read(200, &mut bytes).await.expect("read");
    assert_eq!(bytes, [2; 10]);
}

#[tokio::test]
async fn fast_zeroes_of_many_pieces() {
    let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
    // Memory is zeroed fast only in the first two pieces.
    let memory = Arc::new(MemoryDevice::from_bytes(&[7; 1 << 20]));
    let spoiled = ["blocksize,maximum-length=256K", "fault,on=zero,error=ENOTSUP,after=2,count=1"];
    let device = layers(&spoiled, memory.clone());
    device.write_zeroes(0, 1 << 20, fast).await.expect("once begun it is finished");
    assert_eq!(memory.allocated_bytes(), 0);
    let memory = Arc::new(MemoryDevice::from_bytes(&[7; 1 << 20]));
    let device =
        layers(&["blocksize,maximum-length=256K", "nozero,zero=plugin,fast-zero=slow"], memory.clone());
    device.write_zeroes(0, 1 << 20, fast).await.expect_err("refused at once");
    assert_eq!(memory.allocated_bytes(), 1 << 20);
}

#[test]
fn what_cannot_be() {
    let wrap = |layer: &str, size| {
        let layer: LayerSpec = layer.parse().expect(layer);
        layer.wrap(Arc::new(MemoryDevice::new(size))).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(wrap("blocksize,minimum=4K", 4097).contains("no multiple of 4096"));
    assert!(wrap("blocksize,offer=512", 4097).contains("no multiple of 512"));
    assert!(wrap("blocksize,minimum=4K,maximum=1K", 8192).contains("maximum=1024"));
    assert_eq!(wrap("blocksize,minimum=4K,maximum=4K", 8192), "");
    for wrong in
        ["minimum=3", "minimum=128K", "offer=0", "parallel=0", "parallel=65", "maximum=0", "preferred=100"]
    {
        assert!(format!("blocksize,{wrong}").parse::<LayerSpec>().is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn an_extent_shorter_than_a_block_is_not_mistaken_for_another() {
    // Extents of 32 KiB in blocks of 64 KiB: the first lies before what is asked for.
    let memory = Arc::new(MemoryDevice::new(1 << 20));
    memory.write(0, &[1; 32 << 10], WriteFlags::default()).await.expect("write");
    let device = layers(&["blocksize,minimum=64K"], memory);
    let extents = device.extents(40 << 10, 100, 1).await.expect("extents");
    assert_eq!((extents[0].offset, extents[0].length, extents[0].kind), (40 << 10, 100, ExtentKind::Data));
    let extents = device.extents(40 << 10, 100, 2).await.expect("extents");
    assert_eq!((extents[0].offset, extents[0].length, extents[0].kind), (40 << 10, 100, ExtentKind::Hole));
}

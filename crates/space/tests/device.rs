//! The address space and the virtual device, byte for byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use loam_block::conformance::{Contents, Profile, read_located, run};
use loam_block::{
    Access, BlockDevice, Capabilities, Error, ErrorKind, Extent, ExtentKind, FileDevice, Geometry, Io,
    Locality, Located, MemoryDevice, PatternDevice, Ticket, WriteFlags, ZeroFlags, check_extents_range,
    check_range,
};
use loam_sim::{FaultyDevice, Operation};
use loam_space::{
    Address, AddressSpace, Allocation, BLOCK, ContentId, Map, Resolver, Unmapped, VIRTUAL_BASE, VirtualDevice,
};

/// A pattern in a file that settles only what lies in its second half.
struct HalfSettled(FileDevice);

impl BlockDevice for HalfSettled {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.0.read(offset, buffer)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.0.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.0.write_zeroes(offset, length, flags)
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.0.trim(offset, length)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.0.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.0.extents(offset, length, limit)
    }

    fn locate(&self, offset: u64, length: u64, access: Access) -> Option<Located<'_>> {
        self.0.locate(offset, length, access)
    }

    fn settle(&self, ticket: Ticket, bytes: Option<&[u8]>) -> bool {
        let shown = bytes.is_none_or(|bytes| PatternDevice::verify(ticket.offset, bytes).is_ok());
        shown && ticket.route.is_none() && ticket.offset >= self.0.geometry().size / 2
    }
}

/// Four blocks, each local once it was prefetched, and one question at a time. Takes whole blocks only.
#[derive(Default)]
struct Lazy {
    local: [AtomicBool; 4],
}

impl BlockDevice for Lazy {
    fn geometry(&self) -> Geometry {
        let block = BLOCK as u32;
        Geometry { size: 4 * BLOCK, minimum_block: block, preferred_block: block, maximum_block: 1 << 20 }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lazy: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, _offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        buffer.fill(b'l');
        Io::Ready(Ok(()))
    }

    fn locality(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Locality>> {
        let checked = check_extents_range(&self.geometry(), offset, length);
        let local = self.local[(offset / BLOCK) as usize].load(Ordering::SeqCst);
        Io::Ready(checked.map(|()| vec![Locality { offset, length: BLOCK, local }]))
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = check_range(&self.geometry(), "prefetch", offset, length) {
            return Io::Ready(Err(error));
        }
        Io::pending(async move {
            for block in offset / BLOCK..(offset + length) / BLOCK {
                self.local[block as usize].store(true, Ordering::SeqCst);
            }
            Ok(())
        })
    }
}

/// Contents whose spec is a byte that fills them; `l` is [`Lazy`], `p` is the pattern, `d` a pattern that takes its time, `f` one in a
/// file, `h` one that is [`HalfSettled`].
#[derive(Default)]
struct Fills {
    calls: AtomicU64,
    failures_left: AtomicU64,
}

impl Resolver for Fills {
    fn resolve<'a>(&'a self, content: ContentId, spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let take_one = |left: u64| left.checked_sub(1);
        if self.failures_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one).is_ok() {
            let context = format!("content {content} cannot be reached");
            return Io::Ready(Err(Error::new(ErrorKind::Unavailable, context)));
        }
        let pattern = PatternDevice::new(64 << 20);
        Io::Ready(Ok(match spec[0] {
            b'p' => Arc::new(pattern),
            b'l' => Arc::new(Lazy::default()),
            b'f' => Arc::new(FileDevice::pattern_in_memory(1 << 20).expect("memory")),
            b'h' => Arc::new(HalfSettled(FileDevice::pattern_in_memory(8 * BLOCK).expect("memory"))),
            b'd' => Arc::new(
                FaultyDevice::new(Arc::new(pattern), 1)
                    .with_delays(Duration::from_micros(50))
                    .with_nth_failing(Operation::Read, 9, ErrorKind::TimedOut),
            ),
            fill => Arc::new(MemoryDevice::from_bytes(&vec![fill; 1 << 20])),
        }))
    }
}

struct Fixture {
    _directory: tempfile::TempDir,
    map: Arc<Map>,
    resolver: Arc<Fills>,
}

impl Fixture {
    fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let map = Arc::new(Map::create(directory.path(), size).expect("map"));
        Fixture { _directory: directory, map, resolver: Arc::default() }
    }

    fn add(&self, spec: &[u8], blocks: &[u64]) {
        let content = self.map.add_content(spec).expect("content");
        let request = |blocks: &u64| Allocation {
            content,
            content_offset: 0,
            length: blocks * BLOCK,
            alignment: BLOCK,
        };
        let requests: Vec<_> = blocks.iter().map(request).collect();
        self.map.allocate_batch(&requests).expect("ranges");
    }

    fn space(&self, unmapped: Unmapped) -> Arc<AddressSpace> {
        Arc::new(AddressSpace::new(Arc::clone(&self.map), Arc::clone(&self.resolver) as _, unmapped))
    }
}

async fn read(device: &dyn BlockDevice, offset: u64, length: usize) -> loam_block::Result<Vec<u8>> {
    let mut bytes = vec![0xcc; length];
    device.read(offset, &mut bytes).await.map(|()| bytes)
}

#[tokio::test]
async fn a_read_over_several_ranges_is_in_order() {
    let fixture = Fixture::new(1 << 30);
    for spec in [b"a", b"b", b"c"] {
        fixture.add(spec, &[1, 2]);
    }
    let space = fixture.space(Unmapped::Error);
    let whole: Vec<u8> = b"aaabbbccc".iter().flat_map(|byte| [*byte; BLOCK as usize]).collect();
    for (start, end) in [(0, whole.len()), (1, 4096), (4095, 8193), (12287, 12289), (100, 36863), (5, 5)] {
        assert_eq!(read(&*space, start as u64, end - start).await.expect("read"), whole[start..end]);
    }
    let mut bytes = vec![0; whole.len()];
    assert!(space.read(0, &mut bytes).is_ready(), "every part is at hand, so the whole is");
    assert_eq!(bytes, whole);
}

#[tokio::test]
async fn a_range_shows_its_part_of_the_content() {
    let fixture = Fixture::new(1 << 30);
    let content = fixture.map.add_content(b"p").expect("content");
    let request = |first: u64| Allocation {
        content,
        content_offset: first * BLOCK,
        length: 2 * BLOCK,
        alignment: BLOCK,
    };
    fixture.map.allocate_batch(&[request(50), request(7)]).expect("ranges");
    let space = fixture.space(Unmapped::Error);
    let bytes = read(&*space, 10, 4 * BLOCK as usize - 10).await.expect("read");
    PatternDevice::verify(50 * BLOCK + 10, &bytes[..8182]).expect("first");
    PatternDevice::verify(7 * BLOCK, &bytes[8182..]).expect("second");
}

#[tokio::test]
async fn a_part_that_waits_makes_the_whole_wait_and_nothing_is_mixed_up() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"a", &[1]);
    fixture.add(b"d", &[3]);
    fixture.add(b"c", &[1]);
    let space = fixture.space(Unmapped::Error);
    for _ in 0..3 {
        let bytes = read(&*space, 0, 5 * BLOCK as usize).await.expect("read");
        assert!(bytes[..4096].iter().all(|byte| *byte == b'a'));
        PatternDevice::verify(0, &bytes[4096..16384]).expect("pattern");
        assert!(bytes[16384..].iter().all(|byte| *byte == b'c'));
    }
    let mut failed = 0;
    for _ in 0..8 {
        failed += u32::from(read(&*space, 2048, 8192).await.is_err());
    }
    assert_eq!(failed, 1, "the tenth read of the slow device fails, and with it the request, and no other");
}

#[tokio::test]
async fn a_content_is_resolved_once_and_a_failure_is_tried_again() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"p", &[4]);
    fixture.resolver.failures_left.store(2, Ordering::SeqCst);
    let space = fixture.space(Unmapped::Error);
    for _ in 0..2 {
        let error = read(&*space, 0, 4096).await.expect_err("cannot be reached");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    }
    let reads = (0..16).map(|_| {
        let space = Arc::clone(&space);
        tokio::spawn(async move { read(&*space, 4096, 4096).await })
    });
    for read in reads.collect::<Vec<_>>() {
        PatternDevice::verify(4096, &read.await.expect("task").expect("read")).expect("pattern");
    }
    assert_eq!(fixture.resolver.calls.load(Ordering::SeqCst), 3);
    let counters = space.counters();
    assert_eq!((counters.resolved, counters.resolve_failures), (1, 2));
}

#[tokio::test]
async fn what_is_unmapped_is_an_error_or_zeroes_as_asked() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"a", &[1]);
    let space = fixture.space(Unmapped::Error);
    for (offset, length) in [(4096, 1), (4095, 2), ((1 << 30) - 1, 1)] {
        let error = read(&*space, offset, length).await.expect_err("unmapped");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Unmapped, 5));
    }
    assert_eq!(space.counters().unmapped_reads, 3);
    let space = fixture.space(Unmapped::Zeros);
    assert_eq!(read(&*space, 4094, 4).await.expect("read"), [b'a', b'a', 0, 0]);
    let extents = space.extents(0, 1 << 30, 9).await.expect("extents");
    let hole = Extent { offset: 4096, length: (1 << 30) - 4096, kind: ExtentKind::Hole };
    assert_eq!(extents, [Extent { offset: 0, length: 4096, kind: ExtentKind::Data }, hole]);
}

#[tokio::test]
async fn ranges_are_seen_as_soon_as_they_are_added() {
    let fixture = Fixture::new(1 << 30);
    let space = fixture.space(Unmapped::Error);
    for blocks in 1..40 {
        let start = fixture.map.stats().high_water.0;
        assert!(read(&*space, start, 4096).await.is_err());
        fixture.add(b"p", &[blocks]);
        let bytes = read(&*space, start, (blocks * BLOCK) as usize).await.expect("read");
        PatternDevice::verify(0, &bytes).expect("pattern");
    }
    fixture.map.compact().expect("compact");
    PatternDevice::verify(0, &read(&*space, 0, 4096).await.expect("read")).expect("pattern");
}

#[tokio::test]
async fn reads_that_straddle_the_base_are_right_byte_for_byte() {
    for prefix_length in [1 << 20, VIRTUAL_BASE - 3000, VIRTUAL_BASE, VIRTUAL_BASE + 5000] {
        let fixture = Fixture::new(1 << 30);
        fixture.add(b"p", &[16]);
        let prefix = Arc::new(PatternDevice::new(prefix_length));
        let device = VirtualDevice::new(prefix, fixture.space(Unmapped::Error));
        assert_eq!(device.geometry().size, VIRTUAL_BASE + (1 << 30));
        let end = prefix_length.min(VIRTUAL_BASE);
        let byte = |offset: u64| match offset {
            _ if offset < end => (offset / 8 * 8).to_be_bytes()[(offset % 8) as usize],
            _ if offset < VIRTUAL_BASE => 0,
            _ => ((offset - VIRTUAL_BASE) / 8 * 8).to_be_bytes()[(offset % 8) as usize],
        };
        for middle in [end, VIRTUAL_BASE] {
            for (before, after) in [(1, 1), (4096, 4096), (5, 8192), (8192, 5), (4096, 0), (0, 4096), (7, 0)]
            {
                let offset = middle - before;
                let bytes = read(&device, offset, (before + after) as usize).await.expect("read");
                let expected: Vec<u8> = (offset..middle + after).map(byte).collect();
                assert_eq!(bytes, expected, "{before} before and {after} after {middle}");
            }
        }
        let bytes = read(&device, VIRTUAL_BASE - 1, 65537).await.expect("read");
        let expected: Vec<u8> = (VIRTUAL_BASE - 1..VIRTUAL_BASE + 65536).map(byte).collect();
        assert_eq!(bytes, expected);
        assert!(read(&device, VIRTUAL_BASE - 1, 65538).await.is_err(), "the last byte is unmapped");
    }
}

#[tokio::test]
async fn extents_of_the_virtual_device_cover_its_parts() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"a", &[1]);
    let prefix = Arc::new(MemoryDevice::new(1 << 20));
    prefix.write(65536, &[1; 4096], WriteFlags::default()).await.expect("superblock");
    let device = VirtualDevice::new(prefix, fixture.space(Unmapped::Zeros));
    let size = device.geometry().size;
    let (mut at, mut kinds) = (0, Vec::new());
    while at < size {
        let extents = device.extents(at, size - at, 2).await.expect("extents");
        loam_block::conformance::assert_extents(&extents, at, size - at, 2, "virtual device");
        kinds.extend(extents.iter().map(|extent| extent.kind));
        at += extents.iter().map(|extent| extent.length).sum::<u64>();
    }
    use ExtentKind::{Data, Hole};
    assert_eq!(kinds, [Hole, Data, Hole, Hole, Data, Hole]);
}

const ACCESSES: [Access; 2] = [Access::Seen, Access::Unseen];

#[tokio::test]
async fn what_lies_in_one_range_of_a_file_is_located_there() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"p", &[1]);
    let content = fixture.map.add_content(b"f").expect("content");
    let request = |first: u64| Allocation {
        content,
        content_offset: first * BLOCK,
        length: 2 * BLOCK,
        alignment: BLOCK,
    };
    fixture.map.allocate_batch(&[request(50), request(7)]).expect("ranges");
    let prefix = Arc::new(FileDevice::pattern_in_memory(1 << 20).expect("prefix"));
    let device = VirtualDevice::new(prefix, fixture.space(Unmapped::Zeros));
    let at = |block: u64| VIRTUAL_BASE + block * BLOCK;
    for access in ACCESSES {
        assert_eq!(read_located(&device, at(1), 4096, access), None, "not resolved yet");
    }
    read(&device, at(0), 5 * BLOCK as usize).await.expect("every content is asked");
    for access in ACCESSES {
        let located = |offset, length| read_located(&device, offset, length, access);
        for (block, blocks, lies_at) in [(1, 2, 50), (2, 1, 51), (3, 1, 7), (3, 2, 7)] {
            let bytes = located(at(block), (blocks * BLOCK) as usize).expect("a location");
            PatternDevice::verify(lies_at * BLOCK, &bytes).expect("the content's bytes");
        }
        assert_eq!(located(at(0), 4096), None, "not in a file");
        assert_eq!(located(at(2), 8192), None, "in two ranges");
        assert_eq!(located(at(4), 8192), None, "reaches beyond the range");
        assert_eq!(located(at(5), 4096), None, "unmapped");
        PatternDevice::verify(8192, &located(8192, 4096).expect("of the prefix")).expect("prefix");
        assert_eq!(located((1 << 20) - 4096, 8192), None, "reaches beyond the prefix");
        assert_eq!(located(VIRTUAL_BASE - 4096, 8192), None, "straddles the base");
        assert_eq!(located(VIRTUAL_BASE - 4096, 4096), None, "zeroes behind the prefix");
    }
    let longer = Arc::new(FileDevice::in_memory(VIRTUAL_BASE + (1 << 20)).expect("sparse memory"));
    let device = VirtualDevice::new(longer, fixture.space(Unmapped::Zeros));
    let located = |offset, length| read_located(&device, offset, length, Access::Seen);
    assert_eq!(located(VIRTUAL_BASE - 4096, 4096), Some(vec![0; 4096]));
    assert_eq!(located(VIRTUAL_BASE - 4096, 8192), None, "of the prefix, nothing is seen from the base on");
}

#[tokio::test]
async fn a_location_is_settled_by_the_content_that_gave_it() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"f", &[8]);
    fixture.add(b"h", &[8]);
    fixture.add(b"f", &[8]);
    let prefix = HalfSettled(FileDevice::pattern_in_memory(8 * BLOCK).expect("prefix"));
    let device = VirtualDevice::new(Arc::new(prefix), fixture.space(Unmapped::Error));
    read(&device, VIRTUAL_BASE, 24 * BLOCK as usize).await.expect("every content is asked");
    for access in ACCESSES {
        let settled = |block| read_located(&device, VIRTUAL_BASE + block * BLOCK, 4096, access).is_some();
        assert_eq!(
            [0, 7, 8, 11, 12, 15, 16, 23].map(settled),
            [true, true, false, false, true, true, true, true]
        );
        let settled = |block| read_located(&device, block * BLOCK, 4096, access).is_some();
        assert_eq!([0, 3, 4, 7].map(settled), [false, false, true, true], "the prefix settles its own");
    }
    let unknown = Ticket::new(0, 4096, 0).and_then(|ticket| ticket.routed(99.try_into().ok()?));
    assert!(!device.settle(unknown.expect("a ticket"), None), "nobody's");
}

#[tokio::test]
async fn writes_are_refused() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"a", &[1]);
    let prefix = Arc::new(MemoryDevice::new(1 << 20));
    let device = VirtualDevice::new(prefix, fixture.space(Unmapped::Error));
    for offset in [0, 65536, VIRTUAL_BASE - 4096, VIRTUAL_BASE, VIRTUAL_BASE + 4096] {
        let refused = [
            device.write(offset, &[1; 4096], WriteFlags::default()).await,
            device.write_zeroes(offset, 4096, ZeroFlags::default()).await,
            device.trim(offset, 4096).await,
        ];
        assert!(refused.into_iter().all(|result| result.is_err_and(|e| e.kind() == ErrorKind::ReadOnly)));
    }
    device.flush().await.expect("flush");
}

#[test]
fn both_devices_keep_the_contract() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"p", &[1, 7, 30]);
    fixture.add(b"x", &[100, 3]);
    fixture.add(b"f", &[20]);
    let space = fixture.space(Unmapped::Zeros);
    let device = VirtualDevice::new(Arc::new(PatternDevice::new(1 << 20)), Arc::clone(&space));
    for seed in 0..4 {
        let profile = Profile { contents: Contents::Fixed, seed, ..Profile::default() };
        run(&*space, &profile);
        run(&device, &profile);
    }
    assert_eq!(fixture.map.lookup(Address(0)).map(|range| range.content), Some(ContentId(0)));
}

/// Asks again and again until all of `offset..end` is known.
async fn localities(device: &dyn BlockDevice, offset: u64, end: u64) -> Vec<(u64, u64, bool)> {
    let mut all: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = offset;
    while at < end {
        let runs = device.locality(at, end - at, 3).await.expect("locality");
        assert!((1..=3).contains(&runs.len()), "{runs:?}");
        for run in runs {
            assert!(run.offset == at && run.length > 0 && run.offset + run.length <= end, "{run:?}");
            at += run.length;
            match all.last_mut() {
                Some(last) if last.2 == run.local => last.1 += run.length,
                _ => all.push((run.offset, run.length, run.local)),
            }
        }
    }
    all
}

#[tokio::test]
async fn what_is_local_and_what_is_brought_near() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"l", &[4]);
    fixture.add(b"m", &[2]);
    fixture.add(b"l", &[4]);
    let starts: Vec<u64> = fixture.map.ranges().map(|range| range.start.0).collect();
    let [first, _, second] = starts[..] else { panic!("{starts:?}") };
    let space = Arc::new(AddressSpace::new(fixture.map.clone(), fixture.resolver.clone(), Unmapped::Error));
    assert!(space.capabilities().lazy);
    let all =
        |local: [(u64, u64, bool); 4]| local.map(|(start, blocks, local)| (start, blocks * BLOCK, local));
    let end = second + 4 * BLOCK;
    let before = all([(first, 4, false), (first + 4 * BLOCK, 2, true), (second, 4, false), (end, 6, true)]);
    assert_eq!(
        localities(&*space, first, end + 6 * BLOCK).await,
        before,
        "contents are resolved to be asked"
    );
    assert_eq!(fixture.resolver.calls.load(Ordering::SeqCst), 3);

    // From the middle of the last block but one of the first to the first byte of the second.
    space.prefetch(first + 2 * BLOCK + 100, second + 1 - first - 2 * BLOCK - 100).await.expect("prefetch");
    let after = localities(&*space, first, end).await;
    let expected = [(first, 2, false), (first + 2 * BLOCK, 5, true), (second + BLOCK, 3, false)];
    assert_eq!(after, expected.map(|(start, blocks, local)| (start, blocks * BLOCK, local)));
    let part = space.locality(first + BLOCK + 10, BLOCK, 9).await.expect("locality");
    let part: Vec<_> = part.iter().map(|run| (run.offset, run.length, run.local)).collect();
    assert_eq!(part[0], (first + BLOCK + 10, BLOCK - 10, false));
    space.prefetch(0, 1 << 30).await.expect("all of it, holes and all");
    assert_eq!(localities(&*space, 0, 1 << 30).await, [(0, 1 << 30, true)]);
    assert!(space.prefetch(0, 0).is_ready());

    let prefix = Arc::new(MemoryDevice::new(1 << 20));
    let device = VirtualDevice::new(prefix, space);
    assert!(device.capabilities().lazy);
    assert_eq!(localities(&device, 0, VIRTUAL_BASE + end).await, [(0, VIRTUAL_BASE + end, true)]);
    device.prefetch(0, device.geometry().size).await.expect("prefetch");
}

#[tokio::test]
async fn a_prefetch_passes_through_the_virtual_device() {
    let fixture = Fixture::new(1 << 30);
    fixture.add(b"l", &[4]);
    let start = fixture.map.ranges().next().expect("a range").start.0;
    let space = Arc::new(AddressSpace::new(fixture.map.clone(), fixture.resolver.clone(), Unmapped::Error));
    let device = VirtualDevice::new(Arc::new(MemoryDevice::new(1 << 20)), space);
    device.prefetch(VIRTUAL_BASE - 4096, 4096 + start + 2 * BLOCK).await.expect("across the base");
    let from = VIRTUAL_BASE - 4096;
    let runs = localities(&device, from, VIRTUAL_BASE + start + 4 * BLOCK).await;
    let local = 4096 + start + 2 * BLOCK;
    assert_eq!(runs, [(from, local, true), (from + local, 2 * BLOCK, false)]);
    fixture.resolver.failures_left.store(u64::MAX, Ordering::SeqCst);
    let fresh = AddressSpace::new(fixture.map.clone(), fixture.resolver.clone(), Unmapped::Error);
    assert_eq!(localities(&fresh, start, start + BLOCK).await, [(start, BLOCK, false)], "as far as is known");
    let error = fresh.prefetch(start, BLOCK).await.expect_err("it cannot be reached");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

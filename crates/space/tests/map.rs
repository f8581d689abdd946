//! The map on a real file system: what it promises to callers.

use loam_space::{Address, Allocation, BLOCK, ContentId, Error, Map, Place, Range};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

#[test]
fn what_was_added_is_there_after_reopening() {
    let directory = directory();
    let map = Map::create(directory.path().join("map"), 1 << 40).expect("create");
    let content = map.add_content(b"first").expect("content");
    let first = map.allocate(content, 12288, BLOCK).expect("range");
    let aligned = map.allocate(content, BLOCK, 1 << 20).expect("range");
    assert_eq!((first.start, first.length), (Address(0), 12288));
    assert_eq!(aligned.start, Address(1 << 20));
    assert_eq!(map.locate(Address(12288)), Place::Unmapped { until: Address(1 << 20) });
    drop(map);
    for compact in [false, true, false] {
        let map = Map::open(directory.path().join("map")).expect("open");
        assert_eq!(map.ranges().collect::<Vec<_>>(), [first, aligned]);
        assert_eq!(map.lookup(Address(8191)), Some(first));
        assert_eq!(map.contents(), [(content, b"first".to_vec())]);
        assert_eq!(map.stats().mapped_bytes, 16384);
        if compact {
            map.compact().expect("compact");
            assert_eq!(map.lookup(Address(8191)), Some(first));
        }
    }
}

#[test]
fn a_second_opener_is_told_that_the_map_is_in_use() {
    let directory = directory();
    let map = Map::create(directory.path(), 1 << 30).expect("create");
    assert!(matches!(Map::open(directory.path()), Err(Error::Locked { .. })));
    drop(map);
    Map::open(directory.path()).expect("free again");
    assert!(matches!(Map::create(directory.path(), 1 << 30), Err(Error::Exists { .. })));
    assert!(matches!(Map::open(directory.path().join("none")), Err(Error::Missing { .. })));
}

#[test]
fn a_full_space_says_how_much_is_left_and_stays_usable() {
    let directory = directory();
    let map = Map::create(directory.path(), 16 * BLOCK).expect("create");
    let content = map.add_content(b"").expect("content");
    map.allocate(content, 13 * BLOCK, BLOCK).expect("fits");
    match map.allocate(content, 4 * BLOCK, BLOCK) {
        Err(Error::Full { requested, free, size }) => {
            assert_eq!((requested, free, size), (4 * BLOCK, 3 * BLOCK, 16 * BLOCK));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(map.allocate(content, BLOCK, 16 * BLOCK), Err(Error::Full { .. })));
    assert!(matches!(map.reserve(u64::MAX / BLOCK * BLOCK, BLOCK), Err(Error::Full { .. })));
    map.allocate(content, 3 * BLOCK, BLOCK).expect("the last blocks");
    assert!(matches!(map.reserve(BLOCK, BLOCK), Err(Error::Full { .. })));
}

#[test]
fn ranges_never_overlap_and_never_change() {
    let directory = directory();
    let map = Map::create(directory.path(), 1 << 30).expect("create");
    let content = map.add_content(b"x").expect("content");
    let reserved = map.reserve(8 * BLOCK, BLOCK).expect("reserved");
    let after = map.allocate(content, BLOCK, BLOCK).expect("behind what is reserved");
    assert_eq!(after.start.0, reserved.0 + 8 * BLOCK);
    let range = |block: u64, blocks: u64| Range {
        start: Address(reserved.0 + block * BLOCK),
        length: blocks * BLOCK,
        content,
        content_offset: block * BLOCK,
    };
    map.add_ranges(&[range(6, 1), range(1, 2)]).expect("two of the reserved");
    for overlapping in [range(0, 2), range(2, 1), range(1, 2), range(0, 8), range(5, 3), range(8, 1)] {
        let refused = map.add_ranges(&[range(4, 1), overlapping]);
        assert!(matches!(refused, Err(Error::Overlap { .. })), "{overlapping:?}");
    }
    assert!(matches!(map.add_ranges(&[range(3, 2), range(4, 1)]), Err(Error::Overlap { .. })));
    assert_eq!(map.ranges().collect::<Vec<_>>(), [range(1, 2), range(6, 1), after]);
}

#[test]
fn impossible_requests_are_refused() {
    let directory = directory();
    for size in [0, 1, 4095, 1 << 63, u64::MAX] {
        assert!(matches!(Map::create(directory.path(), size), Err(Error::Invalid { .. })), "{size}");
    }
    let map = Map::create(directory.path(), 1 << 30).expect("create");
    let content = map.add_content(b"x").expect("content");
    for (length, alignment) in [(0, BLOCK), (1, BLOCK), (BLOCK, 0), (BLOCK, 512), (BLOCK, 3 * BLOCK)] {
        assert!(matches!(map.allocate(content, length, alignment), Err(Error::Invalid { .. })));
    }
    let unknown = map.allocate(ContentId(1), BLOCK, BLOCK);
    assert!(matches!(unknown, Err(Error::UnknownContent(ContentId(1)))));
    let content_offset = u64::MAX - BLOCK + 1;
    let request = Allocation { content, content_offset, length: BLOCK, alignment: BLOCK };
    assert!(matches!(map.allocate_batch(&[request]), Err(Error::Invalid { .. })));
    assert!(matches!(map.add_content(&vec![0; 65537]), Err(Error::Invalid { .. })));
    assert_eq!(map.ranges().count(), 0);
}

#[test]
fn a_log_that_grows_is_compacted_by_itself() {
    let directory = directory();
    let map = Map::create(directory.path(), 1 << 50).expect("create");
    let content = map.add_content(b"x").expect("content");
    let request = Allocation { content, content_offset: 0, length: BLOCK, alignment: 2 * BLOCK };
    for _ in 0..3 {
        map.allocate_batch(&[request; 40_000]).expect("batch");
    }
    let names = || {
        let entries = std::fs::read_dir(directory.path()).expect("directory");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["log", "table-0000000000000003"]);
    for i in [0, 1, 15, 16, 17, 255, 256, 4095, 4096, 119_998, 119_999] {
        let range = map.lookup(Address(i * 2 * BLOCK + 5)).expect("mapped");
        assert_eq!(range.start, Address(i * 2 * BLOCK));
        let gap = map.locate(Address((i * 2 + 1) * BLOCK));
        let until = if i == 119_999 { 1 << 50 } else { (i + 1) * 2 * BLOCK };
        assert_eq!(gap, Place::Unmapped { until: Address(until) });
    }
    drop(map);
    let map = Map::open(directory.path()).expect("open");
    assert_eq!(map.stats().ranges, 120_000);
    assert_eq!(map.allocate(content, BLOCK, BLOCK).expect("range").start, Address(239_999 * BLOCK));
}

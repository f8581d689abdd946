//! Files that are not what loam wrote: every wrong byte is found or does no harm, and nothing makes the map panic.

mod common;

use common::Sim;
use loam_sim::SimDisk;
use loam_space::{Address, Allocation, BLOCK, ContentId, Error, Map, MapStats, Range};
use proptest::prelude::*;

type Truth = (Vec<Range>, Vec<(ContentId, Vec<u8>)>, MapStats);

const TABLE: &str = "table-0000000000000001";

fn truth(map: &Map<Sim>) -> Truth {
    (map.ranges().collect(), map.contents(), map.stats())
}

/// A disk with a map that has a table and a log, at rest.
fn disk_at_rest() -> (SimDisk, Truth) {
    let disk = SimDisk::new();
    let map = Map::create_in(Sim(disk.clone()), 1 << 40).expect("create");
    for round in 0..2u8 {
        for name in [b"alpha", b"gamma"] {
            let content = map.add_content(&[&name[..], &[round]].concat()).expect("content");
            map.allocate(content, 3 * BLOCK, 16 * BLOCK).expect("range");
            let request = Allocation { content, content_offset: BLOCK, length: BLOCK, alignment: BLOCK };
            map.allocate_batch(&[request; 3]).expect("ranges");
        }
        map.reserve(5 * BLOCK, BLOCK).expect("reserved");
        if round == 0 {
            map.compact().expect("compact");
        }
    }
    let truth = truth(&map);
    drop(map);
    (disk, truth)
}

fn file(disk: &SimDisk, name: &str) -> Vec<u8> {
    disk.open(name).and_then(|file| file.read_all()).expect(name)
}

/// A disk whose files are these.
fn disk_of(files: &[(&str, &[u8])]) -> SimDisk {
    let disk = SimDisk::new();
    for (name, bytes) in files {
        disk.create(name).and_then(|file| file.write_at(0, bytes)).expect("file");
    }
    disk
}

#[test]
fn a_wrong_byte_anywhere_is_found_or_does_no_harm() {
    let (disk, truth_before) = disk_at_rest();
    let (mut found, mut harmless) = (0, 0);
    for name in ["log", TABLE] {
        for offset in 0..file(&disk, name).len() {
            for mask in [0x01, 0x80, 0xff] {
                disk.corrupt(name, offset, mask);
                match Map::open_in(Sim(disk.power_cycle(1))) {
                    Err(Error::Corrupt { .. } | Error::NewerFormat { .. }) => found += 1,
                    Err(error) => panic!("{name} byte {offset}: {error}"),
                    Ok(map) => {
                        harmless += 1;
                        assert_eq!(truth(&map), truth_before, "{name} byte {offset} mask {mask:#x}");
                    }
                }
                disk.corrupt(name, offset, mask);
            }
        }
    }
    // Only the mark at the log's end says nothing that anyone needs, and padding.
    assert!(found > 1000 && harmless < 32 * 3 + 8 * 3 * 8, "{found} found, {harmless} harmless");
}

#[test]
fn the_error_names_the_place() {
    let (disk, _) = disk_at_rest();
    disk.corrupt("log", 48 + 40, 1);
    match Map::open_in(Sim(disk.clone())) {
        Err(Error::Corrupt { path, offset: 48, what }) => {
            assert!(path.ends_with("log") && what.contains("followed"), "{what}");
        }
        other => panic!("{other:?}"),
    }
    disk.corrupt("log", 48 + 40, 1);
    disk.remove(TABLE).expect("remove");
    let error = Map::open_in(Sim(disk)).expect_err("no table");
    assert!(error.to_string().contains(TABLE), "{error}");
}

#[test]
fn a_log_cut_anywhere_gives_a_prefix() {
    let (disk, (ranges, contents, _)) = disk_at_rest();
    let (log, table) = (file(&disk, "log"), file(&disk, TABLE));
    for length in 0..log.len() {
        let cut = disk_of(&[("log", &log[..length]), (TABLE, &table)]);
        match Map::open_in(Sim(cut.clone())) {
            Err(Error::Corrupt { offset: 0, .. }) => assert!(length < 48),
            Err(error) => panic!("{length}: {error}"),
            Ok(map) => {
                assert!(map.ranges().all(|range| ranges.contains(&range)), "{length}");
                assert!(contents.starts_with(&map.contents()), "{length}");
                map.add_content(b"the log can be added to").expect("content");
                drop(map);
                Map::open_in(Sim(cut)).expect("and opened again");
            }
        }
    }
}

#[test]
fn a_newer_format_is_named() {
    let (disk, _) = disk_at_rest();
    for name in ["log", TABLE] {
        disk.corrupt(name, 8, 0x02);
        match Map::open_in(Sim(disk.clone())) {
            Err(Error::NewerFormat { path, found: 3, known: 1 }) => assert!(path.ends_with(name)),
            other => panic!("{other:?}"),
        }
        disk.corrupt(name, 8, 0x02);
    }
}

#[test]
fn another_maps_table_is_refused() {
    let (disk, _) = disk_at_rest();
    let other = SimDisk::new();
    let map = Map::create_in(Sim(other.clone()), 1 << 40).expect("create");
    map.add_content(b"other").expect("content");
    map.compact().expect("compact");
    let mixed = disk_of(&[("log", &file(&disk, "log")), (TABLE, &file(&other, TABLE))]);
    assert!(matches!(Map::open_in(Sim(mixed)), Err(Error::Corrupt { .. })));
}

#[test]
fn an_absurdly_long_log_is_not_read() {
    let disk = SimDisk::new();
    let log = disk.create("log").expect("create");
    log.set_length((128 << 20) + 1).expect("length");
    assert!(matches!(Map::open_in(Sim(disk)), Err(Error::Corrupt { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Checksums are no defence against someone who computes them, so they are made right again here.
    #[test]
    fn hostile_files_with_right_checksums_do_not_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0usize..9), 1..6),
        in_table in any::<bool>(),
    ) {
        let (disk, _) = disk_at_rest();
        let (mut log, mut table) = (file(&disk, "log"), file(&disk, TABLE));
        let target = if in_table { &mut table } else { &mut log };
        for (place, value, width) in changes {
            let at = place.index(target.len());
            let end = target.len().min(at + width);
            target[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        mend_table(&mut table);
        mend_log(&mut log, u32::from_le_bytes(table[76..80].try_into().expect("4 bytes")));
        let disk = disk_of(&[("log", &log), (TABLE, &table)]);
        if let Ok(map) = Map::open_in(Sim(disk)) {
            let stats = map.stats();
            let mut end = Address(0);
            for range in map.ranges() {
                prop_assert!(end <= range.start && range.end().0 <= stats.size);
                prop_assert!(u64::from(range.content.0) < stats.contents);
                end = range.end();
            }
            prop_assert!(end <= stats.high_water);
            map.contents();
        }
    }

    #[test]
    fn random_bytes_do_not_panic(log in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Map::open_in(Sim(disk_of(&[("log", &log)]))).is_err());
    }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn mend_table(table: &mut [u8]) {
    let body = crc32c::crc32c(&table[4096..]);
    put(table, 72, body);
    let header = crc32c::crc32c(&table[..76]);
    put(table, 76, header);
}

fn mend_log(log: &mut [u8], table_crc: u32) {
    put(log, 40, table_crc);
    let mut previous = crc32c::crc32c(&log[..44]);
    put(log, 44, previous);
    let mut at = 48;
    while at + 32 <= log.len() {
        let length = get(log, at) as usize;
        let Some(payload) = log.get(at + 32..).and_then(|rest| rest.get(..length)) else { return };
        let payload_crc = crc32c::crc32c(payload);
        put(log, at + 20, previous);
        put(log, at + 24, payload_crc);
        previous = crc32c::crc32c(&log[at..at + 28]);
        put(log, at + 28, previous);
        at += (32 + length).next_multiple_of(8);
    }
}

//! What an inspection shows.

mod common;

use common::full_pair;
use loam_seed::{Image, Layout, Record, TreeFilter, inspect};

fn dump(images: &[(&'static str, &dyn loam_seed::ReadAt)], filter: TreeFilter) -> Vec<Record> {
    let mut records = Vec::new();
    inspect(images, filter, &mut |record| {
        records.push(record.clone());
        Ok(())
    })
    .expect("readable");
    records
}

#[test]
fn every_tree_and_item_is_shown() {
    let pair = full_pair(Layout::Pair);
    let local = pair.local.as_ref().expect("a pair");
    let records = dump(&[("virtual", &pair.virtual_image), ("local", local)], TreeFilter::All);
    let text: Vec<String> = records.iter().map(ToString::to_string).collect();
    let has = |part: &str| text.iter().any(|line| line.contains(part));
    assert_eq!(records.iter().filter(|record| matches!(record, Record::Superblock { .. })).count(), 2);
    assert_eq!(records.iter().filter(|record| matches!(record, Record::Tree { .. })).count(), 12);
    for part in [
        "magic \"_BHRfS_M\"",
        "tree 3 (chunk)",
        "tree 256 (subvolume)",
        "item 0 (256 inode 0) inode { generation 1",
        "name \".virtual-data\"",
        "(257 extent_data 0) extent { generation 1",
        "data \"content\"",
        "name \"user.qmeo5att\" data \"one\"",
        "status { version 1",
    ] {
        assert!(has(part), "{part}");
    }
    assert!(!text.iter().any(|line| line.contains("FAULT")));
    let one = dump(&[("local", local)], "extent".parse().expect("a name"));
    let trees: Vec<&Record> = one.iter().filter(|record| matches!(record, Record::Tree { .. })).collect();
    assert!(matches!(trees[..], [Record::Tree { id: 2, name: Some("extent"), .. }]));
    let json = serde_json::to_string(&one[1]).expect("serialisable");
    assert!(json.starts_with("{\"record\":\"tree\",\"id\":2,\"name\":\"extent\""), "{json}");
}

#[test]
fn damage_is_shown_in_place_and_a_seed_alone_has_only_a_superblock() {
    let mut pair = full_pair(Layout::Pair);
    let seed = dump(&[("virtual", &pair.virtual_image)], TreeFilter::All);
    assert!(matches!(&seed[0], Record::Superblock { .. }));
    assert!(seed.iter().any(|record| record.to_string().contains("none of the chunk's devices was given")));
    pair.trees().write_at((65 << 20) + 3000, &[0x55]).expect("write");
    let local = pair.local.as_ref().expect("a pair");
    let damaged = dump(&[("local", local)], TreeFilter::One(5));
    assert!(damaged.iter().any(|record| record.to_string().contains("FAULT in block 68157440")));
    assert!("no-such-tree".parse::<TreeFilter>().is_err());
}

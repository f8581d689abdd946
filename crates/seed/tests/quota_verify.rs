//! Quotas of images that no kernel has touched: right ones, wrong ones by a known number of bytes, and hostile ones.

mod common;

use common::{Pair, full_pair};
use loam_seed::disk::{DiskKey, HEADER_SIZE, Item, Key, item, object};
use loam_seed::quota::{
    Cause, ExplainOptions, GroupId, Kind, LIVE_ATTEMPTS, LiveError, Mode, Report, explain, verify, when_still,
};
use loam_seed::reader::{Device, Filesystem, Walk};
use loam_seed::{Image, Layout, MemoryImage, ReadAt, SeedOptions};
use proptest::prelude::*;
use zerocopy::FromBytes;

const NODE_SIZE: usize = 4096;
/// That of the images of `common`.
const VIRTUAL_SIZE: u64 = 300 << 40;

fn devices(pair: &Pair) -> Vec<Device<'_>> {
    // The wrong way round for the reader: the order must not matter.
    let mut devices: Vec<Device<'_>> =
        pair.local.iter().map(|image| Device { name: "local", image }).collect();
    devices.push(Device { name: "virtual", image: &pair.virtual_image });
    devices
}

fn check(pair: &Pair) -> Report {
    verify(&devices(pair)).expect("readable")
}

/// Where the blocks of a tree lie on the image that carries the trees, and how many there are.
fn blocks(pair: &Pair, tree: u64) -> Vec<u64> {
    let mut devices = devices(pair);
    devices.reverse();
    let filesystem = Filesystem::open(&devices).expect("a filesystem");
    let root = filesystem.root(tree).expect("a tree");
    let mut walk = Walk::new(&filesystem, root);
    let mut found = Vec::new();
    while let Some(visited) = walk.next() {
        let chunk = filesystem.chunks().find(visited.bytenr).expect("a chunk");
        found.push(chunk.stripes[0].physical + (visited.bytenr - chunk.logical));
    }
    found
}

/// Changes one 64-bit word of an item of the quota tree, and makes the block's checksum right again.
fn patch(pair: &mut Pair, key: Key, word: usize, value: u64) {
    let place = blocks(pair, object::QUOTA_TREE)[0];
    let image = pair.trees();
    let mut block = vec![0; NODE_SIZE];
    image.read_at(place, &mut block).expect("read");
    let count = u32::from_le_bytes(block[96..100].try_into().expect("four bytes")) as usize;
    let heads = (0..count).map(|slot| {
        Item::read_from_prefix(&block[HEADER_SIZE + slot * size_of::<Item>()..]).expect("an item").0
    });
    let head = heads.into_iter().find(|head| Key::from(head.key) == key).expect("the item");
    let at = HEADER_SIZE + head.offset.get() as usize + word * 8;
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let crc = crc32c::crc32c(&block[32..]);
    block[..4].copy_from_slice(&crc.to_le_bytes());
    image.write_at(place, &block).expect("write");
}

fn status() -> Key {
    Key::new(0, item::QGROUP_STATUS, 0)
}

fn info(group: u64) -> Key {
    Key::new(0, item::QGROUP_INFO, group)
}

/// As if the quotas had been on when the image was written: every tree block of a subvolume must be charged, and to the
/// top level all virtual data too. Returns how much.
fn enabled_before(pair: &mut Pair) -> Vec<(u64, u64)> {
    patch(pair, status(), 4, 0);
    let subvolumes = [object::FS_TREE, 256, 257];
    let data = |id| if id == object::FS_TREE { VIRTUAL_SIZE } else { 0 };
    subvolumes.map(|id| (id, (blocks(pair, id).len() * NODE_SIZE) as u64 + data(id))).to_vec()
}

#[test]
fn a_right_image_is_silent() {
    for layout in [Layout::Pair, Layout::Single] {
        let report = check(&full_pair(layout));
        assert!(report.verified && report.is_clean(), "{:?}", report.findings);
        assert_eq!((report.mode, report.groups.len()), (Mode::Simple, 3));
        assert!(report.groups.iter().all(|group| group.expected_bytes == 0 && !group.subvolume_gone));
        assert!(report.counts.older_bytes >= VIRTUAL_SIZE, "all virtual data is older than the quotas");
        assert_eq!(report.enable_generation, Some(report.generation + 1));
    }
}

#[test]
fn without_quotas_nothing_is_verified() {
    let pair = common::format(&SeedOptions { simple_quota: false, ..common::small_options() }, &[]);
    let report = check(&pair.expect("formatted"));
    assert_eq!((report.mode, report.verified), (Mode::Off, false));
    assert!(report.is_clean() && report.groups.is_empty());
}

#[test]
fn full_qgroups_are_named_and_not_verified() {
    let mut pair = full_pair(Layout::Pair);
    patch(&mut pair, status(), 2, 1);
    let report = check(&pair);
    assert_eq!((report.mode, report.verified, report.enable_generation), (Mode::Full, false, None));
}

#[test]
fn charges_are_exact_to_the_block() {
    let mut pair = full_pair(Layout::Pair);
    let expected = enabled_before(&mut pair);
    let report = check(&pair);
    assert_eq!(report.findings.len(), 3, "{:?}", report.findings);
    for ((id, bytes), finding) in expected.iter().zip(&report.findings) {
        assert_eq!(finding.group, Some(GroupId::from_raw(*id)));
        assert_eq!(finding.kind, Kind::WrongCharge);
        assert_eq!((finding.expected_bytes, finding.found_bytes), (Some(*bytes), Some(0)));
        assert_eq!(finding.difference_bytes, Some(-(*bytes as i64)));
    }
    for &(id, bytes) in &expected {
        patch(&mut pair, info(id), 1, bytes);
        patch(&mut pair, info(id), 3, bytes);
    }
    let report = check(&pair);
    assert!(report.is_clean(), "{:?}", report.findings);
    let bytes = report.counts.tree_blocks * NODE_SIZE as u64 + VIRTUAL_SIZE;
    assert_eq!(bytes, expected.iter().map(|(_, bytes)| bytes).sum::<u64>());
    let (id, bytes) = expected[1];
    patch(&mut pair, info(id), 1, bytes + 1);
    let report = check(&pair);
    let found: Vec<_> =
        report.findings.iter().map(|finding| (finding.kind, finding.difference_bytes)).collect();
    assert_eq!(found, [(Kind::WrongCharge, Some(1)), (Kind::WrongExclusive, Some(-1))]);
}

#[test]
fn a_count_below_zero_is_told_as_such() {
    let mut pair = full_pair(Layout::Pair);
    for word in [1, 3] {
        patch(&mut pair, info(257), word, 4096u64.wrapping_neg());
    }
    let report = check(&pair);
    let [finding] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
    assert_eq!((finding.difference_bytes, finding.cause), (Some(-4096), Some(Cause::Underflow)));
    assert!(finding.to_string().contains("below zero"), "{finding}");
}

#[test]
fn tree_blocks_of_the_enabling_transaction_are_recognised() {
    let mut pair = full_pair(Layout::Pair);
    let generation = check(&pair).generation;
    patch(&mut pair, status(), 4, generation);
    let report = check(&pair);
    assert!(!report.is_clean());
    let containers = report.findings.iter().filter(|finding| finding.group != Some(GroupId::from_raw(5)));
    let causes: Vec<_> = containers.map(|finding| finding.cause).collect();
    assert_eq!(causes, [Some(Cause::EnablingTransaction); 2]);
}

#[test]
fn a_subvolume_without_a_group_is_found() {
    let mut pair = full_pair(Layout::Pair);
    // Another number in the keys of its two items: the group is then one of nobody.
    let place = blocks(&pair, object::QUOTA_TREE)[0];
    let mut block = vec![0; NODE_SIZE];
    pair.trees().read_at(place, &mut block).expect("read");
    let count = u32::from_le_bytes(block[96..100].try_into().expect("four bytes")) as usize;
    for slot in 0..count {
        let at = HEADER_SIZE + slot * size_of::<Item>();
        let key: Key = DiskKey::read_from_prefix(&block[at..]).expect("a key").0.into();
        if key.offset == 257 {
            block[at + 9..at + 17].copy_from_slice(&258u64.to_le_bytes());
        }
    }
    let crc = crc32c::crc32c(&block[32..]);
    block[..4].copy_from_slice(&crc.to_le_bytes());
    pair.trees().write_at(place, &block).expect("write");
    let report = check(&pair);
    let [finding] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
    assert_eq!((finding.kind, finding.group), (Kind::MissingGroup, Some(GroupId::from_raw(257))));
    assert_eq!(report.notes.len(), 1, "{:?}", report.notes);
}

#[test]
fn an_explanation_of_metadata_alone() {
    let mut pair = full_pair(Layout::Pair);
    let expected = enabled_before(&mut pair);
    let group = GroupId::from_raw(expected[1].0);
    let explanation = explain(&devices(&pair), group, &ExplainOptions::default()).expect("explained");
    assert_eq!((explanation.charged_bytes, explanation.data_bytes), (expected[1].1, 0));
    assert_eq!(explanation.subvolumes[&group.raw()].as_deref(), Some("one"));
    assert_eq!(explanation.metadata_kept_by_others_bytes, 0);
    assert!(explanation.advice[0].contains("tree blocks"), "{:?}", explanation.advice);
    let none = explain(&devices(&pair), GroupId::from_raw(999), &ExplainOptions::default());
    assert!(none.unwrap_err().to_string().contains("0/999"));
}

#[test]
fn a_filesystem_that_moves_is_given_up() {
    let pair = full_pair(Layout::Pair);
    let devices = devices(&pair);
    let looked = when_still(&devices, &mut || Ok(()), &mut || verify(&devices)).expect("still");
    assert!(looked.is_clean());
    let failing = when_still(&devices, &mut || Err(std::io::Error::other("no")), &mut || verify(&devices));
    assert!(matches!(failing, Err(LiveError::Refresh(_))));

    let moving = Moving { pair: full_pair(Layout::Single), reads: std::sync::atomic::AtomicU64::new(0) };
    let devices = [Device { name: "moving", image: &moving }];
    let mut looks = 0;
    let result = when_still(&devices, &mut || Ok(()), &mut || {
        looks += 1;
        Ok(())
    });
    assert!(matches!(result, Err(LiveError::Moving { .. })), "{result:?}");
    assert_eq!(looks, LIVE_ATTEMPTS);
}

/// A device whose superblock has another generation at each look.
struct Moving {
    pair: Pair,
    reads: std::sync::atomic::AtomicU64,
}

impl ReadAt for Moving {
    fn length(&self) -> std::io::Result<u64> {
        self.pair.virtual_image.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.pair.virtual_image.read_at(offset, buffer)?;
        if offset == 64 << 10 {
            let reads = self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            buffer[72..80].copy_from_slice(&(1000 + reads).to_le_bytes());
            let crc = crc32c::crc32c(&buffer[32..]);
            buffer[..4].copy_from_slice(&crc.to_le_bytes());
        }
        Ok(())
    }
}

/// Everything that reads quotas.
fn read_all(pair: &Pair) {
    let devices = devices(pair);
    let mut groups = vec![GroupId::from_raw(5), GroupId::from_raw(256)];
    if let Ok(report) = verify(&devices) {
        groups.extend(report.groups.iter().map(|group| group.group).take(8));
        for finding in &report.findings {
            let _ = finding.to_string();
        }
    }
    for group in groups {
        let _ = explain(&devices, group, &ExplainOptions { extents: 3 });
    }
}

fn reseal(image: &mut MemoryImage) {
    let pages: Vec<(u64, Vec<u8>)> = image.pages().map(|(offset, page)| (offset, page.to_vec())).collect();
    for (offset, mut page) in pages {
        if offset >= 1 << 20 || loam_seed::disk::SUPER_OFFSETS.contains(&offset) {
            let crc = crc32c::crc32c(&page[32..]);
            page[..4].copy_from_slice(&crc.to_le_bytes());
            image.write_at(offset, &page).expect("write");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_flipped_bit_of_the_quota_tree_is_found(bit in 0usize..NODE_SIZE * 8) {
        let mut pair = full_pair(Layout::Pair);
        for (id, bytes) in enabled_before(&mut pair) {
            patch(&mut pair, info(id), 1, bytes);
            patch(&mut pair, info(id), 3, bytes);
        }
        prop_assert!(check(&pair).is_clean());
        let place = blocks(&pair, object::QUOTA_TREE)[0] + bit as u64 / 8;
        let mut byte = [0];
        pair.trees().read_at(place, &mut byte).expect("read");
        byte[0] ^= 1 << (bit % 8);
        pair.trees().write_at(place, &byte).expect("write");
        prop_assert!(!check(&pair).is_clean());
        read_all(&pair);
    }

    #[test]
    fn mutations_never_panic(
        layout in prop_oneof![Just(Layout::Pair), Just(Layout::Single)],
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..4096, prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(0), Just(65 << 20)]
                .prop_map(|word| word.to_le_bytes().to_vec()),
        ]), 1..6),
        quota_words in proptest::collection::vec((0usize..NODE_SIZE - 8, any::<u64>()), 0..4),
        sealed in any::<bool>(),
    ) {
        let mut pair = full_pair(layout);
        enabled_before(&mut pair);
        let quota = blocks(&pair, object::QUOTA_TREE)[0];
        let pages: Vec<u64> = pair.trees().pages().map(|(offset, _)| offset).collect();
        for (page, byte, value) in changes {
            let byte = byte.min(4096 - value.len());
            let page = pages[page.index(pages.len())];
            pair.trees().write_at(page + byte as u64, &value).expect("write");
        }
        for (byte, word) in quota_words {
            pair.trees().write_at(quota + byte as u64, &word.to_le_bytes()).expect("write");
        }
        if sealed {
            reseal(pair.trees());
        }
        read_all(&pair);
    }
}

//! Images that somebody made up: whatever the bytes, there is an answer, soon, and no panic.

mod common;

use common::{Pair, full_pair};
use loam_seed::disk::SUPER_OFFSETS;
use loam_seed::{
    Image, Layout, MemoryImage, ReadAt, TreeFilter, inspect, read_label, read_virtual_superblock, verify,
};
use proptest::prelude::*;

/// Reads an image in every way there is.
fn read_all(pair: &Pair) {
    let _ = verify(&pair.virtual_image, pair.local.as_ref().map(|local| local as _));
    let _ = verify(&pair.virtual_image, None);
    let mut images: Vec<(&'static str, &dyn ReadAt)> = vec![("virtual", &pair.virtual_image)];
    if let Some(local) = &pair.local {
        let _ = read_label(local);
        images.push(("local", local));
    }
    let mut lines = 0;
    let _ = inspect(&images, TreeFilter::All, &mut |record| {
        lines += record.to_string().len();
        Ok(())
    });
    let _ = read_virtual_superblock(&pair.virtual_image);
}

/// Makes the checksums of all blocks and superblocks right, so that what lies behind them is reached.
fn reseal(image: &mut MemoryImage) {
    let pages: Vec<(u64, Vec<u8>)> = image.pages().map(|(offset, page)| (offset, page.to_vec())).collect();
    for (offset, mut page) in pages {
        if offset >= 1 << 20 || SUPER_OFFSETS.contains(&offset) {
            let crc = crc32c::crc32c(&page[32..]);
            page[..4].copy_from_slice(&crc.to_le_bytes());
            image.write_at(offset, &page).expect("write");
        }
    }
}

#[test]
fn images_cut_off_anywhere_are_errors() {
    let pair = full_pair(Layout::Pair);
    let local = pair.local.as_ref().expect("a pair");
    for length in [0, 1, 4096, 8192, 65_535, 65_536, 69_631, 69_632, 1 << 20, (65 << 20) + 100, 66 << 20] {
        let mut cut = MemoryImage::new();
        cut.set_length(length).expect("resize");
        for (offset, page) in local.pages().filter(|(offset, _)| offset + 4096 <= length) {
            cut.write_at(offset, page).expect("write");
        }
        if let Ok(verification) = verify(&pair.virtual_image, Some(&cut)) {
            assert!(!verification.is_clean(), "cut at {length}");
        }
        let pair = Pair { virtual_image: pair.virtual_image.clone(), local: Some(cut) };
        read_all(&pair);
    }
}

#[test]
fn a_tree_that_contains_itself_ends() {
    let mut pair = full_pair(Layout::Pair);
    let pages: Vec<u64> =
        pair.trees().pages().map(|(offset, _)| offset).filter(|page| *page >= 65 << 20).collect();
    let mut found = 0;
    for page in pages {
        let mut block = vec![0; 4096];
        pair.trees().read_at(page, &mut block).expect("read");
        if block[100] == 0 {
            continue;
        }
        found += 1;
        let original = block.clone();
        let count = u32::from_le_bytes(block[96..100].try_into().expect("four bytes")) as usize;
        // All children of every inner node are the node itself, first as a level above, then as one below.
        for level in [block[100], 0, 7, 255] {
            block[100] = level;
            for slot in 0..count {
                block[101 + slot * 33 + 17..][..8].copy_from_slice(&page.to_le_bytes());
            }
            let crc = crc32c::crc32c(&block[32..]);
            block[..4].copy_from_slice(&crc.to_le_bytes());
            pair.trees().write_at(page, &block).expect("write");
            read_all(&pair);
        }
        pair.trees().write_at(page, &original).expect("write");
    }
    assert!(found > 2, "{found}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_is_no_file_system(bytes in proptest::collection::vec(any::<u8>(), 0..5000), at in 0u64..70_000) {
        let mut image = MemoryImage::new();
        image.set_length(1 << 27).expect("resize");
        image.write_at(at, &bytes).expect("write");
        let pair = Pair { virtual_image: image.clone(), local: Some(image) };
        read_all(&pair);
    }

    #[test]
    fn mutations_never_panic(
        layout in prop_oneof![Just(Layout::Pair), Just(Layout::Single)],
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..4096, prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<u32>().prop_map(|word| word.to_le_bytes().to_vec()),
            prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(0), Just(65 << 20)]
                .prop_map(|word| word.to_le_bytes().to_vec()),
        ]), 1..6),
        sealed in any::<bool>(),
    ) {
        let mut pair = full_pair(layout);
        let pages: Vec<u64> = pair.trees().pages().map(|(offset, _)| offset).collect();
        for (page, byte, value) in changes {
            let byte = byte.min(4096 - value.len());
            let page = pages[page.index(pages.len())];
            pair.trees().write_at(page + byte as u64, &value).expect("write");
        }
        if sealed {
            reseal(pair.trees());
        }
        read_all(&pair);
    }

    #[test]
    fn heads_of_items_may_be_anything(
        page in any::<prop::sample::Index>(),
        words in proptest::collection::vec(any::<u8>(), 25..200),
    ) {
        let mut pair = full_pair(Layout::Pair);
        let pages: Vec<u64> =
            pair.trees().pages().map(|(offset, _)| offset).filter(|page| *page >= 1 << 20).collect();
        let page = pages[page.index(pages.len())];
        pair.trees().write_at(page + 96, &words).expect("write");
        reseal(pair.trees());
        read_all(&pair);
    }
}

//! Trees of any shape: what is written verifies, and the same input gives the same bytes.

mod common;

use common::{attributes, everything, format, show, small_options};
use loam_seed::{
    Attributes, Error, FileTree, Layout, MemoryTree, OwnedKind, Run, SeedOptions, Subvolume, Timestamp,
    inline_max, read_label, virtual_superblock,
};
use proptest::prelude::*;

const SECTOR: u64 = 4096;

fn refused(tree: &MemoryTree) -> String {
    let subvolume = Subvolume { name: "x", tree, readonly: false };
    match format(&small_options(), &[subvolume]) {
        Err(error @ Error::Node { .. }) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("not refused"),
    }
}

fn with(kind: OwnedKind, name: &str) -> MemoryTree {
    let mut tree = MemoryTree::new(attributes(0o755));
    tree.add(0, name, kind, attributes(0o644));
    tree
}

#[test]
fn trees_that_break_a_rule_are_refused_by_name() {
    let file = |size, file_offset, address, length| {
        with(OwnedKind::File { size, runs: vec![Run { file_offset, address, length }] }, "f")
    };
    for (tree, part) in [
        (with(OwnedKind::Directory, ""), "1 to 255 bytes"),
        (with(OwnedKind::Directory, &"x".repeat(256)), "1 to 255 bytes"),
        (with(OwnedKind::Directory, ".."), "may not be"),
        (with(OwnedKind::Directory, "a/b"), "may not be"),
        (with(OwnedKind::HardLink(0), "l"), "hard link to node 0"),
        (with(OwnedKind::HardLink(9), "l"), "hard link to node 9"),
        (with(OwnedKind::Symlink(Vec::new()), "l"), "link to nothing"),
        (with(OwnedKind::Inline(vec![0; inline_max(16 << 10) + 1]), "i"), "at most 4095"),
        (with(OwnedKind::CharacterDevice { major: 4096, minor: 0 }, "d"), "device number"),
        (file(u64::MAX, 0, 0, SECTOR), "more than a file can have"),
        (file(SECTOR, 0, 100, SECTOR), "aligned to 4 KiB"),
        (file(2 * SECTOR, 0, 0, 100), "aligned to 4 KiB"),
        (file(SECTOR, 0, 0, 2 * SECTOR), "aligned to 4 KiB"),
        (file(SECTOR, 0, 300 << 40, SECTOR), "aligned to 4 KiB"),
        (file(SECTOR, u64::MAX - 4095, 0, SECTOR), "aligned to 4 KiB"),
    ] {
        let text = refused(&tree);
        assert!(text.contains(part) && text.contains("subvolume \"x\", node 1"), "{text}");
    }
    let mut twice = with(OwnedKind::Fifo, "same");
    twice.add(0, "same", OwnedKind::Fifo, attributes(0));
    assert!(refused(&twice).contains("another entry of this name"));
    let mut orphan = with(OwnedKind::Fifo, "file");
    orphan.add(1, "below-a-file", OwnedKind::Fifo, attributes(0));
    assert!(refused(&orphan).contains("no directory"));
    let mut large = with(OwnedKind::Fifo, "file");
    large.set_xattr(1, "user.large", vec![0; 20_000]);
    assert!(refused(&large).contains("20000 bytes; a tree block takes"));
}

#[test]
fn subvolume_names_are_checked() {
    let tree = MemoryTree::new(attributes(0o755));
    let named = |name| Subvolume { name, tree: &tree, readonly: false };
    for names in [&["a", "a"][..], &[".virtual-data"], &["a/b"], &[""]] {
        let subvolumes: Vec<_> = names.iter().map(|name| named(name)).collect();
        let result = format(&small_options(), &subvolumes);
        assert!(matches!(result, Err(Error::Subvolume { .. })), "{names:?}");
    }
    let names: Vec<String> = (0..3000).map(|index| format!("subvolume-{index}")).collect();
    let subvolumes: Vec<_> = names.iter().map(|name| named(name)).collect();
    let pair =
        format(&SeedOptions { simple_quota: true, ..small_options() }, &subvolumes).expect("formatted");
    let verification = pair.verify();
    assert!(verification.is_clean(), "{}", show(&verification));
}

#[test]
fn a_local_image_that_is_too_small_says_what_would_do() {
    let mut tree = MemoryTree::new(attributes(0o755));
    for index in 0..60_000 {
        tree.add(0, format!("{index:0>250}"), OwnedKind::Fifo, attributes(0o644));
    }
    let subvolume = Subvolume { name: "x", tree: &tree, readonly: false };
    let options = SeedOptions { local_size: 256 << 20, node_size: 4096, ..small_options() };
    assert!(format(&options, &[subvolume]).is_ok());
    for index in 60_000..150_000 {
        tree.add(0, format!("{index:0>250}"), OwnedKind::Fifo, attributes(0o644));
    }
    let subvolume = Subvolume { name: "x", tree: &tree, readonly: false };
    let Err(Error::NoRoom { needed, available, .. }) = format(&options, &[subvolume]) else {
        panic!("it fits")
    };
    assert!(available == 256 << 20 && needed > available, "{needed} {available}");
}

#[test]
fn the_same_input_gives_the_same_bytes_and_another_identity_other_uuids() {
    let tree = everything();
    let subvolumes = [Subvolume { name: "x", tree: &tree, readonly: false }];
    let bytes = |options: &SeedOptions| {
        let pair = format(options, &subvolumes).expect("formatted");
        let all =
            |image: &loam_seed::MemoryImage| image.pages().map(|(o, p)| (o, p.to_vec())).collect::<Vec<_>>();
        (all(&pair.virtual_image), all(pair.local.as_ref().expect("a pair")))
    };
    let options = small_options();
    assert_eq!(bytes(&options), bytes(&options));
    let other = bytes(&SeedOptions { identity: [8; 32], ..options.clone() });
    assert_ne!(bytes(&options).0, other.0);
    let pair = format(&SeedOptions { content_digest: [3; 32], ..options.clone() }, &[]).expect("formatted");
    let label = read_label(pair.local.as_ref().expect("a pair")).expect("a label");
    assert_eq!((label.content_digest, label.identity, label.virtual_size), ([3; 32], [7; 32], 300 << 40));
    assert!(pair.virtual_image.allocated() == 4096);
    let alone = virtual_superblock(&options).expect("a superblock");
    assert_eq!(bytes(&options).0, [(64 << 10, alone.to_vec())]);
    let seed_identity = Some([9; 32]);
    let [one, two] =
        [[1; 32], [2; 32]].map(|identity| SeedOptions { identity, seed_identity, ..options.clone() });
    let (one, two) = (bytes(&one), bytes(&two));
    assert_eq!(one.0, two.0, "one seed for both");
    assert_ne!(one.1, two.1);
    let single = SeedOptions { layout: Layout::Single, ..options };
    assert!(matches!(virtual_superblock(&single), Err(Error::Option { .. })));
}

#[test]
fn an_empty_pair_of_four_exbibytes_is_small() {
    let options = SeedOptions { virtual_size: 4 << 60, ..small_options() };
    let pair = format(&options, &[]).expect("formatted");
    assert!(pair.local.as_ref().expect("a pair").allocated() < 16 << 20);
    assert!(pair.verify().is_clean());
}

/// The bytes are a promise: a virtual superblock can be made again for a local image of an older version, and an image
/// that is formatted anew for the same index is the same. A change here is a change of `docs/formats/seed.md`.
#[test]
fn the_bytes_are_those_of_the_format_document() {
    let tree = everything();
    let subvolumes = [Subvolume { name: "golden", tree: &tree, readonly: true }];
    let mut hasher = blake3::Hasher::new();
    for layout in [Layout::Pair, Layout::Single] {
        let options = SeedOptions { layout, node_size: 4096, simple_quota: true, ..small_options() };
        let pair = format(&options, &subvolumes).expect("formatted");
        for image in std::iter::once(&pair.virtual_image).chain(&pair.local) {
            for (offset, page) in image.pages() {
                hasher.update(&offset.to_le_bytes()).update(page);
            }
        }
    }
    assert_eq!(
        hasher.finalize().to_hex().as_str(),
        "15d05a19a26d50c63840f579d72b960b44bd575bc2a35073a1ca4b1c4fdb9aa3"
    );
}

/// A node as proptest makes it: the parent by index, a kind, a name.
type Sketch = (prop::sample::Index, u8, String, Vec<(u64, u64, u64)>, Vec<(String, Vec<u8>)>);

fn sketch() -> impl Strategy<Value = Sketch> {
    let run = (1u64..20, 0u64..1 << 34, 1u64..40);
    let xattr = ("user\\.[a-z]{1,8}", proptest::collection::vec(any::<u8>(), 0..50));
    (
        any::<prop::sample::Index>(),
        0u8..12,
        "[a-zA-Z0-9 ._-]{1,60}",
        proptest::collection::vec(run, 0..6),
        proptest::collection::vec(xattr, 0..3),
    )
}

fn grow(sketches: Vec<Sketch>) -> MemoryTree {
    let mut tree = MemoryTree::new(attributes(0o755));
    let (mut directories, mut files) = (vec![0], Vec::new());
    for (number, (place, kind, name, runs, xattrs)) in sketches.into_iter().enumerate() {
        let parent = directories[place.index(directories.len())];
        let name = format!("{name}{number}");
        let data = name.repeat(runs.len() + 1).into_bytes();
        let kind = match kind {
            0..=2 => OwnedKind::Directory,
            3 => OwnedKind::Inline(data),
            4 => OwnedKind::Symlink(data),
            5 if !files.is_empty() => OwnedKind::HardLink(files[place.index(files.len())]),
            6 => OwnedKind::Fifo,
            7 => OwnedKind::BlockDevice { major: 7, minor: number as u32 },
            _ => {
                let (mut size, mut list) = (0, Vec::new());
                for (gap, address, sectors) in runs {
                    let file_offset = size + gap / 2 * SECTOR;
                    list.push(Run { file_offset, address: address * SECTOR, length: sectors * SECTOR });
                    size = file_offset + sectors * SECTOR;
                }
                OwnedKind::File { size, runs: list }
            }
        };
        let time = Timestamp { seconds: number as i64 - 100, nanoseconds: number as u32 };
        let owner =
            Attributes { uid: number as u32, gid: 3, mode: 0o1234, atime: time, mtime: time, ctime: time };
        let (is_directory, is_link) = (kind == OwnedKind::Directory, matches!(kind, OwnedKind::HardLink(_)));
        let node = tree.add(parent, name, kind, owner);
        match (is_directory, is_link) {
            (true, _) => directories.push(node),
            (_, false) => files.push(node),
            _ => {}
        }
        for (name, value) in xattrs {
            let known = tree.xattrs_of(node as usize).iter().any(|(other, _)| *other == name.as_bytes());
            if !known && !is_link {
                tree.set_xattr(node, name, value);
            }
        }
    }
    tree
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_tree_verifies(
        sketches in proptest::collection::vec(sketch(), 0..300),
        node_size in prop_oneof![Just(4096u32), Just(16 << 10), Just(64 << 10)],
        simple_quota in any::<bool>(),
    ) {
        let tree = grow(sketches);
        let subvolume = Subvolume { name: "any", tree: &tree, readonly: false };
        let options = SeedOptions { node_size, simple_quota, ..small_options() };
        let verification = format(&options, &[subvolume]).expect("formatted").verify();
        prop_assert!(verification.is_clean(), "{}", show(&verification));
        let links = (0..tree.len())
            .filter(|&index| matches!(tree.kind(index), OwnedKind::HardLink(_)))
            .count();
        prop_assert_eq!(verification.counts.inodes as usize, tree.len() - links + 3);
    }
}

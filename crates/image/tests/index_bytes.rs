//! The index as bytes: the golden file, damage of every kind, and what a build hands to its sink.

mod common;

use std::ops::Range;
use std::path::Path;

use common::{Keep, archive, build_with, content, member, model, noise, pax, tar_spec};
use loam_content::Digest;
use loam_image::index::{IndexWriter, NewEntry, NewKind};
use loam_image::trace::{from_text, to_text};
use loam_image::{Blob, BlobKind, BuildOptions, Error, Index, LoadedTree, Metadata, build};
use proptest::prelude::*;

/// An archive with one of everything, always the same.
fn golden_archive() -> Vec<u8> {
    let link = common::Block::new(b"dir/link", b'2', 0).link(b"../file").finish();
    let hard = common::Block::new(b"dir/same", b'1', 0).link(b"file").finish();
    let device = common::Block::new(b"null", b'3', 0).put(329, b"0000001").put(337, b"0000003").finish();
    let sparse = [("GNU.sparse.size", &b"100000"[..]), ("GNU.sparse.map", b"8192,600,90000,5")];
    archive(&[
        member(b"./", b'5', b""),
        member(b"file", b'0', &noise(1, 70_000)),
        member(b"small", b'0', b"a small file"),
        member(b"dir/", b'5', b""),
        pax(b'x', &[("mtime", b"-1.25"), ("atime", b"5.5"), ("SCHILY.xattr.user.note", b"value")]),
        member(b"dir/empty", b'0', b""),
        link,
        hard,
        device,
        member(b"fifo", b'6', b""),
        pax(b'x', &sparse),
        member(b"sparse", b'0', &noise(2, 605)),
    ])
}

/// Out of order, and over the end of the first file.
const TRACE: [Range<u64>; 3] = [65_536..77_824, 0..8192, 77_824..81_920];

fn golden_index() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("golden.tar");
    std::fs::write(&path, golden_archive()).unwrap();
    // Spelt out: other defaults are no other format.
    let options = BuildOptions { chunk_bytes: 64 << 10, inline_bytes: 512, ..BuildOptions::default() };
    let built = build_with(&tar_spec(&path), &options).unwrap().index;
    Index::open(built).unwrap().with_trace(&TRACE).unwrap().to_vec()
}

/// The format of version 1 for all time: a change that breaks this test needs a new version. With `LOAM_GOLDEN=write`
/// the file is made anew.
#[test]
fn golden_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/version-1.loam");
    let built = golden_index();
    if std::env::var_os("LOAM_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, &built).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    let index = Index::open(golden.clone()).unwrap();
    assert_eq!(index.entries().map(Result::unwrap).count(), 10);
    assert_eq!(index.trace(), TRACE);
    let listing: Vec<String> = index.entries().map(|entry| format!("{:?}", entry.unwrap())).collect();
    let built_listing: Vec<String> =
        Index::open(built.clone()).unwrap().entries().map(|entry| format!("{:?}", entry.unwrap())).collect();
    assert_eq!(listing, built_listing, "the old file reads as before");
    assert!(golden == built, "the same archive no longer gives the same bytes");
}

#[test]
fn other_versions_and_other_files_are_told_apart() {
    let golden = golden_index();
    let mut newer = golden.clone();
    newer[8] = 2;
    assert!(matches!(Index::open(newer), Err(Error::Version { found: 2, supported: 1 })));
    let message = Index::open(b"hello".to_vec()).unwrap_err().to_string();
    assert!(message.contains("loam index"), "{message}");
    let mut other = golden;
    other[0] = b'X';
    assert!(Index::open(other).unwrap_err().to_string().contains("not an index"));
}

#[test]
fn every_flipped_bit_is_found() {
    let golden = golden_index();
    for position in 0..golden.len() {
        let mut damaged = golden.clone();
        damaged[position] ^= 1 << (position % 8);
        Index::open(damaged).map(|_| ()).expect_err(&format!("byte {position}"));
    }
    for length in 0..golden.len() {
        Index::open(golden[..length].to_vec()).map(|_| ()).unwrap_err();
    }
    let mut longer = golden;
    longer.push(0);
    Index::open(longer).map(|_| ()).unwrap_err();
}

/// Sections of version 1, and the bytes in front of them.
const SECTIONS: usize = 5;
const HEAD_BYTES: usize = 64 + SECTIONS * 32;

/// Puts right the checksums of an index, so that damage reaches the parsers.
fn mend(bytes: &mut [u8]) {
    if bytes.len() < HEAD_BYTES {
        return;
    }
    for section in 0..SECTIONS {
        let entry = 64 + section * 32;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let (offset, length) = (word(entry + 8), word(entry + 16));
        if let Some(content) = offset.checked_add(length).and_then(|end| bytes.get(offset..end)) {
            let checksum = crc32c::crc32c(content);
            bytes[entry + 4..entry + 8].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..60]), &bytes[64..HEAD_BYTES]);
    bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
}

/// Sections with their blocks decoded and put together again, so that damage gets behind zstd's own checks.
fn mutate_decoded(bytes: &[u8], section: usize, mutate: &dyn Fn(&mut Vec<u8>)) -> Vec<u8> {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut sections: Vec<Vec<u8>> =
        (0..SECTIONS).map(|i| bytes[word(64 + i * 32 + 8)..][..word(64 + i * 32 + 16)].to_vec()).collect();
    let start = word(64 + section * 32 + 8);
    let (items, stored, decoded) = (half(start), half(start + 4), half(start + 8));
    let mut block = zstd::bulk::decompress(&bytes[start + 12..start + 12 + stored], decoded).unwrap();
    mutate(&mut block);
    let frame = zstd::bulk::compress(&block, 1).unwrap();
    sections[section] = [&(items as u32).to_le_bytes()[..], &(frame.len() as u32).to_le_bytes()].concat();
    sections[section].extend_from_slice(&(block.len() as u32).to_le_bytes());
    sections[section].extend_from_slice(&frame);
    let mut out = bytes[..HEAD_BYTES].to_vec();
    for (i, content) in sections.iter().enumerate() {
        let offset = out.len() as u64;
        out[64 + i * 32 + 8..][..8].copy_from_slice(&offset.to_le_bytes());
        out[64 + i * 32 + 16..][..8].copy_from_slice(&(content.len() as u64).to_le_bytes());
        out.extend_from_slice(content);
    }
    let length = out.len() as u64;
    out[48..56].copy_from_slice(&length.to_le_bytes());
    mend(&mut out);
    out
}

/// Reads all of an index that may be damaged.
fn read_all(bytes: Vec<u8>) -> Result<(), Error> {
    let index = Index::open(bytes)?;
    for entry in index.entries() {
        entry?;
    }
    LoadedTree::load(&index, 1 << 40)?;
    from_text(&index, &to_text(&index, index.trace())?)?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn damage_with_good_checksums_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = golden_index_once().clone();
        for (position, value) in changes {
            let position = position.index(bytes.len());
            bytes[position] = value;
        }
        mend(&mut bytes);
        let _ = read_all(bytes);
    }

    #[test]
    fn damaged_columns_never_panic(
        section in prop::sample::select(vec![0usize, 1, 3, 4]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let bytes = mutate_decoded(golden_index_once(), section, &|block| {
            for (position, value) in &changes {
                let position = position.index(block.len());
                block[position] = *value;
            }
        });
        let _ = read_all(bytes);
    }
}

fn golden_index_once() -> &'static Vec<u8> {
    static GOLDEN: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    GOLDEN.get_or_init(golden_index)
}

#[test]
fn mutation_helper_reaches_the_parser() {
    let same = mutate_decoded(golden_index_once(), 3, &|_| {});
    read_all(same).unwrap();
    let error = read_all(mutate_decoded(golden_index_once(), 3, &|block| block.push(0))).unwrap_err();
    assert!(error.to_string().contains("too many"), "{error}");
}

#[test]
fn digests_are_those_of_the_naive_layout() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, golden_archive()).unwrap();
    for chunk_bytes in [4096, 65_536, 4 << 20] {
        let options = BuildOptions { chunk_bytes, ..BuildOptions::default() };
        let keep = Keep::default();
        let spec = tar_spec(&path);
        let built = common::runtime().block_on(build(&spec, &options, Some(Box::new(keep.clone())))).unwrap();
        let index = Index::open(built.index).unwrap();
        // "file" at 0; of "sparse" the blocks that hold 8192..8792 and 90000..90005.
        let mut naive = noise(1, 70_000);
        naive.resize(73_728, 0);
        let data = noise(2, 605);
        naive.extend_from_slice(&data[..600]);
        naive.resize(73_728 + 4096 + 90_000 % 4096, 0);
        naive.extend_from_slice(&data[600..]);
        naive.resize(73_728 + 8192, 0);
        assert_eq!(index.content_length(), naive.len() as u64);
        for (number, chunk) in naive.chunks(chunk_bytes as usize).enumerate() {
            assert_eq!(index.chunk_digest(number as u64), Some(Digest::of(chunk)));
            assert!(keep.0.lock().unwrap()[number] == chunk, "the sink got other bytes");
        }
        assert_eq!(index.chunk_digest(index.chunk_count()), None);
        assert_eq!(index.blobs()[0].digest, Some(Digest::of(&golden_archive())));
        assert!(content(&spec, &index) == naive, "the chunk source gives other bytes");
        model(&index, &naive);
    }
}

#[test]
fn many_blocks_of_entries() {
    let mut writer = IndexWriter::new();
    let metadata = Metadata { mode: 0o644, ..Metadata::default() };
    writer.add(&NewEntry { depth: 0, name: b"", kind: NewKind::Directory, metadata: &metadata }).unwrap();
    for i in 0..100_000u32 {
        let name = format!("{i}");
        let kind = if i == 99_999 { NewKind::HardLink(1) } else { NewKind::Inline(b"x") };
        writer.add(&NewEntry { depth: 1, name: name.as_bytes(), kind, metadata: &metadata }).unwrap();
    }
    let blob = Blob { kind: BlobKind::Raw, name: "x".into(), length: 0, digest: None };
    let bytes = writer.finish(65_536, 0, &[blob], std::iter::empty(), &[]).unwrap();
    let index = Index::open(bytes).unwrap();
    let entries: Vec<_> = index.entries().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 100_001);
    assert_eq!(entries[50_000].name, "49999");
    assert_eq!(index.entry_count(), 100_001);
}

//! Random trees, packed by another writer, against what the image says of them; compressed archives; directories.

mod common;

use std::collections::BTreeMap;
use std::io::Write;

use common::{Kind, build_with, content, dir_spec, model, model_of, noise, source, tar_spec};
use loam_content::{ChunkSource, FetchCost, collect_chunks};
use loam_image::{BuildOptions, Error, Index, LoadedTree};
use loam_seed::{FileTree, NodeKind};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Plan {
    Directory,
    File(u64, usize),
    Symlink(String),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![
        Just(Plan::Directory),
        (any::<u64>(), prop_oneof![0usize..20, 400usize..600, 4000usize..4200, 0usize..200_000])
            .prop_map(|(seed, length)| Plan::File(seed, length)),
        "[a-z]{1,8}(/[a-z]{1,20}){0,12}".prop_map(Plan::Symlink),
    ]
}

/// Paths of up to four components, so that some plans lie in others.
fn tree() -> impl Strategy<Value = BTreeMap<String, (Plan, u32, u64)>> {
    let path = prop::collection::vec(prop_oneof!["[a-c]", "[a-z]{1,8}", "[a-z]{90,110}"], 1..4)
        .prop_map(|parts| parts.join("/"));
    prop::collection::btree_map(path, (plan(), 0u32..0o10000, 0u64..1 << 34), 0..30)
}

/// The tree without what lies in something that is not a directory.
fn consistent(tree: BTreeMap<String, (Plan, u32, u64)>) -> BTreeMap<String, (Plan, u32, u64)> {
    let is_blocked = |path: &str| {
        path.match_indices('/')
            .any(|(at, _)| tree.get(&path[..at]).is_some_and(|(plan, ..)| !matches!(plan, Plan::Directory)))
    };
    tree.iter()
        .filter(|(path, _)| !is_blocked(path))
        .map(|(path, item)| (path.clone(), item.clone()))
        .collect()
}

fn pack(tree: &BTreeMap<String, (Plan, u32, u64)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, (plan, mode, mtime)) in tree {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_mtime(*mtime);
        header.set_uid(u64::from(*mode));
        header.set_size(0);
        match plan {
            Plan::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, path, &[][..]).unwrap();
            }
            Plan::File(seed, length) => {
                header.set_size(*length as u64);
                builder.append_data(&mut header, path, &noise(*seed, *length)[..]).unwrap();
            }
            Plan::Symlink(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, path, target).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back(tree in tree(), chunk in 12u32..18, inline in 0usize..2048) {
        let tree = consistent(tree);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar");
        std::fs::write(&path, pack(&tree)).unwrap();
        let spec = tar_spec(&path);
        let options = BuildOptions { chunk_bytes: 1 << chunk, inline_bytes: inline, ..BuildOptions::default() };
        let built = build_with(&spec, &options).unwrap();
        let index = Index::open(built.index).unwrap();
        let model = model(&index, &content(&spec, &index));
        for (path, (plan, mode, mtime)) in &tree {
            let item = &model[path.as_bytes()];
            let kind = match plan {
                Plan::Directory => Kind::Directory,
                Plan::File(seed, length) => Kind::File(noise(*seed, *length)),
                Plan::Symlink(target) => Kind::Symlink(target.clone().into_bytes()),
            };
            prop_assert!(item.kind == kind, "{path}");
            prop_assert_eq!(u32::from(item.metadata.mode), *mode);
            prop_assert_eq!(item.metadata.mtime.seconds, *mtime as i64);
        }
        let implied = model.len() - 1 - tree.len();
        prop_assert!(model.values().filter(|item| item.kind == Kind::Directory).count() > implied);
    }
}

fn sample() -> Vec<u8> {
    let tree = (0..40)
        .map(|i| (format!("d{}/f{i}", i % 3), (Plan::File(i, (i * 997) as usize), 0o644, i)))
        .collect();
    pack(&tree)
}

#[test]
fn compressed_archives_give_the_same_tree() {
    let plain = sample();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let xz = |bytes: &[u8]| {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let bzip2 = |bytes: &[u8]| {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let (head, tail) = plain.split_at(plain.len() / 3);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive");
    let expected = {
        std::fs::write(&path, &plain).unwrap();
        model_of(&tar_spec(&path), &BuildOptions::default())
    };
    for (name, bytes) in [
        ("gzip", gzip(&plain)),
        ("gzip", [gzip(head), gzip(tail)].concat()),
        ("xz", xz(&plain)),
        ("xz", [xz(head), xz(tail)].concat()),
        ("bzip2", bzip2(&plain)),
        ("bzip2", [bzip2(head), bzip2(tail)].concat()),
        ("zstd", zstd(&plain)),
        ("zstd", [zstd(head), zstd(tail)].concat()),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let spec = tar_spec(&path);
        let built = build_with(&spec, &BuildOptions::default()).unwrap();
        let index = Index::open(built.index).unwrap();
        assert!(index.not_lazy().unwrap().contains(name));
        let source = source(&spec, &index);
        assert_eq!(source.fetch_cost(), FetchCost::WholeStream);
        assert!(model(&index, &content(&spec, &index)) == expected, "{name}");
        // A run in the middle alone.
        let chunks = common::runtime().block_on(collect_chunks(&source, 3, 2)).unwrap();
        assert_eq!(index.chunk_digest(4), Some(loam_content::Digest::of(&chunks[1])));
        // Cut short.
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        build_with(&spec, &BuildOptions::default()).map(|_| ()).unwrap_err();
    }
}

#[test]
fn runs_outside_the_content_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, sample()).unwrap();
    let spec = tar_spec(&path);
    let index = Index::open(build_with(&spec, &BuildOptions::default()).unwrap().index).unwrap();
    let source = source(&spec, &index);
    let runtime = common::runtime();
    for (first, count) in [(index.chunk_count(), 1), (0, index.chunk_count() + 1), (u64::MAX, 2)] {
        runtime.block_on(collect_chunks(&source, first, count)).unwrap_err();
    }
}

#[test]
fn a_changed_directory_is_an_error_not_data() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    std::fs::create_dir(root.join("d")).unwrap();
    std::fs::write(root.join("d/file"), noise(1, 100_000)).unwrap();
    let spec = dir_spec(root);
    let index = Index::open(build_with(&spec, &BuildOptions::default()).unwrap().index).unwrap();
    let runtime = common::runtime();
    let fetch = || runtime.block_on(collect_chunks(&source(&spec, &index), 0, 1));
    fetch().unwrap();
    std::fs::write(root.join("d/file"), noise(1, 99_999)).unwrap();
    assert!(matches!(fetch(), Err(loam_content::Error::Changed { .. })));
    // A symbolic link on the way leads nowhere, not even to the same file.
    std::fs::rename(root.join("d"), root.join("moved")).unwrap();
    std::os::unix::fs::symlink("moved", root.join("d")).unwrap();
    assert!(matches!(fetch(), Err(loam_content::Error::Io { .. })));
}

#[test]
fn a_longer_archive_is_another_archive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, sample()).unwrap();
    let spec = tar_spec(&path);
    let index = Index::open(build_with(&spec, &BuildOptions::default()).unwrap().index).unwrap();
    std::fs::write(&path, [sample(), vec![0; 512]].concat()).unwrap();
    let bytes = loam_content::FileSource::open(&path, None).unwrap();
    let error =
        loam_image::ImageSource::archive(index.into(), std::sync::Arc::new(bytes)).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Content(loam_content::Error::Changed { .. })), "{error}");
}

#[test]
fn a_loaded_tree_says_what_the_entries_say() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, sample()).unwrap();
    let index = Index::open(build_with(&tar_spec(&path), &BuildOptions::default()).unwrap().index).unwrap();
    let base = 1 << 30;
    let tree = LoadedTree::load(&index, base).unwrap();
    assert_eq!(tree.len() as u64, index.entry_count());
    for entry in index.entries().map(Result::unwrap) {
        let number = entry.number as usize;
        let node = tree.node(number);
        assert_eq!((node.parent, node.name), (entry.parent, &entry.name[..]));
        assert_eq!(node.attributes.mtime.seconds, entry.metadata.mtime.seconds);
        match (&entry.kind, node.kind) {
            (loam_image::EntryKind::Directory, NodeKind::Directory) => {}
            (loam_image::EntryKind::Inline(data), NodeKind::Inline(other)) => assert_eq!(data, other),
            (loam_image::EntryKind::File { size, runs }, NodeKind::File { size: other }) => {
                assert_eq!(*size, other);
                let mut found = Vec::new();
                tree.runs(number, &mut |run| found.push((run.file_offset, run.address - base, run.length)));
                // The formatter wants the last run to end where the file does.
                let clip = |run: &loam_image::Run| run.length.min(size - run.file_offset);
                let expected: Vec<_> =
                    runs.iter().map(|run| (run.file_offset, run.address, clip(run))).collect();
                assert_eq!(found, expected);
            }
            other => panic!("{other:?}"),
        }
    }
}

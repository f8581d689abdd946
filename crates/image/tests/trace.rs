//! Traces as text: from runs to files and back, from one index to the next, and texts that nobody should have written.

mod common;

use std::ops::Range;
use std::sync::OnceLock;

use common::{Block, archive, build_with, dir_spec, member, noise, pax, tar_spec};
use loam_image::trace::{LINES_MAX, TEXT_BYTES_MAX, Traced, first_uses, from_text, to_text};
use loam_image::{BuildOptions, Error, Index};
use proptest::prelude::*;

const BLOCK: u64 = 4096;

fn index_of(parts: &[Vec<u8>]) -> Index {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    std::fs::write(&path, archive(parts)).unwrap();
    Index::open(build_with(&tar_spec(&path), &BuildOptions::default()).unwrap().index).unwrap()
}

fn parts() -> Vec<Vec<u8>> {
    let sparse = [("GNU.sparse.size", &b"100000"[..]), ("GNU.sparse.map", b"8192,600,90000,5")];
    vec![
        member(b"usr/bin/first", b'0', &noise(1, 10_000)),
        member(b"usr/lib/odd \n\\\xff name", b'0', &noise(2, 4096)),
        member(b"small", b'0', b"inline"),
        pax(b'x', &sparse),
        member(b"sparse", b'0', &noise(3, 605)),
        Block::new(b"link", b'1', 0).link(b"usr/bin/first").finish(),
        Block::new(b"small-link", b'1', 0).link(b"small").finish(),
        Block::new(b"symlink", b'2', 0).link(b"usr/bin/first").finish(),
        Block::new(b"symlink-link", b'1', 0).link(b"symlink").finish(),
        member(b"last", b'0', &noise(4, 50_000)),
    ]
}

/// `usr/bin/first` at blocks 0..3, the odd name at 3, `sparse` at 4 and 5, `last` at 6..19.
fn index() -> &'static Index {
    static INDEX: OnceLock<Index> = OnceLock::new();
    INDEX.get_or_init(|| index_of(&parts()))
}

fn blocks(range: Range<u64>) -> Range<u64> {
    range.start * BLOCK..range.end * BLOCK
}

fn read(lines: &str) -> Traced {
    from_text(index(), &format!("# loam trace 1\n{lines}")).unwrap()
}

fn refused(text: &str) -> String {
    from_text(index(), text).unwrap_err().to_string()
}

#[test]
fn runs_become_lines_of_files() {
    assert_eq!(index().content_length(), 19 * BLOCK);
    let text = to_text(index(), &[blocks(2..7), blocks(0..1), blocks(18..19), blocks(1..2)]).unwrap();
    let expected = "# loam trace 1\n\
        8192 1808 usr/bin/first\n\
        0 4096 usr/lib/odd \\x0a\\x5c\\xff name\n\
        8192 4096 sparse\n\
        86016 4096 sparse\n\
        0 4096 last\n\
        0 4096 usr/bin/first\n\
        49152 848 last\n\
        4096 4096 usr/bin/first\n";
    assert_eq!(text, expected);
    assert_eq!(
        read(text.strip_prefix("# loam trace 1\n").unwrap()),
        Traced { runs: vec![blocks(2..7), blocks(0..1), blocks(18..19), blocks(1..2)], unknown: Vec::new() }
    );
    assert_eq!(to_text(index(), &[]).unwrap(), "# loam trace 1\n");
}

#[test]
fn lines_become_runs_of_whole_blocks_each_once() {
    let traced = read("5000 1 link\n0 50000 last\n0 10000 usr/bin/first\n0 6 small\n0 9 small-link\n");
    assert_eq!(traced.runs, [blocks(1..2), blocks(6..19), blocks(0..1), blocks(2..3)]);
    assert_eq!(traced.unknown, [""; 0]);
    // Holes need nothing; a line over the whole of a sparse file is its data.
    assert_eq!(read("0 8000 sparse").runs, []);
    assert_eq!(read("8191 1 sparse\n8192 81809 sparse").runs, [blocks(4..6)]);
    assert_eq!(read("90112 9888 sparse").runs, []);
}

#[test]
fn what_the_index_lacks_is_named() {
    let traced = read(
        "0 1 gone\n9999 2 usr/bin/first\n5 1 gone\n10000 1 link\n0 1 usr\n0 1 symlink\n0 1 symlink-link\n0 1 g\\x6fne\\x20\n",
    );
    let expected =
        ["gone", "9999 2 usr/bin/first", "10000 1 link", "usr", "symlink", "symlink-link", "g\\x6fne\\x20"];
    assert_eq!(traced.unknown, expected);
    assert_eq!(traced.runs, [blocks(2..3)]);
}

#[test]
fn malformed_lines_are_named_by_number() {
    for line in [
        "",
        " ",
        "x",
        "1 2",
        "1  2 a",
        "a 1 last",
        "1 b last",
        "-1 1 last",
        "+1 1 last",
        "0 0 last",
        "0 1 ",
        "0 1 /last",
        "0 1 ../last",
        "0 1 a//b",
        "0 1 ./last",
        "0 1 a\\",
        "0 1 a\\x0",
        "0 1 a\tb",
        "0 1 a\\x00",
        "18446744073709551615 1 last",
        "18446744073709551616 1 last",
        "0 0x10 last",
        "# note",
    ] {
        let text = format!("# loam trace 1\n0 1 last\n{line}\n0 1 last\n");
        let error = from_text(index(), &text).unwrap_err();
        assert!(matches!(error, Error::Trace { line: 3, .. }), "{line:?}: {error}");
        assert!(error.to_string().contains("line 3"), "{error}");
    }
    for text in
        ["", "\n", "0 1 last\n", "# loam trace\n", "# loam trace x\n", "# loam trace 0\n", " # loam trace 1"]
    {
        assert!(refused(text).contains("line 1: not a trace"), "{text:?}");
    }
    let newer = from_text(index(), "# loam trace 2\nanything").unwrap_err();
    assert!(matches!(newer, Error::TraceVersion { found: 2, supported: 1 }));
    assert!(newer.to_string().contains("newer loam"));
    assert_eq!(from_text(index(), "# loam trace 1\r\n0 1 last\r\n").unwrap().runs, [blocks(6..7)]);
}

#[test]
fn texts_are_bounded() {
    let lines = |count| format!("# loam trace 1\n{}", "0 1 last\n".repeat(count));
    assert_eq!(from_text(index(), &lines(LINES_MAX)).unwrap().runs, [blocks(6..7)]);
    assert!(matches!(from_text(index(), &lines(LINES_MAX + 1)), Err(Error::Limit { .. })));
    let long = format!("# loam trace 1\n0 1 {}", "a".repeat(TEXT_BYTES_MAX));
    assert!(matches!(from_text(index(), &long), Err(Error::Limit { .. })));
    // 2,000 scattered blocks of a file, named whole 600 times, come to more runs than anyone reads.
    let map: Vec<String> = (0..2000).map(|i| format!("{},1", i * 8192)).collect();
    let records = [("GNU.sparse.size", &b"99999999"[..]), ("GNU.sparse.map", map.join(",").as_bytes())]
        .map(|(key, value)| (key, value.to_vec()));
    let records: Vec<(&str, &[u8])> = records.iter().map(|(key, value)| (*key, &value[..])).collect();
    let scattered = index_of(&[pax(b'x', &records), member(b"s", b'0', &noise(5, 2000))]);
    let lines = |count| format!("# loam trace 1\n{}", "0 99999999 s\n".repeat(count));
    assert_eq!(from_text(&scattered, &lines(500)).unwrap().runs, [blocks(0..2000)]);
    assert!(matches!(from_text(&scattered, &lines(600)), Err(Error::Limit { limit: 1_048_576, .. })));
}

#[test]
fn a_trace_in_the_index_changes_its_name_and_nothing_else() {
    let plain = index();
    assert_eq!(plain.trace(), []);
    let trace = [blocks(5..9), blocks(0..2)];
    let traced = Index::open(plain.with_trace(&trace).unwrap()).unwrap();
    assert_eq!(traced.trace(), trace);
    assert_ne!(traced.digest(), plain.digest());
    assert_eq!((traced.pieces(), traced.blobs()), (plain.pieces(), plain.blobs()));
    assert!(traced.entries().map(Result::unwrap).eq(plain.entries().map(Result::unwrap)));
    assert!((0..=plain.chunk_count()).all(|i| traced.chunk_digest(i) == plain.chunk_digest(i)));
    assert_eq!(traced.with_trace(&[]).unwrap(), plain.as_bytes());
    let other = traced.with_trace(&[1..2, BLOCK..BLOCK + 1, 0..1]).unwrap();
    assert_eq!(Index::open(other).unwrap().trace(), [blocks(0..2)]);
    let error = plain.with_trace(&[blocks(18..20)]).unwrap_err().to_string();
    assert!(error.contains("beyond the content"), "{error}");
    assert!(to_text(plain, &[blocks(18..20)]).is_err());
}

#[test]
fn a_trace_survives_a_rebuilt_tree() {
    let trace = [blocks(7..9), blocks(0..3)];
    let text = to_text(index(), &trace).unwrap();
    let mut changed = parts();
    changed.insert(0, member(b"a-new-file", b'0', &noise(9, 5000)));
    let rebuilt = index_of(&changed);
    let expected = Traced { runs: vec![blocks(9..11), blocks(2..5)], unknown: Vec::new() };
    assert_eq!(from_text(&rebuilt, &text).unwrap(), expected);
    assert_eq!(to_text(&rebuilt, &expected.runs).unwrap(), text);
}

#[test]
fn nested_directories_have_whole_paths() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a/b/c/one", "a/b/two", "a/three", "four", "b/c/five"] {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, noise(name.len() as u64, 5000)).unwrap();
    }
    let built = build_with(&dir_spec(directory.path()), &BuildOptions::default()).unwrap();
    let index = Index::open(built.index).unwrap();
    let all = 0..index.content_length();
    let text = to_text(&index, std::slice::from_ref(&all)).unwrap();
    let mut lines: Vec<&str> = text.lines().skip(1).collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["0 5000 a/b/c/one", "0 5000 a/b/two", "0 5000 a/three", "0 5000 b/c/five", "0 5000 four"]
    );
    let traced = from_text(&index, &text).unwrap();
    assert_eq!((traced.runs, traced.unknown.len()), (vec![all], 0));
}

/// Block after block, each where it is first seen.
fn naive(runs: &[Range<u64>]) -> Vec<u64> {
    let mut seen = Vec::new();
    for run in runs.iter().filter(|run| !run.is_empty()) {
        for block in run.start / BLOCK..run.end.div_ceil(BLOCK) {
            if !seen.contains(&block) {
                seen.push(block);
            }
        }
    }
    seen
}

fn runs() -> impl Strategy<Value = Vec<Range<u64>>> {
    let run =
        (0..19 * BLOCK, 0..6 * BLOCK).prop_map(|(start, length)| start..(start + length).min(19 * BLOCK));
    prop::collection::vec(run, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn first_uses_are_those_of_a_list_of_blocks(runs in runs()) {
        let normal = first_uses(runs.iter().cloned(), 19 * BLOCK).unwrap();
        prop_assert_eq!(naive(&normal), naive(&runs));
        let length: u64 = normal.iter().map(|run| run.end - run.start).sum();
        prop_assert_eq!(length, naive(&runs).len() as u64 * BLOCK, "a block twice");
        prop_assert!(normal.windows(2).all(|pair| pair[0].end != pair[1].start), "not merged");
    }

    #[test]
    fn traces_round_trip_through_text_and_index(runs in runs()) {
        let normal = first_uses(runs.iter().cloned(), 19 * BLOCK).unwrap();
        let text = to_text(index(), &runs).unwrap();
        let traced = from_text(index(), &text).unwrap();
        prop_assert_eq!(&traced, &Traced { runs: normal.clone(), unknown: Vec::new() });
        let held = Index::open(index().with_trace(&traced.runs).unwrap()).unwrap();
        prop_assert_eq!(held.trace(), &normal[..]);
        prop_assert_eq!(to_text(&held, held.trace()).unwrap(), text);
    }

    #[test]
    fn mutated_text_never_panics(
        runs in runs(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut text = to_text(index(), &runs).unwrap().into_bytes();
        for (position, value) in changes {
            let position = position.index(text.len());
            text[position] = value;
        }
        if let Ok(traced) = from_text(index(), &String::from_utf8_lossy(&text)) {
            prop_assert_eq!(first_uses(traced.runs.iter().cloned(), 19 * BLOCK).unwrap(), traced.runs);
        }
    }
}

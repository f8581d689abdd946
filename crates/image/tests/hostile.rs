//! Archives that are broken, hostile, or merely strange.

mod common;

use std::sync::atomic::Ordering;

use common::{Block, END, Kind, archive, build_bytes, build_with, member, model_of, pax, refused, tar_spec};
use loam_image::{BuildOptions, Error, Index};

fn model(archive: &[u8]) -> common::Model {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive.tar");
    std::fs::write(&path, archive).unwrap();
    model_of(&tar_spec(&path), &BuildOptions::default())
}

#[test]
fn climbing_names_are_refused_by_name() {
    for name in ["../evil", "a/../../evil", "/../evil", ".."] {
        let message = refused(&archive(&[member(name.as_bytes(), b'0', b"x")]));
        assert!(message.contains(name) && message.contains("\"..\""), "{message}");
    }
    let link = Block::new(b"link", b'1', 0).link(b"../../etc/passwd").finish();
    assert!(refused(&archive(&[link])).contains("link target"));
}

#[test]
fn absolute_names_lose_their_slash() {
    let model = model(&archive(&[member(b"///etc/./x", b'0', b"x")]));
    assert_eq!(model[&b"etc/x"[..]].kind, Kind::File(b"x".to_vec()));
    assert_eq!(model[&b"etc"[..]].metadata.mode, 0o755, "missing parents are made");
}

#[test]
fn nothing_is_written_through_a_symlink() {
    let link = Block::new(b"a", b'2', 0).link(b"/etc").finish();
    let message = refused(&archive(&[link.clone(), member(b"a/passwd", b'0', b"x")]));
    assert!(message.contains("a/passwd") && message.contains("symbolic link"), "{message}");
    let message = refused(&archive(&[member(b"f", b'0', b"x"), member(b"f/below", b'0', b"x")]));
    assert!(message.contains("not a directory"), "{message}");
    // A directory in the link's place is what GNU tar makes too.
    let model = model(&archive(&[link, member(b"a", b'5', b""), member(b"a/passwd", b'0', b"x")]));
    assert_eq!(model[&b"a"[..]].kind, Kind::Directory);
}

#[test]
fn hard_links_need_a_target_before_them() {
    let link = |name: &[u8], target: &[u8]| Block::new(name, b'1', 0).link(target).finish();
    let message = refused(&archive(&[link(b"a", b"nowhere")]));
    assert!(message.contains("\"a\"") && message.contains("\"nowhere\""), "{message}");
    refused(&archive(&[link(b"a", b"a")]));
    refused(&archive(&[link(b"a", b"b"), link(b"b", b"a")]));
    assert!(refused(&archive(&[member(b"d", b'5', b""), link(b"a", b"d")])).contains("directory"));
    let model =
        model(&archive(&[member(b"a", b'0', b"x"), link(b"a", b"a"), link(b"b", b"./a"), link(b"a", b"b")]));
    assert_eq!(model[&b"b"[..]].first_name, b"a");
}

#[test]
fn a_hard_link_has_no_data_whatever_its_size_says() {
    let link = Block::new(b"b", b'1', 5000).link(b"a").finish();
    let model = model(&archive(&[member(b"a", b'0', b"x"), link, member(b"c", b'0', b"y")]));
    assert_eq!(model.len(), 4);
}

#[test]
fn directories_with_content_are_not_replaced() {
    let message = refused(&archive(&[member(b"d/f", b'0', b"x"), member(b"d", b'0', b"x")]));
    assert!(message.contains("not empty"), "{message}");
    let model = model(&archive(&[member(b"d", b'5', b""), member(b"d", b'0', b"x")]));
    assert_eq!(model[&b"d"[..]].kind, Kind::File(b"x".to_vec()));
}

#[test]
fn impossible_sizes_are_refused() {
    let huge = |bytes: &[u8]| Block::new(b"huge", b'0', 0).put(124, bytes).finish();
    for field in [
        &b"\x80\0\0\0\x80\0\0\0\0\0\0\0"[..],
        b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"notanumber\0\0",
    ] {
        let message = refused(&archive(&[huge(field)]));
        assert!(message.contains("huge"), "{message}");
    }
    for size in ["9223372036854775808", "18446744073709551615", "99999999999999999999", "-1"] {
        refused(&archive(&[pax(b'x', &[("size", size.as_bytes())]), member(b"huge", b'0', b"")]));
    }
    // Possible, but not there: the archive is too short.
    let message = refused(&archive(&[huge(b"\x80\0\0\0\0\0\x10\0\0\0\0\0")]));
    assert!(message.contains("truncated"), "{message}");
}

#[test]
fn every_truncation_is_an_error() {
    let whole = archive(&[
        pax(b'x', &[("mtime", b"1.5")]),
        member(b"a", b'0', &common::noise(1, 1500)),
        member(b"b", b'5', b""),
    ]);
    build_bytes(&whole).unwrap();
    // One block of zeroes is enough of an end mark.
    for length in (0..whole.len() - 512).step_by(100).chain((0..whole.len() - 512).step_by(512)) {
        let message = refused(&whole[..length]);
        assert!(message.contains("truncated"), "{length}: {message}");
    }
}

#[test]
fn other_files_are_not_archives() {
    for bytes in [&b"hello"[..], &[b'x'; 5000], &common::noise(7, 10_000)] {
        refused(bytes);
    }
    let mut damaged = archive(&[member(b"a", b'0', b"x")]);
    damaged[3] ^= 1;
    assert!(refused(&damaged).contains("checksum"));
}

#[test]
fn extended_headers_are_bounded() {
    let bomb = Block::new(b"pax", b'x', 1 << 40).finish();
    assert!(refused(&archive(&[bomb])).contains("extended headers"));
    let filler = vec![b'v'; 60_000];
    let many: Vec<Vec<u8>> =
        (0..100).map(|i| pax(b'x', &[(&format!("SCHILY.xattr.user.{i}"), &filler)])).collect();
    assert!(refused(&archive(&many)).contains("extended headers"));
    let globals: Vec<Vec<u8>> = (0..100).map(|_| pax(b'g', &[("comment", &filler)])).collect();
    assert!(refused(&archive(&globals)).contains("extended headers"));
    let attributes: Vec<Vec<u8>> =
        (0..1100).map(|i| pax(b'x', &[(&format!("SCHILY.xattr.user.{i}"), b"v")])).collect();
    assert!(refused(&archive(&attributes)).contains("attributes"));
    let long = vec![b'v'; 65_537];
    refused(&archive(&[pax(b'x', &[("SCHILY.xattr.user.long", &long)]), member(b"a", b'0', b"")]));
}

#[test]
fn names_that_linux_cannot_hold_are_refused() {
    let named = |path: &[u8]| archive(&[pax(b'x', &[("path", path)]), member(b"short", b'0', b"x")]);
    assert!(refused(&named(&[b'n'; 256])).contains("256 bytes"));
    assert!(refused(&named(&b"abcdefg/".repeat(600))).contains("path of"));
    assert!(refused(&named(b"nul\0byte")).contains("NUL"));
    refused(&named(&vec![b'n'; 100_000]));
    build_bytes(&named(&b"abcdefg/".repeat(511))).unwrap();
    let long_link = vec![b't'; 5000];
    let link = archive(&[pax(b'x', &[("linkpath", &long_link)]), member(b"l", b'2', b"")]);
    assert!(refused(&link).contains("link target"));
    assert!(refused(&archive(&[member(b"l", b'2', b"")])).contains("without a target"));
}

#[test]
fn owners_that_mean_nothing_are_refused() {
    for id in ["4294967295", "4294967296", "-5"] {
        refused(&archive(&[pax(b'x', &[("uid", id.as_bytes())]), member(b"a", b'0', b"")]));
    }
    let negative = Block::new(b"a", b'0', 0).put(116, &[0xff; 8]).finish();
    assert!(refused(&archive(&[negative])).contains("gid"));
}

#[test]
fn sparse_maps_are_checked() {
    let sparse = |map: &[u8], data: &[u8]| {
        let records =
            [("GNU.sparse.size", &b"10000"[..]), ("GNU.sparse.name", b"sparse"), ("GNU.sparse.map", map)];
        archive(&[pax(b'x', &records), member(b"GNUSparseFile.1/sparse", b'0', data)])
    };
    let model = model(&sparse(b"100,5,9000,5", b"helloworld"));
    let Kind::File(data) = &model[&b"sparse"[..]].kind else { panic!("not a file") };
    assert_eq!((data.len(), &data[100..105], &data[9000..9005]), (10_000, &b"hello"[..], &b"world"[..]));
    for map in ["100,5,103,5", "0,5", "0,5,9996,5", "0,5,18446744073709551615,5", "5", "0,11", "a,b"] {
        assert!(refused(&sparse(map.as_bytes(), b"helloworld")).contains("sparse"), "{map}");
    }
    // A map inside the data that never ends, and one that claims to be long.
    for map in [&[b'1'; 512][..], &[&b"99999999\n"[..], &[b'\n'; 503]].concat()] {
        let records =
            [("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"10")];
        refused(&archive(&[pax(b'x', &records), member(b"s", b'0', map)]));
    }
    let old = Block::new(b"old", b'S', 0).put(386, b"00000000000 00000000010").put(483, b"00000000020");
    assert!(refused(&archive(&[old.finish()])).contains("sparse"));
}

#[test]
fn a_sparse_file_may_be_as_long_as_linux_takes() {
    let records =
        [("GNU.sparse.size", &b"9223372036854775807"[..]), ("GNU.sparse.map", b"4611686018427387904,5")];
    let built = build_bytes(&archive(&[pax(b'x', &records), member(b"s", b'0', b"hello")])).unwrap();
    let index = Index::open(built.index).unwrap();
    assert_eq!(index.entries().map(Result::unwrap).count(), 2);
    assert_eq!(index.content_length(), 4096);
}

#[test]
fn labels_and_unknown_kinds_do_no_harm() {
    let model = model(&archive(&[
        member(b"label", b'V', b""),
        member(b"odd", b'Q', b"text"),
        member(b"c", b'7', b"c"),
    ]));
    assert_eq!(model[&b"odd"[..]].kind, Kind::File(b"text".to_vec()));
    assert_eq!(model.len(), 3);
    assert!(refused(&archive(&[member(b"part", b'M', b"x")])).contains("multi-volume"));
}

#[test]
fn global_headers_hold_until_taken_back() {
    let model = model(&archive(&[
        pax(b'g', &[("uid", b"7"), ("mtime", b"9.25")]),
        member(b"a", b'0', b""),
        pax(b'x', &[("uid", b"8")]),
        member(b"b", b'0', b""),
        pax(b'g', &[("uid", b"")]),
        member(b"c", b'0', b""),
    ]));
    let uid = |name: &[u8]| model[name].metadata.uid;
    assert_eq!((uid(b"a"), uid(b"b"), uid(b"c")), (7, 8, 0));
    assert_eq!(model[&b"c"[..]].metadata.mtime.nanoseconds, 250_000_000);
}

#[test]
fn attributes_as_libarchive_writes_them() {
    let model = model(&archive(&[
        pax(
            b'x',
            &[
                ("LIBARCHIVE.xattr.user.a%20b", b"aGVsbG8"),
                ("SCHILY.acl.access", b"user::rwx,user:5:r--,group::r--,mask::r--,other::---"),
            ],
        ),
        member(b"a", b'0', b""),
    ]));
    let xattrs = &model[&b"a"[..]].metadata.xattrs;
    assert_eq!((&xattrs[0].name[..], &xattrs[0].value[..]), (&b"user.a b"[..], &b"hello"[..]));
    assert_eq!(&xattrs[1].name[..], b"system.posix_acl_access");
}

#[test]
fn devices_and_large_numbers() {
    let device = Block::new(b"null", b'3', 0).put(329, b"0000001").put(337, b"0000003").finish();
    let block = Block::new(b"disk", b'4', 77).put(329, b"0000010").put(337, b"0000020").finish();
    let owner = Block::new(b"big", b'0', 0).put(108, b"\x80\0\0\0\xff\xff\xff\xfe").finish();
    let model = model(&archive(&[device, block, owner]));
    assert_eq!(model[&b"null"[..]].kind, Kind::Character(1, 3));
    assert_eq!(model[&b"disk"[..]].kind, Kind::Block(8, 16));
    assert_eq!(model[&b"big"[..]].metadata.uid, u32::MAX - 1);
}

#[test]
fn a_build_can_be_cancelled() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive.tar");
    std::fs::write(&path, archive(&[member(b"a", b'0', b"x")])).unwrap();
    let options = BuildOptions::default();
    options.cancel.store(true, Ordering::Relaxed);
    assert!(matches!(build_with(&tar_spec(&path), &options), Err(Error::Cancelled)));
}

#[test]
fn what_follows_the_end_mark_is_not_read_as_members() {
    let mut bytes = archive(&[member(b"a", b'0', b"x")]);
    bytes.extend(member(b"hidden", b'0', b"x"));
    bytes.extend(END);
    let built = build_bytes(&bytes).unwrap();
    assert_eq!((built.report.entries, built.report.source_bytes), (2, bytes.len() as u64));
}

//! Archives that GNU tar writes, in each of its formats, against the directory that it read.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use common::{Kind, Model, dir_spec, model_of, noise, reduced, tar_spec};
use loam_image::{BuildOptions, Metadata};
use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps};

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A tree with one of everything that needs no privilege.
fn tree(root: &Path) {
    let write = |name: &str, bytes: &[u8]| std::fs::write(root.join(name), bytes).unwrap();
    std::fs::create_dir_all(root.join("dir/below")).unwrap();
    write("empty", b"");
    write("small", b"a few bytes");
    write("block", &noise(1, 4096));
    write("odd", &noise(2, 70_001));
    write("large", &noise(3, 1 << 20));
    write("dir/below/name with spaces\nand lines", b"x");
    let long = "n".repeat(200);
    write(&format!("dir/{long}"), &noise(4, 600));
    std::os::unix::fs::symlink(format!("../{}", "t".repeat(300)), root.join("dir/long-link")).unwrap();
    std::os::unix::fs::symlink("small", root.join("link")).unwrap();
    std::fs::hard_link(root.join("odd"), root.join("dir/odd-too")).unwrap();
    std::fs::hard_link(root.join("link"), root.join("link-too")).unwrap();
    rustix::fs::mknodat(CWD, root.join("fifo"), rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
    let set_mode = |name: &str, mode| {
        std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    set_mode("small", 0o4751);
    set_mode("dir", 0o1777);
    set_mode("dir/below", 0o2750);
    set_mtime(&root.join("empty"), 0, 0);
    set_mtime(&root.join("small"), 1_700_000_000, 123_456_789);
    set_mtime(&root.join("link"), 5_000_000_000, 1);
    set_mtime(&root.join("dir/below"), 1_000_000_000, 999_999_999);
}

fn sparse_tree(root: &Path) {
    let sparse = |name: &str, size: u64, parts: &[(u64, usize)]| {
        let file = File::create(root.join(name)).unwrap();
        for &(offset, length) in parts {
            file.write_all_at(&noise(offset, length), offset).unwrap();
        }
        file.set_len(size).unwrap();
    };
    sparse("all-hole", 10 << 20, &[]);
    sparse("middle", 5 << 20, &[(1 << 20, 70_000)]);
    sparse("end", (3 << 20) + 5, &[((3 << 20) - 100, 105)]);
    let many: Vec<(u64, usize)> = (0..60).map(|i| (i * 40_960, 4096 + i as usize)).collect();
    sparse("many", 60 * 40_960 + 17, &many);
    std::fs::write(root.join("dense"), noise(9, 9000)).unwrap();
}

fn pack(root: &Path, archive: &Path, options: &[&str]) {
    let status = Command::new("tar")
        .arg("-C")
        .arg(root)
        .args(["--numeric-owner", "-cf"])
        .arg(archive)
        .args(options)
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success(), "tar {options:?}");
}

/// Packs the tree and compares what the archive gives with what the directory gives, after `keep` on both.
fn compare(make: fn(&Path), options: &[&str], keep: fn(&mut Metadata)) -> Model {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    make(&root);
    let archive = directory.path().join("tree.tar");
    pack(&root, &archive, options);
    let build = BuildOptions::default();
    let expected = reduced(model_of(&dir_spec(&root), &build), keep);
    let found = reduced(model_of(&tar_spec(&archive), &build), keep);
    assert_same(&found, &expected);
    found
}

fn assert_same(found: &Model, expected: &Model) {
    let names =
        |model: &Model| model.keys().map(|k| String::from_utf8_lossy(k).into_owned()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (path, item) in expected {
        let path_shown = String::from_utf8_lossy(path);
        let other = &found[path];
        assert!(other.kind == item.kind, "{path_shown}: other kind or bytes");
        assert_eq!((&other.metadata, &other.first_name), (&item.metadata, &item.first_name), "{path_shown}");
    }
}

fn no_access_times(metadata: &mut Metadata) {
    (metadata.atime, metadata.ctime) = (None, None);
}

fn whole_seconds(metadata: &mut Metadata) {
    no_access_times(metadata);
    metadata.mtime.nanoseconds = 0;
}

#[test]
fn pax_keeps_everything() {
    let model = compare(tree, &["--format=pax"], no_access_times);
    assert_eq!(model[&b"small"[..]].metadata.mtime.nanoseconds, 123_456_789);
    assert_eq!(model[&b"dir/odd-too"[..]].first_name, b"dir/odd-too");
    assert_eq!(model[&b"odd"[..]].first_name, b"dir/odd-too");
    assert!(matches!(&model[&b"large"[..]].kind, Kind::File(data) if data.len() == 1 << 20));
}

#[test]
fn gnu_format_has_long_names_and_whole_seconds() {
    compare(tree, &["--format=gnu"], whole_seconds);
    compare(tree, &["--format=oldgnu"], whole_seconds);
}

#[test]
fn ustar_splits_names() {
    fn make(root: &Path) {
        let below = root.join("p".repeat(90)).join("q".repeat(60));
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("r".repeat(95)), noise(1, 5000)).unwrap();
        std::os::unix::fs::symlink("here", root.join("link")).unwrap();
    }
    compare(make, &["--format=ustar"], whole_seconds);
}

#[test]
fn v7_knows_directories_by_their_slash() {
    fn make(root: &Path) {
        std::fs::create_dir(root.join("dir")).unwrap();
        std::fs::write(root.join("dir/file"), noise(1, 5000)).unwrap();
        std::fs::hard_link(root.join("dir/file"), root.join("other")).unwrap();
    }
    compare(make, &["--format=v7"], whole_seconds);
}

#[test]
fn sparse_files_in_all_formats() {
    for options in [
        &["--sparse", "--format=gnu"][..],
        &["--sparse", "--format=pax", "--sparse-version=0.0"],
        &["--sparse", "--format=pax", "--sparse-version=0.1"],
        &["--sparse", "--format=pax", "--sparse-version=1.0"],
    ] {
        compare(sparse_tree, options, whole_seconds);
    }
}

#[test]
fn holes_take_no_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    sparse_tree(&root);
    let archive = directory.path().join("tree.tar");
    pack(&root, &archive, &["--sparse", "--format=pax"]);
    for spec in [dir_spec(&root), tar_spec(&archive)] {
        let built = common::build_with(&spec, &BuildOptions::default()).unwrap();
        assert!(built.report.content_length < 1 << 20, "{spec}: {}", built.report.content_length);
    }
}

#[test]
fn user_attributes_and_access_lists() {
    fn make(root: &Path) {
        let file = root.join("file");
        std::fs::write(&file, b"x").unwrap();
        std::fs::create_dir(root.join("dir")).unwrap();
        let run = |program: &str, arguments: &[&str], path: &Path| {
            let status = Command::new(program).args(arguments).arg(path).status().unwrap();
            assert!(status.success(), "{program} {arguments:?}");
        };
        run("setfattr", &["-n", "user.plain", "-v", "a value"], &file);
        run("setfattr", &["-n", "user.odd=name%", "-v", "0x000a3d00ff"], &file);
        run("setfattr", &["-n", "user.empty"], &file);
        run("setfacl", &["-m", "u:1000:r,g:12:rwx,m::rw"], &file);
        run("setfacl", &["-d", "-m", "u:7:rwx"], &root.join("dir"));
    }
    fn sorted(metadata: &mut Metadata) {
        no_access_times(metadata);
        let mut xattrs = metadata.xattrs.to_vec();
        xattrs.sort_by(|a, b| a.name.cmp(&b.name));
        metadata.xattrs = xattrs.into();
    }
    let model = compare(make, &["--format=pax", "--xattrs", "--xattrs-include=*", "--acls"], sorted);
    let names: Vec<_> = model[&b"file"[..]].metadata.xattrs.iter().map(|x| x.name.clone()).collect();
    assert_eq!(names, ["system.posix_acl_access", "user.empty", "user.odd=name%", "user.plain"]);
    assert_eq!(model[&b"dir"[..]].metadata.xattrs[0].name, "system.posix_acl_default");
}

#[test]
fn times_before_1970_keep_their_nanoseconds() {
    fn make(root: &Path) {
        std::fs::write(root.join("old"), b"x").unwrap();
        set_mtime(&root.join("old"), -1_000_001, 250_000_001);
        std::fs::write(root.join("older"), b"x").unwrap();
        set_mtime(&root.join("older"), -2_000_000_000, 0);
    }
    let model = compare(make, &["--format=pax"], no_access_times);
    let time = model[&b"old"[..]].metadata.mtime;
    assert_eq!((time.seconds, time.nanoseconds), (-1_000_001, 250_000_001));
    compare(make, &["--format=gnu"], whole_seconds);
}

#[test]
fn appended_members_replace_earlier_ones() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("file"), noise(1, 5000)).unwrap();
    std::fs::hard_link(root.join("file"), root.join("same")).unwrap();
    let archive = directory.path().join("tree.tar");
    let tar = |arguments: &[&str]| {
        let status = Command::new("tar").arg("-C").arg(&root).args(arguments).status().unwrap();
        assert!(status.success());
    };
    let archive_name = archive.to_str().unwrap();
    tar(&["-cf", archive_name, "file", "same"]);
    std::fs::write(directory.path().join("new"), noise(2, 6000)).unwrap();
    std::fs::rename(directory.path().join("new"), root.join("file")).unwrap();
    tar(&["-rf", archive_name, "file"]);
    let model = model_of(&tar_spec(&archive), &BuildOptions::default());
    assert!(model[&b"file"[..]].kind == Kind::File(noise(2, 6000)), "the later member wins");
    assert!(model[&b"same"[..]].kind == Kind::File(noise(1, 5000)), "the link keeps the file it was made to");
}

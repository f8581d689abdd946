//! `loam quota` on a btrfs that is no pool: what it prints, what it refuses, and how it exits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod quota_support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use loam_e2e::{Loam, Outcome};
use loam_sys::btrfs;
use quota_support::{Filesystem, must};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The command, and a filesystem to use it on.
struct Setup {
    loam: Loam,
    filesystem: Filesystem,
}

impl Setup {
    fn new() -> Self {
        Setup { loam: Loam::new(), filesystem: Filesystem::new(1, 1 << 30, &["-m", "single"]) }
    }

    fn enabled() -> Self {
        let setup = Setup::new();
        setup.quota(&["enable", "."]).ok();
        setup
    }

    /// `loam quota ARGUMENTS` in the filesystem's root. Each test is a process of its own, so the directory is too.
    fn quota(&self, arguments: &[&str]) -> Outcome {
        std::env::set_current_dir(self.filesystem.root()).unwrap();
        let outcome = self.loam.run([&["quota"], arguments].concat());
        std::env::set_current_dir("/").unwrap();
        outcome
    }

    fn json(&self, arguments: &[&str]) -> Value {
        self.quota(&[arguments, &["--json"]].concat()).json()
    }

    fn subvolume(&self, path: &str) -> String {
        let path = self.filesystem.path(path);
        btrfs::create_subvolume(File::open(path.parent().unwrap()).unwrap(), path.file_name().unwrap())
            .unwrap();
        self.filesystem.group(&path).to_string()
    }

    /// Writes a file of so many MiB; whether that went well.
    fn write(&self, path: &str, mib: u64) -> bool {
        let Ok(mut file) = File::create(self.filesystem.path(path)) else { return false };
        let chunk = vec![3; MIB as usize];
        (0..mib).all(|_| file.write_all(&chunk).and_then(|()| file.sync_data()).is_ok())
    }
}

fn group<'a>(shown: &'a Value, name: &str) -> &'a Value {
    let groups = shown["groups"].as_array().unwrap();
    groups.iter().find(|group| group["group"] == name).unwrap_or_else(|| panic!("no {name} in {shown}"))
}

#[test]
fn it_is_enabled_limited_shown_verified_and_disabled() {
    let setup = Setup::new();
    let a = setup.subvolume("a");
    let enabled = setup.json(&["enable", "."]);
    assert_eq!((&enabled["mode"], &enabled["changed"]), (&"simple".into(), &true.into()));
    assert!(enabled["enable_generation"].is_u64(), "{enabled}");
    assert!(setup.quota(&["enable", "a"]).ok().contains("already"), "twice is harmless");
    let limited = setup.json(&["limit", "a", "20MiB"]);
    assert_eq!((&limited["group"], &limited["limit_bytes"]), (&a.as_str().into(), &(20 * MIB).into()));
    assert!(setup.write("a/file", 10) && !setup.write("a/more", 20));
    fs::remove_file(setup.filesystem.path("a/more")).unwrap();
    let used = setup.json(&["show", "."]);
    let used = group(&used, &a);
    assert!((10 * MIB..11 * MIB).contains(&used["referenced_bytes"].as_u64().unwrap()), "{used}");
    assert_eq!((&used["path"], &used["limited_by"]), (&"a".into(), &a.as_str().into()));
    let text = setup.quota(&["show", "a"]).ok();
    assert!(text.contains("simple quotas") && text.contains("20 MiB") && text.contains("/a"), "{text}");
    // Relative, beyond 32 bits, below what is used, none.
    let relative = setup.json(&["limit", "a", "+5GiB"]);
    let (limit, used) = (relative["limit_bytes"].as_u64().unwrap(), relative["used_bytes"].as_u64().unwrap());
    assert_eq!(limit - used, 5 << 30);
    assert_eq!(setup.json(&["limit", "a", "4294967297"])["limit_bytes"], (1u64 << 32) + 1);
    let below = setup.quota(&["limit", "a", "1MiB"]);
    assert!(below.stderr.contains("writes fail until enough is deleted"), "{}", below.stderr);
    assert!(below.ok().contains("1 MiB"));
    assert!(!setup.write("a/not", 1));
    assert!(setup.json(&["limit", "a", "none", "--exclusive"])["limit_bytes"].is_null());
    // Disabling while over the limit.
    assert_eq!(setup.quota(&["verify", "."]).ok(), "", "silent when all is right");
    assert_eq!(setup.json(&["disable", "."])["changed"], true);
    assert!(setup.write("a/not", 20));
    assert!(setup.quota(&["disable", "."]).ok().contains("already"));
    let error = setup.quota(&["verify", "."]).fails();
    assert!(error.contains("not enabled") && error.contains("hint:"), "{error}");
}

#[test]
fn limits_hold_for_groups_and_for_what_is_nested() {
    let setup = Setup::enabled();
    let (a, b) = (setup.subvolume("a"), setup.subvolume("b"));
    assert!(setup.quota(&["group", "create", ".", "1/100", "--limit", "16MiB"]).ok().contains("16 MiB"));
    setup.quota(&["group", "add", ".", "1/100", "a", &b]).ok();
    setup.quota(&["group", "add", ".", "1/100", "a"]).ok();
    assert!(setup.write("a/file", 8) && !setup.write("b/file", 16));
    let tree = setup.quota(&["show", "."]).ok();
    let lines: Vec<&str> = tree.lines().skip(2).collect();
    assert!(lines[0].starts_with("1/100") && lines[1].starts_with(&format!("  {a}")), "{tree}");
    assert!(lines[2].contains("(1/100)"), "the limit that is next to be reached: {tree}");
    assert!(setup.quota(&["group", "rm", ".", "1/100"]).fails().contains("in use"));
    assert!(setup.quota(&["group", "create", ".", "1/100"]).fails().contains("already"));
    setup.quota(&["group", "remove", ".", "1/100", &a, "b"]).ok();
    assert!(setup.write("b/file", 32));
    setup.quota(&["group", "rm", ".", "1/100"]).ok();

    // A limit on a subvolume alone is left behind in one that is made inside; with --nested it is not.
    setup.subvolume("loose");
    setup.quota(&["limit", "loose", "4MiB"]).ok();
    setup.subvolume("loose/inner");
    assert!(setup.write("loose/inner/file", 12));
    let held = setup.subvolume("held");
    let around = held.replacen("0/", "1/", 1);
    assert_eq!(setup.json(&["limit", "held", "4MiB", "--nested"])["group"], around.as_str());
    setup.subvolume("held/inner");
    assert!(!setup.write("held/inner/file", 12));
    // Later ones are for the group around it.
    assert_eq!(setup.json(&["limit", "held", "40MiB"])["group"], around.as_str());
    assert!(setup.write("held/inner/file", 12));
    assert_eq!(setup.quota(&["verify", "."]).ok(), "");
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let mut setup = Setup::new();
    setup.subvolume("a");
    fs::create_dir(setup.filesystem.path("a/directory")).unwrap();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let elsewhere = elsewhere.path().to_str().unwrap().to_owned();
    for arguments in [
        &["enable", &elsewhere][..],
        &["disable", &elsewhere],
        &["show", &elsewhere],
        &["limit", &elsewhere, "1GiB"],
        &["verify", &elsewhere],
    ] {
        assert!(setup.quota(arguments).fails().contains("not on btrfs"), "{arguments:?}");
    }
    assert!(setup.quota(&["show", "nothing"]).fails().contains("No such file"));
    let off = setup.quota(&["limit", "a", "1GiB"]).fails();
    assert!(off.contains("not enabled") && off.contains("hint: loam quota enable a"), "{off}");
    // Another mode is on.
    setup.quota(&["enable", ".", "--full"]).ok();
    let error = setup.quota(&["enable", "."]).fails();
    assert!(error.contains("full qgroups are enabled") && error.contains("loam quota disable"), "{error}");
    assert!(setup.quota(&["show", "."]).ok().contains("EXCLUSIVE"));
    assert!(setup.quota(&["verify", "."]).fails().contains("only simple quotas"));
    setup.quota(&["disable", "."]).ok();
    setup.quota(&["enable", "."]).ok();

    let error = setup.quota(&["limit", "a/directory", "1GiB"]).fails();
    assert!(error.contains("not the root of a subvolume") && error.contains("subvolume /a"), "{error}");
    for wrong in ["8EiB", "2GB", "1.5G", "", "++1", "99999999999999999999"] {
        let outcome = setup.quota(&["limit", "a", wrong]);
        assert_eq!(outcome.status.code(), Some(2), "{wrong:?}");
        outcome.fails();
    }
    assert!(setup.quota(&["limit", ".", "1GiB", "--group", "1/5"]).fails().contains("no quota group 1/5"));
    assert_eq!(setup.quota(&["limit", ".", "1GiB", "--group", "five"]).status.code(), Some(2));
    assert!(setup.quota(&["group", "create", ".", "0/999"]).fails().contains("level 0"));
    assert!(setup.quota(&["group", "add", ".", "1/5", "a"]).fails().contains("no quota group 1/5"));
    assert!(setup.quota(&["verify", ".", "--explain", "1/5"]).fails().contains("1/5"));

    setup.filesystem.unmount();
    setup.filesystem.mount("ro");
    for arguments in [&["limit", "a", "1GiB"][..], &["disable", "."], &["group", "create", ".", "1/5"]] {
        let error = setup.quota(arguments).fails();
        assert!(error.contains("read-only") && error.contains("remount"), "{arguments:?}: {error}");
    }
    setup.quota(&["show", "."]).ok();
    assert_eq!(setup.quota(&["verify", "."]).ok(), "");
}

#[test]
fn the_original_is_gone_and_a_copy_keeps_its_charge() {
    let setup = Setup::enabled();
    let (alice, _) = (setup.subvolume("alice"), setup.subvolume("bob"));
    assert!(setup.write("alice/film", 32));
    let path = |name: &str| setup.filesystem.path(name);
    must(Command::new("cp").arg("--reflink=always").arg(path("alice/film")).arg(path("bob/copy")));
    fs::remove_file(path("alice/film")).unwrap();
    let text = setup.quota(&["verify", ".", "--explain", "alice"]).ok();
    for part in ["group ", "32 MiB", "others alone", "/bob/copy"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let explained = setup.json(&["verify", ".", "--explain", &alice]);
    assert_eq!(explained["kept_by_others_bytes"], 32 * MIB);
    assert_eq!(explained["extents"][0]["references"][0]["path"], "copy");
    assert!(!explained["advice"].as_array().unwrap().is_empty(), "{explained}");
    // What it says to do, done.
    must(Command::new("cp").arg("--reflink=never").arg(path("bob/copy")).arg(path("bob/own")));
    fs::rename(path("bob/own"), path("bob/copy")).unwrap();
    setup.filesystem.sync();
    assert_eq!(setup.json(&["verify", ".", "--explain", &alice])["data_bytes"], 0);
}

#[test]
fn what_is_wrong_is_said_and_the_exit_code_is_one() {
    let mut setup = Setup::enabled();
    setup.subvolume("a");
    assert!(setup.write("a/file", 4));
    setup.filesystem.unmount();
    let image = setup.filesystem.image(0);
    let quota_verify = |loam: &Loam, image: &Path| loam.run(["quota", "verify", image.to_str().unwrap()]);
    assert_eq!(quota_verify(&setup.loam, &image).ok(), "");
    for (offset, _) in quota_blocks(&image) {
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[0xff], offset + 2000).unwrap();
    }
    let outcome = quota_verify(&setup.loam, &image);
    assert_eq!(outcome.status.code(), Some(1), "{outcome:?}");
    assert!(!outcome.stdout.is_empty() || outcome.stderr.contains("loam: "), "{outcome:?}");
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    setup.loam.run(["quota", "verify", "/dev/null"]).fails();
    setup.loam.run(["quota", "verify", "/etc/passwd"]).fails();
    setup.loam.run(["quota", "verify", "/nonexistent"]).fails();
}

/// Where the blocks of the quota tree lie in an image, and of which transaction each is: all, as old ones do no harm.
fn quota_blocks(image: &Path) -> Vec<(u64, u64)> {
    const QUOTA_TREE: u64 = 8;
    let file = File::open(image).unwrap();
    let length = file.metadata().unwrap().len();
    let word = |block: &[u8], at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
    let mut superblock = [0; 64];
    file.read_exact_at(&mut superblock, 64 << 10).unwrap();
    let mut header = [0; 104];
    let mut found = Vec::new();
    for offset in (0..length - 16384).step_by(16384) {
        file.read_exact_at(&mut header, offset).unwrap();
        // struct btrfs_header: csum[32], fsid[16], bytenr, flags, chunk_tree_uuid[16], generation, owner.
        if header[32..48] == superblock[32..48] && word(&header, 88) == QUOTA_TREE {
            found.push((offset, word(&header, 80)));
        }
    }
    assert!(!found.is_empty(), "an image with quotas has a quota tree");
    found
}

#[test]
fn subvolumes_that_come_and_go_do_not_disturb_verification() {
    let setup = Setup::enabled();
    setup.subvolume("stays");
    assert!(setup.write("stays/file", 2));
    let done = AtomicBool::new(false);
    let filesystem = &setup.filesystem;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                btrfs::create_subvolume(filesystem.open(""), "comes").unwrap();
                fs::write(filesystem.path("comes/file"), vec![1; 1 << 20]).unwrap();
                btrfs::delete_subvolume(filesystem.open(""), "comes").unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        for _ in 0..8 {
            let outcome = setup.quota(&["verify", "."]);
            match outcome.status.code() {
                Some(0) => assert_eq!(outcome.stdout, ""),
                _ => assert!(outcome.fails().contains("attempts")),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    setup.quota(&["verify", "."]).ok();
}

#[test]
fn help_teaches() {
    let loam = Loam::new();
    let help = loam.run(["quota", "--help"]).ok();
    for part in ["Examples:", "loam quota limit", "+5GiB", "1/100", "--explain", "6.7"] {
        assert!(help.contains(part), "{part} in {help}");
    }
    for (command, part) in
        [("limit", "--nested"), ("verify", "Exit code 0"), ("enable", "--full"), ("group", "Add")]
    {
        let help = loam.run(["quota", command, "--help"]).ok().to_lowercase();
        assert!(help.contains(&part.to_lowercase()), "{command}: {part} in {help}");
    }
    assert_eq!(loam.run(["quota", "limit", "x"]).status.code(), Some(2));
}

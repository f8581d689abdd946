//! `loam mount` and `umount`: one image at one place, without a pool.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use loam_e2e::{FileServer, Loam, compare, drop_page_cache, read_direct, tarball, wait_until};

/// Bytes of the file that shows whether data was fetched.
const LARGE: usize = 8 << 20;

/// A served image with one of everything and a large file.
fn published(loam: &Loam, server: &FileServer) -> (String, PathBuf) {
    let tree = loam.path("tree");
    tarball::everything(&tree);
    fs::write(tree.join("large"), tarball::noise(7, LARGE)).unwrap();
    (loam.publish(server, &tree, "image"), tree)
}

/// The pools that `loam mount` made for its mounts.
fn pools_of_mounts(loam: &Loam) -> Vec<PathBuf> {
    let entries = fs::read_dir(loam.pool().join("mounts")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.join("pool.toml").exists()).collect()
}

#[test]
fn an_image_is_there_whole_before_its_data_has_arrived() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, _) = published(&loam, &server);
    let unpacked = loam.path("unpacked");
    tarball::unpack(&loam.path("image.tar"), &unpacked);
    let mounted = loam.mount_image(&source, "mnt");
    assert!(server.counters().bytes < LARGE as u64 / 4, "mounting fetched {:?}", server.counters());
    let report = compare::trees(&unpacked, &mounted, &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
    assert!(server.log().iter().all(|request| request.range.is_some() || request.name.ends_with(".loam")));
}

#[test]
fn a_mount_is_writable_and_forgets_unless_local_keeps() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, _) = published(&loam, &server);
    let target = loam.mount_image(&source, "mnt");
    fs::write(target.join("written"), "here").unwrap();
    let large = File::options().write(true).open(target.join("large")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&large, b"overwritten", 5_000_001).unwrap();
    large.sync_all().unwrap();
    drop(large);
    let mut expected = tarball::noise(7, LARGE);
    expected[5_000_001..5_000_012].copy_from_slice(b"overwritten");
    assert!(read_direct(&target.join("large")).unwrap() == expected);
    let text = target.display().to_string();
    loam.run(["umount", &text]).ok();
    loam.run(["mount", &source, &text]).ok();
    assert!(!target.join("written").exists());
    assert!(read_direct(&target.join("large")).unwrap() == tarball::noise(7, LARGE));
    loam.run(["umount", &text]).ok();
    let local = loam.path("kept.img").display().to_string();
    for round in 0..2 {
        loam.run(["mount", &source, &text, "--local", &local]).ok();
        assert_eq!(target.join("kept").exists(), round == 1);
        fs::write(target.join("kept"), "here").unwrap();
        loam.run(["umount", &text]).ok();
    }
}

#[test]
fn mount_refuses_what_cannot_work_and_says_why() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, tree) = published(&loam, &server);
    let missing = format!("tar:{}", server.url("missing.tar"));
    let (target, nowhere) = (loam.path("target"), loam.path("nowhere").display().to_string());
    fs::create_dir(&target).unwrap();
    let text = target.display().to_string();
    assert!(loam.run(["mount", &missing, &text]).fails().contains("missing.tar"));
    loam.run(["mount", &source, &nowhere]).fails();
    loam.run(["mount", "tar:/does/not/exist.tar", &text]).fails();
    loam.run(["mount", "gopher:what", &text]).fails();
    loam.run(["umount", &text]).fails();
    loam.run(["umount", &tree.display().to_string()]).fails();
    assert!(pools_of_mounts(&loam).is_empty(), "failed mounts left {:?}", pools_of_mounts(&loam));
}

#[test]
fn a_second_mount_at_the_same_place_is_refused_and_elsewhere_is_its_own() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, _) = published(&loam, &server);
    let first = loam.mount_image(&source, "first");
    loam.run(["mount", &source, &first.display().to_string()]).fails();
    let second = loam.mount_image(&source, "second");
    fs::write(first.join("only-here"), "").unwrap();
    assert!(!second.join("only-here").exists());
    assert!(read_direct(&second.join("large")).unwrap() == tarball::noise(7, LARGE));
}

#[test]
fn a_busy_umount_says_who_and_changes_nothing() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, _) = published(&loam, &server);
    let target = loam.mount_image(&source, "mnt");
    let open = File::open(target.join("large")).unwrap();
    let text = target.display().to_string();
    let why = loam.run(["umount", &text]).fails();
    assert!(why.contains(&std::process::id().to_string()), "umount does not say who: {why}");
    assert!(read_direct(&target.join("large")).unwrap() == tarball::noise(7, LARGE));
    drop(open);
    loam.run(["umount", &text]).ok();
    assert!(!target.join("large").exists());
}

#[test]
fn a_killed_daemon_is_followed_by_another_and_readers_see_no_error() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let (source, _) = published(&loam, &server);
    let target = loam.mount_image(&source, "mnt");
    let pool = pools_of_mounts(&loam).pop().expect("the mount has a pool of its own");
    let pool = pool.display().to_string();
    let pid = || loam.run(["--pool", &pool, "status", "--json"]).json()["daemon"]["pid"].as_i64();
    for _ in 0..3 {
        let before = pid().expect("a daemon serves the mount");
        let process = rustix::process::Pid::from_raw(i32::try_from(before).unwrap()).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        assert!(read_direct(&target.join("large")).unwrap() == tarball::noise(7, LARGE));
        wait_until("another daemon", Duration::from_secs(5), || pid().is_some_and(|pid| pid != before));
    }
}

#[test]
fn a_local_tar_without_an_index_is_read_once_and_mounts_too() {
    let loam = Loam::new();
    let tree = loam.path("tree");
    tarball::everything(&tree);
    let (tar, unpacked) = (loam.path("image.tar"), loam.path("unpacked"));
    tarball::pack(&tree, &tar);
    tarball::unpack(&tar, &unpacked);
    let mounted = loam.mount_image(&format!("tar:{}", tar.display()), "mnt");
    let report = compare::trees(&unpacked, &mounted, &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
}

#[test]
fn a_program_of_the_image_runs_in_it() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    let mounted = loam.mount_image(&source, "mnt");
    let mode = fs::metadata(mounted.join("bin/busybox")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
    let output =
        tarball::must(std::process::Command::new("chroot").arg(&mounted).args(["sh", "-c", "echo $((6*7))"]));
    assert_eq!(output, "42");
    drop_page_cache();
    assert!(fs::read(mounted.join("data/large")).unwrap() == tarball::noise(8 << 20, 8 << 20));
}

//! A pool's virtual device, an image's, and one file of a pool, by NBD; and exports as the content of a pool.

mod nbd_serving;
mod seed_support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use loam_block::PatternDevice;
use loam_e2e::{FileServer, Loam, compare, drop_page_cache, tarball};
use nbd_serving::{Serving, extents, read_export, text, unix};
use rustix::process::Signal;
use seed_support::{Loop, Mount, must};
use serde_json::Value;

/// Where the address space begins on a virtual device.
const VIRTUAL_BASE: u64 = 1 << 40;

/// A pool with one image of a few megabytes; what it was packed from is at `root`.
fn with_image() -> (Loam, FileServer) {
    let (loam, server) = (Loam::up(), FileServer::start());
    let root = loam.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("large"), tarball::noise(11, 3_000_000)).unwrap();
    fs::write(root.join("small"), "small").unwrap();
    let source = loam.publish(&server, &root, "image");
    loam.run(["add", "image", &source]).ok();
    (loam, server)
}

fn lazy_bytes(map: &Value) -> u64 {
    let rows = map["extents"].as_array().unwrap().iter();
    rows.filter(|row| row["local"] == false).map(|row| row["length"].as_u64().unwrap()).sum()
}

#[test]
fn a_pool_is_a_device_while_it_is_up_and_while_it_is_down() {
    let (loam, _server) = with_image();
    let socket = loam.pool().join("run/nbd.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let info = loam.run(["info", "pool:", "--json"]).json();
    assert_eq!(info["size"], VIRTUAL_BASE + (4 << 60));
    assert_eq!((&info["read_only"], &info["capabilities"]["lazy"]), (&true.into(), &true.into()), "{info}");

    let before = lazy_bytes(&loam.run(["map", "pool:", "--locality", "--json"]).json());
    assert!(before >= 3_000_000, "{before}");
    assert!(fs::read(loam.path_of("image").join("large")).unwrap() == tarball::noise(11, 3_000_000));
    let after = lazy_bytes(&loam.run(["map", "pool:", "--locality", "--json"]).json());
    assert!(after < before / 4, "{before} bytes were lazy, now {after} are");
    let superblock = read_export(&uri, 65536, 4096).unwrap();
    let content = read_export(&uri, VIRTUAL_BASE, 65536).unwrap();
    assert!(read_export(&uri, VIRTUAL_BASE + 5, 10).unwrap() == content[5..15], "bytes, not blocks");
    assert!(read_export(&uri, VIRTUAL_BASE + (1 << 50), 4096).unwrap_err().contains("Io"), "unmapped");
    let pid = loam.daemon_pid();
    loam.kill_daemon();
    assert_eq!(loam.run(["info", "pool:", "--json"]).json()["size"], info["size"]);
    assert_ne!(loam.daemon_pid(), pid, "its successor serves it");

    loam.run(["down"]).ok();
    assert!(!socket.exists());
    let down = loam.run(["map", "pool:", "--locality", "--json"]).json();
    assert_eq!(lazy_bytes(&down), after);
    assert_eq!(extents(&down)[1], (65536, 4096, "data".to_owned()), "the superblock");
    let own = loam.path("s");
    let mut serving = Serving::start(&loam, ["pool:", "--nbd", &unix(&own)]);
    assert!(read_export(serving.uri(), 65536, 4096).unwrap() == superblock);
    assert!(read_export(serving.uri(), VIRTUAL_BASE, 65536).unwrap() == content);
    assert!(read_export(serving.uri(), VIRTUAL_BASE + 4095, 2).unwrap() == content[4095..4097]);
    let kept_away = loam.run(["up"]).fails();
    assert!(kept_away.contains("open"), "{kept_away}");
    serving.signal(Signal::TERM);
    serving.ended();
    loam.run(["up"]).ok();
    loam.run(["check"]).ok();
}

#[test]
fn a_pool_that_is_up_is_served_on_to_others() {
    let (loam, _server) = with_image();
    let serving = Serving::start(&loam, ["pool:", "--nbd", "tcp:127.0.0.1:0"]);
    let map = loam.run(["map", serving.uri(), "--locality", "--json"]).json();
    assert!(lazy_bytes(&map) >= 3_000_000, "locality goes through two servers: {map}");
    assert!(read_export(serving.uri(), 65536, 4096).unwrap()[64..72] == *b"_BHRfS_M");
    let refused = loam.run(["copy", "pattern:1MiB", "pool:"]).fails();
    assert!(refused.contains("read-only"), "{refused}");
}

#[test]
fn one_file_of_a_pool_is_served_lazily_and_copied_out() {
    let (loam, _server) = with_image();
    let file = loam.path_of("image").join("large");
    let fetched = || loam.status()["cache"]["fetched_bytes"].as_u64().unwrap();
    let before = fetched();
    let serving = Serving::start(&loam, [&text(&file), "--readonly", "--nbd", "tcp:127.0.0.1:0"]);
    assert_eq!(fetched(), before, "serving alone fetches nothing");
    let out = loam.path("out");
    loam.run(["copy", serving.uri(), &text(&out), "--create", "--verify"]).ok();
    assert!(fs::read(&out).unwrap() == tarball::noise(11, 3_000_000));
    assert!(fetched() >= before + 3_000_000);
}

/// What `loam seed make --index` and `index:` make of one index: a whole machine's disk.
#[test]
fn an_image_without_a_pool_is_the_other_half_of_any_local_device() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "image");
    let index = loam.path("image.tar.loam");
    let device =
        format!("index:{}?source={}&cache={}", index.display(), source, loam.path("cache").display());
    let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
    let seeds = ["a", "b"].map(|name| {
        let (made, local) =
            (tmpfs.path().join(format!("virtual-{name}")), tmpfs.path().join(format!("local-{name}")));
        let arguments = ["seed", "make", "--local-size", "1GiB", "--index"];
        loam.run(arguments.iter().map(ToString::to_string).chain([text(&index), text(&made), text(&local)]))
            .ok();
        (made, local)
    });
    let serving = Serving::start(&loam, [&device, "--nbd", &unix(&loam.path("s"))]);
    let size = loam.run(["info", serving.uri(), "--json"]).json()["size"].as_u64().unwrap();
    let served = tmpfs.path().join("served");
    let file = File::create(&served).unwrap();
    file.set_len(size).unwrap();
    let prefix = read_export(serving.uri(), 0, 1 << 20).unwrap();
    for (made, _) in &seeds {
        assert_eq!(fs::metadata(made).unwrap().len(), size);
        let mut bytes = vec![0; 1 << 20];
        File::open(made).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == prefix, "{}: the same superblock", made.display());
    }
    file.write_all_at(&prefix, 0).unwrap();
    let map = loam.run(["map", serving.uri(), "--locality", "--json"]).json();
    let content: u64 = lazy_bytes(&map);
    assert!(content > 300_000, "{map}");
    let bytes = read_export(serving.uri(), VIRTUAL_BASE, content as usize).unwrap();
    file.write_all_at(&bytes, VIRTUAL_BASE).unwrap();
    assert_eq!(lazy_bytes(&loam.run(["map", serving.uri(), "--locality", "--json"]).json()), 0);
    drop(file);

    let virtual_device = Loop::attach(&served);
    for (_, local) in &seeds {
        let local = Loop::attach(local);
        must(Command::new("btrfs").args(["check", "--readonly"]).arg(&local.0));
        let point = loam.path("mnt");
        fs::create_dir_all(&point).unwrap();
        let options = format!("subvol=image,device={}", virtual_device.0.display());
        must(Command::new("mount").args(["-t", "btrfs", "-o", &options]).arg(&local.0).arg(&point));
        let mount = Mount(point);
        let report = compare::trees(&root, &mount.0, &[]).unwrap();
        assert!(report.differences.is_empty(), "{:#?}", report.differences);
        fs::write(mount.0.join("written"), "here").unwrap();
    }
    let second = loam.run(["info", &device]).fails();
    assert!(second.contains("another process") && second.contains("cache=DIR"), "{second}");
}

#[test]
fn an_index_is_served_with_another_size_a_temporary_cache_and_by_url() {
    let (loam, server) = (Loam::new(), FileServer::start());
    let root = loam.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("large"), tarball::noise(5, 1_000_000)).unwrap();
    loam.publish(&server, &root, "image");
    let device = format!("index:{}?virtual-size=1GiB", server.url("image.tar.loam"));
    let temporary = loam.path("tmp");
    fs::create_dir(&temporary).unwrap();
    let mut info = loam.command(["map", &device, "--locality", "--json"]);
    let map: Value =
        serde_json::from_slice(&info.env("TMPDIR", &temporary).output().unwrap().stdout).unwrap();
    let end = extents(&map).last().map(|(offset, length, _)| offset + length);
    assert_eq!(end, Some(VIRTUAL_BASE + (1 << 30)));
    assert!((1_000_000..1_100_000).contains(&lazy_bytes(&map)), "{map}");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "the cache went with the device");
    let (made, local) = (loam.path("v"), loam.path("l"));
    let arguments = ["seed", "make", "--virtual-size", "2GiB", "--local-size", "1GiB", "--index"];
    let paths = [text(&loam.path("image.tar.loam")), text(&made), text(&local)];
    loam.run(arguments.iter().map(ToString::to_string).chain(paths)).ok();
    let device = format!("index:{}?virtual={}", server.url("image.tar.loam"), made.display());
    let info = loam.run(["info", &device, "--json"]).json();
    assert_eq!(info["size"], VIRTUAL_BASE + (2 << 30));
}

#[test]
fn an_export_is_a_source_whose_bytes_never_change() {
    let loam = Loam::up();
    let (socket, disk) = (loam.path("s"), loam.path("disk"));
    let size = (1 << 20) + 8192;
    let mut bytes = vec![0; size];
    for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(number as u64 * 8).to_be_bytes());
    }
    fs::write(&disk, &bytes).unwrap();
    let arguments = [text(&disk), "--nbd".to_owned(), unix(&socket)];
    let mut serving = Serving::start(&loam, &arguments);
    let added = loam.run(["range", "add", serving.uri(), "--json"]).json();
    assert_eq!((&added["length"], &added["kind"]), (&(size as u64).into(), &"bytes".into()), "{added}");
    assert_eq!(added["source"], serving.uri());
    let address = added["address"].as_u64().unwrap();
    let clone = loam.mount().join("clone");
    loam.run(["range", "clone", &address.to_string(), &size.to_string(), &text(&clone)]).ok();
    let half = read_at(&clone, 0, 512 << 10).unwrap();
    PatternDevice::verify(0, &half).unwrap();

    // Gone, and back with other bytes: what was seen is held to what it was.
    serving.signal(Signal::KILL);
    serving.ended();
    assert!(read_at(&clone, 0, 512 << 10).unwrap() == half, "what is local needs no server");
    loam.run(["evict"]).ok();
    bytes[100] ^= 1;
    fs::write(&disk, &bytes).unwrap();
    let _serving = Serving::start(&loam, &arguments);
    drop_page_cache();
    read_at(&clone, 0, 4096).expect_err("other bytes than before");
    assert!(loam.errors() > 0);
    let rest = read_at(&clone, 1 << 20, 8192).unwrap();
    PatternDevice::verify(1 << 20, &rest).unwrap();
    let status = loam.run(["range", "ls"]).ok();
    assert!(status.contains("nbd+unix://"), "{status}");
    let refused = loam.run(["range", "add", "nbd+unix:///?socket=/nonexistent"]).fails();
    assert!(refused.contains("/nonexistent"), "{refused}");
}

fn read_at(path: &Path, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    File::open(path)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

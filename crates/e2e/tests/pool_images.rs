//! Images and containers: add, create, run, ls, show, rm, pin, evict, check, range; and what they print as JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use loam_e2e::{FileServer, Loam, compare, drop_page_cache, read_direct, tarball};
use serde_json::Value;

fn busybox(loam: &Loam, server: &FileServer) -> String {
    let root = loam.path("root");
    tarball::busybox_root(&root);
    loam.publish(server, &root, "busybox")
}

#[track_caller]
fn assert_fields(what: &str, value: &Value, integers: &[&str], strings: &[&str]) {
    for name in integers {
        assert!(value[name].is_u64(), "{what}.{name} is no integer: {value}");
    }
    for name in strings {
        assert!(value[name].is_string(), "{what}.{name} is no string: {value}");
    }
}

#[test]
fn a_container_equals_what_gnu_tar_extracts() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let (tree, unpacked) = (loam.path("tree"), loam.path("unpacked"));
    tarball::everything(&tree);
    let source = loam.publish(&server, &tree, "everything");
    tarball::unpack(&loam.path("everything.tar"), &unpacked);
    let added = loam.run(["add", "everything", &source, "--json"]).json();
    assert_fields("add", &added, &["files", "bytes", "wire_bytes"], &["name", "source", "path"]);
    let path = PathBuf::from(loam.run(["create", "web", "everything"]).ok());
    let report = compare::trees(&unpacked, &path, &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
    drop_page_cache();
    let report = compare::trees(&unpacked, &loam.path_of("everything"), &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
    loam.run(["check", "--read-data"]).ok();
}

#[test]
fn other_tar_formats_and_compressions_are_as_faithful() {
    let loam = Loam::up();
    let tree = loam.path("tree");
    tarball::everything(&tree);
    // GNU and v7 carry whole seconds and no xattrs: what tar extracts is what counts.
    let variants = [
        ("gnu", "--format=gnu --sparse", ""),
        ("pax-old-sparse", "--format=pax --sparse-version=0.1 --sparse --xattrs --acls", ""),
        ("pax-gz", "--format=pax --xattrs --acls", "gzip"),
        ("pax-xz", "--format=pax", "xz"),
        ("gnu-bz2", "--format=gnu", "bzip2"),
        ("pax-zst", "--format=pax", "zstd"),
    ];
    for (name, options, compressor) in variants {
        let tar = loam.path(format!("{name}.tar"));
        let script = format!("tar --numeric-owner {options} -cf \"$0\" -C \"$1\" .");
        tarball::must(Command::new("sh").args(["-euc", &script]).arg(&tar).arg(&tree));
        let unpacked = loam.path(format!("{name}-unpacked"));
        tarball::unpack(&tar, &unpacked);
        let source = match compressor {
            "" => tar,
            program => {
                let compressed = PathBuf::from(format!("{}.{program}", tar.display()));
                let file = fs::File::create(&compressed).unwrap();
                assert!(Command::new(program).arg("-c").arg(&tar).stdout(file).status().unwrap().success());
                compressed
            }
        };
        loam.run(["add", name, &format!("tar:{}", source.display())]).ok();
        let report = compare::trees(&unpacked, &loam.path_of(name), &[]).unwrap();
        assert_eq!(report.differences, Vec::<String>::new(), "{name}");
        let lazy = &loam.run(["show", name, "--json"]).json()["lazy"];
        let expected = compressor.is_empty();
        assert!(lazy == &Value::Bool(true) || (!expected && lazy.is_string()), "{name}: lazy is {lazy}");
    }
}

#[test]
fn a_directory_is_an_image_too() {
    let loam = Loam::up();
    let tree = loam.path("tree");
    tarball::everything(&tree);
    loam.run(["add", "tree", &format!("dir:{}", tree.display())]).ok();
    let report = compare::trees(&tree, &loam.path_of("tree"), &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
}

#[test]
fn adding_by_the_index_fetches_nothing_else() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    let index = fs::metadata(loam.path("busybox.tar.loam")).unwrap().len();
    let before = server.counters().bytes;
    loam.run(["add", "busybox", &source]).ok();
    assert_eq!(server.counters().bytes - before, index);
    let image = loam.path_of("busybox");
    let before = server.counters().bytes;
    assert!(fs::read(image.join("data/small")).unwrap() == tarball::noise(100, 100));
    let fetched = server.counters().bytes - before;
    assert!(fetched < 4 << 20, "reading 100 bytes fetched {fetched}");
}

#[test]
fn adding_without_an_index_reads_the_tar_once_says_so_and_keeps_it() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    server.remove("busybox.tar.loam");
    let outcome = loam.run(["add", "busybox", &source]);
    assert!(outcome.stderr.contains("index"), "nothing said about the missing index: {:?}", outcome.stderr);
    outcome.ok();
    let before = server.counters();
    assert!(before.bytes <= fs::metadata(loam.path("busybox.tar")).unwrap().len() + 4096, "{before:?}");
    assert!(
        read_direct(&loam.path_of("busybox").join("data/large")).unwrap() == tarball::noise(8 << 20, 8 << 20)
    );
    assert_eq!(server.counters().bytes, before.bytes, "what was read once was fetched again");
}

#[test]
fn run_gives_the_programs_output_and_code_and_removes_its_container() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    loam.run(["add", "busybox", &source]).ok();
    let output = loam.run(["run", "busybox", "--", "sh", "-c", "echo $((6*7)); touch /gone"]).ok();
    assert_eq!(output, "42");
    let outcome = loam.run(["run", "busybox", "--", "sh", "-c", "exit 7"]);
    assert_eq!(outcome.status.code(), Some(7), "{outcome:?}");
    assert_eq!(loam.status()["containers"].as_array().map(Vec::len), Some(0));
    loam.run(["run", "busybox", "--name", "kept", "--keep", "--", "touch", "/kept"]).ok();
    assert!(loam.path_of("kept").join("kept").exists());
    assert!(!loam.path_of("busybox").join("kept").exists(), "a container wrote to its image");
    assert!(!loam.path_of("kept").join("gone").exists(), "containers see each other");
    loam.run(["run", "nothing", "--", "true"]).fails();
}

#[test]
fn names_are_checked_and_images_and_containers_come_and_go() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    for name in ["", "..", "a/b", ".hidden", "-x", "a b", "ü", &"n".repeat(300)] {
        let outcome = loam.run(["add", "--", name, &source]);
        assert!(!outcome.status.success(), "the name {name:?} was taken");
    }
    loam.run(["add", "busybox", &source]).ok();
    loam.run(["add", "busybox", &source]).fails();
    loam.run(["create", "web", "busybox"]).ok();
    loam.run(["create", "web", "busybox"]).fails();
    loam.run(["create", "other", "nothing"]).fails();
    loam.run(["rm", "nothing"]).fails();
    let listed = loam.run(["ls", "--json"]).json();
    assert_eq!(listed["images"][0]["name"], "busybox");
    assert_eq!(listed["containers"][0]["name"], "web");
    let image = loam.path_of("busybox");
    assert!(fs::write(image.join("x"), "").is_err(), "an image is read-only");
    let web = loam.path_of("web");
    loam.run(["rm", "web"]).ok();
    loam.run(["rm", "busybox"]).ok();
    assert!(!web.exists() && !image.exists());
    let listed = loam.run(["ls", "--json"]).json();
    assert_eq!(
        (listed["images"].as_array(), listed["containers"].as_array()),
        (Some(&vec![]), Some(&vec![]))
    );
    loam.run(["add", "busybox", &source]).ok();
    assert!(fs::read(loam.path_of("busybox").join("data/small")).unwrap() == tarball::noise(100, 100));
}

#[test]
fn json_has_the_fields_that_were_promised() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    loam.run(["add", "busybox", &source]).ok();
    loam.run(["create", "web", "busybox"]).ok();
    let web = loam.path_of("web");
    fs::write(web.join("written"), tarball::noise(1, 1 << 20)).unwrap();
    tarball::shell(&web, "sync -f .");
    fs::read(web.join("data/medium")).unwrap();
    let status = loam.status();
    assert_fields("status", &status, &[], &["pool", "transport", "device", "mount"]);
    assert_fields("daemon", &status["daemon"], &["pid", "uptime_ns"], &[]);
    assert_fields("virtual", &status["virtual"], &["size", "ranges", "mapped_bytes"], &[]);
    let cache = ["bytes", "limit", "hits", "misses", "fetched_bytes", "bad_blocks"];
    assert_fields("cache", &status["cache"], &cache, &[]);
    assert!(status["errors"].is_object(), "{status}");
    assert_eq!(loam.errors(), 0, "{status}");
    assert_eq!(status["images"].as_array().map(Vec::len), Some(1));
    let container = &status["containers"][0];
    assert_fields("container", container, &["written_bytes"], &["name", "image", "path"]);
    let written = container["written_bytes"].as_u64().unwrap();
    assert!((1 << 20..4 << 20).contains(&written), "1 MiB was written: {container}");
    assert!(container.as_object().unwrap().contains_key("limit_bytes"), "{container}");
    for (name, kind) in [("busybox", "image"), ("web", "container")] {
        let shown = loam.run(["show", name, "--json"]).json();
        assert_fields("show", &shown, &["files", "bytes", "local_bytes"], &["kind", "source", "path"]);
        assert_eq!(shown["kind"], kind);
        assert_eq!(shown["lazy"], true);
    }
    assert!(status["cache"]["fetched_bytes"].as_u64() >= Some(300_000));
    assert!(status["virtual"]["mapped_bytes"].as_u64() >= Some(8 << 20));
}

#[test]
fn what_is_pinned_is_local_and_survives_eviction_and_what_is_not_is_fetched_again() {
    let (loam, mut server) = (Loam::up(), FileServer::start());
    let source = busybox(&loam, &server);
    loam.run(["add", "busybox", &source]).ok();
    let image = loam.path_of("busybox");
    loam.run(["pin", "busybox", "/data/large"]).ok();
    read_direct(&image.join("data/medium")).unwrap();
    loam.run(["evict"]).ok();
    server.stop();
    assert!(read_direct(&image.join("data/large")).unwrap() == tarball::noise(8 << 20, 8 << 20));
    server.resume();
    let before = server.counters().bytes;
    assert!(read_direct(&image.join("data/medium")).unwrap() == tarball::noise(300_000, 300_000));
    assert!(server.counters().bytes > before, "what was evicted was not fetched again");
    loam.run(["pin", "busybox"]).ok();
    server.stop();
    drop_page_cache();
    for entry in fs::read_dir(image.join("data")).unwrap() {
        read_direct(&entry.unwrap().path()).unwrap();
    }
    loam.run(["pin", "busybox", "/no/such/path"]).fails();
}

#[test]
fn a_range_is_cloned_by_address_and_reads_as_its_source() {
    let loam = Loam::up();
    let (data, bytes) = (loam.path("data"), tarball::noise(3, (1 << 20) + 17));
    fs::write(&data, &bytes).unwrap();
    let range = loam.run(["range", "add", &format!("file:{}", data.display()), "--json"]).json();
    assert_fields("range", &range, &["address", "length"], &[]);
    let (address, length) = (range["address"].as_u64().unwrap(), range["length"].as_u64().unwrap());
    assert_eq!((address % 4096, length % 4096), (0, 0));
    let listed = loam.run(["range", "ls", "--json"]).json();
    assert_eq!(listed["ranges"][0]["address"], address);
    let file = loam.mount().join("clone");
    let clone = |address: u64, length: u64, file: &Path| {
        loam.run(["range", "clone", &address.to_string(), &length.to_string(), &file.display().to_string()])
    };
    clone(address, length, &file).ok();
    let found = read_direct(&file).unwrap();
    assert!(found[..bytes.len()] == bytes && found[bytes.len()..].iter().all(|byte| *byte == 0));
    clone(address + 1, 4096, &loam.mount().join("unaligned")).fails();
    clone(address, length, &loam.path("outside-of-the-pool")).fails();
    let unmapped = loam.mount().join("unmapped");
    if clone(1 << 50, 4096, &unmapped).status.success() {
        assert_eq!(fs::read(&unmapped).unwrap_err().raw_os_error(), Some(5));
    }
    loam.run(["check"]).ok();
}

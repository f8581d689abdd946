//! Bad days of the world around a pool: the server, the disks, the tars.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use loam_e2e::disk::SmallDisk;
use loam_e2e::{FileServer, Loam, drop_page_cache, read_direct, tarball};

/// Bytes of the file that is read.
const LARGE: usize = 16 << 20;
const EIO: Option<i32> = Some(5);

/// A tar of one large file and a small one, served with its index, not yet added.
fn served(loam: &Loam, server: &FileServer, seed: u64) -> String {
    let tree = loam.path(format!("tree-{seed}"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("large"), tarball::noise(seed, LARGE)).unwrap();
    fs::write(tree.join("small"), tarball::noise(seed, 5000)).unwrap();
    loam.publish(server, &tree, &format!("image-{seed}"))
}

fn added(loam: &Loam, server: &FileServer, seed: u64) -> PathBuf {
    let source = served(loam, server, seed);
    let name = format!("image-{seed}");
    loam.run(["add", &name, &source]).ok();
    loam.path_of(&name)
}

/// The first `length` bytes from `offset`, past the page cache's read-ahead.
fn read_some(path: &Path, offset: usize, length: usize) -> io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset as u64)?;
    Ok(bytes)
}

/// Reads again and again until it works: a chunk that failed for good is left alone for a moment.
#[track_caller]
fn recovered(mut read: impl FnMut() -> io::Result<Vec<u8>>) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match read() {
            Ok(bytes) => return bytes,
            Err(error) => assert!(Instant::now() < deadline, "still {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_server_that_is_gone_for_a_moment_is_waited_for() {
    let (loam, mut server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 1);
    assert!(read_some(&image.join("large"), 0, 4096).unwrap() == tarball::noise(1, 4096));
    server.stop();
    let reader = std::thread::spawn({
        let path = image.join("large");
        move || read_some(&path, 10 << 20, 4096)
    });
    std::thread::sleep(Duration::from_millis(500));
    server.resume();
    let bytes = reader.join().unwrap().expect("the server was away for half a second only");
    assert!(bytes == tarball::noise(1, LARGE)[10 << 20..(10 << 20) + 4096]);
}

#[test]
fn a_server_that_stays_away_is_an_error_that_ends_and_nothing_breaks() {
    let (loam, mut server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 2);
    loam.run(["create", "web", "image-2"]).ok();
    let local = read_some(&image.join("small"), 0, 5000).unwrap();
    server.stop();
    let error = read_some(&image.join("large"), 8 << 20, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), EIO, "{error}");
    drop_page_cache();
    assert!(read_some(&image.join("small"), 0, 5000).unwrap() == local, "what is local needs no server");
    fs::write(loam.path_of("web").join("written"), "still writable").unwrap();
    assert!(loam.errors() > 0, "{}", loam.status());
    server.resume();
    assert!(recovered(|| read_direct(&image.join("large"))) == tarball::noise(2, LARGE));
}

#[test]
fn a_server_gone_in_the_middle_of_an_answer_costs_a_retry_and_no_more() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 3);
    for status in [500, 502, 503] {
        server.fail_next(2, status);
        let offset = usize::from(status - 500) << 20;
        let bytes = read_some(&image.join("large"), offset, 4096).unwrap();
        assert!(bytes == tarball::noise(3, LARGE)[offset..offset + 4096], "after {status}");
    }
}

#[test]
fn other_bytes_than_the_index_promises_are_an_error_and_never_data() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 4);
    let position = find(&fs::read(loam.path("image-4.tar")).unwrap(), &tarball::noise(4, 64));
    server.replace_silently("image-4.tar", |bytes| bytes[position + (6 << 20) + 100] ^= 1);
    let error = read_some(&image.join("large"), 6 << 20, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), EIO, "{error}");
    assert!(loam.errors() > 0, "{}", loam.status());
    // A whole chunk is refused, never more: what lies megabytes away is fine.
    assert!(
        read_some(&image.join("large"), 14 << 20, 4096).unwrap()
            == tarball::noise(4, LARGE)[14 << 20..][..4096]
    );
    server.replace_silently("image-4.tar", |bytes| bytes[position + (6 << 20) + 100] ^= 1);
    assert!(recovered(|| read_direct(&image.join("large"))) == tarball::noise(4, LARGE));
    loam.run(["check", "--read-data"]).ok();
}

#[test]
fn a_file_that_was_replaced_on_the_server_is_an_error_that_says_so() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 5);
    let original = fs::read(loam.path("image-5.tar")).unwrap();
    // The first answer is what later ones are held to.
    assert!(
        read_some(&image.join("large"), 12 << 20, 4096).unwrap()
            == tarball::noise(5, LARGE)[12 << 20..][..4096]
    );
    server.put("image-5.tar", tarball::noise(99, original.len()));
    let error = read_some(&image.join("large"), 1 << 20, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), EIO, "{error}");
    let status = loam.status();
    assert!(status["errors"]["changed"].as_u64() > Some(0), "{status}");
    let log = fs::read_to_string(loam.pool().join("run/daemon.log")).unwrap();
    assert!(
        log.contains("image-5.tar has changed") || log.contains("ETag"),
        "the log does not say so: {log}"
    );
    server.put("image-5.tar", original);
    assert!(recovered(|| read_direct(&image.join("large"))) == tarball::noise(5, LARGE));
}

#[test]
fn without_digests_known_in_advance_the_first_bytes_are_held_to() {
    let (loam, server) = (Loam::up(), FileServer::start());
    server.put_with_etag("blob", tarball::noise(6, LARGE), "same");
    let range = loam.run(["range", "add", &server.url("blob"), "--json"]).json();
    let file = loam.mount().join("blob");
    let (address, length) = (range["address"].to_string(), range["length"].to_string());
    loam.run(["range", "clone", &address, &length, &file.display().to_string()]).ok();
    assert!(read_some(&file, 0, 1 << 20).unwrap() == tarball::noise(6, 1 << 20));
    loam.run(["evict"]).ok();
    drop_page_cache();
    server.replace_silently("blob", |bytes| bytes[5] ^= 1);
    assert_eq!(read_some(&file, 0, 4096).unwrap_err().raw_os_error(), EIO);
    assert!(loam.errors() > 0);
    server.replace_silently("blob", |bytes| bytes[5] ^= 1);
    assert!(recovered(|| read_some(&file, 0, 1 << 20)) == tarball::noise(6, 1 << 20));
}

/// Where `needle` begins.
fn find(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).position(|window| window == needle).expect("the bytes are there")
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn a_corrupted_chunk_on_disk_is_found_dropped_and_fetched_again() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 7);
    let expected = tarball::noise(7, LARGE);
    assert!(read_direct(&image.join("large")).unwrap() == expected);
    let needle = &expected[5 << 20..(5 << 20) + 64];
    let mut corrupted = 0;
    for path in files_below(&loam.pool().join("cache")) {
        let content = fs::read(&path).unwrap();
        if let Some(position) = content.windows(64).position(|window| window == needle) {
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[content[position + 9] ^ 0x40], position as u64 + 9).unwrap();
            corrupted += 1;
        }
    }
    assert_eq!(corrupted, 1, "the cache keeps the block once, as it is");
    let before = server.counters().bytes;
    assert!(read_direct(&image.join("large")).unwrap() == expected);
    let status = loam.status();
    assert!(status["cache"]["bad_blocks"].as_u64() >= Some(1), "{status}");
    assert!(server.counters().bytes > before);
    loam.run(["check", "--read-data"]).ok();
}

#[test]
fn a_cache_whose_files_are_cut_short_is_fetched_again() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 8);
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(8, LARGE));
    loam.run(["down"]).ok();
    for path in files_below(&loam.pool().join("cache")) {
        let length = fs::metadata(&path).unwrap().len();
        fs::File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    }
    loam.run(["up"]).ok();
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(8, LARGE));
}

/// Moves a directory of the pool, which is down, to a small disk of its own.
fn on_small_disk(directory: &Path, bytes: u64) -> SmallDisk {
    let aside = directory.with_extension("aside");
    fs::create_dir_all(directory).unwrap();
    fs::rename(directory, &aside).unwrap();
    let disk = SmallDisk::mount(directory, bytes);
    tarball::shell(directory, &format!("cp -a {}/. .", aside.display()));
    fs::remove_dir_all(aside).unwrap();
    disk
}

#[test]
fn a_full_cache_disk_costs_speed_and_nothing_else() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 9);
    loam.run(["down"]).ok();
    let disk = on_small_disk(&loam.pool().join("cache"), 6 << 20);
    loam.run(["up"]).ok();
    for _ in 0..2 {
        drop_page_cache();
        assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(9, LARGE));
    }
    disk.resize(64 << 20);
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(9, LARGE));
    loam.run(["down"]).ok();
    drop(disk);
}

#[test]
fn a_full_map_disk_refuses_new_images_and_keeps_the_old() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = added(&loam, &server, 10);
    let source = served(&loam, &server, 11);
    loam.run(["down"]).ok();
    let disk = on_small_disk(&loam.pool().join("map"), 4 << 20);
    loam.run(["up"]).ok();
    let filler = disk.path().join("filler");
    let error = fs::write(&filler, vec![0; 8 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(28), "{error}");
    // The log's last page has room for some more records: fill that as well.
    let refused = (0..200).find_map(|round: u32| {
        let small = loam.path(format!("small-{round}"));
        fs::write(&small, round.to_string()).unwrap();
        let outcome = loam.run(["range", "add", &format!("file:{}", small.display())]);
        (!outcome.status.success()).then(|| outcome.fails())
    });
    assert!(refused.is_some_and(|why| why.contains("No space left")), "200 ranges were added to a full disk");
    loam.run(["add", "image-11", &source]).fails();
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(10, LARGE));
    fs::remove_file(&filler).unwrap();
    // The first error latched: a restart is asked for, and enough.
    loam.run(["down"]).ok();
    loam.run(["up"]).ok();
    loam.run(["add", "image-11", &source]).ok();
    assert!(read_direct(&loam.path_of("image-11").join("large")).unwrap() == tarball::noise(11, LARGE));
    loam.run(["check"]).ok();
    loam.run(["down"]).ok();
    drop(disk);
}

#[test]
fn a_full_local_device_refuses_writes_and_is_fine_when_something_was_deleted() {
    let (loam, server) = (Loam::new(), FileServer::start());
    loam.run(["init", "--local-size", "512MiB"]).ok();
    loam.run(["up"]).ok();
    let image = added(&loam, &server, 12);
    loam.run(["create", "web", "image-12"]).ok();
    let web = loam.path_of("web");
    let error = fs::write(web.join("too-large"), vec![0x55; 700 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(28), "{error}");
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(12, LARGE));
    fs::remove_file(web.join("too-large")).unwrap();
    tarball::shell(&web, "sync -f .");
    fs::write(web.join("small-enough"), vec![0x55; 10 << 20]).unwrap();
    loam.run(["down"]).ok();
    loam.run(["up"]).ok();
    assert_eq!(fs::metadata(loam.path_of("web").join("small-enough")).unwrap().len(), 10 << 20);
}

/// A tar with one member whose header's fields are set as they come.
fn member(name: &[u8], kind: tar::EntryType, link: &[u8], size: u64, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    {
        let fields = header.as_gnu_mut().unwrap();
        fields.name[..name.len()].copy_from_slice(name);
        fields.linkname[..link.len()].copy_from_slice(link);
    }
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn hostile_tars_reach_nothing_outside_and_leave_no_image() {
    use tar::EntryType as Kind;
    let loam = Loam::up();
    let victim = loam.path("victim");
    fs::create_dir(&victim).unwrap();
    let outside = victim.display().to_string();
    let through_link = [
        member(b"link", Kind::Symlink, outside.as_bytes(), 0, b""),
        member(b"link/written", Kind::Regular, b"", 5, b"owned"),
    ]
    .concat();
    let absolute = format!("{outside}/absolute");
    let end = vec![0; 1024];
    let tars = [
        ("dot-dot", member(b"../../../../../../../../tmp/loam-escape", Kind::Regular, b"", 5, b"owned")),
        ("absolute", member(absolute.as_bytes(), Kind::Regular, b"", 5, b"owned")),
        ("through-link", through_link),
        ("huge", member(b"huge", Kind::Regular, b"", 1 << 62, b"")),
        ("link-out", member(b"hard", Kind::Link, b"../../../../etc/passwd", 0, b"")),
        ("cut", member(b"cut", Kind::Regular, b"", 100_000, b"only this")),
        ("noise", tarball::noise(5, 100_000)),
    ];
    let pid = loam.daemon_pid();
    for (name, bytes) in tars {
        let path = loam.path(format!("{name}.tar"));
        fs::write(&path, [bytes, end.clone()].concat()).unwrap();
        let outcome = loam.run(["add", name, &format!("tar:{}", path.display())]);
        let listed = loam.run(["ls", "--json"]).json().to_string();
        if outcome.status.success() {
            assert!(!["huge", "cut", "noise"].contains(&name), "{name} was taken");
        } else {
            outcome.fails();
            assert!(!listed.contains(&format!("\"{name}\"")), "{name} failed and left an image: {listed}");
        }
    }
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
    assert!(!Path::new("/tmp/loam-escape").exists());
    assert_eq!(loam.daemon_pid(), pid, "a tar ended the daemon");
    loam.run(["check"]).ok();
}

//! `kill -9` of the daemon: under load, and at any point of `add`.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use loam_e2e::{BLOCK, FileServer, Loam, compare, tarball, wait_until};

/// Bytes of the file that is read under load.
const LARGE: usize = 64 << 20;
/// Readers at once: the depth at which the kernel's queue is kept.
const READERS: u64 = 64;
/// The longest time that a read may take while the daemon is replaced.
const OUTAGE_MAX: Duration = Duration::from_secs(1);

/// Kills while data is still being fetched, before those whose outages are measured.
const COLD_KILLS: u32 = 3;

/// How often the daemon is killed; the published figure is of 100 (`LOAM_E2E_KILLS=100`).
fn kills() -> u32 {
    std::env::var("LOAM_E2E_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// What the readers saw.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    reads: AtomicU64,
    errors: AtomicU64,
    wrong: AtomicU64,
    longest_us: AtomicU64,
}

/// Reads random blocks directly and compares each with what it has to be, until told to stop.
fn read_blocks(path: &Path, expected: &[u8], seed: u64, seen: &Seen) {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let file: File = OpenOptions::new().read(true).custom_flags(direct).open(path).unwrap();
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    let block = &mut buffer[start..start + BLOCK];
    let blocks = (expected.len() / BLOCK) as u64;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while !seen.stop.load(Ordering::Relaxed) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let offset = (state % blocks) * BLOCK as u64;
        let started = Instant::now();
        match file.read_exact_at(block, offset) {
            Ok(()) => {
                let position = usize::try_from(offset).unwrap();
                if *block != expected[position..position + BLOCK] {
                    seen.wrong.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(_) => {
                seen.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap();
        seen.longest_us.fetch_max(micros, Ordering::Relaxed);
        seen.reads.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn readers_see_no_error_and_no_wrong_byte_when_the_daemon_is_killed_again_and_again() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let (tree, expected) = (loam.path("tree"), tarball::noise(11, LARGE));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("large"), &expected).unwrap();
    let source = loam.publish(&server, &tree, "image");
    loam.run(["add", "image", &source]).ok();
    let path = loam.path_of("image").join("large");
    let seen = Seen::default();
    let mut outages = Vec::new();
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (path, expected, seen) = (&path, &expected, &seen);
            scope.spawn(move || read_blocks(path, expected, reader + 1, seen));
        }
        for kill in 0..kills() + COLD_KILLS {
            std::thread::sleep(Duration::from_millis(300));
            if kill == COLD_KILLS {
                // From here on, how long a read takes is how long the daemon was away, not what its source took.
                outages.clear();
                wait_until("another daemon", Duration::from_secs(10), || loam.run(["ls"]).status.success());
                loam.run(["pin", "image"]).ok();
            }
            seen.longest_us.store(0, Ordering::Relaxed);
            loam.kill_daemon();
            let before = seen.reads.load(Ordering::Relaxed);
            let enough = before + 20 * READERS;
            wait_until("reads go on", Duration::from_secs(30), || {
                seen.reads.load(Ordering::Relaxed) > enough
            });
            outages.push(Duration::from_micros(seen.longest_us.load(Ordering::Relaxed)));
        }
        seen.stop.store(true, Ordering::Relaxed);
    });
    outages.sort();
    let (reads, errors, wrong) = (seen.reads.into_inner(), seen.errors.into_inner(), seen.wrong.into_inner());
    eprintln!("{} kills, {reads} reads; longest read of each, sorted: {outages:?}", kills());
    assert_eq!((errors, wrong), (0, 0), "errors and wrong blocks of {reads} reads");
    assert!(outages.last().is_some_and(|longest| *longest < OUTAGE_MAX), "{outages:?}");
    loam.run(["check", "--read-data"]).ok();
}

/// Subvolumes of the pool's filesystem, as the kernel lists them.
fn subvolumes(loam: &Loam) -> usize {
    let mount = loam.mount().display().to_string();
    tarball::must(std::process::Command::new("btrfs").args(["subvolume", "list", &mount])).lines().count()
}

#[test]
fn an_add_that_is_killed_at_any_point_leaves_nothing_or_all_of_the_image() {
    const POINTS: u32 = 16;
    let (loam, server) = (Loam::up(), FileServer::start());
    let tree = loam.path("tree");
    tarball::everything(&tree);
    for directory in 0..40 {
        let path = tree.join(format!("many/{directory}"));
        fs::create_dir_all(&path).unwrap();
        for file in 0..50 {
            fs::write(path.join(file.to_string()), format!("{directory} {file}").repeat(file * 20)).unwrap();
        }
    }
    let source = loam.publish(&server, &tree, "image");
    let unpacked = loam.path("unpacked");
    tarball::unpack(&loam.path("image.tar"), &unpacked);
    let empty = subvolumes(&loam);
    let outcome = loam.run(["add", "whole", &source]);
    let whole = outcome.elapsed;
    outcome.ok();
    let each = subvolumes(&loam) - empty;
    let mut completed = 0;
    for point in 0..POINTS {
        let name = format!("image-{point}");
        let mut adding = loam.spawn(["add", &name, &source]);
        std::thread::sleep(whole * point / (POINTS - 2));
        loam.kill_daemon();
        let succeeded = adding.wait().unwrap().success();
        wait_until("another daemon", Duration::from_secs(10), || loam.run(["ls"]).status.success());
        let listed = loam.run(["ls", "--json"]).json();
        let images = listed["images"].as_array().unwrap();
        let there = images.iter().any(|image| image["name"] == name.as_str());
        assert!(there || !succeeded, "add said that {name} is there, and it is not: {listed}");
        if there {
            completed += 1;
        } else {
            loam.run(["add", &name, &source]).ok();
        }
        let report = compare::trees(&unpacked, &loam.path_of(&name), &[]).unwrap();
        assert_eq!(report.differences, Vec::<String>::new(), "killed at point {point} of {POINTS}");
        loam.run(["rm", &name]).ok();
        wait_until("nothing is left over", Duration::from_secs(10), || subvolumes(&loam) == empty + each);
    }
    eprintln!("{completed} of {POINTS} adds were done when the daemon was killed; one takes {whole:?}");
    assert!(completed < POINTS, "no kill came before the end: the test tests nothing");
    loam.run(["check"]).ok();
}

#[test]
fn an_up_whose_daemon_is_killed_at_any_point_comes_up_all_the_same() {
    const POINTS: u32 = 16;
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    let whole = loam.run(["up"]).elapsed;
    loam.run(["down"]).ok();
    let mut killed = 0;
    for point in 0..POINTS {
        let mut coming = loam.spawn(["up"]);
        std::thread::sleep(whole * (point + 1) / POINTS);
        for pid in daemons(&loam) {
            killed += 1;
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        assert!(coming.wait().unwrap().success(), "killed at point {point} of {POINTS}");
        let mount = loam.mount();
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = table.lines().filter(|line| line.split(' ').nth(1) == mount.to_str()).count();
        assert_eq!(mounts, 1, "killed at point {point} of {POINTS}");
        loam.run(["ls"]).ok();
        loam.run(["down"]).ok();
    }
    eprintln!("{killed} daemons were killed at {POINTS} points; one up takes {whole:?}");
    assert!(killed > POINTS / 2, "{killed} kills only: the test tests little");
}

/// This pool's daemons.
fn daemons(loam: &Loam) -> Vec<rustix::process::Pid> {
    let pool = loam.pool().display().to_string();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_daemon = |pid: &i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split('\0').collect();
        words.contains(&"daemon") && words.contains(&"internal") && words.contains(&pool.as_str())
    };
    pids.filter(is_daemon).filter_map(rustix::process::Pid::from_raw).collect()
}

#[test]
fn a_container_that_is_written_to_keeps_its_data_over_kills() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    loam.run(["add", "busybox", &source]).ok();
    loam.run(["create", "web", "busybox"]).ok();
    let web = loam.path_of("web");
    for round in 0..4_u64 {
        let bytes = tarball::noise(round, 3_000_000);
        fs::write(web.join(format!("written-{round}")), &bytes).unwrap();
        loam.kill_daemon();
        assert!(fs::read(web.join(format!("written-{round}"))).unwrap() == bytes);
        assert!(fs::read(web.join("data/medium")).unwrap() == tarball::noise(300_000, 300_000));
        wait_until("another daemon", Duration::from_secs(10), || loam.run(["ls"]).status.success());
    }
    let restarts = loam.status()["daemon"]["restarts"].as_u64();
    assert_eq!(restarts, Some(4));
}

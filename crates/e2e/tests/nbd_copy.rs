//! `loam copy` between the servers of others, ours and files: the bytes, the commands that a server sees, and servers
//! and copies that are killed on the way.

mod nbd_serving;
mod nbd_support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use loam_e2e::{Loam, tarball};
use nbd_serving::{Serving, text, unix};
use nbd_support::{Peer, nbd_server, nbdkit, qemu_nbd};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Not a multiple of the 4 KiB that some would like.
const SIZE: u64 = 6 * MIB + 3 * 512;

/// Noise in every other run of 256 KiB.
fn striped(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for at in (0..SIZE).step_by(512 << 10) {
        let end = (at + (256 << 10)).min(SIZE);
        let run = &mut bytes[at as usize..end as usize];
        run.copy_from_slice(&tarball::noise(at + 1, run.len()));
        file.write_all_at(run, at).unwrap();
    }
    bytes
}

/// A file of nothing but other bytes.
fn dirty(path: &Path) {
    File::create(path).unwrap().write_all_at(&vec![0xEE; SIZE as usize], 0).unwrap();
}

fn assert_equal(path: &Path, wanted: &[u8], what: &str) {
    let found = std::fs::read(path).unwrap();
    let wrong = wanted.iter().zip(&found).position(|(wanted, found)| wanted != found);
    assert!(found.len() == wanted.len() && wrong.is_none(), "{what}: {} bytes, {wrong:?}", found.len());
}

/// Something to copy from or to: its name, and what has to live that long.
struct End {
    name: String,
    _peer: Option<Peer>,
    _serving: Option<Serving>,
}

const ENDS: [&str; 5] = ["file", "nbdkit", "qemu-nbd", "nbd-server", "loam"];

fn end(kind: &str, loam: &Loam, path: &Path, socket: &str) -> End {
    let file = format!("file={}", path.display());
    let peer = match kind {
        "nbdkit" => Some(nbdkit(&["file", &file])),
        "qemu-nbd" => Some(qemu_nbd(&["-f", "raw", "--discard=unmap", &text(path)])),
        "nbd-server" => {
            let sections = format!("[disk]\nexportname = {}\nflush = true\ntrim = true\n", path.display());
            Some(nbd_server(&sections))
        }
        _ => None,
    };
    if kind == "loam" {
        let socket = loam.path(socket);
        let serving = Serving::start(loam, [&text(path), "--nbd", &unix(&socket)]);
        let name = format!("nbd+unix:///?socket={}", socket.display());
        return End { name, _peer: None, _serving: Some(serving) };
    }
    let name = match &peer {
        Some(peer) if kind == "nbd-server" => peer.uri_of("disk"),
        Some(peer) => peer.uri(),
        None => text(path).to_string(),
    };
    End { name, _peer: peer, _serving: None }
}

#[test]
fn every_kind_of_end_to_every_other() {
    let loam = Loam::new();
    let (source, destination) = (loam.path("source"), loam.path("destination"));
    let bytes = striped(&source);
    for from in ENDS {
        for to in ENDS {
            dirty(&destination);
            let from_end = end(from, &loam, &source, "from");
            let to_end = end(to, &loam, &destination, "to");
            let copied = loam.run(["copy", &from_end.name, &to_end.name, "--verify", "--json"]).json();
            drop((from_end, to_end));
            assert_equal(&destination, &bytes, &format!("{from} to {to}: {copied}"));
            assert_eq!(copied["bytes"], SIZE, "{from} to {to}: {copied}");
        }
    }
    let images = [&source, &destination];
    let compared = Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).args(images).status();
    assert!(compared.unwrap().success(), "qemu-img does not agree");
}

#[test]
fn filters_that_make_a_server_hard_to_write_to() {
    let loam = Loam::new();
    let source = loam.path("source");
    let bytes = striped(&source);
    let policy = "--filter=blocksize-policy";
    let size = (SIZE + 4096).to_string();
    let cases: [&[&str]; 6] = [
        &["--filter=nozero", "memory", &size],
        &["--filter=nozero", "memory", &size, "zeromode=plugin", "fastzeromode=slow"],
        &["--filter=nozero", "memory", &size, "zeromode=plugin", "fastzeromode=none"],
        &["--filter=nozero", "--filter=noextents", "memory", &size, "zeromode=emulate"],
        &["--filter=noextents", "--filter=fua", "memory", &size],
        &[
            policy,
            "memory",
            "7M",
            "blocksize-minimum=4096",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
    ];
    for case in cases {
        let peer = nbdkit(case);
        let back = loam.path("back");
        let copied = loam.run(["copy", &text(&source), &peer.uri(), "--verify", "--json"]).json();
        loam.run(["copy", &peer.uri(), &text(&back), "--create", "--json"]).json();
        let found = std::fs::read(&back).unwrap();
        assert!(
            found[..bytes.len()] == bytes && found[bytes.len()..].iter().all(|&b| b == 0),
            "{case:?}: {copied}"
        );
        std::fs::remove_file(&back).unwrap();
    }
}

#[test]
fn what_a_server_refuses_is_said() {
    let loam = Loam::new();
    let source = loam.path("source");
    striped(&source);
    let cases = [
        (["error=ENOSPC", "error-pwrite-rate=100%"], "write"),
        (["error=EIO", "error-pwrite-rate=20%"], "write"),
        (["error=EIO", "error-extents-rate=100%"], "extents"),
    ];
    for (faults, operation) in cases {
        let peer = nbdkit(&["--filter=error", "memory", "8M", faults[0], faults[1]]);
        let error = loam.run(["copy", &text(&source), &peer.uri()]).fails();
        assert!(error.contains("destination") && error.contains(operation), "{faults:?}: {error}");
    }
    let peer = nbdkit(&["--filter=error", "pattern", "8M", "error=EIO", "error-pread-rate=100%"]);
    let error = loam.run(["copy", &peer.uri(), &text(&loam.path("out")), "--create"]).fails();
    assert!(error.contains("source") && error.contains("read"), "{error}");
    let small = nbdkit(&["memory", "1M"]);
    let error = loam.run(["copy", &text(&source), &small.uri()]).fails();
    assert!(error.contains("too small"), "{error}");
    let error = loam.run(["copy", &small.uri(), &small.uri()]).fails();
    assert!(error.contains("onto itself"), "{error}");
}

/// A server of `path` that takes `delay` for a write.
fn slow_server(path: &Path, delay: &str) -> Peer {
    let file = format!("file={}", path.display());
    nbdkit(&["--filter=delay", "file", &file, &format!("delay-write={delay}")])
}

#[test]
fn a_server_that_is_killed_and_comes_back() {
    let loam = Loam::new();
    let (source, destination) = (loam.path("source"), loam.path("destination"));
    let bytes = striped(&source);
    dirty(&destination);
    let mut peer = slow_server(&destination, "50ms");
    let arguments = ["copy", &text(&source), &peer.uri(), "--queue-depth", "2", "--request-size", "64K"];
    let mut copying = loam.spawn(arguments);
    for _ in 0..3 {
        sleep(Duration::from_millis(200));
        peer.kill();
        sleep(Duration::from_millis(50));
        peer.restart();
    }
    assert!(copying.wait().unwrap().success());
    assert_equal(&destination, &bytes, "after three kills");
}

#[test]
fn a_copy_that_is_killed_is_resumed() {
    let loam = Loam::new();
    let (source, destination, state) = (loam.path("source"), loam.path("destination"), loam.path("state"));
    let bytes = striped(&source);
    dirty(&destination);
    let peer = slow_server(&destination, "20ms");
    let resume = format!("--resume={}", state.display());
    let uri = peer.uri();
    let arguments =
        ["copy", &text(&source), &uri, &resume, "--queue-depth=1", "--request-size=16K", "--json"];
    let mut copying = loam.spawn(arguments);
    loam_e2e::wait_until("a state file", Duration::from_secs(10), || state.exists());
    sleep(Duration::from_millis(300));
    copying.kill().unwrap();
    copying.wait().unwrap();
    assert!(state.exists(), "it was not done");
    let other = ["copy", &text(&destination), &uri, &resume];
    assert!(loam.run(other).fails().contains("another copy"));
    let arguments = ["copy", &text(&source), &uri, &resume, "--json", "--verify"];
    let copied = loam.run(arguments).json();
    assert_eq!(copied["bytes"].as_u64().unwrap() + copied["resumed_bytes"].as_u64().unwrap(), SIZE);
    drop(peer);
    assert_equal(&destination, &bytes, &format!("{copied}"));
    assert!(!state.exists());
}

/// Seconds, writes and zeroes of a copy of 100 MiB, every other MiB a hole, to a memory disk whose writes take 20 ms for
/// each 256 KiB.
fn case_study(arguments: &[&str]) -> (f64, usize, usize) {
    let loam = Loam::new();
    let source = loam.path("source");
    let file = File::create(&source).unwrap();
    file.set_len(100 * MIB).unwrap();
    for at in (0..100 * MIB).step_by(2 << 20) {
        file.write_all_at(&vec![(at / MIB + 1) as u8; MIB as usize], at).unwrap();
    }
    let log = loam.path("log");
    let logfile = format!("logfile={}", log.display());
    let filters = ["log", "nozero", "blocksize", "delay", "noextents"].map(|name| format!("--filter={name}"));
    let mut server: Vec<&str> = filters.iter().map(String::as_str).collect();
    server.extend(["memory", "100M", &logfile, "delay-write=20ms", "maxdata=256k"]);
    server.extend(arguments);
    let peer = nbdkit(&server);
    let began = Instant::now();
    let copied: Value = loam.run(["copy", &text(&source), &peer.uri(), "--json"]).json();
    let seconds = began.elapsed().as_secs_f64();
    let log = std::fs::read_to_string(log).unwrap();
    let begun = |name: &str| log.lines().filter(|line| line.contains(name) && line.ends_with("...")).count();
    let commands = (begun(" Write id="), begun(" Zero id="));
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", &text(&source), &peer.uri()])
        .status();
    assert!(compared.unwrap().success(), "{copied}");
    (seconds, commands.0, commands.1)
}

/// The limits on time are far above what is measured: they tell parallel from not parallel on a machine with other work.
#[test]
fn the_case_study_is_parallel_and_sends_no_more_than_it_must() {
    let fast = ["delay-zero=5ms", "zeromode=plugin", "fastzeromode=default"];
    let slow = ["delay-zero=20ms", "maxlen=256k", "zeromode=plugin", "fastzeromode=slow"];
    let (seconds, writes, zeroes) = case_study(&fast);
    assert!(writes == 50 && zeroes <= 2, "fast: {writes} writes, {zeroes} zeroes");
    assert!(seconds < 2.0, "fast: {seconds}");
    let (seconds, writes, zeroes) = case_study(&slow);
    assert!(writes == 50 && zeroes <= 51, "slow: {writes} writes, {zeroes} zeroes");
    assert!(seconds < 3.0, "slow: {seconds}");
    let (seconds, writes, zeroes) = case_study(&["zeromode=none"]);
    assert!(writes == 100 && zeroes == 0, "none: {writes} writes, {zeroes} zeroes");
    assert!(seconds < 3.0, "none: {seconds}");
}

//! A pool on ublk: what is special about a device that stays when its server dies. What holds for every transport is in
//! the `pool_` tests, which `LOAM_TRANSPORT=ublk` runs on this one. A kernel without ublk fails these tests: the test VM
//! has it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use loam_e2e::{BLOCK, FileServer, Loam, drop_page_cache, read_direct, tarball, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Bytes of the file that is read.
const LARGE: usize = 4 << 20;
/// Where the virtual region begins on the device.
const VIRTUAL_BASE: u64 = 1 << 40;
/// A reader that waits for a server has not been answered after this long.
const A_WHILE: Duration = Duration::from_secs(1);
/// The longest that going up or down may take, on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pool that is up on ublk.
fn up(options: &[&str]) -> Loam {
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    loam.run([&["up", "--transport", "ublk"], options].concat()).ok();
    loam
}

/// The same with an image of one file, whose bytes are `noise(1, LARGE)`; the path of that file.
fn with_image(options: &[&str]) -> (Loam, FileServer, PathBuf) {
    let (loam, server) = (up(options), FileServer::start());
    let tree = loam.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("large"), tarball::noise(1, LARGE)).unwrap();
    let source = loam.publish(&server, &tree, "image");
    loam.run(["add", "image", &source]).ok();
    let large = loam.path_of("image").join("large");
    (loam, server, large)
}

/// The bytes that block `number` of the image's file has.
fn expected(number: usize) -> Vec<u8> {
    tarball::noise(1, LARGE)[number * BLOCK..(number + 1) * BLOCK].to_vec()
}

fn device(loam: &Loam) -> PathBuf {
    PathBuf::from(loam.status()["device"].as_str().expect("a pool that is up has a device"))
}

/// The server's ends of all ublk devices.
fn devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Kills the pool's holder, then its daemon: nobody is left who would start another.
fn kill_everybody(loam: &Loam) {
    let daemon = loam.daemon_pid();
    let stat = fs::read_to_string(format!("/proc/{daemon}/stat")).unwrap();
    let parent = stat.rsplit(") ").next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    for pid in [parent, daemon] {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    wait_until("everybody is dead", PATIENCE, || {
        [parent, daemon].iter().all(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        })
    });
}

/// A read of one block of an open file, past the page cache, in a thread of its own: it may wait.
fn read_apart(path: &Path, number: usize) -> Receiver<std::io::Result<Vec<u8>>> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let file: File = OpenOptions::new().read(true).custom_flags(direct).open(path).unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 2 * BLOCK];
        let start = buffer.as_ptr().align_offset(BLOCK);
        let block = &mut buffer[start..start + BLOCK];
        let read = file.read_exact_at(block, (number * BLOCK) as u64).map(|()| block.to_vec());
        // Closed before it is answered: who takes the pool down then finds it unused.
        drop(file);
        let _ = sender.send(read);
    });
    receiver
}

/// A process with a mount namespace of its own, in which the pool stays mounted.
struct Elsewhere(Child);

impl Elsewhere {
    fn new(mount: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", "echo there; exec sleep 1000"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut there = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut there).unwrap();
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", child.id())).unwrap();
        assert!(mounts.contains(&mount.display().to_string()), "{mounts}");
        Elsewhere(child)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pool_lives_on_ublk_and_leaves_nothing() {
    let before = devices();
    let (loam, _server, large) = with_image(&["--queues", "1"]);
    let status = loam.status();
    assert_eq!((&status["transport"], &status["queues"]), (&"ublk".into(), &1.into()), "{status}");
    assert!(device(&loam).display().to_string().starts_with("/dev/ublkb"), "{status}");
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
    for _ in 0..2 {
        loam.run(["up"]).ok();
    }
    assert_eq!(loam.status()["daemon"]["pid"], status["daemon"]["pid"], "up twice changes nothing");
    let mut curl = Command::new("curl");
    let socket = loam.pool().join("run/control.sock");
    curl.args(["-sSf", "--unix-socket"]).arg(socket).arg("http://pool/metrics");
    let metrics = tarball::must(&mut curl);
    assert!(
        metrics.contains("transport=\"ublk\"") && metrics.contains("loam_transport_queues 1"),
        "{metrics}"
    );
    for _ in 0..2 {
        loam.run(["down"]).ok();
    }
    assert_eq!(devices(), before);
}

#[test]
fn auto_takes_ublk_where_there_is_ublk() {
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    loam.run(["up", "--transport", "auto"]).ok();
    assert_eq!(loam.status()["transport"], "ublk");
    loam.run(["down"]).ok();
    loam.run(["up", "--transport", "loop"]).ok();
    assert_eq!(loam.status()["transport"], "loop");
}

#[test]
fn without_the_driver_auto_takes_loop_and_ublk_says_what_to_do() {
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    tarball::must(Command::new("modprobe").args(["-r", "ublk_drv"]));
    let (asked, auto) = (loam.run(["up", "--transport", "ublk"]), loam.run(["up", "--transport", "auto"]));
    let status = loam.status();
    // Before anything can fail: other tests need it.
    tarball::must(Command::new("modprobe").arg("ublk_drv"));
    let why = asked.fails();
    assert!(why.contains("/dev/ublk-control") && why.contains("modprobe ublk_drv"), "{why}");
    auto.ok();
    assert_eq!(status["transport"], "loop");
    let log = fs::read_to_string(loam.pool().join("run/daemon.log")).unwrap();
    assert!(log.contains("transport loop: no ublk here"), "{log}");
}

#[test]
fn every_data_path_gives_the_same_bytes_and_is_shown() {
    let (mut served, mut refused) = (Vec::new(), Vec::new());
    for path in ["copy", "user-copy", "zero-copy"] {
        let loam = Loam::new();
        loam.run(["init", "--local-size", "1GiB"]).ok();
        let outcome = loam.run(["up", "--transport", "ublk", "--data-path", path]);
        if !outcome.status.success() {
            assert!(outcome.fails().contains(path), "the error names the data path");
            refused.push(path);
            continue;
        }
        assert_eq!(loam.status()["data_path"], path);
        let (server, tree) = (FileServer::start(), loam.path("tree"));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("large"), tarball::noise(1, LARGE)).unwrap();
        let source = loam.publish(&server, &tree, "image");
        loam.run(["add", "image", &source]).ok();
        // Fetched, then from the cache, then taken over, with what was chosen when it was made.
        for round in 0..4 {
            drop_page_cache();
            let read = read_direct(&loam.path_of("image").join("large")).unwrap();
            assert!(read == tarball::noise(1, LARGE), "{path}, round {round}");
            if round == 2 {
                loam.kill_daemon();
            }
        }
        assert_eq!(loam.status()["data_path"], path);
        assert_eq!(loam.errors(), 0, "{}", loam.status());
        served.push(path);
    }
    eprintln!("served: {served:?}, refused: {refused:?}");
    assert!(served.contains(&"copy"));
}

#[test]
fn layouts_and_sizes_to_seven_exbibytes() {
    let cases = [("pair", 1_u64 << 30), ("pair", 4 << 60), ("pair", 7 << 60), ("single", 1 << 50)];
    for (layout, size) in cases {
        let loam = Loam::new();
        let (bytes, case) = (size.to_string(), format!("{layout} of {size} bytes"));
        loam.run(["init", "--layout", layout, "--virtual-size", &bytes, "--local-size", "1GiB"]).ok();
        loam.run(["up", "--transport", "ublk"]).ok();
        let name = device(&loam).file_name().unwrap().to_string_lossy().into_owned();
        let sectors = fs::read_to_string(format!("/sys/block/{name}/size")).unwrap();
        assert_eq!(sectors.trim().parse(), Ok((VIRTUAL_BASE + size) / 512), "{case}");
        let (server, tree) = (FileServer::start(), loam.path("tree"));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("large"), tarball::noise(1, LARGE)).unwrap();
        let source = loam.publish(&server, &tree, "image");
        loam.run(["add", "image", &source]).ok();
        loam.kill_daemon();
        assert!(
            read_direct(&loam.path_of("image").join("large")).unwrap() == tarball::noise(1, LARGE),
            "{case}"
        );
        loam.run(["check"]).ok();
        loam.run(["down"]).ok();
        loam.run(["up", "--transport", "ublk"]).ok();
        assert!(
            read_direct(&loam.path_of("image").join("large")).unwrap() == tarball::noise(1, LARGE),
            "{case}"
        );
    }
}

#[test]
fn readers_wait_when_everybody_is_dead_and_up_goes_on() {
    let (loam, _server, large) = with_image(&[]);
    let before = device(&loam);
    for round in 0..2 {
        let open = File::open(&large).unwrap();
        kill_everybody(&loam);
        let reader = read_apart(&large, 100 + round);
        assert!(reader.recv_timeout(A_WHILE).is_err(), "who answers, when everybody is dead?");
        let status = loam.status();
        assert_eq!((&status["state"], &status["daemon"]), (&"waiting".into(), &Value::Null), "{status}");
        loam.run(["up"]).ok();
        assert!(reader.recv_timeout(PATIENCE).unwrap().unwrap() == expected(100 + round));
        // The same filesystem: what was open still is.
        let mut bytes = vec![0; BLOCK];
        open.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected(0));
        assert_eq!(device(&loam), before);
        assert_eq!(loam.status()["daemon"]["restarts"], round + 1);
    }
    // Another daemon than the one that was started with it is followed by another, too.
    loam.kill_daemon();
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
    loam.run(["up"]).ok();
}

#[test]
fn what_was_asked_for_does_not_keep_up_from_going_on() {
    let (loam, _server, large) = with_image(&[]);
    kill_everybody(&loam);
    loam.run(["up", "--transport", "loop"]).ok();
    assert_eq!(loam.status()["transport"], "ublk", "it was mounted on ublk, and is");
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
}

#[test]
fn down_after_everybody_died_answers_readers_first() {
    let before = devices();
    let (loam, _server, large) = with_image(&[]);
    kill_everybody(&loam);
    let reader = read_apart(&large, 200);
    assert!(reader.recv_timeout(A_WHILE).is_err());
    let began = Instant::now();
    // Busy or not is a race with the reader; with either outcome the reader has its bytes.
    let _ = loam.run(["down"]);
    assert!(reader.recv_timeout(PATIENCE).unwrap().unwrap() == expected(200));
    loam.run(["down"]).ok();
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert_eq!(devices(), before);
    loam.run(["down"]).ok();
    assert_eq!(loam.status()["state"], "down");
}

#[test]
fn down_after_everybody_died_is_refused_while_it_is_used_and_serves_on() {
    let (loam, _server, large) = with_image(&[]);
    let open = File::open(&large).unwrap();
    kill_everybody(&loam);
    let why = loam.run(["down"]).fails();
    assert!(why.contains(&std::process::id().to_string()), "down does not say who: {why}");
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE), "it is served again");
    loam.kill_daemon();
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE), "and held again");
    drop(open);
    loam.run(["down"]).ok();
}

#[test]
fn down_removes_even_what_no_daemon_can_serve_any_more() {
    let before = devices();
    let (loam, _server, large) = with_image(&[]);
    kill_everybody(&loam);
    let (map, aside) = (loam.pool().join("map"), loam.pool().join("map.aside"));
    fs::rename(&map, &aside).unwrap();
    let reader = read_apart(&large, 300);
    loam.run(["up"]).fails();
    assert!(reader.recv_timeout(A_WHILE).is_err(), "a daemon that cannot be has answered");
    let began = Instant::now();
    // Busy while the reader is there; what it waits for ends with an error.
    wait_until("down", PATIENCE, || loam.run(["down"]).status.success());
    let error = reader.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert_eq!(devices(), before);
    fs::rename(&aside, &map).unwrap();
    loam.run(["up"]).ok();
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
}

#[test]
fn down_while_mounted_elsewhere_is_refused_and_the_pool_serves_on() {
    let (loam, _server, large) = with_image(&[]);
    let elsewhere = Elsewhere::new(&loam.mount());
    for _ in 0..2 {
        let why = loam.run(["down"]).fails();
        assert!(why.contains("busy"), "{why}");
        assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
        loam.kill_daemon();
        assert!(
            read_direct(&large).unwrap() == tarball::noise(1, LARGE),
            "the refusal left it without a holder"
        );
    }
    // Everybody dead, and mounted elsewhere: as much as before, refused and served.
    kill_everybody(&loam);
    loam.run(["down"]).fails();
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
    drop(elsewhere);
    wait_until("down", PATIENCE, || loam.run(["down"]).status.success());
}

#[test]
fn down_with_a_second_mount_is_refused_and_the_pool_serves_on() {
    let (loam, _server, large) = with_image(&[]);
    let second = loam.path("second");
    fs::create_dir(&second).unwrap();
    tarball::must(Command::new("mount").arg("--bind").arg(loam.mount()).arg(&second));
    let why = loam.run(["down"]).fails();
    assert!(why.contains("busy"), "{why}");
    assert!(read_direct(&large).unwrap() == tarball::noise(1, LARGE));
    tarball::must(Command::new("umount").arg(&second));
    loam.run(["down"]).ok();
}

#[test]
fn a_down_that_is_killed_at_any_point_can_be_repeated() {
    const POINTS: u32 = 8;
    let before = devices();
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    loam.run(["up", "--transport", "ublk"]).ok();
    let whole = loam.run(["down"]).elapsed;
    for point in 0..POINTS {
        loam.run(["up", "--transport", "ublk"]).ok();
        let daemon = loam.daemon_pid();
        let mut going = loam.spawn(["down"]);
        std::thread::sleep(whole * point / POINTS);
        let _ = kill_process(Pid::from_raw(daemon).unwrap(), Signal::KILL);
        going.wait().unwrap();
        loam.run(["down"]).ok();
        assert_eq!(devices(), before, "killed at point {point} of {POINTS}");
    }
}

#[test]
fn two_pools_and_a_mounted_image_live_side_by_side() {
    let (one, _first_server, first) = with_image(&[]);
    let (two, server, second) = with_image(&[]);
    assert_ne!(device(&one), device(&two));
    let mounted = two.path("mounted");
    fs::create_dir(&mounted).unwrap();
    let (source, target) = (format!("tar:{}", server.url("image.tar")), mounted.display().to_string());
    two.run(["mount", &source, &target, "--transport", "ublk", "--queues", "1"]).ok();
    kill_everybody(&one);
    for path in [&second, &mounted.join("large")] {
        assert!(read_direct(path).unwrap() == tarball::noise(1, LARGE), "{}", path.display());
    }
    two.run(["umount", &target]).ok();
    two.run(["down"]).ok();
    one.run(["up"]).ok();
    assert!(read_direct(&first).unwrap() == tarball::noise(1, LARGE));
}

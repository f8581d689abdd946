//! A pool's life: init, up, down, and every way in which they are called at the wrong time.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use loam_e2e::{FileServer, Loam, tarball, wait_until};
use serde_json::Value;

/// A pool with one served image of a busybox.
fn with_image() -> (Loam, FileServer) {
    let (loam, server) = (Loam::up(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    loam.run(["add", "busybox", &source]).ok();
    (loam, server)
}

#[test]
fn a_pool_of_four_exbibytes_comes_up_at_once_and_goes_without_a_trace() {
    let loam = Loam::new();
    loam.run(["init"]).ok();
    let outcome = loam.run(["up"]);
    assert!(outcome.elapsed < Duration::from_secs(5), "up took {:?}", outcome.elapsed);
    outcome.ok();
    loam.remember_device();
    let status = loam.status();
    assert_eq!(status["virtual"]["size"], 4_u64 << 60);
    assert_eq!(status["virtual"]["ranges"], 0);
    loam.run(["check"]).ok();
    loam.run(["down"]).ok();
    assert_eq!(loam.tear_down(), Vec::<String>::new());
}

#[test]
fn what_was_added_and_written_is_there_after_down_and_up() {
    let (loam, _server) = with_image();
    loam.run(["create", "web", "busybox"]).ok();
    fs::write(loam.path_of("web").join("written"), "here").unwrap();
    loam.run(["down"]).ok();
    loam.run(["up"]).ok();
    assert_eq!(fs::read_to_string(loam.path_of("web").join("written")).unwrap(), "here");
    assert!(fs::read(loam.path_of("web").join("data/medium")).unwrap() == tarball::noise(300_000, 300_000));
    loam.run(["check", "--read-data"]).ok();
}

#[test]
fn every_command_may_be_given_twice() {
    let loam = Loam::new();
    loam.run(["down"]).fails();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    loam.run(["init"]).fails();
    loam.run(["down"]).ok();
    loam.run(["up"]).ok();
    let pid = loam.daemon_pid();
    loam.run(["up"]).ok();
    assert_eq!(loam.daemon_pid(), pid);
    loam.run(["down"]).ok();
    loam.run(["down"]).ok();
}

#[test]
fn commands_that_need_a_daemon_say_what_to_do_without_one() {
    let loam = Loam::new();
    assert!(loam.run(["up"]).fails().contains(" init"), "no pool: the hint is `loam init`");
    loam.run(["init", "--local-size", "1GiB"]).ok();
    assert!(loam.run(["ls"]).fails().contains(" up"), "no daemon: the hint is `loam up`");
    let status = loam.status();
    assert_eq!(status["daemon"], Value::Null, "{status}");
}

#[test]
fn of_many_ups_at_once_one_makes_the_daemon_and_all_succeed() {
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| loam.run(["up"]).ok());
        }
    });
    let daemons = daemons_of(&loam);
    assert_eq!(daemons.len(), 1, "{daemons:?}");
}

#[test]
fn a_pool_by_another_name_is_the_same_pool() {
    let loam = Loam::up();
    let other = loam.path("other-name");
    symlink(loam.pool(), &other).unwrap();
    let pid = loam.daemon_pid();
    let _ = loam.run(["--pool", &other.display().to_string(), "up"]);
    let _ = loam.run(["--pool", &other.display().to_string(), "up", "--foreground"]);
    assert_eq!(loam.daemon_pid(), pid);
    assert_eq!(daemons_of(&loam).len(), 1);
}

#[test]
fn down_with_a_busy_mount_says_who_and_changes_nothing() {
    let (loam, _server) = with_image();
    loam.run(["create", "web", "busybox"]).ok();
    let file = loam.path_of("web").join("data/large");
    let open = File::open(&file).unwrap();
    let why = loam.run(["down"]).fails();
    assert!(why.contains(&std::process::id().to_string()), "down does not say who: {why}");
    assert!(fs::read(&file).unwrap() == tarball::noise(8 << 20, 8 << 20));
    fs::write(loam.path_of("web").join("still"), "writable").unwrap();
    drop(open);
    loam.run(["down"]).ok();
}

#[test]
fn down_cleans_up_after_everything_was_killed() {
    let (loam, _server) = with_image();
    for pid in daemons_and_holders(&loam) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    let started = Instant::now();
    loam.run(["down"]).ok();
    assert!(started.elapsed() < Duration::from_secs(30));
    loam.run(["up"]).ok();
    let path = loam.path_of("busybox");
    assert!(fs::read(path.join("data/medium")).unwrap() == tarball::noise(300_000, 300_000));
}

#[test]
fn up_mends_what_a_kill_of_everything_left() {
    let (loam, _server) = with_image();
    for pid in daemons_and_holders(&loam) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    wait_until("all are gone", Duration::from_secs(5), || daemons_and_holders(&loam).is_empty());
    loam.run(["up"]).ok();
    let path = loam.path_of("busybox");
    assert!(fs::read(path.join("data/medium")).unwrap() == tarball::noise(300_000, 300_000));
    loam.run(["check"]).ok();
}

#[test]
fn a_pool_of_a_newer_format_is_refused_by_name_and_left_alone() {
    let loam = Loam::new();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    let path = loam.pool().join("pool.toml");
    let text = fs::read_to_string(&path).unwrap();
    let newer = text.replace("format = 1", "format = 99");
    assert_ne!(text, newer, "pool.toml names its format");
    fs::write(&path, format!("{newer}\n[a_section_of_the_future]\nkey = true\n")).unwrap();
    for command in ["up", "status", "check"] {
        let why = loam.run([command]).fails();
        assert!(why.contains("99"), "`loam {command}` does not name the format: {why}");
    }
    fs::write(&path, text).unwrap();
    loam.run(["up"]).ok();
}

#[test]
fn the_control_socket_is_roots_alone_and_has_metrics() {
    use std::os::unix::fs::PermissionsExt;
    let (loam, _server) = with_image();
    let socket = loam.pool().join("run/control.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut curl = std::process::Command::new("curl");
    curl.args(["-sSf", "--unix-socket"]).arg(&socket).arg("http://pool/metrics");
    let text = tarball::must(&mut curl);
    for name in ["loam_cache_bytes ", "loam_fetched_bytes_total ", "loam_errors_total{", "loam_images 1"] {
        assert!(text.contains(name), "no {name}in {text}");
    }
    assert!(text.ends_with("# EOF"), "{text}");
}

#[test]
fn a_pool_may_be_mounted_elsewhere() {
    let loam = Loam::new();
    let target = loam.path("elsewhere");
    fs::create_dir(&target).unwrap();
    loam.run(["init", "--local-size", "1GiB"]).ok();
    loam.run(["up", "--mount", &target.display().to_string()]).ok();
    assert_eq!(loam.mount(), target);
    loam.run(["down"]).ok();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn all_layouts_that_this_kernel_takes_come_up_and_the_other_says_why() {
    for (layout, comes_up) in [("pair", true), ("single", true), ("mega-extent", false)] {
        let loam = Loam::new();
        let size = if layout == "mega-extent" { "4EiB" } else { "1PiB" };
        loam.run(["init", "--layout", layout, "--virtual-size", size, "--local-size", "1GiB"]).ok();
        let up = loam.run(["up"]);
        if comes_up {
            up.ok();
            loam.run(["check"]).ok();
            // Without it every small write walks the block groups of the virtual region.
            let options = mount_options(&loam.mount());
            assert!(options.split(',').any(|option| option == "ssd_spread"), "{layout}: {options}");
        } else {
            assert!(up.fails().contains("chunk"), "{layout}");
        }
    }
}

/// The filesystem's own options of what is mounted at `path`, as the kernel lists them.
fn mount_options(path: &std::path::Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = |line: &&str| line.split(' ').nth(4) == path.to_str();
    let line = mounts.lines().find(at).unwrap_or_else(|| panic!("{} is not mounted", path.display()));
    line.rsplit(' ').next().unwrap().to_owned()
}

/// Processes of `loam internal` whose command line names this pool's directory.
fn processes(loam: &Loam, role: &str) -> Vec<i32> {
    let needle = loam.pool().display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let ours = words.iter().any(|word| word.contains(&needle))
            || String::from_utf8_lossy(&environment).contains(&needle);
        if ours && words.iter().any(|word| word == "internal") && words.iter().any(|word| word == role) {
            found.push(pid);
        }
    }
    found
}

fn daemons_of(loam: &Loam) -> Vec<i32> {
    processes(loam, "daemon")
}

fn daemons_and_holders(loam: &Loam) -> Vec<i32> {
    // The holder first: it would start another daemon.
    [processes(loam, "holder"), processes(loam, "daemon")].concat()
}

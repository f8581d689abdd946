//! The serving process is killed under load, over and over: readers wait, and neither an error nor a wrong byte reaches
//! them. This test program is the worker and the holder too, started again under names of their own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attach_common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attach_common::{Aligned, HUGE, TestDevice, VIRTUAL_BASE, open_direct, read_pattern, runtime};
use loam_attach::holder::{Ended, FdStore};
use loam_attach::{AttachOptions, LoopTransport, SavedState, holder};
use loam_block::BlockDevice;
use loam_e2e::{require_root, wait_until};
use loam_sys::process::{Isolation, inherit};
use rustix::process::{Pid, Signal};

/// Where worker and holder find the scratch directory of their test.
const DIRECTORY: &str = "LOAM_E2E_CRASH_DIRECTORY";
/// Readers at once, each with one read under way.
const DEPTH: u64 = 64;
/// Reads from here on take a while.
const SLOW_FROM: u64 = VIRTUAL_BASE + (1 << 61);

/// This program again, as one of the processes below.
fn role(name: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--quiet"]).env(DIRECTORY, directory);
    command
}

fn directory() -> PathBuf {
    PathBuf::from(std::env::var_os(DIRECTORY).expect("started by the tests below, not by hand"))
}

#[test]
#[ignore = "a process that the tests below start"]
fn holder_process() {
    let directory = directory();
    let ended = holder::run(|| role("worker_process", &directory)).unwrap();
    assert!(matches!(ended, Ended::Worker(status) if status.success()), "{ended:?}");
}

#[test]
#[ignore = "a process that the tests below start"]
fn worker_process() {
    let directory = directory();
    println!("born {}", std::process::id());
    let store = FdStore::from_environment().unwrap();
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice {
        slow_from: SLOW_FROM,
        delay: Duration::from_millis(20),
        ..TestDevice::new(HUGE)
    });
    let state_file = directory.join("state.json");
    let options = AttachOptions::default();
    let saved =
        std::fs::read(&state_file).ok().map(|bytes| serde_json::from_slice::<SavedState>(&bytes).unwrap());
    let mut attachment = match saved {
        Some(state) => LoopTransport::resume(device, runtime.handle().clone(), &options, state, &store),
        None => LoopTransport::attach(device, runtime.handle().clone(), &options, &store),
    }
    .unwrap();
    std::fs::write(directory.join("state.new"), serde_json::to_vec(attachment.state()).unwrap()).unwrap();
    std::fs::rename(directory.join("state.new"), &state_file).unwrap();
    store.ready().unwrap();
    println!("ready {}", std::process::id());
    wait_until("asked to stop", Duration::from_secs(600), || directory.join("stop").exists());
    attachment.detach(&store).unwrap();
    // The test harness's own way out could wait for output that nobody reads.
    std::process::exit(0);
}

/// A holder with its worker, and how to kill the latter.
struct Served {
    directory: tempfile::TempDir,
    holder: Child,
    output: BufReader<std::process::ChildStdout>,
    state: SavedState,
}

impl Served {
    fn start() -> (Served, Pid) {
        let directory = tempfile::tempdir().unwrap();
        let mut holder = role("holder_process", directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(holder.stdout.take().unwrap());
        let pid = next_pid(&mut output, "ready ");
        let state =
            serde_json::from_slice(&std::fs::read(directory.path().join("state.json")).unwrap()).unwrap();
        (Served { directory, holder, output, state }, pid)
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.state.loop_number))
    }

    /// Kills the worker and waits for the next to serve.
    fn kill(&mut self, worker: Pid) -> Pid {
        rustix::process::kill_process(worker, Signal::KILL).unwrap();
        next_pid(&mut self.output, "ready ")
    }

    /// Kills both, so that the connection ends.
    fn abandon(&mut self, worker: Pid) {
        self.holder.kill().unwrap();
        let _ = rustix::process::kill_process(worker, Signal::KILL);
    }

    fn stop(mut self) {
        std::fs::write(self.directory.path().join("stop"), "").unwrap();
        assert!(self.holder.wait().unwrap().success());
        assert_eq!(LoopTransport::find(&self.state).unwrap(), None);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // After a failed test: the worker ends by itself, then the holder.
        let _ = std::fs::write(self.directory.path().join("stop"), "");
        let _ = self.holder.wait();
    }
}

/// The process id that the next worker prints behind `word`.
fn next_pid(output: &mut impl BufRead, word: &str) -> Pid {
    let mut line = String::new();
    loop {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the holder ended");
        // The test harness prints beside it.
        if let Some((_, pid)) = line.rsplit_once(word) {
            return Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        }
    }
}

#[test]
fn a_hundred_kills_under_load_without_an_error() {
    require_root();
    let (mut served, mut worker) = Served::start();
    let device = served.device();
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let longest = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..DEPTH)
            .map(|reader| {
                let (device, stop, reads) = (&device, &stop, &reads);
                scope.spawn(move || {
                    let file = open_direct(device);
                    let mut buffer = Aligned::new(4096);
                    let mut longest = Duration::ZERO;
                    // One in eight reads of the slow part: killed while it waits.
                    let base = if reader % 8 == 0 { SLOW_FROM } else { VIRTUAL_BASE };
                    let mut index = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let offset = base + (reader << 40) + index * 4096;
                        let begin = Instant::now();
                        read_pattern(&file, offset, &mut buffer)
                            .unwrap_or_else(|error| panic!("reader {reader} at {offset}: {error}"));
                        longest = longest.max(begin.elapsed());
                        reads.fetch_add(1, Ordering::Relaxed);
                        index += 1;
                    }
                    longest
                })
            })
            .collect();
        for _ in 0..100 {
            let before = reads.load(Ordering::Relaxed);
            // Longer than what the holder takes for a worker that cannot live.
            std::thread::sleep(Duration::from_millis(120));
            worker = served.kill(worker);
            let goes_on = || reads.load(Ordering::Relaxed) > before + DEPTH;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !goes_on() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !goes_on() {
                // Readers that hang would hang this test: without anybody who serves they fail.
                served.abandon(worker);
                panic!("nobody reads on after a kill");
            }
        }
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).max().unwrap()
    });
    println!("{} reads, the longest took {longest:?}", reads.load(Ordering::Relaxed));
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    served.stop();
}

#[test]
fn workers_that_die_before_they_serve_are_survived() {
    require_root();
    let (mut served, mut worker) = Served::start();
    let device = served.device();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8_u64)
            .map(|reader| {
                let (done, device) = (&done, &device);
                scope.spawn(move || {
                    let file = open_direct(device);
                    let mut index = 0;
                    while !done.load(Ordering::Relaxed) {
                        let offset = VIRTUAL_BASE + (reader << 40) + index * 4096;
                        read_pattern(&file, offset, &mut Aligned::new(4096)).unwrap();
                        index += 1;
                    }
                })
            })
            .collect();
        for round in 0..10 {
            rustix::process::kill_process(worker, Signal::KILL).unwrap();
            worker = next_pid(&mut served.output, "born ");
            // At another moment of its start each time.
            std::thread::sleep(Duration::from_micros(round * 700));
        }
        next_pid(&mut served.output, "ready ");
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    served.stop();
}

#[test]
fn without_holder_and_worker_the_device_goes_away() {
    require_root();
    let (mut served, worker) = Served::start();
    let device = served.device();
    read_pattern(&open_direct(&device), 0, &mut Aligned::new(4096)).unwrap();
    served.holder.kill().unwrap();
    served.holder.wait().unwrap();
    // The worker alone still serves.
    read_pattern(&open_direct(&device), VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
    rustix::process::kill_process(worker, Signal::KILL).unwrap();
    wait_until("the loop device is free", Duration::from_secs(5), || {
        LoopTransport::find(&served.state).unwrap().is_none()
    });
    assert!(!LoopTransport::remove(&served.state).unwrap());
}

#[test]
fn what_everybody_left_open_is_found_and_removed() {
    require_root();
    let (mut served, worker) = Served::start();
    let held = open_direct(&served.device());
    served.holder.kill().unwrap();
    served.holder.wait().unwrap();
    rustix::process::kill_process(worker, Signal::KILL).unwrap();
    wait_until("reads fail", Duration::from_secs(5), || {
        read_pattern(&held, VIRTUAL_BASE, &mut Aligned::new(4096)).is_err()
    });
    assert_eq!(LoopTransport::find(&served.state).unwrap(), Some(served.state.loop_number));
    drop(held);
    LoopTransport::remove(&served.state).unwrap();
    assert_eq!(LoopTransport::find(&served.state).unwrap(), None);
}

/// What systemd does for a unit with `FileDescriptorStoreMax=`: takes descriptors by name over NOTIFY_SOCKET, and passes
/// them to the next process from number 3 on.
struct Systemd {
    socket: UnixDatagram,
    kept: BTreeMap<String, OwnedFd>,
}

impl Systemd {
    fn start(&self, directory: &Path) -> Child {
        let (names, descriptors): (Vec<_>, Vec<_>) =
            self.kept.iter().map(|(name, fd)| (name.as_str(), fd.try_clone().unwrap())).unzip();
        let moves = (descriptors.iter().zip(3..)).map(|(fd, to)| format!(" {to}<&{}-", fd.as_raw_fd()));
        let script = format!("export LISTEN_PID=$$; exec \"$0\" \"$@\"{}", moves.collect::<String>());
        let worker = role("worker_process", directory);
        let mut command = Command::new("bash");
        command
            .args(["-c", &script])
            .arg(worker.get_program())
            .args(worker.get_args())
            .env(DIRECTORY, directory);
        command.env("NOTIFY_SOCKET", directory.join("notify")).env("FDSTORE", "16");
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        inherit(&mut command, descriptors, Isolation::default());
        command.stdout(Stdio::null()).spawn().unwrap()
    }

    /// Does what the worker says until it is ready.
    fn attend(&mut self) {
        loop {
            let mut buffer = [0; 256];
            let (length, mut descriptors) = loam_sys::fds::receive(&self.socket, &mut buffer).unwrap();
            let text = std::str::from_utf8(&buffer[..length]).unwrap();
            if text.contains("FDSTORE=1") {
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap();
                self.kept.insert(name.to_owned(), descriptors.pop().unwrap());
            } else if text.contains("READY=1") {
                return;
            }
        }
    }
}

#[test]
fn systemd_can_be_the_holder() {
    require_root();
    let directory = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut systemd = Systemd { socket, kept: BTreeMap::new() };
    let mut worker = systemd.start(directory.path());
    systemd.attend();
    assert_eq!(systemd.kept.keys().collect::<Vec<_>>(), ["fuse", "loop"]);
    let state: SavedState =
        serde_json::from_slice(&std::fs::read(directory.path().join("state.json")).unwrap()).unwrap();
    let file = open_direct(Path::new(&format!("/dev/loop{}", state.loop_number)));
    for round in 0..3 {
        worker.kill().unwrap();
        worker.wait().unwrap();
        std::thread::scope(|scope| {
            // Begun while nobody serves.
            let reader =
                scope.spawn(|| read_pattern(&file, VIRTUAL_BASE + round * 4096, &mut Aligned::new(4096)));
            std::thread::sleep(Duration::from_millis(20));
            worker = systemd.start(directory.path());
            systemd.attend();
            reader.join().unwrap().unwrap();
        });
    }
    drop(file);
    // systemd lets go when the worker says so; here, before it does.
    systemd.kept.clear();
    std::fs::write(directory.path().join("stop"), "").unwrap();
    assert!(worker.wait().unwrap().success());
    assert_eq!(LoopTransport::find(&state).unwrap(), None);
}

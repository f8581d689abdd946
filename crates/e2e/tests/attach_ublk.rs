//! The ublk transport on a real kernel: what is read is what the device holds by every data path, errors are told and
//! got over, misses do not stand before hits, a killed server is followed by another unnoticed, and nothing is left
//! behind. A kernel without ublk fails these tests: the test VM has it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attach_common;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attach_common::{Aligned, HUGE, TestDevice, VIRTUAL_BASE, open_direct, read_pattern, resources, runtime};
use loam_attach::Error;
use loam_attach::ublk::{self, Attachment, DataPath, Options, SavedState};
use loam_block::{BlockDevice, FileDevice, FileOptions};
use loam_e2e::{require_root, wait_until};
use loam_sys::ublk::{Control, DeviceId};
use tokio::runtime::Runtime;

/// Where a worker finds the scratch directory of its test.
const DIRECTORY: &str = "LOAM_E2E_UBLK_DIRECTORY";
/// Readers at once, each with one read under way.
const DEPTH: u64 = 64;
/// Reads from here on take a while.
const SLOW_FROM: u64 = VIRTUAL_BASE + (1 << 61);
/// The largest device that is promised.
const LARGEST: u64 = (7 << 60) + (1 << 40);

/// What the kernel offers; fails the test where it has no ublk.
fn features() -> ublk::Features {
    require_root();
    ublk::features().unwrap_or_else(|error| panic!("{error} ({})", error.hint().unwrap_or("no hint")))
}

/// The data paths that this kernel has.
fn data_paths() -> Vec<DataPath> {
    let features = features();
    let mut paths = vec![DataPath::Auto, DataPath::Copy];
    if features.user_copy() {
        paths.push(DataPath::UserCopy);
    }
    if features.zero_copy() && features.auto_buffer() {
        paths.push(DataPath::ZeroCopy);
    }
    paths
}

fn attach(device: Arc<dyn BlockDevice>, runtime: &Runtime, options: &Options) -> Attachment {
    features();
    ublk::attach(device, runtime.handle().clone(), options).unwrap()
}

fn open_exclusive(path: &Path) -> std::io::Result<File> {
    let flags = (rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::EXCL).bits() as i32;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

#[test]
fn every_data_path_reads_right_and_detaches_without_a_trace() {
    let runtime = runtime();
    for size in [HUGE, LARGEST] {
        for data_path in data_paths() {
            let options = Options { data_path, ..Options::default() };
            let mut attachment = attach(Arc::new(TestDevice::new(size)), &runtime, &options);
            assert_ne!(attachment.data_path(), DataPath::Auto);
            assert_eq!(ublk::find(attachment.state()).unwrap(), Some(attachment.state().number));
            let file = open_direct(&attachment.device_path());
            for length in [4096, 65536, 1 << 20] {
                let mut buffer = Aligned::new(length);
                for offset in [0, 4096, VIRTUAL_BASE - 4096, VIRTUAL_BASE, size / 2, size - length as u64] {
                    read_pattern(&file, offset, &mut buffer)
                        .unwrap_or_else(|error| panic!("{data_path}, {length} at {offset}: {error}"));
                }
            }
            let stats = attachment.stats();
            assert!(stats.hits > 0 && stats.errors == 0 && stats.protocol_errors == 0, "{stats:?}");
            drop(file);
            let state = attachment.state().clone();
            attachment.detach().unwrap();
            assert_eq!(ublk::find(&state).unwrap(), None);
            assert!(!ublk::remove(&state).unwrap());
        }
    }
}

#[test]
fn attaching_leaves_no_descriptors_and_threads() {
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice::new(HUGE));
    let mut before = resources();
    for round in 0..3 {
        let mut attachment = attach(device.clone(), &runtime, &Options::default());
        read_pattern(&open_direct(&attachment.device_path()), 0, &mut Aligned::new(4096)).unwrap();
        attachment.detach().unwrap();
        drop(attachment);
        if round == 0 {
            // The runtime's threads are started lazily.
            before = resources();
        }
        assert_eq!(resources(), before, "descriptors and threads");
    }
}

#[test]
fn what_lies_in_files_reads_right_by_every_data_path() {
    let runtime = runtime();
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("content");
    const SIZE: u64 = 8 << 20;
    let content = FileDevice::pattern_in_memory(SIZE).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    runtime.block_on(content.read(0, &mut bytes)).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    for data_path in data_paths() {
        for direct in [None, Some(false), Some(true)] {
            let device: Arc<dyn BlockDevice> = match direct {
                None => Arc::new(FileDevice::pattern_in_memory(SIZE).unwrap()),
                Some(direct) => {
                    let options = FileOptions { read_only: true, direct };
                    Arc::new(FileDevice::open(&path, options).unwrap())
                }
            };
            let options = Options { data_path, ..Options::default() };
            let mut attachment = attach(device, &runtime, &options);
            let file = open_direct(&attachment.device_path());
            for (length, step) in [(4096, 3 << 16), (1 << 20, 1 << 20)] {
                let mut buffer = Aligned::new(length);
                for offset in (0..=SIZE - length as u64).step_by(step) {
                    read_pattern(&file, offset, &mut buffer)
                        .unwrap_or_else(|error| panic!("{data_path}, direct {direct:?}, {offset}: {error}"));
                }
            }
            let stats = attachment.stats();
            assert_eq!(
                (stats.errors, stats.protocol_errors, stats.waiting),
                (0, 0, 0),
                "{data_path} {direct:?}"
            );
            drop(file);
            attachment.detach().unwrap();
        }
    }
}

#[test]
fn an_error_of_the_device_reaches_the_reader_and_a_later_read_succeeds() {
    let runtime = runtime();
    for data_path in data_paths() {
        let device = Arc::new(TestDevice {
            slow_from: SLOW_FROM,
            delay: Duration::from_millis(1),
            ..TestDevice::new(HUGE)
        });
        let options = Options { data_path, ..Options::default() };
        let mut attachment = attach(device.clone(), &runtime, &options);
        let file = open_direct(&attachment.device_path());
        let mut buffer = Aligned::new(4096);
        for flag in [&device.broken, &device.panics] {
            flag.store(true, Ordering::Relaxed);
            let error = read_pattern(&file, VIRTUAL_BASE, &mut buffer).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(5), "{error}");
            flag.store(false, Ordering::Relaxed);
            read_pattern(&file, VIRTUAL_BASE, &mut buffer).unwrap();
            read_pattern(&file, SLOW_FROM, &mut buffer).unwrap();
        }
        assert!(attachment.stats().errors >= 2);
        drop(file);
        attachment.detach().unwrap();
    }
}

#[test]
fn writes_and_discards_are_refused() {
    let runtime = runtime();
    let mut attachment = attach(Arc::new(TestDevice::new(HUGE)), &runtime, &Options::default());
    let path = attachment.device_path();
    match OpenOptions::new().write(true).open(&path) {
        // EPERM, EACCES or EROFS, depending on the kernel.
        Err(error) => assert!(matches!(error.raw_os_error(), Some(1 | 13 | 30)), "{error}"),
        Ok(mut file) => {
            let error = file.write_all(&[0; 4096]).and_then(|()| file.sync_all()).unwrap_err();
            assert!(matches!(error.raw_os_error(), Some(1 | 5 | 30)), "{error}");
            for extra in [&[][..], &["--zeroout"]] {
                let discarded = Command::new("blkdiscard").args(extra).arg(&path).output().unwrap();
                assert!(!discarded.status.success(), "{extra:?}");
            }
        }
    }
    read_pattern(&open_direct(&path), 0, &mut Aligned::new(4096)).unwrap();
    attachment.detach().unwrap();
}

#[test]
fn a_device_that_is_held_is_not_detached_and_goes_on() {
    let runtime = runtime();
    let mut attachment = attach(Arc::new(TestDevice::new(HUGE)), &runtime, &Options::default());
    let path = attachment.device_path();
    // What a mount does: claim it exclusively.
    let claim = open_exclusive(&path).unwrap();
    let error = attachment.detach().unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    assert!(error.to_string().contains("unmount"), "{error}");
    assert!(matches!(ublk::remove(attachment.state()).unwrap_err(), Error::Busy { .. }));
    read_pattern(&claim, VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
    drop(claim);
    let opened = open_direct(&path);
    assert!(matches!(attachment.detach().unwrap_err(), Error::StillOpen { .. }));
    read_pattern(&opened, VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
    drop(opened);
    attachment.detach().unwrap();
    attachment.detach().unwrap();
}

#[test]
fn misses_do_not_stand_before_hits() {
    let runtime = runtime();
    for data_path in data_paths() {
        let device = Arc::new(TestDevice {
            slow_from: VIRTUAL_BASE,
            delay: Duration::from_secs(2),
            ..TestDevice::new(HUGE)
        });
        let options = Options { data_path, queues: Some(1), ..Options::default() };
        let mut attachment = attach(device.clone(), &runtime, &options);
        let file = open_direct(&attachment.device_path());
        std::thread::scope(|scope| {
            let slow: Vec<_> = (0..16_u64)
                .map(|reader| {
                    let file = &file;
                    let offset = VIRTUAL_BASE + (reader << 30);
                    scope.spawn(move || read_pattern(file, offset, &mut Aligned::new(4096)).unwrap())
                })
                .collect();
            wait_until("the slow reads are under way", Duration::from_secs(5), || {
                device.under_way.load(Ordering::Relaxed) == 16
            });
            let begin = Instant::now();
            for block in 0..100 {
                read_pattern(&file, block * 4096, &mut Aligned::new(4096)).unwrap();
            }
            assert!(begin.elapsed() < Duration::from_secs(1), "{data_path}: {:?}", begin.elapsed());
            assert!(slow.iter().all(|reader| !reader.is_finished()), "hits came first");
        });
        drop(file);
        attachment.detach().unwrap();
    }
}

#[test]
fn more_misses_than_tags_are_all_answered() {
    let runtime = runtime();
    let device =
        Arc::new(TestDevice { slow_from: 0, delay: Duration::from_millis(5), ..TestDevice::new(HUGE) });
    let options = Options { queues: Some(1), depth: 4, ..Options::default() };
    let mut attachment = attach(device.clone(), &runtime, &options);
    let file = open_direct(&attachment.device_path());
    std::thread::scope(|scope| {
        for reader in 0..32_u64 {
            let file = &file;
            scope.spawn(move || {
                for block in 0..10 {
                    read_pattern(file, (reader << 30) + block * 4096, &mut Aligned::new(4096)).unwrap();
                }
            });
        }
    });
    assert!(device.most_under_way.load(Ordering::Relaxed) <= 4);
    drop(file);
    attachment.detach().unwrap();
}

/// This program again, as the server.
fn worker(directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "worker_process", "--ignored", "--nocapture", "--quiet"]);
    command.env(DIRECTORY, directory).stdout(Stdio::piped());
    command
}

#[test]
#[ignore = "a process that the tests below start"]
fn worker_process() {
    let directory = std::env::var_os(DIRECTORY).expect("started by the tests below, not by hand");
    let directory = PathBuf::from(directory);
    println!("born");
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice {
        slow_from: SLOW_FROM,
        delay: Duration::from_millis(20),
        ..TestDevice::new(HUGE)
    });
    let state_file = directory.join("state.json");
    let options = Options::default();
    let saved = std::fs::read(&state_file).ok();
    let mut attachment = match saved.map(|bytes| serde_json::from_slice::<SavedState>(&bytes).unwrap()) {
        Some(state) => ublk::resume(device, runtime.handle().clone(), state),
        None => ublk::attach(device, runtime.handle().clone(), &options),
    }
    .unwrap();
    if !state_file.exists() {
        std::fs::write(directory.join("state.new"), serde_json::to_vec(attachment.state()).unwrap()).unwrap();
        std::fs::rename(directory.join("state.new"), &state_file).unwrap();
    }
    println!("ready");
    wait_until("asked to stop", Duration::from_secs(600), || directory.join("stop").exists());
    attachment.detach().unwrap();
    // The test harness's own way out could wait for output that nobody reads.
    std::process::exit(0);
}

/// A server in a process of its own.
struct Served {
    directory: tempfile::TempDir,
    worker: Child,
    output: BufReader<std::process::ChildStdout>,
    state: SavedState,
}

impl Served {
    fn start() -> Served {
        features();
        let directory = tempfile::tempdir().unwrap();
        let mut child = worker(directory.path()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        wait_for_line(&mut output, "ready");
        let state = std::fs::read(directory.path().join("state.json")).unwrap();
        Served { directory, worker: child, output, state: serde_json::from_slice(&state).unwrap() }
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.state.number))
    }

    /// Kills the server and starts the next, without waiting for anything.
    fn kill_and_start(&mut self) {
        self.worker.kill().unwrap();
        let mut child = worker(self.directory.path()).spawn().unwrap();
        self.output = BufReader::new(child.stdout.take().unwrap());
        std::mem::replace(&mut self.worker, child).wait().unwrap();
    }

    fn wait_for(&mut self, word: &str) {
        wait_for_line(&mut self.output, word);
    }

    fn stop(mut self) {
        std::fs::write(self.directory.path().join("stop"), "").unwrap();
        assert!(self.worker.wait().unwrap().success());
        assert_eq!(ublk::find(&self.state).unwrap(), None);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // After a failed test: without a server and a device its readers fail rather than hang.
        let _ = self.worker.kill();
        let _ = self.worker.wait();
        let _ = ublk::remove(&self.state);
    }
}

/// After a failure, lets the readers of a device that nobody serves fail rather than hang.
struct Abandon<'a>(&'a SavedState);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && ublk::find(self.0).unwrap().is_some() {
            let id = DeviceId { number: self.0.number, unprivileged: false };
            let _ = Control::open().unwrap().stop(id);
        }
    }
}

fn wait_for_line(output: &mut impl BufRead, word: &str) {
    let mut line = String::new();
    // The test harness prints beside it.
    while !line.trim_end().ends_with(word) {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the server ended");
    }
}

#[test]
fn a_hundred_kills_under_load_without_an_error() {
    let mut served = Served::start();
    let (device, state) = (served.device(), served.state.clone());
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut outages = Vec::new();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..DEPTH)
            .map(|reader| {
                let (device, stop, reads) = (&device, &stop, &reads);
                scope.spawn(move || {
                    let file = open_direct(device);
                    let mut buffer = Aligned::new(4096);
                    // One in eight reads of the slow part: killed while it waits.
                    let base = if reader % 8 == 0 { SLOW_FROM } else { VIRTUAL_BASE };
                    let mut index = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let offset = base + (reader << 40) + index * 4096;
                        read_pattern(&file, offset, &mut buffer)
                            .unwrap_or_else(|error| panic!("reader {reader} at {offset}: {error}"));
                        reads.fetch_add(1, Ordering::Relaxed);
                        index += 1;
                    }
                })
            })
            .collect();
        let _abandon = Abandon(&state);
        for _ in 0..100 {
            let before = reads.load(Ordering::Relaxed);
            wait_until("readers read on", Duration::from_secs(20), || {
                reads.load(Ordering::Relaxed) > before + DEPTH
            });
            let killed = Instant::now();
            served.kill_and_start();
            let at_kill = reads.load(Ordering::Relaxed);
            served.wait_for("ready");
            while reads.load(Ordering::Relaxed) == at_kill {
                assert!(killed.elapsed() < Duration::from_secs(20), "nobody reads on after a kill");
                std::thread::sleep(Duration::from_millis(1));
            }
            outages.push(killed.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    outages.sort();
    println!(
        "{} reads; without a server for {:?} in the middle, at most {:?}",
        reads.load(Ordering::Relaxed),
        outages[50],
        outages[99]
    );
    assert!(outages[99] < Duration::from_secs(1), "{:?}", outages[99]);
    served.stop();
}

#[test]
fn servers_that_die_before_they_serve_are_survived() {
    let mut served = Served::start();
    let (device, state) = (served.device(), served.state.clone());
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
        let _abandon = Abandon(&state);
        for round in 0..10 {
            served.kill_and_start();
            served.wait_for("born");
            // At another moment of its start each time.
            std::thread::sleep(Duration::from_micros(round * 700));
        }
        served.wait_for("ready");
        // Not hung, and not failed.
        std::thread::sleep(Duration::from_millis(100));
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    served.stop();
}

#[test]
fn what_a_dead_server_left_is_found_refused_while_held_and_removed() {
    let mut served = Served::start();
    let claim = open_exclusive(&served.device()).unwrap();
    read_pattern(&claim, 0, &mut Aligned::new(4096)).unwrap();
    served.worker.kill().unwrap();
    served.worker.wait().unwrap();
    assert_eq!(ublk::find(&served.state).unwrap(), Some(served.state.number));
    assert!(matches!(ublk::remove(&served.state).unwrap_err(), Error::Busy { .. }));
    drop(claim);
    // Another's device is not ours, whatever its number.
    let other = SavedState { id: served.state.id ^ 1, ..served.state.clone() };
    assert_eq!(ublk::find(&other).unwrap(), None);
    assert!(!ublk::remove(&other).unwrap());
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice::new(HUGE));
    let error = ublk::resume(device, runtime.handle().clone(), other).err().unwrap();
    assert!(matches!(error, Error::Mismatch(_)), "{error}");
    assert!(ublk::remove(&served.state).unwrap());
    assert_eq!(ublk::find(&served.state).unwrap(), None);
    assert!(!served.device().exists());
}

#[test]
fn a_device_that_is_served_cannot_be_taken_over() {
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice::new(HUGE));
    let mut attachment = attach(device.clone(), &runtime, &Options::default());
    let handle = runtime.handle().clone();
    let resumed = ublk::resume(device, handle.clone(), attachment.state().clone());
    let error = resumed.err().unwrap();
    assert!(matches!(error, Error::Mismatch(_)) && error.to_string().contains("still served"), "{error}");
    let smaller: Arc<dyn BlockDevice> = Arc::new(TestDevice::new(HUGE / 2));
    let resumed = ublk::resume(smaller, handle, attachment.state().clone());
    assert!(matches!(resumed.err().unwrap(), Error::Mismatch(_)));
    let mut buffer = Aligned::new(4096);
    open_direct(&attachment.device_path()).read_exact_at(buffer.bytes(), 0).unwrap();
    attachment.detach().unwrap();
}

//! What a test may leave behind: mounts, loop and ublk devices, processes. Found through /proc and /sys alone, so that
//! nothing of the code under test is asked about itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::harness::kill;

/// Loop devices with autoclear and daemons that were told to end take a moment.
const SETTLE: Duration = Duration::from_secs(5);

/// A device as it was attached: the number alone may have been given to somebody else since.
#[derive(Debug)]
pub(crate) struct Attached {
    device: String,
    /// The file behind a loop device.
    backing: Option<String>,
    /// The kernel counts devices, never twice the same.
    sequence: String,
}

impl Attached {
    /// What stands behind `device` (`/dev/loopN`, `/dev/ublkbN`) now; `None` if nothing does.
    pub(crate) fn of(device: &Path) -> Option<Attached> {
        let name = device.file_name()?.to_str()?.to_string();
        let backing = read(&format!("/sys/block/{name}/loop/backing_file"));
        if backing.is_none() && !name.starts_with("ublkb") {
            return None;
        }
        let sequence = read(&format!("/sys/block/{name}/diskseq"))?;
        Some(Attached { device: name, backing, sequence })
    }

    fn is_attached(&self) -> bool {
        let now = Attached::of(Path::new(&self.device));
        now.is_some_and(|now| now.backing == self.backing && now.sequence == self.sequence)
    }
}

/// A ublk device, which exists from its making to its removal whether or not anybody serves it. Nothing in /sys tells
/// whose it is; the inode of its folder there tells it from another one that has the number later.
#[derive(Debug, PartialEq, Eq)]
struct Ublk {
    name: String,
    inode: u64,
}

impl Ublk {
    fn all() -> Vec<Ublk> {
        let entries = fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
        let found = entries.filter_map(|entry| {
            let inode = fs::metadata(entry.path()).ok()?.ino();
            Some(Ublk { name: entry.file_name().to_string_lossy().into_owned(), inode })
        });
        found.collect()
    }
}

/// Those who watch ublk devices in this process (a test has a process of its own, and tests take turns), and the
/// devices that were there before the first of them.
static WATCH: Mutex<(usize, Vec<Ublk>)> = Mutex::new((0, Vec::new()));

/// From its making on, ublk devices that appear are the test's: when the last watch of a process ends, they are to be
/// gone.
#[derive(Debug)]
pub(crate) struct UblkWatch(());

impl UblkWatch {
    /// Begins to watch.
    pub(crate) fn begin() -> UblkWatch {
        let mut watch = WATCH.lock().unwrap();
        if watch.0 == 0 {
            watch.1 = Ublk::all();
        }
        watch.0 += 1;
        UblkWatch(())
    }

    /// Devices that have appeared, where nobody else of this process may have made them.
    fn appeared(&self) -> Vec<Ublk> {
        let watch = WATCH.lock().unwrap();
        if watch.0 > 1 {
            return Vec::new();
        }
        Ublk::all().into_iter().filter(|device| !watch.1.contains(device)).collect()
    }
}

impl Drop for UblkWatch {
    fn drop(&mut self) {
        WATCH.lock().unwrap().0 -= 1;
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_string())
}

/// Everything under `directory` that is still mounted, attached or running after a short wait.
pub(crate) fn find(directory: &Path, attached: &[Attached], watch: &UblkWatch) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let mut left: Vec<String> =
            mounts(directory).iter().map(|target| format!("mounted: {}", target.display())).collect();
        left.extend(loops(directory).iter().map(|(name, file)| format!("attached: {name} on {file}")));
        left.extend(processes(directory).iter().map(|(pid, line)| format!("running: {pid} {line}")));
        left.extend(
            attached
                .iter()
                .filter(|device| device.is_attached())
                .map(|device| format!("attached: {device:?}")),
        );
        left.extend(watch.appeared().iter().map(|device| format!("attached: {device:?}")));
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ends what [`find`] found, as well as it can be done, so that one bad test does not spoil the next.
pub(crate) fn force_clean(directory: &Path) {
    for target in mounts(directory).iter().rev() {
        let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
    }
    for (pid, _) in processes(directory) {
        kill(pid);
    }
    for (name, _) in loops(directory) {
        let _ = std::process::Command::new("losetup").args(["-d", &format!("/dev/{name}")]).status();
    }
}

/// Whether `target` is a mount point.
pub(crate) fn is_mounted(target: &Path) -> bool {
    let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_path_buf());
    mounts(&target).contains(&target)
}

/// Whether a process with this id exists and is not a zombie.
pub(crate) fn is_running(pid: i32) -> bool {
    let Some(status) = read(&format!("/proc/{pid}/stat")) else { return false };
    !status.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
}

/// Mount points at or under `directory`, parents first.
fn mounts(directory: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    targets.filter(|target| target.starts_with(directory)).collect()
}

/// Loop devices backed by a file under `directory`.
fn loops(directory: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(file) = read(&format!("/sys/block/{name}/loop/backing_file"))
            && Path::new(&file).starts_with(directory)
        {
            found.push((name, file));
        }
    }
    found
}

/// Processes whose command line or environment names `directory`, this one aside.
fn processes(directory: &Path) -> Vec<(i32, String)> {
    let needle = directory.as_os_str().as_encoded_bytes();
    let mentions = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        if u32::try_from(pid) == Ok(std::process::id()) || !is_running(pid) {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if mentions(&line) || mentions(&environment) {
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            found.push((pid, words.join(" ")));
        }
    }
    found
}

//! [`Loam`]: the real binary with a pool of its own under a temporary directory.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::{FileServer, leaks, tarball};

/// A pool's local device in tests: sparse, so the size costs nothing.
const LOCAL_SIZE: &str = "4GiB";

/// Fails the test unless it runs as root.
pub fn require_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the end-to-end tests attach loop devices and mount: run them as root (`cargo xtask test --unit` needs none)"
    );
}

/// The binary under test: `LOAM_BIN`, or the one built beside this test.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("LOAM_BIN") {
        return PathBuf::from(path);
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let beside = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").join("loam");
    assert!(
        beside.is_file(),
        "{} is not built: cargo build --package loam, or set LOAM_BIN",
        beside.display()
    );
    beside
}

/// Polls until `condition` holds; fails the test after `limit`, saying what did not happen.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// How long it took.
    pub elapsed: Duration,
    line: String,
}

impl Outcome {
    /// Fails the test unless the command succeeded; returns its output without the last line end.
    #[track_caller]
    pub fn ok(self) -> String {
        let Outcome { status, stdout, stderr, line, .. } = self;
        assert!(status.success(), "`{line}`: {status}\nstdout: {stdout}\nstderr: {stderr}");
        stdout.trim_end_matches('\n').to_string()
    }

    /// Fails the test unless the command failed as loam promises: exit code 1 or 2, `loam: what: why` on stderr, no
    /// panic. Returns stderr.
    #[track_caller]
    pub fn fails(self) -> String {
        let Outcome { status, stdout, stderr, line, .. } = self;
        let code = status.code();
        assert!(matches!(code, Some(1 | 2)), "`{line}`: {status}\nstdout: {stdout}\nstderr: {stderr}");
        assert!(stderr.contains("loam: "), "`{line}`: stderr does not say what: why: {stderr}");
        assert!(!stderr.contains("panicked"), "`{line}`: {stderr}");
        stderr
    }

    /// The one JSON object that the command printed.
    #[track_caller]
    pub fn json(self) -> Value {
        let line = self.line.clone();
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`{line}`: {error} in {text}"))
    }
}

/// The binary with a pool directory, a mount point and a scratch directory of its own. The transport is what
/// `LOAM_TRANSPORT` says (the binary reads it too), else what the binary takes by itself.
pub struct Loam {
    directory: TempDir,
    pool: PathBuf,
    lazy_mounts: Mutex<Vec<PathBuf>>,
    devices: Mutex<Vec<leaks::Attached>>,
    ublk: leaks::UblkWatch,
}

impl Loam {
    /// Paths only: nothing is formatted or started. Fails without root.
    pub fn new() -> Self {
        require_root();
        let directory =
            tempfile::Builder::new().prefix("loam-e2e-").tempdir().expect("a temporary directory");
        let pool = directory.path().join("pool");
        let ublk = leaks::UblkWatch::begin();
        Loam { directory, pool, lazy_mounts: Mutex::default(), devices: Mutex::default(), ublk }
    }

    /// A pool that is formatted and up.
    pub fn up() -> Self {
        let loam = Loam::new();
        loam.run(["init", "--local-size", LOCAL_SIZE]).ok();
        loam.run(["up"]).ok();
        loam.remember_device();
        loam
    }

    /// The pool's directory; it does not exist before `init`.
    pub fn pool(&self) -> &Path {
        &self.pool
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the pool is mounted, as `status` says.
    pub fn mount(&self) -> PathBuf {
        let status = self.status();
        PathBuf::from(status["mount"].as_str().unwrap_or_else(|| panic!("no mount in {status}")))
    }

    /// The command, not yet started, with this pool and a quiet environment.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("LOAM_POOL", &self.pool).stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Outcome {
        run(&mut self.command(arguments))
    }

    /// Starts the command and leaves it running, output discarded.
    pub fn spawn<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the binary starts")
    }

    /// `loam mount SOURCE` on a directory of its own, which is unmounted at the latest when this is dropped.
    pub fn mount_image(&self, source: &str, name: &str) -> PathBuf {
        let target = self.path(name);
        std::fs::create_dir_all(&target).unwrap();
        self.lazy_mounts.lock().unwrap().push(target.clone());
        self.run([OsStr::new("mount"), OsStr::new(source), target.as_os_str()]).ok();
        target
    }

    /// Packs `tree`, indexes the tar and serves both; returns the source to add or mount.
    pub fn publish(&self, server: &FileServer, tree: &Path, name: &str) -> String {
        let (tar, index) = (self.path(format!("{name}.tar")), self.path(format!("{name}.tar.loam")));
        tarball::pack(tree, &tar);
        self.run(["index", &format!("tar:{}", tar.display()), "-o", &index.display().to_string()]).ok();
        server.put(&format!("{name}.tar"), std::fs::read(&tar).unwrap());
        server.put(&format!("{name}.tar.loam"), std::fs::read(&index).unwrap());
        format!("tar:{}", server.url(&format!("{name}.tar")))
    }

    /// The path of an image or container, as `show` says.
    pub fn path_of(&self, name: &str) -> PathBuf {
        let shown = self.run(["show", name, "--json"]).json();
        PathBuf::from(shown["path"].as_str().unwrap_or_else(|| panic!("no path in {shown}")))
    }

    /// Counters of what went wrong, added up.
    pub fn errors(&self) -> u64 {
        let status = self.status();
        let errors = status["errors"].as_object().unwrap_or_else(|| panic!("no errors in {status}"));
        errors.values().map(|count| count.as_u64().expect("counters are integers")).sum()
    }

    /// `loam status --json`.
    pub fn status(&self) -> Value {
        self.run(["status", "--json"]).json()
    }

    /// The daemon's process id, as `status` says.
    pub fn daemon_pid(&self) -> i32 {
        let status = self.status();
        let pid = status["daemon"]["pid"].as_i64().unwrap_or_else(|| panic!("no daemon.pid in {status}"));
        i32::try_from(pid).unwrap()
    }

    /// SIGKILL to the daemon; returns once that process is gone.
    pub fn kill_daemon(&self) {
        let pid = self.daemon_pid();
        kill(pid);
        wait_until("the killed daemon is gone", Duration::from_secs(5), || !leaks::is_running(pid));
    }

    /// Makes the leak check of this pool look at the device that `status` names now.
    pub fn remember_device(&self) {
        let status = self.status();
        if let Some(device) = status["device"].as_str() {
            self.devices.lock().unwrap().extend(leaks::Attached::of(Path::new(device)));
        }
    }

    /// `loam down` and `loam umount` of everything, then everything that is still there.
    pub fn tear_down(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for target in self.lazy_mounts.lock().unwrap().drain(..) {
            if leaks::is_mounted(&target) {
                let outcome = self.run([OsStr::new("umount"), target.as_os_str()]);
                if !outcome.status.success() {
                    problems.push(format!("umount of {}: {}", target.display(), outcome.stderr));
                }
            }
        }
        if self.pool.join("pool.toml").exists() {
            let outcome = self.run(["down"]);
            if !outcome.status.success() {
                problems.push(format!("down: {}", outcome.stderr));
            }
        }
        let attached = self.devices.lock().unwrap();
        problems.extend(leaks::find(self.directory.path(), &attached, &self.ublk));
        problems
    }
}

impl Default for Loam {
    fn default() -> Self {
        Loam::new()
    }
}

impl Drop for Loam {
    fn drop(&mut self) {
        let problems = self.tear_down();
        if problems.is_empty() {
            return;
        }
        leaks::force_clean(self.directory.path());
        let report = format!("left behind:\n  {}", problems.join("\n  "));
        if std::thread::panicking() {
            eprintln!("{report}");
        } else {
            panic!("{report}");
        }
    }
}

/// SIGKILL to one process.
pub(crate) fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id is positive");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Runs any command to its end.
pub(crate) fn run(command: &mut Command) -> Outcome {
    let line = format!("{command:?}");
    let started = Instant::now();
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
    Outcome {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        elapsed: started.elapsed(),
        line,
    }
}

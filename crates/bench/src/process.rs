//! Child processes, and directories whose loam is taken down when they go.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// The most characters of what a failed command said.
const SAID_MAX: usize = 1000;

/// Runs a command to its end; anything but success is an error with what it said. Returns its output and its time.
pub(crate) fn timed(command: &mut Command) -> Result<(String, Duration)> {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).output();
    let elapsed = started.elapsed();
    let name = command.get_program().to_string_lossy().into_owned();
    let output = output.with_context(|| format!("cannot start {name}: is it installed?"))?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        // fio says what went wrong on its standard output.
        let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        let said: String = String::from_utf8_lossy(said).trim().chars().take(SAID_MAX).collect();
        bail!("`{name} {}` ended with {}: {said}", arguments.join(" "), output.status);
    }
    Ok((String::from_utf8_lossy(&output.stdout).trim_end().to_string(), elapsed))
}

/// An empty pool directory and mount points for the binary that runs now.
pub(crate) struct Sandbox {
    directory: TempDir,
    mounted: Vec<PathBuf>,
    up: bool,
}

impl Sandbox {
    /// A directory below `parent`.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("loam-bench-").tempdir_in(parent);
        let directory =
            directory.with_context(|| format!("no temporary directory in {}", parent.display()))?;
        Ok(Sandbox { directory, mounted: Vec::new(), up: false })
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("this program's own path")?);
        command.args(arguments).env("LOAM_POOL", self.path("pool"));
        Ok(command)
    }

    /// Runs a loam command on this pool.
    pub(crate) fn loam<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<(String, Duration)> {
        timed(&mut self.command(arguments)?)
    }

    /// `loam up`, and `loam down` at the latest when this is dropped.
    pub(crate) fn up(&mut self) -> Result<Duration> {
        self.up = true;
        Ok(self.loam(["up"])?.1)
    }

    /// `loam mount IMAGE` on a new directory, unmounted at the latest when this is dropped.
    pub(crate) fn mount(&mut self, image: &[String]) -> Result<(PathBuf, Duration)> {
        let target = self.path("mnt");
        std::fs::create_dir(&target)?;
        self.mounted.push(target.clone());
        let mut arguments = vec![OsStr::new("mount"), target.as_os_str()];
        arguments.splice(1..1, image.iter().map(OsStr::new));
        let (_, elapsed) = self.loam(arguments)?;
        Ok((target, elapsed))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for target in std::mem::take(&mut self.mounted) {
            if let Err(error) = self.loam([OsStr::new("umount"), target.as_os_str()]) {
                eprintln!("loam bench: left behind: {error:#}");
            }
        }
        if self.up
            && let Err(error) = self.loam(["down"])
        {
            eprintln!("loam bench: left behind: {error:#}");
        }
    }
}

/// A loop device on a file, detached when dropped.
pub(crate) struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// `losetup --find --show OPTIONS FILE`.
    pub(crate) fn attach(file: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new("losetup");
        let (path, _) = timed(command.args(["--find", "--show"]).args(options).arg(file))?;
        Ok(LoopDevice { path: PathBuf::from(path) })
    }

    /// `/dev/loopN`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = timed(Command::new("losetup").arg("--detach").arg(&self.path)) {
            eprintln!("loam bench: left behind: {error:#}");
        }
    }
}

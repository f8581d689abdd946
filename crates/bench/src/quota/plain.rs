//! A btrfs of its own on a loop device, mounted nowhere: its mount has no place in any directory, only a descriptor
//! here, by which writers find it. When this process ends, however it ends, nothing of it is left.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use loam_attach::{FileAttachment, FileOptions};
use loam_sys::btrfs;
use rustix::fs::{FallocateFlags, Mode as Permissions, OFlags};

use super::ground::{COMMIT, Ground, set_mode};
use super::plan::{BLOCK, Point, Shape};
use crate::clone::{median, mount_detached};
use crate::process::{Sandbox, timed};
use crate::record::{Metrics, stop_if_interrupted};

const SHARED: &str = "shared";
const VICTIM: &str = "victim";
const PROBED: &str = "probed";

pub(super) struct Plain {
    mount: Option<OwnedFd>,
    device: FileAttachment,
    writers: u32,
    snapshot_time: Duration,
    // Last: the image lies in it.
    _sandbox: Sandbox,
}

impl Plain {
    /// Formats, turns quotas on, and makes files and snapshots.
    pub(super) fn make(point: &Point, directory: &Path, size: u64) -> Result<Self> {
        let sandbox = Sandbox::new(directory)?;
        let image = sandbox.path("image");
        File::create_new(&image)?.set_len(size)?;
        timed(std::process::Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&image))?;
        let device = FileAttachment::attach(&image, &FileOptions::default())?;
        let mut plain = Plain {
            mount: None,
            device,
            writers: point.shape.writers,
            snapshot_time: Duration::ZERO,
            _sandbox: sandbox,
        };
        plain.mount()?;
        let root = plain.root()?;
        set_mode(&root, point.mode)?;
        btrfs::create_subvolume(&root, SHARED)?;
        btrfs::create_subvolume(&root, PROBED)?;
        make_files(&plain.path(SHARED), &point.shape)?;
        btrfs::sync(&root)?;
        plain.snapshot_time = plain.make_snapshots(point.shape.snapshots)?;
        btrfs::sync(&root)?;
        Ok(plain)
    }

    fn mount(&mut self) -> Result<Duration> {
        let started = Instant::now();
        self.mount = Some(mount_detached(&self.device.device_path(), None, &[COMMIT])?);
        Ok(started.elapsed())
    }

    /// Of something in it, for other processes too.
    fn path(&self, name: &str) -> PathBuf {
        let mount = self.mount.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        PathBuf::from(format!("/proc/{}/fd/{mount}/{name}", std::process::id()))
    }

    /// The victim, and `count` others. Returns the median time of one.
    fn make_snapshots(&self, count: u32) -> Result<Duration> {
        let (root, source) = (self.root()?, File::open(self.path(SHARED))?);
        let mut times = Vec::new();
        for name in std::iter::once(VICTIM.to_string()).chain((0..count).map(other)) {
            stop_if_interrupted()?;
            let started = Instant::now();
            btrfs::snapshot(&source, &root, name, false)?;
            times.push(started.elapsed());
        }
        times.sort();
        Ok(median(&times))
    }
}

fn other(number: u32) -> String {
    format!("other{number}")
}

/// Files of one written extent, or of many that are allocated one by one, which the kernel does not join.
fn make_files(directory: &Path, shape: &Shape) -> Result<()> {
    let content: Vec<u8> = (0..shape.file_bytes).map(|at| (at % 251) as u8).collect();
    for number in 0..shape.files {
        stop_if_interrupted()?;
        let path = directory.join(number.to_string());
        if shape.extents == 1 {
            fs::write(&path, &content).with_context(|| format!("cannot write {}", path.display()))?;
            continue;
        }
        let file = File::create_new(&path)?;
        for extent in 0..u64::from(shape.extents) {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), extent * BLOCK, BLOCK)?;
        }
    }
    Ok(())
}

impl Ground for Plain {
    fn root(&self) -> Result<File> {
        let mount = self.mount.as_ref().context("not mounted")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(mount, ".", flags, Permissions::empty())?))
    }

    fn victim(&self) -> PathBuf {
        self.path(VICTIM)
    }

    fn others(&self) -> Vec<PathBuf> {
        (0..self.writers).map(|number| self.path(&other(number))).collect()
    }

    fn probed(&self) -> PathBuf {
        self.path(PROBED)
    }

    fn snapshot_time(&self) -> Duration {
        self.snapshot_time
    }

    fn end(&mut self, metrics: &mut Metrics) -> Result<()> {
        let started = Instant::now();
        // Its last descriptor: the kernel unmounts it before close(2) returns.
        self.mount = None;
        metrics.insert("umount_seconds".into(), started.elapsed().as_secs_f64());
        metrics.insert("mount_seconds".into(), self.mount()?.as_secs_f64());
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.mount = None;
        // The kernel remembers scanned devices by their numbers, which others get next.
        let _ = btrfs::forget_device(&self.device.device_path());
        if let Err(error) = self.device.detach() {
            eprintln!("loam bench: left behind: {error:#}");
        }
    }
}

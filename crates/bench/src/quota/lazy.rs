//! The same in a pool: the files are an image whose data has not arrived, the snapshots are containers. Everything is
//! done by loam's own commands, but for the quota mode, which the pool would not choose so.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use loam_sys::btrfs;
use serde_json::Value;

use super::ground::{COMMIT, Ground, set_mode};
use super::plan::{Point, Shape};
use crate::clone::median;
use crate::process::{Sandbox, timed};
use crate::record::{Metrics, stop_if_interrupted};

const IMAGE: &str = "shared";
/// Where the top-level subvolume of a pool is mounted, in its directory.
const MOUNT: &str = "pool/mnt";
/// A subvolume beside images and containers.
const PROBED: &str = "probed";

pub(super) struct Pool {
    /// The first is the victim's.
    containers: Vec<PathBuf>,
    writers: usize,
    snapshot_time: Duration,
    sandbox: Sandbox,
}

impl Pool {
    /// Makes a directory of files, a pool, an image of the directory, and containers.
    pub(super) fn make(point: &Point, directory: &Path, size: u64) -> Result<Self> {
        let mut sandbox = Sandbox::new(directory)?;
        let source = sandbox.path("source");
        make_source(&source, &point.shape)?;
        sandbox.loam(["init", "--local-size", &size.to_string()])?;
        sandbox.up()?;
        sandbox.loam(["add", IMAGE, &format!("dir:{}", source.display())])?;
        let mut remount = Command::new("mount");
        timed(remount.arg("-o").arg(format!("remount,{COMMIT}")).arg(sandbox.path(MOUNT)))?;
        let root = File::open(sandbox.path(MOUNT))?;
        set_mode(&root, point.mode)?;
        btrfs::create_subvolume(&root, PROBED)?;
        let (mut containers, mut times) = (Vec::new(), Vec::new());
        for number in 0..=point.shape.snapshots {
            stop_if_interrupted()?;
            let (path, elapsed) = sandbox.loam(["create", &format!("c{number}"), IMAGE])?;
            containers.push(PathBuf::from(path.trim()));
            times.push(elapsed);
        }
        btrfs::sync(&root)?;
        times.sort();
        let writers = point.shape.writers as usize;
        Ok(Pool { containers, writers, snapshot_time: median(&times), sandbox })
    }
}

/// Files no two of which are alike.
fn make_source(directory: &Path, shape: &Shape) -> Result<()> {
    fs::create_dir(directory)?;
    for number in 0..shape.files {
        let content: Vec<u8> = (0..shape.file_bytes / 8)
            .flat_map(|word| (word << 32 | u64::from(number)).to_le_bytes())
            .collect();
        fs::write(directory.join(number.to_string()), content)?;
    }
    Ok(())
}

impl Ground for Pool {
    fn root(&self) -> Result<File> {
        Ok(File::open(self.sandbox.path(MOUNT))?)
    }

    fn victim(&self) -> PathBuf {
        self.containers[0].clone()
    }

    fn others(&self) -> Vec<PathBuf> {
        self.containers[1..].iter().take(self.writers).cloned().collect()
    }

    fn probed(&self) -> PathBuf {
        self.sandbox.path(MOUNT).join(PROBED)
    }

    fn snapshot_time(&self) -> Duration {
        self.snapshot_time
    }

    /// Of a pool these are `loam down` and `loam up`: devices and the daemon too.
    fn end(&mut self, metrics: &mut Metrics) -> Result<()> {
        let status: Value = serde_json::from_str(&self.sandbox.loam(["status", "--json"])?.0)?;
        let fetched =
            status["cache"]["fetched_bytes"].as_f64().context("`loam status` says nothing of bytes")?;
        metrics.insert("fetched_bytes".into(), fetched);
        let (_, down) = self.sandbox.loam(["down"])?;
        metrics.insert("umount_seconds".into(), down.as_secs_f64());
        metrics.insert("mount_seconds".into(), self.sandbox.up()?.as_secs_f64());
        Ok(())
    }
}

//! What is written to: a filesystem with snapshots in it, plain or a pool.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use loam_sys::btrfs::{self, QuotaMode, quota};
use rustix::io::Errno;

use super::lazy::Pool;
use super::plain::Plain;
use super::plan::{Mode, Point, Series};
use crate::record::Metrics;

/// An option of the mount: a commit each second, not each half minute, so that a run of seconds has several of them.
pub(super) const COMMIT: &str = "commit=1";

/// A filesystem that is ready to be written to.
pub(super) trait Ground {
    /// Its top-level directory, or one of any subvolume.
    fn root(&self) -> Result<File>;

    /// The snapshot that the measured writer writes to.
    fn victim(&self) -> PathBuf;

    /// The snapshots that others write to.
    fn others(&self) -> Vec<PathBuf>;

    /// A subvolume with nothing in it.
    fn probed(&self) -> PathBuf;

    /// The median time of a snapshot while the ground was made.
    fn snapshot_time(&self) -> Duration;

    /// Takes it down and up again: `umount_seconds` and `mount_seconds`, and what else is known at the end. Nothing in it
    /// may be open.
    fn end(&mut self, metrics: &mut Metrics) -> Result<()>;
}

/// Makes the ground of a case below `directory`; the inner error is why this machine has none.
pub(super) fn make(
    point: &Point,
    directory: &Path,
    size: u64,
) -> Result<std::result::Result<Box<dyn Ground>, String>> {
    let made: Result<Box<dyn Ground>> = match point.shape.series {
        Series::Lazy => Pool::make(point, directory, size).map(|pool| Box::new(pool) as _),
        _ => Plain::make(point, directory, size).map(|plain| Box::new(plain) as _),
    };
    match made {
        Err(error) if error.is::<NoSimpleQuotas>() => Ok(Err(error.to_string())),
        other => other.map(Ok),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("this kernel has no simple quotas, which came with Linux 6.7")]
struct NoSimpleQuotas;

/// Has the filesystem count as `mode` says from now on, whatever it did before.
pub(super) fn set_mode(root: impl AsFd, mode: Mode) -> Result<()> {
    let wanted = match mode {
        Mode::None => None,
        Mode::Full => Some(QuotaMode::Full),
        Mode::Simple => Some(QuotaMode::Simple),
    };
    let now = btrfs::quota_mode(&root)?;
    if now.is_some() && now != wanted {
        btrfs::disable_quota(&root)?;
    }
    if let Some(wanted) = wanted.filter(|wanted| now != Some(*wanted)) {
        match btrfs::enable_quota(&root, wanted) {
            Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) => {
                return Err(NoSimpleQuotas.into());
            }
            enabled => enabled?,
        }
    }
    if mode == Mode::Full {
        quota::wait_for_rescan(&root)?;
    }
    btrfs::sync(&root)?;
    Ok(())
}

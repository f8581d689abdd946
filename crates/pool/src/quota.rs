//! Quotas of any btrfs, a pool's or not: enabled, limited, shown, verified and explained by path.
//!
//! Simple quotas charge an extent to the subvolume that wrote it first. Full qgroups, which count who shares what and slow
//! down commits, are there for who asks for them by name, and never chosen in place of the others. The accounts are the
//! kernel's; this module keeps nothing of its own.
//!
//! A limit on a subvolume's own group (`0/ID`) does not hold for subvolumes that are made in it: those get a group of their
//! own. The kernel makes them members of the groups that the outer one is a member of, so what is to hold for a container
//! and all that it makes is a limit on a group of level 1 with the container in it: [`contain`].

mod error;
mod limit;
mod live;
mod show;
mod top_level;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use loam_sys::btrfs::{self, QuotaMode, quota};
use serde::Serialize;

pub use error::{Error, Result};
pub use limit::{Limit, LimitKind, LimitOutcome, Target, contain, group_at, limit, release};
pub(crate) use limit::{abandon, contain_new, group_of};
pub use live::{Source, explain, verify};
pub use loam_seed::quota::{
    ExplainOptions, Explanation, GroupId, LargeExtent, Mode as TreeMode, Reference, Report, Standing,
};
pub(crate) use show::unnamed;
pub use show::{Group, ROWS_MAX, Row, Shown, Usage, show, usage};

/// How a filesystem counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// By the subvolume that wrote an extent first.
    Simple,
    /// By back references.
    Full,
}

impl From<QuotaMode> for Mode {
    fn from(mode: QuotaMode) -> Self {
        match mode {
            QuotaMode::Simple => Mode::Simple,
            QuotaMode::Full => Mode::Full,
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Simple => "simple quotas",
            Mode::Full => "full qgroups",
        })
    }
}

/// What turning quotas on did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Enabled {
    /// How the filesystem counts now.
    pub mode: Mode,
    /// Whether it did not before.
    pub changed: bool,
    /// Simple quotas: extents of earlier transactions are charged to nobody.
    pub enable_generation: Option<u64>,
}

/// Turns quotas on for the filesystem that `path` lies in. On already in this mode: nothing changes. For full qgroups it
/// returns when all that is there has been counted.
///
/// # Errors
/// No btrfs; mounted read-only; the other mode is on; a kernel without simple quotas (before 6.7).
pub fn enable(path: &Path, mode: Mode) -> Result<Enabled> {
    let root = open(path)?;
    let changed = match status(&root, path)? {
        Some(on) if Mode::from(on.mode) == mode => false,
        Some(on) => {
            return Err(Error::OtherMode { path: path.to_owned(), wanted: mode, on: on.mode.into() });
        }
        None => {
            // Kernels before 7.1 get tree blocks wrong that the enabling transaction writes: let there be few.
            kernel(path, btrfs::sync(&root))?;
            let wanted = if mode == Mode::Simple { QuotaMode::Simple } else { QuotaMode::Full };
            kernel(path, btrfs::enable_quota(&root, wanted)).map_err(|error| match error.errno() {
                Some(rustix::io::Errno::INVAL) if mode == Mode::Simple => Error::TooOld(path.to_owned()),
                _ => error,
            })?;
            true
        }
    };
    if mode == Mode::Full {
        kernel(path, quota::wait_for_rescan(&root))?;
    }
    let enable_generation = status(&root, path)?.and_then(|status| status.enable_generation);
    Ok(Enabled { mode, changed, enable_generation })
}

/// Turns quotas off; all groups and limits are forgotten. Returns whether they were on.
///
/// # Errors
/// No btrfs; mounted read-only.
pub fn disable(path: &Path) -> Result<bool> {
    let root = open(path)?;
    if status(&root, path)?.is_none() {
        return Ok(false);
    }
    kernel(path, btrfs::disable_quota(&root))?;
    Ok(true)
}

/// How the filesystem that `path` lies in counts; `None`: not at all.
///
/// # Errors
/// No btrfs.
pub fn mode(path: &Path) -> Result<Option<Mode>> {
    Ok(status(&open(path)?, path)?.map(|status| status.mode.into()))
}

/// Makes a group of level 1 or more.
///
/// # Errors
/// There is one; quotas are off.
pub fn create_group(path: &Path, group: GroupId) -> Result<()> {
    let root = enabled(path)?;
    if group.level() == 0 {
        return Err(Error::LevelZero(group));
    }
    let created = top_level::at_limit_too(path, &root, |root| quota::create_group(root, group.raw()));
    created.map_err(|error| match error.errno() {
        Some(rustix::io::Errno::EXIST) => Error::GroupExists(group),
        _ => error,
    })
}

/// Removes a group that has no members and that nothing is charged to.
///
/// # Errors
/// There is none; it is in use.
pub fn remove_group(path: &Path, group: GroupId) -> Result<()> {
    let root = enabled(path)?;
    let removed = top_level::at_limit_too(path, &root, |root| quota::remove_group(root, group.raw()));
    removed.map_err(|error| about(error, group))
}

/// Makes `member` a member of `group`. One that is one already stays so.
///
/// # Errors
/// One of them is not there, or their levels do not rise.
pub fn assign(path: &Path, member: GroupId, group: GroupId) -> Result<()> {
    let root = enabled(path)?;
    if member.level() >= group.level() {
        return Err(Error::LevelsFall { member, group });
    }
    let assigned =
        top_level::at_limit_too(path, &root, |root| quota::assign_group(root, member.raw(), group.raw()));
    match assigned {
        Err(error) if error.errno() == Some(rustix::io::Errno::EXIST) => Ok(()),
        // The kernel says EINVAL for a group that is not there.
        Err(error) if error.errno() == Some(rustix::io::Errno::INVAL) => {
            let groups = kernel(path, quota::list_groups(&root))?;
            let missing =
                [member, group].into_iter().find(|id| !groups.iter().any(|group| group.id == id.raw()));
            Err(missing.map_or(error, |group| Error::NoGroup { path: path.to_owned(), group }))
        }
        result => result,
    }
}

/// Ends a membership. What is none stays so.
///
/// # Errors
/// Quotas are off.
pub fn unassign(path: &Path, member: GroupId, group: GroupId) -> Result<()> {
    let root = enabled(path)?;
    let ended =
        top_level::at_limit_too(path, &root, |root| quota::unassign_group(root, member.raw(), group.raw()));
    match ended {
        Err(error) if error.errno() == Some(rustix::io::Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// Removes the groups that are left of deleted subvolumes and that nothing is charged to; older kernels leave them.
/// Returns how many.
///
/// # Errors
/// Quotas are off.
pub fn remove_stale(path: &Path) -> Result<usize> {
    let root = enabled(path)?;
    kernel(path, btrfs::sync(&root))?;
    remove_stale_of_commit(path, &root)
}

/// The same, without those whose charge has become nothing since the last commit; for who comes again.
pub(crate) fn remove_stale_later(path: &Path) -> Result<usize> {
    match enabled(path) {
        Err(Error::Off(_)) => Ok(0),
        root => remove_stale_of_commit(path, &root?),
    }
}

fn remove_stale_of_commit(path: &Path, root: &File) -> Result<usize> {
    let names = kernel(path, quota::subvolume_paths(root))?;
    let groups = kernel(path, quota::list_groups(root))?;
    let stale = groups.iter().filter(|group| {
        let id = GroupId::from_raw(group.id);
        id.level() == 0 && !names.contains_key(&id.number()) && group.referenced == 0 && group.exclusive == 0
    });
    // Of one that is being deleted the kernel says that it is busy.
    Ok(stale.filter(|group| quota::remove_group(root, group.id).is_ok()).count())
}

fn open(path: &Path) -> Result<File> {
    let root = File::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
    // Not by `statfs`, which looks at every block group: a pool has tens of thousands, and it takes 10 ms.
    btrfs::filesystem_info(&root).map_err(|_| Error::NotBtrfs(path.to_owned()))?;
    Ok(root)
}

/// The root of a filesystem whose quotas are on.
fn enabled(path: &Path) -> Result<File> {
    let root = open(path)?;
    status(&root, path)?.ok_or_else(|| Error::Off(path.to_owned()))?;
    Ok(root)
}

/// The root directory of a subvolume, and its group.
fn subvolume(path: &Path) -> Result<(File, GroupId)> {
    let root = open(path)?;
    let metadata = root.metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?;
    let info = kernel(path, btrfs::subvolume_info(&root))?;
    if metadata.ino() != btrfs::ROOT_INODE || !metadata.is_dir() {
        let names = quota::subvolume_paths(&root).unwrap_or_default();
        let within = names.get(&info.id).map(|name| Path::new("/").join(name));
        return Err(Error::NotASubvolume { path: path.to_owned(), within });
    }
    Ok((root, GroupId::from_raw(info.id)))
}

fn status(root: &File, path: &Path) -> Result<Option<quota::QuotaStatus>> {
    kernel(path, quota::quota_status(root))
}

/// Gives the kernel's refusals that any call may meet their names.
fn kernel<T>(path: &Path, result: loam_sys::Result<T>) -> Result<T> {
    result.map_err(|source| Error::kernel(path, source))
}

/// What the kernel's refusals mean of a group.
fn about(error: Error, group: GroupId) -> Error {
    match (error.errno(), error) {
        (Some(rustix::io::Errno::NOENT), Error::Kernel { path, .. }) => Error::NoGroup { path, group },
        (Some(rustix::io::Errno::BUSY), _) => Error::GroupInUse(group),
        (_, error) => error,
    }
}

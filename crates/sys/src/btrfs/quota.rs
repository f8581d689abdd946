//! Quotas: simple quotas (Linux 6.7), which charge a new extent to the subvolume that wrote it, or full qgroups.
//!
//! Here: turning them on and off, how they stand, rescans, and the group of one subvolume. [`groups`](list_groups) has
//! the groups of a whole filesystem and changes them, [`create_subvolume_in`] makes subvolumes that are members of groups
//! from their first byte on, and [`subvolume_paths`] says what to call them.

mod groups;
mod inherit;
mod names;

use std::os::fd::AsFd;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::search::{Key, tree_search};
use super::{MAGIC, subvolume_info};
use crate::ioctl::{self, READ, Request, WRITE, call_integer, plain};
use crate::{Error, Result};

pub use groups::{
    Qgroup, QgroupLimits, assign_group, create_group, limit_group, list_groups, remove_group, unassign_group,
};
pub use inherit::{Inherit, create_subvolume_in, snapshot_in};
pub use names::{SUBVOLUMES_MAX, subvolume_paths};

const QUOTA_CTL_ENABLE: u64 = 1;
const QUOTA_CTL_DISABLE: u64 = 2;
const QUOTA_CTL_ENABLE_SIMPLE_QUOTA: u64 = 4;
const LIMIT_MAX_RFER: u64 = 1 << 0;
/// The tree that holds qgroups (BTRFS_QUOTA_TREE_OBJECTID).
const QUOTA_TREE: u64 = 8;
const QGROUP_STATUS: u8 = 240;
const QGROUP_INFO: u8 = 242;
const QGROUP_LIMIT: u8 = 244;
/// A limit of this value is none: how the kernel clears one.
const CLEAR: u64 = u64::MAX;
const STATUS_ON: u64 = 1 << 0;
const STATUS_RESCAN: u64 = 1 << 1;
const STATUS_INCONSISTENT: u64 = 1 << 2;
const STATUS_SIMPLE: u64 = 1 << 3;

/// `struct btrfs_ioctl_quota_ctl_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct QuotaCtlArgs {
    command: u64,
    status: u64,
}

/// `struct btrfs_ioctl_qgroup_limit_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct QgroupLimitArgs {
    qgroupid: u64,
    flags: u64,
    max_rfer: u64,
    max_excl: u64,
    rsv_rfer: u64,
    rsv_excl: u64,
}

/// `struct btrfs_ioctl_quota_rescan_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RescanArgs {
    flags: u64,
    progress: u64,
    reserved: [u64; 6],
}

const _: () = assert!(size_of::<RescanArgs>() == 64);
const _: () = assert!(size_of::<QuotaCtlArgs>() == 16);
const _: () = assert!(size_of::<QgroupLimitArgs>() == 48);

const QUOTA_CTL: Request<QuotaCtlArgs> = Request::sized("BTRFS_IOC_QUOTA_CTL", READ | WRITE, MAGIC, 40);
// The kernel's header really says _IOR.
const QGROUP_LIMIT_SET: Request<QgroupLimitArgs> = Request::sized("BTRFS_IOC_QGROUP_LIMIT", READ, MAGIC, 43);
const QUOTA_RESCAN: Request<RescanArgs> = Request::sized("BTRFS_IOC_QUOTA_RESCAN", WRITE, MAGIC, 44);
const QUOTA_RESCAN_WAIT: u32 = plain(MAGIC, 46);

/// How a filesystem counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaMode {
    /// By the subvolume that wrote an extent first: cheap, and what lay there before is free.
    Simple,
    /// By backreferences: exact for shared extents, costly.
    Full,
}

/// What a subvolume's own qgroup says, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QgroupUsage {
    /// Charged to it.
    pub referenced: u64,
    /// Charged to it alone (the same under simple quotas).
    pub exclusive: u64,
    /// The most that `referenced` may become; `None`: no limit.
    pub limit: Option<u64>,
}

/// Turns quotas on for the filesystem that `file` lies in. Turning on what is on already changes nothing.
///
/// # Errors
/// `EINVAL` for simple quotas on a kernel before 6.7, or when the other mode is on.
pub fn enable_quota(file: impl AsFd, mode: QuotaMode) -> Result<()> {
    let command = match mode {
        QuotaMode::Simple => QUOTA_CTL_ENABLE_SIMPLE_QUOTA,
        QuotaMode::Full => QUOTA_CTL_ENABLE,
    };
    quota_control(&file, command)
}

/// Turns quotas off; all limits are forgotten.
///
/// # Errors
/// `ENOTTY` when it is not btrfs.
pub fn disable_quota(file: impl AsFd) -> Result<()> {
    quota_control(&file, QUOTA_CTL_DISABLE)
}

fn quota_control(file: &impl AsFd, command: u64) -> Result<()> {
    let mut arguments = QuotaCtlArgs { command, status: 0 };
    QUOTA_CTL.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd()))?;
    Ok(())
}

/// Limits what may be charged to the subvolume that `file` lies in to `limit` bytes; `None` lifts the limit.
///
/// # Errors
/// `ENOTCONN` when quotas are off.
pub fn limit_subvolume(file: impl AsFd, limit: Option<u64>) -> Result<()> {
    let mut arguments = QgroupLimitArgs::new_zeroed();
    // qgroupid 0 is the one of the subvolume that the descriptor lies in.
    arguments.flags = LIMIT_MAX_RFER;
    arguments.max_rfer = limit.unwrap_or(CLEAR);
    QGROUP_LIMIT_SET.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd()))?;
    Ok(())
}

/// How the quotas of a filesystem stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaStatus {
    /// How it counts.
    pub mode: QuotaMode,
    /// Simple quotas: extents of earlier transactions are charged to nobody. `None` for full qgroups.
    pub enable_generation: Option<u64>,
    /// Full qgroups: the counts are wrong until a rescan has ended.
    pub inconsistent: bool,
    /// Full qgroups: a rescan is under way.
    pub rescanning: bool,
}

/// How the quotas of the filesystem that `file` lies in stand, as of the last commit; `None` when they are off.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
pub fn quota_status(file: impl AsFd) -> Result<Option<QuotaStatus>> {
    let key = Key { objectid: 0, kind: QGROUP_STATUS, offset: 0 };
    let items = match tree_search(&file, QUOTA_TREE, key, key, 1) {
        Ok(items) => items,
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(items.first().and_then(|item| parse_status(&item.bytes)))
}

/// Takes `struct btrfs_qgroup_status_item` apart: version, generation, flags, rescan progress, and for simple quotas the
/// generation of their enabling.
fn parse_status(item: &[u8]) -> Option<QuotaStatus> {
    let flags = word(item, 2).filter(|flags| flags & STATUS_ON != 0)?;
    let simple = flags & STATUS_SIMPLE != 0;
    Some(QuotaStatus {
        mode: if simple { QuotaMode::Simple } else { QuotaMode::Full },
        enable_generation: word(item, 4).filter(|_| simple),
        inconsistent: flags & STATUS_INCONSISTENT != 0,
        rescanning: flags & STATUS_RESCAN != 0,
    })
}

/// How the filesystem that `file` lies in counts; `None` when quotas are off.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
pub fn quota_mode(file: impl AsFd) -> Result<Option<QuotaMode>> {
    Ok(quota_status(file)?.map(|status| status.mode))
}

/// Full qgroups: begins to count everything anew. One that is under way already is left to go on.
///
/// # Errors
/// `ENOTCONN` when quotas are off; `EINVAL` under simple quotas, which have nothing to count anew.
pub fn rescan_quota(file: impl AsFd) -> Result<()> {
    let mut arguments = RescanArgs::new_zeroed();
    match QUOTA_RESCAN.call(file.as_fd(), &mut arguments, || ioctl::describe(file.as_fd())) {
        Err(error) if error.errno() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

/// Waits until no rescan is under way.
///
/// # Errors
/// `EINTR` when a signal came first.
pub fn wait_for_rescan(file: impl AsFd) -> Result<()> {
    let describe = || ioctl::describe(file.as_fd());
    call_integer("BTRFS_IOC_QUOTA_RESCAN_WAIT", QUOTA_RESCAN_WAIT, file.as_fd(), 0, describe)?;
    Ok(())
}

/// What is charged to the subvolume that `file` lies in, as of the last commit, and its limit.
///
/// # Errors
/// `ENOENT` when quotas are off; `EPERM` without CAP_SYS_ADMIN.
pub fn qgroup_usage(file: impl AsFd) -> Result<QgroupUsage> {
    let id = subvolume_info(&file)?.id;
    let info = Key { objectid: 0, kind: QGROUP_INFO, offset: id };
    let limit = Key { kind: QGROUP_LIMIT, ..info };
    let info = tree_search(&file, QUOTA_TREE, info, info, 1)?;
    let Some(info) = info.first() else {
        let error = std::io::Error::from_raw_os_error(libc::ENOENT);
        let subject = format!("qgroup 0/{id} of {}", ioctl::describe(file.as_fd()));
        return Err(Error::new("BTRFS_IOC_TREE_SEARCH", subject, error));
    };
    let limit = tree_search(&file, QUOTA_TREE, limit, limit, 1)?;
    let limit = limit.first().and_then(|item| {
        // struct btrfs_qgroup_limit_item: flags, max_rfer, ...
        let flags = word(&item.bytes, 0)?;
        let bytes = word(&item.bytes, 1)?;
        (flags & LIMIT_MAX_RFER != 0 && bytes != CLEAR).then_some(bytes)
    });
    // struct btrfs_qgroup_info_item: generation, rfer, rfer_cmpr, excl, excl_cmpr.
    Ok(QgroupUsage {
        referenced: word(&info.bytes, 1).unwrap_or(0),
        exclusive: word(&info.bytes, 3).unwrap_or(0),
        limit,
    })
}

/// The `index`-th little-endian 64-bit word.
fn word(bytes: &[u8], index: usize) -> Option<u64> {
    let bytes = bytes.get(index * 8..index * 8 + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_told_from_its_flags() {
        let item = |flags: u64| {
            [1u64, 9, flags, 0, 7].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()
        };
        assert_eq!(parse_status(&item(STATUS_SIMPLE)), None, "off");
        let simple = parse_status(&item(STATUS_ON | STATUS_SIMPLE)).expect("on");
        assert_eq!(
            (simple.mode, simple.enable_generation, simple.inconsistent),
            (QuotaMode::Simple, Some(7), false)
        );
        let full = parse_status(&item(STATUS_ON | STATUS_INCONSISTENT | STATUS_RESCAN)[..32]).expect("on");
        assert_eq!((full.mode, full.enable_generation), (QuotaMode::Full, None));
        assert!(full.inconsistent && full.rescanning);
        assert_eq!(parse_status(&item(STATUS_ON)[..20]), None, "torn");
    }

    #[test]
    fn words_beyond_the_end_are_none() {
        let bytes: Vec<u8> = (0..20).collect();
        assert_eq!(word(&bytes, 1), Some(u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15])));
        assert_eq!(word(&bytes, 2), None);
    }
}

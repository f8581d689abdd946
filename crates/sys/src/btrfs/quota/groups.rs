//! Quota groups: listed with what is charged to them, made, removed, related and limited.
//!
//! A group is a number: its level in the upper 16 bits, and below it, for level 0, the id of a subvolume. Groups of
//! level 1 and more are made by hand; each may be a member of groups of higher levels.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{
    CLEAR, LIMIT_MAX_RFER, QGROUP_INFO, QGROUP_LIMIT, QGROUP_LIMIT_SET, QUOTA_TREE, QgroupLimitArgs, word,
};
use crate::btrfs::MAGIC;
use crate::btrfs::search::{Key, tree_search};
use crate::ioctl::{self, Request, WRITE};
use crate::{Error, Result};

const LIMIT_MAX_EXCL: u64 = 1 << 1;
const QGROUP_RELATION: u8 = 246;
/// The most groups that [`list_groups`] lists.
const GROUPS_MAX: usize = 1 << 20;
/// Items asked for in one search: more than fit an answer.
const SEARCH_ITEMS: u32 = 4096;

/// `struct btrfs_ioctl_qgroup_assign_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AssignArgs {
    assign: u64,
    member: u64,
    parent: u64,
}

/// `struct btrfs_ioctl_qgroup_create_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct CreateArgs {
    create: u64,
    qgroupid: u64,
}

const _: () = assert!(size_of::<AssignArgs>() == 24);
const _: () = assert!(size_of::<CreateArgs>() == 16);

const QGROUP_ASSIGN: Request<AssignArgs> = Request::sized("BTRFS_IOC_QGROUP_ASSIGN", WRITE, MAGIC, 41);
const QGROUP_CREATE: Request<CreateArgs> = Request::sized("BTRFS_IOC_QGROUP_CREATE", WRITE, MAGIC, 42);

/// The most that may be charged to a group, in bytes; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QgroupLimits {
    /// Of what is charged to it.
    pub referenced: Option<u64>,
    /// Of what is charged to it alone.
    pub exclusive: Option<u64>,
}

/// A group as the quota tree has it, as of the last commit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Qgroup {
    /// Its number.
    pub id: u64,
    /// Bytes charged to it.
    pub referenced: u64,
    /// Bytes charged to it alone; the same under simple quotas.
    pub exclusive: u64,
    /// Its limits.
    pub limits: QgroupLimits,
    /// The groups that it is a member of, ascending.
    pub parents: Vec<u64>,
}

/// All groups of the filesystem that `file` lies in, by number; none when quotas are off.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `EFBIG` when there are more than a million.
pub fn list_groups(file: impl AsFd) -> Result<Vec<Qgroup>> {
    let mut groups: BTreeMap<u64, Qgroup> = BTreeMap::new();
    let mut first = Key { objectid: 0, kind: QGROUP_INFO, offset: 0 };
    let last = Key { objectid: u64::MAX, kind: QGROUP_RELATION, offset: u64::MAX };
    loop {
        let items = match tree_search(&file, QUOTA_TREE, first, last, SEARCH_ITEMS) {
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
            result => result?,
        };
        let Some(end) = items.last().map(|item| item.key) else { break };
        for item in &items {
            note(&mut groups, item.key, &item.bytes);
        }
        if groups.len() > GROUPS_MAX {
            let error = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::new("BTRFS_IOC_TREE_SEARCH", ioctl::describe(file.as_fd()), error));
        }
        match end.successor() {
            Some(next) => first = next,
            None => break,
        }
    }
    Ok(groups.into_values().collect())
}

/// Takes one item of the quota tree in. Items without their group's `QGROUP_INFO`, which comes first, are left out.
fn note(groups: &mut BTreeMap<u64, Qgroup>, key: Key, item: &[u8]) {
    match key.kind {
        QGROUP_INFO => {
            // struct btrfs_qgroup_info_item: generation, rfer, rfer_cmpr, excl, excl_cmpr.
            let (referenced, exclusive) = (word(item, 1).unwrap_or(0), word(item, 3).unwrap_or(0));
            groups.insert(key.offset, Qgroup { id: key.offset, referenced, exclusive, ..Qgroup::default() });
        }
        QGROUP_LIMIT => {
            if let Some(group) = groups.get_mut(&key.offset) {
                group.limits = parse_limits(item);
            }
        }
        // Each relation is there twice; this one is from the member to the group.
        QGROUP_RELATION if key.objectid < key.offset => {
            if let Some(group) = groups.get_mut(&key.objectid) {
                group.parents.push(key.offset);
            }
        }
        _ => {}
    }
}

/// `struct btrfs_qgroup_limit_item`: flags, max_rfer, max_excl, and two that are unused.
fn parse_limits(item: &[u8]) -> QgroupLimits {
    let flags = word(item, 0).unwrap_or(0);
    let limit = |flag: u64, index| word(item, index).filter(|bytes| flags & flag != 0 && *bytes != CLEAR);
    QgroupLimits { referenced: limit(LIMIT_MAX_RFER, 1), exclusive: limit(LIMIT_MAX_EXCL, 2) }
}

fn describe(file: &impl AsFd, group: u64) -> String {
    let subject = ioctl::describe(file.as_fd());
    format!("qgroup {}/{} of {subject}", group >> 48, group & ((1 << 48) - 1))
}

/// Makes a group.
///
/// # Errors
/// `EEXIST`; `ENOTCONN` when quotas are off; `EROFS`.
pub fn create_group(file: impl AsFd, group: u64) -> Result<()> {
    let mut arguments = CreateArgs { create: 1, qgroupid: group };
    QGROUP_CREATE.call(file.as_fd(), &mut arguments, || describe(&file, group))?;
    Ok(())
}

/// Removes a group.
///
/// # Errors
/// `EBUSY` while it has members, a subvolume, or (simple quotas) anything is charged to it; `ENOENT`; `ENOTCONN`.
pub fn remove_group(file: impl AsFd, group: u64) -> Result<()> {
    let mut arguments = CreateArgs { create: 0, qgroupid: group };
    QGROUP_CREATE.call(file.as_fd(), &mut arguments, || describe(&file, group))?;
    Ok(())
}

/// Makes `member` a member of `parent`, which must be of a higher level.
///
/// # Errors
/// `EEXIST` when it is one already; `EINVAL` when there is no such group or the levels do not rise; `ENOTCONN`.
pub fn assign_group(file: impl AsFd, member: u64, parent: u64) -> Result<()> {
    let mut arguments = AssignArgs { assign: 1, member, parent };
    QGROUP_ASSIGN.call(file.as_fd(), &mut arguments, || describe(&file, member))?;
    Ok(())
}

/// Undoes [`assign_group`].
///
/// # Errors
/// `ENOENT` when it is no member; `ENOTCONN`.
pub fn unassign_group(file: impl AsFd, member: u64, parent: u64) -> Result<()> {
    let mut arguments = AssignArgs { assign: 0, member, parent };
    QGROUP_ASSIGN.call(file.as_fd(), &mut arguments, || describe(&file, member))?;
    Ok(())
}

/// Sets limits of a group, in bytes: `None` leaves one as it is, `Some(None)` lifts it.
///
/// # Errors
/// `ENOENT` when there is no such group; `ENOTCONN` when quotas are off; `EROFS`.
pub fn limit_group(
    file: impl AsFd,
    group: u64,
    referenced: Option<Option<u64>>,
    exclusive: Option<Option<u64>>,
) -> Result<()> {
    let mut arguments = QgroupLimitArgs::new_zeroed();
    arguments.qgroupid = group;
    if let Some(limit) = referenced {
        arguments.flags |= LIMIT_MAX_RFER;
        arguments.max_rfer = limit.unwrap_or(CLEAR);
    }
    if let Some(limit) = exclusive {
        arguments.flags |= LIMIT_MAX_EXCL;
        arguments.max_excl = limit.unwrap_or(CLEAR);
    }
    QGROUP_LIMIT_SET.call(file.as_fd(), &mut arguments, || describe(&file, group))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn items_become_groups_and_orphans_do_not() {
        let mut groups = BTreeMap::new();
        let key = |objectid, kind, offset| Key { objectid, kind, offset };
        let parent = 1 << 48 | 7;
        note(&mut groups, key(0, QGROUP_INFO, 256), &words(&[1, 100, 0, 90, 0]));
        note(&mut groups, key(0, QGROUP_LIMIT, 256), &words(&[LIMIT_MAX_EXCL, 5, 6, 0, 0]));
        note(&mut groups, key(0, QGROUP_LIMIT, 257), &words(&[1, 5, 6, 0, 0]));
        note(&mut groups, key(256, QGROUP_RELATION, parent), &[]);
        note(&mut groups, key(parent, QGROUP_RELATION, 256), &[]);
        let expected = Qgroup {
            id: 256,
            referenced: 100,
            exclusive: 90,
            limits: QgroupLimits { referenced: None, exclusive: Some(6) },
            parents: vec![parent],
        };
        assert_eq!(groups.into_values().collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_limit_that_is_cleared_is_none() {
        assert_eq!(parse_limits(&words(&[3, CLEAR, 0, 0, 0])).referenced, None);
        assert_eq!(parse_limits(&words(&[3, CLEAR, 0, 0, 0])).exclusive, Some(0));
        assert_eq!(parse_limits(&[3]), QgroupLimits::default());
    }
}

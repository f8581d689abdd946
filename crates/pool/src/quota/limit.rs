//! Limits: of subvolumes, of groups, and of containers with all that they make.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::str::FromStr;

use loam_block::size::ByteSize;
use loam_sys::btrfs::{self, quota};
use serde::Serialize;

use super::error::{Error, Result};
use super::{
    GroupId, Mode, about, assign, create_group, enabled, kernel, remove_group, status, subvolume, top_level,
    unassign,
};

/// Limits are below this, in bytes: the kernel's counts are signed where it compares them.
const LIMIT_END: u64 = 1 << 63;

/// How much may be charged. Text: `2GiB`, `+2GiB`, `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// So many bytes.
    Absolute(u64),
    /// So many bytes more than are charged now.
    Relative(u64),
    /// No limit.
    None,
}

impl FromStr for Limit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(Limit::None);
        }
        let limit = match text.strip_prefix('+') {
            Some(size) => Limit::Relative(size.parse::<ByteSize>()?.0),
            None => Limit::Absolute(text.parse::<ByteSize>()?.0),
        };
        limit.bytes(0)?;
        Ok(limit)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Limit::Absolute(bytes) => ByteSize(bytes).fmt(f),
            Limit::Relative(bytes) => write!(f, "+{}", ByteSize(bytes)),
            Limit::None => f.write_str("none"),
        }
    }
}

impl Limit {
    /// The limit in bytes where so many are `used`.
    fn bytes(self, used: u64) -> Result<Option<u64>> {
        let (added, used) = match self {
            Limit::None => return Ok(None),
            Limit::Absolute(bytes) => (bytes, 0),
            Limit::Relative(bytes) => (bytes, used),
        };
        let bytes = added.checked_add(used).filter(|bytes| *bytes < LIMIT_END);
        bytes.map(Some).ok_or(Error::LimitTooLarge { added, used })
    }
}

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitKind {
    /// All that is charged.
    #[default]
    Referenced,
    /// What is charged to this group alone; the same under simple quotas.
    Exclusive,
}

/// What a limit is set for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The subvolume at the path that is given.
    Subvolume,
    /// A group of the path's filesystem.
    Group(GroupId),
}

/// What setting a limit did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LimitOutcome {
    /// The group.
    pub group: GroupId,
    /// What is limited.
    pub kind: LimitKind,
    /// The limit in bytes, if there is one.
    pub limit_bytes: Option<u64>,
    /// Bytes charged at the time.
    pub used_bytes: u64,
    /// More is charged already than the limit allows: nothing is lost, but every write fails until enough is deleted.
    pub over_limit: bool,
}

/// Sets or lifts a limit.
///
/// A limit below what is charged already is set all the same: that is how an administrator stops what grows.
///
/// # Errors
/// Quotas are off; no such group; the path is no subvolume; mounted read-only; the limit is 8 EiB or more.
pub fn limit(path: &Path, target: &Target, limit: Limit, kind: LimitKind) -> Result<LimitOutcome> {
    let (root, group) = match target {
        Target::Subvolume => {
            let (root, group) = subvolume(path)?;
            status(&root, path)?.ok_or_else(|| Error::Off(path.to_owned()))?;
            (root, group)
        }
        Target::Group(group) => (enabled(path)?, *group),
    };
    // What is charged is written down at commits only.
    if !is_read_only(&root) {
        kernel(path, btrfs::sync(&root))?;
    }
    let groups = kernel(path, quota::list_groups(&root))?;
    let found = groups.iter().find(|candidate| candidate.id == group.raw());
    let found = found.ok_or_else(|| Error::NoGroup { path: path.to_owned(), group })?;
    let used_bytes = match kind {
        LimitKind::Referenced => found.referenced,
        LimitKind::Exclusive => found.exclusive,
    };
    let limit_bytes = limit.bytes(used_bytes)?;
    let (referenced, exclusive) = match kind {
        LimitKind::Referenced => (Some(limit_bytes), None),
        LimitKind::Exclusive => (None, Some(limit_bytes)),
    };
    let set = |root: &File| quota::limit_group(root, group.raw(), referenced, exclusive);
    top_level::at_limit_too(path, &root, set).map_err(|error| about(error, group))?;
    let over_limit = limit_bytes.is_some_and(|limit| used_bytes > limit);
    Ok(LimitOutcome { group, kind, limit_bytes, used_bytes, over_limit })
}

/// On a filesystem that is mounted read-only everything is written down.
fn is_read_only(root: &File) -> bool {
    rustix::fs::fstatvfs(root)
        .is_ok_and(|statvfs| statvfs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Makes a limit hold for a subvolume and all subvolumes that are made in it: puts it into a group `1/ID` of its own, to
/// which the kernel adds those by itself, and limits that. Again with another limit: changes it.
///
/// # Errors
/// As [`limit`]; [`Error::GroupExists`] when somebody made a group of this number for other members.
pub fn contain(path: &Path, limit: Limit) -> Result<LimitOutcome> {
    let (root, member) = subvolume(path)?;
    let group = group_of(member);
    let groups = kernel(path, quota::list_groups(&root))?;
    let is_member = |other: &quota::Qgroup| other.parents.contains(&group.raw());
    let mut members = groups.iter().filter(|other| is_member(other)).peekable();
    if members.peek().is_some() && !members.any(|other| other.id == member.raw()) {
        return Err(Error::GroupExists(group));
    }
    if !groups.iter().any(|other| other.id == group.raw()) {
        create_group(path, group)?;
    }
    if !groups.iter().any(|other| other.id == member.raw() && is_member(other)) {
        assign(path, member, group)?;
    }
    self::limit(path, &Target::Group(group), limit, LimitKind::Referenced)
}

/// [`contain`] for a subvolume that was just made, in a few microseconds: nothing is charged to it that a commit would have
/// to tell.
///
/// # Errors
/// Simple quotas are not on; [`Error::GroupExists`].
pub(crate) fn contain_new(path: &Path, limit: Limit) -> Result<GroupId> {
    let limit = limit.bytes(0)?;
    let (root, member) = subvolume(path)?;
    let on = status(&root, path)?.ok_or_else(|| Error::Off(path.to_owned()))?;
    if Mode::from(on.mode) != Mode::Simple {
        return Err(Error::OtherMode { path: path.to_owned(), wanted: Mode::Simple, on: on.mode.into() });
    }
    let group = group_of(member);
    create_group(path, group)?;
    let contained = assign(path, member, group).and_then(|()| {
        top_level::at_limit_too(path, &root, |root| quota::limit_group(root, group.raw(), Some(limit), None))
    });
    if let Err(error) = contained {
        // Why it failed is what must be told.
        let _ = unassign(path, member, group).and_then(|()| remove_group(path, group));
        return Err(error);
    }
    Ok(group)
}

/// The group that a limit for the subvolume at `path` belongs to: its own `1/ID` where [`contain`] has made one, else `0/ID`.
///
/// # Errors
/// Quotas are off; the path is no subvolume.
pub fn group_at(path: &Path) -> Result<GroupId> {
    let (root, member) = subvolume(path)?;
    status(&root, path)?.ok_or_else(|| Error::Off(path.to_owned()))?;
    let around = group_of(member);
    let groups = kernel(path, quota::list_groups(&root))?;
    let contained =
        groups.iter().any(|group| group.id == member.raw() && group.parents.contains(&around.raw()));
    Ok(if contained { around } else { member })
}

/// Undoes [`contain`] for the subvolume `id` of the filesystem at `path`: takes all members out of its group and removes
/// that. Without such a group, or with one that somebody made for other members, there is nothing to do. Before the subvolume is deleted or after.
///
/// # Errors
/// Mounted read-only.
pub fn release(path: &Path, id: u64) -> Result<()> {
    let group = group_of(GroupId::from_raw(id));
    let root = match enabled(path) {
        Err(Error::Off(_)) => return Ok(()),
        root => root?,
    };
    let groups = kernel(path, quota::list_groups(&root))?;
    if !groups.iter().any(|other| other.id == group.raw()) {
        return Ok(());
    }
    let members = || groups.iter().filter(|other| other.parents.contains(&group.raw()));
    let outside = groups.iter().any(|other| other.id == id && !other.parents.contains(&group.raw()));
    if outside && members().next().is_some() {
        return Ok(());
    }
    for member in members() {
        unassign(path, GroupId::from_raw(member.id), group)?;
    }
    remove_group(path, group)
}

/// Takes subvolumes that are about to be deleted out of all groups, and lifts their own limits.
///
/// # Errors
/// Mounted read-only; the top level is at a limit itself.
pub(crate) fn abandon(path: &Path, subvolumes: &[u64]) -> Result<()> {
    let root = enabled(path)?;
    let groups = kernel(path, quota::list_groups(&root))?;
    for group in groups.iter().filter(|group| subvolumes.contains(&group.id)) {
        for parent in &group.parents {
            unassign(path, GroupId::from_raw(group.id), GroupId::from_raw(*parent))?;
        }
        if group.limits != quota::QgroupLimits::default() {
            let lift = |root: &File| quota::limit_group(root, group.id, Some(None), Some(None));
            top_level::at_limit_too(path, &root, lift)?;
        }
    }
    Ok(())
}

/// The group that a subvolume is contained by.
pub(crate) fn group_of(member: GroupId) -> GroupId {
    GroupId::from_raw(1 << 48 | member.number())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_people_write_them() {
        for (text, limit) in [
            ("none", Limit::None),
            ("0", Limit::Absolute(0)),
            ("5GiB", Limit::Absolute(5 << 30)),
            ("+2G", Limit::Relative(2 << 30)),
        ] {
            assert_eq!(text.parse::<Limit>().unwrap(), limit);
        }
        for text in
            ["", "+", "-1", "none ", "++1", "2GB", "8EiB", "+9223372036854775808", "99999999999999999999"]
        {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
        assert_eq!(Limit::Relative(2 << 30).to_string(), "+2GiB");
    }

    #[test]
    fn relative_limits_do_not_wrap_around() {
        assert_eq!(Limit::Relative(1 << 32).bytes(1 << 32).unwrap(), Some(1 << 33));
        assert!(matches!(Limit::Relative(1).bytes(u64::MAX), Err(Error::LimitTooLarge { .. })));
        assert!(matches!(Limit::Relative(1).bytes(LIMIT_END - 1), Err(Error::LimitTooLarge { .. })));
        assert_eq!(Limit::Absolute(7).bytes(u64::MAX).unwrap(), Some(7));
    }
}

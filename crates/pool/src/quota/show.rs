//! The groups of a filesystem as a tree: names, limits, what is used and what is free.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loam_sys::btrfs::{self, quota};
use serde::Serialize;

use super::error::{Error, Result};
use super::{GroupId, Mode, enabled, kernel, open, status, subvolume};

/// The most rows of a tree: a group that is a member of several is in as many places.
pub const ROWS_MAX: usize = 1 << 20;

/// A group with its place among the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The group.
    pub group: GroupId,
    /// Its level.
    pub level: u16,
    /// The path of its subvolume from the filesystem's top level on ("" for that itself); for a group of a higher level, of
    /// the subvolume whose id is its number, if there is one.
    pub path: Option<PathBuf>,
    /// Level 0: the subvolume is deleted; what is charged is what others still share of it.
    pub deleted: bool,
    /// Bytes charged to it.
    pub referenced_bytes: u64,
    /// Bytes charged to it alone; the same under simple quotas.
    pub exclusive_bytes: u64,
    /// The most that `referenced_bytes` may become.
    pub limit_referenced_bytes: Option<u64>,
    /// The most that `exclusive_bytes` may become.
    pub limit_exclusive_bytes: Option<u64>,
    /// Bytes that may still be charged to it, under its own limits and those of the groups that it is in.
    pub free_bytes: Option<u64>,
    /// The group whose limit is the next to be reached.
    pub limited_by: Option<GroupId>,
    /// The groups that it is in.
    pub parents: Vec<GroupId>,
    /// The groups in it.
    pub members: Vec<GroupId>,
}

/// What one subvolume has used and may still use.
pub type Usage = Group;

/// The quotas of a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The path that was asked for.
    pub path: PathBuf,
    /// How it counts.
    pub mode: Mode,
    /// Simple quotas: extents of earlier transactions are charged to nobody.
    pub enable_generation: Option<u64>,
    /// Full qgroups: the counts are wrong until a rescan has ended.
    pub inconsistent: bool,
    /// Full qgroups: a rescan is under way.
    pub rescanning: bool,
    /// All groups, by number.
    pub groups: Vec<Group>,
}

/// A group and how deep in the tree it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'s> {
    /// 0 for a group that is in no other.
    pub depth: usize,
    /// The group.
    pub group: &'s Group,
}

/// All groups of the filesystem that `path` lies in. Bytes are those of the last commit; `sync` makes that now.
///
/// # Errors
/// No btrfs; quotas are off.
pub fn show(path: &Path, sync: bool) -> Result<Shown> {
    let root = enabled(path)?;
    if sync {
        kernel(path, btrfs::sync(&root))?;
    }
    let status = status(&root, path)?.ok_or_else(|| Error::Off(path.to_owned()))?;
    let names = kernel(path, quota::subvolume_paths(&root))?;
    let groups = kernel(path, quota::list_groups(&root))?;
    Ok(Shown::new(path, status, arrange(&groups, &names)))
}

/// The group of the subvolume at `path`; `None` when quotas are off.
///
/// # Errors
/// No btrfs; no subvolume.
pub fn usage(path: &Path, sync: bool) -> Result<Option<Usage>> {
    let (root, group) = subvolume(path)?;
    if status(&root, path)?.is_none() {
        return Ok(None);
    }
    if sync {
        kernel(path, btrfs::sync(open(path)?))?;
    }
    let groups = kernel(path, quota::list_groups(&root))?;
    Ok(arrange(&groups, &BTreeMap::new()).into_iter().find(|found| found.group == group).map(|mut found| {
        found.deleted = false;
        found
    }))
}

/// As [`show`] without the groups' names, which cost the most; `None` when quotas are off.
///
/// # Errors
/// No btrfs.
pub(crate) fn unnamed(path: &Path) -> Result<Option<Shown>> {
    let root = open(path)?;
    let Some(status) = status(&root, path)? else { return Ok(None) };
    let groups = kernel(path, quota::list_groups(&root))?;
    Ok(Some(Shown::new(path, status, arrange(&groups, &BTreeMap::new()))))
}

fn arrange(groups: &[quota::Qgroup], names: &BTreeMap<u64, PathBuf>) -> Vec<Group> {
    let mut members: BTreeMap<u64, Vec<GroupId>> = BTreeMap::new();
    for group in groups {
        for parent in &group.parents {
            members.entry(*parent).or_default().push(GroupId::from_raw(group.id));
        }
    }
    let mut room: BTreeMap<u64, (u64, GroupId)> = BTreeMap::new();
    let mut arranged = Vec::with_capacity(groups.len());
    // From the highest level down, since what is free above bounds what is free below.
    for group in groups.iter().rev() {
        let id = GroupId::from_raw(group.id);
        let own = [(group.limits.referenced, group.referenced), (group.limits.exclusive, group.exclusive)];
        let own = own.into_iter().filter_map(|(limit, used)| Some((limit?.saturating_sub(used), id)));
        let above = group.parents.iter().filter_map(|parent| room.get(parent).copied());
        let tightest = own.chain(above).min_by_key(|(free, _)| *free);
        if let Some(tightest) = tightest {
            room.insert(group.id, tightest);
        }
        let path = names.get(&id.number()).cloned();
        arranged.push(Group {
            group: id,
            level: id.level(),
            deleted: id.level() == 0 && path.is_none(),
            path,
            referenced_bytes: group.referenced,
            exclusive_bytes: group.exclusive,
            limit_referenced_bytes: group.limits.referenced,
            limit_exclusive_bytes: group.limits.exclusive,
            free_bytes: tightest.map(|(free, _)| free),
            limited_by: tightest.map(|(_, group)| group),
            parents: group.parents.iter().map(|parent| GroupId::from_raw(*parent)).collect(),
            members: members.remove(&group.id).unwrap_or_default(),
        });
    }
    arranged.reverse();
    arranged
}

impl Shown {
    fn new(path: &Path, status: quota::QuotaStatus, groups: Vec<Group>) -> Self {
        Shown {
            path: path.to_owned(),
            mode: status.mode.into(),
            enable_generation: status.enable_generation,
            inconsistent: status.inconsistent,
            rescanning: status.rescanning,
            groups,
        }
    }

    /// A group.
    pub fn group(&self, group: GroupId) -> Option<&Group> {
        let index = self.groups.binary_search_by_key(&group, |found| found.group).ok()?;
        self.groups.get(index)
    }

    /// The groups as a tree, members below the groups that they are in, the highest levels first: at most [`ROWS_MAX`].
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows = Vec::new();
        let tops = self.groups.iter().filter(|group| group.parents.is_empty());
        // A stack, so what is to come first is pushed last: high levels, then low numbers.
        let mut tops: Vec<&Group> = tops.collect();
        tops.sort_by_key(|group| (group.level, std::cmp::Reverse(group.group)));
        let mut stack: Vec<Row<'_>> = tops.into_iter().map(|group| Row { depth: 0, group }).collect();
        while let Some(row) = stack.pop().filter(|_| rows.len() < ROWS_MAX) {
            rows.push(row);
            let members = row.group.members.iter().rev().filter_map(|member| self.group(*member));
            stack.extend(members.map(|group| Row { depth: row.depth + 1, group }));
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use loam_sys::btrfs::quota::{Qgroup, QgroupLimits};

    fn id(level: u16, number: u64) -> u64 {
        GroupId::new(level, number).unwrap().raw()
    }

    fn group(id: u64, used: u64, limit: Option<u64>, parents: &[u64]) -> Qgroup {
        let limits = QgroupLimits { referenced: limit, exclusive: None };
        Qgroup { id, referenced: used, exclusive: used, limits, parents: parents.to_vec() }
    }

    fn shown() -> Shown {
        let tenant = id(2, 1);
        let groups = [
            group(id(0, 5), 10, None, &[]),
            group(id(0, 256), 30, Some(100), &[id(1, 256)]),
            group(id(0, 300), 5, None, &[id(1, 256)]),
            group(id(1, 256), 35, Some(50), &[tenant]),
            group(tenant, 95, Some(90), &[]),
        ];
        let names = BTreeMap::from([(5, PathBuf::new()), (256, PathBuf::from("web1"))]);
        Shown {
            path: PathBuf::from("/mnt"),
            mode: Mode::Simple,
            enable_generation: Some(7),
            inconsistent: false,
            rescanning: false,
            groups: arrange(&groups, &names),
        }
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let mut shown = shown();
        let web = shown.group(GroupId::from_raw(id(0, 256))).unwrap();
        assert_eq!(
            (web.free_bytes, web.limited_by),
            (Some(0), GroupId::new(2, 1)),
            "the tenant is over its limit"
        );
        assert_eq!(web.path.as_deref(), Some(Path::new("web1")));
        assert_eq!(shown.group(GroupId::from_raw(id(0, 5))).unwrap().free_bytes, None);
        assert!(shown.group(GroupId::from_raw(id(0, 300))).unwrap().deleted);
        shown.groups.clear();
        assert!(shown.rows().is_empty());
    }

    #[test]
    fn rows_are_a_tree() {
        let shown = shown();
        let rows: Vec<String> =
            shown.rows().iter().map(|row| format!("{}{}", " ".repeat(row.depth), row.group.group)).collect();
        assert_eq!(rows, ["2/1", " 1/256", "  0/256", "  0/300", "0/5"]);
    }

    #[test]
    fn json_is_flat_and_in_bytes() {
        let json = serde_json::to_value(shown()).unwrap();
        assert_eq!(json["mode"], "simple");
        assert_eq!(json["groups"][1]["group"], "0/256");
        assert_eq!(json["groups"][1]["limit_referenced_bytes"], 100);
        assert_eq!(json["groups"][3]["members"][1], "0/300");
    }
}

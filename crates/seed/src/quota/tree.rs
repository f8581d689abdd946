//! The quota tree as typed values.

use std::collections::{BTreeMap, BTreeSet};

use zerocopy::FromBytes;

use crate::disk::{Key, QgroupInfo, QgroupLimit, QgroupStatus, flag, item, object};
use crate::reader::{Filesystem, TreeRoot, Walk};
use crate::{Error, Result};

use super::GroupId;
use super::report::{Finding, Kind, Mode, Report};

/// The most groups that are read: some 200 MiB of memory.
const GROUPS_MAX: usize = 1 << 20;
/// The most memberships that are read.
const RELATIONS_MAX: usize = 1 << 21;

/// What the quota tree says.
#[derive(Debug, Default)]
pub(super) struct QuotaTree {
    status: Option<Status>,
    /// `referenced` and `exclusive` of each group.
    pub(super) infos: BTreeMap<GroupId, (u64, u64)>,
    pub(super) limits: BTreeSet<GroupId>,
    /// (member, group), as far as the levels rise.
    pub(super) memberships: BTreeSet<(GroupId, GroupId)>,
    /// (group, member): the same from the other side.
    reverse: BTreeSet<(GroupId, GroupId)>,
}

#[derive(Debug, Clone, Copy)]
struct Status {
    flags: u64,
    enable_generation: u64,
}

impl QuotaTree {
    /// Reads it; `None` when there is none, or when it says that quotas are off.
    pub(super) fn read(filesystem: &Filesystem<'_>, report: &mut Report) -> Result<Option<Self>> {
        let roots = filesystem.roots()?;
        let Some((root, _)) = roots.into_iter().find(|(root, _)| root.id == object::QUOTA_TREE) else {
            return Ok(None);
        };
        let mut tree = QuotaTree::default();
        let mut statuses = 0u64;
        for_each(filesystem, root, report, &mut |key, body, report| {
            if key.kind == item::QGROUP_STATUS {
                statuses += 1;
            }
            if let Err(reason) = tree.item(key, body) {
                report.find(Finding::new(
                    Kind::BadItem,
                    None,
                    format!("item {key} of the quota tree: {reason}"),
                ));
            }
            if tree.infos.len() > GROUPS_MAX || tree.memberships.len() + tree.reverse.len() > RELATIONS_MAX {
                return Err(Error::Inconsistent(format!(
                    "the quota tree has more than {GROUPS_MAX} groups or {RELATIONS_MAX} memberships"
                )));
            }
            Ok(())
        })?;
        if tree.status.is_none() {
            let message = "the quota tree has no status: whether and how the filesystem counts is not known";
            report.find(Finding::new(Kind::BadItem, None, message));
            return Ok(None);
        }
        if tree.mode() == Mode::Off {
            return Ok(None);
        }
        tree.check(report);
        Ok(Some(tree))
    }

    fn item(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        let wrong_size = || format!("has {} bytes", body.len());
        let is_info = matches!(key.kind, item::QGROUP_STATUS | item::QGROUP_INFO | item::QGROUP_LIMIT);
        if is_info && key.objectid != 0 {
            return Err("its key does not begin with 0".to_owned());
        }
        let group = GroupId::from_raw(key.offset);
        match key.kind {
            item::QGROUP_STATUS => {
                // Full qgroups have one without the last field.
                let mut whole = [0; size_of::<QgroupStatus>()];
                let shortest = whole.len() - size_of::<u64>();
                if !(shortest..=whole.len()).contains(&body.len()) || key.offset != 0 {
                    return Err(wrong_size());
                }
                whole[..body.len()].copy_from_slice(body);
                let status = QgroupStatus::read_from_bytes(&whole).map_err(|_| wrong_size())?;
                if status.version.get() != 1 {
                    return Err(format!("is of version {}; only 1 is known", status.version));
                }
                let (flags, enable_generation) = (status.flags.get(), status.enable_generation.get());
                self.status = Some(Status { flags, enable_generation });
            }
            item::QGROUP_INFO => {
                let info = QgroupInfo::read_from_bytes(body).map_err(|_| wrong_size())?;
                self.infos.insert(group, (info.referenced.get(), info.exclusive.get()));
            }
            item::QGROUP_LIMIT => {
                QgroupLimit::read_from_bytes(body).map_err(|_| wrong_size())?;
                self.limits.insert(group);
            }
            item::QGROUP_RELATION => {
                let (from, to) = (GroupId::from_raw(key.objectid), group);
                if from.level() == to.level() {
                    return Err("relates groups of one level".to_owned());
                }
                if from.level() < to.level() {
                    self.memberships.insert((from, to));
                } else {
                    self.reverse.insert((from, to));
                }
            }
            kind => return Err(format!("type {kind} has no place there")),
        }
        Ok(())
    }

    pub(super) fn mode(&self) -> Mode {
        match self.status.map(|status| status.flags) {
            Some(flags) if flags & flag::QGROUP_ON == 0 => Mode::Off,
            Some(flags) if flags & flag::QGROUP_SIMPLE != 0 => Mode::Simple,
            Some(_) => Mode::Full,
            None => Mode::Off,
        }
    }

    /// The first transaction that is charged, for simple quotas.
    pub(super) fn enable_generation(&self) -> Option<u64> {
        let status = self.status?;
        (self.mode() == Mode::Simple).then_some(status.enable_generation)
    }

    /// What the items say of each other.
    fn check(&self, report: &mut Report) {
        let wrong = |report: &mut Report, group, message: &str| {
            report.find(Finding::new(Kind::BadItem, Some(group), message));
        };
        for group in self.infos.keys().filter(|group| !self.limits.contains(group)) {
            wrong(report, *group, "has no limit item (QGROUP_LIMIT), not even one without limits");
        }
        for group in self.limits.iter().filter(|group| !self.infos.contains_key(group)) {
            wrong(report, *group, "has a limit item but no usage (QGROUP_INFO)");
        }
        for &(member, group) in &self.memberships {
            if !self.reverse.contains(&(group, member)) {
                wrong(report, group, &format!("lacks the item that {member} is a member of it"));
            }
            for side in [member, group].iter().filter(|side| !self.infos.contains_key(side)) {
                wrong(report, *side, "is related to others but has no usage (QGROUP_INFO)");
            }
        }
        for &(group, member) in &self.reverse {
            if !self.memberships.contains(&(member, group)) {
                wrong(report, member, &format!("lacks the item that it is a member of {group}"));
            }
        }
    }
}

/// What is told of each item that [`for_each`] comes to.
type Visit<'v> = dyn FnMut(Key, &[u8], &mut Report) -> Result<()> + 'v;

/// Shows the items of a tree, beyond damaged blocks too, which become findings.
pub(super) fn for_each(
    filesystem: &Filesystem<'_>,
    root: TreeRoot,
    report: &mut Report,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let mut walk = Walk::new(filesystem, root);
    while let Some(visited) = walk.next() {
        for fault in visited.faults {
            let message = format!("tree {}, block {}: {fault}", root.id, visited.bytenr);
            report.find(Finding::new(Kind::Damaged, None, message));
        }
        let Some(block) = visited.block else { continue };
        for (key, body) in block.items() {
            visit(key, body, report)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_membership_must_be_there_from_both_sides() {
        let (member, group) = (256, 1 << 48 | 1);
        let forward = Key::new(member, item::QGROUP_RELATION, group);
        let reverse = Key::new(group, item::QGROUP_RELATION, member);
        for (relations, faults) in [(vec![forward, reverse], 0), (vec![forward], 1), (vec![reverse], 1)] {
            let mut tree = QuotaTree::default();
            for id in [member, group] {
                tree.item(Key::new(0, item::QGROUP_INFO, id), &words(&[0; 5])).expect("usage");
                tree.item(Key::new(0, item::QGROUP_LIMIT, id), &words(&[0; 5])).expect("limits");
            }
            for key in relations {
                tree.item(key, &[]).expect("a relation");
            }
            let mut report = Report::new(1);
            tree.check(&mut report);
            assert_eq!(report.findings.len(), faults, "{:?}", report.findings);
        }
    }

    #[test]
    fn items_that_make_no_sense_are_refused() {
        let mut tree = QuotaTree::default();
        let mut refuse = |key: Key, body: &[u8]| assert!(tree.item(key, body).is_err(), "{key}");
        refuse(Key::new(256, item::QGROUP_RELATION, 257), &[]);
        refuse(Key::new(1, item::QGROUP_INFO, 256), &words(&[0; 5]));
        refuse(Key::new(0, item::QGROUP_INFO, 256), &words(&[0; 4]));
        refuse(Key::new(0, item::QGROUP_LIMIT, 256), &[]);
        refuse(Key::new(0, item::QGROUP_STATUS, 0), &words(&[2, 0, 1, 0, 0]));
        refuse(Key::new(0, item::QGROUP_STATUS, 0), &words(&[1, 0, 1]));
        refuse(Key::new(0, 1, 0), &[]);
    }
}

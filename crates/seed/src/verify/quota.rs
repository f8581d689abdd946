//! The quota tree: its status, an item of each kind for every subvolume, and, for simple quotas, the sums.

use std::collections::HashMap;

use zerocopy::FromBytes;

use crate::disk::{Key, QgroupInfo, QgroupLimit, QgroupStatus, flag, item, object};

use super::blocks::Trees;
use super::finding::{Finding, Findings};

/// Groups with a level are made by hand; those of level 0 are subvolumes.
const LEVEL_SHIFT: u32 = 48;

pub(super) fn check(trees: &Trees, findings: &mut Findings) {
    let at = |key: Key, field: &str| Finding::new(field, "").tree(object::QUOTA_TREE).key(key);
    let mut status = None;
    let mut infos: HashMap<u64, QgroupInfo> = HashMap::new();
    let mut limits = HashMap::new();
    for (key, body) in &trees.quota {
        let parsed = match key.kind {
            item::QGROUP_STATUS => {
                // Without enable_generation it is shorter: full quotas, of which nothing is verified.
                status = status.or(QgroupStatus::read_from_prefix(body).ok().map(|(item, _)| (*key, item)));
                body.len() + size_of::<u64>() >= size_of::<QgroupStatus>()
            }
            item::QGROUP_INFO => {
                let item = QgroupInfo::read_from_bytes(body);
                item.map(|item| infos.insert(key.offset, item)).is_ok()
            }
            item::QGROUP_LIMIT => {
                let item = QgroupLimit::read_from_bytes(body);
                item.map(|item| limits.insert(key.offset, item)).is_ok()
            }
            kind => kind == item::QGROUP_RELATION,
        };
        if !parsed {
            findings.add(Finding { reason: format!("{} bytes", body.len()), ..at(*key, "item") });
        }
    }
    let Some((key, status)) = status else { return };
    findings.expect_same(at(key, "status.version"), status.version.get(), 1);
    for (group, _) in infos.iter().filter(|(group, _)| !limits.contains_key(group)) {
        let key = Key::new(0, item::QGROUP_LIMIT, *group);
        findings.add(Finding { reason: "is missing".to_owned(), ..at(key, "limit") });
    }
    let simple = flag::QGROUP_ON | flag::QGROUP_SIMPLE;
    if status.flags.get() & (simple | flag::QGROUP_INCONSISTENT) == simple {
        sums(trees, status.enable_generation.get(), &infos, findings);
    }
}

/// Simple quotas charge an extent to one subvolume, unless it is older than the quotas.
fn sums(trees: &Trees, enabled: u64, infos: &HashMap<u64, QgroupInfo>, findings: &mut Findings) {
    let mut charged: HashMap<u64, u64> = HashMap::new();
    for extent in trees.extents.iter().filter(|extent| extent.generation >= enabled) {
        let owner = match extent.is_tree() {
            true => trees.blocks.get(&extent.bytenr).map(|block| block.owner),
            false => extent.owner,
        };
        if let Some(owner) = owner {
            let sum = charged.entry(owner).or_default();
            *sum = sum.saturating_add(extent.length);
        }
    }
    for (root, _) in trees.roots.iter().filter(|(root, _)| root.is_subvolume()) {
        let key = Key::new(0, item::QGROUP_INFO, root.id);
        let at = |field: &str| Finding::new(field, "").tree(object::QUOTA_TREE).key(key);
        let Some(info) = infos.get(&root.id) else {
            findings.add(Finding { reason: "is missing".to_owned(), ..at("info") });
            continue;
        };
        let sum = charged.get(&root.id).copied().unwrap_or(0);
        findings.expect_same(at("info.referenced"), info.referenced.get(), sum);
        findings.expect_same(at("info.exclusive"), info.exclusive.get(), sum);
    }
    for group in infos.keys().filter(|group| **group >> LEVEL_SHIFT == 0) {
        let is_root = trees.roots.iter().any(|(root, _)| root.id == *group);
        let sum = charged.get(group).copied().unwrap_or(0);
        let info = &infos[group];
        if !is_root && info.referenced.get() != sum {
            let key = Key::new(0, item::QGROUP_INFO, *group);
            let at =
                Finding::new("info.referenced of a deleted subvolume", "").tree(object::QUOTA_TREE).key(key);
            findings.expect_same(at, info.referenced.get(), sum);
        }
    }
}

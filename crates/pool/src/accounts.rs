//! What a pool's images and containers are charged under simple quotas.
//!
//! A container with a quota is limited by a group `1/ID` of its own, which also holds the subvolumes that it makes
//! ([`quota::contain_new`]); one without has its subvolume's group `0/ID` alone. What the quota tree says is as old as the
//! last commit. The kernel's current count, and what it has reserved for data that is not on disk yet, is in
//! `/sys/fs/btrfs/FSID/qgroups/LEVEL_NUMBER` (`fs/btrfs/sysfs.c`): so a list needs no commit.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use loam_block::size::ByteSize;
use loam_sys::btrfs;

use crate::error::{Context, Result};
use crate::quota::{self, Group, GroupId, Mode};

/// The kernel reserves room ahead, so a limit is felt so many bytes before the count reaches it.
const NEAR_LIMIT: u64 = 2 << 20;

/// The groups of a pool whose quotas are on.
#[derive(Debug)]
pub(crate) struct Accounts {
    mount: PathBuf,
    /// Ascending.
    groups: Vec<Group>,
    enable_generation: u64,
    live: PathBuf,
}

/// What one subvolume, with all that it makes, is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    /// The group that counts.
    pub(crate) group: GroupId,
    /// Bytes charged to it, with what is being written.
    pub(crate) charged_bytes: u64,
    /// The most that may be.
    pub(crate) limit_bytes: Option<u64>,
    /// What is left of the tightest limit that it is under.
    pub(crate) free_bytes: Option<u64>,
    /// The group that has the tightest limit.
    pub(crate) limited_by: Option<GroupId>,
}

impl Accounts {
    /// The accounts of the pool that is mounted there; `None` unless simple quotas are on.
    pub(crate) fn open(mount: &Path) -> Result<Option<Self>> {
        let Some(shown) = quota::unnamed(mount)?.filter(|shown| shown.mode == Mode::Simple) else {
            return Ok(None);
        };
        let what = || format!("reading the quotas of {}", mount.display());
        let info = btrfs::filesystem_info(File::open(mount).step(what)?).step(what)?;
        let live = PathBuf::from(format!("/sys/fs/btrfs/{}/qgroups", uuid::Uuid::from_bytes(info.fsid)));
        let enable_generation = shown.enable_generation.unwrap_or(0);
        Ok(Some(Accounts { mount: mount.to_owned(), groups: shown.groups, enable_generation, live }))
    }

    /// What was written before this transaction is charged to nobody.
    pub(crate) fn enable_generation(&self) -> u64 {
        self.enable_generation
    }

    /// The account of a subvolume.
    pub(crate) fn of(&self, subvolume: u64) -> Option<Account> {
        let own = self.group(GroupId::from_raw(subvolume))?;
        let around = quota::group_of(own.group);
        let container = if own.parents.contains(&around) { self.group(around)? } else { own };
        // A limit on the subvolume alone may be set by hand beside that of the group.
        let limit_bytes = [own, container].into_iter().filter_map(|group| group.limit_referenced_bytes).min();
        Some(Account {
            group: container.group,
            charged_bytes: self.live(container.group).unwrap_or(container.referenced_bytes),
            limit_bytes,
            free_bytes: own.free_bytes,
            limited_by: own.limited_by,
        })
    }

    fn group(&self, group: GroupId) -> Option<&Group> {
        let index = self.groups.binary_search_by_key(&group, |found| found.group).ok()?;
        self.groups.get(index)
    }

    /// What the kernel counts now.
    fn live(&self, group: GroupId) -> Option<u64> {
        let directory = self.live.join(format!("{}_{}", group.level(), group.number()));
        let number = |name: &str| fs::read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
        Some(number("referenced")?.saturating_add(number("rsv_data")?))
    }

    /// Why the subvolume at `path` cannot be written to, where a limit is reached, and what to do about it.
    pub(crate) fn at_limit(&self, account: &Account, path: &Path) -> Option<String> {
        let group = self.group(account.limited_by?)?;
        let limit = group.limit_referenced_bytes.or(group.limit_exclusive_bytes)?;
        if !is_at_limit(account.free_bytes?, limit) {
            return None;
        }
        let (used, limit) = (ByteSize(group.referenced_bytes), ByteSize(limit));
        let state = format!("{used:#} of {limit:#} are used");
        let what_fails = "writes fail with EDQUOT (disk quota exceeded), reads and deletes go on";
        let (mount, path) = (self.mount.display(), path.display());
        let raise = if group.group == account.group || group.group.level() == 0 {
            format!("loam quota limit {path} +1GiB")
        } else {
            format!("loam quota limit {mount} +1GiB --group {}", group.group)
        };
        Some(format!(
            "{state} (quota group {}): {what_fails}; more room: {raise}; what it is charged for: loam quota verify {mount} \
             --explain {path}",
            group.group
        ))
    }
}

fn is_at_limit(free: u64, limit: u64) -> bool {
    free <= NEAR_LIMIT.min(limit / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(level: u16, number: u64) -> GroupId {
        GroupId::new(level, number).unwrap()
    }

    fn group(group: GroupId, used: u64, limit: Option<u64>, parents: &[GroupId]) -> Group {
        Group {
            group,
            level: group.level(),
            path: None,
            deleted: false,
            referenced_bytes: used,
            exclusive_bytes: used,
            limit_referenced_bytes: limit,
            limit_exclusive_bytes: None,
            free_bytes: limit.map(|limit| limit.saturating_sub(used)),
            limited_by: limit.map(|_| group),
            parents: parents.to_vec(),
            members: Vec::new(),
        }
    }

    fn accounts(groups: Vec<Group>) -> Accounts {
        Accounts { mount: "/p".into(), groups, enable_generation: 9, live: "/nonexistent".into() }
    }

    #[test]
    fn a_container_is_charged_with_what_it_contains() {
        let around = id(1, 300);
        let mut member = group(id(0, 300), 5, None, &[around]);
        (member.free_bytes, member.limited_by) = (Some(60 << 20), Some(around));
        let accounts = accounts(vec![
            group(id(0, 256), 7, None, &[]),
            member,
            group(around, 40 << 20, Some(100 << 20), &[]),
        ]);
        let account = accounts.of(300).unwrap();
        assert_eq!((account.group, account.charged_bytes), (around, 40 << 20));
        assert_eq!(account.limit_bytes, Some(100 << 20));
        assert_eq!(accounts.at_limit(&account, Path::new("/p/web")), None);
        let plain = accounts.of(256).unwrap();
        assert_eq!((plain.group, plain.charged_bytes, plain.limit_bytes), (id(0, 256), 7, None));
        assert_eq!(accounts.of(999), None);
    }

    #[test]
    fn why_nothing_can_be_written_names_the_limit_that_is_reached() {
        let tenant = id(2, 1);
        let mut member = group(id(0, 300), 5, Some(1 << 30), &[tenant]);
        (member.free_bytes, member.limited_by) = (Some(0), Some(tenant));
        let accounts = accounts(vec![member, group(tenant, 9 << 20, Some(8 << 20), &[])]);
        let why = accounts.at_limit(&accounts.of(300).unwrap(), Path::new("/p/web")).unwrap();
        assert!(why.contains("group 2/1") && why.contains("--group 2/1") && why.contains("EDQUOT"), "{why}");
    }

    #[test]
    fn a_limit_is_felt_a_little_early() {
        assert!(is_at_limit(0, 0));
        assert!(is_at_limit(1 << 20, 1 << 30));
        assert!(!is_at_limit(3 << 20, 1 << 30));
        assert!(!is_at_limit(3 << 20, 4 << 20), "a small one is not reached when it is nearly unused");
    }
}

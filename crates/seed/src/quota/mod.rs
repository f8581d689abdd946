//! Simple quotas, checked from the trees: what every group must be charged, against what the quota tree says
//! ([`verify()`]), and what a group is charged for and who keeps it alive ([`explain()`]).
//!
//! Under simple quotas the kernel charges an extent once, to the subvolume that wrote it first, and gives the charge back
//! when the extent goes, whoever was the last to use it (`btrfs_record_squota_delta` in `fs/btrfs/qgroup.c`). So what must
//! be charged can be read off the extent tree alone: data by its `EXTENT_OWNER_REF`, a tree block by the owner in its
//! header, both only from the generation on in which the quotas were enabled. `docs/quotas.md` tells the story.
//!
//! The extent tree is streamed, so that memory grows with the number of groups and not with that of extents. Input is not
//! trusted: nothing panics, and every count is bounded by a constant.

mod charge;
mod devices;
mod explain;
mod forward;
mod group;
mod hierarchy;
mod live;
mod paths;
mod report;
mod tree;
mod words;

pub use explain::{EXTENTS_MAX, ExplainOptions, Explanation, LargeExtent, Reference, Standing, explain};
pub use group::{GroupId, ParseGroupError};
pub use live::{LIVE_ATTEMPTS, LiveError, when_still};
pub use report::{Cause, Counts, Finding, GroupReport, Kind, Mode, Report};

use crate::Result;
use crate::disk::object;
use crate::reader::{Device, Filesystem};

use charge::Charges;
use tree::QuotaTree;

/// Compares what the quota tree says with what the extents ask for. The devices may be given in any order.
///
/// Only simple quotas are verified; for full qgroups, whose counts need all back references resolved, and for a
/// filesystem without quotas, [`Report::verified`] is false and nothing is found.
///
/// # Errors
/// No superblock can be read, or the filesystem uses what is not known here. Damage that does not keep this from reading
/// on is a [`Finding`].
pub fn verify(devices: &[Device<'_>]) -> Result<Report> {
    let filesystem = devices::open(devices)?;
    let mut report = Report::new(filesystem.superblock().generation.get());
    let Some(quota) = QuotaTree::read(&filesystem, &mut report)? else { return Ok(report) };
    report.mode = quota.mode();
    report.enable_generation = quota.enable_generation();
    if report.mode != Mode::Simple {
        return Ok(report);
    }
    let mut charges = Charges::default();
    let older =
        charge::for_each(&filesystem, quota.enable_generation().unwrap_or(0), &mut report, &mut |charged| {
            charges.add(&charged);
        })?;
    report.verified = true;
    let orphans = older.iter().filter(|(owner, _)| !quota.infos.contains_key(&GroupId::from_raw(**owner)));
    match orphans.map(|(_, extents)| extents).sum::<u64>() {
        0 => {}
        count => report.notes.push(format!(
            "{count} extents were written by deleted subvolumes while quotas were on before: kernels before 7.1 turn the \
             filesystem read-only when a balance moves one of them (there is no group to charge); do not balance on such"
        )),
    }
    hierarchy::compare(
        &quota,
        &charges,
        &subvolumes(&filesystem)?,
        filesystem.node_size().into(),
        &mut report,
    );
    Ok(report)
}

/// The ids of all subvolumes, and whether each is being deleted.
fn subvolumes(filesystem: &Filesystem<'_>) -> Result<std::collections::BTreeMap<u64, bool>> {
    let roots = filesystem.roots()?;
    Ok(roots
        .into_iter()
        .filter(|(root, _)| is_subvolume(root.id))
        .map(|(root, item)| (root.id, item.refs.get() == 0))
        .collect())
}

/// Whether a tree is charged at all (`btrfs_is_fstree`).
fn is_subvolume(tree: u64) -> bool {
    tree == object::FS_TREE || (object::FIRST_FREE..=object::LAST_FREE).contains(&tree)
}

//! What a group is charged for, and who keeps it alive.
//!
//! A charge outlives what it was for: as long as anyone, in any subvolume, references an extent, whoever wrote it first
//! is charged. So a subvolume may be charged for data that none of its files has; [`explain`] finds that data, says who
//! still has it, and what would end it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::disk::Key;
use crate::reader::{Device, Filesystem, TreeRoot};
use crate::{Error, Result};

use super::charge::{self, Charged, Sum};
use super::forward::{Again, Forward};
use super::paths::Paths;
use super::report::{Mode, Report};
use super::tree::QuotaTree;
use super::words::bytes;
use super::{GroupId, devices, hierarchy, is_subvolume};

mod references;

use references::{Target, Targets};

/// Extents of one group that are looked at; of a group that is charged for more, the first ones are.
pub const EXTENTS_MAX: usize = 1 << 22;
/// Tree blocks that are read at most to find who references what.
const VISITS_MAX: u64 = 1 << 23;

/// What to look for.
#[derive(Debug, Clone, Copy)]
pub struct ExplainOptions {
    /// How many of the largest extents are named, and how many of the largest that only others reference.
    pub extents: usize,
}

impl Default for ExplainOptions {
    fn default() -> Self {
        ExplainOptions { extents: 10 }
    }
}

/// Who references an extent, seen from the group that is charged for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Only files of the group's subvolumes.
    Own,
    /// Files of the group's subvolumes and of others.
    Shared,
    /// Only files of other subvolumes: the original is deleted or overwritten, copies of it live on.
    KeptByOthers,
    /// Only files of other subvolumes, and the subvolume that wrote it is deleted.
    KeptAfterDeletion,
    /// No file: it is about to be freed, or what references it is damaged.
    Unreferenced,
}

/// A file that references an extent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// The subvolume.
    pub subvolume: u64,
    /// Its path from the top level on; none when it is deleted.
    pub subvolume_path: Option<String>,
    /// The inode.
    pub inode: u64,
    /// One of its paths within the subvolume.
    pub path: Option<String>,
    /// Bytes of the file that lie in the extent.
    pub bytes: u64,
}

/// An extent that the group is charged for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LargeExtent {
    /// Its logical address.
    pub address: u64,
    /// Bytes charged.
    pub bytes: u64,
    /// The subvolume that wrote it.
    pub owner: u64,
    /// The transaction that wrote it.
    pub generation: u64,
    /// Who references it.
    pub standing: Standing,
    /// Bytes of it that any file still has, where it is not compressed. The rest stays charged with it.
    pub used_bytes: Option<u64>,
    /// Files that reference it, the first of them.
    pub references: Vec<Reference>,
    /// Files that reference it.
    pub files: u64,
}

/// What a group is charged for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The group.
    pub group: GroupId,
    /// The subvolumes that are charged to it, with their paths; none for a path: it is deleted.
    pub subvolumes: BTreeMap<u64, Option<String>>,
    /// Bytes that it must be charged.
    pub charged_bytes: u64,
    /// Of these, data.
    pub data_bytes: u64,
    /// Of these, tree blocks.
    pub metadata_bytes: u64,
    /// Bytes of data that no file of the group's subvolumes references any more.
    pub kept_by_others_bytes: u64,
    /// Bytes of tree blocks that only other subvolumes' trees, its snapshots', still have.
    pub metadata_kept_by_others_bytes: u64,
    /// The largest extents, the largest first.
    pub extents: Vec<LargeExtent>,
    /// What it comes to, and what to do, in words.
    pub advice: Vec<String>,
    /// What was not looked at.
    pub notes: Vec<String>,
}

/// Explains a group. The devices may be given in any order.
///
/// # Errors
/// As [`super::verify`]; the filesystem has no simple quotas, or no such group.
pub fn explain(devices: &[Device<'_>], group: GroupId, options: &ExplainOptions) -> Result<Explanation> {
    let filesystem = devices::open(devices)?;
    let mut report = Report::new(filesystem.superblock().generation.get());
    let quota = QuotaTree::read(&filesystem, &mut report)?.filter(|quota| quota.mode() == Mode::Simple);
    let Some(quota) = quota else {
        return Err(Error::Inconsistent(
            "only simple quotas can be explained; they are not on here".to_owned(),
        ));
    };
    if !quota.infos.contains_key(&group) {
        return Err(Error::Inconsistent(format!("the filesystem has no quota group {group}")));
    }
    let members = hierarchy::members(&quota, group);
    let mut inventory = Inventory::default();
    charge::for_each(&filesystem, quota.enable_generation().unwrap_or(0), &mut report, &mut |charged| {
        if members.contains(&charged.owner) {
            inventory.add(&charged);
        }
    })?;
    let roots = Roots::of(&filesystem)?;
    inventory.mark(&filesystem, &roots, &members);
    let mut explanation = inventory.summary(group);
    let targets = inventory.largest(options.extents);
    let mut paths = Paths::new(&filesystem, roots.0.iter().map(|(root, _)| *root));
    explanation.subvolumes = members.iter().map(|&id| (id, paths.of_subvolume(id))).collect();
    let targets = references::find(&filesystem, &roots, targets, &mut explanation.notes);
    explanation.extents =
        targets.into_iter().map(|target| target.into_extent(&members, &roots, &mut paths)).collect();
    let damaged = report.findings.len();
    if damaged > 0 {
        explanation.notes.push(format!("{damaged} things are wrong with the trees: verify says which"));
    }
    advise(&mut explanation);
    Ok(explanation)
}

/// The trees of subvolumes, each with the key below which its deletion has come.
struct Roots(Vec<(TreeRoot, Option<Key>)>);

impl Roots {
    fn of(filesystem: &Filesystem<'_>) -> Result<Self> {
        let roots = filesystem.roots()?.into_iter().filter(|(root, _)| is_subvolume(root.id));
        Ok(Roots(
            roots
                .map(|(root, item)| (root, (item.refs.get() == 0).then(|| item.drop_progress.into())))
                .collect(),
        ))
    }

    /// Whether there is such a subvolume, and it is not being deleted.
    fn is_alive(&self, id: u64) -> bool {
        self.0.iter().any(|(root, progress)| root.id == id && progress.is_none())
    }
}

/// Everything that a group is charged for, in order of addresses.
#[derive(Default)]
struct Inventory {
    data: Vec<Charged>,
    data_used: Vec<bool>,
    blocks: Vec<u64>,
    blocks_used: Vec<bool>,
    block_bytes: u64,
    sum: Sum,
    left_out: u64,
    damaged: u64,
}

impl Inventory {
    fn add(&mut self, charged: &Charged) {
        let (data, metadata) = if charged.is_tree { (0, charged.length) } else { (charged.length, 0) };
        self.sum.add(&Sum { data, metadata, first: 0 });
        if self.data.len() + self.blocks.len() >= EXTENTS_MAX {
            self.left_out += 1;
        } else if charged.is_tree {
            self.blocks.push(charged.bytenr);
            self.block_bytes = charged.length;
        } else {
            self.data.push(*charged);
        }
    }

    /// Marks what the group's own subvolumes still have.
    fn mark(&mut self, filesystem: &Filesystem<'_>, roots: &Roots, members: &BTreeSet<u64>) {
        self.data_used = vec![false; self.data.len()];
        self.blocks_used = vec![false; self.blocks.len()];
        let mut forward = Forward::new(filesystem, Again::Never, VISITS_MAX);
        for &(root, progress) in roots.0.iter().filter(|(root, _)| members.contains(&root.id)) {
            forward.walk(root, progress.unwrap_or_default(), &mut |block| {
                if let Ok(index) = self.blocks.binary_search(&block.bytenr()) {
                    self.blocks_used[index] = true;
                }
                for pointer in references::pointers(block) {
                    let found = self.data.binary_search_by_key(&pointer.bytenr, |charged| charged.bytenr);
                    if let Ok(index) = found {
                        self.data_used[index] = true;
                    }
                }
                true
            });
        }
        self.damaged = forward.damaged();
        if forward.is_cut_short() {
            // Nothing is said to be kept by others that may not be.
            self.data_used.fill(true);
            self.blocks_used.fill(true);
            self.left_out = self.left_out.max(1);
        }
    }

    fn summary(&self, group: GroupId) -> Explanation {
        let unused = self.data.iter().zip(&self.data_used).filter(|(_, used)| !**used);
        let kept = unused.fold(0u64, |sum, (charged, _)| sum.saturating_add(charged.length));
        let blocks = self.blocks_used.iter().filter(|used| !**used).count() as u64;
        let mut notes = Vec::new();
        if self.left_out > 0 {
            notes.push(format!(
                "the group has more than this program looks at: {} extents are only counted, not looked for",
                self.left_out
            ));
        }
        if self.damaged > 0 {
            notes.push(format!("{} tree blocks are damaged: what they reference is not known", self.damaged));
        }
        Explanation {
            group,
            subvolumes: BTreeMap::new(),
            charged_bytes: self.sum.total(),
            data_bytes: self.sum.data,
            metadata_bytes: self.sum.metadata,
            kept_by_others_bytes: kept,
            metadata_kept_by_others_bytes: blocks.saturating_mul(self.block_bytes),
            extents: Vec::new(),
            advice: Vec::new(),
            notes,
        }
    }

    /// The `count` largest extents, and the `count` largest of those that only others have.
    fn largest(&self, count: usize) -> Targets {
        let mut order: Vec<usize> = (0..self.data.len()).collect();
        order.sort_unstable_by_key(|&index| (std::cmp::Reverse(self.data[index].length), index));
        let unused = order.iter().filter(|&&index| !self.data_used[index]).take(count);
        let chosen: BTreeSet<usize> = order.iter().take(count).chain(unused).copied().collect();
        Targets::new(chosen.into_iter().map(|index| Target::new(self.data[index])))
    }
}

/// Says what it comes to.
fn advise(explanation: &mut Explanation) {
    let group = explanation.group;
    let mut advice = Vec::new();
    let deleted = explanation.subvolumes.values().any(Option::is_none);
    if explanation.kept_by_others_bytes > 0 {
        let kept = bytes(explanation.kept_by_others_bytes);
        let who = match (group.level(), deleted) {
            (0, true) => "whose subvolume is deleted,",
            (0, false) => "which no longer has it in any file,",
            _ => "whose subvolumes no longer have it in any file,",
        };
        advice.push(format!(
            "{kept} of data that other subvolumes keep alive stay charged to {group}, {who} because simple quotas charge \
             whoever wrote an extent first, until the last reference goes. To end it, delete the files named as references, \
             or let their owners write them anew without sharing (cp --reflink=never FILE FILE.new && mv FILE.new FILE): \
             then their owners are charged."
        ));
    }
    if explanation.metadata_kept_by_others_bytes > 0 {
        let kept = bytes(explanation.metadata_kept_by_others_bytes);
        advice.push(format!(
            "{kept} of tree blocks live on only in snapshots of the subvolumes of {group}: they go when the snapshots do."
        ));
    }
    let wasted: u64 = explanation.extents.iter().fold(0, |sum, extent| {
        sum.saturating_add(extent.used_bytes.map_or(0, |used| extent.bytes.saturating_sub(used)))
    });
    if wasted > 0 {
        advice.push(format!(
            "{} of the extents named belong to no file any more, but an extent is freed, and its charge given back, only as a \
             whole. Write the files that have the rest anew (cp --reflink=never, or btrfs filesystem defragment where no \
             snapshots share them).",
            bytes(wasted)
        ));
    }
    if explanation.extents.is_empty() && explanation.metadata_bytes == explanation.charged_bytes {
        advice.push(format!(
            "all that {group} is charged is tree blocks: the names, attributes and extent lists of its files."
        ));
    }
    explanation.advice = advice;
}

//! Finds all files that reference a few given extents.

use std::collections::{BTreeMap, BTreeSet};

use zerocopy::FromBytes;

use crate::disk::{FileExtentHead, FileExtentTail, item};
use crate::reader::{Block, Filesystem};

use super::super::charge::Charged;
use super::super::forward::{Again, Forward};
use super::super::paths::Paths;
use super::{LargeExtent, Reference, Roots, Standing, VISITS_MAX};

/// Files that are named for one extent; more are counted.
const NAMED_MAX: usize = 16;
/// Files that are told apart for one extent.
const FILES_MAX: usize = 1 << 16;
/// Parts of an extent in use that are told apart; of an extent in more parts it is not said how much is in use.
const PARTS_MAX: usize = 1 << 12;

/// A file extent that points to a data extent.
pub(super) struct Pointer {
    pub(super) bytenr: u64,
    inode: u64,
    /// Where in the extent, uncompressed, the file's part begins.
    offset: u64,
    bytes: u64,
    compressed: bool,
}

/// The file extents of a leaf that point to data.
pub(super) fn pointers(block: &Block) -> impl Iterator<Item = Pointer> {
    let items = block.items().filter(|(key, _)| block.is_leaf() && key.kind == item::EXTENT_DATA);
    items.filter_map(|(key, body)| {
        let (head, rest) = FileExtentHead::read_from_prefix(body).ok()?;
        let (tail, _) = FileExtentTail::read_from_prefix(rest).ok()?;
        let bytenr = tail.disk_bytenr.get();
        (head.kind != 0 && bytenr != 0).then(|| Pointer {
            bytenr,
            inode: key.objectid,
            offset: tail.offset.get(),
            bytes: tail.bytes.get(),
            compressed: head.compression != 0,
        })
    })
}

/// An extent that is looked for.
pub(super) struct Target {
    charged: Charged,
    /// Bytes by subvolume and inode.
    files: BTreeMap<(u64, u64), u64>,
    files_left_out: u64,
    /// Start and end of the parts in use; none once they are not known.
    parts: Option<BTreeSet<(u64, u64)>>,
}

impl Target {
    pub(super) fn new(charged: Charged) -> Self {
        Target { charged, files: BTreeMap::new(), files_left_out: 0, parts: Some(BTreeSet::new()) }
    }

    fn add(&mut self, subvolume: u64, pointer: &Pointer) {
        let key = (subvolume, pointer.inode);
        if self.files.len() >= FILES_MAX && !self.files.contains_key(&key) {
            self.files_left_out += 1;
        } else {
            let bytes = self.files.entry(key).or_default();
            *bytes = bytes.saturating_add(pointer.bytes);
        }
        let end = pointer.offset.saturating_add(pointer.bytes);
        if let Some(parts) = &mut self.parts {
            parts.insert((pointer.offset, end));
            if pointer.compressed || parts.len() > PARTS_MAX || end > self.charged.length {
                self.parts = None;
            }
        }
    }

    /// Bytes in use by any file.
    fn used(&self) -> Option<u64> {
        let mut used = 0;
        let mut done = 0;
        for &(start, end) in self.parts.as_ref()? {
            used += end.saturating_sub(start.max(done));
            done = done.max(end);
        }
        Some(used)
    }

    pub(super) fn into_extent(
        self,
        members: &BTreeSet<u64>,
        roots: &Roots,
        paths: &mut Paths<'_, '_>,
    ) -> LargeExtent {
        let is_own = |subvolume: &u64| members.contains(subvolume);
        let own = self.files.keys().any(|(subvolume, _)| is_own(subvolume));
        let others = self.files.keys().any(|(subvolume, _)| !is_own(subvolume));
        let standing = match (own, others) {
            (true, false) => Standing::Own,
            (true, true) => Standing::Shared,
            (false, true) if roots.is_alive(self.charged.owner) => Standing::KeptByOthers,
            (false, true) => Standing::KeptAfterDeletion,
            (false, false) => Standing::Unreferenced,
        };
        let references = self.files.iter().take(NAMED_MAX).map(|(&(subvolume, inode), &bytes)| Reference {
            subvolume,
            subvolume_path: paths.of_subvolume(subvolume),
            inode,
            path: paths.of_inode(subvolume, inode),
            bytes,
        });
        LargeExtent {
            address: self.charged.bytenr,
            bytes: self.charged.length,
            owner: self.charged.owner,
            generation: self.charged.generation,
            standing,
            used_bytes: self.used(),
            references: references.collect(),
            files: self.files.len() as u64 + self.files_left_out,
        }
    }
}

/// Extents that are looked for, by address.
pub(super) struct Targets(Vec<Target>);

impl Targets {
    /// They must come in order of their addresses.
    pub(super) fn new(targets: impl Iterator<Item = Target>) -> Self {
        Targets(targets.collect())
    }

    fn get(&mut self, bytenr: u64) -> Option<&mut Target> {
        let index = self.0.binary_search_by_key(&bytenr, |target| target.charged.bytenr).ok()?;
        self.0.get_mut(index)
    }
}

/// Goes through all subvolumes; the targets come back the largest first.
pub(super) fn find(
    filesystem: &Filesystem<'_>,
    roots: &Roots,
    mut targets: Targets,
    notes: &mut Vec<String>,
) -> Vec<Target> {
    let mut forward = Forward::new(filesystem, Again::Interesting, VISITS_MAX);
    if !targets.0.is_empty() {
        for &(root, progress) in &roots.0 {
            forward.walk(root, progress.unwrap_or_default(), &mut |block| {
                let mut interesting = false;
                for pointer in pointers(block) {
                    if let Some(target) = targets.get(pointer.bytenr) {
                        target.add(root.id, &pointer);
                        interesting = true;
                    }
                }
                interesting
            });
        }
    }
    if forward.is_cut_short() {
        notes.push(format!("more than {VISITS_MAX} tree blocks: not all references are found"));
    }
    let mut targets = targets.0;
    targets.sort_by_key(|target| (std::cmp::Reverse(target.charged.length), target.charged.bytenr));
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        let charged =
            Charged { bytenr: 0, length: 100, generation: 1, owner: 256, is_tree: false, is_first: false };
        Target::new(charged)
    }

    fn pointer(offset: u64, bytes: u64) -> Pointer {
        Pointer { bytenr: 0, inode: 257, offset, bytes, compressed: false }
    }

    #[test]
    fn overlapping_parts_are_used_once() {
        let mut target = target();
        for (offset, bytes) in [(0, 20), (10, 20), (10, 5), (50, 10)] {
            target.add(256, &pointer(offset, bytes));
        }
        assert_eq!(target.used(), Some(40));
        assert_eq!(target.files[&(256, 257)], 55);
    }

    #[test]
    fn parts_that_make_no_sense_are_not_counted() {
        let mut target = target();
        target.add(256, &pointer(90, 20));
        assert_eq!(target.used(), None, "reaches beyond the extent");
        target.add(256, &pointer(0, u64::MAX));
        assert_eq!(target.used(), None);
    }
}

//! The tree of trees: root items against the blocks they point to, subvolumes against the directories that hold
//! them, UUIDs against subvolumes.

use zerocopy::FromBytes;

use crate::disk::{InodeItem, Key, RootItem, RootRef, entry, item, object};
use crate::hash;
use crate::reader::{Filesystem, TreeRoot};

use super::blocks::{Trees, deletion_progress};
use super::finding::{Finding, Findings, Only, differences};
use super::names::{entries, inode_refs};

/// Trees that a file system must have.
const NEEDED: [u64; 6] = [
    object::EXTENT_TREE,
    object::DEV_TREE,
    object::FS_TREE,
    object::CSUM_TREE,
    object::FREE_SPACE_TREE,
    object::DATA_RELOC_TREE,
];

pub(super) fn check(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    let at = |id: u64, field: &str| {
        Finding::new(field, "").tree(object::ROOT_TREE).key(Key::new(id, item::ROOT, 0))
    };
    for id in NEEDED {
        if !trees.roots.iter().any(|(root, _)| root.id == id) {
            findings.add(Finding { reason: "there is no such tree".to_owned(), ..at(id, "root") });
        }
    }
    let generation = filesystem.superblock().generation.get();
    for (root, item) in &trees.roots {
        if root.generation > generation {
            let reason = format!("is {}, above the superblock's {generation}", root.generation);
            findings.add(Finding { reason, ..at(root.id, "generation") });
        }
        findings.expect_same(at(root.id, "generation_v2"), item.generation_v2.get(), root.generation);
        let is_deleted = deletion_progress(item).is_some();
        if item.refs.get() != 1 && !(is_deleted && root.is_subvolume()) {
            findings.expect_same(at(root.id, "refs"), item.refs.get().into(), 1);
        }
        let has_directory = root.is_subvolume() || root.id == object::DATA_RELOC_TREE;
        let directory = if has_directory { object::FIRST_FREE } else { 0 };
        findings.expect_same(at(root.id, "root_dirid"), item.root_dirid.get(), directory);
        if !root.is_subvolume() && item.uuid != [0; 16] {
            findings.add(Finding { reason: "only subvolumes have one".to_owned(), ..at(root.id, "uuid") });
        }
        if is_deleted {
            continue;
        }
        let used = trees.tree_blocks.get(&root.id).copied().unwrap_or(0) * u64::from(filesystem.node_size());
        findings.expect_same(at(root.id, "bytes_used"), item.bytes_used.get(), used);
        if let Some(block) = trees.blocks.get(&root.bytenr) {
            findings.expect_same(at(root.id, "level"), root.level.into(), block.level.into());
        }
    }
    default_subvolume(trees, findings);
    subvolumes(trees, findings);
    uuids(filesystem, trees, findings);
}

/// The root tree's own directory has one entry, "default", that leads to a subvolume.
fn default_subvolume(trees: &Trees, findings: &mut Findings) {
    let mut default = None;
    for (key, body) in &trees.root_directory {
        let right = match key.kind {
            item::INODE => InodeItem::read_from_bytes(body)
                .is_ok_and(|inode| inode.nlink.get() == 1 && inode.mode.get() & 0o170_000 == 0o040_000),
            item::INODE_REF => inode_refs(body).is_ok_and(|refs| refs == [(0, &b".."[..])]),
            item::DIR_ITEM => {
                let entries = entries(body).unwrap_or_default();
                entries.iter().all(|entry| {
                    let location = entry.location();
                    if entry.name == b"default" && location.kind == item::ROOT {
                        default = Some(location.objectid);
                    }
                    let sound = entry.head.kind == entry::DIRECTORY && location.offset == u64::MAX;
                    sound && hash::name(entry.name) == key.offset && entry.data.is_empty()
                })
            }
            _ => true,
        };
        if !right {
            let reason = "is not as it should be in the directory of the root tree";
            findings.add(Finding::new("item", reason).tree(object::ROOT_TREE).key(*key));
        }
    }
    let is_there = |id| trees.roots.iter().any(|(root, _)| root.id == id && root.is_subvolume());
    if !default.is_some_and(is_there) {
        findings.add(Finding::new("default subvolume", "there is none").tree(object::ROOT_TREE));
    }
}

/// Parent, directory, index, subvolume, name.
type Place = (u64, u64, u64, u64, Vec<u8>);

fn subvolumes(trees: &Trees, findings: &mut Findings) {
    let (mut forward, mut back): (Vec<Place>, Vec<Place>) = (Vec::new(), Vec::new());
    for (key, body) in &trees.root_refs {
        let Ok((head, name)) = RootRef::read_from_prefix(body) else {
            findings.add(Finding::new("item", "is cut off").tree(object::ROOT_TREE).key(*key));
            continue;
        };
        if name.len() != usize::from(head.name_length.get()) {
            let reason = format!("is {}, the name has {} bytes", head.name_length, name.len());
            findings.add(Finding::new("ref.name_length", reason).tree(object::ROOT_TREE).key(*key));
        }
        let (directory, index, name) = (head.directory.get(), head.index.get(), name.to_vec());
        match key.kind {
            item::ROOT_REF => forward.push((key.objectid, directory, index, key.offset, name)),
            _ => back.push((key.offset, directory, index, key.objectid, name)),
        }
    }
    forward.sort_unstable();
    back.sort_unstable();
    let at = |place: &Place, reason: &str| {
        let what =
            format!("subvolume {} (\"{}\" in tree {})", place.3, String::from_utf8_lossy(&place.4), place.0);
        Finding::new(what, reason).tree(object::ROOT_TREE)
    };
    differences(&forward, &back, |only| {
        findings.add(match only {
            Only::Left(place) => at(place, "has no ROOT_BACKREF that says the same as its ROOT_REF"),
            Only::Right(place) => at(place, "has no ROOT_REF that says the same as its ROOT_BACKREF"),
        });
    });
    let mut entries = trees.subvolume_entries.clone();
    entries.sort_unstable();
    let is_snapshot =
        |id: u64| trees.roots.iter().any(|(root, item)| root.id == id && item.parent_uuid != [0; 16]);
    differences(&forward, &entries, |only| match only {
        Only::Left(place) => findings.add(at(place, "has no directory entry")),
        // A snapshot keeps the entries of the subvolumes in it, which lead nowhere.
        Only::Right(place) if is_snapshot(place.0) => {}
        Only::Right(place) => findings.add(at(place, "has a directory entry but no ROOT_REF")),
    });
    let needs_a_place = |root: &TreeRoot, item: &RootItem| {
        root.is_subvolume() && root.id != object::FS_TREE && deletion_progress(item).is_none()
    };
    for (root, _) in trees.roots.iter().filter(|(root, item)| needs_a_place(root, item)) {
        if !back.iter().any(|place| place.3 == root.id) {
            let key = Key::new(root.id, item::ROOT, 0);
            let reason = "no directory holds this subvolume";
            findings.add(Finding::new("root", reason).tree(object::ROOT_TREE).key(key));
        }
    }
}

fn uuids(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    let superblock = filesystem.superblock();
    if superblock.uuid_tree_generation != superblock.generation {
        return;
    }
    let mut of_subvolumes: Vec<(u64, u64, u64)> = trees
        .roots
        .iter()
        .filter(|(root, item)| {
            root.is_subvolume() && item.uuid != [0; 16] && deletion_progress(item).is_none()
        })
        .map(|(root, item)| {
            let (high, low) = halves(&item.uuid);
            (high, low, root.id)
        })
        .collect();
    of_subvolumes.sort_unstable();
    let mut of_tree = Vec::new();
    for (key, body) in trees.uuids.iter().filter(|(key, _)| key.kind == item::UUID_SUBVOL) {
        for id in body.chunks(8) {
            let id = id.try_into().map_or(0, u64::from_le_bytes);
            of_tree.push((key.objectid, key.offset, id));
        }
    }
    of_tree.sort_unstable();
    let at = |id: u64, reason: &str| Finding::new(format!("subvolume {id}"), reason).tree(object::UUID_TREE);
    differences(&of_subvolumes, &of_tree, |only| {
        findings.add(match only {
            Only::Left((_, _, id)) => at(*id, "its UUID is not noted"),
            Only::Right((_, _, id)) => at(*id, "a UUID is noted for it that it does not have"),
        });
    });
}

/// A UUID as it stands in the keys of the UUID tree.
fn halves(uuid: &[u8; 16]) -> (u64, u64) {
    let value = u128::from_le_bytes(*uuid);
    (value as u64, (value >> 64) as u64)
}

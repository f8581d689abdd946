//! One subvolume: inodes against their items, names against inodes. Items come in key order, so an inode is complete
//! when the next begins.

use std::collections::HashSet;

use zerocopy::FromBytes;

use crate::disk::{FileExtentHead, FileExtentTail, InodeItem, Key, SECTOR_SIZE, entry, flag, item, object};
use crate::hash;
use crate::reader::Filesystem;

use super::blocks::Trees;
use super::finding::{Finding, Findings, Only, differences};
use super::names::{Name, entries, inode_extrefs, inode_refs, name_hash};

/// The object that orphan items belong to.
const ORPHAN_OBJECT: u64 = 5u64.wrapping_neg();
const NANOSECONDS: u32 = 1_000_000_000;
/// The most that an inline extent can hold, in bytes: compressed data becomes at most this much.
const INLINE_MAX: u64 = 128 << 10;
/// Directory entries of subvolumes that are remembered; a hostile image could otherwise repeat them in every snapshot.
const SUBVOLUME_ENTRIES_MAX: usize = 1 << 20;

/// What has been seen of the inode at hand.
#[derive(Default)]
struct Inode {
    number: u64,
    item: Option<InodeItem>,
    names: u64,
    entry_bytes: u64,
    has_entries: bool,
    extent_bytes: u64,
    extents: u64,
    extents_end: u64,
    inline: Option<u64>,
}

/// Checks one subvolume.
pub(super) struct SubvolumeCheck {
    tree: u64,
    generation: u64,
    node_size: u64,
    no_holes: bool,
    inode: Inode,
    inodes: u64,
    /// Kind of directory entry of each inode, by number.
    kinds: Vec<(u64, u8)>,
    refs: Vec<Name>,
    indices: Vec<Name>,
    items: Vec<Name>,
    orphans: HashSet<u64>,
    without_name: Vec<u64>,
    subvolumes: Vec<(u64, u64, u64, u64, Vec<u8>)>,
}

impl SubvolumeCheck {
    pub(super) fn new(filesystem: &Filesystem<'_>, tree: u64) -> Self {
        let superblock = filesystem.superblock();
        SubvolumeCheck {
            tree,
            generation: superblock.generation.get(),
            node_size: superblock.node_size.get().into(),
            no_holes: superblock.incompat.get() & flag::INCOMPAT_NO_HOLES != 0,
            inode: Inode::default(),
            inodes: 0,
            kinds: Vec::new(),
            refs: Vec::new(),
            indices: Vec::new(),
            items: Vec::new(),
            orphans: HashSet::new(),
            without_name: Vec::new(),
            subvolumes: Vec::new(),
        }
    }

    fn at(&self, key: Key, field: &str) -> Finding {
        Finding::new(field, "").tree(self.tree).key(key)
    }

    /// Takes the next item.
    pub(super) fn item(&mut self, key: Key, body: &[u8], findings: &mut Findings) {
        if key.objectid != self.inode.number {
            self.inode_is_complete(findings);
            self.inode = Inode { number: key.objectid, ..Inode::default() };
        }
        let result = match key.kind {
            item::ORPHAN if key.objectid == ORPHAN_OBJECT => {
                self.orphans.insert(key.offset);
                Ok(())
            }
            item::INODE => self.inode_item(key, body, findings),
            item::INODE_REF => inode_refs(body).map(|refs| {
                for (index, name) in refs {
                    self.name(key.offset, index, name);
                }
            }),
            item::INODE_EXTREF => inode_extrefs(body).and_then(|refs| {
                for (directory, index, name) in refs {
                    if hash::extref(directory, name) != key.offset {
                        return Err(format!(
                            "the key's hash is not that of \"{}\"",
                            String::from_utf8_lossy(name)
                        ));
                    }
                    self.name(directory, index, name);
                }
                Ok(())
            }),
            item::XATTR => self.xattr(key, body),
            item::DIR_ITEM | item::DIR_INDEX => self.entries(key, body),
            item::EXTENT_DATA => self.extent(key, body),
            // Verity, send and log items say nothing that other trees rely on.
            _ => Ok(()),
        };
        if let Err(reason) = result {
            findings.add(Finding { reason, ..self.at(key, "item") });
        }
    }

    fn inode_item(&mut self, key: Key, body: &[u8], findings: &mut Findings) -> Result<(), String> {
        let inode = InodeItem::read_from_bytes(body).map_err(|_| format!("{} bytes", body.len()))?;
        for (field, value) in [("generation", inode.generation), ("transaction", inode.transaction)] {
            // The kernel writes ahead of the superblock by one.
            if value.get() > self.generation.saturating_add(1) {
                let reason = format!("is {value}, above the superblock's {}", self.generation);
                findings.add(Finding { reason, ..self.at(key, field) });
            }
        }
        for (field, time) in
            [("atime", inode.atime), ("ctime", inode.ctime), ("mtime", inode.mtime), ("otime", inode.otime)]
        {
            if time.nanoseconds.get() >= NANOSECONDS {
                let reason = format!("has {} nanoseconds", time.nanoseconds);
                findings.add(Finding { reason, ..self.at(key, field) });
            }
        }
        if key.offset != 0 {
            return Err("the key's offset is not zero".to_owned());
        }
        self.inode.item = Some(inode);
        self.inodes += 1;
        self.kinds.push((key.objectid, kind_of(inode.mode.get()).ok_or("the mode has no known type")?));
        Ok(())
    }

    fn name(&mut self, directory: u64, index: u64, name: &[u8]) {
        self.inode.names += 1;
        let inode = self.inode.number;
        // A subvolume's root is its own parent and has no entry.
        if !(inode == directory && inode == object::FIRST_FREE && name == b"..") {
            self.refs.push(Name { directory, index, inode, hash: name_hash(name), kind: 0 });
        }
    }

    fn xattr(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        for entry in entries(body)? {
            if hash::name(entry.name) != key.offset {
                return Err(format!(
                    "the key's hash is not that of \"{}\"",
                    String::from_utf8_lossy(entry.name)
                ));
            }
            if entry.head.kind != entry::XATTR || entry.location() != Key::default() {
                return Err("an attribute is no attribute".to_owned());
            }
        }
        Ok(())
    }

    fn entries(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        let entries = entries(body)?;
        let is_index = key.kind == item::DIR_INDEX;
        if is_index && entries.len() != 1 {
            return Err(format!("has {} entries", entries.len()));
        }
        self.inode.has_entries = true;
        for entry in entries {
            if !entry.data.is_empty() || !(1..=entry::SYMLINK).contains(&entry.head.kind) {
                return Err(format!("an entry of kind {} with {} bytes", entry.head.kind, entry.data.len()));
            }
            if !is_index && hash::name(entry.name) != key.offset {
                return Err(format!(
                    "the key's hash is not that of \"{}\"",
                    String::from_utf8_lossy(entry.name)
                ));
            }
            self.inode.entry_bytes += entry.name.len() as u64;
            let location = entry.location();
            let inode = match location.kind {
                item::INODE if location.offset == 0 => location.objectid,
                item::ROOT if entry.head.kind == entry::DIRECTORY => u64::MAX - location.objectid,
                _ => return Err(format!("an entry leads to {location}")),
            };
            let index = if is_index { key.offset } else { 0 };
            let kind = entry.head.kind;
            let name = Name { directory: key.objectid, index, inode, hash: name_hash(entry.name), kind };
            if !is_index {
                self.items.push(name);
                continue;
            }
            self.indices.push(name);
            if location.kind == item::ROOT {
                let name = entry.name.to_vec();
                self.subvolumes.push((self.tree, key.objectid, index, location.objectid, name));
            }
        }
        Ok(())
    }

    fn extent(&mut self, key: Key, body: &[u8]) -> Result<(), String> {
        let (head, rest) =
            FileExtentHead::read_from_prefix(body).map_err(|_| format!("{} bytes", body.len()))?;
        if head.generation.get() > self.generation.saturating_add(1) {
            return Err(format!("generation is {}, above the superblock's", head.generation));
        }
        if head.encryption != 0 || head.other_encoding.get() != 0 || head.compression > 3 || head.kind > 2 {
            return Err("compression, encryption, encoding or type is unknown".to_owned());
        }
        let inode = &mut self.inode;
        // The kernel never compresses what has no checksums.
        let no_checksums = inode.item.is_some_and(|item| item.flags.get() & flag::INODE_NODATASUM != 0);
        if head.compression != 0 && no_checksums {
            return Err("is compressed, but the inode has no checksums".to_owned());
        }
        inode.extents += 1;
        if head.kind == 0 {
            let length = if head.compression == 0 { rest.len() as u64 } else { head.ram_bytes.get() };
            if key.offset != 0 || length != head.ram_bytes.get() || length > INLINE_MAX {
                return Err(format!(
                    "{} inline bytes at {}; ram_bytes is {}",
                    rest.len(),
                    key.offset,
                    head.ram_bytes
                ));
            }
            inode.inline = Some(length);
            inode.extent_bytes += head.ram_bytes.get();
            inode.extents_end = length.next_multiple_of(SECTOR_SIZE.into());
            return Ok(());
        }
        let tail = FileExtentTail::read_from_bytes(rest).map_err(|_| format!("{} bytes", body.len()))?;
        let (start, length, offset) = (key.offset, tail.bytes.get(), tail.offset.get());
        let sectors = [start, length, offset, tail.disk_bytes.get(), tail.disk_bytenr.get()];
        if length == 0 || sectors.iter().any(|value| !value.is_multiple_of(SECTOR_SIZE.into())) {
            return Err("an offset or length is not a multiple of a sector".to_owned());
        }
        let available = if head.compression == 0 { tail.disk_bytes.get() } else { head.ram_bytes.get() };
        let is_hole = tail.disk_bytenr.get() == 0;
        let ends = |from: u64, end: u64| from.checked_add(length).is_some_and(|to| to <= end);
        if !ends(start, i64::MAX as u64) || (!is_hole && !ends(offset, available)) {
            return Err(format!("{length} bytes at {offset} are not in the extent's {available}"));
        }
        if head.compression == 0 && !is_hole && head.ram_bytes != tail.disk_bytes {
            return Err(format!("ram_bytes is {}, disk_bytes {}", head.ram_bytes, tail.disk_bytes));
        }
        // Only what fills a sector, which is compressed, may be inline and have more behind it.
        let behind_part = inode.inline.is_some_and(|length| !length.is_multiple_of(SECTOR_SIZE.into()));
        if behind_part || start < inode.extents_end {
            return Err(format!("begins at {start}, inside of the extent before it"));
        }
        inode.extents_end = start + length;
        if !is_hole {
            inode.extent_bytes += length;
        }
        Ok(())
    }

    fn inode_is_complete(&mut self, findings: &mut Findings) {
        let inode = std::mem::take(&mut self.inode);
        let key = Key::new(inode.number, item::INODE, 0);
        let Some(item) = &inode.item else {
            let is_inode = (object::FIRST_FREE..=object::LAST_FREE).contains(&inode.number);
            if is_inode && (inode.names > 0 || inode.has_entries || inode.extents > 0) {
                let reason = "there is none, but other items belong to it".to_owned();
                findings.add(Finding { reason, ..self.at(key, "inode") });
            }
            return;
        };
        let (size, nbytes) = (item.size.get(), item.nbytes.get());
        let nlink = u64::from(item.nlink.get());
        if nlink == 0 {
            self.without_name.push(inode.number);
        }
        findings.expect_same(self.at(key, "nlink"), nlink, inode.names);
        // mkfs gives root directories the size of a tree block, which nobody minds.
        if inode.number != object::FIRST_FREE || nbytes != self.node_size {
            findings.expect_same(self.at(key, "nbytes"), nbytes, inode.extent_bytes);
        }
        let kind = kind_of(item.mode.get());
        if kind != Some(entry::DIRECTORY) && inode.has_entries {
            findings.add(Finding {
                reason: "is no directory but has entries".to_owned(),
                ..self.at(key, "mode")
            });
        }
        match kind {
            Some(entry::DIRECTORY) => {
                findings.expect_same(self.at(key, "size"), size, inode.entry_bytes);
                if inode.names > 1 || inode.extents > 0 {
                    let reason =
                        format!("a directory with {} names and {} extents", inode.names, inode.extents);
                    findings.add(Finding { reason, ..self.at(key, "mode") });
                }
            }
            Some(entry::FILE) => {
                if let Some(inline) = inode.inline.filter(|_| inode.extents == 1) {
                    findings.expect_same(self.at(key, "size"), size, inline);
                }
                let covers = inode.inline.is_some() || inode.extents_end >= size;
                if !self.no_holes && !covers && size > 0 {
                    let reason = format!("is {size}, extents end at {}", inode.extents_end);
                    findings.add(Finding { reason, ..self.at(key, "size") });
                }
            }
            Some(entry::SYMLINK) => {
                findings.expect_same(self.at(key, "size"), size, inode.inline.unwrap_or(0));
            }
            _ => {
                findings.expect_same(self.at(key, "size"), size, 0);
                if inode.extents > 0 {
                    findings.add(Finding {
                        reason: "a special file with extents".to_owned(),
                        ..self.at(key, "mode")
                    });
                }
            }
        }
    }

    /// Compares what was gathered; hands on what other trees have to agree with.
    pub(super) fn finish(mut self, trees: &mut Trees, findings: &mut Findings) {
        self.inode_is_complete(findings);
        for inode in &self.without_name {
            if !self.orphans.contains(inode) {
                let key = Key::new(*inode, item::INODE, 0);
                let reason = "is 0, and no orphan item asks for its removal".to_owned();
                findings.add(Finding { reason, ..self.at(key, "nlink") });
            }
        }
        if self.kinds.first() != Some(&(object::FIRST_FREE, entry::DIRECTORY)) {
            let key = Key::new(object::FIRST_FREE, item::INODE, 0);
            findings
                .add(Finding { reason: "there is no root directory".to_owned(), ..self.at(key, "inode") });
        }
        self.compare_kinds(findings);
        self.compare_names(findings);
        trees.inodes += self.inodes;
        if trees.subvolume_entries.len() + self.subvolumes.len() > SUBVOLUME_ENTRIES_MAX {
            let reason =
                format!("more than {SUBVOLUME_ENTRIES_MAX} in all snapshots: the rest is not verified");
            findings.add(Finding::new("subvolume entries", reason).tree(self.tree));
            return;
        }
        trees.subvolume_entries.append(&mut self.subvolumes);
    }

    fn compare_kinds(&self, findings: &mut Findings) {
        for name in &self.indices {
            if is_subvolume(name) {
                continue;
            }
            let found = self.kinds.binary_search_by_key(&name.inode, |(inode, _)| *inode);
            let key = Key::new(name.directory, item::DIR_INDEX, name.index);
            match found.map(|index| self.kinds[index].1) {
                Ok(kind) => findings.expect_same(self.at(key, "entry.kind"), name.kind.into(), kind.into()),
                Err(_) => {
                    let reason = format!("there is no inode {}", name.inode);
                    findings.add(Finding { reason, ..self.at(key, "entry.location") });
                }
            }
        }
    }

    fn compare_names(&mut self, findings: &mut Findings) {
        let tree = self.tree;
        let at = |key: Key, reason: String| Finding::new("name", reason).tree(tree).key(key);
        let mut without_index: Vec<Name> =
            self.indices.iter().map(|name| Name { index: 0, ..*name }).collect();
        without_index.sort_unstable();
        self.items.sort_unstable();
        differences(&without_index, &self.items, |only| {
            findings.add(match only {
                Only::Left(name) => {
                    let key = Key::new(name.directory, item::DIR_INDEX, 0);
                    at(key, format!("a DIR_INDEX of inode {} is no DIR_ITEM", name.inode))
                }
                Only::Right(name) => {
                    let key = Key::new(name.directory, item::DIR_ITEM, 0);
                    at(key, format!("a DIR_ITEM of inode {} is no DIR_INDEX", name.inode))
                }
            });
        });
        let mut of_inodes: Vec<Name> = self
            .indices
            .iter()
            .filter(|name| !is_subvolume(name))
            .map(|name| Name { kind: 0, ..*name })
            .collect();
        of_inodes.sort_unstable();
        self.refs.sort_unstable();
        differences(&of_inodes, &self.refs, |only| {
            findings.add(match only {
                Only::Left(name) => {
                    let key = Key::new(name.directory, item::DIR_INDEX, name.index);
                    at(key, format!("inode {} has no such reference", name.inode))
                }
                Only::Right(name) => {
                    let key = Key::new(name.inode, item::INODE_REF, name.directory);
                    at(key, format!("directory {} has no such entry", name.directory))
                }
            });
        });
    }
}

/// Subvolumes' ids are kept mirrored, so that they cannot be taken for inodes.
fn is_subvolume(name: &Name) -> bool {
    name.inode > u64::MAX / 2
}

/// The kind of directory entry that an inode of this mode has.
fn kind_of(mode: u32) -> Option<u8> {
    Some(match mode >> 12 {
        0o01 => entry::FIFO,
        0o02 => entry::CHARACTER,
        0o04 => entry::DIRECTORY,
        0o06 => entry::BLOCK,
        0o10 => entry::FILE,
        0o12 => entry::SYMLINK,
        0o14 => entry::SOCKET,
        _ => return None,
    })
}

//! Turns a file tree into the items of a subvolume, in key order and in one pass.
//!
//! Inode numbers are 256 + node index, so walking the nodes in order *is* key order; what is needed beside the
//! node itself (its children, its index in its directory, its other names) comes from [`Links`].

use zerocopy::IntoBytes;

use crate::builder::{ItemSink, item_max};
use crate::disk::{
    DirItem, DiskKey, FileExtentHead, FileExtentTail, InodeExtref, InodeItem, InodeRef, Key, SECTOR_SIZE,
    Time, entry, flag, item, object,
};
use crate::options::{GENERATION, VIRTUAL_BASE};
use crate::tree::inline_max;
use crate::{Attributes, Error, FileTree, Node, NodeKind, Result, Run, SeedOptions, Timestamp, hash};

use super::links::Links;
use super::refs::{DataRef, DataRefs};

const TYPE_FIFO: u32 = 0o010_000;
const TYPE_CHARACTER: u32 = 0o020_000;
pub(super) const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_BLOCK: u32 = 0o060_000;
pub(super) const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;
const TYPE_SOCKET: u32 = 0o140_000;

/// The index of a directory's first entry: 0 and 1 stand for "." and "..".
pub(super) const FIRST_INDEX: u64 = 2;

/// The inode number of a node.
fn inode_number(node: usize) -> u64 {
    object::FIRST_FREE + node as u64
}

/// Writes the items of one subvolume.
pub(super) struct FsTreeWriter<'a> {
    pub(super) options: &'a SeedOptions,
    pub(super) name: &'a str,
    pub(super) root: u64,
    pub(super) tree: &'a dyn FileTree,
    pub(super) refs: &'a mut DataRefs,
}

/// An entry of a directory: the hash of its name and its node.
type Entry = (u32, u32);

impl FsTreeWriter<'_> {
    /// Sends all items to `sink`.
    pub(super) fn write(&mut self, sink: &mut dyn ItemSink) -> Result<()> {
        let links = Links::new(self.tree).map_err(|(node, reason)| self.refuse(node, reason))?;
        let mut body = Vec::new();
        let mut entries = Vec::new();
        for index in 0..self.tree.len() {
            let node = self.tree.node(index);
            match node.kind {
                NodeKind::HardLink(_) => continue,
                NodeKind::Directory => self.directory(index, &node, &links, &mut entries, &mut body, sink)?,
                _ => self.file(index, &node, &links, &mut body, sink)?,
            }
        }
        Ok(())
    }

    fn refuse(&self, node: usize, reason: impl Into<String>) -> Error {
        let name = String::from_utf8_lossy(self.tree.node(node).name).into_owned();
        Error::Node { subvolume: self.name.to_owned(), node, name, reason: reason.into() }
    }

    fn directory(
        &mut self,
        index: usize,
        node: &Node<'_>,
        links: &Links,
        entries: &mut Vec<Entry>,
        body: &mut Vec<u8>,
        sink: &mut dyn ItemSink,
    ) -> Result<()> {
        let inode = inode_number(index);
        entries.clear();
        let mut size = 0;
        for &child in links.children(index) {
            let name = self.tree.node(child as usize).name;
            entries.push((hash::name(name) as u32, child));
            size += 2 * name.len() as u64;
        }
        let item = InodeItem { size: size.into(), ..inode_item(&node.attributes, TYPE_DIRECTORY, 1) };
        sink.push(Key::new(inode, item::INODE, 0), &[item.as_bytes()])?;
        if index == 0 {
            root_directory_ref(inode, sink)?;
        } else {
            self.names(index, node, links, body, sink)?;
        }
        self.xattrs(index, body, sink)?;
        entries.sort_unstable();
        for group in entries.chunk_by(|left, right| left.0 == right.0) {
            self.dir_item(inode, group, body, sink)?;
        }
        for (position, &child) in links.children(index).iter().enumerate() {
            let child = child as usize;
            let (head, name) = self.entry(child);
            let key = Key::new(inode, item::DIR_INDEX, FIRST_INDEX + position as u64);
            sink.push(key, &[head.as_bytes(), name])?;
        }
        Ok(())
    }

    fn dir_item(
        &self,
        inode: u64,
        group: &[Entry],
        body: &mut Vec<u8>,
        sink: &mut dyn ItemSink,
    ) -> Result<()> {
        body.clear();
        for (position, &(_, child)) in group.iter().enumerate() {
            let child = child as usize;
            let (head, name) = self.entry(child);
            if group[..position].iter().any(|&(_, other)| self.tree.node(other as usize).name == name) {
                return Err(self.refuse(child, "the directory has another entry of this name"));
            }
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(name);
            if body.len() > item_max(self.options.node_size) {
                return Err(self.refuse(child, "too many names of one hash for a tree block"));
            }
        }
        sink.push(Key::new(inode, item::DIR_ITEM, group[0].0.into()), &[body])
    }

    /// The directory entry that names a node.
    fn entry(&self, node: usize) -> (DirItem, &[u8]) {
        let named = self.tree.node(node);
        let target = match named.kind {
            NodeKind::HardLink(target) => target as usize,
            _ => node,
        };
        let kind = match self.tree.node(target).kind {
            NodeKind::Directory => entry::DIRECTORY,
            NodeKind::File { .. } | NodeKind::Inline(_) | NodeKind::HardLink(_) => entry::FILE,
            NodeKind::Symlink(_) => entry::SYMLINK,
            NodeKind::CharacterDevice { .. } => entry::CHARACTER,
            NodeKind::BlockDevice { .. } => entry::BLOCK,
            NodeKind::Fifo => entry::FIFO,
            NodeKind::Socket => entry::SOCKET,
        };
        (dir_entry(Key::new(inode_number(target), item::INODE, 0), named.name.len(), kind), named.name)
    }

    fn file(
        &mut self,
        index: usize,
        node: &Node<'_>,
        links: &Links,
        body: &mut Vec<u8>,
        sink: &mut dyn ItemSink,
    ) -> Result<()> {
        let inode = inode_number(index);
        let nlink = 1 + links.other_names(index).len() as u32;
        let with = |kind| inode_item(&node.attributes, kind, nlink);
        let device = |kind, major: u32, minor: u32| {
            if major >> 12 != 0 || minor >> 20 != 0 {
                return Err(self.refuse(index, format!("device number {major}:{minor} is too large")));
            }
            Ok(InodeItem { rdev: (u64::from(major) << 20 | u64::from(minor)).into(), ..with(kind) })
        };
        let inlined = |kind, data: &[u8]| {
            let most = inline_max(self.options.node_size);
            if data.len() > most {
                return Err(self.refuse(index, format!("{} bytes; at most {most} fit a tree", data.len())));
            }
            let length = data.len() as u64;
            Ok(InodeItem { size: length.into(), nbytes: length.into(), ..with(kind) })
        };
        let mut inline: &[u8] = &[];
        let item = match node.kind {
            NodeKind::File { size } => {
                let nbytes = self.check_runs(index, size)?;
                let flags = flag::INODE_NODATASUM.into();
                InodeItem { size: size.into(), nbytes: nbytes.into(), flags, ..with(TYPE_FILE) }
            }
            NodeKind::Inline(data) => {
                inline = data;
                inlined(TYPE_FILE, data)?
            }
            NodeKind::Symlink(target) => {
                if target.is_empty() {
                    return Err(self.refuse(index, "a symbolic link to nothing"));
                }
                inline = target;
                inlined(TYPE_SYMLINK, target)?
            }
            NodeKind::CharacterDevice { major, minor } => device(TYPE_CHARACTER, major, minor)?,
            NodeKind::BlockDevice { major, minor } => device(TYPE_BLOCK, major, minor)?,
            NodeKind::Fifo => with(TYPE_FIFO),
            NodeKind::Socket => with(TYPE_SOCKET),
            NodeKind::Directory | NodeKind::HardLink(_) => {
                return Err(Error::Inconsistent(
                    "directories and hard links are written elsewhere".to_owned(),
                ));
            }
        };
        sink.push(Key::new(inode, item::INODE, 0), &[item.as_bytes()])?;
        self.names(index, node, links, body, sink)?;
        self.xattrs(index, body, sink)?;
        if !inline.is_empty() {
            let head = extent_head(inline.len() as u64, 0);
            sink.push(Key::new(inode, item::EXTENT_DATA, 0), &[head.as_bytes(), inline])?;
        } else if let NodeKind::File { size } = node.kind {
            self.extents(index, size, sink)?;
        }
        Ok(())
    }

    /// Checks the runs of a file and adds up the bytes that its extents will take.
    fn check_runs(&self, index: usize, size: u64) -> Result<u64> {
        if size > i64::MAX as u64 {
            return Err(self.refuse(index, format!("{size} bytes are more than a file can have")));
        }
        let (mut end, mut nbytes, mut wrong) = (0, 0, None);
        self.tree.runs(index, &mut |run| {
            let sector = u64::from(SECTOR_SIZE);
            let file_end = run.file_offset.checked_add(run.length);
            let aligned = (run.file_offset | run.address).is_multiple_of(sector)
                && (run.length.is_multiple_of(sector) || file_end == Some(size));
            let length = run.length.next_multiple_of(sector);
            let inside = file_end.is_some_and(|end| end <= size)
                && run.address.checked_add(length).is_some_and(|end| end <= self.options.virtual_size);
            if run.length == 0 || !aligned || !inside || run.file_offset < end {
                wrong.get_or_insert(run);
                return;
            }
            end = run.file_offset + length;
            nbytes += length;
        });
        match wrong {
            None => Ok(nbytes),
            Some(run) => Err(self.refuse(
                index,
                format!(
                    "run of {} bytes at {} of the file, {} of the region: must be aligned to 4 KiB, ascending, inside \
                     the file's {size} bytes and the region's {}",
                    run.length, run.file_offset, run.address, self.options.virtual_size
                ),
            )),
        }
    }

    fn extents(&mut self, index: usize, size: u64, sink: &mut dyn ItemSink) -> Result<()> {
        let (inode, chunk_length) = (inode_number(index), self.options.chunk_length());
        let virtual_size = self.options.virtual_size;
        let mut result = Ok(());
        let (tree, root) = (self.tree, self.root);
        tree.runs(index, &mut |run| {
            if result.is_ok() && run.file_offset < size {
                result = split_run(run, chunk_length, &mut |file_offset, chunk, offset, length| {
                    let start = chunk * chunk_length;
                    let tail = FileExtentTail {
                        disk_bytenr: (VIRTUAL_BASE + start).into(),
                        disk_bytes: chunk_length.min(virtual_size - start).into(),
                        offset: offset.into(),
                        bytes: length.into(),
                    };
                    self.refs.push(DataRef::new(chunk as u32, root, inode, file_offset.wrapping_sub(offset)));
                    let head = extent_head(tail.disk_bytes.get(), 1);
                    sink.push(
                        Key::new(inode, item::EXTENT_DATA, file_offset),
                        &[head.as_bytes(), tail.as_bytes()],
                    )
                });
            }
        });
        result
    }

    /// `INODE_REF` and `INODE_EXTREF` items: all names of an inode, grouped by directory.
    fn names(
        &self,
        index: usize,
        node: &Node<'_>,
        links: &Links,
        body: &mut Vec<u8>,
        sink: &mut dyn ItemSink,
    ) -> Result<()> {
        let inode = inode_number(index);
        let others = links.other_names(index);
        if others.is_empty() {
            let head = InodeRef {
                index: (FIRST_INDEX + links.position(index)).into(),
                name_length: (node.name.len() as u16).into(),
            };
            let key = Key::new(inode, item::INODE_REF, inode_number(node.parent as usize));
            return sink.push(key, &[head.as_bytes(), node.name]);
        }
        let mut names: Vec<(u32, u32)> = others
            .iter()
            .map(|&(_, link)| link as usize)
            .chain([index])
            .map(|named| (self.tree.node(named).parent, named as u32))
            .collect();
        names.sort_unstable();
        let mut overflow: Vec<(u64, u32)> = Vec::new();
        for group in names.chunk_by(|left, right| left.0 == right.0) {
            let parent = inode_number(group[0].0 as usize);
            body.clear();
            for &(_, named) in group {
                let name = self.tree.node(named as usize).name;
                if body.len() + size_of::<InodeRef>() + name.len() > item_max(self.options.node_size) {
                    overflow.push((hash::extref(parent, name), named));
                    continue;
                }
                let index = FIRST_INDEX + links.position(named as usize);
                let head = InodeRef { index: index.into(), name_length: (name.len() as u16).into() };
                body.extend_from_slice(head.as_bytes());
                body.extend_from_slice(name);
            }
            sink.push(Key::new(inode, item::INODE_REF, parent), &[body])?;
        }
        overflow.sort_unstable();
        for group in overflow.chunk_by(|left, right| left.0 == right.0) {
            body.clear();
            for &(_, named) in group {
                let node = self.tree.node(named as usize);
                let head = InodeExtref {
                    parent: inode_number(node.parent as usize).into(),
                    index: (FIRST_INDEX + links.position(named as usize)).into(),
                    name_length: (node.name.len() as u16).into(),
                };
                body.extend_from_slice(head.as_bytes());
                body.extend_from_slice(node.name);
            }
            if body.len() > item_max(self.options.node_size) {
                return Err(self.refuse(index, "too many names of one hash for a tree block"));
            }
            sink.push(Key::new(inode, item::INODE_EXTREF, group[0].0), &[body])?;
        }
        Ok(())
    }

    fn xattrs(&self, index: usize, body: &mut Vec<u8>, sink: &mut dyn ItemSink) -> Result<()> {
        let mut all: Vec<(u64, Vec<u8>, Vec<u8>)> = Vec::new();
        self.tree
            .xattrs(index, &mut |name, value| all.push((hash::name(name), name.to_vec(), value.to_vec())));
        all.sort_unstable();
        for group in all.chunk_by(|left, right| left.0 == right.0) {
            body.clear();
            for (position, (_, name, value)) in group.iter().enumerate() {
                let shown = String::from_utf8_lossy(name);
                if name.is_empty() || name.len() > crate::disk::NAME_MAX {
                    return Err(
                        self.refuse(index, format!("attribute \"{shown}\": names have 1 to 255 bytes"))
                    );
                }
                if group[..position].iter().any(|(_, other, _)| other == name) {
                    return Err(self.refuse(index, format!("attribute \"{shown}\" is there twice")));
                }
                let most = item_max(self.options.node_size);
                if body.len() + size_of::<DirItem>() + name.len() + value.len() > most {
                    let reason =
                        format!("attribute \"{shown}\" has {} bytes; a tree block takes {most}", value.len());
                    return Err(self.refuse(index, reason));
                }
                let head = DirItem {
                    data_length: (value.len() as u16).into(),
                    transaction: GENERATION.into(),
                    ..dir_entry(Key::default(), name.len(), entry::XATTR)
                };
                body.extend_from_slice(head.as_bytes());
                body.extend_from_slice(name);
                body.extend_from_slice(value);
            }
            sink.push(Key::new(inode_number(index), item::XATTR, group[0].0), &[body])?;
        }
        Ok(())
    }
}

/// Cuts a run at chunk boundaries: file offset, chunk, offset in the chunk, length (whole sectors).
fn split_run(
    run: Run,
    chunk_length: u64,
    visit: &mut dyn FnMut(u64, u64, u64, u64) -> Result<()>,
) -> Result<()> {
    let (mut file_offset, mut address) = (run.file_offset, run.address);
    let mut left = run.length.next_multiple_of(SECTOR_SIZE.into());
    while left > 0 {
        let (chunk, offset) = (address / chunk_length, address % chunk_length);
        let length = left.min(chunk_length - offset);
        visit(file_offset, chunk, offset, length)?;
        file_offset += length;
        address += length;
        left -= length;
    }
    Ok(())
}

pub(super) fn time(timestamp: Timestamp) -> Time {
    Time { seconds: (timestamp.seconds as u64).into(), nanoseconds: timestamp.nanoseconds.into() }
}

/// An inode of size 0.
pub(super) fn inode_item(attributes: &Attributes, kind: u32, nlink: u32) -> InodeItem {
    InodeItem {
        generation: GENERATION.into(),
        transaction: GENERATION.into(),
        size: 0.into(),
        nbytes: 0.into(),
        block_group: 0.into(),
        nlink: nlink.into(),
        uid: attributes.uid.into(),
        gid: attributes.gid.into(),
        mode: (kind | attributes.mode & 0o7777).into(),
        rdev: 0.into(),
        flags: 0.into(),
        sequence: 0.into(),
        reserved: [0; 32],
        atime: time(attributes.atime),
        ctime: time(attributes.ctime),
        mtime: time(attributes.mtime),
        otime: time(attributes.ctime),
    }
}

pub(super) fn dir_entry(location: Key, name_length: usize, kind: u8) -> DirItem {
    DirItem {
        location: DiskKey::from(location),
        transaction: GENERATION.into(),
        data_length: 0.into(),
        name_length: (name_length as u16).into(),
        kind,
    }
}

/// The head of a file extent: `kind` 0 inline, 1 regular.
pub(super) fn extent_head(ram_bytes: u64, kind: u8) -> FileExtentHead {
    FileExtentHead {
        generation: GENERATION.into(),
        ram_bytes: ram_bytes.into(),
        compression: 0,
        encryption: 0,
        other_encoding: 0.into(),
        kind,
    }
}

/// A subvolume's root directory is its own parent, named "..".
pub(super) fn root_directory_ref(inode: u64, sink: &mut dyn ItemSink) -> Result<()> {
    let head = InodeRef { index: 0.into(), name_length: 2.into() };
    sink.push(Key::new(inode, item::INODE_REF, inode), &[head.as_bytes(), b".."])
}

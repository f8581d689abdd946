//! The file tree of an image while it is being made: names and inodes, in the order in which the source gives them.
//!
//! The tree lives in memory only, so nothing in a source can reach outside it. Later members replace earlier ones as
//! they would under GNU tar: a name gets a new inode, other hard links keep the old one.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use crate::entry::{ENTRIES_MAX, Metadata, NAME_BYTES_MAX, PATH_BYTES_MAX, Xattr};
use crate::index::{FileExtent, IndexWriter, NewEntry, NewKind, Piece};
use crate::{Error, Result};

/// Names, targets, attributes and inline data of one tree, bytes.
pub(crate) const TREE_BYTES_MAX: u64 = 1 << 30;

const NONE: u32 = u32::MAX;
/// Mode of directories that the source does not mention.
const IMPLIED_MODE: u16 = 0o755;

/// What an inode is.
#[derive(Debug)]
pub(crate) enum InodeKind {
    Directory,
    /// Data in pieces `first .. first + count`.
    File {
        size: u64,
        first: u64,
        count: u32,
    },
    Inline(Box<[u8]>),
    Symlink(Box<[u8]>),
    CharacterDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    Socket,
}

/// Numbers a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId(u32);

/// Numbers an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InodeId(u32);

struct Node {
    parent: u32,
    name_start: u32,
    name_length: u8,
    inode: u32,
    first_child: u32,
    last_child: u32,
    next_sibling: u32,
    /// The next node whose name hashes alike.
    next_alike: u32,
}

struct Inode {
    kind: InodeKind,
    metadata: Metadata,
}

/// A piece with its place in the file that it belongs to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FilePiece {
    pub(crate) piece: Piece,
    pub(crate) file_offset: u64,
}

/// The tree.
pub(crate) struct Tree {
    nodes: Vec<Node>,
    inodes: Vec<Inode>,
    names: Vec<u8>,
    by_name: HashMap<u64, u32>,
    hasher: RandomState,
    bytes: u64,
    /// Most names, and most inodes.
    entries_max: u64,
    no_xattrs: Arc<[Xattr]>,
}

impl Tree {
    /// A tree of an empty root directory.
    pub(crate) fn new() -> Self {
        Tree::with_limit(ENTRIES_MAX)
    }

    /// The same for at most `entries_max` entries, the root included.
    pub(crate) fn with_limit(entries_max: u64) -> Self {
        let no_xattrs: Arc<[Xattr]> = Arc::new([]);
        let metadata = Metadata { mode: IMPLIED_MODE, xattrs: no_xattrs.clone(), ..Metadata::default() };
        let root = Node {
            parent: 0,
            name_start: 0,
            name_length: 0,
            inode: 0,
            first_child: NONE,
            last_child: NONE,
            next_sibling: NONE,
            next_alike: NONE,
        };
        Tree {
            nodes: vec![root],
            inodes: vec![Inode { kind: InodeKind::Directory, metadata }],
            names: Vec::new(),
            by_name: HashMap::new(),
            hasher: RandomState::new(),
            bytes: 0,
            entries_max,
            no_xattrs,
        }
    }

    /// Names so far.
    pub(crate) fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Makes an inode without a name.
    pub(crate) fn inode(&mut self, kind: InodeKind, mut metadata: Metadata) -> Result<InodeId> {
        if self.inodes.len() as u64 >= self.entries_max {
            return Err(Error::Limit { what: "entries in a source".to_owned(), limit: self.entries_max });
        }
        if metadata.xattrs.is_empty() {
            metadata.xattrs = self.no_xattrs.clone();
        }
        let payload = match &kind {
            InodeKind::Inline(bytes) | InodeKind::Symlink(bytes) => bytes.len(),
            _ => 0,
        };
        let xattrs: usize = metadata.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
        self.count_bytes(payload + xattrs)?;
        self.inodes.push(Inode { kind, metadata });
        Ok(InodeId(self.inodes.len() as u32 - 1))
    }

    /// Puts `inode` at `path` (see [`components`]); directories that are missing on the way are made.
    ///
    /// # Errors
    /// A reason without the path, for the caller to add; the outer result is for limits.
    pub(crate) fn place(&mut self, path: &[&[u8]], inode: InodeId) -> Result<Result<(), String>> {
        let is_directory = matches!(self.inodes[inode.0 as usize].kind, InodeKind::Directory);
        let Some((name, parents)) = path.split_last() else {
            if !is_directory {
                return Ok(Err("the root of the tree must be a directory".to_owned()));
            }
            self.nodes[0].inode = inode.0;
            return Ok(Ok(()));
        };
        let mut parent = 0;
        for component in parents {
            parent = match self.child(parent, component) {
                Some(node) => match self.kind(NodeId(node)) {
                    InodeKind::Directory => node,
                    InodeKind::Symlink(_) => {
                        let shown = String::from_utf8_lossy(component);
                        return Ok(Err(format!("lies below the symbolic link {shown:?}: refused")));
                    }
                    _ => {
                        let shown = String::from_utf8_lossy(component);
                        return Ok(Err(format!("lies below {shown:?}, which is not a directory")));
                    }
                },
                None => {
                    let metadata = Metadata { mode: IMPLIED_MODE, ..Metadata::default() };
                    let implied = self.inode(InodeKind::Directory, metadata)?;
                    self.add_child(parent, component, implied)?
                }
            };
        }
        let Some(node) = self.child(parent, name) else {
            self.add_child(parent, name, inode)?;
            return Ok(Ok(()));
        };
        if !is_directory && self.nodes[node as usize].first_child != NONE {
            return Ok(Err("would replace a directory that is not empty".to_owned()));
        }
        self.nodes[node as usize].inode = inode.0;
        Ok(Ok(()))
    }

    /// The name at `path`, following nothing.
    pub(crate) fn find(&self, path: &[&[u8]]) -> Option<NodeId> {
        path.iter().try_fold(0, |parent, component| self.child(parent, component)).map(NodeId)
    }

    pub(crate) fn kind(&self, node: NodeId) -> &InodeKind {
        &self.inodes[self.nodes[node.0 as usize].inode as usize].kind
    }

    pub(crate) fn inode_of(&self, node: NodeId) -> InodeId {
        InodeId(self.nodes[node.0 as usize].inode)
    }

    fn count_bytes(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes as u64;
        if self.bytes > TREE_BYTES_MAX {
            let what = "bytes of names, attributes and small files in a source".to_owned();
            return Err(Error::Limit { what, limit: TREE_BYTES_MAX });
        }
        Ok(())
    }

    fn name(&self, node: &Node) -> &[u8] {
        let start = node.name_start as usize;
        &self.names[start..start + usize::from(node.name_length)]
    }

    fn child(&self, parent: u32, name: &[u8]) -> Option<u32> {
        let mut at = *self.by_name.get(&self.hasher.hash_one((parent, name)))?;
        while at != NONE {
            let node = &self.nodes[at as usize];
            if node.parent == parent && self.name(node) == name {
                return Some(at);
            }
            at = node.next_alike;
        }
        None
    }

    fn add_child(&mut self, parent: u32, name: &[u8], inode: InodeId) -> Result<u32> {
        if self.nodes.len() as u64 >= self.entries_max {
            return Err(Error::Limit { what: "entries in a source".to_owned(), limit: self.entries_max });
        }
        debug_assert!(!name.is_empty() && name.len() <= NAME_BYTES_MAX);
        self.count_bytes(name.len())?;
        let number = self.nodes.len() as u32;
        let alike = self.by_name.insert(self.hasher.hash_one((parent, name)), number);
        let name_start = self.names.len() as u32;
        self.names.extend_from_slice(name);
        self.nodes.push(Node {
            parent,
            name_start,
            name_length: name.len() as u8,
            inode: inode.0,
            first_child: NONE,
            last_child: NONE,
            next_sibling: NONE,
            next_alike: alike.unwrap_or(NONE),
        });
        let last = std::mem::replace(&mut self.nodes[parent as usize].last_child, number);
        match last {
            NONE => self.nodes[parent as usize].first_child = number,
            _ => self.nodes[last as usize].next_sibling = number,
        }
        Ok(number)
    }

    /// Writes all entries in pre-order; the first name of an inode is the entry, the others are hard links to it.
    pub(crate) fn write(&self, pieces: &[FilePiece], writer: &mut IndexWriter) -> Result<()> {
        let mut written = vec![NONE; self.inodes.len()];
        let mut parts = Vec::new();
        let (mut node, mut depth) = (0u32, 0u32);
        loop {
            let here = &self.nodes[node as usize];
            let inode = &self.inodes[here.inode as usize];
            let kind = match written[here.inode as usize] {
                NONE => new_kind(&inode.kind, pieces, &mut parts),
                earlier => NewKind::HardLink(earlier),
            };
            if !matches!(kind, NewKind::HardLink(_)) {
                written[here.inode as usize] = writer.entries() as u32;
            }
            writer.add(&NewEntry { depth, name: self.name(here), kind, metadata: &inode.metadata })?;
            if here.first_child != NONE {
                node = here.first_child;
                depth += 1;
                continue;
            }
            while depth > 0 && self.nodes[node as usize].next_sibling == NONE {
                node = self.nodes[node as usize].parent;
                depth -= 1;
            }
            if depth == 0 {
                return Ok(());
            }
            node = self.nodes[node as usize].next_sibling;
        }
    }
}

fn new_kind<'a>(kind: &'a InodeKind, pieces: &[FilePiece], parts: &'a mut Vec<(u64, u64)>) -> NewKind<'a> {
    match kind {
        InodeKind::Directory => NewKind::Directory,
        &InodeKind::File { size, first, count } => {
            parts.clear();
            let range = first as usize..first as usize + count as usize;
            parts.extend(pieces[range].iter().map(|part| (part.file_offset, part.piece.length)));
            NewKind::File(FileExtent { first_piece: first, parts, size })
        }
        InodeKind::Inline(data) => NewKind::Inline(data),
        InodeKind::Symlink(target) => NewKind::Symlink(target),
        &InodeKind::CharacterDevice(major, minor) => NewKind::CharacterDevice(major, minor),
        &InodeKind::BlockDevice(major, minor) => NewKind::BlockDevice(major, minor),
        InodeKind::Fifo => NewKind::Fifo,
        InodeKind::Socket => NewKind::Socket,
    }
}

/// Splits a path into its components as an unpacker does: leading slashes, `.` and empty parts are dropped.
///
/// # Errors
/// A reason for paths that climb (`..`) or that Linux cannot name.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.contains(&0) {
        return Err("a NUL byte in the path".to_owned());
    }
    let parts: Vec<&[u8]> =
        path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err("\"..\" in the path: refused".to_owned());
    }
    if let Some(part) = parts.iter().find(|part| part.len() > NAME_BYTES_MAX) {
        return Err(format!("a name of {} bytes; Linux takes {NAME_BYTES_MAX}", part.len()));
    }
    let length = parts.iter().map(|part| part.len() + 1).sum::<usize>();
    if length > PATH_BYTES_MAX + 1 {
        return Err(format!("a path of {} bytes; Linux takes {PATH_BYTES_MAX}", length - 1));
    }
    Ok(parts)
}

/// Checks the target of a symbolic link.
///
/// # Errors
/// A reason for targets that Linux cannot store.
pub(crate) fn check_target(target: &[u8]) -> Result<(), String> {
    match target.len() {
        0 => Err("a symbolic link without a target".to_owned()),
        _ if target.contains(&0) => Err("a NUL byte in the link target".to_owned()),
        1..=PATH_BYTES_MAX => Ok(()),
        length => Err(format!("a link target of {length} bytes; Linux takes {PATH_BYTES_MAX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_stay_below_the_root() {
        assert_eq!(components(b"/./a//b/").unwrap(), [b"a", b"b"]);
        assert!(components(b"./").unwrap().is_empty());
        for bad in ["..", "a/../b", "/..", "a\0b"] {
            components(bad.as_bytes()).unwrap_err();
        }
        components(&[b'x'; 256]).unwrap_err();
        components(&b"abcdefg/".repeat(512)).unwrap();
        components(&b"abcdefg/".repeat(513)).unwrap_err();
    }

    #[test]
    fn a_symlink_is_no_way_out() {
        let mut tree = Tree::new();
        let link = tree.inode(InodeKind::Symlink((*b"/etc").into()), Metadata::default()).unwrap();
        tree.place(&[b"a"], link).unwrap().unwrap();
        let file = tree.inode(InodeKind::Fifo, Metadata::default()).unwrap();
        assert!(tree.place(&[b"a", b"passwd"], file).unwrap().unwrap_err().contains("symbolic link"));
    }
}

//! A file tree that owns its nodes: for small trees and for tests.

use crate::{Attributes, FileTree, Node, NodeKind, Run};

/// A file tree in memory; node 0, the root, is there from the start.
#[derive(Debug, Clone)]
pub struct MemoryTree {
    nodes: Vec<Owned>,
}

/// What a node is, owning its bytes; see [`NodeKind`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the variant of NodeKind of the same name")]
pub enum OwnedKind {
    Directory,
    File { size: u64, runs: Vec<Run> },
    Inline(Vec<u8>),
    Symlink(Vec<u8>),
    HardLink(u32),
    CharacterDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

#[derive(Debug, Clone)]
struct Owned {
    parent: u32,
    name: Vec<u8>,
    kind: OwnedKind,
    attributes: Attributes,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl MemoryTree {
    /// A tree that is a root directory with these attributes.
    pub fn new(root: Attributes) -> Self {
        let root = Owned {
            parent: 0,
            name: Vec::new(),
            kind: OwnedKind::Directory,
            attributes: root,
            xattrs: Vec::new(),
        };
        MemoryTree { nodes: vec![root] }
    }

    /// Adds a node to the directory `parent` and returns its index.
    pub fn add(
        &mut self,
        parent: u32,
        name: impl Into<Vec<u8>>,
        kind: OwnedKind,
        attributes: Attributes,
    ) -> u32 {
        self.nodes.push(Owned { parent, name: name.into(), kind, attributes, xattrs: Vec::new() });
        self.nodes.len() as u32 - 1
    }

    /// Gives a node an extended attribute.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn set_xattr(&mut self, node: u32, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.nodes[node as usize].xattrs.push((name.into(), value.into()));
    }

    /// The attributes of a node.
    pub fn xattrs_of(&self, node: usize) -> &[(Vec<u8>, Vec<u8>)] {
        &self.nodes[node].xattrs
    }

    /// What a node is.
    pub fn kind(&self, node: usize) -> &OwnedKind {
        &self.nodes[node].kind
    }
}

impl FileTree for MemoryTree {
    fn len(&self) -> usize {
        self.nodes.len()
    }

    fn node(&self, index: usize) -> Node<'_> {
        let owned = &self.nodes[index];
        let kind = match &owned.kind {
            OwnedKind::Directory => NodeKind::Directory,
            OwnedKind::File { size, .. } => NodeKind::File { size: *size },
            OwnedKind::Inline(data) => NodeKind::Inline(data),
            OwnedKind::Symlink(target) => NodeKind::Symlink(target),
            OwnedKind::HardLink(target) => NodeKind::HardLink(*target),
            &OwnedKind::CharacterDevice { major, minor } => NodeKind::CharacterDevice { major, minor },
            &OwnedKind::BlockDevice { major, minor } => NodeKind::BlockDevice { major, minor },
            OwnedKind::Fifo => NodeKind::Fifo,
            OwnedKind::Socket => NodeKind::Socket,
        };
        Node { parent: owned.parent, name: &owned.name, kind, attributes: owned.attributes }
    }

    fn runs(&self, index: usize, visit: &mut dyn FnMut(Run)) {
        if let OwnedKind::File { runs, .. } = &self.nodes[index].kind {
            runs.iter().copied().for_each(visit);
        }
    }

    fn xattrs(&self, index: usize, visit: &mut dyn FnMut(&[u8], &[u8])) {
        for (name, value) in &self.nodes[index].xattrs {
            visit(name, value);
        }
    }
}

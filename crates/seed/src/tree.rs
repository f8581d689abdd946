//! The file trees that are cloned into an image before it is first mounted, as the caller lends them.

use crate::Timestamp;

/// A file tree: nodes by index, parents before their children, node 0 the root directory (its name is not used).
///
/// The formatter asks for each node a handful of times and keeps 16 bytes for it, so a compact table can be lent
/// as it is. Names need be unique within their directory; anything that breaks a rule is an error that names the node.
pub trait FileTree {
    /// Nodes, the root included; at least 1.
    fn len(&self) -> usize;

    /// Whether there is not even a root.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The node at `index < len()`.
    fn node(&self, index: usize) -> Node<'_>;

    /// Shows the runs of a [`NodeKind::File`], ascending by file offset, none overlapping. What no run covers is
    /// a hole.
    fn runs(&self, index: usize, visit: &mut dyn FnMut(Run));

    /// Shows the extended attributes of a node, in any order: name ("user.x"), value.
    fn xattrs(&self, index: usize, visit: &mut dyn FnMut(&[u8], &[u8]));
}

/// A name in a directory and, unless it is a hard link, the inode behind it.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    /// The directory that holds it; less than the node's own index.
    pub parent: u32,
    /// 1 to 255 bytes, no slash, no zero byte.
    pub name: &'a [u8],
    /// What it is.
    pub kind: NodeKind<'a>,
    /// Owner, permissions and times; not used for a hard link.
    pub attributes: Attributes,
}

/// Owner, permissions and times of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits with set-id and sticky: the lower 12 bits; the type comes from the node's kind.
    pub mode: u32,
    /// Last read.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode; also noted as its creation.
    pub ctime: Timestamp,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind<'a> {
    /// A directory.
    Directory,
    /// A file of `size` bytes whose content is [`FileTree::runs`] of the virtual region.
    File {
        /// Bytes.
        size: u64,
    },
    /// A file whose content lies in the tree: at most [`inline_max`] bytes.
    Inline(&'a [u8]),
    /// A symbolic link to this path of 1 to [`inline_max`] bytes.
    Symlink(&'a [u8]),
    /// Another name of the node at this index, which is no directory and no hard link.
    HardLink(u32),
    /// A character device.
    CharacterDevice {
        /// Major number, below 4096.
        major: u32,
        /// Minor number, below 2^20.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number, below 4096.
        major: u32,
        /// Minor number, below 2^20.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A run of a file that is a clone of a run of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where in the file; a multiple of 4 KiB.
    pub file_offset: u64,
    /// Where in the virtual region; a multiple of 4 KiB.
    pub address: u64,
    /// Bytes; a multiple of 4 KiB unless the run ends where the file ends.
    pub length: u64,
}

/// A tree that becomes a subvolume of the image.
#[derive(Clone, Copy)]
pub struct Subvolume<'a> {
    /// Its name in the top-level directory: one path component.
    pub name: &'a str,
    /// Its files.
    pub tree: &'a dyn FileTree,
    /// Whether it can be written to.
    pub readonly: bool,
}

/// The longest inline file or symbolic link with tree blocks of `node_size` bytes: what fits a leaf, and less than a
/// sector.
pub fn inline_max(node_size: u32) -> usize {
    use crate::disk::{FileExtentHead, HEADER_SIZE, ITEM_SIZE, SECTOR_SIZE};
    (node_size as usize - HEADER_SIZE - ITEM_SIZE - size_of::<FileExtentHead>()).min(SECTOR_SIZE as usize - 1)
}

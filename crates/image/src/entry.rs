//! The entries of an image's file tree, as a reader of an index sees them.
//!
//! Names, targets and attribute names are bytes: Linux knows no encoding there.

use std::sync::Arc;

use bytes::Bytes;

/// Addresses, runs and clones are multiples of this, bytes: the sector size of the filesystems that loam makes.
pub const BLOCK_BYTES: u64 = 4096;
/// Most entries of one tree, the root included.
pub const ENTRIES_MAX: u64 = 1 << 22;
/// Longest name of a directory entry, bytes (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest path of an entry relative to the root, and longest target of a symbolic link, bytes (`PATH_MAX` - 1).
pub const PATH_BYTES_MAX: usize = 4095;
/// Most extended attributes of one entry.
pub const XATTRS_MAX: usize = 1024;
/// Longest value of an extended attribute, bytes (`XATTR_SIZE_MAX`).
pub const XATTR_VALUE_BYTES_MAX: usize = 65_536;
/// Largest inline file, bytes. What every layout of the formatter can keep inside a metadata leaf.
pub const INLINE_BYTES_MAX: usize = 2048;

/// A point in time; before 1970 the seconds are negative and the nanoseconds still count forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, below 10^9.
    pub nanoseconds: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Xattr {
    /// Full name, such as `user.comment` or `security.capability`.
    pub name: Bytes,
    /// Value; for `system.posix_acl_*` the kernel's binary form.
    pub value: Bytes,
}

/// What an inode carries beside its data.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits, at most 07777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the data.
    pub mtime: Time,
    /// Last access, where the source says it.
    pub atime: Option<Time>,
    /// Last change of the inode, where the source says it.
    pub ctime: Option<Time>,
    /// Extended attributes in the order of the source.
    pub xattrs: Arc<[Xattr]>,
}

/// A part of a file that is cloned from the address space. All three are multiples of [`BLOCK_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where in the file, bytes.
    pub file_offset: u64,
    /// Address relative to the content's first, bytes.
    pub address: u64,
    /// Bytes; the last run may reach beyond the file's end to the next block boundary.
    pub length: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file whose data lies in the address space; what no run covers is a hole.
    File {
        /// Size in bytes.
        size: u64,
        /// Ascending by file offset.
        runs: Vec<Run>,
    },
    /// A regular file whose data lies in the index.
    Inline(Bytes),
    /// A symbolic link with its target.
    Symlink(Bytes),
    /// One more name of the inode of an entry before this one.
    HardLink(u32),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One entry of a tree, parents before children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number, counted from the root, which is 0.
    pub number: u32,
    /// Number of the directory it is in; the root's is 0.
    pub parent: u32,
    /// How many directories are above it; 0 for the root.
    pub depth: u32,
    /// Name in its directory; empty for the root.
    pub name: Bytes,
    /// What it is.
    pub kind: EntryKind,
    /// Owner, mode, times, attributes. Meaningless (default) for a hard link, which shares its target's.
    pub metadata: Metadata,
}

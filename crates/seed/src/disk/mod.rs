//! What btrfs puts on disk: constants, keys and fixed-size records, all little-endian and unaligned.
//!
//! Names and numbers follow the kernel's `include/uapi/linux/btrfs_tree.h`; every record states its size, which the
//! compiler checks. Nothing here reads or writes a device.

mod pieces;
mod records;
mod superblock;

use std::fmt;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use pieces::{Piece, field_at, pieces};
pub use records::*;
pub use superblock::*;

/// Bytes of a sector: the unit of file extents and of alignment.
pub const SECTOR_SIZE: u32 = 4096;
/// Bytes of a stripe unit; chunks begin and end on multiples of it.
pub const STRIPE_LENGTH: u64 = 64 << 10;
/// The longest name of a directory entry or extended attribute, in bytes.
pub const NAME_MAX: usize = 255;
/// Levels of a tree; the root lies at most at level 7.
pub const LEVEL_MAX: u8 = 8;

/// Well-known tree ids and object ids.
pub mod object {
    /// The tree of trees.
    pub const ROOT_TREE: u64 = 1;
    /// Extents and block groups.
    pub const EXTENT_TREE: u64 = 2;
    /// Chunks and devices.
    pub const CHUNK_TREE: u64 = 3;
    /// Device extents.
    pub const DEV_TREE: u64 = 4;
    /// The top-level subvolume.
    pub const FS_TREE: u64 = 5;
    /// The directory in the root tree that names the default subvolume.
    pub const ROOT_TREE_DIR: u64 = 6;
    /// Data checksums.
    pub const CSUM_TREE: u64 = 7;
    /// Quota groups.
    pub const QUOTA_TREE: u64 = 8;
    /// Subvolumes by UUID.
    pub const UUID_TREE: u64 = 9;
    /// Free space.
    pub const FREE_SPACE_TREE: u64 = 10;
    /// Block groups, where they have a tree of their own.
    pub const BLOCK_GROUP_TREE: u64 = 11;
    /// Relocated data.
    pub const DATA_RELOC_TREE: u64 = 9u64.wrapping_neg();
    /// The object of device items, and that of chunks' owners.
    pub const DEV_ITEMS: u64 = 1;
    /// The object of chunk items, and the first free id of inodes and subvolumes.
    pub const FIRST_FREE: u64 = 256;
    /// The last id of inodes and subvolumes.
    pub const LAST_FREE: u64 = 256u64.wrapping_neg();
}

/// Item types, as they stand in keys.
pub mod item {
    /// An inode.
    pub const INODE: u8 = 1;
    /// A name of an inode.
    pub const INODE_REF: u8 = 12;
    /// Names of an inode that found no room in its `INODE_REF`.
    pub const INODE_EXTREF: u8 = 13;
    /// Extended attributes of one name hash.
    pub const XATTR: u8 = 24;
    /// An inode to be cleaned up.
    pub const ORPHAN: u8 = 48;
    /// Directory entries of one name hash.
    pub const DIR_ITEM: u8 = 84;
    /// A directory entry in order of creation.
    pub const DIR_INDEX: u8 = 96;
    /// A file extent.
    pub const EXTENT_DATA: u8 = 108;
    /// Checksums of data.
    pub const EXTENT_CSUM: u8 = 128;
    /// A tree.
    pub const ROOT: u8 = 132;
    /// From a subvolume to the directory that holds it.
    pub const ROOT_BACKREF: u8 = 144;
    /// From a directory to the subvolume in it.
    pub const ROOT_REF: u8 = 156;
    /// A data extent, or a tree block where `METADATA` is not used.
    pub const EXTENT: u8 = 168;
    /// A tree block.
    pub const METADATA: u8 = 169;
    /// Inline only: the subvolume that a data extent is charged to.
    pub const EXTENT_OWNER_REF: u8 = 172;
    /// A tree that holds a tree block.
    pub const TREE_BLOCK_REF: u8 = 176;
    /// A file that refers to a data extent.
    pub const EXTENT_DATA_REF: u8 = 178;
    /// A tree block that holds a tree block.
    pub const SHARED_BLOCK_REF: u8 = 182;
    /// A leaf that refers to a data extent.
    pub const SHARED_DATA_REF: u8 = 184;
    /// A block group.
    pub const BLOCK_GROUP: u8 = 192;
    /// How free space of a block group is noted.
    pub const FREE_SPACE_INFO: u8 = 198;
    /// A run of free space.
    pub const FREE_SPACE_EXTENT: u8 = 199;
    /// Free space as a bitmap.
    pub const FREE_SPACE_BITMAP: u8 = 200;
    /// A run of a device given to a chunk.
    pub const DEV_EXTENT: u8 = 204;
    /// A device.
    pub const DEV: u8 = 216;
    /// A chunk.
    pub const CHUNK: u8 = 228;
    /// The state of quotas.
    pub const QGROUP_STATUS: u8 = 240;
    /// Usage of a quota group.
    pub const QGROUP_INFO: u8 = 242;
    /// Limits of a quota group.
    pub const QGROUP_LIMIT: u8 = 244;
    /// A quota group's parent or child.
    pub const QGROUP_RELATION: u8 = 246;
    /// State that is kept between mounts (balance).
    pub const TEMPORARY: u8 = 248;
    /// State that is kept for good (device statistics).
    pub const PERSISTENT: u8 = 249;
    /// A subvolume's UUID.
    pub const UUID_SUBVOL: u8 = 251;
    /// The UUID of the subvolume that one was received from.
    pub const UUID_RECEIVED: u8 = 252;
}

/// Feature bits and flags.
pub mod flag {
    /// What every file system since 2009 has: refs that name trees, not blocks.
    pub const INCOMPAT_MIXED_BACKREF: u64 = 1 << 0;
    /// The default subvolume is not the top-level one.
    pub const INCOMPAT_DEFAULT_SUBVOL: u64 = 1 << 1;
    /// Some data is compressed with LZO.
    pub const INCOMPAT_COMPRESS_LZO: u64 = 1 << 3;
    /// Some data is compressed with zstd.
    pub const INCOMPAT_COMPRESS_ZSTD: u64 = 1 << 4;
    /// Tree blocks larger than a sector.
    pub const INCOMPAT_BIG_METADATA: u64 = 1 << 5;
    /// `INODE_EXTREF` items.
    pub const INCOMPAT_EXTENDED_IREF: u64 = 1 << 6;
    /// RAID 5 and 6 (of data: trees on them cannot be read here).
    pub const INCOMPAT_RAID56: u64 = 1 << 7;
    /// `METADATA` items.
    pub const INCOMPAT_SKINNY_METADATA: u64 = 1 << 8;
    /// Holes of files are not recorded.
    pub const INCOMPAT_NO_HOLES: u64 = 1 << 9;
    /// Blocks carry `metadata_uuid`.
    pub const INCOMPAT_METADATA_UUID: u64 = 1 << 10;
    /// RAID 1 with three and four copies.
    pub const INCOMPAT_RAID1C34: u64 = 1 << 11;
    /// Simple quotas: data extents carry `EXTENT_OWNER_REF`.
    pub const INCOMPAT_SIMPLE_QUOTA: u64 = 1 << 16;
    /// There is a free space tree.
    pub const COMPAT_RO_FREE_SPACE_TREE: u64 = 1 << 0;
    /// The free space tree may be trusted.
    pub const COMPAT_RO_FREE_SPACE_TREE_VALID: u64 = 1 << 1;
    /// Block groups have a tree of their own.
    pub const COMPAT_RO_BLOCK_GROUP_TREE: u64 = 1 << 3;
    /// Tree block or superblock was written.
    pub const HEADER_WRITTEN: u64 = 1 << 0;
    /// Tree blocks: the version of back references, in the top byte.
    pub const HEADER_MIXED_BACKREF: u64 = 1 << 56;
    /// Superblock: the device is a seed.
    pub const SUPER_SEEDING: u64 = 1 << 32;
    /// Chunk and block group: data.
    pub const GROUP_DATA: u64 = 1 << 0;
    /// Chunk and block group: the chunk tree.
    pub const GROUP_SYSTEM: u64 = 1 << 1;
    /// Chunk and block group: all other trees.
    pub const GROUP_METADATA: u64 = 1 << 2;
    /// Extent: data.
    pub const EXTENT_DATA: u64 = 1 << 0;
    /// Extent: a tree block.
    pub const EXTENT_TREE_BLOCK: u64 = 1 << 1;
    /// Extent: a tree block whose references are full: its children name it, not its tree.
    pub const EXTENT_FULL_BACKREF: u64 = 1 << 8;
    /// Inode: data has no checksums.
    pub const INODE_NODATASUM: u64 = 1 << 0;
    /// Inode: may not be changed.
    pub const INODE_IMMUTABLE: u64 = 1 << 6;
    /// Root item: its flags are valid; without it the kernel clears them.
    pub const INODE_ROOT_ITEM_INIT: u64 = 1 << 31;
    /// Root item: the subvolume is read-only.
    pub const ROOT_READONLY: u64 = 1 << 0;
    /// Quota status: quotas are on.
    pub const QGROUP_ON: u64 = 1 << 0;
    /// Quota status: usage may be wrong.
    pub const QGROUP_INCONSISTENT: u64 = 1 << 2;
    /// Quota status: simple quotas.
    pub const QGROUP_SIMPLE: u64 = 1 << 3;
}

/// Kinds of directory entries.
pub mod entry {
    /// A regular file.
    pub const FILE: u8 = 1;
    /// A directory or subvolume.
    pub const DIRECTORY: u8 = 2;
    /// A character device.
    pub const CHARACTER: u8 = 3;
    /// A block device.
    pub const BLOCK: u8 = 4;
    /// A named pipe.
    pub const FIFO: u8 = 5;
    /// A socket.
    pub const SOCKET: u8 = 6;
    /// A symbolic link.
    pub const SYMLINK: u8 = 7;
    /// An extended attribute.
    pub const XATTR: u8 = 8;
}

/// The key of an item: trees are sorted by it, field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Key {
    /// What the item is about: an inode number, a tree id, a byte address.
    pub objectid: u64,
    /// The item's type, see [`item`].
    pub kind: u8,
    /// What it says depends on the type.
    pub offset: u64,
}

impl Key {
    /// A key of its three fields.
    pub const fn new(objectid: u64, kind: u8, offset: u64) -> Self {
        Key { objectid, kind, offset }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} {} {})", self.objectid, self.kind, self.offset)
    }
}

/// A [`Key`] as it stands on disk: 17 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DiskKey {
    /// See [`Key::objectid`].
    pub objectid: U64,
    /// See [`Key::kind`].
    pub kind: u8,
    /// See [`Key::offset`].
    pub offset: U64,
}

const _: () = assert!(size_of::<DiskKey>() == 17);

impl From<Key> for DiskKey {
    fn from(key: Key) -> Self {
        DiskKey { objectid: key.objectid.into(), kind: key.kind, offset: key.offset.into() }
    }
}

impl From<DiskKey> for Key {
    fn from(key: DiskKey) -> Self {
        Key { objectid: key.objectid.get(), kind: key.kind, offset: key.offset.get() }
    }
}

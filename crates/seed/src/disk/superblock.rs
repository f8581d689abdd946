//! The superblock: 4 KiB at 64 KiB, 64 MiB and 256 GiB of each device.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::DevItem;
use super::records::{Field, Nested, records};

/// Bytes of a superblock.
pub const SUPER_SIZE: usize = 4096;
/// Where superblocks lie on a device, in bytes; those beyond its end are left out.
pub const SUPER_OFFSETS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// What every superblock says.
pub const SUPER_MAGIC: [u8; 8] = *b"_BHRfS_M";
/// The longest file system label in bytes; one more is for the terminating zero.
pub const LABEL_MAX: usize = 255;

records! {
    /// The superblock.
    SuperBlock [4096] {
        /// crc32c of everything after this field.
        checksum: [u8; 32],
        /// The file system's UUID.
        fsid: [u8; 16],
        /// Where this copy lies on the device.
        bytenr: U64,
        /// See [`super::flag`].
        flags: U64,
        /// [`SUPER_MAGIC`].
        magic: [u8; 8],
        /// The last transaction.
        generation: U64,
        /// The root tree's root block.
        root: U64,
        /// The chunk tree's root block.
        chunk_root: U64,
        /// The log tree's root block, or 0.
        log_root: U64,
        /// Unused.
        log_root_transaction: U64,
        /// Bytes of all devices.
        total_bytes: U64,
        /// Bytes allocated.
        bytes_used: U64,
        /// Always 6.
        root_dir_objectid: U64,
        /// Devices.
        device_count: U64,
        /// Bytes of a sector.
        sector_size: U32,
        /// Bytes of a tree block.
        node_size: U32,
        /// Same as `node_size`.
        leaf_size: U32,
        /// Same as `sector_size`.
        stripe_size: U32,
        /// Bytes used of `system_chunks`.
        system_chunks_size: U32,
        /// The transaction that wrote the chunk tree's root.
        chunk_root_generation: U64,
        /// Features that an older kernel may ignore.
        compat: U64,
        /// Features that an older kernel may ignore when it only reads.
        compat_ro: U64,
        /// Features that a kernel must know.
        incompat: U64,
        /// 0: crc32c.
        checksum_type: U16,
        /// Level of the root tree's root.
        root_level: u8,
        /// Level of the chunk tree's root.
        chunk_root_level: u8,
        /// Level of the log tree's root.
        log_root_level: u8,
        /// The device that this superblock lies on.
        device: DevItem,
        /// The file system's label, ended by a zero.
        label: [u8; 256],
        /// The transaction of the old free space cache; 0: there is none.
        cache_generation: U64,
        /// Same as `generation` if the UUID tree may be trusted.
        uuid_tree_generation: U64,
        /// The UUID in tree blocks, where it differs from `fsid`.
        metadata_uuid: [u8; 16],
        /// Only with the extent-tree-v2 feature.
        global_root_count: U64,
        /// Unused.
        reserved: [u8; 216],
        /// Keys and chunk items of the system chunks.
        system_chunks: [u8; 2048],
        /// Four sets of older roots.
        backup_roots: [u8; 672],
        /// Unused.
        padding: [u8; 565],
    }
}

impl SuperBlock {
    /// The checksum that the other fields ask for.
    pub fn expected_checksum(&self) -> u32 {
        crc32c::crc32c(&self.as_bytes()[self.checksum.len()..])
    }

    /// Whether the checksum is right.
    pub fn checksum_matches(&self) -> bool {
        let (crc, rest) = self.checksum.split_at(4);
        crc == self.expected_checksum().to_le_bytes() && rest.iter().all(|&byte| byte == 0)
    }

    /// Computes the checksum and stores it.
    pub fn seal(&mut self) {
        self.checksum = [0; 32];
        let crc = self.expected_checksum();
        self.checksum[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

//! Tree blocks' headers and the bodies of items.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::DiskKey;

/// Declares records: each is `repr(C)`, unaligned, readable from any bytes, and has the size that is stated.
macro_rules! records {
    ($($(#[$meta:meta])* $name:ident [$size:literal] { $($(#[$field_meta:meta])* $field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl $name {
            /// What lies where in the record.
            pub const FIELDS: &'static [Field] = &[$(Field {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field),
                size: size_of::<$kind>(),
                nested: <$kind as Nested>::FIELDS,
            }),*];
        }
        impl Nested for $name {
            const FIELDS: &'static [Field] = $name::FIELDS;
        }
    )*};
}
pub(super) use records;

/// A field of a record: for messages and dumps that name it.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Bytes from the start of the record.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// What it consists of, if it is a record itself.
    pub nested: &'static [Field],
}

/// The fields of a field's type: none unless it is a record.
pub(super) trait Nested {
    const FIELDS: &'static [Field] = &[];
}

impl Nested for u8 {}
impl Nested for U16 {}
impl Nested for U32 {}
impl Nested for U64 {}
impl<const N: usize> Nested for [u8; N] {}
impl Nested for DiskKey {
    const FIELDS: &'static [Field] = &[
        Field { name: "objectid", offset: 0, size: 8, nested: &[] },
        Field { name: "type", offset: 8, size: 1, nested: &[] },
        Field { name: "offset", offset: 9, size: 8, nested: &[] },
    ];
}

records! {
    /// The head of every tree block.
    Header [101] {
        /// crc32c of everything after this field; 28 bytes of it unused.
        checksum: [u8; 32],
        /// The file system's UUID.
        fsid: [u8; 16],
        /// The block's own logical address.
        bytenr: U64,
        /// Written, relocated; the version of back references in the top byte.
        flags: U64,
        /// UUID of the chunk tree.
        chunk_tree_uuid: [u8; 16],
        /// The transaction that wrote the block.
        generation: U64,
        /// The tree that allocated the block.
        owner: U64,
        /// Items, or children.
        count: U32,
        /// 0 for a leaf.
        level: u8,
    }
    /// An item's head in a leaf; its body lies at `offset` from the end of the header.
    Item [25] {
        /// The item's key.
        key: DiskKey,
        /// Bytes from the end of the block's header to the body.
        offset: U32,
        /// Bytes of the body.
        size: U32,
    }
    /// A child in a node.
    KeyPointer [33] {
        /// The first key below the child.
        key: DiskKey,
        /// The child's logical address.
        bytenr: U64,
        /// The child's generation.
        generation: U64,
    }
    /// A time since the epoch.
    Time [12] {
        /// Seconds, signed.
        seconds: U64,
        /// Nanoseconds.
        nanoseconds: U32,
    }
    /// `INODE`.
    InodeItem [160] {
        /// The transaction that made the inode.
        generation: U64,
        /// The transaction that changed it last.
        transaction: U64,
        /// Bytes of the file; for a directory twice the bytes of its entries' names.
        size: U64,
        /// Bytes that its extents take.
        nbytes: U64,
        /// Unused.
        block_group: U64,
        /// Names.
        nlink: U32,
        /// Owner.
        uid: U32,
        /// Group.
        gid: U32,
        /// Type and permissions.
        mode: U32,
        /// Devices: `major << 20 | minor`.
        rdev: U64,
        /// See [`super::flag`].
        flags: U64,
        /// Counts changes (NFS).
        sequence: U64,
        /// Unused.
        reserved: [u8; 32],
        /// Last read.
        atime: Time,
        /// Last change of the inode.
        ctime: Time,
        /// Last change of the content.
        mtime: Time,
        /// Creation.
        otime: Time,
    }
    /// `INODE_REF`, one of several in an item; the name follows.
    InodeRef [10] {
        /// The entry's index in the directory.
        index: U64,
        /// Bytes of the name.
        name_length: U16,
    }
    /// `INODE_EXTREF`, one of several in an item; the name follows.
    InodeExtref [18] {
        /// The directory.
        parent: U64,
        /// The entry's index in the directory.
        index: U64,
        /// Bytes of the name.
        name_length: U16,
    }
    /// `DIR_ITEM`, `DIR_INDEX` and `XATTR`; name and data follow.
    DirItem [30] {
        /// The inode or subvolume; zeroes for an attribute.
        location: DiskKey,
        /// The transaction that made the entry.
        transaction: U64,
        /// Bytes of data, only for an attribute.
        data_length: U16,
        /// Bytes of the name.
        name_length: U16,
        /// See [`super::entry`].
        kind: u8,
    }
    /// `EXTENT_DATA` up to where inline data begins.
    FileExtentHead [21] {
        /// The transaction that made the extent.
        generation: U64,
        /// Bytes when decompressed.
        ram_bytes: U64,
        /// 0: none.
        compression: u8,
        /// 0: none.
        encryption: u8,
        /// 0: none.
        other_encoding: U16,
        /// 0: inline, 1: regular, 2: preallocated.
        kind: u8,
    }
    /// What follows [`FileExtentHead`] in a regular extent.
    FileExtentTail [32] {
        /// The data extent's logical address; 0 for a hole.
        disk_bytenr: U64,
        /// The data extent's length.
        disk_bytes: U64,
        /// Where in the data extent the file's part begins.
        offset: U64,
        /// Bytes of the file's part.
        bytes: U64,
    }
    /// `ROOT`.
    RootItem [439] {
        /// Mostly unused; its flags say whether `flags` is valid.
        inode: InodeItem,
        /// The transaction that wrote the root block.
        generation: U64,
        /// The root directory's inode.
        root_dirid: U64,
        /// Address of the root block.
        bytenr: U64,
        /// Unused.
        byte_limit: U64,
        /// Bytes of the tree's blocks.
        bytes_used: U64,
        /// The transaction of the last snapshot.
        last_snapshot: U64,
        /// See [`super::flag`].
        flags: U64,
        /// 1 unless it is being deleted.
        refs: U32,
        /// Progress of a deletion.
        drop_progress: DiskKey,
        /// Progress of a deletion.
        drop_level: u8,
        /// Level of the root block.
        level: u8,
        /// Same as `generation`, or the fields below are not valid.
        generation_v2: U64,
        /// The subvolume's UUID.
        uuid: [u8; 16],
        /// That of the subvolume it is a snapshot of.
        parent_uuid: [u8; 16],
        /// That of the subvolume it was received from.
        received_uuid: [u8; 16],
        /// Transaction of the last change.
        ctransid: U64,
        /// Transaction of the creation.
        otransid: U64,
        /// Transaction of sending.
        stransid: U64,
        /// Transaction of receiving.
        rtransid: U64,
        /// Last change.
        ctime: Time,
        /// Creation.
        otime: Time,
        /// Sent.
        stime: Time,
        /// Received.
        rtime: Time,
        /// Unused.
        reserved: [u8; 64],
    }
    /// `ROOT_REF` and `ROOT_BACKREF`; the name follows.
    RootRef [18] {
        /// The directory that holds the subvolume.
        directory: U64,
        /// The entry's index in it.
        index: U64,
        /// Bytes of the name.
        name_length: U16,
    }
    /// `EXTENT` and `METADATA`; inline references follow.
    ExtentItem [24] {
        /// References altogether.
        refs: U64,
        /// The transaction that allocated the extent.
        generation: U64,
        /// See [`super::flag`].
        flags: U64,
    }
    /// `EXTENT_DATA_REF`.
    ExtentDataRef [28] {
        /// The subvolume.
        root: U64,
        /// The inode.
        objectid: U64,
        /// File offset less offset in the extent, modulo 2^64.
        offset: U64,
        /// File extents that refer so.
        count: U32,
    }
    /// `BLOCK_GROUP`.
    BlockGroupItem [24] {
        /// Bytes allocated.
        used: U64,
        /// Always 256.
        chunk_objectid: U64,
        /// Type and profile.
        flags: U64,
    }
    /// `FREE_SPACE_INFO`.
    FreeSpaceInfo [8] {
        /// Runs of free space.
        extent_count: U32,
        /// 1 if it is noted as bitmaps.
        flags: U32,
    }
    /// `DEV_EXTENT`.
    DevExtent [48] {
        /// Always 3.
        chunk_tree: U64,
        /// Always 256.
        chunk_objectid: U64,
        /// The chunk's logical address.
        chunk_offset: U64,
        /// Bytes.
        length: U64,
        /// UUID of the chunk tree.
        chunk_tree_uuid: [u8; 16],
    }
    /// `DEV`.
    DevItem [98] {
        /// The device's id.
        devid: U64,
        /// Bytes of the device.
        total_bytes: U64,
        /// Bytes of its device extents.
        bytes_used: U64,
        /// Preferred alignment of requests.
        io_align: U32,
        /// Preferred length of requests.
        io_width: U32,
        /// Smallest request.
        sector_size: U32,
        /// Unused.
        kind: U64,
        /// The transaction that made a seed of it.
        generation: U64,
        /// Unused.
        start_offset: U64,
        /// Unused.
        group: U32,
        /// Unused.
        seek_speed: u8,
        /// Unused.
        bandwidth: u8,
        /// The device's UUID.
        uuid: [u8; 16],
        /// UUID of the file system that the device belongs to: a seed's own.
        fsid: [u8; 16],
    }
    /// `CHUNK`; stripes follow.
    ChunkItem [48] {
        /// Bytes of logical address space.
        length: U64,
        /// Always 2: the extent tree.
        owner: U64,
        /// Bytes of a stripe unit.
        stripe_length: U64,
        /// Type and profile.
        flags: U64,
        /// Preferred alignment of requests.
        io_align: U32,
        /// Preferred length of requests.
        io_width: U32,
        /// Smallest request.
        sector_size: U32,
        /// Stripes.
        stripe_count: U16,
        /// Only for RAID 10.
        sub_stripes: U16,
    }
    /// One stripe of a chunk.
    Stripe [32] {
        /// The device.
        devid: U64,
        /// Where on the device.
        offset: U64,
        /// The device's UUID.
        uuid: [u8; 16],
    }
    /// `QGROUP_STATUS`.
    QgroupStatus [40] {
        /// Always 1.
        version: U64,
        /// The transaction that changed quotas last.
        generation: U64,
        /// See [`super::flag`].
        flags: U64,
        /// Progress of a rescan.
        rescan: U64,
        /// Simple quotas: extents of earlier transactions are not counted.
        enable_generation: U64,
    }
    /// `QGROUP_INFO`.
    QgroupInfo [40] {
        /// The transaction that changed it last.
        generation: U64,
        /// Bytes referenced.
        referenced: U64,
        /// The same, compressed.
        referenced_compressed: U64,
        /// Bytes that nobody else references.
        exclusive: U64,
        /// The same, compressed.
        exclusive_compressed: U64,
    }
    /// `QGROUP_LIMIT`.
    QgroupLimit [40] {
        /// Which of the limits hold.
        flags: U64,
        /// Largest `referenced`.
        referenced: U64,
        /// Largest `exclusive`.
        exclusive: U64,
        /// Unused.
        reserved_referenced: U64,
        /// Unused.
        reserved_exclusive: U64,
    }
}

/// Bytes of a [`Header`]; the rest of a block is items or children.
pub const HEADER_SIZE: usize = size_of::<Header>();
/// Bytes of an [`Item`] head.
pub const ITEM_SIZE: usize = size_of::<Item>();
/// Bytes of a [`KeyPointer`].
pub const POINTER_SIZE: usize = size_of::<KeyPointer>();

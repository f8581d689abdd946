//! The FUSE wire format as far as a server of one read-only file needs it (`include/uapi/linux/fuse.h`, protocol 7.31
//! and later). Numbers are in the host's byte order: the other side is this machine's kernel.
//!
//! Every message begins with a header; lengths are bytes, header included.
//!
//! ```text
//! request  0  len u32        reply  0  len u32
//!          4  opcode u32            4  error i32: 0 or a negative errno
//!          8  unique u64            8  unique u64: that of the request; 0 in a notification
//!         16  nodeid u64           16  body
//!         24  uid u32
//!         28  gid u32
//!         32  pid u32
//!         36  total_extlen u16, in units of 8 bytes
//!         38  padding u16
//!         40  body
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub const MAJOR: u32 = 7;
/// The minor version spoken here: 7.39 has everything used, `FUSE_HAS_RESEND` among it.
pub const MINOR: u32 = 39;
/// The oldest minor version whose message layouts are those below.
pub const MINOR_MIN: u32 = 31;
/// The root directory.
pub const ROOT_NODE: u64 = 1;
/// The smallest buffer that the kernel lets a server read requests into (`FUSE_MIN_READ_BUFFER`).
pub const MIN_READ_BUFFER: usize = 8192;
/// Bit of `unique` in a request that was sent before (`FUSE_UNIQUE_RESEND`): part of the number, echoed in the reply.
pub const UNIQUE_RESEND: u64 = 1 << 63;
/// Notification: send every unanswered request again (`FUSE_NOTIFY_RESEND`; the code travels as `error`).
pub const NOTIFY_RESEND: i32 = 7;

/// Bits of `flags` (low half) and `flags2` (high half) in INIT.
pub mod init {
    /// Reads may be answered in any order (`FUSE_ASYNC_READ`).
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Asynchronous direct I/O is sent without waiting for each answer (`FUSE_ASYNC_DIO`).
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// `max_pages` counts (`FUSE_MAX_PAGES`).
    pub const MAX_PAGES: u64 = 1 << 22;
    /// `flags2` counts (`FUSE_INIT_EXT`).
    pub const INIT_EXT: u64 = 1 << 30;
    /// The kernel can send unanswered requests again (`FUSE_HAS_RESEND`, Linux 6.9).
    pub const HAS_RESEND: u64 = 1 << 39;
    /// Requests come by io_uring (`FUSE_OVER_IO_URING`, Linux 6.14).
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// Bits of `open_flags` in the reply to OPEN.
pub mod open {
    /// Bypass the page cache (`FOPEN_DIRECT_IO`).
    pub const DIRECT_IO: u32 = 1 << 0;
    /// Keep what is cached of the file (`FOPEN_KEEP_CACHE`).
    pub const KEEP_CACHE: u32 = 1 << 1;
}

/// Operation codes.
pub mod opcode {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InHeader {
    /// Bytes of the whole request.
    pub len: u32,
    /// What is asked.
    pub opcode: u32,
    /// Names the request.
    pub unique: u64,
    /// The inode.
    pub nodeid: u64,
    /// Of the process that asks.
    pub uid: u32,
    /// Of the process that asks.
    pub gid: u32,
    /// Of the process that asks.
    pub pid: u32,
    /// Length of extensions behind the body, in units of 8 bytes.
    pub total_extlen: u16,
    /// Unused.
    pub padding: u16,
}

/// `struct fuse_out_header`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OutHeader {
    /// Bytes of the whole reply.
    pub len: u32,
    /// 0 or a negative errno; the code of a notification.
    pub error: i32,
    /// Of the request; 0 for a notification.
    pub unique: u64,
}

/// `struct fuse_init_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitIn {
    /// The kernel's major version.
    pub major: u32,
    /// The kernel's minor version.
    pub minor: u32,
    /// Read-ahead it would do, in bytes.
    pub max_readahead: u32,
    /// What it can do.
    pub flags: u32,
    /// More of that, when `flags` has INIT_EXT.
    pub flags2: u32,
    /// Later versions' fields.
    pub unused: [u32; 11],
}

/// `struct fuse_init_out`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitOut {
    /// The server's major version.
    pub major: u32,
    /// The server's minor version.
    pub minor: u32,
    /// Read-ahead wanted, in bytes.
    pub max_readahead: u32,
    /// What is wanted of what the kernel can do.
    pub flags: u32,
    /// The most asynchronous requests under way.
    pub max_background: u16,
    /// From how many on the device counts as congested.
    pub congestion_threshold: u16,
    /// The largest WRITE in bytes.
    pub max_write: u32,
    /// Granularity of timestamps in nanoseconds.
    pub time_gran: u32,
    /// The most pages in one request.
    pub max_pages: u16,
    /// Unused here.
    pub map_alignment: u16,
    /// More flags, with INIT_EXT.
    pub flags2: u32,
    /// Later versions' fields.
    pub unused: [u32; 7],
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    /// atime, mtime, ctime in seconds.
    pub times: [u64; 3],
    /// The nanoseconds to these.
    pub nanoseconds: [u32; 3],
    /// Type and permissions.
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Preferred block size in bytes.
    pub blksize: u32,
    /// Unused here.
    pub flags: u32,
}

/// `struct fuse_entry_out`, the reply to LOOKUP.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EntryOut {
    /// The inode.
    pub nodeid: u64,
    /// With `nodeid`, unique while mounted.
    pub generation: u64,
    /// How long the name is right, in seconds.
    pub entry_valid: u64,
    /// How long the attributes are right, in seconds.
    pub attr_valid: u64,
    /// The nanoseconds to `entry_valid`.
    pub entry_valid_nsec: u32,
    /// The nanoseconds to `attr_valid`.
    pub attr_valid_nsec: u32,
    /// The attributes.
    pub attr: Attr,
}

/// `struct fuse_attr_out`, the reply to GETATTR.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttrOut {
    /// How long this is right, in seconds.
    pub attr_valid: u64,
    /// The nanoseconds to that.
    pub attr_valid_nsec: u32,
    /// Unused.
    pub dummy: u32,
    /// The attributes.
    pub attr: Attr,
}

/// `struct fuse_open_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenIn {
    /// Flags of open(2).
    pub flags: u32,
    /// Flags of FUSE.
    pub open_flags: u32,
}

/// `struct fuse_open_out`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenOut {
    /// The server's number for the open file.
    pub fh: u64,
    /// See [`open`].
    pub open_flags: u32,
    /// Unused here.
    pub backing_id: i32,
}

/// `struct fuse_read_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadIn {
    /// The open file.
    pub fh: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u32,
    /// Unused here.
    pub read_flags: u32,
    /// Unused here.
    pub lock_owner: u64,
    /// Flags of the open file.
    pub flags: u32,
    /// Unused.
    pub padding: u32,
}

/// `struct fuse_kstatfs`, the reply to STATFS.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatfsOut {
    /// Size of the filesystem in units of `frsize`.
    pub blocks: u64,
    /// Free ones.
    pub bfree: u64,
    /// Free ones for users.
    pub bavail: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Preferred block size in bytes.
    pub bsize: u32,
    /// The longest name in bytes.
    pub namelen: u32,
    /// The unit of the counts above in bytes.
    pub frsize: u32,
    /// Unused.
    pub padding: u32,
    /// Unused.
    pub spare: [u32; 6],
}

const _: () = assert!(size_of::<InHeader>() == 40);
const _: () = assert!(size_of::<OutHeader>() == 16);
const _: () = assert!(size_of::<InitIn>() == 64);
const _: () = assert!(size_of::<InitOut>() == 64);
const _: () = assert!(size_of::<Attr>() == 88);
const _: () = assert!(size_of::<EntryOut>() == 128);
const _: () = assert!(size_of::<AttrOut>() == 104);
const _: () = assert!(size_of::<OpenIn>() == 8);
const _: () = assert!(size_of::<OpenOut>() == 16);
const _: () = assert!(size_of::<ReadIn>() == 40);
const _: () = assert!(size_of::<StatfsOut>() == 80);

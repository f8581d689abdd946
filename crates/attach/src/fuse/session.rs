//! The protocol without I/O: a request as bytes comes in, and out comes what to do about it: send these bytes, read
//! this much of the device, or nothing. Requests come from the kernel, but nothing here trusts them.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::wire::{
    self, Attr, AttrOut, EntryOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, ReadIn, StatfsOut,
    init, opcode, open,
};

/// The inode of the file.
const FILE_NODE: u64 = 2;
/// The only handle that OPEN gives.
const FILE_HANDLE: u64 = 1;
/// How long names and attributes are right, in seconds: always. The kernel cuts this to what its clock can hold.
const FOREVER: u64 = 1 << 40;
/// Bytes of a page, the unit of `max_pages`.
const PAGE: u32 = 4096;
/// The largest READ, in bytes: 256 pages, the kernel's limit unless an administrator raised it.
pub const MAX_READ: u32 = 1 << 20;
/// The largest WRITE that the kernel may send (only to be refused): the smallest number it accepts.
const MAX_WRITE: u32 = 4096;
/// The longest reply that is not data.
pub const REPLY_BYTES: usize = size_of::<OutHeader>() + size_of::<EntryOut>();

const ENOENT: i32 = 2;
const EISDIR: i32 = 21;
const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;
const EPROTO: i32 = 71;

/// What INIT agreed on. A process that goes on serving a connection which another began needs it: INIT is sent once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The kernel's minor protocol version.
    pub minor: u32,
    /// Flags that both sides want, `flags2` in the high half.
    pub flags: u64,
}

impl Negotiated {
    /// Whether the kernel can send unanswered requests again, so that a new process may take over (Linux 6.9). Not those
    /// that are under way in io_uring.
    pub fn can_resend(&self) -> bool {
        self.flags & init::HAS_RESEND != 0 && !self.uses_uring()
    }

    /// Whether requests come by io_uring.
    pub fn uses_uring(&self) -> bool {
        self.flags & init::OVER_IO_URING != 0
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send the first bytes of the reply buffer, this many.
    Reply(usize),
    /// Send these bytes of the device. Never reaches beyond its end; `length` may be 0, and is at most [`MAX_READ`].
    Read {
        /// Names the request.
        unique: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// The connection begins: send the reply, and remember what was agreed on.
    Begin(usize, Negotiated),
    /// No answer is wanted.
    Nothing,
    /// Not a request: too short to name one. Cannot be answered.
    Malformed,
}

/// The file as the kernel shall see it, and limits.
#[derive(Debug, Clone)]
pub struct Session {
    name: Vec<u8>,
    size: u64,
    max_read: u32,
    max_background: u16,
    uring: bool,
}

impl Session {
    /// One file `name` of `size` bytes in the root directory, read at most `max_read` bytes at a time (whole pages, from
    /// one to [`MAX_READ`]); at most `max_background` asynchronous requests under way.
    pub fn new(name: impl Into<Vec<u8>>, size: u64, max_read: u32, max_background: u16) -> Session {
        let max_read = (max_read / PAGE * PAGE).clamp(PAGE, MAX_READ);
        Session { name: name.into(), size, max_read, max_background, uring: false }
    }

    /// Takes FUSE over io_uring when the kernel offers it.
    pub fn offer_uring(&mut self) {
        self.uring = true;
    }

    /// The longest read, in bytes.
    pub fn max_read(&self) -> u32 {
        self.max_read
    }

    /// What to do about one request. `reply` is filled for [`Action::Reply`] and [`Action::Begin`].
    pub fn handle(&self, message: &[u8], reply: &mut [u8; REPLY_BYTES]) -> Action {
        let Ok((header, body)) = InHeader::read_from_prefix(message) else { return Action::Malformed };
        // The length in the header is that of the read, or the message was cut.
        if header.len as usize != message.len() {
            return reply_error(reply, header.unique, EPROTO);
        }
        let unique = header.unique;
        match header.opcode {
            opcode::READ => self.read(&header, body, reply),
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Action::Nothing,
            opcode::INIT => self.init(unique, body, reply),
            opcode::LOOKUP => answer(reply, unique, self.lookup(header.nodeid, body)),
            opcode::GETATTR => answer(reply, unique, self.getattr(header.nodeid)),
            opcode::OPEN => answer(reply, unique, open_file(header.nodeid, body)),
            opcode::STATFS => answer(reply, unique, Ok(self.statfs())),
            // Nothing is kept for an open file, and nothing is ever dirty.
            opcode::RELEASE | opcode::FSYNC | opcode::SYNCFS | opcode::DESTROY => {
                reply_error(reply, unique, 0)
            }
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::TMPFILE => reply_error(reply, unique, EROFS),
            // ENOSYS makes the kernel remember, and not ask again (FLUSH, ACCESS, LSEEK, xattrs, STATX).
            _ => reply_error(reply, unique, ENOSYS),
        }
    }

    fn read(&self, header: &InHeader, body: &[u8], reply: &mut [u8; REPLY_BYTES]) -> Action {
        let Ok((read, _)) = ReadIn::read_from_prefix(body) else {
            return reply_error(reply, header.unique, EINVAL);
        };
        if header.nodeid != FILE_NODE {
            return reply_error(reply, header.unique, EISDIR);
        }
        let left = self.size.saturating_sub(read.offset);
        let length = u64::from(read.size.min(self.max_read)).min(left) as u32;
        Action::Read { unique: header.unique, offset: read.offset, length }
    }

    fn init(&self, unique: u64, body: &[u8], reply: &mut [u8; REPLY_BYTES]) -> Action {
        // Kernels before 7.36 send 16 bytes; what is missing reads as zero.
        let mut bytes = [0; size_of::<InitIn>()];
        let known = body.len().min(bytes.len());
        if known < 16 {
            return reply_error(reply, unique, EINVAL);
        }
        for (place, byte) in bytes.iter_mut().zip(body) {
            *place = *byte;
        }
        let Ok(offer) = InitIn::read_from_bytes(&bytes) else { return reply_error(reply, unique, EINVAL) };
        if offer.major < wire::MAJOR || (offer.major == wire::MAJOR && offer.minor < wire::MINOR_MIN) {
            return reply_error(reply, unique, EPROTO);
        }
        let mut out = InitOut::new_zeroed();
        out.major = wire::MAJOR;
        out.minor = wire::MINOR;
        if offer.major > wire::MAJOR {
            // The kernel asks again in the version that it is told here.
            return answer(reply, unique, Ok(out));
        }
        let mut offered = u64::from(offer.flags);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(offer.flags2) << 32;
        }
        let mut wanted =
            init::ASYNC_READ | init::ASYNC_DIO | init::MAX_PAGES | init::INIT_EXT | init::HAS_RESEND;
        if self.uring {
            wanted |= init::OVER_IO_URING;
        }
        let flags = offered & wanted;
        out.flags = flags as u32;
        out.flags2 = (flags >> 32) as u32;
        out.max_readahead = offer.max_readahead;
        out.max_background = self.max_background;
        out.congestion_threshold = self.max_background;
        out.max_write = MAX_WRITE;
        out.time_gran = 1;
        out.max_pages = (self.max_read / PAGE) as u16;
        match answer(reply, unique, Ok(out)) {
            Action::Reply(length) => Action::Begin(length, Negotiated { minor: offer.minor, flags }),
            other => other,
        }
    }

    fn lookup(&self, parent: u64, body: &[u8]) -> Result<EntryOut, i32> {
        let name = body.split(|&byte| byte == 0).next().unwrap_or_default();
        if parent != wire::ROOT_NODE || name != self.name {
            return Err(ENOENT);
        }
        let mut entry = EntryOut::new_zeroed();
        entry.nodeid = FILE_NODE;
        entry.entry_valid = FOREVER;
        entry.attr_valid = FOREVER;
        entry.attr = self.attributes(FILE_NODE);
        Ok(entry)
    }

    fn getattr(&self, node: u64) -> Result<AttrOut, i32> {
        if node != wire::ROOT_NODE && node != FILE_NODE {
            return Err(ENOENT);
        }
        let mut out = AttrOut::new_zeroed();
        out.attr_valid = FOREVER;
        out.attr = self.attributes(node);
        Ok(out)
    }

    fn attributes(&self, node: u64) -> Attr {
        const DIRECTORY: u32 = 0o040_500;
        const REGULAR: u32 = 0o100_400;
        let mut attr = Attr::new_zeroed();
        attr.ino = node;
        attr.blksize = PAGE;
        if node == FILE_NODE {
            attr.mode = REGULAR;
            attr.nlink = 1;
            attr.size = self.size;
            attr.blocks = self.size.div_ceil(512);
        } else {
            attr.mode = DIRECTORY;
            attr.nlink = 2;
        }
        attr
    }

    fn statfs(&self) -> StatfsOut {
        let mut out = StatfsOut::new_zeroed();
        out.blocks = self.size.div_ceil(u64::from(PAGE));
        out.files = 2;
        out.bsize = PAGE;
        out.frsize = PAGE;
        out.namelen = 255;
        out
    }
}

fn open_file(node: u64, body: &[u8]) -> Result<OpenOut, i32> {
    const O_ACCMODE: u32 = 3;
    let Ok((request, _)) = OpenIn::read_from_prefix(body) else { return Err(EINVAL) };
    if node != FILE_NODE {
        return Err(EISDIR);
    }
    if request.flags & O_ACCMODE != 0 {
        return Err(EROFS);
    }
    Ok(OpenOut { fh: FILE_HANDLE, open_flags: open::DIRECT_IO | open::KEEP_CACHE, backing_id: 0 })
}

fn answer<T: IntoBytes + Immutable>(
    reply: &mut [u8; REPLY_BYTES],
    unique: u64,
    result: Result<T, i32>,
) -> Action {
    match result {
        Ok(body) => {
            let header =
                OutHeader { len: (size_of::<OutHeader>() + size_of::<T>()) as u32, error: 0, unique };
            Action::Reply(fill(reply, &[header.as_bytes(), body.as_bytes()]))
        }
        Err(errno) => reply_error(reply, unique, errno),
    }
}

fn reply_error(reply: &mut [u8; REPLY_BYTES], unique: u64, errno: i32) -> Action {
    Action::Reply(fill(reply, &[error_header(unique, errno).as_bytes()]))
}

/// The reply that says only `errno` (positive; 0: done).
pub(super) fn error_header(unique: u64, errno: i32) -> OutHeader {
    OutHeader { len: size_of::<OutHeader>() as u32, error: -errno, unique }
}

/// The header before `length` bytes of data.
pub(super) fn data_header(unique: u64, length: u32) -> OutHeader {
    OutHeader { len: size_of::<OutHeader>() as u32 + length, error: 0, unique }
}

/// The notification that asks for every unanswered request again.
pub(super) fn resend_notification() -> OutHeader {
    OutHeader { len: size_of::<OutHeader>() as u32, error: wire::NOTIFY_RESEND, unique: 0 }
}

fn fill(reply: &mut [u8; REPLY_BYTES], parts: &[&[u8]]) -> usize {
    let mut length = 0;
    for (place, byte) in reply.iter_mut().zip(parts.iter().copied().flatten()) {
        *place = *byte;
        length += 1;
    }
    length
}

#[cfg(test)]
mod tests;

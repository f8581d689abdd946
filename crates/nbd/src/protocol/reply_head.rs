//! Replies as a server writes them: everything before the data in one array, so that a reply is one gathered write and
//! nothing is allocated.

use std::ops::Deref;

use zerocopy::{Immutable, IntoBytes};

use super::wire::{
    EXTENDED_REPLY_MAGIC, RawExtended, RawExtendedStatus, RawHole, RawSimpleReply, RawStatus, RawStructured,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use super::{ChunkKind, HeaderStyle, NbdError, ReplyFlags, Request, STATUS_EXTENTS_MAX, Status, text};

/// The bytes of a reply that precede its data, or all of them where it has none.
#[derive(Clone, Copy)]
pub struct ReplyHead {
    bytes: [u8; Self::LENGTH_MAX],
    length: u8,
}

impl ReplyHead {
    /// The longest: an extended header with a hole.
    pub const LENGTH_MAX: usize = size_of::<RawExtended>() + size_of::<RawHole>();

    const EMPTY: ReplyHead = ReplyHead { bytes: [0; Self::LENGTH_MAX], length: 0 };

    fn push(&mut self, bytes: &(impl IntoBytes + Immutable)) {
        let begin = usize::from(self.length);
        let end = begin + size_of_val(bytes);
        self.bytes[begin..end].copy_from_slice(bytes.as_bytes());
        self.length = end as u8;
    }

    /// The header of a chunk with a payload of `length` bytes. Only for styles that have chunks: a simple reply has no
    /// place for what a chunk says, and would be a bug of the server.
    fn chunk(style: HeaderStyle, request: &Request, flags: ReplyFlags, kind: ChunkKind, length: u32) -> Self {
        debug_assert!(style.chunks(), "a chunk in a session of simple replies");
        let mut head = Self::EMPTY;
        if style == HeaderStyle::Extended {
            head.push(&RawExtended {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.bits().into(),
                kind: kind.code().into(),
                cookie: request.cookie.into(),
                offset: request.offset.into(),
                length: u64::from(length).into(),
            });
        } else {
            head.push(&RawStructured {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.bits().into(),
                kind: kind.code().into(),
                cookie: request.cookie.into(),
                length: length.into(),
            });
        }
        head
    }

    /// A simple reply: all of it, or what precedes the data of a READ that succeeded.
    #[inline]
    pub fn simple(cookie: u64, error: Option<NbdError>) -> Self {
        let mut head = Self::EMPTY;
        head.push(&RawSimpleReply {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.map_or(0, NbdError::code).into(),
            cookie: cookie.into(),
        });
        head
    }

    /// Success without a payload: the whole reply to all but READ and BLOCK_STATUS, or the last chunk of one. Where a
    /// simple reply may be used it is: it is shorter.
    #[inline]
    pub fn success(style: HeaderStyle, request: &Request) -> Self {
        match style {
            HeaderStyle::Simple | HeaderStyle::Structured => Self::simple(request.cookie, None),
            HeaderStyle::Extended => Self::done(style, request),
        }
    }

    /// The chunk that ends a reply and says nothing more.
    #[inline]
    pub fn done(style: HeaderStyle, request: &Request) -> Self {
        Self::chunk(style, request, ReplyFlags::DONE, ChunkKind::None, 0)
    }

    /// What precedes `length` bytes of data (at least one) from `offset` of the export.
    #[inline]
    pub fn data(style: HeaderStyle, request: &Request, flags: ReplyFlags, offset: u64, length: u32) -> Self {
        let mut head = Self::chunk(style, request, flags, ChunkKind::OffsetData, length.saturating_add(8));
        head.push(&offset.to_be_bytes());
        head
    }

    /// A chunk that says that `length` bytes (at least one) from `offset` of the export are zeroes.
    #[inline]
    pub fn hole(style: HeaderStyle, request: &Request, flags: ReplyFlags, offset: u64, length: u32) -> Self {
        let raw = RawHole { offset: offset.into(), length: length.into() };
        let mut head = Self::chunk(style, request, flags, ChunkKind::OffsetHole, size_of::<RawHole>() as u32);
        head.push(&raw);
        head
    }
}

impl Deref for ReplyHead {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// Appends the reply that a request failed, the last of its chunks. With a `message` for a human, where there is a place
/// for it and it is not empty; `offset` says where it failed, for commands that have a place.
pub fn encode_error(
    style: HeaderStyle,
    request: &Request,
    error: NbdError,
    message: &str,
    offset: Option<u64>,
    out: &mut Vec<u8>,
) {
    if style == HeaderStyle::Simple {
        out.extend_from_slice(&ReplyHead::simple(request.cookie, Some(error)));
        return;
    }
    let message = text::truncate(message);
    let kind = if offset.is_some() { ChunkKind::ErrorOffset } else { ChunkKind::Error };
    let length = 6 + message.len() + offset.map_or(0, |_| 8);
    out.extend_from_slice(&ReplyHead::chunk(style, request, ReplyFlags::DONE, kind, length as u32));
    out.extend_from_slice(&error.code().to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

/// Appends a chunk with the extents of one metadata context, at least one of them. Those beyond [`STATUS_EXTENTS_MAX`]
/// are left out, which the protocol allows; where descriptors have 32 bits, a longer extent ends the chunk, cut to
/// whole multiples of 64 KiB so that it stays on the export's blocks.
pub fn encode_status(
    style: HeaderStyle,
    request: &Request,
    flags: ReplyFlags,
    context: u32,
    extents: &[Status],
    out: &mut Vec<u8>,
) {
    const LONGEST: u64 = (u32::MAX as u64) & !0xffff;
    let extents = &extents[..extents.len().min(STATUS_EXTENTS_MAX)];
    if style == HeaderStyle::Extended {
        let length = (8 + extents.len() * size_of::<RawExtendedStatus>()) as u32;
        out.extend_from_slice(&ReplyHead::chunk(style, request, flags, ChunkKind::BlockStatusExt, length));
        out.extend_from_slice(&context.to_be_bytes());
        out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
        for extent in extents {
            let raw = RawExtendedStatus { length: extent.length.into(), flags: extent.flags.into() };
            out.extend_from_slice(raw.as_bytes());
        }
        return;
    }
    let long = extents.iter().position(|extent| extent.length > LONGEST);
    let extents = &extents[..long.map_or(extents.len(), |index| index + 1)];
    let length = (4 + extents.len() * size_of::<RawStatus>()) as u32;
    out.extend_from_slice(&ReplyHead::chunk(style, request, flags, ChunkKind::BlockStatus, length));
    out.extend_from_slice(&context.to_be_bytes());
    for extent in extents {
        let length = extent.length.min(LONGEST) as u32;
        let raw = RawStatus { length: length.into(), flags: (extent.flags as u32).into() };
        out.extend_from_slice(raw.as_bytes());
    }
}

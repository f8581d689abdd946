//! Replies of the transmission phase as a client reads them.

use zerocopy::{FromBytes, transmute};

use super::option::codes;
use super::wire::{
    EXTENDED_REPLY_MAGIC, RawExtended, RawExtendedStatus, RawHole, RawSimpleReply, RawStatus, RawStructured,
    Reader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use super::{ERROR_PAYLOAD_MAX, NbdError, ProtocolError, ReplyFlags, STATUS_EXTENTS_MAX, text};

/// A simple reply. Whether data follows is known from the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// What went wrong, if anything.
    pub error: Option<NbdError>,
    /// That of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const LENGTH: usize = size_of::<RawSimpleReply>();

    /// Reads a simple reply.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`].
    #[inline]
    pub fn parse(bytes: [u8; Self::LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawSimpleReply = transmute!(bytes);
        if raw.magic.get() != SIMPLE_REPLY_MAGIC {
            return Err(ProtocolError::Magic { what: "a simple reply", found: raw.magic.get().into() });
        }
        Ok(SimpleReply { error: NbdError::from_code(raw.error.get()), cookie: raw.cookie.get() })
    }
}

codes! {
    /// The types of chunks (NBD_REPLY_TYPE_*).
    ChunkKind: u16 {
        /// No payload; the last one.
        None = 0,
        /// Data at an offset.
        OffsetData = 1,
        /// Zeroes at an offset.
        OffsetHole = 2,
        /// Extents of one metadata context, in 32 bits.
        BlockStatus = 5,
        /// Extents of one metadata context, in 64 bits.
        BlockStatusExt = 6,
        /// An error.
        Error = 0x8001,
        /// An error at an offset.
        ErrorOffset = 0x8002,
    }
}

impl ChunkKind {
    /// Whether it is an error, known or not.
    pub const fn is_error(self) -> bool {
        self.code() & 0x8000 != 0
    }
}

/// The header of a chunk, structured or extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether it is the last one.
    pub flags: ReplyFlags,
    /// What the payload is; never unknown unless it is an error.
    pub kind: ChunkKind,
    /// That of the request.
    pub cookie: u64,
    /// That of the request; `None` in a structured reply, which does not repeat it.
    pub offset: Option<u64>,
    /// Of the payload, in bytes: possible for its kind, and bounded for all kinds but [`ChunkKind::OffsetData`], whose
    /// bound is the request.
    pub length: u32,
}

impl ChunkHeader {
    /// Bytes of a structured header.
    pub const STRUCTURED_LENGTH: usize = size_of::<RawStructured>();
    /// Bytes of an extended header.
    pub const EXTENDED_LENGTH: usize = size_of::<RawExtended>();
    /// Bytes of the payload before the data of an [`ChunkKind::OffsetData`] chunk.
    pub const DATA_PREFIX: usize = 8;

    /// Reads the header of a structured chunk.
    ///
    /// # Errors
    /// [`ProtocolError`] for another magic number, an unknown type that is no error, or a length that is not possible.
    #[inline]
    pub fn parse_structured(bytes: [u8; Self::STRUCTURED_LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawStructured = transmute!(bytes);
        if raw.magic.get() != STRUCTURED_REPLY_MAGIC {
            return Err(ProtocolError::Magic { what: "a structured reply", found: raw.magic.get().into() });
        }
        let header = ChunkHeader {
            flags: ReplyFlags::from_bits_retain(raw.flags.get()),
            kind: ChunkKind::from_code(raw.kind.get()),
            cookie: raw.cookie.get(),
            offset: None,
            length: raw.length.get(),
        };
        header.check(ChunkKind::BlockStatus)
    }

    /// Reads the header of an extended chunk.
    ///
    /// # Errors
    /// As [`ChunkHeader::parse_structured`]; also for a length that does not fit 32 bits.
    #[inline]
    pub fn parse_extended(bytes: [u8; Self::EXTENDED_LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawExtended = transmute!(bytes);
        if raw.magic.get() != EXTENDED_REPLY_MAGIC {
            return Err(ProtocolError::Magic { what: "an extended reply", found: raw.magic.get().into() });
        }
        let length = u32::try_from(raw.length.get())
            .map_err(|_| ProtocolError::Length { what: "an extended reply", length: raw.length.get() })?;
        let header = ChunkHeader {
            flags: ReplyFlags::from_bits_retain(raw.flags.get()),
            kind: ChunkKind::from_code(raw.kind.get()),
            cookie: raw.cookie.get(),
            offset: Some(raw.offset.get()),
            length,
        };
        header.check(ChunkKind::BlockStatusExt)
    }

    /// Whether this is the last chunk of its reply.
    #[inline]
    pub fn done(&self) -> bool {
        self.flags.contains(ReplyFlags::DONE)
    }

    /// Bytes of data in an [`ChunkKind::OffsetData`] chunk.
    #[inline]
    pub fn data_length(&self) -> u32 {
        self.length.saturating_sub(Self::DATA_PREFIX as u32)
    }

    #[inline]
    fn check(self, status: ChunkKind) -> Result<Self, ProtocolError> {
        let length = self.length as usize;
        let descriptors = |head: usize, each: usize| {
            length > head
                && (length - head).is_multiple_of(each)
                && (length - head) / each <= STATUS_EXTENTS_MAX
        };
        let possible = match self.kind {
            ChunkKind::None if !self.done() => {
                return Err(ProtocolError::Content { what: "an empty chunk", why: "it must be the last" });
            }
            ChunkKind::None => length == 0,
            ChunkKind::OffsetData => length > Self::DATA_PREFIX,
            ChunkKind::OffsetHole => length == size_of::<RawHole>(),
            ChunkKind::BlockStatus if status == self.kind => descriptors(4, size_of::<RawStatus>()),
            ChunkKind::BlockStatusExt if status == self.kind => {
                descriptors(8, size_of::<RawExtendedStatus>())
            }
            ChunkKind::ErrorOffset => length >= 14 && self.length <= ERROR_PAYLOAD_MAX,
            kind if kind.is_error() => length >= 6 && self.length <= ERROR_PAYLOAD_MAX,
            kind => return Err(ProtocolError::Type { what: "a chunk", kind: kind.code().into() }),
        };
        if possible {
            Ok(self)
        } else {
            Err(ProtocolError::Length { what: "a chunk", length: self.length.into() })
        }
    }
}

/// One extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status {
    /// Bytes; never 0.
    pub length: u64,
    /// What the context says of them.
    pub flags: u64,
}

/// The extents of one metadata context, from the offset of the request on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusChunk {
    /// Id of the context.
    pub context: u32,
    /// At least one.
    pub extents: Vec<Status>,
}

/// An error chunk, known or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorChunk {
    /// What went wrong.
    pub error: NbdError,
    /// For a human; may be empty.
    pub message: String,
    /// Where, if that is known.
    pub offset: Option<u64>,
}

/// A chunk with its payload. Whether it lies inside what was asked is for the client to say, which knows the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Nothing more.
    None,
    /// Data.
    Data {
        /// First byte in the export.
        offset: u64,
        /// At least one byte.
        data: &'a [u8],
    },
    /// Zeroes.
    Hole {
        /// First byte in the export.
        offset: u64,
        /// Bytes; never 0.
        length: u32,
    },
    /// Extents.
    Status(StatusChunk),
    /// The request failed, or will have.
    Error(ErrorChunk),
}

impl<'a> Chunk<'a> {
    /// Reads the payload that follows `header`. A client that wants data where it belongs reads the first
    /// [`ChunkHeader::DATA_PREFIX`] bytes (a big-endian offset) and the rest itself.
    ///
    /// # Errors
    /// [`ProtocolError`] when the payload contradicts itself or its header.
    pub fn parse(header: &ChunkHeader, payload: &'a [u8]) -> Result<Self, ProtocolError> {
        let wrong = || ProtocolError::Length { what: "a chunk", length: payload.len() as u64 };
        if payload.len() != header.length as usize {
            return Err(wrong());
        }
        let mut reader = Reader::new(payload);
        match header.kind {
            ChunkKind::None => Ok(Chunk::None),
            ChunkKind::OffsetData => {
                Ok(Chunk::Data { offset: reader.u64().ok_or_else(wrong)?, data: reader.rest() })
            }
            ChunkKind::OffsetHole => {
                let raw = RawHole::read_from_bytes(payload).map_err(|_| wrong())?;
                if raw.length.get() == 0 {
                    return Err(ProtocolError::Content { what: "a hole chunk", why: "the hole is empty" });
                }
                Ok(Chunk::Hole { offset: raw.offset.get(), length: raw.length.get() })
            }
            ChunkKind::BlockStatus => {
                let context = reader.u32().ok_or_else(wrong)?;
                let raw = <[RawStatus]>::ref_from_bytes(reader.rest()).map_err(|_| wrong())?;
                let extents = raw
                    .iter()
                    .map(|raw| Status { length: raw.length.get().into(), flags: raw.flags.get().into() });
                status(context, extents)
            }
            ChunkKind::BlockStatusExt => {
                let context = reader.u32().ok_or_else(wrong)?;
                let count = reader.u32().ok_or_else(wrong)?;
                let raw = <[RawExtendedStatus]>::ref_from_bytes(reader.rest()).map_err(|_| wrong())?;
                if raw.len() != count as usize {
                    let why = "the number of extents is not that of the payload";
                    return Err(ProtocolError::Content { what: "a block status chunk", why });
                }
                status(
                    context,
                    raw.iter().map(|raw| Status { length: raw.length.get(), flags: raw.flags.get() }),
                )
            }
            kind => error(kind, reader).map(Chunk::Error),
        }
    }
}

fn status(context: u32, extents: impl Iterator<Item = Status>) -> Result<Chunk<'static>, ProtocolError> {
    let extents: Vec<Status> = extents.collect();
    if extents.is_empty() || extents.iter().any(|extent| extent.length == 0) {
        let why = "an extent is empty, or there is none";
        return Err(ProtocolError::Content { what: "a block status chunk", why });
    }
    Ok(Chunk::Status(StatusChunk { context, extents }))
}

fn error(kind: ChunkKind, mut reader: Reader<'_>) -> Result<ErrorChunk, ProtocolError> {
    let wrong = |why| move || ProtocolError::Content { what: "an error chunk", why };
    let short = wrong("the message is longer than the chunk");
    let code = reader.u32().ok_or_else(short)?;
    let length = reader.u16().ok_or_else(short)?;
    let message = text::message(reader.bytes(length.into()).ok_or_else(short)?);
    let error = NbdError::from_code(code).ok_or_else(wrong("the error is 0"))?;
    let offset = match kind {
        ChunkKind::ErrorOffset => Some(reader.u64().ok_or_else(short)?),
        _ => None,
    };
    if matches!(kind, ChunkKind::Error | ChunkKind::ErrorOffset) && !reader.rest().is_empty() {
        return Err(wrong("bytes follow its last field")());
    }
    Ok(ErrorChunk { error, message, offset })
}

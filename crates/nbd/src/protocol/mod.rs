//! The messages of the protocol: a type for each, parsed from bytes and written to bytes, without any I/O.
//!
//! Whoever reads from a socket takes a header of fixed length, has it parsed, and learns from it how many bytes follow;
//! that number has been checked against the limits below before anyone sees it. What is malformed comes back as the
//! thing that must happen next: [`ProtocolError`] closes the connection, [`Refusal`] answers an option, [`NbdError`]
//! answers a request. Parsers never panic and allocate no more than a small multiple of the bytes that they are given.
//! Headers of requests and replies are arrays; nothing on the way of a request allocates.
//!
//! | what | client | server |
//! |---|---|---|
//! | [`Greeting`], [`ClientFlags`] | parse, encode | encode, parse |
//! | [`OptionHeader`], [`OptionRequest`] | encode | parse |
//! | [`OptionReplyHeader`], [`OptionReply`], [`ExportNameReply`] | parse | encode |
//! | [`Request`], [`StatusFilter`] | encode | parse, then [`ExportTerms::check`] |
//! | [`SimpleReply`], [`ChunkHeader`], [`Chunk`] | parse | [`ReplyHead`], [`encode_error`], [`encode_status`] |
//!
//! Names follow the specification; all integers on the wire are big-endian.

mod chunk;
mod error;
mod flags;
mod handshake;
mod option;
mod option_reply;
mod reply_head;
mod request;
#[cfg(test)]
mod tests;
mod text;
pub mod wire;

pub use chunk::{Chunk, ChunkHeader, ChunkKind, ErrorChunk, SimpleReply, Status, StatusChunk};
pub use error::{NbdError, ProtocolError, Refusal, RefusalKind};
pub use flags::{
    AllocationFlags, ClientFlags, CommandFlags, HandshakeFlags, LocalityFlags, ReplyFlags, TransmissionFlags,
};
pub use handshake::{ExportNameReply, Greeting};
pub use option::{
    Handling, InfoRequest, InfoType, MetaContextRequest, OptionCode, OptionHeader, OptionRequest, selects,
};
pub use option_reply::{BlockSizes, ExportFacts, InfoItem, OptionReply, OptionReplyHeader};
pub use reply_head::{ReplyHead, encode_error, encode_status};
pub use request::{Command, ExportTerms, Request, StatusFilter};

/// The port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// The longest string of the protocol (names, queries, messages), in bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// The longest option data that a server reads into memory, in bytes: EXPORT_NAME needs 4,096, and a SET_META_CONTEXT
/// with a name and a dozen queries of full length less than this.
pub const OPTION_DATA_MAX: u32 = 64 << 10;

/// The longest option data that a server reads and throws away so as to answer TOO_BIG, in bytes. A longer one is taken
/// for an attack. The specification asks that payloads up to this length are not.
pub const OPTION_SKIP_MAX: u32 = 32 << 20;

/// The longest reply to an option that a client reads, in bytes.
pub const OPTION_REPLY_MAX: u32 = 64 << 10;

/// Queries that one LIST_META_CONTEXT or SET_META_CONTEXT may hold.
pub const META_QUERIES_MAX: usize = 64;

/// Contexts that the payload of one BLOCK_STATUS may name.
pub const STATUS_FILTER_MAX: usize = 64;

/// Extents of one BLOCK_STATUS chunk: no sender exceeds it, no reader takes more.
pub const STATUS_EXTENTS_MAX: usize = 1 << 20;

/// The longest payload of an error chunk that a client reads, in bytes: room for fields of later types.
pub const ERROR_PAYLOAD_MAX: u32 = 64 << 10;

/// The name of the metadata context of allocation, as the specification defines it.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The name of the metadata context that says which extents are local, and which reading would fetch from elsewhere
/// ([`LocalityFlags`]).
pub const LOAM_LOCALITY: &str = "loam:locality";

/// Which headers the transmission phase uses, by what was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HeaderStyle {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies (simple ones where there is no payload).
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl HeaderStyle {
    /// Length of a request's header, in bytes.
    pub const fn request_length(self) -> usize {
        match self {
            HeaderStyle::Simple | HeaderStyle::Structured => Request::COMPACT_LENGTH,
            HeaderStyle::Extended => Request::EXTENDED_LENGTH,
        }
    }

    /// Whether replies come in chunks.
    pub const fn chunks(self) -> bool {
        !matches!(self, HeaderStyle::Simple)
    }

    /// Length of a reply's header, in bytes, by its magic number. All are at least [`SimpleReply::LENGTH`] long.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`] for a magic number that this style does not have.
    pub fn reply_length(self, magic: [u8; 4]) -> Result<usize, ProtocolError> {
        let found = u32::from_be_bytes(magic);
        match (found, self) {
            (wire::SIMPLE_REPLY_MAGIC, HeaderStyle::Simple | HeaderStyle::Structured) => {
                Ok(SimpleReply::LENGTH)
            }
            (wire::STRUCTURED_REPLY_MAGIC, HeaderStyle::Structured) => Ok(ChunkHeader::STRUCTURED_LENGTH),
            (wire::EXTENDED_REPLY_MAGIC, HeaderStyle::Extended) => Ok(ChunkHeader::EXTENDED_LENGTH),
            _ => Err(ProtocolError::Magic { what: "a reply", found: found.into() }),
        }
    }
}

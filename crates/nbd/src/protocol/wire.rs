//! The fixed headers as they lie on the wire (all integers big-endian), the magic numbers, and a reader that takes
//! apart what has a variable length. Nothing here knows what a field means.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of a server, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the first of each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of an oldstyle server.
pub const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of a chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident, $bytes:literal { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

layout! {
    /// What a server says first.
    RawGreeting, 18 { magic: U64, style: U64, flags: U16 }
}
layout! {
    /// What precedes the data of an option.
    RawOption, 16 { magic: U64, option: U32, length: U32 }
}
layout! {
    /// What precedes the data of a reply to an option.
    RawOptionReply, 20 { magic: U64, option: U32, kind: U32, length: U32 }
}
layout! {
    /// The answer to EXPORT_NAME, before its zeroes.
    RawExportName, 10 { size: U64, flags: U16 }
}
layout! {
    /// A compact request.
    RawRequest, 28 { magic: U32, flags: U16, command: U16, cookie: U64, offset: U64, length: U32 }
}
layout! {
    /// An extended request.
    RawExtendedRequest, 32 { magic: U32, flags: U16, command: U16, cookie: U64, offset: U64, length: U64 }
}
layout! {
    /// A simple reply.
    RawSimpleReply, 16 { magic: U32, error: U32, cookie: U64 }
}
layout! {
    /// What precedes the payload of a structured chunk.
    RawStructured, 20 { magic: U32, flags: U16, kind: U16, cookie: U64, length: U32 }
}
layout! {
    /// What precedes the payload of an extended chunk.
    RawExtended, 32 { magic: U32, flags: U16, kind: U16, cookie: U64, offset: U64, length: U64 }
}
layout! {
    /// The payload of an OFFSET_HOLE chunk.
    RawHole, 12 { offset: U64, length: U32 }
}
layout! {
    /// A descriptor of a BLOCK_STATUS chunk.
    RawStatus, 8 { length: U32, flags: U32 }
}
layout! {
    /// A descriptor of a BLOCK_STATUS_EXT chunk.
    RawExtendedStatus, 16 { length: U64, flags: U64 }
}

/// Takes integers and runs of bytes from the front of a slice; `None` where it is too short.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(super) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(U16::read_from_bytes(self.bytes(2)?).ok()?.get())
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(U32::read_from_bytes(self.bytes(4)?).ok()?.get())
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(U64::read_from_bytes(self.bytes(8)?).ok()?.get())
    }

    /// A run of bytes after its length in 32 bits.
    pub(super) fn counted(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }
}

//! The flag words. All keep bits that this side does not know, so that who must refuse them can see them and who must
//! ignore them is not disturbed.

use bitflags::bitflags;

bitflags! {
    /// What a server offers in its greeting (16 bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct HandshakeFlags: u16 {
        /// It speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// It can leave out the 124 zeroes after EXPORT_NAME.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What a client takes of that (32 bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct ClientFlags: u32 {
        /// It speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1;
        /// It wants no 124 zeroes after EXPORT_NAME.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What an export can do (16 bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// FLUSH works.
        const SEND_FLUSH = 1 << 2;
        /// FUA works, and is accepted on all commands.
        const SEND_FUA = 1 << 3;
        /// Seeking costs time.
        const ROTATIONAL = 1 << 4;
        /// TRIM works.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES works, and NO_HOLE with it.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// READ takes DF.
        const SEND_DF = 1 << 7;
        /// What one connection wrote and flushed, all see.
        const CAN_MULTI_CONN = 1 << 8;
        /// Of the experimental RESIZE extension; never set here.
        const SEND_RESIZE = 1 << 9;
        /// CACHE works.
        const SEND_CACHE = 1 << 10;
        /// WRITE_ZEROES takes FAST_ZERO.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS takes a payload that names contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
        const _ = !0;
    }

    /// How a command is to be done (16 bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct CommandFlags: u16 {
        /// On stable storage before the reply.
        const FUA = 1;
        /// WRITE_ZEROES must not punch a hole.
        const NO_HOLE = 1 << 1;
        /// READ is to be answered in one content chunk.
        const DF = 1 << 2;
        /// BLOCK_STATUS is to tell one extent.
        const REQ_ONE = 1 << 3;
        /// WRITE_ZEROES is to fail at once where it would not be faster than writing.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload (extended headers only).
        const PAYLOAD_LEN = 1 << 5;
        const _ = !0;
    }

    /// What goes for a chunk (16 bits).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of its reply.
        const DONE = 1;
        const _ = !0;
    }

    /// The status of an extent in the context `base:allocation`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct AllocationFlags: u64 {
        /// Not allocated.
        const HOLE = 1;
        /// Reads as zeroes.
        const ZERO = 1 << 1;
        const _ = !0;
    }

    /// The status of an extent in the context `loam:locality`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct LocalityFlags: u64 {
        /// Reading it fetches from elsewhere.
        const LAZY = 1;
        const _ = !0;
    }
}

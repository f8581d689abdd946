//! What a server says of an export.

use serde::Serialize;

use crate::protocol::{BASE_ALLOCATION, BlockSizes, HeaderStyle, LOAM_LOCALITY, TransmissionFlags};

/// An export as the server describes it: what `loam info` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportInfo {
    /// Its name, as the server calls it.
    pub name: String,
    /// For a human; may be empty.
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// What it can do.
    #[serde(flatten)]
    pub flags: ExportFlags,
    /// Offsets and lengths must be multiples of this, in bytes.
    pub minimum_block: u32,
    /// Requests of this many bytes, so aligned, cause no read-modify-write.
    pub preferred_block: u32,
    /// The longest payload of a request, in bytes.
    pub maximum_block: u32,
    /// Whether the server said these three; else they are what the specification has a client assume.
    pub block_sizes_advertised: bool,
    /// Metadata contexts that are in use, or when exports are listed, that could be.
    pub contexts: Vec<String>,
    /// Replies are structured (or extended).
    pub structured: bool,
    /// Headers are extended: lengths have 64 bits.
    pub extended: bool,
    /// The connection is encrypted.
    pub tls: bool,
}

/// The transmission flags, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExportFlags {
    /// Writes are refused.
    pub read_only: bool,
    /// It takes FLUSH.
    pub flush: bool,
    /// It takes FUA.
    pub fua: bool,
    /// Seeking costs time.
    pub rotational: bool,
    /// It takes TRIM.
    pub trim: bool,
    /// It takes WRITE_ZEROES.
    pub write_zeroes: bool,
    /// READ takes DF.
    pub df: bool,
    /// What one connection wrote and flushed, all see.
    pub multi_connection: bool,
    /// It takes CACHE.
    pub cache: bool,
    /// WRITE_ZEROES takes FAST_ZERO.
    pub fast_zero: bool,
    /// BLOCK_STATUS takes a payload that names contexts.
    pub block_status_payload: bool,
}

impl From<TransmissionFlags> for ExportFlags {
    fn from(flags: TransmissionFlags) -> Self {
        let zero = flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
        ExportFlags {
            read_only: flags.contains(TransmissionFlags::READ_ONLY),
            flush: flags.contains(TransmissionFlags::SEND_FLUSH),
            fua: flags.contains(TransmissionFlags::SEND_FUA),
            rotational: flags.contains(TransmissionFlags::ROTATIONAL),
            trim: flags.contains(TransmissionFlags::SEND_TRIM),
            write_zeroes: zero,
            df: flags.contains(TransmissionFlags::SEND_DF),
            multi_connection: flags.contains(TransmissionFlags::CAN_MULTI_CONN),
            cache: flags.contains(TransmissionFlags::SEND_CACHE),
            // One without the other is nothing that could be asked for.
            fast_zero: zero && flags.contains(TransmissionFlags::SEND_FAST_ZERO),
            block_status_payload: flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
        }
    }
}

impl ExportInfo {
    /// What is known before the server said anything.
    pub(super) fn unknown(name: &str, style: HeaderStyle, tls: bool) -> Self {
        let BlockSizes { minimum, preferred, maximum } = BlockSizes::DEFAULT;
        ExportInfo {
            name: name.to_owned(),
            description: String::new(),
            size: 0,
            flags: TransmissionFlags::empty().into(),
            minimum_block: minimum,
            preferred_block: preferred,
            maximum_block: maximum,
            block_sizes_advertised: false,
            contexts: Vec::new(),
            structured: style != HeaderStyle::Simple,
            extended: style == HeaderStyle::Extended,
            tls,
        }
    }

    /// Whether the server can say which extents are data.
    pub fn has_extents(&self) -> bool {
        self.contexts.iter().any(|name| name == BASE_ALLOCATION)
    }

    /// Whether the server can say which extents are local.
    pub fn has_locality(&self) -> bool {
        self.contexts.iter().any(|name| name == LOAM_LOCALITY)
    }
}

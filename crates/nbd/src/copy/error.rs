//! Why a copy ended without being done.

use std::fmt;
use std::path::PathBuf;

use loam_block::ErrorKind;

/// Which end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// What is read.
    Source,
    /// What is written.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Side::Source => "source",
            Side::Destination => "destination",
        })
    }
}

/// What was asked of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `read`
    Read,
    /// `write`
    Write,
    /// `write_zeroes`
    Zero,
    /// `flush`
    Flush,
    /// `extents`
    Extents,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Zero => "write zeroes",
            Operation::Flush => "flush",
            Operation::Extents => "ask for the extents of",
        })
    }
}

/// Why a copy ended without being done. `done` is the length of the prefix of the destination that is complete and was
/// flushed: there a resumed copy goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// A device failed.
    #[error("cannot {operation} {length} bytes at {offset} of the {side} ({done} bytes are copied and safe)")]
    Device {
        /// Which.
        side: Side,
        /// What was asked of it.
        operation: Operation,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes from the start that are copied and flushed.
        done: u64,
        /// What the device said.
        source: loam_block::Error,
    },
    /// Asked to stop.
    #[error("stopped: the first {done} bytes are copied and safe")]
    Stopped {
        /// Bytes from the start that are copied and flushed.
        done: u64,
    },
    /// Both ends are one.
    #[error("source and destination are the same ({identity}): copying it onto itself is refused")]
    SameDevice {
        /// What they are.
        identity: String,
    },
    /// The destination takes no writes.
    #[error("the destination is read-only")]
    ReadOnly,
    /// The source does not fit.
    #[error(
        "the destination is too small: {destination} bytes, and the source has {source_size}; \
         make it larger (a larger one is fine)"
    )]
    TooSmall {
        /// Bytes of the source.
        source_size: u64,
        /// Bytes of the destination.
        destination: u64,
    },
    /// Sizes and block sizes do not go together.
    #[error("the {side} of {size} bytes has blocks of {block}, so the last bytes cannot be reached: {hint}")]
    BlockSize {
        /// Which end is in the way.
        side: Side,
        /// Its bytes.
        size: u64,
        /// Its minimum block.
        block: u32,
        /// What to do.
        hint: &'static str,
    },
    /// A value of the options is out of bounds.
    #[error("{what} of {value} is out of bounds: between {minimum} and {maximum}")]
    Option {
        /// Which.
        what: &'static str,
        /// The value.
        value: u64,
        /// The least.
        minimum: u64,
        /// The most.
        maximum: u64,
    },
    /// The state file cannot be used.
    #[error("state file {path}: {why}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
        /// The cause.
        source: Option<std::io::Error>,
    },
    /// Writes were lost too often.
    #[error(
        "the destination lost writes {times} times: it goes away before it keeps anything ({done} bytes are safe)"
    )]
    LostTooOften {
        /// How often.
        times: u32,
        /// Bytes from the start that are copied and flushed.
        done: u64,
        /// What the device said last.
        source: loam_block::Error,
    },
    /// The destination does not hold what the source holds.
    #[error("source and destination differ at byte {offset}: {wanted:#04x} there, {found:#04x} here")]
    Differs {
        /// The first byte that differs in the run that was compared.
        offset: u64,
        /// In the source.
        wanted: u8,
        /// In the destination.
        found: u8,
    },
    /// A task of the copy panicked: a bug.
    #[error("a part of the copy ended unexpectedly: {0}")]
    Internal(String),
}

impl CopyError {
    /// The class of the device's error, if it was one.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            CopyError::Device { source, .. } | CopyError::LostTooOften { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

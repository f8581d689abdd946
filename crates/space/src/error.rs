//! What can go wrong with a map.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Address, ContentId};

/// The result of an operation on a map.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a map could not be made, opened or added to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process, or another part of this one, has the map open.
    #[error("the map in {} is in use by another process: stop it first", path.display())]
    Locked {
        /// The map's directory.
        path: PathBuf,
    },
    /// There is no map.
    #[error("there is no map in {}", path.display())]
    Missing {
        /// The map's directory.
        path: PathBuf,
    },
    /// There is a map already.
    #[error("there is a map in {} already", path.display())]
    Exists {
        /// The map's directory.
        path: PathBuf,
    },
    /// Written by a newer loam.
    #[error(
        "{} has format version {found}, this loam knows versions up to {known}: use a newer loam",
        path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that is known here.
        known: u32,
    },
    /// Bytes that were once durable are no longer what was written.
    #[error("{} is damaged at byte {offset}: {what}; restore it from a copy", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// No room for a range.
    #[error("no room for {requested} bytes: {free} of {size} bytes of the address space are left")]
    Full {
        /// Bytes asked for.
        requested: u64,
        /// Addresses that were never given out, in bytes.
        free: u64,
        /// Bytes of the address space.
        size: u64,
    },
    /// A range that was asked for overlaps one that exists.
    #[error("{length} bytes at address {start} overlap what is mapped already: a range never changes")]
    Overlap {
        /// First address.
        start: Address,
        /// Bytes.
        length: u64,
    },
    /// A content that the map does not have.
    #[error("the map has no content {0}")]
    UnknownContent(ContentId),
    /// A request that no map can take.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// The log has reached its limit and could not be compacted.
    #[error("the log in {} has reached its limit and could not be compacted: see the log messages", path.display())]
    LogFull {
        /// The map's directory.
        path: PathBuf,
    },
    /// An earlier failure left it unknown what is on disk; nothing is added any more.
    #[error(
        "the map takes no more changes since an earlier failure ({cause}): restart loam once that is repaired"
    )]
    Latched {
        /// The first failure.
        cause: Arc<str>,
    },
    /// The file system failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

//! What goes wrong between a reader and the bytes it wants: sources that fail, lie or change, and a cache that cannot
//! keep what it was given. Every waiter of one shared fetch is told the same error, so errors are cheap to clone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use loam_block::ErrorKind;

use crate::Digest;

/// The result of an operation on a source or on the cache.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of a source or of the cache: what was tried on what, and what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a local file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried on which file.
        what: String,
        /// The reason.
        source: Arc<io::Error>,
    },
    /// A text that names no source.
    #[error("{url:?} names no source: {why}")]
    BadUrl {
        /// The text.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The object is not the version that was pinned.
    #[error("{url} has changed: {what}; put the old version back, or add the new one under another name")]
    Changed {
        /// The source.
        url: String,
        /// Which validator differs: what was pinned and what was found.
        what: String,
    },
    /// `404` or `410`, or no such file.
    #[error("{url} does not exist; check the address, and that the publisher still keeps the file there")]
    NotFound {
        /// The source.
        url: String,
    },
    /// `401` or `403`.
    #[error(
        "{url} may not be read (status {status}); check user and password, or whether a signed address has expired"
    )]
    Denied {
        /// The source.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server's certificate is not one that this system trusts.
    #[error(
        "{url}: the server's certificate is not trusted: {why}; add its authority to the system's certificates"
    )]
    Untrusted {
        /// The source.
        url: String,
        /// The reason.
        why: String,
    },
    /// The server answers a range request with the whole object.
    #[error(
        "{url}: the server knows no range requests; use one that does, or download the file and use its path"
    )]
    NoRanges {
        /// The source.
        url: String,
    },
    /// A status that retrying does not cure.
    #[error("{url}: the server answered with status {status}")]
    Status {
        /// The source.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// An answer that breaks HTTP's or the source's rules.
    #[error("{url}: wrong answer: {why}")]
    Malformed {
        /// The source.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// An object longer than the caller can take.
    #[error("{url} is longer than {limit} bytes, the most that is accepted here")]
    TooLong {
        /// The source.
        url: String,
        /// Bytes.
        limit: u64,
    },
    /// A range that is not inside the object.
    #[error("read of {length} bytes at {offset} of {url}: it is {end} bytes long")]
    OutOfBounds {
        /// The source.
        url: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// The object's length in bytes.
        end: u64,
    },
    /// Every attempt failed.
    #[error(
        "{url} cannot be reached: {attempts} attempts in {elapsed:.1?}, the last: {last}; check network and server"
    )]
    Unavailable {
        /// The source.
        url: String,
        /// Requests sent without success.
        attempts: u32,
        /// From the first attempt to giving up.
        elapsed: Duration,
        /// How the last one failed.
        last: String,
    },
    /// The last attempt got no answer, or one too slow, in time.
    #[error(
        "{url} is too slow: {attempts} attempts in {elapsed:.1?}, the last: {last}; check network and server"
    )]
    TimedOut {
        /// The source.
        url: String,
        /// Requests sent without success.
        attempts: u32,
        /// From the first attempt to giving up.
        elapsed: Duration,
        /// How the last one failed.
        last: String,
    },
    /// Fetched bytes do not match the digest that the index gives.
    #[error(
        "chunk {chunk} of {content} does not match the index: it says {expected}, the source sent {found}; \
         source and index do not belong together, or one of them is damaged"
    )]
    Corrupt {
        /// The content's name.
        content: String,
        /// The chunk's number.
        chunk: u64,
        /// From the index.
        expected: Digest,
        /// Of the bytes that came.
        found: Digest,
    },
    /// Fetched bytes differ from those that were served before.
    #[error(
        "chunk {chunk} of {content} is not what it was: recorded {recorded}, the source sent {found}; \
         put the old version back, or add the new one under another name"
    )]
    OtherBytes {
        /// The content's name.
        content: String,
        /// The chunk's number.
        chunk: u64,
        /// Recorded at the first fetch.
        recorded: Digest,
        /// Of the bytes that came.
        found: Digest,
    },
    /// A cache file that is damaged beyond what can be fetched again.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// A content is opened with another geometry than it was made with.
    #[error("{content} is cached as another content: {what}")]
    Mismatch {
        /// The content's name.
        content: String,
        /// What differs.
        what: String,
    },
    /// Somebody else uses it.
    #[error("{what} is in use: {why}")]
    InUse {
        /// The thing.
        what: String,
        /// By whom, and what to do.
        why: String,
    },
    /// A chunk source's own failure (a decoder's, say), for implementations outside this crate.
    #[error("{what}")]
    Source {
        /// The class that the reader is told.
        kind: ErrorKind,
        /// What was tried on what, why it failed, what to do.
        what: String,
    },
    /// The runtime ends, or nobody wants the bytes any more.
    #[error("{what}: shutting down")]
    ShuttingDown {
        /// What was going on.
        what: String,
    },
}

impl Error {
    /// Wraps an error of the operating system; `what` says what was tried on which file.
    pub fn io(what: impl Into<String>, source: io::Error) -> Error {
        Error::Io { what: what.into(), source: Arc::new(source) }
    }

    /// The class that a reader of the device is told.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Io { what, source } => {
                let source = source
                    .raw_os_error()
                    .map_or_else(|| io::Error::from(source.kind()), io::Error::from_raw_os_error);
                loam_block::Error::from_os(what.as_str(), source).kind()
            }
            Error::BadUrl { .. } | Error::Mismatch { .. } | Error::TooLong { .. } => ErrorKind::Invalid,
            Error::Changed { .. } | Error::OtherBytes { .. } => ErrorKind::Changed,
            Error::NotFound { .. }
            | Error::Denied { .. }
            | Error::Untrusted { .. }
            | Error::NoRanges { .. }
            | Error::Status { .. }
            | Error::InUse { .. }
            | Error::Unavailable { .. } => ErrorKind::Unavailable,
            Error::Malformed { .. } => ErrorKind::Io,
            Error::OutOfBounds { .. } => ErrorKind::OutOfBounds,
            Error::TimedOut { .. } => ErrorKind::TimedOut,
            Error::Corrupt { .. } | Error::Damaged { .. } => ErrorKind::Corrupt,
            Error::Source { kind, .. } => *kind,
            Error::ShuttingDown { .. } => ErrorKind::ShuttingDown,
        }
    }
}

impl From<Error> for loam_block::Error {
    fn from(error: Error) -> loam_block::Error {
        loam_block::Error::new(error.kind(), error.to_string())
    }
}

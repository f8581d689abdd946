//! What can go wrong between a source and an image, each with what was tried on what.

use std::io;
use std::path::PathBuf;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure to read a source, make or read an index, or create an image's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A source specification that names no source.
    #[error("{spec:?}: {reason}; known sources: dir:PATH, tar:PATH, tar:http(s)://HOST/PATH")]
    Spec {
        /// What was given.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The archive breaks the rules of its format, or asks for something that no unpacker should do.
    #[error("tar archive, byte {position}: entry {entry:?}: {reason}")]
    Archive {
        /// The entry's name as far as it was known (lossy UTF-8), empty before the first.
        entry: String,
        /// Where in the decoded archive, bytes.
        position: u64,
        /// What is wrong.
        reason: String,
    },
    /// The archive ends too early.
    #[error("tar archive: ends at byte {position}, {missing}: it is truncated or its download was cut short")]
    Truncated {
        /// Length of what was there, decoded bytes.
        position: u64,
        /// What was expected there.
        missing: String,
    },
    /// A constant limit of this crate was reached.
    #[error("{what}: more than {limit}, which is the limit")]
    Limit {
        /// What there is too much of.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The bytes are not an index, or a damaged one.
    #[error("index: {section}: {reason}; fetch it again or make a new one with `loam index`")]
    Index {
        /// Which part of the file.
        section: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The index is of a version that this program does not know.
    #[error("index: format version {found}; this program reads version {supported}: use a newer loam")]
    Version {
        /// Version in the file.
        found: u32,
        /// Version that this code reads.
        supported: u32,
    },
    /// A line of a trace's text that says nothing usable.
    #[error("trace, line {line}: {reason}; correct or delete the line, or record the trace anew")]
    Trace {
        /// Counted from 1, the line with the version.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A trace's text is of a version that this program does not know.
    #[error("trace: format version {found}; this program reads version {supported}: use a newer loam")]
    TraceVersion {
        /// Version in the first line.
        found: u32,
        /// Version that this code reads.
        supported: u32,
    },
    /// A file was not the same after reading as before.
    #[error("{}: changed while it was read; index a directory that nobody writes to", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{}: {step}: {source}", path.display())]
    Os {
        /// What was tried, such as "open" or "set xattr user.x".
        step: String,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The byte source below failed.
    #[error(transparent)]
    Content(#[from] loam_content::Error),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn os(
        step: impl Into<String>,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Error::Os { step: step.into(), path: path.into(), source: source.into() }
    }

    pub(crate) fn index(section: &'static str, reason: impl Into<String>) -> Self {
        Error::Index { section, reason: reason.into() }
    }
}

//! What can go wrong with a request, in terms that map onto errno and onto NBD's errors.

use std::fmt;
use std::sync::Arc;

/// The result of a request on a device.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The class of an [`Error`]: decides the errno that a kernel or a client sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request reaches beyond the end of the device (`EINVAL`; `ENOSPC` is for writes that found no room).
    OutOfBounds,
    /// Offset, length or flags break the device's constraints (`EINVAL`).
    Invalid,
    /// The device takes no writes (`EROFS`).
    ReadOnly,
    /// The device cannot do this, or not fast (`ENOTSUP`).
    NotSupported,
    /// No room below (`ENOSPC`).
    NoSpace,
    /// No content has been given to these addresses (`EIO`).
    Unmapped,
    /// Bytes do not match their digest or checksum (`EIO`).
    Corrupt,
    /// The source serves other bytes than it did before (`EIO`).
    Changed,
    /// The source cannot be reached (`EIO`).
    Unavailable,
    /// An answer did not come in time (`EIO`: the kernel's block layer knows no retry on `ETIMEDOUT`).
    TimedOut,
    /// Writes that were acknowledged, but not flushed, may be gone: what kept them went away and came back (`EIO`).
    WritesLost,
    /// The device is being closed (`ESHUTDOWN`).
    ShuttingDown,
    /// Any other failure below (`EIO`).
    Io,
}

impl ErrorKind {
    /// The positive errno that a kernel or a client is told.
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::OutOfBounds | ErrorKind::Invalid => 22,
            ErrorKind::ReadOnly => 30,
            ErrorKind::NotSupported => 95,
            ErrorKind::NoSpace => 28,
            ErrorKind::ShuttingDown => 108,
            ErrorKind::Unmapped
            | ErrorKind::Corrupt
            | ErrorKind::Changed
            | ErrorKind::Unavailable
            | ErrorKind::TimedOut
            | ErrorKind::WritesLost
            | ErrorKind::Io => 5,
        }
    }
}

/// A failed request: its class, what was tried on what, and the cause. Cheap to clone, so that every waiter of one
/// shared fetch is told the same.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    context: Arc<str>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a cause below it. `context` says what was tried on what: "read of 4096 bytes at 0 of x.img".
    pub fn new(kind: ErrorKind, context: impl Into<Arc<str>>) -> Self {
        Error { kind, context: context.into(), source: None }
    }

    /// The same with the error that caused it.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<Arc<str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, context: context.into(), source: Some(Arc::from(source.into())) }
    }

    /// Wraps an operating system error; `ENOSPC`, `EDQUOT`, `EROFS` and `EOPNOTSUPP` keep their meaning.
    pub fn from_os(context: impl Into<Arc<str>>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(28 | 122) => ErrorKind::NoSpace,
            Some(30) => ErrorKind::ReadOnly,
            Some(95) => ErrorKind::NotSupported,
            Some(110) => ErrorKind::TimedOut,
            _ => ErrorKind::Io,
        };
        Error::with_source(kind, context, source)
    }

    /// The class.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The positive errno that a kernel or a client is told.
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.context)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

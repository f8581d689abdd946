//! What can be wrong with a message, by what must follow: a [`ProtocolError`] ends the connection, a [`Refusal`] is the
//! answer to an option, an [`NbdError`] the answer to a request.

use std::fmt;

use loam_block::ErrorKind;

/// The peer broke the protocol in a way that leaves no common ground: the connection must be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A message did not begin as it must: this is not NBD, or the stream lost its step.
    #[error("{what} begins with {found:#x}: not NBD, or out of step")]
    Magic {
        /// The message that was expected.
        what: &'static str,
        /// What came instead of its magic number.
        found: u64,
    },
    /// The server speaks only the oldstyle handshake, which knows no exports by name.
    #[error("the server speaks oldstyle NBD, which ended with nbd-server 3.10: it must offer newstyle")]
    OldStyle,
    /// The client took handshake flags that were not offered.
    #[error("client flags {bits:#x} were not offered")]
    ClientFlags {
        /// All its flags.
        bits: u32,
    },
    /// A message has a length that it cannot have, or that this side does not take.
    #[error("{what} of {length} bytes: that is not possible, or more than is taken")]
    Length {
        /// The message.
        what: &'static str,
        /// What its header claims, in bytes.
        length: u64,
    },
    /// A message whose content contradicts itself or the specification.
    #[error("{what}: {why}")]
    Content {
        /// The message.
        what: &'static str,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// A message of a type that is not known, or not allowed here.
    #[error("{what} of type {kind:#x} is not known or not expected")]
    Type {
        /// The message.
        what: &'static str,
        /// Its type.
        kind: u32,
    },
}

/// Why an option is refused: the error types of option replies (NBD_REP_ERR_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalKind {
    /// The option is not known.
    Unsupported,
    /// Policy forbids it.
    Policy,
    /// It is malformed, or makes no sense now.
    Invalid,
    /// The platform, or the build, cannot do it.
    Platform,
    /// TLS must be started first.
    TlsRequired,
    /// No export of this name.
    UnknownExport,
    /// The server is stopping.
    Shutdown,
    /// The client must ask for block sizes.
    BlockSizeRequired,
    /// Request or reply are too large.
    TooBig,
    /// Extended headers must be negotiated, or already are.
    ExtendedHeadersRequired,
    /// An error that this side does not know; its whole reply type.
    Other(u32),
}

/// Bit 31 of a reply type: it is an error.
pub(super) const REPLY_ERROR: u32 = 1 << 31;

impl RefusalKind {
    /// The reply type on the wire.
    pub fn code(self) -> u32 {
        match self {
            RefusalKind::Unsupported => REPLY_ERROR + 1,
            RefusalKind::Policy => REPLY_ERROR + 2,
            RefusalKind::Invalid => REPLY_ERROR + 3,
            RefusalKind::Platform => REPLY_ERROR + 4,
            RefusalKind::TlsRequired => REPLY_ERROR + 5,
            RefusalKind::UnknownExport => REPLY_ERROR + 6,
            RefusalKind::Shutdown => REPLY_ERROR + 7,
            RefusalKind::BlockSizeRequired => REPLY_ERROR + 8,
            RefusalKind::TooBig => REPLY_ERROR + 9,
            RefusalKind::ExtendedHeadersRequired => REPLY_ERROR + 10,
            RefusalKind::Other(code) => code,
        }
    }

    /// The error of a reply type that has bit 31 set.
    pub fn from_code(code: u32) -> Self {
        match code.wrapping_sub(REPLY_ERROR) {
            1 => RefusalKind::Unsupported,
            2 => RefusalKind::Policy,
            3 => RefusalKind::Invalid,
            4 => RefusalKind::Platform,
            5 => RefusalKind::TlsRequired,
            6 => RefusalKind::UnknownExport,
            7 => RefusalKind::Shutdown,
            8 => RefusalKind::BlockSizeRequired,
            9 => RefusalKind::TooBig,
            10 => RefusalKind::ExtendedHeadersRequired,
            _ => RefusalKind::Other(code),
        }
    }
}

impl fmt::Display for RefusalKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RefusalKind::Unsupported => "option not supported",
            RefusalKind::Policy => "forbidden by policy",
            RefusalKind::Invalid => "invalid option",
            RefusalKind::Platform => "not supported on this platform",
            RefusalKind::TlsRequired => "TLS required",
            RefusalKind::UnknownExport => "no such export",
            RefusalKind::Shutdown => "server is shutting down",
            RefusalKind::BlockSizeRequired => "client must honour block sizes",
            RefusalKind::TooBig => "too big",
            RefusalKind::ExtendedHeadersRequired => "extended headers required or already in use",
            RefusalKind::Other(code) => return write!(f, "unknown error {code:#x}"),
        })
    }
}

/// The error answer to an option; the connection goes on. Only EXPORT_NAME cannot be answered so
/// ([`super::OptionCode::can_be_refused`]): there the server must close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Refusal {
    /// What it is.
    pub kind: RefusalKind,
    /// For a human; may be empty.
    pub message: String,
}

impl Refusal {
    /// A refusal with a message for a human.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Refusal { kind, message: message.into() }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Refusal::new(RefusalKind::Invalid, message)
    }
}

/// The errors that a reply in the transmission phase can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NbdError {
    /// `NBD_EPERM`: the export is read-only, or the operation is not permitted.
    #[error("operation not permitted (EPERM)")]
    NotPermitted,
    /// `NBD_EIO`.
    #[error("input/output error (EIO)")]
    Io,
    /// `NBD_ENOMEM`.
    #[error("cannot allocate memory (ENOMEM)")]
    NoMemory,
    /// `NBD_EINVAL`.
    #[error("invalid argument (EINVAL)")]
    Invalid,
    /// `NBD_ENOSPC`: no room, or a write beyond the end.
    #[error("no space left on device (ENOSPC)")]
    NoSpace,
    /// `NBD_EOVERFLOW`: too long for one reply.
    #[error("value too large (EOVERFLOW)")]
    Overflow,
    /// `NBD_ENOTSUP`: zeroing would not be fast.
    #[error("operation not supported (ENOTSUP)")]
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is stopping.
    #[error("server is shutting down (ESHUTDOWN)")]
    Shutdown,
}

impl NbdError {
    /// The value on the wire.
    pub const fn code(self) -> u32 {
        match self {
            NbdError::NotPermitted => 1,
            NbdError::Io => 5,
            NbdError::NoMemory => 12,
            NbdError::Invalid => 22,
            NbdError::NoSpace => 28,
            NbdError::Overflow => 75,
            NbdError::NotSupported => 95,
            NbdError::Shutdown => 108,
        }
    }

    /// What a value on the wire says: `None` for 0, success. The specification has a client take a value that it does
    /// not know for EINVAL.
    pub const fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => NbdError::NotPermitted,
            5 => NbdError::Io,
            12 => NbdError::NoMemory,
            28 => NbdError::NoSpace,
            75 => NbdError::Overflow,
            95 => NbdError::NotSupported,
            108 => NbdError::Shutdown,
            _ => NbdError::Invalid,
        })
    }
}

impl From<ErrorKind> for NbdError {
    /// What a client is told of a device's failure. A server sends [`NbdError::NotSupported`] only as the answer to
    /// FAST_ZERO, and `NoSpace` for a write beyond the end: that is the business of who knows the command.
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::OutOfBounds | ErrorKind::Invalid => NbdError::Invalid,
            ErrorKind::ReadOnly => NbdError::NotPermitted,
            ErrorKind::NotSupported => NbdError::NotSupported,
            ErrorKind::NoSpace => NbdError::NoSpace,
            ErrorKind::ShuttingDown => NbdError::Shutdown,
            _ => NbdError::Io,
        }
    }
}

impl From<NbdError> for ErrorKind {
    fn from(error: NbdError) -> Self {
        match error {
            NbdError::NotPermitted => ErrorKind::ReadOnly,
            NbdError::Io | NbdError::NoMemory => ErrorKind::Io,
            NbdError::Invalid | NbdError::Overflow => ErrorKind::Invalid,
            NbdError::NoSpace => ErrorKind::NoSpace,
            NbdError::NotSupported => ErrorKind::NotSupported,
            NbdError::Shutdown => ErrorKind::ShuttingDown,
        }
    }
}

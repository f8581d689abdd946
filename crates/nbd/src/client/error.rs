//! Why no connection to an export came about.

use std::io;

use loam_block::{Error, ErrorKind};

use crate::protocol::{ProtocolError, Refusal};
use crate::tls::TlsError;

/// Why a server, or an export of it, cannot be used. Each says of which URI.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody answers at the address, or the connection broke during the handshake.
    #[error("{uri}: {source}")]
    Io {
        /// What was connected to.
        uri: String,
        /// Why not.
        source: io::Error,
    },
    /// The server was silent for too long.
    #[error("{uri}: no answer to the handshake in time")]
    TimedOut {
        /// What was connected to.
        uri: String,
    },
    /// The other side does not speak NBD as it should.
    #[error("{uri}: {source}")]
    Protocol {
        /// What was connected to.
        uri: String,
        /// What it did.
        source: ProtocolError,
    },
    /// The server has no such export.
    #[error(
        "{uri}: the server has no export of this name{}: `loam info --list` shows what it has",
        said(refusal)
    )]
    NoSuchExport {
        /// What was connected to.
        uri: String,
        /// What the server says.
        refusal: Refusal,
    },
    /// The server refuses.
    #[error("{uri}: refused to {what}: {refusal}")]
    Refused {
        /// What was connected to.
        uri: String,
        /// What was asked for.
        what: &'static str,
        /// What the server says.
        refusal: Refusal,
    },
    /// The server wants TLS, for which nothing was given.
    #[error("{uri}: the server requires TLS: use nbds:// with certificates (?tls-certificates=DIR)")]
    TlsRequired {
        /// What was connected to.
        uri: String,
    },
    /// TLS is wanted, but there are no certificates to check the server by.
    #[error(
        "{uri}: TLS needs to know whom to trust: give the directory of ca-cert.pem (?tls-certificates=DIR)"
    )]
    NoCertificates {
        /// What was connected to.
        uri: String,
    },
    /// Certificates that cannot be used.
    #[error("{uri}: {source}")]
    Certificates {
        /// What was connected to.
        uri: String,
        /// Why.
        source: TlsError,
    },
    /// TLS is wanted, and the server does not offer it.
    #[error("{uri}: the server offers no TLS ({reason}): nothing was sent to it")]
    TlsRefused {
        /// What was connected to.
        uri: String,
        /// What it says.
        reason: String,
    },
    /// The TLS handshake failed: a certificate is not trusted, expired, or of another name.
    #[error("{uri}: TLS failed: {source}")]
    TlsFailed {
        /// What was connected to.
        uri: String,
        /// Why.
        source: io::Error,
    },
}

fn said(refusal: &Refusal) -> String {
    if refusal.message.is_empty() { String::new() } else { format!(" ({})", refusal.message) }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        let kind = match &error {
            ConnectError::Io { .. } => ErrorKind::Unavailable,
            ConnectError::TimedOut { .. } => ErrorKind::TimedOut,
            _ => ErrorKind::Io,
        };
        let context = error.to_string();
        Error::with_source(kind, context, error)
    }
}

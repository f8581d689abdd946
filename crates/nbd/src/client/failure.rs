//! Why a request got no answer, or not the one it wanted.

use std::io;
use std::sync::Arc;

use loam_block::{Error, ErrorKind};

use crate::protocol::{NbdError, ProtocolError};

/// Why a connection is of no use any more.
#[derive(Debug)]
pub(super) enum BreakKind {
    /// The transport failed, or the server closed it.
    Transport(io::Error),
    /// The server broke the protocol.
    Protocol(ProtocolError),
    /// A request was not answered in time.
    TimedOut,
    /// The server is being stopped.
    Shutdown,
    /// A request was given up while it was being sent.
    HalfSent,
}

/// The end of a connection.
#[derive(Debug)]
pub(super) struct Break {
    pub(super) kind: BreakKind,
}

impl Break {
    pub(super) fn new(kind: BreakKind) -> Self {
        Break { kind }
    }

    pub(super) fn content(what: &'static str, why: &'static str) -> Self {
        Break::new(BreakKind::Protocol(ProtocolError::Content { what, why }))
    }

    pub(super) fn closed() -> Self {
        let closed = io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection");
        Break::new(BreakKind::Transport(closed))
    }

    /// Whether the same request may fare better on another connection.
    pub(super) fn is_transient(&self) -> bool {
        !matches!(self.kind, BreakKind::Protocol(_))
    }

    /// The error of a request that this ended. `context` says what was tried on what.
    pub(super) fn error(&self, context: String) -> Error {
        match &self.kind {
            BreakKind::Transport(source) => Error::with_source(
                ErrorKind::Unavailable,
                context,
                io::Error::new(source.kind(), source.to_string()),
            ),
            BreakKind::Protocol(source) => {
                let context = format!("{context}: the server broke the protocol");
                Error::with_source(ErrorKind::Io, context, source.clone())
            }
            BreakKind::TimedOut => Error::new(ErrorKind::TimedOut, format!("{context}: no answer in time")),
            BreakKind::Shutdown => {
                Error::new(ErrorKind::Unavailable, format!("{context}: the server is shutting down"))
            }
            BreakKind::HalfSent => {
                Error::new(ErrorKind::Unavailable, format!("{context}: the connection was given up"))
            }
        }
    }
}

impl From<ProtocolError> for Break {
    fn from(error: ProtocolError) -> Self {
        Break::new(BreakKind::Protocol(error))
    }
}

impl From<io::Error> for Break {
    fn from(error: io::Error) -> Self {
        Break::new(BreakKind::Transport(error))
    }
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The server answered with an error.
    Refused { error: NbdError, message: String },
    /// The connection broke before the answer came.
    Broken(Arc<Break>),
}

impl Failure {
    /// The error that the caller sees.
    pub(super) fn error(&self, context: String) -> Error {
        match self {
            Failure::Refused { error, message } if message.is_empty() => {
                Error::with_source((*error).into(), context, *error)
            }
            Failure::Refused { error, message } => {
                Error::with_source((*error).into(), format!("{context}: {message}"), *error)
            }
            Failure::Broken(cause) => cause.error(context),
        }
    }
}

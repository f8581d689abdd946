//! The bytes below the protocol: a Unix or TCP socket, in TLS or not.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::uri::Address;

/// A connected socket.
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A connection during its handshake.
pub(super) enum Transport {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

/// A connection whose directions are used independently.
pub(super) struct Halves {
    pub(super) read: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) write: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Socket {
    pub(super) async fn connect(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Unix(path) => Socket::Unix(UnixStream::connect(path).await?),
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                // A header must not wait for the acknowledgement of the payload before it.
                stream.set_nodelay(true)?;
                Socket::Tcp(stream)
            }
        })
    }
}

impl Transport {
    pub(super) fn into_halves(self) -> Halves {
        match self {
            Transport::Plain(Socket::Unix(stream)) => {
                let (read, write) = stream.into_split();
                Halves { read: Box::new(read), write: Box::new(write) }
            }
            Transport::Plain(Socket::Tcp(stream)) => {
                let (read, write) = stream.into_split();
                Halves { read: Box::new(read), write: Box::new(write) }
            }
            Transport::Tls(stream) => {
                let (read, write) = tokio::io::split(*stream);
                Halves { read: Box::new(read), write: Box::new(write) }
            }
        }
    }
}

/// Calls a method of whichever stream it is.
macro_rules! either {
    ($self:ident, $enum:ident::{$a:ident, $b:ident}, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            $enum::$a($stream) => $call,
            $enum::$b($stream) => $call,
        }
    };
}

macro_rules! forward {
    ($enum:ident::{$a:ident, $b:ident}) => {
        impl AsyncRead for $enum {
            fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                either!(self, $enum::{$a, $b}, stream => Pin::new(stream).poll_read(cx, to))
            }
        }

        impl AsyncWrite for $enum {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
                either!(self, $enum::{$a, $b}, stream => Pin::new(stream).poll_write(cx, from))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                from: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                either!(self, $enum::{$a, $b}, stream => Pin::new(stream).poll_write_vectored(cx, from))
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                either!(self, $enum::{$a, $b}, stream => Pin::new(stream).poll_flush(cx))
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                either!(self, $enum::{$a, $b}, stream => Pin::new(stream).poll_shutdown(cx))
            }
        }
    };
}

forward!(Socket::{Unix, Tcp});
forward!(Transport::{Plain, Tls});

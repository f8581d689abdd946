//! The server: exports of [`loam_block::BlockDevice`]s, for any number of connections.
//!
//! One task serves one connection and owns its socket. Requests that a device answers at once are answered by that
//! task, many with one `send`; what has to wait goes to a task of its own and is answered when it is done, in whatever
//! order that is. `docs/decisions/2026-11-21-nbd-server.md` says what was weighed.

mod buffers;
mod connection;
mod export;
mod handshake;
mod listener;
mod work;

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use loam_block::BlockDevice;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use crate::tls::TlsPolicy;
use connection::{Connection, Pools, SendFile, send_file_tcp, send_file_unix};
use handshake::{Haggling, Outcome};
use listener::Accepted;
pub use listener::Listener;

/// The longest name or description of an export, in bytes; the protocol's limit for any string.
pub const NAME_BYTES_MAX: usize = 4096;
/// The largest minimum block size that the protocol can advertise, in bytes.
pub const MINIMUM_BLOCK_MAX: u32 = 64 << 10;

/// How long no connection is accepted after accepting one failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A device under a name.
#[derive(Clone)]
pub struct Export {
    /// What clients ask for. The first export is also the default one: what a client gets that asks for the empty name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn BlockDevice>,
    /// Refuse writes even if the device takes them.
    pub read_only: bool,
}

/// Limits and manners of a [`Server`].
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Whether clients may, must, or cannot use TLS.
    pub tls: TlsPolicy,
    /// Connections at once; one more is closed as soon as it is made.
    pub max_connections: usize,
    /// Bytes of payload that one connection may keep in memory. A request that is larger than this is still served, alone.
    pub connection_memory: usize,
    /// For everything before the transmission phase.
    pub handshake_timeout: Duration,
    /// A client that is in the middle of a request, or does not take its replies, is disconnected when nothing moves for
    /// this long. A client that has nothing to say may be silent for ever.
    pub stall_timeout: Duration,
    /// For requests in flight when the server stops; what is not done by then is cut off.
    pub stop_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            tls: TlsPolicy::Refuse,
            max_connections: 4096,
            connection_memory: 64 << 20,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(10),
        }
    }
}

/// Exports that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is nothing to serve.
    #[error("a server needs at least one export")]
    NoExports,
    /// A name or description that the protocol cannot carry.
    #[error("export {name:?}: names and descriptions hold at most {NAME_BYTES_MAX} bytes and no NUL")]
    BadName {
        /// The export's name.
        name: String,
    },
    /// Two exports would answer to one name.
    #[error("two exports are called {name:?}; give each a name of its own")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The device's blocks are larger than the protocol can say.
    #[error("export {name:?} has blocks of {minimum_block} bytes; NBD knows at most {MINIMUM_BLOCK_MAX}")]
    BlockTooLarge {
        /// The export's name.
        name: String,
        /// Its smallest block in bytes.
        minimum_block: u32,
    },
}

/// A set of exports and the connections to them.
pub struct Server {
    exports: Vec<Export>,
    options: ServerOptions,
    pools: Pools,
}

impl Server {
    /// A server of `exports`.
    ///
    /// # Errors
    /// [`ServerError`] when there are none, or one cannot be advertised.
    pub fn new(exports: Vec<Export>, options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        if exports.is_empty() {
            return Err(ServerError::NoExports);
        }
        let mut names = HashSet::new();
        for export in &exports {
            let name = export.name.clone();
            let bad = |text: &str| text.len() > NAME_BYTES_MAX || text.contains('\0');
            if bad(&name) || bad(&export.description) {
                return Err(ServerError::BadName { name });
            }
            let minimum_block = export.device.geometry().minimum_block;
            if minimum_block > MINIMUM_BLOCK_MAX {
                return Err(ServerError::BlockTooLarge { name, minimum_block });
            }
            if !names.insert(name.clone()) {
                return Err(ServerError::Duplicate { name });
            }
        }
        Ok(Arc::new(Server { exports, options, pools: Pools::new() }))
    }

    /// Takes connections from `listener` until `shutdown` is done; then takes no more, lets each connection finish what
    /// it has begun, answers what still comes with `ESHUTDOWN`, and returns when all are closed. A server may serve
    /// several listeners at once.
    ///
    /// # Errors
    /// When the listener fails; what a single connection does wrong is logged and ends that connection.
    pub async fn serve(
        self: &Arc<Self>,
        listener: Listener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let (stop, stopping) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                accepted = listener.accept() => self.accept(accepted, &stopping, &mut connections).await,
                Some(_) = connections.join_next() => {}
                () = &mut shutdown => break,
            }
        }
        drop(listener);
        stop.send_replace(true);
        let all_gone = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.options.stop_timeout, all_gone).await.is_err() {
            tracing::warn!(connections = connections.len(), "cut off what did not finish in time");
        }
        Ok(())
    }

    /// Starts a task for a new connection.
    async fn accept(
        self: &Arc<Self>,
        accepted: io::Result<Accepted>,
        stopping: &watch::Receiver<bool>,
        connections: &mut JoinSet<()>,
    ) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                // Out of descriptors, most likely: some will be closed.
                tokio::time::sleep(ACCEPT_PAUSE).await;
                return;
            }
        };
        if connections.len() >= self.options.max_connections {
            tracing::warn!(limit = self.options.max_connections, "closed a connection: too many at once");
            return;
        }
        let (server, stopping) = (Arc::clone(self), stopping.clone());
        connections.spawn(async move {
            let served = match accepted {
                Accepted::Unix(stream) => {
                    server.serve_connection(stream, Some(send_file_unix), stopping).await
                }
                Accepted::Tcp(stream) => server.serve_connection(stream, Some(send_file_tcp), stopping).await,
            };
            if let Err(error) = served {
                tracing::info!(%error, "a connection ended");
            }
        });
    }

    /// Serves one connection over `stream` until the client leaves, for instance a socket pair.
    ///
    /// # Errors
    /// When the stream fails, or the client breaks the protocol so that no answer is possible.
    pub async fn serve_stream<S>(self: &Arc<Self>, stream: S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (_stop, stopping) = watch::channel(false);
        self.serve_connection(stream, None, stopping).await
    }

    /// Serves one connection; `send_file` is for its plain stream.
    async fn serve_connection<S>(
        &self,
        mut stream: S,
        send_file: Option<SendFile<S>>,
        stopping: watch::Receiver<bool>,
    ) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut limits =
            Limits { deadline: Instant::now() + self.options.handshake_timeout, stopping: stopping.clone() };
        let mut haggling = limits.keep(Haggling::begin(self, &mut stream)).await?;
        match limits.keep(haggling.options(&mut stream)).await? {
            Outcome::Closed => stream.shutdown().await,
            Outcome::Transmission(session) => {
                Connection::new(self, stream, session, send_file, stopping).run().await
            }
            Outcome::StartTls => {
                let mut stream = limits.keep(self.accept_tls(stream)).await?;
                haggling.secured();
                match limits.keep(haggling.options(&mut stream)).await? {
                    Outcome::Transmission(session) => {
                        Connection::new(self, stream, session, None, stopping).run().await
                    }
                    Outcome::Closed | Outcome::StartTls => stream.shutdown().await,
                }
            }
        }
    }

    async fn accept_tls<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match &self.options.tls {
            TlsPolicy::Allow(tls) | TlsPolicy::Require(tls) => tls.accept(stream).await,
            TlsPolicy::Refuse => Err(io::Error::other("TLS was begun on a server that has none")),
        }
    }
}

/// When a handshake is over, whether or not it came to an end: nothing is in flight that a client could miss.
struct Limits {
    deadline: Instant,
    stopping: watch::Receiver<bool>,
}

impl Limits {
    /// What `step` of the handshake comes to, within the limits.
    async fn keep<T>(&mut self, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        tokio::select! {
            done = tokio::time::timeout_at(self.deadline, step) => done.unwrap_or_else(|_| {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the client did not finish the handshake in time"))
            }),
            Ok(_) = self.stopping.wait_for(|stopping| *stopping) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server stopped during the handshake"))
            }
        }
    }
}

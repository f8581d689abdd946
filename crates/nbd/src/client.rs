//! The client: an export of a server as a [`loam_block::BlockDevice`].
//!
//! [`NbdDevice::connect`] negotiates the most that the server offers and opens as many connections as both sides want.
//! Requests are pipelined: each caller's future sends its own request and, when its turn comes, receives its own reply
//! into its own buffer; there is no task in between and no second copy. A connection that breaks is made again within
//! bounded time, and what was in flight on it is sent again, for the callers still hold the data. What cannot be sent
//! again are writes that were acknowledged: the next flush fails once with
//! [`WritesLost`](loam_block::ErrorKind::WritesLost).
//!
//! A replayed write may meet its first sending, if the server carries that out late: so may it with every NBD client that
//! reconnects. Futures of a device that were polled once want to be polled on or dropped: while one is not, its data is
//! received for it, but a write that is sent by half holds its connection up until the time for requests is over.

mod coverage;
mod device;
mod error;
mod exchange;
mod export;
mod failure;
mod handshake;
mod link;
mod list;
mod pool;
mod receive;
mod transport;

use std::time::Duration;

pub use device::NbdDevice;
pub use error::ConnectError;
pub use export::{ExportFlags, ExportInfo};
pub use list::list;

use crate::tls::ClientTls;

/// Connections that one device opens at most.
pub const CONNECTIONS_MAX: usize = 64;

/// For [`ClientOptions::fill`]: what one connection of a server with threads has in hand at a time, by custom.
pub const CONNECTION_FILL: usize = 16;

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Connections, at most [`CONNECTIONS_MAX`]; one where the server does not promise that several see the same.
    pub connections: usize,
    /// Requests in flight on one connection before the next is used; beyond that, and with 0 from the start, a request
    /// goes to the connection that has least to do. A server at memory speed does more for each wake-up the fewer
    /// connections there are, and servers have their threads by connection: [`CONNECTION_FILL`] gives both their due.
    pub fill: usize,
    /// How long connecting and the handshake may take together.
    pub connect_timeout: Duration,
    /// How long the answer to a read, a write or a question may take until the connection is taken for dead.
    pub request_timeout: Duration,
    /// The same for flushes, zeroes, trims and prefetches, which may have much to do.
    pub slow_timeout: Duration,
    /// How long a broken connection is tried to be made again. Zero: once.
    pub reconnect_limit: Duration,
    /// For `nbds://`, and for `nbd://` where the server offers TLS. Certificates that a URI names come first.
    pub tls: Option<ClientTls>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            connections: 4,
            fill: 0,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            slow_timeout: Duration::from_secs(300),
            reconnect_limit: Duration::from_secs(60),
            tls: None,
        }
    }
}

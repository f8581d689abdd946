//! A FUSE server of our own for exactly one huge read-only file, because what makes it fast under a loop device and
//! what makes it survive its process are settings that general libraries leave out: asynchronous direct I/O, many
//! requests under way, and taking over a connection with a resend.
//!
//! [`wire`] holds the message layouts, [`Session`] decides what to do about a request without doing any I/O,
//! [`Server`] does it, and [`connect()`] makes the kernel's side.

mod buffer;
mod connect;
mod queues;
mod server;
mod session;
mod stats;
pub mod wire;

pub(crate) use connect::open_file;
pub use connect::{Connection, connect};
pub use server::{Engine, Server, ServerOptions};
pub use session::{Action, MAX_READ, Negotiated, REPLY_BYTES, Session};
pub use stats::Stats;
pub(crate) use stats::{Counters, add, sum};

//! NBD, the network block device protocol: its messages, a server of any [`loam_block::BlockDevice`], a client that is
//! one, and a copier between two of them.
//!
//! The protocol is that of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, with extended headers.
//! [`protocol`] knows bytes and no sockets.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod client;
pub mod copy;
pub mod protocol;
pub mod server;
pub mod tls;
pub mod uri;

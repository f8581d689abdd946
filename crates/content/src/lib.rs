//! Bytes from somewhere slow, made local and trustworthy: byte sources (files, HTTP), chunk sources on top of them, and
//! the verified chunk cache that serves them as a [`loam_block::BlockDevice`].
//!
//! A [`ByteSource`] is one pinned version of one object. A [`ChunkSource`] materialises the chunks of one content from
//! it (an image's index says how; [`WholeSource`] takes the object as it is). A [`Cache`] keeps chunks in a directory,
//! each 4 KiB block with a checksum, and gives for each content a [`CachedDevice`]: a block that is local is answered
//! without allocation or lock, one that is not is fetched once, however many wait for it, and checked against its
//! digest before it is cached or served.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod cache;
mod chunk;
mod digest;
mod error;
mod source;
mod url;

pub use cache::{
    Cache, CacheOptions, CacheStats, CachedDevice, CheckReport, ErrorCounts, Importer, Progress, ReadAhead,
};
pub use chunk::{
    ChunkReceiver, ChunkSender, ChunkSource, FetchCost, WholeSource, chunk_channel, collect_chunks,
};
pub use digest::{BadDigest, Digest};
pub use error::{Error, Result};
pub use source::{
    ByteSource, ByteStream, Fetched, FileSource, HttpClient, HttpOptions, HttpSource, Pin, WireCounters,
    WireTotals, fetch_whole, open,
};
pub use url::SourceUrl;

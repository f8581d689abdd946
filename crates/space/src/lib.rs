//! The address space of a pool: which addresses belong to which content ([`Map`], durable), their bytes
//! ([`AddressSpace`]), and the device that the kernel sees ([`VirtualDevice`]).
//!
//! What this crate promises:
//! - An address that was given to a range belongs to it for ever; a range, and what describes a content, never
//!   changes. Addresses are given out once.
//! - When a call that adds something returns, what it added survives power loss.
//! - A map that is damaged fails to open and says where; it never answers wrongly.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use loam_block::{BlockDevice, Io, MemoryDevice};
//! # use loam_space::{AddressSpace, ContentId, Map, Resolver, Unmapped, VirtualDevice};
//! struct Contents;
//!
//! impl Resolver for Contents {
//!     fn resolve<'a>(&'a self, _content: ContentId, spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>> {
//!         Io::Ready(Ok(Arc::new(MemoryDevice::from_bytes(spec))))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let map = Arc::new(Map::create("pool/map", 4 << 60)?);
//! let content = map.add_content(b"{\"kind\": \"example\"}")?;
//! let range = map.allocate(content, 64 << 10, 4096)?;
//! let space = Arc::new(AddressSpace::new(map, Arc::new(Contents), Unmapped::Error));
//! let superblock = Arc::new(MemoryDevice::new(1 << 20));
//! let device = VirtualDevice::new(superblock, space);
//! # Ok(())
//! # }
//! ```

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod error;
mod log;
mod map;
mod recover;
mod snapshot;
mod space;
pub mod storage;
mod table;
mod types;
mod virtual_device;

pub use error::{Error, Result};
pub use log::SPEC_BYTES_MAX;
pub use map::{Allocation, CONTENTS_MAX, Map, MapStats, SIZE_MAX};
pub use snapshot::Ranges;
pub use space::{AddressSpace, Resolver, SpaceCounters, Unmapped};
pub use storage::{Storage, StorageFile};
pub use types::{Address, BLOCK, ContentId, Place, Range};
pub use virtual_device::{VIRTUAL_BASE, VirtualDevice};

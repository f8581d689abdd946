//! For tests: what disks and devices do on bad days, replayable from a seed.
//!
//! - [`SimDisk`] is a directory of files that keeps volatile and durable bytes apart. It can lose power at any
//!   operation; what was not synced is then dropped, kept or torn, sector by sector.
//! - [`FaultyDevice`] is a layer over any block device that fails, delays and corrupts requests.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod disk;
mod faulty;

pub use disk::{SECTOR, SimDisk, SimFile};
pub use faulty::{FaultyDevice, Operation};

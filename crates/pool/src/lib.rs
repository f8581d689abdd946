//! Pools: one directory that holds one loam filesystem, from formatting to taking it down.
//!
//! A pool has a *virtual image* (the seed's superblock, or its trees), a *local device* (all btrfs trees and all
//! writes), a durable map of the address space, a chunk cache and a daemon that serves the virtual device to the
//! kernel. `loam mount` is the same thing with one image formatted into it beforehand, so there is one code path.
//!
//! The daemon (`daemon`) is the only writer of map and cache; command-line tools talk to it over HTTP on a Unix
//! socket (`client`, `protocol`). What must also work when the daemon is dead (taking down what it
//! left, offline checks) lives in library functions that both call.

mod accounts;
mod apart;
mod bundle;
mod busy;
mod catalog;
mod check;
mod client;
mod config;
mod containers;
mod content;
mod daemon;
pub mod device;
mod directory;
mod error;
mod format;
mod images;
mod indexes;
mod kernel;
mod launch;
mod mounts;
mod nbd_source;
mod pins;
pub mod protocol;
pub mod quota;
mod ranges;
mod served;
mod stand_in;
mod state;
mod trace;

pub use apart::mount_main;
pub use bundle::{RunOptions, run_container};
pub use busy::{Holder, holders};
pub use catalog::check_name;
pub use check::{CheckOptions, check};
pub use client::Client;
pub use config::{Config, EngineChoice, LocalDevice, Purpose, TransportChoice, UnmappedChoice};
pub use daemon::daemon_main;
pub use directory::PoolDirectory;
pub use error::{Error, Result};
pub use format::{InitOptions, Made, QuotaChoice, init, seed_without_pool};
pub use indexes::{
    IndexMade, IndexOptions, Watch, absolute_bytes, absolute_location, absolute_source, make_index,
};
pub use launch::{UpOptions, UpOutcome, down, holder_main, status, up};
pub use loam_attach::ublk::DataPath;
pub use mounts::{MountOptions, MountReport, Mounted, directory_of_mount, mount_image, unmount_image};
pub use ranges::clone_range;

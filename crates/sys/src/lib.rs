//! What loam asks of the kernel beyond reading and writing: ioctls, mounts, descriptor passing, mappings. The only
//! crate that may hold `unsafe`, so it stays small: each module wraps one kernel interface behind safe functions, and
//! decides nothing.
//!
//! Where `rustix` has a safe call already (`mknodat`, `lsetxattr`, `utimensat`, `chownat`, `openat2`), use that.

mod error;
mod ioctl;

pub mod btrfs;
pub mod fds;
pub mod fuse_ring;
pub mod loopdev;
pub mod map_file;
pub mod mount;
pub mod process;
pub mod ublk;

pub use error::{Error, Result};

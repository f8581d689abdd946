//! The end-to-end tests' tools: the real binary with a pool of its own ([`Loam`]), a web server whose bad days are
//! at the test's command ([`FileServer`]), trees and tars ([`tarball`]), and a comparison of two trees that looks at
//! everything a filesystem keeps ([`compare`]).
//!
//! The tests need root, btrfs, loop devices and FUSE, some of them ublk. Without root they fail; they are never skipped.
//! What a test attaches or mounts is gone when it ends: [`Loam`]'s drop looks for mounts, loop and ublk devices and
//! processes left behind and fails the test that left them.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test's tools fail by panicking")]

pub mod compare;
pub mod disk;
mod harness;
mod http;
pub mod kernel_nbd;
mod leaks;
mod reader;
pub mod tarball;

pub use harness::{Loam, Outcome, binary, require_root, wait_until};
pub use http::{Counters, FileServer, Request};
pub use reader::{BLOCK, drop_page_cache, read_direct};

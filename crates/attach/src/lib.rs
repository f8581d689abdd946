//! Transports: how the kernel gets a [`loam_block::BlockDevice`] as a block device.
//!
//! [`LoopTransport`] serves it as one file of a FUSE filesystem that is mounted nowhere ([`fuse`]), with a loop device
//! on top in direct-I/O mode. [`holder`] keeps the descriptors that must survive the serving process, so that a killed
//! one is followed by another and no reader sees an error.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod error;
pub mod fuse;
pub mod holder;
mod local;
mod loop_transport;
pub mod transport;
pub mod ublk;

pub use error::{Error, Result};
pub use local::{FileAttachment, FileOptions};
pub use loop_transport::{AttachOptions, Attachment, LoopTransport, SavedState};

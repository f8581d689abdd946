//! The one abstraction of loam: a [`BlockDevice`] is anything that can be read (and perhaps written) by byte
//! offset: a file, memory, a pattern, an export on the network, the virtual device of a pool.
//!
//! # How a local hit is answered without allocation, and how a miss suspends
//!
//! Every operation returns an [`Io`]: either [`Io::Ready`] with the result, or [`Io::Pending`] with a boxed
//! future. A device whose bytes are at hand (memory, a page-cached file, a cached chunk) fills the caller's buffer
//! before it returns and answers `Ready`: no allocation, no runtime, no other thread. Only a device that must wait
//! for a disk or a network allocates a future.
//!
//! A `Pending` future is *lazy and cancel-safe*: it has done nothing that matters before its first poll, and
//! dropping it at any point leaves the device consistent and the buffer untouched from then on. So a queue thread
//! may call [`BlockDevice::read`] with a buffer of its own, answer at once when it is `Ready`, and otherwise drop
//! the future and issue the same request again from a task with an owned buffer. Futures are polled inside a tokio
//! runtime with time and I/O enabled.
//!
//! `docs/decisions/2026-11-21-io-shape.md` weighs this against a channel for each thread.
//!
//! # Where bytes lie
//!
//! A device whose bytes lie in a local file can say where ([`BlockDevice::locate`], [`BlockDevice::settle`]), so that a
//! transport reads them through its own ring or lets the kernel move them. Everything works without.
//!
//! # Devices
//!
//! [`FileDevice`] (a regular file or a block device), [`MemoryDevice`] (sparse, of any size), [`NullDevice`] and
//! [`PatternDevice`] (each 8 bytes hold their own offset). [`DeviceSpec`] opens them from the strings of the command
//! line. [`layer`] has the devices that wrap a device. With the feature `conformance` there is a suite that every device and layer has to pass.
//!
//! ```
//! # use loam_block::{BlockDevice, DeviceSpec, FileOptions, PatternDevice};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = "pattern:4EiB".parse::<DeviceSpec>()?.open(FileOptions::default())?;
//! let mut block = [0; 4096];
//! device.read(1 << 60, &mut block).await?;
//! PatternDevice::verify(1 << 60, &block)?;
//! # Ok(())
//! # }
//! ```
//!
//! Offsets and lengths are bytes throughout.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[cfg(feature = "conformance")]
pub mod conformance;
mod device;
mod error;
mod file;
mod io;
pub mod layer;
mod location;
mod memory;
mod null;
mod pattern;
pub mod size;
mod spec;

pub use device::{
    BlockDevice, Capabilities, Extent, ExtentKind, Geometry, Locality, MAXIMUM_BLOCK, WriteFlags, ZeroFlags,
    check_extents_range, check_range, whole_device_as,
};
pub use error::{Error, ErrorKind, Result};
pub use file::{FileDevice, FileOptions};
pub use io::Io;
pub use location::{Access, Located, Ticket};
pub use memory::MemoryDevice;
pub use null::NullDevice;
pub use pattern::PatternDevice;
pub use size::{ByteSize, ParseSizeError};
pub use spec::{DeviceSpec, ParseDeviceError};

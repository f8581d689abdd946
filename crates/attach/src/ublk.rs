//! The ublk transport: a block device whose requests this process takes from io_uring, one thread and one ring for each
//! queue of the device.
//!
//! [`attach`] makes a device, [`resume`] goes on with one whose process is gone: the kernel keeps the device, and the
//! requests that were under way wait for it (`UBLK_F_USER_RECOVERY_REISSUE`). Nobody need hold a descriptor meanwhile.
//! The kernel also keeps 64 bits for the server with each device: a random number there tells one attachment from
//! whatever device has the same number later, so none but our own is ever touched.
//!
//! # Unprivileged devices
//! With [`Options::unprivileged`] a user without CAP_SYS_ADMIN may attach, where an administrator gave access to
//! /dev/ublk-control and to the new devices (udev rules). The kernel then allows no recovery (the device goes away with
//! its process, readers get errors), copies data itself ([`DataPath::Copy`]), lets nobody but the owner open the device,
//! and kills a server that leaves a request unanswered for half a minute.

mod device;
mod options;
mod queue;
mod request;
mod server;

use std::path::PathBuf;
use std::sync::Arc;

use loam_block::BlockDevice;
use tokio::runtime::Handle;

pub use options::{DataPath, Features, Options, SavedState};

use crate::fuse::Stats;
use crate::{Error, Result};
use device::Device;
use server::Server;

/// What the driver offers here.
///
/// # Errors
/// [`Error::Unavailable`] with the reason: the driver is not there, not for this user, or io_uring is switched off.
pub fn features() -> Result<Features> {
    device::open().map(|(_, features)| features)
}

/// Attaches `device`, read-only, as a new block device. Reads that must wait run on `runtime`, which must keep running.
/// Blocks until the device is there.
///
/// # Errors
/// [`Error::Unavailable`] without ublk; [`Error::Unsuitable`] when the size is not a multiple of the block size or too
/// large, or when the kernel lacks what `options` ask for; [`Error::System`] for what the kernel refuses.
pub fn attach(device: Arc<dyn BlockDevice>, runtime: Handle, options: &Options) -> Result<Attachment> {
    let (control, features) = device::open()?;
    let made = Device::add(control, features, &device.geometry(), options)?;
    let server = Server::start(device, runtime, &made)?;
    let made = made.start(&server)?;
    Ok(Attachment { device: Box::new(made), server })
}

/// Goes on serving an attachment whose process is gone. Requests that it left unanswered are answered now. Waits for the
/// process to be gone wholly.
///
/// # Errors
/// [`Error::Mismatch`] when the device is not that attachment, is still served by a process, or has another size;
/// [`Error::Unavailable`] without ublk; [`Error::System`] for what the kernel refuses.
pub fn resume(device: Arc<dyn BlockDevice>, runtime: Handle, state: SavedState) -> Result<Attachment> {
    let size = device.geometry().size;
    if size != state.size {
        return Err(Error::Mismatch(format!("the device has {size} bytes, the attached one {}", state.size)));
    }
    let (control, _) = device::open()?;
    let found = Device::found(control, state)?;
    let server = Server::start(device, runtime, &found)?;
    let found = found.take_over(&server)?;
    Ok(Attachment { device: Box::new(found), server })
}

/// The N of /dev/ublkbN that an attachment has; `None` when it is gone. Needs no server.
///
/// # Errors
/// [`Error::Unavailable`] without ublk.
pub fn find(state: &SavedState) -> Result<Option<u32>> {
    let (mut control, _) = device::open()?;
    Ok(device::find(&mut control, state)?.map(|_| state.number))
}

/// Removes what a dead process left of an attachment. Returns whether there was anything.
///
/// # Errors
/// [`Error::Busy`] when it is mounted, [`Error::StillOpen`] when it is open elsewhere: nothing has changed then.
pub fn remove(state: &SavedState) -> Result<bool> {
    let (control, _) = device::open()?;
    device::remove(control, state)
}

/// What a process left that died while it attached with [`Options::id`]: enough to [`remove`] it.
///
/// # Errors
/// [`Error::Unavailable`] without ublk.
pub fn lost(id: u64) -> Result<Option<SavedState>> {
    let (control, _) = device::open()?;
    device::find_by_id(control, id)
}

/// A device that is attached and being served.
///
/// Dropping it changes nothing: the device is served until the process ends, and can be taken over then.
pub struct Attachment {
    device: Box<Device>,
    server: Server,
}

impl Attachment {
    /// The block device: "/dev/ublkbN".
    pub fn device_path(&self) -> PathBuf {
        device::path(self.device.state().number)
    }

    /// What to keep on disk for [`resume`], [`find`] and [`remove`].
    pub fn state(&self) -> &SavedState {
        self.device.state()
    }

    /// How data travels: never [`DataPath::Auto`].
    pub fn data_path(&self) -> DataPath {
        self.device.state().data_path
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.server.stats()
    }

    /// Removes the device and ends its threads. May be called again after an error.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is mounted, [`Error::StillOpen`] while it is open elsewhere: nothing has changed then, and
    /// it is still served.
    pub fn detach(&mut self) -> Result<()> {
        self.device.detach(&mut self.server)
    }
}

//! The loop transport: a FUSE file under a loop device with direct I/O.
//!
//! The file's name is random and belongs to one attachment. Sysfs shows it as the loop device's backing file, so that
//! any process can tell, without asking a server that may be dead, whether a loop device is the one it looks for: a
//! device that got the same number later is never touched.
//!
//! Loop devices are taken with autoclear: while the attachment (or a holder) has the device open, or it is mounted, it
//! stays; when everything is killed, it goes away with the last of them.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use loam_block::{BlockDevice, Geometry};
use loam_sys::loopdev::{self, LoopConfig, LoopDevice};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::fuse::{self, Engine, Negotiated, Server, ServerOptions, Stats};
use crate::holder::FdStore;
use crate::{Error, Result};

/// How long transient openers (udev's probes) may take to close a device that is being detached.
pub(crate) const DETACH_TIMEOUT: Duration = Duration::from_secs(5);
/// What the /dev/fuse descriptor is stored under. Who keeps a duplicate makes readers wait, where they would fail.
const CHANNEL_NAME: &str = "fuse";
/// What the loop device's descriptor is stored under. After the other in the alphabet: holders let go in that order.
const LOOP_NAME: &str = "loop";
/// Device number of /dev/fuse (`include/linux/miscdevice.h`).
const FUSE_RDEV: (u32, u32) = (10, 229);
/// FUSE asks for whole pages of this many bytes.
const PAGE: u32 = 4096;
/// The largest device: sizes are signed in the kernel, and its last page must be addressable.
const SIZE_MAX: u64 = i64::MAX as u64 - 4095;

/// How a device is attached.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// How its FUSE file is served.
    pub server: ServerOptions,
    /// Logical block size of the loop device, in bytes: 512, 1024, 2048 or 4096.
    pub block_size: u32,
}

impl Default for AttachOptions {
    fn default() -> Self {
        AttachOptions { server: ServerOptions::default(), block_size: 4096 }
    }
}

/// What another process needs to find an attachment, take it over, or remove it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Names the attachment and no other, ever.
    pub id: Uuid,
    /// The N of /dev/loopN.
    pub loop_number: u32,
    /// Size of the device in bytes.
    pub size: u64,
    /// What the FUSE connection agreed on.
    pub negotiated: Negotiated,
}

impl SavedState {
    /// The name of the FUSE file.
    fn file_name(&self) -> String {
        file_name(self.id)
    }

    /// The backing file as sysfs prints it: the root of a detached mount has no path above it.
    fn backing_file(&self) -> PathBuf {
        PathBuf::from(format!("/{}", self.file_name()))
    }
}

fn file_name(id: Uuid) -> String {
    format!("loam-{}", id.simple())
}

/// Attaches devices by FUSE and loop.
///
/// All calls block. They may be made from a task of a multi-threaded runtime through `spawn_blocking` or
/// `block_in_place`; the runtime given to [`LoopTransport::attach`] must keep running, because reads that wait run on it.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoopTransport;

impl LoopTransport {
    /// Attaches `device`, read-only, under a new loop device. Reads that must wait run on `runtime`. What another process
    /// needs to take over is put into `store`, unless that is impossible ([`Negotiated::can_resend`]).
    ///
    /// # Errors
    /// [`Error::Unsuitable`] when the size is not a multiple of the block size or too large; [`Error::System`] without
    /// CAP_SYS_ADMIN, FUSE or loop devices.
    pub fn attach(
        device: Arc<dyn BlockDevice>,
        runtime: Handle,
        options: &AttachOptions,
        store: &FdStore,
    ) -> Result<Attachment> {
        let size = check_geometry(&device.geometry(), options.block_size)?;
        let id = Uuid::new_v4();
        let name = file_name(id);
        let connection = fuse::connect()?;
        // The threads run before the file is opened: opening it asks them.
        let server = Server::start(connection.channel, &name, device, runtime, &options.server)?;
        let file = fuse::open_file(connection.mount.as_fd(), OsStr::new(&name))?;
        let Some(negotiated) = server.negotiated() else {
            return Err(Error::Mismatch("the FUSE connection began without INIT".into()));
        };
        if options.server.engine == Engine::Uring && !negotiated.uses_uring() {
            tracing::warn!(
                "this kernel has FUSE over io_uring switched off (echo Y > /sys/module/fuse/parameters/enable_uring): \
                 serving by /dev/fuse"
            );
        }
        let loop_device = loopdev::attach(&LoopConfig {
            backing: file.as_fd(),
            read_only: true,
            direct_io: true,
            autoclear: true,
            block_size: options.block_size,
            offset: 0,
            size_limit: 0,
        })?;
        let loop_device = above(loop_device, server.channel())?;
        let state = SavedState { id, loop_number: loop_device.number(), size, negotiated };
        if !loop_device.direct_io() {
            tracing::warn!(device = %loop_device.path().display(), "loop goes through the page cache: slower");
        }
        if negotiated.can_resend() {
            store.store(CHANNEL_NAME, server.channel())?;
            store.store(LOOP_NAME, loop_device.as_fd())?;
        } else {
            // Kept without a resend, readers would wait for ever; not kept, they get errors.
            tracing::warn!("reads under way when this process dies will fail: nobody can take over");
        }
        Ok(Attachment { state, server, loop_device: Some(loop_device) })
    }

    /// Goes on serving an attachment whose process has gone, with the descriptors that `store` kept. Every read that the
    /// other process left unanswered is answered now.
    ///
    /// # Errors
    /// [`Error::NotKept`] when the store has no descriptors; [`Error::Mismatch`] when they, the device and `state` do not
    /// belong together; [`Error::CannotResend`] on kernels before 6.9.
    pub fn resume(
        device: Arc<dyn BlockDevice>,
        runtime: Handle,
        options: &AttachOptions,
        state: SavedState,
        store: &FdStore,
    ) -> Result<Attachment> {
        let size = device.geometry().size;
        if size != state.size {
            let sizes = format!("the device has {size} bytes, the attached one {}", state.size);
            return Err(Error::Mismatch(sizes));
        }
        let (Some(channel), Some(loop_device)) = (store.take(CHANNEL_NAME), store.take(LOOP_NAME)) else {
            return Err(Error::NotKept);
        };
        check_channel(channel.as_fd())?;
        let loop_device = above(LoopDevice::from_fd(loop_device)?, channel.as_fd())?;
        let backing = loopdev::backing_file(loop_device.number());
        if loop_device.number() != state.loop_number || backing.as_ref() != Some(&state.backing_file()) {
            let found = format!("{} with backing file {backing:?}", loop_device.path().display());
            let expected = format!("/dev/loop{} with {:?}", state.loop_number, state.backing_file());
            return Err(Error::Mismatch(format!("got {found}, expected {expected}")));
        }
        let name = state.file_name();
        let server = Server::resume(channel, &name, device, runtime, &options.server, state.negotiated)?;
        Ok(Attachment { state, server, loop_device: Some(loop_device) })
    }

    /// The N of /dev/loopN that an attachment has now; `None` when it is gone. Needs no server.
    ///
    /// # Errors
    /// Where sysfs cannot be read.
    pub fn find(state: &SavedState) -> Result<Option<u32>> {
        Ok(loopdev::find(state.backing_file())?.first().copied())
    }

    /// Removes what a dead process left of an attachment. Returns whether there was anything.
    ///
    /// # Errors
    /// [`Error::Busy`] when it is mounted; [`Error::StillOpen`] when it is open elsewhere.
    pub fn remove(state: &SavedState) -> Result<bool> {
        match LoopTransport::find(state)? {
            Some(number) => remove_loop(number, &state.backing_file()).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Whether a device can lie under a loop device with that block size. Returns its size.
fn check_geometry(geometry: &Geometry, block_size: u32) -> Result<u64> {
    let Geometry { size, minimum_block, maximum_block, .. } = *geometry;
    if size == 0 || size > SIZE_MAX || !size.is_multiple_of(u64::from(block_size.max(512))) {
        let limits = format!("from 1 to {SIZE_MAX} and a multiple of {block_size}");
        return Err(Error::Unsuitable(format!("the size of {size} bytes is not {limits}")));
    }
    if minimum_block > block_size || maximum_block < PAGE {
        let blocks = format!("{minimum_block} to {maximum_block} bytes at a time");
        return Err(Error::Unsuitable(format!(
            "the device is read {blocks}, loop reads {block_size} to {PAGE}"
        )));
    }
    Ok(size)
}

/// Makes the loop device's descriptor number higher than the channel's. A process that is killed closes its descriptors
/// in ascending order: the connection must end before the loop device is let go of, which may wait for reads.
fn above(loop_device: LoopDevice, channel: BorrowedFd<'_>) -> Result<LoopDevice> {
    if loop_device.as_fd().as_raw_fd() > channel.as_raw_fd() {
        return Ok(loop_device);
    }
    let copy = rustix::io::fcntl_dupfd_cloexec(&loop_device, channel.as_raw_fd() + 1)
        .map_err(|error| loam_sys::Error::new("fcntl", loop_device.path().display().to_string(), error))?;
    Ok(LoopDevice::from_fd(copy)?)
}

fn check_channel(channel: BorrowedFd<'_>) -> Result<()> {
    let stat = rustix::fs::fstat(channel)
        .map_err(|error| loam_sys::Error::new("fstat", "the kept /dev/fuse descriptor", error))?;
    let rdev = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    if rdev != FUSE_RDEV {
        return Err(Error::Mismatch("the kept descriptor is not /dev/fuse".into()));
    }
    Ok(())
}

/// Lets go of a loop device whose backing file is printed as `backing`, and of no other.
fn remove_loop(number: u32, backing: &Path) -> Result<()> {
    let path = loopdev::path(number);
    check_unused(&path)?;
    let device = LoopDevice::open(number, false)?;
    // Now that it is open it cannot become another one.
    if loopdev::backing_file(number).as_deref() == Some(backing) {
        let _ = device.clear();
    }
    drop(device);
    if !loopdev::wait_gone(number, backing, DETACH_TIMEOUT) {
        return Err(Error::StillOpen { device: path });
    }
    Ok(())
}

/// Fails when the device is mounted or else held exclusively.
pub(crate) fn check_unused(path: &Path) -> Result<()> {
    let result =
        OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::EXCL.bits() as i32).open(path);
    match result {
        Ok(file) => {
            let is_block = file.metadata().is_ok_and(|m| m.file_type().is_block_device() && m.rdev() != 0);
            if is_block { Ok(()) } else { Err(Error::Mismatch(format!("{} is no device", path.display()))) }
        }
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
            Err(Error::Busy { device: path.to_owned() })
        }
        Err(error) => Err(loam_sys::Error::new("open", path.display().to_string(), error).into()),
    }
}

/// A device that is attached and being served.
///
/// Dropping it closes the loop device but goes on serving: one that is mounted works on, one that is not goes away.
pub struct Attachment {
    state: SavedState,
    server: Server,
    loop_device: Option<LoopDevice>,
}

impl Attachment {
    /// The block device: "/dev/loopN".
    pub fn device_path(&self) -> PathBuf {
        loopdev::path(self.state.loop_number)
    }

    /// What to keep on disk for [`LoopTransport::resume`], [`LoopTransport::find`] and [`LoopTransport::remove`].
    pub fn state(&self) -> &SavedState {
        &self.state
    }

    /// How requests travel: what was asked for, or what the kernel made of it.
    pub fn engine(&self) -> Engine {
        if self.state.negotiated.uses_uring() { Engine::Uring } else { Engine::Classic }
    }

    /// How many threads serve it.
    pub fn threads(&self) -> usize {
        self.server.threads()
    }

    /// Counters of the FUSE server.
    pub fn stats(&self) -> Stats {
        self.server.stats()
    }

    /// Removes the loop device, ends the FUSE connection and its threads, and clears `store` of both. May be called
    /// again after an error.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is mounted: nothing has changed then, and it is still served. [`Error::StillOpen`] when
    /// somebody else keeps it open: it is served until they close it.
    pub fn detach(&mut self, store: &FdStore) -> Result<()> {
        let path = self.device_path();
        let backing = self.state.backing_file();
        if let Some(device) = &self.loop_device {
            check_unused(&path)?;
            device.clear()?;
        }
        self.loop_device = None;
        // A holder's duplicates would keep both alive. One that has gone keeps nothing.
        for name in [LOOP_NAME, CHANNEL_NAME] {
            if let Err(error) = store.remove(name) {
                tracing::debug!(%error, name, "cannot clear the descriptor store");
            }
        }
        let gone = loopdev::wait_gone(self.state.loop_number, &backing, DETACH_TIMEOUT);
        if !gone || !self.server.wait(DETACH_TIMEOUT) {
            return Err(Error::StillOpen { device: path });
        }
        Ok(())
    }
}

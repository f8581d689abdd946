//! What is attached and mounted, kept in `run/attach.json`: enough for a new daemon to take over and for `loam down` to
//! remove it when every process of the pool is dead.

use std::path::PathBuf;
use std::sync::Arc;

use loam_attach::FileAttachment;
use loam_attach::holder::FdStore;
use loam_attach::transport::{self, Attachment, SavedState};
use serde::{Deserialize, Serialize};

use crate::config::{Config, LocalDevice};
use crate::directory::{PoolDirectory, remove_if_there, write_atomic};
use crate::error::{Context, Error, Result};
use crate::stand_in::StandIn;
use crate::{apart, bundle, kernel};

/// The contents of `run/attach.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AttachState {
    /// The virtual device.
    pub(crate) transport: SavedState,
    /// Its path.
    pub(crate) device: PathBuf,
    /// The mount point.
    pub(crate) mount: PathBuf,
    /// Daemons that took over from a dead one since the pool came up.
    pub(crate) restarts: u64,
}

impl AttachState {
    /// Reads it; `None` when the pool is not up.
    pub(crate) fn load(directory: &PoolDirectory) -> Result<Option<Self>> {
        let path = directory.attach_state();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::step(format!("reading {}", path.display()), error)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| Error::BadFile { path, why: error.to_string() })
    }

    /// Writes it, atomically.
    pub(crate) fn save(&self, directory: &PoolDirectory) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).step(|| "encoding attach.json".to_owned())?;
        write_atomic(&directory.attach_state(), &text)
    }
}

/// Removes whatever a dead daemon left: mount, block devices, the kernel's memory of the devices, sockets. Harmless when
/// there is nothing. The caller has made sure that no daemon runs. Readers that wait for one get errors: see
/// [`waiting`]. To be called where there is a runtime.
pub(crate) fn tear_down(directory: &PoolDirectory, config: &Config) -> Result<()> {
    if let Some(state) = AttachState::load(directory)? {
        let local = find_local(config)?;
        let detaching = |error| match error {
            // Unmounted here, but not in every mount namespace.
            loam_attach::Error::Busy { .. } => Error::busy(&state.mount),
            error => Error::step(format!("detaching {}", state.device.display()), error),
        };
        if is_mounted(&state, local.as_ref())? {
            let mut standin = stand_in(directory, &state).map_err(detaching)?;
            let devices = devices(&state, local.as_ref());
            apart::unmount(directory, &devices.each_ref().map(|device| device.as_path()), &state.mount)?;
            if let Some(attachment) = &mut standin {
                attachment.detach(&FdStore::none()).map_err(detaching)?;
            }
        }
        remove_devices(&state, local).map_err(detaching)?;
    } else if let Some(mut local) = find_local(config)? {
        local.detach().step(|| "detaching the local device".to_owned())?;
    }
    remove_lost(directory)?;
    bundle::remove_stale_state(directory)?;
    let sockets = [directory.control_socket(), directory.nbd_socket()];
    for path in [directory.attach_state(), directory.failure()].iter().chain(&sockets) {
        remove_if_there(path)?;
    }
    Ok(())
}

/// Chooses a name for a device and notes it, for [`tear_down`] to find the device by if this process dies before the
/// attachment's state is written.
pub(crate) fn begin_attaching(directory: &PoolDirectory) -> Result<u64> {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    let id = high ^ low;
    write_atomic(&directory.attaching(), id.to_string().as_bytes())?;
    Ok(id)
}

/// Removes the device of a daemon that died while it attached it.
fn remove_lost(directory: &PoolDirectory) -> Result<()> {
    let path = directory.attaching();
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::step(format!("reading {}", path.display()), error)),
    };
    let bad = |error: std::num::ParseIntError| Error::BadFile { path: path.clone(), why: error.to_string() };
    transport::remove_lost(text.parse().map_err(bad)?)
        .step(|| "removing a device that was being attached".to_owned())?;
    remove_if_there(&path)
}

/// What a pool has whose daemon is gone, where it is mounted and its reads wait for another: then neither readers nor
/// unmounting can go on before there is one. The caller has made sure that no daemon runs.
pub(crate) fn waiting(directory: &PoolDirectory, config: &Config) -> Result<Option<AttachState>> {
    let Some(state) = AttachState::load(directory)? else { return Ok(None) };
    if !state.transport.waits_for_server() || !is_mounted(&state, find_local(config)?.as_ref())? {
        return Ok(None);
    }
    let attached =
        state.transport.is_attached().step(|| format!("looking for {}", state.device.display()))?;
    Ok(attached.then_some(state))
}

fn devices(state: &AttachState, local: Option<&FileAttachment>) -> [PathBuf; 2] {
    [state.device.clone(), local.map_or_else(|| state.device.clone(), FileAttachment::device_path)]
}

fn is_mounted(state: &AttachState, local: Option<&FileAttachment>) -> Result<bool> {
    let devices = devices(state, local);
    kernel::is_mounted(&state.mount, &devices.each_ref().map(|device| device.as_path()))
}

/// A filesystem whose reads wait for ever cannot be unmounted for certain, so this process answers them meanwhile.
fn stand_in(directory: &PoolDirectory, state: &AttachState) -> loam_attach::Result<Option<Attachment>> {
    if !state.transport.waits_for_server() || !state.transport.is_attached()? {
        return Ok(None);
    }
    let device = Arc::new(StandIn::new(directory, state.transport.size()));
    let (runtime, how) = (tokio::runtime::Handle::current(), transport::Options::default());
    transport::resume(device, runtime, &how, state.transport.clone(), &FdStore::none()).map(Some)
}

fn remove_devices(state: &AttachState, local: Option<FileAttachment>) -> loam_attach::Result<()> {
    state.transport.remove()?;
    local.map_or(Ok(()), |mut local| local.detach())
}

/// The loop device of the pool's local file, where it has one.
pub(crate) fn find_local(config: &Config) -> Result<Option<FileAttachment>> {
    match &config.local {
        LocalDevice::File(path) if path.exists() => {
            FileAttachment::find(path).step(|| format!("looking for the loop device of {}", path.display()))
        }
        _ => Ok(None),
    }
}

//! What is attached and mounted, kept in `run/attach.json`: enough for a new daemon to take over and for `loam down` to
//! remove it when every process of the pool is dead.

use std::path::{Path, PathBuf};

use loam_attach::FileAttachment;
use loam_attach::transport::SavedState;
use serde::{Deserialize, Serialize};

use crate::config::{Config, LocalDevice};
use crate::directory::{PoolDirectory, remove_if_there, write_atomic};
use crate::error::{Context, Error, Result};
use crate::{apart, bundle};

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

/// Removes whatever a dead daemon left: mount, loop devices, the kernel's memory of the devices, sockets. Harmless when
/// there is nothing. The caller has made sure that no daemon runs.
pub(crate) fn tear_down(directory: &PoolDirectory, config: &Config) -> Result<()> {
    if let Some(state) = AttachState::load(directory)? {
        let local = find_local(config)?;
        let local_path = local.as_ref().map(FileAttachment::device_path);
        let devices: Vec<&Path> =
            [Some(state.device.as_path()), local_path.as_deref()].into_iter().flatten().collect();
        apart::unmount(directory, &devices, &state.mount)?;
        remove_devices(&state, local).map_err(|error| match error {
            // Unmounted here, but not in every mount namespace.
            loam_attach::Error::Busy { .. } => Error::busy(&state.mount),
            error => Error::step(format!("detaching {}", state.device.display()), error),
        })?;
    } else if let Some(mut local) = find_local(config)? {
        local.detach().step(|| "detaching the local device".to_owned())?;
    }
    bundle::remove_stale_state(directory)?;
    for path in [directory.attach_state(), directory.control_socket(), directory.failure()] {
        remove_if_there(&path)?;
    }
    Ok(())
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

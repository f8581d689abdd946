//! How a daemon gets its devices: by taking over what one that died was serving, or anew.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use loam_attach::fuse::{Engine, ServerOptions};
use loam_attach::holder::FdStore;
use loam_attach::transport::{self, Attachment, Transport};
use loam_attach::{AttachOptions, FileAttachment, ublk};
use loam_block::BlockDevice;
use tokio::runtime::Handle;

use crate::config::{Config, EngineChoice, LocalDevice, TransportChoice};
use crate::directory::{PoolDirectory, remove_if_there};
use crate::error::{Context, Error, Result};
use crate::launch::UpOptions;
use crate::state::{AttachState, begin_attaching, find_local, tear_down};

/// Takes over the attachment of a daemon that died, or makes a new one after removing what a dead one left.
pub(super) fn attach(
    directory: &PoolDirectory,
    config: &Config,
    options: &UpOptions,
    device: Arc<dyn BlockDevice>,
    store: &FdStore,
) -> Result<(Attachment, AttachState)> {
    let mut how = transport_options(options);
    if let Some(state) = AttachState::load(directory)?
        && let Some(taken) = take_over(directory, options.transport, &how, device.clone(), store, state)?
    {
        return Ok(taken);
    }
    tear_down(directory, config)?;
    let transport = choose(options.transport)?;
    how.ublk.id = Some(begin_attaching(directory)?);
    let attachment = transport::attach(transport, device, Handle::current(), &how, store)
        .map_err(|error| advised("attaching the virtual device".to_owned(), error))?;
    let state = AttachState {
        transport: attachment.state(),
        device: attachment.device_path(),
        mount: mount_point(directory, config, options)?,
        restarts: 0,
    };
    state.save(directory)?;
    remove_if_there(&directory.attaching())?;
    Ok((attachment, state))
}

/// Serves on what a dead daemon served: `None` where there is nothing to take over, or nothing that is used.
fn take_over(
    directory: &PoolDirectory,
    choice: TransportChoice,
    how: &transport::Options,
    device: Arc<dyn BlockDevice>,
    store: &FdStore,
    mut state: AttachState,
) -> Result<Option<(Attachment, AttachState)>> {
    let what = || format!("taking over {}", state.device.display());
    if !state.transport.is_resumable(store).step(what)? {
        return Ok(None);
    }
    let found = state.transport.transport();
    if !choice.takes(found) {
        match state.transport.remove() {
            Ok(_) => return Ok(None),
            Err(error) => tracing::warn!("going on with the transport {found}: {error}"),
        }
    }
    match transport::resume(device, Handle::current(), how, state.transport.clone(), store) {
        Ok(attachment) => {
            state.restarts += 1;
            state.save(directory)?;
            Ok(Some((attachment, state)))
        }
        // Nobody uses it: another will do.
        Err(error) if found == Transport::Ublk && state.transport.remove().is_ok() => {
            tracing::warn!("{} is made anew: {error}", state.device.display());
            Ok(None)
        }
        Err(error) => {
            Err(Error::step(what(), error).with_hint("loam down removes it; readers of it get errors then"))
        }
    }
}

/// The transport that was asked for, or the fastest that there is.
fn choose(choice: TransportChoice) -> Result<Transport> {
    match choice {
        TransportChoice::Loop => Ok(Transport::Loop),
        TransportChoice::Ublk => Transport::Ublk
            .check()
            .map(|()| Transport::Ublk)
            .map_err(|error| advised("transport ublk".to_owned(), error)),
        TransportChoice::Auto => {
            let (best, why) = Transport::best();
            match why {
                Some(why) => tracing::info!("transport {best}: {why}"),
                None => tracing::info!("transport {best}: the fastest that this kernel has"),
            }
            Ok(best)
        }
    }
}

fn advised(what: String, error: loam_attach::Error) -> Error {
    let hint = error.hint();
    let failed = Error::step(what, error);
    match hint {
        Some(hint) => failed.with_hint(hint),
        None => failed,
    }
}

fn transport_options(options: &UpOptions) -> transport::Options {
    let engine = match options.engine {
        EngineChoice::Classic => Engine::Classic,
        EngineChoice::IoUring => Engine::Uring,
    };
    let server =
        ServerOptions { engine, threads: options.queues.map(usize::from), ..ServerOptions::default() };
    transport::Options {
        loop_device: AttachOptions { server, ..AttachOptions::default() },
        ublk: ublk::Options {
            queues: options.queues,
            data_path: options.data_path,
            ..ublk::Options::default()
        },
    }
}

fn mount_point(directory: &PoolDirectory, config: &Config, options: &UpOptions) -> Result<PathBuf> {
    let chosen = options.mount.clone().or_else(|| config.mount_point.clone());
    let path = chosen.unwrap_or_else(|| directory.default_mount());
    fs::create_dir_all(&path).step(|| format!("making {}", path.display()))?;
    // The table of mounts shows paths without symbolic links.
    path.canonicalize().step(|| format!("path {}", path.display()))
}

pub(super) fn attach_local(config: &Config) -> Result<Option<FileAttachment>> {
    let LocalDevice::File(path) = &config.local else { return Ok(None) };
    if let Some(attached) = find_local(config)? {
        return Ok(Some(attached));
    }
    FileAttachment::attach(path, &loam_attach::FileOptions::default())
        .step(|| format!("attaching {}", path.display()))
        .map(Some)
}

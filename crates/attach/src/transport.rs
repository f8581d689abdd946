//! One face for all transports: what is above chooses one when it attaches, and then neither knows nor cares which one
//! serves it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use loam_block::BlockDevice;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::fuse::{Engine, Stats};
use crate::holder::FdStore;
use crate::{AttachOptions, Error, LoopTransport, Result, loop_transport, ublk};

/// How the kernel gets a device's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// A FUSE file under a loop device: on every kernel. The holder of descriptors must live for a device to outlive
    /// its server.
    Loop,
    /// A ublk device: faster, and the kernel itself keeps what must outlive the server.
    Ublk,
}

impl Transport {
    /// The fastest transport that this machine has and that outlives the death of its server; and, where that is not
    /// ublk, why.
    pub fn best() -> (Transport, Option<Error>) {
        match Transport::Ublk.check() {
            Ok(()) => (Transport::Ublk, None),
            Err(error) => (Transport::Loop, Some(error)),
        }
    }

    /// Whether this machine has the transport.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with what is missing and how to get it.
    pub fn check(self) -> Result<()> {
        match self {
            // Its parts are tried when they are used: nothing else is as sure.
            Transport::Loop => Ok(()),
            Transport::Ublk if ublk::features()?.recovery_reissue() => Ok(()),
            Transport::Ublk => Err(Error::Unavailable {
                transport: "ublk",
                why: "a device would not outlive its server (UBLK_F_USER_RECOVERY_REISSUE)".into(),
                hint: "a newer kernel has it; --transport loop works without",
            }),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Loop => "loop",
            Transport::Ublk => "ublk",
        })
    }
}

/// How a device is attached, by each transport.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// By the loop transport.
    pub loop_device: AttachOptions,
    /// By ublk.
    pub ublk: ublk::Options,
}

/// What another process needs to find an attachment, take it over, or remove it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct SavedState(Tagged);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "snake_case")]
enum Tagged {
    Loop(loop_transport::SavedState),
    Ublk(ublk::SavedState),
}

/// As states were written, ever.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Tagged(Tagged),
    /// When there was one transport, it was not named.
    Untagged(loop_transport::SavedState),
}

impl From<Written> for SavedState {
    fn from(written: Written) -> SavedState {
        match written {
            Written::Tagged(tagged) => SavedState(tagged),
            Written::Untagged(state) => SavedState(Tagged::Loop(state)),
        }
    }
}

impl SavedState {
    /// Whose it is.
    pub fn transport(&self) -> Transport {
        match self.0 {
            Tagged::Loop(_) => Transport::Loop,
            Tagged::Ublk(_) => Transport::Ublk,
        }
    }

    /// Size of the device in bytes.
    pub fn size(&self) -> u64 {
        match &self.0 {
            Tagged::Loop(state) => state.size,
            Tagged::Ublk(state) => state.size,
        }
    }

    /// Whether the block device is there, and still that attachment's. Needs no server.
    ///
    /// # Errors
    /// Where the kernel cannot be asked.
    pub fn is_attached(&self) -> Result<bool> {
        Ok(match &self.0 {
            Tagged::Loop(state) => LoopTransport::find(state)?.is_some(),
            Tagged::Ublk(state) => ublk::find(state)?.is_some(),
        })
    }

    /// Whether [`resume`] can serve it: all that it takes is still there.
    ///
    /// # Errors
    /// Where the kernel cannot be asked.
    pub fn is_resumable(&self, store: &FdStore) -> Result<bool> {
        match &self.0 {
            Tagged::Loop(_) => Ok(!store.names().is_empty()),
            Tagged::Ublk(_) => self.is_attached(),
        }
    }

    /// Whether reads wait for a server when there is none, however that came about. Where they fail instead, what is
    /// mounted can be unmounted without one.
    pub fn waits_for_server(&self) -> bool {
        self.transport() == Transport::Ublk
    }

    /// Removes what a dead process left. Returns whether there was anything.
    ///
    /// # Errors
    /// [`Error::Busy`] when it is mounted; [`Error::StillOpen`] when it is open elsewhere.
    pub fn remove(&self) -> Result<bool> {
        match &self.0 {
            Tagged::Loop(state) => LoopTransport::remove(state),
            Tagged::Ublk(state) => ublk::remove(state),
        }
    }
}

/// Attaches `device`, read-only. Reads that must wait run on `runtime`, which must keep running. Blocks.
///
/// # Errors
/// [`Error::Unavailable`] where the transport is not to be had, [`Error::Unsuitable`] for sizes that it cannot serve.
pub fn attach(
    transport: Transport,
    device: Arc<dyn BlockDevice>,
    runtime: Handle,
    options: &Options,
    store: &FdStore,
) -> Result<Attachment> {
    Ok(Attachment(match transport {
        Transport::Loop => Served::Loop(LoopTransport::attach(device, runtime, &options.loop_device, store)?),
        Transport::Ublk => Served::Ublk(ublk::attach(device, runtime, &options.ublk)?),
    }))
}

/// Removes what a process left that died in [`attach`], which it began as `id` ([`ublk::Options::id`]); the loop transport
/// leaves nothing then. Returns whether there was anything.
///
/// # Errors
/// As [`SavedState::remove`].
pub fn remove_lost(id: u64) -> Result<bool> {
    match ublk::lost(id) {
        Ok(Some(state)) => ublk::remove(&state),
        Ok(None) | Err(Error::Unavailable { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Goes on serving an attachment whose process has gone. Every read that it left unanswered is answered now. Blocks.
///
/// # Errors
/// [`Error::Mismatch`] when what is found does not belong to `state`; [`Error::NotKept`] when the loop transport's
/// descriptors are gone.
pub fn resume(
    device: Arc<dyn BlockDevice>,
    runtime: Handle,
    options: &Options,
    state: SavedState,
    store: &FdStore,
) -> Result<Attachment> {
    Ok(Attachment(match state.0 {
        Tagged::Loop(state) => {
            Served::Loop(LoopTransport::resume(device, runtime, &options.loop_device, state, store)?)
        }
        Tagged::Ublk(state) => Served::Ublk(ublk::resume(device, runtime, state)?),
    }))
}

/// A device that is attached and being served. Dropping it leaves a mounted device served.
pub struct Attachment(Served);

enum Served {
    Loop(loop_transport::Attachment),
    Ublk(ublk::Attachment),
}

impl Attachment {
    /// The block device.
    pub fn device_path(&self) -> PathBuf {
        match &self.0 {
            Served::Loop(attachment) => attachment.device_path(),
            Served::Ublk(attachment) => attachment.device_path(),
        }
    }

    /// What to keep on disk.
    pub fn state(&self) -> SavedState {
        SavedState(match &self.0 {
            Served::Loop(attachment) => Tagged::Loop(attachment.state().clone()),
            Served::Ublk(attachment) => Tagged::Ublk(attachment.state().clone()),
        })
    }

    /// Which transport serves it.
    pub fn transport(&self) -> Transport {
        match &self.0 {
            Served::Loop(_) => Transport::Loop,
            Served::Ublk(_) => Transport::Ublk,
        }
    }

    /// How bytes reach the kernel: "fuse", "fuse-io-uring", or ublk's "copy", "user-copy", "zero-copy".
    pub fn data_path(&self) -> String {
        match &self.0 {
            Served::Loop(attachment) if attachment.engine() == Engine::Uring => "fuse-io-uring".into(),
            Served::Loop(_) => "fuse".into(),
            Served::Ublk(attachment) => attachment.data_path().to_string(),
        }
    }

    /// Threads that serve the kernel.
    pub fn queues(&self) -> u16 {
        match &self.0 {
            Served::Loop(attachment) => u16::try_from(attachment.threads()).unwrap_or(u16::MAX),
            Served::Ublk(attachment) => attachment.state().queues,
        }
    }

    /// Whether it outlives this process: reads wait for the next server instead of failing.
    pub fn is_kept(&self, store: &FdStore) -> bool {
        match &self.0 {
            Served::Loop(_) => store.keeps(),
            Served::Ublk(_) => true,
        }
    }

    /// Counters since the server started.
    pub fn stats(&self) -> Stats {
        match &self.0 {
            Served::Loop(attachment) => attachment.stats(),
            Served::Ublk(attachment) => attachment.stats(),
        }
    }

    /// Ends it: the block device is gone afterwards, and `store` keeps nothing of it. May be called again after an
    /// error.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is mounted: nothing has changed then, and it is still served. [`Error::StillOpen`] when
    /// somebody else keeps it open.
    pub fn detach(&mut self, store: &FdStore) -> Result<()> {
        match &mut self.0 {
            Served::Loop(attachment) => attachment.detach(store),
            Served::Ublk(attachment) => attachment.detach(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMER: &str = r#"{
        "id": "6f1b0b5e-7f2e-4c8e-9a3e-2d8f6a0f3c11", "loop_number": 3, "size": 8192,
        "negotiated": { "minor": 40, "flags": 549755813888 }
    }"#;

    #[test]
    fn a_state_says_whose_it_is() {
        let state: SavedState = serde_json::from_str(FORMER).unwrap();
        assert_eq!((state.transport(), state.size()), (Transport::Loop, 8192), "as it was written first");
        let written = serde_json::to_value(&state).unwrap();
        assert_eq!(written["transport"], "loop");
        assert_eq!(serde_json::from_value::<SavedState>(written.clone()).unwrap(), state);
        // What wrote it first reads it as well.
        let back: loop_transport::SavedState = serde_json::from_value(written).unwrap();
        assert_eq!(back.loop_number, 3);
    }

    #[test]
    fn a_state_of_ublk_travels() {
        let ublk = ublk::SavedState {
            id: u64::MAX,
            number: 7,
            size: 7 << 60,
            queues: 2,
            depth: 128,
            data_path: ublk::DataPath::UserCopy,
            io_bytes_max: 128 << 10,
            unprivileged: false,
        };
        let state = SavedState(Tagged::Ublk(ublk));
        let text = serde_json::to_string(&state).unwrap();
        assert!(text.contains(r#""transport":"ublk""#), "{text}");
        assert_eq!(serde_json::from_str::<SavedState>(&text).unwrap(), state);
        let broken = text.replace("\"size\"", "\"sice\"");
        assert!(serde_json::from_str::<SavedState>(&broken).is_err());
    }
}

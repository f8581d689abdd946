//! [`FdStore`]: where a worker puts descriptors that must survive it, and gets those that its predecessor put there.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use loam_sys::fds;
use sd_notify::NotifyState;

use super::{MESSAGE_MAX, SOCKET_VARIABLE, STORED_MAX, is_name};
use crate::{Error, Result};

/// Keeps descriptors beyond the end of this process: with a holder, with systemd, or not at all.
pub struct FdStore {
    keeper: Keeper,
    kept: Mutex<BTreeMap<String, OwnedFd>>,
}

enum Keeper {
    Holder(OwnedFd),
    Systemd,
    Nobody,
}

impl FdStore {
    /// A store that keeps nothing: what is served ends with this process.
    pub fn none() -> FdStore {
        FdStore { keeper: Keeper::Nobody, kept: Mutex::default() }
    }

    /// The store that the environment names: a holder's socket (`LOAM_HOLDER_FD`), else systemd's (when the unit has
    /// `FileDescriptorStoreMax=`), else none. Takes over what was kept.
    ///
    /// To be called once, early: it takes possession of inherited descriptors.
    ///
    /// # Errors
    /// [`Error::Store`] when the environment names descriptors that are not there, or the holder speaks in an unknown
    /// way.
    pub fn from_environment() -> Result<FdStore> {
        if let Some(value) = std::env::var_os(SOCKET_VARIABLE) {
            let Some((number, holder)) = value.to_str().and_then(parse_socket) else {
                return Err(Error::Store(format!("{SOCKET_VARIABLE} is not NUMBER:PID but {value:?}")));
            };
            if holder == std::os::unix::process::parent_id() {
                return FdStore::with_holder(loam_sys::process::take_inherited(number)?);
            }
            tracing::debug!(holder, "{SOCKET_VARIABLE} is meant for another process, or the holder has gone");
            return Ok(FdStore::none());
        }
        let mut kept = BTreeMap::new();
        let passed = sd_notify::listen_fds_with_names().map_err(|error| Error::Store(error.to_string()))?;
        for (number, name) in passed.take(STORED_MAX) {
            kept.insert(name, loam_sys::process::take_inherited(number)?);
        }
        // systemd sets FDSTORE to the number of descriptors that it would keep (since version 254).
        let keeps = std::env::var("FDSTORE").is_ok_and(|number| number != "0");
        let keeper = if keeps || !kept.is_empty() { Keeper::Systemd } else { Keeper::Nobody };
        Ok(FdStore { keeper, kept: Mutex::new(kept) })
    }

    /// The worker's side of a holder's socket. Takes over what is kept.
    fn with_holder(socket: OwnedFd) -> Result<FdStore> {
        fds::send(&socket, b"take", &[])?;
        let mut kept = BTreeMap::new();
        // One more message than there can be descriptors: the end.
        for _ in 0..=STORED_MAX {
            let mut buffer = [0; MESSAGE_MAX];
            let (length, mut descriptors) = fds::receive(&socket, &mut buffer)?;
            let text = std::str::from_utf8(buffer.get(..length).unwrap_or_default()).unwrap_or_default();
            match (text.strip_prefix("descriptor "), descriptors.pop()) {
                (Some(name), Some(descriptor)) if is_name(name) => {
                    kept.insert(name.to_owned(), descriptor);
                }
                (None, None) if text == "end" => {
                    return Ok(FdStore { keeper: Keeper::Holder(socket), kept: Mutex::new(kept) });
                }
                _ => break,
            }
        }
        Err(Error::Store("the holder gave an answer that is not known".into()))
    }

    /// Whether anybody keeps descriptors: whether a crash of this process is survived.
    pub fn keeps(&self) -> bool {
        !matches!(self.keeper, Keeper::Nobody)
    }

    /// The names of what was kept by an earlier process and not taken yet.
    pub fn names(&self) -> Vec<String> {
        self.kept().keys().cloned().collect()
    }

    /// Takes what an earlier process stored under `name`. It stays stored.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.kept().remove(name)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a duplicate of `descriptor`, in place of one of the same name.
    ///
    /// # Errors
    /// [`Error::System`] when the holder has gone.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        check_name(name)?;
        match &self.keeper {
            Keeper::Holder(socket) => {
                fds::send(socket, format!("store {name}").as_bytes(), &[descriptor])?;
            }
            Keeper::Systemd => {
                let state = [NotifyState::FdStore, NotifyState::FdName(name)];
                sd_notify::notify_with_fds(&state, &[descriptor])
                    .map_err(|error| loam_sys::Error::new("sd_notify(FDSTORE)", name, error))?;
            }
            Keeper::Nobody => {}
        }
        Ok(())
    }

    /// Gives up what is stored under `name`, and what was kept under it.
    ///
    /// # Errors
    /// [`Error::System`] when the holder has gone.
    pub fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        self.kept().remove(name);
        match &self.keeper {
            Keeper::Holder(socket) => fds::send(socket, format!("remove {name}").as_bytes(), &[])?,
            Keeper::Systemd => {
                sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
                    .map_err(|error| loam_sys::Error::new("sd_notify(FDSTOREREMOVE)", name, error))?;
            }
            Keeper::Nobody => {}
        }
        Ok(())
    }

    /// Says that the device is served: to the holder, which tells systemd, or to systemd.
    ///
    /// # Errors
    /// [`Error::System`] when the holder has gone.
    pub fn ready(&self) -> Result<()> {
        self.tell(b"ready", &NotifyState::Ready)
    }

    /// Says that the end of this process is near and wanted: it is not to be started again.
    ///
    /// # Errors
    /// [`Error::System`] when the holder has gone.
    pub fn stopping(&self) -> Result<()> {
        self.tell(b"stop", &NotifyState::Stopping)
    }

    fn tell(&self, message: &[u8], state: &NotifyState<'_>) -> Result<()> {
        match &self.keeper {
            Keeper::Holder(socket) => fds::send(socket, message, &[])?,
            // Does nothing where there is no systemd.
            Keeper::Systemd | Keeper::Nobody => sd_notify::notify(std::slice::from_ref(state))
                .map_err(|error| loam_sys::Error::new("sd_notify", "NOTIFY_SOCKET", error))?,
        }
        Ok(())
    }

    /// Waits until the holder has gone. The device is served on, but no longer survives this process. Never ends where
    /// there is no holder.
    ///
    /// # Errors
    /// [`Error::System`] when the socket cannot be watched.
    pub async fn lost(&self) -> Result<()> {
        let Keeper::Holder(socket) = &self.keeper else { return std::future::pending().await };
        let fail = |error| loam_sys::Error::new("epoll_ctl", "the holder's socket", error);
        let copy = std::os::unix::net::UnixStream::from(socket.try_clone().map_err(fail)?);
        // Shared with the original: its messages are a few bytes, which the holder always has room for.
        copy.set_nonblocking(true).map_err(fail)?;
        let socket = tokio::net::UnixStream::from_std(copy).map_err(fail)?;
        // The holder says nothing unasked: what can be read is the end.
        socket.readable().await.map_err(fail)?;
        Ok(())
    }
}

/// "NUMBER:PID".
fn parse_socket(text: &str) -> Option<(i32, u32)> {
    let (number, holder) = text.split_once(':')?;
    Some((number.parse().ok()?, holder.parse().ok()?))
}

fn check_name(name: &str) -> Result<()> {
    if is_name(name) { Ok(()) } else { Err(Error::Store(format!("{name:?} cannot be a descriptor's name"))) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_store_without_a_keeper_takes_everything_and_has_nothing() {
        let store = FdStore::none();
        store.store("fuse", std::io::stdin().as_fd()).unwrap();
        store.ready().unwrap();
        assert!(!store.keeps() && store.take("fuse").is_none());
        assert!(store.store("a b", std::io::stdin().as_fd()).is_err());
    }

    #[test]
    fn the_variable_has_two_numbers() {
        assert_eq!(parse_socket("7:4711"), Some((7, 4711)));
        for bad in ["7", "7:", ":1", "a:1", "7:-1", "7:1:2"] {
            assert_eq!(parse_socket(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_a_holder_keeps_is_taken_over() {
        let (worker, holder) = fds::message_pair().unwrap();
        fds::send(&holder, b"descriptor fuse", &[holder.as_fd()]).unwrap();
        fds::send(&holder, b"end", &[]).unwrap();
        let store = FdStore::with_holder(worker).unwrap();
        assert_eq!(store.names(), ["fuse"]);
        assert!(store.take("fuse").is_some() && store.take("fuse").is_none());
        store.remove("fuse").unwrap();
        let mut buffer = [0; 64];
        assert_eq!(fds::receive(&holder, &mut buffer).unwrap().0, b"take".len());
        let (length, _) = fds::receive(&holder, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"remove fuse");
    }

    #[test]
    fn a_holder_that_talks_nonsense_or_ends_is_an_error() {
        for messages in [&[&b"descriptor fuse"[..]][..], &[b"hello"], &[]] {
            let (worker, holder) = fds::message_pair().unwrap();
            for message in messages {
                fds::send(&holder, message, &[]).unwrap();
            }
            // Not closed before the worker has asked, or it could not ask.
            let thread = std::thread::spawn(move || FdStore::with_holder(worker).err());
            fds::receive(&holder, &mut [0; 64]).unwrap();
            drop(holder);
            assert!(thread.join().unwrap().is_some());
        }
    }
}

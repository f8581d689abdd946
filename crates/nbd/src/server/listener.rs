//! Where connections come from: a Unix socket, a TCP port, or sockets that systemd opened and passed on.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::uri::Address;
use rustix::net::{AddressFamily, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// The first descriptor that systemd passes, by sd_listen_fds(3).
const FIRST_PASSED: i32 = 3;
/// The most sockets that are taken from systemd.
const PASSED_MAX: i32 = 64;
/// What a Unix socket may hold that the client has not taken, in bytes. The kernel gives what it allows
/// (`net.core.wmem_max`): twice its default, usually.
const SEND_BUFFER: usize = 1 << 20;
/// How long a TCP connection is silent before the kernel asks whether its peer still lives, and how often it asks.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// A socket that clients connect to. Dropping it closes it, and removes the socket file that it made.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Unix { listener: UnixListener, file: Option<SocketFile> },
    Tcp(TcpListener),
}

/// One connection of either kind.
#[derive(Debug)]
pub(super) enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    /// Listens on `address`.
    ///
    /// # Errors
    /// Those of [`Listener::bind_unix`] and [`Listener::bind_tcp`].
    pub async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Listener::bind_unix(path),
            Address::Tcp { host, port } => Listener::bind_tcp(host, *port).await,
        }
    }

    /// Listens on the Unix socket `path`; one that begins with a NUL byte is a name in the abstract namespace. A socket
    /// file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `EADDRINUSE` when somebody does listen there or the path is something else than a socket, and what bind(2) says.
    pub fn bind_unix(path: &Path) -> io::Result<Self> {
        if let Some(name) = path.as_os_str().as_bytes().strip_prefix(b"\0") {
            let address = unix::SocketAddr::from_abstract_name(name)?;
            let bound = unix::UnixListener::bind_addr(&address);
            let listener = bound.map_err(|error| while_listening(&path.display(), error))?;
            listener.set_nonblocking(true)?;
            return Ok(Listener {
                kind: Kind::Unix { listener: UnixListener::from_std(listener)?, file: None },
            });
        }
        let bound = match unix::UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                fs::remove_file(path)?;
                unix::UnixListener::bind(path)
            }
            bound => bound,
        };
        let listener = bound.map_err(|error| while_listening(&path.display(), error))?;
        let file = SocketFile::of(path)?;
        listener.set_nonblocking(true)?;
        Ok(Listener { kind: Kind::Unix { listener: UnixListener::from_std(listener)?, file: Some(file) } })
    }

    /// Listens on `port` (0: any that is free) of `host`, a name or an address; an empty host means all.
    ///
    /// # Errors
    /// When the name is not known, or none of its addresses can be listened on.
    pub async fn bind_tcp(host: &str, port: u16) -> io::Result<Self> {
        let bound = match host {
            "" => match TcpListener::bind(("::", port)).await {
                Ok(listener) => Ok(listener),
                // A host without IPv6.
                Err(_) => TcpListener::bind(("0.0.0.0", port)).await,
            },
            host => TcpListener::bind((host, port)).await,
        };
        let listener = bound.map_err(|error| while_listening(&format_args!("{host}:{port}"), error))?;
        Ok(Listener { kind: Kind::Tcp(listener) })
    }

    /// The listening sockets that systemd passed (`LISTEN_FDS`, if `LISTEN_PID` is this process), none if it did not.
    /// To be asked once in a process: the descriptors are taken over.
    ///
    /// # Errors
    /// When the variables make no sense, what was passed is no listening stream socket, or this is asked again.
    pub fn from_systemd() -> io::Result<Vec<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let variable = |name| std::env::var(name).ok();
        let count = passed(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS").as_deref())?;
        if count > 0 && TAKEN.swap(true, Ordering::SeqCst) {
            return Err(io::Error::other("the sockets of LISTEN_FDS were taken before"));
        }
        (FIRST_PASSED..FIRST_PASSED + count)
            .map(|number| {
                let owned = loam_sys::process::take_inherited(number).map_err(io::Error::other)?;
                Listener::from_descriptor(owned)
            })
            .collect()
    }

    /// Takes over a listening Unix or TCP socket.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        let listens = sockopt::socket_acceptconn(&descriptor)?;
        let family = sockopt::socket_domain(&descriptor)?;
        if !listens {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket does not listen"));
        }
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        let kind = match family {
            AddressFamily::UNIX => {
                Kind::Unix { listener: UnixListener::from_std(descriptor.into())?, file: None }
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                Kind::Tcp(TcpListener::from_std(descriptor.into())?)
            }
            other => {
                let what = format!("a socket of address family {} is neither Unix nor TCP", other.as_raw());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        };
        Ok(Listener { kind })
    }

    /// The path of the Unix socket, if it is one that has a path.
    pub fn unix_path(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::Unix { listener, .. } => listener.local_addr().ok()?.as_pathname().map(Path::to_owned),
            Kind::Tcp(_) => None,
        }
    }

    /// The address and port that are listened on, if it is TCP.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Unix { .. } => None,
            Kind::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match &self.kind {
            Kind::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                sockopt::set_socket_send_buffer_size(stream.as_fd(), SEND_BUFFER)?;
                Ok(Accepted::Unix(stream))
            }
            Kind::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(stream.as_fd(), true)?;
                sockopt::set_tcp_keepidle(stream.as_fd(), KEEP_ALIVE)?;
                sockopt::set_tcp_keepintvl(stream.as_fd(), KEEP_ALIVE_INTERVAL)?;
                Ok(Accepted::Tcp(stream))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix { file: Some(file), .. } = &self.kind {
            file.remove();
        }
    }
}

/// A socket file that we made, to be removed unless somebody put another in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        // The working directory may change before the file is to be removed.
        let path = std::path::absolute(path)?;
        Ok(SocketFile { path, device: found.dev(), inode: found.ino() })
    }

    fn remove(&self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// A socket file that nobody listens on.
fn is_stale(path: &Path) -> bool {
    matches!(unix::UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
        && fs::symlink_metadata(path)
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()))
}

fn while_listening(address: &dyn std::fmt::Display, error: io::Error) -> io::Error {
    let hint =
        if error.kind() == io::ErrorKind::AddrInUse { " (is another server running there?)" } else { "" };
    io::Error::new(error.kind(), format!("cannot listen on {address}: {error}{hint}"))
}

/// How many sockets the variables of sd_listen_fds(3) announce to this process.
fn passed(pid: Option<&str>, count: Option<&str>) -> io::Result<i32> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(0) };
    // For another process: the variables were inherited, the sockets were not.
    if pid.parse() != Ok(std::process::id()) {
        return Ok(0);
    }
    match count.parse() {
        Ok(count @ 0..=PASSED_MAX) => Ok(count),
        _ => {
            let what = format!("LISTEN_FDS={count}: expected a number from 0 to {PASSED_MAX}");
            Err(io::Error::new(io::ErrorKind::InvalidInput, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_taken_only_when_they_are_for_this_process() {
        let own = std::process::id().to_string();
        assert_eq!(passed(Some(&own), Some("2")).expect("two"), 2);
        assert_eq!(passed(Some("1"), Some("2")).expect("another's"), 0);
        assert_eq!(passed(None, Some("2")).expect("no process named"), 0);
        assert_eq!(passed(Some(&own), None).expect("no sockets"), 0);
        for nonsense in ["-1", "65", "many", ""] {
            assert!(passed(Some(&own), Some(nonsense)).is_err(), "{nonsense:?}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("s");
        drop(unix::UnixListener::bind(&path).expect("bind"));
        let listener = Listener::bind_unix(&path).expect("the file is stale");
        assert!(Listener::bind_unix(&path).is_err(), "somebody listens");
        drop(listener);
        assert!(!path.exists(), "removed at the end");
        fs::write(&path, "precious").expect("a file");
        assert!(Listener::bind_unix(&path).is_err(), "a file is no stale socket");
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_socket_of_somebody_else_stays() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("s");
        let listener = Listener::bind_unix(&path).expect("bind");
        fs::remove_file(&path).expect("remove");
        let _other = unix::UnixListener::bind(&path).expect("another's");
        drop(listener);
        assert!(path.exists());
    }
}

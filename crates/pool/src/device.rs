//! `DEVICE` of the command line: everything that can be served, copied, asked for its extents.
//!
//! | form | what |
//! |---|---|
//! | `file:PATH`, a plain path, `memory:SIZE`, `null:SIZE`, `pattern:SIZE` | see [`loam_block::DeviceSpec`] |
//! | `nbd://`, `nbds://`, `nbd+unix://`, `nbds+unix://` | an export of an NBD server, see [`loam_nbd::uri`] |
//! | `pool:` | the virtual device of the pool that was chosen, read-only |
//! | `index:FILE` | the virtual device of one image, read-only, without a pool; see [`IndexDevice`] |
//!
//! A file that lies in a mounted pool is a plain path: reading it fetches what it needs, as for every other program.

mod index;
mod pool;

use std::any::Any;
use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use loam_block::{BlockDevice, FileDevice, FileOptions};
use loam_nbd::client::{ClientOptions, ConnectError, NbdDevice};
use loam_nbd::uri::{Address, Uri};

use crate::directory::PoolDirectory;
use crate::error::{Context, Error, Result};

pub use index::IndexDevice;

/// What a device string names. Prints as a string that parses to the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceSpec {
    /// A file, memory, zeroes or a pattern.
    Simple(loam_block::DeviceSpec),
    /// An export of an NBD server.
    Nbd(Box<Uri>),
    /// The virtual device of the pool.
    Pool,
    /// The virtual device of one image.
    Index(Box<IndexDevice>),
}

/// How a device is opened.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Whose virtual device `pool:` is.
    pub pool: Option<PoolDirectory>,
    /// How NBD servers are talked to.
    pub client: ClientOptions,
}

/// A device that is open. It is to be kept for as long as `device` is used: dropping it may remove a temporary cache, or
/// let the daemon of a pool start.
pub struct Opened {
    /// The device.
    pub device: Arc<dyn BlockDevice>,
    /// Which storage it stands for.
    pub identity: Identity,
    /// The connection, where it is an NBD server's.
    pub nbd: Option<Arc<NbdDevice>>,
    /// It was made now: nothing but zeroes are in it.
    pub created: bool,
    _kept: Option<Box<dyn Any + Send + Sync>>,
}

/// Which storage a device stands for, as far as can be told: a copy of a device onto itself is refused by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A file: device and inode, and its path without symbolic links.
    File(u64, u64, PathBuf),
    /// A block device: its number and path.
    Block(u64, PathBuf),
    /// An export: server and name.
    Export(String),
    /// Nobody else has it.
    Own,
}

impl Identity {
    /// Whether both are one storage for certain.
    pub fn is_same(&self, other: &Identity) -> bool {
        match (self, other) {
            (Identity::File(device, inode, _), Identity::File(other_device, other_inode, _)) => {
                (device, inode) == (other_device, other_inode)
            }
            (Identity::Block(number, _), Identity::Block(other, _)) => number == other,
            (Identity::Export(name), Identity::Export(other)) => name == other,
            _ => false,
        }
    }

    /// A name by which it is known again; none where nobody else has it.
    pub fn name(&self) -> Option<String> {
        match self {
            Identity::File(_, _, path) | Identity::Block(_, path) => Some(path.display().to_string()),
            Identity::Export(name) => Some(name.clone()),
            Identity::Own => None,
        }
    }
}

impl Opened {
    fn new(device: Arc<dyn BlockDevice>) -> Self {
        Opened { device, identity: Identity::Own, nbd: None, created: false, _kept: None }
    }

    fn keeping(self, kept: impl Any + Send + Sync) -> Self {
        Opened { _kept: Some(Box::new(kept)), ..self }
    }
}

impl DeviceSpec {
    /// Opens the device.
    ///
    /// # Errors
    /// What keeps it from being opened; [`Error::NoPool`] for `pool:` where there is none.
    pub async fn open(&self, options: &OpenOptions) -> Result<Opened> {
        match self {
            DeviceSpec::Simple(simple) => open_simple(simple, options),
            DeviceSpec::Nbd(uri) => open_nbd(uri, options.client.clone()).await,
            DeviceSpec::Pool => {
                let directory = options.pool.as_ref();
                let directory = directory.ok_or_else(|| Error::invalid("pool:", "no pool was chosen"))?;
                pool::open(directory, options).await
            }
            DeviceSpec::Index(index) => index.open().await,
        }
    }

    /// As [`DeviceSpec::open`]; a file that is not there is made, sparse, with `size` bytes.
    ///
    /// # Errors
    /// Those of [`DeviceSpec::open`], and what keeps the file from being made.
    pub async fn open_or_create(&self, options: &OpenOptions, size: u64) -> Result<Opened> {
        match self {
            DeviceSpec::Simple(loam_block::DeviceSpec::File(path)) if !path.exists() => {
                let device = FileDevice::create(path, size, FileOptions::default())
                    .step(|| format!("making {}", path.display()))?;
                Ok(Opened { created: true, identity: identity_of(path)?, ..Opened::new(Arc::new(device)) })
            }
            _ => self.open(options).await,
        }
    }

    /// Whether bytes go over a network or to another process.
    pub fn is_nbd(&self) -> bool {
        matches!(self, DeviceSpec::Nbd(_))
    }
}

fn open_simple(simple: &loam_block::DeviceSpec, options: &OpenOptions) -> Result<Opened> {
    let how = FileOptions { read_only: options.read_only, ..FileOptions::default() };
    let device = simple.open(how).map_err(|error| {
        let missing = matches!(simple, loam_block::DeviceSpec::File(path) if !path.exists());
        let failed = Error::step(simple.to_string(), error);
        match simple {
            _ if missing && !options.read_only => {
                failed.with_hint("loam copy --create makes a file that is not there")
            }
            loam_block::DeviceSpec::File(path) if !options.read_only && is_unwritable(path) => {
                failed.with_hint("it cannot be written; loam serve --readonly serves it for reading")
            }
            _ => failed,
        }
    })?;
    let identity = match simple {
        loam_block::DeviceSpec::File(path) => identity_of(path)?,
        _ => Identity::Own,
    };
    Ok(Opened { identity, ..Opened::new(device) })
}

fn is_unwritable(path: &Path) -> bool {
    path.exists() && fs::OpenOptions::new().write(true).open(path).is_err()
}

fn identity_of(path: &Path) -> Result<Identity> {
    let meta = fs::metadata(path).step(|| format!("looking at {}", path.display()))?;
    Ok(match meta.file_type().is_block_device() {
        true => Identity::Block(meta.rdev(), canonical(path)),
        false => Identity::File(meta.dev(), meta.ino(), canonical(path)),
    })
}

/// Connects to an export.
async fn open_nbd(uri: &Uri, client: ClientOptions) -> Result<Opened> {
    if !uri.ignored.is_empty() {
        tracing::warn!("{uri}: parameters that mean nothing to loam: {}", uri.ignored.join(", "));
    }
    let device = Arc::new(NbdDevice::connect(uri, client).await.map_err(not_connected)?);
    let server = match &uri.address {
        Address::Unix(path) => format!("unix:{}", canonical(path).display()),
        Address::Tcp { host, port } => format!("tcp:{host}:{port}"),
    };
    let identity = Identity::Export(format!("{server}/{}", uri.export));
    Ok(Opened { identity, nbd: Some(device.clone()), ..Opened::new(device) })
}

/// Why a server cannot be used, and what to do. The URI is in the reason.
pub fn not_connected(error: ConnectError) -> Error {
    let hint = match &error {
        ConnectError::Io { .. } | ConnectError::TimedOut { .. } => {
            "is the server running, and reachable from here?"
        }
        _ => return Error::step("NBD", error),
    };
    Error::step("NBD", error).with_hint(hint)
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// Whether a text is an NBD URI, well formed or not.
pub(crate) fn is_nbd_uri(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        let scheme = scheme.to_ascii_lowercase();
        scheme.starts_with("nbd") && matches!(scheme.split('+').next(), Some("nbd" | "nbds"))
    })
}

/// Parses an NBD URI; the path of its socket and of its certificates become absolute.
pub(crate) fn parse_nbd_uri(text: &str) -> Result<Uri> {
    let mut uri: Uri =
        text.parse().map_err(|error| Error::invalid(format!("`{text}`"), format!("{error}")))?;
    if let Address::Unix(path) = &mut uri.address {
        *path = std::path::absolute(&*path).step(|| format!("path {}", path.display()))?;
    }
    Ok(uri)
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if is_nbd_uri(text) {
            return parse_nbd_uri(text).map(|uri| DeviceSpec::Nbd(Box::new(uri)));
        }
        if let Some(rest) = text.strip_prefix("pool:") {
            return match rest {
                "" => Ok(DeviceSpec::Pool),
                _ => Err(Error::invalid(
                    format!("`{text}`"),
                    "nothing follows pool: (--pool DIR chooses the pool)",
                )),
            };
        }
        if let Some(rest) = text.strip_prefix("index:") {
            return rest.parse().map(|index| DeviceSpec::Index(Box::new(index)));
        }
        match text.parse::<loam_block::DeviceSpec>() {
            Ok(simple) => Ok(DeviceSpec::Simple(simple)),
            Err(loam_block::ParseDeviceError::UnknownKind { kind, text }) => {
                let why = format!(
                    "`{kind}:` is not a kind of device that loam knows (file, memory, null, pattern, pool, index, \
                     nbd://, nbds://, nbd+unix://, nbds+unix://); for a file of this name write file:{text}"
                );
                Err(Error::invalid(text, why))
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                Err(Error::invalid("device", format!("{error}{}", cause.unwrap_or_default())))
            }
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Simple(simple) => simple.fmt(f),
            DeviceSpec::Nbd(uri) => uri.fmt(f),
            DeviceSpec::Pool => f.write_str("pool:"),
            DeviceSpec::Index(index) => write!(f, "index:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_parses_and_prints_as_itself() {
        for text in [
            "file:/a/b",
            "memory:4KiB",
            "null:4EiB",
            "pattern:0",
            "pool:",
            "index:file:/srv/root.tar.loam",
            "index:http://host/root.tar.loam?key=1&source=tar:http://other/root.tar%3Fa",
        ] {
            let spec: DeviceSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
            assert_eq!(spec.to_string().parse::<DeviceSpec>().unwrap(), spec, "{text}");
        }
        for text in
            ["nbd://host/export", "nbd://[::1]:10810", "nbds://host/", "nbd+unix:///x?socket=/run/d.sock"]
        {
            let spec: DeviceSpec = text.parse().unwrap();
            assert!(spec.is_nbd());
            assert_eq!(spec.to_string().parse::<DeviceSpec>().unwrap(), spec, "{text}");
        }
    }

    #[test]
    fn refusals_say_what_to_write() {
        let message = |text: &str| text.parse::<DeviceSpec>().expect_err(text).chain();
        assert!(message("ramdisk:4K").contains("file:ramdisk:4K"));
        assert!(message("ramdisk:4K").contains("index"));
        assert!(message("pool:/x").contains("--pool"));
        assert!(message("memory:x").contains("size"));
        assert!(message("index:").contains("path"));
        assert!(message("nbd+unix:///x").contains("socket"));
        assert!(message("").contains("names no device"));
    }

    #[tokio::test]
    async fn one_file_by_two_names_is_one_storage() {
        let temporary = tempfile::tempdir().unwrap();
        let (path, link) = (temporary.path().join("a"), temporary.path().join("b"));
        let spec = |path: &Path| format!("file:{}", path.display()).parse::<DeviceSpec>().unwrap();
        let options = OpenOptions::default();
        assert!(spec(&path).open(&options).await.err().unwrap().hint().unwrap().contains("--create"));
        let made = spec(&path).open_or_create(&options, 8192).await.unwrap();
        assert!(made.created);
        assert_eq!(made.device.geometry().size, 8192);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let other = spec(&link).open_or_create(&options, 1).await.unwrap();
        assert!(!other.created && other.identity.is_same(&made.identity));
        let memory = "memory:4K".parse::<DeviceSpec>().unwrap();
        let (one, two) = (memory.open(&options).await.unwrap(), memory.open(&options).await.unwrap());
        assert!(!one.identity.is_same(&two.identity));
    }
}

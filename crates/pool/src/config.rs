//! `pool.toml`: what was decided when the pool was made. Written once, atomically; it carries the pool's format
//! version, so that an older loam refuses a newer pool instead of misreading it.

use std::path::PathBuf;

use loam_attach::transport::Transport;
use loam_seed::Layout;
use serde::{Deserialize, Serialize};

use crate::directory::{PoolDirectory, write_atomic};
use crate::error::{Context, Error, Result};

/// The pool format that this build writes and the newest that it reads.
pub(crate) const POOL_FORMAT: u32 = 1;

/// What the pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Many images and containers.
    Pool,
    /// One image, mounted at one place (`loam mount`); goes away with the mount.
    Mount,
}

/// Where the local device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalDevice {
    /// A file, attached through a loop device.
    File(PathBuf),
    /// A block device, used as it is.
    Block(PathBuf),
}

/// How the kernel gets the virtual device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportChoice {
    /// The fastest that the kernel has.
    #[default]
    Auto,
    /// A ublk device.
    Ublk,
    /// A FUSE file under a loop device.
    Loop,
}

impl TransportChoice {
    /// Whether that transport is what was asked for.
    pub(crate) fn takes(self, transport: Transport) -> bool {
        match self {
            TransportChoice::Auto => true,
            TransportChoice::Ublk => transport == Transport::Ublk,
            TransportChoice::Loop => transport == Transport::Loop,
        }
    }
}

/// How requests come from FUSE under the loop transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineChoice {
    /// Reads and writes of /dev/fuse: survives the daemon's death.
    #[default]
    Classic,
    /// FUSE over io_uring, where the kernel has it on.
    IoUring,
}

/// What an address without content reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmappedChoice {
    /// EIO.
    #[default]
    Error,
    /// Zeroes, for benchmarks.
    Zeros,
}

/// How [`Layout`] is written.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Layout", rename_all = "kebab-case")]
pub(crate) enum LayoutName {
    Pair,
    Single,
    MegaExtent,
}

/// The pool's configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The pool format of the loam that made it.
    pub format: u32,
    /// What the pool is for.
    pub purpose: Purpose,
    /// How the seed was formatted.
    #[serde(with = "LayoutName")]
    pub layout: Layout,
    /// Bytes of the virtual region.
    pub virtual_size: u64,
    /// Bytes of the local device when it was made.
    pub local_size: u64,
    /// Where the local device is.
    pub local: LocalDevice,
    /// From which all UUIDs of the filesystem derive: 32 bytes in hexadecimal.
    pub identity: String,
    /// The same for the virtual device alone, where its local device was made to stand on a seed that others stand on too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_identity: Option<String>,
    /// Most bytes that the chunk cache may hold.
    pub cache_limit: u64,
    /// Purpose `mount`: the mount point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_point: Option<PathBuf>,
    /// Purpose `mount`: the source as the user wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Formatted with simple quotas on. Whether they are on now, the filesystem says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simple_quota: bool,
}

/// Read first, so that a newer format is named as such whatever else has changed.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Config {
    /// Reads a pool's configuration.
    ///
    /// # Errors
    /// [`Error::NoPool`], [`Error::NewerFormat`], or [`Error::BadFile`] with the line that does not parse.
    pub fn load(directory: &PoolDirectory) -> Result<Self> {
        let path = directory.config();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoPool(directory.root().to_owned()));
            }
            Err(error) => return Err(Error::step(format!("reading {}", path.display()), error)),
        };
        let bad = |error: toml::de::Error| Error::BadFile { path: path.clone(), why: error.to_string() };
        let FormatOnly { format } = toml::from_str(&text).map_err(bad)?;
        if format > POOL_FORMAT {
            return Err(Error::NewerFormat { path, found: format, known: POOL_FORMAT });
        }
        toml::from_str(&text).map_err(bad)
    }

    /// Writes it, atomically. The file's presence is what makes a directory a pool, so this is the last step of
    /// making one.
    pub(crate) fn save(&self, directory: &PoolDirectory) -> Result<()> {
        let text = toml::to_string_pretty(self).step(|| "encoding pool.toml".to_owned())?;
        write_atomic(&directory.config(), text.as_bytes())
    }

    /// The identity as bytes.
    pub(crate) fn identity_bytes(&self, directory: &PoolDirectory) -> Result<[u8; 32]> {
        parse_identity(directory, &self.identity)
    }

    /// The identity of the virtual device as bytes, where it has one of its own.
    pub(crate) fn seed_identity_bytes(&self, directory: &PoolDirectory) -> Result<Option<[u8; 32]>> {
        self.seed_identity.as_deref().map(|text| parse_identity(directory, text)).transpose()
    }
}

/// An identity as it stands in the configuration.
pub(crate) fn identity_text(identity: [u8; 32]) -> String {
    blake3::Hash::from_bytes(identity).to_hex().to_string()
}

fn parse_identity(directory: &PoolDirectory, text: &str) -> Result<[u8; 32]> {
    let bad =
        || Error::BadFile { path: directory.config(), why: "identity is not 64 hexadecimal digits".into() };
    let mut bytes = [0; 32];
    let text = text.as_bytes();
    if text.len() != 64 {
        return Err(bad());
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config() -> Config {
        Config {
            format: POOL_FORMAT,
            purpose: Purpose::Mount,
            layout: Layout::MegaExtent,
            virtual_size: 4 << 60,
            local_size: 64 << 30,
            local: LocalDevice::Block("/dev/vdb".into()),
            identity: "0f".repeat(32),
            seed_identity: Some("1e".repeat(32)),
            cache_limit: 1 << 30,
            mount_point: Some("/mnt/a b".into()),
            source: None,
            simple_quota: true,
        }
    }

    fn written(text: &str) -> (tempfile::TempDir, PoolDirectory) {
        let temporary = tempfile::tempdir().unwrap();
        let directory = PoolDirectory::new(temporary.path()).unwrap();
        std::fs::write(directory.config(), text).unwrap();
        (temporary, directory)
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let (_temporary, directory) = written("");
        config().save(&directory).unwrap();
        let loaded = Config::load(&directory).unwrap();
        assert_eq!(loaded, config());
        assert_eq!(loaded.identity_bytes(&directory).unwrap(), [15; 32]);
        assert_eq!(loaded.seed_identity_bytes(&directory).unwrap(), Some([30; 32]));
    }

    #[test]
    fn a_newer_format_is_named_whatever_else_is_new() {
        let (_temporary, directory) = written("format = 2\n[of]\nanother = \"kind\"\n");
        let error = Config::load(&directory).unwrap_err();
        assert!(matches!(error, Error::NewerFormat { found: 2, known: POOL_FORMAT, .. }), "{error}");
    }

    #[test]
    fn a_file_that_does_not_parse_and_a_pool_that_is_not_there() {
        for text in ["", "format = -1", "format = 1\nsurprise = 1", "\0"] {
            let (_temporary, directory) = written(text);
            assert!(matches!(Config::load(&directory), Err(Error::BadFile { .. })), "{text:?}");
        }
        let nowhere = PoolDirectory::new(Path::new("/nonexistent")).unwrap();
        assert!(matches!(Config::load(&nowhere), Err(Error::NoPool(_))));
    }

    #[test]
    fn an_identity_is_64_digits() {
        let (_temporary, directory) = written("");
        for bad in ["", "0f", &"0g".repeat(32), &"\u{e4}".repeat(32)] {
            let config = Config { identity: bad.to_owned(), ..config() };
            assert!(config.identity_bytes(&directory).is_err(), "{bad:?}");
        }
    }
}

//! Where things lie in a pool's directory, and the atomic way in which its small files are written.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// A pool's directory and the names in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolDirectory {
    root: PathBuf,
}

impl PoolDirectory {
    /// Names a directory; it need not exist yet. The path is made absolute, so that a daemon may change directory.
    ///
    /// # Errors
    /// When the current directory is needed and gone.
    pub fn new(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).step(|| format!("path {}", root.display()))?;
        Ok(PoolDirectory { root })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether a pool has been made here.
    pub fn exists(&self) -> bool {
        self.config().exists()
    }

    /// `pool.toml`: format version and all that was decided when the pool was made.
    pub fn config(&self) -> PathBuf {
        self.root.join("pool.toml")
    }

    /// The sparse image of the virtual device below the virtual region.
    pub fn virtual_image(&self) -> PathBuf {
        self.root.join("virtual.img")
    }

    /// The local device, where it is a file of the pool's own.
    pub fn local_image(&self) -> PathBuf {
        self.root.join("local.img")
    }

    /// The durable map of the address space.
    pub fn map(&self) -> PathBuf {
        self.root.join("map")
    }

    /// The chunk cache.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Indexes, named by their digest.
    pub fn indexes(&self) -> PathBuf {
        self.root.join("indexes")
    }

    /// Held by the daemon with flock.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Everything that is true only while the pool is up.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The daemon's control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.run().join("control.sock")
    }

    /// Where the daemon serves its virtual device by NBD.
    pub fn nbd_socket(&self) -> PathBuf {
        self.run().join("nbd.sock")
    }

    /// What is attached and mounted: enough to resume it or to remove it.
    pub fn attach_state(&self) -> PathBuf {
        self.run().join("attach.json")
    }

    /// The name of a device that is being attached, while `attach_state` does not have it yet.
    pub fn attaching(&self) -> PathBuf {
        self.run().join("attaching")
    }

    /// Held by who mounts or unmounts the pool's filesystem.
    pub fn mount_lock(&self) -> PathBuf {
        self.run().join("mount.lock")
    }

    /// Why the daemon could not start, in one line.
    pub fn failure(&self) -> PathBuf {
        self.run().join("failure")
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.run().join("daemon.log")
    }

    /// OCI bundles of running containers.
    pub fn bundles(&self) -> PathBuf {
        self.run().join("bundles")
    }

    /// Where the pool is mounted unless told otherwise.
    pub fn default_mount(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// Pools of single mounted images live below the pool's directory, one for each.
    pub fn mounts(&self) -> PathBuf {
        self.root.join("mounts")
    }
}

/// Replaces `path` by `bytes` so that a crash leaves the old file or the new one, whole.
///
/// # Errors
/// Names the file and the operating system's reason.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let what = || format!("writing {}", path.display());
    let parent =
        path.parent().ok_or_else(|| Error::invalid(path.display().to_string(), "has no directory"))?;
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).step(what)?;
    file.write_all(bytes).step(what)?;
    file.sync_all().step(what)?;
    fs::rename(&temporary, path).step(what)?;
    sync_directory(parent)
}

/// Makes renames and new names in a directory survive power loss.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).step(|| format!("syncing {}", path.display()))
}

/// Removes a file that may be gone already.
pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::step(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Removes a directory and all in it; it may be gone already.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::step(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

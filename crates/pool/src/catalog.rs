//! Which images and containers a pool has. The record lives in the pool's own filesystem, so that it and the
//! subvolumes commit together:
//!
//! ```text
//! mnt/.loam/              0700
//!   building/NAME         a subvolume that is not finished; removed when the pool comes up
//!   images/NAME           an empty file whose xattr `trusted.loam` is the image's record (JSON)
//!   containers/NAME       the same for a container
//! mnt/images/NAME         the image: a read-only subvolume
//! mnt/containers/NAME     the container: a writable snapshot of one
//! ```
//!
//! A name exists when both its record and its subvolume do. The record is put in place first and the subvolume is
//! renamed into place last; both are metadata only, so a crash leaves both, or a half that [`Catalog::mend`] removes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use loam_sys::btrfs::{self, Key};
use rustix::fs::XattrFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::directory::remove_if_there;
use crate::error::{Context, Error, Result};
use crate::protocol::Lazy;
use crate::quota;

/// The xattr that holds a record.
const RECORD: &str = "trusted.loam";

/// The longest record; btrfs stores an xattr in one leaf.
const MAX_RECORD_BYTES: usize = 8 << 10;

/// The longest name of an image or container.
const MAX_NAME_BYTES: usize = 128;

/// What is known of an image besides its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) source: String,
    pub(crate) index: String,
    pub(crate) content: Option<u32>,
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) lazy: Lazy,
}

/// What is known of a container besides its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) image: String,
    pub(crate) index: String,
    /// The subvolume's generation when it was made: what is newer was written by the container.
    pub(crate) made_generation: u64,
    /// The process whose end is the container's end.
    pub(crate) ephemeral_owner: Option<u32>,
}

/// The two kinds of things that have names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Image,
    Container,
}

impl Kind {
    fn directory(self) -> &'static str {
        match self {
            Kind::Image => "images",
            Kind::Container => "containers",
        }
    }

    /// "image", "container".
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Image => "image",
            Kind::Container => "container",
        }
    }
}

/// The catalogue of a mounted pool.
#[derive(Debug, Clone)]
pub(crate) struct Catalog {
    mount: PathBuf,
    virtual_size: u64,
}

impl Catalog {
    /// Opens the catalogue below a mount point, making its directories where they lack.
    pub(crate) fn open(mount: &Path, virtual_size: u64) -> Result<Self> {
        let catalog = Catalog { mount: mount.to_owned(), virtual_size };
        let private = catalog.private();
        for directory in [
            private.clone(),
            private.join("building"),
            private.join("images"),
            private.join("containers"),
            mount.join("images"),
            mount.join("containers"),
        ] {
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::step(format!("making {}", directory.display()), error));
                }
                _ => {}
            }
        }
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&private, fs::Permissions::from_mode(0o700))
            .step(|| format!("closing {}", private.display()))?;
        Ok(catalog)
    }

    /// Where the pool is mounted.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// Bytes of the virtual region.
    pub(crate) fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn private(&self) -> PathBuf {
        self.mount.join(".loam")
    }

    /// Where a subvolume is while it is being made.
    pub(crate) fn building(&self, name: &str) -> PathBuf {
        self.private().join("building").join(name)
    }

    /// The subvolume of a name.
    pub(crate) fn subvolume(&self, kind: Kind, name: &str) -> PathBuf {
        self.mount.join(kind.directory()).join(name)
    }

    fn record(&self, kind: Kind, name: &str) -> PathBuf {
        self.private().join(kind.directory()).join(name)
    }

    /// Whether the name is taken, by either kind: `rm` and `show` take one name for both.
    pub(crate) fn taken(&self, name: &str) -> Option<Kind> {
        [Kind::Image, Kind::Container].into_iter().find(|&kind| self.exists(kind, name))
    }

    fn exists(&self, kind: Kind, name: &str) -> bool {
        check_name(name).is_ok() && self.record(kind, name).exists() && self.subvolume(kind, name).exists()
    }

    /// Refuses a name that is taken or cannot be one.
    pub(crate) fn check_free(&self, name: &str) -> Result<()> {
        check_name(name)?;
        match self.taken(name) {
            Some(Kind::Image) => Err(Error::Exists { kind: "an image", name: name.to_owned() }),
            Some(Kind::Container) => Err(Error::Exists { kind: "a container", name: name.to_owned() }),
            None => Ok(()),
        }
    }

    /// Puts a finished subvolume from [`Catalog::building`] into place under its name.
    pub(crate) fn publish<R: Serialize>(&self, kind: Kind, name: &str, record: &R) -> Result<()> {
        let what = || format!("recording {} {name}", kind.name());
        let bytes = serde_json::to_vec(record).step(what)?;
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(Error::invalid(name, format!("its record would take {} bytes", bytes.len())));
        }
        let temporary = self.private().join(format!("record.{name}"));
        File::create(&temporary).step(what)?;
        rustix::fs::setxattr(&temporary, RECORD, &bytes, XattrFlags::empty()).step(what)?;
        fs::rename(&temporary, self.record(kind, name)).step(what)?;
        let renamed = fs::rename(self.building(name), self.subvolume(kind, name)).step(what);
        if renamed.is_err() {
            remove_if_there(&self.record(kind, name))?;
        }
        renamed?;
        match kind {
            // Only now: the kernel does not rename a read-only subvolume.
            Kind::Image => self.make_read_only(name),
            Kind::Container => Ok(()),
        }
    }

    fn make_read_only(&self, image: &str) -> Result<()> {
        let path = self.subvolume(Kind::Image, image);
        let what = || format!("making {} read-only", path.display());
        btrfs::set_read_only(File::open(&path).step(what)?, true).step(what)
    }

    /// Removes a name at once, then its subvolume.
    pub(crate) fn remove(&self, kind: Kind, name: &str) -> Result<()> {
        remove_if_there(&self.record(kind, name))?;
        remove_subvolume(&self.subvolume(kind, name))
    }

    /// The record of a name, if there is one.
    pub(crate) fn read<R: DeserializeOwned>(&self, kind: Kind, name: &str) -> Result<R> {
        let missing = || Error::NotFound { kind: kind.name(), name: name.to_owned() };
        if !self.exists(kind, name) {
            return Err(missing());
        }
        let path = self.record(kind, name);
        let mut buffer = vec![0; MAX_RECORD_BYTES];
        let length = rustix::fs::getxattr(&path, RECORD, &mut buffer[..])
            .step(|| format!("reading the record of {} {name}", kind.name()))?;
        serde_json::from_slice(&buffer[..length])
            .map_err(|error| Error::BadFile { path, why: format!("its record does not parse: {error}") })
    }

    /// All names of a kind, sorted.
    pub(crate) fn names(&self, kind: Kind) -> Result<Vec<String>> {
        let mut names = self.recorded(kind)?;
        names.retain(|name| self.exists(kind, name));
        Ok(names)
    }

    fn recorded(&self, kind: Kind) -> Result<Vec<String>> {
        let directory = self.private().join(kind.directory());
        let what = || format!("listing {}", directory.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).step(what)? {
            if let Ok(name) = entry.step(what)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Containers that were made from an image.
    pub(crate) fn containers_of(&self, image: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for name in self.names(Kind::Container)? {
            if self.read::<ContainerRecord>(Kind::Container, &name)?.image == image {
                found.push(name);
            }
        }
        Ok(found)
    }

    /// Removes what a crash left half-done: unfinished subvolumes, records without a subvolume, subvolumes without a
    /// record, and containers whose owner is gone. Returns what was removed, for the log.
    pub(crate) fn mend(&self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        let building = self.private().join("building");
        for path in children(&building)? {
            remove_subvolume(&path)?;
            removed.push(format!("unfinished {}", path.display()));
        }
        for kind in [Kind::Image, Kind::Container] {
            for name in self.recorded(kind)? {
                if !self.subvolume(kind, &name).exists() {
                    remove_if_there(&self.record(kind, &name))?;
                    removed.push(format!("the record of {} {name}, which has no subvolume", kind.name()));
                }
            }
            for path in children(&self.mount.join(kind.directory()))? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !self.record(kind, &name).exists() && is_subvolume(&path) {
                    remove_subvolume(&path)?;
                    removed.push(format!("{} {name}, which has no record", kind.name()));
                }
            }
        }
        for name in self.names(Kind::Image)? {
            self.make_read_only(&name)?;
        }
        for name in self.names(Kind::Container)? {
            let record: ContainerRecord = self.read(Kind::Container, &name)?;
            let owner_gone =
                record.ephemeral_owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if owner_gone {
                self.remove(Kind::Container, &name)?;
                removed.push(format!("container {name}, whose loam run is gone"));
            }
        }
        Ok(removed)
    }
}

/// A name is a file name that needs no quoting, so that paths and runtimes take it as it is.
///
/// # Errors
/// [`Error::Invalid`] with the rule.
pub fn check_name(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+@".contains(&byte);
    let ok = !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(fits);
    if ok {
        return Ok(());
    }
    let rule = "a name begins with a letter or digit and has only letters, digits and . _ - + @, at most 128";
    Err(Error::invalid(format!("name {name:?}"), rule))
}

/// Deletes a subvolume and every subvolume that was made inside it, innermost first, and the quota group that contains
/// them. A path that is not there is no error.
pub(crate) fn remove_subvolume(path: &Path) -> Result<()> {
    let what = || format!("deleting subvolume {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    if !path.exists() {
        return Ok(());
    }
    let root = File::open(path).step(what)?;
    let mut doomed = vec![btrfs::subvolume_info(&root).step(what)?.id];
    // First, so that a crash leaves a subvolume, which is found again, and not a group. And a full one would keep what was
    // made in it from being deleted.
    if let Err(error) = quota::release(parent, doomed[0]) {
        tracing::warn!("releasing the quota of {}: {error}", path.display());
    }
    let directory = File::open(parent).step(what)?;
    let mut next = 0;
    while let Some(&id) = doomed.get(next) {
        doomed.extend(nested(&root, id).step(what)?);
        next += 1;
    }
    for &id in doomed[1..].iter().rev() {
        at_limit_too(parent, &doomed, || btrfs::delete_subvolume_by_id(&root, id)).step(what)?;
    }
    drop(root);
    at_limit_too(parent, &doomed, || btrfs::delete_subvolume(&directory, name)).step(what)
}

/// To delete a subvolume takes room under the quota of the one around it; where there is none, those that are to go are
/// taken out of all quotas.
fn at_limit_too(
    filesystem: &Path,
    doomed: &[u64],
    delete: impl Fn() -> loam_sys::Result<()>,
) -> loam_sys::Result<()> {
    match delete() {
        Err(error) if error.errno() == Some(rustix::io::Errno::DQUOT.raw_os_error()) => {
            if let Err(error) = quota::abandon(filesystem, doomed) {
                tracing::warn!("taking subvolumes that are to be deleted out of their quotas: {error}");
            }
            delete()
        }
        result => result,
    }
}

/// The subvolumes directly inside subvolume `id`: its `ROOT_REF` items in the tree of roots.
fn nested(filesystem: &File, id: u64) -> loam_sys::Result<Vec<u64>> {
    const ROOT_TREE: u64 = 1;
    const ROOT_REF_KEY: u8 = 156;
    let last = Key { objectid: id, kind: ROOT_REF_KEY, offset: u64::MAX };
    let mut first = Key { offset: 0, ..last };
    let mut found = Vec::new();
    loop {
        let items = btrfs::tree_search(filesystem, ROOT_TREE, first, last, 64)?;
        let Some(end) = items.last().and_then(|item| item.key.successor()) else { return Ok(found) };
        found.extend(items.iter().map(|item| item.key.offset));
        first = end;
    }
}

/// The root directory of a subvolume always has inode 256.
fn is_subvolume(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.ino() == 256)
}

fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("listing {}", directory.display());
    fs::read_dir(directory).step(what)?.map(|entry| Ok(entry.step(what)?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "a/b", "../x", "-x", ".loam", "a\0", "ä", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["debian", "web1", "a.b-c_d+e@2", "0"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }
}

//! `loam mount` and `loam umount`: one image as a pool of its own. The image's files are cloned into the filesystem while
//! it is formatted, so the kernel has them the moment it is mounted; everything else is a pool's code.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use loam_attach::ublk::DataPath;
use loam_content::{Cache, CacheOptions, HttpClient, HttpOptions, Importer};
use loam_image::{Index, LoadedTree};
use loam_seed::{FileTree, Label, Layout, NodeKind, Subvolume};
use serde::Serialize;
use tokio::process::Child;

use crate::config::{Config, LocalDevice, POOL_FORMAT, Purpose, TransportChoice, identity_text};
use crate::content::{ContentSpec, place};
use crate::directory::{PoolDirectory, remove_tree};
use crate::error::{Context, Error, Result};
use crate::format::{format_filesystem, format_virtual_only, make_directories, make_map, random_identity};
use crate::indexes::{self, Obtained, Watch};
use crate::kernel::IMAGE_SUBVOLUME;
use crate::launch::{UpOptions, down, is_held, start};

/// Bytes of the local device of a mounted image, sparse.
const LOCAL_BYTES: u64 = 64 << 30;

/// Most bytes that its cache may hold.
const CACHE_BYTES: u64 = 64 << 30;

/// The virtual region is as long as the content, in steps of this.
const VIRTUAL_STEP: u64 = 1 << 30;

/// How an image is to be mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Its source, with an absolute path where it is local.
    pub source: String,
    /// The mount point.
    pub directory: PathBuf,
    /// Where its index is, if not beside the source.
    pub index: Option<String>,
    /// A file for what is written, which outlives the mount.
    pub local: Option<PathBuf>,
    /// How the kernel gets the blocks.
    pub transport: TransportChoice,
    /// Threads that serve the kernel.
    pub queues: Option<u16>,
    /// How bytes get from ublk to the kernel.
    pub data_path: DataPath,
}

/// What was mounted.
#[derive(Debug, Clone, Serialize)]
pub struct MountReport {
    /// The source.
    pub source: String,
    /// The mount point.
    pub mount: PathBuf,
    /// Entries of all kinds.
    pub files: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes received from the source so far.
    pub wire_bytes: u64,
    /// Getting the index.
    pub index_ns: u64,
    /// Formatting.
    pub format_ns: u64,
    /// All of it.
    pub elapsed_ns: u64,
}

/// Mounts an image.
///
/// # Errors
/// What is wrong with source, index or mount point; whatever was begun is undone.
pub async fn mount_image(
    parent: &PoolDirectory,
    options: &MountOptions,
    watch: Arc<dyn Watch>,
) -> Result<Mounted> {
    let started = Instant::now();
    let mount = mount_point(&options.directory)?;
    let _lock = lock(&mount)?;
    let directory = directory_of(parent, &mount)?;
    clear_leftovers(&directory, &mount).await?;
    let undo = Undo { directory: Some(&directory) };
    make_directories(&directory)?;
    let source = indexes::parse_source(&options.source)?;
    let cache_options = CacheOptions { limit_bytes: CACHE_BYTES, ..CacheOptions::default() };
    let cache = Cache::open(directory.cache(), cache_options).step(|| "making the cache".to_owned())?;
    let http = HttpClient::new(HttpOptions::default()).step(|| "setting up HTTP".to_owned())?;
    let obtained = indexes::obtain(&source, options.index.as_deref(), &cache, &http, watch).await?;
    let Obtained { index, import, wire_bytes } = obtained;
    let index_ns = started.elapsed().as_nanos() as u64;
    let (bytes, config) = format(&directory, options, &mount, &index)?;
    let format_ns = started.elapsed().as_nanos() as u64 - index_ns;
    make_content(&directory, &config, options, &cache, &index, import)?;
    drop(cache);
    config.save(&directory)?;
    let up_options = UpOptions {
        transport: options.transport,
        queues: options.queues,
        data_path: options.data_path,
        ..UpOptions::default()
    };
    let holder = start(&directory, &up_options).await?;
    undo.keep();
    let report = MountReport {
        source: options.source.clone(),
        mount,
        files: index.entry_count(),
        bytes,
        wire_bytes,
        index_ns,
        format_ns,
        elapsed_ns: started.elapsed().as_nanos() as u64,
    };
    Ok(Mounted { report, directory, holder })
}

/// An image that is mounted. Dropping this leaves it mounted.
#[derive(Debug)]
pub struct Mounted {
    /// What was mounted.
    pub report: MountReport,
    directory: PoolDirectory,
    holder: Option<Child>,
}

impl Mounted {
    /// Completes when the image has been unmounted by somebody else, and forgets it then.
    ///
    /// # Errors
    /// What cannot be removed.
    pub async fn ended(&mut self) -> Result<()> {
        if let Some(holder) = &mut self.holder {
            holder.wait().await.step(|| "waiting for the daemon".to_owned())?;
        }
        // `loam umount` removes the state itself; a signal to the daemon does not.
        if self.directory.exists() { self.unmount().await } else { Ok(()) }
    }

    /// Unmounts the image and forgets it.
    ///
    /// # Errors
    /// [`Error::Busy`]: it stays mounted then.
    pub async fn unmount(&self) -> Result<()> {
        forget(&self.directory).await
    }
}

/// Takes the pool of a mount down and removes it.
async fn forget(directory: &PoolDirectory) -> Result<()> {
    match down(directory).await {
        // Somebody else was faster.
        Err(Error::NoPool(_)) => {}
        result => result?,
    }
    remove_tree(directory.root())
}

/// Keeps others from mounting at the same place meanwhile. The lock is on the directory that the mount will cover.
fn lock(mount: &Path) -> Result<fs::File> {
    let what = || format!("mounting on {}", mount.display());
    let directory = fs::File::open(mount).step(what)?;
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| Error::step(what(), "another loam is mounting there right now"))?;
    Ok(directory)
}

/// Removes the state of a mount that did not come about.
struct Undo<'a> {
    directory: Option<&'a PoolDirectory>,
}

impl Undo<'_> {
    fn keep(mut self) {
        self.directory = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // A daemon that could not be ended still needs it.
        if let Some(directory) = self.directory.filter(|directory| !is_held(directory).unwrap_or(false)) {
            // The error that led here is what the user must see.
            let _ = fs::remove_dir_all(directory.root());
        }
    }
}

/// The mount point without symbolic links, as the kernel's table of mounts shows it. It must exist and be empty.
fn mount_point(path: &Path) -> Result<PathBuf> {
    let what = || format!("mount point {}", path.display());
    let canonical = path.canonicalize().step(what)?;
    let mut entries = fs::read_dir(&canonical).step(what)?;
    if entries.next().is_some() {
        return Err(Error::step(what(), "it is not empty").with_hint("choose an empty directory"));
    }
    Ok(canonical)
}

/// Where the state of the mount at a mount point lies.
fn directory_of(parent: &PoolDirectory, mount: &Path) -> Result<PoolDirectory> {
    use std::os::unix::ffi::OsStrExt;
    let name = blake3::hash(mount.as_os_str().as_bytes()).to_hex();
    PoolDirectory::new(&parent.mounts().join(&name[..16]))
}

/// The pool directory of the image that is mounted at a place; `None` when loam has mounted none there.
///
/// # Errors
/// A path that cannot be resolved.
pub fn directory_of_mount(parent: &PoolDirectory, mount: &Path) -> Result<Option<PoolDirectory>> {
    let canonical = mount.canonicalize().step(|| format!("mount point {}", mount.display()))?;
    let directory = directory_of(parent, &canonical)?;
    Ok(directory.exists().then_some(directory))
}

/// What a crash left of an earlier mount at the same place is removed; a living one is refused.
async fn clear_leftovers(directory: &PoolDirectory, mount: &Path) -> Result<()> {
    if !directory.root().exists() {
        return Ok(());
    }
    if crate::client::Client::new(directory).is_up().await {
        return Err(Error::step(
            format!("mounting on {}", mount.display()),
            "an image is mounted there by loam",
        )
        .with_hint(format!("loam umount {}", mount.display())));
    }
    if directory.exists() {
        down(directory).await?;
    }
    remove_tree(directory.root())
}

/// Formats the pair with the image in it; returns the bytes of its files.
fn format(
    directory: &PoolDirectory,
    options: &MountOptions,
    mount: &Path,
    index: &Index,
) -> Result<(u64, Config)> {
    let digest = index.digest();
    let tree = LoadedTree::load(index, 0).step(|| format!("index of {}", options.source))?;
    let local =
        options.local.clone().map(std::path::absolute).transpose().step(|| "path of --local".to_owned())?;
    let kept = local.as_deref().map(|path| reusable(path, digest.0)).transpose()?.flatten();
    let (identity, seed_identity, virtual_size, local_size) = match &kept {
        Some((label, bytes)) => (label.identity, label.seed_identity, label.virtual_size, *bytes),
        None => (random_identity(), None, virtual_size_for(index), LOCAL_BYTES),
    };
    let config = Config {
        format: POOL_FORMAT,
        purpose: Purpose::Mount,
        layout: Layout::Pair,
        virtual_size,
        local_size,
        local: LocalDevice::File(local.unwrap_or_else(|| directory.local_image())),
        identity: identity_text(identity),
        seed_identity: seed_identity.map(identity_text),
        cache_limit: CACHE_BYTES,
        mount_point: Some(mount.to_owned()),
        source: Some(options.source.clone()),
        simple_quota: false,
    };
    let subvolume = Subvolume { name: IMAGE_SUBVOLUME, tree: &tree, readonly: false };
    if kept.is_some() {
        format_virtual_only(directory, &config, digest.0)?;
    } else {
        format_filesystem(directory, &config, digest.0, &[subvolume])?;
    }
    Ok((file_bytes(&tree), config))
}

/// Bytes of the virtual region for one image.
fn virtual_size_for(index: &Index) -> u64 {
    index.content_length().next_multiple_of(VIRTUAL_STEP).max(VIRTUAL_STEP)
}

fn file_bytes(tree: &LoadedTree) -> u64 {
    let bytes = |node: NodeKind<'_>| match node {
        NodeKind::File { size } => size,
        NodeKind::Inline(data) => data.len() as u64,
        _ => 0,
    };
    (0..tree.len()).map(|index| bytes(tree.node(index).kind)).sum()
}

/// Whether an existing local file belongs to this index: then its label and bytes. A file of another index, or one
/// that is no local device at all, is refused rather than overwritten.
fn reusable(path: &Path, digest: [u8; 32]) -> Result<Option<(Label, u64)>> {
    let what = || format!("local file {}", path.display());
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::step(what(), error)),
    };
    let bytes = file.metadata().step(what)?.len();
    if bytes == 0 {
        return Ok(None);
    }
    let label = loam_seed::read_label(&file).step(what)?;
    if label.content_digest != digest {
        return Err(Error::step(what(), "it was written over another image or another version of this one")
            .with_hint("mount the source that it belongs to, or choose a new file"));
    }
    Ok(Some((label, bytes)))
}

/// Makes index, map and cached content, so that address 0 is the first byte of the image's content.
fn make_content(
    directory: &PoolDirectory,
    config: &Config,
    options: &MountOptions,
    cache: &Cache,
    index: &Index,
    import: Option<Importer>,
) -> Result<()> {
    indexes::store(directory, index)?;
    let map = make_map(directory, config.virtual_size)?;
    if index.content_length() == 0 {
        return Ok(());
    }
    let spec = ContentSpec::Image { index: index.digest(), source: options.source.clone() };
    let (id, range) = place(&map, &spec, index.content_length())?;
    debug_assert_eq!(range.start.0, 0, "the first range of an empty map");
    match import {
        Some(import) => import
            .finish(cache, &spec.cache_key(id), index.content_length())
            .step(|| format!("caching {}", options.source)),
        None => Ok(()),
    }
}

/// Unmounts what [`mount_image`] mounted and forgets it; also when its daemon is dead.
///
/// # Errors
/// [`Error::Busy`]: it stays mounted then. Nothing of loam's at that place.
pub async fn unmount_image(parent: &PoolDirectory, mount: &Path) -> Result<()> {
    let Some(directory) = directory_of_mount(parent, mount)? else {
        return Err(Error::step(mount.display().to_string(), "no image is mounted there by loam")
            .with_hint("loam mount SOURCE DIR mounts one; a pool is taken down by loam down"));
    };
    forget(&directory).await
}

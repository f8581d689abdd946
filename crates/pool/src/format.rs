//! Making a pool: format the seed, make the map and the directories; `pool.toml` is written last, so that a pool
//! either is there whole or is not there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use loam_content::Digest;
use loam_seed::{Image, Layout, SeedOptions, Subvolume, Timestamp, VIRTUAL_BASE};
use loam_space::Map;
use serde::Serialize;

use crate::config::{Config, LayoutName, LocalDevice, POOL_FORMAT, Purpose, identity_text};
use crate::directory::{PoolDirectory, sync_directory};
use crate::error::{Context, Error, Result};

/// How a pool is to be made.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// How the seed is formatted.
    pub layout: Layout,
    /// Bytes of the virtual region.
    pub virtual_size: u64,
    /// Bytes of the local device's file.
    pub local_size: u64,
    /// A block device to use instead of a file.
    pub local_device: Option<PathBuf>,
    /// Most bytes that the chunk cache may hold.
    pub cache_limit: u64,
    /// Whether it is formatted with simple quotas on.
    pub quota: QuotaChoice,
}

/// Whether a pool is formatted with simple quotas on. With them, kernels before 6.7 do not mount it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QuotaChoice {
    /// Where the running kernel has them.
    #[default]
    Auto,
    /// In any case.
    On,
    /// Not; they can be enabled later.
    Off,
}

impl QuotaChoice {
    fn is_on(self, layout: Layout) -> Result<bool> {
        match (self, layout) {
            (QuotaChoice::On, Layout::MegaExtent) => Err(Error::invalid(
                "--quota on",
                "layout mega-extent is for kernels before 6.4, which have no simple quotas",
            )),
            (QuotaChoice::Off, _) | (QuotaChoice::Auto, Layout::MegaExtent) => Ok(false),
            (QuotaChoice::On, _) => Ok(true),
            (QuotaChoice::Auto, _) => Ok(has_simple_quotas(&kernel_release())),
        }
    }
}

/// The running kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Whether a kernel of this release has simple quotas.
pub(crate) fn has_simple_quotas(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 7)
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct Made {
    /// The pool's directory.
    pub pool: PathBuf,
    /// How the seed was formatted.
    #[serde(with = "LayoutName")]
    pub layout: Layout,
    /// Bytes of the virtual region.
    pub virtual_size: u64,
    /// Bytes of the local device.
    pub local_size: u64,
    /// Whether simple quotas are on.
    pub simple_quota: bool,
    /// How long it took.
    pub elapsed_ns: u64,
}

/// Makes a pool in `directory`.
///
/// # Errors
/// [`Error::PoolExists`]; sizes that cannot be; a block device that is in use; the disk's own errors.
pub fn init(directory: &PoolDirectory, options: &InitOptions) -> Result<Made> {
    let started = Instant::now();
    if directory.exists() {
        return Err(Error::PoolExists(directory.root().to_owned()));
    }
    let simple_quota = options.quota.is_on(options.layout)?;
    make_directories(directory)?;
    let (local, local_size) = match &options.local_device {
        Some(device) => (LocalDevice::Block(device.clone()), block_device_bytes(device)?),
        None => (LocalDevice::File(directory.local_image()), options.local_size),
    };
    let config = Config {
        format: POOL_FORMAT,
        purpose: Purpose::Pool,
        layout: options.layout,
        virtual_size: options.virtual_size,
        local_size,
        local,
        identity: identity_text(random_identity()),
        seed_identity: None,
        cache_limit: options.cache_limit,
        mount_point: None,
        source: None,
        simple_quota,
    };
    format_filesystem(directory, &config, [0; 32], &[])?;
    make_map(directory, config.virtual_size)?;
    config.save(directory)?;
    Ok(Made {
        pool: directory.root().to_owned(),
        layout: config.layout,
        virtual_size: config.virtual_size,
        local_size,
        simple_quota: config.simple_quota,
        elapsed_ns: started.elapsed().as_nanos() as u64,
    })
}

/// Makes the directories of a pool.
pub(crate) fn make_directories(directory: &PoolDirectory) -> Result<()> {
    for path in [directory.root().to_owned(), directory.indexes(), directory.run()] {
        fs::create_dir_all(&path).step(|| format!("making {}", path.display()))?;
    }
    use std::os::unix::fs::PermissionsExt;
    let private = fs::Permissions::from_mode(0o700);
    fs::set_permissions(directory.root(), private).step(|| format!("closing {}", directory.root().display()))
}

/// Makes an empty map of `virtual_size` bytes.
pub(crate) fn make_map(directory: &PoolDirectory, virtual_size: u64) -> Result<Map> {
    let path = directory.map();
    match fs::remove_dir_all(&path) {
        // Left by an attempt that did not come as far as pool.toml.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::step(format!("removing {}", path.display()), error));
        }
        _ => {}
    }
    Map::create(&path, virtual_size).step(|| format!("making the map {}", path.display()))
}

/// Formats virtual image and local device as the configuration says, with `subvolumes` cloned into it.
/// `content_digest` is noted in the local device's label.
pub(crate) fn format_filesystem(
    directory: &PoolDirectory,
    config: &Config,
    content_digest: [u8; 32],
    subvolumes: &[Subvolume<'_>],
) -> Result<()> {
    let seed = seed_options(directory, config, content_digest)?;
    if let Some(limit) = seed.layout.kernel_limit(seed.virtual_size) {
        tracing::warn!("{limit}");
    }
    let virtual_path = directory.virtual_image();
    let mut virtual_image = Prefix(create(&virtual_path)?);
    let (LocalDevice::File(local_path) | LocalDevice::Block(local_path)) = &config.local;
    let mut local_image = open_local(&config.local)?;
    let local: Option<&mut dyn Image> = if seed.layout == Layout::Pair {
        Some(&mut local_image)
    } else {
        local_image
            .set_length(config.local_size)
            .step(|| format!("making {} {} bytes long", local_path.display(), config.local_size))?;
        wipe_superblock(&local_image).step(|| format!("wiping {}", local_path.display()))?;
        None
    };
    loam_seed::write(&seed, subvolumes, &mut virtual_image, local)
        .step(|| format!("formatting {} and {}", virtual_path.display(), local_path.display()))?;
    for (file, path) in [(&virtual_image.0, virtual_path.as_path()), (&local_image, local_path)] {
        file.sync_all().step(|| format!("syncing {}", path.display()))?;
    }
    sync_directory(directory.root())
}

/// Makes the virtual image of a pair whose local device exists already: the same identity and sizes give the same
/// superblock, and there is nothing else on it.
pub(crate) fn format_virtual_only(
    directory: &PoolDirectory,
    config: &Config,
    content_digest: [u8; 32],
) -> Result<()> {
    write_prefix(&directory.virtual_image(), &seed_options(directory, config, content_digest)?)
}

/// Writes what lies below the virtual region of a pair.
pub(crate) fn write_prefix(path: &Path, options: &SeedOptions) -> Result<()> {
    const SUPERBLOCK_OFFSET: u64 = 64 << 10;
    let what = || format!("formatting {}", path.display());
    let superblock = loam_seed::virtual_superblock(options).step(what)?;
    let image = create(path)?;
    image.set_len(VIRTUAL_BASE).step(what)?;
    image.write_all_at(&superblock[..], SUPERBLOCK_OFFSET).step(what)
}

/// The formatter's options for a configuration.
pub(crate) fn seed_options(
    directory: &PoolDirectory,
    config: &Config,
    content_digest: [u8; 32],
) -> Result<SeedOptions> {
    Ok(SeedOptions {
        layout: config.layout,
        virtual_size: config.virtual_size,
        local_size: config.local_size,
        simple_quota: config.simple_quota,
        content_digest,
        seed_identity: config.seed_identity_bytes(directory)?,
        ..seed_defaults(config.identity_bytes(directory)?)
    })
}

/// What all seeds have in common.
fn seed_defaults(identity: [u8; 32]) -> SeedOptions {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SeedOptions {
        label: "loam".to_owned(),
        timestamp: Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() },
        ..SeedOptions::new(identity)
    }
}

/// Options for a seed without a pool, with the files of the index of this digest, or empty. The virtual device follows
/// from the digest and its size alone, so that whoever has the index can serve it (`index:FILE`) to any number of local
/// devices; each of those is a filesystem of its own.
pub fn seed_without_pool(index: Option<Digest>, virtual_size: u64) -> SeedOptions {
    SeedOptions {
        virtual_size,
        content_digest: index.map_or([0; 32], |digest| digest.0),
        seed_identity: index.map(|digest| seed_identity(&digest, virtual_size)),
        ..seed_defaults(random_identity())
    }
}

fn seed_identity(index: &Digest, virtual_size: u64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("loam 2026 seed of an index");
    hasher.update(&index.0).update(&virtual_size.to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// The part of the virtual device below the virtual region: what lies beyond is the address space's, and no
/// filesystem takes a file of four exbibytes.
struct Prefix(File);

impl Image for Prefix {
    fn set_length(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length.min(VIRTUAL_BASE))
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

fn create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .step(|| format!("making {}", path.display()))
}

fn open_local(local: &LocalDevice) -> Result<File> {
    match local {
        LocalDevice::File(path) => create(path),
        LocalDevice::Block(path) => {
            use std::os::unix::fs::OpenOptionsExt;
            // O_EXCL on a block device: refused while it is mounted or part of something.
            let flags = rustix::fs::OFlags::EXCL.bits() as i32;
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(|error| {
                Error::step(format!("opening {}", path.display()), error)
                    .with_hint("it must be a block device that nothing uses")
            })
        }
    }
}

/// A device that is to be added online must not look like part of another filesystem.
fn wipe_superblock(local: &File) -> io::Result<()> {
    const SUPERBLOCK_OFFSET: u64 = 64 << 10;
    local.write_all_at(&[0; 4096], SUPERBLOCK_OFFSET)
}

fn block_device_bytes(path: &Path) -> Result<u64> {
    let what = || format!("opening {}", path.display());
    let file = File::open(path).step(what)?;
    if !file.metadata().step(what)?.file_type().is_block_device() {
        return Err(Error::invalid(path.display().to_string(), "not a block device"));
    }
    let bytes = loam_seed::ReadAt::length(&file).step(what)?;
    Ok(bytes / 4096 * 4096)
}

/// Every filesystem that is ever mounted on one host needs UUIDs of its own.
pub(crate) fn random_identity() -> [u8; 32] {
    let (one, two) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
    let mut hasher = blake3::Hasher::new_derive_key("loam 2026 pool identity");
    hasher.update(one.as_bytes()).update(two.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_with_simple_quotas_are_known_by_their_release() {
        for (release, has) in [
            ("6.7.0", true),
            ("6.6.99-rt", false),
            ("6.12-rc1", true),
            ("7.2.0", true),
            ("5.15", false),
            ("", false),
        ] {
            assert_eq!(has_simple_quotas(release), has, "{release}");
        }
    }

    #[test]
    fn quotas_are_never_formatted_where_they_cannot_be() {
        assert!(QuotaChoice::On.is_on(Layout::MegaExtent).is_err());
        assert!(!QuotaChoice::Auto.is_on(Layout::MegaExtent).unwrap());
        assert!(QuotaChoice::On.is_on(Layout::Pair).unwrap());
        assert!(!QuotaChoice::Off.is_on(Layout::Pair).unwrap());
    }
}

//! What a benchmark's device holds: always the same bytes (each aligned 8 hold their own offset, big-endian), from
//! where a transport can get them at different cost.

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use loam_block::size::ByteSize;
use loam_block::{
    Access, BlockDevice, Capabilities, FileDevice, FileOptions, Geometry, Io, Located, MAXIMUM_BLOCK,
    PatternDevice, Ticket, check_range,
};
use loam_content::{Cache, CacheOptions, FileSource, WholeSource};
use loam_sys::map_file::MappedFile;
use tokio::runtime::Handle;

use crate::clone::SeedDevice;

/// Chunks of the cached content, as a pool has them.
const CHUNK_BYTES: u32 = 64 << 10;

/// Where the bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// `pattern:SIZE`: computed for each read. The plumbing alone.
    Pattern(ByteSize),
    /// `memory:PATH`: a file on a tmpfs, mapped.
    Memory(PathBuf),
    /// `file:PATH[,direct]`: a file by reads, through the page cache or past it.
    File { path: PathBuf, direct: bool },
    /// `cache:DIRECTORY,FILE`: what a pool does: all of FILE in a chunk cache, checked by its checksums.
    Cache { directory: PathBuf, file: PathBuf },
    /// `seed:SIZE,BASE,IMAGE`: a device of SIZE bytes that IMAGE, a sparse file, has a few of; the others are a pattern
    /// from BASE on.
    Seed { size: u64, pattern_base: u64, image: PathBuf },
}

impl FromStr for Content {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected =
            "pattern:SIZE, memory:PATH, file:PATH[,direct], cache:DIRECTORY,FILE or seed:SIZE,BASE,IMAGE";
        let (kind, rest) = text.split_once(':').with_context(|| format!("{text}: not {expected}"))?;
        Ok(match kind {
            "pattern" => Content::Pattern(rest.parse()?),
            "memory" => Content::Memory(PathBuf::from(rest)),
            "file" => match rest.strip_suffix(",direct") {
                Some(path) => Content::File { path: PathBuf::from(path), direct: true },
                None => Content::File { path: PathBuf::from(rest), direct: false },
            },
            "cache" => {
                let (directory, file) = rest.split_once(',').context("cache:DIRECTORY,FILE needs both")?;
                Content::Cache { directory: PathBuf::from(directory), file: PathBuf::from(file) }
            }
            "seed" => {
                let mut parts = rest.splitn(3, ',');
                let mut part = || parts.next().context("seed:SIZE,BASE,IMAGE needs all three");
                let (size, pattern_base) = (part()?.parse()?, part()?.parse()?);
                Content::Seed { size, pattern_base, image: PathBuf::from(part()?) }
            }
            _ => bail!("{text}: not {expected}"),
        })
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Pattern(size) => write!(f, "pattern:{size}"),
            Content::Memory(path) => write!(f, "memory:{}", path.display()),
            Content::File { path, direct: false } => write!(f, "file:{}", path.display()),
            Content::File { path, direct: true } => write!(f, "file:{},direct", path.display()),
            Content::Cache { directory, file } => {
                write!(f, "cache:{},{}", directory.display(), file.display())
            }
            Content::Seed { size, pattern_base, image } => {
                write!(f, "seed:{size},{pattern_base},{}", image.display())
            }
        }
    }
}

impl Content {
    /// The device. What a cache lacks is fetched before this returns.
    pub(super) fn open(&self, runtime: &Handle) -> Result<Arc<dyn BlockDevice>> {
        Ok(match self {
            Content::Pattern(size) => Arc::new(PatternDevice::new(size.0)),
            Content::Memory(path) => Arc::new(MappedDevice::open(path)?),
            Content::File { path, direct } => {
                Arc::new(FileDevice::open(path, FileOptions { read_only: true, direct: *direct })?)
            }
            Content::Cache { directory, file } => runtime.block_on(cached(directory, file))?,
            Content::Seed { size, pattern_base, image } => {
                Arc::new(SeedDevice::open(image, *size, *pattern_base)?)
            }
        })
    }
}

async fn cached(directory: &Path, file: &Path) -> Result<Arc<dyn BlockDevice>> {
    let options = CacheOptions { limit_bytes: 1 << 40, ..CacheOptions::default() };
    let cache = Cache::open(directory, options)?;
    let source = Arc::new(WholeSource::new(Arc::new(FileSource::open(file, None)?), CHUNK_BYTES)?);
    let device = cache.device("bench", source)?;
    let whole = 0..device.geometry().size;
    device.prefetch(std::slice::from_ref(&whole), &|_| {}).await?;
    // What was read back and found right may be moved by the kernel from the first read on.
    device.check(false).await?;
    Ok(Arc::new(device))
}

/// A file in memory, mapped: a read is one copy and no system call.
struct MappedDevice {
    file: File,
    mapped: MappedFile,
}

impl MappedDevice {
    fn open(path: &Path) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            let mapped = MappedFile::map(&file)?;
            std::io::Result::Ok(MappedDevice { file, mapped })
        };
        open().with_context(|| format!("cannot map {}", path.display()))
    }
}

impl BlockDevice for MappedDevice {
    fn geometry(&self) -> Geometry {
        let size = self.mapped.len() as u64;
        Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { multi_connection: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let checked = check_range(&self.geometry(), "read", offset, buffer.len() as u64);
        Io::Ready(checked.map(|()| {
            let start = offset as usize;
            buffer.copy_from_slice(&self.mapped[start..start + buffer.len()]);
        }))
    }

    fn locate(&self, offset: u64, length: u64, _access: Access) -> Option<Located<'_>> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.mapped.len() as u64);
        let ticket = Ticket::new(offset, length, 0).filter(|_| inside)?;
        Some(Located { file: self.file.as_fd(), offset, ticket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_named_as_they_are_written() {
        let parse = |text: &str| text.parse::<Content>().unwrap();
        assert_eq!(parse("pattern:1MiB"), Content::Pattern(ByteSize(1 << 20)));
        assert_eq!(parse("file:/a,b"), Content::File { path: "/a,b".into(), direct: false });
        assert_eq!(parse("file:/a,direct"), Content::File { path: "/a".into(), direct: true });
        assert_eq!(parse("cache:/c,/f"), Content::Cache { directory: "/c".into(), file: "/f".into() });
        let seed = Content::Seed { size: 4096, pattern_base: 512, image: "/i,j".into() };
        assert_eq!(parse("seed:4096,512,/i,j"), seed);
        assert_eq!(parse(&seed.to_string()), seed);
        assert!("disk:/a".parse::<Content>().is_err() && "cache:/c".parse::<Content>().is_err());
    }

    #[test]
    fn a_cache_and_a_mapping_give_the_bytes_of_their_file() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("data");
        let mut bytes = vec![0; 1 << 20];
        let pattern = PatternDevice::new(bytes.len() as u64);
        runtime.block_on(async { pattern.read(0, &mut bytes).await }).unwrap();
        std::fs::write(&file, &bytes).unwrap();
        let cache = Content::Cache { directory: directory.path().join("cache"), file: file.clone() };
        for content in [cache, Content::Memory(file.clone()), Content::File { path: file, direct: false }] {
            let device = content.open(runtime.handle()).unwrap();
            let mut block = vec![0; 8192];
            runtime.block_on(async { device.read(4096, &mut block).await }).unwrap();
            PatternDevice::verify(4096, &block).unwrap();
        }
    }
}

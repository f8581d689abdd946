//! `index:FILE`: the virtual device of one image, made of its index alone. Together with a local device that
//! `loam seed make --index` formatted from the same index it is a whole filesystem: the virtual device's bytes follow
//! from the index, so neither needs to know of the other.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use loam_block::ByteSize;
use loam_content::{Cache, CacheOptions, HttpClient, HttpOptions, SourceUrl};
use loam_image::Index;
use loam_seed::VIRTUAL_BASE;
use loam_space::{Map, Unmapped};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use rustix::fs::FlockOperation;

use super::Opened;
use crate::content::{ContentSpec, place};
use crate::directory::{PoolDirectory, remove_tree};
use crate::error::{Context, Error, Result};
use crate::format::{make_directories, make_map, seed_without_pool, write_prefix};
use crate::indexes::{self, MAX_INDEX_BYTES, SUFFIX};
use crate::served::{Served, of_any_bytes};

/// Bytes of the virtual region unless told otherwise, as `loam seed make` has it.
const VIRTUAL_SIZE: u64 = 4 << 60;

/// Most bytes that the cache of one such device may hold.
const CACHE_BYTES: u64 = 64 << 30;

/// An index and how to serve it: `FILE[?KEY=VALUE[&KEY=VALUE]...]`. Values are percent-encoded where they hold `&`, `%`.
///
/// | key | value | without it |
/// |---|---|---|
/// | `source` | where the image's data is: `dir:PATH`, `tar:PATH-or-URL` | beside the index: its name without `.loam` |
/// | `cache` | a directory that keeps what was fetched | a temporary one, removed at the end |
/// | `virtual-size` | bytes of the virtual region, as for `loam seed make` | 4EiB |
/// | `virtual` | the VIRTUAL that `loam seed make` wrote, of any layout: its size and what lies below the region are taken from it | a pair's superblock |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexDevice {
    /// The index: a file or URL.
    pub location: SourceUrl,
    /// Where its data is.
    pub source: Option<String>,
    /// A directory for what is fetched.
    pub cache: Option<PathBuf>,
    /// Bytes of the virtual region.
    pub virtual_size: Option<ByteSize>,
    /// A file with what lies below the region.
    pub virtual_image: Option<PathBuf>,
}

impl IndexDevice {
    /// Reads the index and makes the device of it.
    pub(super) async fn open(&self) -> Result<Opened> {
        let http = HttpClient::new(HttpOptions::default()).step(|| "setting up HTTP".to_owned())?;
        let fetched = loam_content::fetch_whole(&http, &self.location, MAX_INDEX_BYTES).await;
        let fetched = fetched.step(|| format!("reading index {}", self.location.shown()))?;
        let index = Index::open(fetched.bytes).step(|| format!("index {}", self.location.shown()))?;
        let source = self.source()?;
        let virtual_size = self.virtual_size()?;
        let directory = self.directory(&index, &source, virtual_size)?;
        let (served, kept) = tokio::task::spawn_blocking({
            let this = self.clone();
            move || this.prepare(directory, &index, source, virtual_size)
        })
        .await
        .step(|| "making the device".to_owned())??;
        Ok(Opened::new(of_any_bytes(served.device.clone())?).keeping((served, kept)))
    }

    /// Map, cache and prefix of a directory that may have been used for the same before.
    fn prepare(
        &self,
        directory: WorkDirectory,
        index: &Index,
        source: String,
        virtual_size: u64,
    ) -> Result<(Served, (WorkDirectory, File))> {
        let place_of = &directory.0;
        make_directories(place_of)?;
        let lock = lock(place_of)?;
        indexes::store(place_of, index)?;
        let map = match Map::open(place_of.map()) {
            Ok(map) => map,
            Err(_) => make_map(place_of, virtual_size)?,
        };
        if index.content_length() > 0 {
            let spec = ContentSpec::Image { index: index.digest(), source };
            place(&map, &spec, index.content_length())?;
        }
        let seed = seed_without_pool(Some(index.digest()), virtual_size);
        let prefix = match &self.virtual_image {
            Some(path) => path.clone(),
            None => {
                write_prefix(&place_of.virtual_image(), &seed)?;
                place_of.virtual_image()
            }
        };
        let cache_options = CacheOptions { limit_bytes: CACHE_BYTES, ..CacheOptions::default() };
        let cache = Cache::open(place_of.cache(), cache_options).step(|| "opening the cache".to_owned())?;
        let served = Served::new(place_of, Arc::new(map), cache, Unmapped::Error, &prefix)?;
        Ok((served, (directory, lock)))
    }

    fn source(&self) -> Result<String> {
        if let Some(source) = &self.source {
            return indexes::absolute_source(source);
        }
        let missing = || {
            Error::invalid(
                format!("index:{}", self.location.shown()),
                "its name does not end with .loam, so it does not tell where the image's data is: add ?source=SOURCE",
            )
        };
        match &self.location {
            SourceUrl::File(path) => {
                let text = path.to_str().ok_or_else(missing)?;
                let beside = text.strip_suffix(SUFFIX).ok_or_else(missing)?;
                let kind = if Path::new(beside).is_dir() { "dir" } else { "tar" };
                indexes::absolute_source(&format!("{kind}:{beside}"))
            }
            SourceUrl::Http(url) => {
                let (path, query) = url.split_at(url.find('?').unwrap_or(url.len()));
                Ok(format!("tar:{}{query}", path.strip_suffix(SUFFIX).ok_or_else(missing)?))
            }
        }
    }

    fn virtual_size(&self) -> Result<u64> {
        let Some(path) = &self.virtual_image else {
            let size = self.virtual_size.map_or(VIRTUAL_SIZE, |size| size.0);
            return Ok(size);
        };
        let length = fs::metadata(path).step(|| format!("opening {}", path.display()))?.len();
        length.checked_sub(VIRTUAL_BASE).filter(|size| *size > 0).ok_or_else(|| {
            let why = "too short to be a virtual device: give the VIRTUAL that loam seed make wrote";
            Error::invalid(path.display().to_string(), why)
        })
    }

    /// Where map and cache go: by index, source and size, so that one cache directory may serve many devices.
    fn directory(&self, index: &Index, source: &str, virtual_size: u64) -> Result<WorkDirectory> {
        match &self.cache {
            Some(cache) => {
                let mut hasher = blake3::Hasher::new();
                hasher
                    .update(&index.digest().0)
                    .update(&virtual_size.to_le_bytes())
                    .update(source.as_bytes());
                let name = hasher.finalize().to_hex();
                Ok(WorkDirectory(PoolDirectory::new(&cache.join(&name[..16]))?, false))
            }
            None => {
                let parent =
                    std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
                let name = format!("loam-index-{}", uuid::Uuid::new_v4().simple());
                Ok(WorkDirectory(PoolDirectory::new(&parent.join(name))?, true))
            }
        }
    }
}

/// Keeps another process from using the same directory.
fn lock(directory: &PoolDirectory) -> Result<File> {
    let path = directory.lock();
    let file = File::create(&path).step(|| format!("making {}", path.display()))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::step(
            format!("cache {}", directory.root().display()),
            "another process serves this index from it",
        )
        .with_hint("give it another ?cache=DIR, or connect to that server")
    })?;
    Ok(file)
}

/// A directory, and whether it goes with the device.
struct WorkDirectory(PoolDirectory, bool);

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        if self.1
            && let Err(error) = remove_tree(self.0.root())
        {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// What does not stand in a value as it is.
const ENCODED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'/').remove(b':').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

/// The keys of the parameters.
const KEYS: [&str; 4] = ["source", "cache", "virtual-size", "virtual"];

impl FromStr for IndexDevice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: String| Error::invalid(format!("`index:{text}`"), why);
        // A file name, and more so a URL, may hold a question mark of its own.
        let begins =
            |at: &(usize, &str)| KEYS.iter().any(|key| text[at.0 + 1..].starts_with(&format!("{key}=")));
        let begin = text.match_indices(['?', '&']).find(begins).map_or(text.len(), |(at, _)| at);
        let location =
            text[..begin].parse().map_err(|error| bad(format!("{error}: write the path of an index")))?;
        let mut device =
            IndexDevice { location, source: None, cache: None, virtual_size: None, virtual_image: None };
        for parameter in text.get(begin + 1..).unwrap_or_default().split('&').filter(|text| !text.is_empty())
        {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = percent_decode_str(value).decode_utf8().map_err(|error| bad(error.to_string()))?;
            let value = value.into_owned();
            match key {
                "source" => device.source = Some(value),
                "cache" => device.cache = Some(value.into()),
                "virtual" => device.virtual_image = Some(value.into()),
                "virtual-size" => {
                    device.virtual_size = Some(value.parse().map_err(|error| bad(format!("{error}")))?);
                }
                _ => return Err(bad(format!("`{key}` is none of {}", KEYS.join(", ")))),
            }
        }
        if device.virtual_image.is_some() && device.virtual_size.is_some() {
            return Err(bad("virtual says the size: leave virtual-size out".to_owned()));
        }
        Ok(device)
    }
}

impl fmt::Display for IndexDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.location)?;
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let values = [
            self.source.clone(),
            path(&self.cache),
            self.virtual_size.map(|size| size.to_string()),
            path(&self.virtual_image),
        ];
        let mut separator = if self.location.to_string().contains('?') { '&' } else { '?' };
        for (key, value) in KEYS.iter().zip(values) {
            if let Some(value) = value {
                write!(f, "{separator}{key}={}", utf8_percent_encode(&value, ENCODED))?;
                separator = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> IndexDevice {
        text.parse().unwrap_or_else(|error: Error| panic!("{text}: {}", error.chain()))
    }

    #[test]
    fn parameters_are_told_from_what_belongs_to_the_name() {
        let device = parsed("/srv/a?b.tar.loam?cache=/var/cache&virtual-size=1GiB");
        assert_eq!(device.location, SourceUrl::File("/srv/a?b.tar.loam".into()));
        assert_eq!((device.cache, device.virtual_size), (Some("/var/cache".into()), Some(ByteSize(1 << 30))));
        let device = parsed("http://h/x.tar.loam?sig=1&source=tar:http://h/y.tar%3Fa=1%26b=2");
        assert_eq!(device.location.to_string(), "http://h/x.tar.loam?sig=1");
        assert_eq!(device.source.as_deref(), Some("tar:http://h/y.tar?a=1&b=2"));
        assert_eq!(parsed(&device_text(&device)), device);
        for bad in [
            "",
            "?source=x",
            "x.loam?virtual-size=1KB",
            "x.loam?cache=a&colour=b",
            "x.loam?virtual=a&virtual-size=1G",
        ] {
            assert!(matches!(bad.parse::<IndexDevice>(), Err(Error::Invalid { .. })), "{bad}");
        }
    }

    fn device_text(device: &IndexDevice) -> String {
        device.to_string()
    }

    #[test]
    fn data_lies_beside_the_index_unless_told() {
        assert_eq!(parsed("/srv/root.tar.loam").source().unwrap(), "tar:/srv/root.tar");
        assert_eq!(parsed("http://h/root.tar.loam?k=1").source().unwrap(), "tar:http://h/root.tar?k=1");
        assert_eq!(parsed("/srv/x?source=dir:/data").source().unwrap(), "dir:/data");
        let error = parsed("/srv/root.index").source().unwrap_err();
        assert!(error.chain().contains("?source="), "{}", error.chain());
        let temporary = tempfile::tempdir().unwrap();
        let tree = temporary.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let index = parsed(&format!("{}.loam", tree.display()));
        assert_eq!(index.source().unwrap(), format!("dir:{}", tree.display()));
    }
}

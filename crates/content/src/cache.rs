//! The chunk cache: a directory with the verified chunks of any number of contents, bounded, and a [`CachedDevice`] for
//! each content that is in use. `docs/formats/cache.md` draws what lies on disk.
//!
//! A read of local chunks is answered in the caller's thread: state byte, `preadv2(RWF_NOWAIT)`, a CRC32C for each 4 KiB
//! block, done. Everything else goes through [`content`]: chunks that are missing are fetched once, however many wait for
//! them ([`flight`]), checked against their digests and only then served and stored ([`fetch`]). Room is made by a clock
//! ([`clock`]). What the kernel may move from the file without our seeing it is told by [`proofs`]. Digests that were not known in advance are recorded durably before use ([`digests`]).

mod check;
mod clock;
mod content;
mod counters;
mod device;
mod digests;
mod fetch;
mod flight;
mod import;
mod layout;
mod paged;
mod prefetch;
mod proofs;
mod readahead;
mod store;
mod sync;

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

pub use check::CheckReport;
pub use counters::{CacheStats, ErrorCounts};
pub use device::CachedDevice;
pub use import::Importer;
pub use prefetch::Progress;
pub use readahead::ReadAhead;

use crate::{ChunkSource, Error, FetchCost, Result, WireTotals};
use clock::Room;
use content::Content;
use counters::Counters;
use digests::DigestLog;
use flight::Shelf;
use layout::Shape;
use store::Store;
use sync::{lock, read, write};

/// `forget` looks this often, this many times at most, whether the last fetch has ended.
const FORGET_LOOK: Duration = Duration::from_millis(5);
const FORGET_LOOKS_MAX: u32 = 6000;

/// How a cache behaves.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// The most bytes of chunks that are kept; the tables take 1/1000 on top.
    pub limit_bytes: u64,
    /// When more is fetched than was asked for.
    pub read_ahead: ReadAhead,
    /// The most bytes that one fetch asks a source for.
    pub run_bytes_max: u64,
    /// Fetches of `prefetch` and `pin` that run at once, over all contents.
    pub background_fetches: usize,
    /// Fetches of one `replay` that run at once.
    pub replay_fetches: usize,
    /// How long a chunk that could not be fetched fails at once.
    pub failure_memory: Duration,
}

impl Default for CacheOptions {
    fn default() -> CacheOptions {
        CacheOptions {
            limit_bytes: 16 << 30,
            read_ahead: ReadAhead::default(),
            run_bytes_max: 4 << 20,
            background_fetches: 4,
            replay_fetches: 12,
            failure_memory: Duration::from_secs(1),
        }
    }
}

/// What all contents of one cache share.
pub(crate) struct Shared {
    pub(crate) options: CacheOptions,
    pub(crate) counters: Counters,
    pub(crate) room: Room,
    /// Fetches that somebody waits for.
    pub(crate) demand: AtomicUsize,
    pub(crate) background: tokio::sync::Semaphore,
    /// Held for its lock, by every fetch that may still store something too.
    _lock: File,
}

/// An open cache directory. One process at a time: the directory is locked.
pub struct Cache {
    directory: PathBuf,
    shared: Arc<Shared>,
    contents: Mutex<Contents>,
    imports: AtomicU64,
}

#[derive(Default)]
struct Contents {
    shelves: HashMap<String, Arc<Shelf>>,
    devices: HashMap<String, Weak<Content>>,
    /// Every source that was opened, for what it received.
    sources: Vec<Arc<dyn ChunkSource>>,
    /// What sources received whose contents were forgotten.
    retired: WireTotals,
}

impl Cache {
    /// Opens the cache in `directory`, which is made (mode 0700) where there is none. What lies there is taken over
    /// without being read: damage is found when a block is read, or by [`CachedDevice::check`].
    ///
    /// # Errors
    /// [`Error::InUse`] while another process has it open; [`Error::Io`].
    pub fn open(directory: impl Into<PathBuf>, options: CacheOptions) -> Result<Cache> {
        let directory = directory.into();
        let failed = |source| Error::io(format!("opening the cache in {}", directory.display()), source);
        make_private(&directory).map_err(failed)?;
        let held = File::create(directory.join("lock")).map_err(failed)?;
        match rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!("the cache in {}", directory.display());
                let why = "another process has it open; stop that one, or use another directory".to_owned();
                return Err(Error::InUse { what, why });
            }
            Err(error) => return Err(failed(error.into())),
        }
        let shared = Arc::new(Shared {
            counters: Counters::default(),
            room: Room::new(options.limit_bytes),
            demand: AtomicUsize::new(0),
            background: tokio::sync::Semaphore::new(options.background_fetches.max(1)),
            options,
            _lock: held,
        });
        let mut contents = Contents::default();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if !path.is_dir() {
                continue;
            }
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(import::PREFIX)) {
                fs::remove_dir_all(&path).map_err(failed)?;
                continue;
            }
            match Store::load(&path) {
                Ok(Some(store)) if path.ends_with(layout::directory_name(store.key())) => {
                    contents.take_over(&shared, store);
                }
                Ok(_) => discard_chunks(&path),
                // One content that cannot be read must not take the others with it; its device will say why.
                Err(error) => {
                    tracing::error!(directory = %path.display(), %error, "a cached content cannot be read");
                }
            }
        }
        Ok(Cache { directory, shared, contents: Mutex::new(contents), imports: AtomicU64::new(0) })
    }

    /// The device of the content `key` (1 to 512 bytes), whose chunks come from `source`. A key stands for the same
    /// bytes for ever: take a digest, or an identifier that is never given out again. While a device of this key is in
    /// use, that one is given and `source` is not used.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the source's length or chunk size is not what it was; [`Error::Damaged`] when recorded
    /// digests are lost; [`Error::Io`].
    pub fn device(&self, key: &str, source: Arc<dyn ChunkSource>) -> Result<CachedDevice> {
        layout::check_key(key)?;
        let mismatch = |what: String| Error::Mismatch { content: key.to_owned(), what };
        let shape = Shape::new(source.length(), source.chunk_bytes()).ok_or_else(|| {
            mismatch(format!(
                "{} bytes in chunks of {}: a content has 4 KiB to 16 TiB, whole blocks of 4 KiB, in chunks of a power \
                 of two from 4 KiB to 4 MiB",
                source.length(),
                source.chunk_bytes()
            ))
        })?;
        let mut contents = lock(&self.contents);
        let same = |found: Shape| match found == shape {
            true => Ok(()),
            false => Err(mismatch(format!("it was {found:?}, it is now {shape:?}; use another key"))),
        };
        if let Some(content) = contents.devices.get(key).and_then(Weak::upgrade) {
            same(content.shape())?;
            return Ok(CachedDevice::new(content));
        }
        let directory = self.directory.join(layout::directory_name(key));
        let digests = DigestLog::open(&directory, key, shape)?;
        let shelf = match contents.shelves.get(key) {
            Some(shelf) => {
                same(shelf.store.shape())?;
                shelf.clone()
            }
            None => contents.take_over(&self.shared, Store::create(&directory, key, shape)?),
        };
        shelf.store.open_files()?;
        shelf.whole_stream.store(source.fetch_cost() == FetchCost::WholeStream, Ordering::Relaxed);
        contents.retire_sources();
        if !contents.sources.iter().any(|known| Arc::ptr_eq(known, &source)) {
            contents.sources.push(source.clone());
        }
        let content = Arc::new(Content::new(self.shared.clone(), shelf, source, digests));
        contents.devices.insert(key.to_owned(), Arc::downgrade(&content));
        Ok(CachedDevice::new(content))
    }

    /// Whether there are files of the content `key`.
    pub fn contains(&self, key: &str) -> bool {
        lock(&self.contents).shelves.contains_key(key)
    }

    /// What was counted so far.
    pub fn stats(&self) -> CacheStats {
        let contents = lock(&self.contents);
        let wire = contents.sources.iter().map(|source| source.wire()).fold(contents.retired, add);
        CacheStats {
            bytes: self.shared.room.bytes(),
            limit: self.shared.room.limit,
            fetched_bytes: wire.bytes,
            requests: wire.requests,
            ..self.shared.counters.snapshot()
        }
    }

    /// Drops chunks, the least used first and pinned ones never, until at most `keep_bytes` are left; gives the bytes
    /// dropped. Blocks: call it from a thread that may.
    pub fn evict(&self, keep_bytes: u64) -> u64 {
        self.shared.room.evict(keep_bytes, &self.shared.counters)
    }

    /// Drops every chunk of the content `key` that is not pinned; gives the bytes dropped. They are fetched again when they
    /// are read. Blocks: call it from a thread that may.
    pub fn evict_content(&self, key: &str) -> u64 {
        let shelf = lock(&self.contents).shelves.get(key).cloned();
        shelf.map_or(0, |shelf| self.shared.room.evict_content(&shelf, &self.shared.counters))
    }

    /// Removes everything of the content `key`, its recorded digests too: only for keys that never come back. Waits for
    /// fetches of it that are still on the way.
    ///
    /// # Errors
    /// [`Error::InUse`] while a device of it is open, or a fetch does not end; [`Error::Io`].
    pub async fn forget(&self, key: &str) -> Result<()> {
        for _ in 0..FORGET_LOOKS_MAX {
            let in_use = |why: &str| {
                Err(Error::InUse { what: format!("the cached content {key}"), why: why.to_owned() })
            };
            match lock(&self.contents).devices.get(key).and_then(Weak::upgrade) {
                None => break,
                Some(content) if content.handles() > 0 => {
                    return in_use("its device is open; close it first");
                }
                Some(_) => {}
            }
            tokio::time::sleep(FORGET_LOOK).await;
        }
        let mut contents = lock(&self.contents);
        if contents.devices.get(key).is_some_and(|device| device.strong_count() > 0) {
            let why = "a fetch of it does not end; try again later".to_owned();
            return Err(Error::InUse { what: format!("the cached content {key}"), why });
        }
        contents.devices.remove(key);
        if let Some(shelf) = contents.shelves.remove(key) {
            self.shared.room.remove(&shelf);
        }
        contents.retire_sources();
        let directory = self.directory.join(layout::directory_name(key));
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing {}", directory.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// The keys of all contents, sorted, with the bytes that are local.
    pub fn contents(&self) -> Vec<(String, u64)> {
        let mut list: Vec<_> = read(&self.shared.room.shelves)
            .iter()
            .map(|shelf| (shelf.store.key().to_owned(), shelf.store.present().1))
            .collect();
        list.sort();
        list
    }
}

impl Contents {
    fn take_over(&mut self, shared: &Shared, store: Store) -> Arc<Shelf> {
        shared.room.add(store.present().1);
        let key = store.key().to_owned();
        let shelf = Arc::new(Shelf::new(store));
        write(&shared.room.shelves).push(shelf.clone());
        self.shelves.insert(key, shelf.clone());
        shelf
    }
}

impl Contents {
    /// Keeps the sums of sources that nobody uses any more, and lets them go.
    fn retire_sources(&mut self) {
        for source in std::mem::take(&mut self.sources) {
            if Arc::strong_count(&source) == 1 {
                self.retired = add(self.retired, source.wire());
            } else {
                self.sources.push(source);
            }
        }
    }
}

fn add(a: WireTotals, b: WireTotals) -> WireTotals {
    WireTotals { requests: a.requests + b.requests, bytes: a.bytes + b.bytes }
}

fn make_private(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Removes chunks whose header cannot be believed. Recorded digests stay: they are not for the cache to lose.
fn discard_chunks(directory: &Path) {
    let discarded = if directory.join("digests").exists() {
        ["data", "table"].into_iter().try_for_each(|name| match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    } else {
        fs::remove_dir_all(directory)
    };
    if let Err(error) = discarded {
        tracing::warn!(directory = %directory.display(), %error, "rubbish in the cache was not removed");
    }
}

//! The map: which addresses belong to which content, durably.
//!
//! A directory holds an append-only `log` and at most one sorted `table`, which the log's header names. What is added
//! goes to the log and is synced before anyone is told; when the log has grown, everything is written to a new table
//! and a new log takes the old one's name. Formats: `docs/formats/map.md`.
//!
//! All of it blocks: from asynchronous code call what changes a map on a blocking thread. Look-ups never block.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use crate::log::{Chain, DiskRange, FRAME_RANGES_MAX, HEADER_BYTES, Record, SPEC_BYTES_MAX};
use crate::snapshot::{Ranges, Snapshot};
use crate::storage::{Directory, Storage, StorageFile};
use crate::{Address, BLOCK, ContentId, Error, Place, Range, Result};

pub(crate) const LOG: &str = "log";
/// The largest address space: with the virtual device's first TiB before it, it ends at the largest file offset.
pub const SIZE_MAX: u64 = (1 << 63) - (1 << 40);
/// Most contents in one map.
pub const CONTENTS_MAX: u64 = 1 << 24;
/// Longest log that is read into memory, and so the longest that is written, in bytes.
pub(crate) const LOG_BYTES_MAX: u64 = 128 << 20;
/// A log shorter than this is not compacted ...
const COMPACT_BYTES_MIN: u64 = 1 << 20;
/// ... one longer than this always is; in between, one that is longer than a 32nd of the table's ranges. What
/// look-ups search beside the table stays small so, and writing the table costs little beside the syncs of what was added
/// one by one.
const COMPACT_BYTES_MAX: u64 = 16 << 20;

/// A request for addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Whose bytes will lie there.
    pub content: ContentId,
    /// Byte of the content that will lie at the first address; a multiple of [`BLOCK`].
    pub content_offset: u64,
    /// Bytes, a multiple of [`BLOCK`], at least one.
    pub length: u64,
    /// The first address will be a multiple of this power of two, at least [`BLOCK`].
    pub alignment: u64,
}

/// What a map holds, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapStats {
    /// Bytes of the address space.
    pub size: u64,
    /// Ranges.
    pub ranges: u64,
    /// Bytes in all ranges together.
    pub mapped_bytes: u64,
    /// Contents.
    pub contents: u64,
    /// Addresses below this were handed out at some time.
    pub high_water: Address,
}

/// The durable map of an address space. See the module's documentation.
pub struct Map<S: Storage = Directory> {
    pub(crate) storage: S,
    pub(crate) snapshot: ArcSwap<Snapshot<S::Mapping>>,
    pub(crate) writer: Mutex<Writer<S::File>>,
}

/// The end of the log.
#[derive(Debug)]
pub(crate) struct Writer<F> {
    pub(crate) file: F,
    /// Bytes of the log that are good.
    pub(crate) end: u64,
    pub(crate) chain: Chain,
    /// Number of the next table.
    pub(crate) next_table: u64,
    /// The log is not compacted before it is this long.
    pub(crate) compact_at: u64,
    pub(crate) latched: Option<Arc<str>>,
}

impl Map<Directory> {
    /// Makes an empty map of an address space of `size` bytes in the directory `path`, which is made if need be.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Locked`], [`Error::Invalid`] for a size that is not a multiple of [`BLOCK`] from
    /// one block to [`SIZE_MAX`], or [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        let path = path.as_ref();
        let make = std::fs::create_dir_all(path).and_then(|()| match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => std::fs::File::open(".")?.sync_all(),
            Some(parent) => std::fs::File::open(parent)?.sync_all(),
            None => Ok(()),
        });
        make.map_err(|source| Error::Io { operation: "making the directory", path: path.into(), source })?;
        Map::create_in(lock(path)?, size)
    }

    /// Opens the map in the directory `path`, cuts off what was being written when the power went, and checks
    /// everything else.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Locked`], [`Error::NewerFormat`], [`Error::Corrupt`] or [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Map::open_in(lock(path.as_ref())?)
    }
}

fn lock(path: &Path) -> Result<Directory> {
    Directory::lock(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::WouldBlock => Error::Locked { path: path.into() },
        std::io::ErrorKind::NotFound => Error::Missing { path: path.into() },
        _ => Error::Io { operation: "locking the map in", path: path.into(), source },
    })
}

impl<S: Storage> Map<S> {
    /// Bytes of the address space.
    pub fn size(&self) -> u64 {
        self.snapshot.load().size
    }

    /// What lies at `address`. Takes no lock and allocates nothing.
    ///
    /// # Panics
    /// Never; an address beyond the end is unmapped up to itself.
    pub fn locate(&self, address: Address) -> Place {
        let snapshot = self.snapshot.load();
        if address.0 >= snapshot.size {
            return Place::Unmapped { until: address };
        }
        snapshot.locate(address)
    }

    /// The range that `address` lies in.
    pub fn lookup(&self, address: Address) -> Option<Range> {
        match self.locate(address) {
            Place::Mapped(range) => Some(range),
            Place::Unmapped { .. } => None,
        }
    }

    /// All ranges at this moment, by address.
    pub fn ranges(&self) -> Ranges<S::Mapping> {
        Ranges::new(self.snapshot.load_full())
    }

    /// What describes `content`.
    pub fn spec(&self, content: ContentId) -> Option<Vec<u8>> {
        self.snapshot.load().spec(content).map(<[u8]>::to_vec)
    }

    /// All contents at this moment with what describes them.
    pub fn contents(&self) -> Vec<(ContentId, Vec<u8>)> {
        let snapshot = self.snapshot.load();
        let ids = (0..snapshot.content_count()).map(|id| ContentId(id as u32));
        ids.filter_map(|id| Some((id, snapshot.spec(id)?.to_vec()))).collect()
    }

    /// Numbers for people.
    pub fn stats(&self) -> MapStats {
        let snapshot = self.snapshot.load();
        MapStats {
            size: snapshot.size,
            ranges: snapshot.range_count(),
            mapped_bytes: snapshot.mapped_bytes,
            contents: snapshot.content_count(),
            high_water: Address(snapshot.high_water),
        }
    }

    /// Adds a content, durably. `spec` describes it to whoever resolves it; it can never be changed.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a spec longer than [`SPEC_BYTES_MAX`] or one content too many; otherwise those of
    /// every change: [`Error::Io`] (after which nothing was added), [`Error::LogFull`], [`Error::Latched`].
    pub fn add_content(&self, spec: &[u8]) -> Result<ContentId> {
        let mut writer = self.writer();
        let snapshot = self.snapshot.load_full();
        if spec.len() > SPEC_BYTES_MAX {
            let what = format!(
                "the description of a content is {} bytes long, at most {SPEC_BYTES_MAX} can be kept",
                spec.len()
            );
            return Err(Error::Invalid { what });
        }
        if snapshot.content_count() >= CONTENTS_MAX {
            return Err(Error::Invalid {
                what: format!("the map has {CONTENTS_MAX} contents, the most it can"),
            });
        }
        let id = ContentId(snapshot.content_count() as u32);
        self.append(&mut writer, &[Record::Content { id, spec }])?;
        self.publish(&mut writer, snapshot.with_content(spec));
        Ok(id)
    }

    /// Gives addresses that never had an owner to `content`, from its byte 0 on, durably.
    ///
    /// # Errors
    /// Those of [`Map::allocate_batch`].
    pub fn allocate(&self, content: ContentId, length: u64, alignment: u64) -> Result<Range> {
        let ranges = self.allocate_batch(&[Allocation { content, content_offset: 0, length, alignment }])?;
        Ok(ranges[0])
    }

    /// Gives addresses that never had an owner to each of `requests`, in order, with one sync for all.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::UnknownContent`], [`Error::Invalid`], and those of every change (see
    /// [`Map::add_content`]). After an error none of the requests holds.
    pub fn allocate_batch(&self, requests: &[Allocation]) -> Result<Vec<Range>> {
        let mut writer = self.writer();
        let snapshot = self.snapshot.load_full();
        let mut free_from = snapshot.high_water;
        let mut ranges = Vec::with_capacity(requests.len());
        for request in requests {
            let start = place(request.length, request.alignment, free_from, snapshot.size)?;
            let Allocation { content, content_offset, length, .. } = *request;
            let range = Range { start: Address(start), length, content, content_offset };
            check(&range, &snapshot)?;
            free_from = range.end().0;
            ranges.push(range);
        }
        self.add_sorted(&mut writer, &snapshot, &ranges)?;
        Ok(ranges)
    }

    /// Hands out `length` addresses without giving them to a content yet, durably: for a file system that is laid
    /// out before its content is known. They are given by [`Map::add_ranges`], or never used.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Invalid`], and those of every change (see [`Map::add_content`]).
    pub fn reserve(&self, length: u64, alignment: u64) -> Result<Address> {
        let mut writer = self.writer();
        let snapshot = self.snapshot.load_full();
        let start = place(length, alignment, snapshot.high_water, snapshot.size)?;
        let high_water = start + length;
        self.append(&mut writer, &[Record::Reserve(Address(high_water))])?;
        self.publish(&mut writer, Snapshot { high_water, ..Snapshot::clone(&snapshot) });
        Ok(Address(start))
    }

    /// Adds ranges at addresses that the caller chose: reserved ones, or any that are not mapped. Durable, with one
    /// sync for all.
    ///
    /// # Errors
    /// [`Error::Overlap`] (with what is there or with each other), [`Error::UnknownContent`], [`Error::Invalid`], and
    /// those of every change (see [`Map::add_content`]). After an error none of the ranges is mapped.
    pub fn add_ranges(&self, ranges: &[Range]) -> Result<()> {
        let mut writer = self.writer();
        let snapshot = self.snapshot.load_full();
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut end = Address(0);
        for range in &sorted {
            check(range, &snapshot)?;
            if range.start < end || snapshot.overlaps(range) {
                return Err(Error::Overlap { start: range.start, length: range.length });
            }
            end = range.end();
        }
        self.add_sorted(&mut writer, &snapshot, &sorted)
    }

    fn add_sorted(
        &self,
        writer: &mut Writer<S::File>,
        snapshot: &Snapshot<S::Mapping>,
        ranges: &[Range],
    ) -> Result<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        let frames = ranges.chunks(FRAME_RANGES_MAX);
        let records: Vec<_> = frames.map(|ranges| Record::Ranges(ranges.to_vec())).collect();
        self.append(writer, &records)?;
        self.publish(writer, snapshot.with_ranges(ranges));
        Ok(())
    }

    fn publish(&self, writer: &mut Writer<S::File>, snapshot: Snapshot<S::Mapping>) {
        self.snapshot.store(Arc::new(snapshot));
        writer.mark();
        self.compact_if_due(writer);
    }

    // A panic while the lock is held leaves at worst a log that is longer than `end`, which the next append mends.
    pub(crate) fn writer(&self) -> MutexGuard<'_, Writer<S::File>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn io_error(&self, operation: &'static str, name: &str, source: std::io::Error) -> Error {
        Error::Io { operation, path: self.storage.location().join(name), source }
    }

    /// Writes and syncs records; after an error none of them counts.
    fn append(&self, writer: &mut Writer<S::File>, records: &[Record<'_>]) -> Result<()> {
        if let Some(cause) = &writer.latched {
            return Err(Error::Latched { cause: Arc::clone(cause) });
        }
        let (mut chain, mut end) = (writer.chain, writer.end);
        let mut bytes = Vec::new();
        for record in records {
            bytes.clear();
            chain.append(record, &mut bytes);
            let next = end + bytes.len() as u64;
            let written = match next <= LOG_BYTES_MAX {
                true => writer.file.write_at(end, &bytes),
                false => {
                    writer.undo();
                    return Err(Error::LogFull { path: self.storage.location().into() });
                }
            };
            if let Err(source) = written {
                writer.undo();
                return Err(self.io_error("writing to", LOG, source));
            }
            end = next;
        }
        if let Err(source) = writer.file.sync() {
            // The kernel may have dropped the pages and will not say so again: nothing is known of the disk now.
            writer.latch(format!("syncing the log: {source}"));
            return Err(self.io_error("syncing", LOG, source));
        }
        chain.durable = chain.sequence;
        (writer.chain, writer.end) = (chain, end);
        Ok(())
    }

    pub(crate) fn compact_if_due(&self, writer: &mut Writer<S::File>) {
        if writer.end < writer.compact_at || writer.latched.is_some() {
            return;
        }
        if let Err(error) = self.compact_now(writer) {
            writer.compact_at = writer.end + COMPACT_BYTES_MIN;
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the map's log could not be compacted; it goes on growing");
        }
    }

    /// Writes everything to a new table and begins a new log. Happens by itself when the log has grown.
    ///
    /// # Errors
    /// [`Error::Io`]; the map is then as it was, or, if it is not known which log survives a power failure, latched.
    pub fn compact(&self) -> Result<()> {
        let mut writer = self.writer();
        match &writer.latched {
            Some(cause) => Err(Error::Latched { cause: Arc::clone(cause) }),
            None => self.compact_now(&mut writer),
        }
    }
}

impl<S: Storage> std::fmt::Debug for Map<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let location = self.storage.location();
        f.debug_struct("Map")
            .field("location", &location)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl<F: StorageFile> Writer<F> {
    pub(crate) fn latch(&mut self, cause: String) {
        tracing::error!(cause, "the map takes no more changes");
        self.latched.get_or_insert(cause.into());
    }

    /// Takes back what a failed append wrote.
    fn undo(&mut self) {
        if let Err(source) = self.file.set_length(self.end) {
            self.latch(format!("taking back a record that could not be written: {source}"));
        }
    }

    /// Notes behind what was synced that it was, so that damage to it is not taken for a torn write. Advice only: it
    /// is not synced itself, and without it everything works.
    pub(crate) fn mark(&mut self) {
        let (mut chain, mut bytes) = (self.chain, Vec::new());
        chain.append(&Record::Mark, &mut bytes);
        if self.file.write_at(self.end, &bytes).is_ok() {
            self.chain = chain;
            self.end += bytes.len() as u64;
        }
    }
}

/// When a log that goes on from a table of so many ranges is to be compacted, in bytes.
pub(crate) fn compact_at(table_ranges: usize) -> u64 {
    let share = (table_ranges * size_of::<DiskRange>()) as u64 / 32;
    HEADER_BYTES as u64 + share.clamp(COMPACT_BYTES_MIN, COMPACT_BYTES_MAX)
}

/// The first fitting address at or behind `free_from`.
fn place(length: u64, alignment: u64, free_from: u64, size: u64) -> Result<u64> {
    if length == 0 || !length.is_multiple_of(BLOCK) {
        let what = format!("a range of {length} bytes: not a multiple of {BLOCK}");
        return Err(Error::Invalid { what });
    }
    if !alignment.is_power_of_two() || alignment < BLOCK {
        let what = format!("an alignment of {alignment} bytes: not a power of two of at least {BLOCK}");
        return Err(Error::Invalid { what });
    }
    let start = free_from.checked_next_multiple_of(alignment);
    let fits = start.filter(|start| start.checked_add(length).is_some_and(|end| end <= size));
    fits.ok_or(Error::Full { requested: length, free: size - free_from, size })
}

fn check<M: std::ops::Deref<Target = [u8]>>(range: &Range, snapshot: &Snapshot<M>) -> Result<()> {
    if u64::from(range.content.0) >= snapshot.content_count() {
        return Err(Error::UnknownContent(range.content));
    }
    match range.defect(snapshot.size, snapshot.content_count()) {
        None => Ok(()),
        Some(defect) => {
            let what = format!("a range of {} bytes at address {}: {defect}", range.length, range.start);
            Err(Error::Invalid { what })
        }
    }
}

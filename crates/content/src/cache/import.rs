//! [`Importer`]: storing the chunks of a content while it is read for the first time, when neither its length nor its key
//! is known yet (an image that is indexed and added in one go). It becomes a content when it is finished.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::layout::{self, HEADER_BYTES, Shape};
use super::store::{PRESENT, Store, checksum};
use super::sync::lock;
use super::{Cache, Shared, make_private};
use crate::chunk::BLOCK_BYTES;
use crate::{Error, Result};

/// What the directories of unfinished imports begin with.
pub(super) const PREFIX: &[u8] = b"import-";

/// Chunks on their way into the cache. Dropped unfinished, it leaves nothing behind.
pub struct Importer {
    shared: Arc<Shared>,
    directory: PathBuf,
    data: File,
    sums: File,
    states: Vec<u8>,
    chunk_bytes: u32,
    salt: u32,
    /// The short chunk, if there was one: it must turn out to be the last.
    short: Option<(u64, u64)>,
    /// Bytes reserved for stored chunks.
    reserved: u64,
}

impl Cache {
    /// Begins an import in chunks of `chunk_bytes` (a power of two from 4 KiB to 4 MiB).
    ///
    /// # Errors
    /// [`Error::Mismatch`] for another chunk size; [`Error::Io`].
    pub fn import(&self, chunk_bytes: u32) -> Result<Importer> {
        if Shape::new(BLOCK_BYTES, chunk_bytes).is_none() {
            let what = format!("chunks of {chunk_bytes} bytes: a power of two from 4 KiB to 4 MiB is needed");
            return Err(Error::Mismatch { content: "import".to_owned(), what });
        }
        let number = self.imports.fetch_add(1, Ordering::Relaxed);
        let directory = self.directory.join(format!("import-{number}"));
        let failed = |source| Error::io(format!("creating {}", directory.display()), source);
        make_private(&directory).map_err(failed)?;
        let create = |name: &str| {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(directory.join(name))
        };
        Ok(Importer {
            shared: self.shared.clone(),
            data: create("data").map_err(failed)?,
            sums: create("sums").map_err(failed)?,
            states: Vec::new(),
            chunk_bytes,
            salt: rand::random(),
            short: None,
            reserved: 0,
            directory,
        })
    }
}

impl Importer {
    /// Stores one chunk; the last one may be short, but has whole blocks of 4 KiB. Blocks. A chunk that finds no room is
    /// left out, counted, and fetched when it is read.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a length that no chunk has, or a chunk beyond the longest content.
    pub fn fill(&mut self, chunk: u64, bytes: &[u8]) -> Result<()> {
        let length = bytes.len() as u64;
        let chunk_bytes = u64::from(self.chunk_bytes);
        let fits = length > 0 && length <= chunk_bytes && length.is_multiple_of(BLOCK_BYTES);
        let second = length < chunk_bytes && self.short.is_some_and(|short| short != (chunk, length));
        if !fits || second || chunk >= layout::CONTENT_BYTES_MAX / chunk_bytes {
            let what = format!("{length} bytes as chunk {chunk} of {chunk_bytes} bytes");
            return Err(Error::Mismatch { content: self.directory.display().to_string(), what });
        }
        if self.states.get(chunk as usize).is_some_and(|state| *state != 0) {
            return Ok(());
        }
        let name = || self.directory.display().to_string();
        if !self.shared.room.reserve(length, &self.shared.counters) {
            self.shared
                .counters
                .uncached(&name(), "nothing more can be evicted to stay under the cache's limit");
            return Ok(());
        }
        let first = chunk * (chunk_bytes / BLOCK_BYTES);
        let sums: Vec<u8> = (first..)
            .zip(bytes.chunks_exact(BLOCK_BYTES as usize))
            .flat_map(|(block, bytes)| checksum(self.salt, block, bytes).to_le_bytes())
            .collect();
        let stored = self
            .data
            .write_all_at(bytes, chunk * chunk_bytes)
            .and_then(|()| self.sums.write_all_at(&sums, first * 4));
        if let Err(error) = stored {
            self.shared.room.release(length);
            self.shared.counters.uncached(&name(), &error.to_string());
            return Ok(());
        }
        self.reserved += length;
        if length < chunk_bytes {
            self.short = Some((chunk, length));
        }
        let slot = chunk as usize;
        if self.states.len() <= slot {
            self.states.resize(slot + 1, 0);
        }
        self.states[slot] = PRESENT;
        Ok(())
    }

    /// Makes what was stored the chunks of the content `key`, `length` bytes long. Where the cache has that content
    /// already, the import goes instead. Blocks.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a length that does not fit; [`Error::Io`].
    pub fn finish(mut self, cache: &Cache, key: &str, length: u64) -> Result<()> {
        layout::check_key(key)?;
        let shape = Shape::new(length, self.chunk_bytes).filter(|shape| {
            let chunks = self.states.len() as u64;
            let short_is_last = self
                .short
                .is_none_or(|(chunk, length)| chunk + 1 == shape.chunks() && length == shape.bytes_of(chunk));
            chunks <= shape.chunks() && short_is_last && self.data_end() <= length
        });
        let shape = shape.ok_or_else(|| Error::Mismatch {
            content: key.to_owned(),
            what: format!(
                "a length of {length} bytes for {} chunks of {}",
                self.states.len(),
                self.chunk_bytes
            ),
        })?;
        let mut contents = lock(&cache.contents);
        if contents.shelves.contains_key(key) {
            return Ok(());
        }
        let target = cache.directory.join(layout::directory_name(key));
        let failed = |source| Error::io(format!("finishing an import as {}", target.display()), source);
        self.write_table(key, shape).map_err(failed)?;
        // Without files of a content there may still be its digests.
        fs::create_dir_all(&target).map_err(failed)?;
        fs::rename(self.directory.join("data"), target.join("data")).map_err(failed)?;
        fs::rename(self.directory.join("table"), target.join("table")).map_err(failed)?;
        let store = Store::load(&target)?.ok_or_else(|| Error::Damaged {
            path: target.display().to_string(),
            why: "the import cannot be read back".to_owned(),
        })?;
        self.shared.room.release(std::mem::take(&mut self.reserved));
        contents.take_over(&self.shared, store);
        Ok(())
    }

    fn data_end(&self) -> u64 {
        self.data.metadata().map_or(u64::MAX, |metadata| metadata.len())
    }

    fn write_table(&self, key: &str, shape: Shape) -> std::io::Result<()> {
        self.data.set_len(shape.length)?;
        let mut table = File::create(self.directory.join("table"))?;
        table.write_all_at(&layout::encode_header(key, shape, self.salt), 0)?;
        table.write_all_at(&self.states, HEADER_BYTES as u64)?;
        let mut sums = &self.sums;
        std::io::Seek::seek(&mut sums, std::io::SeekFrom::Start(0))?;
        std::io::Seek::seek(&mut table, std::io::SeekFrom::Start(shape.sum_offset(0)))?;
        std::io::copy(&mut sums, &mut table)?;
        table.set_len(shape.table_bytes())
    }
}

impl Drop for Importer {
    fn drop(&mut self) {
        self.shared.room.release(self.reserved);
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "an import left files behind");
        }
    }
}

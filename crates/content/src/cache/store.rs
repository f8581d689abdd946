//! [`Store`]: the files of one content and the tables that say which of their blocks can be believed.
//!
//! `data` mirrors the content byte for byte and is sparse; `table` holds a state byte for each chunk and a checksum for
//! each block. Nothing is synced when a chunk is stored: the state says that a chunk was stored, the checksums say
//! whether it (still) is what was stored. So a reader believes nothing but bytes whose checksums match, and whatever a
//! power cut makes of the three writes, in any order, is found out and fetched again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use crc_fast::CrcAlgorithm;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::layout::{self, HEADER_BYTES, Shape};
use super::paged::Paged;
use super::proofs::{Generation, Proofs};
use crate::chunk::BLOCK_BYTES;
use crate::{Error, Result};

/// The chunk was stored. On disk.
pub(crate) const PRESENT: u8 = 1;
/// The chunk is not to be evicted. On disk.
pub(crate) const PINNED: u8 = 2;
/// The chunk was read since the clock's hand passed it. In memory alone.
pub(crate) const ACCESSED: u8 = 4;
const ON_DISK: u8 = PRESENT | PINNED;

const STATE_PAGE: usize = 4096;
const SUM_PAGE: usize = 1024;
const BLOCK: usize = BLOCK_BYTES as usize;

/// What came of a read of local bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Local {
    /// The buffer is filled with verified bytes.
    Hit,
    /// A chunk is not there.
    Absent,
    /// It is there but must be waited for: ask again from a thread that may block.
    Slow,
    /// This block's bytes do not match its checksum, or cannot be read. It may be that the chunk was just evicted; only
    /// who holds the chunk's flight can tell.
    Suspect(u64),
}

#[derive(Debug)]
struct Files {
    data: File,
    table: File,
    /// `data` lies on a filesystem whose reads never wait, but which does not know RWF_NOWAIT.
    in_memory: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Store {
    directory: PathBuf,
    key: String,
    shape: Shape,
    salt: u32,
    states: Paged<AtomicU8, STATE_PAGE>,
    sums: Paged<AtomicU32, SUM_PAGE>,
    /// In memory alone.
    proofs: Proofs,
    /// Somebody asked for bytes that he would not see.
    unseen_wanted: AtomicBool,
    files: OnceLock<Files>,
    /// The filesystem refused RWF_NOWAIT: reads go to a thread that may block.
    no_nowait: AtomicBool,
}

fn blocks_of(offset: u64, length: u64) -> Range<u64> {
    offset / BLOCK_BYTES..(offset + length) / BLOCK_BYTES
}

/// The checksum of a block as it stands in the table.
pub(super) fn checksum(salt: u32, block: u64, bytes: &[u8]) -> u32 {
    // The block's number goes in as the initial value: a block that lies in a wrong place does not match. 0 says that
    // there is none, so a sum that is 0 is stored as 1.
    let begun = !(salt ^ block as u32);
    let mut digest = crc_fast::Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, begun.into());
    digest.update(bytes);
    (digest.finalize() as u32).max(1)
}

impl Store {
    /// Opens the content that lies in `directory`, or `None` where there is none that can be used.
    pub(crate) fn load(directory: &Path) -> Result<Option<Store>> {
        let path = directory.join("table");
        let failed = |source| Error::io(format!("reading {}", path.display()), source);
        let table = match File::open(&path) {
            Ok(table) => table,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut header = [0; HEADER_BYTES];
        match table.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let Some((key, shape, salt)) = layout::decode_header(&header) else { return Ok(None) };
        if table.metadata().map_err(failed)?.len() != shape.table_bytes() {
            return Ok(None);
        }
        let store = Store::with_empty_tables(directory, &key, shape, salt);
        store.load_states(&table).map_err(failed)?;
        Ok(Some(store))
    }

    /// Makes the files of a content anew, whatever lay there.
    pub(crate) fn create(directory: &Path, key: &str, shape: Shape) -> Result<Store> {
        let failed = |source| Error::io(format!("creating {}", directory.display()), source);
        let create = |name: &str| {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(directory.join(name))
        };
        fs::create_dir_all(directory).map_err(failed)?;
        let data = create("data").map_err(failed)?;
        let table = create("table").map_err(failed)?;
        data.set_len(shape.length).map_err(failed)?;
        table.set_len(shape.table_bytes()).map_err(failed)?;
        let salt = layout::salt_of(key);
        table.write_all_at(&layout::encode_header(key, shape, salt), 0).map_err(failed)?;
        Ok(Store::with_empty_tables(directory, key, shape, salt))
    }

    fn with_empty_tables(directory: &Path, key: &str, shape: Shape, salt: u32) -> Store {
        Store {
            directory: directory.to_owned(),
            key: key.to_owned(),
            shape,
            salt,
            states: Paged::new(shape.chunks()),
            sums: Paged::new(shape.blocks()),
            proofs: Proofs::new(shape.blocks()),
            unseen_wanted: AtomicBool::new(false),
            files: OnceLock::new(),
            no_nowait: AtomicBool::new(false),
        }
    }

    fn load_states(&self, table: &File) -> io::Result<()> {
        let end = Shape::state_offset(self.shape.chunks());
        let mut at = Shape::state_offset(0);
        // A content of many chunks of which few are there: its holes are not read.
        while at < end {
            at = match rustix::fs::seek(table, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) if data < end => data - data % STATE_PAGE as u64,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                Err(error) => return Err(error.into()),
            };
            let mut bytes = [0; STATE_PAGE];
            let size = (end - at).min(STATE_PAGE as u64) as usize;
            table.read_exact_at(&mut bytes[..size], at)?;
            if bytes.iter().any(|state| state & ON_DISK != 0) {
                let page = (at / STATE_PAGE as u64 - 1) as usize;
                self.states.set(page, || Box::new(bytes.map(|state| AtomicU8::new(state & ON_DISK))));
            }
            at += STATE_PAGE as u64;
        }
        Ok(())
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Opens the files, so that [`Store::try_read`] finds them open.
    pub(crate) fn open_files(&self) -> Result<()> {
        self.files()
            .map(|_| ())
            .map_err(|source| Error::io(format!("opening {}", self.directory.display()), source))
    }

    fn files(&self) -> io::Result<&Files> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(self.directory.join(name));
        let data = open("data")?;
        if data.metadata()?.len() != self.shape.length {
            data.set_len(self.shape.length)?;
        }
        /// `linux/magic.h`.
        const TMPFS_MAGIC: u64 = 0x0102_1994;
        let in_memory = rustix::fs::fstatfs(&data)?.f_type as u64 == TMPFS_MAGIC;
        let files = Files { data, table: open("table")?, in_memory };
        Ok(self.files.get_or_init(|| files))
    }

    fn state(&self, chunk: u64) -> u8 {
        self.states.get(chunk).map_or(0, |state| state.load(Ordering::Acquire))
    }

    pub(crate) fn is_present(&self, chunk: u64) -> bool {
        self.state(chunk) & PRESENT != 0
    }

    /// Present chunks and their bytes.
    pub(crate) fn present(&self) -> (u64, u64) {
        let last = self.shape.chunks() - 1;
        let mut count = 0;
        for page in (0..self.states.pages()).filter_map(|page| self.states.page(page)) {
            count += page.iter().filter(|state| state.load(Ordering::Relaxed) & PRESENT != 0).count() as u64;
        }
        let missing =
            if self.is_present(last) { self.shape.chunk_bytes() - self.shape.bytes_of(last) } else { 0 };
        (count, count * self.shape.chunk_bytes() - missing)
    }

    /// The first chunk at or behind `from` whose state has a bit of `mask`, pages that hold none skipped.
    pub(crate) fn next_with(&self, from: u64, mask: u8) -> Option<u64> {
        let first = Paged::<AtomicU8, STATE_PAGE>::page_of(from);
        for index in first..self.states.pages() {
            let Some(page) = self.states.page(index) else { continue };
            let base = (index * STATE_PAGE) as u64;
            let skip = from.saturating_sub(base) as usize;
            let found = page[skip..].iter().position(|state| state.load(Ordering::Relaxed) & mask != 0);
            if let Some(found) = found {
                return Some(base + (skip + found) as u64);
            }
        }
        None
    }

    /// The clock's look at a chunk: what its state was, the accessed bit taken away.
    pub(crate) fn take_accessed(&self, chunk: u64) -> u8 {
        self.states.get(chunk).map_or(0, |state| state.fetch_and(!ACCESSED, Ordering::Relaxed))
    }

    /// Fills `buffer` (not empty, whole blocks, inside the content) if that needs no waiting. Takes no lock and
    /// allocates nothing.
    pub(crate) fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Local {
        let Some(files) = self.files.get() else { return Local::Slow };
        let seen = self.proofs.generation(&blocks_of(offset, buffer.len() as u64));
        if !self.all_present(offset, buffer.len() as u64) {
            return Local::Absent;
        }
        if !self.no_nowait.load(Ordering::Relaxed) {
            let read = rustix::io::preadv2(
                &files.data,
                &mut [IoSliceMut::new(buffer)],
                offset,
                ReadWriteFlags::NOWAIT,
            );
            match read {
                Ok(count) if count == buffer.len() => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.no_nowait.store(true, Ordering::Relaxed),
                _ => return Local::Slow,
            }
        }
        if self.no_nowait.load(Ordering::Relaxed)
            && (!files.in_memory || files.data.read_exact_at(buffer, offset).is_err())
        {
            return Local::Slow;
        }
        self.verify(offset, buffer, seen)
    }

    /// Where to read `length` bytes at `offset` (not 0, whole blocks, inside the content), and what [`Store::settle_seen`]
    /// must know, if they are present and can be checked without waiting. Takes no lock and allocates nothing.
    pub(crate) fn locate_seen(&self, offset: u64, length: u64) -> Option<(BorrowedFd<'_>, Generation)> {
        let files = self.files.get()?;
        let blocks = blocks_of(offset, length);
        let seen = self.proofs.generation(&blocks);
        let sums = Paged::<AtomicU32, SUM_PAGE>::page_of(blocks.start)
            ..=Paged::<AtomicU32, SUM_PAGE>::page_of(blocks.end - 1);
        let checkable = sums.into_iter().all(|page| self.sums.page(page).is_some());
        (checkable && self.all_present(offset, length)).then(|| (files.data.as_fd(), seen))
    }

    /// The same for bytes that nobody will see: only if every block was found right in the file since the cache was
    /// opened.
    pub(crate) fn locate_unseen(&self, offset: u64, length: u64) -> Option<(BorrowedFd<'_>, Generation)> {
        let files = self.files.get()?;
        // A store only where it changes something: the line stays shared between cores.
        if !self.unseen_wanted.load(Ordering::Relaxed) {
            self.unseen_wanted.store(true, Ordering::Relaxed);
        }
        self.proofs.proven(&blocks_of(offset, length)).map(|seen| (files.data.as_fd(), seen))
    }

    /// Whether these bytes, read where [`Store::locate_seen`] said, are the content's.
    pub(crate) fn settle_seen(&self, offset: u64, bytes: &[u8], seen: Generation) -> bool {
        self.verify(offset, bytes, seen) == Local::Hit
    }

    /// Whether what the kernel read where [`Store::locate_unseen`] said is the content's: nothing of it was dropped since.
    pub(crate) fn settle_unseen(&self, offset: u64, length: u64, seen: Generation) -> bool {
        let right = self.proofs.still_proven(&blocks_of(offset, length), seen);
        if right {
            self.note_accessed(offset, length);
        }
        right
    }

    /// The same from a thread that may block.
    ///
    /// # Errors
    /// Those of the table; bytes that cannot be read are [`Local::Suspect`].
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<Local> {
        let files = self.files()?;
        let blocks = blocks_of(offset, buffer.len() as u64);
        let seen = self.proofs.generation(&blocks);
        if !self.all_present(offset, buffer.len() as u64) {
            return Ok(Local::Absent);
        }
        self.load_sums(files, blocks.start, blocks.end)?;
        if let Err(error) = files.data.read_exact_at(buffer, offset) {
            tracing::warn!(content = self.key, offset, %error, "a cached chunk cannot be read");
            return Ok(Local::Suspect(offset / BLOCK_BYTES));
        }
        Ok(self.verify(offset, buffer, seen))
    }

    fn all_present(&self, offset: u64, length: u64) -> bool {
        let mut chunks = self.shape.chunk_of(offset)..=self.shape.chunk_of(offset + length - 1);
        chunks.all(|chunk| self.is_present(chunk))
    }

    /// Checks bytes of chunks that were present after `seen` was seen, and read after that.
    fn verify(&self, offset: u64, buffer: &[u8], seen: Generation) -> Local {
        let local = self.prove(offset, buffer, seen);
        if local == Local::Hit {
            self.note_accessed(offset, buffer.len() as u64);
        }
        local
    }

    /// The same without their counting as read.
    fn prove(&self, offset: u64, buffer: &[u8], seen: Generation) -> Local {
        let blocks = blocks_of(offset, buffer.len() as u64);
        for (block, bytes) in blocks.clone().zip(buffer.chunks_exact(BLOCK)) {
            let Some(sum) = self.sums.get(block) else { return Local::Slow };
            if sum.load(Ordering::Acquire) != checksum(self.salt, block, bytes) {
                // It was right once, perhaps: nobody is given it unseen from now on.
                self.proofs.revoke(&(block..block + 1));
                return Local::Suspect(block);
            }
        }
        self.proofs.prove(&blocks, seen);
        Local::Hit
    }

    fn note_accessed(&self, offset: u64, length: u64) {
        let last = self.shape.chunk_of(offset + length - 1);
        for chunk in self.shape.chunk_of(offset)..=last {
            if let Some(state) = self.states.get(chunk) {
                // A store only where it changes something: the line stays shared between cores.
                if state.load(Ordering::Relaxed) & ACCESSED == 0 {
                    state.fetch_or(ACCESSED, Ordering::Relaxed);
                }
            }
        }
    }

    /// Brings the pages with the sums of `first..end` into memory.
    fn load_sums(&self, files: &Files, first: u64, end: u64) -> io::Result<()> {
        for page in
            Paged::<AtomicU32, SUM_PAGE>::page_of(first)..=Paged::<AtomicU32, SUM_PAGE>::page_of(end - 1)
        {
            if self.sums.page(page).is_some() {
                continue;
            }
            let block = (page * SUM_PAGE) as u64;
            let count = (self.shape.blocks() - block).min(SUM_PAGE as u64) as usize;
            let mut bytes = [0; SUM_PAGE * 4];
            files.table.read_exact_at(&mut bytes[..count * 4], self.shape.sum_offset(block))?;
            self.sums.set(page, || {
                Box::new(std::array::from_fn(|at| {
                    let at = at * 4;
                    AtomicU32::new(u32::from_le_bytes([
                        bytes[at],
                        bytes[at + 1],
                        bytes[at + 2],
                        bytes[at + 3],
                    ]))
                }))
            });
        }
        Ok(())
    }

    /// Stores a chunk that is not present. Who calls holds the chunk's flight; `bytes` are verified and as long as the
    /// chunk. Blocks.
    ///
    /// # Errors
    /// After an error the chunk is not present.
    pub(crate) fn fill(&self, chunk: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(bytes.len() as u64, self.shape.bytes_of(chunk), "a chunk is stored whole");
        let files = self.files()?;
        let start = self.shape.start(chunk);
        let first = start / BLOCK_BYTES;
        self.load_sums(files, first, first + bytes.len() as u64 / BLOCK_BYTES)?;
        files.data.write_all_at(bytes, start)?;
        let mut sums = Vec::with_capacity(bytes.len() / BLOCK * 4);
        for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK)) {
            let sum = checksum(self.salt, block, bytes);
            if let Some(slot) = self.sums.get(block) {
                slot.store(sum, Ordering::Release);
            }
            sums.extend_from_slice(&sum.to_le_bytes());
        }
        files.table.write_all_at(&sums, self.shape.sum_offset(first))?;
        let old = self.change_state(chunk, |state| state.fetch_or(PRESENT, Ordering::Release));
        let stored = files.table.write_all_at(&[(old | PRESENT) & ON_DISK], Shape::state_offset(chunk));
        if stored.is_err() {
            self.change_state(chunk, |state| state.fetch_and(!PRESENT, Ordering::Release));
        }
        stored
    }

    /// Reads back a chunk that was just stored, where somebody wants bytes that he does not see: what is fetched ahead of
    /// readers is theirs to have from the first read on. What cannot be read now is found out by who reads it. Blocks.
    pub(crate) fn read_back(&self, chunk: u64) {
        let Some(files) = self.files.get().filter(|_| self.unseen_wanted.load(Ordering::Relaxed)) else {
            return;
        };
        let (start, length) = (self.shape.start(chunk), self.shape.bytes_of(chunk));
        let seen = self.proofs.generation(&blocks_of(start, length));
        let mut bytes = vec![0; length as usize];
        if self.is_present(chunk) && files.data.read_exact_at(&mut bytes, start).is_ok() {
            self.prove(start, &bytes, seen);
        }
    }

    /// Forgets chunks, gives their room back, and says how many bytes were present. Who calls keeps flights of these
    /// chunks from starting, or holds them. Readers that are at it find that the sums do not match, or, where the kernel
    /// reads for them unseen, that the generation is another ([`Proofs`] has the argument). Blocks.
    pub(crate) fn drop_run(&self, first: u64, count: u64) -> u64 {
        let mut bytes = 0;
        let mut states = Vec::with_capacity(count as usize);
        for chunk in first..first + count {
            let old =
                self.change_state(chunk, |state| state.fetch_and(!(PRESENT | ACCESSED), Ordering::AcqRel));
            states.push(old & ON_DISK & !PRESENT);
            bytes += if old & PRESENT != 0 { self.shape.bytes_of(chunk) } else { 0 };
        }
        let start = self.shape.start(first);
        let end = self.shape.length.min(self.shape.start(first + count));
        self.proofs.revoke(&blocks_of(start, end - start));
        let dropped = self.files().and_then(|files| {
            // A state that stays behind on disk is found out by the checksums.
            let stated = files.table.write_all_at(&states, Shape::state_offset(first));
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&files.data, flags, start, end - start)?;
            stated
        });
        if let Err(error) = dropped {
            tracing::warn!(content = self.key, %error, "room of dropped chunks was not given back");
        }
        bytes
    }

    /// Sets or clears the pinned bit of a run and makes that durable. Blocks.
    pub(crate) fn set_pinned(&self, first: u64, count: u64, pinned: bool) -> io::Result<()> {
        let files = self.files()?;
        let mut at = first;
        while at < first + count {
            let run = (first + count - at).min(STATE_PAGE as u64);
            let states: Vec<u8> = (at..at + run)
                .map(|chunk| {
                    self.change_state(chunk, |state| match pinned {
                        true => state.fetch_or(PINNED, Ordering::AcqRel) | PINNED,
                        false => state.fetch_and(!PINNED, Ordering::AcqRel) & !PINNED,
                    }) & ON_DISK
                })
                .collect();
            files.table.write_all_at(&states, Shape::state_offset(at))?;
            at += run;
        }
        files.table.sync_data()
    }

    fn change_state(&self, chunk: u64, change: impl FnOnce(&AtomicU8) -> u8) -> u8 {
        let page = Paged::<AtomicU8, STATE_PAGE>::page_of(chunk);
        let page = self.states.set(page, || Box::new(std::array::from_fn(|_| AtomicU8::new(0))));
        change(&page[(chunk % STATE_PAGE as u64) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_a_block_is_what_the_format_says() {
        let block: Vec<u8> = (0..BLOCK as u32).map(|at| ((at * at) >> 7) as u8).collect();
        for (salt, number) in [(0, 0), (77, 1), (u32::MAX, 5), (0x8765_4321, 1 << 31), (9, (1 << 32) + 3)] {
            let expected = crc32c::crc32c_append(salt ^ number as u32, &block);
            assert_eq!(checksum(salt, number, &block), expected, "salt {salt:#x}, block {number}");
        }
        assert_eq!((crc32c::crc32c(&[]), checksum(0, 0, &[])), (0, 1), "0 says that there is none");
    }
}

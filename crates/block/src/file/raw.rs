//! The system calls of the file device: an open file, what was learned of it, and blocking or never-blocking calls.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, AtFlags, FallocateFlags, MemfdFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::FileOptions;
use crate::{Error, ErrorKind, Geometry, MAXIMUM_BLOCK, Result, ZeroFlags};

/// Memory of `O_DIRECT` requests is aligned to this, which satisfies every device that a page satisfies.
const DIRECT_MEMORY_ALIGNMENT: usize = 4096;
/// Zero bytes written at once where the file cannot be told to zero itself.
const ZERO_PIECE: usize = 1 << 20;
/// `statfs` type of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Regular,
    /// A regular file whose pages are its store: never worth another thread.
    InMemory,
    BlockDevice,
}

#[derive(Debug)]
pub(super) struct RawFile {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    file: File,
    kind: Kind,
    direct: bool,
    /// Set when the file system refused `RWF_NOWAIT`, so that it is asked once and not at every request.
    no_cached_reads: AtomicBool,
    no_cached_writes: AtomicBool,
}

/// Owned bytes inside an allocation that is large enough to begin at an aligned address.
pub(super) struct AlignedBytes {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBytes {
    fn zeroed(length: usize, alignment: usize) -> Self {
        let memory = vec![0; length + alignment - 1];
        let start = memory.as_ptr().align_offset(alignment);
        AlignedBytes { memory, start, length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.length]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.length]
    }
}

impl RawFile {
    pub(super) fn open(path: PathBuf, options: FileOptions) -> Result<(Self, Geometry)> {
        let context = || format!("opening {} as a device", path.display());
        let flags = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = File::options()
            .read(true)
            .write(!options.read_only)
            .custom_flags((flags | OFlags::CLOEXEC).bits() as i32)
            .open(&path)
            .map_err(|source| Error::from_os(context(), source))?;
        RawFile::of(file, path, options)
    }

    pub(super) fn in_memory(size: u64) -> Result<(Self, Geometry)> {
        let context = || format!("making a file of {size} bytes in memory");
        let file = rustix::fs::memfd_create(c"loam-memory", MemfdFlags::CLOEXEC).map(File::from);
        let file = file.map_err(|errno| Error::from_os(context(), errno.into()))?;
        file.set_len(size).map_err(|source| Error::from_os(context(), source))?;
        RawFile::of(file, "memory".into(), FileOptions::default())
    }

    fn of(file: File, path: PathBuf, options: FileOptions) -> Result<(Self, Geometry)> {
        let context = || format!("opening {} as a device", path.display());
        let metadata = file.metadata().map_err(|source| Error::from_os(context(), source))?;
        let kind = if metadata.is_file() {
            let file_system =
                rustix::fs::fstatfs(&file).map_err(|errno| Error::from_os(context(), errno.into()))?;
            if file_system.f_type == TMPFS_MAGIC { Kind::InMemory } else { Kind::Regular }
        } else if metadata.file_type().is_block_device() {
            Kind::BlockDevice
        } else {
            let context = context() + ": it is neither a regular file nor a block device";
            return Err(Error::new(ErrorKind::Invalid, context));
        };
        if kind == Kind::InMemory {
            // tmpfs does not say that its reads do not wait, so io_uring hands each to a worker thread, unless the file
            // was opened as one that never does. Where a transport reads by a ring that is 1.6 us against 4.
            let flags =
                rustix::fs::fcntl_getfl(&file).map_err(|errno| Error::from_os(context(), errno.into()))?;
            rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)
                .map_err(|errno| Error::from_os(context(), errno.into()))?;
        }
        let raw = RawFile {
            read_only: options.read_only,
            direct: options.direct,
            no_cached_reads: AtomicBool::new(options.direct),
            no_cached_writes: AtomicBool::new(options.direct),
            file,
            kind,
            path,
        };
        let size = match kind {
            Kind::BlockDevice => {
                raw.seek(SeekFrom::End(0)).map_err(|e| raw.fail("finding the size", 0, 0, e))?
            }
            Kind::Regular | Kind::InMemory => metadata.len(),
        };
        let minimum_block = raw.minimum_block()?;
        if size % u64::from(minimum_block) != 0 {
            let context = format!(
                "opening {}: its size of {size} bytes is not a multiple of {minimum_block}, as direct I/O needs",
                raw.path.display()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let preferred = u32::try_from(metadata.blksize()).ok().filter(|size| size.is_power_of_two());
        let preferred_block = preferred.unwrap_or(4096).clamp(minimum_block.max(4096), MAXIMUM_BLOCK);
        let geometry = Geometry { size, minimum_block, preferred_block, maximum_block: MAXIMUM_BLOCK };
        Ok((raw, geometry))
    }

    /// Block devices keep their logical sectors even buffered, so that zeroes and trims need no edges written.
    fn minimum_block(&self) -> Result<u32> {
        let sector = match self.kind {
            Kind::BlockDevice => rustix::fs::ioctl_blksszget(&self.file)
                .map_err(|errno| self.fail("asking for the sector size", 0, 0, errno.into()))?,
            Kind::Regular | Kind::InMemory => 1,
        };
        if !self.direct {
            return Ok(sector);
        }
        let dio = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let dio = dio.ok().map(|stat| stat.stx_dio_offset_align).filter(|align| align.is_power_of_two());
        // Kernels before 6.1 do not say; 4096 is a multiple of every sector size in use.
        Ok(dio.unwrap_or(4096).max(sector))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind != Kind::BlockDevice
    }

    pub(super) fn describe(&self, operation: &str, offset: u64, length: u64) -> String {
        format!("{operation} of {length} bytes at {offset} of {}", self.path.display())
    }

    fn fail(&self, operation: &str, offset: u64, length: u64, source: io::Error) -> Error {
        Error::from_os(self.describe(operation, offset, length), source)
    }

    fn cut_short(&self, offset: u64, length: u64) -> Error {
        let context = self.describe("read", offset, length) + ": the file was cut short since it was opened";
        Error::new(ErrorKind::Io, context)
    }

    pub(super) fn seek(&self, to: SeekFrom) -> io::Result<u64> {
        rustix::fs::seek(&self.file, to).map_err(io::Error::from)
    }

    /// Fills as much of `buffer` as is in memory; how much that is.
    pub(super) fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if self.no_cached_reads.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let flags = match self.kind {
            Kind::InMemory => ReadWriteFlags::empty(),
            Kind::Regular | Kind::BlockDevice => ReadWriteFlags::NOWAIT,
        };
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(&mut buffer[done..])], at, flags) {
                Ok(0) => return Err(self.cut_short(offset, buffer.len() as u64)),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::OPNOTSUPP) => {
                    self.no_cached_reads.store(true, Ordering::Relaxed);
                    break;
                }
                Err(errno) => return Err(self.fail("read", offset, buffer.len() as u64, errno.into())),
            }
        }
        Ok(done)
    }

    pub(super) fn read_blocking(&self, offset: u64, length: usize) -> Result<AlignedBytes> {
        let mut bytes = AlignedBytes::zeroed(length, self.memory_alignment());
        self.file.read_exact_at(bytes.bytes_mut(), offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.cut_short(offset, length as u64),
            _ => self.fail("read", offset, length as u64, source),
        })?;
        Ok(bytes)
    }

    fn memory_alignment(&self) -> usize {
        if self.direct { DIRECT_MEMORY_ALIGNMENT } else { 1 }
    }

    pub(super) fn owned_copy(&self, data: &[u8]) -> AlignedBytes {
        let mut bytes = AlignedBytes::zeroed(data.len(), self.memory_alignment());
        bytes.bytes_mut().copy_from_slice(data);
        bytes
    }

    /// Writes into the page cache if that needs no waiting; `None`, with nothing changed, if it does.
    pub(super) fn write_cached(&self, offset: u64, data: &[u8]) -> Option<Result<()>> {
        if self.kind == Kind::InMemory && !self.direct {
            return Some(self.write_blocking(offset, data, false));
        }
        if self.no_cached_writes.load(Ordering::Relaxed) {
            return None;
        }
        match rustix::io::pwritev2(&self.file, &[IoSlice::new(data)], offset, ReadWriteFlags::NOWAIT) {
            // A request may not be half done when it is dropped, so what did not fit is written here and now.
            Ok(done) => Some(self.write_blocking(offset + done as u64, &data[done..], false)),
            Err(Errno::OPNOTSUPP) => {
                self.no_cached_writes.store(true, Ordering::Relaxed);
                None
            }
            Err(_) => None,
        }
    }

    pub(super) fn write_blocking(&self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        let flags = if fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            match rustix::io::pwritev2(&self.file, &[IoSlice::new(&data[done..])], at, flags) {
                Ok(0) => {
                    let source = io::Error::from(io::ErrorKind::WriteZero);
                    return Err(self.fail("write", offset, data.len() as u64, source));
                }
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.fail("write", offset, data.len() as u64, errno.into())),
            }
        }
        Ok(())
    }

    /// `Ok(false)` where the file system or the device does not know how.
    fn fallocate(&self, flags: FallocateFlags, operation: &str, offset: u64, length: u64) -> Result<bool> {
        loop {
            let flags = flags | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
                Err(errno) => return Err(self.fail(operation, offset, length, errno.into())),
            }
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        const OPERATION: &str = "write of zeroes";
        let punched = length == 0
            || match (flags.no_hole, self.kind) {
                (false, _) => self.fallocate(FallocateFlags::PUNCH_HOLE, OPERATION, offset, length)?,
                // For a block device the kernel would write zeroes itself here, which is not fast.
                (true, Kind::BlockDevice) if flags.fast_only => false,
                (true, _) => self.fallocate(FallocateFlags::ZERO_RANGE, OPERATION, offset, length)?,
            };
        if !punched {
            if flags.fast_only {
                let context = self.describe(OPERATION, offset, length) + ": bytes would have to be written";
                return Err(Error::new(ErrorKind::NotSupported, context));
            }
            self.write_zero_bytes(offset, length)?;
        }
        if flags.fua { self.sync() } else { Ok(()) }
    }

    fn write_zero_bytes(&self, offset: u64, length: u64) -> Result<()> {
        let zeroes = AlignedBytes::zeroed(length.min(ZERO_PIECE as u64) as usize, self.memory_alignment());
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(ZERO_PIECE as u64) as usize;
            self.write_blocking(offset + done, &zeroes.bytes()[..piece], false)?;
            done += piece as u64;
        }
        Ok(())
    }

    /// A trim is advice: where no hole can be punched the bytes stay. (For a block device the kernel turns a punched
    /// hole into "write zeroes, unmap if you can", and refuses if it would have to send zero bytes.)
    pub(super) fn trim(&self, offset: u64, length: u64) -> Result<()> {
        if length != 0 {
            self.fallocate(FallocateFlags::PUNCH_HOLE, "trim", offset, length)?;
        }
        Ok(())
    }

    /// Whether there is a page cache that may not hold the file's bytes.
    pub(super) fn has_page_cache_to_fill(&self) -> bool {
        self.kind != Kind::InMemory && !self.direct
    }

    /// Starts reading into the page cache. Advice: what cannot be had is found out by who reads it.
    pub(super) fn read_ahead(&self, offset: u64, length: u64) -> Result<()> {
        match rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed) {
            Ok(()) | Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            Err(errno) => Err(self.fail("prefetch", offset, length, errno.into())),
        }
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|source| Error::from_os(format!("flush of {}", self.path.display()), source))
    }
}

//! The `file` device: a regular file or a block device.
//!
//! Buffered reads ask the page cache first (`preadv2` with `RWF_NOWAIT`): what is cached is answered by the caller's
//! thread, only what is not goes to tokio's blocking pool. Files on tmpfs know no `RWF_NOWAIT` and are memory, so they
//! are always read by the caller. With `direct` the page cache is passed by (`O_DIRECT`): every request goes to the
//! pool, through an aligned buffer of its own.
//!
//! Zeroes are written by punching holes (`FALLOC_FL_PUNCH_HOLE`) or, where the range must stay allocated, by
//! `FALLOC_FL_ZERO_RANGE`; extents come from `SEEK_DATA` and `SEEK_HOLE`.

mod extents;
mod raw;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::device::check_extents_range;
use crate::pattern;
use crate::{
    Access, BlockDevice, Capabilities, Error, ErrorKind, Extent, Geometry, Io, Located, Result, Ticket,
    WriteFlags, ZeroFlags, check_range,
};
use extents::DataCache;
use raw::RawFile;

/// Bytes of a pattern that are made before they are written.
const PATTERN_PIECE: u64 = 1 << 20;

/// How a file is opened as a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Open for reading only; writes fail with [`ErrorKind::ReadOnly`].
    pub read_only: bool,
    /// Pass the page cache by. Offsets and lengths must then keep the file's direct I/O alignment, which becomes the
    /// device's minimum block.
    pub direct: bool,
}

/// A regular file or a block device as a [`BlockDevice`]. Its size is the one it had when it was opened.
#[derive(Debug)]
pub struct FileDevice {
    file: Arc<RawFile>,
    geometry: Geometry,
    known_data: Arc<DataCache>,
}

impl FileDevice {
    /// Opens `path`.
    ///
    /// # Errors
    /// When it cannot be opened, is neither a regular file nor a block device, or, with `direct`, its size is not a
    /// multiple of its direct I/O alignment.
    pub fn open(path: impl Into<PathBuf>, options: FileOptions) -> Result<Self> {
        let (file, geometry) = RawFile::open(path.into(), options)?;
        Ok(FileDevice { file: Arc::new(file), geometry, known_data: Arc::default() })
    }

    /// Makes a sparse file of `size` bytes and opens it.
    ///
    /// # Errors
    /// When `path` exists or cannot be made.
    pub fn create(path: impl Into<PathBuf>, size: u64, options: FileOptions) -> Result<Self> {
        let path = path.into();
        let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&path);
        made.and_then(|file| file.set_len(size)).map_err(|source| {
            Error::from_os(format!("making {} with {size} bytes", path.display()), source)
        })?;
        FileDevice::open(path, options)
    }

    /// An anonymous file in memory (`memfd_create`) of `size` bytes, all zero: memory that a transport's kernel side can
    /// read by itself. Nothing is allocated for what was not written.
    ///
    /// # Errors
    /// When the kernel gives none of this size.
    pub fn in_memory(size: u64) -> Result<Self> {
        let (file, geometry) = RawFile::in_memory(size)?;
        Ok(FileDevice { file: Arc::new(file), geometry, known_data: Arc::default() })
    }

    /// The bytes of a [`PatternDevice`](crate::PatternDevice) of `size` bytes, written to a file as
    /// [`FileDevice::in_memory`] makes it: they take their room in memory.
    ///
    /// # Errors
    /// When the kernel gives no file of this size, or memory runs out.
    pub fn pattern_in_memory(size: u64) -> Result<Self> {
        let device = FileDevice::in_memory(size)?;
        let mut piece = vec![0; PATTERN_PIECE.min(size) as usize];
        for offset in (0..size).step_by(PATTERN_PIECE as usize) {
            let piece = &mut piece[..PATTERN_PIECE.min(size - offset) as usize];
            pattern::fill(offset, piece);
            device.file.write_blocking(offset, piece, false)?;
        }
        Ok(device)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    fn check(&self, operation: &'static str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry, operation, offset, length)
    }

    fn check_write(&self, operation: &'static str, offset: u64, length: u64) -> Result<()> {
        self.check(operation, offset, length)?;
        if self.file.read_only {
            let context = self.file.describe(operation, offset, length) + ": it was opened for reading only";
            return Err(Error::new(ErrorKind::ReadOnly, context));
        }
        Ok(())
    }

    /// Runs `work` on tokio's blocking pool once the returned request is polled.
    fn on_pool<T: Send + Unpin + 'static>(
        &self,
        work: impl FnOnce(&RawFile) -> Result<T> + Send + 'static,
    ) -> Io<'_, T> {
        let file = Arc::clone(&self.file);
        Io::pending(run_blocking(move || work(&file)))
    }
}

async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|gone| {
        // The runtime drops queued work when it shuts down; a panic in `work` cannot be told apart by the waiter.
        let kind = if gone.is_cancelled() { ErrorKind::ShuttingDown } else { ErrorKind::Io };
        Err(Error::with_source(kind, "file request on the blocking pool", gone))
    })
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        let write = !self.file.read_only;
        let regular = self.file.is_regular();
        Capabilities {
            write,
            trim: write,
            zero: write,
            fast_zero: write,
            extents: regular,
            multi_connection: true,
            lazy: false,
            rotational: None,
        }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        if let Err(error) = self.check("read", offset, buffer.len() as u64) {
            return Io::Ready(Err(error));
        }
        let done = match self.file.read_cached(offset, buffer) {
            Ok(done) if done == buffer.len() => return Io::Ready(Ok(())),
            Ok(done) => done,
            Err(error) => return Io::Ready(Err(error)),
        };
        let rest = &mut buffer[done..];
        let offset = offset + done as u64;
        let length = rest.len();
        let file = Arc::clone(&self.file);
        Io::pending(async move {
            let read = run_blocking(move || file.read_blocking(offset, length)).await?;
            rest.copy_from_slice(read.bytes());
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        if let Err(error) = self.check_write("write", offset, data.len() as u64) {
            return Io::Ready(Err(error));
        }
        if data.is_empty() && !flags.fua {
            return Io::Ready(Ok(()));
        }
        if !flags.fua
            && let Some(done) = self.file.write_cached(offset, data)
        {
            return Io::Ready(done);
        }
        let file = Arc::clone(&self.file);
        Io::pending(async move {
            let owned = file.owned_copy(data);
            run_blocking(move || file.write_blocking(offset, owned.bytes(), flags.fua)).await
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if let Err(error) = self.check_write("write of zeroes", offset, length) {
            return Io::Ready(Err(error));
        }
        let known_data = Arc::clone(&self.known_data);
        self.on_pool(move |file| {
            known_data.forget();
            file.write_zeroes(offset, length, flags)
        })
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = self.check_write("trim", offset, length) {
            return Io::Ready(Err(error));
        }
        let known_data = Arc::clone(&self.known_data);
        self.on_pool(move |file| {
            known_data.forget();
            file.trim(offset, length)
        })
    }

    fn flush(&self) -> Io<'_, ()> {
        if self.file.read_only {
            return Io::Ready(Ok(()));
        }
        self.on_pool(RawFile::sync)
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        if let Err(error) = check_extents_range(&self.geometry, offset, length) {
            return Io::Ready(Err(error));
        }
        if let Some(extent) = self.known_data.find(offset, length) {
            return Io::Ready(Ok(vec![extent]));
        }
        let known_data = Arc::clone(&self.known_data);
        self.on_pool(move |file| extents::collect(file, &known_data, offset, length, limit))
    }

    /// Asks the kernel to read ahead (`posix_fadvise`), which is done when it has begun to.
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = self.check("prefetch", offset, length) {
            return Io::Ready(Err(error));
        }
        if length == 0 || !self.file.has_page_cache_to_fill() {
            return Io::Ready(Ok(()));
        }
        self.on_pool(move |file| file.read_ahead(offset, length))
    }

    /// Always: whoever has the file may read it. A file that was cut short gives a short read, and `read` says so.
    fn locate(&self, offset: u64, length: u64, _access: Access) -> Option<Located<'_>> {
        let aligned = (offset | length) & (u64::from(self.geometry.minimum_block) - 1) == 0;
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.geometry.size);
        let ticket = Ticket::new(offset, length, 0).filter(|_| aligned && inside)?;
        Some(Located { file: self.file.as_fd(), offset, ticket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cached_block_is_answered_by_the_caller() -> Result<()> {
        for parent in ["/var/tmp", "/dev/shm"] {
            let directory = tempfile::tempdir_in(parent).expect("temporary directory");
            let device = FileDevice::create(directory.path().join("f"), 1 << 20, FileOptions::default())?;
            device.write(4096, &[7; 4096], WriteFlags::default()).await?;
            let mut buffer = [0; 4096];
            let answer = device.read(4096, &mut buffer);
            assert!(answer.is_ready(), "in {parent}");
            answer.await?;
            assert_eq!(buffer, [7; 4096]);
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_prefetch_fills_the_page_cache() -> Result<()> {
        let directory = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
        let path = directory.path().join("f");
        std::fs::write(&path, vec![7; 8 << 20]).expect("file");
        let file = std::fs::File::open(&path).expect("file");
        file.sync_all().expect("written back");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
        let device = FileDevice::open(&path, FileOptions { read_only: true, ..FileOptions::default() })?;
        let far = 4 << 20;
        if device.read(far, &mut [0; 4096]).is_ready() {
            return Ok(()); // the file system keeps its pages (overlayfs and tmpfs do): nothing to see
        }
        device.prefetch(far, 1 << 20).await?;
        let mut ready = false;
        for _ in 0..500 {
            ready = ready || device.read(far + (1 << 19), &mut [0; 4096]).is_ready();
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        assert!(ready, "nobody read it, and it is there");
        Ok(())
    }

    #[tokio::test]
    async fn a_file_cut_short_is_an_error_not_zeroes() -> Result<()> {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("f");
        let device = FileDevice::create(&path, 1 << 20, FileOptions::default())?;
        std::fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(4096)).expect("cut");
        let error = device.read(0, &mut [0; 8192]).await.expect_err("half of it is gone");
        assert!(error.to_string().contains("cut short"), "{error}");
        Ok(())
    }

    #[tokio::test]
    async fn a_pattern_in_memory_is_all_there() -> Result<()> {
        let size = PATTERN_PIECE + 12_288;
        let device = FileDevice::pattern_in_memory(size)?;
        assert_eq!(device.geometry().size, size);
        let mut bytes = vec![0; size as usize];
        device.read(0, &mut bytes).await?;
        crate::PatternDevice::verify(0, &bytes)
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let error = FileDevice::open("/dev/zero", FileOptions::default()).expect_err("a character device");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let error = FileDevice::open("/nonexistent", FileOptions::default()).expect_err("nothing there");
        assert!(error.to_string().contains("/nonexistent"));
    }

    #[tokio::test]
    async fn direct_reads_and_writes_pass_through_aligned_buffers() -> Result<()> {
        let directory = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
        let options = FileOptions { direct: true, ..FileOptions::default() };
        let path = directory.path().join("f");
        let device = FileDevice::create(&path, 1 << 20, options)?;
        let block = device.geometry().minimum_block as usize;
        assert!(block >= 512);
        let data: Vec<u8> = (0..block * 3 + 1).map(|i| i as u8).collect();
        device.write(block as u64, &data[1..], WriteFlags { fua: true }).await?;
        let mut back = vec![0; block * 3 + 1];
        device.read(block as u64, &mut back[1..]).await?;
        assert_eq!(back[1..], data[1..]);
        let error = device.read(1, &mut back[..block]).await.expect_err("not aligned");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        std::fs::write(directory.path().join("odd"), [1; 1000]).expect("file of an odd size");
        assert!(FileDevice::open(directory.path().join("odd"), options).is_err());
        Ok(())
    }
}

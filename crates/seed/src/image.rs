//! Where bytes are written to and read from: a file, a device, memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What a formatter writes to.
pub trait Image {
    /// Makes the image `length` bytes long, reading as zeroes where nothing is written. A block device that is
    /// long enough has nothing to do: the formatter overwrites whole blocks and every superblock.
    ///
    /// # Errors
    /// Whatever keeps the image from having that length.
    fn set_length(&mut self, length: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// Whatever keeps any byte from being written.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// What a verifier reads from. Shared by reference between threads.
pub trait ReadAt: Sync {
    /// Bytes of the image.
    ///
    /// # Errors
    /// Whatever keeps the length from being known.
    fn length(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset`; a buffer that reaches beyond the end is an error.
    ///
    /// # Errors
    /// Whatever keeps any byte from being read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Image for File {
    fn set_length(&mut self, length: u64) -> io::Result<()> {
        if !self.metadata()?.is_file() {
            let available = ReadAt::length(self)?;
            return if available >= length {
                Ok(())
            } else {
                Err(io::Error::new(io::ErrorKind::StorageFull, format!("the device has {available} bytes")))
            };
        }
        self.set_len(0)?;
        self.set_len(length).map_err(|error| {
            // ext4 ends at 16 TiB, so this is what a user of large virtual images meets first.
            if matches!(error.kind(), io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput) {
                let hint = "this file system takes no files of that length: use tmpfs, XFS or btrfs";
                io::Error::new(error.kind(), format!("{error} ({hint})"))
            } else {
                error
            }
        })
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }
}

impl ReadAt for File {
    fn length(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.is_file() {
            return Ok(metadata.len());
        }
        // A block device: its inode says 0, its end is found by seeking.
        use std::io::{Seek, SeekFrom};
        let mut handle: &File = self;
        handle.seek(SeekFrom::End(0))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// A sparse image in memory: only pages that were written take room.
#[derive(Debug, Clone, Default)]
pub struct MemoryImage {
    length: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// Bytes of a page of a [`MemoryImage`].
const PAGE_SIZE: usize = 4096;

impl MemoryImage {
    /// An empty image.
    pub fn new() -> Self {
        MemoryImage::default()
    }

    /// Bytes of memory that the content takes.
    pub fn allocated(&self) -> u64 {
        (self.pages.len() * PAGE_SIZE) as u64
    }

    /// The pages that were written, in order: offset and 4096 bytes.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().map(|(&offset, page)| (offset, &page[..]))
    }

    fn check(&self, offset: u64, length: usize) -> io::Result<()> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the image ends at {}", self.length),
            )),
        }
    }
}

/// Cuts `length` bytes at `offset` into parts of pages: page, start in the page, bytes.
fn page_parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let position = offset + done as u64;
            let within = (position % PAGE_SIZE as u64) as usize;
            let bytes = (PAGE_SIZE - within).min(length - done);
            done += bytes;
            (position - within as u64, within, bytes)
        })
    })
}

impl Image for MemoryImage {
    fn set_length(&mut self, length: u64) -> io::Result<()> {
        self.pages.clear();
        self.length = length;
        Ok(())
    }

    fn write_at(&mut self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len())?;
        for (page, start, bytes) in page_parts(offset, data.len()) {
            let (part, rest) = data.split_at(bytes);
            let page = self.pages.entry(page).or_insert_with(|| vec![0; PAGE_SIZE].into());
            page[start..start + bytes].copy_from_slice(part);
            data = rest;
        }
        Ok(())
    }
}

impl ReadAt for MemoryImage {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn read_at(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        self.check(offset, buffer.len())?;
        for (page, start, bytes) in page_parts(offset, buffer.len()) {
            let (part, rest) = buffer.split_at_mut(bytes);
            match self.pages.get(&page) {
                Some(page) => part.copy_from_slice(&page[start..start + bytes]),
                None => part.fill(0),
            }
            buffer = rest;
        }
        Ok(())
    }
}

//! The few file operations that a map stands on, as a trait: so that tests run the map's real code on a simulated
//! disk that loses power at every write.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use loam_sys::map_file::MappedFile;
use rustix::fs::FlockOperation;

/// A directory of files. Names are plain, without slashes. As on any POSIX file system, nothing is durable before it
/// is synced: bytes and length by [`StorageFile::sync`], names by [`Storage::sync`].
pub trait Storage: Send + Sync + 'static {
    /// An open file.
    type File: StorageFile;
    /// A whole file in memory, unchanging.
    type Mapping: Deref<Target = [u8]> + Send + Sync + 'static;

    /// Where it is, for messages.
    fn location(&self) -> &Path;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Makes an empty file, replacing what has the name.
    fn create(&self, name: &str) -> io::Result<Self::File>;
    /// Maps a file that nobody will write to again.
    fn map(&self, name: &str) -> io::Result<Self::Mapping>;
    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// The names of all files.
    fn names(&self) -> io::Result<Vec<String>>;
    /// Makes names durable.
    fn sync(&self) -> io::Result<()>;
}

/// A file of a [`Storage`]. Offsets and lengths are bytes.
pub trait StorageFile: Send + 'static {
    /// Length of the file.
    fn length(&self) -> io::Result<u64>;
    /// Fills all of `buffer` or fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`; after an error any part of it may be there.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Cuts the file, or lengthens it with zeroes.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Makes bytes and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// A real directory, locked (`flock`) against other processes for as long as it is open.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    handle: File,
}

impl Directory {
    /// Opens and locks `path`.
    ///
    /// # Errors
    /// `WouldBlock` when another process holds the lock; otherwise what opening a directory may fail with.
    pub fn lock(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let handle = File::open(&path)?;
        rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Directory { path, handle })
    }
}

impl Storage for Directory {
    type File = File;
    type Mapping = MappedFile;

    fn location(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path.join(name))
    }

    fn create(&self, name: &str) -> io::Result<File> {
        // A new inode each time: the old one may be mapped.
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        OpenOptions::new().read(true).write(true).create_new(true).open(self.path.join(name))
    }

    fn map(&self, name: &str) -> io::Result<MappedFile> {
        MappedFile::map(&File::open(self.path.join(name))?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }
}

impl StorageFile for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

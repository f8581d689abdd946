//! Read-only mappings of files that nobody changes any more.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// A whole file in memory, read-only.
///
/// # Why a `&[u8]` of a file is sound here
/// Rust assumes that bytes behind a shared reference do not change, and a file may change or be cut (then access is
/// SIGBUS) behind a mapping. The mapping is private and read-only, so nobody can write *through* it; what remains is
/// the file itself. [`MappedFile::map`] therefore asks callers to map only files that are complete, owned by them (in
/// a directory that they hold a lock on), and only ever replaced by renaming a new inode over them, never written or
/// cut in place. Whoever has the rights to break that has the rights to write to this process's memory as well.
#[derive(Debug)]
pub struct MappedFile {
    start: NonNull<c_void>,
    length: usize,
}

impl MappedFile {
    /// Maps all of `file`, which must be complete: see the type's documentation.
    ///
    /// # Errors
    /// When the file is empty, or the kernel refuses.
    pub fn map(file: &File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "an empty file cannot be mapped"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(MappedFile { start, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `length` readable bytes, lives until `drop`, and does not change (see the type).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: `start` and `length` are those of a mapping that `map` made and nothing borrows any more.
        unsafe { libc::munmap(self.start.as_ptr(), self.length) };
    }
}

// SAFETY: the mapping is plain read-only memory, tied to no thread.
unsafe impl Send for MappedFile {}
// SAFETY: nothing can be changed through it.
unsafe impl Sync for MappedFile {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn maps_what_is_in_the_file_even_after_it_lost_its_name() {
        let path = std::env::temp_dir().join(format!("loam-map-file-{}", std::process::id()));
        let mut file = File::create_new(&path).expect("file");
        assert!(MappedFile::map(&File::open(&path).expect("open")).is_err(), "an empty file");
        file.write_all(&[7; 5000]).expect("write");
        let mapped = MappedFile::map(&File::open(&path).expect("open")).expect("map");
        std::fs::remove_file(&path).expect("remove");
        assert_eq!(*mapped, [7; 5000]);
    }
}

//! The directories that lead to where the creation is.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::entry::Metadata;
use crate::walk::open_beneath;
use crate::{Error, Result};

/// Most directories that are kept open: far below the usual limit of 1,024 descriptors. Those above are opened again
/// when the walk comes back to them.
const OPEN_MAX: usize = 128;

/// A path of directories, the deepest ones open.
pub(super) struct Stack {
    /// Length of each directory's path and its metadata, from the root.
    frames: Vec<(usize, Metadata)>,
    /// The open ones: the last is the deepest.
    open: VecDeque<OwnedFd>,
    /// Path of the deepest directory relative to the root.
    path: Vec<u8>,
}

impl Stack {
    pub(super) fn new(root: OwnedFd) -> Self {
        Stack { frames: vec![(0, Metadata::default())], open: VecDeque::from([root]), path: Vec::new() }
    }

    /// Directories above the current one.
    pub(super) fn depth(&self) -> u32 {
        self.frames.len() as u32 - 1
    }

    /// The current directory. It is open after [`Stack::push`] and [`Stack::reopen`].
    pub(super) fn fd(&self) -> Result<BorrowedFd<'_>> {
        match self.open.back() {
            Some(fd) => Ok(fd.as_fd()),
            None => Err(Error::os("use", self.shown(b""), Errno::BADF)),
        }
    }

    /// Opens the current directory again if it was closed on the way down.
    pub(super) fn reopen(&mut self, root: BorrowedFd<'_>) -> Result<(), Errno> {
        if self.open.is_empty() {
            self.open.push_back(open_beneath(root, &self.path, OFlags::RDONLY | OFlags::DIRECTORY)?);
        }
        Ok(())
    }

    pub(super) fn push(&mut self, fd: OwnedFd, name: &[u8], metadata: Metadata) {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        self.frames.push((self.path.len(), metadata));
        self.open.push_back(fd);
        if self.open.len() > OPEN_MAX {
            self.open.pop_front();
        }
    }

    pub(super) fn pop(&mut self) {
        self.frames.pop();
        self.open.pop_back();
        self.path.truncate(self.frames.last().map_or(0, |frame| frame.0));
    }

    /// The current directory's metadata, to be set when the walk leaves it.
    pub(super) fn metadata(&self) -> Metadata {
        self.frames.last().map(|frame| frame.1.clone()).unwrap_or_default()
    }

    pub(super) fn set_metadata(&mut self, metadata: Metadata) {
        if let Some(frame) = self.frames.last_mut() {
            frame.1 = metadata;
        }
    }

    /// The path of `name` in the current directory, relative to the root.
    pub(super) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() {
            return name.to_vec();
        }
        [&self.path, &b"/"[..], name].concat()
    }

    /// The same for messages; the directory itself for an empty name.
    pub(super) fn shown(&self, name: &[u8]) -> PathBuf {
        let directory = Path::new(OsStr::from_bytes(&self.path));
        if name.is_empty() { directory.to_owned() } else { directory.join(OsStr::from_bytes(name)) }
    }
}

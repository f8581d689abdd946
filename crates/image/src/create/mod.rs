//! Online creation: an image's files made inside a mounted btrfs, without their data.
//!
//! A file's blocks are clones of ranges of `.virtual-data`, which has no checksums, so its inode must have none either:
//! it begins as an unnamed file in a staging directory with the NOCOW flag, is given its extents, size, owner, mode,
//! attributes and times, and only then its name. Directories stay open while the walk is inside them and get their own
//! metadata when it leaves: what is created in them must not inherit a default ACL or a set-group-ID bit, and must not
//! touch their times.

mod inode;
mod stack;

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::entry::{Entry, EntryKind};
use crate::index::Index;
use crate::walk::open_beneath;
use crate::{Error, Result};
use inode::{Creator, Owner};
use stack::Stack;

/// Progress is told once for this many entries.
const PROGRESS_ENTRIES: u64 = 1024;

/// Where to create, and what to clone from. All four lie on one btrfs filesystem.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The image's root: an empty directory. Its metadata becomes that of the tree's root.
    pub root: BorrowedFd<'a>,
    /// An empty directory with the NOCOW flag in the *same subvolume* as `root` (a name cannot cross subvolumes), but
    /// not below what the image creates. The caller removes it.
    pub staging: BorrowedFd<'a>,
    /// `.virtual-data`, open for reading: its offsets are addresses.
    pub virtual_data: BorrowedFd<'a>,
    /// Address at which the content's run begins, bytes.
    pub base: u64,
    /// Where `root` is, for messages.
    pub path: &'a std::path::Path,
}

/// How the caller follows and ends a creation.
#[derive(Clone, Default)]
pub struct Control {
    /// Set from outside to end it with [`Error::Cancelled`].
    pub cancel: Arc<AtomicBool>,
    /// Told the number of entries made, now and then.
    pub progress: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

/// What was created.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Created {
    /// Entries, the root included.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Sum of their sizes, bytes.
    pub bytes: u64,
    /// Ranges cloned.
    pub clones: u64,
}

/// Makes all entries of `index` below the target's root. Blocking; nothing is synced. What was made before an error
/// stays: the caller removes the subvolume.
///
/// # Errors
/// [`Error::Os`] with the path and the step; [`Error::Index`]; [`Error::Cancelled`].
pub fn create(index: &Index, target: &Target<'_>, control: &Control) -> Result<Created> {
    let link_targets = link_targets(index)?;
    let creator = Creator { target, owner: Owner::of_new_files(target)?, umask: umask(target)? };
    let root = open_beneath(target.root, b"", OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|error| Error::os("open", target.path, error))?;
    let mut walk = Walk { creator, stack: Stack::new(root), link_targets, created: Created::default() };
    let mut entries = index.entries();
    let Some(top) = entries.next().transpose()? else { return Ok(walk.created) };
    walk.stack.set_metadata(top.metadata);
    walk.created.entries = 1;
    for entry in entries {
        walk.entry(&entry?)?;
        let entries = walk.created.entries;
        if control.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        if entries.is_multiple_of(PROGRESS_ENTRIES)
            && let Some(progress) = &control.progress
        {
            progress(entries);
        }
    }
    walk.leave_to(0)?;
    let metadata = walk.stack.metadata();
    walk.creator
        .finish_directory(walk.stack.fd()?, &metadata)
        .map_err(|(step, error)| walk.error(&step, b"", error))?;
    if let Some(progress) = &control.progress {
        progress(walk.created.entries);
    }
    Ok(walk.created)
}

/// The entries that hard links lead to; their paths are filled in when they are made.
fn link_targets(index: &Index) -> Result<HashMap<u32, Vec<u8>>> {
    let mut targets = HashMap::new();
    for entry in index.entries() {
        if let EntryKind::HardLink(target) = entry?.kind {
            targets.insert(target, Vec::new());
        }
    }
    Ok(targets)
}

struct Walk<'a> {
    creator: Creator<'a>,
    stack: Stack,
    link_targets: HashMap<u32, Vec<u8>>,
    created: Created,
}

/// A failed step: which, and why.
type Failure = (String, Errno);

impl Walk<'_> {
    /// An error at `name` in the current directory.
    fn error(&self, step: &str, name: &[u8], error: Errno) -> Error {
        let path: PathBuf = self.creator.target.path.join(self.stack.shown(name));
        Error::os(step, path, error)
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.leave_to(entry.depth - 1)?;
        if let EntryKind::Directory = entry.kind {
            self.enter(entry)?;
        } else if let EntryKind::HardLink(target) = entry.kind {
            self.hard_link(entry, target)?;
        } else {
            let reopened = self.stack.reopen(self.creator.target.root);
            reopened.map_err(|error| self.error("open", b"", error))?;
            let made = self.creator.make(self.stack.fd()?, entry);
            made.map_err(|(step, error)| self.error(&step, &entry.name, error))?;
            self.count(&entry.kind);
        }
        if let Some(path) = self.link_targets.get_mut(&entry.number) {
            *path = self.stack.path_of(&entry.name);
        }
        self.created.entries += 1;
        Ok(())
    }

    fn count(&mut self, kind: &EntryKind) {
        let (size, clones) = match kind {
            EntryKind::File { size, runs } => (*size, runs.len() as u64),
            EntryKind::Inline(data) => (data.len() as u64, 0),
            _ => return,
        };
        self.created.files += 1;
        self.created.bytes += size;
        self.created.clones += clones;
    }

    fn enter(&mut self, entry: &Entry) -> Result<()> {
        let reopened = self.stack.reopen(self.creator.target.root);
        reopened.map_err(|error| self.error("open", b"", error))?;
        let parent = self.stack.fd()?;
        let name = inode::os(&entry.name);
        fs::mkdirat(parent, name, Mode::RWXU)
            .map_err(|error| self.error("make the directory", &entry.name, error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(parent, name, flags, Mode::empty())
            .map_err(|error| self.error("open the directory", &entry.name, error))?;
        self.stack.push(fd, &entry.name, entry.metadata.clone());
        Ok(())
    }

    /// Leaves directories until the walk is `depth` deep, finishing each.
    fn leave_to(&mut self, depth: u32) -> Result<()> {
        while self.stack.depth() > depth {
            let reopened = self.stack.reopen(self.creator.target.root);
            reopened.map_err(|error| self.error("open", b"", error))?;
            let metadata = self.stack.metadata();
            let finished = self.creator.finish_directory(self.stack.fd()?, &metadata);
            finished.map_err(|(step, error)| self.error(&step, b"", error))?;
            self.stack.pop();
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, target: u32) -> Result<()> {
        let reopened = self.stack.reopen(self.creator.target.root);
        reopened.map_err(|error| self.error("open", b"", error))?;
        let path = self.link_targets.get(&target).map(Vec::as_slice).unwrap_or_default();
        let cut = path.iter().rposition(|&b| b == b'/');
        let (parent, name) = cut.map_or((&b""[..], path), |cut| (&path[..cut], &path[cut + 1..]));
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let step = || format!("link to {:?}", String::from_utf8_lossy(path));
        open_beneath(self.creator.target.root, parent, flags)
            .and_then(|parent: OwnedFd| {
                let here = self.stack.fd().map_err(|_| Errno::BADF)?;
                fs::linkat(&parent, inode::os(name), here, inode::os(&entry.name), AtFlags::empty())
            })
            .map_err(|error| self.error(&step(), &entry.name, error))
    }
}

/// The permission bits that the kernel takes from what this process creates. Setting the mask, which is the only call
/// that gives it, would be seen by other threads.
fn umask(target: &Target<'_>) -> Result<u16> {
    let failed = |error: std::io::Error| Error::os("read the umask for", target.path, error);
    let status = std::fs::read_to_string("/proc/thread-self/status").map_err(failed)?;
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    let mask = mask.and_then(|mask| u16::from_str_radix(mask.trim(), 8).ok());
    mask.ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))
}

/// Whether a mode says that what is created inside gets the directory's group.
fn passes_group_on(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(fs::fstat(fd)?.st_mode & 0o2000 != 0)
}

/// A path in messages.
pub(crate) fn shown(path: &[u8]) -> &std::path::Path {
    std::path::Path::new(inode::os(path))
}

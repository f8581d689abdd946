//! Making single inodes, in the fewest system calls that leave them complete.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::{Failure, Target, passes_group_on};
use crate::entry::{Entry, EntryKind, Metadata, Run, Xattr};
use crate::{Error, Result};

/// Who owns what this process creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    /// The owner of new files in the target. Files that belong to it anyway need no change of owner.
    pub(super) fn of_new_files(target: &Target<'_>) -> Result<Option<Owner>> {
        for (fd, what) in [(target.staging, "staging directory"), (target.root, "root")] {
            let passes = passes_group_on(fd)
                .map_err(|error| Error::os(format!("stat the {what}"), target.path, error))?;
            if passes {
                return Ok(None);
            }
        }
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Ok(Some(Owner { uid: uid.as_raw(), gid: gid.as_raw() }))
    }
}

/// Set-user-ID, set-group-ID and sticky: not every filesystem takes them at creation.
const SPECIAL_BITS: u16 = 0o7000;

/// Makes inodes of a target.
pub(super) struct Creator<'a> {
    pub(super) target: &'a Target<'a>,
    pub(super) owner: Option<Owner>,
    /// Permission bits that the kernel takes away at creation.
    pub(super) umask: u16,
}

pub(super) fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

fn failed(step: &'static str) -> impl Fn(Errno) -> Failure {
    move |error| (step.to_owned(), error)
}

impl Creator<'_> {
    /// Makes anything but directories and hard links.
    pub(super) fn make(&self, directory: BorrowedFd<'_>, entry: &Entry) -> Result<(), Failure> {
        let name = os(&entry.name);
        let metadata = &entry.metadata;
        match &entry.kind {
            EntryKind::File { size, runs } if !runs.is_empty() => {
                self.cloned(directory, name, *size, runs, metadata)
            }
            EntryKind::File { size, .. } => self.plain(directory, name, metadata, |fd| match size {
                0 => Ok(()),
                _ => fs::ftruncate(fd, *size).map_err(|error| ("set the size".to_owned(), error)),
            }),
            EntryKind::Inline(data) => self.plain(directory, name, metadata, |fd| write_all(fd, data)),
            EntryKind::Symlink(target) => self.symlink(directory, name, target, metadata),
            EntryKind::CharacterDevice { major, minor } => {
                self.node(directory, name, FileType::CharacterDevice, fs::makedev(*major, *minor), metadata)
            }
            EntryKind::BlockDevice { major, minor } => {
                self.node(directory, name, FileType::BlockDevice, fs::makedev(*major, *minor), metadata)
            }
            EntryKind::Fifo => self.node(directory, name, FileType::Fifo, 0, metadata),
            EntryKind::Socket => self.node(directory, name, FileType::Socket, 0, metadata),
            EntryKind::Directory | EntryKind::HardLink(_) => Ok(()),
        }
    }

    /// A file whose data is cloned: unnamed and without checksums at first.
    fn cloned(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        size: u64,
        runs: &[Run],
        metadata: &Metadata,
    ) -> Result<(), Failure> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = fs::openat(self.target.staging, c".", flags, mode(metadata))
            .map_err(failed("make an unnamed file in the staging directory"))?;
        let mut end = 0;
        for run in runs {
            let address = self.target.base + run.address;
            loam_sys::btrfs::clone_range(self.target.virtual_data, address, run.length, &fd, run.file_offset)
                .map_err(|error| {
                    let errno = error.errno().unwrap_or(Errno::IO.raw_os_error());
                    let step = format!("clone {} bytes at address {address}", run.length);
                    (step, Errno::from_raw_os_error(errno))
                })?;
            end = run.file_offset + run.length;
        }
        if end != size {
            fs::ftruncate(&fd, size).map_err(failed("set the size"))?;
        }
        self.finish_file(&fd, metadata)?;
        fs::linkat(&fd, c"", directory, name, AtFlags::EMPTY_PATH).map_err(failed("give the file its name"))
    }

    /// A file whose data, if any, is local.
    fn plain(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        metadata: &Metadata,
        fill: impl FnOnce(&OwnedFd) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = fs::openat(directory, name, flags, mode(metadata)).map_err(failed("create the file"))?;
        fill(&fd)?;
        self.finish_file(&fd, metadata)
    }

    /// Owner before mode, because a change of owner takes set-ID bits away; attributes after both, because it takes
    /// capabilities away too; times last.
    fn finish_file(&self, fd: &OwnedFd, metadata: &Metadata) -> Result<(), Failure> {
        let chowned = self.chown(metadata, |uid, gid| fs::fchown(fd, uid, gid))?;
        let is_as_created = metadata.mode & (self.umask | SPECIAL_BITS) == 0;
        if chowned || !is_as_created {
            fs::fchmod(fd, mode(metadata)).map_err(failed("set the mode"))?;
        }
        for xattr in metadata.xattrs.iter() {
            fs::fsetxattr(fd, os(&xattr.name), &xattr.value, XattrFlags::empty())
                .map_err(xattr_failed(xattr))?;
        }
        fs::futimens(fd, &times(metadata)).map_err(failed("set the times"))
    }

    /// Gives a directory its metadata when everything in it is there.
    pub(super) fn finish_directory(&self, fd: BorrowedFd<'_>, metadata: &Metadata) -> Result<(), Failure> {
        let (uid, gid) = ids(metadata);
        fs::fchown(fd, uid, gid).map_err(failed("set the owner"))?;
        fs::fchmod(fd, mode(metadata)).map_err(failed("set the mode"))?;
        for xattr in metadata.xattrs.iter() {
            fs::fsetxattr(fd, os(&xattr.name), &xattr.value, XattrFlags::empty())
                .map_err(xattr_failed(xattr))?;
        }
        fs::futimens(fd, &times(metadata)).map_err(failed("set the times"))
    }

    /// Changes the owner where it is another; says whether it did.
    fn chown(
        &self,
        metadata: &Metadata,
        change: impl FnOnce(Option<Uid>, Option<Gid>) -> Result<(), Errno>,
    ) -> Result<bool, Failure> {
        if self.owner == Some(Owner { uid: metadata.uid, gid: metadata.gid }) {
            return Ok(false);
        }
        let (uid, gid) = ids(metadata);
        change(uid, gid).map(|()| true).map_err(failed("set the owner"))
    }

    fn symlink(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        target: &[u8],
        metadata: &Metadata,
    ) -> Result<(), Failure> {
        fs::symlinkat(os(target), directory, name).map_err(failed("make the symbolic link"))?;
        self.chown(metadata, |uid, gid| fs::chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW))?;
        let path = through_proc(directory).join(name);
        for xattr in metadata.xattrs.iter() {
            fs::lsetxattr(&path, os(&xattr.name), &xattr.value, XattrFlags::empty())
                .map_err(xattr_failed(xattr))?;
        }
        fs::utimensat(directory, name, &times(metadata), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("set the times"))
    }

    /// A device, FIFO or socket. It is never opened, only named: by a path descriptor, so nothing is followed.
    fn node(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        kind: FileType,
        device: u64,
        metadata: &Metadata,
    ) -> Result<(), Failure> {
        fs::mknodat(directory, name, kind, mode(metadata), device).map_err(failed("make the node"))?;
        let fd =
            fs::openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                .map_err(failed("open the node"))?;
        self.chown(metadata, |uid, gid| fs::chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH))?;
        let path = through_proc(fd.as_fd());
        fs::chmod(&path, mode(metadata)).map_err(failed("set the mode"))?;
        for xattr in metadata.xattrs.iter() {
            fs::setxattr(&path, os(&xattr.name), &xattr.value, XattrFlags::empty())
                .map_err(xattr_failed(xattr))?;
        }
        fs::utimensat(fs::CWD, &path, &times(metadata), AtFlags::empty()).map_err(failed("set the times"))
    }
}

fn xattr_failed(xattr: &Xattr) -> impl Fn(Errno) -> Failure {
    let name = xattr.name.clone();
    move |error| (format!("set attribute {}", String::from_utf8_lossy(&name)), error)
}

/// The magic link of a descriptor: its last part leads to the inode itself.
fn through_proc(fd: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

fn mode(metadata: &Metadata) -> Mode {
    Mode::from_raw_mode(metadata.mode.into())
}

fn ids(metadata: &Metadata) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))
}

fn times(metadata: &Metadata) -> Timestamps {
    let stamp =
        |time: crate::entry::Time| Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    let mtime = stamp(metadata.mtime);
    Timestamps { last_access: metadata.atime.map_or(mtime, stamp), last_modification: mtime }
}

fn write_all(fd: &OwnedFd, mut data: &[u8]) -> Result<(), Failure> {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(0) => return Err(("write the data".to_owned(), Errno::IO)),
            Ok(count) => data = &data[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(("write the data".to_owned(), error)),
        }
    }
    Ok(())
}

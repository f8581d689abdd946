//! Reading a directory tree into an image: nothing is followed, nothing is crossed silently.
//!
//! Names are sorted, so that the same tree gives the same index wherever it lies. Times of last access and of inode
//! changes are not taken: they tell of the host, not of the tree.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Statx, StatxFlags};
use rustix::io::Errno;

use crate::build::Job;
use crate::content::Stored;
use crate::entry::{Metadata, Time, XATTR_VALUE_BYTES_MAX, XATTRS_MAX, Xattr};
use crate::feed::READ_BYTES;
use crate::index::{BLOBS_MAX, Blob, BlobKind};
use crate::tar::Segment;
use crate::tree::{InodeId, InodeKind, check_target, components};
use crate::{Error, Result};

/// Longest list of attribute names that Linux gives, bytes (`XATTR_LIST_MAX`).
const XATTR_LIST_BYTES_MAX: usize = 65_536;
const _: () = assert!(READ_BYTES >= XATTR_LIST_BYTES_MAX + XATTR_VALUE_BYTES_MAX);
/// What is asked of every file.
const STAT: StatxFlags = StatxFlags::BASIC_STATS;

/// Opens `path` below `root` in any way that cannot leave it.
pub(crate) fn open_beneath(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    loop {
        match fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // The kernel's way of saying that a rename elsewhere raced with the walk.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Reads the tree at `path` into `job`; gives the bytes of all files read.
pub(crate) fn walk(path: &Path, job: &mut Job) -> Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = fs::open(path, flags, Mode::empty()).map_err(|error| Error::os("open", path, error))?;
    let mut walker =
        Walker { top: path, root, job, links: HashMap::new(), buffer: vec![0; READ_BYTES], bytes: 0 };
    let mut pending = vec![Vec::new()];
    while let Some(directory) = pending.pop() {
        let mut below = walker.directory(&directory)?;
        pending.append(&mut below);
    }
    Ok(walker.bytes)
}

struct Walker<'a> {
    top: &'a Path,
    root: OwnedFd,
    job: &'a mut Job,
    /// Inodes with several names, by device and number.
    links: HashMap<(u32, u32, u64), InodeId>,
    buffer: Vec<u8>,
    bytes: u64,
}

impl Walker<'_> {
    fn shown(&self, path: &[u8]) -> PathBuf {
        self.top.join(OsStr::from_bytes(path))
    }

    /// Takes a directory and everything in it but directories, whose paths it gives in the order to pop them.
    fn directory(&mut self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let os = |step: &str, error: Errno| Error::os(step, self.shown(path), error);
        let fd = open_beneath(self.root.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
            .map_err(|error| os("open", error))?;
        let stat = fs::statx(&fd, "", AtFlags::EMPTY_PATH, STAT).map_err(|error| os("stat", error))?;
        let names = self.names(&fd, path)?;
        let xattrs = self.xattrs(&fd, OsStr::new("."), path)?;
        self.place(path, InodeKind::Directory, &stat, xattrs)?;
        let mut directories = Vec::new();
        for name in names {
            let below = if path.is_empty() { name.clone().into_vec() } else { join(path, &name) };
            let stat = fs::statx(&fd, &name, AtFlags::SYMLINK_NOFOLLOW, STAT)
                .map_err(|error| Error::os("stat", self.shown(&below), error))?;
            if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory {
                directories.push(below);
            } else {
                self.entry(&fd, &name, &below, &stat)?;
            }
        }
        directories.reverse();
        Ok(directories)
    }

    fn names(&self, fd: &OwnedFd, path: &[u8]) -> Result<Vec<OsString>> {
        let os = |error: Errno| Error::os("list", self.shown(path), error);
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(os)? {
            let name = entry.map_err(os)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Takes anything but a directory.
    fn entry(&mut self, directory: &OwnedFd, name: &OsStr, path: &[u8], stat: &Statx) -> Result<()> {
        self.job.step(self.bytes)?;
        let key = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
        if stat.stx_nlink > 1
            && let Some(&inode) = self.links.get(&key)
        {
            return self.place_inode(path, inode);
        }
        let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile => self.file(directory, name, path, stat)?,
            FileType::Symlink => {
                let target = fs::readlinkat(directory, name, Vec::new())
                    .map_err(|error| Error::os("read the link", self.shown(path), error))?
                    .into_bytes();
                check_target(&target).map_err(|reason| self.refused(path, &reason))?;
                InodeKind::Symlink(target.into())
            }
            FileType::CharacterDevice => InodeKind::CharacterDevice(stat.stx_rdev_major, stat.stx_rdev_minor),
            FileType::BlockDevice => InodeKind::BlockDevice(stat.stx_rdev_major, stat.stx_rdev_minor),
            FileType::Fifo => InodeKind::Fifo,
            FileType::Socket => InodeKind::Socket,
            _ => return Err(self.refused(path, "an unknown type of file")),
        };
        let xattrs = self.xattrs(directory, name, path)?;
        let inode = self.place(path, kind, stat, xattrs)?;
        if stat.stx_nlink > 1 {
            self.links.insert(key, inode);
        }
        Ok(())
    }

    fn refused(&self, path: &[u8], reason: &str) -> Error {
        refused(&self.shown(path), reason)
    }

    fn place(&mut self, path: &[u8], kind: InodeKind, stat: &Statx, xattrs: Vec<Xattr>) -> Result<InodeId> {
        let metadata = Metadata {
            mode: stat.stx_mode & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime: Time { seconds: stat.stx_mtime.tv_sec, nanoseconds: stat.stx_mtime.tv_nsec },
            atime: None,
            ctime: None,
            xattrs: xattrs.into(),
        };
        let inode = self.job.tree.inode(kind, metadata)?;
        self.place_inode(path, inode)?;
        Ok(inode)
    }

    fn place_inode(&mut self, path: &[u8], inode: InodeId) -> Result<()> {
        let parts = components(path).map_err(|reason| self.refused(path, &reason))?;
        let placed = self.job.tree.place(&parts, inode)?;
        placed.map_err(|_| Error::Changed { path: self.shown(path) })
    }

    fn file(&mut self, directory: &OwnedFd, name: &OsStr, path: &[u8], stat: &Statx) -> Result<InodeKind> {
        let shown = self.shown(path);
        let os = |step: &str, error: Errno| Error::os(step, &shown, error);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = fs::openat(directory, name, flags, Mode::empty()).map_err(|error| os("open", error))?;
        let size = stat.stx_size;
        let kind = if size > 0 && size <= self.job.inline_bytes as u64 {
            let mut data = vec![0; size as usize];
            read_exactly(&fd, 0, &mut data, &shown)?;
            InodeKind::Inline(data.into())
        } else {
            let segments = segments(&fd, stat).map_err(|error| os("find the holes of", error))?;
            self.content(&fd, path, size, &segments, &shown)?
        };
        self.bytes += size;
        let after = fs::statx(&fd, "", AtFlags::EMPTY_PATH, STAT).map_err(|error| os("stat", error))?;
        let version = |stat: &Statx| {
            let time = (
                stat.stx_mtime.tv_sec,
                stat.stx_mtime.tv_nsec,
                stat.stx_ctime.tv_sec,
                stat.stx_ctime.tv_nsec,
            );
            (stat.stx_ino, stat.stx_dev_major, stat.stx_dev_minor, stat.stx_size, time)
        };
        if version(stat) != version(&after) {
            return Err(Error::Changed { path: shown });
        }
        Ok(kind)
    }

    /// Puts a file's data into the content, as a blob of its own.
    fn content(
        &mut self,
        fd: &OwnedFd,
        path: &[u8],
        size: u64,
        data: &[Segment],
        shown: &Path,
    ) -> Result<InodeKind> {
        let (buffer, teller, before) = (&mut self.buffer, &mut self.job.teller, self.bytes);
        let mut read = 0;
        let blob = self.job.blobs.len() as u32;
        let placed = self.job.content.add_file(data, blob, Stored::InPlace, |content, segment| {
            let mut done = 0;
            while done < segment.length {
                let count = (segment.length - done).min(buffer.len() as u64) as usize;
                read_exactly(fd, segment.offset + done, &mut buffer[..count], shown)?;
                read += count as u64;
                teller.tell(before + read)?;
                content.write(&buffer[..count])?;
                done += count as u64;
            }
            Ok(())
        })?;
        if !data.is_empty() {
            if self.job.blobs.len() as u64 == BLOBS_MAX {
                return Err(Error::Limit {
                    what: "files with data in a directory".to_owned(),
                    limit: BLOBS_MAX,
                });
            }
            let name = Bytes::copy_from_slice(path);
            self.job.blobs.push(Blob { kind: BlobKind::TreeFile, name, length: size, digest: None });
        }
        Ok(InodeKind::File { size, first: placed.first, count: placed.count })
    }

    fn xattrs(&mut self, directory: &OwnedFd, name: &OsStr, path: &[u8]) -> Result<Vec<Xattr>> {
        // There is no listxattrat before 6.13; through the descriptor's link the last part is still not followed.
        let number = std::os::fd::AsRawFd::as_raw_fd(directory);
        let file = Path::new("/proc/self/fd").join(number.to_string()).join(name);
        let shown = self.shown(path);
        let os = |step: String, error: Errno| Error::os(step, &shown, error);
        let (list, value) = self.buffer.split_at_mut(XATTR_LIST_BYTES_MAX);
        let value = &mut value[..XATTR_VALUE_BYTES_MAX];
        let length = match fs::llistxattr(&file, &mut *list) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(os("list attributes".to_owned(), error)),
        };
        let mut xattrs = Vec::new();
        let mut names: Vec<&[u8]> = list[..length].split(|&b| b == 0).filter(|name| is_taken(name)).collect();
        names.sort_unstable();
        for name in names {
            let step = || format!("read attribute {}", String::from_utf8_lossy(name));
            let length = match fs::lgetxattr(&file, OsStr::from_bytes(name), &mut *value) {
                Ok(length) => length,
                Err(error) => return Err(os(step(), error)),
            };
            if xattrs.len() == XATTRS_MAX {
                return Err(refused(&shown, &format!("more than {XATTRS_MAX} attributes")));
            }
            let value = Bytes::copy_from_slice(&value[..length]);
            xattrs.push(Xattr { name: Bytes::copy_from_slice(name), value });
        }
        Ok(xattrs)
    }
}

fn refused(shown: &Path, reason: &str) -> Error {
    Error::os(reason, shown, std::io::Error::from(std::io::ErrorKind::Unsupported))
}

/// Whether an attribute is a part of the tree: ACLs are, other `system.` and `btrfs.` ones speak of the filesystem.
fn is_taken(name: &[u8]) -> bool {
    !name.is_empty()
        && (name.starts_with(b"system.posix_acl_")
            || !name.starts_with(b"system.") && !name.starts_with(b"btrfs."))
}

fn join(path: &[u8], name: &OsStr) -> Vec<u8> {
    [path, b"/", name.as_bytes()].concat()
}

/// Where a file has data. A file with all its blocks is not asked: on tmpfs the question costs time.
fn segments(fd: &OwnedFd, stat: &Statx) -> Result<Vec<Segment>, Errno> {
    let size = stat.stx_size;
    if size == 0 || stat.stx_blocks.saturating_mul(512) >= size {
        return Ok(if size == 0 { Vec::new() } else { vec![Segment { offset: 0, length: size }] });
    }
    let mut segments = Vec::new();
    let mut position = 0;
    while position < size {
        let start = match fs::seek(fd, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        let end = fs::seek(fd, SeekFrom::Hole(start))?.min(size);
        if end <= start {
            break;
        }
        segments.push(Segment { offset: start, length: end - start });
        position = end;
    }
    Ok(segments)
}

fn read_exactly(fd: &OwnedFd, offset: u64, buffer: &mut [u8], shown: &Path) -> Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[done..], offset + done as u64) {
            Ok(0) => return Err(Error::Changed { path: shown.to_owned() }),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::os("read", shown, error)),
        }
    }
    Ok(())
}

//! Mounts by the file-descriptor calls (fsopen, fsconfig, fsmount, move_mount; Linux 5.2), which tell in words why a
//! mount failed and can make one that is attached nowhere, and the table of mounts (`/proc/self/mountinfo`).

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};

use crate::{Error, Result};

/// The most lines of explanation taken from the kernel for one failed mount.
const MAX_KERNEL_MESSAGES: usize = 16;

/// Properties of one mount (not of the filesystem below it).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountFlags {
    /// Refuse writes through this mount.
    pub read_only: bool,
    /// Do not update access times.
    pub no_access_time: bool,
    /// Ignore set-user-id bits.
    pub no_set_user_id: bool,
    /// Ignore device nodes.
    pub no_devices: bool,
}

impl MountFlags {
    fn attributes(self) -> MountAttrFlags {
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.read_only);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOATIME, self.no_access_time);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, self.no_set_user_id);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, self.no_devices);
        attributes
    }
}

/// A filesystem that is being configured.
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    kind: String,
}

impl FsContext {
    /// Begins a new filesystem of `kind` ("btrfs", "fuse").
    ///
    /// # Errors
    /// `ENODEV` when the kernel does not know that kind.
    pub fn open(kind: &str) -> Result<FsContext> {
        let fd = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|error| Error::new("fsopen", kind, error))?;
        Ok(FsContext { fd, kind: kind.to_owned() })
    }

    /// Sets an option that has a value ("source" among them).
    ///
    /// # Errors
    /// `EINVAL` with the kernel's words when it does not know or like it.
    pub fn set(&self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Result<()> {
        rustix::mount::fsconfig_set_string(&self.fd, key, value.as_ref())
            .map_err(|error| self.explain("fsconfig", &format!("option {key} of {}", self.kind), error))
    }

    /// Sets an option that has no value ("ro", "degraded").
    ///
    /// # Errors
    /// As [`FsContext::set`].
    pub fn set_flag(&self, key: &str) -> Result<()> {
        rustix::mount::fsconfig_set_flag(&self.fd, key)
            .map_err(|error| self.explain("fsconfig", &format!("option {key} of {}", self.kind), error))
    }

    /// Sets "key=value" or "key".
    ///
    /// # Errors
    /// As [`FsContext::set`].
    pub fn set_option(&self, option: &str) -> Result<()> {
        match option.split_once('=') {
            Some((key, value)) => self.set(key, value),
            None => self.set_flag(option),
        }
    }

    /// Makes the filesystem: this reads the superblock.
    ///
    /// # Errors
    /// What the filesystem says, with its words.
    pub fn create(&self) -> Result<()> {
        rustix::mount::fsconfig_create(&self.fd)
            .map_err(|error| self.explain("fsconfig(create)", &self.kind, error))
    }

    /// A mount of it that is attached to no directory. It goes away with the last descriptor into it.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN.
    pub fn mount(&self, flags: MountFlags) -> Result<OwnedFd> {
        rustix::mount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, flags.attributes())
            .map_err(|error| self.explain("fsmount", &self.kind, error))
    }

    /// Adds what the kernel logged into the context ("e btrfs: ...") to the subject of the error.
    fn explain(&self, call: &'static str, subject: &str, errno: rustix::io::Errno) -> Error {
        let mut subject = subject.to_owned();
        let mut buffer = [0; 1024];
        for _ in 0..MAX_KERNEL_MESSAGES {
            let Ok(length) = rustix::io::read(&self.fd, &mut buffer) else { break };
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
            subject.push_str(": the kernel says \"");
            subject.push_str(text.trim().trim_start_matches("e ").trim_start_matches("w "));
            subject.push('"');
        }
        Error::new(call, subject, errno)
    }
}

/// Attaches a detached mount to a directory.
///
/// # Errors
/// `ENOENT`, `ENOTDIR` for the directory; `EPERM` without CAP_SYS_ADMIN.
pub fn attach(mount: BorrowedFd<'_>, directory: &Path) -> Result<()> {
    rustix::mount::move_mount(mount, "", rustix::fs::CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| Error::new("move_mount", directory.display().to_string(), error))
}

/// Mounts `source`, a filesystem of `kind`, on `directory` with options as in fstab ("device=/dev/loop1,degraded").
/// With `flags.read_only` the filesystem itself is opened read-only too.
///
/// # Errors
/// What the kernel says, naming source, directory and its own words.
pub fn mount(kind: &str, source: &Path, directory: &Path, options: &[&str], flags: MountFlags) -> Result<()> {
    let context = FsContext::open(kind)?;
    context.set("source", source)?;
    for option in options {
        context.set_option(option)?;
    }
    if flags.read_only {
        context.set_flag("ro")?;
    }
    context.create()?;
    let mount = context.mount(flags)?;
    attach(mount.as_fd(), directory)
}

/// Takes a mount off its directory.
///
/// # Errors
/// `EBUSY` while something below it is open, `EINVAL` when nothing is mounted there.
pub fn unmount(directory: &Path) -> Result<()> {
    unmount_with(directory, UnmountFlags::NOFOLLOW)
}

/// Takes a mount off its directory at once and cleans up when its last user has gone (MNT_DETACH).
///
/// # Errors
/// `EINVAL` when nothing is mounted there.
pub fn unmount_lazily(directory: &Path) -> Result<()> {
    unmount_with(directory, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
}

fn unmount_with(directory: &Path, flags: UnmountFlags) -> Result<()> {
    rustix::mount::unmount(directory, flags)
        .map_err(|error| Error::new("umount2", directory.display().to_string(), error))
}

/// One line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique while mounted.
    pub id: u64,
    /// The mount below.
    pub parent: u64,
    /// Device number of the filesystem, as `st_dev` shows it (btrfs shows another for each subvolume).
    pub device: (u32, u32),
    /// The directory of the filesystem that is mounted: for btrfs the path of the subvolume.
    pub root: PathBuf,
    /// Where it is mounted, as this process sees it.
    pub mount_point: PathBuf,
    /// Options of the mount.
    pub options: String,
    /// "btrfs".
    pub kind: String,
    /// What was mounted.
    pub source: PathBuf,
    /// Options of the filesystem.
    pub super_options: String,
}

/// The mounts of this process's namespace, in the kernel's order: a later one on the same directory covers an
/// earlier one.
///
/// # Errors
/// Where /proc is not mounted.
pub fn mounts() -> Result<Vec<MountEntry>> {
    const PATH: &str = "/proc/self/mountinfo";
    let bytes = fs::read(PATH).map_err(|error| Error::new("read", PATH, error))?;
    Ok(parse(&bytes))
}

/// Reads mountinfo. Lines that do not have its shape are left out.
pub fn parse(mountinfo: &[u8]) -> Vec<MountEntry> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut next = || fields.next();
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let device = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let device = (device.0.parse().ok()?, device.1.parse().ok()?);
    let root = path(next()?);
    let mount_point = path(next()?);
    let options = text(next()?);
    // Any number of optional fields, ended by a single "-".
    while next()? != b"-" {}
    let kind = text(next()?);
    let source = path(next()?);
    let super_options = text(next().unwrap_or_default());
    Some(MountEntry { id, parent, device, root, mount_point, options, kind, source, super_options })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's escapes: space, tab, newline, backslash and '#' as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] = rest {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_escapes() {
        let line = b"36 35 0:98 /sub\\040vol /mnt/a\\134b rw,noatime shared:1 master:2 - btrfs /dev/loop\\0433 rw,ssd\n";
        let entries = parse(line);
        assert_eq!(entries.len(), 1);
        let entry = &entries[0];
        assert_eq!((entry.id, entry.parent, entry.device), (36, 35, (0, 98)));
        assert_eq!(entry.root, Path::new("/sub vol"));
        assert_eq!(entry.mount_point, Path::new("/mnt/a\\b"));
        assert_eq!((entry.kind.as_str(), entry.super_options.as_str()), ("btrfs", "rw,ssd"));
        assert_eq!(entry.source, Path::new("/dev/loop#3"));
    }

    #[test]
    fn lines_of_another_shape_are_left_out() {
        for line in [
            "",
            "1 2 3:4 / / rw",
            "1 2 3:4 / / rw shared:1",
            "x 2 3:4 / / rw - a b c",
            "1 2 34 / / rw - a b c",
        ] {
            assert_eq!(parse(line.as_bytes()), [], "{line}");
        }
        assert_eq!(unescape(b"\\04"), b"\\04");
        assert_eq!(unescape(b"\\777"), b"\\777");
    }

    #[test]
    fn this_process_has_a_root_mount() {
        assert!(mounts().unwrap().iter().any(|entry| entry.mount_point == Path::new("/")));
    }
}

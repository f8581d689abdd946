//! Compares two trees in everything a filesystem keeps: names, types, contents, owners, modes, times to the
//! nanosecond, xattrs (so ACLs and capabilities too), device numbers, symlink targets and which names are one file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes compared at a time.
const PIECE: usize = 1 << 20;
/// The kernel's limit of an xattr's value and of the list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;

/// What a comparison looked at, and what differed.
#[derive(Debug, Default)]
pub struct Report {
    /// Entries of the first tree.
    pub entries: u64,
    /// Bytes of regular files that were compared.
    pub bytes: u64,
    /// One line for each difference: path, what, both values.
    pub differences: Vec<String>,
}

impl Report {
    fn differ(&mut self, path: &Path, what: &str, left: impl std::fmt::Debug, right: impl std::fmt::Debug) {
        self.differences.push(format!("{}: {what}: {left:?} and {right:?}", path.display()));
    }

    fn same<T: PartialEq + std::fmt::Debug>(&mut self, path: &Path, what: &str, left: T, right: T) {
        if left != right {
            self.differ(path, what, left, right);
        }
    }
}

/// Compares the trees at `left` and `right`, both roots included. Names in `except` (relative paths) are left out on
/// both sides, with all below them.
///
/// # Errors
/// When either tree cannot be read.
pub fn trees(left: &Path, right: &Path, except: &[&str]) -> io::Result<Report> {
    let mut report = Report::default();
    let mut links = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    let except: BTreeSet<&Path> = except.iter().map(Path::new).collect();
    while let Some(relative) = pending.pop() {
        report.entries += 1;
        let (a, b) = (join(left, &relative), join(right, &relative));
        let (ours, theirs) = (fs::symlink_metadata(&a)?, fs::symlink_metadata(&b)?);
        entry(&mut report, &relative, (&a, &ours), (&b, &theirs))?;
        if !ours.is_dir() && ours.nlink() > 1 {
            let first =
                links.entry((ours.dev(), ours.ino())).or_insert_with(|| (theirs.ino(), relative.clone()));
            if first.0 != theirs.ino() {
                report.differ(&relative, "hard link", &first.1, "a file of its own");
            }
        }
        if ours.is_dir() && theirs.is_dir() {
            let (ours, theirs) = (names(&a)?, names(&b)?);
            for name in ours.symmetric_difference(&theirs) {
                let path = relative.join(name);
                if !except.contains(path.as_path()) {
                    report.differ(&path, "exists", ours.contains(name), theirs.contains(name));
                }
            }
            let common = ours.intersection(&theirs).map(|name| relative.join(name));
            pending.extend(common.filter(|path| !except.contains(path.as_path())));
        }
    }
    Ok(report)
}

fn join(root: &Path, relative: &Path) -> PathBuf {
    if relative.as_os_str().is_empty() { root.to_path_buf() } else { root.join(relative) }
}

fn names(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect()
}

fn entry(
    report: &mut Report,
    relative: &Path,
    (a, ours): (&Path, &Metadata),
    (b, theirs): (&Path, &Metadata),
) -> io::Result<()> {
    report.same(relative, "mode", format!("{:o}", ours.mode()), format!("{:o}", theirs.mode()));
    report.same(relative, "owner", (ours.uid(), ours.gid()), (theirs.uid(), theirs.gid()));
    let times = |metadata: &Metadata| (metadata.mtime(), metadata.mtime_nsec());
    report.same(relative, "mtime", times(ours), times(theirs));
    report.same(relative, "xattrs", xattrs(a)?, xattrs(b)?);
    if ours.file_type() != theirs.file_type() {
        return Ok(());
    }
    let kind = ours.file_type();
    if !kind.is_dir() {
        report.same(relative, "links", ours.nlink(), theirs.nlink());
    }
    if kind.is_file() {
        report.same(relative, "size", ours.len(), theirs.len());
        report.bytes += ours.len();
        if let Some(offset) = first_difference(a, b)? {
            report.differ(relative, "content", format!("differs at byte {offset}"), "");
        }
    } else if kind.is_symlink() {
        report.same(relative, "target", fs::read_link(a)?, fs::read_link(b)?);
    } else if kind.is_char_device() || kind.is_block_device() {
        report.same(relative, "device", ours.rdev(), theirs.rdev());
    }
    Ok(())
}

/// The offset of the first byte that differs, up to the end of the shorter file.
fn first_difference(a: &Path, b: &Path) -> io::Result<Option<u64>> {
    let context = |path: &Path, error: io::Error| {
        io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()))
    };
    let mut left = File::open(a).map_err(|error| context(a, error))?;
    let mut right = File::open(b).map_err(|error| context(b, error))?;
    let (mut ours, mut theirs) = (vec![0; PIECE], vec![0; PIECE]);
    let mut offset = 0;
    loop {
        let length = fill(&mut left, &mut ours).map_err(|error| context(a, error))?;
        let other = fill(&mut right, &mut theirs).map_err(|error| context(b, error))?;
        let common = length.min(other);
        if ours[..common] != theirs[..common] {
            let position = ours[..common].iter().zip(&theirs[..common]).position(|(x, y)| x != y);
            return Ok(position.map(|position| offset + position as u64));
        }
        if common < PIECE {
            return Ok(None);
        }
        offset += common as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// All xattrs of a file, of a symlink itself.
fn xattrs(path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut names = vec![0_u8; XATTR_BYTES_MAX];
    let length = rustix::fs::llistxattr(path, &mut names)?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let key = CString::new(name)?;
        let mut value = vec![0_u8; XATTR_BYTES_MAX];
        let length = rustix::fs::lgetxattr(path, key.as_c_str(), &mut value)?;
        value.truncate(length);
        found.insert(OsStr::from_bytes(name).to_os_string(), value);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::trees;
    use std::fs;

    #[test]
    fn a_difference_in_anything_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        for root in [&a, &b] {
            fs::create_dir(root).unwrap();
            fs::write(root.join("file"), "content").unwrap();
            std::os::unix::fs::symlink("file", root.join("link")).unwrap();
        }
        let time = std::time::SystemTime::UNIX_EPOCH;
        let set_times = || {
            for path in [a.join("file"), b.join("file"), a.clone(), b.clone()] {
                fs::File::open(path).unwrap().set_modified(time).unwrap();
            }
        };
        set_times();
        let only_link = |report: super::Report| {
            report.differences.into_iter().filter(|line| !line.starts_with("link: mtime")).collect::<Vec<_>>()
        };
        assert_eq!(only_link(trees(&a, &b, &[]).unwrap()), Vec::<String>::new());
        fs::write(b.join("file"), "c0ntent").unwrap();
        fs::write(b.join("extra"), "").unwrap();
        set_times();
        let differences = only_link(trees(&a, &b, &[]).unwrap());
        assert_eq!(differences.len(), 2, "{differences:?}");
        assert_eq!(only_link(trees(&a, &b, &["extra"]).unwrap()).len(), 1);
    }
}

//! [`LoadedTree`]: a whole index as one compact table, the form in which the formatter reads a tree.
//!
//! About 100 bytes an entry: fixed records, names and data in arenas, runs and attribute sets in tables beside them.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use loam_seed::{Attributes, FileTree, Node, NodeKind, Timestamp};

use crate::entry::{Entry, EntryKind, Run, Time, Xattr};
use crate::index::Index;
use crate::{Error, Result};

/// The tree of an index, its runs moved to where the content lies in the address space.
#[derive(Debug)]
pub struct LoadedTree {
    records: Vec<Record>,
    /// Names, inline data and link targets.
    bytes: Vec<u8>,
    runs: Vec<Run>,
    xattr_sets: Vec<Arc<[Xattr]>>,
    /// atime and ctime of the entries whose source says them.
    times: Vec<(Time, Time)>,
    base: u64,
}

/// One entry. `payload` and `count` mean what `tag` says.
#[derive(Debug, Clone, Copy)]
struct Record {
    mtime: i64,
    /// Size of a file; otherwise where bytes begin; major and minor of a device.
    payload: u64,
    /// First run of a file; the target of a hard link.
    reference: u32,
    /// Runs of a file; number of bytes.
    count: u32,
    name: u32,
    parent: u32,
    uid: u32,
    gid: u32,
    mtime_ns: u32,
    /// 1-based into `times`; 0: as mtime.
    times: u32,
    /// 1-based into `xattr_sets`; 0: none.
    xattrs: u32,
    mode: u16,
    name_length: u8,
    tag: Tag,
}

const _: () = assert!(size_of::<Record>() == 56);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Directory,
    File,
    Inline,
    Symlink,
    HardLink,
    CharacterDevice,
    BlockDevice,
    Fifo,
    Socket,
}

impl LoadedTree {
    /// Decodes all entries; the content begins at address `base` of the virtual region.
    ///
    /// # Errors
    /// [`Error::Index`] for entries that break the format; [`Error::Limit`] beyond 4 GiB of names and data.
    pub fn load(index: &Index, base: u64) -> Result<LoadedTree> {
        let count = usize::try_from(index.entry_count()).unwrap_or(usize::MAX);
        let mut tree = LoadedTree {
            records: Vec::with_capacity(count),
            bytes: Vec::new(),
            runs: Vec::with_capacity(index.pieces().len()),
            xattr_sets: Vec::new(),
            times: Vec::new(),
            base,
        };
        let mut sets = HashMap::new();
        for entry in index.entries() {
            tree.add(&entry?, &mut sets)?;
        }
        Ok(tree)
    }

    fn add(&mut self, entry: &Entry, sets: &mut HashMap<Arc<[Xattr]>, u32>) -> Result<()> {
        let metadata = &entry.metadata;
        let name = self.put(&entry.name)?;
        let (tag, payload, reference, count) = match &entry.kind {
            EntryKind::Directory => (Tag::Directory, 0, 0, 0),
            EntryKind::File { size, runs } => {
                let first = self.runs.len() as u32;
                self.runs.extend_from_slice(runs);
                (Tag::File, *size, first, runs.len() as u32)
            }
            EntryKind::Inline(data) => (Tag::Inline, u64::from(self.put(data)?), 0, data.len() as u32),
            EntryKind::Symlink(target) => {
                (Tag::Symlink, u64::from(self.put(target)?), 0, target.len() as u32)
            }
            EntryKind::HardLink(target) => (Tag::HardLink, 0, *target, 0),
            EntryKind::CharacterDevice { major, minor } => (Tag::CharacterDevice, pack(*major, *minor), 0, 0),
            EntryKind::BlockDevice { major, minor } => (Tag::BlockDevice, pack(*major, *minor), 0, 0),
            EntryKind::Fifo => (Tag::Fifo, 0, 0, 0),
            EntryKind::Socket => (Tag::Socket, 0, 0, 0),
        };
        let mut times = 0;
        if metadata.atime.is_some() || metadata.ctime.is_some() {
            let or_mtime = |time: Option<Time>| time.unwrap_or(metadata.mtime);
            self.times.push((or_mtime(metadata.atime), or_mtime(metadata.ctime)));
            times = self.times.len() as u32;
        }
        let xattrs = self.xattr_set(&metadata.xattrs, sets);
        self.records.push(Record {
            mtime: metadata.mtime.seconds,
            payload,
            reference,
            count,
            name,
            parent: entry.parent,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime_ns: metadata.mtime.nanoseconds,
            times,
            xattrs,
            mode: metadata.mode,
            name_length: entry.name.len() as u8,
            tag,
        });
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<u32> {
        let limit = u32::MAX;
        let start = u32::try_from(self.bytes.len())
            .map_err(|_| Error::Limit { what: "bytes of names in a tree".to_owned(), limit: limit.into() })?;
        self.bytes.extend_from_slice(bytes);
        Ok(start)
    }

    fn xattr_set(&mut self, xattrs: &Arc<[Xattr]>, sets: &mut HashMap<Arc<[Xattr]>, u32>) -> u32 {
        if xattrs.is_empty() {
            return 0;
        }
        if let Some(&number) = sets.get(xattrs) {
            return number;
        }
        // Copied, because a slice of a decoded block would keep the whole block in memory.
        let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let own: Arc<[Xattr]> =
            xattrs.iter().map(|x| Xattr { name: copy(&x.name), value: copy(&x.value) }).collect();
        self.xattr_sets.push(own.clone());
        let number = self.xattr_sets.len() as u32;
        sets.insert(own, number);
        number
    }

    fn slice(&self, start: u64, length: u32) -> &[u8] {
        &self.bytes[start as usize..][..length as usize]
    }

    fn attributes(&self, record: &Record) -> Attributes {
        let mtime = Time { seconds: record.mtime, nanoseconds: record.mtime_ns };
        let (atime, ctime) = match record.times {
            0 => (mtime, mtime),
            n => self.times[n as usize - 1],
        };
        let stamp = |time: Time| Timestamp { seconds: time.seconds, nanoseconds: time.nanoseconds };
        Attributes {
            uid: record.uid,
            gid: record.gid,
            mode: record.mode.into(),
            atime: stamp(atime),
            mtime: stamp(mtime),
            ctime: stamp(ctime),
        }
    }
}

impl FileTree for LoadedTree {
    fn len(&self) -> usize {
        self.records.len()
    }

    fn node(&self, index: usize) -> Node<'_> {
        let record = &self.records[index];
        let data = || self.slice(record.payload, record.count);
        let (major, minor) = ((record.payload >> 32) as u32, record.payload as u32);
        let kind = match record.tag {
            Tag::Directory => NodeKind::Directory,
            Tag::File => NodeKind::File { size: record.payload },
            Tag::Inline => NodeKind::Inline(data()),
            Tag::Symlink => NodeKind::Symlink(data()),
            Tag::HardLink => NodeKind::HardLink(record.reference),
            Tag::CharacterDevice => NodeKind::CharacterDevice { major, minor },
            Tag::BlockDevice => NodeKind::BlockDevice { major, minor },
            Tag::Fifo => NodeKind::Fifo,
            Tag::Socket => NodeKind::Socket,
        };
        let name = self.slice(record.name.into(), record.name_length.into());
        Node { parent: record.parent, name, kind, attributes: self.attributes(record) }
    }

    fn runs(&self, index: usize, visit: &mut dyn FnMut(loam_seed::Run)) {
        let record = &self.records[index];
        if record.tag != Tag::File {
            return;
        }
        for run in &self.runs[record.reference as usize..][..record.count as usize] {
            let address = self.base + run.address;
            // The formatter wants the last run to end where the file does.
            let length = run.length.min(record.payload.saturating_sub(run.file_offset));
            visit(loam_seed::Run { file_offset: run.file_offset, address, length });
        }
    }

    fn xattrs(&self, index: usize, visit: &mut dyn FnMut(&[u8], &[u8])) {
        if let Some(set) = (self.records[index].xattrs as usize).checked_sub(1) {
            self.xattr_sets[set].iter().for_each(|xattr| visit(&xattr.name, &xattr.value));
        }
    }
}

fn pack(major: u32, minor: u32) -> u64 {
    u64::from(major) << 32 | u64::from(minor)
}

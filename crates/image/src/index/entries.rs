//! Decoding of the entry section, block by block, checking everything that a tree must keep.

use std::sync::Arc;

use bytes::Bytes;

use super::column::Cursor;
use super::format::{columns, take_block};
use super::tables::Piece;
use crate::entry::{
    Entry, EntryKind, INLINE_BYTES_MAX, Metadata, NAME_BYTES_MAX, PATH_BYTES_MAX, Time,
    XATTR_VALUE_BYTES_MAX, XATTRS_MAX, Xattr,
};
use crate::layout::RunBuilder;
use crate::{Error, Result};

const SECTION: &str = "entries";
/// Largest owner or group: the number above it means "leave it" to chown.
const ID_MAX: u64 = u32::MAX as u64 - 1;

/// Columns of an entry block, as numbered in the format's documentation.
pub(crate) mod column {
    pub(crate) const KIND: usize = 0;
    pub(crate) const DEPTH: usize = 1;
    pub(crate) const NAME_LENGTH: usize = 2;
    pub(crate) const NAMES: usize = 3;
    pub(crate) const MODE: usize = 4;
    pub(crate) const UID: usize = 5;
    pub(crate) const GID: usize = 6;
    pub(crate) const MTIME: usize = 7;
    pub(crate) const MTIME_NS: usize = 8;
    pub(crate) const ATIME: usize = 9;
    pub(crate) const CTIME: usize = 10;
    pub(crate) const XATTR_SET: usize = 11;
    pub(crate) const XATTR_SETS: usize = 12;
    pub(crate) const FIRST_PIECE: usize = 13;
    pub(crate) const PIECE_COUNT: usize = 14;
    pub(crate) const GAP: usize = 15;
    pub(crate) const TAIL: usize = 16;
    pub(crate) const INLINE_LENGTH: usize = 17;
    pub(crate) const INLINE: usize = 18;
    pub(crate) const TARGET_LENGTH: usize = 19;
    pub(crate) const TARGETS: usize = 20;
    pub(crate) const LINK: usize = 21;
    pub(crate) const DEVICE: usize = 22;
    pub(crate) const COUNT: usize = 23;
}

/// Codes of the kind column.
pub(crate) mod kind {
    pub(crate) const DIRECTORY: u8 = 0;
    pub(crate) const FILE: u8 = 1;
    pub(crate) const INLINE: u8 = 2;
    pub(crate) const SYMLINK: u8 = 3;
    pub(crate) const HARD_LINK: u8 = 4;
    pub(crate) const CHARACTER_DEVICE: u8 = 5;
    pub(crate) const BLOCK_DEVICE: u8 = 6;
    pub(crate) const FIFO: u8 = 7;
    pub(crate) const SOCKET: u8 = 8;
    pub(crate) const MASK: u8 = 0x0f;
    pub(crate) const HAS_ATIME: u8 = 0x10;
    pub(crate) const HAS_CTIME: u8 = 0x20;
}

/// Iterates over the entries of an index; decodes one block at a time. After an error it ends.
pub struct Entries<'a> {
    section: &'a [u8],
    pieces: &'a [Piece],
    total: u64,
    state: State,
    block: std::vec::IntoIter<Entry>,
    failed: bool,
}

/// What is known of the tree so far.
#[derive(Default)]
struct State {
    next: u64,
    expected_piece: u64,
    /// Numbers of the directories that lead to the entry before, and the lengths of their paths.
    parents: Vec<(u32, usize)>,
    /// The deepest that the next entry may lie.
    depth_max: u32,
    /// One bit per entry: whether a hard link may lead to it.
    linkable: Vec<u64>,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(section: &'a [u8], pieces: &'a [Piece], total: u64) -> Self {
        Entries {
            section,
            pieces,
            total,
            state: State::default(),
            block: Vec::new().into_iter(),
            failed: false,
        }
    }

    fn next_block(&mut self) -> Result<bool> {
        let Some((items, block)) = take_block(SECTION, &mut self.section)? else {
            if self.state.next != self.total {
                return Err(Error::index(SECTION, "fewer entries than the header says"));
            }
            return Ok(false);
        };
        if self.state.next + u64::from(items) > self.total {
            return Err(Error::index(SECTION, "more entries than the header says"));
        }
        let block = Bytes::from(block);
        self.block = Block::new(&block, self.pieces)?.decode(items, &mut self.state)?.into_iter();
        Ok(true)
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Result<Entry>> {
        loop {
            if let Some(entry) = self.block.next() {
                return Some(Ok(entry));
            }
            if self.failed {
                return None;
            }
            match self.next_block() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// One decoded block and how far each of its columns has been read.
struct Block<'a> {
    bytes: &'a Bytes,
    columns: [Cursor<'a>; column::COUNT],
    pieces: &'a [Piece],
    xattr_sets: Vec<Arc<[Xattr]>>,
    none: Arc<[Xattr]>,
    mtime: i64,
}

fn bad(reason: impl Into<String>) -> Error {
    Error::index(SECTION, reason)
}

impl<'a> Block<'a> {
    fn new(bytes: &'a Bytes, pieces: &'a [Piece]) -> Result<Self> {
        let columns = columns::<{ column::COUNT }>(SECTION, bytes)?;
        let none: Arc<[Xattr]> = Arc::new([]);
        let mut block = Block { bytes, columns, pieces, xattr_sets: Vec::new(), none, mtime: 0 };
        block.read_xattr_sets()?;
        Ok(block)
    }

    fn decode(mut self, items: u32, state: &mut State) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(items as usize);
        for _ in 0..items {
            entries.push(self.entry(state)?);
        }
        for column in &self.columns {
            column.finish()?;
        }
        Ok(entries)
    }

    fn entry(&mut self, state: &mut State) -> Result<Entry> {
        let code = self.columns[column::KIND].byte()?;
        let number = state.next as u32;
        let depth = self.columns[column::DEPTH].at_most(u64::from(state.depth_max), "depth")? as u32;
        let name = self.bytes(column::NAME_LENGTH, column::NAMES, NAME_BYTES_MAX, "name")?;
        let (parent, path_bytes) = state.place(depth, &name)?;
        let (kind, metadata) = if code == kind::HARD_LINK {
            (self.hard_link(number, state)?, Metadata { xattrs: self.none.clone(), ..Metadata::default() })
        } else {
            let metadata = self.metadata(code)?;
            (self.kind(code & kind::MASK, state)?, metadata)
        };
        state.admit(&kind, depth, path_bytes);
        Ok(Entry { number, parent, depth, name, kind, metadata })
    }

    /// Bytes whose lengths are in one column and which themselves are in another.
    fn bytes(&mut self, lengths: usize, column: usize, limit: usize, what: &str) -> Result<Bytes> {
        let length = self.columns[lengths].at_most(limit as u64, what)?;
        let slice = self.columns[column].take(length as usize)?;
        Ok(self.bytes.slice_ref(slice))
    }

    fn metadata(&mut self, code: u8) -> Result<Metadata> {
        let mode = self.columns[column::MODE].at_most(0o7777, "mode")? as u16;
        let uid = self.columns[column::UID].at_most(ID_MAX, "uid")? as u32;
        let gid = self.columns[column::GID].at_most(ID_MAX, "gid")? as u32;
        self.mtime = self.mtime.wrapping_add(self.columns[column::MTIME].zigzag()?);
        let mtime = Time { seconds: self.mtime, nanoseconds: self.nanoseconds(column::MTIME_NS)? };
        let atime = (code & kind::HAS_ATIME != 0).then(|| self.other_time(column::ATIME)).transpose()?;
        let ctime = (code & kind::HAS_CTIME != 0).then(|| self.other_time(column::CTIME)).transpose()?;
        let set = self.columns[column::XATTR_SET].at_most(self.xattr_sets.len() as u64, "xattr set")?;
        let xattrs = match set {
            0 => self.none.clone(),
            n => self.xattr_sets[n as usize - 1].clone(),
        };
        Ok(Metadata { mode, uid, gid, mtime, atime, ctime, xattrs })
    }

    fn nanoseconds(&mut self, column: usize) -> Result<u32> {
        Ok(self.columns[column].at_most(999_999_999, "nanoseconds")? as u32)
    }

    fn other_time(&mut self, column: usize) -> Result<Time> {
        let seconds = self.mtime.wrapping_add(self.columns[column].zigzag()?);
        Ok(Time { seconds, nanoseconds: self.nanoseconds(column)? })
    }

    fn kind(&mut self, code: u8, state: &mut State) -> Result<EntryKind> {
        Ok(match code {
            kind::DIRECTORY => EntryKind::Directory,
            kind::FILE => self.file(state)?,
            kind::INLINE => {
                let data =
                    self.bytes(column::INLINE_LENGTH, column::INLINE, INLINE_BYTES_MAX, "inline length")?;
                if data.is_empty() {
                    return Err(bad("an inline file is empty"));
                }
                EntryKind::Inline(data)
            }
            kind::SYMLINK => {
                let target =
                    self.bytes(column::TARGET_LENGTH, column::TARGETS, PATH_BYTES_MAX, "target length")?;
                if target.is_empty() || target.contains(&0) {
                    return Err(bad("a symbolic link without a usable target"));
                }
                EntryKind::Symlink(target)
            }
            kind::CHARACTER_DEVICE | kind::BLOCK_DEVICE => {
                let major = self.columns[column::DEVICE].at_most(u64::from(u32::MAX), "major")? as u32;
                let minor = self.columns[column::DEVICE].at_most(u64::from(u32::MAX), "minor")? as u32;
                match code {
                    kind::CHARACTER_DEVICE => EntryKind::CharacterDevice { major, minor },
                    _ => EntryKind::BlockDevice { major, minor },
                }
            }
            kind::FIFO => EntryKind::Fifo,
            kind::SOCKET => EntryKind::Socket,
            _ => return Err(bad(format!("unknown kind {code}"))),
        })
    }

    fn file(&mut self, state: &mut State) -> Result<EntryKind> {
        let first = state.expected_piece.checked_add_signed(self.columns[column::FIRST_PIECE].zigzag()?);
        let count = self.columns[column::PIECE_COUNT].varint()?;
        let end = first.and_then(|first| first.checked_add(count));
        let (Some(first), Some(end)) = (first, end.filter(|&end| end <= self.pieces.len() as u64)) else {
            return Err(bad("a file names pieces that are not there"));
        };
        state.expected_piece = end;
        let mut runs = RunBuilder::default();
        let mut position = 0u64;
        for piece in &self.pieces[first as usize..end as usize] {
            let gap = self.columns[column::GAP].at_most(i64::MAX as u64, "gap")?;
            position += gap;
            let end = position.checked_add(piece.length).filter(|&end| end <= i64::MAX as u64);
            let end = end.ok_or_else(|| bad("a file longer than 2^63 - 1 bytes"))?;
            runs.add(position, piece).map_err(bad)?;
            position = end;
        }
        let size = position + self.columns[column::TAIL].at_most(i64::MAX as u64, "tail")?;
        if size > i64::MAX as u64 {
            return Err(bad("a file longer than 2^63 - 1 bytes"));
        }
        Ok(EntryKind::File { size, runs: runs.finish() })
    }

    fn hard_link(&mut self, number: u32, state: &State) -> Result<EntryKind> {
        let distance = self.columns[column::LINK].at_most(u64::from(number), "link distance")? as u32;
        let target = number - distance;
        if !state.is_linkable(target) {
            return Err(bad("a hard link to something that cannot have one"));
        }
        Ok(EntryKind::HardLink(target))
    }

    fn read_xattr_sets(&mut self) -> Result<()> {
        let bytes = self.bytes;
        let cursor = &mut self.columns[column::XATTR_SETS];
        // Each set takes at least one byte of the column, so the column bounds what is allocated here.
        let sets = cursor.at_most(cursor.rest().len() as u64, "number of xattr sets")?;
        for _ in 0..sets {
            let pairs = cursor.at_most(XATTRS_MAX as u64, "number of xattrs")?;
            let mut set = Vec::new();
            for _ in 0..pairs {
                let length = cursor.at_most(NAME_BYTES_MAX as u64, "xattr name length")?;
                let name = bytes.slice_ref(cursor.take(length as usize)?);
                if name.is_empty() || name.contains(&0) {
                    return Err(bad("an xattr without a usable name"));
                }
                let length = cursor.at_most(XATTR_VALUE_BYTES_MAX as u64, "xattr value length")?;
                let value = bytes.slice_ref(cursor.take(length as usize)?);
                set.push(Xattr { name, value });
            }
            self.xattr_sets.push(set.into());
        }
        Ok(())
    }
}

impl State {
    /// The parent of an entry at `depth`, and the length of the entry's path.
    fn place(&self, depth: u32, name: &[u8]) -> Result<(u32, usize)> {
        if self.next == 0 {
            return if name.is_empty() { Ok((0, 0)) } else { Err(bad("the root has a name")) };
        }
        if depth == 0 {
            return Err(bad("a second root"));
        }
        if name.is_empty() || name == b"." || name == b".." || name.iter().any(|&b| b == b'/' || b == 0) {
            return Err(bad("a name that no directory can hold"));
        }
        let (parent, above) = self.parents[depth as usize - 1];
        let path_bytes = above + name.len() + usize::from(above > 0);
        if path_bytes > PATH_BYTES_MAX {
            return Err(bad("a path longer than Linux can name"));
        }
        Ok((parent, path_bytes))
    }

    /// Takes an entry whose checks passed into the picture.
    fn admit(&mut self, kind: &EntryKind, depth: u32, path_bytes: usize) {
        let number = self.next as u32;
        self.parents.truncate(depth as usize);
        if number.is_multiple_of(64) {
            self.linkable.push(0);
        }
        match kind {
            EntryKind::Directory => {
                self.parents.push((number, path_bytes));
                self.depth_max = depth + 1;
            }
            EntryKind::HardLink(_) => self.depth_max = depth,
            _ => {
                self.linkable[number as usize / 64] |= 1 << (number % 64);
                self.depth_max = depth;
            }
        }
        self.next += 1;
    }

    fn is_linkable(&self, number: u32) -> bool {
        self.linkable.get(number as usize / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }
}

//! The table: everything that the log said up to some record, sorted by address, in a file that is mapped and never
//! changed. `docs/formats/map.md` has the byte map.
//!
//! In memory there is only every 8th start, every 16th of those, and so on: the upper levels of a search tree whose
//! leaves are the file. A look-up among a million ranges waits for memory about once: when it reads its leaf.

use std::ops::Deref;
use std::path::Path;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::log::{DiskRange, SPEC_BYTES_MAX, VERSION, crc_before_last};
use crate::map::CONTENTS_MAX;
use crate::{Address, Error, Place, Range, Result, Storage, StorageFile};

const MAGIC: [u8; 8] = *b"loam-tab";
/// Where the body begins: the header has a page of its own.
const BODY: usize = 4096;
/// Ranges in one leaf of the search tree: 256 bytes, which a processor fetches in one go.
const LEAF: usize = 8;
/// Starts in each node above.
const NODE: usize = 16;
/// Bytes gathered before they are written to a new table.
const WRITE_BUFFER: usize = 1 << 20;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskHeader {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    /// Number of the table, as in its name.
    number: U64,
    /// Bytes of the address space.
    size: U64,
    /// The first record that is not in the table.
    sequence: U64,
    /// Addresses below this were handed out.
    high_water: U64,
    range_count: U64,
    content_count: U64,
    /// Bytes of all contents' descriptions together.
    spec_bytes: U64,
    /// CRC32C of everything from byte 4096 to the end.
    body_crc: U32,
    /// CRC32C of everything before.
    crc: U32,
}
const _: () = assert!(size_of::<DiskHeader>() == 80);
const _: () = assert!(size_of::<DiskHeader>() <= BODY);

/// What a new table says beside its ranges and contents.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    pub(crate) number: u64,
    pub(crate) size: u64,
    pub(crate) sequence: u64,
    pub(crate) high_water: u64,
}

/// The name of the table of this number.
pub(crate) fn name(number: u64) -> String {
    format!("table-{number:016x}")
}

/// An open, verified table.
#[derive(Debug)]
pub(crate) struct Table<M> {
    mapping: M,
    pub(crate) summary: Summary,
    /// CRC of the header: names this very table.
    pub(crate) crc: u32,
    pub(crate) range_count: usize,
    pub(crate) content_count: usize,
    /// Bytes in all ranges together.
    pub(crate) mapped_bytes: u64,
    content_ends_at: usize,
    specs_at: usize,
    /// Every 16th start, every 16th of those, ... ; the last has at most 16.
    levels: Vec<Vec<u64>>,
}

impl<M: Deref<Target = [u8]>> Table<M> {
    /// Opens the table in `mapping` and checks all of it, so that look-ups need not.
    ///
    /// # Errors
    /// [`Error::NewerFormat`] and [`Error::Corrupt`].
    pub(crate) fn open(mapping: M, path: &Path) -> Result<Self> {
        let corrupt = |offset: usize, what: &str| Error::Corrupt {
            path: path.into(),
            offset: offset as u64,
            what: what.into(),
        };
        let Ok((header, _)) = DiskHeader::ref_from_prefix(&mapping) else {
            return Err(corrupt(mapping.len(), "the table ends within its header"));
        };
        let header = *header;
        if header.magic != MAGIC {
            return Err(corrupt(0, "this is not a table of a map"));
        }
        if header.version.get() > VERSION {
            let found = header.version.get();
            return Err(Error::NewerFormat { path: path.into(), found, known: VERSION });
        }
        if header.crc.get() != crc_before_last(header.as_bytes()) {
            return Err(corrupt(0, "the table's header does not match its checksum"));
        }
        let layout = Layout::of(&header).filter(|layout| layout.end == mapping.len());
        let layout = layout.filter(|layout| layout.content_count as u64 <= CONTENTS_MAX);
        let layout = layout.ok_or_else(|| corrupt(BODY, "the table is not as long as its header says"))?;
        if mapping[size_of::<DiskHeader>()..BODY].iter().any(|byte| *byte != 0) {
            return Err(corrupt(size_of::<DiskHeader>(), "the table's header is not followed by zeroes"));
        }
        if header.body_crc.get() != crc32c::crc32c(&mapping[BODY..]) {
            return Err(corrupt(BODY, "the table does not match its checksum"));
        }
        let mut table = Table {
            mapping,
            summary: Summary {
                number: header.number.get(),
                size: header.size.get(),
                sequence: header.sequence.get(),
                high_water: header.high_water.get(),
            },
            crc: header.crc.get(),
            range_count: layout.range_count,
            content_count: layout.content_count,
            mapped_bytes: 0,
            content_ends_at: layout.content_ends,
            specs_at: layout.specs,
            levels: Vec::new(),
        };
        table.check_ranges(path)?;
        table.check_contents(path)?;
        table.build_levels();
        Ok(table)
    }

    fn check_ranges(&mut self, path: &Path) -> Result<()> {
        let (mut end, mut mapped_bytes) = (0, 0);
        for (i, range) in self.ranges().enumerate() {
            let contents = self.content_count as u64;
            let defect = match range.defect(self.summary.size, contents) {
                None if range.start.0 < end => Some("it is out of order or overlaps the one before"),
                defect => defect,
            };
            if let Some(defect) = defect {
                let what = format!("range {i} is impossible: {defect}");
                return Err(Error::Corrupt {
                    path: path.into(),
                    offset: (BODY + i * size_of::<DiskRange>()) as u64,
                    what,
                });
            }
            end = range.end().0;
            mapped_bytes += range.length;
        }
        if end > self.summary.high_water || self.summary.high_water > self.summary.size {
            let what = "the allocation mark does not fit the ranges".to_owned();
            return Err(Error::Corrupt { path: path.into(), offset: 0, what });
        }
        self.mapped_bytes = mapped_bytes;
        Ok(())
    }

    fn check_contents(&self, path: &Path) -> Result<()> {
        let mut start = 0;
        for (i, end) in self.content_ends().iter().enumerate() {
            let end = end.get();
            let total = (self.mapping.len() - self.specs_at) as u64;
            let last = i + 1 == self.content_count;
            let fits = start <= end && end <= total && end - start <= SPEC_BYTES_MAX as u64;
            if !fits || (last && end != total) {
                let what = format!("the description of content {i} has impossible bounds");
                let offset = (self.content_ends_at + i * 8) as u64;
                return Err(Error::Corrupt { path: path.into(), offset, what });
            }
            start = end;
        }
        Ok(())
    }

    fn build_levels(&mut self) {
        let mut level: Vec<u64> =
            self.entries().iter().step_by(LEAF).map(|entry| entry.start.get()).collect();
        while level.len() > NODE {
            let above = level.iter().step_by(NODE).copied().collect();
            self.levels.push(std::mem::replace(&mut level, above));
        }
        self.levels.push(level);
    }

    /// What lies at `address`.
    pub(crate) fn locate(&self, address: Address) -> Place {
        // Index, on each level, of the last start that is not behind the address.
        let mut index = 0;
        for level in self.levels.iter().rev() {
            let node = &level[index * NODE..level.len().min((index + 1) * NODE)];
            match node.iter().filter(|start| **start <= address.0).count() {
                0 => return Place::Unmapped { until: self.start_or_end(0) },
                found => index = index * NODE + found - 1,
            }
        }
        let entries = self.entries();
        let node = &entries[index * LEAF..entries.len().min((index + 1) * LEAF)];
        // Counting reads all of the node's cache lines at once, where a binary search waits for one after the other.
        let found = node.iter().filter(|entry| entry.start.get() <= address.0).count();
        match found.checked_sub(1).map(|last| Range::from(&node[last])) {
            Some(range) if range.contains(address) => Place::Mapped(range),
            _ => Place::Unmapped { until: self.start_or_end(index * LEAF + found) },
        }
    }

    fn start_or_end(&self, index: usize) -> Address {
        Address(self.entries().get(index).map_or(self.summary.size, |entry| entry.start.get()))
    }

    /// All ranges, by address.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.entries().iter().map(Range::from)
    }

    /// What describes a content.
    pub(crate) fn spec(&self, index: usize) -> Option<&[u8]> {
        let ends = self.content_ends();
        let end = ends.get(index)?.get() as usize;
        let start = index.checked_sub(1).map_or(0, |before| ends[before].get() as usize);
        self.mapping[self.specs_at..].get(start..end)
    }

    fn entries(&self) -> &[DiskRange] {
        column(&self.mapping[BODY..self.content_ends_at])
    }

    fn content_ends(&self) -> &[U64] {
        column(&self.mapping[self.content_ends_at..self.specs_at])
    }
}

/// A column of the body; its bounds come from [`Layout`], so its length is a multiple of the element's.
fn column<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> &[T] {
    <[T]>::ref_from_bytes(bytes).unwrap_or_default()
}

/// Where the columns of a table's body begin.
struct Layout {
    range_count: usize,
    content_count: usize,
    content_ends: usize,
    specs: usize,
    end: usize,
}

impl Layout {
    /// `None` where the numbers of a header exceed any file.
    fn of(header: &DiskHeader) -> Option<Self> {
        let range_count = usize::try_from(header.range_count.get()).ok()?;
        let content_count = usize::try_from(header.content_count.get()).ok()?;
        let content_ends = BODY.checked_add(range_count.checked_mul(size_of::<DiskRange>())?)?;
        let specs = content_ends.checked_add(content_count.checked_mul(size_of::<U64>())?)?;
        let end = specs.checked_add(usize::try_from(header.spec_bytes.get()).ok()?)?;
        Some(Layout { range_count, content_count, content_ends, specs, end })
    }
}

/// Writes a table under `name` and syncs it; its name is not synced yet.
///
/// `ranges` are sorted; they are written as they come, so that the table is never in memory as a whole.
pub(crate) fn write<S: Storage>(
    storage: &S,
    name: &str,
    summary: Summary,
    ranges: impl Iterator<Item = Range>,
    specs: &[&[u8]],
) -> std::io::Result<()> {
    let mut body = BodyWriter { file: storage.create(name)?, at: BODY as u64, buffer: Vec::new(), crc: 0 };
    let mut range_count = 0;
    for range in ranges {
        range_count += 1;
        body.push(DiskRange::from(&range).as_bytes())?;
    }
    let mut spec_bytes = 0;
    for spec in specs {
        spec_bytes += spec.len() as u64;
        body.push(U64::new(spec_bytes).as_bytes())?;
    }
    for spec in specs {
        body.push(spec)?;
    }
    body.flush()?;
    let mut header = DiskHeader {
        magic: MAGIC,
        version: U32::new(VERSION),
        reserved: U32::ZERO,
        number: U64::new(summary.number),
        size: U64::new(summary.size),
        sequence: U64::new(summary.sequence),
        high_water: U64::new(summary.high_water),
        range_count: U64::new(range_count),
        content_count: U64::new(specs.len() as u64),
        spec_bytes: U64::new(spec_bytes),
        body_crc: U32::new(body.crc),
        crc: U32::ZERO,
    };
    header.crc = U32::new(crc_before_last(header.as_bytes()));
    let mut first_page = [0; BODY];
    first_page[..size_of::<DiskHeader>()].copy_from_slice(header.as_bytes());
    body.file.write_at(0, &first_page)?;
    body.file.sync()
}

struct BodyWriter<F> {
    file: F,
    at: u64,
    buffer: Vec<u8>,
    crc: u32,
}

impl<F: StorageFile> BodyWriter<F> {
    fn push(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BUFFER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.write_at(self.at, &self.buffer)?;
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

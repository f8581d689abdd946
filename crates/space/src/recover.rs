//! How a map's files come into being and are read back: creating, opening after any crash, compacting.

use std::io;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use zerocopy::{FromBytes, IntoBytes};

use crate::log::{Chain, DiskHeader, HEADER_BYTES, MAGIC, Next, Reader, Record, VERSION};
use crate::map::{CONTENTS_MAX, LOG, LOG_BYTES_MAX, Map, SIZE_MAX, Writer, compact_at};
use crate::snapshot::Snapshot;
use crate::storage::{Storage, StorageFile};
use crate::table::{self, Summary, Table};
use crate::{BLOCK, Error, Range, Result};

const NEW_LOG: &str = "log.new";
const NEW_TABLE: &str = "table.new";

impl<S: Storage> Map<S> {
    /// Makes an empty map of `size` bytes in `storage`.
    ///
    /// # Errors
    /// As [`Map::create`].
    pub fn create_in(storage: S, size: u64) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(BLOCK) || size > SIZE_MAX {
            let what =
                format!("an address space of {size} bytes: not a multiple of {BLOCK} up to {SIZE_MAX}");
            return Err(Error::Invalid { what });
        }
        let path = storage.location().to_path_buf();
        let fail = |operation, source| Error::Io { operation, path: path.join(LOG), source };
        let names = storage.names().map_err(|source| fail("looking for", source))?;
        if names.iter().any(|name| name == LOG) {
            return Err(Error::Exists { path });
        }
        let header = DiskHeader::new(size, 0, 0, 0);
        let made = write_new_log(&storage, &header).and_then(|_| {
            storage.rename(NEW_LOG, LOG)?;
            storage.sync()
        });
        made.map_err(|source| fail("making", source))?;
        Map::open_in(storage)
    }

    /// Opens the map in `storage`.
    ///
    /// # Errors
    /// As [`Map::open`].
    pub fn open_in(storage: S) -> Result<Self> {
        let path = storage.location().join(LOG);
        let fail = |operation, source| Error::Io { operation, path: path.clone(), source };
        let file = storage.open(LOG).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Missing { path: storage.location().into() },
            _ => fail("opening", source),
        })?;
        let bytes = read_whole(&file, &path)?;
        let header = check_header(&bytes, &path)?;
        let table = open_table(&storage, &header)?;
        let table_ranges = table.as_ref().map_or(0, |table| table.range_count);
        let replayed = replay(&bytes, &header, Snapshot::of_table(header.size.get(), table), &path)?;

        if replayed.end < bytes.len() as u64 {
            tracing::info!(
                path = %path.display(), from = replayed.end, to = bytes.len(),
                "cutting off a record that was being written when the power or the process went"
            );
            file.set_length(replayed.end).map_err(|source| fail("cutting", source))?;
        }
        // What a process wrote that was killed before it synced, or whose sync failed, may be in memory only: it must
        // not be believed before it is durable. After a failed sync the kernel takes its pages for clean, so they are
        // written again.
        if let Some(unproven) = bytes.get(replayed.unproven_from..replayed.end as usize) {
            file.write_at(replayed.unproven_from as u64, unproven)
                .map_err(|source| fail("rewriting", source))?;
        }
        file.sync().map_err(|source| fail("syncing", source))?;
        // The process may have gone between giving a new log its name and making that durable.
        storage.sync().map_err(|source| fail("syncing the directory of", source))?;
        let mut chain = replayed.chain;
        chain.durable = chain.sequence;
        let mut writer = Writer {
            file,
            end: replayed.end,
            chain,
            next_table: header.table.get().checked_add(1).ok_or_else(|| Error::Corrupt {
                path: path.clone(),
                offset: 0,
                what: "the table numbers have come to their end".to_owned(),
            })?,
            compact_at: compact_at(table_ranges),
            latched: None,
        };
        if !replayed.ends_in_mark {
            writer.mark();
        }
        remove_strays(&storage, header.table.get());
        let map =
            Map { storage, snapshot: ArcSwap::from_pointee(replayed.snapshot), writer: Mutex::new(writer) };
        map.compact_if_due(&mut map.writer());
        Ok(map)
    }

    pub(crate) fn compact_now(&self, writer: &mut Writer<S::File>) -> Result<()> {
        let snapshot = self.snapshot.load_full();
        let number = writer.next_table;
        let name = table::name(number);
        // A table of this number that an earlier attempt left may be anything; it is replaced.
        let table = self.write_table(&snapshot, number, writer.chain.sequence, &name)?;
        let header = DiskHeader::new(snapshot.size, writer.chain.sequence, number, table.crc);
        let file = write_new_log(&self.storage, &header)
            .map_err(|source| self.io_error("writing", NEW_LOG, source))?;
        // The table's name must be durable before the log that names it.
        self.storage.sync().map_err(|source| self.io_error("syncing the directory of", &name, source))?;
        let renamed = self.storage.rename(NEW_LOG, LOG).and_then(|()| self.storage.sync());
        if let Err(source) = renamed {
            writer.latch(format!("replacing the log: {source}"));
            return Err(self.io_error("replacing", LOG, source));
        }
        let old = snapshot.table.as_ref().map(|table| table::name(table.summary.number));
        *writer = Writer {
            file,
            end: HEADER_BYTES as u64,
            chain: Chain::after_header(&header),
            next_table: number + 1,
            compact_at: compact_at(table.range_count),
            latched: None,
        };
        self.snapshot.store(Arc::new(Snapshot::of_table(snapshot.size, Some(Arc::new(table)))));
        // Otherwise the next open removes it.
        let _ = old.map(|old| self.storage.remove(&old));
        Ok(())
    }

    fn write_table(
        &self,
        snapshot: &Snapshot<S::Mapping>,
        number: u64,
        sequence: u64,
        name: &str,
    ) -> Result<Table<S::Mapping>> {
        let summary = Summary { number, size: snapshot.size, sequence, high_water: snapshot.high_water };
        let ids = 0..snapshot.content_count();
        let specs: Vec<&[u8]> = ids.filter_map(|id| snapshot.spec(crate::ContentId(id as u32))).collect();
        let written = table::write(&self.storage, NEW_TABLE, summary, merged(snapshot), &specs)
            .and_then(|()| self.storage.rename(NEW_TABLE, name))
            .and_then(|()| self.storage.map(name));
        let mapping = written.map_err(|source| self.io_error("writing", name, source))?;
        Table::open(mapping, &self.storage.location().join(name))
    }
}

/// All ranges of a snapshot, by address.
fn merged<M: std::ops::Deref<Target = [u8]>>(snapshot: &Snapshot<M>) -> impl Iterator<Item = Range> + '_ {
    let mut old = snapshot.table.iter().flat_map(|table| table.ranges()).peekable();
    let mut recent = snapshot.recent.iter().copied().peekable();
    std::iter::from_fn(move || match (old.peek(), recent.peek()) {
        (Some(a), Some(b)) if a.start > b.start => recent.next(),
        (Some(_), _) => old.next(),
        (None, _) => recent.next(),
    })
}

fn write_new_log<S: Storage>(storage: &S, header: &DiskHeader) -> io::Result<S::File> {
    let file = storage.create(NEW_LOG)?;
    file.write_at(0, header.as_bytes())?;
    file.sync()?;
    Ok(file)
}

fn read_whole(file: &impl StorageFile, path: &std::path::Path) -> Result<Vec<u8>> {
    let fail = |source| Error::Io { operation: "reading", path: path.into(), source };
    let length = file.length().map_err(fail)?;
    if length > LOG_BYTES_MAX {
        let what = format!("the log is {length} bytes long, loam writes at most {LOG_BYTES_MAX}");
        return Err(Error::Corrupt { path: path.into(), offset: LOG_BYTES_MAX, what });
    }
    let mut bytes = vec![0; length as usize];
    file.read_at(0, &mut bytes).map_err(fail)?;
    Ok(bytes)
}

/// Version and magic lie where they are in every version, and are looked at before anything else.
fn check_header(bytes: &[u8], path: &std::path::Path) -> Result<DiskHeader> {
    let corrupt = |what: &str| Error::Corrupt { path: path.into(), offset: 0, what: what.to_owned() };
    let (header, _) =
        DiskHeader::read_from_prefix(bytes).map_err(|_| corrupt("it ends within its header"))?;
    if header.magic != MAGIC {
        return Err(corrupt("this is not the log of a map"));
    }
    let found = header.version.get();
    if found > VERSION {
        return Err(Error::NewerFormat { path: path.into(), found, known: VERSION });
    }
    if !header.is_intact() || found != VERSION {
        return Err(corrupt("the header does not match its checksum"));
    }
    let size = header.size.get();
    if size == 0 || !size.is_multiple_of(BLOCK) || size > SIZE_MAX {
        return Err(corrupt("the size of the address space is impossible"));
    }
    Ok(header)
}

fn open_table<S: Storage>(storage: &S, header: &DiskHeader) -> Result<Option<Arc<Table<S::Mapping>>>> {
    let number = header.table.get();
    if number == 0 {
        return Ok(None);
    }
    let name = table::name(number);
    let path = storage.location().join(&name);
    let mapping = storage.map(&name).map_err(|source| Error::Io {
        operation: "mapping",
        path: path.clone(),
        source,
    })?;
    let table = Table::open(mapping, &path)?;
    let Summary { number: own_number, size, sequence, .. } = table.summary;
    if own_number != number
        || size != header.size.get()
        || sequence != header.sequence.get()
        || table.crc != header.table_crc.get()
    {
        let what = "this is not the table that the log goes on from".to_owned();
        return Err(Error::Corrupt { path, offset: 0, what });
    }
    Ok(Some(Arc::new(table)))
}

struct Replayed<M> {
    snapshot: Snapshot<M>,
    end: u64,
    unproven_from: usize,
    chain: Chain,
    ends_in_mark: bool,
}

fn replay<M: std::ops::Deref<Target = [u8]>>(
    bytes: &[u8],
    header: &DiskHeader,
    base: Snapshot<M>,
    path: &std::path::Path,
) -> Result<Replayed<M>> {
    let mut reader = Reader::new(bytes, header);
    let mut ranges: Vec<Range> = Vec::new();
    let mut specs: Vec<Arc<[u8]>> = Vec::new();
    let mut high_water = base.high_water;
    let mut ends_in_mark = false;
    loop {
        let offset = reader.at as u64;
        let corrupt = |what: String| Err(Error::Corrupt { path: path.into(), offset, what });
        let contents = base.content_count() + specs.len() as u64;
        let record = match reader.next() {
            Next::Record(record) => record,
            Next::End => break,
            Next::Damaged(what) => return corrupt(what),
        };
        ends_in_mark = record == Record::Mark;
        match record {
            Record::Content { id, spec } if u64::from(id.0) == contents && contents < CONTENTS_MAX => {
                specs.push(spec.into());
            }
            Record::Content { id, .. } => {
                return corrupt(format!("content {id} follows {contents} others"));
            }
            Record::Ranges(new) => {
                let defect = |range: &Range| range.defect(base.size, contents);
                if let Some(defect) = new.iter().find_map(defect) {
                    return corrupt(format!("a range is impossible: {defect}"));
                }
                high_water = new.iter().map(|range| range.end().0).fold(high_water, u64::max);
                ranges.extend(new);
            }
            Record::Reserve(address) if address.0 <= base.size => high_water = high_water.max(address.0),
            Record::Reserve(address) => {
                return corrupt(format!("address {address} was handed out beyond the end"));
            }
            Record::Mark => {}
        }
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let pairs = ranges.windows(2).find(|pair| pair[0].end() > pair[1].start).map(|pair| pair[1]);
    if let Some(range) = pairs.or_else(|| ranges.iter().copied().find(|range| base.overlaps(range))) {
        let what = format!("the range at address {} overlaps another", range.start);
        return Err(Error::Corrupt { path: path.into(), offset: HEADER_BYTES as u64, what });
    }
    let snapshot = base.with_ranges(&ranges);
    let snapshot = Snapshot { high_water, recent_specs: Arc::new(specs), ..snapshot };
    let unproven_from = reader.unproven_from();
    Ok(Replayed { snapshot, end: reader.at as u64, unproven_from, chain: reader.chain, ends_in_mark })
}

/// Removes what an interrupted compaction left. Failing to is no harm: the next open tries again.
fn remove_strays<S: Storage>(storage: &S, table: u64) {
    let current = table::name(table);
    for name in storage.names().unwrap_or_default() {
        let stray = name == NEW_LOG || name == NEW_TABLE || (name.starts_with("table-") && name != current);
        if stray {
            let _ = storage.remove(&name);
        }
    }
}

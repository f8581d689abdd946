//! Back references from data extents to the files that are clones of them.
//!
//! They are met in the order of files and needed in the order of extents, so this is the one thing that is kept for
//! every run of every file: 40 bytes each.

use zerocopy::IntoBytes;

use crate::builder::ItemSink;
use crate::disk::{ExtentDataRef, Key, item};
use crate::{Result, hash};

/// One file's reference to the extent of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DataRef {
    chunk: u32,
    count: u32,
    hash: u64,
    root: u64,
    inode: u64,
    offset: u64,
}

impl DataRef {
    /// `offset` is the file offset less the offset in the extent, modulo 2^64.
    pub(super) fn new(chunk: u32, root: u64, inode: u64, offset: u64) -> Self {
        DataRef { chunk, count: 1, hash: hash::data_ref(root, inode, offset), root, inode, offset }
    }

    fn same_but_count(&self, other: &Self) -> bool {
        Self { count: 0, ..*self } == Self { count: 0, ..*other }
    }
}

/// All references, but for those of `.virtual-data`.
#[derive(Debug, Default)]
pub(super) struct DataRefs {
    refs: Vec<DataRef>,
}

impl DataRefs {
    pub(super) fn push(&mut self, new: DataRef) {
        match self.refs.last_mut() {
            // Runs of a file that continue each other at the extent's other parts differ in no field.
            Some(last) if last.same_but_count(&new) => last.count += 1,
            _ => self.refs.push(new),
        }
    }

    /// Sorts by extent and key, joins what is the same, and moves colliding hashes on to the next free one, which
    /// is where the kernel looks for them.
    pub(super) fn seal(&mut self) {
        let place = |data_ref: &DataRef| {
            (data_ref.chunk, data_ref.hash, data_ref.root, data_ref.inode, data_ref.offset)
        };
        self.refs.sort_unstable_by_key(place);
        self.refs.dedup_by(|next, kept| {
            let same = kept.same_but_count(next);
            if same {
                kept.count += next.count;
            }
            same
        });
        for index in 1..self.refs.len() {
            let previous = self.refs[index - 1];
            let current = &mut self.refs[index];
            if current.chunk == previous.chunk && current.hash <= previous.hash {
                current.hash = previous.hash + 1;
            }
        }
    }

    /// The references to the extent of `chunk`, sorted by key; chunks must be asked for in ascending order by
    /// advancing `position` from 0.
    pub(super) fn of_chunk(&self, position: &mut usize, chunk: u32) -> &[DataRef] {
        let start = *position;
        *position += self.refs[start..].partition_point(|data_ref| data_ref.chunk == chunk);
        &self.refs[start..*position]
    }
}

/// References altogether.
pub(super) fn total(refs: &[DataRef]) -> u64 {
    refs.iter().map(|data_ref| u64::from(data_ref.count)).sum()
}

/// Sends the keyed back references of the extent at `bytenr`.
pub(super) fn write(refs: &[DataRef], bytenr: u64, sink: &mut dyn ItemSink) -> Result<()> {
    for data_ref in refs {
        let body = ExtentDataRef {
            root: data_ref.root.into(),
            objectid: data_ref.inode.into(),
            offset: data_ref.offset.into(),
            count: data_ref.count.into(),
        };
        sink.push(Key::new(bytenr, item::EXTENT_DATA_REF, data_ref.hash), &[body.as_bytes()])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_references_are_joined_and_colliding_hashes_moved() {
        let mut refs = DataRefs::default();
        refs.push(DataRef { hash: 7, ..DataRef::new(1, 5, 300, 0) });
        refs.push(DataRef { hash: 7, ..DataRef::new(1, 5, 301, 0) });
        refs.push(DataRef { hash: 8, ..DataRef::new(1, 5, 302, 0) });
        refs.push(DataRef { hash: 7, ..DataRef::new(0, 5, 303, 0) });
        refs.push(DataRef { hash: 7, ..DataRef::new(0, 5, 303, 0) });
        refs.push(DataRef { hash: 7, ..DataRef::new(1, 5, 300, 0) });
        refs.seal();
        let mut position = 0;
        let first = refs.of_chunk(&mut position, 0).to_vec();
        let second = refs.of_chunk(&mut position, 1).to_vec();
        assert_eq!((first.len(), first[0].count, total(&first)), (1, 2, 2));
        let keys: Vec<_> =
            second.iter().map(|data_ref| (data_ref.hash, data_ref.inode, data_ref.count)).collect();
        assert_eq!(keys, [(7, 300, 2), (8, 301, 1), (9, 302, 1)]);
    }
}

//! What a map says at one moment: the table and what the log added to it. Readers hold one without any lock, writers
//! publish the next.

use std::ops::Deref;
use std::sync::Arc;

use crate::table::Table;
use crate::{Address, ContentId, Place, Range};

#[derive(Debug)]
pub(crate) struct Snapshot<M> {
    pub(crate) size: u64,
    pub(crate) table: Option<Arc<Table<M>>>,
    /// Ranges that are not in the table, by address.
    pub(crate) recent: Arc<Vec<Range>>,
    /// Descriptions of the contents that are not in the table.
    pub(crate) recent_specs: Arc<Vec<Arc<[u8]>>>,
    /// Addresses below this were handed out.
    pub(crate) high_water: u64,
    pub(crate) mapped_bytes: u64,
}

// Not derived: that would ask for `M: Clone`.
impl<M> Clone for Snapshot<M> {
    fn clone(&self) -> Self {
        Snapshot {
            size: self.size,
            table: self.table.clone(),
            recent: Arc::clone(&self.recent),
            recent_specs: Arc::clone(&self.recent_specs),
            high_water: self.high_water,
            mapped_bytes: self.mapped_bytes,
        }
    }
}

impl<M: Deref<Target = [u8]>> Snapshot<M> {
    pub(crate) fn of_table(size: u64, table: Option<Arc<Table<M>>>) -> Self {
        Snapshot {
            size,
            high_water: table.as_ref().map_or(0, |table| table.summary.high_water),
            mapped_bytes: table.as_ref().map_or(0, |table| table.mapped_bytes),
            table,
            recent: Arc::default(),
            recent_specs: Arc::default(),
        }
    }

    pub(crate) fn range_count(&self) -> u64 {
        (self.recent.len() + self.table.as_ref().map_or(0, |table| table.range_count)) as u64
    }

    fn table_contents(&self) -> usize {
        self.table.as_ref().map_or(0, |table| table.content_count)
    }

    pub(crate) fn content_count(&self) -> u64 {
        (self.table_contents() + self.recent_specs.len()) as u64
    }

    pub(crate) fn spec(&self, content: ContentId) -> Option<&[u8]> {
        let index = content.0 as usize;
        match index.checked_sub(self.table_contents()) {
            Some(recent) => self.recent_specs.get(recent).map(|spec| &**spec),
            None => self.table.as_ref()?.spec(index),
        }
    }

    /// What lies at `address`, which is inside the space.
    pub(crate) fn locate(&self, address: Address) -> Place {
        // Addresses grow, so most lie before all that is recent: they need no search here.
        let after = match self.recent.first() {
            Some(first) if first.start <= address => {
                self.recent.partition_point(|range| range.start <= address)
            }
            _ => 0,
        };
        if let Some(range) = after.checked_sub(1).map(|before| self.recent[before])
            && range.contains(address)
        {
            return Place::Mapped(range);
        }
        let recent_until = self.recent.get(after).map_or(Address(self.size), |range| range.start);
        match self.table.as_ref().map(|table| table.locate(address)) {
            Some(Place::Unmapped { until }) => Place::Unmapped { until: until.min(recent_until) },
            Some(mapped) => mapped,
            None => Place::Unmapped { until: recent_until },
        }
    }

    /// Whether any address of `range` is mapped.
    pub(crate) fn overlaps(&self, range: &Range) -> bool {
        match self.locate(range.start) {
            Place::Mapped(_) => true,
            Place::Unmapped { until } => until < range.end(),
        }
    }

    /// The snapshot with `new` ranges, sorted by address, that overlap nothing.
    pub(crate) fn with_ranges(&self, new: &[Range]) -> Self {
        let mut recent = Vec::with_capacity(self.recent.len() + new.len());
        let mut old = self.recent.iter().peekable();
        for range in new {
            while let Some(before) = old.next_if(|old| old.start < range.start) {
                recent.push(*before);
            }
            recent.push(*range);
        }
        recent.extend(old);
        let end = new.last().map_or(0, |range| range.end().0);
        Snapshot {
            recent: Arc::new(recent),
            high_water: self.high_water.max(end),
            mapped_bytes: self.mapped_bytes + new.iter().map(|range| range.length).sum::<u64>(),
            ..self.clone()
        }
    }

    pub(crate) fn with_content(&self, spec: &[u8]) -> Self {
        let mut specs = Vec::clone(&self.recent_specs);
        specs.push(Arc::from(spec));
        Snapshot { recent_specs: Arc::new(specs), ..self.clone() }
    }
}

/// All ranges of a map at one moment, by address.
#[derive(Debug)]
pub struct Ranges<M> {
    snapshot: Arc<Snapshot<M>>,
    at: Address,
}

impl<M> Ranges<M> {
    pub(crate) fn new(snapshot: Arc<Snapshot<M>>) -> Self {
        Ranges { snapshot, at: Address(0) }
    }
}

impl<M: Deref<Target = [u8]>> Iterator for Ranges<M> {
    type Item = Range;

    fn next(&mut self) -> Option<Range> {
        while self.at.0 < self.snapshot.size {
            match self.snapshot.locate(self.at) {
                Place::Mapped(range) => {
                    self.at = range.end();
                    return Some(range);
                }
                Place::Unmapped { until } => self.at = until,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(block: u64, blocks: u64) -> Range {
        let (start, length) = (Address(block * 4096), blocks * 4096);
        Range { start, length, content: ContentId(0), content_offset: 0 }
    }

    #[test]
    fn gaps_end_where_the_next_range_begins() {
        let empty = Snapshot::<Vec<u8>>::of_table(1 << 20, None);
        assert_eq!(empty.locate(Address(5)), Place::Unmapped { until: Address(1 << 20) });
        let snapshot = empty.with_ranges(&[range(4, 2)]).with_ranges(&[range(1, 1), range(10, 1)]);
        assert_eq!(snapshot.locate(Address(0)), Place::Unmapped { until: Address(4096) });
        assert_eq!(snapshot.locate(Address(4096)), Place::Mapped(range(1, 1)));
        assert_eq!(snapshot.locate(Address(6 * 4096 - 1)), Place::Mapped(range(4, 2)));
        assert_eq!(snapshot.locate(Address(6 * 4096)), Place::Unmapped { until: Address(10 * 4096) });
        assert!(snapshot.overlaps(&range(2, 3)) && !snapshot.overlaps(&range(2, 2)));
        assert_eq!(snapshot.high_water, 11 * 4096);
        assert_eq!(Ranges::new(Arc::new(snapshot)).count(), 3);
    }
}

//! What of the address space is local, and bringing it near.

use loam_block::{Io, Locality, Result};

use super::AddressSpace;
use crate::storage::Storage;
use crate::{Address, BLOCK, Place, Range};

/// Ranges that one question looks at before it answers with what it has.
const RANGES_MAX: usize = 4096;

/// The part of a range from an address on, and no further than `end`, in bytes of its content. Contents take whole blocks,
/// so it is widened to those; ranges begin and end with them.
struct Part {
    range: Range,
    /// Of the first byte in the content.
    offset: u64,
    length: u64,
}

impl Part {
    fn new(range: Range, address: u64, end: u64) -> Part {
        let start = address & !(BLOCK - 1);
        let end = end.next_multiple_of(BLOCK).min(range.end().0);
        Part { offset: range.content_offset + (start - range.start.0), length: end - start, range }
    }

    /// An answer of the content's device in addresses, without what lies outside of `from..to`; never empty.
    fn at_addresses(&self, runs: Vec<Locality>, from: u64, to: u64) -> Vec<Locality> {
        let mut runs: Vec<_> = runs
            .into_iter()
            .filter_map(|run| {
                let start = self.range.start.0 + (run.offset - self.range.content_offset);
                let (offset, end) = (start.max(from), (start + run.length).min(to));
                (offset < end).then(|| Locality { offset, length: end - offset, local: run.local })
            })
            .collect();
        if runs.is_empty() {
            // The device spoke of less than a block, and not of the bytes that were meant.
            runs.push(Locality { offset: from, length: BLOCK.min(to - from), local: false });
        }
        runs
    }
}

/// Adds runs behind those that are there; whether the limit keeps some out.
fn push(all: &mut Vec<Locality>, runs: Vec<Locality>, limit: usize) -> bool {
    for run in runs {
        let full = all.len() >= limit.max(1);
        match all.last_mut() {
            Some(last) if last.local == run.local => last.length += run.length,
            _ if full => return true,
            _ => all.push(run),
        }
    }
    false
}

impl<S: Storage> AddressSpace<S> {
    pub(super) fn collect_locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        let end = offset + length;
        let mut all = Vec::new();
        let mut at = offset;
        for _ in 0..RANGES_MAX {
            let range = match self.map.locate(Address(at)) {
                Place::Unmapped { until } => {
                    let stop = until.0.min(end);
                    if push(&mut all, vec![Locality { offset: at, length: stop - at, local: true }], limit) {
                        break;
                    }
                    at = stop;
                    if at == end {
                        break;
                    }
                    continue;
                }
                Place::Mapped(range) => range,
            };
            let part = Part::new(range, at, end);
            let device = self.slots.get(range.content);
            let answer = device.map(|device| device.locality(part.offset, part.length, limit));
            let Some(Io::Ready(runs)) = answer else {
                // What is there already is an answer; the content is asked when it is the first.
                return if all.is_empty() { self.ask(part, at, end, limit) } else { Io::Ready(Ok(all)) };
            };
            let runs = match runs {
                Ok(runs) => part.at_addresses(runs, at, end),
                Err(error) => return Io::Ready(Err(error)),
            };
            at += runs.iter().map(|run| run.length).sum::<u64>();
            let whole = at == range.end().0.min(end);
            if push(&mut all, runs, limit) || !whole || at == end {
                break;
            }
        }
        Io::Ready(Ok(all))
    }

    /// The answer for a part whose content has to be resolved first, or takes its time.
    fn ask(&self, part: Part, at: u64, end: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        Io::pending(async move {
            let stop = part.range.end().0.min(end);
            let Ok(device) = self.resolve(part.range.content).await else {
                return Ok(vec![Locality { offset: at, length: stop - at, local: false }]);
            };
            let runs = device.locality(part.offset, part.length, limit).await?;
            let mut all = Vec::new();
            push(&mut all, part.at_addresses(runs, at, stop), limit);
            Ok(all)
        })
    }

    /// The next mapped part at or behind `at`, and where it ends.
    fn next_part(&self, mut at: u64, end: u64) -> Option<(Part, u64)> {
        while at < end {
            match self.map.locate(Address(at)) {
                Place::Mapped(range) => return Some((Part::new(range, at, end), range.end().0)),
                Place::Unmapped { until } => at = until.0,
            }
        }
        None
    }

    pub(super) fn prefetch_parts(&self, offset: u64, end: u64) -> Io<'_, ()> {
        let mut at = offset;
        while let Some((part, stop)) = self.next_part(at, end) {
            let device = self.slots.get(part.range.content);
            match device.map(|device| device.prefetch(part.offset, part.length)) {
                Some(Io::Ready(Ok(()))) => at = stop,
                Some(Io::Ready(Err(error))) => return Io::Ready(Err(error)),
                Some(Io::Pending(_)) | None => return Io::pending(self.prefetch_rest(at, end)),
            }
        }
        Io::Ready(Ok(()))
    }

    async fn prefetch_rest(&self, mut at: u64, end: u64) -> Result<()> {
        while let Some((part, stop)) = self.next_part(at, end) {
            let device = self.resolve(part.range.content).await?;
            device.prefetch(part.offset, part.length).await?;
            at = stop;
        }
        Ok(())
    }
}

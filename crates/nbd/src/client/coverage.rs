//! Which bytes of a read have been answered: the chunks of a reply come in any order and must cover the request exactly,
//! once, and nothing else.

use std::collections::BTreeMap;

/// Chunks of one reply, at most. A server that answers the longest read (32 MiB) in sectors stays below.
const CHUNKS_MAX: usize = 1 << 16;

#[derive(Debug, Clone, Copy)]
struct Part {
    length: u64,
    hole: bool,
}

/// What was answered so far. Offsets are relative to the request. A reply of one chunk allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    first: Option<(u64, Part)>,
    more: BTreeMap<u64, Part>,
    bytes: u64,
}

impl Coverage {
    /// Notes a chunk of `length` bytes at `start` of a request of `total` bytes.
    ///
    /// # Errors
    /// What is wrong with it, if it is empty, reaches outside or overlaps with an earlier one.
    pub(super) fn add(
        &mut self,
        start: u64,
        length: u64,
        hole: bool,
        total: u64,
    ) -> Result<(), &'static str> {
        let part = Part { length, hole };
        let end = start.checked_add(length).filter(|end| *end <= total);
        let end = end.ok_or("it lies outside of what was asked")?;
        if length == 0 {
            return Err("it is empty");
        }
        match self.first {
            None => self.first = Some((start, part)),
            Some(first) => {
                if self.more.is_empty() {
                    self.more.insert(first.0, first.1);
                }
                let before = self.more.range(..end).next_back();
                if before.is_some_and(|(at, part)| at + part.length > start) {
                    return Err("it overlaps with an earlier one");
                }
                if self.more.len() == CHUNKS_MAX {
                    return Err("the reply has too many of them");
                }
                self.more.insert(start, part);
            }
        }
        self.bytes += length;
        Ok(())
    }

    /// Whether all of a request of `total` bytes was answered.
    pub(super) fn is_whole(&self, total: u64) -> bool {
        // What cannot overlap covers all when it is as long.
        self.bytes == total
    }

    /// Fills with zeroes what the server said is a hole.
    pub(super) fn fill_holes(&self, buffer: &mut [u8]) {
        let only = self.first.iter().filter(|_| self.more.is_empty()).map(|(at, part)| (at, part));
        for (&at, part) in only.chain(self.more.iter()).filter(|(_, part)| part.hole) {
            buffer[at as usize..][..part.length as usize].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_cover_exactly() {
        let mut coverage = Coverage::default();
        for (start, length, hole) in [(4, 4, true), (0, 2, false), (8, 2, false), (2, 2, true)] {
            assert!(!coverage.is_whole(10));
            coverage.add(start, length, hole, 10).unwrap();
        }
        assert!(coverage.is_whole(10));
        let mut buffer = [7; 10];
        coverage.fill_holes(&mut buffer);
        assert_eq!(buffer, [7, 7, 0, 0, 0, 0, 0, 0, 7, 7]);
        let mut single = Coverage::default();
        single.add(0, 10, true, 10).unwrap();
        single.fill_holes(&mut buffer);
        assert_eq!(buffer, [0; 10]);
    }

    #[test]
    fn overlaps_and_what_lies_outside_are_refused() {
        let mut coverage = Coverage::default();
        coverage.add(4, 4, false, 16).unwrap();
        coverage.add(12, 1, false, 16).unwrap();
        for (start, length) in
            [(4, 4), (3, 2), (7, 1), (0, 16), (5, 1), (12, 4), (16, 1), (0, 0), (u64::MAX, 2)]
        {
            assert!(coverage.add(start, length, false, 16).is_err(), "{length} at {start}");
        }
        coverage.add(8, 4, false, 16).unwrap();
        coverage.add(0, 4, false, 16).unwrap();
        coverage.add(13, 3, true, 16).unwrap();
        assert!(coverage.is_whole(16));
    }
}

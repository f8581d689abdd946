//! From extents, as devices report them, to runs that both ends can take: neighbours of one kind joined, edges moved to
//! whole blocks. A block that is zero in part is data.

use super::feed::Run;

/// Turns extents, in order, into runs, in order, without gaps.
#[derive(Debug)]
pub(super) struct Shaper {
    align: u64,
    size: u64,
    /// Where what was given out ends; a multiple of `align`.
    given: u64,
    /// Where what is known ends.
    known: u64,
    /// Zeroes, up to `known`, that may go on.
    zeroes_from: Option<u64>,
}

impl Shaper {
    /// From `start`, a multiple of `align` (a power of two), to `size`, which may be none.
    pub(super) fn new(start: u64, size: u64, align: u64) -> Self {
        debug_assert!(align.is_power_of_two() && start.is_multiple_of(align));
        Shaper { align, size, given: start, known: start, zeroes_from: None }
    }

    /// The next `length` bytes are zero or not. Adds to `runs` what is certain by that.
    pub(super) fn add(&mut self, length: u64, zero: bool, runs: &mut Vec<Run>) {
        if zero {
            self.zeroes_from.get_or_insert(self.known);
        } else {
            self.end_zeroes(runs);
        }
        self.known += length;
    }

    /// Gives out data that is long enough, although more of it may follow: nobody should wait for the end of a run.
    pub(super) fn hurry(&mut self, enough: u64, runs: &mut Vec<Run>) {
        let end = self.known & !(self.align - 1);
        if self.zeroes_from.is_none() && end.saturating_sub(self.given) >= enough {
            self.give(end, false, runs);
        }
    }

    /// The end of the source was reached.
    pub(super) fn finish(&mut self, runs: &mut Vec<Run>) {
        debug_assert_eq!(self.known, self.size);
        self.end_zeroes(runs);
        self.give(self.size, false, runs);
    }

    fn end_zeroes(&mut self, runs: &mut Vec<Run>) {
        let Some(from) = self.zeroes_from.take() else { return };
        let from = from.next_multiple_of(self.align);
        let to = self.known & !(self.align - 1);
        if from < to {
            self.give(from, false, runs);
            self.give(to, true, runs);
        }
    }

    fn give(&mut self, end: u64, zero: bool, runs: &mut Vec<Run>) {
        if self.given < end {
            runs.push(Run { offset: self.given, length: end - self.given, zero });
            self.given = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(align: u64, extents: &[(u64, bool)], hurry: bool) -> Vec<Run> {
        let size = extents.iter().map(|(length, _)| length).sum();
        let mut shaper = Shaper::new(0, size, align);
        let mut runs = Vec::new();
        for (length, zero) in extents {
            shaper.add(*length, *zero, &mut runs);
            if hurry {
                shaper.hurry(1, &mut runs);
            }
        }
        shaper.finish(&mut runs);
        runs
    }

    #[test]
    fn neighbours_join_and_edges_move_to_blocks() {
        let run = |offset, length, zero| Run { offset, length, zero };
        assert_eq!(
            shape(1, &[(5, false), (7, false), (4, true), (4, true)], false),
            [run(0, 12, false), run(12, 8, true)]
        );
        // The second zeroes are not a whole block; the last block is not whole.
        let extents = [(10, false), (30, true), (3, false), (2, true), (10, true), (10, false), (45, true)];
        assert_eq!(
            shape(16, &extents, false),
            [run(0, 16, false), run(16, 16, true), run(32, 48, false), run(80, 16, true), run(96, 14, false)]
        );
    }

    proptest! {
        #[test]
        fn runs_cover_all_once_and_zeroes_are_zeroes(
            extents in prop::collection::vec((1u64..100, any::<bool>()), 0..40),
            shift in 0u32..7,
            hurry: bool,
        ) {
            let align = 1u64 << shift;
            let map: Vec<bool> = extents.iter().flat_map(|&(n, zero)| vec![zero; n as usize]).collect();
            let mut at = 0;
            for run in shape(align, &extents, hurry) {
                prop_assert_eq!(run.offset, at);
                prop_assert_eq!(at % align, 0);
                at = run.end();
                if run.zero {
                    prop_assert_eq!(at % align, 0);
                    prop_assert!(map[run.offset as usize..at as usize].iter().all(|&zero| zero));
                }
            }
            prop_assert_eq!(at, map.len() as u64);
        }
    }
}

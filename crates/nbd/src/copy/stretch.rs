//! Zeroes inside of what was read: which stretches need not be written.

use std::ops::Range;

/// Looked at in one go: long enough for vector instructions, short enough to stop early.
const LOOK: usize = 128;

/// Whether all bytes are zero. Data is found out at its first bytes nearly always, so the cost is that of zeroes.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let mut looks = bytes.chunks_exact(LOOK);
    let rest_is_zero = looks.remainder().iter().all(|&byte| byte == 0);
    rest_is_zero && looks.all(|look| look.iter().fold(0, |all, byte| all | byte) == 0)
}

/// A part of a buffer that is all zero or that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) range: Range<usize>,
    pub(super) zero: bool,
}

/// Cuts `bytes`, which lie at `offset` of the device, into zeroes and data at multiples of `granule` (a power of two).
/// Zeroes between data that are shorter than `worth` are data: a second write costs more than they do.
pub(super) fn stretches(bytes: &[u8], offset: u64, granule: usize, worth: usize) -> Vec<Stretch> {
    let mut found: Vec<Stretch> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let into = (offset + at as u64) as usize & (granule - 1);
        let end = (at + granule - into).min(bytes.len());
        let zero = is_zero(&bytes[at..end]);
        join(&mut found, Stretch { range: at..end, zero });
        at = end;
    }
    let last = found.len().saturating_sub(1);
    let inner_and_short =
        |index: usize, stretch: &Stretch| index != 0 && index != last && stretch.range.len() < worth;
    if !found.iter().enumerate().any(|(index, stretch)| stretch.zero && inner_and_short(index, stretch)) {
        return found;
    }
    let mut joined = Vec::with_capacity(found.len());
    for (index, stretch) in found.into_iter().enumerate() {
        let zero = stretch.zero && !inner_and_short(index, &stretch);
        join(&mut joined, Stretch { zero, ..stretch });
    }
    joined
}

fn join(stretches: &mut Vec<Stretch>, next: Stretch) {
    match stretches.last_mut().filter(|last| last.zero == next.zero) {
        Some(last) => last.range.end = next.range.end,
        None => stretches.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for length in [0, 1, 127, 128, 129, 4096, 4100] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn short_zeroes_between_data_are_data_and_at_the_edges_are_not() {
        let mut bytes = vec![0; 64];
        let cut = |bytes: &[u8]| {
            let all = stretches(bytes, 1000 * 8, 8, 24);
            all.into_iter().map(|s| (s.range.start, s.range.end, s.zero)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&bytes), [(0, 64, true)]);
        bytes[8] = 1;
        bytes[31] = 1;
        assert_eq!(cut(&bytes), [(0, 8, true), (8, 32, false), (32, 64, true)]);
        bytes[63] = 1;
        assert_eq!(cut(&bytes), [(0, 8, true), (8, 32, false), (32, 56, true), (56, 64, false)]);
    }

    proptest! {
        #[test]
        fn stretches_cover_all_and_zeroes_are_zero(
            marks in prop::collection::vec(0usize..3000, 0..6),
            offset in 0u64..1000,
            worth in 0usize..600,
        ) {
            let mut bytes = vec![0; 3000];
            marks.iter().for_each(|&at| bytes[at] = 7);
            let mut at = 0;
            let mut before = None;
            for stretch in stretches(&bytes, offset, 64, worth) {
                prop_assert_eq!(stretch.range.start, at);
                prop_assert_ne!(before.replace(stretch.zero), Some(stretch.zero));
                prop_assert!(!stretch.zero || is_zero(&bytes[stretch.range.clone()]));
                at = stretch.range.end;
            }
            prop_assert_eq!(at, bytes.len());
        }
    }
}

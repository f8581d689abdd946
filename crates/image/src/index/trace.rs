//! The trace section: what a run of the image read first, in order, so that a host can fetch it before it is asked for.

use std::ops::Range;

use super::column::{join, put_varint, put_zigzag};
use super::format::{BLOCK_ITEMS_MAX, columns, put_block, take_block};
use crate::entry::BLOCK_BYTES;
use crate::{Error, Result};

/// Most runs of a trace: what one block holds, which at 4 KiB a run is the first 256 MiB of a run without any order.
pub const TRACE_RUNS_MAX: usize = BLOCK_ITEMS_MAX as usize;

/// `runs` are multiples of 4096 bytes and inside the content.
pub(crate) fn encode_trace(runs: &[Range<u64>], level: i32) -> Result<Vec<u8>> {
    if runs.len() > TRACE_RUNS_MAX {
        return Err(Error::Limit { what: "runs in a trace".to_owned(), limit: TRACE_RUNS_MAX as u64 });
    }
    let mut out = Vec::new();
    if runs.is_empty() {
        return Ok(out);
    }
    let mut columns: [Vec<u8>; 2] = Default::default();
    let mut end = 0;
    for run in runs {
        let (first, behind) = (run.start / BLOCK_BYTES, run.end / BLOCK_BYTES);
        put_zigzag(&mut columns[0], first as i64 - end as i64);
        put_varint(&mut columns[1], behind - first);
        end = behind;
    }
    put_block(&mut out, runs.len() as u32, &join(&columns), level)?;
    Ok(out)
}

/// Runs in bytes, each inside the content, no address in two of them.
pub(crate) fn decode_trace(mut section: &[u8], content_length: u64) -> Result<Vec<Range<u64>>> {
    let bad = |reason: &str| Error::index("trace", reason);
    let Some((items, block)) = take_block("trace", &mut section)? else { return Ok(Vec::new()) };
    if !section.is_empty() {
        return Err(bad("more than one block"));
    }
    let [mut starts, mut lengths] = columns::<2>("trace", &block)?;
    let blocks = content_length / BLOCK_BYTES;
    let mut runs = Vec::with_capacity(items as usize);
    let mut end = 0u64;
    for _ in 0..items {
        let start = end.checked_add_signed(starts.zigzag()?).filter(|&start| start < blocks);
        let start = start.ok_or_else(|| bad("a run begins outside the content"))?;
        let length = lengths.at_most(blocks - start, "run length")?;
        if length == 0 {
            return Err(bad("an empty run"));
        }
        end = start + length;
        runs.push(start * BLOCK_BYTES..end * BLOCK_BYTES);
    }
    starts.finish()?;
    lengths.finish()?;
    let mut sorted: Vec<(u64, u64)> = runs.iter().map(|run| (run.start, run.end)).collect();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(bad("runs overlap"));
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 100 * BLOCK_BYTES;

    fn section(items: &[(i64, u64)]) -> Vec<u8> {
        let mut columns: [Vec<u8>; 2] = Default::default();
        for &(start, length) in items {
            put_zigzag(&mut columns[0], start);
            put_varint(&mut columns[1], length);
        }
        let mut out = Vec::new();
        put_block(&mut out, items.len() as u32, &join(&columns), 1).unwrap();
        out
    }

    fn refused(items: &[(i64, u64)]) -> String {
        decode_trace(&section(items), LENGTH).unwrap_err().to_string()
    }

    #[test]
    fn runs_round_trip_in_their_order() {
        let runs = [40960..45056, 0..4096, 4096 * 99..LENGTH, 8192..40960];
        let bytes = encode_trace(&runs, 1).unwrap();
        assert_eq!(decode_trace(&bytes, LENGTH).unwrap(), runs);
        assert!(encode_trace(&[], 1).unwrap().is_empty());
        assert_eq!(decode_trace(&[], LENGTH).unwrap(), []);
    }

    #[test]
    fn what_no_content_holds_is_refused() {
        assert!(refused(&[(-1, 1)]).contains("outside"));
        assert!(refused(&[(100, 1)]).contains("outside"));
        assert!(refused(&[(i64::MAX, 1)]).contains("outside"));
        assert!(refused(&[(0, 0)]).contains("empty"));
        assert!(refused(&[(99, 2)]).contains("run length"));
        assert!(refused(&[(0, u64::MAX)]).contains("run length"));
        assert!(refused(&[(0, 2), (-1, 1)]).contains("overlap"));
        assert!(refused(&[(0, 100), (-100, 100)]).contains("overlap"));
        let all = decode_trace(&section(&[(0, 100)]), LENGTH).unwrap();
        assert_eq!(all, std::slice::from_ref(&(0..LENGTH)));
        decode_trace(&section(&[(0, 1)]), 0).unwrap_err();
        let two = section(&[(0, 1)]).repeat(2);
        assert!(decode_trace(&two, LENGTH).unwrap_err().to_string().contains("one block"));
    }

    #[test]
    fn runs_are_limited() {
        let runs: Vec<_> = (0..=TRACE_RUNS_MAX as u64).map(|i| i * 8192..i * 8192 + 4096).collect();
        assert!(matches!(encode_trace(&runs, 1), Err(Error::Limit { limit: 65_536, .. })));
        let bytes = encode_trace(&runs[..TRACE_RUNS_MAX], 1).unwrap();
        assert_eq!(decode_trace(&bytes, 1 << 30).unwrap(), runs[..TRACE_RUNS_MAX]);
    }
}

//! Maps of sparse files: GNU's old kind `S`, and PAX formats 0.0, 0.1 and 1.0.

use super::header::{GNU_REAL_SIZE, GNU_SPARSE, GNU_SPARSE_EXTENDED};
use super::text::{decimal, number};
use super::{BLOCK_BYTES, Input, SEGMENTS_MAX};
use crate::{Error, Result};

/// Data in a sparse file; what lies between segments is a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Offset in the file, bytes.
    pub(crate) offset: u64,
    /// Bytes, which follow those of the segment before in the archive.
    pub(crate) length: u64,
}

/// Bytes of a segment in GNU headers: two octal fields of 12.
const GNU_SEGMENT_BYTES: usize = 24;
/// Segments in an extension block of GNU's old format, and where the mark is that another follows.
const GNU_EXTENSION_SEGMENTS: usize = 21;
const GNU_EXTENSION_MORE: usize = GNU_EXTENSION_SEGMENTS * GNU_SEGMENT_BYTES;
/// Digits of the longest number in a map.
const DIGITS_MAX: usize = 20;

/// Reads the map of an entry of kind `S`: from its header and the extension blocks that follow it. Gives the map and
/// the file's size.
pub(crate) fn read_gnu(
    block: &[u8; 512],
    input: &mut Input<'_>,
) -> Result<Result<(Vec<Segment>, u64), String>> {
    let mut segments = Vec::new();
    if let Err(reason) = add_gnu(&mut segments, &block[GNU_SPARSE]) {
        return Ok(Err(reason));
    }
    let size = match number(&block[GNU_REAL_SIZE]).map(u64::try_from) {
        Ok(Ok(size)) => size,
        _ => return Ok(Err("sparse file without a usable size".to_owned())),
    };
    let mut more = block[GNU_SPARSE_EXTENDED] != 0;
    while more {
        let mut extension = [0; 512];
        if input.fill(&mut extension)? < extension.len() {
            let missing = "within the map of a sparse file".to_owned();
            return Err(Error::Truncated { position: input.position(), missing });
        }
        if let Err(reason) = add_gnu(&mut segments, &extension[..GNU_EXTENSION_MORE]) {
            return Ok(Err(reason));
        }
        more = extension[GNU_EXTENSION_MORE] != 0;
    }
    Ok(Ok((segments, size)))
}

fn add_gnu(segments: &mut Vec<Segment>, fields: &[u8]) -> Result<(), String> {
    for field in fields.chunks_exact(GNU_SEGMENT_BYTES) {
        if field[0] == 0 {
            break;
        }
        let part = |field: &[u8]| {
            let value = number(field)?;
            u64::try_from(value).map_err(|_| "negative number in a sparse map".to_owned())
        };
        push(segments, Segment { offset: part(&field[..12])?, length: part(&field[12..])? })?;
    }
    Ok(())
}

/// Adds a segment to a map.
pub(crate) fn push(segments: &mut Vec<Segment>, segment: Segment) -> Result<(), String> {
    if segments.len() == SEGMENTS_MAX {
        return Err(format!("sparse file of more than {SEGMENTS_MAX} segments"));
    }
    segments.push(segment);
    Ok(())
}

/// Parses the map of PAX format 0.1: "offset,length,offset,length...".
pub(crate) fn parse_list(text: &[u8]) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    let mut numbers = text.split(|&b| b == b',').map(decimal);
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or("sparse map with an odd number of numbers")?;
        push(&mut segments, Segment { offset: offset?, length: length? })?;
    }
    Ok(segments)
}

/// Reads the map of PAX format 1.0, which stands in front of the data in decimal lines, padded to whole blocks. Takes
/// at most `stored` bytes.
pub(crate) fn read_map(stored: u64, input: &mut Input<'_>) -> Result<Result<Vec<Segment>, String>> {
    let mut lines = Lines { input, left: stored, block: [0; 512], at: BLOCK_BYTES as usize };
    let mut segments = Vec::new();
    let count = match lines.number()? {
        Ok(count) => count,
        Err(reason) => return Ok(Err(reason)),
    };
    for _ in 0..count {
        let (offset, length) = (lines.number()?, lines.number()?);
        let pushed = offset.and_then(|offset| push(&mut segments, Segment { offset, length: length? }));
        if let Err(reason) = pushed {
            return Ok(Err(reason));
        }
    }
    Ok(Ok(segments))
}

/// Decimal lines in 512-byte blocks.
struct Lines<'a, 'b> {
    input: &'a mut Input<'b>,
    left: u64,
    block: [u8; 512],
    at: usize,
}

impl Lines<'_, '_> {
    fn number(&mut self) -> Result<Result<u64, String>> {
        let mut digits = Vec::new();
        loop {
            if self.at == self.block.len() {
                if self.left < BLOCK_BYTES {
                    return Ok(Err("sparse map longer than the entry".to_owned()));
                }
                if self.input.fill(&mut self.block)? < self.block.len() {
                    let missing = "within the map of a sparse file".to_owned();
                    return Err(Error::Truncated { position: self.input.position(), missing });
                }
                self.left -= BLOCK_BYTES;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => return Ok(decimal(&digits)),
                _ if digits.len() == DIGITS_MAX => return Ok(Err("sparse map without line ends".to_owned())),
                _ => digits.push(byte),
            }
        }
    }
}

/// Checks that the segments ascend, lie within the file and have as many bytes as are stored; drops empty ones.
pub(crate) fn check(mut segments: Vec<Segment>, size: u64, stored: u64) -> Result<Vec<Segment>, String> {
    let (mut end, mut total) = (0u64, 0u64);
    for segment in &segments {
        let next = segment.offset.checked_add(segment.length).filter(|&next| next <= size);
        let (Some(next), true) = (next, segment.offset >= end) else {
            return Err("sparse map out of order or beyond the file's size".to_owned());
        };
        end = next;
        total += segment.length;
    }
    if total != stored {
        return Err(format!("sparse map of {total} bytes for {stored} bytes of data"));
    }
    segments.retain(|segment| segment.length > 0);
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let expected = [Segment { offset: 0, length: 5 }, Segment { offset: 10, length: 2 }];
        assert_eq!(parse_list(b"0,5,10,2").unwrap(), expected);
        for bad in ["", "1", "0,5,10", "0,5,,", "a,b", "0,-1"] {
            parse_list(bad.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn checks() {
        let map = |parts: &[(u64, u64)]| {
            parts.iter().map(|&(offset, length)| Segment { offset, length }).collect::<Vec<_>>()
        };
        assert_eq!(check(map(&[(0, 5), (9, 1), (10, 0)]), 10, 6).unwrap().len(), 2);
        check(map(&[(0, 5), (4, 1)]), 10, 6).unwrap_err();
        check(map(&[(0, 11)]), 10, 11).unwrap_err();
        check(map(&[(u64::MAX, 2)]), u64::MAX, 2).unwrap_err();
        check(map(&[(0, 5)]), 10, 6).unwrap_err();
    }
}

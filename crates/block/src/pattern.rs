//! The `pattern` device: each aligned 8 bytes hold their own offset, big-endian. Any byte read through any stack of
//! layers, protocols and kernels can be checked without a copy of the data, and a byte that comes from the wrong
//! place says from where.

use crate::{BlockDevice, Capabilities, Error, ErrorKind, Geometry, Io, MAXIMUM_BLOCK, Result, check_range};

const WORD: u64 = 8;

/// A read-only device whose bytes follow from their offsets.
#[derive(Debug, Clone, Copy)]
pub struct PatternDevice {
    geometry: Geometry,
}

impl PatternDevice {
    /// A pattern device of `size` bytes.
    pub fn new(size: u64) -> Self {
        let geometry =
            Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK };
        PatternDevice { geometry }
    }

    /// Checks that `bytes`, read at `offset`, are what a pattern device holds there.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the first wrong byte and, where its word is one of the pattern, the offset it
    /// belongs to.
    pub fn verify(offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(wrong) = (0..bytes.len()).find(|&i| bytes[i] != byte_at(offset.wrapping_add(i as u64)))
        else {
            return Ok(());
        };
        let at = offset.wrapping_add(wrong as u64);
        let word_start = (at / WORD * WORD).wrapping_sub(offset);
        let word = usize::try_from(word_start).ok().and_then(|start| bytes.get(start..start.checked_add(8)?));
        let origin = match word.map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default())) {
            Some(value) if value % WORD == 0 => format!(" (this word belongs to offset {value})"),
            _ => String::new(),
        };
        let context =
            format!("byte {at} is {:#04x}, the pattern has {:#04x}{origin}", bytes[wrong], byte_at(at));
        Err(Error::new(ErrorKind::Corrupt, context))
    }
}

fn byte_at(offset: u64) -> u8 {
    (offset / WORD * WORD).to_be_bytes()[(offset % WORD) as usize]
}

pub(crate) fn fill(offset: u64, buffer: &mut [u8]) {
    let misaligned = ((WORD - offset % WORD) % WORD) as usize;
    let (head, rest) = buffer.split_at_mut(misaligned.min(buffer.len()));
    for (i, byte) in head.iter_mut().enumerate() {
        *byte = byte_at(offset + i as u64);
    }
    let mut word = offset + head.len() as u64;
    let mut words = rest.chunks_exact_mut(WORD as usize);
    for bytes in &mut words {
        bytes.copy_from_slice(&word.to_be_bytes());
        word = word.wrapping_add(WORD);
    }
    for (i, byte) in words.into_remainder().iter_mut().enumerate() {
        *byte = byte_at(word + i as u64);
    }
}

impl BlockDevice for PatternDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { multi_connection: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let checked = check_range(&self.geometry, "read", offset, buffer.len() as u64);
        Io::Ready(checked.map(|()| fill(offset, buffer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_their_offset_at_any_alignment() {
        let mut whole = vec![0; 256];
        fill(0, &mut whole);
        assert_eq!(&whole[8..16], &[0, 0, 0, 0, 0, 0, 0, 8]);
        for start in 0..24 {
            for end in start..64 {
                let mut part = vec![0xaa; end - start];
                fill(start as u64, &mut part);
                assert_eq!(part, whole[start..end], "{start}..{end}");
                assert!(PatternDevice::verify(start as u64, &part).is_ok());
            }
        }
    }

    #[test]
    fn the_last_word_of_the_largest_device_is_right() {
        let mut tail = [0; 13];
        fill(u64::MAX - 13, &mut tail);
        assert!(PatternDevice::verify(u64::MAX - 13, &tail).is_ok());
        assert_eq!(tail[6..], (u64::MAX - 7).to_be_bytes()[..7]);
    }

    #[test]
    fn a_misdirected_block_is_named() {
        let mut block = vec![0; 4096];
        fill(1 << 20, &mut block);
        let error = PatternDevice::verify(4096, &block).expect_err("bytes of another block");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("belongs to offset 1048576"), "{error}");
    }
}

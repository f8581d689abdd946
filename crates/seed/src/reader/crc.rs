//! Finds the one flipped bit that explains a wrong crc32c.
//!
//! A CRC is linear: the difference between the stored and the computed checksum depends on where bits differ, not on
//! the data. For fewer than 2^31 bits every position has a difference of its own (crc32c's Hamming distance is 4 at
//! these lengths), so a single flipped bit can be named, and undone in memory so that one error is one finding.

/// The reflected polynomial of crc32c.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Which bit to flip to make the checksums agree: its number counted from the first bit of `length` bytes of data
/// (lowest bit of a byte first), or in the stored checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlippedBit {
    Data(usize),
    Checksum(usize),
}

/// Finds the single flipped bit in `length` bytes of data with these checksums, if there is one.
pub(crate) fn flipped_bit(stored: u32, computed: u32, length: usize) -> Option<FlippedBit> {
    let difference = stored ^ computed;
    if difference.is_power_of_two() {
        return Some(FlippedBit::Checksum(difference.trailing_zeros() as usize));
    }
    // The last bit of the data goes through the register once; each bit before it once more.
    let mut syndrome = POLYNOMIAL;
    for bit in (0..length * 8).rev() {
        if syndrome == difference {
            return Some(FlippedBit::Data(bit));
        }
        syndrome = (syndrome >> 1) ^ (POLYNOMIAL & (syndrome & 1).wrapping_neg());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_flip_is_located_and_two_are_not() {
        let data: Vec<u8> = (0..500u32).map(|index| (index * 7) as u8).collect();
        let right = crc32c::crc32c(&data);
        for bit in 0..data.len() * 8 {
            let mut bad = data.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(flipped_bit(right, crc32c::crc32c(&bad), data.len()), Some(FlippedBit::Data(bit)));
        }
        assert_eq!(flipped_bit(right ^ 8, right, data.len()), Some(FlippedBit::Checksum(3)));
        let mut bad = data.clone();
        bad[3] ^= 0x81;
        assert_eq!(flipped_bit(right, crc32c::crc32c(&bad), data.len()), None);
    }
}

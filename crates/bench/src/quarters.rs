//! Where the bytes of a benchmark's clone lie: a quarter at the start of the virtual region, half around its middle, a
//! quarter at its end, so that neither a large region nor its far end is ever left out of a measurement.

use anyhow::{Result, ensure};

/// Quarters begin on boundaries of this many bytes, the sector of btrfs.
const SECTOR: u64 = 4096;

/// A run of the clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where in the file.
    pub(crate) file_offset: u64,
    /// Where in the virtual region.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) length: u64,
}

/// The three runs of a clone of `clone_size` bytes in a region of `virtual_size` bytes.
///
/// # Errors
/// The clone is no multiple of four sectors, or larger than the region.
pub(crate) fn pieces(virtual_size: u64, clone_size: u64) -> Result<[Piece; 3]> {
    let quarter = clone_size / 4;
    ensure!(
        clone_size > 0 && quarter.is_multiple_of(SECTOR) && clone_size.is_multiple_of(4),
        "a clone of {clone_size} bytes: it has to be a multiple of 16 KiB"
    );
    ensure!(
        clone_size <= virtual_size && virtual_size.is_multiple_of(2 * SECTOR),
        "a clone of {clone_size} bytes in a virtual region of {virtual_size} bytes"
    );
    Ok([
        Piece { file_offset: 0, address: 0, length: quarter },
        Piece { file_offset: quarter, address: virtual_size / 2 - quarter, length: 2 * quarter },
        Piece { file_offset: 3 * quarter, address: virtual_size - quarter, length: quarter },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_tile_the_file_and_reach_both_ends_of_the_region() {
        for (virtual_size, clone_size) in [(1 << 30, 1 << 20), (4 << 60, 1 << 36), (1 << 30, 1 << 30)] {
            let pieces = pieces(virtual_size, clone_size).unwrap();
            let mut end = 0;
            for window in pieces.windows(2) {
                assert!(window[0].address + window[0].length <= window[1].address);
            }
            for piece in pieces {
                assert_eq!(piece.file_offset, end);
                end += piece.length;
            }
            assert_eq!((end, pieces[0].address), (clone_size, 0));
            assert_eq!(pieces[2].address + pieces[2].length, virtual_size);
        }
        assert!(pieces(1 << 30, 4096).is_err() && pieces(1 << 20, 1 << 21).is_err());
    }
}

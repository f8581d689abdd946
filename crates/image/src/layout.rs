//! How files' bytes map to the content's address space: pieces in, block-aligned runs out.

use crate::entry::{BLOCK_BYTES, Run};
use crate::index::Piece;

/// Gathers a file's pieces into the fewest block-aligned runs.
///
/// A piece need not begin or end on a block boundary (sparse archives know no blocks), but its address is congruent
/// to its file offset, so the blocks around it are a run, and pieces that share a block must lie on one line.
#[derive(Debug, Default)]
pub(crate) struct RunBuilder {
    runs: Vec<Run>,
}

impl RunBuilder {
    /// Adds the piece that begins at `file_offset`, behind all pieces added before. `file_offset` and the end of the
    /// piece are at most 2^63.
    pub(crate) fn add(&mut self, file_offset: u64, piece: &Piece) -> Result<(), &'static str> {
        if file_offset % BLOCK_BYTES != piece.address % BLOCK_BYTES {
            return Err("a piece that cannot be cloned: address and file offset differ within a block");
        }
        let lead = file_offset % BLOCK_BYTES;
        let (start, address) = (file_offset - lead, piece.address - lead);
        let length = (lead + piece.length).next_multiple_of(BLOCK_BYTES);
        if let Some(last) = self.runs.last_mut() {
            let end = last.file_offset + last.length;
            let on_line = start >= last.file_offset
                && address >= last.address
                && address - last.address == start - last.file_offset;
            if on_line && start <= end {
                last.length = last.length.max(start + length - last.file_offset);
                return Ok(());
            }
            if start < end {
                return Err("two pieces claim one block of a file");
            }
        }
        self.runs.push(Run { file_offset: start, address, length });
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<Run> {
        self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(address: u64, length: u64) -> Piece {
        Piece { address, offset: 0, length, blob: 0 }
    }

    #[test]
    fn adjacent_pieces_become_one_run() {
        let mut runs = RunBuilder::default();
        runs.add(0, &piece(8192, 4096)).unwrap();
        runs.add(4096, &piece(12288, 10)).unwrap();
        assert_eq!(runs.finish(), [Run { file_offset: 0, address: 8192, length: 8192 }]);
    }

    #[test]
    fn pieces_within_one_block_share_it() {
        let mut runs = RunBuilder::default();
        runs.add(100, &piece(100, 50)).unwrap();
        runs.add(300, &piece(300, 50)).unwrap();
        runs.add(1 << 30, &piece(4096, 1)).unwrap();
        let expected = [
            Run { file_offset: 0, address: 0, length: 4096 },
            Run { file_offset: 1 << 30, address: 4096, length: 4096 },
        ];
        assert_eq!(runs.finish(), expected);
    }

    #[test]
    fn what_cannot_be_cloned_is_refused() {
        RunBuilder::default().add(100, &piece(0, 10)).unwrap_err();
        let mut runs = RunBuilder::default();
        runs.add(0, &piece(0, 10)).unwrap();
        runs.add(20, &piece(4096 + 20, 10)).unwrap_err();
    }
}

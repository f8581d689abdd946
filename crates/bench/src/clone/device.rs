//! The virtual device of this benchmark: a seed's own blocks from memory and a pattern for everything else, so that
//! nothing but the transport costs anything and each byte that is read can be checked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use loam_block::{BlockDevice, Capabilities, Geometry, Io, MAXIMUM_BLOCK, PatternDevice, check_range};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The most bytes that a seed's own blocks may have: they are held in memory.
const BLOCKS_MAX: u64 = 1 << 30;

/// The data of a sparse file in memory, over a pattern.
pub(crate) struct SeedDevice {
    /// Where in the device, and which bytes; ascending.
    blocks: Vec<(u64, Vec<u8>)>,
    pattern: PatternDevice,
    pattern_base: u64,
    geometry: Geometry,
}

impl SeedDevice {
    /// A device of `size` bytes: what the sparse file `image` has, and in its holes a pattern from the byte
    /// `pattern_base` of the device on, which is where the pattern's 0 is.
    pub(crate) fn open(image: &Path, size: u64, pattern_base: u64) -> Result<Self> {
        let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        SeedDevice::load(&file, size, pattern_base)
    }

    fn load(file: &File, size: u64, pattern_base: u64) -> Result<Self> {
        let (mut blocks, mut position, mut total) = (Vec::new(), 0, 0);
        loop {
            let start = match rustix::fs::seek(file, SeekFrom::Data(position)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                Err(error) => return Err(error).context("cannot look for data in the seed's image"),
            };
            position = rustix::fs::seek(file, SeekFrom::Hole(start))?;
            total += position - start;
            ensure!(total <= BLOCKS_MAX, "the seed's image has more than {BLOCKS_MAX} bytes of data");
            let mut bytes = vec![0; (position - start) as usize];
            file.read_exact_at(&mut bytes, start).context("cannot read the seed's image")?;
            blocks.push((start, bytes));
        }
        Ok(SeedDevice::new(blocks, size, pattern_base))
    }

    fn new(blocks: Vec<(u64, Vec<u8>)>, size: u64, pattern_base: u64) -> Self {
        let geometry =
            Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK };
        SeedDevice { blocks, pattern: PatternDevice::new(size), pattern_base, geometry }
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> loam_block::Result<()> {
        let below = self.pattern_base.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (zeroes, pattern) = buffer.split_at_mut(below);
        zeroes.fill(0);
        if !pattern.is_empty() {
            match self.pattern.read(offset + below as u64 - self.pattern_base, pattern) {
                Io::Ready(result) => result?,
                Io::Pending(_) => unreachable!("a pattern is at hand"),
            }
        }
        let end = offset + buffer.len() as u64;
        let first = self.blocks.partition_point(|(start, bytes)| start + bytes.len() as u64 <= offset);
        for (start, bytes) in self.blocks[first..].iter().take_while(|(start, _)| *start < end) {
            let (from, to) = (offset.max(*start), end.min(start + bytes.len() as u64));
            let source = &bytes[(from - start) as usize..(to - start) as usize];
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
        Ok(())
    }
}

impl BlockDevice for SeedDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { multi_connection: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let checked = check_range(&self.geometry, "read", offset, buffer.len() as u64);
        Io::Ready(checked.and_then(|()| self.fill(offset, buffer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &SeedDevice, offset: u64, length: usize) -> Vec<u8> {
        let mut buffer = vec![0xaa; length];
        match device.read(offset, &mut buffer) {
            Io::Ready(result) => result.unwrap(),
            Io::Pending(_) => panic!("it is in memory"),
        }
        buffer
    }

    #[test]
    fn blocks_lie_over_zeroes_and_pattern() {
        let blocks = vec![(4096, vec![1; 4096]), (16384, vec![2; 8])];
        let device = SeedDevice::new(blocks, 1 << 20, 8192);
        let bytes = read(&device, 4090, 16400 - 4090);
        assert_eq!(bytes[..6], [0; 6]);
        assert!(bytes[6..4102].iter().all(|byte| *byte == 1));
        assert!(PatternDevice::verify(0, &bytes[4102..4102 + 8192]).is_ok());
        assert_eq!(bytes[bytes.len() - 16..][..8], [2; 8]);
        assert!(PatternDevice::verify(8200, &bytes[bytes.len() - 8..]).is_ok());
    }

    #[test]
    fn a_sparse_file_is_read_without_its_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 4096], 32 << 20).unwrap();
        let device = SeedDevice::load(&file, 1 << 40, 0).unwrap();
        assert!(device.blocks.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() < 1 << 20);
        assert_eq!(read(&device, 32 << 20, 4096), [7; 4096]);
        assert!(PatternDevice::verify(1 << 39, &read(&device, 1 << 39, 4096)).is_ok());
    }
}

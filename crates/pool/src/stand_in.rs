//! What is served in the daemon's place while a pool is taken down whose daemon cannot be started: the filesystem's own
//! blocks, which unmounting may need, and errors for all content.

use std::fs::File;
use std::os::unix::fs::FileExt;

use loam_block::{BlockDevice, Capabilities, Error, ErrorKind, Geometry, Io, MAXIMUM_BLOCK, Result};

use crate::directory::PoolDirectory;

/// The virtual device without its content. It reads at once, in the thread that asks: nothing else may be running.
pub(crate) struct StandIn {
    /// Absent where even that cannot be opened: unmounting must go on.
    prefix: Option<File>,
    geometry: Geometry,
}

impl StandIn {
    /// In place of a device of `size` bytes.
    pub(crate) fn new(directory: &PoolDirectory, size: u64) -> Self {
        let geometry =
            Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK };
        StandIn { prefix: File::open(directory.virtual_image()).ok(), geometry }
    }

    fn read_prefix(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let failed = |why: &str| {
            let what = format!("read of {} bytes at {offset} of the virtual device", buffer.len());
            Error::new(ErrorKind::Io, format!("{what}: {why}"))
        };
        let Some(prefix) = &self.prefix else { return Err(failed("virtual.img cannot be opened")) };
        let end = prefix.metadata().map_err(|error| failed(&error.to_string()))?.len();
        if offset + buffer.len() as u64 > end {
            return Err(failed("the pool is being taken down without its daemon"));
        }
        let read = prefix.read_exact_at(buffer, offset);
        read.map_err(|error| Error::with_source(ErrorKind::Io, "read of virtual.img", error))
    }
}

impl BlockDevice for StandIn {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let checked = loam_block::check_range(&self.geometry, "read", offset, buffer.len() as u64);
        Io::Ready(checked.and_then(|()| self.read_prefix(offset, buffer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &StandIn, offset: u64) -> Result<[u8; 4096]> {
        let mut block = [0; 4096];
        let Io::Ready(result) = device.read(offset, &mut block) else { panic!("it must not wait") };
        result.map(|()| block)
    }

    #[test]
    fn the_filesystems_own_blocks_are_there_and_content_is_an_error() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = PoolDirectory::new(temporary.path()).unwrap();
        let size = (1 << 40) + (1 << 30);
        let blind = StandIn::new(&directory, size);
        assert!(read(&blind, 0).is_err(), "no image");
        std::fs::write(directory.virtual_image(), [7; 8192]).unwrap();
        let device = StandIn::new(&directory, size);
        assert_eq!(read(&device, 4096).unwrap(), [7; 4096]);
        for offset in [8192, 1 << 40, size - 4096, size, u64::MAX] {
            assert!(read(&device, offset).is_err(), "{offset}");
        }
    }
}

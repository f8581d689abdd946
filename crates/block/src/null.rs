//! The `null` device: reads as zeroes, forgets what is written. It costs nothing, so it shows what a transport or a
//! server costs.

use crate::device::whole_device_as;
use crate::{
    BlockDevice, Capabilities, Extent, ExtentKind, Geometry, Io, MAXIMUM_BLOCK, Result, WriteFlags,
    ZeroFlags, check_range,
};

/// A device of zeroes that swallows writes.
#[derive(Debug, Clone, Copy)]
pub struct NullDevice {
    geometry: Geometry,
}

impl NullDevice {
    /// A null device of `size` bytes.
    pub fn new(size: u64) -> Self {
        let geometry =
            Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK };
        NullDevice { geometry }
    }

    fn check(&self, operation: &str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry, operation, offset, length)
    }
}

impl BlockDevice for NullDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write: true,
            trim: true,
            zero: true,
            fast_zero: true,
            extents: true,
            multi_connection: true,
            lazy: false,
            rotational: Some(false),
        }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        Io::Ready(self.check("read", offset, buffer.len() as u64).map(|()| buffer.fill(0)))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        Io::Ready(self.check("write", offset, data.len() as u64))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        Io::Ready(self.check("write of zeroes", offset, length))
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        Io::Ready(self.check("trim", offset, length))
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Ok(()))
    }

    fn extents(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Extent>> {
        Io::Ready(whole_device_as(&self.geometry, ExtentKind::Hole, offset, length))
    }
}

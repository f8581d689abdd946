//! Descriptors as the kernel writes them become requests here, in range or refused.

use loam_sys::ublk::{IoDescriptor, operation};

/// Bytes of the unit that descriptors count in.
const SECTOR: u64 = 512;

pub(super) const EIO: i32 = 5;
pub(super) const EINVAL: i32 = 22;
pub(super) const EROFS: i32 = 30;
pub(super) const EOPNOTSUPP: i32 = 95;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// `length` bytes from `offset`; inside the device, and not longer than a buffer.
    Read { offset: u64, length: u32 },
    /// Nothing was written, so nothing is to be done.
    Flush,
    /// Not to be had: this errno.
    Refused(i32),
}

impl Request {
    /// What `descriptor` asks of a device of `size` bytes, whose requests are no longer than `io_bytes_max`.
    pub(super) fn parse(descriptor: &IoDescriptor, size: u64, io_bytes_max: u32) -> Request {
        match descriptor.operation() {
            operation::READ => {
                let length = u64::from(descriptor.sectors) * SECTOR;
                let offset = descriptor.first_sector.checked_mul(SECTOR);
                let end = offset.and_then(|offset| offset.checked_add(length));
                match (offset, end) {
                    (Some(offset), Some(end))
                        if end <= size && (1..=u64::from(io_bytes_max)).contains(&length) =>
                    {
                        Request::Read { offset, length: length as u32 }
                    }
                    _ => Request::Refused(EINVAL),
                }
            }
            operation::FLUSH => Request::Flush,
            operation::WRITE => Request::Refused(EROFS),
            _ => Request::Refused(EOPNOTSUPP),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = (7 << 60) + (1 << 40);
    const IO_BYTES: u32 = 128 << 10;

    fn parse(operation: u8, first_sector: u64, sectors: u32) -> Request {
        // Flags in the upper bytes do not matter.
        let operation_flags = 0xabcd_ef00 | u32::from(operation);
        Request::parse(&IoDescriptor { operation_flags, sectors, first_sector, address: 1 }, SIZE, IO_BYTES)
    }

    #[test]
    fn reads_are_in_range_or_refused() {
        let last = SIZE / SECTOR - 8;
        assert_eq!(parse(0, last, 8), Request::Read { offset: SIZE - 4096, length: 4096 });
        assert_eq!(parse(0, 0, IO_BYTES / 512), Request::Read { offset: 0, length: IO_BYTES });
        let refused =
            [(last, 9), (last + 8, 8), (u64::MAX, 8), (1 << 55, 8), (0, 0), (0, u32::MAX), (0, 257)];
        for (first, sectors) in refused {
            assert_eq!(parse(0, first, sectors), Request::Refused(EINVAL), "{first} {sectors}");
        }
    }

    #[test]
    fn what_changes_the_device_is_refused() {
        assert_eq!(parse(1, 0, 8), Request::Refused(EROFS));
        for operation in [3, 4, 5, 10, 15, 18, 255] {
            assert_eq!(parse(operation, 0, 8), Request::Refused(EOPNOTSUPP), "{operation}");
        }
        assert_eq!(parse(2, 0, 0), Request::Flush);
    }

    proptest! {
        #[test]
        fn no_descriptor_reaches_beyond_the_device(
            flags in any::<u32>(), sectors in any::<u32>(), first_sector in any::<u64>(),
            size in any::<u64>(), io_bytes_max in any::<u32>(),
        ) {
            let descriptor = IoDescriptor { operation_flags: flags, sectors, first_sector, address: 0 };
            if let Request::Read { offset, length } = Request::parse(&descriptor, size, io_bytes_max) {
                prop_assert!(length > 0 && length <= io_bytes_max);
                prop_assert!(offset.checked_add(u64::from(length)).unwrap() <= size);
            }
        }
    }
}

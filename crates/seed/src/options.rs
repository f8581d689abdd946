//! What is to be formatted: sizes, layout, identity; and the arithmetic of where chunks lie.

use crate::disk::{LABEL_MAX, SECTOR_SIZE, STRIPE_LENGTH};
use crate::{Error, Result};

/// Where the virtual region begins on the virtual device, in bytes: clear of all superblocks, so that
/// `physical = VIRTUAL_BASE + address` holds for every address.
pub const VIRTUAL_BASE: u64 = 1 << 40;
/// The smallest virtual region, in bytes.
pub const VIRTUAL_SIZE_MIN: u64 = 1 << 30;
/// The largest virtual region, in bytes: beyond 8 EiB less what the kernel adds, its signed offsets overflow.
pub const VIRTUAL_SIZE_MAX: u64 = 7 << 60;
/// The smallest local device, in bytes.
pub const LOCAL_SIZE_MIN: u64 = 256 << 20;
/// The length of the data chunks, in bytes, but for the last. Kernels since 6.4 refuse 2^48 - 64 KiB and more.
pub const CHUNK_LENGTH: u64 = 128 << 40;
/// The longest chunk that kernels since 6.4 mount (`btrfs_check_chunk_valid`), in bytes.
pub const KERNEL_CHUNK_MAX: u64 = (u32::MAX as u64 - 1) << 16;

/// Where the SYSTEM chunk (the chunk tree) begins.
pub(crate) const SYSTEM_BASE: u64 = 1 << 20;
/// Where the METADATA chunk begins: past the second superblock.
pub(crate) const METADATA_BASE: u64 = 65 << 20;
/// Where a chunk that begins at [`METADATA_BASE`] has to end: at the third superblock.
pub(crate) const METADATA_END: u64 = 256 << 30;
/// The transaction of everything in a fresh image.
pub(crate) const GENERATION: u64 = 1;

/// Who carries the trees, and how the virtual region is cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// Two devices, sprouted offline: the virtual device is a seed that carries nothing but a superblock, the local
    /// device carries every tree. Mounts read-write at once.
    #[default]
    Pair,
    /// One device, a seed that carries its trees below the virtual region; to be sprouted by `btrfs device add`.
    Single,
    /// As [`Layout::Single`] with one data chunk and one extent: see [`Layout::kernel_limit`].
    MegaExtent,
}

impl Layout {
    /// Why current kernels refuse this layout at `virtual_size` bytes, if they do.
    pub fn kernel_limit(self, virtual_size: u64) -> Option<String> {
        (self == Layout::MegaExtent && virtual_size > KERNEL_CHUNK_MAX).then(|| {
            format!(
                "Linux 6.4 and later refuse to mount this image (\"chunk length too large\"): its one data chunk has \
                 {virtual_size} bytes, they allow {KERNEL_CHUNK_MAX}; use layout single or pair, or an older kernel"
            )
        })
    }

    /// Whether the virtual image carries the trees.
    pub fn trees_on_virtual(self) -> bool {
        self != Layout::Pair
    }
}

/// A time since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds, below 10^9.
    pub nanoseconds: u32,
}

/// What to format. The same options and trees give the same bytes.
#[derive(Debug, Clone)]
pub struct SeedOptions {
    /// Who carries the trees.
    pub layout: Layout,
    /// Bytes of the virtual region: a multiple of 64 KiB from 1 GiB to 7 EiB.
    pub virtual_size: u64,
    /// Bytes of the local device: a multiple of 4 KiB, at least 256 MiB. Only for [`Layout::Pair`].
    pub local_size: u64,
    /// Bytes of a tree block: a power of two from 4 KiB to 64 KiB.
    pub node_size: u32,
    /// Enables simple quotas (Linux 6.7 and later). What the image holds predates them and is charged to nobody.
    pub simple_quota: bool,
    /// Every UUID is derived from this: two file systems that are ever to be mounted on one host need different ones.
    pub identity: [u8; 32],
    /// What the UUIDs of the virtual device of a pair are derived from instead, where it is to be the same for many local
    /// devices: each of them is a file system of its own, on one seed.
    pub seed_identity: Option<[u8; 32]>,
    /// The caller's digest of what was pre-cloned (an index), noted in the local image's label block.
    pub content_digest: [u8; 32],
    /// The file system's label: at most 255 bytes, no newline.
    pub label: String,
    /// Times of the top-level directory and of `.virtual-data`.
    pub timestamp: Timestamp,
}

impl SeedOptions {
    /// A pair of 4 EiB with 64 GiB of local space and tree blocks of 16 KiB.
    pub fn new(identity: [u8; 32]) -> Self {
        SeedOptions {
            layout: Layout::Pair,
            virtual_size: 4 << 60,
            local_size: 64 << 30,
            node_size: 16 << 10,
            simple_quota: false,
            identity,
            seed_identity: None,
            content_digest: [0; 32],
            label: String::new(),
            timestamp: Timestamp::default(),
        }
    }

    /// Bytes of the virtual device.
    pub fn virtual_device_size(&self) -> u64 {
        VIRTUAL_BASE + self.virtual_size
    }

    /// [`SeedOptions::seed_identity`], where the layout has a virtual device that is nothing but a seed.
    pub(crate) fn seed_identity_of_pair(&self) -> Option<&[u8; 32]> {
        self.seed_identity.as_ref().filter(|_| self.layout == Layout::Pair)
    }

    /// # Errors
    /// [`Error::Option`] for the first option that is out of its range.
    pub fn validate(&self) -> Result<()> {
        let refuse =
            |option, value, reason: &str| Err(Error::Option { option, value, reason: reason.to_owned() });
        let size = self.virtual_size;
        if !(VIRTUAL_SIZE_MIN..=VIRTUAL_SIZE_MAX).contains(&size) {
            return refuse("virtual size", size, "must be from 1 GiB to 7 EiB");
        }
        if !size.is_multiple_of(STRIPE_LENGTH) {
            return refuse("virtual size", size, "must be a multiple of 64 KiB, the unit of chunks");
        }
        if !self.node_size.is_power_of_two() || !(4 << 10..=64 << 10).contains(&self.node_size) {
            return refuse("node size", self.node_size.into(), "must be 4, 8, 16, 32 or 64 KiB");
        }
        if self.layout == Layout::Pair {
            let size = self.local_size;
            if size < LOCAL_SIZE_MIN {
                return refuse("local size", size, "must be at least 256 MiB");
            }
            if !size.is_multiple_of(u64::from(SECTOR_SIZE)) {
                return refuse("local size", size, "must be a multiple of 4 KiB");
            }
            if size > i64::MAX as u64 - VIRTUAL_BASE - self.virtual_size {
                return refuse("local size", size, "both devices together must stay below 8 EiB");
            }
        }
        if self.label.len() > LABEL_MAX || self.label.bytes().any(|byte| byte == b'\n' || byte == 0) {
            return refuse(
                "label length",
                self.label.len() as u64,
                "at most 255 bytes, no newline, no zero byte",
            );
        }
        if self.timestamp.nanoseconds >= 1_000_000_000 {
            return refuse("timestamp nanoseconds", self.timestamp.nanoseconds.into(), "must be below 10^9");
        }
        Ok(())
    }

    /// Bytes of every data chunk but the last, which may be shorter.
    pub(crate) fn chunk_length(&self) -> u64 {
        if self.layout == Layout::MegaExtent {
            self.virtual_size
        } else {
            CHUNK_LENGTH.min(self.virtual_size)
        }
    }

    /// The data chunks: logical (and physical) start and length.
    pub(crate) fn data_chunks(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + use<> {
        let (size, length) = (self.virtual_size, self.chunk_length());
        let count = size.div_ceil(length) as u32;
        (0..count).map(move |index| {
            let start = u64::from(index) * length;
            (VIRTUAL_BASE + start, length.min(size - start))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_the_region() {
        for (layout, size, count) in [
            (Layout::Pair, 1 << 30, 1),
            (Layout::Pair, 4 << 60, 32_768),
            (Layout::Single, (128 << 40) + (64 << 10), 2),
            (Layout::MegaExtent, 4 << 60, 1),
        ] {
            let options = SeedOptions { layout, virtual_size: size, ..SeedOptions::new([0; 32]) };
            options.validate().unwrap();
            assert_eq!(options.data_chunks().len(), count);
            let end = options.data_chunks().fold(VIRTUAL_BASE, |end, (start, length)| {
                assert_eq!(start, end);
                end + length
            });
            assert_eq!(end, options.virtual_device_size());
        }
    }

    #[test]
    fn out_of_range_options_are_refused() {
        let good = SeedOptions::new([0; 32]);
        for bad in [
            SeedOptions { virtual_size: (1 << 30) - (64 << 10), ..good.clone() },
            SeedOptions { virtual_size: (7 << 60) + (64 << 10), ..good.clone() },
            SeedOptions { virtual_size: (1 << 30) + 4096, ..good.clone() },
            SeedOptions { node_size: 2048, ..good.clone() },
            SeedOptions { node_size: 20 << 10, ..good.clone() },
            SeedOptions { local_size: 255 << 20, ..good.clone() },
            SeedOptions { local_size: 1 << 62, virtual_size: 4 << 60, ..good.clone() },
            SeedOptions { label: "x".repeat(256), ..good.clone() },
        ] {
            assert!(matches!(bad.validate(), Err(Error::Option { .. })), "{bad:?}");
        }
    }

    #[test]
    fn only_a_long_mega_extent_meets_the_kernel_limit() {
        assert!(Layout::MegaExtent.kernel_limit(4 << 60).unwrap().contains("chunk length too large"));
        assert_eq!(KERNEL_CHUNK_MAX, (1 << 48) - (128 << 10));
        assert_eq!(Layout::MegaExtent.kernel_limit(KERNEL_CHUNK_MAX), None);
        assert_eq!(Layout::Single.kernel_limit(4 << 60), None);
    }
}

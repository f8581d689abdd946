//! The four uses that btrfs makes of crc32c besides checksums. They differ in seed and in whether the result is
//! inverted, which is where implementations go wrong.

/// crc32c without inversion before or after, as the kernel's `crc32c(seed, data)`.
pub(crate) fn raw(seed: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, data)
}

/// The hash of a name in the key of `DIR_ITEM` and `XATTR` (`btrfs_name_hash`).
pub(crate) fn name(name: &[u8]) -> u64 {
    u64::from(raw(!1, name))
}

/// The hash in the key of `INODE_EXTREF` (`btrfs_extref_hash`): only the lower half of the inode number counts.
pub(crate) fn extref(parent: u64, name: &[u8]) -> u64 {
    u64::from(raw(parent as u32, name))
}

/// The hash in the key of `EXTENT_DATA_REF` (`hash_extent_data_ref`): its halves overlap by one bit.
pub(crate) fn data_ref(root: u64, objectid: u64, offset: u64) -> u64 {
    let high = u64::from(raw(!0, &root.to_le_bytes()));
    let low = u64::from(raw(raw(!0, &objectid.to_le_bytes()), &offset.to_le_bytes()));
    (high << 31) ^ low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_matches_the_published_vector() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(raw(!0, b"123456789"), !0xe306_9283);
    }

    #[test]
    fn name_hash_matches_kernel_keys() {
        // As `btrfs inspect-internal dump-tree` shows them on any file system.
        assert_eq!(name(b"default"), 2_378_154_706);
        assert_eq!(name(b""), u64::from(!1u32));
    }

    #[test]
    fn data_ref_halves_overlap() {
        let hash = data_ref(5, 257, 0);
        let high = u64::from(raw(!0, &5u64.to_le_bytes()));
        assert_eq!(hash >> 32, (high << 31) >> 32);
        assert_ne!(hash, data_ref(5, 258, 0));
        assert_ne!(hash, data_ref(5, 257, 4096));
    }
}

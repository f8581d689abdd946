//! All UUIDs of an image, derived from the caller's identity with keyed BLAKE3, so that the same input gives the
//! same bytes.

/// The UUIDs that are not those of subvolumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    key: [u8; 32],
    /// The file system that is mounted: in all tree blocks and in the superblock beside them.
    pub fsid: [u8; 16],
    /// The chunk tree.
    pub chunk_tree: [u8; 16],
    /// The virtual device.
    pub virtual_device: [u8; 16],
    /// The seed file system that the virtual device of a pair belongs to.
    pub seed_fsid: [u8; 16],
    /// The local device.
    pub local_device: [u8; 16],
}

impl Identity {
    /// Derives all UUIDs from `identity`; those of the virtual device of a pair from `seed_identity`, where it has one of
    /// its own.
    pub fn new(identity: &[u8; 32], seed_identity: Option<&[u8; 32]>) -> Self {
        let seed = seed_identity.unwrap_or(identity);
        Identity {
            key: *identity,
            fsid: derive(identity, "file system", b""),
            chunk_tree: derive(identity, "chunk tree", b""),
            virtual_device: derive(seed, "virtual device", b""),
            seed_fsid: derive(seed, "seed file system", b""),
            local_device: derive(identity, "local device", b""),
        }
    }

    /// The UUID of a subvolume.
    pub fn subvolume(&self, name: &str) -> [u8; 16] {
        derive(&self.key, "subvolume", name.as_bytes())
    }
}

/// A UUID of version 8 (RFC 9562: contents are the application's own).
fn derive(key: &[u8; 32], purpose: &str, name: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&(purpose.len() as u64).to_le_bytes()).update(purpose.as_bytes()).update(name);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_depend_on_identity_and_differ_from_each_other() {
        let one = Identity::new(&[1; 32], None);
        assert_eq!(one, Identity::new(&[1; 32], Some(&[1; 32])));
        let two = Identity::new(&[2; 32], None);
        let all = [
            one.fsid,
            one.seed_fsid,
            one.chunk_tree,
            one.virtual_device,
            one.local_device,
            one.subvolume("a"),
            one.subvolume("b"),
            two.fsid,
            two.subvolume("a"),
        ];
        for (index, uuid) in all.iter().enumerate() {
            assert!(!all[..index].contains(uuid));
            assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (8, 2));
        }
    }

    #[test]
    fn local_devices_of_one_seed_differ_and_their_seed_does_not() {
        let [one, two] = [[1; 32], [2; 32]].map(|identity| Identity::new(&identity, Some(&[3; 32])));
        assert_eq!((one.virtual_device, one.seed_fsid), (two.virtual_device, two.seed_fsid));
        assert_ne!(one.fsid, two.fsid);
        assert_ne!(one.local_device, two.local_device);
    }
}

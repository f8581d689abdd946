//! The chunk map: from logical addresses to places on devices.

use zerocopy::FromBytes;

use crate::disk::{ChunkItem, DiskKey, Key, Stripe, item};

/// Profiles whose data lies in one piece on each of their devices: one copy, several on one device, or mirrored.
const PROFILE_MASK: u64 = 0x7f8;
const WHOLE_COPIES: u64 = 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10;

/// A run of the logical address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its first logical address.
    pub logical: u64,
    /// Bytes.
    pub length: u64,
    /// Type and profile, see [`crate::disk::flag`].
    pub flags: u64,
    /// Bytes of a stripe unit.
    pub stripe_length: u64,
    /// The tree that owns it: 2.
    pub owner: u64,
    /// Where its copies, or parts, lie.
    pub stripes: Vec<Place>,
}

/// Where a stripe lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The device's id.
    pub devid: u64,
    /// Bytes from the start of the device.
    pub physical: u64,
    /// The device's UUID.
    pub uuid: [u8; 16],
}

impl Chunk {
    /// Reads a chunk item.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(key: Key, body: &[u8]) -> Result<Self, String> {
        let (head, rest) =
            ChunkItem::read_from_prefix(body).map_err(|_| "the item is too short".to_owned())?;
        let count = usize::from(head.stripe_count.get());
        if count == 0 || rest.len() != count * size_of::<Stripe>() {
            return Err(format!("{count} stripes in {} bytes", rest.len()));
        }
        let stripes =
            rest.chunks_exact(size_of::<Stripe>()).filter_map(|bytes| Stripe::read_from_bytes(bytes).ok());
        let chunk = Chunk {
            logical: key.offset,
            length: head.length.get(),
            flags: head.flags.get(),
            stripe_length: head.stripe_length.get(),
            owner: head.owner.get(),
            stripes: stripes
                .map(|stripe| Place {
                    devid: stripe.devid.get(),
                    physical: stripe.offset.get(),
                    uuid: stripe.uuid,
                })
                .collect(),
        };
        let ends = |start: u64| start.checked_add(chunk.length).is_some_and(|end| end <= i64::MAX as u64);
        if chunk.length == 0
            || !ends(chunk.logical)
            || !chunk.stripes.iter().all(|place| ends(place.physical))
        {
            return Err(format!("{} bytes at {} end nowhere", chunk.length, chunk.logical));
        }
        Ok(chunk)
    }

    /// The first logical address after it.
    pub fn end(&self) -> u64 {
        self.logical + self.length
    }

    /// Whether each of its stripes is a whole copy.
    pub fn is_linear(&self) -> bool {
        let profile = self.flags & PROFILE_MASK;
        profile == 0 || (profile.is_power_of_two() && profile & WHOLE_COPIES != 0)
    }
}

/// All chunks known, sorted and without overlap.
#[derive(Debug, Clone, Default)]
pub struct ChunkMap {
    chunks: Vec<Chunk>,
}

impl ChunkMap {
    /// Reads the chunks that a superblock carries, which are those of the chunk tree itself.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of_superblock(array: &[u8]) -> Result<Self, String> {
        let mut map = ChunkMap::default();
        let mut rest = array;
        while !rest.is_empty() {
            let (key, after) = DiskKey::read_from_prefix(rest).map_err(|_| "half a key".to_owned())?;
            let (head, _) = ChunkItem::read_from_prefix(after).map_err(|_| "half a chunk".to_owned())?;
            let length = size_of::<ChunkItem>() + usize::from(head.stripe_count.get()) * size_of::<Stripe>();
            let body = after.get(..length).ok_or("a chunk reaches beyond the array")?;
            if key.kind != item::CHUNK {
                return Err(format!("an item of type {} among the chunks", key.kind));
            }
            map.insert(Chunk::parse(key.into(), body)?)?;
            rest = &after[length..];
        }
        Ok(map)
    }

    /// Adds a chunk; the one that is there already changes nothing.
    ///
    /// # Errors
    /// It overlaps another.
    pub fn insert(&mut self, chunk: Chunk) -> Result<(), String> {
        let index = self.chunks.partition_point(|other| other.logical < chunk.logical);
        if self.chunks.get(index) == Some(&chunk) {
            return Ok(());
        }
        let before = index.checked_sub(1).and_then(|index| self.chunks.get(index));
        let clash = before
            .filter(|before| before.end() > chunk.logical)
            .or_else(|| self.chunks.get(index).filter(|after| after.logical < chunk.end()));
        if let Some(other) = clash {
            return Err(format!(
                "chunk at {} overlaps or contradicts that at {}",
                chunk.logical, other.logical
            ));
        }
        self.chunks.insert(index, chunk);
        Ok(())
    }

    /// The chunks in order of their addresses.
    pub fn iter(&self) -> std::slice::Iter<'_, Chunk> {
        self.chunks.iter()
    }

    /// The chunk that holds an address.
    pub fn find(&self, logical: u64) -> Option<&Chunk> {
        let index = self.chunks.partition_point(|chunk| chunk.logical <= logical).checked_sub(1)?;
        self.chunks.get(index).filter(|chunk| logical < chunk.end())
    }
}

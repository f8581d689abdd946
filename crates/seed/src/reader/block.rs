//! One tree block: what its bytes say, in bounds whatever they are, and what is wrong with them.

use std::fmt;

use zerocopy::FromBytes;

use crate::disk::{
    HEADER_SIZE, Header, ITEM_SIZE, Item, Key, KeyPointer, LEVEL_MAX, POINTER_SIZE, field_at, flag, pieces,
};

use super::crc::{FlippedBit, flipped_bit};

/// All flags of a block that there are: written, relocated, and the version of its references.
const HEADER_FLAGS: u64 = flag::HEADER_WRITTEN | 1 << 1 | 0xff << 56;

/// A tree block in memory.
#[derive(Debug, Clone)]
pub struct Block {
    bytenr: u64,
    header: Header,
    data: Box<[u8]>,
}

/// What a block should be, as far as whoever points to it says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected {
    /// The tree it belongs to; none if it may be shared between subvolumes.
    pub owner: Option<u64>,
    /// Its level.
    pub level: Option<u8>,
    /// The transaction that wrote it.
    pub generation: Option<u64>,
    /// Its first key.
    pub first: Option<Key>,
    /// A key that is above all of its own.
    pub above: Option<Key>,
}

/// Something wrong with a block: which field, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The field.
    pub field: String,
    /// The key of the item that it is in, if it is in an item.
    pub key: Option<Key>,
    /// What is wrong.
    pub reason: String,
}

impl Fault {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Fault { field: field.into(), key: None, reason: reason.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key {
            Some(key) => write!(f, "{} of item {key}: {}", self.field, self.reason),
            None => write!(f, "{}: {}", self.field, self.reason),
        }
    }
}

/// The UUIDs that all blocks of a file system carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uuids {
    /// The file system.
    pub fsid: [u8; 16],
    /// The chunk tree; not known before it is read.
    pub chunk_tree: Option<[u8; 16]>,
}

impl Block {
    /// Takes the bytes of the block at `bytenr`; a bit that was flipped is flipped back, and noted in `faults`.
    ///
    /// # Panics
    /// When `data` is shorter than a header.
    pub(crate) fn new(bytenr: u64, mut data: Box<[u8]>, faults: &mut Vec<Fault>) -> Self {
        let (stored, unused) = (u32::from_le_bytes([data[0], data[1], data[2], data[3]]), &data[4..32]);
        if unused.iter().any(|&byte| byte != 0) {
            faults.push(Fault::new("header.checksum", "the unused part is not zero"));
        }
        let checked_from = size_of::<[u8; 32]>();
        let computed = crc32c::crc32c(&data[checked_from..]);
        if stored != computed {
            let found = flipped_bit(stored, computed, data.len() - checked_from);
            if let Some(FlippedBit::Data(bit)) = found {
                data[checked_from + bit / 8] ^= 1 << (bit % 8);
            }
            let mut block = Block { bytenr, header: header_of(&data), data };
            let fault = block.checksum_fault(stored, computed, found, checked_from);
            faults.push(fault);
            block.header = header_of(&block.data);
            return block;
        }
        Block { bytenr, header: header_of(&data), data }
    }

    fn checksum_fault(
        &self,
        stored: u32,
        computed: u32,
        found: Option<FlippedBit>,
        checked_from: usize,
    ) -> Fault {
        let wrong = format!("checksum is {computed:#010x} but {stored:#010x} is stored");
        match found {
            Some(FlippedBit::Checksum(bit)) => {
                Fault::new("header.checksum", format!("{wrong}: bit {bit} of the stored one is flipped"))
            }
            Some(FlippedBit::Data(bit)) => {
                let byte = checked_from + bit / 8;
                let (field, key) = self.field_at(byte);
                let reason = format!("{wrong}: bit {} of byte {byte} is flipped", bit % 8);
                Fault { field, key, reason }
            }
            None => Fault::new("block", format!("{wrong}: more than one bit differs")),
        }
    }

    /// Its logical address.
    pub fn bytenr(&self) -> u64 {
        self.bytenr
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its level: 0 is a leaf.
    pub fn level(&self) -> u8 {
        self.header.level
    }

    /// Whether the block is a leaf.
    pub fn is_leaf(&self) -> bool {
        self.header.level == 0
    }

    /// Items or children that fit the block, whatever the header says.
    pub fn count(&self) -> usize {
        let each = if self.is_leaf() { ITEM_SIZE } else { POINTER_SIZE };
        (self.header.count.get() as usize).min((self.data.len() - HEADER_SIZE) / each)
    }

    /// The child at `slot < count()` of a node.
    pub fn pointer(&self, slot: usize) -> Option<KeyPointer> {
        if self.is_leaf() || slot >= self.count() {
            return None;
        }
        KeyPointer::read_from_prefix(&self.data[HEADER_SIZE + slot * POINTER_SIZE..])
            .ok()
            .map(|(pointer, _)| pointer)
    }

    /// The head of the item at `slot < count()` of a leaf.
    pub fn item_head(&self, slot: usize) -> Option<Item> {
        if !self.is_leaf() || slot >= self.count() {
            return None;
        }
        Item::read_from_prefix(&self.data[HEADER_SIZE + slot * ITEM_SIZE..]).ok().map(|(item, _)| item)
    }

    /// Key and body of the item at `slot`; none if it lies outside of the block.
    pub fn item(&self, slot: usize) -> Option<(Key, &[u8])> {
        let head = self.item_head(slot)?;
        let start = HEADER_SIZE.checked_add(head.offset.get() as usize)?;
        let body = self.data.get(start..start.checked_add(head.size.get() as usize)?)?;
        Some((head.key.into(), body))
    }

    /// Keys and bodies of all items that lie in the block.
    pub fn items(&self) -> impl Iterator<Item = (Key, &[u8])> {
        (0..self.count()).filter_map(|slot| self.item(slot))
    }

    /// The key at `slot`.
    pub fn key(&self, slot: usize) -> Option<Key> {
        match self.is_leaf() {
            true => self.item_head(slot).map(|item| item.key.into()),
            false => self.pointer(slot).map(|pointer| pointer.key.into()),
        }
    }

    /// The name of the field that holds a byte of the block, and the key of its item.
    pub fn field_at(&self, byte: usize) -> (String, Option<Key>) {
        if let Some(field) = field_at(Header::FIELDS, byte) {
            return (format!("header.{field}"), None);
        }
        let (each, fields, what) = match self.is_leaf() {
            true => (ITEM_SIZE, Item::FIELDS, "item"),
            false => (POINTER_SIZE, KeyPointer::FIELDS, "child"),
        };
        let (slot, within) = ((byte - HEADER_SIZE) / each, (byte - HEADER_SIZE) % each);
        if slot < self.count() {
            let field = field_at(fields, within).unwrap_or_default();
            return (format!("{what} {slot} {field}"), self.key(slot));
        }
        for slot in 0..self.count() {
            let (Some(head), Some((key, body))) = (self.item_head(slot), self.item(slot)) else { continue };
            let start = HEADER_SIZE + head.offset.get() as usize;
            if !(start..start + body.len()).contains(&byte) {
                continue;
            }
            let offset = byte - start;
            let pieces = pieces(key.kind, body);
            let piece =
                pieces.iter().find(|piece| (piece.start..piece.start + piece.length).contains(&offset));
            let name =
                piece.map_or_else(String::new, |piece| match field_at(piece.fields, offset - piece.start) {
                    Some(field) => format!("{}.{field}", piece.name),
                    None => piece.name.to_owned(),
                });
            return (name, Some(key));
        }
        ("unused space".to_owned(), None)
    }

    /// Everything that can be said against the block by itself and from what points to it.
    pub(crate) fn check(&self, expected: &Expected, uuids: &Uuids, faults: &mut Vec<Fault>) {
        let header = &self.header;
        let mut differs = |field: &str, is: u64, should: u64| {
            if is != should {
                faults.push(Fault::new(format!("header.{field}"), format!("is {is}, should be {should}")));
            }
        };
        differs("bytenr", header.bytenr.get(), self.bytenr);
        if let Some(owner) = expected.owner {
            differs("owner", header.owner.get(), owner);
        }
        if let Some(level) = expected.level {
            differs("level", header.level.into(), level.into());
        }
        if let Some(generation) = expected.generation {
            differs("generation", header.generation.get(), generation);
        }
        differs("flags.written", header.flags.get() & flag::HEADER_WRITTEN, flag::HEADER_WRITTEN);
        differs("flags", header.flags.get() & !HEADER_FLAGS, 0);
        differs("flags.backref_version", header.flags.get() >> 56, 1);
        if header.level >= LEVEL_MAX {
            faults.push(Fault::new("header.level", format!("is {}; at most 7 is possible", header.level)));
        }
        if header.fsid != uuids.fsid {
            faults.push(Fault::new("header.fsid", "is not the file system's UUID"));
        }
        if uuids.chunk_tree.is_some_and(|uuid| uuid != header.chunk_tree_uuid) {
            faults.push(Fault::new("header.chunk_tree_uuid", "is not the chunk tree's UUID"));
        }
        if header.count.get() as usize != self.count() {
            faults.push(Fault::new("header.count", format!("{} items do not fit", header.count)));
        }
        self.check_keys(expected, faults);
        if self.is_leaf() {
            self.check_bodies(faults);
        }
    }

    fn check_keys(&self, expected: &Expected, faults: &mut Vec<Fault>) {
        let mut wrong = |slot: usize, key, reason: String| {
            faults.push(Fault { field: format!("key of slot {slot}"), key: Some(key), reason });
        };
        let mut last: Option<Key> = None;
        for slot in 0..self.count() {
            let Some(key) = self.key(slot) else { continue };
            if let Some(last) = last.filter(|last| *last >= key) {
                wrong(slot, key, format!("is not above {last} before it"));
            }
            last = Some(key);
        }
        if let (Some(first), Some(key)) = (expected.first, self.key(0))
            && key != first
        {
            wrong(0, key, format!("the node above says {first}"));
        }
        if let (Some(above), Some(last)) = (expected.above, last)
            && last >= above
        {
            wrong(self.count() - 1, last, format!("is not below {above}, where the next block begins"));
        }
        if self.count() == 0 && (expected.first.is_some() || !self.is_leaf()) {
            faults.push(Fault::new("header.count", "only a tree's one leaf may be empty"));
        }
    }

    /// Bodies lie without gaps from the end of the block down.
    fn check_bodies(&self, faults: &mut Vec<Fault>) {
        let mut end = self.data.len() - HEADER_SIZE;
        for slot in 0..self.count() {
            let Some(head) = self.item_head(slot) else { continue };
            let (offset, size) = (head.offset.get() as usize, head.size.get() as usize);
            let lowest = (slot + 1) * ITEM_SIZE;
            if offset.checked_add(size) != Some(end) || offset < lowest {
                let key = Some(head.key.into());
                let reason = format!("{size} bytes at {offset}, should end at {end}");
                faults.push(Fault { field: format!("item {slot} offset and size"), key, reason });
                return;
            }
            end = offset;
        }
    }
}

fn header_of(data: &[u8]) -> Header {
    match Header::read_from_prefix(data) {
        Ok((header, _)) => header,
        Err(_) => panic!("a block of {} bytes", data.len()),
    }
}

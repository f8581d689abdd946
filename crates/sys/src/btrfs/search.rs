//! Reading items of a mounted filesystem's trees (BTRFS_IOC_TREE_SEARCH).

use std::os::fd::AsFd;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::MAGIC;
use crate::Result;
use crate::ioctl::{self, READ, Request, WRITE};

/// Bytes of items in one answer.
const BUFFER: usize = 4096 - size_of::<SearchKey>();

/// `struct btrfs_ioctl_search_key`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SearchKey {
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    unused1: [u64; 4],
}

/// `struct btrfs_ioctl_search_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SearchArgs {
    key: SearchKey,
    buffer: [u8; BUFFER],
}

/// `struct btrfs_ioctl_search_header`, before each item.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    transid: u64,
    objectid: u64,
    offset: u64,
    kind: u32,
    length: u32,
}

const _: () = assert!(size_of::<SearchKey>() == 104);
const _: () = assert!(size_of::<SearchArgs>() == 4096);
const _: () = assert!(size_of::<Header>() == 32);

const TREE_SEARCH: Request<SearchArgs> = Request::sized("BTRFS_IOC_TREE_SEARCH", READ | WRITE, MAGIC, 17);

/// A key of a btrfs tree; keys are ordered by their fields in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// What the item belongs to.
    pub objectid: u64,
    /// The type of the item.
    pub kind: u8,
    /// Depends on the type.
    pub offset: u64,
}

impl Key {
    /// The next key in order; `None` after the last.
    pub fn successor(self) -> Option<Key> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Key { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Key { kind, offset: 0, ..self });
        }
        Some(Key { objectid: self.objectid.checked_add(1)?, kind: 0, offset: 0 })
    }
}

/// One item: its key and its bytes as they are on disk (little-endian).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where it is in the tree.
    pub key: Key,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// Items of tree `tree` (0: the subvolume that `file` lies in) from `first` to `last`, in order: at least one if there
/// is one, at most what fits one answer (4 KiB), at most `limit`. To go on, ask again from the last key's successor.
/// An item that is longer than an answer is left out.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `ENOENT` for a tree that does not exist.
pub fn tree_search(file: impl AsFd, tree: u64, first: Key, last: Key, limit: u32) -> Result<Vec<Item>> {
    tree_search_since(file, tree, first, last, 0, limit)
}

/// The same, without the items of leaves that were last written before transaction `generation`: the kernel skips
/// whole subtrees that are older, so what changed in a large tree is found without reading all of it.
///
/// # Errors
/// As [`tree_search`].
pub fn tree_search_since(
    file: impl AsFd,
    tree: u64,
    first: Key,
    last: Key,
    generation: u64,
    limit: u32,
) -> Result<Vec<Item>> {
    let mut arguments = SearchArgs::new_zeroed();
    arguments.key = SearchKey {
        tree_id: tree,
        min_objectid: first.objectid,
        max_objectid: last.objectid,
        min_offset: first.offset,
        max_offset: last.offset,
        min_transid: generation,
        max_transid: u64::MAX,
        min_type: u32::from(first.kind),
        max_type: u32::from(last.kind),
        nr_items: limit,
        unused: 0,
        unused1: [0; 4],
    };
    TREE_SEARCH
        .call(file.as_fd(), &mut arguments, || format!("tree {tree} of {}", ioctl::describe(file.as_fd())))?;
    Ok(parse(&arguments.buffer, arguments.key.nr_items))
}

fn parse(buffer: &[u8], count: u32) -> Vec<Item> {
    let mut items = Vec::new();
    let mut rest = buffer;
    for _ in 0..count {
        let Ok((header, tail)) = Header::read_from_prefix(rest) else { break };
        let (Some((bytes, tail)), Ok(kind)) =
            (tail.split_at_checked(header.length as usize), u8::try_from(header.kind))
        else {
            break;
        };
        let key = Key { objectid: header.objectid, kind, offset: header.offset };
        items.push(Item { key, bytes: bytes.to_vec() });
        rest = tail;
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_cut_where_the_buffer_ends() {
        let header = Header { transid: 1, objectid: 256, offset: 7, kind: 12, length: 3 };
        let mut buffer = header.as_bytes().to_vec();
        buffer.extend(b"abc");
        buffer.extend(Header { length: u32::MAX, ..header }.as_bytes());
        let items = parse(&buffer, u32::MAX);
        let key = Key { objectid: 256, kind: 12, offset: 7 };
        assert_eq!(items, [Item { key, bytes: b"abc".to_vec() }]);
    }

    #[test]
    fn the_successor_of_a_key_carries_over() {
        let last = Key { objectid: 1, kind: 255, offset: u64::MAX };
        assert_eq!(last.successor(), Some(Key { objectid: 2, kind: 0, offset: 0 }));
        assert_eq!(Key { objectid: u64::MAX, ..last }.successor(), None);
    }
}

//! Names: each is stated three times, as `DIR_ITEM`, as `DIR_INDEX` and as reference of the inode.

use std::hash::{DefaultHasher, Hash, Hasher};

use zerocopy::FromBytes;

use crate::disk::{DirItem, InodeExtref, InodeRef, Key};

/// A name in a directory. Of the bytes only a hash is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) directory: u64,
    /// The entry's place in the directory; 0 where it is not stated.
    pub(super) index: u64,
    pub(super) inode: u64,
    pub(super) hash: u64,
    /// The kind of entry; 0 where it is not stated.
    pub(super) kind: u8,
}

pub(super) fn name_hash(name: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// An entry of a `DIR_ITEM`, `DIR_INDEX` or `XATTR`.
pub(super) struct Entry<'a> {
    pub(super) head: DirItem,
    pub(super) name: &'a [u8],
    pub(super) data: &'a [u8],
}

impl Entry<'_> {
    pub(super) fn location(&self) -> Key {
        self.head.location.into()
    }
}

/// Takes entries apart.
pub(super) fn entries(mut body: &[u8]) -> Result<Vec<Entry<'_>>, String> {
    let mut entries = Vec::new();
    while !body.is_empty() {
        let (head, rest) = DirItem::read_from_prefix(body).map_err(|_| "an entry is cut off".to_owned())?;
        let (name, rest) = rest.split_at_checked(head.name_length.get().into()).ok_or("a name is cut off")?;
        let (data, rest) = rest.split_at_checked(head.data_length.get().into()).ok_or("data is cut off")?;
        if name.is_empty() || name.len() > crate::disk::NAME_MAX {
            return Err(format!("a name has {} bytes", name.len()));
        }
        entries.push(Entry { head, name, data });
        body = rest;
    }
    if entries.is_empty() { Err("there is no entry".to_owned()) } else { Ok(entries) }
}

/// Takes an `INODE_REF` apart: index and name.
pub(super) fn inode_refs(mut body: &[u8]) -> Result<Vec<(u64, &[u8])>, String> {
    let mut refs = Vec::new();
    while !body.is_empty() {
        let (head, rest) =
            InodeRef::read_from_prefix(body).map_err(|_| "a reference is cut off".to_owned())?;
        let (name, rest) = rest.split_at_checked(head.name_length.get().into()).ok_or("a name is cut off")?;
        refs.push((head.index.get(), name));
        body = rest;
    }
    if refs.is_empty() { Err("there is no reference".to_owned()) } else { Ok(refs) }
}

/// Directory, index and name.
pub(super) type Extref<'a> = (u64, u64, &'a [u8]);

/// Takes an `INODE_EXTREF` apart.
pub(super) fn inode_extrefs(mut body: &[u8]) -> Result<Vec<Extref<'_>>, String> {
    let mut refs = Vec::new();
    while !body.is_empty() {
        let (head, rest) =
            InodeExtref::read_from_prefix(body).map_err(|_| "a reference is cut off".to_owned())?;
        let (name, rest) = rest.split_at_checked(head.name_length.get().into()).ok_or("a name is cut off")?;
        refs.push((head.parent.get(), head.index.get(), name));
        body = rest;
    }
    if refs.is_empty() { Err("there is no reference".to_owned()) } else { Ok(refs) }
}

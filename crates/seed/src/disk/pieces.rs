//! Takes the bodies of items apart, for dumps and for messages that name a field. Bodies may be any bytes.

use zerocopy::FromBytes;

use super::{
    BlockGroupItem, ChunkItem, DevExtent, DevItem, DirItem, ExtentDataRef, ExtentItem, Field, FileExtentHead,
    FileExtentTail, FreeSpaceInfo, InodeExtref, InodeItem, InodeRef, QgroupInfo, QgroupLimit, QgroupStatus,
    RootItem, RootRef, Stripe, item,
};

/// A part of an item's body.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// What it is: a record's name, "name", "data", "rest".
    pub name: &'static str,
    /// Bytes from the start of the body.
    pub start: usize,
    /// Bytes; within the body.
    pub length: usize,
    /// Its fields, if it is a record.
    pub fields: &'static [Field],
}

/// Goes through a body from the front.
struct Cutter<'a> {
    body: &'a [u8],
    position: usize,
    pieces: Vec<Piece>,
}

impl Cutter<'_> {
    fn left(&self) -> usize {
        self.body.len() - self.position
    }

    fn bytes(&mut self, name: &'static str, length: usize) {
        let length = length.min(self.left());
        if length > 0 {
            self.pieces.push(Piece { name, start: self.position, length, fields: &[] });
            self.position += length;
        }
    }

    /// Cuts off a record; none if less is left.
    fn record<T: FromBytes>(&mut self, name: &'static str, fields: &'static [Field]) -> Option<T> {
        let (record, _) = T::read_from_prefix(&self.body[self.position..]).ok()?;
        let length = size_of::<T>();
        self.pieces.push(Piece { name, start: self.position, length, fields });
        self.position += length;
        Some(record)
    }

    fn dir_items(&mut self) {
        while let Some(head) = self.record::<DirItem>("entry", DirItem::FIELDS) {
            self.bytes("name", head.name_length.get().into());
            self.bytes("data", head.data_length.get().into());
        }
    }

    fn inline_refs(&mut self) {
        const KIND: &[Field] = &[Field { name: "type", offset: 0, size: 1, nested: &[] }];
        const TREE: &[Field] = &[Field { name: "root_or_parent", offset: 0, size: 8, nested: &[] }];
        const SHARED: &[Field] = &[
            Field { name: "parent", offset: 0, size: 8, nested: &[] },
            Field { name: "count", offset: 8, size: 4, nested: &[] },
        ];
        while let Some(kind) = self.record::<u8>("inline_ref", KIND) {
            let known = match kind {
                item::EXTENT_DATA_REF => {
                    self.record::<ExtentDataRef>("data_ref", ExtentDataRef::FIELDS).is_some()
                }
                item::SHARED_DATA_REF => self.record::<[u8; 12]>("shared_data_ref", SHARED).is_some(),
                item::TREE_BLOCK_REF | item::SHARED_BLOCK_REF | item::EXTENT_OWNER_REF => {
                    self.record::<[u8; 8]>("ref", TREE).is_some()
                }
                _ => false,
            };
            if !known {
                break;
            }
        }
    }
}

/// What the body of an item consists of, without gaps; what makes no sense is a piece named "rest".
pub fn pieces(kind: u8, body: &[u8]) -> Vec<Piece> {
    let mut cut = Cutter { body, position: 0, pieces: Vec::new() };
    macro_rules! one {
        ($name:literal, $record:ident) => {{
            cut.record::<$record>($name, $record::FIELDS);
        }};
    }
    match kind {
        item::INODE => one!("inode", InodeItem),
        item::INODE_REF => {
            while let Some(head) = cut.record::<InodeRef>("ref", InodeRef::FIELDS) {
                cut.bytes("name", head.name_length.get().into());
            }
        }
        item::INODE_EXTREF => {
            while let Some(head) = cut.record::<InodeExtref>("extref", InodeExtref::FIELDS) {
                cut.bytes("name", head.name_length.get().into());
            }
        }
        item::XATTR | item::DIR_ITEM | item::DIR_INDEX => cut.dir_items(),
        item::EXTENT_DATA => {
            if let Some(head) = cut.record::<FileExtentHead>("extent", FileExtentHead::FIELDS) {
                if head.kind == 0 {
                    cut.bytes("data", body.len());
                } else {
                    one!("extent", FileExtentTail);
                }
            }
        }
        item::ROOT => one!("root", RootItem),
        item::ROOT_REF | item::ROOT_BACKREF => {
            one!("ref", RootRef);
            cut.bytes("name", body.len());
        }
        item::EXTENT | item::METADATA => {
            one!("extent", ExtentItem);
            cut.inline_refs();
        }
        item::EXTENT_DATA_REF => one!("data_ref", ExtentDataRef),
        item::BLOCK_GROUP => one!("block_group", BlockGroupItem),
        item::FREE_SPACE_INFO => one!("free_space", FreeSpaceInfo),
        item::FREE_SPACE_BITMAP => cut.bytes("bitmap", body.len()),
        item::EXTENT_CSUM => cut.bytes("checksums", body.len()),
        item::DEV_EXTENT => one!("dev_extent", DevExtent),
        item::DEV => one!("device", DevItem),
        item::CHUNK => {
            one!("chunk", ChunkItem);
            while cut.record::<Stripe>("stripe", Stripe::FIELDS).is_some() {}
        }
        item::QGROUP_STATUS => one!("status", QgroupStatus),
        item::QGROUP_INFO => one!("info", QgroupInfo),
        item::QGROUP_LIMIT => one!("limit", QgroupLimit),
        item::UUID_SUBVOL | item::UUID_RECEIVED => cut.bytes("subvolumes", body.len()),
        _ => {}
    }
    cut.bytes("rest", body.len());
    cut.pieces
}

/// The name of the field at `offset` bytes into a record: "mtime.seconds".
pub fn field_at(fields: &[Field], offset: usize) -> Option<String> {
    let field = fields.iter().find(|field| (field.offset..field.offset + field.size).contains(&offset))?;
    Some(match field_at(field.nested, offset - field.offset) {
        Some(inner) => format!("{}.{inner}", field.name),
        None => field.name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Header, SuperBlock};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_tile_any_body(kind in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..700)) {
            let mut end = 0;
            for piece in pieces(kind, &body) {
                prop_assert_eq!(piece.start, end);
                end += piece.length;
            }
            prop_assert_eq!(end, body.len());
        }
    }

    #[test]
    fn every_byte_of_a_record_has_a_name() {
        for (fields, size) in [
            (InodeItem::FIELDS, size_of::<InodeItem>()),
            (RootItem::FIELDS, size_of::<RootItem>()),
            (Header::FIELDS, size_of::<Header>()),
            (SuperBlock::FIELDS, size_of::<SuperBlock>()),
        ] {
            assert!((0..size).all(|offset| field_at(fields, offset).is_some()));
            assert_eq!(field_at(fields, size), None);
        }
        assert_eq!(field_at(RootItem::FIELDS, 160 + 8), Some("root_dirid".to_owned()));
        assert_eq!(field_at(RootItem::FIELDS, 40), Some("inode.nlink".to_owned()));
        assert_eq!(field_at(InodeItem::FIELDS, 112 + 8), Some("atime.nanoseconds".to_owned()));
    }
}

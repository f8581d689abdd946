//! What an inspection shows, one record at a time.

use std::fmt;

use serde::Serialize;

use crate::disk::{Field, Piece};

/// Bytes of names and data that are shown; of longer ones only the number is.
const SHOWN_MAX: usize = 64;

/// A part of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// The first superblock of a device.
    Superblock {
        /// What the device was called by the caller.
        device: &'static str,
        /// Its fields.
        fields: Vec<FieldValue>,
    },
    /// A tree begins.
    Tree {
        /// Its id.
        id: u64,
        /// Its name, if it has one.
        name: Option<&'static str>,
        /// Logical address of its root block.
        root: u64,
        /// Level of that.
        level: u8,
        /// Transaction of that.
        generation: u64,
    },
    /// A tree block begins.
    Block {
        /// The tree that was walked.
        tree: u64,
        /// Logical address.
        bytenr: u64,
        /// Its header.
        fields: Vec<FieldValue>,
    },
    /// A child of a node.
    Child {
        /// The tree that was walked.
        tree: u64,
        /// Its place in the node.
        slot: usize,
        /// Key, address and generation.
        fields: Vec<FieldValue>,
    },
    /// An item of a leaf.
    Item {
        /// The tree that was walked.
        tree: u64,
        /// Its place in the leaf.
        slot: usize,
        /// First field of the key.
        objectid: u64,
        /// Item type by name, or number.
        kind: String,
        /// Last field of the key.
        offset: u64,
        /// What the body consists of.
        pieces: Vec<PieceValue>,
    },
    /// Something wrong with the block shown last.
    Fault {
        /// Logical address of the block.
        block: u64,
        /// What is wrong.
        reason: String,
    },
}

/// A field and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldValue {
    /// The field's name.
    pub name: &'static str,
    /// What it holds.
    pub value: Value,
}

/// A part of an item's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PieceValue {
    /// What it is.
    pub name: &'static str,
    /// What it holds.
    pub value: Value,
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Integer(u64),
    /// A UUID, or text.
    Text(String),
    /// The fields of a record.
    Record(Vec<FieldValue>),
}

/// Decodes the fields of a record; all-zero bytes beyond 16 are left out.
pub(super) fn field_values(fields: &[Field], bytes: &[u8]) -> Vec<FieldValue> {
    fields
        .iter()
        .filter_map(|field| {
            let bytes = bytes.get(field.offset..field.offset + field.size)?;
            let value = match bytes.len() {
                _ if !field.nested.is_empty() => Value::Record(field_values(field.nested, bytes)),
                8 if field.name == "magic" => Value::Text(text(bytes)),
                1 | 2 | 4 | 8 => {
                    Value::Integer(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
                }
                16 => Value::Text(uuid(bytes)),
                _ if bytes.iter().all(|&byte| byte == 0) => return None,
                32 => Value::Text(hexadecimal(&bytes[..4])),
                _ => Value::Text(text(bytes)),
            };
            Some(FieldValue { name: field.name, value })
        })
        .collect()
}

/// Decodes a part of an item's body.
pub(super) fn piece_value(piece: &Piece, body: &[u8]) -> PieceValue {
    let bytes = &body[piece.start..piece.start + piece.length];
    let value = if piece.fields.is_empty() {
        Value::Text(text(bytes))
    } else {
        Value::Record(field_values(piece.fields, bytes))
    };
    PieceValue { name: piece.name, value }
}

fn uuid(bytes: &[u8]) -> String {
    let hex = hexadecimal(bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes as text where they are, else in hexadecimal; padding zeroes are dropped.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let shown = &bytes[..end.min(SHOWN_MAX)];
    let more = if end > SHOWN_MAX { format!("... ({end} bytes)") } else { String::new() };
    match std::str::from_utf8(shown) {
        Ok(text) if text.chars().all(|character| !character.is_control()) => format!("{text}{more}"),
        _ => format!("0x{}{more}", hexadecimal(shown)),
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Integer(number) => write!(f, "{number}"),
            Value::Text(text) => write!(f, "\"{text}\""),
            Value::Record(fields) => {
                f.write_str("{")?;
                write_fields(f, fields)?;
                f.write_str(" }")
            }
        }
    }
}

fn write_fields(f: &mut fmt::Formatter<'_>, fields: &[FieldValue]) -> fmt::Result {
    fields.iter().try_for_each(|field| write!(f, " {} {}", field.name, field.value))
}

impl fmt::Display for Record {
    /// One line, or for a superblock one for each field; without a final newline.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Record::Superblock { device, fields } => {
                write!(f, "superblock of the {device} image")?;
                fields.iter().try_for_each(|field| write!(f, "\n    {} {}", field.name, field.value))
            }
            Record::Tree { id, name, root, level, generation } => {
                let name = name.unwrap_or("subvolume");
                write!(f, "tree {id} ({name}) root {root} level {level} generation {generation}")
            }
            Record::Block { bytenr, fields, .. } => {
                write!(f, "  block {bytenr}")?;
                write_fields(f, fields)
            }
            Record::Child { slot, fields, .. } => {
                write!(f, "    child {slot}")?;
                write_fields(f, fields)
            }
            Record::Item { slot, objectid, kind, offset, pieces, .. } => {
                write!(f, "    item {slot} ({objectid} {kind} {offset})")?;
                pieces.iter().try_for_each(|piece| write!(f, " {} {}", piece.name, piece.value))
            }
            Record::Fault { block, reason } => write!(f, "  FAULT in block {block}: {reason}"),
        }
    }
}

//! btrfs on disk, without root and without a kernel: formats the file systems that loam serves ([`write()`]), reads
//! them back ([`reader`]), proves them right ([`verify()`]) and shows them ([`inspect()`]).
//!
//! What is formatted is an unusual file system: its *virtual region*, up to 7 EiB of data that nobody has yet, lies on
//! a read-only *virtual device* and is allocated whole to one file, `.virtual-data`. Any file may be a clone of any
//! run of it. `docs/formats/seed.md` has the byte maps.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod builder;
pub mod disk;
mod error;
mod hash;
mod identity;
mod image;
mod inspect;
mod label;
mod memory_tree;
mod options;
pub mod quota;
pub mod reader;
mod synthetic;
mod tree;
mod verify;
mod write;

pub use error::{Error, Result};
pub use identity::Identity;
pub use image::{Image, MemoryImage, ReadAt};
pub use inspect::{FieldValue, PieceValue, Record, TreeFilter, Value, inspect};
pub use label::{LABEL_OFFSET, LABEL_SIZE, Label, read_label};
pub use memory_tree::{MemoryTree, OwnedKind};
pub use options::{
    CHUNK_LENGTH, KERNEL_CHUNK_MAX, LOCAL_SIZE_MIN, Layout, SeedOptions, Timestamp, VIRTUAL_BASE,
    VIRTUAL_SIZE_MAX, VIRTUAL_SIZE_MIN,
};
pub use reader::read_virtual_superblock;
pub use synthetic::SyntheticTree;
pub use tree::{Attributes, FileTree, Node, NodeKind, Run, Subvolume, inline_max};
pub use verify::{Counts, Finding, Verification, verify, verify_filesystem};
pub use write::{Report, VIRTUAL_DATA_INODE, VIRTUAL_DATA_NAME, virtual_superblock, write};

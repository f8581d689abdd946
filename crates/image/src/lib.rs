//! Images: sources that have a file tree (a directory, a tar archive), and the *index* that says all of them but their
//! data.
//!
//! [`build()`] reads a source once, forwards, and makes an [`Index`]: the tree with all metadata, where each file's bytes
//! lie, and a digest for every chunk of the content (the byte map is `docs/formats/index.md`). [`trace`] keeps what a run
//! read first as text that outlives one index.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod build;
mod content;
pub mod create;
mod decode;
pub mod entry;
mod error;
mod feed;
pub mod index;
mod layout;
mod loaded;
mod path;
mod source;
mod spec;
mod tar;
pub mod trace;
mod tree;
mod walk;

pub use build::{
    BuildOptions, BuildReport, Built, CHUNK_BYTES_DEFAULT, INLINE_BYTES_DEFAULT, Progress, ProgressFn, build,
};
pub use content::ChunkSink;
pub use decode::Compression;
pub use entry::{Entry, EntryKind, Metadata, Run, Time, Xattr};
pub use error::{Error, Result};
pub use index::{Blob, BlobKind, Entries, Index, Piece};
pub use loaded::LoadedTree;
pub use source::ImageSource;
pub use spec::SourceSpec;

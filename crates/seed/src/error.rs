//! What can go wrong while formatting or reading an image.

use std::io;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image cannot be written or read. What [`crate::verify()`] finds wrong in a readable image is no error but a
/// [`crate::Finding`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option is out of its range.
    #[error("{option} of {value}: {reason}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What it was set to.
        value: u64,
        /// What is allowed, and why.
        reason: String,
    },
    /// A subvolume's name cannot be used.
    #[error("subvolume \"{name}\": {reason}")]
    Subvolume {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A node of a file tree cannot be written.
    #[error("subvolume \"{subvolume}\", node {node} \"{name}\": {reason}")]
    Node {
        /// The subvolume's name.
        subvolume: String,
        /// The node's index.
        node: usize,
        /// The node's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The trees do not fit on the device that is to hold them.
    #[error("metadata needs {needed} bytes but {device} has room for {available}; {hint}")]
    NoRoom {
        /// Which image.
        device: &'static str,
        /// Size of the image that would do, in bytes.
        needed: u64,
        /// Its size as it is, in bytes.
        available: u64,
        /// What to do.
        hint: &'static str,
    },
    /// An image could not be read or written.
    #[error("{operation} of {length} bytes at {offset} of the {device} image: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Which image.
        device: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The cause.
        source: io::Error,
    },
    /// The bytes are not what they should be, and reading cannot go on.
    #[error("{what} at {offset} of the {device} image: {reason}")]
    Format {
        /// What was read.
        what: &'static str,
        /// Which image.
        device: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The writer's plan and what it wrote disagree: a bug in this crate.
    #[error("the formatter contradicts itself: {0}")]
    Inconsistent(String),
}

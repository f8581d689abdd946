//! Device strings of the command line: `file:PATH` (or a plain path), `memory:SIZE`, `null:SIZE`, `pattern:SIZE`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::size::{ByteSize, ParseSizeError};
use crate::{BlockDevice, FileDevice, FileOptions, MemoryDevice, NullDevice, PatternDevice, Result};

/// What a device string names. Prints as a string that parses to the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceSpec {
    /// A regular file or a block device.
    File(PathBuf),
    /// Sparse memory of this size, all zero.
    Memory(ByteSize),
    /// Zeroes of this size; writes are forgotten.
    Null(ByteSize),
    /// A pattern of this size: each aligned 8 bytes hold their own offset.
    Pattern(ByteSize),
}

/// Why a text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDeviceError {
    /// Empty text or empty path.
    #[error("`{0}` names no device: write a path, file:PATH, memory:SIZE, null:SIZE or pattern:SIZE")]
    Empty(String),
    /// A word before the colon that is not known.
    #[error(
        "`{kind}:` is not a kind of device that loam knows (file, memory, null, pattern); \
         for a file of this name write file:{text}"
    )]
    UnknownKind {
        /// The word.
        kind: String,
        /// The whole text.
        text: String,
    },
    /// The size after the colon is none.
    #[error("the size of `{text}`")]
    Size {
        /// The whole text.
        text: String,
        /// What is wrong with it.
        source: ParseSizeError,
    },
}

impl DeviceSpec {
    /// Opens the device. `options` matter to files only; a memory device begins empty each time.
    ///
    /// # Errors
    /// Those of [`FileDevice::open`].
    pub fn open(&self, options: FileOptions) -> Result<Arc<dyn BlockDevice>> {
        Ok(match self {
            DeviceSpec::File(path) => Arc::new(FileDevice::open(path, options)?),
            DeviceSpec::Memory(size) => Arc::new(MemoryDevice::new(size.0)),
            DeviceSpec::Null(size) => Arc::new(NullDevice::new(size.0)),
            DeviceSpec::Pattern(size) => Arc::new(PatternDevice::new(size.0)),
        })
    }
}

impl FromStr for DeviceSpec {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        let (kind, rest) = match text.split_once(':') {
            Some((kind, rest)) if is_kind(kind) => (kind, rest),
            _ => ("file", text),
        };
        let size = || rest.parse().map_err(|source| ParseDeviceError::Size { text: text.to_owned(), source });
        match kind {
            "file" if rest.is_empty() => Err(ParseDeviceError::Empty(text.to_owned())),
            "file" => Ok(DeviceSpec::File(PathBuf::from(rest))),
            "memory" => size().map(DeviceSpec::Memory),
            "null" => size().map(DeviceSpec::Null),
            "pattern" => size().map(DeviceSpec::Pattern),
            _ => Err(ParseDeviceError::UnknownKind { kind: kind.to_owned(), text: text.to_owned() }),
        }
    }
}

/// A scheme as in RFC 3986; anything else before a colon (a slash, a dot at the start) is part of a path.
fn is_kind(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::File(path) => write!(f, "file:{}", path.display()),
            DeviceSpec::Memory(size) => write!(f, "memory:{size}"),
            DeviceSpec::Null(size) => write!(f, "null:{size}"),
            DeviceSpec::Pattern(size) => write!(f, "pattern:{size}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_devices() {
        let file = |path: &str| DeviceSpec::File(path.into());
        let cases = [
            ("/a/b", file("/a/b")),
            ("./x:y", file("./x:y")),
            ("disk.img", file("disk.img")),
            ("file:disk.img", file("disk.img")),
            ("file:memory:4K", file("memory:4K")),
            ("memory:4K", DeviceSpec::Memory(ByteSize(4096))),
            ("null:4EiB", DeviceSpec::Null(ByteSize(4 << 60))),
            ("pattern:0", DeviceSpec::Pattern(ByteSize(0))),
        ];
        for (text, spec) in cases {
            assert_eq!(text.parse(), Ok(spec.clone()), "{text}");
            assert_eq!(spec.to_string().parse(), Ok(spec), "{text}");
        }
    }

    #[test]
    fn refusals_say_what_to_write() {
        let message = |text: &str| text.parse::<DeviceSpec>().expect_err(text).to_string();
        assert!(message("").contains("names no device"));
        assert!(message("file:").contains("names no device"));
        assert!(message("ramdisk:4K").contains("file:ramdisk:4K"));
        assert!(message("memory:").contains("size of `memory:`"));
    }

    #[test]
    fn opens_what_it_names() {
        let device = DeviceSpec::Pattern(ByteSize(64)).open(FileOptions::default()).expect("pattern");
        assert_eq!(device.geometry().size, 64);
        assert!(DeviceSpec::File("/nonexistent".into()).open(FileOptions::default()).is_err());
    }
}

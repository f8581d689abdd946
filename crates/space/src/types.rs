//! Addresses, contents and ranges, as types that do not mix.

use std::fmt;

/// Everything in the address space is a multiple of this: the page of the kernel and the sector of btrfs.
pub const BLOCK: u64 = 4096;

/// A byte of the address space, counted from its start (not from the start of the virtual device).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address(pub u64);

/// Names a content of one map. Given out in order from 0, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(pub u32);

/// A run of addresses that was given to a content: never changed, never taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    /// First address, a multiple of [`BLOCK`].
    pub start: Address,
    /// Bytes, a multiple of [`BLOCK`], never 0.
    pub length: u64,
    /// Whose bytes they are.
    pub content: ContentId,
    /// Byte of the content that lies at `start`.
    pub content_offset: u64,
}

impl Range {
    /// The first address behind the range.
    pub fn end(&self) -> Address {
        Address(self.start.0 + self.length)
    }

    /// Whether `address` lies in the range.
    pub fn contains(&self, address: Address) -> bool {
        self.start <= address && address < self.end()
    }

    /// What makes a range impossible in a space of `size` bytes with `contents` contents, if anything does. Ranges
    /// from disk and from callers pass through here before anything is computed with them.
    pub(crate) fn defect(&self, size: u64, contents: u64) -> Option<&'static str> {
        if self.length == 0 {
            return Some("it is empty");
        }
        if !(self.start.0 | self.length | self.content_offset).is_multiple_of(BLOCK) {
            return Some("it is not aligned to 4096 bytes");
        }
        if self.start.0.checked_add(self.length).is_none_or(|end| end > size) {
            return Some("it reaches beyond the end of the address space");
        }
        if self.content_offset.checked_add(self.length).is_none() {
            return Some("it reaches beyond the largest possible content");
        }
        if u64::from(self.content.0) >= contents {
            return Some("its content is not known");
        }
        None
    }
}

/// What lies at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This range.
    Mapped(Range),
    /// Nothing, up to this address: the start of the next range, or the end of the address space.
    Unmapped {
        /// First address that is mapped again.
        until: Address,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

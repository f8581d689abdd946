//! A reader of tar archives as a stream: v7, ustar, GNU and PAX, with sparse files, extended attributes and ACLs.
//!
//! A layer of its own because an index needs what libraries hide: where in the archive a member's bytes lie, header by
//! header, without seeking. Everything that it reads is bounded by the constants here; what breaks a rule is an error
//! that names the entry. Deviations between tar programs are settled as GNU tar does.

mod acl;
mod header;
mod input;
mod pax;
mod reader;
mod sparse;
mod text;

pub(crate) use input::{Input, from_io};
pub(crate) use reader::{Member, MemberKind, TarReader};
pub(crate) use sparse::Segment;

/// Headers, and the beginnings of data, are multiples of this, bytes.
pub(crate) const BLOCK_BYTES: u64 = 512;
/// Most bytes of extended headers (PAX records, long names) in front of one entry, and of global PAX headers.
pub(crate) const EXTENDED_BYTES_MAX: u64 = 4 << 20;
/// Most data segments of one sparse file.
pub(crate) const SEGMENTS_MAX: usize = 1 << 20;

//! The 512-byte header block. Field layout: POSIX.1-1988 ustar, and GNU's `tar.h` where its magic says so.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::text::number;

/// A header block as it stands in the archive.
#[derive(Debug, Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    name: [u8; 100],
    mode: [u8; 8],
    uid: [u8; 8],
    gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    checksum: [u8; 8],
    pub(crate) kind: u8,
    link: [u8; 100],
    magic: [u8; 8],
    _user_name: [u8; 32],
    _group_name: [u8; 32],
    major: [u8; 8],
    minor: [u8; 8],
    prefix: [u8; 155],
    _rest: [u8; 12],
}

const _: () = assert!(size_of::<Header>() == 512);

/// Where GNU tar puts the first sparse segments, in a header of kind `S`.
pub(crate) const GNU_SPARSE: std::ops::Range<usize> = 386..482;
/// Whether blocks with more segments follow.
pub(crate) const GNU_SPARSE_EXTENDED: usize = 482;
/// The size of the file with its holes.
pub(crate) const GNU_REAL_SIZE: std::ops::Range<usize> = 483..495;

const MAGIC_USTAR: &[u8] = b"ustar\0";

impl Header {
    /// The header in `block` if its checksum is right.
    pub(crate) fn parse(block: &[u8; 512]) -> Result<Header, String> {
        let header = Header::read_from_bytes(block).map_err(|_| "not a header".to_owned())?;
        let stored = number(&header.checksum)?;
        let field = std::mem::offset_of!(Header, checksum)..std::mem::offset_of!(Header, kind);
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (i, &byte) in block.iter().enumerate() {
            let byte = if field.contains(&i) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte as i8);
        }
        // Historical programs summed signed characters.
        if stored == unsigned || stored == signed {
            return Ok(header);
        }
        Err("header checksum mismatch: not a tar archive, or a damaged one".to_owned())
    }

    /// The name, with the ustar prefix where there is one.
    pub(crate) fn path(&self) -> Vec<u8> {
        let name = c_string(&self.name);
        if !self.magic.starts_with(MAGIC_USTAR) {
            return name.to_vec();
        }
        // star's variant of ustar keeps times in the last 24 bytes of the prefix.
        let is_star = self._rest[8..] == *b"tar\0";
        let prefix = c_string(if is_star { &self.prefix[..131] } else { &self.prefix });
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(crate) fn link(&self) -> &[u8] {
        c_string(&self.link)
    }

    pub(crate) fn size(&self) -> Result<u64, String> {
        unsigned(&self.size, "size")
    }

    pub(crate) fn mode(&self) -> Result<u16, String> {
        Ok((number(&self.mode)? & 0o7777) as u16)
    }

    pub(crate) fn uid(&self) -> Result<u64, String> {
        unsigned(&self.uid, "uid")
    }

    pub(crate) fn gid(&self) -> Result<u64, String> {
        unsigned(&self.gid, "gid")
    }

    pub(crate) fn mtime(&self) -> Result<i64, String> {
        number(&self.mtime)
    }

    /// Major and minor of a device.
    pub(crate) fn device(&self) -> Result<(u32, u32), String> {
        let part = |field: &[u8]| {
            let value = number(field)?;
            u32::try_from(value).map_err(|_| format!("device number {value} is out of range"))
        };
        Ok((part(&self.major)?, part(&self.minor)?))
    }
}

/// A field up to its first NUL.
pub(crate) fn c_string(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

fn unsigned(field: &[u8], what: &str) -> Result<u64, String> {
    let value = number(field)?;
    u64::try_from(value).map_err(|_| format!("{what} {value} is negative"))
}

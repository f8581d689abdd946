//! POSIX ACLs: from the text in PAX headers to the kernel's xattr form.
//!
//! The binary form is `include/uapi/linux/posix_acl_xattr.h`: version 2, then entries of tag, permissions and id, all
//! little-endian. Names of users and groups that come without a number are looked up in the running host's
//! `/etc/passwd` and `/etc/group`, as every unpacker does.

use std::path::Path;

/// Version of the xattr form.
const VERSION: u32 = 2;
/// The id of entries that have none.
const NO_ID: u32 = u32::MAX;
/// Longest account database that is searched, bytes.
const DATABASE_BYTES_MAX: u64 = 16 << 20;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Converts an ACL's text. `None` when it says no more than permission bits do: the kernel stores nothing then, and an
/// empty one.
pub(crate) fn to_xattr(text: &[u8], is_default: bool) -> Result<Option<Vec<u8>>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "ACL is not text".to_owned())?;
    let mut entries = Vec::new();
    for part in text.split([',', '\n']) {
        let part = part.split('#').next().unwrap_or_default().trim();
        if !part.is_empty() {
            entries.push(entry(part).ok_or_else(|| format!("ACL entry {part:?}: not understood"))??);
        }
    }
    entries.sort_by_key(|&(tag, id, _)| (tag, id));
    let is_minimal = entries.iter().all(|&(tag, ..)| matches!(tag, USER_OBJ | GROUP_OBJ | OTHER));
    if entries.is_empty() || (is_minimal && !is_default) {
        return Ok(None);
    }
    let mut out = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&permissions.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    Ok(Some(out))
}

/// One entry: `tag:qualifier:permissions[:id]`. `None` when it is not of this form.
fn entry(text: &str) -> Option<Result<(u16, u32, u16), String>> {
    let mut fields = text.split(':');
    let (kind, qualifier) = (fields.next()?.trim(), fields.next()?.trim());
    let mut rest = fields.next();
    // Solaris and some star versions write "other:r-x" and "mask:rwx".
    let short = rest.is_none() && matches!(kind, "other" | "o" | "mask" | "m");
    let qualifier = if short { "" } else { qualifier };
    if short {
        rest = text.split(':').nth(1);
    }
    let permissions = permissions(rest?.trim())?;
    let number = fields.next().map(|id| id.trim().parse::<u32>());
    let named = |tag, database| {
        let id = match number {
            Some(id) => id.map_err(|_| format!("ACL entry {text:?}: the id is not a number")),
            None => look_up(qualifier, Path::new(database)),
        };
        id.map(|id| (tag, id, permissions))
    };
    Some(match (kind, qualifier.is_empty()) {
        ("user" | "u", true) => Ok((USER_OBJ, NO_ID, permissions)),
        ("user" | "u", false) => named(USER, "/etc/passwd"),
        ("group" | "g", true) => Ok((GROUP_OBJ, NO_ID, permissions)),
        ("group" | "g", false) => named(GROUP, "/etc/group"),
        ("mask" | "m", true) => Ok((MASK, NO_ID, permissions)),
        ("other" | "o", true) => Ok((OTHER, NO_ID, permissions)),
        _ => return None,
    })
}

fn permissions(text: &str) -> Option<u16> {
    text.bytes().try_fold(0, |bits, byte| match byte {
        b'r' => Some(bits | 4),
        b'w' => Some(bits | 2),
        b'x' => Some(bits | 1),
        b'-' => Some(bits),
        _ => None,
    })
}

fn look_up(name: &str, database: &Path) -> Result<u32, String> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let unknown = || {
        format!("ACL names {name:?}, which {} does not know; pack with --numeric-owner", database.display())
    };
    let length = std::fs::metadata(database).map_err(|_| unknown())?.len();
    if length > DATABASE_BYTES_MAX {
        return Err(unknown());
    }
    let text = std::fs::read(database).map_err(|_| unknown())?;
    for line in text.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b':');
        if fields.next() == Some(name.as_bytes()) {
            let id = fields.nth(1).and_then(|id| std::str::from_utf8(id).ok()).and_then(|id| id.parse().ok());
            return id.ok_or_else(unknown);
        }
    }
    Err(unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_list() {
        let xattr =
            to_xattr(b"user::rwx,user:1000:r-x,group::r-x,mask::r-x,other::---", false).unwrap().unwrap();
        assert_eq!(xattr.len(), 4 + 5 * 8);
        assert_eq!(xattr[..12], [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255]);
        assert_eq!(xattr[12..20], [2, 0, 5, 0, 232, 3, 0, 0]);
        let star = to_xattr(b"user::rwx,user:lisa:r-x:1000,group::r-x,mask::r-x,other::---", false).unwrap();
        assert_eq!(star.unwrap(), xattr);
        let lines =
            to_xattr(b"other::---\nuser::rwx\nuser:1000:r-x\t#effective\ngroup::r-x\nmask:r-x\n", false);
        assert_eq!(lines.unwrap().unwrap(), xattr);
    }

    #[test]
    fn permission_bits_are_no_list() {
        assert_eq!(to_xattr(b"user::rw-,group::r--,other::r--", false), Ok(None));
        assert_eq!(to_xattr(b"", true), Ok(None));
        assert!(to_xattr(b"user::rw-,group::r--,other::r--", true).unwrap().is_some());
        assert_eq!(
            to_xattr(b"user::rw-,user:root:r--,group::r--,mask::r--,other::r--", false).unwrap().unwrap()[16],
            0
        );
    }

    #[test]
    fn nonsense_is_an_error() {
        for bad in
            ["user", "user::rwz", "who::rwx", "user:no-such-user-here:rwx", "user:x:rwx:y", "other:x:rwx"]
        {
            to_xattr(bad.as_bytes(), false).unwrap_err();
        }
        to_xattr(b"\xff::rwx", false).unwrap_err();
    }
}

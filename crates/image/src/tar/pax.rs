//! PAX extended headers: records of `LENGTH KEYWORD=VALUE\n`, as POSIX.1-2001, GNU tar, star and libarchive use them.

use bytes::Bytes;

use super::acl;
use super::sparse::{self, Segment};
use super::text::{base64, decimal, percent_decode, time};
use crate::entry::{NAME_BYTES_MAX, Time, XATTR_VALUE_BYTES_MAX, XATTRS_MAX, Xattr};

/// Longest path in a record, bytes. Somewhat more than Linux takes, for what is cut off before use (`./`).
const NAME_RECORD_BYTES_MAX: usize = 16 << 10;

/// What extended headers say of an entry; a field that is there overrides the plain header's.
#[derive(Debug, Clone, Default)]
pub(crate) struct Extended {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Time>,
    pub(crate) atime: Option<Time>,
    pub(crate) ctime: Option<Time>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: Sparse,
}

/// The `GNU.sparse.*` records.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sparse {
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) major: Option<u64>,
    pub(crate) size: Option<u64>,
    pub(crate) segments: Option<Vec<Segment>>,
    /// Format 0.0 gives offset and length in records of their own.
    offset: Option<u64>,
}

impl Extended {
    /// Takes all records of one extended header.
    pub(crate) fn parse(&mut self, mut records: &[u8]) -> Result<(), String> {
        let bad = || "damaged PAX header".to_owned();
        // Some programs pad with NULs.
        while records.first().is_some_and(|&b| b != 0) {
            let space = records.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
            let length = decimal(&records[..space]).map_err(|_| bad())?;
            let length = usize::try_from(length).ok().filter(|&n| n <= records.len()).ok_or_else(bad)?;
            let record = records.get(space + 1..length).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            let (keyword, value) = (&record[..equals], &record[equals + 1..]);
            self.record(keyword, value)
                .map_err(|reason| format!("PAX record {:?}: {reason}", String::from_utf8_lossy(keyword)))?;
            records = &records[length..];
        }
        Ok(())
    }

    fn record(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), String> {
        // An empty value takes back what a header before said.
        let text = (!value.is_empty()).then_some(value);
        let number = || text.map(decimal).transpose();
        if matches!(keyword, b"path" | b"linkpath" | b"GNU.sparse.name")
            && value.len() > NAME_RECORD_BYTES_MAX
        {
            return Err(format!("more than {NAME_RECORD_BYTES_MAX} bytes"));
        }
        match keyword {
            b"path" => self.path = text.map(<[u8]>::to_vec),
            b"linkpath" => self.link = text.map(<[u8]>::to_vec),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = text.map(time).transpose()?,
            b"atime" => self.atime = text.map(time).transpose()?,
            b"ctime" => self.ctime = text.map(time).transpose()?,
            b"SCHILY.acl.access" => self.acl(b"system.posix_acl_access", value, false)?,
            b"SCHILY.acl.default" => self.acl(b"system.posix_acl_default", value, true)?,
            b"RHT.security.selinux" => {
                let context = [value.strip_suffix(b"\0").unwrap_or(value), b"\0"].concat();
                self.set_xattr(b"security.selinux", context)?;
            }
            _ => {
                if let Some(name) = keyword.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(&percent_decode(name, Some(b"=%")), value.to_vec())?;
                } else if let Some(name) = keyword.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let value = base64(value).ok_or("not base64")?;
                    self.set_xattr(&percent_decode(name, None), value)?;
                } else if let Some(key) = keyword.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                }
            }
        }
        Ok(())
    }

    fn acl(&mut self, name: &[u8], text: &[u8], is_default: bool) -> Result<(), String> {
        match acl::to_xattr(text, is_default)? {
            Some(value) => self.set_xattr(name, value),
            None => Ok(()),
        }
    }

    fn set_xattr(&mut self, name: &[u8], value: Vec<u8>) -> Result<(), String> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(&0) {
            return Err(format!("an attribute name has 1 to {NAME_BYTES_MAX} bytes and no NUL"));
        }
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(format!("the value has more than {XATTR_VALUE_BYTES_MAX} bytes"));
        }
        let value = Bytes::from(value);
        if let Some(xattr) = self.xattrs.iter_mut().find(|xattr| xattr.name == name) {
            xattr.value = value;
            return Ok(());
        }
        if self.xattrs.len() == XATTRS_MAX {
            return Err(format!("more than {XATTRS_MAX} attributes"));
        }
        self.xattrs.push(Xattr { name: Bytes::copy_from_slice(name), value });
        Ok(())
    }
}

impl Sparse {
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(decimal(value)?),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"map" => self.segments = Some(sparse::parse_list(value)?),
            b"numblocks" => self.segments = Some(Vec::new()),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or("a length without an offset")?;
                let segment = Segment { offset, length: decimal(value)? };
                sparse::push(self.segments.get_or_insert_default(), segment)?;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(keyword: &str, value: &str) -> Vec<u8> {
        let rest = format!(" {keyword}={value}\n");
        let mut length = rest.len();
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        format!("{length}{rest}").into_bytes()
    }

    #[test]
    fn later_records_win_and_empty_ones_take_back() {
        let mut extended = Extended::default();
        let records =
            [record("path", "a"), record("path", "b\nc=d"), record("size", "5"), record("size", "")].concat();
        extended.parse(&records).unwrap();
        assert_eq!(extended.path.unwrap(), b"b\nc=d");
        assert_eq!(extended.size, None);
    }

    #[test]
    fn damaged_headers_are_errors() {
        for bad in ["5", "x path=a\n", "99 path=a\n", "9 path=a.", "3 \n", "7 path\n", "0 a=b\n", "1 a=b\n"] {
            Extended::default().parse(bad.as_bytes()).unwrap_err();
        }
        let sparse = record("GNU.sparse.numbytes", "3");
        Extended::default().parse(&sparse).unwrap_err();
    }
}

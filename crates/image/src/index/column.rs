//! Varints and columns: the small change of the index format, written and read without trust.

use crate::{Error, Result};

/// Appends an unsigned LEB128 number.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed number so that small magnitudes are short.
pub(crate) fn put_zigzag(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Joins columns into the bytes of a block.
pub(crate) fn join<'a>(columns: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    for column in columns {
        put_varint(&mut out, column.len() as u64);
        out.extend_from_slice(column);
    }
    out
}

/// Reads one column from its front. Every method fails at the column's end instead of reading on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    section: &'static str,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(section: &'static str, bytes: &'a [u8]) -> Self {
        Cursor { bytes, section }
    }

    /// What is left.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    fn short(&self) -> Error {
        Error::index(self.section, "a column is too short")
    }

    pub(crate) fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.bytes.split_first().ok_or_else(|| self.short())?;
        self.bytes = rest;
        Ok(*first)
    }

    pub(crate) fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for (i, &byte) in self.bytes.iter().enumerate().take(10) {
            let bits = u64::from(byte & 0x7f);
            if i == 9 && bits > 1 {
                break;
            }
            value |= bits << (7 * i);
            if byte & 0x80 == 0 {
                self.bytes = &self.bytes[i + 1..];
                return Ok(value);
            }
        }
        Err(Error::index(self.section, "a number has no end"))
    }

    pub(crate) fn zigzag(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A varint of at most `limit`; `what` names it in the error.
    pub(crate) fn at_most(&mut self, limit: u64, what: &str) -> Result<u64> {
        let value = self.varint()?;
        if value > limit {
            return Err(Error::index(self.section, format!("{what} of {value}, at most {limit} is allowed")));
        }
        Ok(value)
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        if length > self.bytes.len() {
            return Err(self.short());
        }
        let (taken, rest) = self.bytes.split_at(length);
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or_else(|| self.short())?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// Splits a column off the front of a block.
    pub(crate) fn column(&mut self) -> Result<Cursor<'a>> {
        let length = self.varint()?;
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        Ok(Cursor::new(self.section, bytes))
    }

    /// The column must be used up.
    pub(crate) fn finish(&self) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(Error::index(self.section, format!("{} bytes too many in a column", self.bytes.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for value in [0i64, 1, -1, 63, -64, 64, 300, i64::MAX, i64::MIN] {
            let mut out = Vec::new();
            put_zigzag(&mut out, value);
            put_varint(&mut out, value as u64);
            let mut cursor = Cursor::new("test", &out);
            assert_eq!(cursor.zigzag().unwrap(), value);
            assert_eq!(cursor.varint().unwrap(), value as u64);
            cursor.finish().unwrap();
        }
    }

    #[test]
    fn endless_and_overlong_numbers_are_errors() {
        for bytes in [&[0x80u8; 11][..], &[0xff; 10], &[0x80], &[]] {
            Cursor::new("test", bytes).varint().unwrap_err();
        }
    }
}

//! Paths of an image's entries: put together while the entries stream by, and as text that any editor keeps.

use std::fmt::Write;

use crate::entry::Entry;

/// Knows the path of each entry of an index when it is shown all of them in order.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    path: Vec<u8>,
    /// Numbers of the entries that lead to the last one, and the lengths of their paths.
    above: Vec<(u32, usize)>,
}

impl Paths {
    /// The path of `entry` relative to the root, bytes as they are; empty for the root.
    pub(crate) fn enter(&mut self, entry: &Entry) -> &[u8] {
        while self.above.last().is_some_and(|&(number, _)| number != entry.parent) {
            self.above.pop();
        }
        self.path.truncate(self.above.last().map_or(0, |&(_, length)| length));
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&entry.name);
        self.above.push((entry.number, self.path.len()));
        &self.path
    }
}

/// A path as printable ASCII on one line: `\` and every byte outside it become `\xHH`, and so does a space at either
/// end, which an editor might drop.
pub(crate) fn escape(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for (i, &byte) in path.iter().enumerate() {
        let at_end = i == 0 || i == path.len() - 1;
        match byte {
            b'\\' => out.push_str("\\x5c"),
            b' ' if at_end => out.push_str("\\x20"),
            b' '..=b'~' => out.push(byte.into()),
            _ => {
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    out
}

/// The bytes of an escaped path. Characters outside ASCII stand for their UTF-8 bytes, because people type them so.
pub(crate) fn unescape(text: &str) -> Result<Vec<u8>, &'static str> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte != b'\\' {
            if byte.is_ascii_control() {
                return Err("a control character in the path, which has to be written as \\xHH");
            }
            out.push(byte);
            continue;
        }
        let code = match rest {
            [b'x', high, low, behind @ ..] => {
                rest = behind;
                hex(*high).zip(hex(*low))
            }
            _ => None,
        };
        let (high, low) = code.ok_or("a \\ in the path without xHH, two hexadecimal digits, behind it")?;
        out.push(high << 4 | low);
    }
    Ok(out)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_as_printable_text() {
        let all: Vec<u8> = (0..=255).collect();
        for path in [&all[..], b"", b" ", b"  ", b" a b ", b"\\x41", b"usr/bin/a file"] {
            let text = escape(path);
            assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text}");
            assert_eq!(text.trim(), text);
            assert_eq!(unescape(&text).unwrap(), path);
        }
        assert_eq!(escape(b"usr/bin/a file"), "usr/bin/a file");
        assert_eq!(escape("\\ü\n".as_bytes()), "\\x5c\\xc3\\xbc\\x0a");
    }

    #[test]
    fn typed_paths_are_read_and_mistakes_refused() {
        assert_eq!(unescape("für").unwrap(), "für".as_bytes());
        assert_eq!(unescape("\\xC3\\xbc").unwrap(), "ü".as_bytes());
        for bad in ["\\", "a\\n", "\\x", "\\x4", "\\xg0", "\\x\u{fc}0", "a\tb", "a\rb"] {
            unescape(bad).unwrap_err();
        }
    }
}

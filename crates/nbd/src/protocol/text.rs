//! Strings of the protocol: names must be UTF-8 without NUL and at most 4,096 bytes; messages for humans are made
//! harmless instead of refused.

use super::STRING_BYTES_MAX;

/// A name, or why it is none.
pub(super) fn name(bytes: &[u8]) -> Result<String, &'static str> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err("it is longer than 4096 bytes");
    }
    if bytes.contains(&0) {
        return Err("it contains a NUL");
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err("it is not UTF-8"),
    }
}

/// A message that can be shown on a terminal: not longer than a string may be, control characters (but the end of a
/// line) replaced.
pub(super) fn message(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(STRING_BYTES_MAX)];
    let shown = |c: char| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c };
    let mut text: String = String::from_utf8_lossy(bytes).chars().map(shown).collect();
    text.truncate(text.trim_end().len());
    truncate(&text).to_owned()
}

/// As much of `text` as a string of the protocol may hold, in whole characters and without NUL.
pub(super) fn truncate(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    &text[..text.floor_char_boundary(STRING_BYTES_MAX)]
}

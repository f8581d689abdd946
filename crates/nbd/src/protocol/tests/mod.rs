//! Tests of all messages: their bytes as the specification draws them, and what becomes of bytes that are none.

mod golden;
mod judged;
mod mutated;

/// Bytes from hexadecimal digits; spaces are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// The same as an array.
fn array<const N: usize>(text: &str) -> [u8; N] {
    hex(text).try_into().unwrap()
}

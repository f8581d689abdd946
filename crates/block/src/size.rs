//! Sizes as people write them: `4096`, `64K`, `64KiB`, `4EiB`. One parser for every argument and device string, so
//! that a size means the same everywhere. Units are binary; the decimal `KB` is refused, because half of its readers
//! mean 1000 and the other half 1024.

use std::fmt;
use std::str::FromStr;

const UNITS: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// A number of bytes. Parses from and prints as text in binary units; what it prints parses to the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// No digits, a sign, a fraction, or an unknown unit.
    #[error(
        "`{0}` is not a size: write bytes, or a number with one of K, M, G, T, P, E (64K and 64KiB are the same)"
    )]
    Malformed(String),
    /// A decimal unit.
    #[error("`{0}` has a decimal unit: loam counts in powers of 1024, write for example KiB instead of KB")]
    Decimal(String),
    /// More bytes than 64 bits hold.
    #[error("`{0}` is too large: a size is less than 16EiB")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let malformed = || ParseSizeError::Malformed(text.to_owned());
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(digits_end);
        if digits.is_empty() {
            return Err(malformed());
        }
        let shift = shift_of_unit(unit).map_err(|decimal| match decimal {
            true => ParseSizeError::Decimal(text.to_owned()),
            false => malformed(),
        })?;
        let too_large = || ParseSizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(too_large)
    }
}

/// The power of two of a unit; the error says whether it was a decimal one.
fn shift_of_unit(unit: &str) -> Result<u32, bool> {
    let unit = unit.to_ascii_uppercase();
    if unit.is_empty() || unit == "B" {
        return Ok(0);
    }
    let mut letters = unit.chars();
    let first = letters.next();
    let shift = UNITS.iter().find(|(letter, _)| Some(*letter) == first).map(|(_, shift)| *shift);
    match (shift, letters.as_str()) {
        (Some(shift), "" | "I" | "IB") => Ok(shift),
        (Some(_), "B") => Err(true),
        _ => Err(false),
    }
}

impl fmt::Display for ByteSize {
    /// The exact number in the largest unit that divides it: `64KiB`, but `65537`. With `{:#}` rounded for people:
    /// `64.0 KiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        if f.alternate() {
            return match UNITS.iter().rev().find(|(_, shift)| bytes >> shift != 0) {
                Some((letter, shift)) => {
                    write!(f, "{:.1} {letter}iB", bytes as f64 / (1u64 << shift) as f64)
                }
                None => write!(f, "{bytes} B"),
            };
        }
        let divides = |shift: u32| bytes != 0 && bytes.trailing_zeros() >= shift;
        match UNITS.iter().rev().find(|(_, shift)| divides(*shift)) {
            Some((letter, shift)) => write!(f, "{}{letter}iB", bytes >> shift),
            None => write!(f, "{bytes}"),
        }
    }
}

impl From<ByteSize> for u64 {
    fn from(size: ByteSize) -> u64 {
        size.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_spellings() {
        let cases: [(&str, u64); 13] = [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64K", 65536),
            ("64k", 65536),
            ("64Ki", 65536),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("4GiB", 4 << 30),
            ("4G", 4 << 30),
            ("4EiB", 4 << 60),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn refused_spellings() {
        for text in ["", "K", "-1", "+1", "1.5G", "4 K", "4KiBB", "4X", "0x10", "٣", "4é"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(ParseSizeError::Malformed(_))), "{text}");
        }
        for text in ["16EiB", "18446744073709551616", "99999999999999999999999K"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(ParseSizeError::TooLarge(_))), "{text}");
        }
        assert!(matches!("4kB".parse::<ByteSize>(), Err(ParseSizeError::Decimal(_))));
    }

    #[test]
    fn printing_is_exact() {
        for bytes in [0, 1, 1023, 1024, 1025, 65536, 3 << 29, 4 << 60, u64::MAX] {
            let printed = ByteSize(bytes).to_string();
            assert_eq!(printed.parse(), Ok(ByteSize(bytes)), "{printed}");
        }
        assert_eq!(ByteSize(4 << 60).to_string(), "4EiB");
        assert_eq!(ByteSize(65537).to_string(), "65537");
        assert_eq!(format!("{:#}", ByteSize(3 << 29)), "1.5 GiB");
        assert_eq!(format!("{:#}", ByteSize(12)), "12 B");
    }
}

//! Numbers and encodings as tar headers spell them.

use crate::entry::Time;

/// A numeric header field: octal digits, or base-256 when the first bit is set. An empty field is 0.
pub(crate) fn number(field: &[u8]) -> Result<i64, String> {
    let invalid = || format!("{:?} is not a number", String::from_utf8_lossy(field));
    let Some(&first) = field.first() else { return Ok(0) };
    if first & 0x80 != 0 {
        // Two's complement without the marker bit: bit 6 of the first byte is the sign.
        let mut value = if first & 0x40 != 0 { -1i128 } else { 0 };
        value = value << 6 | i128::from(first & 0x3f);
        for &byte in &field[1..] {
            value = value << 8 | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| format!("number {value} is out of range"));
    }
    let digits = field.iter().skip_while(|&&b| b == b' ' || b == 0);
    let mut value = 0i64;
    let mut seen = false;
    for &byte in digits {
        match byte {
            b'0'..=b'7' => value = value.checked_mul(8).ok_or_else(invalid)? | i64::from(byte - b'0'),
            b' ' | 0 if seen => break,
            _ => return Err(invalid()),
        }
        seen = true;
    }
    Ok(value)
}

/// An unsigned decimal number, all of `text`.
pub(crate) fn decimal(text: &[u8]) -> Result<u64, String> {
    let parsed = std::str::from_utf8(text).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
    parsed
        .and_then(|t| t.parse().ok())
        .ok_or_else(|| format!("{:?} is not a number", String::from_utf8_lossy(&text[..text.len().min(64)])))
}

/// A PAX time: decimal seconds, perhaps negative, perhaps with a fraction, of which nanoseconds are kept (towards the
/// past, as GNU tar does).
pub(crate) fn time(text: &[u8]) -> Result<Time, String> {
    let invalid = || format!("{:?} is not a time", String::from_utf8_lossy(&text[..text.len().min(64)]));
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (whole, fraction) = match digits.iter().position(|&b| b == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &[][..]),
    };
    if (whole.is_empty() && fraction.is_empty()) || !fraction.iter().all(u8::is_ascii_digit) {
        return Err(invalid());
    }
    let whole = if whole.is_empty() { 0 } else { decimal(whole).map_err(|_| invalid())? };
    let mut seconds = i64::try_from(whole).map_err(|_| invalid())?;
    let mut nanoseconds = 0u32;
    for i in 0..9 {
        nanoseconds = nanoseconds * 10 + fraction.get(i).map_or(0, |&b| u32::from(b - b'0'));
    }
    if negative {
        let beyond = fraction.iter().skip(9).any(|&b| b != b'0');
        nanoseconds += u32::from(beyond);
        seconds = -seconds;
        if nanoseconds > 0 {
            seconds -= 1;
            nanoseconds = 1_000_000_000 - nanoseconds;
        }
    }
    Ok(Time { seconds, nanoseconds })
}

/// Base64 with or without padding.
pub(crate) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    let text = text.trim_ascii_end();
    let end = text.iter().position(|&b| b == b'=').unwrap_or(text.len());
    for &byte in &text[..end] {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

/// Undoes percent-encoding. `only` limits it to the given characters; what is not an escape stays as it is.
pub(crate) fn percent_decode(text: &[u8], only: Option<&[u8]>) -> Vec<u8> {
    let nibble = |byte: u8| (byte as char).to_digit(16).map(|n| n as u8);
    let mut out = Vec::with_capacity(text.len());
    let mut i = 0;
    while i < text.len() {
        if let [b'%', high, low, ..] = text[i..]
            && let (Some(high), Some(low)) = (nibble(high), nibble(low))
            && only.is_none_or(|only| only.contains(&(high << 4 | low)))
        {
            out.push(high << 4 | low);
            i += 3;
            continue;
        }
        out.push(text[i]);
        i += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(b"777777777777"), Ok(0o777777777777));
        assert_eq!(number(&[0; 12]), Ok(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\x01"), Ok((2 << 32) + 1));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf0"), Ok(-16));
        number(b"\x80\0\0\x01\0\0\0\0\0\0\0\0").unwrap_err();
        number(b"12x4567\0").unwrap_err();
        number(b"-1\0").unwrap_err();
    }

    #[test]
    fn times() {
        let time = |text: &str| super::time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time("1350244992.023960108"), Ok((1350244992, 23960108)));
        assert_eq!(time("12"), Ok((12, 0)));
        assert_eq!(time("12.5"), Ok((12, 500_000_000)));
        assert_eq!(time("-12.5"), Ok((-13, 500_000_000)));
        assert_eq!(time("-0.000000001"), Ok((-1, 999_999_999)));
        assert_eq!(time("-1.0000000001"), Ok((-2, 999_999_999)));
        assert_eq!(time("-1.9999999999"), Ok((-2, 0)));
        for bad in ["", "-", ".", "1e3", "1.2.3", "99999999999999999999", "+1", " 1"] {
            time(bad).unwrap_err();
        }
    }

    #[test]
    fn encodings() {
        assert_eq!(base64(b"aGVsbG8=").unwrap(), b"hello");
        assert_eq!(base64(b"aGVsbG8").unwrap(), b"hello");
        assert_eq!(base64(b"a!"), None);
        assert_eq!(percent_decode(b"user.a%3Db%25%41%4", Some(b"=%")), b"user.a=b%%41%4");
        assert_eq!(percent_decode(b"user.%41", None), b"user.A");
    }
}

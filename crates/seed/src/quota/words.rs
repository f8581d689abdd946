//! Bytes in words.

/// "1.5 GiB (1610612736 bytes)", "512 bytes".
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} bytes");
    }
    let power = (count.ilog2() / 10).min(UNITS.len() as u32);
    let tenths = (u128::from(count) * 10) >> (10 * power);
    let whole = tenths / 10;
    let fraction = match tenths % 10 {
        0 => String::new(),
        tenth => format!(".{tenth}"),
    };
    format!("{whole}{fraction} {} ({count} bytes)", UNITS[power as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_are_rounded_down_and_exact() {
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(bytes(16384), "16 KiB (16384 bytes)");
        assert_eq!(bytes(3 << 29), "1.5 GiB (1610612736 bytes)");
        assert_eq!(bytes(u64::MAX), "15.9 EiB (18446744073709551615 bytes)");
    }
}

//! How results and errors are shown: JSON for machines, lines and small tables for people.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;

/// Prints facts as JSON, or as `text` says. A reader that has gone away (`loam ls | head`) is no error.
pub(crate) fn print<T: Serialize>(
    json: bool,
    facts: &T,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let mut text = if json { serde_json::to_string(facts)? } else { text(facts) };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints `loam: what: why` and a hint; says which exit code that is.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let (text, hint, usage) = match error.downcast_ref::<loam_pool::Error>() {
        Some(error) => (error.chain(), error.hint(), matches!(error, loam_pool::Error::Invalid { .. })),
        None => (format!("{error:#}"), None, false),
    };
    eprintln!("loam: {text}");
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(if usage { 2 } else { 1 })
}

/// Prints help as it is, and what is wrong with the arguments as every other error.
pub(crate) fn report_usage(usage: &clap::Error) -> ExitCode {
    let text = usage.render();
    if !usage.use_stderr() {
        // A reader that has seen enough is no error.
        let _ = write!(std::io::stdout(), "{text}");
        return ExitCode::SUCCESS;
    }
    let text = text.to_string();
    match text.strip_prefix("error: ") {
        Some(what) => eprint!("loam: {what}"),
        // No command at all: help.
        None => eprint!("{text}"),
    }
    ExitCode::from(2)
}

/// A size for people: whole bytes below 1 KiB, else three digits or so in the unit that fits.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    if unit == 0 || value.fract() == 0.0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A time for people.
pub(crate) fn seconds(nanoseconds: u64) -> String {
    let seconds = nanoseconds as f64 / 1e9;
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

/// Lays rows out in columns as wide as their widest cell; numbers are for the caller to format.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut laid_out = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(laid_out, "{cell:<width$}  ");
        }
        text.push_str(laid_out.trim_end());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let shown = [0, 1023, 1024, 1536, 211_524_971, 4 << 60, u64::MAX].map(size);
        assert_eq!(shown, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "202 MiB", "4 EiB", "16 EiB"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "2".to_owned()]];
        assert_eq!(table(&["N", "V"], &rows), "N     V\na     1\nlong  2\n");
    }
}

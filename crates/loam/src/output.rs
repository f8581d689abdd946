//! How results and errors are shown: JSON for machines, lines and small tables for people.

use std::fmt::Write as _;
use std::process::ExitCode;

use loam_block::size::ByteSize;
use serde::Serialize;

/// Prints facts as JSON, or as `text` says.
pub(crate) fn print<T: Serialize>(json: bool, facts: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(facts)?);
    } else {
        let text = text(facts);
        print!("{text}");
        if !text.is_empty() && !text.ends_with('\n') {
            println!();
        }
    }
    Ok(())
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

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
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

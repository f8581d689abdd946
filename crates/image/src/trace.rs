//! Traces as text: what a run of an image read first, in order, by file and offset instead of by address. Addresses move
//! with every build of an image, paths hardly ever do; so this is the form that is kept, edited, and put into the index
//! of the next build.
//!
//! The first line is `# loam trace 1`; each line behind it is `OFFSET LENGTH PATH`, in the order of first use
//! (`docs/formats/trace.md`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::ops::Range;

use crate::entry::{BLOCK_BYTES, EntryKind, Run};
use crate::index::{Index, is_safe_path};
use crate::path::{Paths, escape, unescape};
use crate::{Error, Result};

/// The version that this code writes and reads.
pub const VERSION: u32 = 1;
/// Longest text, bytes.
pub const TEXT_BYTES_MAX: usize = 64 << 20;
/// Most lines that name a file. A run of the index gives more than one where it spans files.
pub const LINES_MAX: usize = 1 << 18;
/// Most runs that the lines of a text may come to before what is said twice is dropped: a scattered file has many.
pub const LINE_RUNS_MAX: usize = 1 << 20;
/// What the first line begins with; the version follows.
const MAGIC: &str = "# loam trace ";

/// A trace's text, for one index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traced {
    /// Runs of the content's addresses in the order of first use: multiples of 4096 bytes, no address twice.
    pub runs: Vec<Range<u64>>,
    /// What the index does not have: the paths (escaped, each once) of files that are not there or are no regular files,
    /// and the lines that reach beyond their file's end, of which `runs` has what is there.
    pub unknown: Vec<String>,
}

/// Rounds runs outwards to blocks of 4096 bytes and keeps of every block the first use. Runs that continue each other
/// become one; empty ones are dropped.
///
/// # Errors
/// [`Error::Index`] for a run that reaches beyond a content of `content_length` bytes.
pub fn first_uses(
    runs: impl IntoIterator<Item = Range<u64>>,
    content_length: u64,
) -> Result<Vec<Range<u64>>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    // Start and end of what is in `out`, disjoint.
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    let mut emit = |run: Range<u64>| match out.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => out.push(run),
    };
    for run in runs.into_iter().filter(|run| run.start < run.end) {
        if run.end > content_length {
            let reason = format!(
                "run {}..{} reaches beyond the content of {content_length} bytes: it is of another index",
                run.start, run.end
            );
            return Err(Error::index("trace", reason));
        }
        let run = run.start / BLOCK_BYTES * BLOCK_BYTES..run.end.next_multiple_of(BLOCK_BYTES);
        let (mut start, mut end, mut position) = (run.start, run.end, run.start);
        if let Some((&before, &until)) = used.range(..run.start).next_back().filter(|(_, e)| **e >= run.start)
        {
            used.remove(&before);
            start = before;
            end = end.max(until);
            position = until;
        }
        while let Some((&next, &until)) = used.range(run.start..=run.end).next() {
            used.remove(&next);
            if position < next {
                emit(position..next);
            }
            end = end.max(until);
            position = until;
        }
        if position < run.end {
            emit(position..run.end);
        }
        used.insert(start, end);
    }
    Ok(out)
}

/// A part of a file that a run of the trace read.
struct Part {
    /// Number of the run.
    order: usize,
    address: u64,
    offset: u64,
    length: u64,
    file: usize,
}

/// Writes runs of the content's addresses as text, after [`first_uses`]. What lies between files is left out; of a file
/// with several names the first one in the index is written.
///
/// # Errors
/// [`Error::Index`] for entries that break the format or a run outside the content; [`Error::Limit`] beyond
/// [`LINES_MAX`] or [`TEXT_BYTES_MAX`].
pub fn to_text(index: &Index, runs: &[Range<u64>]) -> Result<String> {
    let runs = first_uses(runs.iter().cloned(), index.content_length())?;
    let mut sorted: Vec<(u64, u64, usize)> =
        runs.iter().enumerate().map(|(order, run)| (run.start, run.end, order)).collect();
    sorted.sort_unstable();
    let mut parts = Vec::new();
    let mut names: Vec<String> = Vec::new();
    let mut paths = Paths::default();
    for entry in index.entries() {
        let entry = entry?;
        let path = paths.enter(&entry);
        let EntryKind::File { size, runs } = &entry.kind else { continue };
        let before = parts.len();
        for run in runs {
            find_parts(&sorted, run, *size, names.len(), &mut parts)?;
        }
        if parts.len() > before {
            names.push(escape(path));
        }
    }
    parts.sort_unstable_by_key(|part| (part.order, part.address, part.file));
    parts.dedup_by(|next, last| {
        let continues = next.file == last.file && next.offset == last.offset + last.length;
        if continues {
            last.length += next.length;
        }
        continues
    });
    let mut text = format!("{MAGIC}{VERSION}\n");
    for Part { offset, length, file, .. } in &parts {
        let _ = writeln!(text, "{offset} {length} {}", names[*file]);
        if text.len() > TEXT_BYTES_MAX {
            return Err(too_long());
        }
    }
    Ok(text)
}

/// Adds what the trace has of one run of a file. `sorted` has start, end and number of the trace's runs by address.
fn find_parts(
    sorted: &[(u64, u64, usize)],
    run: &Run,
    size: u64,
    file: usize,
    parts: &mut Vec<Part>,
) -> Result<()> {
    let first = sorted.partition_point(|&(_, end, _)| end <= run.address);
    let run_end = run.address + run.length;
    for &(start, end, order) in sorted[first..].iter().take_while(|&&(start, ..)| start < run_end) {
        let address = start.max(run.address);
        let offset = run.file_offset + (address - run.address);
        let length = (end.min(run_end) - address).min(size.saturating_sub(offset));
        if length == 0 {
            continue;
        }
        if parts.len() == LINES_MAX {
            return Err(too_many_lines());
        }
        parts.push(Part { order, address, offset, length, file });
    }
    Ok(())
}

fn too_long() -> Error {
    Error::Limit { what: "bytes of a trace's text".to_owned(), limit: TEXT_BYTES_MAX as u64 }
}

fn too_many_lines() -> Error {
    Error::Limit { what: "lines of a trace's text".to_owned(), limit: LINES_MAX as u64 }
}

/// A line that names a file.
struct Line<'a> {
    text: &'a str,
    offset: u64,
    end: u64,
    /// Number of its path.
    path: usize,
}

/// A text taken apart.
#[derive(Default)]
struct Lines<'a> {
    lines: Vec<Line<'a>>,
    paths: HashMap<Vec<u8>, usize>,
}

/// The data of a file as clones of the content: its size, and its runs by file offset.
type Data = (u64, Vec<Run>);

/// Finds the runs that a text names in an index, which need not be the one that it was recorded with.
///
/// # Errors
/// [`Error::Trace`] with the number of a line that is malformed; [`Error::TraceVersion`]; [`Error::Limit`] beyond
/// [`LINES_MAX`], [`TEXT_BYTES_MAX`] or [`LINE_RUNS_MAX`]; [`Error::Index`] for entries that break the format.
pub fn from_text(index: &Index, text: &str) -> Result<Traced> {
    let Lines { lines, paths } = parse(text)?;
    let numbers = find_numbers(index, &paths)?;
    let files = find_files(index, &numbers)?;
    let mut raw = Vec::new();
    let mut unknown = Vec::new();
    let mut missing = vec![false; numbers.len()];
    for line in &lines {
        let (size, runs) = match numbers[line.path].and_then(|number| files.get(&number)) {
            Some(Some(data)) => data,
            Some(None) => continue,
            None => {
                if !std::mem::replace(&mut missing[line.path], true) {
                    unknown.push(line.text.splitn(3, ' ').nth(2).unwrap_or_default().to_owned());
                }
                continue;
            }
        };
        if line.end > *size {
            unknown.push(line.text.to_owned());
        }
        let (start, end) = (line.offset, line.end.min(*size));
        let first = runs.partition_point(|run| run.file_offset + run.length <= start);
        for run in runs[first..].iter().take_while(|run| run.file_offset < end) {
            if raw.len() == LINE_RUNS_MAX {
                let what = "runs that a trace's lines come to".to_owned();
                return Err(Error::Limit { what, limit: LINE_RUNS_MAX as u64 });
            }
            let from = start.saturating_sub(run.file_offset);
            let to = (end - run.file_offset).min(run.length);
            raw.push(run.address + from..run.address + to);
        }
    }
    Ok(Traced { runs: first_uses(raw, index.content_length())?, unknown })
}

fn parse(text: &str) -> Result<Lines<'_>> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(too_long());
    }
    let mut lines = text.lines();
    let found: Option<u32> = lines.next().and_then(|line| line.strip_prefix(MAGIC)?.parse().ok());
    match found {
        Some(VERSION) => {}
        Some(found) if found > VERSION => return Err(Error::TraceVersion { found, supported: VERSION }),
        _ => {
            let reason = format!("not a trace: one begins with \"{MAGIC}{VERSION}\"");
            return Err(Error::Trace { line: 1, reason });
        }
    }
    let mut out = Lines::default();
    for (number, text) in (2..).zip(lines) {
        if out.lines.len() == LINES_MAX {
            return Err(too_many_lines());
        }
        let (offset, end, path) =
            parse_line(text).map_err(|reason| Error::Trace { line: number, reason: reason.to_owned() })?;
        let count = out.paths.len();
        let path = *out.paths.entry(path).or_insert(count);
        out.lines.push(Line { text, offset, end, path });
    }
    Ok(out)
}

/// First byte, byte behind the last, and path.
fn parse_line(text: &str) -> Result<(u64, u64, Vec<u8>), &'static str> {
    let mut fields = text.splitn(3, ' ');
    let mut field = || fields.next().ok_or("not of the form OFFSET LENGTH PATH");
    let (offset, length, path) = (field()?, field()?, field()?);
    let decimal = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let offset = decimal(offset).ok_or("the offset is not a decimal number of bytes")?;
    let length = decimal(length).ok_or("the length is not a decimal number of bytes")?;
    if length == 0 {
        return Err("the length is 0");
    }
    let end = offset.checked_add(length).ok_or("offset and length come to more than 2^64 bytes")?;
    let path = unescape(path)?;
    if !is_safe_path(&path) {
        return Err("the path is not one below the image's root");
    }
    Ok((offset, end, path))
}

/// The number of the entry whose inode each path names; `None` for paths that are not there.
fn find_numbers(index: &Index, wanted: &HashMap<Vec<u8>, usize>) -> Result<Vec<Option<u32>>> {
    let mut numbers = vec![None; wanted.len()];
    let mut paths = Paths::default();
    for entry in index.entries() {
        let entry = entry?;
        if let Some(&path) = wanted.get(paths.enter(&entry)) {
            numbers[path] = Some(match entry.kind {
                EntryKind::HardLink(target) => target,
                _ => entry.number,
            });
        }
    }
    Ok(numbers)
}

/// The regular files among these entries: `None` for those whose data came with the index. A pass of its own, because
/// a hard link says only in passing which entry before it has the data.
fn find_files(index: &Index, numbers: &[Option<u32>]) -> Result<HashMap<u32, Option<Data>>> {
    let wanted: HashSet<u32> = numbers.iter().flatten().copied().collect();
    let mut files = HashMap::new();
    for entry in index.entries() {
        let entry = entry?;
        if !wanted.contains(&entry.number) {
            continue;
        }
        match entry.kind {
            EntryKind::File { size, runs } => files.insert(entry.number, Some((size, runs))),
            EntryKind::Inline(_) => files.insert(entry.number, None),
            _ => None,
        };
    }
    Ok(files)
}

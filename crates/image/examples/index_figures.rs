//! Figures of an index: `index_figures SOURCE [INLINE_BYTES]` builds it, reads it back, and prints sizes and times.

use std::time::Instant;

use loam_image::{BuildOptions, EntryKind, Index, SourceSpec, build};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let spec: SourceSpec = arguments.next().ok_or("usage: index_figures SOURCE [INLINE_BYTES]")?.parse()?;
    let mut options = BuildOptions::default();
    if let Some(inline) = arguments.next() {
        options.inline_bytes = inline.parse()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let built = runtime.block_on(build(&spec, &options, None))?;
    let report = &built.report;
    let rate = report.read_bytes as f64 / report.elapsed.as_secs_f64() / 1e6;
    println!("build: {:?}, {rate:.0} MB/s, {} entries", report.elapsed, report.entries);
    let share = report.index_bytes as f64 / report.source_bytes as f64 * 100.0;
    println!("index: {} bytes, {share:.3} % of {} source bytes", report.index_bytes, report.source_bytes);
    let began = Instant::now();
    let index = Index::open(built.index.clone())?;
    let opened = began.elapsed();
    let (mut inline, mut inline_bytes, mut files, mut links) = (0, 0, 0, 0);
    let began = Instant::now();
    for entry in index.entries() {
        match entry?.kind {
            EntryKind::Inline(data) => (inline, inline_bytes) = (inline + 1, inline_bytes + data.len()),
            EntryKind::File { .. } => files += 1,
            EntryKind::HardLink(_) => links += 1,
            _ => {}
        }
    }
    println!("open: {opened:?}; all entries: {:?}", began.elapsed());
    println!("{files} files, {inline} inline ({inline_bytes} bytes), {links} hard links");
    let (content, chunks) = (index.content_length(), index.chunk_count());
    println!("content: {content} bytes, {chunks} chunks ({} bytes of digests)", chunks * 32);
    Ok(())
}

//! Files per second of online creation: `create_figures SOURCE DIR [COPIES]`, as root, with DIR on a mounted btrfs.
//!
//! Indexes SOURCE, makes a stand-in for `.virtual-data` in DIR (allocated, without checksums) and creates the tree once
//! for each of three rounds; with COPIES the tree has that many times the entries. Cleans up after itself.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use loam_image::create::{Control, Target, create};
use loam_image::index::{FileExtent, IndexWriter, NewEntry, NewKind};
use loam_image::{BuildOptions, Entry, EntryKind, Index, Metadata, SourceSpec, build};
use rustix::fs::{FallocateFlags, IFlags};

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> AnyResult<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: create_figures SOURCE DIR [COPIES]";
    let spec: SourceSpec = arguments.next().ok_or(usage)?.parse()?;
    let directory = arguments.next().ok_or(usage)?;
    let copies: u32 = arguments.next().map_or(Ok(1), |copies| copies.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let built = runtime.block_on(build(&spec, &BuildOptions::default(), None))?;
    let index = Index::open(replicate(&Index::open(built.index)?, copies)?)?;

    let top = Path::new(&directory);
    let staging = top.join("staging");
    std::fs::create_dir(&staging)?;
    let staging_fd = File::open(&staging)?;
    loam_sys::btrfs::set_inode_flags(&staging_fd, IFlags::NOCOW)?;
    let virtual_path = staging.join("virtual-data");
    let virtual_data = File::create_new(&virtual_path)?;
    rustix::fs::fallocate(&virtual_data, FallocateFlags::empty(), 0, index.content_length())?;
    let virtual_data = File::open(&virtual_path)?;
    for round in 0..3 {
        let path = top.join(format!("image-{round}"));
        std::fs::create_dir(&path)?;
        let root = File::open(&path)?;
        let target = Target {
            root: root.as_fd(),
            staging: staging_fd.as_fd(),
            virtual_data: virtual_data.as_fd(),
            base: 0,
            path: &path,
        };
        let cpu = cpu_seconds();
        let began = Instant::now();
        let created = create(&index, &target, &Control::default())?;
        let elapsed = began.elapsed();
        let cpu = cpu_seconds() - cpu;
        let files = created.files as f64;
        let (wall_rate, cpu_rate) = (files / elapsed.as_secs_f64(), files / cpu);
        println!("{created:?} in {elapsed:?}: {wall_rate:.0} files/s, {cpu_rate:.0} files per CPU second");
        let began = Instant::now();
        rustix::fs::syncfs(&root)?;
        println!("sync: {:?}", began.elapsed());
    }
    for round in 0..3 {
        std::fs::remove_dir_all(top.join(format!("image-{round}")))?;
    }
    std::fs::remove_dir_all(&staging)?;
    Ok(())
}

/// CPU time of this thread: what is left of a figure when others share the machine.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The index of a tree that holds `copies` of this one, all on the same content.
fn replicate(index: &Index, copies: u32) -> AnyResult<Vec<u8>> {
    let mut writer = IndexWriter::new();
    let root = Metadata { mode: 0o755, ..Metadata::default() };
    writer.add(&NewEntry { depth: 0, name: b"", kind: NewKind::Directory, metadata: &root })?;
    for copy in 0..copies {
        let first = writer.entries() as u32;
        for entry in index.entries() {
            add_copy(&mut writer, index, &entry?, copy, first)?;
        }
    }
    let digests: Vec<_> = (0..index.chunk_count()).filter_map(|chunk| index.chunk_digest(chunk)).collect();
    let pieces = index.pieces().iter().copied();
    Ok(writer.finish(index.chunk_bytes(), index.content_length(), index.blobs(), pieces, &digests)?)
}

fn add_copy(writer: &mut IndexWriter, index: &Index, entry: &Entry, copy: u32, first: u32) -> AnyResult<()> {
    let name = if entry.depth == 0 { format!("copy-{copy}").into_bytes() } else { entry.name.to_vec() };
    let parts: Vec<(u64, u64)>;
    let kind = match &entry.kind {
        EntryKind::Directory => NewKind::Directory,
        EntryKind::File { size, runs } => {
            let range = runs.first().map_or(0..0, |run| run.address..run.address + run.length);
            let pieces = index.pieces_in(range.clone());
            let first_piece = index.pieces().partition_point(|piece| piece.end() <= range.start) as u64;
            parts = pieces.iter().map(|piece| (piece.address - range.start, piece.length)).collect();
            NewKind::File(FileExtent { first_piece, parts: &parts, size: *size })
        }
        EntryKind::Inline(data) => NewKind::Inline(data),
        EntryKind::Symlink(target) => NewKind::Symlink(target),
        EntryKind::HardLink(target) => NewKind::HardLink(target + first),
        EntryKind::CharacterDevice { major, minor } => NewKind::CharacterDevice(*major, *minor),
        EntryKind::BlockDevice { major, minor } => NewKind::BlockDevice(*major, *minor),
        EntryKind::Fifo => NewKind::Fifo,
        EntryKind::Socket => NewKind::Socket,
    };
    writer.add(&NewEntry { depth: entry.depth + 1, name: &name, kind, metadata: &entry.metadata })?;
    Ok(())
}

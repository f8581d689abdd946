//! File systems over the benchmark's bytes: written by their own kernel code, or formatted by loam.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use loam_block::{BlockDevice, Io, PatternDevice};
use loam_seed::{Attributes, MemoryTree, OwnedKind, Run, SeedOptions, Subvolume};

use super::guards::{Mounted, OnLoop};
use crate::process::timed;
use crate::quarters;

/// The file that is read, and the subvolume or directory that it lies in.
pub(super) const DATA: &str = "data";
pub(super) const SUBVOLUME: &str = "bench";
/// Bytes written at a time.
const PIECE: u64 = 1 << 20;
/// What a file system needs beside the data.
pub(super) const SPARE: u64 = 512 << 20;
/// The local image of a pair: sparse, and nothing but trees is ever written to it.
const LOCAL_SIZE: u64 = 1 << 30;
/// One fallocate; stock btrfs cuts it into extents of at most 256 MiB.
const ALLOCATION: u64 = 64 << 30;

/// Writes the pattern of `file_offset..` to `offset..offset + length`.
pub(super) fn fill(file: &File, offset: u64, file_offset: u64, length: u64) -> Result<()> {
    let pattern = PatternDevice::new(file_offset + length);
    let mut piece = vec![0; PIECE.min(length) as usize];
    for start in (0..length).step_by(PIECE as usize) {
        let piece = &mut piece[..PIECE.min(length - start) as usize];
        match pattern.read(file_offset + start, piece) {
            Io::Ready(result) => result?,
            Io::Pending(_) => unreachable!("a pattern is computed"),
        }
        file.write_all_at(piece, offset + start)?;
    }
    Ok(())
}

/// A new file of the pattern.
pub(super) fn pattern_file(path: &Path, size: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    fill(&file, 0, 0, size)?;
    Ok(file.sync_all()?)
}

/// A sparse file.
pub(super) fn sparse_file(path: &Path, size: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(file.set_len(size)?)
}

/// mkfs on a device or image; its words only when it fails.
pub(super) fn make(kind: &str, device: &Path) -> Result<()> {
    let mut command = Command::new(format!("mkfs.{kind}"));
    match kind {
        "btrfs" => command.args(["-q", "-f", "-K", "-m", "single", "-d", "single"]),
        _ => command.args(["-q", "-F"]),
    };
    timed(command.arg(device)).map(drop)
}

/// Makes the file system on a device and writes the data file; without checksums, as virtual data has none.
pub(super) fn with_data(kind: &str, device: &Path, directory: &Path, size: u64) -> Result<()> {
    make(kind, device)?;
    let options: &[&str] = if kind == "btrfs" { &["nodatasum"] } else { &[] };
    let mounted = Mounted::mount(kind, device, directory, options, false)?;
    pattern_file(&directory.join(DATA), size)?;
    drop(mounted);
    Ok(())
}

/// The same in an image file.
pub(super) fn image_with_data(image: &Path, directory: &Path, size: u64) -> Result<()> {
    sparse_file(image, 2 * size + SPARE)?;
    let device = OnLoop::attach(image, false)?;
    with_data("btrfs", &device.path(), directory, size)
}

/// Formats a seed with one file that is a clone of `clone_size` bytes of the virtual region.
pub(super) fn seed(options: &SeedOptions, clone_size: u64, images: (&Path, Option<&Path>)) -> Result<()> {
    let plain = |mode| Attributes { mode, ..Attributes::default() };
    let mut tree = MemoryTree::new(plain(0o755));
    let runs = quarters::pieces(options.virtual_size, clone_size)?;
    let runs = runs.map(|piece| Run {
        file_offset: piece.file_offset,
        address: piece.address,
        length: piece.length,
    });
    tree.add(0, DATA, OwnedKind::File { size: clone_size, runs: runs.to_vec() }, plain(0o644));
    let subvolumes = [Subvolume { name: SUBVOLUME, tree: &tree, readonly: false }];
    let create = |path: &Path| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        file.with_context(|| format!("cannot make {}", path.display()))
    };
    let mut virtual_image = create(images.0)?;
    let mut local = images.1.map(create).transpose()?;
    let options = SeedOptions { local_size: LOCAL_SIZE, ..options.clone() };
    let local = local.as_mut().map(|file| file as &mut dyn loam_seed::Image);
    loam_seed::write(&options, &subvolumes, &mut virtual_image, local)?;
    Ok(())
}

/// What stock tools give: mkfs on a sparse image, a file of `virtual_size` bytes by fallocate, and a clone of it. The
/// clone's bytes are written through the file system, in place, before it is cloned; the seed study rewrote the type of
/// every extent instead, which reads the same.
pub(super) fn small_extents(
    image: &Path,
    directory: &Path,
    virtual_size: u64,
    clone_size: u64,
) -> Result<()> {
    let pieces = quarters::pieces(virtual_size, clone_size)?;
    sparse_file(image, virtual_size + virtual_size / 16 + SPARE)?;
    let device = OnLoop::attach(image, false)?;
    make("btrfs", &device.path())?;
    let _mounted = Mounted::mount("btrfs", &device.path(), directory, &["nodatasum"], false)?;
    fs::create_dir(directory.join(SUBVOLUME))?;
    let large = File::create_new(directory.join(".virtual-data"))?;
    for start in (0..virtual_size).step_by(ALLOCATION as usize) {
        let length = ALLOCATION.min(virtual_size - start);
        rustix::fs::fallocate(&large, rustix::fs::FallocateFlags::empty(), start, length)
            .with_context(|| format!("fallocate of {virtual_size} bytes"))?;
    }
    let clone = File::create_new(directory.join(SUBVOLUME).join(DATA))?;
    for piece in pieces {
        fill(&large, piece.address, piece.file_offset, piece.length)?;
        large.sync_all()?;
        loam_sys::btrfs::clone_range(&large, piece.address, piece.length, &clone, piece.file_offset)?;
    }
    ensure!(clone.metadata()?.len() == clone_size, "the clone has another size");
    Ok(clone.sync_all()?)
}

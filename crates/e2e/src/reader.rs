//! Reads that the page cache has no part in.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Bytes of a direct read: one filesystem block.
pub const BLOCK: usize = 4096;

/// Reads all of a file with O_DIRECT, a megabyte at a time: what the device gives now, not what was read before.
///
/// # Errors
/// Those of open and read.
pub fn read_direct(path: &Path) -> io::Result<Vec<u8>> {
    const PIECE: usize = 1 << 20;
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a flag of open(2)");
    let file: File = OpenOptions::new().read(true).custom_flags(direct).open(path)?;
    let length = usize::try_from(file.metadata()?.len()).expect("a test's file fits into memory");
    let mut buffer = vec![0; PIECE + BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    let piece = &mut buffer[start..start + PIECE];
    let mut content = Vec::with_capacity(length);
    while content.len() < length {
        match file.read_at(piece, content.len() as u64)? {
            0 => break,
            count => content.extend_from_slice(&piece[..count]),
        }
    }
    Ok(content)
}

/// Gives back all clean pages, of every file of the machine.
pub fn drop_page_cache() {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

//! Extents of a regular file by `SEEK_DATA` and `SEEK_HOLE` (lseek(2)).
//!
//! Finding where data ends may walk a file's whole extent tree, and copiers ask again and again inside one long run,
//! so the last run of data is remembered. Only data is: a remembered hole would be a lie as soon as someone else
//! writes into it, while data that has since become a hole still reads as what it is.

use std::sync::{Mutex, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::raw::RawFile;
use crate::{Error, Extent, ExtentKind, Result};

/// The last run of data that was found.
#[derive(Debug, Default)]
pub(super) struct DataCache {
    run: Mutex<Option<(u64, u64)>>,
}

impl DataCache {
    /// The data extent that fills `offset..offset + length`, when the remembered run covers it all.
    pub(super) fn find(&self, offset: u64, length: u64) -> Option<Extent> {
        let (start, end) = (*self.lock())?;
        let covered = start <= offset && offset + length <= end;
        covered.then_some(Extent { offset, length, kind: ExtentKind::Data })
    }

    /// To be called before anything that may turn data into a hole.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    fn remember(&self, start: u64, end: u64) {
        *self.lock() = Some((start, end));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(u64, u64)>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The extents of `offset..offset + length`, at most `limit`.
pub(super) fn collect(
    file: &RawFile,
    cache: &DataCache,
    offset: u64,
    length: u64,
    limit: usize,
) -> Result<Vec<Extent>> {
    if !file.is_regular() {
        return Ok(vec![Extent { offset, length, kind: ExtentKind::Data }]);
    }
    let end = offset + length;
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = offset;
    while at < end && extents.len() < limit.max(1) {
        let (kind, run_end) = run_at(file, cache, at)?;
        let stop = run_end.min(end);
        match extents.last_mut().filter(|last| last.kind == kind) {
            Some(last) => last.length += stop - at,
            None => extents.push(Extent { offset: at, length: stop - at, kind }),
        }
        at = stop;
    }
    Ok(extents)
}

/// What lies at `at`, and where that ends.
fn run_at(file: &RawFile, cache: &DataCache, at: u64) -> Result<(ExtentKind, u64)> {
    let seek = |to| match file.seek(to) {
        // Nothing but holes up to the end of the file, or `at` lies beyond a file that was cut short.
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => Ok(None),
        Err(error) => Err(Error::from_os(format!("extents at {at} of {}", file.path.display()), error)),
        Ok(found) => Ok(Some(found)),
    };
    match seek(SeekFrom::Data(at))? {
        None => Ok((ExtentKind::Hole, u64::MAX)),
        Some(data) if data > at => Ok((ExtentKind::Hole, data)),
        Some(_) => {
            // A writer may have made it a hole in between: then it is data until the next look.
            let hole = seek(SeekFrom::Hole(at))?.filter(|&hole| hole > at).unwrap_or(at + 4096);
            cache.remember(at, hole);
            Ok((ExtentKind::Data, hole))
        }
    }
}

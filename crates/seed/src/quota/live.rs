//! Looking at a filesystem that is mounted and may change meanwhile.
//!
//! btrfs never overwrites a block of the last committed trees: what a transaction frees is used again only once that
//! transaction itself is committed, which moves the superblock's generation. So what was read between two looks at the
//! same generation is one consistent state.

use std::io;

use crate::Error;
use crate::reader::Device;

use super::devices;

/// How often [`when_still`] looks before it gives up.
pub const LIVE_ATTEMPTS: u32 = 8;

/// Why a filesystem in use could not be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    /// It was written to all the time.
    #[error(
        "the filesystem moved on from transaction {first} to {last} in {attempts} attempts to read it: writers commit faster \
         than its trees are read; quiet them, freeze it for a moment (fsfreeze), or look at it unmounted"
    )]
    Moving {
        /// How often it was tried.
        attempts: u32,
        /// The transaction at the beginning.
        first: u64,
        /// The transaction at the end.
        last: u64,
    },
    /// It could not be brought to disk, or what was cached of the device not be dropped.
    #[error("preparing to read the filesystem: {0}")]
    Refresh(#[source] io::Error),
    /// It could not be read, although it kept still.
    #[error(transparent)]
    Read(#[from] Error),
}

/// Calls `refresh`, which commits what is pending and makes sure that reads see the device as it is, and then `look`, until
/// the filesystem's generation is the same after as before; returns what `look` found then.
///
/// # Errors
/// [`LiveError::Moving`] after [`LIVE_ATTEMPTS`] attempts.
pub fn when_still<T>(
    devices: &[Device<'_>],
    refresh: &mut dyn FnMut() -> io::Result<()>,
    look: &mut dyn FnMut() -> crate::Result<T>,
) -> Result<T, LiveError> {
    let mut first = None;
    let mut last = 0;
    for _ in 0..LIVE_ATTEMPTS {
        refresh().map_err(LiveError::Refresh)?;
        let before = devices::generation(devices);
        first = first.or(before);
        let found = look();
        let after = devices::generation(devices);
        if before == after {
            return Ok(found?);
        }
        last = after.unwrap_or(last);
    }
    Err(LiveError::Moving { attempts: LIVE_ATTEMPTS, first: first.unwrap_or(0), last })
}

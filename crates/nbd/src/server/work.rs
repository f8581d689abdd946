//! What a request asks of the device: at once where the device can, otherwise as a future for a task of its own.

use std::sync::Arc;

use loam_block::{BlockDevice, Error, ErrorKind, Extent, ExtentKind, Io, Locality, WriteFlags, ZeroFlags};

use super::export::Context;
use crate::protocol::{AllocationFlags, Command, CommandFlags, LocalityFlags, NbdError, Request, Status};

/// Extents of one context in one reply; a client asks again from the end of the last.
pub(super) const STATUS_EXTENTS_MAX: usize = 32 << 10;
/// Zeroes that are written at a time where the device cannot write them by itself, in bytes.
const ZEROES_PIECE: u64 = 256 << 10;

/// What became of a request that is not a read.
pub(super) type Done = Result<(), Error>;

/// The extents of each context that was asked for.
pub(super) type Statuses = Vec<(Context, Vec<Status>)>;

/// What is done already; what is not is forgotten, to be asked for again by another task.
pub(super) fn at_once<T>(io: Io<'_, T>) -> Option<Result<T, Error>> {
    match io {
        Io::Ready(done) => Some(done),
        Io::Pending(_) => None,
    }
}

pub(super) fn write_flags(request: &Request) -> WriteFlags {
    WriteFlags { fua: request.flags.contains(CommandFlags::FUA) }
}

fn zero_flags(request: &Request) -> ZeroFlags {
    ZeroFlags {
        fua: request.flags.contains(CommandFlags::FUA),
        no_hole: request.flags.contains(CommandFlags::NO_HOLE),
        fast_only: request.flags.contains(CommandFlags::FAST_ZERO),
    }
}

/// The error that a client is told. Those that the specification reserves for other commands become EIO or EINVAL.
pub(super) fn told(request: &Request, error: &Error) -> NbdError {
    match (error.kind(), request.command) {
        (ErrorKind::OutOfBounds, Command::Write | Command::WriteZeroes) => NbdError::NoSpace,
        (ErrorKind::NotSupported, Command::WriteZeroes)
            if request.flags.contains(CommandFlags::FAST_ZERO) =>
        {
            NbdError::NotSupported
        }
        (ErrorKind::NotSupported, Command::Cache | Command::BlockStatus) => NbdError::Invalid,
        (ErrorKind::NotSupported, _) => NbdError::Io,
        (kind, _) => kind.into(),
    }
}

/// FLUSH, TRIM, CACHE or WRITE_ZEROES, if the device does it at once.
pub(super) fn attempt(device: &dyn BlockDevice, request: &Request) -> Option<Done> {
    let io = match request.command {
        Command::Flush => device.flush(),
        Command::Trim if request.flags.contains(CommandFlags::FUA) => return None,
        Command::Trim => device.trim(request.offset, request.length),
        Command::WriteZeroes => device.write_zeroes(request.offset, request.length, zero_flags(request)),
        _ => device.prefetch(request.offset, request.length),
    };
    at_once(io).filter(|done| !matches!(done, Err(error) if needs_more(request, error)))
}

/// The same, however long it takes.
pub(super) async fn carry_out(device: Arc<dyn BlockDevice>, request: Request) -> Done {
    match request.command {
        Command::Flush => device.flush().await,
        Command::Trim => {
            match device.trim(request.offset, request.length).await {
                // A hint that the device cannot take.
                Err(error) if error.kind() == ErrorKind::NotSupported => {}
                done => done?,
            }
            match request.flags.contains(CommandFlags::FUA) {
                true => device.flush().await,
                false => Ok(()),
            }
        }
        Command::WriteZeroes => {
            match device.write_zeroes(request.offset, request.length, zero_flags(&request)).await {
                Err(error) if needs_more(&request, &error) => write_zero_bytes(&*device, &request).await,
                done => done,
            }
        }
        _ => device.prefetch(request.offset, request.length).await,
    }
}

/// Whether a refusal of the device is not to reach the client: TRIM is a hint, and WRITE_ZEROES has to work, with or
/// without a hole, unless it is to be fast.
fn needs_more(request: &Request, error: &Error) -> bool {
    error.kind() == ErrorKind::NotSupported
        && match request.command {
            Command::Trim => true,
            Command::WriteZeroes => !request.flags.contains(CommandFlags::FAST_ZERO),
            _ => false,
        }
}

async fn write_zero_bytes(device: &dyn BlockDevice, request: &Request) -> Done {
    let piece = ZEROES_PIECE.min(device.geometry().maximum_block.into());
    let zeroes = vec![0; piece.min(request.length) as usize];
    let end = request.offset + request.length;
    let mut at = request.offset;
    while at < end {
        let length = piece.min(end - at);
        device.write(at, &zeroes[..length as usize], write_flags(request)).await?;
        at += length;
    }
    Ok(())
}

/// The status of `length` bytes, if the device knows it at once.
pub(super) fn attempt_status(
    device: &dyn BlockDevice,
    contexts: &[Context],
    request: &Request,
    length: u64,
) -> Option<Result<Statuses, Error>> {
    let limit = extents_limit(request);
    let mut statuses = Vec::with_capacity(contexts.len());
    for &context in contexts {
        let extents = match context {
            Context::Allocation => {
                at_once(device.extents(request.offset, length, limit))?.map(|extents| allocation(&extents))
            }
            Context::Locality => {
                at_once(device.locality(request.offset, length, limit))?.map(|runs| locality(&runs))
            }
        };
        match extents {
            Ok(extents) => statuses.push((context, extents)),
            Err(error) => return Some(Err(error)),
        }
    }
    Some(Ok(statuses))
}

/// The same, however long it takes.
pub(super) async fn status(
    device: Arc<dyn BlockDevice>,
    contexts: Vec<Context>,
    request: Request,
    length: u64,
) -> Result<Statuses, Error> {
    let limit = extents_limit(&request);
    let mut statuses = Vec::with_capacity(contexts.len());
    for context in contexts {
        let extents = match context {
            Context::Allocation => allocation(&device.extents(request.offset, length, limit).await?),
            Context::Locality => locality(&device.locality(request.offset, length, limit).await?),
        };
        statuses.push((context, extents));
    }
    Ok(statuses)
}

fn extents_limit(request: &Request) -> usize {
    if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { STATUS_EXTENTS_MAX }
}

fn allocation(extents: &[Extent]) -> Vec<Status> {
    merged(extents.iter().map(|extent| {
        let flags = match extent.kind {
            ExtentKind::Data => AllocationFlags::empty(),
            ExtentKind::Zero => AllocationFlags::ZERO,
            ExtentKind::Hole => AllocationFlags::HOLE | AllocationFlags::ZERO,
        };
        Status { length: extent.length, flags: flags.bits() }
    }))
}

fn locality(runs: &[Locality]) -> Vec<Status> {
    merged(runs.iter().map(|run| {
        let flags = if run.local { LocalityFlags::empty() } else { LocalityFlags::LAZY };
        Status { length: run.length, flags: flags.bits() }
    }))
}

/// Adjacent extents of one status as one, as the specification likes it.
fn merged(statuses: impl Iterator<Item = Status>) -> Vec<Status> {
    let mut result: Vec<Status> = Vec::new();
    for status in statuses {
        match result.last_mut().filter(|last| last.flags == status.flags) {
            Some(last) => last.length += status.length,
            None => result.push(status),
        }
    }
    result
}

/// Whether all of `bytes` are zero. Data is told from zeroes by its first bytes, most of the time.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    const PIECE: usize = 256;
    let (pieces, rest) = bytes.as_chunks::<PIECE>();
    pieces.iter().all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_that_is_not_zero_is_seen_wherever_it_is() {
        let mut bytes = vec![0; 1000];
        assert!(all_zero(&bytes) && all_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 0x80;
            assert!(!all_zero(&bytes), "at {at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn neighbours_of_one_status_are_one_extent() {
        let extent = |length, flags| Status { length, flags };
        let given = [extent(1, 0), extent(2, 0), extent(3, 1), extent(4, 0)];
        assert_eq!(merged(given.into_iter()), [extent(3, 0), extent(3, 1), extent(4, 0)]);
    }
}

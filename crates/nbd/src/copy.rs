//! The copier: from any [`loam_block::BlockDevice`] to any other, without doing slow work twice.

mod error;
mod options;
mod progress;
mod report;

use std::sync::Arc;
use std::time::Instant;

use loam_block::{BlockDevice, WriteFlags};

pub use error::{CopyError, Operation, Side};
pub use options::{
    CopyOptions, ParseZeroStrategyError, QUEUE_DEPTH_DEFAULT, QUEUE_DEPTH_MAX, REQUEST_BYTES_DEFAULT, Stop,
    WHOLE_RUN_BYTES, ZeroStrategy,
};
pub use progress::{NoProgress, Phase, Progress, ProgressState};
pub use report::{Commands, CopyReport, ZeroMethod};

/// Copies all of `source` to the start of `destination` and flushes it.
///
/// # Errors
/// [`CopyError`] says which side failed, at what, and how far the copy is.
pub async fn copy(
    source: Arc<dyn BlockDevice>,
    destination: Arc<dyn BlockDevice>,
    options: &CopyOptions,
    _progress: &dyn Progress,
) -> Result<CopyReport, CopyError> {
    let began = Instant::now();
    let size = source.geometry().size;
    let counters = report::Counters::default();
    let mut buffer = vec![0; REQUEST_BYTES_DEFAULT as usize];
    for offset in (0..size).step_by(buffer.len()) {
        let piece = &mut buffer[..(size - offset).min(u64::from(REQUEST_BYTES_DEFAULT)) as usize];
        let length = piece.len() as u64;
        let device_error = |side, operation| {
            move |source| CopyError::Device { side, operation, offset, length, done: 0, source }
        };
        source.read(offset, piece).await.map_err(device_error(Side::Source, Operation::Read))?;
        let written = destination.write(offset, piece, WriteFlags::default()).await;
        written.map_err(device_error(Side::Destination, Operation::Write))?;
        report::add(&counters.read, 1);
        report::add(&counters.write, 1);
        report::add(&counters.data_bytes, length);
    }
    let flushed = destination.flush().await;
    flushed.map_err(|source| CopyError::Device {
        side: Side::Destination,
        operation: Operation::Flush,
        offset: 0,
        length: size,
        done: 0,
        source,
    })?;
    Ok(CopyReport {
        bytes: size,
        data_bytes: size,
        zero_bytes: counters.zero_bytes.load(std::sync::atomic::Ordering::Relaxed),
        resumed_bytes: 0,
        commands: counters.commands(),
        strategy: options.zero,
        zero_method: ZeroMethod::None,
        redone: 0,
        verified: false,
        seconds: began.elapsed().as_secs_f64(),
    })
}

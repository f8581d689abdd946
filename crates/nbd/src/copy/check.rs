//! What is settled before the first byte moves: whether the two devices go together, and in what pieces.

use std::sync::Arc;

use loam_block::{Access, BlockDevice, Geometry};
use rustix::fs::FileType;

use super::error::{CopyError, Side};
use super::options::{CopyOptions, QUEUE_DEPTH_MAX, REQUEST_BYTES_DEFAULT, WHOLE_RUN_BYTES};

/// Zeroes are looked for in blocks of the destination's preferred size, within these bounds.
const GRANULE_MIN: u32 = 4 << 10;
const GRANULE_MAX: u32 = 64 << 10;
/// Bytes of a request that may be asked for.
const REQUEST_BYTES_MIN: u32 = 512;
const REQUEST_BYTES_MAX: u32 = 32 << 20;

/// In what pieces a copy is made, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// What is copied: the size of the source.
    pub(super) size: u64,
    /// Runs begin and end at multiples of this, except at the end of the source.
    pub(super) align: u64,
    /// Blocks of the destination: what a last write has to be filled up to.
    pub(super) destination_block: u64,
    /// Data runs longer than `whole_run` are cut into this.
    pub(super) request: u64,
    /// Data runs up to this are one request.
    pub(super) whole_run: u64,
    /// Blocks in which zeroes are looked for.
    pub(super) granule: usize,
    /// Requests in flight.
    pub(super) depth: usize,
}

impl Limits {
    /// The end of the last whole block: zeroes are never asked for beyond.
    pub(super) fn last_block_end(&self) -> u64 {
        self.size & !(self.align - 1)
    }
}

fn within(what: &'static str, value: u64, minimum: u64, maximum: u64) -> Result<(), CopyError> {
    match (minimum..=maximum).contains(&value) {
        true => Ok(()),
        false => Err(CopyError::Option { what, value, minimum, maximum }),
    }
}

/// The pieces for these two devices, or why they do not go together.
pub(super) fn limits(
    source: &Geometry,
    destination: &Geometry,
    options: &CopyOptions,
) -> Result<Limits, CopyError> {
    let (size, room) = (source.size, destination.size);
    let (source_block, destination_block) =
        (u64::from(source.minimum_block), u64::from(destination.minimum_block));
    within("queue depth", options.queue_depth as u64, 1, QUEUE_DEPTH_MAX as u64)?;
    if room < size {
        return Err(CopyError::TooSmall { source_size: size, destination: room });
    }
    if size % source_block != 0 {
        let hint = "serve it with smaller blocks, or make its size a multiple of them";
        return Err(CopyError::BlockSize { side: Side::Source, size, block: source.minimum_block, hint });
    }
    let reachable = room - room % destination_block;
    if size.next_multiple_of(destination_block) > reachable {
        let hint = "make it larger by one block";
        let block = destination.minimum_block;
        return Err(CopyError::BlockSize { side: Side::Destination, size: room, block, hint });
    }
    let align = source_block.max(destination_block);
    let maximum = u64::from(source.maximum_block.min(destination.maximum_block)) & !(align - 1);
    let maximum = maximum.clamp(align, u64::from(REQUEST_BYTES_MAX).max(align));
    if let Some(bytes) = options.request_bytes {
        within("request size", bytes.into(), REQUEST_BYTES_MIN.into(), REQUEST_BYTES_MAX.into())?;
    }
    let piece = |bytes: u32| (u64::from(bytes) & !(align - 1)).clamp(align, maximum);
    let request = piece(options.request_bytes.unwrap_or(REQUEST_BYTES_DEFAULT));
    let granule = destination.preferred_block.clamp(GRANULE_MIN, GRANULE_MAX).max(align as u32);
    Ok(Limits {
        size,
        align,
        destination_block,
        request,
        whole_run: if options.request_bytes.is_some() { request } else { piece(WHOLE_RUN_BYTES) },
        granule: granule as usize,
        depth: options.queue_depth,
    })
}

/// Which file a device is, where it is one.
fn file_of(device: &dyn BlockDevice) -> Option<(u64, u64)> {
    let located = device.locate(0, device.geometry().minimum_block.into(), Access::Unseen)?;
    let stat = rustix::fs::fstat(located.file).ok()?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Some((u64::MAX, stat.st_rdev)),
        _ => Some((stat.st_dev, stat.st_ino)),
    }
}

/// Whether a device is a file, or lies in one.
pub(super) fn is_file(device: &dyn BlockDevice) -> bool {
    file_of(device).is_some()
}

/// Refuses to copy a thing onto itself: by the identities that the caller knows, and by the files behind the devices.
pub(super) fn refuse_same(
    source: &Arc<dyn BlockDevice>,
    destination: &Arc<dyn BlockDevice>,
    options: &CopyOptions,
) -> Result<(), CopyError> {
    let same = |identity: String| Err(CopyError::SameDevice { identity });
    match (&options.source_identity, &options.destination_identity) {
        (Some(source), Some(destination)) if source == destination => return same(source.clone()),
        _ => {}
    }
    if std::ptr::addr_eq(Arc::as_ptr(source), Arc::as_ptr(destination)) {
        return same("one device".to_owned());
    }
    match (file_of(source.as_ref()), file_of(destination.as_ref())) {
        (Some(source), Some(destination)) if source == destination => {
            let named = options.destination_identity.clone().or_else(|| options.source_identity.clone());
            same(named.unwrap_or_else(|| "one file".to_owned()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(size: u64, minimum_block: u32, maximum_block: u32) -> Geometry {
        Geometry { size, minimum_block, preferred_block: minimum_block.max(4096), maximum_block }
    }

    #[test]
    fn pieces_keep_the_blocks_and_bounds_of_both() {
        let options = CopyOptions::default();
        let limits = |source, destination| limits(&source, &destination, &options);
        let plain = limits(geometry(1000, 1, 32 << 20), geometry(1000, 1, 32 << 20)).expect("plain");
        assert_eq!((plain.align, plain.request, plain.whole_run), (1, 256 << 10, 1 << 20));
        let mixed =
            limits(geometry(1 << 20, 512, 1 << 20), geometry(1 << 20, 4096, 70_000)).expect("mixed blocks");
        assert_eq!((mixed.align, mixed.request, mixed.whole_run), (4096, 69632, 69632));
        let big = limits(geometry(4 << 20, 1, 32 << 20), geometry(4 << 20, 2 << 20, 32 << 20)).expect("big");
        assert_eq!((big.request, big.granule), (2 << 20, 2 << 20));
    }

    #[test]
    fn what_cannot_be_copied_is_refused() {
        let refuse = |source, destination, options: CopyOptions| {
            limits(&source, &destination, &options).expect_err("refused").to_string()
        };
        let sized = |size| geometry(size, 1, 32 << 20);
        assert!(refuse(sized(11), sized(10), CopyOptions::default()).contains("too small"));
        assert!(refuse(geometry(1000, 512, 4096), sized(2000), CopyOptions::default()).contains("source"));
        let unreachable = refuse(sized(1000), geometry(1000, 512, 4096), CopyOptions::default());
        assert!(unreachable.contains("destination") && unreachable.contains("larger"), "{unreachable}");
        let none = CopyOptions { queue_depth: 0, ..CopyOptions::default() };
        assert!(refuse(sized(1), sized(1), none).contains("queue depth of 0"));
        let small = CopyOptions { request_bytes: Some(1), ..CopyOptions::default() };
        assert!(refuse(sized(1), sized(1), small).contains("request size of 1"));
    }
}

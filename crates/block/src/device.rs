//! The [`BlockDevice`] trait and the types of its requests.

use crate::{Access, Error, ErrorKind, Io, Located, Result, Ticket};

/// Size and block sizes of a device, in bytes. Fixed while the device is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Length of the device in bytes.
    pub size: u64,
    /// Offsets and lengths must be multiples of this power of two; 1 where any will do.
    pub minimum_block: u32,
    /// Requests of this power of two, so aligned, cause no read-modify-write below.
    pub preferred_block: u32,
    /// The longest data request that the device takes in one piece.
    pub maximum_block: u32,
}

/// What a device can do beyond reading. A request that needs a capability the device lacks fails with
/// [`ErrorKind::NotSupported`] (or [`ErrorKind::ReadOnly`]); these flags only say so in advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Takes writes, write-zeroes and trims.
    pub write: bool,
    /// `trim` does something.
    pub trim: bool,
    /// `write_zeroes` works without sending zero bytes.
    pub zero: bool,
    /// `write_zeroes` with `fast_only` is answered truly.
    pub fast_zero: bool,
    /// `extents` knows more than "all data".
    pub extents: bool,
    /// Data written through one handle is seen, and flushed, through every other.
    pub multi_connection: bool,
    /// Some bytes come from elsewhere on first read: `locality` and `prefetch` know more than "all local".
    pub lazy: bool,
    /// Whether seeking costs time, where that is known.
    pub rotational: Option<bool>,
}

/// How a write is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// The data is on stable storage before the request is done (force unit access).
    pub fua: bool,
}

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// The zeroes are on stable storage before the request is done.
    pub fua: bool,
    /// The range must stay allocated: do not punch a hole.
    pub no_hole: bool,
    /// Fail at once with [`ErrorKind::NotSupported`] where this would not be faster than writing zero bytes.
    pub fast_only: bool,
}

/// What lies in a run of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Allocated; may be any bytes.
    Data,
    /// Allocated; reads as zeroes.
    Zero,
    /// Not allocated; reads as zeroes.
    Hole,
}

/// A run of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes; never 0.
    pub length: u64,
    /// What lies there.
    pub kind: ExtentKind,
}

/// A run that is local as a whole, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Locality {
    /// First byte.
    pub offset: u64,
    /// Bytes; never 0.
    pub length: u64,
    /// Reading it fetches nothing from elsewhere.
    pub local: bool,
}

/// Anything that stores bytes by offset. Object safe; shared by reference between any number of threads.
///
/// Rules that every device and layer keeps (the conformance suite checks them):
/// - A request outside `0..size`, or one that breaks `minimum_block`, fails whole and changes nothing.
/// - A read fills the whole buffer or fails; after an error the buffer's content is unspecified.
/// - Requests of length 0 succeed.
/// - After a successful `flush`, or a request with `fua`, the data survives power loss.
/// - Futures are lazy and cancel-safe, as the crate documentation says.
pub trait BlockDevice: Send + Sync {
    /// Size and block sizes.
    fn geometry(&self) -> Geometry;

    /// What the device can do.
    fn capabilities(&self) -> Capabilities;

    /// Fills `buffer` from `offset`.
    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()>;

    /// Writes all of `data` at `offset`. A device that does not say otherwise is read-only.
    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        refuse(&self.geometry(), "write", offset, data.len() as u64)
    }

    /// Makes `length` bytes at `offset` read as zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        refuse(&self.geometry(), "write of zeroes", offset, length)
    }

    /// Says that `length` bytes at `offset` are no longer needed. What they read as afterwards is unspecified, but
    /// it is either the old bytes or zeroes.
    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        refuse(&self.geometry(), "trim", offset, length)
    }

    /// Makes everything that was written before survive power loss.
    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Ok(()))
    }

    /// The kinds of the bytes from `offset`: at least one extent, the first beginning at `offset`, each adjacent to
    /// the one before, none reaching beyond `offset + length`, and at most `limit` of them. They may end early, at
    /// the limit or where looking further would take long: a caller that wants more asks again from their end.
    /// `length` is at least 1 (else [`ErrorKind::Invalid`]); a `limit` of 0 counts as 1. A device that does not say
    /// otherwise is all data.
    fn extents(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Extent>> {
        Io::Ready(whole_device_as(&self.geometry(), ExtentKind::Data, offset, length))
    }

    /// Which of the bytes from `offset` are local, as they are now: they may be fetched, or evicted, the next moment.
    /// Shape, limits and errors are those of [`BlockDevice::extents`]. A device that does not say otherwise is all local.
    fn locality(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Locality>> {
        let checked = check_extents_range(&self.geometry(), offset, length);
        Io::Ready(checked.map(|()| vec![Locality { offset, length, local: true }]))
    }

    /// Brings bytes near that will be read soon: a lazy device fetches them, and is done when they are local. A device
    /// that does not say otherwise has nothing to do.
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        Io::Ready(check_range(&self.geometry(), "prefetch", offset, length))
    }

    /// Where `length` bytes at `offset` lie in a local file, for a transport that lets the kernel move them. `None`: not
    /// local, not in one piece, out of bounds, empty, or not known: use [`BlockDevice::read`], which says why. Never
    /// waits, allocates or takes a lock. A run that has no location now may have one the next time, and the other way
    /// round.
    ///
    /// [`Located`] says what goes for the file. Whoever reads there asks [`BlockDevice::settle`] before the bytes are
    /// given out.
    fn locate(&self, _offset: u64, _length: u64, _access: Access) -> Option<Located<'_>> {
        None
    }

    /// Whether all the bytes of the location of `ticket`, which were read between the two calls, may be given out. If
    /// not, they are forgotten, and [`BlockDevice::read`] brings the right ones. `bytes` are those that were read, and
    /// must be there if the location was asked for with [`Access::Seen`]. Never waits, allocates or takes a lock. Asked
    /// at most once for a ticket; a location that was not read, or not wholly, is not settled at all.
    fn settle(&self, _ticket: Ticket, _bytes: Option<&[u8]>) -> bool {
        true
    }
}

/// The longest request that the devices of this crate ask for in one piece, in bytes; the limit that NBD's
/// specification gives to clients that were told none.
pub const MAXIMUM_BLOCK: u32 = 32 << 20;

/// The answer of a read-only device to whatever would change it.
pub(crate) fn refuse(geometry: &Geometry, operation: &str, offset: u64, length: u64) -> Io<'static, ()> {
    Io::Ready(check_range(geometry, operation, offset, length).and_then(|()| {
        let context = format!("{operation} of {length} bytes at {offset}: the device is read-only");
        Err(Error::new(ErrorKind::ReadOnly, context))
    }))
}

/// The answer to `extents` of a device that is all of one kind.
///
/// # Errors
/// Those of [`check_extents_range`].
pub fn whole_device_as(
    geometry: &Geometry,
    kind: ExtentKind,
    offset: u64,
    length: u64,
) -> Result<Vec<Extent>> {
    check_extents_range(geometry, offset, length)?;
    Ok(vec![Extent { offset, length, kind }])
}

/// Checks the range of an `extents` request, which must not be empty.
///
/// # Errors
/// Those of [`check_range`], and [`ErrorKind::Invalid`] for a length of 0.
pub fn check_extents_range(geometry: &Geometry, offset: u64, length: u64) -> Result<()> {
    check_range(geometry, "extents", offset, length)?;
    if length == 0 {
        let context = format!("extents of 0 bytes at {offset}: an empty range has none");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(())
}

/// Checks that `offset..offset + length` lies inside the device and keeps `minimum_block`.
///
/// # Errors
/// [`ErrorKind::OutOfBounds`] or [`ErrorKind::Invalid`], naming `operation` and the range.
pub fn check_range(geometry: &Geometry, operation: &str, offset: u64, length: u64) -> Result<()> {
    let describe = || format!("{operation} of {length} bytes at {offset}");
    match offset.checked_add(length) {
        Some(end) if end <= geometry.size => {}
        _ => {
            let context = format!("{}: the device ends at {}", describe(), geometry.size);
            return Err(Error::new(ErrorKind::OutOfBounds, context));
        }
    }
    let mask = u64::from(geometry.minimum_block) - 1;
    if (offset | length) & mask != 0 {
        let context = format!("{}: not a multiple of {} bytes", describe(), geometry.minimum_block);
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(())
}

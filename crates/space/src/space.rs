//! The address space as a device: the map says which content an address belongs to, a resolver turns contents into
//! devices.
//!
//! A read of what is mapped and resolved takes no lock, touches no reference count and allocates nothing: the map is
//! read through `arc-swap`, devices lie in slots that are filled once and never emptied. For the same reason there
//! are counters of what is exceptional only; contents count their own reads.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use loam_block::{
    Access, BlockDevice, Capabilities, Error, ErrorKind, Extent, ExtentKind, Geometry, Io, Locality, Located,
    MAXIMUM_BLOCK, Ticket, WriteFlags, ZeroFlags, check_extents_range, check_range,
};
use tokio::sync::OnceCell;

mod near;

use crate::storage::{Directory, Storage};
use crate::{Address, ContentId, Map, Place, Range};

/// Turns a content into the device that holds its bytes.
pub trait Resolver: Send + Sync {
    /// The device of `content`, which `spec` describes. Asked when the content is first read and never again once it
    /// succeeded; one call at a time for each content. After a failure, which is the failure of the read that
    /// asked, the next read asks again.
    ///
    /// The device must take requests at any 4 KiB boundary, and at any byte where the space is read at any byte, and
    /// must always return the same bytes or fail.
    fn resolve<'a>(&'a self, content: ContentId, spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>>;
}

/// What reading an address that no range covers gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unmapped {
    /// [`ErrorKind::Unmapped`], which a kernel sees as `EIO`.
    #[default]
    Error,
    /// Zeroes. Breaks the promise that an address always reads the same, so only for benchmarks.
    Zeros,
}

/// What happened since the address space was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpaceCounters {
    /// Reads that failed because they met an unmapped address.
    pub unmapped_reads: u64,
    /// Reads that failed because a content could not be resolved.
    pub resolve_failures: u64,
    /// Contents that were resolved.
    pub resolved: u64,
}

#[derive(Debug, Default)]
struct AtomicCounters {
    unmapped_reads: AtomicU64,
    resolve_failures: AtomicU64,
    resolved: AtomicU64,
}

type Slot = OnceCell<Arc<dyn BlockDevice>>;

/// Devices by content. Slots come in groups that double in size (1, 2, 4, ...), made when one of theirs is first
/// needed, so that a slot never moves and can be borrowed for as long as the space.
struct Slots {
    groups: [OnceLock<Box<[Slot]>>; 32],
}

impl Slots {
    fn position(content: ContentId) -> (usize, usize) {
        let number = u64::from(content.0) + 1;
        let group = number.ilog2();
        (group as usize, (number - (1 << group)) as usize)
    }

    fn get(&self, content: ContentId) -> Option<&Arc<dyn BlockDevice>> {
        let (group, index) = Slots::position(content);
        self.groups.get(group)?.get()?[index].get()
    }

    /// The slot of a content that the map has (which bounds what is allocated here).
    fn slot(&self, content: ContentId) -> &Slot {
        let (group, index) = Slots::position(content);
        let make = || (0..1usize << group).map(|_| OnceCell::new()).collect();
        &self.groups[group].get_or_init(make)[index]
    }
}

/// The address space of a map as a read-only [`BlockDevice`]. Ranges that are added to the map are seen at once.
pub struct AddressSpace<S: Storage = Directory> {
    map: Arc<Map<S>>,
    resolver: Arc<dyn Resolver>,
    unmapped: Unmapped,
    slots: Slots,
    counters: AtomicCounters,
    size: u64,
}

impl<S: Storage> AddressSpace<S> {
    /// The address space of `map`.
    pub fn new(map: Arc<Map<S>>, resolver: Arc<dyn Resolver>, unmapped: Unmapped) -> Self {
        let size = map.size();
        let slots = Slots { groups: [const { OnceLock::new() }; 32] };
        AddressSpace { map, resolver, unmapped, slots, counters: AtomicCounters::default(), size }
    }

    /// The map.
    pub fn map(&self) -> &Arc<Map<S>> {
        &self.map
    }

    /// What happened so far.
    pub fn counters(&self) -> SpaceCounters {
        SpaceCounters {
            unmapped_reads: self.counters.unmapped_reads.load(Ordering::Relaxed),
            resolve_failures: self.counters.resolve_failures.load(Ordering::Relaxed),
            resolved: self.counters.resolved.load(Ordering::Relaxed),
        }
    }

    /// The device of a content if it has been resolved already.
    pub fn resolved(&self, content: ContentId) -> Option<&Arc<dyn BlockDevice>> {
        self.slots.get(content)
    }

    /// The device of a content, resolved now if it has not been.
    ///
    /// # Errors
    /// What the resolver says, and [`ErrorKind::Unmapped`] for a content that the map does not have.
    pub async fn resolve(&self, content: ContentId) -> loam_block::Result<&Arc<dyn BlockDevice>> {
        if let Some(device) = self.slots.get(content) {
            return Ok(device);
        }
        let Some(spec) = self.map.spec(content) else {
            let context = format!("resolving content {content}: the map has none of this number");
            return Err(Error::new(ErrorKind::Unmapped, context));
        };
        let resolving = self.slots.slot(content).get_or_try_init(|| async {
            let device = self.resolver.resolve(content, &spec).await?;
            self.counters.resolved.fetch_add(1, Ordering::Relaxed);
            Ok(device)
        });
        resolving.await.inspect_err(|_: &Error| {
            self.counters.resolve_failures.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// Reads what lies in one range.
    fn read_range<'a>(&'a self, range: &Range, address: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let content = range.content;
        let offset = range.content_offset + (address - range.start.0);
        match self.slots.get(content) {
            Some(device) => device.read(offset, buffer),
            None => Io::pending(async move { self.resolve(content).await?.read(offset, buffer).await }),
        }
    }

    fn read_parts<'a>(&'a self, mut address: u64, mut buffer: &'a mut [u8]) -> Io<'a, ()> {
        loop {
            let (place, end) = match self.map.locate(Address(address)) {
                Place::Mapped(range) => (Some(range), range.end().0),
                Place::Unmapped { until } => (None, until.0),
            };
            let length = (end - address).min(buffer.len() as u64);
            let (part, rest) = buffer.split_at_mut(length as usize);
            let done = match place {
                Some(range) => self.read_range(&range, address, part),
                None => self.read_unmapped(address, part),
            };
            if rest.is_empty() {
                return done;
            }
            (address, buffer) = (address + length, rest);
            match done {
                Io::Ready(Ok(())) => {}
                Io::Ready(Err(error)) => return Io::Ready(Err(error)),
                pending => return pending.and_then(move || self.read_parts(address, buffer)),
            }
        }
    }

    fn read_unmapped(&self, address: u64, buffer: &mut [u8]) -> Io<'static, ()> {
        match self.unmapped {
            Unmapped::Zeros => {
                buffer.fill(0);
                Io::Ready(Ok(()))
            }
            Unmapped::Error => {
                self.counters.unmapped_reads.fetch_add(1, Ordering::Relaxed);
                let context = format!("read at address {address}: no content has been given to it");
                Io::Ready(Err(Error::new(ErrorKind::Unmapped, context)))
            }
        }
    }

    /// What is unmapped reads as zeroes only where that was asked for; a copier must not take an error for a hole.
    fn collect_extents(&self, offset: u64, length: u64, limit: usize) -> Vec<Extent> {
        if self.unmapped == Unmapped::Error {
            return vec![Extent { offset, length, kind: ExtentKind::Data }];
        }
        let end = offset + length;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        // Neighbouring ranges are one extent, so the limit alone does not bound the work.
        for _ in 0..EXTENT_RANGES_MAX {
            if at >= end {
                break;
            }
            let (kind, stop) = match self.map.locate(Address(at)) {
                Place::Mapped(range) => (ExtentKind::Data, range.end().0.min(end)),
                Place::Unmapped { until } => (ExtentKind::Hole, until.0.min(end)),
            };
            let full = extents.len() >= limit.max(1);
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += stop - at,
                _ if full => break,
                _ => extents.push(Extent { offset: at, length: stop - at, kind }),
            }
            at = stop;
        }
        extents
    }
}

/// Ranges that one `extents` request looks at before it answers with what it has.
const EXTENT_RANGES_MAX: usize = 4096;

impl<S: Storage> BlockDevice for AddressSpace<S> {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK }
    }

    fn capabilities(&self) -> Capabilities {
        let extents = self.unmapped == Unmapped::Zeros;
        Capabilities { extents, multi_connection: true, lazy: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        match check_range(&self.geometry(), "read", offset, buffer.len() as u64) {
            Ok(()) if buffer.is_empty() => Io::Ready(Ok(())),
            Ok(()) => self.read_parts(offset, buffer),
            Err(error) => Io::Ready(Err(error)),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        Io::Ready(refuse(&self.geometry(), "write", offset, data.len() as u64))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        Io::Ready(refuse(&self.geometry(), "write of zeroes", offset, length))
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        Io::Ready(refuse(&self.geometry(), "trim", offset, length))
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Ok(()))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        let checked = check_extents_range(&self.geometry(), offset, length);
        Io::Ready(checked.map(|()| self.collect_extents(offset, length, limit)))
    }

    /// What is unmapped is local: reading it fails, or gives zeroes, but fetches nothing. What lies in a content is as its
    /// device says; a content that was not read yet is resolved for that, and is not local where that fails.
    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        match check_extents_range(&self.geometry(), offset, length) {
            Ok(()) => self.collect_locality(offset, length, limit),
            Err(error) => Io::Ready(Err(error)),
        }
    }

    /// Content by content, in the order of addresses; what is unmapped is passed over.
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        match check_range(&self.geometry(), "prefetch", offset, length) {
            Ok(()) if length == 0 => Io::Ready(Ok(())),
            Ok(()) => self.prefetch_parts(offset, offset + length),
            Err(error) => Io::Ready(Err(error)),
        }
    }

    /// Of what lies in one range of a content that was read before. Ranges never change, so a location is right if it is
    /// right in its content.
    fn locate(&self, offset: u64, length: u64, access: Access) -> Option<Located<'_>> {
        let end = offset.checked_add(length)?;
        let range = self.map.lookup(Address(offset)).filter(|range| end <= range.end().0)?;
        let device = self.slots.get(range.content)?;
        let located = device.locate(range.content_offset + (offset - range.start.0), length, access)?;
        let ticket = located.ticket.routed(route_to(range.content)?)?;
        Some(Located { ticket, ..located })
    }

    fn settle(&self, ticket: Ticket, bytes: Option<&[u8]>) -> bool {
        let device = ticket.route.and_then(|route| self.slots.get(ContentId(route.get() - 1)));
        device.is_some_and(|device| device.settle(ticket.unrouted(), bytes))
    }
}

fn route_to(content: ContentId) -> Option<NonZeroU32> {
    NonZeroU32::new(content.0.checked_add(1)?)
}

/// The answer of a read-only device to whatever would change it.
pub(crate) fn refuse(
    geometry: &Geometry,
    operation: &str,
    offset: u64,
    length: u64,
) -> loam_block::Result<()> {
    check_range(geometry, operation, offset, length)?;
    let context = format!("{operation} of {length} bytes at {offset}: the virtual region never changes");
    Err(Error::new(ErrorKind::ReadOnly, context))
}

impl<S: Storage> std::fmt::Debug for AddressSpace<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressSpace").field("map", &self.map.stats()).finish_non_exhaustive()
    }
}

//! The virtual device: what the kernel sees. Below [`VIRTUAL_BASE`] a prefix (the seed's superblock, and its trees
//! where the layout has them there), from there on the address space. Read-only.

use std::sync::Arc;

use loam_block::{
    Access, BlockDevice, Capabilities, Extent, ExtentKind, Geometry, Io, Locality, Located, MAXIMUM_BLOCK,
    Ticket, WriteFlags, ZeroFlags, check_extents_range, check_range,
};

use crate::space::{AddressSpace, refuse};
use crate::storage::{Directory, Storage};

/// Where the address space begins on the virtual device, in bytes: 1 TiB, clear of the superblock's copies at 64 MiB
/// and 256 GiB.
pub const VIRTUAL_BASE: u64 = 1 << 40;

/// A prefix device, zeroes up to [`VIRTUAL_BASE`], and an address space.
#[derive(Clone)]
pub struct VirtualDevice<S: Storage = Directory> {
    prefix: Arc<dyn BlockDevice>,
    space: Arc<AddressSpace<S>>,
    geometry: Geometry,
}

impl<S: Storage> VirtualDevice<S> {
    /// The virtual device of `space` behind `prefix`, of which nothing from [`VIRTUAL_BASE`] on is seen. `prefix`
    /// must take requests at any byte (a minimum block of 1).
    pub fn new(prefix: Arc<dyn BlockDevice>, space: Arc<AddressSpace<S>>) -> Self {
        let geometry = Geometry {
            size: VIRTUAL_BASE + space.geometry().size,
            minimum_block: 1,
            preferred_block: 4096,
            maximum_block: MAXIMUM_BLOCK,
        };
        VirtualDevice { prefix, space, geometry }
    }

    /// The address space.
    pub fn space(&self) -> &Arc<AddressSpace<S>> {
        &self.space
    }

    /// Where the prefix device's bytes end and zeroes begin.
    fn prefix_end(&self) -> u64 {
        self.prefix.geometry().size.min(VIRTUAL_BASE)
    }

    /// Reads from below the base.
    fn read_below<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let in_prefix = self.prefix_end().saturating_sub(offset).min(buffer.len() as u64);
        let (prefix, zeroes) = buffer.split_at_mut(in_prefix as usize);
        zeroes.fill(0);
        match prefix.is_empty() {
            true => Io::Ready(Ok(())),
            false => self.prefix.read(offset, prefix),
        }
    }
}

impl<S: Storage> BlockDevice for VirtualDevice<S> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { extents: true, multi_connection: true, lazy: true, ..Capabilities::default() }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        if let Err(error) = check_range(&self.geometry, "read", offset, buffer.len() as u64) {
            return Io::Ready(Err(error));
        }
        let Some(below) = VIRTUAL_BASE.checked_sub(offset).filter(|below| *below > 0) else {
            return self.space.read(offset - VIRTUAL_BASE, buffer);
        };
        let below = below.min(buffer.len() as u64) as usize;
        let (below, above) = buffer.split_at_mut(below);
        let first = self.read_below(offset, below);
        match above.is_empty() {
            true => first,
            false => first.and_then(move || self.space.read(0, above)),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _flags: WriteFlags) -> Io<'a, ()> {
        Io::Ready(refuse(&self.geometry, "write", offset, data.len() as u64))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        Io::Ready(refuse(&self.geometry, "write of zeroes", offset, length))
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        Io::Ready(refuse(&self.geometry, "trim", offset, length))
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Ok(()))
    }

    /// Those of the part that `offset` lies in: prefix, zeroes behind it, or address space.
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        if let Err(error) = check_extents_range(&self.geometry, offset, length) {
            return Io::Ready(Err(error));
        }
        let prefix_end = self.prefix_end();
        if offset < prefix_end {
            return self.prefix.extents(offset, length.min(prefix_end - offset), limit);
        }
        if offset < VIRTUAL_BASE {
            let length = length.min(VIRTUAL_BASE - offset);
            return Io::Ready(Ok(vec![Extent { offset, length, kind: ExtentKind::Hole }]));
        }
        match self.space.extents(offset - VIRTUAL_BASE, length, limit) {
            Io::Ready(extents) => Io::Ready(extents.map(shift)),
            pending => Io::pending(async move { pending.await.map(shift) }),
        }
    }

    /// Of the part that `offset` lies in, like extents. Zeroes behind the prefix are local.
    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        if let Err(error) = check_extents_range(&self.geometry, offset, length) {
            return Io::Ready(Err(error));
        }
        let prefix_end = self.prefix_end();
        if offset < prefix_end {
            return self.prefix.locality(offset, length.min(prefix_end - offset), limit);
        }
        if offset < VIRTUAL_BASE {
            let length = length.min(VIRTUAL_BASE - offset);
            return Io::Ready(Ok(vec![Locality { offset, length, local: true }]));
        }
        let shift = |mut runs: Vec<Locality>| {
            runs.iter_mut().for_each(|run| run.offset += VIRTUAL_BASE);
            runs
        };
        match self.space.locality(offset - VIRTUAL_BASE, length, limit) {
            Io::Ready(runs) => Io::Ready(runs.map(shift)),
            pending => Io::pending(async move { pending.await.map(shift) }),
        }
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = check_range(&self.geometry, "prefetch", offset, length) {
            return Io::Ready(Err(error));
        }
        let (end, prefix_end) = (offset + length, self.prefix_end());
        let below = end.min(prefix_end).saturating_sub(offset);
        let first = if below > 0 { self.prefix.prefetch(offset, below) } else { Io::Ready(Ok(())) };
        let address = offset.saturating_sub(VIRTUAL_BASE);
        let above = end.saturating_sub(VIRTUAL_BASE.max(offset));
        first.and_then(move || self.space.prefetch(address, above))
    }

    /// Tickets of the address space are routed to a content; the prefix is one device, whose tickets are not.
    fn locate(&self, offset: u64, length: u64, access: Access) -> Option<Located<'_>> {
        if let Some(address) = offset.checked_sub(VIRTUAL_BASE) {
            return self.space.locate(address, length, access);
        }
        let end = offset.checked_add(length).filter(|end| *end <= self.prefix_end())?;
        let located = self.prefix.locate(offset, end - offset, access);
        located.filter(|located| located.ticket.route.is_none())
    }

    fn settle(&self, ticket: Ticket, bytes: Option<&[u8]>) -> bool {
        match ticket.route {
            Some(_) => self.space.settle(ticket, bytes),
            None => self.prefix.settle(ticket, bytes),
        }
    }
}

fn shift(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.iter_mut().for_each(|extent| extent.offset += VIRTUAL_BASE);
    extents
}

impl<S: Storage> std::fmt::Debug for VirtualDevice<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtualDevice").field("space", &self.space).finish_non_exhaustive()
    }
}

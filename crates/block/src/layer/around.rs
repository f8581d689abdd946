//! Layers that treat all requests alike (`delay`, `log`, `stats`, `fault`, `rate`): each says in one place what it does
//! around a request; [`Layered`] makes that a device.
//!
//! They name no locations: what is read there would pass them by.

use std::sync::Arc;

use super::forward::forward;
use crate::{BlockDevice, Extent, Io, Locality, WriteFlags, ZeroFlags};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `read`
    Read,
    /// `write`
    Write,
    /// `write_zeroes`
    Zero,
    /// `trim`
    Trim,
    /// `flush`
    Flush,
    /// `extents` and `locality`: both are what NBD calls block status.
    Extents,
    /// `prefetch`
    Prefetch,
}

impl Operation {
    /// All, in the order of their discriminants.
    pub const ALL: [Operation; 7] = [
        Operation::Read,
        Operation::Write,
        Operation::Zero,
        Operation::Trim,
        Operation::Flush,
        Operation::Extents,
        Operation::Prefetch,
    ];

    /// As it is written in parameters, logs and statistics.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Zero => "zero",
            Operation::Trim => "trim",
            Operation::Flush => "flush",
            Operation::Extents => "extents",
            Operation::Prefetch => "prefetch",
        }
    }
}

/// A request, for layers that look at its outside only.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Flags that do not belong to the operation are false.
    pub(super) flags: ZeroFlags,
}

impl Request {
    fn new(operation: Operation, offset: u64, length: u64) -> Self {
        Request { operation, offset, length, flags: ZeroFlags::default() }
    }
}

/// What a layer does around every request.
pub(super) trait Around: Send + Sync {
    /// Lets `run`, which makes the request of the device below, go on or not. As `BlockDevice` wants it: ready where
    /// nothing has to be waited for, and without effect as long as a pending answer is not polled.
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T>;
}

/// A device with such a layer around it.
pub(super) struct Layered<L> {
    inner: Arc<dyn BlockDevice>,
    layer: L,
}

impl<L> Layered<L> {
    pub(super) fn new(inner: Arc<dyn BlockDevice>, layer: L) -> Self {
        Layered { inner, layer }
    }
}

impl<L: Around> BlockDevice for Layered<L> {
    forward!(inner: geometry, capabilities);

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let request = Request::new(Operation::Read, offset, buffer.len() as u64);
        self.layer.around(request, move || self.inner.read(offset, buffer))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        let mut request = Request::new(Operation::Write, offset, data.len() as u64);
        request.flags.fua = flags.fua;
        self.layer.around(request, move || self.inner.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let request = Request { flags, ..Request::new(Operation::Zero, offset, length) };
        self.layer.around(request, move || self.inner.write_zeroes(offset, length, flags))
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        let request = Request::new(Operation::Trim, offset, length);
        self.layer.around(request, move || self.inner.trim(offset, length))
    }

    fn flush(&self) -> Io<'_, ()> {
        self.layer.around(Request::new(Operation::Flush, 0, 0), move || self.inner.flush())
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        let request = Request::new(Operation::Extents, offset, length);
        self.layer.around(request, move || self.inner.extents(offset, length, limit))
    }

    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        let request = Request::new(Operation::Extents, offset, length);
        self.layer.around(request, move || self.inner.locality(offset, length, limit))
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        let request = Request::new(Operation::Prefetch, offset, length);
        self.layer.around(request, move || self.inner.prefetch(offset, length))
    }
}

/// Takes back what was done for a request whose pending answer is dropped before it was polled: a caller may do that and
/// make the request again.
pub(super) struct TakeBack<F: FnMut()>(Option<F>);

impl<F: FnMut()> TakeBack<F> {
    pub(super) fn new(take_back: F) -> Self {
        TakeBack(Some(take_back))
    }

    /// The request goes on.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl<F: FnMut()> Drop for TakeBack<F> {
    fn drop(&mut self) {
        if let Some(take_back) = &mut self.0 {
            take_back();
        }
    }
}

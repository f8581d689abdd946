//! How a layer hands on the requests that it has nothing to say about. Every method that is forwarded is named, so what
//! a layer does not name is the trait's own answer (read-only, all data, all local, no location) or written out.

/// Methods of `BlockDevice` that call the same method of a field: `forward!(inner: geometry, read, flush);`
macro_rules! forward {
    ($inner:ident: $($method:ident),+ $(,)?) => { $($crate::layer::forward::forward!(@$method $inner);)+ };
    (@geometry $inner:ident) => {
        fn geometry(&self) -> $crate::Geometry {
            self.$inner.geometry()
        }
    };
    (@capabilities $inner:ident) => {
        fn capabilities(&self) -> $crate::Capabilities {
            self.$inner.capabilities()
        }
    };
    (@read $inner:ident) => {
        fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> $crate::Io<'a, ()> {
            self.$inner.read(offset, buffer)
        }
    };
    (@write $inner:ident) => {
        fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: $crate::WriteFlags) -> $crate::Io<'a, ()> {
            self.$inner.write(offset, data, flags)
        }
    };
    (@write_zeroes $inner:ident) => {
        fn write_zeroes(&self, offset: u64, length: u64, flags: $crate::ZeroFlags) -> $crate::Io<'_, ()> {
            self.$inner.write_zeroes(offset, length, flags)
        }
    };
    (@trim $inner:ident) => {
        fn trim(&self, offset: u64, length: u64) -> $crate::Io<'_, ()> {
            self.$inner.trim(offset, length)
        }
    };
    (@flush $inner:ident) => {
        fn flush(&self) -> $crate::Io<'_, ()> {
            self.$inner.flush()
        }
    };
    (@extents $inner:ident) => {
        fn extents(&self, offset: u64, length: u64, limit: usize) -> $crate::Io<'_, Vec<$crate::Extent>> {
            self.$inner.extents(offset, length, limit)
        }
    };
    (@locality $inner:ident) => {
        fn locality(&self, offset: u64, length: u64, limit: usize) -> $crate::Io<'_, Vec<$crate::Locality>> {
            self.$inner.locality(offset, length, limit)
        }
    };
    (@prefetch $inner:ident) => {
        fn prefetch(&self, offset: u64, length: u64) -> $crate::Io<'_, ()> {
            self.$inner.prefetch(offset, length)
        }
    };
    (@locate $inner:ident) => {
        fn locate(&self, offset: u64, length: u64, access: $crate::Access) -> Option<$crate::Located<'_>> {
            self.$inner.locate(offset, length, access)
        }
    };
    (@settle $inner:ident) => {
        fn settle(&self, ticket: $crate::Ticket, bytes: Option<&[u8]>) -> bool {
            self.$inner.settle(ticket, bytes)
        }
    };
}

pub(super) use forward;

//! [`Paged`]: a long table of atomics whose pages come into memory when they are first needed.
//!
//! Why not a shared mapping of the table file: a mapping answers a disk that is full (the first store to a page of a
//! copy-on-write filesystem), a disk that fails and a file that was cut short with SIGBUS, which ends the daemon. Here
//! those are errors of `read` and `write` like any other. The price is memory that cannot be reclaimed: 1/1024 of the
//! data that was read.

use std::sync::OnceLock;

/// A table of `T`, all of them default until their page is set. Look-ups take no lock.
#[derive(Debug)]
pub(crate) struct Paged<T, const PAGE: usize> {
    pages: Box<[OnceLock<Box<[T; PAGE]>>]>,
}

impl<T, const PAGE: usize> Paged<T, PAGE> {
    pub(crate) fn new(entries: u64) -> Self {
        let pages = entries.div_ceil(PAGE as u64);
        Paged { pages: (0..pages).map(|_| OnceLock::new()).collect() }
    }

    pub(crate) fn page_of(entry: u64) -> usize {
        (entry / PAGE as u64) as usize
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// The page, if it is in memory.
    pub(crate) fn page(&self, page: usize) -> Option<&[T; PAGE]> {
        self.pages.get(page)?.get().map(|page| &**page)
    }

    /// The entry, if its page is in memory.
    pub(crate) fn get(&self, entry: u64) -> Option<&T> {
        self.page(Self::page_of(entry)).map(|page| &page[(entry % PAGE as u64) as usize])
    }

    /// Sets a page unless somebody did before; gives the page that is set. `page` must be inside the table.
    pub(crate) fn set(&self, page: usize, entries: impl FnOnce() -> Box<[T; PAGE]>) -> &[T; PAGE] {
        self.pages[page].get_or_init(entries)
    }
}

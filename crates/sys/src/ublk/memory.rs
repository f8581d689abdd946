//! The memory of a queue: the buffers of its tags, in one mapping, and the right to use one of them elsewhere for a
//! while; and the descriptors of requests, which the driver shares.

use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::wire::{self, IoDescriptor};

const PAGE: usize = 4096;

/// An anonymous mapping of equal buffers. Pages that were never touched take no memory.
pub(super) struct Memory {
    start: NonNull<u8>,
    buffer_bytes: usize,
    count: usize,
}

// SAFETY: it is an address range and a length; who may use which buffer is what `Queue` keeps.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference gives out addresses only.
unsafe impl Sync for Memory {}

impl Memory {
    /// `count` buffers of `buffer_bytes` (whole pages) each.
    pub(super) fn new(count: usize, buffer_bytes: usize) -> std::io::Result<Memory> {
        let bytes = count * buffer_bytes;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // Small requests touch the first page of each buffer: huge pages would make all of it resident.
        // SAFETY: the range is the mapping just made. Advice changes no contents.
        unsafe { libc::madvise(address, bytes, libc::MADV_NOHUGEPAGE) };
        let start = NonNull::new(address.cast());
        let start = start.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Memory { start, buffer_bytes, count })
    }

    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Where buffer `index` begins.
    pub(super) fn at(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.count, "buffer {index} of {}", self.count);
        // SAFETY: inside the mapping (asserted above).
        unsafe { self.start.add(index * self.buffer_bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length; the last user is gone, and a queue that the kernel may yet write
        // for keeps a reference for ever.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * self.buffer_bytes) };
    }
}

/// The buffer of one tag, lent by [`super::Queue::lend`] to whoever fills it elsewhere.
pub struct LentBuffer {
    pub(super) memory: Arc<Memory>,
    pub(super) tag: u16,
}

impl LentBuffer {
    /// Whose buffer it is.
    pub fn tag(&self) -> u16 {
        self.tag
    }
}

impl Deref for LentBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = self.memory.at(usize::from(self.tag));
        // SAFETY: inside the mapping, which `memory` keeps; initialised (mapped as zeroes); while it is lent neither the
        // queue nor the kernel uses it, so this is the only way to it.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.memory.buffer_bytes) }
    }
}

impl DerefMut for LentBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.memory.at(usize::from(self.tag));
        // SAFETY: as in `deref`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.memory.buffer_bytes) }
    }
}

/// The descriptors of a queue's requests, shared by the driver.
pub(super) struct Descriptors {
    start: NonNull<u8>,
    bytes: usize,
}

impl Descriptors {
    pub(super) fn map(device: RawFd, queue: u16, depth: u16) -> std::io::Result<Descriptors> {
        let size_of_queue =
            |depth: u16| (usize::from(depth) * size_of::<IoDescriptor>()).next_multiple_of(PAGE);
        let bytes = size_of_queue(depth);
        let offset = usize::from(queue) * size_of_queue(wire::DEPTH_MAX);
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping of the driver's memory, read-only, touches nothing that exists.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, device, offset as libc::off_t)
        };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(address.cast());
        Ok(Descriptors {
            start: start.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOMEM))?,
            bytes,
        })
    }

    /// A copy of the descriptor of `tag`; `None` beyond the mapping.
    pub(super) fn get(&self, tag: u16) -> Option<IoDescriptor> {
        let index = usize::from(tag);
        if (index + 1) * size_of::<IoDescriptor>() > self.bytes {
            return None;
        }
        let at = self.start.as_ptr().cast::<IoDescriptor>().wrapping_add(index);
        // SAFETY: inside the mapping (checked above), 8-byte aligned (the mapping begins on a page, a descriptor has 24
        // bytes) and valid with any bits; volatile, because the driver may write meanwhile.
        Some(unsafe { at.read_volatile() })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length; nobody else has its address.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

//! Rings that are registered with their thread: io_uring_enter then takes an index instead of a descriptor.

use std::os::fd::RawFd;

const IORING_REGISTER_RING_FDS: libc::c_uint = 20;
const IORING_UNREGISTER_RING_FDS: libc::c_uint = 21;

/// Registers a ring with its thread, which saves a look-up of its descriptor in each call; `None` where that fails, and
/// nothing is lost.
pub(super) fn register(ring: RawFd) -> Option<u32> {
    update(ring, IORING_REGISTER_RING_FDS, u32::MAX, ring as u64)
}

/// Takes a ring back that its thread registered under `index`.
pub(super) fn unregister(ring: RawFd, index: u32) {
    let _ = update(ring, IORING_UNREGISTER_RING_FDS, index, 0);
}

/// Registers a ring, or takes it back; returns its index.
fn update(ring: RawFd, operation: libc::c_uint, index: u32, data: u64) -> Option<u32> {
    /// `struct io_uring_rsrc_update`.
    #[repr(C)]
    struct Update {
        offset: u32,
        reserved: u32,
        data: u64,
    }
    let mut update = Update { offset: index, reserved: 0, data };
    let pointer: *mut Update = &mut update;
    // SAFETY: the kernel reads and writes one struct io_uring_rsrc_update, which `update` is.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, pointer, 1) };
    (result == 1).then_some(update.offset)
}

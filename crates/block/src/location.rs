//! Where bytes lie: the optional capability by which a device names the local file behind a run of its bytes, so that a
//! transport can let the kernel move them: through the ring that the transport has anyway, or, with zero copy, without
//! their passing through this process at all.
//!
//! 1. [`BlockDevice::locate`](crate::BlockDevice::locate) names the file, the offset in it, and a [`Ticket`].
//! 2. The transport reads there: all of the bytes, or it has failed and uses `read`.
//! 3. [`BlockDevice::settle`](crate::BlockDevice::settle) says whether what was read may be given out. If not, `read`.
//!
//! Between 1 and 3 nothing is held: a device that drops bytes (a cache) may do so at any moment, and `settle` finds out.
//! A request that is abandoned after 1 needs no word. `docs/decisions/2026-11-21-where-it-lies.md` has the reasons.

use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;

/// Who sees the bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// This process: the bytes are read into memory of its own, and `settle` is given them.
    Seen,
    /// Nobody: the kernel moves them to where they are wanted, and `settle` is asked without them.
    Unseen,
}

/// Bytes of a device that lie in one piece in a local file.
#[derive(Debug, Clone, Copy)]
pub struct Located<'a> {
    /// The file. It stays open, under this number, for as long as the device exists: it may be registered with a ring
    /// once and known again by its number. If it was opened with `O_DIRECT`, memory that is read into must begin on a
    /// 4096-byte boundary.
    pub file: BorrowedFd<'a>,
    /// Of the first byte in the file. If the file was opened with `O_DIRECT`, this and the length keep its alignment.
    pub offset: u64,
    /// For `settle`.
    pub ticket: Ticket,
}

/// What a device that named a location must know to settle it. Transports keep it and look at none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    /// The first byte, in the device that named the location.
    pub offset: u64,
    /// Whatever that device wants to remember.
    pub proof: u64,
    /// Bytes.
    pub length: u32,
    /// Set by a device that hands requests on to several others: which one.
    pub route: Option<NonZeroU32>,
}

impl Ticket {
    /// A ticket of a device that hands nothing on. `None` where `length` is 0 or more than a ticket holds.
    pub fn new(offset: u64, length: u64, proof: u64) -> Option<Ticket> {
        let length = u32::try_from(length).ok().filter(|length| *length > 0)?;
        Some(Ticket { offset, proof, length, route: None })
    }

    /// This ticket for the device above, which will find the way back by `route`. `None` if a device below has put one
    /// in already: there is room for one.
    pub fn routed(self, route: NonZeroU32) -> Option<Ticket> {
        self.route.is_none().then_some(Ticket { route: Some(route), ..self })
    }

    /// The ticket as the device below gave it.
    pub fn unrouted(self) -> Ticket {
        Ticket { route: None, ..self }
    }
}

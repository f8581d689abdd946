//! What can go wrong with attaching.

use std::path::PathBuf;

/// The result of attaching, detaching, or taking over.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a device could not be attached, taken over, or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a call.
    #[error(transparent)]
    System(#[from] loam_sys::Error),
    /// The device is mounted, or held by someone else exclusively. Nothing was changed.
    #[error("{} is in use: unmount what is on it first", .device.display())]
    Busy {
        /// The block device.
        device: PathBuf,
    },
    /// Nothing holds the device exclusively, but somebody keeps it open. It goes away when they close it.
    #[error("{} is still open in another process; it goes away when that closes it", .device.display())]
    StillOpen {
        /// The block device.
        device: PathBuf,
    },
    /// The kernel cannot send unanswered requests again.
    #[error(
        "this kernel cannot resend FUSE requests (FUSE_HAS_RESEND, Linux 6.9): unmount, and start afresh"
    )]
    CannotResend,
    /// Nobody kept the descriptors of the process that has gone.
    #[error("nobody kept the descriptors of the process that served this device: unmount, and start afresh")]
    NotKept,
    /// What was saved does not belong to what was found.
    #[error("cannot take over the attachment: {0}")]
    Mismatch(String),
    /// The device cannot be served this way.
    #[error("cannot attach: {0}")]
    Unsuitable(String),
    /// This machine does not have the transport, or not for this process.
    #[error("no {transport} here: {why}")]
    Unavailable {
        /// "ublk", "loop".
        transport: &'static str,
        /// What was tried, and what came of it.
        why: String,
        /// What the user can do.
        hint: &'static str,
    },
    /// The holder of descriptors spoke in an unknown way, or ended.
    #[error("descriptor store: {0}")]
    Store(String),
}

impl Error {
    /// What the user can do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Unavailable { hint, .. } => Some(hint),
            Error::System(error) => error.hint(),
            _ => None,
        }
    }
}

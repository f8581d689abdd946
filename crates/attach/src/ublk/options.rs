//! What can be asked of the transport, what the kernel offers, and what is kept of an attachment.

use std::fmt;
use std::str::FromStr;

use loam_sys::ublk::{Transfer, feature};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Queues when nothing else is asked for: as many as there are processors, but no more than this.
const DEFAULT_QUEUES_MAX: u16 = 4;
/// The most queues: each has a thread.
const QUEUES_MAX: u16 = 64;
/// The most requests of one queue: each has a buffer.
const DEPTH_MAX: u16 = 1024;

/// How a device is attached.
#[derive(Debug, Clone)]
pub struct Options {
    /// Names the attachment, once and for ever; `None`: a random number does. Who may die before the state of the
    /// attachment is kept chooses one and keeps it first: see [`lost`](super::lost).
    pub id: Option<u64>,
    /// Queues, each with a thread and a ring, 1 to 64; `None`: as many as processors, at most 4.
    pub queues: Option<u16>,
    /// Requests of each queue that may be under way, 1 to 1024.
    pub depth: u16,
    /// How data gets into the requests' pages.
    pub data_path: DataPath,
    /// Logical block size in bytes: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// Make a device that needs no CAP_SYS_ADMIN, with the limits that the module's documentation lists.
    pub unprivileged: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            id: None,
            queues: None,
            depth: 128,
            data_path: DataPath::Auto,
            block_size: 4096,
            unprivileged: false,
        }
    }
}

impl Options {
    pub(super) fn queues(&self) -> u16 {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let default = || processors().min(usize::from(DEFAULT_QUEUES_MAX)) as u16;
        self.queues.unwrap_or_else(default).clamp(1, QUEUES_MAX)
    }

    pub(super) fn depth(&self) -> u16 {
        self.depth.clamp(1, DEPTH_MAX)
    }
}

/// How the bytes of a read get into the request's pages. Parses from and prints as `auto`, `copy`, `user-copy`,
/// `zero-copy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// What measured best: [`DataPath::Copy`]; `docs/decisions/2026-11-21-ublk-raw.md` has the figures.
    #[default]
    Auto,
    /// The device fills a buffer of this process, the driver copies it.
    Copy,
    /// The device fills a buffer of this process, which a write to the driver copies (Linux 6.5).
    UserCopy,
    /// What lies in a local file is read into the request's pages without passing through this process (Linux 6.16);
    /// the rest goes as [`DataPath::UserCopy`].
    ZeroCopy,
}

const NAMES: [(DataPath, &str); 4] = [
    (DataPath::Auto, "auto"),
    (DataPath::Copy, "copy"),
    (DataPath::UserCopy, "user-copy"),
    (DataPath::ZeroCopy, "zero-copy"),
];

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(path, _)| path == self).map_or("auto", |(_, name)| name);
        f.pad(name)
    }
}

/// A text that names no data path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no data path: write auto, copy, user-copy or zero-copy")]
pub struct ParseDataPathError(String);

impl FromStr for DataPath {
    type Err = ParseDataPathError;

    fn from_str(text: &str) -> Result<Self, ParseDataPathError> {
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(path, _)| *path).ok_or_else(|| ParseDataPathError(text.to_owned()))
    }
}

impl DataPath {
    /// What to use where `features` are offered.
    pub(super) fn resolve(self, features: Features, unprivileged: bool) -> Result<DataPath> {
        let possible = match self {
            DataPath::Auto => return Ok(DataPath::Copy),
            DataPath::Copy => true,
            DataPath::UserCopy => features.user_copy() && !unprivileged,
            DataPath::ZeroCopy => features.zero_copy() && features.auto_buffer() && !unprivileged,
        };
        if possible {
            return Ok(self);
        }
        let why =
            if unprivileged { "unprivileged devices do not have" } else { "this kernel does not offer" };
        Err(Error::Unsuitable(format!("{why} the data path {self}; copy always works")))
    }

    /// The flags that a device with this path is made with.
    pub(super) fn flags(self) -> u64 {
        match self {
            DataPath::Auto | DataPath::Copy => 0,
            DataPath::UserCopy => feature::USER_COPY,
            DataPath::ZeroCopy => feature::USER_COPY | feature::SUPPORT_ZERO_COPY | feature::AUTO_BUF_REG,
        }
    }

    pub(super) fn transfer(self) -> Transfer {
        match self {
            DataPath::Auto | DataPath::Copy => Transfer::Copy,
            DataPath::UserCopy => Transfer::UserCopy,
            DataPath::ZeroCopy => Transfer::Registered,
        }
    }
}

/// What the driver offers (`UBLK_U_CMD_GET_FEATURES`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features(pub u64);

impl Features {
    fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// A device outlives its process, and the requests under way are given to the next.
    pub fn recovery_reissue(self) -> bool {
        self.has(feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE)
    }

    /// [`DataPath::UserCopy`].
    pub fn user_copy(self) -> bool {
        self.has(feature::USER_COPY)
    }

    /// Pages of requests can be registered with a ring.
    pub fn zero_copy(self) -> bool {
        self.has(feature::SUPPORT_ZERO_COPY)
    }

    /// Pages of requests are registered without being asked.
    pub fn auto_buffer(self) -> bool {
        self.has(feature::AUTO_BUF_REG)
    }

    /// Devices without CAP_SYS_ADMIN.
    pub fn unprivileged(self) -> bool {
        self.has(feature::UNPRIVILEGED_DEV)
    }

    /// A device can be stopped on the condition that nobody has it open.
    pub fn safe_stop(self) -> bool {
        self.has(feature::SAFE_STOP_DEV)
    }

    /// Commands for many requests at once.
    pub fn batch(self) -> bool {
        self.has(feature::BATCH_IO)
    }

    /// The kernel can be kept from looking for partitions.
    pub fn no_partition_scan(self) -> bool {
        self.has(feature::NO_AUTO_PART_SCAN)
    }
}

/// What another process needs to find an attachment, take it over, or remove it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Names the attachment: random, and kept by the kernel with the device.
    pub id: u64,
    /// The N of /dev/ublkbN.
    pub number: u32,
    /// Size of the device in bytes.
    pub size: u64,
    /// Queues that the device has.
    pub queues: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// How data travels: never [`DataPath::Auto`].
    pub data_path: DataPath,
    /// The longest request in bytes.
    pub io_bytes_max: u32,
    /// Whether it was made without CAP_SYS_ADMIN.
    pub unprivileged: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_paths_print_what_they_parse_from() {
        for (path, name) in NAMES {
            assert_eq!((path.to_string().as_str(), name.parse()), (name, Ok(path)));
            let json = format!("\"{name}\"");
            assert_eq!(serde_json::from_str::<DataPath>(&json).unwrap(), path);
        }
        assert!("zero_copy".parse::<DataPath>().is_err());
    }

    #[test]
    fn a_path_that_the_kernel_lacks_is_refused() {
        let old = Features(0x7f);
        assert_eq!(DataPath::Auto.resolve(old, false).unwrap(), DataPath::Copy);
        assert!(DataPath::UserCopy.resolve(old, false).is_err());
        assert!(DataPath::ZeroCopy.resolve(old, false).is_err());
        let new = Features(u64::MAX);
        assert_eq!(DataPath::ZeroCopy.resolve(new, false).unwrap(), DataPath::ZeroCopy);
        assert!(DataPath::ZeroCopy.resolve(new, true).is_err());
    }

    #[test]
    fn numbers_are_brought_into_range() {
        let options = Options { queues: Some(0), depth: 0, ..Options::default() };
        assert_eq!((options.queues(), options.depth()), (1, 1));
        let options = Options { queues: Some(u16::MAX), depth: u16::MAX, ..Options::default() };
        assert_eq!((options.queues(), options.depth()), (QUEUES_MAX, DEPTH_MAX));
    }
}

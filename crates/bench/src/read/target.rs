//! What is read: loam's devices in all their variants, and what they are compared with.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::ValueEnum;
use loam_attach::ublk::DataPath;
use loam_block::size::ByteSize;

use crate::serve::Transport;

/// What lies on a loam device, and who reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Layout {
    /// No file system: the block device itself.
    Raw,
    /// btrfs whose trees lie on a local device: what pools have.
    Pair,
    /// btrfs whose trees lie on the served device, mounted as it is.
    Single,
    /// As single, with one data chunk and one extent.
    MegaExtent,
    /// btrfs by stock mkfs and fallocate: extents of at most 256 MiB.
    SmallExtents,
}

/// Where a loam device's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Source {
    /// Computed: the plumbing alone.
    Pattern,
    /// Memory of the server.
    Memory,
    /// The chunk cache, all local, its checksums checked.
    Cache,
    /// A file on a local disk, past the page cache.
    Disk,
}

/// The name of a value, as the command line has it.
pub(crate) fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

/// One of loam's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoamTarget {
    pub(crate) transport: Transport,
    pub(crate) layout: Layout,
    pub(crate) source: Source,
    /// Bytes of the virtual region; 0 for a raw device, which has none.
    pub(crate) virtual_size: ByteSize,
    /// Bytes of the file that is read, or of the raw device.
    pub(crate) clone_size: ByteSize,
    /// `None`: what the transport chooses.
    pub(crate) queues: Option<u16>,
    pub(crate) data_path: DataPath,
}

impl fmt::Display for LoamTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loam {} {} {}", word(self.transport), word(self.layout), word(self.source))?;
        if self.virtual_size.0 > 0 {
            write!(f, " {}", self.virtual_size)?;
        }
        if let Some(queues) = self.queues {
            write!(f, " {queues}q")?;
        }
        if self.data_path != DataPath::Auto {
            write!(f, " {}", self.data_path)?;
        }
        Ok(())
    }
}

/// What loam is compared with, over the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Reference {
    /// btrfs on a RAM disk of the kernel (brd).
    BtrfsBrd,
    /// ext4 on a RAM disk.
    Ext4Brd,
    /// A RAM disk itself.
    Brd,
    /// A file on tmpfs.
    Tmpfs,
    /// The file of the barest FUSE server.
    Fuse,
    /// A loop device on that.
    FuseLoop,
    /// rublk's null target: it copies nothing and looks nothing up.
    RublkNull,
    /// The same with zero copy.
    RublkNullZeroCopy,
    /// rublk's loop target on a tmpfs file, through the page cache.
    RublkLoop,
    /// The same by direct reads of the tmpfs file.
    RublkLoopDirect,
    /// btrfs on rublk-loop.
    BtrfsRublkLoop,
    /// btrfs on rublk-loop-direct.
    BtrfsRublkLoopDirect,
    /// The kernel's loop device on a tmpfs file.
    LoopTmpfs,
    /// btrfs on that.
    BtrfsLoopTmpfs,
    /// /dev/zero, which takes no direct reads.
    DevZero,
}

/// Anything that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Loam(LoamTarget),
    Reference { kind: Reference, size: ByteSize },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Loam(loam) => loam.fmt(f),
            Target::Reference { kind, .. } => f.write_str(&word(*kind)),
        }
    }
}

impl Target {
    /// As a record has them.
    pub(crate) fn options(&self) -> BTreeMap<String, String> {
        let mut options = BTreeMap::new();
        let mut set = |name: &str, value: String| _ = options.insert(name.to_string(), value);
        match self {
            Target::Loam(loam) => {
                set("transport", word(loam.transport));
                set("layout", word(loam.layout));
                set("content", word(loam.source));
                if loam.virtual_size.0 > 0 {
                    set("virtual_size", loam.virtual_size.to_string());
                }
                set("queues", loam.queues.map_or("auto".into(), |queues| queues.to_string()));
                if loam.transport == Transport::Ublk {
                    set("data_path", loam.data_path.to_string());
                }
            }
            Target::Reference { kind, .. } => set("reference", word(*kind)),
        }
        set("clone_size", self.size().to_string());
        options
    }

    /// Bytes that are read.
    pub(crate) fn size(&self) -> ByteSize {
        match self {
            Target::Loam(loam) => loam.clone_size,
            Target::Reference { size, .. } => *size,
        }
    }
}

/// A number of queues or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queues(pub(crate) Option<u16>);

impl FromStr for Queues {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Queues(None)),
            number => {
                number.parse().map(|number| Queues(Some(number))).context("a number of queues, or auto")
            }
        }
    }
}

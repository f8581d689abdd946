//! Which servers are put under which load.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use loam_block::size::ByteSize;

use super::load::Operation;
use super::server::{Device, Kind};

/// What the bytes of a server come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Medium {
    Memory,
    /// On tmpfs.
    File,
    Null,
}

impl fmt::Display for Medium {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Medium::Memory => "memory",
            Medium::File => "file",
            Medium::Null => "null",
        })
    }
}

/// A server of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) kind: Kind,
    pub(super) medium: Medium,
}

impl Target {
    /// All that there are.
    pub(super) const ALL: [Target; 9] = [
        Target { kind: Kind::Echo, medium: Medium::Null },
        Target { kind: Kind::Loam, medium: Medium::Memory },
        Target { kind: Kind::Nbdkit, medium: Medium::Memory },
        Target { kind: Kind::Loam, medium: Medium::File },
        Target { kind: Kind::Nbdkit, medium: Medium::File },
        Target { kind: Kind::QemuNbd, medium: Medium::File },
        Target { kind: Kind::Loam, medium: Medium::Null },
        Target { kind: Kind::Nbdkit, medium: Medium::Null },
        Target { kind: Kind::QemuNbd, medium: Medium::Null },
    ];

    pub(super) fn device(self, size: u64, file: &Path) -> Device {
        match self.medium {
            Medium::Memory => Device::Memory(size),
            Medium::File => Device::File(file.to_path_buf()),
            Medium::Null => Device::Null(size),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Echo => formatter.write_str("echo"),
            kind => write!(formatter, "{kind} {}", self.medium),
        }
    }
}

/// What a server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workload {
    pub(super) operation: Operation,
    pub(super) block: u64,
    pub(super) depth: u32,
    pub(super) connections: u32,
}

const fn workload(operation: Operation, block: u64, depth: u32, connections: u32) -> Workload {
    Workload { operation, block, depth, connections }
}

impl Workload {
    pub(super) const ALL: [Workload; 6] = [
        workload(Operation::Randread, 4 << 10, 64, 1),
        workload(Operation::Randread, 4 << 10, 64, 4),
        workload(Operation::Randread, 4 << 10, 1, 1),
        workload(Operation::Randwrite, 4 << 10, 64, 1),
        workload(Operation::Read, 1 << 20, 8, 1),
        workload(Operation::Write, 1 << 20, 8, 1),
    ];

    fn verb(self) -> &'static str {
        match self.operation {
            Operation::Randread => "random reads",
            Operation::Read => "reads",
            Operation::Randwrite => "random writes",
            Operation::Write | Operation::Fill => "writes",
        }
    }

    /// As [`crate::record::Record::options`], together with the target.
    pub(super) fn options(self, target: Target) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("server".to_string(), target.kind.to_string()),
            ("device".into(), target.medium.to_string()),
            ("operation".into(), self.verb().into()),
            ("block".into(), ByteSize(self.block).to_string()),
            ("depth".into(), self.depth.to_string()),
            ("connections".into(), self.connections.to_string()),
        ])
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.connections == 1 { "" } else { "s" };
        let Workload { block, depth, connections, .. } = *self;
        let verb = self.verb();
        write!(formatter, "{verb} of {}, depth {depth}, {connections} connection{plural}", ByteSize(block))
    }
}

/// The setting of the case of connections that do nothing.
pub(super) fn idle(connections: u32) -> String {
    format!("{connections} idle connections")
}

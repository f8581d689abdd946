//! The cases: who copies, to what kind of server, with holes of what size.

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;

use anyhow::Result;
use loam_block::size::ByteSize;

use crate::nbd::copy;
use crate::nbd::server::{self, Kind};
use crate::record::Case;

/// What zeroing is like on a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zeroing {
    /// Much faster than writing, for any length.
    Fast,
    /// As slow as writing zeroes; a fast zero is refused.
    Slow,
    /// Not offered.
    None,
}

impl Zeroing {
    pub(super) const ALL: [Zeroing; 3] = [Zeroing::Fast, Zeroing::Slow, Zeroing::None];
}

impl fmt::Display for Zeroing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Zeroing::Fast => "fast zeroing",
            Zeroing::Slow => "slow zeroing",
            Zeroing::None => "no zeroing",
        })
    }
}

/// Who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copier {
    /// `loam copy --zero` with this.
    Loam(&'static str),
    Peer(copy::Copier),
}

/// The strategy that decides by itself.
pub(super) const AUTO: &str = "auto";
/// Those of history.
const STRATEGIES: [&str; 4] = ["write", "prezero", "guess", "fast"];
pub(super) const PEERS: [copy::Copier; 2] = [copy::Copier::Nbdcopy, copy::Copier::QemuImg];

impl Copier {
    /// In the order of reports.
    pub(super) fn all() -> Vec<Copier> {
        let own = std::iter::once(AUTO).chain(STRATEGIES).map(Copier::Loam);
        own.chain(PEERS.map(Copier::Peer)).collect()
    }

    pub(super) fn command(self, source: &str, destination: &str) -> Result<Command> {
        match self {
            Copier::Peer(peer) => peer.command(source, destination),
            Copier::Loam(strategy) => {
                let mut command = server::loam()?;
                command.args(["copy", "--json", "--zero", strategy, source, destination]);
                Ok(command)
            }
        }
    }
}

impl fmt::Display for Copier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Copier::Loam(strategy) => write!(formatter, "loam {strategy}"),
            Copier::Peer(peer) => peer.fmt(formatter),
        }
    }
}

/// A case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) server: Kind,
    pub(super) zeroing: Zeroing,
    /// Bytes of each hole, and of the data between two.
    pub(super) hole: u64,
    /// Bytes of the image.
    pub(super) size: u64,
    pub(super) copier: Copier,
}

impl Point {
    /// Runs of data in the image.
    pub(super) fn data_runs(&self) -> u64 {
        self.size.div_ceil(2 * self.hole)
    }

    pub(super) fn case(&self, round: u32) -> Case {
        let options = BTreeMap::from([
            ("server".to_string(), self.server.to_string()),
            ("zeroing".into(), self.zeroing.to_string()),
            ("hole_bytes".into(), self.hole.to_string()),
            ("size_bytes".into(), self.size.to_string()),
            ("copier".into(), self.copier.to_string()),
        ]);
        let setting = setting(self.server, self.zeroing, self.hole);
        Case { bench: "zero", setting, case: self.copier.to_string(), round, options }
    }
}

/// What copiers are compared under.
pub(super) fn setting(server: Kind, zeroing: Zeroing, hole: u64) -> String {
    format!("{server}, {zeroing}, holes of {}", ByteSize(hole))
}

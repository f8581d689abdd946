//! Copies of a half sparse image from every kind of server to every kind: loam's copier beside nbdcopy and qemu-img. The
//! processors that copier and servers use count as much as the time.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use rand::seq::SliceRandom;

use super::Options;
use super::load::stamped;
use super::server::{self, Device, Kind, Server};
use crate::cpu::Snapshot;
use crate::process::timed;
use crate::record::{Case, Metrics, Recorder};

/// Data and holes alternate in runs of this many bytes.
const RUN: u64 = 1 << 20;
/// Connections that servers take, beside that of the copier's own.
const CONNECTIONS: u32 = 16;

/// A program that copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copier {
    Loam,
    Nbdcopy,
    /// As fast as it goes: out of order, sixteen requests at a time.
    QemuImg,
}

impl Copier {
    pub(crate) const ALL: [Copier; 3] = [Copier::Loam, Copier::Nbdcopy, Copier::QemuImg];

    /// From one URI or path to another, which exists.
    pub(crate) fn command(self, source: &str, destination: &str) -> Result<Command> {
        let mut command = match self {
            Copier::Loam => server::loam()?,
            Copier::Nbdcopy => Command::new("nbdcopy"),
            Copier::QemuImg => Command::new("qemu-img"),
        };
        match self {
            Copier::Loam => command.args(["copy", "--json"]),
            Copier::Nbdcopy => &mut command,
            Copier::QemuImg => command.args(["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"]),
        };
        command.args([source, destination]);
        Ok(command)
    }
}

impl fmt::Display for Copier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Copier::Loam => "loam copy",
            Copier::Nbdcopy => "nbdcopy",
            Copier::QemuImg => "qemu-img -W",
        })
    }
}

/// What lies at one end: a server of a file, or the file itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Server(Kind),
    File,
}

const ENDS: [End; 4] =
    [End::Server(Kind::Loam), End::Server(Kind::Nbdkit), End::Server(Kind::QemuNbd), End::File];

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Server(kind) => kind.fmt(formatter),
            End::File => formatter.write_str("file"),
        }
    }
}

/// An end that can be copied from or to.
struct OpenEnd {
    /// URI or path.
    name: String,
    server: Option<Server>,
}

impl OpenEnd {
    fn open(end: End, path: &Path, socket: &Path) -> Result<Self> {
        let End::Server(kind) = end else {
            return Ok(OpenEnd { name: path.display().to_string(), server: None });
        };
        let _ = std::fs::remove_file(socket);
        let command = server::command(kind, &Device::File(path.to_path_buf()), socket, CONNECTIONS + 1)?;
        let server = Server::start(command.context("every server has files")?, socket)?;
        Ok(OpenEnd { name: server.uri(), server: Some(server) })
    }
}

pub(super) fn run(options: &Options, directory: &Path, mut recorder: Recorder) -> Result<()> {
    let (source, destination) = (directory.join("source"), directory.join("destination"));
    make_half_sparse(&source, options.size())?;
    for round in 0..options.common.rounds() {
        let mut random = options.random(round);
        let mut pairs: Vec<(End, End)> = ENDS.iter().flat_map(|from| ENDS.map(|to| (*from, to))).collect();
        let chosen = |end: &End| match end {
            End::Server(kind) => options.has(*kind),
            End::File => true,
        };
        pairs.retain(|(from, to)| chosen(from) && chosen(to));
        pairs.shuffle(&mut random);
        for (from, to) in pairs {
            let mut copiers = Copier::ALL;
            copiers.shuffle(&mut random);
            for copier in copiers {
                let case = case(copier, (from, to), options.size(), round);
                if recorder.has(&case) {
                    continue;
                }
                let paths = Paths { directory, source: &source, destination: &destination };
                let ends = paths.open(from, to, options.size());
                match ends {
                    Ok(ends) => recorder.measure_case(&case, || {
                        let metrics = measure(copier, &ends)?;
                        drop(ends);
                        check(&destination, options.size())?;
                        Ok(metrics)
                    })?,
                    Err(error) => recorder.unavailable(&case, &format!("{error:#}"))?,
                }
            }
        }
    }
    Ok(())
}

struct Paths<'a> {
    directory: &'a Path,
    source: &'a PathBuf,
    destination: &'a PathBuf,
}

impl Paths<'_> {
    /// Both ends; the destination is new and all hole.
    fn open(&self, from: End, to: End, size: u64) -> Result<(OpenEnd, OpenEnd)> {
        File::create(self.destination)?.set_len(size)?;
        let from = OpenEnd::open(from, self.source, &self.directory.join("from"))?;
        Ok((from, OpenEnd::open(to, self.destination, &self.directory.join("to"))?))
    }
}

fn case(copier: Copier, (from, to): (End, End), size: u64, round: u32) -> Case {
    let options = BTreeMap::from([
        ("copier".to_string(), copier.to_string()),
        ("from".into(), from.to_string()),
        ("to".into(), to.to_string()),
        ("size".into(), ByteSize(size).to_string()),
    ]);
    Case { bench: "copy", setting: format!("{from} to {to}"), case: copier.to_string(), round, options }
}

fn measure(copier: Copier, (from, to): &(OpenEnd, OpenEnd)) -> Result<Metrics> {
    let servers = [from, to].into_iter().flat_map(|end| &end.server);
    let servers: Vec<u32> = servers.map(Server::process).collect();
    let mut command = copier.command(&from.name, &to.name)?;
    let before = Snapshot::take(&servers)?;
    let (_, elapsed) = timed(&mut command)?;
    let used = Snapshot::take(&servers)?.since(before);
    let (copier, servers) = (used.children.total(), used.servers.total());
    Ok(Metrics::from([
        ("copy_seconds".to_string(), elapsed.as_secs_f64()),
        ("copier_cpu_seconds".into(), copier),
        ("servers_cpu_seconds".into(), servers),
        ("total_cpu_seconds".into(), copier + servers),
    ]))
}

/// The even runs hold stamped data, the odd ones are holes.
fn make_half_sparse(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(size)?;
    for offset in (0..size).step_by(2 * RUN as usize) {
        file.write_all_at(&stamped(offset, RUN.min(size - offset) as usize), offset)?;
    }
    Ok(())
}

/// Fails unless a file holds what [`make_half_sparse`] writes.
fn check(path: &Path, size: u64) -> Result<()> {
    let file = File::open(path)?;
    ensure!(file.metadata()?.len() == size, "the copy is {} bytes long", file.metadata()?.len());
    let mut found = vec![0; RUN as usize];
    let zeroes = vec![0; RUN as usize];
    for offset in (0..size).step_by(RUN as usize) {
        let found = &mut found[..RUN.min(size - offset) as usize];
        file.read_exact_at(found, offset)?;
        let is_right = match (offset / RUN).is_multiple_of(2) {
            true => *found == stamped(offset, found.len()),
            false => *found == zeroes[..found.len()],
        };
        ensure!(is_right, "the copy differs between {offset} and {}", offset + found.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_differs_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        make_half_sparse(&path, 5 * RUN).unwrap();
        check(&path, 5 * RUN).unwrap();
        assert!(check(&path, 4 * RUN).is_err());
        let file = File::options().write(true).open(&path).unwrap();
        for offset in [RUN + 77, 2 * RUN + 5000] {
            let byte = if offset < 2 * RUN { 1 } else { 0 };
            file.write_all_at(&[byte], offset).unwrap();
            assert!(check(&path, 5 * RUN).is_err(), "{offset}");
            make_half_sparse(&path, 5 * RUN).unwrap();
        }
    }
}

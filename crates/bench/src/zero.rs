//! What zeroes are worth: an image of alternating data and holes is copied to servers on which each write takes time,
//! and zeroing is fast, slow, or not to be had. `loam copy` by each of its strategies, beside nbdcopy and qemu-img; on
//! nbdkit with its filters, and on loam with its layers, which do the same. The servers count the commands.

mod plan;
mod report;
mod server;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Common;
use crate::nbd::load::stamped;
use crate::nbd::server::{Kind, Server};
use crate::process::timed;
use crate::record::{Metrics, Recorder};
use plan::{Copier, Point, Zeroing};
pub(crate) use report::SECTION;

/// `loam bench zero`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sizes of the holes, and of the data between them [default: 64KiB,256KiB,1MiB,4MiB,16MiB,64MiB; with --quick 1MiB].
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',')]
    holes: Vec<ByteSize>,
    /// Servers that are copied to [default: loam,nbdkit].
    #[arg(long, value_name = "SERVER,...", value_delimiter = ',')]
    servers: Vec<Kind>,
    /// What is copied, in bytes [default: 100MiB; with --quick 8MiB].
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// Decides the order of cases.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// A directory in memory, for files and sockets.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    scratch: PathBuf,
    #[command(flatten)]
    common: Common,
}

impl Options {
    fn holes(&self) -> Vec<u64> {
        match (self.holes.as_slice(), self.common.quick) {
            ([], true) => vec![1 << 20],
            ([], false) => [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20].to_vec(),
            (given, _) => given.iter().map(|size| size.0).collect(),
        }
    }

    fn servers(&self) -> Vec<Kind> {
        if self.servers.is_empty() { vec![Kind::Loam, Kind::Nbdkit] } else { self.servers.clone() }
    }

    fn size(&self) -> u64 {
        self.size.map_or(if self.common.quick { 8 << 20 } else { 100 << 20 }, |size| size.0)
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let (holes, servers, size) = (options.holes(), options.servers(), options.size());
    ensure!(
        holes.iter().all(|hole| *hole > 0 && hole.is_multiple_of(4096))
            && size.is_multiple_of(4096)
            && size > 0,
        "holes and the image are multiples of 4KiB"
    );
    ensure!(
        servers.iter().all(|kind| matches!(kind, Kind::Loam | Kind::Nbdkit)),
        "only loam and nbdkit have layers that make writes and zeroes slow"
    );
    let directory = tempfile::Builder::new().prefix("loam-bench-").tempdir_in(&options.scratch);
    let directory = directory.with_context(|| format!("cannot write to {}", options.scratch.display()))?;
    let mut recorder = Recorder::open(&options.common.out)?;
    for round in 0..options.common.rounds() {
        let mut random = StdRng::seed_from_u64(options.seed.wrapping_add(u64::from(round)));
        let mut settings: Vec<(Kind, Zeroing, u64)> = Vec::new();
        for server in &servers {
            for zeroing in Zeroing::ALL {
                settings.extend(holes.iter().map(|hole| (*server, zeroing, *hole)));
            }
        }
        settings.shuffle(&mut random);
        for (server, zeroing, hole) in settings {
            let source = directory.path().join(format!("source-{hole}"));
            if !source.exists() {
                make_source(&source, size, hole)?;
            }
            let mut copiers = Copier::all();
            copiers.shuffle(&mut random);
            for copier in copiers {
                let point = Point { server, zeroing, hole, size, copier };
                let case = point.case(round);
                if !recorder.has(&case) {
                    measure(&mut recorder, &point, round, &source, directory.path())?;
                }
            }
        }
    }
    Ok(())
}

/// Starts a server, copies to it, and looks at what it has then.
fn measure(
    recorder: &mut Recorder,
    point: &Point,
    round: u32,
    source: &Path,
    directory: &Path,
) -> Result<()> {
    let (socket, log) = (directory.join("socket"), directory.join("log"));
    for old in [&socket, &log] {
        let _ = std::fs::remove_file(old);
    }
    let command = server::command(point.server, point.zeroing, point.size, &socket, &log)?;
    let server = match Server::start(command, &socket) {
        Ok(server) => server,
        Err(error) => return recorder.unavailable(&point.case(round), &format!("{error:#}")),
    };
    recorder.measure_case(&point.case(round), || {
        let mut copy = point.copier.command(&source.display().to_string(), &server.uri())?;
        let (_, elapsed) = timed(&mut copy)?;
        let log = std::fs::read_to_string(&log).context("the server's log")?;
        let commands = server::Commands::of(&log);
        server::check(&socket, point.size, |offset, length| expected(point.hole, offset, length))?;
        let mut metrics = Metrics::from([("copy_seconds".to_string(), elapsed.as_secs_f64())]);
        metrics.extend(commands.metrics());
        metrics.insert("data_runs".into(), point.data_runs() as f64);
        Ok(metrics)
    })
}

/// Data and holes in turn, data first.
fn make_source(path: &Path, size: u64, hole: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(size)?;
    for offset in (0..size).step_by(2 * hole as usize) {
        file.write_all_at(&stamped(offset, hole.min(size - offset) as usize), offset)?;
    }
    Ok(())
}

/// What a copy holds in `length` bytes from `offset`.
fn expected(hole: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let end = offset + length as u64;
    let mut at = offset;
    while at < end {
        let next = ((at / hole + 1) * hole).min(end);
        if (at / hole).is_multiple_of(2) {
            let run = (at - offset) as usize..(next - offset) as usize;
            let data = stamped(at, run.len());
            bytes[run].copy_from_slice(&data);
        }
        at = next;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_is_what_the_source_holds() {
        let directory = tempfile::tempdir().unwrap();
        for hole in [4096, 12288, 65536] {
            let path = directory.path().join(hole.to_string());
            make_source(&path, 200 << 10, hole).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            for (offset, length) in [(0, 200 << 10), (4096, 8192), (8192, 65536)] {
                assert_eq!(expected(hole, offset, length), bytes[offset as usize..offset as usize + length]);
            }
        }
    }
}

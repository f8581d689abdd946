//! NBD servers under raw load, and copiers between them: loam beside nbdkit and qemu-nbd, and beside a bare loop that
//! answers without a device, which shows what the socket can do. All over Unix sockets, every byte in memory.
//!
//! A round starts every server, and puts one workload after the other, shuffled, on all of them, shuffled as well: what
//! is compared was measured within seconds.

pub(crate) mod copy;
mod copy_report;
pub(crate) mod echo;
pub(crate) mod load;
mod plan;
mod report;
pub(crate) mod server;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rustix::process::{Resource, Rlimit};
use tempfile::TempDir;

use crate::Common;
use crate::cpu::Snapshot;
use crate::process::timed;
use crate::record::{Case, Metrics, Recorder};
pub(crate) use copy_report::SECTION as COPY_SECTION;
use load::{Operation, Outcome};
use plan::{Medium, Target, Workload};
pub(crate) use report::SECTION as LOAD_SECTION;
use server::{Kind, Server};

/// Descriptors that a process with so many connections needs beside them.
const DESCRIPTORS_SPARE: u64 = 100;
/// What a server is first filled with, in requests of this many bytes.
const FILL_BLOCK: u64 = 1 << 20;

/// `loam bench nbd`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure copies from each kind of server to each, instead of load.
    #[arg(long)]
    copy: bool,
    /// Servers that are compared [default: all].
    #[arg(long, value_name = "SERVER,...", value_delimiter = ',')]
    servers: Vec<Kind>,
    /// Bytes of each export [default: 512MiB; copies: 2GiB; with --quick 64MiB].
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// How long each load lasts [default: 1.5; with --quick 0.2].
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Connections that do nothing [default: 1000; with --quick 50]; 0 for none.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    idle: Option<u32>,
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
    fn size(&self) -> u64 {
        let full = if self.copy { 2 << 30 } else { 512 << 20 };
        self.size.map_or(if self.common.quick { 64 << 20 } else { full }, |size| size.0)
    }

    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.common.quick { 0.2 } else { 1.5 })
    }

    fn idle(&self) -> u32 {
        self.idle.unwrap_or(if self.common.quick { 50 } else { 1000 })
    }

    fn has(&self, kind: Kind) -> bool {
        self.servers.is_empty() || self.servers.contains(&kind)
    }

    fn random(&self, round: u32) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_add(u64::from(round)))
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let size = options.size();
    ensure!(
        size >= 4 * FILL_BLOCK && size.is_multiple_of(FILL_BLOCK),
        "the size is to be a multiple of 1MiB, 4MiB at least"
    );
    allow_descriptors(u64::from(options.idle()) + DESCRIPTORS_SPARE)?;
    let directory = tempfile::Builder::new().prefix("loam-bench-").tempdir_in(&options.scratch);
    let directory = directory.with_context(|| format!("cannot write to {}", options.scratch.display()))?;
    let recorder = Recorder::open(&options.common.out)?;
    if options.copy {
        return copy::run(options, directory.path(), recorder);
    }
    let mut runner = Runner { options, directory, recorder };
    for round in 0..options.common.rounds() {
        runner.round(round)?;
        if options.idle() > 0 {
            for kind in [Kind::Loam, Kind::Nbdkit, Kind::QemuNbd] {
                runner.idle(kind, round)?;
            }
        }
    }
    Ok(())
}

/// This process and its children may open so many files.
pub(crate) fn allow_descriptors(count: u64) -> Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        let maximum = limit.maximum.map(|maximum| maximum.max(count));
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum })
            .with_context(|| format!("{count} open files are not allowed"))?;
    }
    Ok(())
}

struct Runner<'a> {
    options: &'a Options,
    directory: TempDir,
    recorder: Recorder,
}

impl Runner<'_> {
    fn round(&mut self, round: u32) -> Result<()> {
        let mut random = self.options.random(round);
        let mut workloads = Workload::ALL;
        workloads.shuffle(&mut random);
        let mut targets: Vec<Target> =
            Target::ALL.into_iter().filter(|target| self.options.has(target.kind)).collect();
        let mut servers = BTreeMap::new();
        for workload in workloads {
            targets.shuffle(&mut random);
            for target in &targets {
                let case = case(*target, workload, round);
                if self.recorder.has(&case) {
                    continue;
                }
                let server = match servers.entry(*target) {
                    std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::btree_map::Entry::Vacant(entry) => entry.insert(
                        start(*target, self.options.size(), self.directory.path())
                            .map_err(|e| format!("{e:#}")),
                    ),
                };
                match server {
                    Ok(server) => {
                        let seconds = self.options.seconds();
                        self.recorder.measure_case(&case, || measure(server, *target, workload, seconds))?;
                    }
                    Err(reason) => self.recorder.unavailable(&case, reason)?,
                }
            }
        }
        Ok(())
    }

    /// How much memory connections take that do nothing.
    fn idle(&mut self, kind: Kind, round: u32) -> Result<()> {
        let connections = self.options.idle();
        let target = Target { kind, medium: Medium::Null };
        let options = BTreeMap::from([
            ("server".to_string(), kind.to_string()),
            ("connections".into(), connections.to_string()),
        ]);
        let (setting, name) = (plan::idle(connections), target.to_string());
        let case = Case { bench: "nbd", setting, case: name, round, options };
        if !self.options.has(kind) || self.recorder.has(&case) {
            return Ok(());
        }
        let socket = self.directory.path().join("idle");
        let device = target.device(1 << 30, &socket);
        let command = server::command(kind, &device, &socket, connections + 1)?;
        let mut command = command.context("every server has a null device")?;
        if kind == Kind::Nbdkit {
            // It has sixteen threads for each connection unless it is told otherwise.
            let program = std::mem::replace(&mut command, std::process::Command::new("nbdkit"));
            command.arg("--threads=1").args(program.get_args());
        }
        let server = match Server::start(command, &socket) {
            Ok(server) => server,
            Err(error) => return self.recorder.unavailable(&case, &format!("{error:#}")),
        };
        self.recorder.measure_case(&case, || {
            let before = server.resident_bytes()?;
            let open = (0..connections).map(|_| Ok(wire::connect(&socket, "", false)?.0));
            let open: Vec<_> = open.collect::<Result<_>>()?;
            let after = server.resident_bytes()?;
            drop(open);
            Ok(Metrics::from([
                ("resident_bytes".to_string(), after as f64),
                ("resident_before_bytes".into(), before as f64),
                (
                    "each_connection_bytes".into(),
                    after.saturating_sub(before) as f64 / f64::from(connections),
                ),
            ]))
        })
    }
}

fn case(target: Target, workload: Workload, round: u32) -> Case {
    let (setting, case) = (workload.to_string(), target.to_string());
    Case { bench: "nbd", setting, case, round, options: workload.options(target) }
}

/// A server whose bytes are stamped.
fn start(target: Target, size: u64, directory: &std::path::Path) -> Result<Server> {
    let socket = directory.join(target.to_string().replace(' ', "-"));
    let file = directory.join("data");
    let connections = Workload::ALL.iter().map(|workload| workload.connections).max().unwrap_or(1) + 1;
    let device = target.device(size, &file);
    if target.medium == Medium::File && !file.exists() {
        std::fs::File::create(&file)?.set_len(size)?;
    }
    // A socket of the round before.
    let _ = std::fs::remove_file(&socket);
    let command = server::command(target.kind, &device, &socket, connections)?;
    let server = Server::start(command.with_context(|| format!("there is no {target}"))?, &socket)?;
    if target.medium != Medium::Null {
        let arguments = load::arguments(&socket, Operation::Fill, (FILL_BLOCK, 8, 1), 0.0);
        timed(server::loam()?.args(arguments))?;
    }
    Ok(server)
}

fn measure(server: &Server, target: Target, workload: Workload, seconds: f64) -> Result<Metrics> {
    let Workload { operation, block, depth, connections } = workload;
    let mut command = server::loam()?;
    command.args(load::arguments(server.socket(), operation, (block, depth, connections), seconds));
    if target.medium == Medium::Null {
        command.arg("--unverified");
    }
    let before = Snapshot::take(&[server.process()])?;
    let (said, _) = timed(&mut command)?;
    let used = Snapshot::take(&[server.process()])?.since(before);
    let outcome: Outcome = serde_json::from_str(&said).context("what the load printed")?;
    ensure!(outcome.wrong == 0, "{} blocks of {} requests held wrong bytes", outcome.wrong, outcome.requests);
    ensure!(outcome.errors == 0, "{} of {} requests failed", outcome.errors, outcome.requests);
    let requests = outcome.requests as f64;
    let mut metrics = Metrics::from([
        ("requests".to_string(), requests),
        ("errors".into(), outcome.errors as f64),
        ("iops".into(), requests / outcome.seconds),
        ("mib_per_second".into(), requests * block as f64 / f64::from(1 << 20) / outcome.seconds),
        ("server_cpu_us".into(), used.servers.total() * 1e6 / requests),
        ("server_system_cpu_us".into(), used.servers.system * 1e6 / requests),
        ("client_cpu_us".into(), used.children.total() * 1e6 / requests),
    ]);
    for (name, value) in [("p50_us", outcome.p50_us), ("p99_us", outcome.p99_us)] {
        metrics.extend(value.map(|value| (name.to_string(), value)));
    }
    Ok(metrics)
}

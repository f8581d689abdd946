//! Benchmarks of loam beside its peers, and reports of them. A benchmark runs its cases in interleaved rounds, so that
//! a machine that is busy now and idle later disturbs all alike, and appends each result to a file of JSON lines at
//! once: a run that was stopped goes on where it was. Everything is measured from outside, through the commands that a
//! user would type.

mod bare;
mod chart;
mod clone;
mod cpu;
mod nbd;
mod process;
mod quarters;
mod quota;
mod read;
mod record;
mod report;
mod seed;
mod serve;
mod shape;
mod start;
mod zero;

pub use record::{Record, Recorder, load};
pub use report::report;
pub use shape::{Link, Shaper, Traffic};

/// What to measure, or what to report.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// From nothing to a program's first output, over a link of a given round trip and bandwidth.
    Start(start::Options),
    /// Formatting: time, memory, room on disk, `btrfs check`, time to mount.
    Seed(seed::Options),
    /// Random reads of blocks that are local, through the transport.
    Read(read::Options),
    /// Making files that are clones: by layout, number and threads; and what they cost afterwards.
    Clone(clone::Options),
    /// NBD servers under raw load, and copiers between them.
    Nbd(nbd::Options),
    /// Copies of images with holes to servers that zero fast, slowly, or not at all.
    Zero(zero::Options),
    /// What quotas cost writers and commits: none, full qgroups and simple quotas side by side.
    Quota(quota::Options),
    /// Medians on the terminal, and one HTML file with charts.
    Report(report::Options),
    /// Formats once and says what it took; `seed` starts it to measure one process's memory.
    #[command(hide = true)]
    SeedOnce(seed::OnceOptions),
    /// Serves a file from memory by FUSE and loop; `read` starts it.
    #[command(hide = true)]
    BareServer(bare::Options),
    /// Serves a device without a pool until its input ends; prints the device's path first.
    #[command(hide = true)]
    ServeDevice(serve::Options),
    /// Puts load on an NBD server and says what came of it; `nbd` starts it.
    #[command(hide = true)]
    NbdLoad(nbd::load::Options),
    /// Answers NBD requests without a device; `nbd` starts it.
    #[command(hide = true)]
    NbdEcho(nbd::echo::Options),
}

/// Options that every benchmark has.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// The file of JSON lines to append to; rounds that it has already are not run again.
    #[arg(long, value_name = "RESULTS.jsonl")]
    pub(crate) out: std::path::PathBuf,
    /// Fewer and smaller rounds: to see that it works, not to publish.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Rounds of each case [default: 5; with --quick 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
}

impl Common {
    pub(crate) fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }
}

/// Runs one benchmark or report.
///
/// # Errors
/// A tool that is missing (with its name), a command that failed (with its output), or a results file that cannot be
/// read or written.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    // The echo loop has nothing to clean up: a signal ends it.
    if !matches!(arguments.command, Command::NbdEcho(_)) {
        record::stop_between_cases_when_interrupted()?;
    }
    match arguments.command {
        Command::Start(options) => start::run(&options),
        Command::Seed(options) => seed::run(&options),
        Command::Read(options) => read::run(&options),
        Command::Clone(options) => clone::run(&options),
        Command::Nbd(options) => nbd::run(&options),
        Command::Zero(options) => zero::run(&options),
        Command::Quota(options) => quota::run(&options),
        Command::NbdLoad(options) => nbd::load::run(&options),
        Command::NbdEcho(options) => nbd::echo::run(&options),
        Command::Report(options) => report::run(&options),
        Command::SeedOnce(options) => seed::once(&options),
        Command::BareServer(options) => bare::run(&options),
        Command::ServeDevice(options) => serve::run(&options),
    }
}

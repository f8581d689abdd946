//! Random reads of 4 KiB, direct, of blocks that are local, by fio on the block device: the pool's virtual device,
//! beside the barest FUSE server under the same loop set-up, which is what the transport can do, and beside a loop device
//! on a tmpfs file, which is what the kernel can do without anybody's daemon.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use loam_seed::VIRTUAL_BASE;
use serde_json::Value;

use crate::Common;
use crate::bare::BareServer;
use crate::process::{LoopDevice, Sandbox, timed};
use crate::record::{Metrics, Recorder};

/// `loam bench read`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Bytes to read from.
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    size: ByteSize,
    /// Seconds of each measurement [default: 5; with --quick 2].
    #[arg(long, value_name = "S")]
    runtime: Option<u32>,
    /// Where the pool is made, on a filesystem with real files.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    /// A tmpfs, for the file that is read from memory.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    memory: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// How fio reads: the setting's name and its arguments.
const MODES: [(&str, &[&str]); 3] = [
    ("psync, 1 job", &["--ioengine=psync", "--numjobs=1"]),
    ("psync, 4 jobs", &["--ioengine=psync", "--numjobs=4"]),
    ("io_uring, depth 64", &["--ioengine=io_uring", "--iodepth=64", "--numjobs=1"]),
];

/// A block device and where on it the data lies.
struct Target {
    case: &'static str,
    device: PathBuf,
    offset: u64,
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let memory = Sandbox::new(&options.memory)?;
    let data = memory.path("data");
    fill(&data, options.size.0)?;
    let on_tmpfs = LoopDevice::attach(&data, &["--direct-io=on", "--read-only"])?;
    let mut pool = Sandbox::new(&options.scratch)?;
    let bare = BareServer::start(&data)?;
    let targets = [
        Target { case: "bare FUSE server", device: bare.device().to_path_buf(), offset: 0 },
        pool_target(&mut pool, &data)?,
        Target { case: "loop on tmpfs", device: on_tmpfs.path().to_path_buf(), offset: 0 },
    ];
    for target in &targets {
        warm(target, &data)?;
    }
    let mut recorder = Recorder::open(&options.common.out)?;
    for round in 0..options.common.rounds() {
        for (setting, mode) in MODES {
            for target in &targets {
                recorder.measure(("read", setting, target.case, round), || fio(options, target, mode))?;
            }
        }
    }
    Ok(())
}

/// Bytes that differ from block to block: each holds its own number.
fn fill(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut piece = vec![0; 1 << 20];
    for start in (0..size).step_by(piece.len()) {
        for (word, bytes) in (0..).zip(piece.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&(start + word * 8).to_be_bytes());
        }
        file.write_all_at(&piece[..piece.len().min((size - start) as usize)], start)?;
    }
    Ok(())
}

/// A pool that is up, with the data as one range.
fn pool_target(pool: &mut Sandbox, data: &Path) -> Result<Target> {
    pool.loam(["init"])?;
    pool.up()?;
    let range = pool.json(&["range", "add", &format!("file:{}", data.display())])?;
    let address = range["address"].as_u64().context("`loam range add` names no address")?;
    let status = pool.json(&["status"])?;
    let device = status["device"].as_str().context("`loam status` names no device")?;
    Ok(Target { case: "loam", device: PathBuf::from(device), offset: VIRTUAL_BASE + address })
}

/// Reads everything once, so that it is local, and sees that it is the data.
fn warm(target: &Target, data: &Path) -> Result<()> {
    let (data, device) = (File::open(data)?, File::open(&target.device)?);
    let (mut expected, mut found) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let size = data.metadata()?.len();
    for start in (0..size).step_by(expected.len()) {
        let length = expected.len().min((size - start) as usize);
        data.read_exact_at(&mut expected[..length], start)?;
        device.read_exact_at(&mut found[..length], target.offset + start)?;
        ensure!(expected == found, "{}: wrong bytes near {start}", target.case);
    }
    Ok(())
}

fn fio(options: &Options, target: &Target, mode: &[&str]) -> Result<Metrics> {
    let runtime = options.runtime.unwrap_or(if options.common.quick { 2 } else { 5 });
    let mut command = Command::new("fio");
    command
        .args(["--name=read", "--rw=randread", "--bs=4k", "--direct=1", "--readonly", "--time_based"])
        .args(["--randrepeat=0", "--norandommap", "--group_reporting", "--output-format=json"])
        .args(mode)
        .arg(format!("--runtime={runtime}"))
        .arg(format!("--offset={}", target.offset))
        .arg(format!("--size={}", options.size.0))
        .arg(format!("--filename={}", target.device.display()));
    let before = busy_seconds()?;
    let (text, _) = timed(&mut command)?;
    let busy = busy_seconds()? - before;
    let result: Value = serde_json::from_str(&text).context("what fio printed")?;
    let read = &result["jobs"][0]["read"];
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio gives no {what}"));
    let requests = number(&read["total_ios"], "total_ios")?;
    let percentile = |name: &str| number(&read["clat_ns"]["percentile"][name], name).map(|ns| ns / 1e3);
    Ok(Metrics::from([
        ("iops".into(), number(&read["iops"], "iops")?),
        ("p50_us".into(), percentile("50.000000")?),
        ("p99_us".into(), percentile("99.000000")?),
        ("p999_us".into(), percentile("99.900000")?),
        ("cpu_us_per_read".into(), busy * 1e6 / requests.max(1.0)),
    ]))
}

/// Seconds that all processors of the machine have been busy since it started, fio's own included.
fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    ensure!(ticks.len() >= 5, "/proc/stat is not understood");
    let idle = ticks[3] + ticks[4];
    Ok((ticks.iter().take(8).sum::<f64>() - idle) / rustix::param::clock_ticks_per_second() as f64)
}

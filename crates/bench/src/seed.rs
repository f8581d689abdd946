//! Formatting: how long, how much memory, how much room, whether `btrfs check` finds it clean, and how long the
//! kernel takes to mount it. Images are made in a tmpfs: other filesystems take no files of 4 EiB.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;
use loam_seed::{SeedOptions, Subvolume, SyntheticTree, VIRTUAL_DATA_NAME};
use serde::{Deserialize, Serialize};

use crate::Common;
use crate::process::{LoopDevice, Sandbox, timed};
use crate::record::{Metrics, Recorder};

/// `loam bench seed`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Bytes of the virtual region.
    #[arg(long, value_name = "SIZE", default_value = "4EiB")]
    virtual_size: ByteSize,
    /// Files to clone into the image; may be given often [default: 0 100000 1000000; with --quick 0 10000].
    #[arg(long, value_name = "N")]
    files: Vec<usize>,
    /// A tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    scratch: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// `loam bench seed-once`.
#[derive(Debug, clap::Args)]
pub(crate) struct OnceOptions {
    #[arg(long)]
    virtual_size: ByteSize,
    #[arg(long)]
    files: usize,
    r#virtual: PathBuf,
    local: PathBuf,
}

/// What `seed-once` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Once {
    format_seconds: f64,
    peak_bytes: u64,
    metadata_bytes: u64,
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let files: &[usize] = match (options.files.as_slice(), options.common.quick) {
        ([], true) => &[0, 10_000],
        ([], false) => &[0, 100_000, 1_000_000],
        (given, _) => given,
    };
    let mut recorder = Recorder::open(&options.common.out)?;
    let setting = format!("{} pair", options.virtual_size);
    for round in 0..options.common.rounds() {
        for &files in files {
            let case = format!("{files} files");
            recorder.measure(("seed", &setting, &case, round), || measure(options, files))?;
        }
    }
    Ok(())
}

fn measure(options: &Options, files: usize) -> Result<Metrics> {
    let sandbox = Sandbox::new(&options.scratch)?;
    let (virtual_image, local) = (sandbox.path("virtual.img"), sandbox.path("local.img"));
    let (size, count) = (options.virtual_size.0.to_string(), files.to_string());
    let arguments = ["bench", "seed-once", "--virtual-size", size.as_str(), "--files", count.as_str()];
    let images = [&virtual_image, &local].map(|path| path.as_os_str());
    let (text, elapsed) = sandbox.loam(arguments.iter().map(AsRef::as_ref).chain(images))?;
    let once: Once = serde_json::from_str(&text).context("what seed-once printed")?;
    let room = allocated(&virtual_image)? + allocated(&local)?;
    let seed = LoopDevice::attach(&virtual_image, &["--read-only"])?;
    let device = LoopDevice::attach(&local, &[])?;
    timed(Command::new("btrfs").args(["device", "scan"]).args([seed.path(), device.path()]))?;
    let (_, checked) = timed(Command::new("btrfs").args(["check", "--readonly"]).arg(device.path()))
        .context("btrfs check does not find the image clean")?;
    let mounted = mount(&sandbox, &seed, &device)?;
    Ok(Metrics::from([
        ("total_seconds".into(), elapsed.as_secs_f64()),
        ("format_seconds".into(), once.format_seconds),
        ("peak_bytes".into(), once.peak_bytes as f64),
        ("metadata_bytes".into(), once.metadata_bytes as f64),
        ("allocated_bytes".into(), room as f64),
        ("check_seconds".into(), checked.as_secs_f64()),
        ("mount_seconds".into(), mounted),
    ]))
}

/// Mounts the pair, sees that it is there, unmounts it. Returns the time of mount(8).
fn mount(sandbox: &Sandbox, seed: &LoopDevice, local: &LoopDevice) -> Result<f64> {
    let target = sandbox.path("mnt");
    fs::create_dir(&target)?;
    let option = format!("device={}", seed.path().display());
    let mut mount = Command::new("mount");
    let (_, elapsed) = timed(mount.args(["-t", "btrfs", "-o", &option]).arg(local.path()).arg(&target))?;
    let found = fs::symlink_metadata(target.join(VIRTUAL_DATA_NAME));
    timed(Command::new("umount").arg(&target))?;
    ensure!(found.is_ok(), "the mounted image has no {VIRTUAL_DATA_NAME}");
    Ok(elapsed.as_secs_f64())
}

fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Formats once, in this process, and prints what it took.
pub(crate) fn once(options: &OnceOptions) -> Result<()> {
    let mut seed_options = SeedOptions::new([0x5e; 32]);
    seed_options.virtual_size = options.virtual_size.0;
    let create = |path: &Path| {
        let file = File::options().read(true).write(true).create_new(true).open(path);
        file.with_context(|| format!("cannot make {}", path.display()))
    };
    let (mut virtual_image, mut local) = (create(&options.r#virtual)?, create(&options.local)?);
    let started = Instant::now();
    let tree = SyntheticTree::new(options.files);
    let image = [Subvolume { name: "image", tree: &tree, readonly: false }];
    let subvolumes = if options.files == 0 { &[] } else { &image[..] };
    let report = loam_seed::write(&seed_options, subvolumes, &mut virtual_image, Some(&mut local))?;
    let once = Once {
        format_seconds: started.elapsed().as_secs_f64(),
        peak_bytes: peak_memory()?,
        metadata_bytes: report.metadata_bytes,
    };
    println!("{}", serde_json::to_string(&once)?);
    Ok(())
}

/// The most memory that this process has had resident, in bytes.
fn peak_memory() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kibibytes.context("no VmHWM in /proc/self/status")? << 10)
}

//! The command line, as `--help` shows it.

pub(crate) mod devices;
pub(crate) mod quota;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use loam_block::size::ByteSize;

/// Whole filesystems for containers and VMs, at once, before their data has arrived.
///
/// The shortest way is one image at one place:
///
///   loam mount tar:http://host/root.tar /mnt ... loam umount /mnt
///
/// The lasting way is a pool for many images and containers:
///
///   loam init; loam up; loam add debian tar:http://host/root.tar; loam run debian -- python3
///
/// Sources are dir:PATH, tar:PATH-or-URL, file:PATH and http(s)://...; sizes are 4096, 64KiB, 64K, 4GiB, 4EiB.
///
/// And block devices, by NBD: loam serve, copy, info, map.
#[derive(Debug, Parser)]
#[command(
    name = "loam",
    version,
    verbatim_doc_comment,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Arguments {
    /// The pool's directory.
    #[arg(long, global = true, env = "LOAM_POOL", default_value = "/var/lib/loam", value_name = "DIR")]
    pub(crate) pool: PathBuf,
    /// Print facts as one JSON object.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Mount one image, writable, without a pool and before its data has arrived.
    Mount(Mount),
    /// Unmount what `loam mount` mounted; what was written there is gone, unless --local kept it.
    Umount {
        /// The mount point.
        directory: PathBuf,
    },
    /// Make a pool: format its filesystem. Nothing is attached or mounted yet.
    Init(Init),
    /// Attach and mount the pool and start its daemon. Running it twice is harmless.
    Up(Up),
    /// Unmount and detach the pool and stop its daemon; also mends what a crash left behind.
    Down,
    /// Show pool, transport, mount, cache and counters.
    Status,
    /// Verify seed, map, cache, and clones against the map.
    Check {
        /// Also read every local block and compare it with its checksum and digest.
        #[arg(long)]
        read_data: bool,
    },
    /// Make the index of a source, to be kept beside it, so that `add` and `mount` fetch nothing else first.
    Index(Index),
    /// Print what has been read of an image, in the order of first use: for `loam index --trace` and `loam add
    /// --prefetch`. Run a program once in a fresh mount or container, then take its trace.
    Trace {
        /// An image or container of the pool, or the mount point of a mounted image.
        name: String,
        /// Where to write it [default: standard output].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Make an image of a source. Its files are there in seconds; their data comes as it is read.
    Add {
        /// The image's name.
        name: String,
        /// dir:PATH or tar:PATH-or-URL. The index SOURCE.loam is used where there is one; without it the source is
        /// read through once.
        source: String,
        /// The index, where it does not lie beside the source.
        #[arg(long, value_name = "FILE|URL")]
        index: Option<String>,
        /// A trace of what will be read first, fetched ahead; in place of the index's own.
        #[arg(long, value_name = "FILE")]
        prefetch: Option<PathBuf>,
    },
    /// Make a container, a writable snapshot of an image, and print its path.
    Create {
        /// The container's name.
        name: String,
        /// The image.
        image: String,
        /// Most bytes that it may write, data and metadata, with all subvolumes that it makes; then EDQUOT. What it
        /// reads of its image is free.
        #[arg(long, value_name = "SIZE", value_parser = quota_size)]
        quota: Option<u64>,
    },
    /// Run a program in a new container of an image, by runc or crun; exits as the program does.
    Run(Run),
    /// List images and containers.
    Ls,
    /// Show all that is known of an image or container.
    Show {
        /// Its name.
        name: String,
    },
    /// Remove an image or container.
    Rm {
        /// Its name.
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Fetch all of an image or container now, or some paths of it, and keep it.
    Pin {
        /// Its name.
        name: String,
        /// Paths in it; all of it without any.
        paths: Vec<String>,
    },
    /// Give cached bytes back; they are fetched again when they are read again. Pinned ones stay.
    Evict {
        /// Bytes that may stay.
        #[arg(long, value_name = "SIZE", default_value = "0")]
        keep: ByteSize,
    },
    /// The address space by hand.
    Range {
        #[command(subcommand)]
        command: Range,
    },
    /// btrfs seeds without a pool, without root: make, verify, inspect.
    Seed {
        #[command(subcommand)]
        command: Seed,
    },
    /// Who pays for what was written: simple quotas, on any btrfs.
    Quota {
        #[command(subcommand)]
        command: quota::Quota,
    },
    /// Serve devices by NBD, the network block device protocol: to qemu, libvirt, nbd-client, nbdcopy, loam copy.
    Serve(Box<devices::ServeDevice>),
    /// Copy a device to another; holes stay holes.
    Copy(Box<devices::Copy>),
    /// Show what a device is and can do; of an NBD server, its exports.
    Info(devices::Info),
    /// Show where a device has data, zeroes and holes.
    Map(devices::Map),
    /// Measure, beside the peers.
    Bench(Box<loam_bench::Arguments>),
    /// Processes that loam starts itself.
    #[command(hide = true)]
    Internal {
        #[command(subcommand)]
        command: Internal,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Index {
    /// dir:PATH or tar:PATH-or-URL.
    pub(crate) source: String,
    /// Where to write it [default: the source's name + .loam].
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Put this trace into it (see loam trace): hosts then fetch ahead what it names.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// What is fetched and verified at once, 4KiB to 4MiB. Smaller chunks fetch less and make a larger index.
    #[arg(long, value_name = "SIZE", default_value = "16KiB")]
    pub(crate) chunk_size: ByteSize,
}

#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// dir:PATH or tar:PATH-or-URL.
    pub(crate) source: String,
    /// The mount point, an empty directory.
    pub(crate) directory: PathBuf,
    /// The index, where it is not SOURCE.loam.
    #[arg(long, value_name = "FILE|URL")]
    pub(crate) index: Option<String>,
    /// Keep what is written in this file; mounting the same source with it again finds it there.
    #[arg(long, value_name = "FILE")]
    pub(crate) local: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) serve: Serve,
    /// Stay; unmount on Ctrl-C.
    #[arg(long)]
    pub(crate) foreground: bool,
}

/// How the kernel is served.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// How the kernel gets the blocks.
    #[arg(long, value_enum, default_value_t, env = "LOAM_TRANSPORT")]
    pub(crate) transport: Transport,
    /// Threads that serve the kernel [default: one for each processor, at most 4]. ublk takes no more than there are
    /// processors.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// How bytes get from ublk to the kernel.
    #[arg(long, value_enum, default_value_t, value_name = "PATH", env = "LOAM_DATA_PATH")]
    pub(crate) data_path: DataPath,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Transport {
    /// ublk where the kernel has it and can recover it, else loop; run/daemon.log in the pool says which and why.
    #[default]
    Auto,
    /// A ublk device: the fast one. Needs the driver (modprobe ublk_drv; Linux 6.5 and newer).
    Ublk,
    /// A FUSE file under a loop device: slower, on every kernel.
    Loop,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum DataPath {
    /// What was measured to be fastest of those that the kernel has.
    #[default]
    Auto,
    /// The driver copies from a buffer of the daemon's into the request.
    Copy,
    /// The daemon writes into the request (Linux 6.5 and newer).
    UserCopy,
    /// The kernel reads cached bytes into the request itself (Linux 6.16 and newer).
    ZeroCopy,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum LayoutArgument {
    /// A superblock alone on the virtual device, all trees on the local one: mounts at once.
    #[default]
    Pair,
    /// All metadata on the virtual device; the local one is added when it is first mounted.
    Single,
    /// As single, with one chunk of the whole size: for kernels before 6.4 only.
    MegaExtent,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Bytes of the virtual region, 1GiB to 7EiB.
    #[arg(long, value_name = "SIZE", default_value = "4EiB")]
    pub(crate) virtual_size: ByteSize,
    /// Bytes of the local device's file, which is sparse.
    #[arg(long, value_name = "SIZE", default_value = "64GiB")]
    pub(crate) local_size: ByteSize,
    /// Use this block device, all of it, instead of a file. What is on it is lost.
    #[arg(long, value_name = "DEV", conflicts_with = "local_size")]
    pub(crate) local_device: Option<PathBuf>,
    /// How the seed is formatted.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) layout: LayoutArgument,
    /// Most bytes that the chunk cache may hold.
    #[arg(long, value_name = "SIZE", default_value = "32GiB")]
    pub(crate) cache_size: ByteSize,
    /// Count what each container writes, so that `create --quota` can limit it (simple quotas). Kernels before 6.7 do not
    /// mount a pool that was made with them; loam quota enable and disable change it later.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) quota: QuotaArgument,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum QuotaArgument {
    /// Where this kernel has them.
    #[default]
    Auto,
    /// In any case.
    On,
    /// Not.
    Off,
}

impl From<QuotaArgument> for loam_pool::QuotaChoice {
    fn from(quota: QuotaArgument) -> Self {
        match quota {
            QuotaArgument::Auto => loam_pool::QuotaChoice::Auto,
            QuotaArgument::On => loam_pool::QuotaChoice::On,
            QuotaArgument::Off => loam_pool::QuotaChoice::Off,
        }
    }
}

/// A size that can be a limit.
fn quota_size(text: &str) -> Result<u64, String> {
    match text.parse::<loam_pool::quota::Limit>() {
        Ok(loam_pool::quota::Limit::Absolute(bytes)) => Ok(bytes),
        Ok(_) => Err("write a size, as 2GiB; loam quota limit changes it later".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) serve: Serve,
    /// Where to mount it [default: mnt in the pool's directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) mount: Option<PathBuf>,
    /// Do not go to the background; take the pool down on Ctrl-C.
    #[arg(long)]
    pub(crate) foreground: bool,
    /// What addresses without content read as; zeros is for benchmarks.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) unmapped: Unmapped,
    /// How requests come from FUSE under the loop transport. io-uring takes less processor time, but readers get errors
    /// if the daemon dies; it needs the module parameter fuse.enable_uring.
    #[arg(long, value_enum, default_value_t, value_name = "ENGINE")]
    pub(crate) fuse_engine: FuseEngine,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum FuseEngine {
    /// Reads and writes of /dev/fuse.
    #[default]
    Classic,
    /// FUSE over io_uring.
    IoUring,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Unmapped {
    /// EIO.
    #[default]
    Error,
    /// Zeroes.
    Zeros,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The image.
    pub(crate) image: String,
    /// The container's name [default: made up].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Most bytes that it may write, as of loam create.
    #[arg(long, value_name = "SIZE", value_parser = quota_size)]
    pub(crate) quota: Option<u64>,
    /// Keep the container when the program has ended.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Program and arguments [default: /bin/sh].
    #[arg(last = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Range {
    /// Give a file or URL a range of addresses; prints it.
    Add {
        /// file:PATH, http(s)://... or an NBD URI.
        source: String,
    },
    /// List the ranges.
    Ls,
    /// Make a file whose data is a run of addresses, without reading it.
    Clone {
        /// First address, a multiple of 4096.
        address: ByteSize,
        /// Bytes.
        length: ByteSize,
        /// The file to make, below the pool's mount.
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Seed {
    /// Format.
    Make(SeedMake),
    /// Read images back and prove that they are whole.
    Verify {
        /// The virtual image.
        r#virtual: PathBuf,
        /// The local image of a pair.
        local: Option<PathBuf>,
    },
    /// Print superblock and trees.
    Inspect {
        /// One tree: its name (root, chunk, dev, extent, fs, csum, uuid, free-space, quota) or number.
        #[arg(long, value_name = "T")]
        tree: Option<String>,
        /// The image that holds the trees: LOCAL of a pair, VIRTUAL else.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SeedMake {
    /// How to format.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) layout: LayoutArgument,
    /// Bytes of the virtual region, 1GiB to 7EiB.
    #[arg(long, value_name = "SIZE", default_value = "4EiB")]
    pub(crate) virtual_size: ByteSize,
    /// Bytes of LOCAL, which is sparse.
    #[arg(long, value_name = "SIZE", default_value = "64GiB")]
    pub(crate) local_size: ByteSize,
    /// Bytes of a tree block, 4096 to 65536.
    #[arg(long, value_name = "N", default_value = "16KiB")]
    pub(crate) nodesize: ByteSize,
    /// Clone the files of this index into a subvolume named image. VIRTUAL then follows from the index and its size alone:
    /// any number of LOCALs, each a filesystem of its own, stand on it, or on index:INDEX (see loam serve --help).
    #[arg(long, value_name = "INDEX")]
    pub(crate) index: Option<PathBuf>,
    /// Format with simple quotas on (Linux 6.7 and newer).
    #[arg(long)]
    pub(crate) simple_quota: bool,
    /// Gets the superblock (pair) or all of the metadata; sparse.
    pub(crate) r#virtual: PathBuf,
    /// Gets the trees of a pair.
    pub(crate) local: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Internal {
    /// Keeps descriptors over the daemon's death and starts it again.
    Holder {
        /// `UpOptions` as JSON.
        options: String,
    },
    /// Mounts or unmounts for the daemon, whose own threads must not wait for blocks that it serves.
    Mount {
        /// What to do, as JSON.
        work: String,
    },
    /// Serves one pool.
    Daemon {
        /// `UpOptions` as JSON.
        options: String,
    },
}

impl From<Transport> for loam_pool::TransportChoice {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Auto => loam_pool::TransportChoice::Auto,
            Transport::Ublk => loam_pool::TransportChoice::Ublk,
            Transport::Loop => loam_pool::TransportChoice::Loop,
        }
    }
}

impl From<DataPath> for loam_pool::DataPath {
    fn from(path: DataPath) -> Self {
        match path {
            DataPath::Auto => loam_pool::DataPath::Auto,
            DataPath::Copy => loam_pool::DataPath::Copy,
            DataPath::UserCopy => loam_pool::DataPath::UserCopy,
            DataPath::ZeroCopy => loam_pool::DataPath::ZeroCopy,
        }
    }
}

impl From<LayoutArgument> for loam_seed::Layout {
    fn from(layout: LayoutArgument) -> Self {
        match layout {
            LayoutArgument::Pair => loam_seed::Layout::Pair,
            LayoutArgument::Single => loam_seed::Layout::Single,
            LayoutArgument::MegaExtent => loam_seed::Layout::MegaExtent,
        }
    }
}

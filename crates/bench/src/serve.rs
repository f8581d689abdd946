//! A device for a benchmark, without a pool: a content as a block device by one of loam's transports, alone or as the
//! data of a virtual device, in a process of its own as loam's daemon is.

mod content;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use loam_attach::holder::FdStore;
use loam_attach::ublk::{self, DataPath};
use loam_attach::{AttachOptions, LoopTransport};
use loam_block::size::ByteSize;
use loam_block::{BlockDevice, FileDevice, FileOptions, Io};
use loam_space::{Address, AddressSpace, ContentId, Map, Range, Resolver, Unmapped, VirtualDevice};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::quarters;
pub(crate) use content::Content;

/// How the kernel gets the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Transport {
    /// The ublk driver.
    Ublk,
    /// A FUSE file under a loop device.
    Loop,
}

/// `loam bench serve-device`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// How the kernel gets the device.
    #[arg(long, value_enum)]
    pub(crate) transport: Transport,
    /// `pattern:SIZE`, `memory:PATH`, `file:PATH[,direct]` or `cache:DIRECTORY,FILE`.
    #[arg(long)]
    pub(crate) content: Content,
    /// Serve a virtual device: this image below 1 TiB, and above it the content, in quarters over the whole region.
    #[arg(long, value_name = "IMAGE", requires = "virtual_size")]
    pub(crate) prefix: Option<PathBuf>,
    /// Bytes of the virtual region.
    #[arg(long, value_name = "SIZE")]
    pub(crate) virtual_size: Option<ByteSize>,
    /// Queues of the ublk device, or threads of the FUSE server [default: processors, at most 4].
    #[arg(long, value_name = "N")]
    pub(crate) queues: Option<u16>,
    /// How data gets into the kernel's pages, of ublk: auto, copy, user-copy, zero-copy.
    #[arg(long, value_name = "PATH")]
    pub(crate) data_path: Option<DataPath>,
}

/// What a server says once its device is there: one line of JSON, after the line with the device's path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// How data gets into the kernel's pages.
    pub(crate) data_path: String,
}

/// Serves until standard input ends. Prints the block device, then the facts.
pub(crate) fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // The map of the virtual device lies there as long as it is served.
    let directory = tempfile::tempdir()?;
    let content = options.content.open(runtime.handle())?;
    let device = match (&options.prefix, options.virtual_size) {
        (Some(prefix), Some(size)) => virtual_device(directory.path(), prefix, size.0, content)?,
        _ => content,
    };
    match options.transport {
        Transport::Ublk => by_ublk(device, runtime.handle(), options),
        Transport::Loop => by_loop(device, runtime.handle(), options),
    }
}

fn by_loop(device: Arc<dyn BlockDevice>, runtime: &Handle, options: &Options) -> Result<()> {
    ensure!(options.data_path.is_none(), "data paths are of ublk; a loop device has none to choose");
    let mut attach = AttachOptions::default();
    attach.server.threads = options.queues.map(usize::from);
    let store = FdStore::none();
    let mut attachment = LoopTransport::attach(device, runtime.clone(), &attach, &store)?;
    until_input_ends(&attachment.device_path(), &Facts { data_path: "fuse".into() })?;
    Ok(attachment.detach(&store)?)
}

fn by_ublk(device: Arc<dyn BlockDevice>, runtime: &Handle, options: &Options) -> Result<()> {
    let mut attach = ublk::Options { queues: options.queues, ..ublk::Options::default() };
    if let Some(data_path) = options.data_path {
        attach.data_path = data_path;
    }
    let mut attachment = ublk::attach(device, runtime.clone(), &attach)?;
    let facts = Facts { data_path: attachment.data_path().to_string() };
    until_input_ends(&attachment.device_path(), &facts)?;
    Ok(attachment.detach()?)
}

fn until_input_ends(device: &Path, facts: &Facts) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}\n{}", device.display(), serde_json::to_string(facts)?)?;
    output.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// One content for every address that is asked for.
struct Only(Arc<dyn BlockDevice>);

impl Resolver for Only {
    fn resolve<'a>(&'a self, _content: ContentId, _spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>> {
        Io::Ready(Ok(Arc::clone(&self.0)))
    }
}

/// The content as the data of a virtual device, by the map and address space that a pool has.
fn virtual_device(
    directory: &Path,
    prefix: &Path,
    size: u64,
    content: Arc<dyn BlockDevice>,
) -> Result<Arc<dyn BlockDevice>> {
    let map = Map::create(directory.join("map"), size)?;
    let id = map.add_content(b"bench")?;
    let ranges = quarters::pieces(size, content.geometry().size)?.map(|piece| Range {
        start: Address(piece.address),
        length: piece.length,
        content: id,
        content_offset: piece.file_offset,
    });
    map.add_ranges(&ranges)?;
    let prefix = FileDevice::open(prefix, FileOptions { read_only: true, ..FileOptions::default() })?;
    let space = AddressSpace::new(Arc::new(map), Arc::new(Only(content)), Unmapped::Error);
    Ok(Arc::new(VirtualDevice::new(Arc::new(prefix), Arc::new(space))))
}

/// A server in a process of its own; it detaches and ends when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    process: Child,
    input: Option<ChildStdin>,
    device: PathBuf,
    facts: Option<Facts>,
}

impl Server {
    /// Serves a device as `options` say.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let transport = options.transport.to_possible_value().context("a transport has a name")?;
        let mut arguments =
            vec!["serve-device".to_string(), "--transport".into(), transport.get_name().into()];
        arguments.extend(["--content".into(), options.content.to_string()]);
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                arguments.extend([format!("--{name}"), value]);
            }
        };
        option("prefix", options.prefix.as_ref().map(|path| path.display().to_string()));
        option("virtual-size", options.virtual_size.map(|size| size.0.to_string()));
        option("queues", options.queues.map(|queues| queues.to_string()));
        option("data-path", options.data_path.map(|path| path.to_string()));
        Server::spawn(&arguments)
    }

    /// Runs `loam bench ARGUMENTS`, which prints a device's path and perhaps facts, and serves until its input ends.
    pub(crate) fn spawn(arguments: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().context("cannot start a server")?;
        let input = process.stdin.take();
        let output = process.stdout.take().context("a pipe was asked for")?;
        let mut output = BufReader::new(output);
        let (mut path, mut facts) = (String::new(), String::new());
        output.read_line(&mut path)?;
        if path.is_empty() {
            drop(input);
            let said = process.wait_with_output()?.stderr;
            bail!("{}", String::from_utf8_lossy(&said).trim().trim_start_matches("loam: "));
        }
        output.read_line(&mut facts)?;
        let device = PathBuf::from(path.trim_end());
        let server = Server { process, input, device, facts: serde_json::from_str(&facts).ok() };
        ensure!(File::open(&server.device).is_ok(), "{}: cannot be opened", server.device.display());
        Ok(server)
    }

    /// What it serves.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.process.id()
    }

    /// What it said of itself.
    pub(crate) fn facts(&self) -> Option<&Facts> {
        self.facts.as_ref()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.input.take());
        match self.process.wait() {
            Ok(status) if status.success() => {}
            ended => eprintln!("loam bench: the server of {} ended with {ended:?}", self.device.display()),
        }
    }
}

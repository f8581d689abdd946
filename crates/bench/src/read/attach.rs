//! Makes a target ready to be read, and takes it down again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use loam_attach::ublk::{self, DataPath};
use loam_block::size::ByteSize;
use loam_seed::SeedOptions;

use super::check::Expected;
use super::guards::{Guards, Mounted, OnLoop};
use super::images::{DATA, SUBVOLUME};
use super::lab::{Lab, RamDisk};
use super::rublk::Rublk;
use super::target::{Layout, LoamTarget, Reference, Source, Target, word};
use crate::bare::BareServer;
use crate::serve::{self, Content, Server, Transport};

/// A target that can be read until this is dropped.
pub(super) struct Attached {
    /// What to read.
    pub(super) path: PathBuf,
    pub(super) expected: Expected,
    /// Processes that serve it.
    pub(super) servers: Vec<u32>,
    /// What was found out about it.
    pub(super) facts: BTreeMap<String, String>,
    guards: Guards,
}

impl Attached {
    fn new(path: impl Into<PathBuf>) -> Self {
        Attached {
            path: path.into(),
            expected: Expected::Pattern,
            servers: Vec::new(),
            facts: BTreeMap::new(),
            guards: Guards::default(),
        }
    }

    fn rublk(mut self, rublk: Rublk) -> Self {
        self.path = rublk.device();
        self.servers.push(rublk.process());
        self.guards.keep(rublk);
        self
    }

    fn server(mut self, server: Server) -> Self {
        self.path = server.device().to_path_buf();
        self.servers.push(server.process());
        if let Some(facts) = server.facts() {
            self.facts.insert("data_path".into(), facts.data_path.clone());
        }
        self.guards.keep(server);
        self
    }

    /// Mounts what was attached so far; the data file is what is read.
    fn mount(mut self, kind: &str, lab: &Lab, file: &Path) -> Result<Self> {
        let directory = lab.mount_point();
        self.guards.keep(Mounted::mount(kind, &self.path, &directory, &[], true)?);
        self.path = directory.join(file);
        Ok(self)
    }
}

/// Attaches a target. An error is a reason why this machine cannot.
pub(super) fn attach(lab: &mut Lab, target: &Target, queues: u16) -> Result<Attached> {
    match target {
        Target::Loam(target) => loam(lab, target),
        Target::Reference { kind, size } => reference(lab, *kind, size.0, queues),
    }
}

fn reference(lab: &mut Lab, kind: Reference, size: u64, queues: u16) -> Result<Attached> {
    let mut attached = Attached::new("");
    let data = Path::new(DATA);
    match kind {
        Reference::BtrfsBrd => return Attached::new(lab.ram_disk(RamDisk::Btrfs)?).mount("btrfs", lab, data),
        Reference::Ext4Brd => return Attached::new(lab.ram_disk(RamDisk::Ext4)?).mount("ext4", lab, data),
        Reference::Brd => attached.path = lab.ram_disk(RamDisk::Raw)?,
        Reference::Tmpfs => attached.path = lab.data(size)?,
        Reference::Fuse => {
            attached = attached.server(BareServer::mounted(&lab.data(size)?, &lab.mount_point())?)
        }
        Reference::FuseLoop => attached = attached.server(BareServer::on_loop(&lab.data(size)?)?),
        Reference::RublkNull | Reference::RublkNullZeroCopy => {
            let zero_copy: &[&str] = if kind == Reference::RublkNull { &[] } else { &["--zero-copy"] };
            if !zero_copy.is_empty() {
                // rublk goes on without, and does not say so.
                let features = ublk::features()?;
                ensure!(features.zero_copy() && features.auto_buffer(), "this kernel offers no zero copy");
            }
            attached = attached.rublk(Rublk::start(queues, &[&["null"], zero_copy].concat())?);
            attached.expected = Expected::Anything;
        }
        Reference::RublkLoop | Reference::RublkLoopDirect => {
            attached = attached.rublk(rublk_loop(&lab.data(size)?, kind == Reference::RublkLoop, queues)?);
        }
        Reference::BtrfsRublkLoop | Reference::BtrfsRublkLoopDirect => {
            let image = lab.btrfs_image(size)?;
            let rublk = rublk_loop(&image, kind == Reference::BtrfsRublkLoop, queues)?;
            return attached.rublk(rublk).mount("btrfs", lab, data);
        }
        Reference::LoopTmpfs => {
            let device = OnLoop::attach(&lab.data(size)?, true)?;
            attached.path = device.path();
            attached.guards.keep(device);
        }
        Reference::BtrfsLoopTmpfs => {
            let device = OnLoop::attach(&lab.btrfs_image(size)?, true)?;
            attached.path = device.path();
            attached.guards.keep(device);
            return attached.mount("btrfs", lab, data);
        }
        Reference::DevZero => {
            attached.path = "/dev/zero".into();
            attached.expected = Expected::Zeroes;
        }
    }
    Ok(attached)
}

fn rublk_loop(file: &Path, buffered: bool, queues: u16) -> Result<Rublk> {
    let file = file.display().to_string();
    let mut arguments = vec!["loop", "--file", &file, "--read-only"];
    if buffered {
        arguments.push("--buffered-io");
    }
    Rublk::start(queues, &arguments)
}

fn loam(lab: &mut Lab, target: &LoamTarget) -> Result<Attached> {
    let mut options = serve::Options {
        transport: target.transport,
        content: Content::Pattern(ByteSize(0)),
        prefix: None,
        virtual_size: None,
        queues: target.queues,
        data_path: (target.data_path != DataPath::Auto).then_some(target.data_path),
    };
    ensure!(
        target.transport == Transport::Ublk || target.data_path == DataPath::Auto,
        "data paths are of ublk alone"
    );
    let (size, virtual_size) = (target.clone_size.0, target.virtual_size.0);
    if target.layout == Layout::SmallExtents {
        // Its trees and its data lie in one image, as stock tools leave them: the image is the content.
        let image = lab.small_extents(virtual_size, size)?;
        options.content = match target.source {
            Source::Memory => Content::Memory(image),
            source => {
                bail!("small extents lie in one image with their trees, in memory, not in {}", word(source))
            }
        };
        let attached = Attached::new("").server(Server::start(&options)?);
        return attached.mount("btrfs", lab, &Path::new(SUBVOLUME).join(DATA));
    }
    options.content = content(lab, target.source, size)?;
    let layout = match target.layout {
        Layout::Raw => {
            let attached = Attached::new("").server(Server::start(&options)?);
            lab.settle()?;
            return Ok(attached);
        }
        Layout::Single => loam_seed::Layout::Single,
        Layout::MegaExtent => loam_seed::Layout::MegaExtent,
        Layout::Pair | Layout::SmallExtents => loam_seed::Layout::Pair,
    };
    let seed = SeedOptions { layout, virtual_size, ..SeedOptions::new([0; 32]) };
    let (virtual_image, local) = lab.seed(&seed, size)?;
    options.prefix = Some(virtual_image);
    options.virtual_size = Some(target.virtual_size);
    let mut attached = Attached::new("").server(Server::start(&options)?);
    // A cache has just been filled, the first time.
    lab.settle()?;
    let file = Path::new(SUBVOLUME).join(DATA);
    if layout != loam_seed::Layout::Pair {
        let limit = layout.kernel_limit(virtual_size);
        return attached.mount("btrfs", lab, &file).map_err(|error| match limit {
            Some(limit) => anyhow!("{limit} ({error:#})"),
            None => error,
        });
    }
    let local = OnLoop::attach(&local, false)?;
    // Not by the option `device=`: older kernels open what it names for writing.
    loam_sys::btrfs::scan_device(&attached.path)?;
    let directory = lab.mount_point();
    let mounted = Mounted::mount("btrfs", &local.path(), &directory, &[], false)?;
    let mounted = mounted.with_member(&attached.path);
    attached.guards.keep(local);
    attached.guards.keep(mounted);
    attached.path = directory.join(file);
    Ok(attached)
}

fn content(lab: &mut Lab, source: Source, size: u64) -> Result<Content> {
    Ok(match source {
        Source::Pattern => Content::Pattern(ByteSize(size)),
        Source::Memory => Content::Memory(lab.data(size)?),
        Source::Cache => {
            let (directory, file) = lab.cache(size)?;
            Content::Cache { directory, file }
        }
        Source::Disk => Content::File { path: lab.data_on_disk(size)?, direct: true },
    })
}

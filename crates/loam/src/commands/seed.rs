//! `seed`: btrfs images without a pool, without root.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use loam_image::{Index, LoadedTree};
use loam_pool::protocol::{Checked, Finding};
use loam_seed::{Layout, SeedOptions, Subvolume, TreeFilter};
use serde::Serialize;

use super::Context;
use crate::arguments::{Seed, SeedMake};
use crate::output::{self, seconds, size};

pub(crate) fn run(context: &Context, command: Seed) -> anyhow::Result<()> {
    match command {
        Seed::Make(options) => make(context, options),
        Seed::Verify { r#virtual, local } => verify(context, &r#virtual, local.as_deref()),
        Seed::Inspect { tree, file } => inspect(context, tree.as_deref(), &file),
    }
}

/// What `seed make` made.
#[derive(Serialize)]
struct Made {
    r#virtual: PathBuf,
    local: Option<PathBuf>,
    virtual_size: u64,
    files: u64,
    metadata_bytes: u64,
    elapsed_ns: u64,
}

fn make(context: &Context, options: SeedMake) -> anyhow::Result<()> {
    let started = Instant::now();
    let layout: Layout = options.layout.into();
    let index = options.index.as_deref().map(read_index).transpose()?;
    let tree = index.as_ref().map(|index| LoadedTree::load(index, 0)).transpose()?;
    let seed = SeedOptions {
        layout,
        local_size: options.local_size.0,
        node_size: u32::try_from(options.nodesize.0).unwrap_or(u32::MAX),
        simple_quota: options.simple_quota,
        ..loam_pool::seed_without_pool(index.as_ref().map(Index::digest), options.virtual_size.0)
    };
    seed.validate()
        .map_err(|error| loam_pool::Error::Invalid { what: "seed make".into(), why: error.to_string() })?;
    let local = match (layout, options.local) {
        (Layout::Pair, None) => {
            let why = "layout pair needs LOCAL, for the trees";
            return Err(loam_pool::Error::Invalid { what: "seed make".into(), why: why.into() }.into());
        }
        (Layout::Single | Layout::MegaExtent, Some(_)) => {
            let why = "only layout pair has a LOCAL; the others keep everything in VIRTUAL";
            return Err(loam_pool::Error::Invalid { what: "seed make".into(), why: why.into() }.into());
        }
        (_, local) => local,
    };
    let subvolumes: Vec<Subvolume<'_>> =
        tree.iter().map(|tree| Subvolume { name: "image", tree, readonly: false }).collect();
    let mut virtual_image = create(&options.r#virtual)?;
    let mut local_image = local.as_deref().map(create).transpose()?;
    let report = loam_seed::write(
        &seed,
        &subvolumes,
        &mut virtual_image,
        local_image.as_mut().map(|file| file as &mut dyn loam_seed::Image),
    )?;
    if let Some(limit) = &report.kernel_limit {
        eprintln!("loam: {limit}");
    }
    let made = Made {
        r#virtual: options.r#virtual,
        local,
        virtual_size: seed.virtual_size,
        files: index.map_or(0, |index| index.entry_count()),
        metadata_bytes: report.metadata_bytes,
        elapsed_ns: started.elapsed().as_nanos() as u64,
    };
    output::print(context.json, &made, |made| {
        let files = made.files;
        format!(
            "{}: {} with {files} entries, {} of metadata, in {}",
            made.r#virtual.display(),
            size(made.virtual_size),
            size(made.metadata_bytes),
            seconds(made.elapsed_ns)
        )
    })
}

fn read_index(path: &Path) -> anyhow::Result<Index> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Index::open(bytes).with_context(|| format!("index {}", path.display()))
}

fn create(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    // Not truncated: the formatter sets the length, and a block device has one of its own.
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).with_context(|| format!("making {}", path.display()))
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

fn verify(context: &Context, virtual_path: &Path, local_path: Option<&Path>) -> anyhow::Result<()> {
    let virtual_image = open(virtual_path)?;
    let local_image = local_path.map(open).transpose()?;
    let local = local_image.as_ref().map(|file| file as &dyn loam_seed::ReadAt);
    let report = loam_seed::verify(&virtual_image, local)?;
    let mut checked = Checked::default();
    checked.checked.insert("tree blocks".to_owned(), report.counts.blocks);
    checked.findings = report
        .findings
        .iter()
        .map(|what| Finding { part: "seed".to_owned(), what: what.to_string() })
        .collect();
    output::print(context.json, &checked, super::pool::describe_check)?;
    anyhow::ensure!(checked.findings.is_empty(), "{}: the image is damaged", virtual_path.display());
    Ok(())
}

fn inspect(context: &Context, tree: Option<&str>, path: &Path) -> anyhow::Result<()> {
    let invalid = |why| loam_pool::Error::Invalid { what: "--tree".into(), why };
    let filter: TreeFilter = tree.map_or(Ok(TreeFilter::All), str::parse).map_err(invalid)?;
    let image = open(path)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut closed = false;
    let shown = loam_seed::inspect(&[("image", &image)], filter, &mut |record| {
        let written = if context.json {
            serde_json::to_writer(&mut out, record).map_err(std::io::Error::from).and_then(|()| writeln!(out))
        } else {
            writeln!(out, "{record}")
        };
        closed |= written.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe);
        written
    });
    match shown {
        // A reader that has seen enough is no error.
        _ if closed => Ok(()),
        shown => {
            shown.with_context(|| format!("inspecting {}", path.display())).and_then(|()| Ok(out.flush()?))
        }
    }
}

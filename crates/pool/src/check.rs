//! `loam check`: seed, map, cache, quota sums, and every file of every image against the map. With the pool up, the kernel is asked
//! where it has put the files; with the pool down, the seed is read back.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use loam_content::{Cache, CacheOptions, HttpClient, HttpOptions};
use loam_image::{Entry, EntryKind, Index, Run};
use loam_seed::Layout;
use loam_space::{Address, Map};

use crate::catalog::{Catalog, ImageRecord, Kind};
use crate::client::Client;
use crate::config::{Config, LocalDevice};
use crate::content::{ContentSpec, Contents};
use crate::daemon::Pool;
use crate::directory::PoolDirectory;
use crate::error::{Context, Error, Result};
use crate::indexes;
use crate::kernel;
use crate::launch::hold_down;
use crate::protocol::{Checked, Finding};
use crate::quota;

/// Findings of one kind that are listed; the rest is only counted.
const FINDINGS_MAX: usize = 1000;

/// What to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckOptions {
    /// Read every local block too.
    pub read_data: bool,
}

/// Checks a pool, up or down.
///
/// # Errors
/// What keeps it from checking; what it finds wrong is in the result.
pub async fn check(directory: &PoolDirectory, options: &CheckOptions) -> Result<Checked> {
    let config = Config::load(directory)?;
    match Client::new(directory).post("/check", &options.read_data).await {
        Err(Error::NotUp(_)) => {
            let _lock = hold_down(directory)?.ok_or_else(|| Error::Locked(directory.root().to_owned()))?;
            offline(directory, &config, options).await
        }
        answer => answer,
    }
}

async fn offline(directory: &PoolDirectory, config: &Config, options: &CheckOptions) -> Result<Checked> {
    let mut checked = Checked::default();
    seed(directory, config, &mut checked)?;
    let (LocalDevice::File(local) | LocalDevice::Block(local)) = &config.local;
    quotas(&[directory.virtual_image(), local.clone()], &mut checked);
    let skipped = "the pool is down: the kernel cannot be asked; loam up, then check again";
    checked.skipped.insert("clones".to_owned(), skipped.to_owned());
    // Opening the map reads and checks all of it.
    let map = match Map::open(directory.map()) {
        Ok(map) => map,
        Err(error) => {
            checked.find("map", error.to_string());
            return Ok(checked);
        }
    };
    let cache_options = CacheOptions { limit_bytes: config.cache_limit, ..CacheOptions::default() };
    let cache = Cache::open(directory.cache(), cache_options).step(|| "opening the cache".to_owned())?;
    let http = HttpClient::new(HttpOptions::default()).step(|| "setting up HTTP".to_owned())?;
    contents(&Contents::new(directory, cache, http), &map, options.read_data, &mut checked).await?;
    Ok(checked)
}

fn seed(directory: &PoolDirectory, config: &Config, checked: &mut Checked) -> Result<()> {
    let path = directory.virtual_image();
    let virtual_image = File::open(&path).step(|| format!("opening {}", path.display()))?;
    let (LocalDevice::File(local) | LocalDevice::Block(local)) = &config.local;
    // A seed of one device has none before it is sprouted.
    let whole = config.layout == Layout::Pair || kernel::has_superblock(local)?;
    let local_image =
        whole.then(|| File::open(local)).transpose().step(|| format!("opening {}", local.display()))?;
    let report =
        loam_seed::verify(&virtual_image, local_image.as_ref().map(|file| file as &dyn loam_seed::ReadAt));
    match report {
        Ok(report) => {
            checked.count("seed tree blocks", report.counts.blocks);
            report.findings.iter().for_each(|finding| checked.find("seed", finding.to_string()));
            if !report.notes.is_empty() {
                checked.skipped.insert("parts of the seed".to_owned(), report.notes.join("; "));
            }
        }
        Err(error) => checked.find("seed", error.to_string()),
    }
    Ok(())
}

/// Compares what is charged to quota groups with what must be, from the trees on the devices.
pub(crate) fn quotas(devices: &[PathBuf], checked: &mut Checked) {
    match quota::Source::open(devices).and_then(|source| quota::verify(&source)) {
        Ok(report) if report.verified => {
            checked.count("quota groups", report.groups.len() as u64);
            report.findings.iter().for_each(|finding| checked.find("quota", finding.to_string()));
        }
        Ok(report) if report.findings.is_empty() => {
            checked.skipped.insert("quota".to_owned(), "simple quotas are not on".to_owned());
        }
        Ok(report) => report.findings.iter().for_each(|finding| checked.find("quota", finding.to_string())),
        // It was written to all the time, or is damaged, which the seed's part says.
        Err(error) => {
            checked.skipped.insert("quota".to_owned(), error.to_string());
        }
    }
}

/// Checks the map's contents: descriptions, indexes, and with `read_data` every cached block.
pub(crate) async fn contents(
    contents: &Contents,
    map: &Map,
    read_data: bool,
    checked: &mut Checked,
) -> Result<()> {
    checked.count("map ranges", map.stats().ranges);
    if !read_data {
        checked.skipped.insert("cached blocks".to_owned(), "not asked for: --read-data".to_owned());
    }
    for (id, spec) in map.contents() {
        let spec = match ContentSpec::decode(&spec) {
            Ok(spec) => spec,
            Err(error) => {
                checked.find("map", format!("content {id}: {}", error.chain()));
                continue;
            }
        };
        let device = match contents.device(id, &spec).await {
            Ok(device) => device,
            Err(error) => {
                checked.find("cache", format!("content {id} ({}): {}", spec.source(), error.chain()));
                continue;
            }
        };
        checked.count("contents", 1);
        if read_data {
            let report = device
                .device()
                .check(false)
                .await
                .step(|| format!("checking the cache of {}", spec.source()))?;
            checked.count("cached chunks", report.chunks);
            checked.count("cached bytes", report.bytes);
            for chunk in &report.bad {
                let what =
                    format!("chunk {chunk} of {} is damaged; it is fetched again when read", spec.source());
                checked.find("cache", what);
            }
        }
    }
    Ok(())
}

/// Asks the kernel where the data of every image's files lies, and compares that with index and map.
pub(crate) fn clones(pool: &Pool) -> Result<Checked> {
    let mut checked = Checked::default();
    let skipped = "the pool is up: the kernel changes it; loam down, then check again";
    checked.skipped.insert("seed".to_owned(), skipped.to_owned());
    let Ok(catalog) = pool.catalog() else {
        return Ok(checked);
    };
    for name in catalog.names(Kind::Image)? {
        match check_image(pool, catalog, &name, &mut checked) {
            // Removed meanwhile.
            Err(_) if catalog.taken(&name).is_none() => {}
            result => result?,
        }
    }
    Ok(checked)
}

fn check_image(pool: &Pool, catalog: &Catalog, name: &str, checked: &mut Checked) -> Result<()> {
    let record: ImageRecord = catalog.read(Kind::Image, name)?;
    check_range(pool, name, &record, checked);
    let digest = record.index.parse().step(|| format!("the record of image {name}"))?;
    match indexes::load(pool.directory(), &digest) {
        Ok(index) => {
            check_files(pool, &catalog.subvolume(Kind::Image, name), &record, &index, checked)?;
            checked.count("images", 1);
        }
        Err(error) => checked.find("map", format!("image {name}: {}", error.chain())),
    }
    Ok(())
}

fn check_range(pool: &Pool, name: &str, record: &ImageRecord, checked: &mut Checked) {
    if record.length == 0 {
        return;
    }
    let range = pool.map().lookup(Address(record.address));
    let right = range.is_some_and(|range| {
        Some(range.content.0) == record.content
            && range.start.0 == record.address
            && range.length == record.length
    });
    if !right {
        let wanted = format!("{} bytes at {}", record.length, record.address);
        checked.find("map", format!("image {name} has {wanted}, where the map has {range:?}"));
    }
}

fn check_files(
    pool: &Pool,
    root: &Path,
    record: &ImageRecord,
    index: &Index,
    checked: &mut Checked,
) -> Result<()> {
    let extents = kernel::virtual_extents(root, pool.map().size())?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in index.entries() {
        let entry = entry.step(|| format!("index of {}", root.display()))?;
        let path = path_of(&entry, root, &paths);
        if let EntryKind::File { runs, .. } = &entry.kind {
            checked.count("files", 1);
            match fs::symlink_metadata(&path) {
                Ok(meta) => {
                    let empty = Vec::new();
                    let found = extents.get(&meta.ino()).unwrap_or(&empty);
                    if *found != absolute(runs, record.address) {
                        checked.find(
                            "clones",
                            format!("{}: its data lies elsewhere than the index says", path.display()),
                        );
                    }
                }
                Err(error) => checked.find("clones", format!("{}: {error}", path.display())),
            }
        }
        // Entries are numbered in order, so this is the path of the entry with its number.
        paths.push(if matches!(entry.kind, EntryKind::Directory) { path } else { PathBuf::new() });
    }
    Ok(())
}

fn path_of(entry: &Entry, root: &Path, paths: &[PathBuf]) -> PathBuf {
    match paths.get(entry.parent as usize) {
        Some(parent) if entry.number != 0 => parent.join(std::ffi::OsStr::from_bytes(&entry.name)),
        _ => root.to_owned(),
    }
}

/// Runs of an index as runs of the address space, with neighbours joined as the kernel's are.
fn absolute(runs: &[Run], base: u64) -> Vec<Run> {
    let mut joined = Vec::new();
    for run in runs {
        kernel::push_run(&mut joined, Run { address: base + run.address, ..*run });
    }
    joined
}

impl Checked {
    fn count(&mut self, what: &str, number: u64) {
        *self.checked.entry(what.to_owned()).or_default() += number;
    }

    fn find(&mut self, part: &str, what: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { part: part.to_owned(), what });
        } else {
            self.count("findings that are not listed", 1);
        }
    }
}

//! Adding an image: get its index, give its content a range, create its files in a new subvolume, and only then give it
//! a name. Whatever fails or is interrupted on the way leaves nothing behind but unused addresses.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use loam_content::Importer;
use loam_image::create::{self, Control, Target};
use loam_image::{Index, SourceSpec};
use loam_sys::btrfs;
use rustix::fs::IFlags;

use crate::accounts::Accounts;
use crate::catalog::{Catalog, ImageRecord, Kind, remove_subvolume};
use crate::containers::account_of;
use crate::content::{ContentSpec, place};
use crate::daemon::Pool;
use crate::error::{Context, Error, Result};
use crate::indexes::{self, Obtained, Watch};
use crate::kernel::VIRTUAL_DATA;
use crate::protocol::{AddRequest, Added, ImageStatus, Lazy};

/// Where an image's content lies in the address space; images without any content have no address.
pub(crate) struct Placed {
    pub(crate) content: Option<u32>,
    pub(crate) address: u64,
    pub(crate) length: u64,
}

/// Adds an image.
pub(crate) async fn add(pool: &Arc<Pool>, request: &AddRequest, watch: Arc<dyn Watch>) -> Result<Added> {
    let started = Instant::now();
    let source = indexes::parse_source(&request.source)?;
    let catalog = pool.catalog()?;
    catalog.check_free(&request.name)?;
    let (cache, http) = (pool.contents().cache(), pool.contents().http());
    let obtained = indexes::obtain(&source, request.index.as_deref(), cache, http, watch.clone()).await?;
    let index_ns = started.elapsed().as_nanos() as u64;
    if watch.cancelled() {
        return Err(Error::Interrupted(format!("adding {}", request.name)));
    }
    let Obtained { index, import, wire_bytes } = obtained;
    let index = match &request.prefetch {
        Some(text) => indexes::with_trace(&index, text, watch.as_ref())?,
        None => index,
    };
    let placed = place_content(pool, &source, &index, import).await?;
    let creating = Instant::now();
    let record = ImageRecord {
        source: request.source.clone(),
        index: index.digest().to_string(),
        content: placed.content,
        address: placed.address,
        length: placed.length,
        files: index.entry_count(),
        bytes: 0,
        lazy: index.not_lazy().map_or(Lazy::Yes(true), Lazy::No),
    };
    let (worker, name) = (pool.clone(), request.name.clone());
    let record = tokio::task::spawn_blocking(move || create_subvolume(&worker, &name, &index, record, watch))
        .await
        .step(|| format!("creating the files of {}", request.name))?
        .map_err(|error| explain_quota(pool, error))?;
    Ok(Added {
        name: request.name.clone(),
        source: record.source,
        path: catalog.subvolume(Kind::Image, &request.name),
        files: record.files,
        bytes: record.bytes,
        wire_bytes,
        lazy: record.lazy,
        index_ns,
        create_ns: creating.elapsed().as_nanos() as u64,
        elapsed_ns: started.elapsed().as_nanos() as u64,
    })
}

/// The kernel says nothing of whose quota it was.
fn explain_quota(pool: &Pool, error: Error) -> Error {
    let quota_exceeded = std::io::Error::from(rustix::io::Errno::DQUOT).to_string();
    if !error.chain().contains(&quota_exceeded) {
        return error;
    }
    error.with_hint(format!(
        "the pool's top level, or a group that it is in, is at its limit: loam quota show {}",
        pool.mount().display()
    ))
}

/// Makes index and range durable, and gives what was read on the way its place in the cache.
async fn place_content(
    pool: &Arc<Pool>,
    source: &SourceSpec,
    index: &Index,
    import: Option<Importer>,
) -> Result<Placed> {
    indexes::store(pool.directory(), index)?;
    if index.content_length() == 0 {
        return Ok(Placed { content: None, address: 0, length: 0 });
    }
    let spec = ContentSpec::Image { index: index.digest(), source: source.to_string() };
    let (id, range) = place(pool.map(), &spec, index.content_length())?;
    if let Some(import) = import {
        import
            .finish(pool.contents().cache(), &spec.cache_key(id), index.content_length())
            .step(|| format!("caching {source}"))?;
    }
    pool.contents().open_image(id, &spec, index).await?;
    Ok(Placed { content: Some(id.0), address: range.start.0, length: range.length })
}

fn create_subvolume(
    pool: &Pool,
    name: &str,
    index: &Index,
    mut record: ImageRecord,
    watch: Arc<dyn Watch>,
) -> Result<ImageRecord> {
    let catalog = pool.catalog()?;
    let building = catalog.building(name);
    let parent = File::open(building.parent().unwrap_or(Path::new("/")))
        .step(|| "opening .loam/building".to_owned())?;
    remove_subvolume(&building)?;
    btrfs::create_subvolume(&parent, name).step(|| format!("making a subvolume for {name}"))?;
    let made = populate(pool, &building, index, &record, watch).and_then(|bytes| {
        record.bytes = bytes;
        catalog.check_free(name)?;
        catalog.publish(Kind::Image, name, &record)
    });
    if let Err(error) = made {
        remove_subvolume(&building)?;
        return Err(error);
    }
    // The name survives power loss once this returns.
    btrfs::sync(&parent).step(|| format!("committing {name}"))?;
    Ok(record)
}

/// Creates all files; returns their bytes.
fn populate(
    pool: &Pool,
    root: &Path,
    index: &Index,
    record: &ImageRecord,
    watch: Arc<dyn Watch>,
) -> Result<u64> {
    let open = |path: &Path| File::open(path).step(|| format!("opening {}", path.display()));
    let root_directory = open(root)?;
    let staging = staging_in(root)?;
    let data = open(&pool.mount().join(VIRTUAL_DATA))?;
    let total = index.entry_count();
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = cancel.clone();
    let control = Control {
        cancel,
        progress: Some(Arc::new(move |done| {
            watch.progress("creating files", done, total, "files");
            stop.store(watch.cancelled(), Ordering::Relaxed);
        })),
    };
    let target = Target {
        root: root_directory.as_fd(),
        staging: staging.as_fd(),
        virtual_data: data.as_fd(),
        base: record.address,
        path: root,
    };
    let created = create::create(index, &target, &control)
        .step(|| format!("creating the files of {}", root.display()))?;
    Ok(created.bytes)
}

/// A no-checksum directory inside the new subvolume, where files are cloned before they are linked to their names. It has
/// no name itself any more when it is used, so the image never shows it.
fn staging_in(root: &Path) -> Result<File> {
    let path = root.join(".loam-staging");
    let what = || format!("making {}", path.display());
    fs::create_dir(&path).step(what)?;
    let staging = File::open(&path).step(what)?;
    btrfs::set_inode_flags(&staging, IFlags::NOCOW).step(what)?;
    fs::remove_dir(&path).step(what)?;
    Ok(staging)
}

/// What a list says of an image.
pub(crate) fn status(pool: &Pool, name: &str, accounts: Option<&Accounts>) -> Result<ImageStatus> {
    let catalog = pool.catalog()?;
    let record: ImageRecord = catalog.read(Kind::Image, name)?;
    let path = catalog.subvolume(Kind::Image, name);
    let account = accounts.map(|accounts| account_of(accounts, &path)).transpose()?.flatten();
    Ok(ImageStatus {
        name: name.to_owned(),
        path,
        metadata_bytes: account.map(|account| account.charged_bytes),
        files: record.files,
        bytes: record.bytes,
        local_bytes: pool.local_bytes(record.content)?,
        source: record.source,
        lazy: record.lazy,
    })
}

/// Removes an image's subvolume and name; gives the content that it had.
pub(crate) fn remove(catalog: &Catalog, name: &str) -> Result<Option<u32>> {
    let record: ImageRecord = catalog.read(Kind::Image, name)?;
    let containers = catalog.containers_of(name)?;
    if !containers.is_empty() {
        return Err(Error::InUse { name: name.to_owned(), containers });
    }
    catalog.remove(Kind::Image, name)?;
    let shared = catalog.names(Kind::Image)?.iter().any(|other| {
        catalog.read::<ImageRecord>(Kind::Image, other).is_ok_and(|other| other.content == record.content)
    });
    Ok(if shared { None } else { record.content })
}

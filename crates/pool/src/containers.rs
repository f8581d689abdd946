//! Containers: writable snapshots of images. Making one takes a constant time, however large the image is.

use std::fs::File;
use std::path::Path;

use crate::accounts::{Account, Accounts};
use crate::catalog::{Catalog, ContainerRecord, ImageRecord, Kind, remove_subvolume};
use crate::error::{Context, Result};
use crate::kernel;
use crate::protocol::{ContainerStatus, CreateRequest};
use crate::quota::{self, Limit};

/// Snapshots the image, limits the snapshot, and gives it a name.
pub(crate) fn create(catalog: &Catalog, request: &CreateRequest) -> Result<ContainerStatus> {
    catalog.check_free(&request.name)?;
    let image: ImageRecord = catalog.read(Kind::Image, &request.image)?;
    let what = || format!("snapshot of {} as {}", request.image, request.name);
    let source = File::open(catalog.subvolume(Kind::Image, &request.image)).step(what)?;
    let building = catalog.building(&request.name);
    let parent = File::open(building.parent().unwrap_or(Path::new("/"))).step(what)?;
    remove_subvolume(&building)?;
    loam_sys::btrfs::snapshot(&source, &parent, &request.name, false).step(what)?;
    let made = finish(catalog, request, image.index, &building);
    if made.is_err() {
        remove_subvolume(&building)?;
    }
    made
}

fn finish(
    catalog: &Catalog,
    request: &CreateRequest,
    index: String,
    building: &Path,
) -> Result<ContainerStatus> {
    let what = || format!("snapshot of {} as {}", request.image, request.name);
    let snapshot = File::open(building).step(what)?;
    let record = ContainerRecord {
        image: request.image.clone(),
        index,
        made_generation: loam_sys::btrfs::subvolume_info(&snapshot).step(what)?.generation,
        ephemeral_owner: request.ephemeral_owner,
    };
    drop(snapshot);
    // Before it has a name: nobody writes to it without its limit.
    if let Some(bytes) = request.quota_bytes {
        quota::contain_new(building, Limit::Absolute(bytes)).map_err(|error| at_mount(catalog, error))?;
    }
    catalog.publish(Kind::Container, &request.name, &record)?;
    Ok(ContainerStatus {
        name: request.name.clone(),
        image: record.image,
        path: catalog.subvolume(Kind::Container, &request.name),
        written_bytes: 0,
        limit_bytes: request.quota_bytes,
    })
}

/// An error about the pool as a whole names its mount point, not a subvolume that is gone when it is read.
fn at_mount(catalog: &Catalog, error: quota::Error) -> crate::Error {
    let path = catalog.mount().to_owned();
    match error {
        quota::Error::Off(_) => quota::Error::Off(path),
        quota::Error::OtherMode { wanted, on, .. } => quota::Error::OtherMode { path, wanted, on },
        error => error,
    }
    .into()
}

/// What a list says of a container, and its account where quotas are on.
pub(crate) fn status(
    catalog: &Catalog,
    name: &str,
    accounts: Option<&Accounts>,
) -> Result<(ContainerStatus, Option<Account>)> {
    let record: ContainerRecord = catalog.read(Kind::Container, name)?;
    let path = catalog.subvolume(Kind::Container, name);
    let account = accounts.map(|accounts| account_of(accounts, &path)).transpose()?.flatten();
    let since = record.made_generation;
    // One that is older than the quotas has written more than it is charged.
    let charged = accounts.zip(account).filter(|(accounts, _)| since >= accounts.enable_generation());
    let written_bytes = match charged {
        Some((_, account)) => account.charged_bytes,
        None => kernel::written_bytes(&path, since, catalog.virtual_size())?,
    };
    let limit_bytes = account.and_then(|account| account.limit_bytes);
    let status =
        ContainerStatus { name: name.to_owned(), image: record.image, path, written_bytes, limit_bytes };
    Ok((status, account))
}

/// The account of the subvolume at a path.
pub(crate) fn account_of(accounts: &Accounts, path: &Path) -> Result<Option<Account>> {
    let what = || format!("opening {}", path.display());
    let info = loam_sys::btrfs::subvolume_info(File::open(path).step(what)?).step(what)?;
    Ok(accounts.of(info.id))
}

/// All containers; one that is removed meanwhile is left out.
pub(crate) fn list(catalog: &Catalog, accounts: Option<&Accounts>) -> Result<Vec<ContainerStatus>> {
    let mut found = Vec::new();
    for name in catalog.names(Kind::Container)? {
        match status(catalog, &name, accounts) {
            Ok((container, _)) => found.push(container),
            Err(error) if catalog.taken(&name).is_some() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

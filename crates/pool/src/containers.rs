//! Containers: writable snapshots of images. Making one takes a constant time, however large the image is.

use std::fs::File;
use std::path::Path;

use crate::catalog::{Catalog, ContainerRecord, ImageRecord, Kind, remove_subvolume};
use crate::error::{Context, Result};
use crate::kernel;
use crate::protocol::{ContainerStatus, CreateRequest};

/// Snapshots the image and gives the snapshot a name.
pub(crate) fn create(catalog: &Catalog, request: &CreateRequest) -> Result<ContainerStatus> {
    catalog.check_free(&request.name)?;
    let image: ImageRecord = catalog.read(Kind::Image, &request.image)?;
    let what = || format!("snapshot of {} as {}", request.image, request.name);
    let source = File::open(catalog.subvolume(Kind::Image, &request.image)).step(what)?;
    let building = catalog.building(&request.name);
    let parent = File::open(building.parent().unwrap_or(Path::new("/"))).step(what)?;
    remove_subvolume(&building)?;
    loam_sys::btrfs::snapshot(&source, &parent, &request.name, false).step(what)?;
    let snapshot = File::open(&building).step(what)?;
    let record = ContainerRecord {
        image: request.image.clone(),
        index: image.index,
        made_generation: loam_sys::btrfs::subvolume_info(&snapshot).step(what)?.generation,
        ephemeral_owner: request.ephemeral_owner,
    };
    if let Err(error) = catalog.publish(Kind::Container, &request.name, &record) {
        remove_subvolume(&building)?;
        return Err(error);
    }
    status(catalog, &request.name)
}

/// What a list says of a container.
pub(crate) fn status(catalog: &Catalog, name: &str) -> Result<ContainerStatus> {
    let record: ContainerRecord = catalog.read(Kind::Container, name)?;
    let path = catalog.subvolume(Kind::Container, name);
    let written_bytes = kernel::written_bytes(&path, record.made_generation, catalog.virtual_size())?;
    Ok(ContainerStatus { name: name.to_owned(), image: record.image, path, written_bytes, limit_bytes: None })
}

/// All containers; one that is removed meanwhile is left out.
pub(crate) fn list(catalog: &Catalog) -> Result<Vec<ContainerStatus>> {
    let mut found = Vec::new();
    for name in catalog.names(Kind::Container)? {
        match status(catalog, &name) {
            Ok(container) => found.push(container),
            Err(error) if catalog.taken(&name).is_some() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

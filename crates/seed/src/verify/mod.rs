//! Proves an image right, or says what is wrong with it: which device, tree, block, item and field.
//!
//! It reads the image through [`crate::reader`] alone and compares what the trees say with each other: blocks with what
//! points to them, extents with their references both ways, chunks with device extents, block groups and free space,
//! names with inodes, and `.virtual-data` with the one linear map that a pool relies on. Images that a kernel has
//! written to since they were formatted are fine too.
//!
//! Memory is proportional to what the image holds: about 300 bytes for each file.

mod blocks;
mod checksums;
mod extents;
mod files;
mod finding;
mod names;
mod quota;
mod roots;
mod space;
mod superblocks;
mod virtual_data;

use crate::reader::{Device, Filesystem};
use crate::{ReadAt, Result};

use finding::Findings;
pub use finding::{Counts, Finding, Verification};

/// Verifies an image: that of a pair by both devices, a single-device seed by `virtual_image` alone, a sprouted seed by
/// both. The virtual image may end where the virtual region begins.
///
/// # Errors
/// Neither copy of a superblock can be read, or the file system uses what is not known here. Everything that is wrong
/// but does not keep the verifier from reading on is a [`Finding`].
pub fn verify(virtual_image: &dyn ReadAt, local: Option<&dyn ReadAt>) -> Result<Verification> {
    let mut devices = vec![Device { name: "virtual", image: virtual_image }];
    devices.extend(local.map(|image| Device { name: "local", image }));
    let filesystem = Filesystem::open(&devices)?;
    let mut findings = Findings::default();
    superblocks::check(&filesystem, &mut findings);
    let trees = blocks::check(&filesystem, &mut findings);
    roots::check(&filesystem, &trees, &mut findings);
    extents::check(&filesystem, &trees, &mut findings);
    space::check(&filesystem, &trees, &mut findings);
    quota::check(&trees, &mut findings);
    checksums::check(&filesystem, &trees, &mut findings);
    virtual_data::check(&filesystem, &trees, &mut findings);
    let counts = Counts {
        trees: trees.roots.len() as u64 + 2,
        blocks: trees.blocks.len() as u64,
        data_extents: trees.extents.iter().filter(|extent| !extent.is_tree()).count() as u64,
        chunks: filesystem.chunks().iter().len() as u64,
        inodes: trees.inodes,
        checked_bytes: trees.checked_bytes,
    };
    Ok(findings.into_verification(counts))
}

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

use blocks::Trees;
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
    superblocks::check_pair(&filesystem, &mut findings);
    let (trees, counts) = check(&filesystem, &mut findings);
    virtual_data::check(&filesystem, &trees, &mut findings);
    Ok(findings.into_verification(counts))
}

/// Verifies a file system that need not be one of loam's: all but what [`verify`] asks of the virtual region.
///
/// # Errors
/// As [`verify`].
pub fn verify_filesystem(devices: &[Device<'_>]) -> Result<Verification> {
    let filesystem = Filesystem::open(devices)?;
    let mut findings = Findings::default();
    let (_, counts) = check(&filesystem, &mut findings);
    Ok(findings.into_verification(counts))
}

fn check(filesystem: &Filesystem<'_>, findings: &mut Findings) -> (Trees, Counts) {
    superblocks::check(filesystem, findings);
    let trees = blocks::check(filesystem, findings);
    roots::check(filesystem, &trees, findings);
    extents::check(filesystem, &trees, findings);
    space::check(filesystem, &trees, findings);
    quota::check(&trees, findings);
    let counts = Counts {
        trees: trees.roots.len() as u64 + 2,
        blocks: trees.blocks.len() as u64,
        data_extents: trees.extents.iter().filter(|extent| !extent.is_tree()).count() as u64,
        chunks: filesystem.chunks().iter().len() as u64,
        inodes: trees.inodes,
        checked_bytes: checksums::check(filesystem, &trees, findings),
    };
    (trees, counts)
}

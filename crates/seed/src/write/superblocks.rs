//! Device items and superblocks.

use zerocopy::{FromZeros, IntoBytes};

use crate::builder::Root;
use crate::disk::{
    DevItem, DiskKey, SECTOR_SIZE, SUPER_MAGIC, SUPER_OFFSETS, SUPER_SIZE, SuperBlock, flag, object,
};
use crate::options::{GENERATION, METADATA_BASE, SYSTEM_BASE};
use crate::{Error, Identity, Image, Layout, Result};

use super::store::write_image;
use super::{Chunk, Plan};

/// The devices, in order of their ids; what they have in use is right once the chunks' lengths are.
pub(super) fn device_items(plan: &Plan<'_>) -> Vec<DevItem> {
    let (options, identity) = (plan.options, &plan.identity);
    let item = |devid: u64, total: u64, generation: u64, uuid, fsid| DevItem {
        devid: devid.into(),
        total_bytes: total.into(),
        bytes_used: plan
            .chunks()
            .filter(|chunk| chunk.devid == devid)
            .map(|chunk| chunk.length)
            .sum::<u64>()
            .into(),
        io_align: SECTOR_SIZE.into(),
        io_width: SECTOR_SIZE.into(),
        sector_size: SECTOR_SIZE.into(),
        kind: 0.into(),
        generation: generation.into(),
        start_offset: 0.into(),
        group: 0.into(),
        seek_speed: 0,
        bandwidth: 0,
        uuid,
        fsid,
    };
    let total = options.virtual_device_size();
    match options.layout {
        // The kernel opens a seed only if its superblock's generation is the one noted in its device item.
        Layout::Pair => vec![
            item(1, total, GENERATION, identity.virtual_device, identity.seed_fsid),
            item(2, options.local_size, 0, identity.local_device, identity.fsid),
        ],
        Layout::Single | Layout::MegaExtent => {
            vec![item(1, total, 0, identity.virtual_device, identity.fsid)]
        }
    }
}

/// The superblock of the device that carries the trees, and that of the virtual device.
pub(super) fn compose(plan: &Plan<'_>, root: Root, chunk_root: Root) -> (Box<SuperBlock>, Box<SuperBlock>) {
    let devices = device_items(plan);
    let mut common = Box::new(SuperBlock::new_zeroed());
    common.magic = SUPER_MAGIC;
    common.generation = GENERATION.into();
    common.root = root.bytenr.into();
    common.root_level = root.level;
    common.chunk_root = chunk_root.bytenr.into();
    common.chunk_root_level = chunk_root.level;
    common.chunk_root_generation = GENERATION.into();
    common.bytes_used = plan.chunks().map(|chunk| chunk.used).sum::<u64>().into();
    common.root_dir_objectid = object::ROOT_TREE_DIR.into();
    common.sector_size = SECTOR_SIZE.into();
    common.stripe_size = SECTOR_SIZE.into();
    common.node_size = plan.options.node_size.into();
    common.leaf_size = plan.options.node_size.into();
    common.compat_ro = (flag::COMPAT_RO_FREE_SPACE_TREE | flag::COMPAT_RO_FREE_SPACE_TREE_VALID).into();
    common.incompat = incompat(plan).into();
    common.uuid_tree_generation = GENERATION.into();
    common.label[..plan.options.label.len()].copy_from_slice(plan.options.label.as_bytes());
    if let Some(chunk) = plan.chunks().find(|chunk| chunk.kind == flag::GROUP_SYSTEM) {
        set_system_chunk(&mut common, &chunk);
    }
    let for_devices = |fsid, devices: &[DevItem], seeding: bool| {
        let mut superblock = common.clone();
        superblock.fsid = fsid;
        let flags = flag::HEADER_WRITTEN | if seeding { flag::SUPER_SEEDING } else { 0 };
        superblock.flags = flags.into();
        superblock.device_count = (devices.len() as u64).into();
        superblock.total_bytes = devices.iter().map(|device| device.total_bytes.get()).sum::<u64>().into();
        superblock
    };
    let identity = &plan.identity;
    let (mut trees, mut seed) = match plan.options.layout {
        Layout::Pair => (
            for_devices(identity.fsid, &devices, false),
            for_devices(identity.seed_fsid, &devices[..1], true),
        ),
        Layout::Single | Layout::MegaExtent => {
            let both = for_devices(identity.fsid, &devices, true);
            (both.clone(), both)
        }
    };
    if plan.options.layout == Layout::Pair {
        seed_of_pair(plan, &mut seed);
    }
    seed.device = devices[0];
    trees.device = devices[devices.len() - 1];
    for superblock in [&mut trees, &mut seed] {
        superblock.bytenr = SUPER_OFFSETS[0].into();
        superblock.seal();
    }
    (trees, seed)
}

fn set_system_chunk(superblock: &mut SuperBlock, chunk: &Chunk) {
    let entry = [DiskKey::from(chunk.key()).as_bytes(), &chunk.to_bytes()].concat();
    superblock.system_chunks[..entry.len()].copy_from_slice(&entry);
    superblock.system_chunks_size = (entry.len() as u32).into();
}

/// Nobody follows the roots of a pair's seed, so they are the same whatever the trees hold; nor its system chunk, so one
/// that many local devices stand on names none of them.
fn seed_of_pair(plan: &Plan<'_>, seed: &mut SuperBlock) {
    let system = plan.chunks().find(|chunk| chunk.kind == flag::GROUP_SYSTEM);
    if let (Some(identity), Some(chunk)) = (plan.options.seed_identity_of_pair(), system) {
        let device_uuid = Identity::new(identity, None).local_device;
        set_system_chunk(seed, &Chunk { device_uuid, ..chunk });
    }
    seed.root = METADATA_BASE.into();
    seed.root_level = 0;
    seed.chunk_root = SYSTEM_BASE.into();
    seed.chunk_root_level = 0;
    seed.bytes_used = plan.options.virtual_size.into();
}

fn incompat(plan: &Plan<'_>) -> u64 {
    let mut bits = flag::INCOMPAT_MIXED_BACKREF
        | flag::INCOMPAT_EXTENDED_IREF
        | flag::INCOMPAT_SKINNY_METADATA
        | flag::INCOMPAT_NO_HOLES;
    if plan.options.node_size > SECTOR_SIZE {
        bits |= flag::INCOMPAT_BIG_METADATA;
    }
    if plan.options.simple_quota {
        bits |= flag::INCOMPAT_SIMPLE_QUOTA;
    }
    bits
}

/// The superblock's bytes.
pub(super) fn to_bytes(superblock: &SuperBlock) -> Box<[u8; SUPER_SIZE]> {
    let mut bytes = Box::new([0; SUPER_SIZE]);
    bytes.copy_from_slice(superblock.as_bytes());
    bytes
}

/// Writes the first superblock and nothing else.
pub(super) fn write_first(bytes: &[u8], image: &mut dyn Image, device: &'static str) -> Result<()> {
    write_image(image, device, SUPER_OFFSETS[0], bytes)
}

/// Writes all copies that fit a device of `size` bytes.
pub(super) fn write(
    superblock: &SuperBlock,
    image: &mut dyn Image,
    device: &'static str,
    size: u64,
) -> Result<(), Error> {
    for offset in SUPER_OFFSETS {
        if offset + SUPER_SIZE as u64 > size {
            break;
        }
        let mut copy = *superblock;
        copy.bytenr = offset.into();
        copy.seal();
        write_image(image, device, offset, copy.as_bytes())?;
    }
    Ok(())
}

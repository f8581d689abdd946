//! Superblocks: each copy by itself, the copies with each other, the devices with their items, the label block.

use zerocopy::IntoBytes;

use crate::VIRTUAL_BASE;
use crate::disk::{DevItem, SUPER_OFFSETS, SUPER_SIZE, SuperBlock, field_at, flag};
use crate::label::read_label;
use crate::reader::{ChunkMap, Device, Filesystem, OpenDevice, check_superblock, read_superblock};

use super::finding::{Finding, Findings};

pub(super) fn check(filesystem: &Filesystem<'_>, findings: &mut Findings) {
    for open in filesystem.devices() {
        check_copies(open, findings);
        check_device_item(filesystem, open, findings);
    }
    let superblock = filesystem.superblock();
    let main = filesystem.devices().last().map_or("", |open| open.device.name);
    let at = |field: &str| Finding::new(format!("superblock.{field}"), "").device(main);
    if superblock.log_root.get() != 0 {
        findings.note("there is a log of what was synced last, not verified: a mount replays it".to_owned());
    }
    let items = filesystem.device_items();
    findings.expect_same(at("device_count"), superblock.device_count.get(), items.len() as u64);
    let total = items.iter().fold(0u64, |sum, device| sum.wrapping_add(device.total_bytes.get()));
    findings.expect_same(at("total_bytes"), superblock.total_bytes.get(), total);
    let generation = superblock.generation.get();
    if superblock.chunk_root_generation.get() > generation {
        let reason = format!("is {}, above the superblock's {generation}", superblock.chunk_root_generation);
        findings.add(Finding { reason, ..at("chunk_root_generation") });
    }
    for (bytenr, fault) in filesystem.chunk_faults() {
        findings.add(Finding::fault(fault).tree(crate::disk::object::CHUNK_TREE).block(*bytenr));
    }
}

/// What holds for a pair besides: the virtual device is a seed, and the local one says whose.
pub(super) fn check_pair(filesystem: &Filesystem<'_>, findings: &mut Findings) {
    check_seed(filesystem, findings);
    check_label(filesystem, findings);
}

/// All copies that the device has room for, or, on a virtual device with nothing below its region, the first.
fn check_copies(open: &OpenDevice<'_>, findings: &mut Findings) {
    let device = open.device;
    let size = open.superblock.device.total_bytes.get();
    let carries_trees = carries_trees(&open.superblock);
    for (copy, offset) in SUPER_OFFSETS.into_iter().enumerate() {
        let is_seed = open.superblock.flags.get() & flag::SUPER_SEEDING != 0;
        if offset + SUPER_SIZE as u64 > size || (copy > 0 && is_seed && !carries_trees) {
            break;
        }
        let at = |field: &str| {
            Finding::new(format!("superblock.{field} of the copy at {offset}"), "").device(device.name)
        };
        let superblock = match read_superblock(device, copy) {
            Ok(superblock) => superblock,
            Err(error) => {
                findings.add(Finding { reason: error.to_string(), ..at("bytes") });
                continue;
            }
        };
        let faults = check_superblock(&superblock, copy);
        for fault in &faults {
            findings.add(Finding { reason: fault.reason.clone(), ..at(&fault.field) });
        }
        if faults.is_empty() {
            compare_copies(&superblock, &open.superblock, &mut |field| {
                findings.add(Finding { reason: "differs from the first good copy".to_owned(), ..at(field) });
            });
        }
    }
}

/// Whether the chunk tree that a superblock leads to lies on its own device: not so for the seed of a pair.
fn carries_trees(superblock: &SuperBlock) -> bool {
    let used = (superblock.system_chunks_size.get() as usize).min(superblock.system_chunks.len());
    let own = superblock.device.devid.get();
    let chunks = ChunkMap::of_superblock(&superblock.system_chunks[..used]);
    chunks.is_ok_and(|chunks| chunks.iter().any(|chunk| chunk.stripes.iter().any(|place| place.devid == own)))
}

/// Copies may differ in where they lie and, hence, in checksum.
fn compare_copies(copy: &SuperBlock, first: &SuperBlock, differs: &mut dyn FnMut(&str)) {
    let mut aligned = *copy;
    (aligned.bytenr, aligned.checksum) = (first.bytenr, first.checksum);
    let bytes = aligned.as_bytes().iter().zip(first.as_bytes());
    if let Some(byte) = bytes.enumerate().find_map(|(index, (a, b))| (a != b).then_some(index)) {
        differs(&field_at(SuperBlock::FIELDS, byte).unwrap_or_default());
    }
}

/// A superblock's device item is that of the chunk tree.
fn check_device_item(filesystem: &Filesystem<'_>, open: &OpenDevice<'_>, findings: &mut Findings) {
    let own = &open.superblock.device;
    let at = |field: String| Finding::new(format!("superblock.device.{field}"), "").device(open.device.name);
    let Some(item) = filesystem.device_items().iter().find(|item| item.devid == own.devid) else {
        let reason = format!("the chunk tree knows no device {}", own.devid);
        findings.add(Finding { reason, ..at("devid".to_owned()) });
        return;
    };
    // A seed's superblock is not written any more, while the file system that sprouted from it goes on.
    let is_seed = open.superblock.flags.get() & flag::SUPER_SEEDING != 0;
    let may_differ = |name: &str| is_seed && matches!(name, "generation" | "bytes_used");
    for field in DevItem::FIELDS {
        let range = field.offset..field.offset + field.size;
        let same = own.as_bytes()[range.clone()] == item.as_bytes()[range];
        if !same && !may_differ(field.name) {
            findings.add(Finding {
                reason: "differs from the chunk tree".to_owned(),
                ..at(field.name.to_owned())
            });
        }
    }
    if own.fsid != open.superblock.fsid {
        findings.add(Finding { reason: "differs from the superblock's".to_owned(), ..at("fsid".to_owned()) });
    }
    // The virtual region of a seed is nobody's to read, so its image may end where that begins.
    let needed = if is_seed { own.total_bytes.get().min(VIRTUAL_BASE) } else { own.total_bytes.get() };
    match open.device.image.length() {
        Ok(length) if length < needed => {
            let reason = format!("is {}, but the image ends at {length}", own.total_bytes);
            findings.add(Finding { reason, ..at("total_bytes".to_owned()) });
        }
        Ok(_) => {}
        Err(error) => findings.add(Finding { reason: error.to_string(), ..at("total_bytes".to_owned()) }),
    }
}

/// The kernel opens the seed of a pair only if its generation is the one that the chunk tree notes.
fn check_seed(filesystem: &Filesystem<'_>, findings: &mut Findings) {
    let [seed, _] = filesystem.devices() else { return };
    let superblock = &seed.superblock;
    let at = |field: &str| Finding::new(format!("superblock.{field}"), "").device(seed.device.name);
    let flags = superblock.flags.get();
    findings.expect_same(at("flags"), flags & flag::SUPER_SEEDING, flag::SUPER_SEEDING);
    let item = filesystem.device_items().iter().find(|item| item.devid == superblock.device.devid);
    if let Some(item) = item {
        findings.expect_same(at("generation"), superblock.generation.get(), item.generation.get());
    }
}

/// The label block of a pair's local image, where there is one, belongs to this virtual device.
fn check_label(filesystem: &Filesystem<'_>, findings: &mut Findings) {
    let [seed, local] = filesystem.devices() else { return };
    let Device { name, image } = local.device;
    let at = |field: &str| Finding::new(format!("label block {field}"), "").device(name);
    let mut bytes = [0; crate::LABEL_SIZE];
    let blank = image.read_at(crate::LABEL_OFFSET, &mut bytes).is_ok() && bytes.iter().all(|&byte| byte == 0);
    // A seed sprouted by the kernel has a local device without label.
    if blank && carries_trees(&seed.superblock) {
        return;
    }
    match read_label(image) {
        Ok(label) => {
            let size = seed.superblock.device.total_bytes.get().saturating_sub(VIRTUAL_BASE);
            findings.expect_same(at("virtual size"), label.virtual_size, size);
            let identity = crate::Identity::new(&label.identity, label.seed_identity.as_ref());
            if identity.fsid != local.superblock.fsid || identity.seed_fsid != seed.superblock.fsid {
                let reason = "is not what the devices' UUIDs were derived from";
                findings.add(Finding { reason: reason.to_owned(), ..at("identity") });
            }
        }
        Err(error) => findings.add(Finding { reason: error.to_string(), ..at("bytes") }),
    }
}

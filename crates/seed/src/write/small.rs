//! The trees that do not depend on file trees: chunks, devices, subvolumes by UUID, quotas, free space, and the
//! tree of trees. Each is a function that sends items to a sink, so that the same code counts and writes.

use zerocopy::IntoBytes;

use crate::builder::{ItemSink, Root};
use crate::disk::{
    ChunkItem, DevExtent, DevItem, DiskKey, FreeSpaceInfo, Key, QgroupInfo, QgroupLimit, QgroupStatus,
    RootItem, RootRef, SECTOR_SIZE, STRIPE_LENGTH, Stripe, entry, flag, item, object,
};
use crate::options::GENERATION;
use crate::{Attributes, Result, hash};

use super::Plan;
use super::fs_tree::{FIRST_INDEX, TYPE_DIRECTORY, dir_entry, inode_item, root_directory_ref, time};

/// The directory of the root tree names the subvolume that is mounted by default.
const DEFAULT_NAME: &[u8] = b"default";

/// One chunk with its one stripe.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: u64,
    pub(super) used: u64,
    pub(super) devid: u64,
    pub(super) device_uuid: [u8; 16],
}

impl Chunk {
    /// The chunk item with its stripe, as it also stands in the superblock.
    pub(super) fn to_bytes(self) -> [u8; 80] {
        let head = ChunkItem {
            length: self.length.into(),
            owner: object::EXTENT_TREE.into(),
            stripe_length: STRIPE_LENGTH.into(),
            flags: self.kind.into(),
            io_align: (STRIPE_LENGTH as u32).into(),
            io_width: (STRIPE_LENGTH as u32).into(),
            sector_size: SECTOR_SIZE.into(),
            stripe_count: 1.into(),
            sub_stripes: 0.into(),
        };
        let stripe = Stripe { devid: self.devid.into(), offset: self.start.into(), uuid: self.device_uuid };
        let mut bytes = [0; 80];
        bytes[..48].copy_from_slice(head.as_bytes());
        bytes[48..].copy_from_slice(stripe.as_bytes());
        bytes
    }

    /// Its key in the chunk tree.
    pub(super) fn key(self) -> Key {
        Key::new(object::FIRST_FREE, item::CHUNK, self.start)
    }
}

pub(super) fn chunk_tree(plan: &Plan<'_>, devices: &[DevItem], sink: &mut dyn ItemSink) -> Result<()> {
    for device in devices {
        sink.push(Key::new(object::DEV_ITEMS, item::DEV, device.devid.get()), &[device.as_bytes()])?;
    }
    for chunk in plan.chunks() {
        sink.push(chunk.key(), &[&chunk.to_bytes()])?;
    }
    Ok(())
}

pub(super) fn dev_tree(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    for devid in plan.devids() {
        for chunk in plan.chunks().filter(|chunk| chunk.devid == devid) {
            let body = DevExtent {
                chunk_tree: object::CHUNK_TREE.into(),
                chunk_objectid: object::FIRST_FREE.into(),
                chunk_offset: chunk.start.into(),
                length: chunk.length.into(),
                chunk_tree_uuid: plan.identity.chunk_tree,
            };
            sink.push(Key::new(devid, item::DEV_EXTENT, chunk.start), &[body.as_bytes()])?;
        }
    }
    Ok(())
}

pub(super) fn data_reloc_tree(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let inode = inode_item(&plan.directory_attributes(), TYPE_DIRECTORY, 1);
    sink.push(Key::new(object::FIRST_FREE, item::INODE, 0), &[inode.as_bytes()])?;
    root_directory_ref(object::FIRST_FREE, sink)
}

pub(super) fn uuid_tree(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let mut entries: Vec<(Key, u64)> = plan
        .subvolume_uuids()
        .map(|(root, uuid)| {
            let (high, low) = uuid.split_at(8);
            let half = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
            (Key::new(half(high), item::UUID_SUBVOL, half(low)), root)
        })
        .collect();
    entries.sort_unstable();
    for (key, root) in entries {
        sink.push(key, &[&root.to_le_bytes()])?;
    }
    Ok(())
}

/// Quotas are on as from the next transaction: what the formatter writes is older than `enable_generation`, which
/// the kernel neither charges nor, when it goes, credits (`btrfs_record_squota_delta`).
pub(super) fn quota_tree(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let status = QgroupStatus {
        version: 1.into(),
        generation: GENERATION.into(),
        flags: (flag::QGROUP_ON | flag::QGROUP_SIMPLE).into(),
        rescan: 0.into(),
        enable_generation: (GENERATION + 1).into(),
    };
    sink.push(Key::new(0, item::QGROUP_STATUS, 0), &[status.as_bytes()])?;
    let info = QgroupInfo {
        generation: GENERATION.into(),
        referenced: 0.into(),
        referenced_compressed: 0.into(),
        exclusive: 0.into(),
        exclusive_compressed: 0.into(),
    };
    for (root, _) in plan.subvolume_uuids() {
        sink.push(Key::new(0, item::QGROUP_INFO, root), &[info.as_bytes()])?;
    }
    for (root, _) in plan.subvolume_uuids() {
        let limit = [0; size_of::<QgroupLimit>()];
        sink.push(Key::new(0, item::QGROUP_LIMIT, root), &[&limit])?;
    }
    Ok(())
}

pub(super) fn free_space_tree(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    for chunk in plan.chunks() {
        let free = chunk.length - chunk.used;
        let info = FreeSpaceInfo { extent_count: u32::from(free > 0).into(), flags: 0.into() };
        sink.push(Key::new(chunk.start, item::FREE_SPACE_INFO, chunk.length), &[info.as_bytes()])?;
        if free > 0 {
            sink.push(Key::new(chunk.start + chunk.used, item::FREE_SPACE_EXTENT, free), &[])?;
        }
    }
    Ok(())
}

/// `roots` are the trees in order of their ids; what they say of places does not matter for counting.
pub(super) fn root_tree(plan: &Plan<'_>, roots: &[(u64, Root)], sink: &mut dyn ItemSink) -> Result<()> {
    for &(id, root) in roots.iter().take_while(|(id, _)| *id <= object::FS_TREE) {
        root_item(plan, id, root, sink)?;
    }
    for (position, subvolume) in plan.subvolumes.iter().enumerate() {
        let key = Key::new(object::FS_TREE, item::ROOT_REF, plan.subvolume_id(position));
        let name = subvolume.name.as_bytes();
        sink.push(key, &[plan.root_ref(position, name).as_bytes(), name])?;
    }
    default_subvolume(plan, sink)?;
    for &(id, root) in roots.iter().skip_while(|(id, _)| *id <= object::FS_TREE) {
        root_item(plan, id, root, sink)?;
        if let Some(position) = plan.subvolume_position(id) {
            let name = plan.subvolumes[position].name.as_bytes();
            let key = Key::new(id, item::ROOT_BACKREF, object::FS_TREE);
            sink.push(key, &[plan.root_ref(position, name).as_bytes(), name])?;
        }
    }
    Ok(())
}

fn default_subvolume(plan: &Plan<'_>, sink: &mut dyn ItemSink) -> Result<()> {
    let directory = object::ROOT_TREE_DIR;
    let inode = inode_item(&plan.directory_attributes(), TYPE_DIRECTORY, 1);
    sink.push(Key::new(directory, item::INODE, 0), &[inode.as_bytes()])?;
    root_directory_ref(directory, sink)?;
    let location = Key::new(object::FS_TREE, item::ROOT, u64::MAX);
    let head = dir_entry(location, DEFAULT_NAME.len(), entry::DIRECTORY);
    let key = Key::new(directory, item::DIR_ITEM, hash::name(DEFAULT_NAME));
    sink.push(key, &[head.as_bytes(), DEFAULT_NAME])
}

fn root_item(plan: &Plan<'_>, id: u64, root: Root, sink: &mut dyn ItemSink) -> Result<()> {
    let position = plan.subvolume_position(id);
    let is_subvolume = id == object::FS_TREE || position.is_some();
    let has_directory = is_subvolume || id == object::DATA_RELOC_TREE;
    let readonly = position.is_some_and(|position| plan.subvolumes[position].readonly);
    let node_size = u64::from(plan.options.node_size);
    let mut inode = inode_item(&Attributes { mode: 0o755, ..Attributes::default() }, TYPE_DIRECTORY, 1);
    inode.size = 3.into();
    inode.nbytes = node_size.into();
    if is_subvolume {
        inode.flags = flag::INODE_ROOT_ITEM_INIT.into();
    }
    let now = time(if is_subvolume { plan.options.timestamp } else { crate::Timestamp::default() });
    let zero = time(crate::Timestamp::default());
    let body = RootItem {
        inode,
        generation: GENERATION.into(),
        root_dirid: if has_directory { object::FIRST_FREE } else { 0 }.into(),
        bytenr: root.bytenr.into(),
        byte_limit: 0.into(),
        bytes_used: (root.blocks * node_size).into(),
        last_snapshot: 0.into(),
        flags: if readonly { flag::ROOT_READONLY } else { 0 }.into(),
        refs: 1.into(),
        drop_progress: DiskKey::from(Key::default()),
        drop_level: 0,
        level: root.level,
        generation_v2: GENERATION.into(),
        uuid: if is_subvolume { plan.subvolume_uuid(id) } else { [0; 16] },
        parent_uuid: [0; 16],
        received_uuid: [0; 16],
        ctransid: if is_subvolume { GENERATION } else { 0 }.into(),
        otransid: if is_subvolume { GENERATION } else { 0 }.into(),
        stransid: 0.into(),
        rtransid: 0.into(),
        ctime: now,
        otime: now,
        stime: zero,
        rtime: zero,
        reserved: [0; 64],
    };
    sink.push(Key::new(id, item::ROOT, 0), &[body.as_bytes()])
}

impl Plan<'_> {
    fn root_ref(&self, position: usize, name: &[u8]) -> RootRef {
        RootRef {
            directory: object::FIRST_FREE.into(),
            index: (FIRST_INDEX + 1 + position as u64).into(),
            name_length: (name.len() as u16).into(),
        }
    }
}

//! Chunks, device extents, block groups, free space, and the sums of what is used: all must say the same.

use std::collections::HashMap;

use crate::disk::{Key, flag, item, object};
use crate::reader::{Chunk, Filesystem};

use super::blocks::{BlockGroup, Trees};
use super::extents::Extent;
use super::finding::{Finding, Findings, Only, differences};

pub(super) fn check(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    chunks(filesystem, trees, findings);
    device_extents(filesystem, trees, findings);
    let used = block_groups(trees, findings);
    let main = filesystem.devices().last().map_or("", |open| open.device.name);
    let at = Finding::new("superblock.bytes_used", "").device(main);
    findings.expect_same(at, filesystem.superblock().bytes_used.get(), used);
    if filesystem.superblock().compat_ro.get() & flag::COMPAT_RO_FREE_SPACE_TREE != 0 {
        free_space(trees, findings);
    }
}

fn at_chunk(chunk: &Chunk, field: &str) -> Finding {
    let key = Key::new(object::FIRST_FREE, item::CHUNK, chunk.logical);
    Finding::new(field, "").tree(object::CHUNK_TREE).key(key)
}

/// Each chunk is one block group of the same length and type.
fn chunks(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    for chunk in filesystem.chunks().iter() {
        findings.expect_same(at_chunk(chunk, "owner"), chunk.owner, object::EXTENT_TREE);
        findings.expect_same(
            at_chunk(chunk, "stripe_length"),
            chunk.stripe_length,
            crate::disk::STRIPE_LENGTH,
        );
        if !chunk.is_linear() {
            let reason = format!("{:#x} is a profile that is not verified", chunk.flags);
            findings.add(Finding { reason, ..at_chunk(chunk, "flags") });
        }
    }
    let of_chunks: Vec<(u64, u64, u64)> =
        filesystem.chunks().iter().map(|chunk| (chunk.logical, chunk.length, chunk.flags)).collect();
    let mut of_groups: Vec<(u64, u64, u64)> =
        trees.block_groups.iter().map(|group| (group.start, group.length, group.flags)).collect();
    of_groups.sort_unstable();
    let describe =
        |(start, length, flags): &(u64, u64, u64)| format!("{length} bytes at {start} with flags {flags:#x}");
    differences(&of_chunks, &of_groups, |only| {
        findings.add(match only {
            Only::Left(chunk) => {
                let reason = format!("{}: there is no such block group", describe(chunk));
                Finding::new("chunk", reason).tree(object::CHUNK_TREE)
            }
            Only::Right(group) => {
                let reason = format!("{}: there is no such chunk", describe(group));
                Finding::new("block group", reason).tree(object::EXTENT_TREE)
            }
        });
    });
}

/// Each stripe is one device extent; device extents do not overlap and end on the device.
fn device_extents(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) {
    type Place = (u64, u64, u64, u64);
    let mut of_chunks: Vec<Place> = filesystem
        .chunks()
        .iter()
        .filter(|chunk| chunk.is_linear())
        .flat_map(|chunk| {
            chunk.stripes.iter().map(|place| (place.devid, place.physical, chunk.logical, chunk.length))
        })
        .collect();
    of_chunks.sort_unstable();
    let of_devices: Vec<Place> = trees
        .dev_extents
        .iter()
        .map(|extent| {
            (extent.devid, extent.physical, extent.item.chunk_offset.get(), extent.item.length.get())
        })
        .collect();
    let describe = |(devid, physical, logical, length): &Place| {
        format!("{length} bytes at {physical} of device {devid} for the chunk at {logical}")
    };
    differences(&of_chunks, &of_devices, |only| {
        findings.add(match only {
            Only::Left(stripe) => {
                let reason = format!("{}: there is no such device extent", describe(stripe));
                Finding::new("stripe", reason).tree(object::CHUNK_TREE)
            }
            Only::Right(extent) => {
                let reason = format!("{}: there is no such stripe", describe(extent));
                Finding::new("device extent", reason).tree(object::DEV_TREE)
            }
        });
    });
    for extent in &trees.dev_extents {
        let key = Key::new(extent.devid, item::DEV_EXTENT, extent.physical);
        let at = |field: &str| Finding::new(field, "").tree(object::DEV_TREE).key(key);
        let item = &extent.item;
        findings.expect_same(at("chunk_tree"), item.chunk_tree.get(), object::CHUNK_TREE);
        findings.expect_same(at("chunk_objectid"), item.chunk_objectid.get(), object::FIRST_FREE);
        // The kernel leaves this zero in the extents that it makes.
        let uuid = filesystem.chunk_tree_uuid();
        if item.chunk_tree_uuid != [0; 16] && uuid.is_some_and(|uuid| uuid != item.chunk_tree_uuid) {
            findings
                .add(Finding { reason: "is not the chunk tree's UUID".to_owned(), ..at("chunk_tree_uuid") });
        }
    }
    devices(filesystem, &of_devices, findings);
}

fn devices(filesystem: &Filesystem<'_>, extents: &[(u64, u64, u64, u64)], findings: &mut Findings) {
    let mut sums: HashMap<u64, u64> = HashMap::new();
    let mut last = (0, 0);
    for &(devid, physical, _, length) in extents {
        let at = |reason: String| {
            let key = Key::new(devid, item::DEV_EXTENT, physical);
            Finding::new("device extent", reason).tree(object::DEV_TREE).key(key)
        };
        if last.0 == devid && physical < last.1 {
            findings.add(at("begins inside of the one before".to_owned()));
        }
        let end = physical.saturating_add(length);
        last = (devid, end);
        let sum = sums.entry(devid).or_default();
        *sum = sum.saturating_add(length);
        match filesystem.device_items().iter().find(|device| device.devid.get() == devid) {
            Some(device) if device.total_bytes.get() >= end => {}
            Some(device) => findings.add(at(format!("ends at {end}, the device at {}", device.total_bytes))),
            None => findings.add(at("there is no such device".to_owned())),
        }
    }
    let mut uuids = HashMap::new();
    for device in filesystem.device_items() {
        let devid = device.devid.get();
        uuids.insert(devid, device.uuid);
        let key = Key::new(object::DEV_ITEMS, item::DEV, devid);
        let at = Finding::new("bytes_used", "").tree(object::CHUNK_TREE).key(key);
        findings.expect_same(at, device.bytes_used.get(), sums.get(&devid).copied().unwrap_or(0));
    }
    for chunk in filesystem.chunks().iter() {
        for place in &chunk.stripes {
            if uuids.get(&place.devid) != Some(&place.uuid) {
                let reason = format!("is not that of device {}", place.devid);
                findings.add(Finding { reason, ..at_chunk(chunk, "stripe.uuid") });
            }
        }
    }
}

/// Extents lie in block groups of their kind and add up to what these say is used; returns the sum of that.
fn block_groups(trees: &Trees, findings: &mut Findings) -> u64 {
    let mut groups: Vec<(&BlockGroup, u64)> = trees.block_groups.iter().map(|group| (group, 0)).collect();
    groups.sort_unstable_by_key(|(group, _)| group.start);
    for extent in &trees.extents {
        let index = groups.partition_point(|(group, _)| group.start <= extent.bytenr);
        let within = index.checked_sub(1).and_then(|index| groups.get_mut(index));
        let end = extent.bytenr + extent.length;
        match within.filter(|(group, _)| end <= group.start.saturating_add(group.length)) {
            Some((group, used)) => {
                *used = used.saturating_add(extent.length);
                check_kind(extent, group, trees, findings);
            }
            None => {
                let reason =
                    format!("the {} bytes at {} are in no block group", extent.length, extent.bytenr);
                findings.add(Finding::new("extent", reason).tree(object::EXTENT_TREE));
            }
        }
    }
    let mut total = 0u64;
    for (group, used) in groups {
        let key = Key::new(group.start, item::BLOCK_GROUP, group.length);
        findings.expect_same(Finding::new("used", "").tree(object::EXTENT_TREE).key(key), group.used, used);
        total = total.saturating_add(used);
    }
    total
}

fn check_kind(extent: &Extent, group: &BlockGroup, trees: &Trees, findings: &mut Findings) {
    let owner = trees.blocks.get(&extent.bytenr).map(|block| block.owner);
    let wanted = match (extent.is_tree(), owner) {
        (false, _) => flag::GROUP_DATA,
        (true, Some(object::CHUNK_TREE)) => flag::GROUP_SYSTEM,
        (true, _) => flag::GROUP_METADATA,
    };
    if group.flags & wanted == 0 {
        let reason = format!("lies in a block group with flags {:#x}, should have {wanted:#x}", group.flags);
        let what = format!("extent at {}", extent.bytenr);
        findings.add(Finding::new(what, reason).tree(object::EXTENT_TREE));
    }
}

/// What the free space tree says is free is what no extent has.
fn free_space(trees: &Trees, findings: &mut Findings) {
    let at = |reason: String| Finding::new("free space", reason).tree(object::FREE_SPACE_TREE);
    let groups: HashMap<(u64, u64), ()> =
        trees.block_groups.iter().map(|group| ((group.start, group.length), ())).collect();
    let mut with_info = HashMap::new();
    for (start, length, info) in &trees.free_space.infos {
        if !groups.contains_key(&(*start, *length)) {
            findings.add(at(format!("{length} bytes at {start} are no block group")));
        }
        with_info.insert(*start, info);
    }
    let mut runs = trees.free_space.runs.clone();
    runs.sort_unstable();
    let (mut extent_index, mut run_index, mut bitmap_index) = (0, 0, 0);
    let mut sorted: Vec<&BlockGroup> = trees.block_groups.iter().collect();
    sorted.sort_unstable_by_key(|group| group.start);
    for group in sorted {
        let end = group.start.saturating_add(group.length);
        let free = complement(group.start, end, &trees.extents, &mut extent_index);
        let stated = joined(&runs, &mut run_index, end);
        let bitmaps = trees.free_space.bitmaps[bitmap_index..].partition_point(|(start, _)| *start < end);
        bitmap_index += bitmaps;
        differences(&stated, &free, |only| {
            findings.add(at(match only {
                Only::Left((start, length)) => {
                    format!("{length} bytes at {start} are stated, but are not a run of free space")
                }
                Only::Right((start, length)) => {
                    format!("{length} bytes at {start} are free, but not stated as a run")
                }
            }));
        });
        let Some(info) = with_info.get(&group.start) else {
            findings.add(at(format!("the block group at {} has no FREE_SPACE_INFO", group.start)));
            continue;
        };
        let key = Key::new(group.start, item::FREE_SPACE_INFO, group.length);
        let place = |field: &str| Finding::new(field, "").tree(object::FREE_SPACE_TREE).key(key);
        findings.expect_same(place("extent_count"), info.extent_count.get().into(), free.len() as u64);
        findings.expect_same(place("flags"), info.flags.get().into(), u64::from(bitmaps > 0));
    }
    for (start, length) in &runs[run_index..] {
        findings.add(at(format!("{length} bytes at {start} are in no block group")));
    }
}

/// The runs of `start..end` that no extent has; `index` goes on through the extents.
fn complement(start: u64, end: u64, extents: &[Extent], index: &mut usize) -> Vec<(u64, u64)> {
    let (mut free, mut position) = (Vec::new(), start);
    while let Some(extent) = extents.get(*index).filter(|extent| extent.bytenr < end) {
        if extent.bytenr > position {
            free.push((position, extent.bytenr - position));
        }
        position = position.max(extent.bytenr + extent.length);
        *index += 1;
    }
    if position < end {
        free.push((position, end - position));
    }
    free
}

/// The runs that begin before `end`, adjacent ones joined: bitmaps cut runs where they end.
fn joined(runs: &[(u64, u64)], index: &mut usize, end: u64) -> Vec<(u64, u64)> {
    let mut result: Vec<(u64, u64)> = Vec::new();
    while let Some(&(start, length)) = runs.get(*index).filter(|(start, _)| *start < end) {
        match result.last_mut() {
            Some(last) if last.0.checked_add(last.1) == Some(start) => last.1 = last.1.saturating_add(length),
            _ => result.push((start, length)),
        }
        *index += 1;
    }
    result
}

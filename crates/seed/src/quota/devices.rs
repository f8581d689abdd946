//! Opens a filesystem from devices in any order.

use crate::Result;
use crate::disk::{SUPER_OFFSETS, SuperBlock, flag};
use crate::reader::{Device, Filesystem, check_superblock, read_superblock};

/// The reader takes the last device for the filesystem's own: a seed comes first, and of several members the one that
/// was written last is believed.
pub(super) fn open<'a>(devices: &[Device<'a>]) -> Result<Filesystem<'a>> {
    let mut ordered: Vec<Device<'a>> = devices.to_vec();
    ordered.sort_by_key(|device| {
        let superblock = first_good(*device);
        superblock.map(|superblock| {
            let seeding = superblock.flags.get() & flag::SUPER_SEEDING != 0;
            (!seeding, superblock.generation.get())
        })
    });
    Filesystem::open(&ordered)
}

/// The generation of the last commit that reached any of the devices.
pub(super) fn generation(devices: &[Device<'_>]) -> Option<u64> {
    devices
        .iter()
        .filter_map(|device| first_good(*device))
        .map(|superblock| superblock.generation.get())
        .max()
}

fn first_good(device: Device<'_>) -> Option<Box<SuperBlock>> {
    (0..SUPER_OFFSETS.len()).find_map(|copy| {
        read_superblock(device, copy).ok().filter(|superblock| check_superblock(superblock, copy).is_empty())
    })
}

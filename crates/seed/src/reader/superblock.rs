//! Reads superblocks and says what is wrong with them.

use zerocopy::{FromBytes, IntoBytes};

use crate::disk::{
    LEVEL_MAX, SECTOR_SIZE, SUPER_MAGIC, SUPER_OFFSETS, SUPER_SIZE, SuperBlock, field_at, flag, object,
};
use crate::{Error, ReadAt, Result};

use super::crc::{FlippedBit, flipped_bit};
use super::{Device, Fault};

/// Features that change nothing in what is read here, or that are handled.
const INCOMPAT_KNOWN: u64 = flag::INCOMPAT_MIXED_BACKREF
    | flag::INCOMPAT_DEFAULT_SUBVOL
    | flag::INCOMPAT_COMPRESS_LZO
    | flag::INCOMPAT_COMPRESS_ZSTD
    | flag::INCOMPAT_BIG_METADATA
    | flag::INCOMPAT_EXTENDED_IREF
    | flag::INCOMPAT_RAID56
    | flag::INCOMPAT_SKINNY_METADATA
    | flag::INCOMPAT_NO_HOLES
    | flag::INCOMPAT_METADATA_UUID
    | flag::INCOMPAT_RAID1C34
    | flag::INCOMPAT_SIMPLE_QUOTA;

/// Reads a copy of a device's superblock as it is; `copy` is its place among [`SUPER_OFFSETS`].
///
/// # Errors
/// The bytes cannot be read.
pub fn read_superblock(device: Device<'_>, copy: usize) -> Result<Box<SuperBlock>> {
    let offset = SUPER_OFFSETS[copy];
    let mut bytes = Box::new([0; SUPER_SIZE]);
    device.image.read_at(offset, &mut bytes[..]).map_err(|source| Error::Io {
        operation: "read",
        device: device.name,
        offset,
        length: SUPER_SIZE as u64,
        source,
    })?;
    SuperBlock::read_from_bytes(&bytes[..])
        .map(Box::new)
        .map_err(|_| Error::Inconsistent("a superblock of another size".to_owned()))
}

/// The first superblock of a virtual device, which for a pair is all that its image holds.
///
/// # Errors
/// It cannot be read, or has a fault.
pub fn read_virtual_superblock(image: &dyn ReadAt) -> Result<Box<[u8; SUPER_SIZE]>> {
    let device = Device { name: "virtual", image };
    let superblock = read_superblock(device, 0)?;
    if let Some(fault) = check_superblock(&superblock, 0).first() {
        return Err(damaged(device, 0, fault));
    }
    let mut bytes = Box::new([0; SUPER_SIZE]);
    bytes.copy_from_slice(superblock.as_bytes());
    Ok(bytes)
}

fn damaged(device: Device<'_>, copy: usize, fault: &Fault) -> Error {
    let (offset, reason) = (SUPER_OFFSETS[copy], fault.to_string());
    Error::Format { what: "superblock", device: device.name, offset, reason }
}

/// The first copy without fault; the error is about the first copy.
pub(super) fn first_good(device: Device<'_>) -> Result<Box<SuperBlock>> {
    let mut first = None;
    for copy in 0..SUPER_OFFSETS.len() {
        let result = read_superblock(device, copy).and_then(|superblock| {
            match check_superblock(&superblock, copy).first() {
                Some(fault) => Err(damaged(device, copy, fault)),
                None => Ok(superblock),
            }
        });
        match result {
            Ok(superblock) => return Ok(superblock),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| Error::Inconsistent("there are no superblocks".to_owned())))
}

/// Everything that can be said against a superblock by itself.
pub fn check_superblock(superblock: &SuperBlock, copy: usize) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |field: &str, reason: String| {
        faults.push(Fault { field: field.to_owned(), key: None, reason });
    };
    if !superblock.checksum_matches() {
        let (field, reason) = explain_checksum(superblock);
        fault(&field, reason);
        return faults;
    }
    if superblock.magic != SUPER_MAGIC {
        fault("magic", "is not that of btrfs".to_owned());
    }
    if superblock.bytenr.get() != SUPER_OFFSETS[copy] {
        fault("bytenr", format!("is {}, should be {}", superblock.bytenr, SUPER_OFFSETS[copy]));
    }
    let node_size = superblock.node_size.get();
    if !node_size.is_power_of_two() || !(4096..=65_536).contains(&node_size) {
        fault("node_size", format!("is {node_size}"));
    }
    if superblock.leaf_size.get() != node_size {
        fault("leaf_size", format!("is {}, should be {node_size}", superblock.leaf_size));
    }
    if superblock.sector_size.get() != SECTOR_SIZE {
        fault("sector_size", format!("is {}; only {SECTOR_SIZE} is supported", superblock.sector_size));
    }
    if superblock.stripe_size != superblock.sector_size {
        fault("stripe_size", format!("is {}, should be {}", superblock.stripe_size, superblock.sector_size));
    }
    if superblock.checksum_type.get() != 0 {
        fault("checksum_type", format!("is {}; only crc32c is supported", superblock.checksum_type));
    }
    for (field, level) in [
        ("root_level", superblock.root_level),
        ("chunk_root_level", superblock.chunk_root_level),
        ("log_root_level", superblock.log_root_level),
    ] {
        if level >= LEVEL_MAX {
            fault(field, format!("is {level}; at most 7 is possible"));
        }
    }
    if superblock.system_chunks_size.get() as usize > superblock.system_chunks.len() {
        fault("system_chunks_size", format!("is {}", superblock.system_chunks_size));
    }
    if superblock.root_dir_objectid.get() != object::ROOT_TREE_DIR {
        fault("root_dir_objectid", format!("is {}, should be 6", superblock.root_dir_objectid));
    }
    if superblock.device.sector_size != superblock.sector_size {
        fault("device.sector_size", format!("is {}", superblock.device.sector_size));
    }
    if superblock.flags.get() & flag::HEADER_WRITTEN == 0 {
        fault("flags", "lack the bit \"written\"".to_owned());
    }
    faults
}

fn explain_checksum(superblock: &SuperBlock) -> (String, String) {
    let mut stored = [0; 4];
    stored.copy_from_slice(&superblock.checksum[..4]);
    let (stored, computed) = (u32::from_le_bytes(stored), superblock.expected_checksum());
    if stored == computed {
        return ("checksum".to_owned(), "the unused part is not zero".to_owned());
    }
    let wrong = format!("checksum is {computed:#010x} but {stored:#010x} is stored");
    let checked_from = superblock.checksum.len();
    match flipped_bit(stored, computed, SUPER_SIZE - checked_from) {
        Some(FlippedBit::Checksum(bit)) => {
            ("checksum".to_owned(), format!("{wrong}: bit {bit} of the stored one is flipped"))
        }
        Some(FlippedBit::Data(bit)) => {
            let byte = checked_from + bit / 8;
            let field = field_at(SuperBlock::FIELDS, byte).unwrap_or_default();
            (field, format!("{wrong}: bit {} of byte {byte} is flipped", bit % 8))
        }
        None if superblock.magic != SUPER_MAGIC => {
            ("magic".to_owned(), "this is no btrfs superblock".to_owned())
        }
        None => ("superblock".to_owned(), format!("{wrong}: more than one bit differs")),
    }
}

/// Whether what the file system asks for is known here.
pub(super) fn supported(superblock: &SuperBlock) -> Result<(), String> {
    let unknown = superblock.incompat.get() & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(format!("it has features that this program does not know (incompat {unknown:#x})"));
    }
    Ok(())
}

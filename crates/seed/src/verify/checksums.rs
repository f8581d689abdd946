//! Data written on the local device against its checksums. The virtual region has none.

use crate::disk::{Key, SECTOR_SIZE, item, object};
use crate::reader::Filesystem;

use super::blocks::Trees;
use super::finding::{Finding, Findings};

/// The object that checksum items belong to.
const CHECKSUM_OBJECT: u64 = 10u64.wrapping_neg();

/// Returns how many bytes of data were compared.
pub(super) fn check(filesystem: &Filesystem<'_>, trees: &Trees, findings: &mut Findings) -> u64 {
    let sector = u64::from(SECTOR_SIZE);
    let mut buffer = vec![0; SECTOR_SIZE as usize];
    let (mut end, mut checked) = (0, 0);
    for (start, checksums) in &trees.checksums {
        let key = Key::new(CHECKSUM_OBJECT, item::EXTENT_CSUM, *start);
        let at = |reason: String| Finding::new("checksums", reason).tree(object::CSUM_TREE).key(key);
        let length = checksums.len() as u64 / 4 * sector;
        if !checksums.len().is_multiple_of(4) || *start < end || !start.is_multiple_of(sector) {
            findings.add(at("overlaps the item before it, or is cut off".to_owned()));
            continue;
        }
        let Some(item_end) = start.checked_add(length) else {
            findings.add(at("reaches beyond all addresses".to_owned()));
            continue;
        };
        end = item_end;
        let index = trees.extents.partition_point(|extent| extent.bytenr <= *start);
        let mut position = *start;
        for extent in &trees.extents[index.saturating_sub(1)..] {
            let covered = extent.bytenr <= position && !extent.is_tree();
            if position >= end || !covered {
                break;
            }
            position = position.max(extent.bytenr + extent.length);
        }
        if position < end {
            findings.add(at(format!("covers {position}, where no data extent is")));
        }
        for (number, stored) in checksums.chunks_exact(4).enumerate() {
            let address = start + number as u64 * sector;
            checked += sector;
            match filesystem.read_logical(address, &mut buffer) {
                Ok(_) if crc32c::crc32c(&buffer).to_le_bytes() == stored => {}
                Ok(_) => findings.add(at(format!("data at {address} does not match its checksum"))),
                Err(reason) => findings.add(at(format!("data at {address}: {reason}"))),
            }
        }
    }
    checked
}

//! Subvolumes and snapshots that are members of groups, and limited, from their first byte on: `BTRFS_SUBVOL_QGROUP_INHERIT`
//! does it in the transaction that makes them.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd};

use super::{LIMIT_MAX_RFER, QgroupLimits};
use crate::btrfs::{SNAP_CREATE_V2, SUBVOL_CREATE_V2, VolArgs2, named, within};
use crate::{Error, Result};

/// `BTRFS_SUBVOL_QGROUP_INHERIT` of struct btrfs_ioctl_vol_args_v2.
const QGROUP_INHERIT: u64 = 1 << 2;
/// `BTRFS_QGROUP_INHERIT_SET_LIMITS` of struct btrfs_qgroup_inherit.
const SET_LIMITS: u64 = 1 << 0;
const LIMIT_MAX_EXCL: u64 = 1 << 1;
/// The kernel refuses an inherit structure longer than a page.
const GROUPS_MAX: usize = 400;
/// 64-bit words of struct btrfs_qgroup_inherit before the groups: flags, three counts, and five of limits.
const HEAD_WORDS: usize = 9;

/// What a new subvolume's group is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inherit {
    /// The groups it becomes a member of; all must be there and of level 1 or more.
    pub groups: Vec<u64>,
    /// Its limits.
    pub limits: QgroupLimits,
}

impl Inherit {
    /// `struct btrfs_qgroup_inherit`.
    fn words(&self) -> Vec<u64> {
        let QgroupLimits { referenced, exclusive } = self.limits;
        let mut limit_flags = 0;
        limit_flags |= referenced.map_or(0, |_| LIMIT_MAX_RFER);
        limit_flags |= exclusive.map_or(0, |_| LIMIT_MAX_EXCL);
        let flags = if limit_flags == 0 { 0 } else { SET_LIMITS };
        let mut words = vec![flags, self.groups.len() as u64, 0, 0, limit_flags];
        words.extend([referenced.unwrap_or(0), exclusive.unwrap_or(0), 0, 0]);
        words.extend(&self.groups);
        words
    }
}

/// Lets `call` go with the argument that points to `inherit`; the kernel only reads what it points to.
fn with_inherit(
    mut arguments: VolArgs2,
    inherit: &Inherit,
    call: impl FnOnce(&mut VolArgs2) -> Result<i32>,
) -> Result<()> {
    if inherit.groups.len() > GROUPS_MAX {
        let error = std::io::Error::from_raw_os_error(libc::E2BIG);
        let subject = format!("{} groups to inherit, at most {GROUPS_MAX}", inherit.groups.len());
        return Err(Error::new("BTRFS_SUBVOL_QGROUP_INHERIT", subject, error));
    }
    let words = inherit.words();
    debug_assert_eq!(words.len(), HEAD_WORDS + inherit.groups.len());
    arguments.flags |= QGROUP_INHERIT;
    // The union's size and pointer.
    arguments.unused[0] = size_of_val(words.as_slice()) as u64;
    arguments.unused[1] = words.as_ptr().expose_provenance() as u64;
    call(&mut arguments)?;
    Ok(())
}

/// As [`create_subvolume`](crate::btrfs::create_subvolume), with groups and limits. Simple quotas make a new subvolume a
/// member of the groups of the one it lies in by themselves; `inherit` takes the place of that.
///
/// # Errors
/// As there; `ENOENT` when there is no such group.
pub fn create_subvolume_in(directory: impl AsFd, name: impl AsRef<OsStr>, inherit: &Inherit) -> Result<()> {
    let name = name.as_ref();
    with_inherit(named(name, "BTRFS_IOC_SUBVOL_CREATE_V2")?, inherit, |arguments| {
        SUBVOL_CREATE_V2.call(directory.as_fd(), arguments, || within(&directory, name))
    })
}

/// As [`snapshot`](crate::btrfs::snapshot), writable, with groups and limits.
///
/// # Errors
/// As there; `ENOENT` when there is no such group.
pub fn snapshot_in(
    source: impl AsFd,
    directory: impl AsFd,
    name: impl AsRef<OsStr>,
    inherit: &Inherit,
) -> Result<()> {
    let name = name.as_ref();
    let mut arguments = named(name, "BTRFS_IOC_SNAP_CREATE_V2")?;
    arguments.fd = i64::from(source.as_fd().as_raw_fd());
    with_inherit(arguments, inherit, |arguments| {
        SNAP_CREATE_V2.call(directory.as_fd(), arguments, || within(&directory, name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        let limits = QgroupLimits { referenced: Some(5 << 32), exclusive: None };
        let inherit = Inherit { groups: vec![1 << 48 | 3], limits };
        assert_eq!(inherit.words(), [1, 1, 0, 0, 1, 5 << 32, 0, 0, 0, 1 << 48 | 3]);
        assert_eq!(Inherit::default().words(), [0; HEAD_WORDS]);
    }
}

//! What can go wrong with quotas, and what to do then.

use std::io;
use std::path::{Path, PathBuf};

use loam_block::size::{ByteSize, ParseSizeError};
use rustix::io::Errno;

use super::{GroupId, Mode};

/// The result of an operation on quotas.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation on quotas. `Display` is "what: why"; [`Error::hint`] says what to do where that is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path cannot be opened.
    #[error("{}: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another filesystem.
    #[error("{}: is not on btrfs: only btrfs has quotas of subvolumes", .0.display())]
    NotBtrfs(PathBuf),
    /// A file or directory, not a subvolume.
    #[error("{}: is not the root of a subvolume: only those have quota groups", path.display())]
    NotASubvolume {
        /// The path.
        path: PathBuf,
        /// The subvolume that it lies in, from the filesystem's top level on.
        within: Option<PathBuf>,
    },
    /// Mounted read-only.
    #[error("{}: is mounted read-only: quotas cannot be changed", .0.display())]
    ReadOnly(PathBuf),
    /// The caller may not.
    #[error("{}: only root may read and change quotas (CAP_SYS_ADMIN)", .0.display())]
    NotPermitted(PathBuf),
    /// Quotas are off.
    #[error("{}: quotas are not enabled on this filesystem", .0.display())]
    Off(PathBuf),
    /// Counted in another way already.
    #[error("{}: {on} are enabled on this filesystem already, not {wanted}", path.display())]
    OtherMode {
        /// The path.
        path: PathBuf,
        /// What was asked for.
        wanted: Mode,
        /// What is on.
        on: Mode,
    },
    /// A kernel without simple quotas.
    #[error("{}: this kernel has no simple quotas (Linux 6.7 and newer have)", .0.display())]
    TooOld(PathBuf),
    /// There is no such group.
    #[error("{}: there is no quota group {group}", path.display())]
    NoGroup {
        /// The path.
        path: PathBuf,
        /// The group.
        group: GroupId,
    },
    /// There is one.
    #[error("there is a quota group {0} already")]
    GroupExists(GroupId),
    /// A group with members, a subvolume or a charge.
    #[error("quota group {0} is in use: it has members, a subvolume, or extents that are charged to it")]
    GroupInUse(GroupId),
    /// A group of level 0 made by hand.
    #[error("quota group {0} is of level 0: those come and go with their subvolumes")]
    LevelZero(GroupId),
    /// A member of its own level or a lower one.
    #[error("quota group {member} cannot be a member of {group}: a group's level must be above its members'")]
    LevelsFall {
        /// The member.
        member: GroupId,
        /// The group.
        group: GroupId,
    },
    /// No size.
    #[error("limit: {0}")]
    BadLimit(#[from] ParseSizeError),
    /// More than can be counted.
    #[error(
        "limit: {} on top of the {} that are used is more than a limit can be (less than 8EiB)",
        ByteSize(*added), ByteSize(*used)
    )]
    LimitTooLarge {
        /// Bytes asked for.
        added: u64,
        /// Bytes in use, for a relative limit.
        used: u64,
    },
    /// The kernel refused for another reason.
    #[error("{}: {source}", path.display())]
    Kernel {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: loam_sys::Error,
    },
    /// The trees of the filesystem could not be read.
    #[error("{}: {source}", path.display())]
    Trees {
        /// The path.
        path: PathBuf,
        /// Why.
        source: loam_seed::quota::LiveError,
    },
}

impl Error {
    /// Names what any call may meet.
    pub(super) fn kernel(path: &Path, source: loam_sys::Error) -> Self {
        let path = path.to_owned();
        match source.errno().map(Errno::from_raw_os_error) {
            Some(Errno::ROFS) => Error::ReadOnly(path),
            Some(Errno::PERM | Errno::ACCESS) => Error::NotPermitted(path),
            Some(Errno::NOTTY) => Error::NotBtrfs(path),
            Some(Errno::NOTCONN) => Error::Off(path),
            _ => Error::Kernel { path, source },
        }
    }

    /// The kernel's number, where it has no name of its own here.
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            Error::Kernel { source, .. } => source.errno().map(Errno::from_raw_os_error),
            _ => None,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NotASubvolume { within: Some(within), .. } => {
                format!("it lies in the subvolume {} of its filesystem: name that", within.display())
            }
            Error::ReadOnly(_) => "remount it writable: mount -o remount,rw".to_owned(),
            Error::NotPermitted(_) => "run it as root".to_owned(),
            Error::Off(path) => format!("loam quota enable {}", path.display()),
            Error::OtherMode { path, wanted, .. } => {
                let flag = if *wanted == Mode::Full { " --full" } else { "" };
                let path = path.display();
                format!(
                    "to change over, which forgets all groups and limits: loam quota disable {path}, then loam quota enable \
                     {path}{flag}"
                )
            }
            Error::TooOld(path) => format!(
                "full qgroups work on this kernel, but slow down commits the more snapshots there are: loam quota enable {} \
                 --full",
                path.display()
            ),
            Error::NoGroup { path, .. } => format!("loam quota show {} lists them", path.display()),
            Error::GroupInUse(_) => {
                "take its members out first; what deleted subvolumes wrote is charged until nobody has \
                                     it any more"
                    .to_owned()
            }
            Error::LimitTooLarge { .. } => "write none for no limit".to_owned(),
            _ => return None,
        })
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let hint = error.hint();
        let failed = crate::Error::step("quota", error);
        match hint {
            Some(hint) => failed.with_hint(hint),
            None => failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No kernel that the tests run on is that old.
    #[test]
    fn an_old_kernel_is_told_of_full_qgroups_and_not_given_them() {
        let error = Error::TooOld("/mnt".into());
        assert!(error.to_string().contains("6.7"), "{error}");
        assert!(error.hint().unwrap().contains("loam quota enable /mnt --full"), "{error}");
        let error = crate::Error::from(error);
        assert!(error.hint().unwrap().contains("slow down commits"), "{error}");
    }
}

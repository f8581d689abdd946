//! What `quota` takes: any btrfs, a pool's or not.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use loam_pool::quota::{GroupId, Limit};

/// Shown by `loam quota --help`.
const EXAMPLES: &str = "\
An extent is charged once, to the subvolume that wrote it first, until nobody has it any more. PATH is any path on the
filesystem, or where it says so a subvolume's; a container's is what loam create prints.

Examples:
  loam quota enable /mnt                          count from now on; what is there is free
  loam quota limit /mnt/home/alice 20GiB          a limit
  loam quota limit /mnt/home/alice +5GiB          5 GiB more than are used now
  loam quota limit /mnt/home/alice none           no limit
  loam quota group create /mnt 1/100              a group for a tenant
  loam quota group add /mnt 1/100 /mnt/a /mnt/b   with two subvolumes in it
  loam quota limit /mnt 50GiB --group 1/100       and one limit for both
  loam quota show /mnt                            all groups, as a tree
  loam quota verify /mnt                          recompute every sum: silent when right
  loam quota verify /mnt --explain /mnt/home/alice
                                                  what is she charged for, and who still has it?

Simple quotas need Linux 6.7. What surprises about them is told in docs/quotas.md.";

const VERIFY_HELP: &str = "\
Reads the trees of image files, devices, or a mounted filesystem (its last commit; nothing is written), and recomputes what
every group must be charged. Exit code 0 and silent when all is right; else 1, with a line for each thing that is wrong.

Examples:
  loam quota verify /mnt                          a mounted filesystem: all of its devices
  loam quota verify /dev/sdb1 /dev/sdc1           an unmounted one: name all of its devices
  loam quota verify disk.img --explain 0/257      what subvolume 257 is charged for";

#[derive(Debug, Subcommand)]
#[command(after_long_help = EXAMPLES)]
pub(crate) enum Quota {
    /// Count what each subvolume writes, from now on. What is there by now is charged to nobody. Twice is harmless.
    Enable {
        /// Any path on the filesystem.
        path: PathBuf,
        /// Full qgroups in place of simple quotas: they count who shares what, and slow down commits the more, the more
        /// snapshots there are.
        #[arg(long)]
        full: bool,
    },
    /// Stop counting, and forget all groups and limits.
    Disable {
        /// Any path on the filesystem.
        path: PathBuf,
    },
    /// Set or lift a limit. One below what is used is set all the same: writes fail until enough is deleted.
    Limit(QuotaLimit),
    /// Groups of groups: one limit for many subvolumes.
    Group {
        #[command(subcommand)]
        command: QuotaGroup,
    },
    /// Show all groups of a filesystem as a tree: used, limit, free.
    Show {
        /// Any path on the filesystem.
        path: PathBuf,
        /// Do not commit first: the numbers are those of the last commit.
        #[arg(long)]
        no_sync: bool,
    },
    /// Recompute what every group must be charged, and compare.
    Verify(QuotaVerify),
}

#[derive(Debug, Args)]
pub(crate) struct QuotaLimit {
    /// The subvolume; with --group any path on the filesystem.
    pub(crate) path: PathBuf,
    /// 2GiB, +2GiB (more than is used now), or none.
    #[arg(value_name = "SIZE|+SIZE|none", value_parser = limit)]
    pub(crate) limit: Limit,
    /// Limit what is charged to this group alone; the same under simple quotas.
    #[arg(long)]
    pub(crate) exclusive: bool,
    /// Limit this group, of any level.
    #[arg(long, value_name = "LEVEL/N")]
    pub(crate) group: Option<GroupId>,
    /// Make it hold for subvolumes that are made inside, too: by a group 1/ID around the subvolume. Containers with --quota
    /// have one.
    #[arg(long, conflicts_with_all = ["group", "exclusive"])]
    pub(crate) nested: bool,
}

fn limit(text: &str) -> Result<Limit, String> {
    text.parse().map_err(|error: loam_pool::quota::Error| error.to_string())
}

#[derive(Debug, Subcommand)]
pub(crate) enum QuotaGroup {
    /// Make a group of level 1 or more.
    Create {
        /// Any path on the filesystem.
        path: PathBuf,
        /// Its number, as 1/100.
        #[arg(value_name = "LEVEL/N")]
        group: GroupId,
        /// Its limit.
        #[arg(long, value_name = "SIZE", value_parser = limit)]
        limit: Option<Limit>,
    },
    /// Remove a group that has no members.
    Rm {
        /// Any path on the filesystem.
        path: PathBuf,
        /// The group.
        #[arg(value_name = "LEVEL/N")]
        group: GroupId,
    },
    /// Put subvolumes or groups of lower levels into a group. What is made in a subvolume later joins by itself.
    Add(QuotaMembers),
    /// Take them out again.
    Remove(QuotaMembers),
}

#[derive(Debug, Args)]
pub(crate) struct QuotaMembers {
    /// Any path on the filesystem.
    pub(crate) path: PathBuf,
    /// The group.
    #[arg(value_name = "LEVEL/N")]
    pub(crate) group: GroupId,
    /// Subvolumes, by path, or groups.
    #[arg(value_name = "PATH|LEVEL/N", required = true)]
    pub(crate) members: Vec<GroupName>,
}

#[derive(Debug, Args)]
#[command(after_long_help = VERIFY_HELP)]
pub(crate) struct QuotaVerify {
    /// A mounted filesystem, or all devices or image files of one.
    #[arg(value_name = "DEV|FILE|PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// Do not verify, but say what this subvolume or group is charged for: its largest extents, and who has them.
    #[arg(long, value_name = "PATH|LEVEL/N")]
    pub(crate) explain: Option<GroupName>,
}

/// A group by its number or by the path of its subvolume.
#[derive(Debug, Clone)]
pub(crate) enum GroupName {
    /// A number, as 1/100.
    Group(GroupId),
    /// A path; one that looks like a number is written ./1/100.
    Subvolume(PathBuf),
}

impl std::str::FromStr for GroupName {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.parse().map_or_else(|_| GroupName::Subvolume(text.into()), GroupName::Group))
    }
}

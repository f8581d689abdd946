//! What a verification says.

use std::fmt;

use serde::Serialize;

use super::GroupId;
use super::words::bytes;

/// Findings that a report keeps; more are counted.
const FINDINGS_MAX: usize = 10_000;

/// How a filesystem counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Not at all.
    Off,
    /// By the subvolume that wrote an extent first.
    Simple,
    /// By back references.
    Full,
}

/// What kind of thing is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A group is charged another number of bytes than its extents have.
    WrongCharge,
    /// `referenced` and `exclusive` differ, which simple quotas never let happen.
    WrongExclusive,
    /// A subvolume, or an extent's owner, has no group.
    MissingGroup,
    /// Items of the quota tree contradict each other or make no sense.
    BadItem,
    /// A tree block cannot be read, or not be trusted.
    Damaged,
}

/// Where a difference that some kernels are known to make comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Tree blocks of the transaction that enabled the quotas were not charged, although their generation says so.
    EnablingTransaction,
    /// A snapshot of a member charged the group one tree block too many.
    SnapshotOfMember,
    /// More was given back than had been charged: the count went below zero.
    Underflow,
}

impl Cause {
    /// What to tell the user.
    pub fn advice(self) -> &'static str {
        match self {
            Cause::EnablingTransaction => {
                "kernels before 7.1 (and stable ones before June 2026) do not charge tree blocks of the transaction that \
                 enables quotas; disable and enable them again, on a filesystem that is quiet, to count from zero"
            }
            Cause::SnapshotOfMember => {
                "kernels before 6.19 charge a group one tree block too many for each snapshot of a member; take the \
                 members out of the group and put them in again"
            }
            Cause::Underflow => {
                "the count went below zero, and no limit of this group can be reached any more; disable and enable \
                 quotas to count from zero"
            }
        }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: Kind,
    /// The group, where it is about one.
    pub group: Option<GroupId>,
    /// Bytes that must be charged.
    pub expected_bytes: Option<u64>,
    /// Bytes that the quota tree says.
    pub found_bytes: Option<u64>,
    /// Found less expected, where both are known.
    pub difference_bytes: Option<i64>,
    /// How it comes about, where that is known.
    pub cause: Option<Cause>,
    /// What is wrong, in words.
    pub message: String,
}

impl Finding {
    pub(super) fn new(kind: Kind, group: Option<GroupId>, message: impl Into<String>) -> Self {
        Finding {
            kind,
            group,
            expected_bytes: None,
            found_bytes: None,
            difference_bytes: None,
            cause: None,
            message: message.into(),
        }
    }

    /// A count that is not what it must be.
    pub(super) fn count(kind: Kind, group: GroupId, what: &str, expected: u64, found: u64) -> Self {
        // A count below zero wraps around, as it did in the kernel.
        let difference = found.wrapping_sub(expected) as i64;
        let side = if difference > 0 { "too many" } else { "too few" };
        let below_zero = if (found as i64) < 0 { " (below zero)" } else { "" };
        let message = format!(
            "{what} is {found}{below_zero}, must be {expected}: {} {side}",
            bytes(difference.unsigned_abs())
        );
        Finding {
            expected_bytes: Some(expected),
            found_bytes: Some(found),
            difference_bytes: Some(difference),
            ..Finding::new(kind, Some(group), message)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(group) = self.group {
            write!(f, "group {group}: ")?;
        }
        f.write_str(&self.message)?;
        match self.cause {
            Some(cause) => write!(f, " ({})", cause.advice()),
            None => Ok(()),
        }
    }
}

/// What one group must be charged and is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupReport {
    /// The group.
    pub group: GroupId,
    /// Bytes that must be charged: of data and tree blocks.
    pub expected_bytes: u64,
    /// Of these, data.
    pub data_bytes: u64,
    /// Of these, tree blocks.
    pub metadata_bytes: u64,
    /// Bytes that the quota tree says; `None` when it has no such group.
    pub found_bytes: Option<u64>,
    /// For level 0: whether its subvolume is gone, and only what others share of it is left.
    pub subvolume_gone: bool,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Data extents that somebody is charged for.
    pub data_extents: u64,
    /// Tree blocks that somebody is charged for.
    pub tree_blocks: u64,
    /// Extents, of both kinds, that are older than the quotas.
    pub older_extents: u64,
    /// Their bytes, which nobody is charged for.
    pub older_bytes: u64,
    /// Data extents that say of nobody that he wrote them, although they are not older than the quotas: the kernel's own.
    pub unowned_extents: u64,
}

/// The outcome of a verification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How the filesystem counts.
    pub mode: Mode,
    /// Whether the counts were verified; only simple quotas are.
    pub verified: bool,
    /// The transaction that was looked at.
    pub generation: u64,
    /// The first transaction whose extents are charged.
    pub enable_generation: Option<u64>,
    /// All groups, ascending.
    pub groups: Vec<GroupReport>,
    /// What is wrong; empty when all is right.
    pub findings: Vec<Finding>,
    /// Findings beyond those in `findings`.
    pub findings_left_out: u64,
    /// What is not wrong but good to know.
    pub notes: Vec<String>,
    /// What was looked at.
    pub counts: Counts,
}

impl Report {
    pub(super) fn new(generation: u64) -> Self {
        Report {
            mode: Mode::Off,
            verified: false,
            generation,
            enable_generation: None,
            groups: Vec::new(),
            findings: Vec::new(),
            findings_left_out: 0,
            notes: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub(super) fn find(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        } else {
            self.findings_left_out += 1;
        }
    }

    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// Whether damage kept extents or groups from being read, so that counts may seem wrong that are not.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|finding| finding.kind == Kind::Damaged)
    }
}

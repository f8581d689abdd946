//! What verification says.

use std::fmt;

use serde::Serialize;

use crate::disk::Key;
use crate::reader::Fault;

/// Findings that are kept; of more only the number is.
const FINDINGS_MAX: usize = 1000;

/// Something wrong with an image, and where.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Finding {
    /// Which image, where it is about one.
    pub device: Option<&'static str>,
    /// The tree's id.
    pub tree: Option<u64>,
    /// The tree block's logical address.
    pub block: Option<u64>,
    /// The item's key.
    #[serde(serialize_with = "serialize_key")]
    pub key: Option<Key>,
    /// The field, or what the rest is about.
    pub field: String,
    /// What is wrong.
    pub reason: String,
}

fn serialize_key<S: serde::Serializer>(key: &Option<Key>, serializer: S) -> Result<S::Ok, S::Error> {
    match key {
        Some(key) => serializer.collect_str(key),
        None => serializer.serialize_none(),
    }
}

impl Finding {
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Finding { field: field.into(), reason: reason.into(), ..Finding::default() }
    }

    pub(super) fn device(self, name: &'static str) -> Self {
        Finding { device: Some(name), ..self }
    }

    pub(super) fn tree(self, id: u64) -> Self {
        Finding { tree: Some(id), ..self }
    }

    pub(super) fn block(self, bytenr: u64) -> Self {
        Finding { block: Some(bytenr), ..self }
    }

    pub(super) fn key(self, key: Key) -> Self {
        Finding { key: Some(key), ..self }
    }

    pub(super) fn fault(fault: &Fault) -> Self {
        Finding { key: fault.key, ..Finding::new(fault.field.clone(), fault.reason.clone()) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(device) = self.device {
            write!(f, "{device} image, ")?;
        }
        if let Some(tree) = self.tree {
            write!(f, "tree {tree}, ")?;
        }
        if let Some(block) = self.block {
            write!(f, "block {block}, ")?;
        }
        if let Some(key) = self.key {
            write!(f, "item {key}, ")?;
        }
        write!(f, "{}: {}", self.field, self.reason)
    }
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Trees.
    pub trees: u64,
    /// Tree blocks.
    pub blocks: u64,
    /// Data extents.
    pub data_extents: u64,
    /// Chunks.
    pub chunks: u64,
    /// Inodes of all subvolumes.
    pub inodes: u64,
    /// Bytes of data compared with their checksums.
    pub checked_bytes: u64,
}

/// The result of [`crate::verify()`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Verification {
    /// What is wrong: the first thousand findings.
    pub findings: Vec<Finding>,
    /// What is in order but was not verified, and why.
    pub notes: Vec<String>,
    /// How many findings there were beyond those.
    pub more: u64,
    /// What was looked at.
    pub counts: Counts,
}

impl Verification {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

/// Gathers findings.
#[derive(Debug, Default)]
pub(super) struct Findings {
    found: Vec<Finding>,
    notes: Vec<String>,
    more: u64,
}

impl Findings {
    pub(super) fn add(&mut self, finding: Finding) {
        if self.found.len() < FINDINGS_MAX {
            self.found.push(finding);
        } else {
            self.more += 1;
        }
    }

    /// Adds a note.
    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < FINDINGS_MAX {
            self.notes.push(note);
        }
    }

    /// Adds a finding unless two values are the same.
    pub(super) fn expect_same(&mut self, place: Finding, is: u64, should: u64) {
        if is != should {
            self.add(Finding { reason: format!("is {is}, should be {should}"), ..place });
        }
    }

    pub(super) fn into_verification(self, counts: Counts) -> Verification {
        Verification { findings: self.found, notes: self.notes, more: self.more, counts }
    }
}

/// An element that only one of two lists has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Only<'a, T> {
    Left(&'a T),
    Right(&'a T),
}

/// Goes through two sorted lists and shows what is in one of them only; equal elements are paired one by one.
pub(super) fn differences<'a, T: Ord>(left: &'a [T], right: &'a [T], mut show: impl FnMut(Only<'a, T>)) {
    let (mut l, mut r) = (0, 0);
    loop {
        match (left.get(l), right.get(r)) {
            (None, None) => return,
            (Some(a), Some(b)) if a == b => (l, r) = (l + 1, r + 1),
            (Some(a), b) if b.is_none_or(|b| a < b) => {
                show(Only::Left(a));
                l += 1;
            }
            (_, Some(b)) => {
                show(Only::Right(b));
                r += 1;
            }
            (Some(_), None) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_pair_equal_elements() {
        let mut found = Vec::new();
        differences(&[1, 2, 2, 5, 9], &[2, 3, 5, 5], |only| found.push(only));
        assert_eq!(found, [Only::Left(&1), Only::Left(&2), Only::Right(&3), Only::Right(&5), Only::Left(&9)]);
    }

    #[test]
    fn findings_are_bounded() {
        let mut findings = Findings::default();
        for _ in 0..FINDINGS_MAX + 5 {
            findings.add(Finding::new("x", "y"));
        }
        let verification = findings.into_verification(Counts::default());
        assert_eq!((verification.findings.len(), verification.more), (FINDINGS_MAX, 5));
    }
}

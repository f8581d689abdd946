//! The number of a quota group: level and, at level 0, subvolume.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bits below the level.
const LEVEL_SHIFT: u32 = 48;

/// A quota group: a subvolume's own at level 0, made by hand above. Shown as `LEVEL/NUMBER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(u64);

impl GroupId {
    /// The group of that level and number; `None` when the number has more than 48 bits.
    pub fn new(level: u16, number: u64) -> Option<Self> {
        (number >> LEVEL_SHIFT == 0).then(|| GroupId(u64::from(level) << LEVEL_SHIFT | number))
    }

    /// As it stands on disk.
    pub const fn from_raw(id: u64) -> Self {
        GroupId(id)
    }

    /// As it stands on disk.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Its level.
    pub const fn level(self) -> u16 {
        (self.0 >> LEVEL_SHIFT) as u16
    }

    /// Its number at its level: for level 0, the subvolume's id.
    pub const fn number(self) -> u64 {
        self.0 & ((1 << LEVEL_SHIFT) - 1)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.level(), self.number())
    }
}

/// Text that names no group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no quota group: write LEVEL/NUMBER, as in 1/100 (a subvolume's own is 0/ID)")]
pub struct ParseGroupError(String);

impl FromStr for GroupId {
    type Err = ParseGroupError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (level, number) = text.split_once('/')?;
            let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            if !digits(level) || !digits(number) {
                return None;
            }
            GroupId::new(level.parse().ok()?, number.parse().ok()?)
        };
        parse().ok_or_else(|| ParseGroupError(text.to_owned()))
    }
}

impl Serialize for GroupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GroupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_round_trip_through_text() {
        for text in ["0/5", "1/0", "65535/281474976710655"] {
            assert_eq!(text.parse::<GroupId>().expect("a group").to_string(), text);
        }
        for text in ["", "/", "1/", "/1", "1", "+1/2", "1/-2", "65536/1", "0/281474976710656", "1/2/3", "a/b"]
        {
            assert!(text.parse::<GroupId>().is_err(), "{text}");
        }
    }
}

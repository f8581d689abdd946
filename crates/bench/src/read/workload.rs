//! How a target is read: by which engine, by how many at once, past the page cache or through it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

/// How fio asks for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Engine {
    /// One `pread` after the other.
    Psync,
    /// Many under way.
    IoUring,
    /// Loads from a mapping: always through the page cache.
    Mmap,
}

impl Engine {
    /// As fio calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Engine::Psync => "psync",
            Engine::IoUring => "io_uring",
            Engine::Mmap => "mmap",
        }
    }
}

/// Random reads of 4 KiB. Written `ENGINE:JOBS[xDEPTH][:buffered]`: `psync:6`, `io_uring:2x64`, `psync:1:buffered`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Workload {
    pub(crate) engine: Engine,
    /// Processes that read.
    pub(crate) jobs: u32,
    /// Reads that each has under way; 1 but for io_uring.
    pub(crate) depth: u32,
    /// Past the page cache.
    pub(crate) direct: bool,
}

/// The most jobs, and reads under way of one.
const JOBS_MAX: u32 = 256;
const DEPTH_MAX: u32 = 4096;

impl FromStr for Workload {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let engine = match parts.next() {
            Some("psync") => Engine::Psync,
            Some("io_uring") => Engine::IoUring,
            Some("mmap") => Engine::Mmap,
            _ => bail!("{text}: the engine has to be psync, io_uring or mmap"),
        };
        let at_once = parts.next().context("how many jobs? Write for example psync:2 or io_uring:2x64")?;
        let (jobs, depth) = at_once.split_once('x').unwrap_or((at_once, "1"));
        let (jobs, depth) = (jobs.parse()?, depth.parse()?);
        ensure!((1..=JOBS_MAX).contains(&jobs), "{text}: from 1 to {JOBS_MAX} jobs");
        ensure!((1..=DEPTH_MAX).contains(&depth), "{text}: a depth from 1 to {DEPTH_MAX}");
        ensure!(depth == 1 || engine == Engine::IoUring, "{text}: only io_uring has a depth");
        let buffered = match parts.next() {
            None => engine == Engine::Mmap,
            Some("buffered") => true,
            Some(other) => bail!("{text}: '{other}' is not 'buffered'"),
        };
        ensure!(parts.next().is_none(), "{text}: nothing comes after 'buffered'");
        Ok(Workload { engine, jobs, depth, direct: !buffered })
    }
}

/// As people read it; what cases of the same workload are compared under.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} job{}", self.engine.name(), self.jobs, if self.jobs == 1 { "" } else { "s" })?;
        if self.engine == Engine::IoUring {
            write!(f, ", depth {}", self.depth)?;
        }
        if !self.direct && self.engine != Engine::Mmap { write!(f, ", buffered") } else { Ok(()) }
    }
}

impl Workload {
    /// As a record has them.
    pub(crate) fn options(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("engine".into(), self.engine.name().into()),
            ("jobs".into(), self.jobs.to_string()),
            ("depth".into(), self.depth.to_string()),
            ("direct".into(), self.direct.to_string()),
        ])
    }

    /// As fio takes them.
    pub(crate) fn fio(&self) -> Vec<String> {
        vec![
            format!("--ioengine={}", self.engine.name()),
            format!("--numjobs={}", self.jobs),
            format!("--iodepth={}", self.depth),
            format!("--direct={}", u8::from(self.direct)),
            // Buffered reads begin with nothing cached; what a direct one asks for never is.
            format!("--invalidate={}", u8::from(!self.direct)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_read_as_they_are_written() {
        let parse = |text: &str| text.parse::<Workload>();
        let shown = |text: &str| parse(text).unwrap().to_string();
        assert_eq!(shown("psync:1"), "psync, 1 job");
        assert_eq!(shown("io_uring:2x64"), "io_uring, 2 jobs, depth 64");
        assert_eq!(shown("psync:6:buffered"), "psync, 6 jobs, buffered");
        assert_eq!(shown("mmap:1"), "mmap, 1 job");
        assert!(!parse("mmap:1").unwrap().direct && parse("io_uring:1x64").unwrap().direct);
        for wrong in
            ["", "psync", "libaio:1", "psync:0", "psync:1x64", "psync:1:direct", "psync:1:buffered:x"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}

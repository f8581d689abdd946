//! `stats`: how many requests of each kind there were, how large, how long they took and how many failed. Written when the
//! device goes, as text or as JSON; a program asks [`Statistics::report`] at any time.
//!
//! Times and sizes are counted by powers of two, so a percentile is the upper bound of its class: right within a factor
//! of two. Counting costs a few relaxed additions for each request.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

use super::around::{Around, Layered, Operation, Request};
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use crate::size::ByteSize;
use crate::{BlockDevice, Error, Io, Result};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "stats",
    summary: "counts requests, bytes and times, and says so at the end (nbdkit: stats)",
    parameters: &[
        parameter("file", "PATH", "standard error", "where to, when the device goes"),
        parameter("format", "text|json", "text", "how"),
    ],
};

/// Classes of sizes and times: class n holds numbers of n bits, so below 2^n.
const CLASSES: usize = 65;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Text,
    Json,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => Err("write text or json"),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    file: Option<PathBuf>,
    format: Format,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let file = parameters.text("file").map(PathBuf::from);
        Ok(Options { file, format: parameters.get("format")?.unwrap_or(Format::Text) })
    }
}

#[derive(Debug)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    sizes: [AtomicU64; CLASSES],
    times: [AtomicU64; CLASSES],
}

impl Counters {
    const fn new() -> Self {
        Counters {
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            sizes: [const { AtomicU64::new(0) }; CLASSES],
            times: [const { AtomicU64::new(0) }; CLASSES],
        }
    }
}

/// What was counted so far.
#[derive(Debug)]
pub struct Statistics {
    /// By operation.
    counters: [Counters; Operation::ALL.len()],
    since: Instant,
}

/// What was counted of one kind of request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OperationReport {
    /// The kind: read, write, zero, trim, flush, extents, prefetch.
    pub operation: &'static str,
    /// That were answered.
    pub requests: u64,
    /// That they asked for; those of failed ones are not counted.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Of all together; requests that ran beside each other each count.
    pub nanoseconds: u64,
    /// Bounds of the times of a half, 9 of 10, and 99 of 100 requests.
    pub nanoseconds_p50: u64,
    /// See `nanoseconds_p50`.
    pub nanoseconds_p90: u64,
    /// See `nanoseconds_p50`.
    pub nanoseconds_p99: u64,
    /// Requests by size: (bytes of which they have fewer, how many), empty classes left out.
    pub sizes: Vec<Class>,
    /// Requests by time: (nanoseconds that they took less than, how many), empty classes left out.
    pub times: Vec<Class>,
}

/// A class of a histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Class {
    /// What is in it is smaller than this, and at least half of it.
    pub below: u64,
    /// How many.
    pub requests: u64,
}

/// What was counted of all kinds of which there were any. Prints as lines for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Since the device was made.
    pub elapsed_ns: u64,
    /// In the order read, write, zero, trim, flush, extents, prefetch.
    pub operations: Vec<OperationReport>,
}

impl Report {
    /// What was counted of one kind, if there was any.
    pub fn operation(&self, operation: Operation) -> Option<&OperationReport> {
        self.operations.iter().find(|report| report.operation == operation.name())
    }
}

fn class(number: u64) -> usize {
    (u64::BITS - number.leading_zeros()) as usize
}

fn bound(class: usize) -> u64 {
    1u64.checked_shl(class as u32).unwrap_or(u64::MAX)
}

fn histogram(classes: &[AtomicU64; CLASSES]) -> Vec<Class> {
    let counted = classes.iter().map(|class| class.load(Ordering::Relaxed)).enumerate();
    counted
        .filter(|(_, requests)| *requests > 0)
        .map(|(class, requests)| Class { below: bound(class), requests })
        .collect()
}

fn percentile(histogram: &[Class], percent: u64) -> u64 {
    let all: u64 = histogram.iter().map(|class| class.requests).sum();
    let mut seen = 0;
    let reached = histogram.iter().find(|class| {
        seen += class.requests;
        seen * 100 >= all * percent
    });
    reached.map_or(0, |class| class.below)
}

impl Statistics {
    fn new() -> Self {
        Statistics { counters: [const { Counters::new() }; Operation::ALL.len()], since: Instant::now() }
    }

    /// What was counted so far.
    pub fn report(&self) -> Report {
        let report = |operation: Operation| {
            let counters = &self.counters[operation as usize];
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let times = histogram(&counters.times);
            OperationReport {
                operation: operation.name(),
                requests: get(&counters.requests),
                bytes: get(&counters.bytes),
                errors: get(&counters.errors),
                nanoseconds: get(&counters.nanoseconds),
                nanoseconds_p50: percentile(&times, 50),
                nanoseconds_p90: percentile(&times, 90),
                nanoseconds_p99: percentile(&times, 99),
                sizes: histogram(&counters.sizes),
                times,
            }
        };
        let operations =
            Operation::ALL.into_iter().map(report).filter(|report| report.requests > 0).collect();
        Report { elapsed_ns: self.since.elapsed().as_nanos() as u64, operations }
    }

    fn count(&self, request: &Request, begun: Instant, failed: bool) {
        let counters = &self.counters[request.operation as usize];
        let nanoseconds = begun.elapsed().as_nanos() as u64;
        let add = |counter: &AtomicU64, number| counter.fetch_add(number, Ordering::Relaxed);
        add(&counters.requests, 1);
        add(&counters.nanoseconds, nanoseconds);
        add(&counters.times[class(nanoseconds)], 1);
        add(&counters.sizes[class(request.length)], 1);
        add(if failed { &counters.errors } else { &counters.bytes }, if failed { 1 } else { request.length });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed_ns as f64 / 1e9;
        writeln!(f, "elapsed: {seconds:.6} s")?;
        for report in &self.operations {
            let OperationReport { operation, requests, bytes, errors, nanoseconds, .. } = report;
            let mean_us = *nanoseconds as f64 / *requests as f64 / 1e3;
            let [p50, p90, p99] = [report.nanoseconds_p50, report.nanoseconds_p90, report.nanoseconds_p99]
                .map(|nanoseconds| nanoseconds as f64 / 1e3);
            writeln!(
                f,
                "{operation}: {requests} requests, {:#}, {errors} errors, mean {mean_us:.1} us, 50% within {p50:.1} us, \
                 90% {p90:.1} us, 99% {p99:.1} us",
                ByteSize(*bytes)
            )?;
            for Class { below, requests } in &report.sizes {
                writeln!(f, "  below {:#}: {requests}", ByteSize(*below))?;
            }
        }
        Ok(())
    }
}

/// The layer itself: writes its report when it goes.
struct Stats {
    statistics: Arc<Statistics>,
    report_to: Option<Options>,
}

impl Stats {
    fn write_report(&self, options: &Options) -> std::io::Result<()> {
        let report = self.statistics.report();
        let mut text = match options.format {
            Format::Text => report.to_string(),
            Format::Json => serde_json::to_string(&report)?,
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        match &options.file {
            Some(path) => std::fs::write(path, text),
            None => std::io::stderr().write_all(text.as_bytes()),
        }
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        let Some(options) = &self.report_to else { return };
        if let Err(error) = self.write_report(options) {
            let file = options.file.as_deref().unwrap_or(Path::new("standard error"));
            let _ = writeln!(std::io::stderr(), "loam: stats layer: writing {}: {error}", file.display());
        }
    }
}

impl Around for Stats {
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        let begun = Instant::now();
        match run() {
            Io::Ready(result) => {
                self.statistics.count(&request, begun, result.is_err());
                Io::Ready(result)
            }
            Io::Pending(future) => Io::pending(async move {
                let result = future.await;
                self.statistics.count(&request, begun, result.is_err());
                result
            }),
        }
    }
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    if let Some(path) = &options.file {
        // A path that cannot be written is known now and not after the run.
        std::fs::write(path, "")
            .map_err(|source| Error::from_os(format!("layer stats: making {}", path.display()), source))?;
    }
    let layer = Stats { statistics: Arc::new(Statistics::new()), report_to: Some(options.clone()) };
    Ok(Arc::new(Layered::new(inner, layer)))
}

/// `inner` with its requests counted, and what they are counted in.
pub fn counted(inner: Arc<dyn BlockDevice>) -> (Arc<dyn BlockDevice>, Arc<Statistics>) {
    let statistics = Arc::new(Statistics::new());
    let layer = Stats { statistics: statistics.clone(), report_to: None };
    (Arc::new(Layered::new(inner, layer)), statistics)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerSpec;
    use crate::{MemoryDevice, WriteFlags};

    async fn use_it(device: &dyn BlockDevice) {
        for _ in 0..3 {
            device.read(0, &mut [0; 4096]).await.expect("read");
        }
        device.read(0, &mut [0; 512]).await.expect("read");
        device.read(u64::MAX, &mut [0; 512]).await.expect_err("outside");
        device.write(0, &[1; 8192], WriteFlags::default()).await.expect("write");
    }

    #[tokio::test]
    async fn counts() {
        let (device, statistics) = counted(Arc::new(MemoryDevice::new(1 << 20)));
        use_it(&*device).await;
        let report = statistics.report();
        assert_eq!(report.operations.len(), 2);
        let read = report.operation(Operation::Read).expect("reads");
        assert_eq!((read.requests, read.bytes, read.errors), (5, 3 * 4096 + 512, 1));
        assert_eq!(read.sizes, [Class { below: 1024, requests: 2 }, Class { below: 8192, requests: 3 }]);
        assert_eq!(read.times.iter().map(|class| class.requests).sum::<u64>(), 5);
        assert!(read.nanoseconds > 0 && read.nanoseconds_p50 <= read.nanoseconds_p99);
        assert_eq!(report.operation(Operation::Trim), None);
    }

    #[tokio::test]
    async fn the_report_is_written_when_the_device_goes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        for format in ["text", "json"] {
            let path = directory.path().join(format);
            let layer: LayerSpec =
                format!("stats,file={},format={format}", path.display()).parse().expect("layer");
            let device = layer.wrap(Arc::new(MemoryDevice::new(1 << 20))).expect("layer");
            use_it(&*device).await;
            drop(device);
            let text = std::fs::read_to_string(&path).expect("report");
            match format {
                "text" => assert!(text.contains("read: 5 requests, 12.5 KiB, 1 errors"), "{text}"),
                _ => assert!(text.contains(r#""operation":"write","requests":1,"bytes":8192,"#), "{text}"),
            }
        }
    }

    #[test]
    fn percentiles_are_bounds() {
        let classes = [
            Class { below: 16, requests: 50 },
            Class { below: 64, requests: 49 },
            Class { below: 1024, requests: 1 },
        ];
        assert_eq!([50, 51, 99, 100].map(|percent| percentile(&classes, percent)), [16, 64, 64, 1024]);
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(
            [0, 1, 4095, 4096, u64::MAX].map(|number| bound(class(number))),
            [1, 2, 4096, 8192, u64::MAX]
        );
    }
}

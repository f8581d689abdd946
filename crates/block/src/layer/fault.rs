//! `fault`: errors, for tests of whatever stands on a device. A fault strikes a request before the device below sees it.
//!
//! Which of the requests that match are struck is decided by their number and a seed, so a run whose requests come in
//! the same order fails at the same ones. Several `fault` layers on one another make several kinds of fault. nbdkit's
//! filter is called error.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::around::{Around, Layered, Operation, Request, TakeBack};
use super::parameters::{LayerHelp, Parameters, ParseLayerError, list, parameter};
use crate::{BlockDevice, Error, ErrorKind, Io};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "fault",
    summary: "requests fail (nbdkit: error)",
    parameters: &[
        parameter("on", "KIND+KIND", "all", "which: read, write, zero, trim, flush, extents, prefetch"),
        parameter(
            "error",
            "ERRNO",
            "EIO",
            "EIO, ENOSPC, EROFS, EPERM, EINVAL, ENOTSUP, ETIMEDOUT, ESHUTDOWN",
        ),
        parameter("rate", "P", "1", "how likely each is struck: 0.01 or 1%"),
        parameter("offset", "SIZE", "0", "only requests that touch the bytes from here on"),
        parameter("length", "SIZE", "", "and only so many of them"),
        parameter("after", "N", "0", "spare the first N requests that match"),
        parameter("count", "N", "", "strike at most N"),
        parameter("seed", "N", "1", "decides which are struck"),
        parameter("file", "PATH", "", "strike only while this file exists"),
    ],
};

const ERRORS: [(&str, ErrorKind); 9] = [
    ("EIO", ErrorKind::Io),
    ("ENOSPC", ErrorKind::NoSpace),
    ("EROFS", ErrorKind::ReadOnly),
    ("EPERM", ErrorKind::ReadOnly),
    ("EINVAL", ErrorKind::Invalid),
    ("ENOTSUP", ErrorKind::NotSupported),
    ("EOPNOTSUPP", ErrorKind::NotSupported),
    ("ETIMEDOUT", ErrorKind::TimedOut),
    ("ESHUTDOWN", ErrorKind::ShuttingDown),
];

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    /// By operation.
    on: [bool; Operation::ALL.len()],
    error: ErrorKind,
    probability: f64,
    /// First byte, and the one behind the last; `None` where any bytes will do, and requests without any.
    bytes: Option<(u64, u64)>,
    after: u64,
    count: u64,
    seed: u64,
    file: Option<PathBuf>,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let on = parameters.get_with("on", parse_operations)?;
        let (offset, length) = (parameters.size("offset")?, parameters.positive_size("length")?);
        let start = offset.unwrap_or(0);
        let end = length.map_or(u64::MAX, |length| start.saturating_add(length));
        Ok(Options {
            on: on.unwrap_or([true; Operation::ALL.len()]),
            error: parameters.get_with("error", parse_error)?.unwrap_or(ErrorKind::Io),
            probability: parameters.get_with("rate", parse_probability)?.unwrap_or(1.0),
            bytes: (offset.is_some() || length.is_some()).then_some((start, end)),
            after: parameters.get("after")?.unwrap_or(0),
            count: parameters.get("count")?.unwrap_or(u64::MAX),
            seed: parameters.get("seed")?.unwrap_or(1),
            file: parameters.text("file").map(PathBuf::from),
        })
    }

    fn matches(&self, request: &Request) -> bool {
        let touched = self.bytes.is_none_or(|(start, end)| {
            request.length > 0
                && request.offset < end
                && request.offset.saturating_add(request.length) > start
        });
        touched && self.on[request.operation as usize] && self.file.as_deref().is_none_or(Path::exists)
    }
}

fn parse_operations(text: &str) -> Result<[bool; Operation::ALL.len()], String> {
    let mut on = [false; Operation::ALL.len()];
    for word in text.split('+') {
        let found = Operation::ALL.into_iter().find(|operation| operation.name() == word);
        let found = found.ok_or_else(|| {
            let known = list(Operation::ALL.into_iter().map(Operation::name));
            format!("`{word}` is no kind of request: there are {known}, joined by +")
        })?;
        on[found as usize] = true;
    }
    Ok(on)
}

fn parse_error(text: &str) -> Result<ErrorKind, String> {
    let found = ERRORS.iter().find(|(name, _)| *name == text).map(|(_, kind)| *kind);
    found.ok_or_else(|| format!("write one of {}", list(ERRORS.iter().map(|(name, _)| *name))))
}

fn parse_probability(text: &str) -> Result<f64, &'static str> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    let probability = number.parse::<f64>().ok().map(|number| number / scale);
    probability.filter(|it| (0.0..=1.0).contains(it)).ok_or("write 0 to 1, or 0% to 100%")
}

struct Fault {
    options: Options,
    /// That matched.
    requests: AtomicU64,
    struck: AtomicU64,
}

impl Fault {
    /// Whether the request of this number, among those that match, is struck.
    fn strikes(&self, number: u64) -> bool {
        let Options { after, count, probability, seed, .. } = self.options;
        if number < after || unit(seed, number) >= probability {
            return false;
        }
        let one_more = |struck: u64| (struck < count).then_some(struck + 1);
        self.struck.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }
}

/// A number from 0 to below 1 (splitmix64's way of mixing).
fn unit(seed: u64, number: u64) -> f64 {
    let mut mixed =
        seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

impl Around for Fault {
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        if !self.options.matches(&request) {
            return run();
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        if self.strikes(number) {
            let Request { operation, offset, length, .. } = request;
            let context =
                format!("{} of {length} bytes at {offset}: a fault that was asked for", operation.name());
            return Io::Ready(Err(Error::new(self.options.error, context)));
        }
        match run() {
            Io::Pending(future) => {
                let uncount = TakeBack::new(|| {
                    self.requests.fetch_sub(1, Ordering::Relaxed);
                });
                Io::pending(async move {
                    uncount.keep();
                    future.await
                })
            }
            ready => ready,
        }
    }
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    let layer = Fault { options: options.clone(), requests: AtomicU64::new(0), struck: AtomicU64::new(0) };
    Arc::new(Layered::new(inner, layer))
}

#[cfg(test)]
mod tests {
    use crate::layer::LayerSpec;
    use crate::{BlockDevice, ErrorKind, MemoryDevice, WriteFlags, ZeroFlags};
    use std::sync::Arc;

    fn device(layer: &str) -> Arc<dyn BlockDevice> {
        let layer: LayerSpec = layer.parse().expect(layer);
        layer.wrap(Arc::new(MemoryDevice::new(4 << 20))).expect("a layer")
    }

    async fn read(device: &dyn BlockDevice, offset: u64) -> Option<ErrorKind> {
        device.read(offset, &mut [0; 4096]).await.err().map(|error| error.kind())
    }

    #[tokio::test]
    async fn every_kind_of_request_can_be_struck() {
        let device = device("fault");
        let kinds = [
            device.read(0, &mut [0; 4096]).await.err(),
            device.write(0, &[1; 4096], WriteFlags::default()).await.err(),
            device.write_zeroes(0, 4096, ZeroFlags::default()).await.err(),
            device.trim(0, 4096).await.err(),
            device.flush().await.err(),
            device.extents(0, 4096, 1).await.err(),
            device.locality(0, 4096, 1).await.err(),
            device.prefetch(0, 4096).await.err(),
        ];
        assert!(kinds.iter().all(|error| error.as_ref().is_some_and(|error| error.kind() == ErrorKind::Io)));
    }

    #[tokio::test]
    async fn only_what_was_named() {
        let device = device("fault,on=write+flush,error=ENOSPC,offset=1M,length=4K");
        let write = |offset| device.write(offset, &[1; 4096], WriteFlags::default());
        assert!(write(0).await.is_ok() && write((1 << 20) + 4096).await.is_ok());
        for offset in [1 << 20, (1 << 20) - 4095, (1 << 20) + 4095] {
            assert_eq!(write(offset).await.expect_err("struck").kind(), ErrorKind::NoSpace, "{offset}");
        }
        assert_eq!(read(&*device, 1 << 20).await, None);
        assert!(device.flush().await.is_ok(), "it touches no bytes");
    }

    #[tokio::test]
    async fn numbers_and_files() {
        let device = device("fault,after=2,count=3");
        let mut failed = Vec::new();
        for _ in 0..8 {
            failed.push(read(&*device, 0).await.is_some());
        }
        assert_eq!(failed, [false, false, true, true, true, false, false, false]);

        let directory = tempfile::tempdir().expect("temporary directory");
        let file = directory.path().join("now");
        let device = self::device(&format!("fault,file={}", file.display()));
        assert_eq!(read(&*device, 0).await, None);
        std::fs::write(&file, "").expect("file");
        assert_eq!(read(&*device, 0).await, Some(ErrorKind::Io));
        std::fs::remove_file(&file).expect("file");
        assert_eq!(read(&*device, 0).await, None);
    }

    #[tokio::test]
    async fn a_rate_is_kept_and_replays() {
        let run = |layer: &'static str| async move {
            let device = device(layer);
            let mut failed = Vec::new();
            for _ in 0..2000 {
                failed.push(read(&*device, 0).await.is_some());
            }
            failed
        };
        let first = run("fault,rate=10%,seed=7").await;
        let count = first.iter().filter(|failed| **failed).count();
        assert!((140..260).contains(&count), "{count}");
        assert_eq!(first, run("fault,rate=0.1,seed=7").await);
        assert_ne!(first, run("fault,rate=0.1,seed=8").await);
    }

    #[tokio::test]
    async fn a_request_that_is_made_again_counts_once() {
        let slow: LayerSpec = "delay,read=1ms".parse().expect("a layer");
        let fault: LayerSpec = "fault,after=2".parse().expect("a layer");
        let device =
            fault.wrap(slow.wrap(Arc::new(MemoryDevice::new(1 << 20))).expect("delay")).expect("fault");
        for _ in 0..2 {
            let mut buffer = [0; 4096];
            drop(device.read(0, &mut buffer));
            assert_eq!(read(&*device, 0).await, None);
        }
        assert_eq!(read(&*device, 0).await, Some(ErrorKind::Io));
    }
}

//! `rate`: bytes per second, for reads, for writes, or for both together, by token buckets. A bucket holds what may be
//! moved at once after a pause (`burst`). A request takes its bytes when it begins, also more than there are; what is
//! owed is waited for before the next goes on, so requests larger than the bucket pass too. What moves no data is free.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::around::{Around, Layered, Operation, Request, TakeBack};
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use crate::{BlockDevice, Io};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "rate",
    summary: "bytes per second are limited (nbdkit: rate, which counts bits)",
    parameters: &[
        parameter("total", "SIZE", "", "bytes per second, reads and writes together"),
        parameter("read", "SIZE", "", "bytes per second of reads"),
        parameter("write", "SIZE", "", "bytes per second of writes"),
        parameter("burst", "TIME", "1s", "after a pause this time's worth of bytes goes at once"),
    ],
};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    total: Option<u64>,
    read: Option<u64>,
    write: Option<u64>,
    burst: Duration,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let rate = |key| parameters.positive_size(key);
        let (total, read, write) = (rate("total")?, rate("read")?, rate("write")?);
        if total.or(read).or(write).is_none() {
            return Err(parameters.combination("say how much, for example rate,total=10M for 10 MiB/s"));
        }
        Ok(Options {
            total,
            read,
            write,
            burst: parameters.duration("burst")?.unwrap_or(Duration::from_secs(1)),
        })
    }
}

/// Bytes that may move now; less than none where some are owed.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: f64,
    capacity: f64,
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(bytes_per_second: u64, burst: Duration) -> Self {
        let bytes_per_second = bytes_per_second as f64;
        let capacity = bytes_per_second * burst.as_secs_f64();
        Bucket { bytes_per_second, capacity, level: Mutex::new((capacity, Instant::now())) }
    }

    /// Takes bytes; how long to wait before they may move.
    fn take(&self, bytes: u64) -> Duration {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let since = now.saturating_duration_since(level.1).as_secs_f64();
        // What the bucket has before it is taken from decides: a request pays for those before it.
        let there = (level.0 + since * self.bytes_per_second).min(self.capacity);
        *level = (there - bytes as f64, now);
        Duration::try_from_secs_f64((-there).max(0.0) / self.bytes_per_second).unwrap_or(Duration::MAX)
    }

    fn put_back(&self, bytes: u64) {
        self.level.lock().unwrap_or_else(PoisonError::into_inner).0 += bytes as f64;
    }
}

struct Rate {
    total: Option<Bucket>,
    read: Option<Bucket>,
    write: Option<Bucket>,
}

impl Rate {
    fn buckets(&self, request: &Request) -> impl Iterator<Item = &Bucket> {
        let own = match request.operation {
            Operation::Read => Some(&self.read),
            Operation::Write => Some(&self.write),
            _ => None,
        };
        let total = own.is_some().then_some(&self.total);
        own.into_iter().chain(total).filter_map(Option::as_ref)
    }

    fn take(&self, request: &Request) -> Duration {
        self.buckets(request).map(|bucket| bucket.take(request.length)).max().unwrap_or(Duration::ZERO)
    }

    fn put_back(&self, request: &Request) {
        self.buckets(request).for_each(|bucket| bucket.put_back(request.length));
    }
}

impl Around for Rate {
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        if self.buckets(&request).next().is_none() {
            return run();
        }
        let wait = self.take(&request);
        let unpaid = TakeBack::new(move || self.put_back(&request));
        if !wait.is_zero() {
            // Taken anew when it is polled, so that what is never polled pays nothing and keeps nobody waiting.
            drop(unpaid);
            return Io::pending(async move {
                let wait = self.take(&request);
                let unpaid = TakeBack::new(move || self.put_back(&request));
                tokio::time::sleep(wait).await;
                unpaid.keep();
                run().await
            });
        }
        match run() {
            Io::Pending(future) => Io::pending(async move {
                unpaid.keep();
                future.await
            }),
            ready => {
                unpaid.keep();
                ready
            }
        }
    }
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, options.burst));
    let layer =
        Rate { total: bucket(options.total), read: bucket(options.read), write: bucket(options.write) };
    Arc::new(Layered::new(inner, layer))
}

#[cfg(test)]
mod tests {
    use crate::layer::LayerSpec;
    use crate::{BlockDevice, MemoryDevice, WriteFlags, ZeroFlags};
    use std::sync::Arc;
    use tokio::time::Instant;

    fn device(layer: &str) -> Arc<dyn BlockDevice> {
        let layer: LayerSpec = layer.parse().expect(layer);
        layer.wrap(Arc::new(MemoryDevice::new(64 << 20))).expect("a layer")
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_takes_its_time_and_a_burst_does_not() {
        let device = device("rate,read=1M,burst=2s");
        let start = Instant::now();
        let mut buffer = vec![0; 1 << 20];
        assert!(device.read(0, &mut buffer).is_ready() && device.read(0, &mut buffer).is_ready());
        for _ in 0..8 {
            device.read(0, &mut buffer).await.expect("read");
        }
        let elapsed = start.elapsed().as_secs_f64();
        assert!((6.9..7.1).contains(&elapsed), "the last one owes: {elapsed}");
        device.write(0, &buffer, WriteFlags::default()).await.expect("writes are free");
        device.write_zeroes(0, 64 << 20, ZeroFlags::default()).await.expect("so are zeroes");
        assert!(start.elapsed().as_secs_f64() < 7.1);
    }

    #[tokio::test(start_paused = true)]
    async fn together_and_beside_each_other() {
        let device = device("rate,total=1M,burst=0");
        let start = Instant::now();
        let data = vec![0; 1 << 20];
        let write = |at: u64| device.write(at, &data, WriteFlags::default());
        let mut buffer = vec![0; 1 << 20];
        let (a, b, c, d) =
            tokio::join!(write(0), write(1 << 20), device.read(0, &mut buffer), write(2 << 20));
        a.and(b).and(c).and(d).expect("requests");
        let elapsed = start.elapsed().as_secs_f64();
        assert!((2.9..3.1).contains(&elapsed), "{elapsed}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_dropped_pays_nothing() {
        let device = device("rate,read=1M,burst=1s");
        let mut buffer = vec![0; 1 << 20];
        device.read(0, &mut buffer).await.expect("read");
        device.read(0, &mut buffer).await.expect("read");
        for _ in 0..100 {
            let mut buffer = vec![0; 1 << 20];
            assert!(!device.read(0, &mut buffer).is_ready());
        }
        let start = Instant::now();
        device.read(0, &mut buffer).await.expect("read");
        assert!(start.elapsed().as_secs_f64() < 1.1, "{:?}", start.elapsed());
    }
}

//! `delay`: time that passes before a request goes on, whatever else is under way. Requests wait beside each other, so a
//! client that keeps several going waits for the slowest and not for the sum.
//!
//! A request of one kind waits the same whatever its length, or, with `per=SIZE`, once for each started SIZE of it: what
//! a disk of that speed with requests of that size would do to a client that sends one request after the other.

use std::sync::Arc;
use std::time::Duration;

use super::around::{Around, Layered, Operation, Request};
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use crate::{BlockDevice, Error, ErrorKind, Io};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "delay",
    summary: "requests wait before they go on, beside each other (nbdkit: delay)",
    parameters: &[
        parameter("read", "TIME", "", "before each read"),
        parameter("write", "TIME", "", "before each write"),
        parameter("zero", "TIME", "", "before each write of zeroes"),
        parameter("trim", "TIME", "", "before each trim"),
        parameter("flush", "TIME", "", "before each flush"),
        parameter("extents", "TIME", "", "before each question for extents or locality"),
        parameter("prefetch", "TIME", "", "before each prefetch"),
        parameter("fast-zero", "true|false", "true", "false: fast zeroes fail at once, without a delay"),
        parameter("per", "SIZE", "", "the time is for each started SIZE of a request, not for the request"),
    ],
};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    /// By operation.
    delays: [Duration; Operation::ALL.len()],
    fast_zero: bool,
    per: Option<u64>,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let mut delays = [Duration::ZERO; Operation::ALL.len()];
        let mut any = false;
        for operation in Operation::ALL {
            if let Some(delay) = parameters.duration(operation.name())? {
                delays[operation as usize] = delay;
                any = true;
            }
        }
        if !any {
            return Err(parameters.combination("say what waits and how long, for example delay,read=20ms"));
        }
        let fast_zero = parameters.yes("fast-zero", true)?;
        Ok(Options { delays, fast_zero, per: parameters.positive_size("per")? })
    }

    fn delay(&self, request: &Request) -> Duration {
        let delay = self.delays[request.operation as usize];
        match self.per {
            // A request without a length (a flush) counts as one piece.
            Some(per) => {
                delay.saturating_mul(u32::try_from(request.length.div_ceil(per).max(1)).unwrap_or(u32::MAX))
            }
            None => delay,
        }
    }
}

impl Around for Options {
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        if request.flags.fast_only && !self.fast_zero {
            let Request { offset, length, .. } = request;
            let context =
                format!("fast zeroes of {length} bytes at {offset}: the delay layer lets none pass");
            return Io::Ready(Err(Error::new(ErrorKind::NotSupported, context)));
        }
        let delay = self.delay(&request);
        if delay.is_zero() {
            return run();
        }
        Io::pending(async move {
            tokio::time::sleep(delay).await;
            run().await
        })
    }
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    Arc::new(Layered::new(inner, options.clone()))
}

#[cfg(test)]
mod tests {
    use crate::layer::LayerSpec;
    use crate::{BlockDevice, ErrorKind, MemoryDevice, WriteFlags, ZeroFlags};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::time::Instant;

    fn device(layer: &str) -> Arc<dyn BlockDevice> {
        let layer: LayerSpec = layer.parse().expect(layer);
        layer.wrap(Arc::new(MemoryDevice::new(4 << 20))).expect("a layer")
    }

    #[tokio::test(start_paused = true)]
    async fn each_kind_waits_its_own_time_and_all_beside_each_other() {
        let device = device("delay,write=20ms,zero=5ms,flush=1s");
        let start = Instant::now();
        assert!(device.read(0, &mut [0; 4096]).is_ready(), "reads do not wait");
        assert!(device.trim(0, 4096).is_ready());
        device.write_zeroes(0, 1 << 20, ZeroFlags::default()).await.expect("zeroes");
        assert_eq!(start.elapsed().as_millis(), 5);
        let write = |at: u64| device.write(at, &[1; 4096], WriteFlags::default());
        let (a, b, c) = tokio::join!(write(0), write(4096), write(8192));
        a.and(b).and(c).expect("writes");
        assert_eq!(start.elapsed().as_millis(), 25);
        device.flush().await.expect("flush");
        assert_eq!(start.elapsed().as_millis(), 1025);
    }

    #[tokio::test(start_paused = true)]
    async fn time_for_each_started_piece() {
        let device = device("delay,write=20ms,flush=1ms,per=256K");
        let start = Instant::now();
        device.write(0, &vec![1; 1 << 20], WriteFlags::default()).await.expect("write");
        assert_eq!(start.elapsed(), Duration::from_millis(80));
        device.write(0, &vec![1; (256 << 10) + 1], WriteFlags::default()).await.expect("write");
        assert_eq!(start.elapsed(), Duration::from_millis(120));
        device.flush().await.expect("flush");
        assert_eq!(start.elapsed(), Duration::from_millis(121));
    }

    #[tokio::test(start_paused = true)]
    async fn fast_zeroes_may_fail_at_once() {
        let device = device("delay,zero=5ms,fast-zero=false");
        let flags = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
        let refused = device.write_zeroes(0, 4096, flags);
        assert!(refused.is_ready());
        assert_eq!(refused.await.expect_err("refused").kind(), ErrorKind::NotSupported);
    }
}

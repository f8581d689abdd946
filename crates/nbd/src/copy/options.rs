//! What a caller may ask of a copy.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Requests in flight unless told otherwise. A server that takes 20 ms for a write is served well by no less.
pub const QUEUE_DEPTH_DEFAULT: usize = 64;
/// Most requests in flight that may be asked for.
pub const QUEUE_DEPTH_MAX: usize = 1024;
/// Bytes into which long runs of data are cut unless told otherwise: buffers of this size stay in a core's cache.
pub const REQUEST_BYTES_DEFAULT: u32 = 256 << 10;
/// A run of data up to this long is one write, whatever the size of a request.
pub const WHOLE_RUN_BYTES: u32 = 1 << 20;

/// How zeroes come to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroStrategy {
    /// What is best for this destination, by what it advertises, how it answers, and how long that takes.
    #[default]
    Auto,
    /// Zero bytes are written like data (qemu-img before 3.1).
    Write,
    /// The whole destination is zeroed first, whatever that costs (qemu-img 3.1).
    Prezero,
    /// Each hole is zeroed by a command of its own, in the hope that this is not slower than writing (qemu-img 4.0).
    Guess,
    /// The whole is zeroed first if the destination says that this is fast, else each hole (qemu-img 4.2).
    Fast,
}

impl ZeroStrategy {
    /// All of them, in the order of their names' first use.
    pub const ALL: [ZeroStrategy; 5] = [
        ZeroStrategy::Auto,
        ZeroStrategy::Write,
        ZeroStrategy::Prezero,
        ZeroStrategy::Guess,
        ZeroStrategy::Fast,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ZeroStrategy::Auto => "auto",
            ZeroStrategy::Write => "write",
            ZeroStrategy::Prezero => "prezero",
            ZeroStrategy::Guess => "guess",
            ZeroStrategy::Fast => "fast",
        }
    }
}

impl fmt::Display for ZeroStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that is no [`ZeroStrategy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no way to write zeroes: it is one of auto, write, prezero, guess, fast")]
pub struct ParseZeroStrategyError(String);

impl FromStr for ZeroStrategy {
    type Err = ParseZeroStrategyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = ZeroStrategy::ALL.into_iter().find(|strategy| strategy.name() == text);
        known.ok_or_else(|| ParseZeroStrategyError(text.to_owned()))
    }
}

/// Asks a running copy to stop: it finishes what is in flight, flushes, writes its state file, if it has one, and ends
/// with [`CopyError::Stopped`](super::CopyError::Stopped). Clones are the same handle.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    shared: Arc<(AtomicBool, Notify)>,
}

impl Stop {
    /// Asks for the stop. May be called at any time, from any thread, more than once.
    pub fn stop(&self) {
        self.shared.0.store(true, Ordering::SeqCst);
        self.shared.1.notify_waiters();
    }

    /// Whether the stop was asked for.
    pub fn is_stopped(&self) -> bool {
        self.shared.0.load(Ordering::SeqCst)
    }

    /// Done once the stop was asked for.
    pub async fn stopped(&self) {
        let notified = self.shared.1.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        if !self.is_stopped() {
            notified.await;
        }
    }
}

/// How a copy is to be made.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// How zeroes come to the destination.
    pub zero: ZeroStrategy,
    /// Requests in flight, all together; between 1 and [`QUEUE_DEPTH_MAX`]. Memory is bounded by this times the bytes
    /// of a request.
    pub queue_depth: usize,
    /// Bytes of a data request. `None`: a run of up to [`WHOLE_RUN_BYTES`] is one, a longer one is cut into pieces of
    /// [`REQUEST_BYTES_DEFAULT`]. What the devices take at most is kept in any case.
    pub request_bytes: Option<u32>,
    /// No holes in the destination: zeroes are allocated, and a destination that is zero already is written all the
    /// same.
    pub allocate: bool,
    /// The destination is known to read as zeroes, because it was just made.
    pub destination_is_zero: bool,
    /// Read both ends back after the flush and compare them.
    pub verify: bool,
    /// A state file: where a copy that was stopped goes on. It is made when the copy begins and removed when it is done.
    pub resume: Option<PathBuf>,
    /// What the source is, in a form that is the same for the same source: the canonical path of a file, a URI. `None`
    /// for what has no identity (memory, null, pattern).
    pub source_identity: Option<String>,
    /// The same of the destination. A copy of a thing onto itself is refused.
    pub destination_identity: Option<String>,
    /// How often the destination is flushed, and the state file written, while the copy runs.
    pub checkpoint_interval: Duration,
    /// To stop it in good order.
    pub stop: Stop,
}

impl Default for CopyOptions {
    fn default() -> Self {
        CopyOptions {
            zero: ZeroStrategy::Auto,
            queue_depth: QUEUE_DEPTH_DEFAULT,
            request_bytes: None,
            allocate: false,
            destination_is_zero: false,
            verify: false,
            resume: None,
            source_identity: None,
            destination_identity: None,
            checkpoint_interval: Duration::from_secs(5),
            stop: Stop::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_print() {
        for strategy in ZeroStrategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let error = "quick".parse::<ZeroStrategy>().expect_err("no such strategy").to_string();
        assert!(error.contains("quick") && error.contains("prezero"), "{error}");
    }

    #[tokio::test]
    async fn a_stop_is_seen_before_and_after_it_is_waited_for() {
        let stop = Stop::default();
        let waiter = tokio::spawn({
            let stop = stop.clone();
            async move { stop.stopped().await }
        });
        tokio::task::yield_now().await;
        assert!(!stop.is_stopped() && !waiter.is_finished());
        stop.stop();
        waiter.await.expect("the waiter ends");
        stop.stopped().await;
    }
}

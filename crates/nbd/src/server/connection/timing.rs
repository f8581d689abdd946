//! What a connection does by the clock: it gives its payload buffers back when it has been idle for a moment, leaves a client
//! that stalls, and closes some time after the server was told to stop.
//!
//! A clock that is set anew for each request would cost more than the request. So there is a slow tick, which runs only
//! while there is something to watch and asks whether anything moved since the last one.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};

use super::Connection;

/// How often is looked whether anything moved on a busy connection.
const TICK: Duration = Duration::from_millis(500);
/// How long a connection that has nothing in flight listens for more when the server stops, so as to answer with
/// ESHUTDOWN what was on its way.
const STOP_TICK: Duration = Duration::from_millis(50);

type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(super) struct Timing {
    stall_timeout: Duration,
    tick: Pin<Box<Sleep>>,
    /// Whether the tick runs.
    ticking: bool,
    moved: bool,
    /// When something had moved, by the tick that saw it.
    last_moved: Instant,
    stopping: watch::Receiver<bool>,
    /// Done when the server stops; gone afterwards.
    stop: Option<Stop>,
    /// Who is woken by `stop`.
    waker: Waker,
    quiet_after_stop: bool,
}

impl Timing {
    pub(super) fn new(stall_timeout: Duration, stopping: watch::Receiver<bool>) -> Self {
        let mut waiting = stopping.clone();
        let stop = async move {
            if waiting.wait_for(|stopping| *stopping).await.is_err() {
                // Nobody can stop this connection any more.
                std::future::pending::<()>().await;
            }
        };
        Timing {
            stall_timeout,
            tick: Box::pin(sleep(Duration::ZERO)),
            ticking: false,
            moved: false,
            last_moved: Instant::now(),
            stopping,
            stop: Some(Box::pin(stop)),
            waker: Waker::noop().clone(),
            quiet_after_stop: false,
        }
    }

    /// Notes that bytes went one way or the other.
    pub(super) fn moved(&mut self) {
        self.moved = true;
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.is_none()
    }

    pub(super) fn is_quiet_after_stop(&self) -> bool {
        self.quiet_after_stop
    }

    fn start_tick(&mut self) {
        let length = if self.is_stopping() { STOP_TICK } else { TICK.min(self.stall_timeout / 4) };
        self.tick.as_mut().reset(Instant::now() + length);
        self.ticking = true;
    }

    /// Whether the server began to stop since the last call. The list of those who wait for that is shared by all
    /// connections: it is not touched as long as the same task asks and nothing changed.
    fn stop_begins(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(stop) = &mut self.stop else { return false };
        let registered = self.waker.will_wake(cx.waker());
        if registered && !self.stopping.has_changed().unwrap_or(false) {
            return false;
        }
        if !registered {
            self.waker.clone_from(cx.waker());
        }
        if stop.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.stop = None;
        true
    }
}

impl<S> Connection<S> {
    /// Looks at the clock and at the server's state; whether something came of it.
    ///
    /// # Errors
    /// When the client stalls.
    pub(super) fn poll_timing(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if self.timing.stop_begins(cx) {
            self.timing.start_tick();
            return Ok(true);
        }
        if !self.timing.ticking {
            if !self.timing.moved {
                return Ok(false);
            }
            self.timing.start_tick();
        }
        if self.timing.tick.as_mut().poll(cx).is_pending() {
            return Ok(false);
        }
        self.on_tick()?;
        Ok(true)
    }

    fn on_tick(&mut self) -> io::Result<()> {
        self.timing.ticking = false;
        let idle = self.output.is_empty() && self.jobs.is_empty() && self.reading.is_none();
        if std::mem::take(&mut self.timing.moved) {
            self.timing.last_moved = Instant::now();
        } else if idle && self.timing.is_stopping() {
            self.timing.quiet_after_stop = true;
        } else if !self.output.is_empty() || self.is_inside_request() {
            if self.timing.last_moved.elapsed() >= self.timing.stall_timeout {
                let what = if self.output.is_empty() { "send the rest of a request" } else { "take replies" };
                let message = format!("the client did not {what} for {:?}", self.timing.stall_timeout);
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
        } else if idle {
            self.spares.clear();
            return Ok(());
        } else {
            // The client waits for the device, not the other way round.
            self.timing.last_moved = Instant::now();
        }
        self.timing.start_tick();
        Ok(())
    }

    /// Whether a request was begun that the client has to go on with.
    fn is_inside_request(&self) -> bool {
        let begun = self.incoming.is_some() || !self.input.bytes().is_empty();
        begun && self.wants_input()
    }
}

//! What a copy tells while it runs.

use std::time::Duration;

/// What a copy is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Bytes go from the source to the destination.
    Copy,
    /// The destination makes them durable.
    Flush,
    /// Both are read and compared.
    Verify,
}

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgressState {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the source that are dealt with in this phase, holes too.
    pub done: u64,
    /// Bytes there are.
    pub total: u64,
    /// Bytes that were dealt with before this run began (a resumed copy).
    pub resumed: u64,
    /// Since this phase began.
    pub elapsed: Duration,
}

impl ProgressState {
    /// Bytes in a second, over the whole of this phase.
    pub fn bytes_per_second(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds == 0.0 { 0.0 } else { self.done.saturating_sub(self.resumed) as f64 / seconds }
    }

    /// The time that the rest of this phase takes if it goes on like that.
    pub fn remaining(&self) -> Option<Duration> {
        let rate = self.bytes_per_second();
        let seconds = self.total.saturating_sub(self.done) as f64 / rate;
        (rate > 0.0).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
    }
}

/// Who is told. A copy calls this some ten times a second and whenever a phase begins or ends, from the task that polls
/// it: an implementation must not block.
pub trait Progress: Send + Sync {
    /// Where the copy is now.
    fn update(&self, state: &ProgressState);
}

/// Nobody wants to know.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn update(&self, _state: &ProgressState) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left() {
        let mut state = ProgressState {
            phase: Phase::Copy,
            done: 300,
            total: 1100,
            resumed: 100,
            elapsed: Duration::from_secs(2),
        };
        assert_eq!(state.bytes_per_second(), 100.0);
        assert_eq!(state.remaining(), Some(Duration::from_secs(8)));
        state.done = 100;
        assert_eq!(state.remaining(), None);
    }
}

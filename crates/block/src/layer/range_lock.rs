//! Locks of byte ranges: many writers of whole blocks beside each other, one who reads, changes and writes back alone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Beside others that are shared.
    Shared,
    /// By nobody else.
    Alone,
}

#[derive(Debug)]
struct Held {
    id: u64,
    start: u64,
    end: u64,
    hold: Hold,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    next_id: u64,
}

/// The ranges of one device that are held. A range is tried again whenever another is given back; there is no queue, as
/// holders are few and brief.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    state: Mutex<State>,
    given_back: Notify,
}

impl RangeLock {
    /// `start..end`, if nobody holds it in a way that forbids that.
    pub(super) fn try_lock(self: &Arc<Self>, start: u64, end: u64, hold: Hold) -> Option<RangeGuard> {
        let mut state = self.state();
        let meets = |held: &Held| held.start < end && start < held.end;
        let forbids = |held: &Held| meets(held) && (hold == Hold::Alone || held.hold == Hold::Alone);
        if state.held.iter().any(forbids) {
            return None;
        }
        let id = state.next_id;
        state.next_id += 1;
        state.held.push(Held { id, start, end, hold });
        Some(RangeGuard { lock: self.clone(), id })
    }

    /// The same, waited for.
    pub(super) async fn lock(self: &Arc<Self>, start: u64, end: u64, hold: Hold) -> RangeGuard {
        loop {
            let mut given_back = std::pin::pin!(self.given_back.notified());
            given_back.as_mut().enable();
            if let Some(guard) = self.try_lock(start, end, hold) {
                return guard;
            }
            given_back.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range that is held until this goes.
#[derive(Debug)]
pub(super) struct RangeGuard {
    lock: Arc<RangeLock>,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.lock.state();
        if let Some(index) = state.held.iter().position(|held| held.id == self.id) {
            state.held.swap_remove(index);
        }
        drop(state);
        self.lock.given_back.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_beside_whom() {
        let lock = Arc::new(RangeLock::default());
        let shared = lock.try_lock(0, 10, Hold::Shared).expect("free");
        assert!(lock.try_lock(5, 15, Hold::Shared).is_some());
        assert!(lock.try_lock(9, 10, Hold::Alone).is_none());
        let alone = lock.try_lock(10, 20, Hold::Alone).expect("free");
        assert!(lock.try_lock(19, 21, Hold::Shared).is_none());
        assert!(lock.try_lock(20, 21, Hold::Shared).is_some());
        drop(shared);
        assert!(lock.try_lock(0, 10, Hold::Alone).is_some());
        drop(alone);
        assert!(lock.try_lock(0, 20, Hold::Alone).is_some());
        assert!(lock.state().held.is_empty());
    }

    #[tokio::test]
    async fn a_waiter_is_woken() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.try_lock(0, 10, Hold::Alone).expect("free");
        let other = lock.clone();
        let waiter = tokio::spawn(async move { drop(other.lock(9, 11, Hold::Shared).await) });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(first);
        waiter.await.expect("woken");
    }
}

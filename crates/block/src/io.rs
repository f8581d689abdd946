//! [`Io`]: the result of a request that is either done already or will be.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::Result;

/// What a request returns: done, or a future that finishes it.
///
/// It is a future itself, so callers that do not care write `device.read(offset, &mut buf).await`.
#[must_use = "a pending request does nothing until it is polled"]
pub enum Io<'a, T> {
    /// The request is finished; nothing was allocated.
    Ready(Result<T>),
    /// The request waits for something that is not local.
    Pending(Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>),
}

impl<'a, T> Io<'a, T> {
    /// A request that has to wait for `future`.
    pub fn pending(future: impl Future<Output = Result<T>> + Send + 'a) -> Self {
        Io::Pending(Box::pin(future))
    }

    /// Whether the result is at hand.
    pub fn is_ready(&self) -> bool {
        matches!(self, Io::Ready(_))
    }
}

impl<'a> Io<'a, ()> {
    /// This request and, when it succeeded, the one that `next` makes: how a request that spans several devices is
    /// carried out in order. Ready when both are.
    pub fn and_then(self, next: impl FnOnce() -> Io<'a, ()> + Send + 'a) -> Io<'a, ()> {
        match self {
            Io::Ready(Ok(())) => next(),
            Io::Ready(Err(error)) => Io::Ready(Err(error)),
            Io::Pending(first) => Io::pending(async move {
                first.await?;
                next().await
            }),
        }
    }
}

impl<T> From<Result<T>> for Io<'_, T> {
    fn from(result: Result<T>) -> Self {
        Io::Ready(result)
    }
}

impl<T: Unpin> Future for Io<'_, T> {
    type Output = Result<T>;

    /// # Panics
    /// When polled again after a ready result was taken, as every future may.
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Io::Pending(future) => future.as_mut().poll(cx),
            ready => {
                // A closure without captures has no size, and boxing that allocates nothing: awaiting what is ready
                // costs no allocation either.
                let spent = poll_fn(|_| panic!("an Io was polled after it was ready"));
                match std::mem::replace(ready, Io::Pending(Box::pin(spent))) {
                    Io::Ready(result) => Poll::Ready(result),
                    Io::Pending(_) => unreachable!("matched above"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, ErrorKind};
    use std::task::Waker;

    fn poll<T: Unpin>(io: &mut Io<'_, T>) -> Poll<Result<T>> {
        Pin::new(io).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_ready_request_gives_its_result_once() {
        let mut io = Io::Ready(Ok(7));
        assert!(matches!(poll(&mut io), Poll::Ready(Ok(7))));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| poll(&mut io))).is_err());
    }

    #[test]
    fn a_chain_is_ready_when_both_are_and_stops_at_an_error() {
        let done = || Io::Ready(Ok(()));
        assert!(done().and_then(done).is_ready());
        let failed = || Io::Ready(Err(Error::new(ErrorKind::Io, "no")));
        let reached = std::sync::atomic::AtomicBool::new(false);
        let reach = || {
            reached.store(true, std::sync::atomic::Ordering::Relaxed);
            Io::Ready(Ok(()))
        };
        assert!(matches!(failed().and_then(reach), Io::Ready(Err(_))));
        let mut late = Io::pending(async { Err(Error::new(ErrorKind::Io, "late")) }).and_then(reach);
        assert!(matches!(poll(&mut late), Poll::Ready(Err(_))));
        assert!(!reached.load(std::sync::atomic::Ordering::Relaxed));
        let mut chain = Io::pending(async { Ok(()) }).and_then(reach);
        assert!(!chain.is_ready() && !reached.load(std::sync::atomic::Ordering::Relaxed), "lazy");
        assert!(matches!(poll(&mut chain), Poll::Ready(Ok(()))));
        assert!(reached.load(std::sync::atomic::Ordering::Relaxed));
    }
}

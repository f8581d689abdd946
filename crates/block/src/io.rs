//! [`Io`]: the result of a request that is either done already or will be.

use std::future::Future;
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
                let spent = Io::Pending(Box::pin(async { panic!("an Io was polled after it was ready") }));
                match std::mem::replace(ready, spent) {
                    Io::Ready(result) => Poll::Ready(result),
                    Io::Pending(_) => unreachable!("matched above"),
                }
            }
        }
    }
}

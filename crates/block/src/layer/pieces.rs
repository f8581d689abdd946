//! Requests that are carried out as several below.

use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::{Io, Result};

/// `offset..offset + length` in pieces of at most `maximum` bytes, counted from `offset`.
pub(super) fn pieces(offset: u64, length: u64, maximum: u64) -> impl Iterator<Item = (u64, u64)> + Send {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let piece = (at, maximum.min(end - at));
            at += piece.1;
            piece
        })
    })
}

/// Makes a request that changes nothing of each piece, at most `parallel` at once. Ready where all are.
pub(super) fn read_all<'a, P: Send + 'a>(
    mut pieces: impl Iterator<Item = P> + Send + 'a,
    parallel: usize,
    mut request: impl FnMut(P) -> Io<'a, ()> + Send + 'a,
) -> Io<'a, ()> {
    while let Some(piece) = pieces.next() {
        match request(piece) {
            Io::Ready(Ok(())) => {}
            Io::Ready(Err(error)) => return Io::Ready(Err(error)),
            pending => return Io::pending(go_on(Some(pending), pieces, parallel, request)),
        }
    }
    Io::Ready(Ok(()))
}

/// Makes a request that changes bytes of each piece, at most `parallel` at once. Never ready: a caller may drop what is
/// pending unpolled, and the pieces before it would have been written.
pub(super) fn change_all<'a, P: Send + 'a>(
    pieces: impl Iterator<Item = P> + Send + 'a,
    parallel: usize,
    request: impl FnMut(P) -> Io<'a, ()> + Send + 'a,
) -> Io<'a, ()> {
    Io::pending(go_on(None, pieces, parallel, request))
}

async fn go_on<'a, P>(
    begun: Option<Io<'a, ()>>,
    mut pieces: impl Iterator<Item = P>,
    parallel: usize,
    mut request: impl FnMut(P) -> Io<'a, ()>,
) -> Result<()> {
    let mut running: FuturesUnordered<_> = begun.into_iter().collect();
    loop {
        while running.len() < parallel
            && let Some(piece) = pieces.next()
        {
            running.push(request(piece));
        }
        match running.next().await {
            Some(done) => done?,
            None => return Ok(()),
        }
    }
}

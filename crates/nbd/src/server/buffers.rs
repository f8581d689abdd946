//! The buffers of a connection: what was received and not yet taken apart, and what is to be sent. A connection holds
//! them only while it is busy; in between they lie in a pool that all connections share.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are received at once: some thousand requests for reads, or a dozen small writes.
pub(super) const INPUT_BYTES: usize = 128 << 10;
/// Bytes that are sent at once: 64 reads of 4 KiB with their headers. Input and output together stay in the second level
/// cache of a core.
pub(super) const OUTPUT_BYTES: usize = (256 << 10) + (16 << 10);
/// What a connection without buffers receives into: 64 requests for reads, or a header whose payload then goes where it
/// belongs.
const IDLE_BYTES: usize = 2 << 10;
/// Buffers of each kind that are kept for the next connection that becomes busy.
const POOL_KEPT_MAX: usize = 32;
/// Payload buffers that a busy connection keeps for its next large request, and the most bytes in them.
const SPARES_MAX: usize = 4;
const SPARE_BYTES_MAX: usize = 4 << 20;
/// Pieces that wait to be sent when no long reads are begun.
const PIECES_MAX: usize = 256;
/// Pieces that are sent in one call.
const GATHERED_MAX: usize = 32;

/// Buffers of one length that nobody uses at the moment.
pub(super) struct Pool {
    length: usize,
    kept: Mutex<Vec<Box<[u8]>>>,
}

impl Pool {
    pub(super) fn new(length: usize) -> Self {
        Pool { length, kept: Mutex::default() }
    }

    fn take(&self) -> Box<[u8]> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| zeroed(self.length))
    }

    fn give_back(&self, buffer: Box<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < POOL_KEPT_MAX {
            kept.push(buffer);
        }
    }
}

/// Payload buffers of a connection that are free at the moment: a large request in a steady stream gets memory whose
/// pages are there already.
#[derive(Default)]
pub(super) struct Spares {
    kept: Vec<Box<[u8]>>,
}

impl Spares {
    /// A buffer of at least `length` bytes and not much more, with anything in it.
    pub(super) fn take(&mut self, length: usize) -> Box<[u8]> {
        match self.kept.iter().position(|buffer| (length..=2 * length).contains(&buffer.len())) {
            Some(index) => self.kept.swap_remove(index),
            None => zeroed(length),
        }
    }

    pub(super) fn give_back(&mut self, buffer: Box<[u8]>) {
        if buffer.len() > SPARE_BYTES_MAX {
            return;
        }
        // The oldest goes: the sizes that are asked for now are those that will be.
        let mut held: usize = self.kept.iter().map(|kept| kept.len()).sum();
        while self.kept.len() >= SPARES_MAX || held + buffer.len() > SPARE_BYTES_MAX {
            held -= self.kept.remove(0).len();
        }
        self.kept.push(buffer);
    }

    pub(super) fn clear(&mut self) {
        self.kept = Vec::new();
    }
}

fn zeroed(length: usize) -> Box<[u8]> {
    vec![0; length].into_boxed_slice()
}

/// What was received and not yet taken.
pub(super) struct Input {
    pool: Arc<Pool>,
    buffer: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Input { pool, buffer: None, start: 0, end: 0 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer[self.start..self.end],
            None => &[],
        }
    }

    pub(super) fn take(&mut self, length: usize) {
        self.start += length;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives more; 0 bytes mean that the client will send no more. Never called when [`Input::is_full`].
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let Some(buffer) = &mut self.buffer else {
            let mut small = [0; IDLE_BYTES];
            let length = ready!(poll_read(stream, cx, &mut small))?;
            if length > 0 {
                let buffer = self.buffer.insert(self.pool.take());
                buffer[..length].copy_from_slice(&small[..length]);
                (self.start, self.end) = (0, length);
            }
            return Poll::Ready(Ok(length));
        };
        if self.start > 0 && self.end == buffer.len() {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let length = ready!(poll_read(stream, cx, &mut buffer[self.end..]))?;
        self.end += length;
        Poll::Ready(Ok(length))
    }

    pub(super) fn is_full(&self) -> bool {
        self.end - self.start == INPUT_BYTES
    }

    /// Gives the buffer back if nothing is in it.
    pub(super) fn rest(&mut self) {
        if self.start == self.end
            && let Some(buffer) = self.buffer.take()
        {
            self.pool.give_back(buffer);
        }
    }
}

/// Reads into the front of `buffer`.
pub(super) fn poll_read<S: AsyncRead + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(buffer);
    ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(buffer.filled().len()))
}

/// A piece of what is to be sent.
enum Piece {
    /// A range of the output buffer.
    Inline { start: usize, end: usize },
    /// A range of a buffer of its own, and whether the buffer may be used again.
    Payload { buffer: Arc<Box<[u8]>>, start: usize, end: usize },
    /// Bytes of the device, which somebody else sends from the file where they lie.
    Located { offset: u64, length: usize },
}

impl Piece {
    fn length(&self) -> usize {
        match self {
            Piece::Inline { start, end } | Piece::Payload { start, end, .. } => end - start,
            Piece::Located { length, .. } => *length,
        }
    }
}

/// What is to be sent. Replies are built where they are sent from: a caller asks for room at the end, fills it, and adds
/// it, or does not.
pub(super) struct Output {
    pool: Arc<Pool>,
    buffer: Option<Box<[u8]>>,
    end: usize,
    pieces: VecDeque<Piece>,
    payload_bytes: usize,
}

impl Output {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Output { pool, buffer: None, end: 0, pieces: VecDeque::new(), payload_bytes: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes in payload buffers that wait to be sent.
    pub(super) fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// How much can be added before something is sent.
    pub(super) fn room(&self) -> usize {
        OUTPUT_BYTES - self.end
    }

    /// The room that follows what was added; `length` is at most [`Output::room`].
    pub(super) fn tail(&mut self, length: usize) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(|| self.pool.take());
        &mut buffer[self.end..][..length]
    }

    /// Adds what was put into the tail.
    pub(super) fn add(&mut self, length: usize) {
        let start = self.end;
        self.end += length;
        match self.pieces.back_mut() {
            Some(Piece::Inline { end, .. }) if *end == start => *end += length,
            _ => self.pieces.push_back(Piece::Inline { start, end: start + length }),
        }
    }

    /// Adds a copy of `bytes`, which fit.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.tail(bytes.len()).copy_from_slice(bytes);
        self.add(bytes.len());
    }

    /// Adds a range of a buffer.
    pub(super) fn push_payload(&mut self, buffer: &Arc<Box<[u8]>>, start: usize, end: usize) {
        self.payload_bytes += end - start;
        self.pieces.push_back(Piece::Payload { buffer: Arc::clone(buffer), start, end });
    }

    /// Whether so many pieces wait that no more should be added.
    pub(super) fn is_long(&self) -> bool {
        self.pieces.len() >= PIECES_MAX
    }

    /// Adds bytes of the device.
    pub(super) fn push_located(&mut self, offset: u64, length: usize) {
        self.pieces.push_back(Piece::Located { offset, length });
    }

    /// The bytes of the device that are to be sent next, if such bytes are.
    pub(super) fn located(&self) -> Option<(u64, usize)> {
        match self.pieces.front() {
            Some(&Piece::Located { offset, length }) => Some((offset, length)),
            _ => None,
        }
    }

    /// Sends what can be sent of what comes before [`Output::located`] would be something.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        spares: &mut Spares,
    ) -> Poll<io::Result<()>> {
        let inline = self.buffer.as_deref().unwrap_or_default();
        let bytes = |piece| match piece {
            &Piece::Inline { start, end } => Some(&inline[start..end]),
            Piece::Payload { buffer, start, end } => Some(&buffer[*start..*end]),
            Piece::Located { .. } => None,
        };
        let mut slices = [IoSlice::new(&[]); GATHERED_MAX];
        let mut count = 0;
        for (into, bytes) in slices.iter_mut().zip(self.pieces.iter().map_while(bytes)) {
            *into = IoSlice::new(bytes);
            count += 1;
        }
        let stream = Pin::new(stream);
        let sent = match &slices[..count] {
            [only] => ready!(stream.poll_write(cx, only))?,
            several => ready!(stream.poll_write_vectored(cx, several))?,
        };
        if sent == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.sent(sent, spares);
        Poll::Ready(Ok(()))
    }

    pub(super) fn sent(&mut self, mut length: usize, spares: &mut Spares) {
        while length > 0
            && let Some(first) = self.pieces.front_mut()
        {
            let part = first.length().min(length);
            length -= part;
            match first {
                Piece::Inline { start, .. } => *start += part,
                Piece::Located { offset, length } => {
                    *offset += part as u64;
                    *length -= part;
                }
                Piece::Payload { start, .. } => {
                    *start += part;
                    self.payload_bytes -= part;
                }
            }
            if first.length() == 0
                && let Some(Piece::Payload { buffer, .. }) = self.pieces.pop_front()
                && let Some(buffer) = Arc::into_inner(buffer)
            {
                spares.give_back(buffer);
            }
        }
        if self.pieces.is_empty() {
            self.end = 0;
        }
    }

    /// Gives the buffer back if nothing is in it.
    pub(super) fn rest(&mut self) {
        if self.pieces.is_empty()
            && let Some(buffer) = self.buffer.take()
        {
            self.pool.give_back(buffer);
            self.pieces = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn inline_and_payload_leave_in_the_order_in_which_they_came() {
        let mut output = Output::new(Arc::new(Pool::new(OUTPUT_BYTES)));
        let mut spares = Spares::default();
        output.push(b"ab");
        output.push(b"cd");
        let payload = Arc::new(Box::from(*b"-EFGH-"));
        output.push_payload(&payload, 1, 3);
        output.push_payload(&payload, 3, 5);
        drop(payload);
        output.push(b"ij");
        assert_eq!(output.payload_bytes(), 4);
        let (mut near, mut far) = tokio::io::duplex(3);
        let mut got = Vec::new();
        while !output.is_empty() {
            let mut cx = Context::from_waker(Waker::noop());
            let _ = output.poll_send(&mut near, &mut cx, &mut spares);
            let mut some = [0; 3];
            let length = far.read(&mut some).await.expect("read");
            got.extend_from_slice(&some[..length]);
        }
        assert_eq!(got, b"abcdEFGHij");
        assert_eq!((output.payload_bytes(), output.room()), (0, OUTPUT_BYTES));
        assert_eq!(spares.take(6).len(), 6, "the payload's buffer is kept");
    }

    #[test]
    fn spares_are_bounded() {
        let mut spares = Spares::default();
        for _ in 0..100 {
            spares.give_back(zeroed(1 << 20));
            spares.give_back(zeroed(SPARE_BYTES_MAX + 1));
        }
        assert!(spares.kept.iter().map(|kept| kept.len()).sum::<usize>() <= SPARE_BYTES_MAX);
        assert!(!spares.kept.is_empty());
    }
}

//! One request and its reply on one connection, as a future.

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use super::failure::{Break, Failure};
use super::link::{Answer, Expected, Link, Reply, lock};
use crate::protocol::{Command, CommandFlags, HeaderStyle, Request, StatusChunk};

/// What goes with a request, or is to come back.
pub(super) enum Body<'a> {
    /// Where data that is read belongs.
    Into(&'a mut [u8]),
    /// Data that is written.
    From(&'a [u8]),
    /// Neither.
    None,
}

impl Body<'_> {
    /// The same for one more sending.
    pub(super) fn again(&mut self) -> Body<'_> {
        match self {
            Body::Into(buffer) => Body::Into(buffer),
            Body::From(data) => Body::From(data),
            Body::None => Body::None,
        }
    }
}

/// A request without its cookie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    /// Bytes of the export.
    pub(super) length: u64,
}

impl Order {
    fn expected(&self) -> Expected {
        let (answer, payload, slow) = match self.command {
            Command::Read => (Answer::Data, self.length, false),
            Command::Write => (Answer::Nothing, self.length, false),
            Command::BlockStatus => (Answer::Status, 0, false),
            _ => (Answer::Nothing, 0, true),
        };
        Expected { answer, offset: self.offset, length: self.length, payload, slow }
    }
}

/// A request under way. Dropping it at any time leaves the connection as it must be.
pub(super) struct Exchange<'a> {
    link: &'a Link,
    order: Order,
    body: Body<'a>,
    header: [u8; Request::EXTENDED_LENGTH],
    /// Bytes of header and payload.
    total: usize,
    sent: usize,
    flushed: bool,
    slot: Option<u32>,
}

impl<'a> Exchange<'a> {
    /// `order` must fit the connection's style: a length beyond 32 bits takes extended headers.
    pub(super) fn new(link: &'a Link, order: Order, body: Body<'a>) -> Self {
        let header = [0; Request::EXTENDED_LENGTH];
        let payload = if let Body::From(data) = &body { data.len() } else { 0 };
        let total = link.style.request_length() + payload;
        Exchange { link, order, body, header, total, sent: 0, flushed: false, slot: None }
    }

    fn enter(&mut self, cx: &Context<'_>) -> Result<Option<u32>, Failure> {
        if self.slot.is_none() {
            let Some((index, cookie)) = self.link.enter(self.order.expected(), cx)? else { return Ok(None) };
            let Order { command, mut flags, offset, length } = self.order;
            let extended = self.link.style == HeaderStyle::Extended;
            flags.set(CommandFlags::PAYLOAD_LEN, extended && command == Command::Write);
            let request = Request { flags, command, cookie, offset, length };
            if extended {
                self.header = request.encode_extended();
            } else if let Some(header) = request.encode_compact() {
                self.header[..Request::COMPACT_LENGTH].copy_from_slice(&header);
            }
            self.slot = Some(index);
        }
        Ok(self.slot)
    }

    /// Sends what is left, when it is this request's turn.
    fn poll_send(&mut self, me: u32, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if !self.link.may_send(me, cx)? {
            return Poll::Pending;
        }
        let result = ready!(self.poll_write(cx));
        if let Err(cause) = result {
            return Poll::Ready(Err(Failure::Broken(self.link.break_off(cause))));
        }
        self.link.sent();
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Break>> {
        let mut writer = lock(&self.link.writer);
        let payload = if let Body::From(data) = &self.body { data } else { &[][..] };
        let header = &self.header[..self.link.style.request_length()];
        while self.sent < self.total {
            let written = match header.get(self.sent..) {
                Some(rest) if !rest.is_empty() && payload.is_empty() => {
                    ready!(Pin::new(&mut *writer).poll_write(cx, rest))?
                }
                Some(rest) if !rest.is_empty() => {
                    let slices = [IoSlice::new(rest), IoSlice::new(payload)];
                    ready!(Pin::new(&mut *writer).poll_write_vectored(cx, &slices))?
                }
                _ => ready!(Pin::new(&mut *writer).poll_write(cx, &payload[self.sent - header.len()..]))?,
            };
            if written == 0 {
                return Poll::Ready(Err(Break::closed()));
            }
            self.sent += written;
        }
        ready!(Pin::new(&mut *writer).poll_flush(cx))?;
        self.flushed = true;
        Poll::Ready(Ok(()))
    }
}

impl Future for Exchange<'_> {
    type Output = Result<Vec<StatusChunk>, Failure>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Some(me) = this.enter(cx)? else { return Poll::Pending };
        if !this.flushed
            && let Poll::Ready(Err(failure)) = this.poll_send(me, cx)
        {
            return Poll::Ready(Err(failure));
        }
        // Replies are received while this waits to send: the server may wait for that in its turn.
        let link = this.link;
        let buffer: &mut [u8] = if let Body::Into(buffer) = &mut this.body { buffer } else { &mut [] };
        let reply = ready!(link.poll_reply(me, buffer, this.flushed, cx));
        if reply.is_ok() || matches!(reply, Err(Failure::Refused { .. })) {
            this.slot = None; // The slot is another's from here on.
        }
        let Reply { coverage, parked, status } = reply?;
        for part in parked {
            buffer[part.at..][..part.bytes.len()].copy_from_slice(&part.bytes);
        }
        coverage.fill_holes(buffer);
        Poll::Ready(Ok(status))
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        if let Some(me) = self.slot.take() {
            self.link.abandon(me, self.sent > 0, self.flushed);
        }
    }
}

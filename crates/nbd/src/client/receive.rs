//! The leader's work: what the server sends is taken apart and given to the requests it belongs to.
//!
//! Headers, and the short payloads that are understood as a whole, go through a receive buffer, so that one call brings
//! many small replies. Data goes from there, or past it straight from the socket, into the buffer of its request. Nothing
//! that the server says is believed: see [`Link::head`] and [`Link::chunk`].

use std::pin::Pin;
use std::sync::MutexGuard;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use super::failure::{Break, BreakKind, Failure};
use super::link::{Answer, Link, Parked, Presence, Reply, Table, lock};
use crate::protocol::{Chunk, ChunkHeader, ChunkKind, HeaderStyle, NbdError, SimpleReply};

/// The receive buffer, in bytes.
const BUFFER: usize = 64 << 10;
/// What is read at once while large replies may come: headers, and little of the data that follows. In bytes.
const SIP: usize = 256;

/// The longest start of a message that is parsed at once: an extended header with the offset of its data.
const HEAD_MAX: usize = ChunkHeader::EXTENDED_LENGTH + ChunkHeader::DATA_PREFIX;
const _: () = assert!(HEAD_MAX <= SIP && SIP <= BUFFER);

/// Data on its way to a request.
struct Incoming {
    slot: u32,
    /// Where in the request's buffer the next byte belongs.
    at: usize,
    remaining: usize,
    /// The reply is complete with it.
    last: bool,
    /// Where it goes while the request's future does not come for it.
    parked: Option<Parked>,
}

enum Progress {
    /// A header comes next.
    Header,
    /// The payload of a chunk that is understood as a whole.
    Payload(ChunkHeader, Vec<u8>),
    Data(Incoming),
}

/// What the leader works with.
pub(super) struct Receiver {
    io: Box<dyn AsyncRead + Send + Unpin>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    progress: Progress,
}

impl Receiver {
    pub(super) fn new(io: Box<dyn AsyncRead + Send + Unpin>) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Receiver { io, buffer, start: 0, end: 0, progress: Progress::Header }
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Reads once from the socket into the buffer; little of it when headers are wanted and `large` replies may come.
    fn fill(&mut self, large: bool, cx: &mut Context<'_>) -> Poll<Result<(), Break>> {
        let limit = if large && matches!(self.progress, Progress::Header) { SIP } else { BUFFER };
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let until = (self.end + limit).min(BUFFER);
        let read = ready!(read(&mut self.io, &mut self.buffer[self.end..until], cx))?;
        self.end += read;
        Poll::Ready(Ok(()))
    }

    /// Takes up to `most` bytes that are buffered.
    fn take(&mut self, most: usize) -> &[u8] {
        let start = self.start;
        self.start += most.min(self.end - start);
        &self.buffer[start..self.start]
    }

    /// Fills `target` from the buffer and then from the socket; `done` says how far it came.
    fn receive(
        &mut self,
        target: &mut [u8],
        done: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Break>> {
        let buffered = self.take(target.len());
        target[..buffered.len()].copy_from_slice(buffered);
        *done = buffered.len();
        while *done < target.len() {
            *done += ready!(read(&mut self.io, &mut target[*done..], cx))?;
        }
        Poll::Ready(Ok(()))
    }
}

/// One read of at least one byte.
fn read(
    io: &mut Box<dyn AsyncRead + Send + Unpin>,
    target: &mut [u8],
    cx: &mut Context<'_>,
) -> Poll<Result<usize, Break>> {
    let mut target = ReadBuf::new(target);
    ready!(Pin::new(io).poll_read(cx, &mut target))?;
    match target.filled().len() {
        0 => Poll::Ready(Err(Break::closed())),
        read => Poll::Ready(Ok(read)),
    }
}

/// What the leader has to do next.
enum Step {
    /// Go on.
    Again,
    /// The buffer does not hold what comes next.
    Starved,
    /// Data has come for a request whose future must take it.
    HandOver(u32),
}

impl Link {
    /// Drives the connection for the request `me`, whose data goes into `buffer`, until its reply is complete.
    /// `finished`: whether the reply is wanted yet.
    pub(super) fn poll_reply(
        &self,
        me: u32,
        buffer: &mut [u8],
        finished: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Reply, Failure>> {
        if !self.table().lead(me, cx) {
            return self.poll_done(me, finished);
        }
        let mut receiver = lock(&self.receiver);
        // Whoever was leader may have named another while this one waited for the lock.
        if self.table().leader != Some(me) {
            return self.poll_done(me, finished);
        }
        match self.lead(&mut receiver, me, buffer, cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(cause)) => {
                drop(receiver);
                return Poll::Ready(Err(Failure::Broken(self.break_off(cause))));
            }
            Poll::Pending => return self.poll_done(me, finished),
        }
        if let Err(cause) = self.pass_on(&mut receiver, me) {
            // This request has its answer; those that have none are told.
            self.break_off(cause);
        }
        drop(receiver);
        self.poll_done(me, finished)
    }

    fn poll_done(&self, me: u32, finished: bool) -> Poll<Result<Reply, Failure>> {
        match self.take_reply(me, finished) {
            Some(reply) => Poll::Ready(reply),
            None => Poll::Pending,
        }
    }

    /// Works as leader until the reply to `me` is complete, or (pending) until the role is another's or there is
    /// nothing to read.
    fn lead(
        &self,
        receiver: &mut Receiver,
        me: u32,
        buffer: &mut [u8],
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Break>> {
        while !self.table().is_done(me) {
            if let Progress::Data(incoming) = &receiver.progress
                && incoming.slot == me
                && incoming.parked.is_none()
            {
                ready!(self.take_own(receiver, buffer, cx))?;
                continue;
            }
            match self.step(receiver)? {
                Step::Again => {}
                Step::Starved => {
                    let large = self.table().expects_large();
                    ready!(receiver.fill(large, cx))?;
                }
                Step::HandOver(other) => {
                    self.call(self.table(), other);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The reply to `me` is complete: gives out what is in the buffer, and names the next leader, whom the socket will
    /// wake.
    fn pass_on(&self, receiver: &mut Receiver, me: u32) -> Result<(), Break> {
        let mut asked = false;
        loop {
            match self.step(receiver)? {
                Step::Again => {}
                Step::HandOver(other) => {
                    self.call(self.table(), other);
                    return Ok(());
                }
                Step::Starved => {
                    let mut table = self.table();
                    let Some(next) = table.choose_leader(Some(me)) else { return Ok(()) };
                    if std::mem::replace(&mut asked, true) {
                        self.call(table, next);
                        return Ok(());
                    }
                    let (waker, large) = (table.waker(next).clone(), table.expects_large());
                    drop(table);
                    match receiver.fill(large, &mut Context::from_waker(&waker)) {
                        Poll::Pending => return Ok(()),
                        Poll::Ready(result) => result?,
                    }
                }
            }
        }
    }

    /// Makes a request leader and wakes its future.
    fn call(&self, mut table: MutexGuard<'_, Table>, next: u32) {
        table.leader = Some(next);
        let waker = table.take_waker(next);
        drop(table);
        waker.wake();
    }

    /// Receives data for the leader itself.
    fn take_own(
        &self,
        receiver: &mut Receiver,
        buffer: &mut [u8],
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Break>> {
        let Progress::Data(Incoming { slot, at, remaining, last, .. }) = receiver.progress else {
            return Poll::Ready(Ok(()));
        };
        let mut done = 0;
        let result = receiver.receive(&mut buffer[at..][..remaining], &mut done, cx);
        if let Progress::Data(incoming) = &mut receiver.progress {
            incoming.at += done;
            incoming.remaining -= done;
        }
        ready!(result)?;
        receiver.progress = Progress::Header;
        Poll::Ready(if last { self.finish(slot) } else { Ok(()) })
    }

    /// One step with what is buffered.
    fn step(&self, receiver: &mut Receiver) -> Result<Step, Break> {
        match receiver.progress {
            Progress::Header => self.head(receiver),
            Progress::Payload(..) => self.payload(receiver),
            Progress::Data(_) => self.data_for_another(receiver),
        }
    }

    /// Data for a request that is not polled: handed over to its future, forgotten if that is gone, kept for it if it
    /// does not come.
    fn data_for_another(&self, receiver: &mut Receiver) -> Result<Step, Break> {
        let Progress::Data(mut incoming) = std::mem::replace(&mut receiver.progress, Progress::Header) else {
            return Ok(Step::Again);
        };
        let presence = self.table().slot(incoming.slot).presence();
        match presence {
            Presence::Here if incoming.parked.is_none() => {
                let slot = incoming.slot;
                receiver.progress = Progress::Data(incoming);
                return Ok(Step::HandOver(slot));
            }
            Presence::Gone => incoming.remaining -= receiver.take(incoming.remaining).len(),
            Presence::Here | Presence::Absent => {
                let at = incoming.at;
                let parked = incoming.parked.get_or_insert_with(|| Parked { at, bytes: Vec::new() });
                let bytes = receiver.take(incoming.remaining);
                parked.bytes.extend_from_slice(bytes);
                incoming.remaining -= bytes.len();
            }
        }
        if incoming.remaining > 0 {
            receiver.progress = Progress::Data(incoming);
            return Ok(Step::Starved);
        }
        if let Some(parked) = incoming.parked {
            self.table().slot(incoming.slot).parked.push(parked);
        }
        if incoming.last {
            self.finish(incoming.slot)?;
        }
        Ok(Step::Again)
    }

    /// The header of a reply, or of a chunk of one.
    fn head(&self, receiver: &mut Receiver) -> Result<Step, Break> {
        let buffered = receiver.buffered();
        let Some(magic) = buffered.first_chunk::<4>() else { return Ok(Step::Starved) };
        let length = self.style.reply_length(*magic)?;
        if length == SimpleReply::LENGTH {
            let Some(bytes) = buffered.first_chunk() else { return Ok(Step::Starved) };
            let reply = SimpleReply::parse(*bytes)?;
            receiver.take(length);
            return self.simple(receiver, &reply);
        }
        let header = if self.style == HeaderStyle::Extended {
            let Some(bytes) = buffered.first_chunk() else { return Ok(Step::Starved) };
            ChunkHeader::parse_extended(*bytes)?
        } else {
            let Some(bytes) = buffered.first_chunk() else { return Ok(Step::Starved) };
            ChunkHeader::parse_structured(*bytes)?
        };
        if header.kind != ChunkKind::OffsetData {
            receiver.take(length);
            return self.chunk(receiver, header);
        }
        let Some(offset) = buffered[length..].first_chunk().map(|bytes| u64::from_be_bytes(*bytes)) else {
            return Ok(Step::Starved);
        };
        receiver.take(length + ChunkHeader::DATA_PREFIX);
        self.data(receiver, &header, offset)
    }

    fn simple(&self, receiver: &mut Receiver, reply: &SimpleReply) -> Result<Step, Break> {
        let mut table = self.table();
        let (index, slot) = table.find(reply.cookie).ok_or_else(|| stranger("a simple reply"))?;
        let expected = slot.expected;
        match (reply.error, expected.answer) {
            (Some(NbdError::Shutdown), _) => return Err(Break::new(BreakKind::Shutdown)),
            (Some(error), _) => slot.error = Some((error, String::new())),
            (None, Answer::Nothing) => {}
            (None, Answer::Data) if self.style == HeaderStyle::Simple => {
                receiver.progress = Progress::Data(Incoming {
                    slot: index,
                    at: 0,
                    remaining: expected.length as usize,
                    last: true,
                    parked: None,
                });
                slot.covered(expected.offset, expected.length, false)
                    .map_err(|why| Break::content("a simple reply", why))?;
                return Ok(Step::Again);
            }
            (None, Answer::Data | Answer::Status) => {
                return Err(Break::content("a simple reply", "a structured one was to come"));
            }
        }
        self.complete(table, index);
        Ok(Step::Again)
    }

    /// A chunk that is no data.
    fn chunk(&self, receiver: &mut Receiver, header: ChunkHeader) -> Result<Step, Break> {
        let mut table = self.table();
        let (index, slot) = table.find(header.cookie).ok_or_else(|| stranger("a chunk"))?;
        let expected = slot.expected;
        check_offset(&header, expected.offset)?;
        match (header.kind, expected.answer) {
            (ChunkKind::None, _) => {
                drop(table);
                self.finish(index)?;
            }
            (ChunkKind::OffsetHole, Answer::Data)
            | (ChunkKind::BlockStatus | ChunkKind::BlockStatusExt, Answer::Status) => {
                receiver.progress = Progress::Payload(header, Vec::new());
            }
            (kind, _) if kind.is_error() => receiver.progress = Progress::Payload(header, Vec::new()),
            _ => return Err(Break::content("a chunk", "it is of a kind that does not answer the request")),
        }
        Ok(Step::Again)
    }

    fn data(&self, receiver: &mut Receiver, header: &ChunkHeader, offset: u64) -> Result<Step, Break> {
        let mut table = self.table();
        let (index, slot) = table.find(header.cookie).ok_or_else(|| stranger("a data chunk"))?;
        let expected = slot.expected;
        check_offset(header, expected.offset)?;
        let length = header.data_length();
        slot.covered(offset, length.into(), false).map_err(|why| Break::content("a data chunk", why))?;
        receiver.progress = Progress::Data(Incoming {
            slot: index,
            // It lies inside the request, whose length is that of a buffer.
            at: (offset - expected.offset) as usize,
            remaining: length as usize,
            last: header.done(),
            parked: None,
        });
        Ok(Step::Again)
    }

    /// A payload that is understood as a whole.
    fn payload(&self, receiver: &mut Receiver) -> Result<Step, Break> {
        let Progress::Payload(header, mut payload) =
            std::mem::replace(&mut receiver.progress, Progress::Header)
        else {
            return Ok(Step::Again);
        };
        payload.extend_from_slice(receiver.take(header.length as usize - payload.len()));
        if payload.len() < header.length as usize {
            receiver.progress = Progress::Payload(header, payload);
            return Ok(Step::Starved);
        }
        let chunk = Chunk::parse(&header, &payload)?;
        let mut table = self.table();
        let (index, slot) = table.find(header.cookie).ok_or_else(|| stranger("a chunk"))?;
        match chunk {
            Chunk::Hole { offset, length } => {
                slot.covered(offset, length.into(), true)
                    .map_err(|why| Break::content("a hole chunk", why))?;
            }
            Chunk::Status(status) => slot.note_status(status)?,
            Chunk::Error(error) if error.error == NbdError::Shutdown => {
                return Err(Break::new(BreakKind::Shutdown));
            }
            Chunk::Error(error) => {
                slot.error.get_or_insert((error.error, error.message));
            }
            Chunk::None | Chunk::Data { .. } => {}
        }
        drop(table);
        if header.done() {
            self.finish(index)?;
        }
        Ok(Step::Again)
    }

    /// The last chunk of a reply came.
    fn finish(&self, index: u32) -> Result<(), Break> {
        let mut table = self.table();
        let slot = table.slot(index);
        if slot.error.is_none() {
            slot.check_complete()?;
        }
        self.complete(table, index);
        Ok(())
    }
}

/// The server answers what was not asked, or is answered already.
fn stranger(what: &'static str) -> Break {
    Break::content(what, "it answers a request that is not in flight")
}

fn check_offset(header: &ChunkHeader, offset: u64) -> Result<(), Break> {
    match header.offset {
        Some(other) if other != offset => {
            Err(Break::content("an extended reply", "its offset is not that of the request"))
        }
        _ => Ok(()),
    }
}

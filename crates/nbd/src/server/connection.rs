//! The transmission phase of one connection: a task that owns the socket and both buffers.
//!
//! It goes round in two steps. It takes apart what was received, as long as there is room for replies: a read is done
//! straight into the output behind its header, a write straight from the input. Then it sends, receives, and collects
//! what other tasks have finished. What a device cannot do at once is given to such a task, with a buffer of its own.
//!
//! Memory: input and output have fixed lengths, and no request is taken from the input while payloads in buffers of
//! their own (received, at work or to be sent) fill the connection's share. So a client that does not take its replies
//! finds that its requests are not taken either.

mod located;
mod replies;
mod timing;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use loam_block::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Server;
use super::buffers::{INPUT_BYTES, Input, OUTPUT_BYTES, Output, Pool, Spares, poll_read};
use super::export::Session;
use super::handshake::broken;
use super::work::{self, Statuses};
use crate::protocol::{
    Command, CommandFlags, HeaderStyle, NbdError, ProtocolError, ReplyFlags, ReplyHead, Request, StatusFilter,
};
use located::Files;
pub(super) use located::{SendFile, send_file_tcp, send_file_unix};
use timing::Timing;

/// Requests that wait for the device at once.
const JOBS_MAX: usize = 1024;
/// The longest read that is answered in one piece of the output buffer, in bytes. Longer ones are divided where the
/// protocol lets a reply have several chunks, and otherwise get a buffer of their own.
const INLINE_READ_MAX: usize = 64 << 10;
/// The chunk of a read that is divided, in bytes: short enough to be still in the second level cache when it is sent.
const READ_PIECE: usize = 256 << 10;
/// How much of long reads waits to be sent when no more is read, in bytes: enough for the socket to be busy while the
/// next piece is read.
const READ_AHEAD: usize = 384 << 10;
/// The longest payload that is collected in the input buffer, in bytes. A longer one is received into its own buffer.
const INLINE_WRITE_MAX: usize = INPUT_BYTES / 4;
/// Reads from this length on are looked through for zeroes, which are then not sent, in bytes.
const HOLE_MIN: usize = 4096;
/// Room in the output for any reply without data, in bytes.
const REPLY_ROOM: usize = 1 << 10;
/// Room in the output for the headers of what another task has read, in bytes.
const FINISH_ROOM: usize = 32 << 10;
/// The longest payload of a compact request that is read past so as to answer with an error, in bytes.
const SKIP_MAX: u64 = 64 << 20;
/// The same for extended requests, unless the export takes more. The specification has this for its default.
const EXTENDED_SKIP_MAX: u64 = 32 << 20;
/// For the last words of TLS.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

const _: () = assert!(OUTPUT_BYTES >= INLINE_READ_MAX + FINISH_ROOM);

/// What is left of a request while its payload comes.
enum Incoming {
    /// It will be written.
    Write { request: Request, buffer: Box<[u8]>, filled: usize },
    /// It is read past: the request has failed already.
    Skip { request: Request, error: NbdError, left: u64 },
}

/// A read that is answered in several chunks.
struct Reading {
    request: Request,
    at: u64,
}

/// What another task has done.
struct Finished {
    request: Request,
    /// The payload, with its length.
    buffer: Option<(Box<[u8]>, usize)>,
    outcome: Outcome,
}

enum Outcome {
    Done(work::Done),
    /// The buffer has been filled from this offset.
    Data(u64, work::Done),
    Status(Result<Statuses, Error>),
}

/// What taking the next request apart came to.
enum Step {
    Again,
    NeedsInput,
    /// Nothing more until something was sent or finished.
    NeedsRoom,
}

pub(super) struct Connection<S> {
    stream: S,
    session: Box<Session>,
    memory: usize,
    input: Input,
    output: Output,
    spares: Spares,
    incoming: Option<Incoming>,
    reading: Option<Reading>,
    jobs: JoinSet<Finished>,
    /// Bytes of payload in `incoming` and `jobs`.
    held: usize,
    files: Files<S>,
    timing: Timing,
    /// The client sends no more.
    ended: bool,
    /// The last step needed room.
    blocked: bool,
    unflushed: bool,
}

/// The buffers that the connections of a server share.
pub(super) struct Pools {
    input: Arc<Pool>,
    output: Arc<Pool>,
}

impl Pools {
    pub(super) fn new() -> Self {
        Pools { input: Arc::new(Pool::new(INPUT_BYTES)), output: Arc::new(Pool::new(OUTPUT_BYTES)) }
    }
}

impl<S> Connection<S> {
    /// Whether the data that answers `request` must stay in one piece.
    fn is_one_chunk(&self, request: &Request) -> bool {
        !self.session.terms.style.chunks() || request.flags.contains(CommandFlags::DF)
    }

    fn wants_input(&self) -> bool {
        !self.ended && !self.blocked && !self.input.is_full()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(
        server: &Server,
        stream: S,
        session: Box<Session>,
        send_file: Option<SendFile<S>>,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        Connection {
            files: Files::new(send_file, &*session.device),
            stream,
            session,
            memory: server.options.connection_memory,
            input: Input::new(Arc::clone(&server.pools.input)),
            output: Output::new(Arc::clone(&server.pools.output)),
            spares: Spares::default(),
            incoming: None,
            reading: None,
            jobs: JoinSet::new(),
            held: 0,
            timing: Timing::new(server.options.stall_timeout, stopping),
            ended: false,
            blocked: false,
            unflushed: false,
        }
    }

    /// Serves until the client leaves or the server stops.
    ///
    /// # Errors
    /// When the stream fails, the client stalls, or breaks the protocol so that no answer is possible.
    pub(super) async fn run(mut self) -> io::Result<()> {
        loop {
            self.process()?;
            if self.is_over() {
                break;
            }
            poll_fn(|cx| self.poll_move(cx)).await?;
        }
        // The client may be gone already: nothing depends on this.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.stream.shutdown()).await;
        Ok(())
    }

    fn is_over(&self) -> bool {
        let idle = self.jobs.is_empty() && self.output.is_empty() && self.reading.is_none();
        idle && !self.unflushed && (self.ended || self.timing.is_quiet_after_stop())
    }

    /// Takes apart and carries out what was received.
    fn process(&mut self) -> io::Result<()> {
        loop {
            match self.step()? {
                Step::Again => {}
                Step::NeedsInput => {
                    self.blocked = false;
                    return Ok(());
                }
                Step::NeedsRoom => {
                    self.blocked = true;
                    return Ok(());
                }
            }
        }
    }

    fn step(&mut self) -> io::Result<Step> {
        if self.output.room() < REPLY_ROOM || self.jobs.len() >= JOBS_MAX {
            return Ok(Step::NeedsRoom);
        }
        if let Some(reading) = self.reading.take() {
            return Ok(self.read_on(reading));
        }
        match self.incoming.take() {
            None if self.ended => Ok(Step::NeedsInput),
            None => self.next_request(),
            Some(Incoming::Write { request, buffer, filled }) if filled as u64 == request.length => {
                self.write_received(request, buffer);
                Ok(Step::Again)
            }
            Some(Incoming::Skip { request, error, left }) => {
                let part = left.min(self.input.bytes().len() as u64);
                self.input.take(part as usize);
                let left = left - part;
                if left == 0 {
                    self.refuse(&request, error);
                    return Ok(Step::Again);
                }
                self.incoming = Some(Incoming::Skip { request, error, left });
                Ok(Step::NeedsInput)
            }
            unfinished => {
                self.incoming = unfinished;
                Ok(Step::NeedsInput)
            }
        }
    }

    fn next_request(&mut self) -> io::Result<Step> {
        let Some(request) = self.parse()? else { return Ok(Step::NeedsInput) };
        let terms = &self.session.terms;
        let payload = request.payload_length(terms.style);
        let longest = match terms.style {
            HeaderStyle::Extended => EXTENDED_SKIP_MAX.max(terms.maximum_payload.into()),
            HeaderStyle::Simple | HeaderStyle::Structured => SKIP_MAX,
        };
        if payload > longest {
            return Err(broken(ProtocolError::Length { what: "a request's payload", length: payload }));
        }
        let stopping = self.timing.is_stopping() && request.command != Command::Disconnect;
        let verdict = if stopping { Err(NbdError::Shutdown) } else { terms.check(&request) };
        if let Err(error) = verdict {
            self.take_header();
            if payload > 0 {
                self.incoming = Some(Incoming::Skip { request, error, left: payload });
            } else {
                self.refuse(&request, error);
            }
            return Ok(Step::Again);
        }
        Ok(match request.command {
            Command::Read => self.read(request),
            Command::Write => self.write(request),
            Command::BlockStatus => self.block_status(request),
            Command::Disconnect => {
                self.ended = true;
                Step::NeedsInput
            }
            _ => self.other(request),
        })
    }

    fn parse(&self) -> io::Result<Option<Request>> {
        let bytes = self.input.bytes();
        let parsed = match self.session.terms.style {
            HeaderStyle::Extended => bytes.first_chunk().copied().map(Request::parse_extended),
            HeaderStyle::Simple | HeaderStyle::Structured => {
                bytes.first_chunk().copied().map(Request::parse_compact)
            }
        };
        parsed.transpose().map_err(broken)
    }

    fn take_header(&mut self) {
        self.input.take(self.session.terms.style.request_length());
    }

    /// Whether `length` more bytes of payload may be held. A request that is larger than the connection's share is served
    /// alone.
    fn may_hold(&self, length: usize) -> bool {
        let held = self.held + self.output.payload_bytes();
        held == 0 || held.saturating_add(length) <= self.memory
    }

    fn read(&mut self, request: Request) -> Step {
        let length = request.length as usize;
        if length > INLINE_READ_MAX {
            self.take_header();
            return self.read_on(Reading { at: request.offset, request });
        }
        if self.output.room() < ReplyHead::LENGTH_MAX + length || !self.may_hold(length) {
            return Step::NeedsRoom;
        }
        self.take_header();
        if length == 0 {
            self.succeed(&request);
        } else {
            self.read_inline(&request, length);
        }
        Step::Again
    }

    /// Reads into the output buffer, which has room.
    fn read_inline(&mut self, request: &Request, length: usize) {
        let (style, flags, at) = (self.session.terms.style, ReplyFlags::DONE, request.offset);
        let head = match style {
            HeaderStyle::Simple => ReplyHead::simple(request.cookie, None),
            style => ReplyHead::data(style, request, flags, at, length as u32),
        };
        let may_skip = length >= HOLE_MIN && !self.is_one_chunk(request);
        let (front, data) = self.output.tail(head.len() + length).split_at_mut(head.len());
        match work::at_once(self.session.device.read(at, data)) {
            Some(Ok(())) if may_skip && work::all_zero(data) => {
                self.output.push(&ReplyHead::hole(style, request, flags, at, length as u32));
            }
            Some(Ok(())) => {
                front.copy_from_slice(&head);
                self.output.add(head.len() + length);
            }
            Some(Err(error)) => self.fail(request, &error),
            None => self.read_later(*request, at),
        }
    }

    /// Reads the next piece of a long read into a buffer of its own: all of it where it must be answered in one piece.
    fn read_on(&mut self, reading: Reading) -> Step {
        let Reading { request, at } = reading;
        let left = (request.offset + request.length - at) as usize;
        let length = if self.is_one_chunk(&request) { left } else { left.min(READ_PIECE) };
        let far_ahead = self.output.payload_bytes() >= READ_AHEAD || self.output.is_long();
        if far_ahead || self.output.room() < FINISH_ROOM || !self.may_hold(left) {
            self.reading = Some(Reading { request, at });
            return Step::NeedsRoom;
        }
        let rest = (length < left).then(|| Reading { request, at: at + length as u64 });
        if self.send_located(&request, at, length) {
            self.reading = rest;
            return Step::Again;
        }
        let mut buffer = self.spares.take(length);
        match work::at_once(self.session.device.read(at, &mut buffer[..length])) {
            Some(Ok(())) => {
                self.send_data(&request, at, buffer, length);
                self.reading = rest;
            }
            Some(Err(error)) => {
                self.fail(&request, &error);
                self.spares.give_back(buffer);
            }
            None => {
                self.spares.give_back(buffer);
                self.read_later(request, at);
            }
        }
        Step::Again
    }

    /// Has another task read the rest of `request` from `at`.
    fn read_later(&mut self, request: Request, at: u64) {
        let length = (request.offset + request.length - at) as usize;
        self.held += length;
        let mut buffer = self.spares.take(length);
        let device = Arc::clone(&self.session.device);
        self.jobs.spawn(async move {
            let done = device.read(at, &mut buffer[..length]).await;
            Finished { request, buffer: Some((buffer, length)), outcome: Outcome::Data(at, done) }
        });
    }

    fn write(&mut self, request: Request) -> Step {
        let length = request.length as usize;
        let header = self.session.terms.style.request_length();
        let received = self.input.bytes().len() - header;
        if received < length && length <= INLINE_WRITE_MAX {
            return Step::NeedsInput;
        }
        if !self.may_hold(length) {
            return Step::NeedsRoom;
        }
        if received < length {
            let mut buffer = self.spares.take(length);
            self.held += length;
            buffer[..received].copy_from_slice(&self.input.bytes()[header..]);
            self.input.take(header + received);
            self.incoming = Some(Incoming::Write { request, buffer, filled: received });
            return Step::NeedsInput;
        }
        let data = &self.input.bytes()[header..][..length];
        match work::at_once(self.session.device.write(request.offset, data, work::write_flags(&request))) {
            Some(done) => self.reply(&request, done),
            None => {
                let mut buffer = self.spares.take(length);
                buffer[..length].copy_from_slice(data);
                self.held += length;
                self.write_later(request, buffer);
            }
        }
        self.input.take(header + length);
        Step::Again
    }

    fn write_received(&mut self, request: Request, buffer: Box<[u8]>) {
        let length = request.length as usize;
        let flags = work::write_flags(&request);
        match work::at_once(self.session.device.write(request.offset, &buffer[..length], flags)) {
            Some(done) => {
                self.held -= length;
                self.spares.give_back(buffer);
                self.reply(&request, done);
            }
            None => self.write_later(request, buffer),
        }
    }

    fn write_later(&mut self, request: Request, buffer: Box<[u8]>) {
        let length = request.length as usize;
        let device = Arc::clone(&self.session.device);
        self.jobs.spawn(async move {
            let done = device.write(request.offset, &buffer[..length], work::write_flags(&request)).await;
            Finished { request, buffer: Some((buffer, length)), outcome: Outcome::Done(done) }
        });
    }

    fn block_status(&mut self, request: Request) -> Step {
        let header = self.session.terms.style.request_length();
        let mut contexts = self.session.contexts.clone();
        let mut length = request.length;
        if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
            let payload = length as usize;
            if payload > StatusFilter::LENGTH_MAX {
                self.input.take(header);
                let left = request.length;
                self.incoming = Some(Incoming::Skip { request, error: NbdError::Invalid, left });
                return Step::Again;
            }
            let Some(bytes) = self.input.bytes()[header..].get(..payload) else { return Step::NeedsInput };
            let filter = StatusFilter::parse(bytes);
            self.input.take(header + payload);
            let known = |id: &u32| contexts.iter().any(|context| context.id() == *id);
            let filter = match filter {
                Ok(filter) if filter.contexts.iter().all(known) => filter,
                _ => {
                    self.refuse(&request, NbdError::Invalid);
                    return Step::Again;
                }
            };
            contexts.retain(|context| filter.contexts.contains(&context.id()));
            length = filter.length;
            let range = self.session.terms.check_range(request.command, request.offset, length);
            if let Err(error) = range {
                self.refuse(&request, error);
                return Step::Again;
            }
        } else {
            self.input.take(header);
        }
        match work::attempt_status(&*self.session.device, &contexts, &request, length) {
            Some(statuses) => self.reply_status(&request, statuses),
            None => {
                let status = work::status(Arc::clone(&self.session.device), contexts, request, length);
                self.jobs.spawn(async move {
                    Finished { request, buffer: None, outcome: Outcome::Status(status.await) }
                });
            }
        }
        Step::Again
    }

    fn other(&mut self, request: Request) -> Step {
        self.take_header();
        match work::attempt(&*self.session.device, &request) {
            Some(done) => self.reply(&request, done),
            None => {
                let work = work::carry_out(Arc::clone(&self.session.device), request);
                self.jobs.spawn(async move {
                    Finished { request, buffer: None, outcome: Outcome::Done(work.await) }
                });
            }
        }
        Step::Again
    }

    /// Sends, receives and collects as much as goes without waiting; pending if nothing does.
    fn poll_move(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut moved = false;
        if !self.output.is_empty()
            && let Poll::Ready(sent) = self.poll_send(cx)
        {
            sent?;
            self.unflushed = true;
            moved = true;
        }
        if self.unflushed
            && self.output.is_empty()
            && let Poll::Ready(flushed) = std::pin::Pin::new(&mut self.stream).poll_flush(cx)
        {
            flushed?;
            self.unflushed = false;
            moved = true;
        }
        if self.wants_input()
            && let Poll::Ready(received) = self.poll_receive(cx)
        {
            self.ended |= received? == 0;
            moved = true;
        }
        if moved {
            self.timing.moved();
        }
        while !self.jobs.is_empty()
            && self.output.room() >= FINISH_ROOM
            && let Poll::Ready(Some(finished)) = self.jobs.poll_join_next(cx)
        {
            self.finish(finished.map_err(io::Error::other)?);
            moved = true;
        }
        if self.poll_timing(cx)? || moved {
            return Poll::Ready(Ok(()));
        }
        // Whatever comes next, another connection may need them first.
        self.input.rest();
        self.output.rest();
        Poll::Pending
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.output.located() {
            Some((offset, length)) => self.poll_send_located(cx, offset, length),
            None => self.output.poll_send(&mut self.stream, cx, &mut self.spares),
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Some(Incoming::Write { request, buffer, filled }) = &mut self.incoming {
            let rest = &mut buffer[*filled..request.length as usize];
            let received = poll_read(&mut self.stream, cx, rest);
            if let Poll::Ready(Ok(length)) = received {
                *filled += length;
            }
            return received;
        }
        self.input.poll_fill(&mut self.stream, cx)
    }
}

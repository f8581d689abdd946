//! Replies other than those of reads that are done at once.

use std::sync::Arc;

use loam_block::{Error, ErrorKind};

use super::{Connection, FINISH_ROOM, Finished, HOLE_MIN, INLINE_READ_MAX, Outcome};
use crate::protocol::{
    Command, CommandFlags, HeaderStyle, NbdError, ReplyFlags, ReplyHead, Request, encode_error, encode_status,
};
use crate::server::work::{self, Statuses};

/// Reads of other tasks that are not longer than this are copied into the output buffer, in bytes: cheaper than a
/// piece of its own in each call that sends.
const COPIED_MAX: usize = 16 << 10;
/// The grain in which what another task has read is looked through for zeroes, in bytes. The headers of all chunks of
/// the longest read fit what is reserved for them.
const HOLE_GRAIN: usize = 64 << 10;

const _: () = assert!((32 << 20) / HOLE_GRAIN * ReplyHead::LENGTH_MAX <= FINISH_ROOM);

impl<S> Connection<S> {
    /// Success without data.
    pub(super) fn succeed(&mut self, request: &Request) {
        let style = self.session.terms.style;
        let head = match request.command {
            Command::Read if style.chunks() => ReplyHead::done(style, request),
            _ => ReplyHead::success(style, request),
        };
        self.output.push(&head);
    }

    pub(super) fn reply(&mut self, request: &Request, done: work::Done) {
        match done {
            Ok(()) => self.succeed(request),
            Err(error) => self.fail(request, &error),
        }
    }

    /// The answer to a request that the device failed.
    pub(super) fn fail(&mut self, request: &Request, error: &Error) {
        let told = work::told(request, error);
        tracing::debug!(?request, %error, ?told, "a request failed");
        self.push_error(request, told, describe(error.kind()));
    }

    /// The answer to a request that did not reach the device.
    pub(super) fn refuse(&mut self, request: &Request, error: NbdError) {
        tracing::debug!(?request, %error, "refused a request");
        self.push_error(request, error, "");
    }

    fn push_error(&mut self, request: &Request, error: NbdError, message: &str) {
        let mut reply = Vec::new();
        encode_error(self.session.terms.style, request, error, message, None, &mut reply);
        self.output.push(&reply);
    }

    /// Answers what another task has done.
    pub(super) fn finish(&mut self, finished: Finished) {
        let Finished { request, buffer, outcome } = finished;
        let length = buffer.as_ref().map_or(0, |(_, length)| *length);
        self.held -= length;
        match (outcome, buffer) {
            (Outcome::Data(offset, Ok(())), Some((buffer, length))) => {
                self.send_data(&request, offset, buffer, length);
            }
            (Outcome::Data(_, done) | Outcome::Done(done), buffer) => {
                self.reply(&request, done);
                if let Some((buffer, _)) = buffer {
                    self.spares.give_back(buffer);
                }
            }
            (Outcome::Status(statuses), _) => self.reply_status(&request, statuses),
        }
    }

    /// Answers `request`, or a part of it, with the `length` bytes in `buffer`, which were read from `offset`. There is
    /// [`FINISH_ROOM`].
    pub(super) fn send_data(&mut self, request: &Request, offset: u64, buffer: Box<[u8]>, length: usize) {
        let style = self.session.terms.style;
        let buffer = Arc::new(buffer);
        if style == HeaderStyle::Simple {
            self.output.push(&ReplyHead::simple(request.cookie, None));
            self.send_bytes(&buffer, 0, length);
            return;
        }
        let may_skip = length >= HOLE_MIN && !request.flags.contains(CommandFlags::DF);
        let grain = if may_skip { HOLE_GRAIN } else { length };
        let is_hole = |start: usize| may_skip && work::all_zero(&buffer[start..length.min(start + grain)]);
        let (mut start, mut hole) = (0, is_hole(0));
        while start < length {
            let mut end = length.min(start + grain);
            let mut next = false;
            while end < length {
                next = is_hole(end);
                if next != hole {
                    break;
                }
                end = length.min(end + grain);
            }
            let is_last = offset + end as u64 == request.offset + request.length;
            let flags = if is_last { ReplyFlags::DONE } else { ReplyFlags::empty() };
            let (at, bytes) = (offset + start as u64, (end - start) as u32);
            if hole {
                self.output.push(&ReplyHead::hole(style, request, flags, at, bytes));
            } else {
                self.output.push(&ReplyHead::data(style, request, flags, at, bytes));
                self.send_bytes(&buffer, start, end);
            }
            (start, hole) = (end, next);
        }
        if let Some(buffer) = Arc::into_inner(buffer) {
            self.spares.give_back(buffer);
        }
    }

    fn send_bytes(&mut self, buffer: &Arc<Box<[u8]>>, start: usize, end: usize) {
        if end - start <= COPIED_MAX && self.output.room() >= FINISH_ROOM + INLINE_READ_MAX {
            self.output.push(&buffer[start..end]);
        } else {
            self.output.push_payload(buffer, start, end);
        }
    }

    pub(super) fn reply_status(&mut self, request: &Request, statuses: Result<Statuses, Error>) {
        let style = self.session.terms.style;
        let statuses = match statuses {
            Ok(statuses) => statuses,
            Err(error) => return self.fail(request, &error),
        };
        let Some((last, _)) = statuses.last() else {
            // The client named no context: an empty list is what it gets.
            self.output.push(&ReplyHead::done(style, request));
            return;
        };
        let mut reply = Vec::new();
        for (context, extents) in &statuses {
            let flags = if context == last { ReplyFlags::DONE } else { ReplyFlags::empty() };
            encode_status(style, request, flags, context.id(), extents, &mut reply);
        }
        if reply.len() <= super::REPLY_ROOM {
            self.output.push(&reply);
        } else {
            let length = reply.len();
            self.output.push_payload(&Arc::new(reply.into_boxed_slice()), 0, length);
        }
    }
}

/// What a client may show its user. Not what the error itself says: that names paths and addresses of this host.
fn describe(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::OutOfBounds => "beyond the end of the device",
        ErrorKind::Invalid => "the device does not take such a request",
        ErrorKind::ReadOnly => "the device takes no writes",
        ErrorKind::NotSupported => "the device cannot do this, or not fast",
        ErrorKind::NoSpace => "no room below the device",
        ErrorKind::Unmapped => "no content was given to these addresses",
        ErrorKind::Corrupt => "what was read does not match its checksum",
        ErrorKind::Changed => "the source serves other bytes than before",
        ErrorKind::Unavailable => "the source cannot be reached",
        ErrorKind::TimedOut => "the device did not answer in time",
        ErrorKind::WritesLost => "writes that were not flushed may be lost",
        ErrorKind::ShuttingDown => "the device is being closed",
        _ => "the device failed",
    }
}

//! Long reads of files that lie in memory (tmpfs): the kernel puts the file's own pages into the socket, and nobody copies
//! them before the client does.
//!
//! The header of such a reply goes out before its data was read, so what can still go wrong ends the connection. With a
//! file in memory that is only one thing: somebody else cuts it short at this very moment. Files on disks can fail in
//! other ways, and to read them may take long; they are read as everything else is.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::task::{Context, Poll, ready};

use loam_block::{Access, BlockDevice};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

use super::{Connection, HOLE_MIN};
use crate::protocol::{HeaderStyle, ReplyFlags, ReplyHead, Request};
use crate::server::work;

/// `statfs` type of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// What is read to see that there is data, and that the file has not been cut short, in bytes.
const GLANCE: usize = 4096;
/// The grain in which is looked for zeroes that need not be sent, in bytes.
const GLANCE_GRAIN: usize = 64 << 10;

/// Has the kernel send so many bytes from this offset of a file into a socket: how many it took, 0 at the file's end.
pub(in crate::server) type SendFile<S> =
    fn(&S, &mut Context<'_>, BorrowedFd<'_>, u64, usize) -> Poll<io::Result<usize>>;

macro_rules! send_file {
    ($name:ident, $stream:ty) => {
        pub(in crate::server) fn $name(
            stream: &$stream,
            cx: &mut Context<'_>,
            file: BorrowedFd<'_>,
            offset: u64,
            length: usize,
        ) -> Poll<io::Result<usize>> {
            loop {
                ready!(stream.poll_write_ready(cx))?;
                let mut from = offset;
                let send = || Ok(rustix::fs::sendfile(stream, file, Some(&mut from), length)?);
                match stream.try_io(Interest::WRITABLE, send) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    sent => return Poll::Ready(sent),
                }
            }
        }
    };
}

send_file!(send_file_unix, UnixStream);
send_file!(send_file_tcp, TcpStream);

/// Whether and how files are sent.
pub(super) struct Files<S> {
    send: Option<SendFile<S>>,
    /// The last file that was asked about, and whether it lies in memory. It keeps its number as long as its device.
    known: Option<(RawFd, bool)>,
}

impl<S> Files<S> {
    pub(super) fn new(send: Option<SendFile<S>>, device: &dyn BlockDevice) -> Self {
        let geometry = device.geometry();
        // What a lazy device has it may drop, and find out when the bytes are half on their way.
        let fits = !device.capabilities().lazy && geometry.minimum_block as usize <= GLANCE;
        Files { send: send.filter(|_| fits), known: None }
    }

    fn is_in_memory(&mut self, file: BorrowedFd<'_>) -> bool {
        let number = file.as_raw_fd();
        match self.known {
            Some((known, in_memory)) if known == number => in_memory,
            _ => {
                let in_memory = rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type == TMPFS_MAGIC);
                self.known = Some((number, in_memory));
                in_memory
            }
        }
    }
}

impl<S> Connection<S> {
    /// Answers `request`, or a part of it, with `length` bytes from `at` where they lie in a file in memory, and look like
    /// data. There is room.
    pub(super) fn send_located(&mut self, request: &Request, at: u64, length: usize) -> bool {
        if self.files.send.is_none() {
            return false;
        }
        let device = &*self.session.device;
        let located = device.locate(at, length as u64, Access::Unseen);
        if !located.is_some_and(|located| self.files.is_in_memory(located.file)) {
            return false;
        }
        let may_skip = !self.is_one_chunk(request);
        let mut bytes = [0; GLANCE];
        let mut is_readable = |start: usize, is_wanted: fn(&[u8]) -> bool| {
            let part = &mut bytes[..GLANCE.min(length - start)];
            let read = work::at_once(device.read(at + start as u64, part));
            matches!(read, Some(Ok(()))) && is_wanted(part)
        };
        let has_data = |part: &[u8]| part.len() < HOLE_MIN || !work::all_zero(part);
        let is_data =
            !may_skip || (0..length).step_by(GLANCE_GRAIN).all(|start| is_readable(start, has_data));
        if !is_data || !is_readable(length - GLANCE.min(length), |_| true) {
            return false;
        }
        let style = self.session.terms.style;
        let is_last = at + length as u64 == request.offset + request.length;
        let flags = if is_last { ReplyFlags::DONE } else { ReplyFlags::empty() };
        let head = match style {
            HeaderStyle::Simple => ReplyHead::simple(request.cookie, None),
            style => ReplyHead::data(style, request, flags, at, length as u32),
        };
        self.output.push(&head);
        self.output.push_located(at, length);
        true
    }

    /// Sends what can be sent of `length` bytes of the device from `offset`.
    ///
    /// # Errors
    /// When the stream fails, or the bytes are no longer there: the client has been promised them.
    pub(super) fn poll_send_located(
        &mut self,
        cx: &mut Context<'_>,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<()>> {
        let gone = |what| io::Error::other(format!("{what} while {length} bytes at {offset} were sent"));
        let device = &*self.session.device;
        let located = device.locate(offset, length as u64, Access::Unseen);
        let (Some(send), Some(located)) = (self.files.send, located) else {
            return Poll::Ready(Err(gone("the device forgot where its bytes lie")));
        };
        let sent = ready!(send(&self.stream, cx, located.file, located.offset, length))?;
        if sent == 0 {
            return Poll::Ready(Err(gone("the file was cut short")));
        }
        if sent == length && !device.settle(located.ticket, None) {
            return Poll::Ready(Err(gone("the device replaced its bytes")));
        }
        self.output.sent(sent, &mut self.spares);
        Poll::Ready(Ok(()))
    }
}

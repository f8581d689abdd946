//! A hostile client's side of a session: what it needs to get into the transmission phase, and to read what comes back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use loam_block::BlockDevice;
use loam_nbd::server::{Export, Listener, Server, ServerOptions};
use tokio::sync::oneshot;

use super::hostile::*;

pub(crate) const SIZE: u64 = 1 << 20;

/// A real server on a socket of its own.
pub(crate) struct Served {
    pub(crate) path: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
    stop: Option<oneshot::Sender<()>>,
    _directory: tempfile::TempDir,
}

static PANICS: AtomicUsize = AtomicUsize::new(0);

impl Served {
    pub(crate) fn exports(exports: Vec<Export>, options: ServerOptions) -> Self {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let on_server = std::thread::current().name().is_some_and(|name| name.starts_with("tokio"));
            PANICS.fetch_add(usize::from(on_server), Ordering::SeqCst);
            before(info);
        }));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).enable_all().thread_name("tokio-server").build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = Server::new(exports, options).unwrap();
        let listener = runtime.block_on(async { Listener::bind_unix(&path) }).unwrap();
        runtime.spawn(async move {
            let stopped = async { drop(stopped.await) };
            server.serve(listener, stopped).await.unwrap();
        });
        Served { path, runtime: Some(runtime), stop: Some(stop), _directory: directory }
    }

    /// One export of `device`, called "disk".
    pub(crate) fn device(device: Arc<dyn BlockDevice>, options: ServerOptions) -> Self {
        Served::exports(vec![export("disk", device)], options)
    }

    pub(crate) fn connect(&self) -> Session {
        Session::connect(&self.path)
    }

    /// The server is as good as new: a session on another connection works, and nothing panicked.
    pub(crate) fn check_alive(&self) {
        let mut session = self.connect().haggle(Style::Structured, "");
        session.check_alive();
        self.end(session);
    }

    /// The same where what lies in the export may have been changed.
    pub(crate) fn check_unharmed(&self) {
        let mut session = self.connect().haggle(Style::Structured, "");
        assert_eq!(session.outcome(READ, 0, 4096, 4096), 0);
        self.end(session);
    }

    fn end(&self, mut session: Session) {
        session.request(DISC, 0, 0, 0, 0);
        session.peer.expect_closed();
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "the server panicked");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) fn export(name: &str, device: Arc<dyn BlockDevice>) -> Export {
    Export { name: name.into(), description: format!("about {name}"), device, read_only: false }
}

/// What the exports hold: no two blocks alike, and a hole at the end.
pub(crate) fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE / 8).flat_map(|word| (word * 8).to_be_bytes()).collect();
    bytes[SIZE as usize / 2..].fill(0);
    bytes
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

pub(crate) const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;
pub(crate) const PAYLOAD_LEN: u16 = 32;

/// One message of a reply.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// `None` in a simple reply.
    pub(crate) kind: Option<u16>,
    pub(crate) done: bool,
    pub(crate) cookie: u64,
    pub(crate) payload: Vec<u8>,
    /// In a simple reply or an error chunk.
    pub(crate) error: u32,
}

pub(crate) struct Session {
    pub(crate) peer: Peer,
    pub(crate) style: Style,
}

impl Session {
    /// Connects and reads the greeting; the client's flags are still to be sent.
    pub(crate) fn bare(path: &Path) -> Self {
        let mut peer = Peer::connect(path);
        assert_eq!(peer.read(), *b"NBDMAGICIHAVEOPT\0\x03");
        Session { peer, style: Style::Simple }
    }

    /// Connects, with fixed newstyle and no zeroes.
    pub(crate) fn connect(path: &Path) -> Self {
        let mut session = Session::bare(path);
        session.peer.send(3_u32.to_be_bytes());
        session
    }

    pub(crate) fn option(&mut self, code: u32, data: impl AsRef<[u8]>) {
        self.peer.send(option(code, data));
    }

    /// The next reply to an option.
    pub(crate) fn reply(&mut self, code: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.peer.u64(), OPTION_REPLY);
        assert_eq!(self.peer.u32(), code, "the reply is to another option");
        let kind = self.peer.u32();
        let length = self.peer.u32();
        assert!(length <= 10000, "a reply of {length} bytes");
        let data = self.peer.read_vec(length.into());
        if kind >> 31 == 1 {
            assert!(data.len() <= 4096 && std::str::from_utf8(&data).is_ok(), "a message for humans");
        }
        if kind == ACK {
            assert!(data.is_empty());
        }
        (kind, data)
    }

    /// All replies to an option, the last of them an ACK or an error.
    pub(crate) fn replies(&mut self, code: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let reply = self.reply(code);
            let last = reply.0 == ACK || reply.0 >> 31 == 1;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// An option that gets one reply: its type.
    pub(crate) fn ask(&mut self, code: u32, data: impl AsRef<[u8]>) -> u32 {
        self.option(code, data);
        self.reply(code).0
    }

    pub(crate) fn set_style(&mut self, style: Style) {
        match style {
            Style::Simple => {}
            Style::Structured => assert_eq!(self.ask(8, ""), ACK),
            Style::Extended => assert_eq!(self.ask(11, ""), ACK),
        }
        self.style = style;
    }

    /// Ids of the contexts that the server agrees to.
    pub(crate) fn set_contexts(&mut self, export: &str, queries: &[&str]) -> Vec<(u32, String)> {
        self.option(10, contexts(export, queries));
        let mut replies = self.replies(10);
        assert_eq!(replies.pop().unwrap().0, ACK);
        replies
            .into_iter()
            .map(|(kind, data)| {
                assert_eq!(kind, META_CONTEXT);
                (be(&data[..4]) as u32, String::from_utf8(data[4..].to_vec()).unwrap())
            })
            .collect()
    }

    /// Enters the transmission phase; size and flags.
    pub(crate) fn go(&mut self, name: &str) -> (u64, u16) {
        self.option(7, info(name, &[3]));
        let replies = self.replies(7);
        assert_eq!(replies.last().unwrap().0, ACK);
        let export = replies.iter().find(|(kind, data)| *kind == INFO && data[..2] == [0, 0]).unwrap();
        assert_eq!(export.1.len(), 12);
        (be(&export.1[2..10]), be(&export.1[10..]) as u16)
    }

    pub(crate) fn haggle(mut self, style: Style, name: &str) -> Self {
        self.set_style(style);
        self.go(name);
        self
    }

    pub(crate) fn header(&self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Bytes {
        match self.style {
            Style::Extended => {
                Bytes::new().u32(EXTENDED_REQUEST).u16(flags).u16(command).u64(cookie).u64(offset).u64(length)
            }
            _ => {
                let length = u32::try_from(length).unwrap();
                Bytes::new().u32(REQUEST).u16(flags).u16(command).u64(cookie).u64(offset).u32(length)
            }
        }
    }

    pub(crate) fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) {
        let header = self.header(command, flags, cookie, offset, length);
        self.peer.send(header);
    }

    /// The flag that a payload needs.
    pub(crate) fn paid(&self) -> u16 {
        if self.style == Style::Extended { PAYLOAD_LEN } else { 0 }
    }

    /// The next piece of a reply; `data` bytes follow a simple reply without an error. `offset` is that of the request.
    pub(crate) fn piece(&mut self, data: u64, offset: u64) -> Piece {
        let magic = self.peer.u32();
        let style = self.style;
        if magic == SIMPLE_REPLY {
            assert_ne!(style, Style::Extended, "a simple reply where headers are extended");
            let (error, cookie) = (self.peer.u32(), self.peer.u64());
            assert!(style == Style::Simple || data == 0, "a simple reply to READ");
            let payload = if error == 0 { self.peer.read_vec(data) } else { Vec::new() };
            return Piece { kind: None, done: true, cookie, payload, error };
        }
        let extended = magic == EXTENDED_REPLY;
        let expected = if style == Style::Extended { EXTENDED_REPLY } else { STRUCTURED_REPLY };
        assert!(magic == expected && style != Style::Simple, "{magic:#x} where headers are {style:?}");
        let (flags, kind, cookie) = (self.peer.u16(), self.peer.u16(), self.peer.u64());
        assert_eq!(flags & !1, 0, "unknown flags");
        if extended {
            assert_eq!(self.peer.u64(), offset, "the request's offset");
        }
        let length = if extended { self.peer.u64() } else { self.peer.u32().into() };
        assert!(length <= (32 << 20) + 8, "a payload of {length} bytes");
        let payload = self.peer.read_vec(length);
        let error = if kind >> 15 == 1 { be(&payload[..4]) as u32 } else { 0 };
        if kind >> 15 == 1 {
            assert_ne!(error, 0);
            let message = be(&payload[4..6]) as usize;
            let tail = if kind == 0x8002 { 8 } else { 0 };
            assert!(message <= 4096 && payload.len() == 6 + message + tail);
            assert!(std::str::from_utf8(&payload[6..6 + message]).is_ok());
        }
        assert!(kind != 0 || (flags == 1 && length == 0));
        Piece { kind: Some(kind), done: flags & 1 == 1, cookie, payload, error }
    }

    /// All of one reply: the error, and the pieces.
    pub(crate) fn whole(&mut self, cookie: u64, data: u64, offset: u64) -> (u32, Vec<Piece>) {
        let (mut error, mut pieces) = (0, Vec::new());
        loop {
            let piece = self.piece(data, offset);
            assert_eq!(piece.cookie, cookie);
            error = if error == 0 { piece.error } else { error };
            let done = piece.done;
            pieces.push(piece);
            if done {
                return (error, pieces);
            }
        }
    }

    /// A request without a payload, and the error that it gets.
    pub(crate) fn outcome(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u32 {
        let cookie = 0xc0ff_ee00_0000_0000 | u64::from(command);
        self.request(command, flags, cookie, offset, length);
        let data = if command == READ { length } else { 0 };
        self.whole(cookie, data, offset).0
    }

    /// A write, and the error that it gets.
    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let flags = flags | self.paid();
        let header = self.header(WRITE, flags, 77, offset, data.len() as u64);
        self.peer.send(header.raw(data));
        self.whole(77, 0, offset).0
    }

    /// A read: its error or its data, put together from chunks, of which there must be no overlap and no gap.
    pub(crate) fn read(&mut self, flags: u16, offset: u64, length: u64) -> Result<Vec<u8>, u32> {
        self.request(READ, flags, 88, offset, length);
        let (error, pieces) = self.whole(88, length, offset);
        if error != 0 {
            return Err(error);
        }
        let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
        for piece in pieces {
            match piece.kind {
                None => return Ok(piece.payload),
                Some(0) => {}
                Some(1) => parts.push((be(&piece.payload[..8]), piece.payload[8..].to_vec())),
                Some(2) => {
                    let zeroes = vec![0; be(&piece.payload[8..12]) as usize];
                    parts.push((be(&piece.payload[..8]), zeroes));
                }
                Some(kind) => panic!("chunk of type {kind} in a read"),
            }
        }
        assert!(flags & DF == 0 || parts.len() == 1, "DF allows one content chunk");
        parts.sort();
        let mut data = Vec::new();
        for (at, part) in parts {
            assert_eq!(at, offset + data.len() as u64, "a gap or an overlap");
            assert!(!part.is_empty());
            data.extend_from_slice(&part);
        }
        assert_eq!(data.len() as u64, length);
        Ok(data)
    }

    /// The session goes on: a good read is answered with what lies there (in the second block, which no test changes).
    pub(crate) fn check_alive(&mut self) {
        let expected: Vec<u8> = (4096_u64 / 8..8192 / 8).flat_map(|word| (word * 8).to_be_bytes()).collect();
        assert_eq!(self.read(0, 4096, 4096), Ok(expected));
    }
}

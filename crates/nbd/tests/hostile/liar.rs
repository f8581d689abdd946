//! A server made by hand, that can be told to misbehave at any point; and what a test needs of the real client.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loam_block::{BlockDevice, Error};
use loam_nbd::client::{ClientOptions, ConnectError, NbdDevice};
use loam_nbd::uri::{Address, Uri};

use crate::hostile::*;

pub(crate) const SIZE: u64 = 1 << 20;
/// HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, DF, CACHE, FAST_ZERO.
pub(crate) const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 128 | 1024 | 2048;
/// What the server calls `base:allocation`.
pub(crate) const CONTEXT: u32 = 0x0c0f_fee0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// One connection, seen from the server.
pub(crate) struct Liar {
    pub(crate) peer: Peer,
    pub(crate) style: Style,
}

impl Liar {
    pub(crate) fn greet(&mut self) {
        self.peer.send(b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(self.peer.u32(), 3, "the client's flags");
    }

    /// The next option and its data; `None` where the client has left.
    pub(crate) fn option(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut head = [0; 16];
        std::io::Read::read_exact(&mut self.peer.stream, &mut head).ok()?;
        assert_eq!(be(&head[..8]), IHAVEOPT);
        let data = self.peer.read_vec(be(&head[12..]));
        Some((be(&head[8..12]) as u32, data))
    }

    /// What an honest server answers to an option.
    pub(crate) fn good_answer(&self, code: u32, data: &[u8]) -> Bytes {
        let reply = |kind: u32, data: Bytes| reply(code, kind, data);
        let ack = reply(ACK, Bytes::new());
        match (code, self.style) {
            (11, Style::Extended) | (8, Style::Structured) | (2, _) => ack,
            (10, style) if style != Style::Simple => {
                let name = b"base:allocation";
                let asked = data.windows(name.len()).any(|part| part == name);
                let chosen = reply(META_CONTEXT, Bytes::new().u32(CONTEXT).raw(name));
                if asked { chosen.raw(ack) } else { ack }
            }
            (6 | 7, _) => good_info(code, SIZE, FLAGS).raw(ack),
            _ => reply(ERR_UNSUP, Bytes::new()),
        }
    }

    /// Answers options as it should until the client goes on to the transmission phase; false if it leaves instead.
    pub(crate) fn haggle(&mut self) -> bool {
        self.greet();
        while let Some((code, data)) = self.option() {
            let answer = self.good_answer(code, &data);
            self.peer.try_send(answer);
            if code == 7 {
                return true;
            }
        }
        false
    }

    /// The next request, with its payload read; `None` when the client leaves.
    pub(crate) fn request(&mut self) -> Option<Request> {
        let mut head = [0; 32];
        let head = if self.style == Style::Extended { &mut head[..] } else { &mut head[..28] };
        std::io::Read::read_exact(&mut self.peer.stream, head).ok()?;
        let magic = if self.style == Style::Extended { EXTENDED_REQUEST } else { REQUEST };
        assert_eq!(be(&head[..4]), u64::from(magic));
        let (flags, command) = (be(&head[4..6]) as u16, be(&head[6..8]) as u16);
        let request =
            Request { command, cookie: be(&head[8..16]), offset: be(&head[16..24]), length: be(&head[24..]) };
        assert_eq!(flags >> 5 & 1 == 1, self.style == Style::Extended && command == 1, "PAYLOAD_LEN");
        if command == 1 {
            self.peer.read_vec(request.length);
        }
        (command != 2).then_some(request)
    }

    pub(crate) fn simple(&self, request: &Request, error: u32) -> Bytes {
        Bytes::new().u32(SIMPLE_REPLY).u32(error).u64(request.cookie)
    }

    /// A chunk in the style of the session.
    pub(crate) fn chunk(&self, request: &Request, flags: u16, kind: u16, payload: impl AsRef<[u8]>) -> Bytes {
        let length = payload.as_ref().len() as u64;
        self.chunk_header(request, flags, kind, length).raw(payload)
    }

    pub(crate) fn chunk_header(&self, request: &Request, flags: u16, kind: u16, length: u64) -> Bytes {
        let magic = if self.style == Style::Extended { EXTENDED_REPLY } else { STRUCTURED_REPLY };
        let head = Bytes::new().u32(magic).u16(flags).u16(kind).u64(request.cookie);
        match self.style {
            Style::Extended => head.u64(request.offset).u64(length),
            _ => head.u32(length as u32),
        }
    }

    pub(crate) fn data(&self, request: &Request, flags: u16, offset: u64, length: usize) -> Bytes {
        self.chunk(request, flags, 1, Bytes::new().u64(offset).raw(pattern(offset, length)))
    }

    pub(crate) fn hole(&self, request: &Request, flags: u16, offset: u64, length: u32) -> Bytes {
        self.chunk(request, flags, 2, Bytes::new().u64(offset).u32(length))
    }

    /// BLOCK_STATUS or BLOCK_STATUS_EXT with these extents.
    pub(crate) fn status(&self, request: &Request, context: u32, extents: &[(u64, u64)]) -> Bytes {
        let mut payload = Bytes::new().u32(context);
        if self.style == Style::Extended {
            payload = payload.u32(extents.len() as u32);
        }
        for (length, flags) in extents {
            payload = match self.style {
                Style::Extended => payload.u64(*length).u64(*flags),
                _ => payload.u32(*length as u32).u32(*flags as u32),
            };
        }
        self.chunk(request, 1, if self.style == Style::Extended { 6 } else { 5 }, payload)
    }

    /// What an honest server answers to a request.
    pub(crate) fn good_reply(&self, request: &Request) -> Bytes {
        match (request.command, self.style) {
            (0, Style::Simple) => {
                self.simple(request, 0).raw(pattern(request.offset, request.length as usize))
            }
            (0, _) => self.data(request, 1, request.offset, request.length as usize),
            (7, _) => self.status(request, CONTEXT, &[(request.length, 0)]),
            (_, Style::Extended) => self.chunk(request, 1, 0, ""),
            _ => self.simple(request, 0),
        }
    }

    /// Answers as it should for as long as the client stays.
    pub(crate) fn behave(&mut self) {
        while let Some(request) = self.request() {
            let reply = self.good_reply(&request);
            self.peer.try_send(reply);
        }
    }

    /// The client sends nothing more but a farewell, and closes.
    pub(crate) fn expect_left(&mut self) {
        let length = self.peer.drain(1 << 20);
        let farewell = if self.style == Style::Extended { 32 } else { 28 };
        assert!(length == 0 || length == farewell, "the client went on: {length} bytes");
    }
}

pub(crate) fn reply(code: u32, kind: u32, data: impl AsRef<[u8]>) -> Bytes {
    Bytes::new().u64(OPTION_REPLY).u32(code).u32(kind).counted(data)
}

/// EXPORT and BLOCK_SIZE, without the ACK.
pub(crate) fn good_info(code: u32, size: u64, flags: u16) -> Bytes {
    let export = reply(code, INFO, Bytes::new().u16(0).u64(size).u16(flags));
    export.raw(reply(code, INFO, Bytes::new().u16(3).u32(512).u32(4096).u32(1 << 20)))
}

/// What lies in the export.
pub(crate) fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64).map(|at| (at ^ at >> 8) as u8).collect()
}

/// A server whose connections are each handled by `serve`, with their number; and the client's side of it.
pub(crate) struct Stage {
    pub(crate) uri: Uri,
    path: PathBuf,
    /// The next connection is the test's own, and ends the server.
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub(crate) runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
}

impl Stage {
    pub(crate) fn new(style: Style, serve: impl Fn(&mut Liar, usize) + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("liar.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = Arc::new(serve);
        let ending = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ending);
        let thread = std::thread::spawn(move || {
            let mut handlers: Vec<JoinHandle<()>> = Vec::new();
            let join = |handler: JoinHandle<()>| handler.join().expect("the server's assertions hold");
            for (number, stream) in listener.incoming().enumerate() {
                let mut liar = Liar { peer: Peer::new(stream.unwrap()), style };
                if over.load(Ordering::SeqCst) {
                    break;
                }
                // A thread keeps its stack until it is joined.
                handlers.extract_if(.., |handler| handler.is_finished()).for_each(join);
                let serve = Arc::clone(&serve);
                handlers.push(std::thread::spawn(move || serve(&mut liar, number)));
            }
            handlers.into_iter().for_each(join);
        });
        let uri = Uri::new(Address::Unix(path.clone()), "disk");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Stage { uri, path, ending, thread: Some(thread), runtime: runtime.unwrap(), _directory: directory }
    }

    pub(crate) fn connect_with(&self, options: ClientOptions) -> Result<NbdDevice, ConnectError> {
        self.in_time(NbdDevice::connect(&self.uri, options))
    }

    pub(crate) fn connect(&self) -> Result<NbdDevice, ConnectError> {
        self.connect_with(options())
    }

    /// Nothing that a server does makes a client wait longer than this.
    pub(crate) fn in_time<T>(&self, future: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(Duration::from_secs(20), future).await };
        self.runtime.block_on(limited).expect("done in time")
    }

    pub(crate) fn read(&self, device: &NbdDevice, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        let mut buffer = vec![0xee; length];
        self.in_time(device.read(offset, &mut buffer)).map(|()| buffer)
    }

    /// Waits until all connections have ended as their handlers wish.
    pub(crate) fn end(mut self, device: Option<NbdDevice>) {
        drop(device);
        self.ending.store(true, Ordering::SeqCst);
        drop(Peer::connect(&self.path));
        let begin = Instant::now();
        self.thread.take().unwrap().join().expect("the server's assertions hold");
        assert!(begin.elapsed() < Duration::from_secs(15));
    }
}

/// One connection, and little patience.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        connections: 1,
        connect_timeout: Duration::from_secs(3),
        request_timeout: Duration::from_secs(3),
        slow_timeout: Duration::from_secs(3),
        reconnect_limit: Duration::from_secs(1),
        ..ClientOptions::default()
    }
}

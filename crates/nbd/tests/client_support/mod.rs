//! What the client's tests share: our own server on a Unix socket, and [`Fake`], a server whose every word is the test's.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use loam_block::BlockDevice;
use loam_nbd::client::{ClientOptions, NbdDevice};
use loam_nbd::protocol::{
    BASE_ALLOCATION, ClientFlags, Command, ExportFacts, ExportNameReply, Greeting, HandshakeFlags,
    HeaderStyle, InfoItem, OptionCode, OptionHeader, OptionReply, OptionRequest, Refusal, RefusalKind,
    Request, TransmissionFlags, wire,
};
use loam_nbd::server::{Export, Listener, Server, ServerOptions};
use loam_nbd::uri::{Address, Uri};
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Time-outs that a test can wait for.
pub fn options() -> ClientOptions {
    ClientOptions {
        connections: 1,
        fill: 0,
        connect_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(5),
        slow_timeout: Duration::from_secs(5),
        reconnect_limit: Duration::from_secs(5),
        tls: None,
    }
}

/// Our server with one export; gone with the runtime.
pub struct Served {
    pub runtime: Runtime,
    pub uri: Uri,
    _directory: TempDir,
}

impl Served {
    pub fn new(device: Arc<dyn BlockDevice>, options: ServerOptions) -> Self {
        let (runtime, directory) = (runtime(), tempfile::tempdir().unwrap());
        let path = directory.path().join("socket");
        let export = Export { name: "disk".into(), description: "a disk".into(), device, read_only: false };
        let server = Server::new(vec![export], options).unwrap();
        let guard = runtime.enter();
        let listener = Listener::bind_unix(&path).unwrap();
        drop(guard);
        runtime.spawn(async move { server.serve(listener, std::future::pending()).await });
        Served { runtime, uri: Uri::new(Address::Unix(path), "disk"), _directory: directory }
    }

    pub fn connect(&self, options: ClientOptions) -> NbdDevice {
        self.runtime.block_on(NbdDevice::connect(&self.uri, options)).unwrap()
    }
}

/// A server that does what a test tells it, on a thread of the test's.
pub struct Fake {
    listener: UnixListener,
    directory: TempDir,
    pub style: HeaderStyle,
    pub size: u64,
    pub flags: TransmissionFlags,
    /// It knows nothing but EXPORT_NAME.
    pub ancient: bool,
}

pub const FLAGS: TransmissionFlags = TransmissionFlags::HAS_FLAGS;
/// The id that the fake gives to base:allocation.
pub const ALLOCATION: u32 = 7;

impl Fake {
    pub fn new(style: HeaderStyle, size: u64, flags: TransmissionFlags) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        Fake { listener, directory, style, size, flags, ancient: false }
    }

    pub fn uri(&self) -> Uri {
        Uri::new(Address::Unix(self.path()), "disk")
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Takes a connection into the transmission phase.
    pub fn accept(&self) -> Session {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut session = Session { stream, style: self.style };
        let mut offered = HandshakeFlags::NO_ZEROES;
        offered.set(HandshakeFlags::FIXED_NEWSTYLE, !self.ancient);
        session.send(&Greeting { flags: offered }.encode());
        let client = ClientFlags::parse(session.take(), offered).unwrap();
        let facts = ExportFacts { size: self.size, flags: self.flags };
        loop {
            let header = OptionHeader::parse(session.take()).unwrap();
            let data = session.bytes(header.length as usize);
            let request = OptionRequest::parse(header.code, &data).unwrap();
            let mut out = Vec::new();
            let mut go = false;
            let mut answer = |reply: OptionReply| reply.encode(header.code, &mut out);
            match request {
                OptionRequest::ExportName(_) => {
                    ExportNameReply { size: facts.size, flags: facts.flags }.encode(client, &mut out);
                    go = true;
                }
                OptionRequest::ExtendedHeaders if self.style == HeaderStyle::Extended => {
                    answer(OptionReply::Ack)
                }
                OptionRequest::StructuredReply if self.style == HeaderStyle::Structured => {
                    answer(OptionReply::Ack)
                }
                OptionRequest::SetMetaContext(_) => {
                    answer(OptionReply::MetaContext { id: ALLOCATION, name: BASE_ALLOCATION.into() });
                    answer(OptionReply::Ack);
                }
                OptionRequest::Go(_) => {
                    answer(OptionReply::Info(InfoItem::Export(facts)));
                    answer(OptionReply::Ack);
                    go = true;
                }
                _ => answer(OptionReply::Refused(Refusal::new(RefusalKind::Unsupported, "no"))),
            }
            assert!(!self.ancient || header.code == OptionCode::ExportName);
            session.send(&out);
            if go {
                return session;
            }
        }
    }
}

/// A connection in its transmission phase.
pub struct Session {
    pub stream: UnixStream,
    style: HeaderStyle,
}

impl Session {
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().unwrap()
    }

    /// The next request, with its data if it is a write.
    pub fn request(&mut self) -> (Request, Vec<u8>) {
        let request = match self.style {
            HeaderStyle::Extended => Request::parse_extended(self.take()),
            _ => Request::parse_compact(self.take()),
        };
        let request = request.unwrap();
        let data = self.bytes(request.payload_length(self.style) as usize);
        (request, data)
    }

    pub fn expect(&mut self, command: Command) -> Request {
        let (request, _) = self.request();
        assert_eq!(request.command, command);
        request
    }

    pub fn simple(&mut self, request: &Request, error: u32, data: &[u8]) {
        let mut out = wire::SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(error.to_be_bytes());
        out.extend(request.cookie.to_be_bytes());
        out.extend(data);
        self.send(&out);
    }

    /// A chunk of any kind.
    pub fn chunk(&mut self, request: &Request, done: bool, kind: u16, payload: &[u8]) {
        let magic = match self.style {
            HeaderStyle::Extended => wire::EXTENDED_REPLY_MAGIC,
            _ => wire::STRUCTURED_REPLY_MAGIC,
        };
        let mut out = magic.to_be_bytes().to_vec();
        out.extend(u16::from(done).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(request.cookie.to_be_bytes());
        if self.style == HeaderStyle::Extended {
            out.extend(request.offset.to_be_bytes());
            out.extend((payload.len() as u64).to_be_bytes());
        } else {
            out.extend((payload.len() as u32).to_be_bytes());
        }
        out.extend(payload);
        self.send(&out);
    }

    pub fn data(&mut self, request: &Request, done: bool, offset: u64, data: &[u8]) {
        self.chunk(request, done, 1, &[&offset.to_be_bytes()[..], data].concat());
    }

    pub fn hole(&mut self, request: &Request, done: bool, offset: u64, length: u32) {
        self.chunk(request, done, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat());
    }

    pub fn done(&mut self, request: &Request) {
        self.chunk(request, true, 0, &[]);
    }

    /// Answers everything with success, reads with `fill`, until the client is gone.
    pub fn serve(&mut self, fill: u8) {
        loop {
            let mut first = [0; 1];
            if self.stream.read(&mut first).unwrap_or(0) == 0 {
                return;
            }
            let mut rest = vec![0; self.style.request_length() - 1];
            self.stream.read_exact(&mut rest).unwrap();
            let bytes = [&first[..], &rest].concat();
            let request = match self.style {
                HeaderStyle::Extended => Request::parse_extended(bytes.try_into().unwrap()),
                _ => Request::parse_compact(bytes.try_into().unwrap()),
            };
            let request = request.unwrap();
            self.bytes(request.payload_length(self.style) as usize);
            let data = vec![fill; request.length as usize];
            match (request.command, self.style) {
                (Command::Disconnect, _) => return,
                (Command::Read, HeaderStyle::Simple) => self.simple(&request, 0, &data),
                (Command::Read, _) => self.data(&request, true, request.offset, &data),
                (_, HeaderStyle::Simple) => self.simple(&request, 0, &[]),
                _ => self.done(&request),
            }
        }
    }
}

//! A client that says exactly what a test wants, and a device that waits where a test wants.

use std::sync::Arc;
use std::time::Duration;

use loam_block::{
    BlockDevice, Capabilities, Extent, Geometry, Io, Locality, MemoryDevice, Result, WriteFlags, ZeroFlags,
};
use loam_nbd::protocol::{
    Chunk, ChunkHeader, ClientFlags, Command, CommandFlags, ExportFacts, Greeting, HeaderStyle, InfoItem,
    InfoRequest, InfoType, MetaContextRequest, NbdError, OptionCode, OptionHeader, OptionReply,
    OptionReplyHeader, OptionRequest, RefusalKind, Request, SimpleReply, StatusChunk,
};
use loam_nbd::server::{Export, Server, ServerOptions};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn export(name: &str, device: Arc<dyn BlockDevice>) -> Export {
    Export { name: name.into(), description: format!("the {name} export"), device, read_only: false }
}

pub(crate) fn server_of(device: impl BlockDevice + 'static) -> Arc<Server> {
    Server::new(vec![export("disk", Arc::new(device))], ServerOptions::default()).expect("one export")
}

/// A memory device of `size` bytes, none of them zero.
pub(crate) fn filled(size: usize) -> MemoryDevice {
    MemoryDevice::from_bytes(&(0..size).map(|at| at as u8 | 1).collect::<Vec<_>>())
}

/// One reply, put together.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Reply {
    pub(crate) error: Option<NbdError>,
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    pub(crate) holes: Vec<(u64, u32)>,
    pub(crate) statuses: Vec<StatusChunk>,
    pub(crate) message: String,
}

impl Reply {
    /// The bytes that a read of `length` bytes from `offset` brought.
    pub(crate) fn assemble(&self, offset: u64, length: usize) -> Vec<u8> {
        assert_eq!(self.error, None, "{}", self.message);
        let mut bytes = vec![0xa5; length];
        let mut covered = 0;
        for (at, data) in &self.data {
            bytes[(at - offset) as usize..][..data.len()].copy_from_slice(data);
            covered += data.len();
        }
        for (at, hole) in &self.holes {
            bytes[(at - offset) as usize..][..*hole as usize].fill(0);
            covered += *hole as usize;
        }
        assert_eq!(covered, length, "each byte once");
        bytes
    }
}

pub(crate) fn request(command: Command, cookie: u64, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags::empty(), command, cookie, offset, length }
}

pub(crate) struct Peer<S = UnixStream> {
    pub(crate) stream: S,
    pub(crate) style: HeaderStyle,
    /// Lengths of reads, by cookie: simple replies do not say them.
    reads: std::collections::HashMap<u64, usize>,
}

pub(crate) fn connect(server: &Arc<Server>) -> (Peer, JoinHandle<std::io::Result<()>>) {
    let (near, far) = UnixStream::pair().expect("a socket pair");
    let server = Arc::clone(server);
    (Peer::over(near), tokio::spawn(async move { server.serve_stream(far).await }))
}

/// How a server's task ended.
pub(crate) async fn ended(served: JoinHandle<std::io::Result<()>>) -> std::io::Result<()> {
    tokio::time::timeout(PATIENCE, served).await.expect("it ends in time").expect("no panic")
}

/// A connection in the transmission phase of the default export.
pub(crate) async fn ready(server: &Arc<Server>, style: HeaderStyle) -> Peer {
    let (mut peer, _) = connect(server);
    peer.greet().await;
    peer.negotiate(style).await;
    peer.go("").await;
    peer
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    pub(crate) fn over(stream: S) -> Self {
        Peer { stream, style: HeaderStyle::Simple, reads: Default::default() }
    }

    pub(crate) async fn read<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let read = tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await;
        read.expect("an answer in time").expect("an answer");
        bytes
    }

    pub(crate) async fn read_vec(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let read = tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await;
        read.expect("an answer in time").expect("an answer");
        bytes
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the server takes it");
        self.stream.flush().await.expect("the server takes it");
    }

    /// The server closes, having said nothing more.
    pub(crate) async fn expect_closed(&mut self) {
        let mut byte = [0];
        let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut byte)).await;
        match read.expect("the server closes in time") {
            Ok(length) => assert_eq!(length, 0, "the server says more"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    pub(crate) async fn greet(&mut self) {
        self.greet_with(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).await;
    }

    pub(crate) async fn greet_with(&mut self, flags: ClientFlags) {
        Greeting::parse(self.read().await).expect("a greeting");
        self.write(&flags.encode()).await;
    }

    pub(crate) async fn option(&mut self, option: OptionRequest) -> Vec<OptionReply> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.write(&bytes).await;
        self.option_replies(option.code()).await
    }

    pub(crate) async fn raw_option(&mut self, code: u32, data: &[u8]) -> Vec<OptionReply> {
        let code = OptionCode::from_code(code);
        self.write(&OptionHeader { code, length: data.len() as u32 }.encode()).await;
        self.write(data).await;
        self.option_replies(code).await
    }

    pub(crate) async fn option_replies(&mut self, code: OptionCode) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::parse(self.read().await, code).expect("a reply");
            let data = self.read_vec(header.length as usize).await;
            let reply = OptionReply::parse(header.kind, &data).expect("a reply");
            let last = matches!(reply, OptionReply::Ack | OptionReply::Refused(_));
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    pub(crate) async fn negotiate(&mut self, style: HeaderStyle) {
        let option = match style {
            HeaderStyle::Simple => return,
            HeaderStyle::Structured => OptionRequest::StructuredReply,
            HeaderStyle::Extended => OptionRequest::ExtendedHeaders,
        };
        assert_eq!(self.option(option).await, [OptionReply::Ack]);
        self.style = style;
    }

    pub(crate) async fn set_contexts(&mut self, export: &str, queries: &[&str]) -> Vec<u32> {
        let queries = queries.iter().map(|query| query.to_string()).collect();
        let request = MetaContextRequest { export: export.into(), queries };
        let replies = self.option(OptionRequest::SetMetaContext(request)).await;
        assert_eq!(replies.last(), Some(&OptionReply::Ack));
        let id = |reply: &OptionReply| match reply {
            OptionReply::MetaContext { id, .. } => Some(*id),
            _ => None,
        };
        replies.iter().filter_map(id).collect()
    }

    /// Enters the transmission phase.
    pub(crate) async fn go(&mut self, name: &str) -> ExportFacts {
        let replies = self.option(OptionRequest::Go(info(name, &[InfoType::BlockSize]))).await;
        assert_eq!(replies.last(), Some(&OptionReply::Ack), "{replies:?}");
        facts(&replies)
    }

    pub(crate) async fn send(&mut self, request: &Request, payload: &[u8]) {
        if request.command == Command::Read {
            self.reads.insert(request.cookie, request.length as usize);
        }
        let mut bytes = match self.style {
            HeaderStyle::Extended => request.encode_extended().to_vec(),
            _ => request.encode_compact().expect("32 bits").to_vec(),
        };
        bytes.extend_from_slice(payload);
        self.write(&bytes).await;
    }

    /// The next reply, and whose it is. Chunks of several replies must not be mixed.
    pub(crate) async fn reply(&mut self) -> (u64, Reply) {
        let mut reply = Reply::default();
        loop {
            let magic: [u8; 4] = self.read().await;
            let length = self.style.reply_length(magic).expect("a reply's magic");
            let rest = self.read_vec(length - 4).await;
            let head = [&magic[..], &rest].concat();
            let header = match length {
                SimpleReply::LENGTH => {
                    let simple = SimpleReply::parse(head.try_into().unwrap()).expect("a simple reply");
                    reply.error = simple.error;
                    let read = self.reads.remove(&simple.cookie);
                    if let Some(length) = read.filter(|_| simple.error.is_none()) {
                        assert_eq!(self.style, HeaderStyle::Simple, "a read is answered in chunks");
                        reply.data.push((0, self.read_vec(length).await));
                    }
                    return (simple.cookie, reply);
                }
                ChunkHeader::STRUCTURED_LENGTH => {
                    ChunkHeader::parse_structured(head.try_into().unwrap()).expect("a chunk")
                }
                _ => ChunkHeader::parse_extended(head.try_into().unwrap()).expect("a chunk"),
            };
            let payload = self.read_vec(header.length as usize).await;
            match Chunk::parse(&header, &payload).expect("a chunk") {
                Chunk::None => {}
                Chunk::Data { offset, data } => reply.data.push((offset, data.to_vec())),
                Chunk::Hole { offset, length } => reply.holes.push((offset, length)),
                Chunk::Status(status) => reply.statuses.push(status),
                Chunk::Error(error) => {
                    (reply.error, reply.message) = (Some(error.error), error.message);
                }
            }
            if header.done() {
                self.reads.remove(&header.cookie);
                return (header.cookie, reply);
            }
        }
    }

    pub(crate) async fn ask(&mut self, request: &Request, payload: &[u8]) -> Reply {
        self.send(request, payload).await;
        let (cookie, reply) = self.reply().await;
        assert_eq!(cookie, request.cookie);
        reply
    }

    /// Sends a request without a payload and with `flags`; what is refused.
    pub(crate) async fn error_of(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Option<NbdError> {
        self.ask(&Request { flags, command, cookie: 77, offset, length }, &[]).await.error
    }

    /// The connection still works.
    pub(crate) async fn expect_alive(&mut self) {
        let reply = self.ask(&request(Command::Read, 0xa11e, 0, 1), &[]).await;
        assert_eq!(reply.error, None);
    }
}

pub(crate) fn info(name: &str, items: &[InfoType]) -> InfoRequest {
    InfoRequest { name: name.into(), items: items.to_vec() }
}

pub(crate) fn facts(replies: &[OptionReply]) -> ExportFacts {
    let found = replies.iter().find_map(|reply| match reply {
        OptionReply::Info(InfoItem::Export(facts)) => Some(*facts),
        _ => None,
    });
    found.expect("facts of the export")
}

pub(crate) fn refusal(replies: &[OptionReply]) -> Option<RefusalKind> {
    match replies {
        [OptionReply::Refused(refusal)] => Some(refusal.kind),
        _ => None,
    }
}

/// A device whose requests at offsets below `slow_below` take `delay`, and count what they are.
pub(crate) struct Slow<D> {
    pub(crate) below: D,
    pub(crate) slow_below: u64,
    pub(crate) delay: Duration,
}

impl<D: BlockDevice> Slow<D> {
    fn after<'a, T: Unpin + Send + 'a>(
        &'a self,
        offset: u64,
        work: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        if offset >= self.slow_below {
            return work();
        }
        Io::pending(async move {
            tokio::time::sleep(self.delay).await;
            work().await
        })
    }
}

impl<D: BlockDevice> BlockDevice for Slow<D> {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.after(offset, move || self.below.read(offset, buffer))
    }
    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.after(offset, move || self.below.write(offset, data, flags))
    }
    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.after(offset, move || self.below.write_zeroes(offset, length, flags))
    }
    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.after(offset, move || self.below.trim(offset, length))
    }
    fn flush(&self) -> Io<'_, ()> {
        self.after(0, || self.below.flush())
    }
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.after(offset, move || self.below.extents(offset, length, limit))
    }
    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        self.after(offset, move || self.below.locality(offset, length, limit))
    }
}

/// Says of a device what a test wants said, and does otherwise what the device does.
pub(crate) struct Claims<D> {
    pub(crate) below: D,
    pub(crate) geometry: Geometry,
    pub(crate) capabilities: Capabilities,
    /// From here on nothing is local.
    pub(crate) local_until: u64,
    /// Refuse write_zeroes with NotSupported.
    pub(crate) no_zeroes: bool,
    pub(crate) prefetched: std::sync::Mutex<Vec<(u64, u64)>>,
}

impl<D: BlockDevice> Claims<D> {
    pub(crate) fn of(below: D) -> Self {
        Claims {
            geometry: below.geometry(),
            capabilities: below.capabilities(),
            local_until: u64::MAX,
            no_zeroes: false,
            prefetched: Default::default(),
            below,
        }
    }
}

impl<D: BlockDevice> BlockDevice for Claims<D> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        self.below.read(offset, buffer)
    }
    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.below.write(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        match self.no_zeroes {
            true => Io::Ready(Err(loam_block::Error::new(loam_block::ErrorKind::NotSupported, "no"))),
            false => self.below.write_zeroes(offset, length, flags),
        }
    }
    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.below.trim(offset, length)
    }
    fn flush(&self) -> Io<'_, ()> {
        self.below.flush()
    }
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.below.extents(offset, length, limit)
    }
    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        let near = self.local_until.saturating_sub(offset).min(length);
        let both = [
            Locality { offset, length: near, local: true },
            Locality { offset: offset + near, length: length - near, local: false },
        ];
        Io::Ready(Ok(both.into_iter().filter(|run| run.length > 0).take(limit).collect()))
    }
    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.prefetched.lock().expect("no panic").push((offset, length));
        Io::Ready(Result::Ok(()))
    }
}

//! [`ImageSource`]: materialises the chunks of an image from where its bytes lie, as its index says.
//!
//! The pieces of a run of chunks are nearly one span of a plain archive (headers lie between), so a fetch is one range
//! request, and bytes that no piece wants are dropped on arrival. A compressed archive is decoded from its beginning.
//! Files of a directory are opened beneath it, one after the other, and must have the size that the index knows.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use loam_block::ErrorKind;
use loam_content::{ByteSource, ChunkSender, ChunkSource, Digest, FetchCost, HttpClient, WireTotals};
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;

use crate::decode::Compression;
use crate::feed::{CHANNEL_BUFFERS, Feed, HashedFeed, READ_BYTES};
use crate::index::{BlobKind, Index, Piece};
use crate::spec::SourceSpec;
use crate::walk::open_beneath;
use crate::{Error, Result};

/// Bytes between two pieces that are fetched and dropped rather than asked around: what 100 Mbit/s carry in the 20 ms
/// that one more request takes.
const COALESCE_BYTES: u64 = 256 << 10;

type ContentResult<T> = Result<T, loam_content::Error>;

/// The chunks of one image.
pub struct ImageSource {
    index: Arc<Index>,
    name: String,
    place: Place,
}

/// Where the bytes lie.
enum Place {
    Archive(Arc<dyn ByteSource>),
    Compressed(Arc<dyn ByteSource>, Compression),
    Directory(Arc<Directory>),
}

struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

impl ImageSource {
    /// The image that `spec` names. An archive on the network is not asked before the first fetch: its length is known
    /// from the index.
    ///
    /// # Errors
    /// As [`ImageSource::archive`] and [`ImageSource::directory`]; [`Error::Content`] when the archive cannot be opened.
    pub async fn open(index: Arc<Index>, spec: &SourceSpec, http: &HttpClient) -> Result<ImageSource> {
        match spec {
            SourceSpec::Directory(path) => ImageSource::directory(index, path),
            SourceSpec::Tar(url) => {
                let length = index.blobs().first().map_or(0, |blob| blob.length);
                let pin = loam_content::Pin::of_length(length);
                let bytes = loam_content::open(http, url, Some(&pin)).await?;
                ImageSource::archive(index, bytes)
            }
        }
    }

    /// An image whose archive is `bytes`.
    ///
    /// # Errors
    /// [`Error::Index`] for the index of a directory; [`Error::Content`] when the archive has another length than the
    /// index knows.
    pub fn archive(index: Arc<Index>, bytes: Arc<dyn ByteSource>) -> Result<ImageSource> {
        let name = bytes.url().to_string();
        let [blob] = index.blobs() else {
            return Err(Error::index("blobs", "this is not the index of one archive"));
        };
        if blob.length != bytes.length() {
            let what = format!("the index knows {} bytes, the archive has {}", blob.length, bytes.length());
            return Err(loam_content::Error::Changed { url: name, what }.into());
        }
        let place = match blob.kind {
            BlobKind::Raw => Place::Archive(bytes),
            BlobKind::Stream(compression) => Place::Compressed(bytes, compression),
            BlobKind::TreeFile => return Err(Error::index("blobs", "this is the index of a directory")),
        };
        Ok(ImageSource { index, name, place })
    }

    /// An image whose files lie below `path`.
    ///
    /// # Errors
    /// [`Error::Index`] for the index of an archive; [`Error::Os`] when the directory cannot be opened.
    pub fn directory(index: Arc<Index>, path: &Path) -> Result<ImageSource> {
        if index.blobs().iter().any(|blob| blob.kind != BlobKind::TreeFile) {
            return Err(Error::index("blobs", "this is the index of an archive"));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|error| Error::os("open", path, error))?;
        let directory = Arc::new(Directory { path: path.to_owned(), fd });
        Ok(ImageSource { index, name: format!("dir:{}", path.display()), place: Place::Directory(directory) })
    }

    /// The index.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Why fetches are not lazy, if so.
    pub fn not_lazy(&self) -> Option<String> {
        self.index.not_lazy()
    }

    /// The addresses of `count` chunks from `first`.
    fn addresses(&self, first: u64, count: u64) -> ContentResult<Range<u64>> {
        let chunk_bytes = u64::from(self.index.chunk_bytes());
        let chunks = self.index.chunk_count();
        match first.checked_add(count) {
            Some(end) if end <= chunks && count > 0 => {
                Ok(first * chunk_bytes..(end * chunk_bytes).min(self.index.content_length()))
            }
            _ => Err(loam_content::Error::Source {
                kind: ErrorKind::OutOfBounds,
                what: format!("{count} chunks from {first} of {}: it has {chunks}", self.name),
            }),
        }
    }
}

impl ChunkSource for ImageSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.index.content_length()
    }

    fn chunk_bytes(&self) -> u32 {
        self.index.chunk_bytes()
    }

    fn digest(&self, chunk: u64) -> Option<Digest> {
        self.index.chunk_digest(chunk)
    }

    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, ContentResult<()>> {
        Box::pin(async move {
            let addresses = self.addresses(first, count)?;
            match &self.place {
                Place::Archive(bytes) => self.fetch_spans(bytes.as_ref(), addresses, &out).await,
                Place::Compressed(bytes, compression) => {
                    self.fetch_decoded(bytes.as_ref(), *compression, addresses, out).await
                }
                Place::Directory(directory) => {
                    let (index, directory) = (self.index.clone(), directory.clone());
                    blocking(move || directory.fetch(&index, addresses, &out)).await
                }
            }
        })
    }

    fn fetch_cost(&self) -> FetchCost {
        match self.place {
            Place::Compressed(..) => FetchCost::WholeStream,
            Place::Archive(_) | Place::Directory(_) => FetchCost::RandomAccess,
        }
    }

    fn wire(&self) -> WireTotals {
        match &self.place {
            Place::Archive(bytes) | Place::Compressed(bytes, _) => bytes.wire(),
            Place::Directory(_) => WireTotals::default(),
        }
    }
}

impl ImageSource {
    /// Fetches from a plain archive: one request for each span.
    async fn fetch_spans(
        &self,
        bytes: &dyn ByteSource,
        addresses: Range<u64>,
        out: &ChunkSender,
    ) -> ContentResult<()> {
        let mut chunks = Assembly::new(addresses.clone(), self.index.chunk_bytes());
        for span in spans(self.index.pieces_in(addresses.clone()), &addresses) {
            let mut stream = bytes.stream(span.offset, span.length);
            let mut position = span.offset;
            let mut parts = span.parts.into_iter().peekable();
            while parts.peek().is_some() {
                let Some(received) = stream.next().await else { return Err(self.short(position)) };
                let received = received?;
                take_parts(&mut parts, position, &received, &mut chunks);
                position += received.len() as u64;
                for chunk in chunks.finished() {
                    out.send(chunk).await?;
                }
            }
        }
        chunks.pad_to(addresses.end);
        for chunk in chunks.finished() {
            out.send(chunk).await?;
        }
        Ok(())
    }

    /// Fetches from a compressed archive: a task receives, a blocking thread decodes until the last byte is there.
    async fn fetch_decoded(
        &self,
        bytes: &dyn ByteSource,
        compression: Compression,
        addresses: Range<u64>,
        out: ChunkSender,
    ) -> ContentResult<()> {
        let (sender, receiver) = mpsc::channel(CHANNEL_BUFFERS);
        let mut stream = bytes.stream(0, bytes.length());
        let pump = async move {
            while let Some(item) = stream.next().await {
                let failed = item.is_err();
                if sender.send(item).await.is_err() || failed {
                    break;
                }
            }
        };
        let (index, name) = (self.index.clone(), self.name.clone());
        let work =
            blocking(move || decode(&index, &name, Feed::channel(receiver), compression, addresses, &out));
        tokio::join!(pump, work).1
    }

    fn short(&self, position: u64) -> loam_content::Error {
        let why = format!("the stream ended at {position}");
        loam_content::Error::Malformed { url: self.name.clone(), why }
    }
}

async fn blocking(work: impl FnOnce() -> ContentResult<()> + Send + 'static) -> ContentResult<()> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(loam_content::Error::ShuttingDown { what: "fetch of a run of chunks".to_owned() }),
    }
}

/// A part of a piece: where its bytes lie and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    offset: u64,
    address: u64,
    length: u64,
}

/// One request and what is wanted of it.
#[derive(Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    length: u64,
    parts: Vec<Part>,
}

/// The part of a piece that lies in `addresses`.
fn clip(piece: &Piece, addresses: &Range<u64>) -> Part {
    let address = piece.address.max(addresses.start);
    let end = piece.end().min(addresses.end);
    Part { offset: piece.offset + (address - piece.address), address, length: end - address }
}

/// Joins the pieces of a run into as few requests as are sensible.
fn spans(pieces: &[Piece], addresses: &Range<u64>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for part in pieces.iter().map(|piece| clip(piece, addresses)) {
        if let Some(last) = spans.last_mut() {
            let end = last.offset + last.length;
            if part.offset >= end && part.offset - end <= COALESCE_BYTES {
                last.length = part.offset + part.length - last.offset;
                last.parts.push(part);
                continue;
            }
        }
        spans.push(Span { offset: part.offset, length: part.length, parts: vec![part] });
    }
    spans
}

/// Puts what is wanted of `received`, which begins at `position`, in its place.
fn take_parts(
    parts: &mut std::iter::Peekable<std::vec::IntoIter<Part>>,
    position: u64,
    received: &[u8],
    chunks: &mut Assembly,
) {
    let end = position + received.len() as u64;
    while let Some(part) = parts.peek() {
        let from = part.offset.max(position);
        let to = (part.offset + part.length).min(end);
        if from < to {
            chunks.pad_to(part.address + (from - part.offset));
            chunks.write(&received[(from - position) as usize..(to - position) as usize]);
        }
        if part.offset + part.length > end {
            break;
        }
        parts.next();
    }
}

/// Chunks being put together, strictly forwards; what is skipped is zero.
struct Assembly {
    at: u64,
    end: u64,
    chunk_bytes: u64,
    chunk: Vec<u8>,
    finished: VecDeque<Bytes>,
}

impl Assembly {
    /// `addresses` begins on a chunk boundary.
    fn new(addresses: Range<u64>, chunk_bytes: u32) -> Self {
        Assembly {
            at: addresses.start,
            end: addresses.end,
            chunk_bytes: chunk_bytes.into(),
            chunk: Vec::with_capacity(chunk_bytes as usize),
            finished: VecDeque::new(),
        }
    }

    /// Bytes until the current chunk, or the run, ends.
    fn room(&self) -> u64 {
        (self.end - self.at).min(self.chunk_bytes - self.chunk.len() as u64)
    }

    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.at < self.end {
            let count = bytes.len().min(self.room() as usize);
            self.chunk.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            self.advance(count as u64);
        }
    }

    fn pad_to(&mut self, address: u64) {
        while self.at < address.min(self.end) {
            let count = self.room().min(address - self.at);
            self.chunk.resize(self.chunk.len() + count as usize, 0);
            self.advance(count);
        }
    }

    fn advance(&mut self, count: u64) {
        self.at += count;
        if self.chunk.len() as u64 == self.chunk_bytes || self.at == self.end {
            let next = Vec::with_capacity(self.chunk_bytes as usize);
            self.finished.push_back(std::mem::replace(&mut self.chunk, next).into());
        }
    }

    fn finished(&mut self) -> impl Iterator<Item = Bytes> {
        self.finished.drain(..)
    }
}

/// Decodes from the beginning and sends the chunks at `addresses`.
fn decode(
    index: &Index,
    name: &str,
    feed: Feed,
    compression: Compression,
    addresses: Range<u64>,
    out: &ChunkSender,
) -> ContentResult<()> {
    let failed = |position: u64, error: std::io::Error| match crate::tar::from_io(position, error) {
        Error::Content(error) => error,
        error => loam_content::Error::Source { kind: ErrorKind::Io, what: format!("{name}: {error}") },
    };
    let decoder = compression.decoder(HashedFeed::unhashed(feed)).map_err(|error| failed(0, error))?;
    let mut decoder = BufReader::with_capacity(READ_BYTES, decoder);
    let mut chunks = Assembly::new(addresses.clone(), index.chunk_bytes());
    let mut position = 0u64;
    for part in index.pieces_in(addresses.clone()).iter().map(|piece| clip(piece, &addresses)) {
        if part.offset < position {
            let what = format!("{name}: the index has the pieces of a stream out of order");
            return Err(loam_content::Error::Source { kind: ErrorKind::Invalid, what });
        }
        chunks.pad_to(part.address);
        let end = part.offset + part.length;
        while position < end {
            let decoded = decoder.fill_buf().map_err(|error| failed(position, error))?;
            if decoded.is_empty() {
                let why = format!("ends at decoded byte {position}, the index expects more");
                return Err(loam_content::Error::Malformed { url: name.to_owned(), why });
            }
            let wanted = if position < part.offset { part.offset - position } else { end - position };
            let count = decoded.len().min(usize::try_from(wanted).unwrap_or(usize::MAX));
            if position >= part.offset {
                chunks.write(&decoded[..count]);
            }
            decoder.consume(count);
            position += count as u64;
            for chunk in chunks.finished() {
                out.blocking_send(chunk)?;
            }
        }
    }
    chunks.pad_to(addresses.end);
    chunks.finished().try_for_each(|chunk| out.blocking_send(chunk))
}

impl Directory {
    /// Reads the chunks at `addresses` from the files below the directory.
    fn fetch(&self, index: &Index, addresses: Range<u64>, out: &ChunkSender) -> ContentResult<()> {
        let mut chunks = Assembly::new(addresses.clone(), index.chunk_bytes());
        let mut buffer = vec![0; index.chunk_bytes() as usize];
        let mut open: Option<(u32, OwnedFd)> = None;
        for piece in index.pieces_in(addresses.clone()) {
            let blob = &index.blobs()[piece.blob as usize];
            let shown = || self.path.join(crate::create::shown(&blob.name));
            let fd = match open.take() {
                Some((number, fd)) if number == piece.blob => fd,
                _ => self.open(&blob.name, blob.length)?,
            };
            let part = clip(piece, &addresses);
            chunks.pad_to(part.address);
            let mut done = 0;
            while done < part.length {
                let count = (part.length - done).min(buffer.len() as u64) as usize;
                let read = rustix::io::pread(&fd, &mut buffer[..count], part.offset + done);
                let read = match read {
                    Err(rustix::io::Errno::INTR) => continue,
                    read => read.map_err(|error| {
                        loam_content::Error::io(format!("read of {}", shown().display()), error.into())
                    })?,
                };
                if read == 0 {
                    return Err(changed(&shown(), "it is shorter than when it was indexed"));
                }
                chunks.write(&buffer[..read]);
                done += read as u64;
                for chunk in chunks.finished() {
                    out.blocking_send(chunk)?;
                }
            }
            open = Some((piece.blob, fd));
        }
        chunks.pad_to(addresses.end);
        chunks.finished().try_for_each(|chunk| out.blocking_send(chunk))
    }

    fn open(&self, path: &[u8], length: u64) -> ContentResult<OwnedFd> {
        let shown = || self.path.join(crate::create::shown(path));
        let fd = open_beneath(self.fd.as_fd(), path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|error| {
            loam_content::Error::io(format!("open of {}", shown().display()), error.into())
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(|error| {
            loam_content::Error::io(format!("stat of {}", shown().display()), error.into())
        })?;
        if stat.st_size as u64 != length {
            let what = format!("it has {} bytes, {length} when it was indexed", stat.st_size);
            return Err(changed(&shown(), &what));
        }
        Ok(fd)
    }
}

fn changed(path: &Path, what: &str) -> loam_content::Error {
    loam_content::Error::Changed { url: path.display().to_string(), what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(address: u64, offset: u64, length: u64) -> Piece {
        Piece { address, offset, length, blob: 0 }
    }

    #[test]
    fn neighbours_in_an_archive_are_one_request() {
        let pieces = [piece(0, 512, 5000), piece(8192, 6656, 100), piece(12288, 7680, 9000)];
        let spans = spans(&pieces, &(4096..16384));
        assert_eq!(spans.len(), 1);
        assert_eq!((spans[0].offset, spans[0].length), (512 + 4096, 7680 + 4096 - (512 + 4096)));
        assert_eq!(spans[0].parts[0], Part { offset: 4608, address: 4096, length: 904 });
        assert_eq!(spans[0].parts[2], Part { offset: 7680, address: 12288, length: 4096 });
    }

    #[test]
    fn far_apart_or_backwards_is_another_request() {
        let far = 1000 + COALESCE_BYTES;
        let pieces = [
            piece(0, 0, 1000),
            piece(4096, far, 10),
            piece(8192, far + 11 + COALESCE_BYTES, 1),
            piece(12288, 5, 1),
        ];
        let spans = spans(&pieces, &(0..16384));
        assert_eq!(spans.iter().map(|span| span.parts.len()).collect::<Vec<_>>(), [2, 1, 1]);
    }

    #[test]
    fn gaps_are_zero_and_the_last_chunk_may_be_short() {
        let mut chunks = Assembly::new(4096..4096 * 4, 8192);
        chunks.write(b"abc");
        chunks.pad_to(4096 + 8190);
        chunks.write(b"wxyz");
        chunks.pad_to(4096 * 4);
        let chunks: Vec<Bytes> = chunks.finished().collect();
        assert_eq!(chunks.iter().map(Bytes::len).collect::<Vec<_>>(), [8192, 4096]);
        assert_eq!(
            (&chunks[0][..4], &chunks[0][8189..], &chunks[1][..3]),
            (&b"abc\0"[..], &b"\0wx"[..], &b"yz\0"[..])
        );
    }
}

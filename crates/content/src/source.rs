//! [`ByteSource`]: one pinned version of one object, read by offset or as a stream.

mod file;
mod http;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use file::FileSource;
pub use http::{HttpClient, HttpOptions, HttpSource};

use crate::{Error, Result, SourceUrl};

/// Bytes as they come, in order; ends after the last one that was asked for, or with an error.
pub type ByteStream = BoxStream<'static, Result<Bytes>>;

/// Bytes by offset from somewhere slow. All offsets and lengths are bytes. Shared by reference between any number of
/// tasks; everything runs inside a tokio runtime with time and I/O enabled.
pub trait ByteSource: Send + Sync {
    /// Where the bytes come from.
    fn url(&self) -> &SourceUrl;

    /// Length of the object.
    fn length(&self) -> u64;

    /// Exactly `length` bytes from `offset`, retried and resumed as the source's options say.
    ///
    /// # Errors
    /// [`crate::Error::OutOfBounds`] at once; [`crate::Error::Changed`] when the object is no longer the pinned one.
    fn read_at(&self, offset: u64, length: u64) -> BoxFuture<'_, Result<Bytes>>;

    /// The same `length` bytes as they arrive, in one request (and its resumptions). Nothing is sent before the first
    /// poll. To the end of the object is `length() - offset`.
    fn stream(&self, offset: u64, length: u64) -> ByteStream;

    /// What identifies this version, as far as it is known by now.
    fn pin(&self) -> Pin;

    /// What has been asked for and received so far.
    fn wire(&self) -> WireTotals;
}

/// What identifies one version of an object: the length always, the others where they are known. An object that
/// differs in one that is known is another version.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pin {
    /// Bytes.
    pub length: u64,
    /// `ETag`, with its quotes and without the mark of a weak one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// `Last-Modified`, as the server spells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
    /// Modification time of a local file: nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_ns: Option<i64>,
    /// Inode number of a local file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inode: Option<u64>,
}

impl Pin {
    /// A pin that knows the length alone: the first answer's validators are pinned from then on.
    pub fn of_length(length: u64) -> Pin {
        Pin { length, ..Pin::default() }
    }
}

/// What crossed the wire, at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WireTotals {
    /// Requests sent, retries and redirects included; for a file, reads.
    pub requests: u64,
    /// Bytes of bodies received, whether or not they were of use; headers are not counted.
    pub bytes: u64,
}

/// Counts what crosses the wire.
#[derive(Debug, Default)]
pub struct WireCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl WireCounters {
    /// One more request.
    pub fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// `bytes` more of a body.
    pub fn received(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn totals(&self) -> WireTotals {
        WireTotals {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// # Errors
/// [`Error::OutOfBounds`] for a range that is not inside an object of `end` bytes.
fn out_of_bounds(url: &SourceUrl, offset: u64, length: u64, end: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(last) if last <= end => Ok(()),
        _ => Err(Error::OutOfBounds { url: url.shown(), offset, length, end }),
    }
}

/// Opens a source. With an `expected` version, an HTTP object is not asked for anything before the first read; without,
/// one request learns what there is.
///
/// # Errors
/// [`Error::Changed`] if the file is not the version that is `expected`, and what else stands in the way.
pub async fn open(
    client: &HttpClient,
    url: &SourceUrl,
    expected: Option<&Pin>,
) -> Result<Arc<dyn ByteSource>> {
    match (url, expected) {
        (SourceUrl::File(path), _) => {
            let (path, expected) = (path.clone(), expected.cloned());
            let opened =
                tokio::task::spawn_blocking(move || FileSource::open(&path, expected.as_ref())).await;
            Ok(Arc::new(
                opened.unwrap_or_else(|_| {
                    Err(Error::ShuttingDown { what: format!("opening {}", url.shown()) })
                })?,
            ))
        }
        (SourceUrl::Http(_), Some(pin)) => Ok(Arc::new(HttpSource::pinned(client, url, pin.clone())?)),
        (SourceUrl::Http(_), None) => Ok(Arc::new(HttpSource::open(client, url).await?)),
    }
}

/// An object that was fetched whole.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// All of it.
    pub bytes: Bytes,
    /// The version that this is.
    pub pin: Pin,
    /// What it cost.
    pub wire: WireTotals,
}

/// Fetches an object of at most `limit_bytes` whole: one request, nothing before it, repeated as `client`'s options say.
///
/// # Errors
/// [`Error::TooLong`], [`Error::NotFound`], and what else stands in the way.
pub async fn fetch_whole(client: &HttpClient, url: &SourceUrl, limit_bytes: u64) -> Result<Fetched> {
    let SourceUrl::File(path) = url else { return http::fetch_whole(client, url, limit_bytes).await };
    let (path, url) = (path.clone(), url.shown());
    let what = format!("reading {url}");
    let fetched = tokio::task::spawn_blocking(move || {
        let source = FileSource::open(&path, None)?;
        if source.length() > limit_bytes {
            return Err(Error::TooLong { url, limit: limit_bytes });
        }
        let mut bytes = Vec::with_capacity(source.length() as usize);
        let file = std::fs::File::open(&path).map_err(|error| Error::io(format!("opening {url}"), error))?;
        let read = file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes);
        let read = read.map_err(|error| Error::io(format!("reading {url}"), error))? as u64;
        if read != source.length() {
            let what = format!("it was {} bytes long, {read} were read", source.length());
            return Err(Error::Changed { url, what });
        }
        Ok(Fetched { bytes: bytes.into(), pin: source.pin(), wire: WireTotals { requests: 1, bytes: read } })
    });
    fetched.await.unwrap_or(Err(Error::ShuttingDown { what }))
}

//! HTTP(S): [`HttpClient`] with its connections and limits, and [`HttpSource`], one pinned object behind an address.

mod answer;
mod range;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream;
use reqwest::{Client, Url};
use tokio::sync::Semaphore;

use super::{ByteSource, ByteStream, Fetched, Pin, WireCounters, WireTotals, out_of_bounds};
use crate::{Error, Result, SourceUrl};
use range::{Reader, Target};

/// Hosts whose limits are remembered at once.
const HOSTS_MAX: usize = 256;

/// Limits of everything that is asked for over HTTP.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// From the first packet to an open connection, TLS included.
    pub connect_timeout: Duration,
    /// From a request to the head of its answer.
    pub answer_timeout: Duration,
    /// In this time of waiting at least [`HttpOptions::progress_bytes`] of a body must come.
    pub progress_window: Duration,
    /// See [`HttpOptions::progress_window`].
    pub progress_bytes: u64,
    /// Attempts without progress after which a read fails.
    pub attempts_max: u32,
    /// Time without progress after which a read fails.
    pub patience: Duration,
    /// The pause before the second attempt; doubled with each further one, and shortened at random by up to half.
    pub backoff_first: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// Requests on the way to one host at once; others wait.
    pub requests_per_host: usize,
    /// Redirects that one request follows.
    pub redirects_max: u32,
}

impl Default for HttpOptions {
    fn default() -> HttpOptions {
        HttpOptions {
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(10),
            progress_window: Duration::from_secs(10),
            progress_bytes: 16 << 10,
            attempts_max: 12,
            patience: Duration::from_secs(30),
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            requests_per_host: 16,
            redirects_max: 5,
        }
    }
}

/// Connections that are kept and shared by everything that is fetched through them. Cheap to clone. Belongs to the
/// runtime on which it is first used.
#[derive(Clone)]
pub struct HttpClient(Arc<Inner>);

struct Inner {
    options: HttpOptions,
    plain: Client,
    /// Made when it is first needed: reading the root certificates takes tens of milliseconds.
    secure: OnceLock<Result<Client, String>>,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl HttpClient {
    /// A client without connections yet. Proxies are taken from the environment (`http_proxy`, `https_proxy`, `no_proxy`).
    ///
    /// # Errors
    /// [`Error::Source`] when the environment names a proxy that cannot be.
    pub fn new(options: HttpOptions) -> Result<HttpClient> {
        // A process has one provider; whoever came first is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = build(&options, false).map_err(|what| Error::Source {
            kind: loam_block::ErrorKind::Invalid,
            what: format!("setting up HTTP: {what}"),
        })?;
        Ok(HttpClient(Arc::new(Inner { options, plain, secure: OnceLock::new(), hosts: Mutex::default() })))
    }

    /// The limits.
    pub fn options(&self) -> &HttpOptions {
        &self.0.options
    }

    /// Opens up to `connections` connections to the server of `url` by asking for the head of the object; nothing for
    /// files. Failures are nobody's business: a read will meet them again.
    pub async fn prewarm(&self, url: &SourceUrl, connections: usize) {
        let SourceUrl::Http(address) = url else { return };
        let Ok(address) = Url::parse(address) else { return };
        let connections = connections.min(self.0.options.requests_per_host);
        let heads = (0..connections).map(|_| async {
            if let Ok(client) = self.client(&address) {
                let head = client.head(address.clone()).send();
                let _ = tokio::time::timeout(self.0.options.answer_timeout, head).await;
            }
        });
        stream::iter(heads).buffer_unordered(connections.max(1)).collect::<Vec<()>>().await;
    }

    fn client(&self, url: &Url) -> Result<Client, String> {
        if url.scheme() == "http" {
            return Ok(self.0.plain.clone());
        }
        self.0.secure.get_or_init(|| build(&self.0.options, true)).clone()
    }

    fn host(&self, url: &Url) -> Arc<Semaphore> {
        let mut hosts = self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= HOSTS_MAX {
            // Those in use live on in their requests.
            hosts.clear();
        }
        let name = url.authority().to_owned();
        hosts
            .entry(name)
            .or_insert_with(|| Arc::new(Semaphore::new(self.0.options.requests_per_host.max(1))))
            .clone()
    }
}

fn build(options: &HttpOptions, secure: bool) -> Result<Client, String> {
    let builder = Client::builder()
        .user_agent(concat!("loam/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        .pool_max_idle_per_host(options.requests_per_host)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_nodelay(true)
        // Followed here, where they are counted and remembered.
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .http1_only();
    let builder = if secure { builder } else { builder.tls_certs_only([]) };
    builder.build().map_err(|error| chain(&error))
}

/// An error with all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// One pinned object behind `http://` or `https://`.
pub struct HttpSource(Arc<Shared>);

/// What all reads of one object share.
struct Shared {
    url: SourceUrl,
    client: HttpClient,
    target: Target,
    length: u64,
    /// What the caller knew.
    given: Pin,
    /// What is known by now: `given` and what answers said.
    pin: Mutex<Pin>,
    wire: Arc<WireCounters>,
}

impl HttpSource {
    /// The object at `url` whose version (at least whose length) is known already, from an index say. Sends nothing:
    /// validators that `pin` does not have are pinned from the first answer on, until an answer contradicts them.
    ///
    /// # Errors
    /// [`Error::BadUrl`].
    pub fn pinned(client: &HttpClient, url: &SourceUrl, pin: Pin) -> Result<HttpSource> {
        Ok(HttpSource(Arc::new(Shared {
            url: url.clone(),
            client: client.clone(),
            target: Target::new(url)?,
            length: pin.length,
            given: pin.clone(),
            pin: Mutex::new(pin),
            wire: Arc::default(),
        })))
    }

    /// The object at `url` as it is now: asks the server for its first byte to learn length and validators.
    ///
    /// # Errors
    /// What the server or the way to it does; [`Error::Malformed`] when it does not tell a length.
    pub async fn open(client: &HttpClient, url: &SourceUrl) -> Result<HttpSource> {
        let target = Target::new(url)?;
        let wire = Arc::new(WireCounters::default());
        let pin = range::probe(client, url, &target, &wire).await?;
        Ok(HttpSource(Arc::new(Shared {
            url: url.clone(),
            client: client.clone(),
            target,
            length: pin.length,
            given: pin.clone(),
            pin: Mutex::new(pin),
            wire,
        })))
    }
}

impl ByteSource for HttpSource {
    fn url(&self) -> &SourceUrl {
        &self.0.url
    }

    fn length(&self) -> u64 {
        self.0.length
    }

    fn read_at(&self, offset: u64, length: u64) -> BoxFuture<'_, Result<Bytes>> {
        let mut pieces = self.stream(offset, length);
        Box::pin(async move {
            let mut first = Bytes::new();
            let mut whole = BytesMut::new();
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                if piece.len() as u64 == length {
                    return Ok(piece);
                }
                match first.is_empty() && whole.is_empty() {
                    true => first = piece,
                    false => {
                        if whole.is_empty() {
                            // `length` was found to be inside the object before anything came.
                            whole.reserve(length as usize);
                            whole.extend_from_slice(&std::mem::take(&mut first));
                        }
                        whole.extend_from_slice(&piece);
                    }
                }
            }
            Ok(whole.freeze())
        })
    }

    fn stream(&self, offset: u64, length: u64) -> ByteStream {
        if let Err(error) = out_of_bounds(&self.0.url, offset, length, self.0.length) {
            return Box::pin(stream::iter([Err(error)]));
        }
        let reader = Reader::new(self.0.clone(), offset, offset + length);
        Box::pin(stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        }))
    }

    fn pin(&self) -> Pin {
        self.0.pin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wire(&self) -> WireTotals {
        self.0.wire.totals()
    }
}

/// Fetches an object whole by one request (and its repetitions).
pub(super) async fn fetch_whole(client: &HttpClient, url: &SourceUrl, limit: u64) -> Result<Fetched> {
    let target = Target::new(url)?;
    let wire = WireCounters::default();
    let (bytes, pin) = range::whole(client, url, &target, &wire, limit).await?;
    Ok(Fetched { bytes, pin, wire: wire.totals() })
}

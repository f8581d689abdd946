//! Attempts: one request with its redirects and time-outs; and [`Reader`], which makes a run of bytes out of as many
//! attempts as its limits allow, each going on where the one before broke off.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT_ENCODING, LOCATION, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};

use super::answer::{Answer, Asked, Failure, Known, judge};
use super::{HttpClient, HttpOptions, Shared, chain};
use crate::{Error, Pin, Result, SourceUrl, WireCounters};

/// An address, and where its redirects led.
pub(super) struct Target {
    origin: Url,
    found: Mutex<Option<Url>>,
}

impl Target {
    pub(super) fn new(url: &SourceUrl) -> Result<Target> {
        let bad = |why: String| Error::BadUrl { url: url.shown(), why };
        let SourceUrl::Http(address) = url else {
            return Err(bad("it is no http:// or https:// address".into()));
        };
        let origin = Url::parse(address).map_err(|error| bad(error.to_string()))?;
        Ok(Target { origin, found: Mutex::new(None) })
    }

    fn found(&self) -> Option<Url> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_found(&self, url: Option<Url>) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = url;
    }
}

/// Where one request's body comes from.
struct Body {
    response: Response,
    /// Kept until the body is read: a request takes its place at the host until then.
    _place: OwnedSemaphorePermit,
    window: Window,
    /// The rest of a piece whose beginning was passed over.
    pending: Option<Bytes>,
}

/// Watches over how fast a body comes, by the time spent waiting for it.
struct Window {
    waited: Duration,
    bytes: u64,
}

/// One request to whom it concerns: everything but what is asked for.
struct Request<'a> {
    client: &'a HttpClient,
    url: &'a SourceUrl,
    target: &'a Target,
    wire: &'a WireCounters,
}

impl Request<'_> {
    fn options(&self) -> &HttpOptions {
        self.client.options()
    }

    fn malformed(&self, why: impl Into<String>) -> Failure {
        Failure::Final(Error::Malformed { url: self.url.shown(), why: why.into() })
    }

    /// Sends the request, follows redirects, judges the head.
    async fn send(&self, asked: Asked, known: &Known) -> Result<(Body, Answer), Failure> {
        let remembered = self.target.found();
        let by_memory = remembered.is_some();
        match self.follow(remembered.unwrap_or_else(|| self.target.origin.clone()), asked, known).await {
            Err(failure) if by_memory => {
                // Addresses that redirects lead to expire: begin again at the origin.
                self.target.set_found(None);
                match failure {
                    Failure::Final(Error::Denied { .. } | Error::NotFound { .. } | Error::Status { .. }) => {
                        self.follow(self.target.origin.clone(), asked, known).await
                    }
                    failure => Err(failure),
                }
            }
            other => other,
        }
    }

    async fn follow(&self, mut at: Url, asked: Asked, known: &Known) -> Result<(Body, Answer), Failure> {
        for _ in 0..=self.options().redirects_max {
            let place = self.client.host(&at).acquire_owned().await;
            let place = place.map_err(|_| Failure::passing("shutting down"))?;
            let response = self.head(&at, asked).await?;
            let status = response.status();
            if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                let answer = judge(self.url, status, response.headers(), asked, known)?;
                if at != self.target.origin {
                    self.target.set_found(Some(at));
                }
                return Ok((Body { response, _place: place, window: Window::new(), pending: None }, answer));
            }
            at = self.redirect(&at, status, &response)?;
        }
        Err(self.malformed(format!("more than {} redirects", self.options().redirects_max)))
    }

    fn redirect(&self, from: &Url, status: StatusCode, response: &Response) -> Result<Url, Failure> {
        let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let Some(location) = location else {
            return Err(self.malformed(format!("status {} without a place to go to", status.as_u16())));
        };
        let to = from
            .join(location)
            .map_err(|error| self.malformed(format!("redirected to no address: {error}")))?;
        let shown = || format!("{}://{}", to.scheme(), to.host_str().unwrap_or_default());
        match (from.scheme(), to.scheme()) {
            ("http" | "https", "https") | ("http", "http") => Ok(to),
            ("https", "http") => {
                let why = format!("redirected from https to {}, where anyone could alter it", shown());
                Err(self.malformed(why))
            }
            _ => Err(self.malformed(format!("redirected to {}, which is not HTTP", shown()))),
        }
    }

    async fn head(&self, at: &Url, asked: Asked) -> Result<Response, Failure> {
        let client =
            self.client.client(at).map_err(|why| self.malformed(format!("setting up TLS: {why}")))?;
        // Anything but the bytes themselves would shift the ranges.
        let mut request = client.get(at.clone()).header(ACCEPT_ENCODING, "identity");
        if let Asked::Range { start, end } = asked {
            request = request.header(RANGE, format!("bytes={start}-{}", end - 1));
        }
        self.wire.request();
        let limit = self.options().answer_timeout;
        match timeout(limit, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_builder() => Err(self.malformed(chain(&error))),
            Ok(Err(error)) if untrusted(&error) => {
                let (url, why) = (self.url.shown(), chain(&error.without_url()));
                Err(Failure::Final(Error::Untrusted { url, why }))
            }
            Ok(Err(error)) if error.is_timeout() => Err(Failure::timed_out(chain(&error.without_url()))),
            Ok(Err(error)) => Err(Failure::passing(chain(&error.without_url()))),
            Err(_) => Err(Failure::timed_out(format!("no answer in {limit:?}"))),
        }
    }

    /// The next bytes of a body, or `None` at its end.
    async fn piece(&self, body: &mut Body) -> Result<Option<Bytes>, Failure> {
        if let Some(pending) = body.pending.take() {
            return Ok(Some(pending));
        }
        let options = self.options();
        loop {
            let left = options.progress_window.saturating_sub(body.window.waited);
            let begun = Instant::now();
            let piece = timeout(left, body.response.chunk()).await;
            body.window.waited += begun.elapsed();
            match piece {
                Ok(Ok(Some(piece))) if piece.is_empty() => {}
                Ok(Ok(Some(piece))) => {
                    body.window.bytes += piece.len() as u64;
                    self.wire.received(piece.len() as u64);
                    body.window.turn(options)?;
                    return Ok(Some(piece));
                }
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(Failure::passing(chain(&error.without_url()))),
                Err(_) => body.window.turn(options)?,
            }
        }
    }
}

/// Whether TLS refused the server's certificate: trying again would not help.
fn untrusted(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        // An I/O error does not give the error that it wraps as its source, but that one's; and they wrap each other.
        let mut inner = error;
        while let Some(wrapped) = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            inner = wrapped;
        }
        let tls = inner.downcast_ref::<rustls::Error>();
        if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Window {
    fn new() -> Window {
        Window { waited: Duration::ZERO, bytes: 0 }
    }

    fn turn(&mut self, options: &HttpOptions) -> Result<(), Failure> {
        if self.waited < options.progress_window {
            return Ok(());
        }
        if self.bytes < options.progress_bytes {
            let why = format!("{} bytes in {:.1?}", self.bytes, self.waited);
            return Err(Failure::timed_out(why));
        }
        *self = Window::new();
        Ok(())
    }
}

/// What has failed since something last came.
struct Trouble {
    since: Option<Instant>,
    attempts: u32,
    /// Bytes since the last failure: a trickle is no progress.
    bytes: u64,
}

impl Trouble {
    fn new() -> Trouble {
        Trouble { since: None, attempts: 0, bytes: 0 }
    }

    fn received(&mut self, bytes: u64, options: &HttpOptions) {
        self.bytes += bytes;
        if self.bytes >= options.progress_bytes {
            *self = Trouble { bytes: self.bytes, ..Trouble::new() };
        }
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The failure as the reader is to be told of it, when there is to be none.
    async fn pause(&mut self, url: &SourceUrl, failure: Failure, options: &HttpOptions) -> Result<()> {
        let (why, timed_out, after) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { why, timed_out, after } => (why, timed_out, after),
        };
        self.attempts += 1;
        self.bytes = 0;
        let elapsed = self.since.get_or_insert_with(Instant::now).elapsed();
        let doubled =
            options.backoff_first.saturating_mul(1 << (self.attempts - 1).min(16)).min(options.backoff_max);
        let jittered = doubled.mul_f64(rand::random_range(0.5..=1.0));
        let pause = after.unwrap_or_default().max(jittered);
        tracing::debug!(url = url.shown(), why, attempt = self.attempts, ?pause, "an attempt failed");
        if self.attempts >= options.attempts_max || elapsed + pause > options.patience {
            let (url, attempts, last) = (url.shown(), self.attempts, why);
            return Err(match timed_out {
                true => Error::TimedOut { url, attempts, elapsed, last },
                false => Error::Unavailable { url, attempts, elapsed, last },
            });
        }
        sleep(pause).await;
        Ok(())
    }
}

/// A run of bytes of a pinned object.
pub(super) struct Reader {
    shared: Arc<Shared>,
    at: u64,
    end: u64,
    /// The run is the object: asked for without a range at first, so that any server will do.
    whole: bool,
    trouble: Trouble,
    body: Option<(Body, u64)>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, start: u64, end: u64) -> Reader {
        let whole = start == 0 && end == shared.length;
        Reader { shared, at: start, end, whole, trouble: Trouble::new(), body: None }
    }

    /// The next bytes, or `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        let shared = self.shared.clone();
        let options = shared.client.options();
        loop {
            if self.at == self.end {
                return Ok(None);
            }
            match self.attempt(&shared).await {
                Ok(piece) => {
                    self.at += piece.len() as u64;
                    self.trouble.received(piece.len() as u64, options);
                    return Ok(Some(piece));
                }
                Err(failure) => {
                    self.body = None;
                    self.trouble.pause(&shared.url, failure, options).await?;
                }
            }
        }
    }

    async fn attempt(&mut self, shared: &Shared) -> Result<Bytes, Failure> {
        let request =
            Request { client: &shared.client, url: &shared.url, target: &shared.target, wire: &shared.wire };
        // Servers may cut a range short; asking for the rest is no failure. Bounded, since each must bring something.
        loop {
            let (body, end) = match &mut self.body {
                Some(open) => open,
                None => self.body.insert(self.connect(shared, &request).await?),
            };
            let Some(mut piece) = request.piece(body).await? else {
                let (missing, short) = (*end - self.at, *end < self.end);
                self.body = None;
                match missing {
                    0 if short => continue,
                    _ => return Err(Failure::passing(format!("the body ended {missing} bytes early"))),
                }
            };
            if piece.len() as u64 > *end - self.at {
                return Err(request.malformed("more bytes came than were announced"));
            }
            piece.truncate((self.end - self.at) as usize);
            return Ok(piece);
        }
    }

    /// Opens a body that goes on at `self.at`, and says where it ends.
    async fn connect(&self, shared: &Shared, request: &Request<'_>) -> Result<(Body, u64), Failure> {
        let asked = match self.whole && self.at == 0 {
            true => Asked::Whole,
            false => Asked::Range { start: self.at, end: self.end },
        };
        let known = Known::from(shared.pin.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let sent = request.send(asked, &known).await;
        let sent = sent.and_then(|(body, answer)| shared.learn(&answer).map(|()| (body, answer)));
        if let Err(Failure::Final(Error::Changed { .. })) = &sent {
            shared.unlearn();
        }
        let (mut body, answer) = sent?;
        let end = answer.end.unwrap_or(shared.length);
        if answer.start == self.at {
            return Ok((body, end));
        }
        // The whole object where a part was asked for. Who reads all of it can pass over what is known already; anyone
        // else would download a gigabyte for a block.
        if !self.whole {
            return Err(Failure::Final(Error::NoRanges { url: shared.url.shown() }));
        }
        let mut skip = self.at;
        while skip > 0 {
            let Some(piece) = request.piece(&mut body).await? else {
                return Err(Failure::passing("the body ended early"));
            };
            let length = piece.len() as u64;
            if length > skip {
                // Pieces are not cut here: the next one must begin at `self.at`.
                body.pending = Some(piece.slice(skip as usize..));
            }
            skip = skip.saturating_sub(length);
        }
        Ok((body, end))
    }
}

impl Shared {
    /// Forgets what was learned beyond what was given at the beginning. A version that only an answer made known may have
    /// been the wrong one: the read that met another fails, later ones start anew, and digests tell which is right.
    fn unlearn(&self) {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.given);
    }

    /// Pins what an answer says and nobody knew yet.
    fn learn(&self, answer: &Answer) -> Result<(), Failure> {
        let mut pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner);
        let first = pin.etag.is_none() && pin.last_modified.is_none();
        if first {
            pin.etag.clone_from(&answer.etag);
            pin.last_modified.clone_from(&answer.last_modified);
        } else if let (Some(was), Some(is)) = (&pin.etag, &answer.etag)
            && was != is
        {
            // Two first answers at once, of two versions.
            let what = format!("its ETag was {was}, it is now {is}");
            return Err(Failure::Final(Error::Changed { url: self.url.shown(), what }));
        }
        Ok(())
    }
}

/// Asks for the first byte of an object, to learn its length and validators.
pub(super) async fn probe(
    client: &HttpClient,
    url: &SourceUrl,
    target: &Target,
    wire: &WireCounters,
) -> Result<Pin> {
    let request = Request { client, url, target, wire };
    let mut trouble = Trouble::new();
    loop {
        match request.send(Asked::Range { start: 0, end: 1 }, &Known::default()).await {
            Ok((mut body, answer)) => {
                if answer.ranges {
                    // Read to its end, so that the connection can be used again.
                    let _ = request.piece(&mut body).await;
                }
                let length = answer.total.ok_or_else(|| Error::Malformed {
                    url: url.shown(),
                    why: "the server does not say how long it is".to_owned(),
                })?;
                let (etag, last_modified) = (answer.etag, answer.last_modified);
                return Ok(Pin { length, etag, last_modified, ..Pin::default() });
            }
            Err(failure) => trouble.pause(url, failure, client.options()).await?,
        }
    }
}

/// Fetches an object of at most `limit` bytes whole.
pub(super) async fn whole(
    client: &HttpClient,
    url: &SourceUrl,
    target: &Target,
    wire: &WireCounters,
    limit: u64,
) -> Result<(Bytes, Pin)> {
    let request = Request { client, url, target, wire };
    let mut trouble = Trouble::new();
    loop {
        match attempt_whole(&request, limit).await {
            Ok(fetched) => return Ok(fetched),
            Err(failure) => trouble.pause(url, failure, client.options()).await?,
        }
    }
}

async fn attempt_whole(request: &Request<'_>, limit: u64) -> Result<(Bytes, Pin), Failure> {
    let too_long = || Failure::Final(Error::TooLong { url: request.url.shown(), limit });
    let (mut body, answer) = request.send(Asked::Whole, &Known::default()).await?;
    if answer.total.is_some_and(|total| total > limit) {
        return Err(too_long());
    }
    let mut bytes = BytesMut::with_capacity(answer.total.unwrap_or(0) as usize);
    while let Some(piece) = request.piece(&mut body).await? {
        if bytes.len() as u64 + piece.len() as u64 > limit {
            return Err(too_long());
        }
        bytes.extend_from_slice(&piece);
    }
    if let Some(total) = answer.total.filter(|total| *total != bytes.len() as u64) {
        return Err(Failure::passing(format!("{} of {total} bytes came", bytes.len())));
    }
    let pin = Pin {
        length: bytes.len() as u64,
        etag: answer.etag,
        last_modified: answer.last_modified,
        ..Pin::default()
    };
    Ok((bytes.freeze(), pin))
}

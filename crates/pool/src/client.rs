//! The other end of the daemon's control socket: HTTP and JSON over a Unix socket in the pool's `run` directory.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::directory::PoolDirectory;
use crate::error::{Error, Result};
use crate::indexes::Watch;
use crate::launch::is_held;
use crate::protocol::{Failure, JobLine, Progress};

/// The longest answer, or line of a streamed answer, that is taken from a daemon.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// How often a question that changes nothing is asked when the daemon dies over the answer.
const ATTEMPTS_MAX: u32 = 3;

/// What is told when the answer to long work ends without its last line.
const DIED: &str = "it died during the work: what was not finished is undone when it starts again; loam ls shows what is there";

/// How long a daemon that died may take to be there again.
const RESTART_PATIENCE: Duration = Duration::from_secs(10);

/// Talks to the daemon of one pool. Each request has its own connection, so a client has no state to lose.
#[derive(Debug, Clone)]
pub struct Client {
    directory: PoolDirectory,
}

impl Client {
    /// A client for the pool in `directory`. Nothing is connected yet.
    pub fn new(directory: &PoolDirectory) -> Self {
        Client { directory: directory.clone() }
    }

    /// Whether a daemon answers on the socket.
    pub async fn is_up(&self) -> bool {
        let Ok(stream) = self.connect().await else { return false };
        self.send_on(stream, Method::GET, "/ready", None)
            .await
            .is_ok_and(|answer| answer.status().is_success())
    }

    /// `GET path`.
    ///
    /// # Errors
    /// [`Error::NoPool`]; [`Error::NotUp`] when nothing listens; [`Error::Daemon`] with the daemon's own words; [`Error::Control`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let answer = async {
                let response = self.send(Method::GET, path, None).await?;
                self.decode(self.whole_body(response).await?)
            };
            match answer.await {
                // It died over the answer. Asking changes nothing, so the next daemon is asked.
                Err(Error::Control { .. }) if attempts < ATTEMPTS_MAX && self.is_held() => {}
                answer => return answer,
            }
        }
    }

    /// `POST path` with a JSON body, or without one.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        let response = self.send(Method::POST, path, Some(self.encode(body)?)).await?;
        self.decode(self.whole_body(response).await?)
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn delete(&self, path: &str) -> Result<()> {
        let response = self.send(Method::DELETE, path, None).await?;
        self.whole_body(response).await.map(drop)
    }

    /// `POST path` for long work: the answer is a stream of [`JobLine`]s; progress and notes go to `watch`.
    /// Dropping the future closes the connection, which tells the daemon to stop and undo.
    ///
    /// # Errors
    /// As [`Client::get`], and the job's own failure as [`Error::Daemon`].
    pub async fn job<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        watch: &dyn Watch,
    ) -> Result<T> {
        let response = self.send(Method::POST, path, Some(self.encode(body)?)).await?;
        let mut body = self.checked(response).await?;
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| self.control(DIED))?;
            let Ok(data) = frame.into_data() else { continue };
            if pending.len() + data.len() > MAX_ANSWER_BYTES {
                return Err(self.control("an answer longer than any should be"));
            }
            pending.extend_from_slice(&data);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                match self.decode(Bytes::from(line))? {
                    JobLine::Progress(Progress { step, done, total, unit }) => {
                        watch.progress(&step, done, total, &unit)
                    }
                    JobLine::Note(note) => watch.note(note),
                    JobLine::Done(result) => return Ok(result),
                    JobLine::Failed(failure) => return Err(daemon_error(failure)),
                }
            }
        }
        Err(self.control(DIED))
    }

    async fn connect(&self) -> Result<UnixStream> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        let socket = self.directory.control_socket();
        UnixStream::connect(&socket).await.map_err(|error| match error.kind() {
            NotFound | ConnectionRefused if self.directory.exists() => {
                Error::NotUp(self.directory.root().to_owned())
            }
            NotFound => Error::NoPool(self.directory.root().to_owned()),
            _ => self.control(format!("connecting to {}: {error}", socket.display())),
        })
    }

    /// Whether somebody starts the daemon again when it dies.
    fn is_held(&self) -> bool {
        self.directory.run().exists() && is_held(&self.directory).unwrap_or(false)
    }

    /// Connects; a daemon that its holder is starting again is waited for.
    async fn connect_patiently(&self) -> Result<UnixStream> {
        let began = Instant::now();
        loop {
            match self.connect().await {
                Err(Error::NotUp(_)) if began.elapsed() < RESTART_PATIENCE && self.is_held() => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                result => return result,
            }
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Response<Incoming>> {
        let stream = self.connect_patiently().await?;
        self.send_on(stream, method, path, body).await
    }

    async fn send_on(
        &self,
        stream: UnixStream,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.control(error.to_string()))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "loam")
            .header("content-type", "application/json")
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|error| self.control(error.to_string()))?;
        sender.send_request(request).await.map_err(|error| self.control(format!("no answer: {error}")))
    }

    async fn checked(&self, response: Response<Incoming>) -> Result<Incoming> {
        if response.status().is_success() {
            return Ok(response.into_body());
        }
        let status = response.status();
        let body = self.collect(response.into_body()).await?;
        Err(match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => daemon_error(failure),
            Err(_) if status == StatusCode::NOT_FOUND => self.control("it does not know this request"),
            Err(_) => self.control(format!("it answered {status}")),
        })
    }

    async fn whole_body(&self, response: Response<Incoming>) -> Result<Bytes> {
        let body = self.checked(response).await?;
        self.collect(body).await
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes> {
        let limited = http_body_util::Limited::new(body, MAX_ANSWER_BYTES);
        let collected = limited.collect().await;
        Ok(collected.map_err(|error| self.control(format!("the answer broke off: {error}")))?.to_bytes())
    }

    fn encode<B: Serialize>(&self, body: &B) -> Result<Bytes> {
        serde_json::to_vec(body).map(Bytes::from).map_err(|error| self.control(error.to_string()))
    }

    fn decode<T: DeserializeOwned>(&self, body: Bytes) -> Result<T> {
        serde_json::from_slice(&body)
            .map_err(|error| self.control(format!("an answer that does not parse: {error}")))
    }

    fn control(&self, why: impl Into<String>) -> Error {
        Error::Control { pool: self.directory.root().to_owned(), why: why.into() }
    }
}

fn daemon_error(failure: Failure) -> Error {
    Error::Daemon { message: failure.error, hint: failure.hint }
}

//! A small HTTP/1.1 server that does wrong what a test tells it to.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// What happens to one request instead of the right answer.
#[derive(Clone, Debug)]
pub enum Fault {
    Status(u16, &'static str),
    /// The right head, so many bytes of the body, and the end of the connection.
    Truncate(usize),
    /// Closes without an answer.
    Hang,
    /// Keeps the connection and says nothing.
    Silent,
    /// The right head, then a byte now and then.
    Drip,
    /// 200 and everything, as if there were no ranges.
    NoRanges,
    /// A Content-Range that begins one byte early.
    WrongRange,
    /// A chunked body with bytes to spare.
    TooMany,
    /// Half of the range that was asked for, correctly labelled.
    Half,
    Redirect(String),
    Encoded,
}

pub struct State {
    pub bytes: Mutex<Vec<u8>>,
    pub etag: Mutex<Option<String>>,
    pub faults: Mutex<VecDeque<Fault>>,
    /// Applied to every request when there is none in `faults`.
    pub always: Mutex<Option<Fault>>,
    pub requests: AtomicU64,
    pub connections: AtomicU64,
    pub ranges: Mutex<Vec<Option<(u64, u64)>>>,
    /// Requests that were in work at once, now and at most.
    pub busy: AtomicU64,
    pub busiest: AtomicU64,
    pub delay: Mutex<Duration>,
}

pub struct Server {
    pub state: Arc<State>,
    pub address: SocketAddr,
    task: Option<AbortHandle>,
}

impl Server {
    pub async fn start(bytes: Vec<u8>) -> Server {
        let state = Arc::new(State {
            bytes: Mutex::new(bytes),
            etag: Mutex::new(Some("\"one\"".into())),
            faults: Mutex::default(),
            always: Mutex::default(),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            ranges: Mutex::default(),
            busy: AtomicU64::new(0),
            busiest: AtomicU64::new(0),
            delay: Mutex::default(),
        });
        let mut server = Server { state, address: "127.0.0.1:0".parse().unwrap(), task: None };
        server.up().await;
        server
    }

    pub fn url(&self) -> String {
        format!("http://{}/x", self.address)
    }

    pub fn fault(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.faults.lock().unwrap().extend(faults);
    }

    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Listens (again) at the same address.
    pub async fn up(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let state = self.state.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task, and all connections with it.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                state.connections.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(stream, state.clone()));
            }
        });
        self.task = Some(task.abort_handle());
    }

    /// Stops listening and cuts all connections.
    pub async fn down(&mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        while !task.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn serve(mut stream: TcpStream, state: Arc<State>) -> Option<()> {
    let mut head = Vec::new();
    loop {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let text = String::from_utf8(std::mem::take(&mut head)).ok()?.to_lowercase();
        state.requests.fetch_add(1, Ordering::SeqCst);
        let busy = state.busy.fetch_add(1, Ordering::SeqCst) + 1;
        state.busiest.fetch_max(busy, Ordering::SeqCst);
        let delay = *state.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        let done = answer(&mut stream, &state, &text).await;
        state.busy.fetch_sub(1, Ordering::SeqCst);
        done?;
    }
}

fn range_of(text: &str) -> Option<(u64, u64)> {
    let (_, rest) = text.split_once("range: bytes=")?;
    let (start, rest) = rest.split_once('-')?;
    let last: u64 = rest.split("\r\n").next()?.parse().ok()?;
    Some((start.parse().ok()?, last + 1))
}

async fn answer(stream: &mut TcpStream, state: &State, text: &str) -> Option<()> {
    let fault = state.faults.lock().unwrap().pop_front().or_else(|| state.always.lock().unwrap().clone());
    let bytes = state.bytes.lock().unwrap().clone();
    let etag = state.etag.lock().unwrap().clone().map_or(String::new(), |tag| format!("etag: {tag}\r\n"));
    let total = bytes.len() as u64;
    let mut range = range_of(text);
    state.ranges.lock().unwrap().push(range);
    let mut extra = "";
    let mut limit = usize::MAX;
    let mut shift = 0;
    match &fault {
        Some(Fault::Hang) => return None,
        Some(Fault::Silent) => {
            tokio::time::sleep(Duration::from_secs(100)).await;
            return None;
        }
        Some(Fault::Status(status, headers)) => {
            let head = format!("HTTP/1.1 {status} Told So\r\ncontent-length: 4\r\n{headers}\r\nno.\n");
            return stream.write_all(head.as_bytes()).await.ok();
        }
        Some(Fault::Redirect(to)) => {
            let head = format!("HTTP/1.1 302 Over There\r\ncontent-length: 0\r\nlocation: {to}\r\n\r\n");
            return stream.write_all(head.as_bytes()).await.ok();
        }
        Some(Fault::NoRanges) => range = None,
        Some(Fault::Truncate(bytes)) => limit = *bytes,
        Some(Fault::WrongRange) => shift = 1,
        Some(Fault::Half) => range = range.map(|(start, end)| (start, start + (end - start).div_ceil(2))),
        Some(Fault::Encoded) => extra = "content-encoding: gzip\r\n",
        Some(Fault::Drip | Fault::TooMany) | None => {}
    }
    if let Some((start, _)) = range.filter(|(start, _)| *start >= total) {
        let head = format!("HTTP/1.1 416 No\r\ncontent-length: 0\r\ncontent-range: bytes */{total}\r\n\r\n");
        let _ = start;
        return stream.write_all(head.as_bytes()).await.ok();
    }
    let (start, end) = range.map_or((0, total), |(start, end)| (start, end.min(total)));
    let body = &bytes[start as usize..end as usize];
    let status = match range {
        Some(_) => {
            let (from, to) = (start - shift, end - 1 - shift);
            format!("206 Partial Content\r\ncontent-range: bytes {from}-{to}/{total}")
        }
        None => "200 OK".to_owned(),
    };
    if matches!(fault, Some(Fault::TooMany)) {
        let head =
            format!("HTTP/1.1 {status}\r\n{etag}transfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len() + 9);
        stream.write_all(head.as_bytes()).await.ok()?;
        stream.write_all(body).await.ok()?;
        return stream.write_all(b"and more!\r\n0\r\n\r\n").await.ok();
    }
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{etag}{extra}\r\n", body.len());
    stream.write_all(head.as_bytes()).await.ok()?;
    if text.starts_with("head ") {
        return Some(());
    }
    if matches!(fault, Some(Fault::Drip)) {
        for byte in body {
            stream.write_all(&[*byte]).await.ok()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        return Some(());
    }
    stream.write_all(&body[..body.len().min(limit)]).await.ok()?;
    if limit < body.len() {
        return None;
    }
    Some(())
}

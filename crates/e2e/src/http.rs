//! [`FileServer`]: a small HTTP/1.1 file server on loopback with Range and ETag, and with every bad day a test needs:
//! gone, slow, answering errors, or serving other bytes under the same name.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes sent between two looks at whether the server is to be gone.
const PIECE: usize = 64 << 10;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// The file's name, without the leading slash.
    pub name: String,
    /// First and last byte of the range asked for.
    pub range: Option<(u64, u64)>,
}

/// What the server has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Requests answered, with whatever status.
    pub requests: u64,
    /// Bytes of bodies sent.
    pub bytes: u64,
    /// Connections accepted.
    pub connections: u64,
}

#[derive(Clone)]
struct Served {
    bytes: Arc<Vec<u8>>,
    etag: String,
}

#[derive(Default)]
struct State {
    files: Mutex<HashMap<String, Served>>,
    log: Mutex<Vec<Request>>,
    connections: Mutex<Vec<TcpStream>>,
    gone: AtomicBool,
    delay_ms: AtomicU64,
    failures: AtomicU32,
    failure_status: AtomicU32,
    requests: AtomicU64,
    bytes: AtomicU64,
    accepted: AtomicU64,
}

/// The server; it ends when dropped.
pub struct FileServer {
    address: SocketAddr,
    state: Arc<State>,
    acceptor: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl FileServer {
    /// A server on a free port of loopback, with nothing in it.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().unwrap();
        let mut server = FileServer { address, state: Arc::default(), acceptor: None };
        server.accept_on(listener);
        server
    }

    fn accept_on(&mut self, listener: TcpListener) {
        let state = Arc::clone(&self.state);
        state.gone.store(false, Ordering::SeqCst);
        self.acceptor = Some(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if state.gone.load(Ordering::SeqCst) {
                    return;
                }
                state.accepted.fetch_add(1, Ordering::Relaxed);
                if let Ok(copy) = stream.try_clone() {
                    lock(&state.connections).push(copy);
                }
                let state = Arc::clone(&state);
                std::thread::spawn(move || {
                    let _ = serve(&state, &stream);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        }));
    }

    /// Serves `bytes` under `name`, with an ETag made from them.
    pub fn put(&self, name: &str, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        self.put_with_etag(name, bytes, &format!("{sum:016x}"));
    }

    /// Serves `bytes` under `name` with an ETag of the caller's choice: the same tag with other bytes is a server
    /// that lies.
    pub fn put_with_etag(&self, name: &str, bytes: impl Into<Vec<u8>>, etag: &str) {
        let served = Served { bytes: Arc::new(bytes.into()), etag: format!("\"{etag}\"") };
        lock(&self.state.files).insert(name.to_string(), served);
    }

    /// Replaces the bytes and keeps the ETag: the change that only a digest finds.
    pub fn replace_silently(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut files = lock(&self.state.files);
        let served = files.get_mut(name).unwrap_or_else(|| panic!("{name} is not served"));
        change(Arc::make_mut(&mut served.bytes));
    }

    /// No longer serves `name`: 404.
    pub fn remove(&self, name: &str) {
        lock(&self.state.files).remove(name);
    }

    /// `http://127.0.0.1:PORT/NAME`.
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        Counters {
            requests: self.state.requests.load(Ordering::Relaxed),
            bytes: self.state.bytes.load(Ordering::Relaxed),
            connections: self.state.accepted.load(Ordering::Relaxed),
        }
    }

    /// Every request since the start, in order.
    pub fn log(&self) -> Vec<Request> {
        lock(&self.state.log).clone()
    }

    /// Each answer waits this long first.
    pub fn set_delay(&self, delay: Duration) {
        self.state.delay_ms.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// The next `count` requests are answered with `status` and no body.
    pub fn fail_next(&self, count: u32, status: u16) {
        self.state.failure_status.store(u32::from(status), Ordering::SeqCst);
        self.state.failures.store(count, Ordering::SeqCst);
    }

    /// Gone: connections are cut in the middle of whatever they carry, and the port refuses new ones.
    pub fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.state.gone.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = acceptor.join();
        for connection in lock(&self.state.connections).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Back, on the same port.
    pub fn resume(&mut self) {
        if self.acceptor.is_none() {
            let listener = TcpListener::bind(self.address).expect("the port was ours a moment ago");
            self.accept_on(listener);
        }
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Answers one connection's requests until it closes.
fn serve(state: &State, stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader)? {
        lock(&state.log).push(request.clone());
        state.requests.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(state.delay_ms.load(Ordering::Relaxed)));
        if state.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            let status = state.failure_status.load(Ordering::SeqCst);
            write!(&*stream, "HTTP/1.1 {status} Bad Day\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let served = lock(&state.files).get(&request.name).cloned();
        match served {
            Some(served) => answer(state, stream, &request, &served)?,
            None => write!(&*stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?,
        }
    }
    Ok(())
}

fn answer(state: &State, mut stream: &TcpStream, request: &Request, served: &Served) -> std::io::Result<()> {
    let length = served.bytes.len() as u64;
    let tag = &served.etag;
    let common = format!("Accept-Ranges: bytes\r\nETag: {tag}\r\nContent-Type: application/octet-stream\r\n");
    let (first, end) = match request.range {
        None => (0, length),
        Some((first, last)) if first < length => (first, length.min(last.saturating_add(1))),
        Some(_) => {
            return write!(
                stream,
                "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{length}\r\nContent-Length: 0\r\n\r\n"
            );
        }
    };
    let body = &served.bytes[usize::try_from(first).unwrap()..usize::try_from(end).unwrap()];
    let status = match request.range {
        None => "200 OK\r\n".to_string(),
        Some(_) => format!("206 Partial Content\r\nContent-Range: bytes {first}-{}/{length}\r\n", end - 1),
    };
    write!(stream, "HTTP/1.1 {status}{common}Content-Length: {}\r\n\r\n", body.len())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    for piece in body.chunks(PIECE) {
        stream.write_all(piece)?;
        state.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// The next request's head, or `None` when the peer is done.
fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_string();
    let name = words.next().unwrap_or_default().trim_start_matches('/').to_string();
    let mut range = None;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Ok(None);
        }
        let header = header.trim_end();
        if header.is_empty() {
            return Ok(Some(Request { method, name, range }));
        }
        if let Some((key, value)) = header.split_once(':')
            && key.eq_ignore_ascii_case("range")
        {
            range = parse_range(value.trim());
        }
    }
}

/// `bytes=FIRST-[LAST]`: one range, as loam sends them.
fn parse_range(value: &str) -> Option<(u64, u64)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, if last.is_empty() { u64::MAX } else { last.parse().ok()? }))
}

//! [`Shaper`]: a TCP proxy on loopback that stands for a link of a given round trip and bandwidth, and counts what goes
//! through it. For kernels without netem, and the same on every machine.
//!
//! Each connection pays one round trip before its first byte, as a TCP handshake does; every byte is delayed by half
//! a round trip in either direction; all bytes from server to client share one link. It is an ideal link: no slow
//! start, no loss, no queue beyond [`QUEUE_PIECES`]. So times are lower bounds for the real thing, for every
//! case alike.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that travel as one piece: 1.3 ms of a link of 100 Mbit/s.
const PIECE: usize = 16 << 10;
/// Pieces under way in one direction of one connection (4 MiB): above the bandwidth-delay product of any [`Link`]
/// worth measuring.
const QUEUE_PIECES: usize = 256;
/// A piece is handed on when it is due within this; sleeping for less is not precise.
const PACING: Duration = Duration::from_millis(1);

/// A link: round trip and bandwidth. Written `20ms,100mbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// From a request to the first byte of its answer, at best.
    pub round_trip: Duration,
    /// Megabits (10^6) in a second, from server to client.
    pub megabits: u32,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}ms,{}mbit", self.round_trip.as_millis(), self.megabits)
    }
}

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (delay, rate) = text.split_once(',')?;
            let round_trip = Duration::from_millis(delay.strip_suffix("ms")?.parse::<u32>().ok()?.into());
            let megabits = rate.strip_suffix("mbit")?.parse().ok().filter(|megabits| *megabits > 0)?;
            Some(Link { round_trip, megabits })
        };
        parse().ok_or_else(|| format!("`{text}` is no link: write for example 20ms,100mbit"))
    }
}

/// What went through a [`Shaper`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from server to client, headers included.
    pub down_bytes: u64,
    /// Bytes from client to server.
    pub up_bytes: u64,
    /// Connections.
    pub connections: u64,
    /// HTTP requests (heads without a body: GET, HEAD).
    pub requests: u64,
}

#[derive(Debug)]
struct Shared {
    link: Link,
    target: SocketAddr,
    /// When the link is free for the next piece.
    free_at: Mutex<Instant>,
    ended: AtomicBool,
    down: AtomicU64,
    up: AtomicU64,
    connections: AtomicU64,
    requests: AtomicU64,
}

/// The proxy; it takes no more connections once dropped.
#[derive(Debug)]
pub struct Shaper {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Shaper {
    /// Listens on a free port of loopback and leads every connection to `target`.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(link: Link, target: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            link,
            target,
            free_at: Mutex::new(Instant::now()),
            ended: AtomicBool::new(false),
            down: AtomicU64::new(0),
            up: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for client in listener.incoming().flatten() {
                    if shared.ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || connect(&shared, client));
                }
            }
        });
        Ok(Shaper { address, shared, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has gone through so far.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            down_bytes: self.shared.down.load(Ordering::Relaxed),
            up_bytes: self.shared.up.load(Ordering::Relaxed),
            connections: self.shared.connections.load(Ordering::Relaxed),
            requests: self.shared.requests.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// One connection: the handshake's round trip, then both directions until both are closed.
fn connect(shared: &Arc<Shared>, client: TcpStream) {
    shared.connections.fetch_add(1, Ordering::Relaxed);
    std::thread::sleep(shared.link.round_trip);
    let Ok(server) = TcpStream::connect(shared.target) else { return };
    let (Ok(()), Ok(())) = (client.set_nodelay(true), server.set_nodelay(true)) else { return };
    let (Ok(client_copy), Ok(server_copy)) = (client.try_clone(), server.try_clone()) else { return };
    let down = std::thread::spawn({
        let shared = Arc::clone(shared);
        move || {
            carry(&server_copy, &client_copy, shared.link.round_trip / 2, |bytes| {
                shared.down.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                departure(&shared, bytes.len())
            });
        }
    });
    let mut heads = HeadCounter::default();
    carry(&client, &server, shared.link.round_trip / 2, |bytes| {
        shared.up.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        shared.requests.fetch_add(heads.count(bytes), Ordering::Relaxed);
        Instant::now()
    });
    let _ = down.join();
}

/// When `length` bytes have left the server: the link carries one piece after the other.
fn departure(shared: &Shared, length: usize) -> Instant {
    let seconds = length as f64 * 8.0 / (f64::from(shared.link.megabits) * 1e6);
    let mut free_at = shared.free_at.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    *free_at = Instant::now().max(*free_at) + Duration::from_secs_f64(seconds);
    *free_at
}

/// Copies one direction: each piece arrives `delay` after the instant at which `depart` says that it left.
fn carry(mut from: &TcpStream, to: &TcpStream, delay: Duration, mut depart: impl FnMut(&[u8]) -> Instant) {
    let (sender, receiver): (SyncSender<(Instant, Vec<u8>)>, Receiver<_>) = sync_channel(QUEUE_PIECES);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut to = to;
            for (due, bytes) in receiver {
                sleep_until(due);
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let left = depart(&buffer[..length]);
            sleep_until(left);
            if sender.send((left + delay, buffer[..length].to_vec())).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Read);
        drop(sender);
    });
}

fn sleep_until(due: Instant) {
    let wait = due.saturating_duration_since(Instant::now());
    if wait > PACING {
        std::thread::sleep(wait);
    }
}

/// Counts the ends of request heads (an empty line) in a stream that arrives in pieces.
#[derive(Debug, Default)]
struct HeadCounter {
    matched: usize,
}

impl HeadCounter {
    fn count(&mut self, bytes: &[u8]) -> u64 {
        const END: &[u8] = b"\r\n\r\n";
        let mut heads = 0;
        for byte in bytes {
            self.matched = match *byte {
                byte if byte == END[self.matched] => self.matched + 1,
                b'\r' => 1,
                _ => 0,
            };
            if self.matched == END.len() {
                heads += 1;
                self.matched = 0;
            }
        }
        heads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_counted_across_pieces() {
        let mut counter = HeadCounter::default();
        let stream = b"GET / HTTP/1.1\r\nA: b\r\n\r\nGET /x HTTP/1.1\r\n\r\r\n\r\n";
        let whole = counter.count(stream);
        let pieces: u64 = stream.chunks(3).map(|piece| counter.count(piece)).sum();
        assert_eq!((whole, pieces), (2, 2));
    }

    #[test]
    fn links_parse_and_print() {
        let link: Link = "20ms,100mbit".parse().unwrap();
        assert_eq!(link, Link { round_trip: Duration::from_millis(20), megabits: 100 });
        assert_eq!(link.to_string(), "20ms,100mbit");
        for wrong in ["", "20ms", "20,100", "20ms,0mbit", "20ms,100mbit,", "-1ms,5mbit"] {
            assert!(wrong.parse::<Link>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_link_delays_and_limits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&vec![7; 500_000]).unwrap();
        });
        let link = Link { round_trip: Duration::from_millis(40), megabits: 40 };
        let shaper = Shaper::start(link, target).unwrap();
        let started = Instant::now();
        let mut client = TcpStream::connect(shaper.address()).unwrap();
        client.write_all(b"x").unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        let elapsed = started.elapsed();
        server.join().unwrap();
        assert_eq!(answer.len(), 500_000);
        // A handshake and a request at 40 ms each, 4 Mbit at 40 Mbit/s: 180 ms.
        assert!(elapsed >= Duration::from_millis(175), "{elapsed:?}");
        let traffic = shaper.traffic();
        assert_eq!((traffic.down_bytes, traffic.up_bytes, traffic.connections), (500_000, 1, 1));
    }
}

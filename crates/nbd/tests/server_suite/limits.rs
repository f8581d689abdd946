//! Memory, time and numbers: what a client can not do to a server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_block::{BlockDevice, MemoryDevice, WriteFlags};
use loam_nbd::protocol::{Command, CommandFlags, HeaderStyle, Request};
use loam_nbd::server::{Export, Server, ServerOptions};
use tokio::io::AsyncReadExt;

use crate::peer::{Peer, Slow, connect, ended, export, filled, ready, request};

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("resident pages") * 4096
}

fn server_with(device: impl BlockDevice + 'static, options: ServerOptions) -> Arc<Server> {
    Server::new(vec![export("", Arc::new(device))], options).expect("one export")
}

/// 10,000 reads of 32 MiB, and nobody takes the answers.
async fn flood(device: impl BlockDevice + 'static, style: HeaderStyle) -> u64 {
    let server = server_with(device, ServerOptions::default());
    let mut peer = ready(&server, style).await;
    let before = resident();
    let flood = async {
        for cookie in 0..10_000 {
            peer.send(&request(Command::Read, cookie, 0, 32 << 20), &[]).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), flood).await;
    resident().saturating_sub(before)
}

#[tokio::test]
async fn requests_without_end_do_not_cost_memory_without_end() {
    for style in [HeaderStyle::Simple, HeaderStyle::Structured] {
        let grown = flood(filled(32 << 20), style).await;
        assert!(grown < 100 << 20, "{} MiB for a device that does not wait, {style:?}", grown >> 20);
        let slow = Slow { below: filled(32 << 20), slow_below: u64::MAX, delay: Duration::from_millis(1) };
        let grown = flood(slow, style).await;
        assert!(grown < 200 << 20, "{} MiB for one that does, {style:?}", grown >> 20);
    }
}

#[tokio::test]
async fn writes_that_wait_are_not_taken_without_end() {
    let slow =
        Slow { below: MemoryDevice::new(1 << 30), slow_below: u64::MAX, delay: Duration::from_secs(3600) };
    let options = ServerOptions { connection_memory: 8 << 20, ..ServerOptions::default() };
    let mut peer = ready(&server_with(slow, options), HeaderStyle::Simple).await;
    let data = vec![1; 1 << 20];
    let mut taken = 0;
    let flood = async {
        for cookie in 0..1000 {
            peer.send(&request(Command::Write, cookie, cookie << 20, 1 << 20), &data).await;
            taken += 1;
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(500), flood).await;
    assert!((7..=10).contains(&taken), "{taken} MiB");
}

#[tokio::test]
async fn a_request_larger_than_the_memory_is_served_alone() {
    let options = ServerOptions { connection_memory: 1 << 20, ..ServerOptions::default() };
    let slow = Slow { below: filled(8 << 20), slow_below: u64::MAX, delay: Duration::from_millis(1) };
    let mut peer = ready(&server_with(slow, options), HeaderStyle::Simple).await;
    for cookie in 0..3 {
        peer.send(&request(Command::Read, cookie, 0, 8 << 20), &[]).await;
    }
    for _ in 0..3 {
        assert_eq!(peer.reply().await.1.error, None);
    }
}

#[tokio::test]
async fn a_client_that_takes_no_replies_is_left() {
    let options = ServerOptions { stall_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let (mut peer, served) = connect(&server_with(filled(32 << 20), options));
    peer.greet().await;
    peer.go("").await;
    let begin = Instant::now();
    peer.send(&request(Command::Read, 1, 0, 32 << 20), &[]).await;
    let error = ended(served).await.expect_err("it stalls");
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(begin.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn a_client_that_stops_inside_a_request_is_left_and_an_idle_one_is_not() {
    let options = ServerOptions { stall_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let server = server_with(filled(1 << 20), options);
    let mut idle = ready(&server, HeaderStyle::Simple).await;
    idle.expect_alive().await;
    let write = request(Command::Write, 1, 0, 200_000).encode_compact().expect("32 bits");
    for begun in [&write[..10], &[&write[..], &[1; 5000]].concat()] {
        let (mut peer, served) = connect(&server);
        peer.greet().await;
        peer.go("").await;
        peer.write(begun).await;
        let error = ended(served).await.expect_err("it stalls");
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }
    idle.expect_alive().await;
}

#[tokio::test]
async fn a_device_that_takes_long_is_not_the_clients_fault() {
    let options = ServerOptions { stall_timeout: Duration::from_millis(100), ..ServerOptions::default() };
    let slow = Slow { below: filled(4096), slow_below: u64::MAX, delay: Duration::from_millis(600) };
    let mut peer = ready(&server_with(slow, options), HeaderStyle::Simple).await;
    peer.expect_alive().await;
}

#[tokio::test]
async fn a_handshake_that_goes_nowhere_ends() {
    let options = ServerOptions { handshake_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let server = server_with(filled(4096), options);
    for says in [&b""[..], b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\x10\0half"] {
        let (mut peer, served) = connect(&server);
        peer.write(says).await;
        let error = ended(served).await.expect_err("too slow");
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }
}

#[tokio::test]
async fn a_byte_at_a_time_is_enough() {
    let (mut peer, _) = connect(&server_with(MemoryDevice::new(1 << 20), ServerOptions::default()));
    peer.greet().await;
    peer.go("").await;
    let mut bytes = request(Command::Write, 1, 100, 50).encode_compact().expect("32 bits").to_vec();
    bytes.extend_from_slice(&[7; 50]);
    bytes.extend_from_slice(&request(Command::Read, 2, 100, 50).encode_compact().expect("32 bits"));
    for byte in bytes {
        peer.write(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(peer.reply().await.0, 1);
    assert_eq!(peer.read::<16>().await[4..8], [0; 4]);
    assert_eq!(peer.read::<50>().await, [7; 50]);
}

#[tokio::test]
async fn a_thousand_idle_connections_cost_little() {
    let device = Arc::new(filled(1 << 20));
    let server = Server::new(vec![export("", device)], ServerOptions::default()).expect("one export");
    let before = resident();
    let mut peers: Vec<Peer> = Vec::new();
    for _ in 0..1000 {
        let mut peer = ready(&server, HeaderStyle::Structured).await;
        // Fills the output buffer: without giving it back this would be 64 MiB.
        let reply = peer.ask(&request(Command::Read, 1, 0, 65_536), &[]).await;
        assert_eq!(reply.error, None);
        peers.push(peer);
    }
    // All have been busy; after a moment all are idle.
    let begin = Instant::now();
    let grown = || resident().saturating_sub(before);
    while grown() > 40 << 20 && begin.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(grown() < 40 << 20, "{} KiB for each connection, both ends", grown() >> 10 >> 10);
    for peer in &mut peers {
        peer.expect_alive().await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_in_mid_request_takes_nothing_with_it() {
    let device = Arc::new(MemoryDevice::new(1 << 20));
    let server = Server::new(vec![export("", device.clone())], ServerOptions::default()).expect("one export");
    let (mut peer, served) = connect(&server);
    peer.greet().await;
    peer.go("").await;
    let write = request(Command::Write, 1, 0, 100_000).encode_compact().expect("32 bits");
    peer.write(&[&write[..], &[9; 50_000]].concat()).await;
    drop(peer);
    ended(served).await.expect("the client left");
    assert_eq!(device.allocated_bytes(), 0, "half a write is none");
    let mut other = ready(&server, HeaderStyle::Simple).await;
    other.expect_alive().await;
}

#[tokio::test]
async fn writes_in_flight_are_finished_when_the_client_closes_its_side() {
    let memory = Arc::new(MemoryDevice::new(1 << 20));
    struct Shared(Arc<MemoryDevice>);
    impl BlockDevice for Shared {
        fn geometry(&self) -> loam_block::Geometry {
            self.0.geometry()
        }
        fn capabilities(&self) -> loam_block::Capabilities {
            self.0.capabilities()
        }
        fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> loam_block::Io<'a, ()> {
            self.0.read(offset, buffer)
        }
        fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> loam_block::Io<'a, ()> {
            self.0.write(offset, data, flags)
        }
    }
    let slow =
        Slow { below: Shared(memory.clone()), slow_below: u64::MAX, delay: Duration::from_millis(200) };
    let (mut peer, served) = connect(&server_with(slow, ServerOptions::default()));
    peer.greet().await;
    peer.go("").await;
    let write = Request { flags: CommandFlags::empty(), ..request(Command::Write, 1, 0, 4096) };
    peer.send(&write, &[3; 4096]).await;
    tokio::io::AsyncWriteExt::shutdown(&mut peer.stream).await.expect("half closed");
    let mut answer = Vec::new();
    peer.stream.read_to_end(&mut answer).await.expect("the answer and the end");
    assert_eq!(answer.len(), 16);
    ended(served).await.expect("a proper end");
    assert!(memory.allocated_bytes() > 0);
}

#[tokio::test]
async fn many_connections_share_one_device() {
    let device = Arc::new(MemoryDevice::new(64 << 20));
    let exports: Vec<Export> = (0..3).map(|n| export(&format!("e{n}"), device.clone())).collect();
    let server = Server::new(exports, ServerOptions::default()).expect("three exports");
    let mut tasks = Vec::new();
    for n in 0..8u64 {
        let server = Arc::clone(&server);
        tasks.push(tokio::spawn(async move {
            let (mut peer, _) = connect(&server);
            peer.greet().await;
            peer.go(&format!("e{}", n % 3)).await;
            for round in 0..50 {
                let offset = (n << 20) + round * 512;
                let data = [n as u8 + 1; 512];
                assert_eq!(peer.ask(&request(Command::Write, round, offset, 512), &data).await.error, None);
                let reply = peer.ask(&request(Command::Read, round, offset, 512), &[]).await;
                assert_eq!(reply.data[0].1, data);
            }
        }));
    }
    for task in tasks {
        task.await.expect("no panic");
    }
}

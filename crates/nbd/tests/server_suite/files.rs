//! Reads of files in memory, whose pages the kernel sends.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use loam_block::{FileDevice, FileOptions};
use loam_nbd::protocol::{Command, CommandFlags, HeaderStyle, NbdError, Request};
use loam_nbd::server::Listener;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::peer::{PATIENCE, Peer, request, server_of};

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 4096 * 31 + at * 7) as u8 | 1).collect()
}

/// A file in memory, all data but for a hole of 1 MiB at 2 MiB.
fn file_in_memory(directory: &Path) -> (PathBuf, Vec<u8>) {
    let path = directory.join("file");
    let file = std::fs::File::create(&path).expect("a file");
    let mut bytes = pattern(8 << 20);
    bytes[2 << 20..3 << 20].fill(0);
    file.set_len(bytes.len() as u64).expect("length");
    for range in [0..2 << 20, 3 << 20..8 << 20] {
        file.write_all_at(&bytes[range.clone()], range.start as u64).expect("data");
    }
    (path, bytes)
}

async fn serve_file(directory: &Path) -> (Peer, Vec<u8>, PathBuf) {
    let (path, bytes) = file_in_memory(directory);
    let device = FileDevice::open(&path, FileOptions::default()).expect("a device");
    let socket = directory.join("socket");
    let listener = Listener::bind_unix(&socket).expect("bind");
    let server = server_of(device);
    tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
    let mut peer = Peer::over(UnixStream::connect(&socket).await.expect("somebody listens"));
    peer.greet().await;
    (peer, bytes, path)
}

#[tokio::test]
async fn the_pages_of_a_file_in_memory_arrive_in_every_style() {
    for style in STYLES {
        let directory = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
        let (mut peer, bytes, _) = serve_file(directory.path()).await;
        peer.negotiate(style).await;
        peer.go("").await;
        let ranges = [
            (0, 1 << 20),
            (1, 70_000),
            (4097, 65_537),
            (1_500_001, 3 << 20),
            (0, 8 << 20),
            (5, (8 << 20) - 5),
        ];
        for (cookie, &(offset, length)) in ranges.iter().enumerate() {
            peer.send(&request(Command::Read, cookie as u64, offset, length as u64), &[]).await;
        }
        for _ in ranges {
            let (cookie, mut reply) = peer.reply().await;
            let (offset, length) = ranges[cookie as usize];
            if style == HeaderStyle::Simple {
                reply.data[0].0 = offset;
            }
            let wanted = &bytes[offset as usize..][..length];
            assert!(reply.assemble(offset, length) == wanted, "{length} from {offset}, {style:?}");
            let has_hole = offset <= 2 << 20 && offset + length as u64 >= 3 << 20;
            assert_eq!(!reply.holes.is_empty(), has_hole && style != HeaderStyle::Simple);
        }
        if style != HeaderStyle::Simple {
            let whole = Request { flags: CommandFlags::DF, ..request(Command::Read, 9, 1, 4 << 20) };
            let reply = peer.ask(&whole, &[]).await;
            assert_eq!((reply.data.len(), reply.holes.len()), (1, 0));
            assert!(reply.assemble(1, 4 << 20) == bytes[1..][..4 << 20]);
        }
    }
}

#[tokio::test]
async fn a_file_cut_short_before_a_read_is_an_error_and_in_its_middle_the_end() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
    let (mut peer, bytes, path) = serve_file(directory.path()).await;
    peer.go("").await;
    peer.send(&request(Command::Read, 1, 0, 8 << 20), &[]).await;
    // The reply has begun, and waits for its client with more than any socket holds.
    let _head: [u8; 16] = peer.read().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(4096)).expect("cut");
    let mut got = Vec::new();
    tokio::time::timeout(PATIENCE, peer.stream.read_to_end(&mut got)).await.expect("closed").expect("read");
    assert!(got.len() < 8 << 20 && got == bytes[..got.len()], "{} bytes", got.len());
    let socket = directory.path().join("socket");
    let mut peer = Peer::over(UnixStream::connect(&socket).await.expect("somebody listens"));
    peer.greet().await;
    peer.go("").await;
    for length in [8192, 1 << 20] {
        let error = peer.error_of(Command::Read, CommandFlags::empty(), 0, length).await;
        assert_eq!(error, Some(NbdError::Io));
    }
    peer.expect_alive().await;
}

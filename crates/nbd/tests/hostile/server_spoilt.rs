//! Good sessions with something wrong: bytes changed, left out, doubled, cut off. The server may answer or close as it
//! likes, but it neither panics nor hangs nor grows, and the next client is served.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_block::MemoryDevice;
use loam_nbd::server::ServerOptions;

use crate::hostile::*;
use crate::session::*;

/// Spoilt sessions of each style; `PROPTEST_CASES` is the long mode of all fuzzing here.
fn cases() -> usize {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(250)
}

/// What a well-behaved client says, with all options and commands.
fn good(style: Style) -> Vec<u8> {
    let mut bytes = Bytes::new().u32(3).raw(option(3, "")).raw(option(99, "data"));
    bytes = match style {
        Style::Simple => bytes,
        Style::Structured => bytes.raw(option(8, "")),
        Style::Extended => bytes.raw(option(11, "")),
    };
    if style != Style::Simple {
        let all = ["base:allocation", "loam:locality"];
        bytes = bytes.raw(option(9, contexts("disk", &["base:"]))).raw(option(10, contexts("disk", &all)));
    }
    bytes = bytes.raw(option(6, info("disk", &[0, 1, 2, 3]))).raw(option(7, info("disk", &[3])));
    let request = |command: u16, flags: u16, offset: u64, length: u64| match style {
        Style::Extended => {
            Bytes::new().u32(EXTENDED_REQUEST).u16(flags).u16(command).u64(offset).u64(offset).u64(length)
        }
        _ => Bytes::new().u32(REQUEST).u16(flags).u16(command).u64(offset).u64(offset).u32(length as u32),
    };
    let paid = if style == Style::Extended { PAYLOAD_LEN } else { 0 };
    for (command, flags, offset, length) in [
        (READ, 0, 0, 65536),
        (READ, if style == Style::Simple { 0 } else { DF }, SIZE / 2 - 100, 200),
        (FLUSH, 0, 0, 0),
        (TRIM, 0, SIZE / 4, 8192),
        (CACHE, 0, 0, SIZE),
        (WRITE_ZEROES, NO_HOLE | FAST_ZERO, SIZE / 4, 8192),
        (BLOCK_STATUS, 0, 0, SIZE),
        (BLOCK_STATUS, REQ_ONE, 0, SIZE),
    ] {
        bytes = bytes.raw(request(command, flags, offset, length));
    }
    bytes = bytes.raw(request(WRITE, paid | FUA, SIZE / 2, 300)).raw([0x5a; 300]);
    if style == Style::Extended {
        bytes = bytes.raw(request(BLOCK_STATUS, PAYLOAD_LEN, 0, 12)).u64(4096).u32(1);
    }
    bytes.raw(request(DISC, 0, 0, 0)).0
}

fn spoil_sessions(style: Style, seed: u64) {
    let handshake_timeout = Duration::from_secs(5);
    let options =
        ServerOptions { handshake_timeout, stall_timeout: handshake_timeout, ..ServerOptions::default() };
    let device = Arc::new(MemoryDevice::from_bytes(&content()));
    let served = Served::device(device, options);
    let good = good(style);
    served.check_alive();
    let memory = peak_memory();
    let mut random = Random(seed);
    for case in 0..cases() {
        let begin = Instant::now();
        let bytes = random.spoil(&good);
        let mut peer = Peer::connect(&served.path);
        // The whole session at once is more than a socket holds of replies: they are read as they come.
        let mut sender = Peer::new(peer.stream.try_clone().unwrap());
        let sending = std::thread::spawn(move || {
            sender.try_send(bytes);
            sender.hang_up_sending();
        });
        let got = peer.drain(512 << 20);
        sending.join().unwrap();
        let taken = begin.elapsed();
        assert!(
            taken < Duration::from_secs(4),
            "{style:?}, seed {seed}, case {case}: {taken:?}, {got} bytes"
        );
    }
    let grown = peak_memory() - memory;
    assert!(grown < 160 << 20, "{style:?}, seed {seed}: {grown} bytes");
    served.check_unharmed();
}

#[test]
fn spoilt_simple_sessions() {
    spoil_sessions(Style::Simple, 1);
}

#[test]
fn spoilt_structured_sessions() {
    spoil_sessions(Style::Structured, 2);
}

#[test]
fn spoilt_extended_sessions() {
    spoil_sessions(Style::Extended, 3);
}

#[test]
fn a_good_session_is_answered_to_the_end() {
    let served = Served::device(Arc::new(MemoryDevice::from_bytes(&content())), ServerOptions::default());
    for style in STYLES {
        let mut peer = Peer::connect(&served.path);
        peer.send(good(style));
        assert!(peer.drain(1 << 20) > 65536, "{style:?}");
    }
    served.check_alive();
}

#[test]
fn noise_is_not_answered_for_long() {
    let served = Served::device(Arc::new(MemoryDevice::from_bytes(&content())), ServerOptions::default());
    let mut random = Random(4);
    for _ in 0..cases() {
        let length = random.below(300);
        let noise: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        let mut peer = Peer::connect(&served.path);
        if random.below(2) == 0 {
            peer.try_send(3_u32.to_be_bytes());
        }
        peer.try_send(noise);
        peer.hang_up_sending();
        peer.drain(1 << 20);
    }
    served.check_alive();
}

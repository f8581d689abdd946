//! Good servers with something wrong: in each session one message is spoilt, after which the server hangs up. The client
//! may fail or come again, but it neither panics nor hangs nor grows, and a good server serves it as before.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use loam_block::{BlockDevice, WriteFlags, ZeroFlags};
use loam_nbd::client::ClientOptions;

use crate::hostile::*;
use crate::liar::*;

/// Sessions of each style; `PROPTEST_CASES` is the long mode of all fuzzing here.
fn cases() -> usize {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(150)
}

/// Sends `good`, or something like it when it is the message to spoil; false after that.
fn send(liar: &mut Liar, random: &Mutex<Random>, left: &mut usize, good: Bytes) -> bool {
    if *left > 0 {
        *left -= 1;
        liar.peer.try_send(good);
        return true;
    }
    let spoilt = random.lock().unwrap().spoil(&good.0);
    liar.peer.try_send(spoilt);
    liar.peer.hang_up_sending();
    liar.peer.drain(1 << 20);
    false
}

/// A session in which the message after `left` others is spoilt.
fn spoil(liar: &mut Liar, random: &Mutex<Random>, mut left: usize) {
    let peer = &mut liar.peer;
    peer.stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    if !send(liar, random, &mut left, Bytes::new().raw("NBDMAGICIHAVEOPT\0\x03")) {
        return;
    }
    let mut flags = [0; 4];
    if std::io::Read::read_exact(&mut liar.peer.stream, &mut flags).is_err() {
        return;
    }
    while let Some((code, data)) = liar.option() {
        let answer = liar.good_answer(code, &data);
        if !send(liar, random, &mut left, answer) {
            return;
        }
        if code == 7 {
            break;
        }
    }
    while let Some(request) = liar.request() {
        let reply = liar.good_reply(&request);
        if !send(liar, random, &mut left, reply) {
            return;
        }
    }
}

fn spoil_sessions(style: Style, seed: u64) {
    let random = Mutex::new(Random(seed));
    let good = AtomicUsize::new(0);
    let spoilt = Stage::new(style, move |liar, _| {
        // Now and then a good session, so that the client gets through.
        let left = match random.lock().unwrap().below(14) {
            13 if good.fetch_add(1, Ordering::Relaxed) < 10_000 => usize::MAX,
            left => left,
        };
        spoil(liar, &random, left);
    });
    let limits = ClientOptions {
        connect_timeout: Duration::from_millis(500),
        request_timeout: Duration::from_millis(500),
        slow_timeout: Duration::from_millis(500),
        reconnect_limit: Duration::ZERO,
        ..options()
    };
    let memory = peak_memory();
    let (mut connected, mut succeeded) = (0, 0);
    for case in 0..cases() {
        let begin = Instant::now();
        let Ok(device) = spoilt.connect_with(limits.clone()) else { continue };
        connected += 1;
        let mut buffer = vec![0; 20_000];
        let size = device.geometry().size;
        let block = u64::from(device.geometry().minimum_block);
        let length = (4096 / block * block).min(size / block * block);
        let part = &mut buffer[..length as usize];
        let done = spoilt.in_time(async {
            let mut done = 0;
            done += usize::from(device.read(0, part).await.is_ok());
            done += usize::from(device.write(0, part, WriteFlags { fua: true }).await.is_ok());
            done += usize::from(device.extents(0, length, 100).await.is_ok());
            done += usize::from(device.write_zeroes(0, length, ZeroFlags::default()).await.is_ok());
            done += usize::from(device.trim(0, length).await.is_ok());
            done += usize::from(device.prefetch(0, length).await.is_ok());
            done += usize::from(device.locality(0, length.max(block), 100).await.is_ok());
            done + usize::from(device.flush().await.is_ok())
        });
        succeeded += done;
        assert!(begin.elapsed() < Duration::from_secs(15), "{style:?}, seed {seed}, case {case}");
    }
    assert!(
        connected > cases() / 10 && succeeded > connected,
        "{connected} connected, {succeeded} succeeded"
    );
    let grown = peak_memory() - memory;
    assert!(grown < 64 << 20, "{style:?}, seed {seed}: {grown} bytes");
    spoilt.end(None);
}

#[test]
fn spoilt_simple_sessions() {
    spoil_sessions(Style::Simple, 11);
}

#[test]
fn spoilt_structured_sessions() {
    spoil_sessions(Style::Structured, 12);
}

#[test]
fn spoilt_extended_sessions() {
    spoil_sessions(Style::Extended, 13);
}

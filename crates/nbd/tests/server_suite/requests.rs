//! Commands of the transmission phase.

use std::time::Duration;

use loam_block::layer::LayerSpec;
use loam_block::{BlockDevice, ExtentKind, MemoryDevice, WriteFlags};
use loam_nbd::protocol::{
    Command, CommandFlags, HeaderStyle, NbdError, Request, Status, StatusChunk, StatusFilter,
};
use loam_nbd::server::{Export, Server, ServerOptions};
use std::sync::Arc;

use crate::peer::{Claims, Peer, Slow, connect, ended, export, filled, ready, request, server_of};

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

fn payload_flag(style: HeaderStyle) -> CommandFlags {
    match style {
        HeaderStyle::Extended => CommandFlags::PAYLOAD_LEN,
        _ => CommandFlags::empty(),
    }
}

async fn write(peer: &mut Peer, offset: u64, data: &[u8]) -> Option<NbdError> {
    let flags = payload_flag(peer.style);
    let request = Request { flags, command: Command::Write, cookie: 5, offset, length: data.len() as u64 };
    peer.ask(&request, data).await.error
}

/// Reads in any style: simple replies do not say where the data belongs.
async fn read(peer: &mut Peer, offset: u64, length: usize) -> Vec<u8> {
    let mut reply = peer.ask(&request(Command::Read, 6, offset, length as u64), &[]).await;
    if peer.style == HeaderStyle::Simple {
        reply.data[0].0 = offset;
    }
    reply.assemble(offset, length)
}

#[tokio::test]
async fn what_was_written_is_read_back_in_every_style_and_length() {
    for style in STYLES {
        let mut peer = ready(&server_of(MemoryDevice::new(16 << 20)), style).await;
        for (round, length) in
            [1, 511, 4096, 65_536, 65_537, 300_000, 1 << 20, 5 << 20].into_iter().enumerate()
        {
            let data: Vec<u8> = (0..length).map(|at| (at * 7 + round + 1) as u8).collect();
            assert_eq!(write(&mut peer, 3 + round as u64, &data).await, None);
            assert!(read(&mut peer, 3 + round as u64, length).await == data, "{length} bytes, {style:?}");
        }
    }
}

#[tokio::test]
async fn a_device_that_waits_gives_the_same() {
    for style in STYLES {
        let device = Slow { below: MemoryDevice::new(8 << 20), slow_below: u64::MAX, delay: Duration::ZERO };
        let mut peer = ready(&server_of(device), style).await;
        for length in [1, 4096, 65_537, 3 << 20] {
            let data: Vec<u8> = (0..length).map(|at| (at * 13 + 1) as u8).collect();
            assert_eq!(write(&mut peer, 4096, &data).await, None);
            assert!(read(&mut peer, 4096, length).await == data, "{length} bytes, {style:?}");
        }
        let zeroes = CommandFlags::empty();
        assert_eq!(peer.error_of(Command::WriteZeroes, zeroes, 4096, 3 << 20).await, None);
        assert!(read(&mut peer, 4096, 3 << 20).await == vec![0; 3 << 20]);
    }
}

#[tokio::test]
async fn zeroes_are_not_sent_where_chunks_can_say_so() {
    let device = MemoryDevice::new(4 << 20);
    device.write(1 << 20, &[9; 300_000], WriteFlags::default()).await.expect("memory");
    let waiting = Slow { below: MemoryDevice::new(4 << 20), slow_below: u64::MAX, delay: Duration::ZERO };
    waiting.below.write(1 << 20, &[9; 300_000], WriteFlags::default()).await.expect("memory");
    for server in [server_of(device), server_of(waiting)] {
        let mut peer = ready(&server, HeaderStyle::Structured).await;
        let reply = peer.ask(&request(Command::Read, 1, 0, 4 << 20), &[]).await;
        let sent: usize = reply.data.iter().map(|(_, data)| data.len()).sum();
        assert!((300_000..800_000).contains(&sent), "{sent} bytes sent");
        let bytes = reply.assemble(0, 4 << 20);
        assert!(
            bytes[1 << 20..][..300_000] == [9; 300_000]
                && bytes.iter().filter(|&&b| b == 0).count() > 3 << 20
        );
        let small = peer.ask(&request(Command::Read, 2, 8192, 4096), &[]).await;
        assert_eq!((small.data.len(), small.holes), (0, vec![(8192, 4096)]));
        // One chunk, with its zeroes.
        let whole = Request { flags: CommandFlags::DF, ..request(Command::Read, 3, 0, 4 << 20) };
        let reply = peer.ask(&whole, &[]).await;
        assert_eq!((reply.data.len(), reply.holes.len()), (1, 0));
        assert_eq!(reply.assemble(0, 4 << 20), bytes);
    }
}

#[tokio::test]
async fn what_lies_beyond_the_end_is_refused_by_command() {
    for style in STYLES {
        let mut peer = ready(&server_of(filled(1 << 20)), style).await;
        let none = CommandFlags::empty();
        for (offset, length) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4096)] {
            let mut expect = Vec::new();
            for command in [Command::Read, Command::Trim, Command::WriteZeroes, Command::Cache] {
                expect.push(peer.error_of(command, none, offset, length).await);
            }
            let invalid = Some(NbdError::Invalid);
            assert_eq!(expect, [invalid, invalid, Some(NbdError::NoSpace), invalid], "{offset} {length}");
            let data = vec![1; length as usize];
            assert_eq!(write(&mut peer, offset, &data).await, Some(NbdError::NoSpace));
        }
        peer.expect_alive().await;
    }
}

#[tokio::test]
async fn flags_and_commands_that_were_not_offered_are_invalid_and_the_connection_goes_on() {
    let mut peer = ready(&server_of(filled(1 << 20)), HeaderStyle::Simple).await;
    let invalid = Some(NbdError::Invalid);
    for (command, flags) in [
        (Command::Read, CommandFlags::DF),
        (Command::Read, CommandFlags::REQ_ONE),
        (Command::Read, CommandFlags::PAYLOAD_LEN),
        (Command::Trim, CommandFlags::NO_HOLE),
        (Command::Cache, CommandFlags::FAST_ZERO),
        (Command::WriteZeroes, CommandFlags::from_bits_retain(1 << 15)),
        (Command::BlockStatus, CommandFlags::empty()),
        (Command::Other(8), CommandFlags::empty()),
        (Command::Other(999), CommandFlags::empty()),
    ] {
        assert_eq!(peer.error_of(command, flags, 0, 512).await, invalid, "{command:?} {flags:?}");
    }
    assert_eq!(peer.error_of(Command::Flush, CommandFlags::empty(), 512, 0).await, invalid);
    // FUA goes with everything.
    for command in [Command::Read, Command::Trim, Command::Cache, Command::WriteZeroes] {
        let reply = peer.ask(&Request { flags: CommandFlags::FUA, ..request(command, 9, 0, 512) }, &[]).await;
        assert_eq!(reply.error, None, "{command:?}");
    }
    assert_eq!(peer.error_of(Command::Flush, CommandFlags::FUA, 0, 0).await, None);
    peer.expect_alive().await;
}

#[tokio::test]
async fn requests_of_no_bytes_do_nothing() {
    for style in STYLES {
        let mut peer = ready(&server_of(filled(4096)), style).await;
        for command in [Command::Read, Command::Trim, Command::WriteZeroes, Command::Cache] {
            let reply = peer.ask(&request(command, 3, 4096, 0), &[]).await;
            assert_eq!(reply.error, None, "{command:?}");
            assert!(reply.data.iter().all(|(_, data)| data.is_empty()) && reply.holes.is_empty());
        }
        assert_eq!(write(&mut peer, 4096, &[]).await, None);
        peer.expect_alive().await;
    }
}

#[tokio::test]
async fn a_read_only_export_takes_no_writes() {
    let device = Arc::new(filled(1 << 20));
    let read_only = Export { read_only: true, ..export("", device.clone()) };
    let server = Server::new(vec![read_only], ServerOptions::default()).expect("one export");
    for style in STYLES {
        let mut peer = ready(&server, style).await;
        let not_permitted = Some(NbdError::NotPermitted);
        assert_eq!(write(&mut peer, 0, &[0; 300_000]).await, not_permitted);
        for command in [Command::Trim, Command::WriteZeroes] {
            assert_eq!(peer.error_of(command, CommandFlags::empty(), 0, 4096).await, not_permitted);
        }
        assert!(read(&mut peer, 0, 300_000).await.iter().all(|&byte| byte != 0));
        assert_eq!(peer.error_of(Command::Flush, CommandFlags::empty(), 0, 0).await, None);
    }
}

#[tokio::test]
async fn unaligned_requests_are_invalid() {
    let mut device = Claims::of(filled(1 << 20));
    device.geometry.minimum_block = 512;
    let mut peer = ready(&server_of(device), HeaderStyle::Structured).await;
    let none = CommandFlags::empty();
    for command in [Command::Read, Command::Trim, Command::WriteZeroes, Command::Cache] {
        assert_eq!(peer.error_of(command, none, 1, 512).await, Some(NbdError::Invalid), "{command:?}");
        assert_eq!(peer.error_of(command, none, 512, 511).await, Some(NbdError::Invalid), "{command:?}");
    }
    assert_eq!(write(&mut peer, 256, &[1; 512]).await, Some(NbdError::Invalid));
    assert_eq!(write(&mut peer, 512, &[1; 512]).await, None);
}

#[tokio::test]
async fn requests_that_are_too_long_are_refused_and_passed_over() {
    for style in STYLES {
        let mut peer = ready(&server_of(MemoryDevice::new(1 << 30)), style).await;
        let expected = if style == HeaderStyle::Simple { NbdError::Invalid } else { NbdError::Overflow };
        let error = peer.error_of(Command::Read, CommandFlags::empty(), 0, (32 << 20) + 1).await;
        assert_eq!(error, Some(expected));
        if style != HeaderStyle::Extended {
            assert_eq!(write(&mut peer, 0, &vec![1; (32 << 20) + 1]).await, Some(NbdError::Invalid));
            peer.expect_alive().await;
        }
        // Too much to be passed over.
        let flags = payload_flag(style);
        let huge = Request { flags, ..request(Command::Write, 1, 0, u32::MAX.into()) };
        peer.send(&huge, &[]).await;
        peer.expect_closed().await;
    }
    let mut peer = ready(&server_of(MemoryDevice::new(u64::MAX / 2)), HeaderStyle::Extended).await;
    let none = CommandFlags::empty();
    assert_eq!(peer.error_of(Command::WriteZeroes, none, 0, 1 << 62).await, None, "64 bits of length");
    assert_eq!(peer.error_of(Command::Read, none, 0, 1 << 62).await, Some(NbdError::Overflow));
}

#[tokio::test]
async fn a_payload_where_none_belongs_is_passed_over() {
    let mut peer = ready(&server_of(filled(1 << 20)), HeaderStyle::Extended).await;
    for command in [Command::Read, Command::Trim, Command::Flush, Command::BlockStatus, Command::Other(50)] {
        let request = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(command, 4, 0, 300_000) };
        let reply = peer.ask(&request, &vec![0x55; 300_000]).await;
        assert_eq!(reply.error, Some(NbdError::Invalid), "{command:?}");
    }
    // qemu's client sends the data of a write without the flag that announces it.
    let bare = peer.ask(&request(Command::Write, 4, 0, 512), &[9; 512]).await;
    assert_eq!(bare.error, None);
    assert_eq!(read(&mut peer, 0, 513).await[511..], [9, 1]);
    peer.expect_alive().await;
}

#[tokio::test]
async fn a_wrong_magic_in_mid_stream_closes() {
    for style in STYLES {
        let mut peer = ready(&server_of(filled(4096)), style).await;
        peer.expect_alive().await;
        peer.write(&[0x55; 32]).await;
        peer.expect_closed().await;
    }
}

#[tokio::test]
async fn disconnecting_finishes_what_was_asked_before() {
    let device = Slow { below: filled(1 << 20), slow_below: u64::MAX, delay: Duration::from_millis(50) };
    let (mut peer, served) = connect(&server_of(device));
    peer.greet().await;
    peer.go("").await;
    peer.send(&request(Command::Read, 1, 0, 512), &[]).await;
    peer.send(&request(Command::Disconnect, 2, 0, 0), &[]).await;
    assert_eq!(peer.reply().await.0, 1);
    peer.expect_closed().await;
    ended(served).await.expect("a proper end");
}

#[tokio::test]
async fn answers_come_when_they_are_ready_not_in_order() {
    let device = Slow { below: filled(1 << 20), slow_below: 65_536, delay: Duration::from_millis(200) };
    for style in STYLES {
        let device = Slow { below: filled(1 << 20), ..device };
        let mut peer = ready(&server_of(device), style).await;
        let begin = std::time::Instant::now();
        for cookie in 0..20 {
            peer.send(&request(Command::Read, cookie, cookie * 512, 512), &[]).await;
        }
        peer.send(&request(Command::Read, 99, 70_000, 512), &[]).await;
        assert_eq!(peer.reply().await.0, 99, "nothing to wait for");
        let mut seen: Vec<u64> = Vec::new();
        for _ in 0..20 {
            seen.push(peer.reply().await.0);
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..20));
        assert!(begin.elapsed() < Duration::from_secs(2), "one after the other it would be 4 s");
    }
}

#[tokio::test]
async fn fast_zero_is_answered_truly() {
    let mut device = Claims::of(filled(1 << 20));
    device.no_zeroes = true;
    let mut peer = ready(&server_of(device), HeaderStyle::Simple).await;
    let fast = peer.error_of(Command::WriteZeroes, CommandFlags::FAST_ZERO, 0, 65_536).await;
    assert_eq!(fast, Some(NbdError::NotSupported));
    assert!(read(&mut peer, 0, 65_536).await.iter().all(|&byte| byte != 0), "nothing changed");
    // Without the flag it has to work, whatever the device says.
    let flags = CommandFlags::NO_HOLE;
    assert_eq!(peer.error_of(Command::WriteZeroes, flags, 0, 600_000).await, None);
    assert_eq!(read(&mut peer, 0, 600_000).await, vec![0; 600_000]);

    let mut unadvertised = Claims::of(filled(1 << 20));
    unadvertised.capabilities.fast_zero = false;
    let mut peer = ready(&server_of(unadvertised), HeaderStyle::Simple).await;
    let fast = peer.error_of(Command::WriteZeroes, CommandFlags::FAST_ZERO, 0, 65_536).await;
    assert_eq!(fast, Some(NbdError::Invalid));
}

#[tokio::test]
async fn faults_below_reach_the_client_by_their_name() {
    for (name, expected) in [("ENOSPC", NbdError::NoSpace), ("EIO", NbdError::Io)] {
        let layer: LayerSpec =
            format!("fault,on=read+write+zero+trim+flush,error={name}").parse().expect("a layer");
        let device = layer.wrap(Arc::new(filled(1 << 20))).expect("wrapped");
        let server = Server::new(vec![export("", device)], ServerOptions::default()).expect("one export");
        for style in STYLES {
            let mut peer = ready(&server, style).await;
            let none = CommandFlags::empty();
            for (command, length) in [
                (Command::Read, 512),
                (Command::Read, 1 << 20),
                (Command::Flush, 0),
                (Command::Trim, 4096),
                (Command::WriteZeroes, 4096),
            ] {
                let error = peer.error_of(command, none, 0, length).await;
                assert_eq!(error, Some(expected), "{command:?} of {length} bytes, {style:?}");
            }
            assert_eq!(write(&mut peer, 0, &[1; 512]).await, Some(expected));
            assert_eq!(write(&mut peer, 0, &[1; 300_000]).await, Some(expected));
        }
    }
}

fn chunk(context: u32, extents: &[(u64, u64)]) -> StatusChunk {
    let extents = extents.iter().map(|&(length, flags)| Status { length, flags }).collect();
    StatusChunk { context, extents }
}

#[tokio::test]
async fn block_status_tells_allocation_and_locality() {
    let memory = MemoryDevice::new(1 << 20);
    memory.write(65_536, &[1; 65_536], WriteFlags::default()).await.expect("memory");
    let kinds: Vec<ExtentKind> =
        memory.extents(0, 1 << 20, 9).await.expect("extents").iter().map(|extent| extent.kind).collect();
    assert_eq!(kinds, [ExtentKind::Hole, ExtentKind::Data, ExtentKind::Hole]);
    let mut device = Claims::of(memory);
    device.local_until = 4096;
    let waiting =
        Slow { below: Claims::of(MemoryDevice::new(1 << 20)), slow_below: u64::MAX, delay: Duration::ZERO };
    let waiting = Slow { below: Claims { local_until: 4096, ..waiting.below }, ..waiting };
    waiting.below.below.write(65_536, &[1; 65_536], WriteFlags::default()).await.expect("memory");
    let servers = [server_of(device), server_of(waiting)];
    for (server, style) in
        servers.iter().flat_map(|server| STYLES[1..].iter().map(move |style| (server, *style)))
    {
        let (mut peer, _) = connect(server);
        peer.greet().await;
        peer.negotiate(style).await;
        let ids = peer.set_contexts("", &["base:allocation", "loam:locality"]).await;
        peer.go("").await;
        let reply = peer.ask(&request(Command::BlockStatus, 1, 0, 1 << 20), &[]).await;
        let allocation = chunk(ids[0], &[(65_536, 3), (65_536, 0), ((1 << 20) - 131_072, 3)]);
        let locality = chunk(ids[1], &[(4096, 0), ((1 << 20) - 4096, 1)]);
        assert_eq!((reply.error, reply.statuses), (None, vec![allocation, locality.clone()]));
        let one = Request { flags: CommandFlags::REQ_ONE, ..request(Command::BlockStatus, 2, 70_000, 4096) };
        let reply = peer.ask(&one, &[]).await;
        assert_eq!(reply.statuses, [chunk(ids[0], &[(4096, 0)]), chunk(ids[1], &[(4096, 1)])]);
        let none = CommandFlags::empty();
        for (offset, length) in [(0, 0), (0, (1 << 20) + 1), (1 << 20, 1)] {
            let error = peer.error_of(Command::BlockStatus, none, offset, length).await;
            assert_eq!(error, Some(NbdError::Invalid), "{offset} {length}");
        }
        if style == HeaderStyle::Extended {
            let flags = CommandFlags::PAYLOAD_LEN;
            let mut filtered = async |length, contexts: &[u32]| {
                let payload = StatusFilter { length, contexts: contexts.to_vec() }.encode();
                let length = payload.len() as u64;
                let request = Request { flags, ..request(Command::BlockStatus, 3, 0, length) };
                peer.ask(&request, &payload).await
            };
            assert_eq!(filtered(1 << 20, &[ids[1]]).await.statuses, [locality]);
            assert_eq!(filtered(1 << 20, &[]).await.error, None);
            for wrong in [vec![77], vec![ids[0], ids[0]], vec![1; 500]] {
                assert_eq!(filtered(4096, &wrong).await.error, Some(NbdError::Invalid), "{wrong:?}");
            }
            assert_eq!(filtered(1 << 40, &ids).await.error, Some(NbdError::Invalid));
        }
        peer.expect_alive().await;
    }
}

#[tokio::test]
async fn contexts_count_only_for_the_export_they_were_set_for() {
    let exports = vec![export("a", Arc::new(filled(4096))), export("b", Arc::new(filled(4096)))];
    let server = Server::new(exports, ServerOptions::default()).expect("two exports");
    let (mut peer, _) = connect(&server);
    peer.greet().await;
    peer.negotiate(HeaderStyle::Structured).await;
    peer.set_contexts("a", &["base:allocation"]).await;
    peer.go("b").await;
    let error = peer.error_of(Command::BlockStatus, CommandFlags::empty(), 0, 4096).await;
    assert_eq!(error, Some(NbdError::Invalid));
}

#[tokio::test]
async fn extents_of_many_gigabytes_fit_both_kinds_of_descriptor() {
    for style in &STYLES[1..] {
        let (mut peer, _) = connect(&server_of(MemoryDevice::new(1 << 60)));
        peer.greet().await;
        peer.negotiate(*style).await;
        peer.set_contexts("", &["base:allocation"]).await;
        peer.go("").await;
        let length = if *style == HeaderStyle::Extended { 1 << 60 } else { 0xffff_f000 };
        let reply = peer.ask(&request(Command::BlockStatus, 1, 0, length), &[]).await;
        let told = reply.statuses[0].extents[0].length;
        assert!(told >= length & !0xffff && told <= length, "{told} of {length}");
    }
}

#[tokio::test]
async fn cache_brings_bytes_near() {
    let device = Arc::new(Claims::of(filled(1 << 20)));
    let server = Server::new(vec![export("", device.clone())], ServerOptions::default()).expect("one export");
    let mut peer = ready(&server, HeaderStyle::Simple).await;
    assert_eq!(peer.error_of(Command::Cache, CommandFlags::empty(), 4096, 8192).await, None);
    assert_eq!(*device.prefetched.lock().expect("no panic"), [(4096, 8192)]);
}

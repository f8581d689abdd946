//! The transmission phase: each rule that the specification has for a server, and clients that break theirs.

use std::sync::Arc;
use std::time::Duration;

use loam_block::layer::LayerSpec;
use loam_block::{BlockDevice, MemoryDevice};
use loam_nbd::server::{Export, ServerOptions};

use crate::hostile::*;
use crate::session::*;

fn memory() -> Served {
    Served::device(Arc::new(MemoryDevice::from_bytes(&content())), ServerOptions::default())
}

fn sessions(served: &Served) -> impl Iterator<Item = Session> {
    STYLES.into_iter().map(|style| served.connect().haggle(style, "disk"))
}

#[test]
fn reads_and_writes_beyond_the_end_have_their_errors() {
    let served = memory();
    for mut session in sessions(&served) {
        for (offset, length) in [
            (SIZE, 512),
            (SIZE - 512, 1024),
            (u64::MAX, 1),
            (u64::MAX - 4095, 4096),
            (1 << 63, 4096),
            (0, u32::MAX),
        ] {
            let length = u64::from(length);
            for command in [READ, TRIM, CACHE] {
                let error = session.outcome(command, 0, offset, length);
                let overflow = command == READ && length > 32 << 20 && error == EOVERFLOW;
                assert!(error == EINVAL || overflow, "command {command} of {length} at {offset}: {error}");
            }
            assert_eq!(session.outcome(WRITE_ZEROES, 0, offset, length), ENOSPC, "{length} at {offset}");
        }
        for offset in [SIZE, SIZE - 512, u64::MAX - 1023] {
            assert_eq!(session.write(0, offset, &[0xaa; 1024]), ENOSPC);
        }
        assert_eq!(session.read(0, SIZE - 512, 512), Ok(vec![0; 512]), "nothing was written");
        session.check_alive();
    }
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    let served = memory();
    for mut session in sessions(&served) {
        for command in [8, 9, 255, 0x7fff, 0xffff] {
            assert_eq!(session.outcome(command, 0, 0, 512), EINVAL, "command {command}");
        }
        let allowed = |command: u16| match command {
            READ if session.style != Style::Simple => FUA | DF,
            WRITE_ZEROES => FUA | NO_HOLE | FAST_ZERO,
            _ => FUA,
        };
        let commands = [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES];
        let table: Vec<_> = commands.map(|command| (command, allowed(command))).into();
        for (command, allowed) in table {
            let (offset, length) = if command == FLUSH { (0, 0) } else { (SIZE / 2, 4096) };
            for bit in (0..16).map(|bit| 1 << bit).filter(|bit| *bit != PAYLOAD_LEN) {
                let expected = if allowed & bit != 0 { 0 } else { EINVAL };
                let error = session.outcome(command, bit, offset, length);
                assert_eq!(error, expected, "command {command} with flag {bit:#x} in {:?}", session.style);
            }
        }
        for bit in (1..16).map(|bit| 1 << bit).filter(|bit| *bit != PAYLOAD_LEN) {
            assert_eq!(session.write(bit, 0, &[1; 512]), EINVAL, "write with flag {bit:#x}");
        }
        assert_eq!(session.write(FUA, SIZE / 2, &[1; 512]), 0);
        session.check_alive();
    }
}

#[test]
fn compact_requests_have_no_payload_flag() {
    let served = memory();
    for style in [Style::Simple, Style::Structured] {
        let mut session = served.connect().haggle(style, "disk");
        assert_eq!(session.outcome(READ, PAYLOAD_LEN, 0, 512), EINVAL, "and no payload follows");
        assert_eq!(session.write(PAYLOAD_LEN, 0, &[1; 512]), EINVAL, "and the payload does");
        session.check_alive();
    }
}

#[test]
fn flush_has_no_place_and_no_length() {
    let served = memory();
    for mut session in sessions(&served) {
        assert_eq!(session.outcome(FLUSH, 0, 0, 0), 0);
        assert_eq!(session.outcome(FLUSH, 0, 512, 0), EINVAL);
        assert_eq!(session.outcome(FLUSH, 0, 0, 512), EINVAL);
        session.check_alive();
    }
}

#[test]
fn requests_of_nothing_do_no_harm() {
    let served = memory();
    for mut session in sessions(&served) {
        for command in [READ, TRIM, CACHE, WRITE_ZEROES] {
            session.outcome(command, 0, 4096, 0);
            session.outcome(command, 0, SIZE, 0);
        }
        session.write(0, 4096, &[]);
        session.check_alive();
    }
}

#[test]
fn a_read_only_export_takes_no_writes() {
    let device = Arc::new(MemoryDevice::from_bytes(&content()));
    let locked = Export { read_only: true, ..export("disk", device.clone()) };
    let layer = "readonly".parse::<LayerSpec>().unwrap().wrap(device).unwrap();
    let served = Served::exports(vec![locked, export("layer", layer)], ServerOptions::default());
    for name in ["disk", "layer"] {
        for style in STYLES {
            let mut session = served.connect();
            session.set_style(style);
            let flags = session.go(name).1;
            assert_eq!(flags & 2, 2, "READ_ONLY");
            assert_eq!(flags & (1 << 11), 0, "no FAST_ZERO without WRITE_ZEROES");
            assert_eq!(session.write(0, 4096, &[0xee; 4096]), EPERM);
            assert_eq!(session.outcome(TRIM, 0, 4096, 4096), EPERM);
            assert_eq!(session.outcome(WRITE_ZEROES, 0, 4096, 4096), EPERM);
            session.check_alive();
        }
    }
}

#[test]
fn requests_off_the_blocks_are_invalid() {
    let memory: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::from_bytes(&content()));
    let device = "blocksize,offer=4096".parse::<LayerSpec>().unwrap().wrap(memory).unwrap();
    let served = Served::device(device, ServerOptions::default());
    for mut session in sessions(&served) {
        for (offset, length) in [(1, 4096), (0, 4095), (512, 4096), (4096, 512), (0, 1)] {
            for command in [READ, TRIM, CACHE, WRITE_ZEROES] {
                assert_eq!(session.outcome(command, 0, offset, length), EINVAL, "command {command}");
            }
            assert_eq!(session.write(0, offset, &vec![1; length as usize]), EINVAL);
        }
        session.check_alive();
    }
    let mut session = served.connect();
    session.set_style(Style::Structured);
    session.set_contexts("disk", &["base:allocation"]);
    session.go("disk");
    assert_eq!(session.outcome(BLOCK_STATUS, 0, 1, 4096), EINVAL);
    session.check_alive();
}

#[test]
fn a_wrong_magic_number_in_mid_stream_ends_the_session() {
    let served = memory();
    for style in STYLES {
        for magic in [0, REQUEST ^ 1, 0x1256_0953, SIMPLE_REPLY, EXTENDED_REQUEST, REQUEST] {
            let own = if style == Style::Extended { EXTENDED_REQUEST } else { REQUEST };
            if magic == own {
                continue;
            }
            let mut session = served.connect().haggle(style, "disk");
            session.check_alive();
            session.peer.send(Bytes::new().u32(magic).raw([0; 28]));
            session.peer.expect_closed();
        }
    }
    served.check_alive();
}

#[test]
fn extended_payloads_are_consumed_whatever_the_command() {
    let served = memory();
    let mut session = served.connect().haggle(Style::Extended, "disk");
    for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8, 99] {
        let header = session.header(command, PAYLOAD_LEN, 5, 0, 100_000);
        session.peer.send(header.raw(vec![0x25; 100_000]));
        assert_eq!(session.whole(5, 0, 0).0, EINVAL, "command {command}");
        session.check_alive();
    }
    // qemu's client sends its data without the flag; what is no write has none then.
    let header = session.header(WRITE, 0, 5, SIZE / 2, 512);
    session.peer.send(header.raw([0x33; 512]));
    assert_eq!(session.whole(5, 0, SIZE / 2).0, 0, "a write without the flag");
    assert_eq!(session.read(0, SIZE / 2, 512), Ok(vec![0x33; 512]));
    session.check_alive();
    for length in [1 << 32, u64::MAX, u64::MAX - 511, 1 << 63] {
        assert_eq!(session.outcome(TRIM, 0, 0, length), EINVAL);
        assert_eq!(session.outcome(CACHE, 0, 512, length), EINVAL);
        assert_eq!(session.outcome(WRITE_ZEROES, 0, 512, length), ENOSPC);
        let error = session.outcome(READ, 0, 0, length);
        assert!(error == EINVAL || error == EOVERFLOW);
        session.check_alive();
    }
}

#[test]
fn payloads_that_nobody_takes_end_the_session_and_cost_no_memory() {
    let served = memory();
    served.check_alive();
    let before = peak_memory();
    let mut waiting = Vec::new();
    for command in [WRITE, BLOCK_STATUS, READ, 99] {
        for length in [u64::MAX, 1 << 40, u32::MAX.into()] {
            let mut session = served.connect().haggle(Style::Extended, "disk");
            let header = session.header(command, PAYLOAD_LEN, 5, 0, length);
            session.peer.try_send(header.raw([0; 4096]));
            waiting.push(session);
        }
    }
    let mut session = served.connect().haggle(Style::Simple, "disk");
    let header = session.header(WRITE, 0, 5, 0, u32::MAX.into());
    session.peer.try_send(header.raw([0; 4096]));
    waiting.push(session);
    for session in &mut waiting {
        session.peer.drain(1 << 20);
    }
    assert!(peak_memory() - before < 32 << 20, "{} bytes", peak_memory() - before);
    served.check_alive();
}

#[test]
fn a_write_that_breaks_off_changes_nothing() {
    let served = memory();
    for mut session in sessions(&served) {
        let flags = session.paid();
        let header = session.header(WRITE, flags, 5, 4096, 65536);
        session.peer.send(header.raw(vec![0xdd; 65535]));
        session.peer.hang_up_sending();
        session.peer.drain(100);
    }
    served.check_alive();
}

#[test]
fn requests_that_share_a_cookie_are_each_answered() {
    let served = memory();
    for mut session in sessions(&served) {
        let one = session.header(READ, 0, 0, 4096, 8);
        session.peer.send(one.0.repeat(50));
        for _ in 0..50 {
            assert_eq!(session.whole(0, 8, 4096).0, 0);
        }
        session.check_alive();
    }
}

#[test]
fn what_was_asked_before_the_end_is_answered() {
    let served = memory();
    for mut session in sessions(&served) {
        let mut bytes = Bytes::new();
        for cookie in 0..20 {
            bytes = bytes.raw(session.header(READ, 0, cookie, 8 * cookie, 8));
        }
        bytes = bytes.raw(session.header(DISC, 0, 99, 0, 0)).raw("nonsense that must not be read");
        session.peer.send(bytes);
        let mut left: Vec<u64> = (0..20).collect();
        while !left.is_empty() {
            // All are of one chunk or two; the offset that is echoed says which request it was.
            if session.style == Style::Extended {
                let head: [u8; 32] = session.peer.read();
                let (cookie, offset) = (be(&head[8..16]), be(&head[16..24]));
                assert_eq!(offset, 8 * cookie);
                session.peer.read_vec(be(&head[24..]));
                if head[5] & 1 == 1 {
                    left.retain(|waiting| *waiting != cookie);
                }
            } else {
                let piece = session.piece(8, 0);
                assert_eq!(piece.error, 0);
                if piece.done {
                    left.retain(|waiting| *waiting != piece.cookie);
                }
            }
        }
        session.peer.expect_closed();
    }
    served.check_alive();
}

#[test]
fn reads_are_whole_and_df_is_one_piece() {
    let served = memory();
    let content = content();
    for mut session in sessions(&served) {
        for (offset, length) in
            [(0, SIZE), (SIZE / 2 - 4096, 65536), (SIZE / 2 - 3, 7), (1, 1), (SIZE - 1, 1)]
        {
            let expected = content[offset as usize..(offset + length) as usize].to_vec();
            assert_eq!(session.read(0, offset, length), Ok(expected.clone()));
            if session.style != Style::Simple {
                match session.read(DF, offset, length) {
                    Err(EOVERFLOW) if length > 65536 => {}
                    read => assert_eq!(read, Ok(expected)),
                }
            }
        }
    }
}

/// Extents of one chunk, each (length, flags).
fn extents(session: &Session, piece: &Piece) -> (u32, Vec<(u64, u64)>) {
    let context = be(&piece.payload[..4]) as u32;
    let (head, half) = match (session.style, piece.kind) {
        (Style::Extended, Some(6)) => (8, 8),
        (Style::Structured, Some(5)) => (4, 4),
        other => panic!("{other:?}"),
    };
    let list = &piece.payload[head..];
    assert!(!list.is_empty() && list.len().is_multiple_of(2 * half));
    if half == 8 {
        assert_eq!(be(&piece.payload[4..8]) as usize, list.len() / 16);
    }
    let extents = list.chunks(2 * half).map(|pair| (be(&pair[..half]), be(&pair[half..]))).collect();
    (context, extents)
}

#[test]
fn block_status_keeps_its_rules() {
    let served = memory();
    for style in [Style::Structured, Style::Extended] {
        let mut session = served.connect();
        session.set_style(style);
        let contexts = session.set_contexts("disk", &["base:allocation", "loam:locality"]);
        let flags = session.go("disk").1;
        assert_eq!(flags >> 12 & 1 == 1, style == Style::Extended, "BLOCK_STATUS_PAYLOAD");
        for (request, offset, length) in [
            (0, 0, SIZE),
            (0, SIZE / 2 - 8192, 16384),
            (REQ_ONE, 0, SIZE),
            (REQ_ONE, 512, 512),
            (0, SIZE - 1, 1),
        ] {
            session.request(BLOCK_STATUS, request, 3, offset, length);
            let (error, pieces) = session.whole(3, 0, offset);
            assert_eq!(error, 0);
            let mut seen = Vec::new();
            for piece in pieces.iter().filter(|piece| piece.kind != Some(0)) {
                let (context, extents) = extents(&session, piece);
                seen.push(context);
                assert!(extents.iter().all(|extent| extent.0 > 0));
                let total: u64 = extents.iter().map(|extent| extent.0).sum();
                assert!(total - extents.last().unwrap().0 < length, "all but the last lie inside");
                assert!(offset + total <= SIZE);
                if request == REQ_ONE {
                    assert!(extents.len() == 1 && total <= length);
                }
                if context == contexts[0].0 {
                    assert!(extents.iter().all(|extent| extent.1 & !3 == 0));
                    assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1));
                }
            }
            seen.sort();
            let mut ids: Vec<u32> = contexts.iter().map(|context| context.0).collect();
            ids.sort();
            assert_eq!(seen, ids, "one chunk for each context");
        }
        for (offset, length) in [(0, SIZE + 1), (SIZE, 1), (u64::MAX, 1), (1 << 40, u32::MAX.into())] {
            assert_eq!(session.outcome(BLOCK_STATUS, 0, offset, length), EINVAL);
        }
        session.outcome(BLOCK_STATUS, 0, 0, 0);
        assert_eq!(session.outcome(BLOCK_STATUS, DF, 0, 512), EINVAL);
        session.check_alive();
    }
}

#[test]
fn block_status_with_a_payload_is_about_the_contexts_in_it() {
    let served = memory();
    let mut session = served.connect();
    session.set_style(Style::Extended);
    let contexts = session.set_contexts("disk", &["base:allocation", "loam:locality"]);
    session.go("disk");
    let ask = |session: &mut Session, payload: Bytes| {
        let header = session.header(BLOCK_STATUS, PAYLOAD_LEN, 4, 4096, payload.0.len() as u64);
        session.peer.send(header.raw(payload));
        session.whole(4, 0, 4096)
    };
    for (id, _) in &contexts {
        let (error, pieces) = ask(&mut session, Bytes::new().u64(8192).u32(*id));
        assert_eq!(error, 0);
        let chunks: Vec<_> = pieces.iter().filter(|piece| piece.kind == Some(6)).collect();
        assert_eq!(chunks.len(), 1);
        assert_eq!(extents(&session, chunks[0]).0, *id);
    }
    let (first, second) = (contexts[0].0, contexts[1].0);
    let unknown = first.max(second) + 1000;
    for payload in [
        Bytes::new().u64(8192).u32(unknown),
        Bytes::new().u64(8192).u32(first).u32(unknown),
        Bytes::new().u64(8192).u32(first).u32(first),
        Bytes::new().u64(8192).u16(0),
        Bytes::new().u32(8192),
        Bytes::new().u64(SIZE + 1).u32(first),
        Bytes::new().u64(u64::MAX).u32(first),
        (0..100_000).fold(Bytes::new().u64(8192), Bytes::u32),
    ] {
        assert_eq!(ask(&mut session, payload).0, EINVAL);
        session.check_alive();
    }
    let mut session = served.connect();
    session.set_style(Style::Extended);
    session.go("disk");
    assert_eq!(ask(&mut session, Bytes::new().u64(8192).u32(first)).0, EINVAL, "no context was chosen");
    session.check_alive();
}

#[test]
fn a_client_that_takes_no_replies_costs_bounded_memory_and_is_dropped() {
    const MEMORY: usize = 8 << 20;
    let options = ServerOptions {
        connection_memory: MEMORY,
        stall_timeout: Duration::from_millis(500),
        ..ServerOptions::default()
    };
    let served = Served::device(Arc::new(MemoryDevice::from_bytes(&content())), options);
    served.check_alive();
    let before = peak_memory();
    let mut session = served.connect().haggle(Style::Structured, "disk");
    session.peer.stream.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    let many = session.header(READ, 0, 1, 0, SIZE / 2).0.repeat(1000);
    for _ in 0..20 {
        session.peer.try_send(&many);
    }
    session.peer.drain(64 << 20);
    let grown = peak_memory() - before;
    assert!(grown < MEMORY as u64 + (24 << 20), "{grown} bytes");
    served.check_alive();
}

#[test]
fn a_client_that_stops_in_mid_request_is_dropped_and_an_idle_one_is_not() {
    let options = ServerOptions { stall_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let served = Served::device(Arc::new(MemoryDevice::from_bytes(&content())), options);
    let mut idle = served.connect().haggle(Style::Simple, "disk");
    let mut half_header = served.connect().haggle(Style::Simple, "disk");
    let header = half_header.header(READ, 0, 1, 0, 8);
    half_header.peer.send(&header.0[..27]);
    let mut half_payload = served.connect().haggle(Style::Extended, "disk");
    let header = half_payload.header(WRITE, PAYLOAD_LEN, 1, 4096, 4096);
    half_payload.peer.send(header.raw([0xdd; 4095]));
    let mut half_skipped = served.connect().haggle(Style::Extended, "disk");
    let header = half_skipped.header(TRIM, PAYLOAD_LEN, 1, 0, 4096);
    half_skipped.peer.send(header.raw([0xdd; 4095]));
    for session in [&mut half_header, &mut half_payload, &mut half_skipped] {
        session.peer.expect_closed();
    }
    idle.check_alive();
    served.check_alive();
}

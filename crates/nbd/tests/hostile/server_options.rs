//! The handshake: each rule that the specification has for a server, and what becomes of clients that break theirs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_block::MemoryDevice;
use loam_nbd::server::ServerOptions;

use crate::hostile::*;
use crate::session::*;

fn two_exports() -> Served {
    let disk = export("disk", Arc::new(MemoryDevice::from_bytes(&content())));
    let other = export("öther disk", Arc::new(MemoryDevice::new(4096)));
    Served::exports(vec![disk, other], ServerOptions::default())
}

#[test]
fn unknown_client_flags_end_the_session() {
    let served = two_exports();
    for flags in [4_u32, 7, 1 << 16, 1 << 31, u32::MAX] {
        let mut session = Session::bare(&served.path);
        session.peer.send(flags.to_be_bytes());
        session.peer.expect_closed();
    }
    served.check_alive();
}

#[test]
fn unknown_options_are_unsupported_and_the_next_one_is_understood() {
    let served = two_exports();
    let mut session = served.connect();
    for code in [0, 4, 12, 99, 1 << 31, u32::MAX] {
        assert_eq!(session.ask(code, ""), ERR_UNSUP, "{code}");
        assert_eq!(session.ask(code, "data to be skipped"), ERR_UNSUP, "{code}");
    }
    let kind = session.ask(99, vec![7; 100_000]);
    assert!(kind == ERR_TOO_BIG || kind == ERR_UNSUP, "{kind:x}");
    session.haggle(Style::Simple, "disk").check_alive();
}

#[test]
fn what_is_no_option_ends_the_session() {
    let served = two_exports();
    for bytes in [
        Bytes::new().u64(IHAVEOPT ^ 1).u32(3).u32(0),
        Bytes::new().u64(OPTION_REPLY).u32(3).u32(0),
        Bytes::new().u32(REQUEST).raw([0; 24]),
        Bytes::new().raw("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ] {
        let mut session = served.connect();
        session.peer.send(bytes);
        session.peer.expect_closed();
    }
    served.check_alive();
}

#[test]
fn lengths_that_nobody_has_are_not_waited_for_and_cost_no_memory() {
    let served = two_exports();
    served.check_alive();
    let before = peak_memory();
    let mut sessions = Vec::new();
    for code in [1, 2, 3, 6, 7, 9, 10, 99] {
        for length in [u32::MAX, 1 << 31] {
            let mut session = served.connect();
            session.peer.send(Bytes::new().u64(IHAVEOPT).u32(code).u32(length).raw([0; 512]));
            sessions.push(session);
        }
    }
    sessions.iter_mut().for_each(|session| session.peer.expect_closed());
    // Lengths inside an option that is short itself.
    let mut session = served.connect();
    for data in [Bytes::new().u32(u32::MAX).raw([0; 20]), Bytes::new().u32(0).u16(u16::MAX)] {
        assert_eq!(session.ask(6, &data), ERR_INVALID);
        assert_eq!(session.ask(7, &data), ERR_INVALID);
    }
    session.set_style(Style::Structured);
    for data in [
        Bytes::new().u32(u32::MAX).raw([0; 20]),
        Bytes::new().counted("disk").u32(u32::MAX),
        Bytes::new().counted("disk").u32(1).u32(u32::MAX).raw("base:"),
    ] {
        assert_eq!(session.ask(9, &data), ERR_INVALID);
        assert_eq!(session.ask(10, &data), ERR_INVALID);
    }
    assert!(peak_memory() - before < 16 << 20, "{} bytes", peak_memory() - before);
    served.check_alive();
}

#[test]
fn malformed_options_are_invalid_and_the_session_goes_on() {
    let served = two_exports();
    let mut session = served.connect();
    for code in [3, 5, 8, 11] {
        assert_eq!(session.ask(code, "x"), ERR_INVALID, "{code} takes no data");
    }
    for data in [
        Bytes::new(),
        Bytes::new().u32(4).raw("disk"),
        Bytes::new().counted("disk").u16(1),
        Bytes::new().counted("disk").u16(0).raw("x"),
        Bytes::new().counted("di\0sk").u16(0),
        Bytes::new().counted([0xff, 0xfe]).u16(0),
        Bytes::new().counted(vec![b'x'; 4097]).u16(0),
    ] {
        assert_eq!(session.ask(6, &data), ERR_INVALID, "{:x?}", data.0);
        assert_eq!(session.ask(7, &data), ERR_INVALID, "{:x?}", data.0);
    }
    assert_eq!(session.ask(9, contexts("disk", &[])), ERR_INVALID, "no structured replies yet");
    assert_eq!(session.ask(10, contexts("disk", &["base:allocation"])), ERR_INVALID);
    session.set_style(Style::Structured);
    for data in [
        Bytes::new(),
        Bytes::new().counted("disk"),
        Bytes::new().counted("disk").u32(1),
        Bytes::new().counted("disk").u32(0).raw("x"),
        Bytes::new().counted("disk").u32(1).counted([0xff]),
    ] {
        assert_eq!(session.ask(9, &data), ERR_INVALID, "{:x?}", data.0);
        assert_eq!(session.ask(10, &data), ERR_INVALID, "{:x?}", data.0);
    }
    let many = contexts("disk", &["x-y:z"; 5000]);
    assert_eq!(session.ask(10, many), ERR_TOO_BIG);
    session.go("disk");
    session.check_alive();
}

#[test]
fn list_tells_all_exports() {
    let served = two_exports();
    let mut session = served.connect();
    session.option(3, "");
    let replies = session.replies(3);
    let of = |name: &str| (SERVER, Bytes::new().counted(name).raw(format!("about {name}")).0);
    assert_eq!(replies, [of("disk"), of("öther disk"), (ACK, vec![])]);
}

#[test]
fn export_name_has_its_own_answer_or_none() {
    let served = two_exports();
    for (flags, length) in [(3_u32, 10_u64), (2, 10), (1, 134), (0, 134)] {
        let mut session = Session::bare(&served.path);
        session.peer.send(flags.to_be_bytes());
        session.option(1, "disk");
        let answer = session.peer.read_vec(length);
        assert_eq!(be(&answer[..8]), SIZE);
        assert_eq!(answer[9] & 1, 1, "HAS_FLAGS");
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        session.check_alive();
    }
    let long = "x".repeat(4097);
    for name in ["nobody", long.as_str(), "di\0sk", "disk\0", "Disk"] {
        let mut session = served.connect();
        session.option(1, name);
        session.peer.expect_closed();
    }
    let mut session = served.connect();
    session.set_style(Style::Extended);
    session.option(1, "disk");
    session.peer.expect_closed();
    let mut session = served.connect();
    session.set_style(Style::Structured);
    session.option(1, "");
    session.peer.read::<10>();
    session.check_alive();
}

#[test]
fn abort_is_acknowledged_whatever_comes_with_it() {
    let served = two_exports();
    for data in ["", "goodbye"] {
        let mut session = served.connect();
        assert_eq!(session.ask(2, data), ACK);
        session.peer.expect_closed();
    }
    // The client need not wait for the answer.
    let mut session = served.connect();
    session.option(2, "");
    drop(session);
    served.check_alive();
}

#[test]
fn a_server_without_tls_says_so_and_goes_on() {
    let served = two_exports();
    let mut session = served.connect();
    let kind = session.ask(5, "");
    assert!(kind == ERR_POLICY || kind == ERR_UNSUP, "{kind:x}");
    session.haggle(Style::Extended, "disk").check_alive();
}

#[test]
fn info_and_go_say_the_same() {
    let served = two_exports();
    for style in STYLES {
        let mut session = served.connect();
        session.set_style(style);
        for name in ["nobody", "dis", "disk ", "other disk"] {
            session.option(6, info(name, &[]));
            assert_eq!(session.replies(6).iter().map(|reply| reply.0).collect::<Vec<_>>(), [ERR_UNKNOWN]);
            assert_eq!(session.ask(7, info(name, &[])), ERR_UNKNOWN);
        }
        let everything = info("öther disk", &[0, 1, 2, 3, 99, 0xffff]);
        session.option(6, &everything);
        let mut said = session.replies(6);
        session.option(7, &everything);
        let mut again = session.replies(7);
        assert_eq!(again.pop(), Some((ACK, vec![])));
        assert_eq!(said.pop(), Some((ACK, vec![])));
        said.sort();
        again.sort();
        assert_eq!(said, again);
        let item = |kind: u8| {
            let found: Vec<_> = said.iter().filter(|(_, data)| data[..2] == [0, kind]).collect();
            assert_eq!(found.len(), 1, "information {kind} is told once");
            found[0].1[2..].to_vec()
        };
        assert!(said.iter().all(|(kind, data)| *kind == INFO && data[0] == 0 && data[1] < 4));
        assert_eq!(item(1), "öther disk".as_bytes());
        assert_eq!(item(2), "about öther disk".as_bytes());
        let facts = item(0);
        assert_eq!((facts.len(), be(&facts[..8])), (10, 4096));
        let flags = be(&facts[8..]) as u16;
        assert_eq!(flags & 1, 1, "HAS_FLAGS");
        assert_eq!(flags >> 7 & 1 == 1, style != Style::Simple, "SEND_DF goes with chunks");
        assert_eq!(flags >> 12 & 1, 0, "no contexts were set, so none can be filtered");
        assert_eq!(flags & 0xe200, 0, "what nobody defined, or implements");
        let sizes = item(3);
        let [minimum, preferred, maximum] = [0, 4, 8].map(|at| be(&sizes[at..at + 4]));
        assert!(minimum.is_power_of_two() && minimum <= 65536);
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512) && maximum >= preferred);
        // No zeroes after GO, though the client did not refuse them: the next bytes are a reply.
        session.option(0, "");
    }
    let mut session = Session::bare(&served.path);
    session.peer.send(1_u32.to_be_bytes());
    session.haggle(Style::Simple, "disk").check_alive();
}

#[test]
fn structured_replies_and_extended_headers_exclude_each_other() {
    let served = two_exports();
    let mut session = served.connect();
    session.set_style(Style::Structured);
    session.set_style(Style::Extended);
    assert_eq!(session.ask(8, ""), ERR_EXT_HEADER_REQD);
    session.go("disk");
    session.check_alive();
}

#[test]
fn contexts_are_chosen_by_exact_name_and_listed_by_namespace() {
    let served = two_exports();
    let mut session = served.connect();
    session.set_style(Style::Structured);
    let list = |session: &mut Session, queries: &[&str]| {
        session.option(9, contexts("disk", queries));
        let mut replies = session.replies(9);
        assert_eq!(replies.pop(), Some((ACK, vec![])));
        let name = |(kind, data): (u32, Vec<u8>)| {
            assert_eq!(kind, META_CONTEXT);
            String::from_utf8(data[4..].to_vec()).unwrap()
        };
        replies.into_iter().map(name).collect::<Vec<_>>()
    };
    assert!(list(&mut session, &[]).contains(&"base:allocation".to_owned()), "no query means all");
    assert_eq!(list(&mut session, &["base:"]), ["base:allocation"]);
    assert_eq!(list(&mut session, &["base:allocation", "base:"]), ["base:allocation"], "once");
    for ignored in ["base:nothing", "x-mine:", "qemu:dirty-bitmap:b", "base", "", ":", "bases:"] {
        assert!(list(&mut session, &[ignored]).is_empty(), "{ignored}");
        assert!(session.set_contexts("disk", &[ignored]).is_empty(), "{ignored}");
    }
    assert!(session.set_contexts("disk", &[]).is_empty(), "no query means none");
    assert!(session.set_contexts("disk", &["base:"]).is_empty(), "a namespace is no context");
    let set = session.set_contexts("disk", &["base:allocation", "loam:locality", "base:allocation"]);
    assert_eq!(set.len(), 2, "each once");
    assert_ne!(set[0].0, set[1].0, "each with an id of its own");
    for code in [9, 10] {
        assert_eq!(session.ask(code, contexts("nobody", &["base:allocation"])), ERR_UNKNOWN);
    }
}

#[test]
fn only_the_last_choice_of_contexts_counts() {
    type Spoil = fn(&mut Session);
    let spoils: [(&str, Spoil); 4] = [
        ("a choice that failed", |session| assert_eq!(session.ask(10, ""), ERR_INVALID)),
        ("no context", |session| drop(session.set_contexts("disk", &[]))),
        ("another export", |session| drop(session.set_contexts("öther disk", &["base:allocation"]))),
        ("too big a choice", |session| assert_eq!(session.ask(10, vec![0; 70_000]), ERR_TOO_BIG)),
    ];
    let served = two_exports();
    for (why, spoil) in spoils {
        let mut session = served.connect();
        session.set_style(Style::Structured);
        assert_eq!(session.set_contexts("disk", &["base:allocation"]).len(), 1);
        spoil(&mut session);
        session.go("disk");
        assert_eq!(session.outcome(BLOCK_STATUS, 0, 0, 4096), EINVAL, "{why}");
        session.check_alive();
    }
    let mut session = served.connect();
    session.set_style(Style::Structured);
    session.set_contexts("disk", &["base:allocation"]);
    // The first export is the default one too: it is the same under both names.
    session.go("");
    session.check_alive();
}

#[test]
fn a_byte_at_a_time_is_understood() {
    let served = two_exports();
    let mut session = Session::bare(&served.path);
    let bytes =
        Bytes::new().u32(3).raw(option(99, "xyz")).raw(option(8, "")).raw(option(7, info("disk", &[3])));
    for byte in bytes.0 {
        session.peer.send([byte]);
    }
    assert_eq!(session.reply(99).0, ERR_UNSUP);
    assert_eq!(session.reply(8).0, ACK);
    assert_eq!(session.replies(7).last().unwrap().0, ACK);
    session.style = Style::Structured;
    for byte in session.header(READ, 0, 9, 0, 8).0 {
        session.peer.send([byte]);
    }
    assert_eq!(session.whole(9, 8, 0).0, 0);
    session.check_alive();
}

#[test]
fn a_client_that_says_nothing_or_too_little_is_not_waited_for() {
    let handshake_timeout = Duration::from_millis(300);
    let options = ServerOptions { handshake_timeout, ..ServerOptions::default() };
    let served = Served::device(Arc::new(MemoryDevice::from_bytes(&content())), options);
    let begin = Instant::now();
    let mut silent = Session::bare(&served.path);
    let mut flags_only = served.connect();
    let mut half_option = served.connect();
    half_option.peer.send(&option(7, info("disk", &[])).0[..20]);
    let mut haggling = served.connect();
    assert_eq!(haggling.ask(3, "x"), ERR_INVALID);
    for session in [&mut silent, &mut flags_only, &mut half_option, &mut haggling] {
        session.peer.expect_closed();
    }
    assert!(begin.elapsed() >= handshake_timeout && begin.elapsed() < Duration::from_secs(5));
    // A byte now and then does not buy more time.
    let mut dripping = Session::bare(&served.path);
    let begin = Instant::now();
    for byte in option(3, vec![0; 200]).0 {
        dripping.peer.try_send([byte]);
        std::thread::sleep(Duration::from_millis(10));
        if begin.elapsed() > 3 * handshake_timeout {
            break;
        }
    }
    dripping.peer.drain(1000);
    assert!(begin.elapsed() < Duration::from_secs(5));
    served.check_alive();
}

#[test]
fn connections_that_are_dropped_half_open_leave_nothing() {
    let served = two_exports();
    let all = Bytes::new().u32(3).raw(option(11, "")).raw(option(7, info("disk", &[])));
    for cut in 0..all.0.len() {
        let mut peer = Peer::connect(&served.path);
        peer.send(&all.0[..cut]);
        drop(peer);
    }
    for _ in 0..200 {
        drop(Peer::connect(&served.path));
    }
    served.check_alive();
}

//! Servers that misbehave before the transmission phase.

use std::time::{Duration, Instant};

use loam_block::BlockDevice;
use loam_nbd::client::{ClientOptions, ConnectError};

use crate::hostile::*;
use crate::liar::*;

/// What the client says of a server that does `serve`.
fn refusal(style: Style, serve: impl Fn(&mut Liar) + Send + Sync + 'static) -> ConnectError {
    let stage = Stage::new(style, move |liar, _| serve(liar));
    let refused = stage.connect().err().expect("no such server can be used");
    stage.end(None);
    refused
}

#[test]
fn what_does_not_greet_is_no_server() {
    let greetings: [&[u8]; 6] = [
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u2\r\n",
        b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n",
        b"NBDMAGICIHAVEOPS\0\x03",
        b"NBDMAGIX\x49\x48\x41\x56\x45\x4f\x50\x54\0\x03",
        &[0; 100],
        &[0xff; 100],
    ];
    for greeting in greetings {
        let refused = refusal(Style::Simple, move |liar| {
            liar.peer.try_send(greeting);
            assert_eq!(liar.peer.drain(100), 0, "the client has nothing to say to it");
        });
        assert!(matches!(refused, ConnectError::Protocol { .. }), "{refused}");
    }
    for cut in [&b""[..], b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0"] {
        let refused = refusal(Style::Simple, move |liar| liar.peer.try_send(cut));
        assert!(matches!(refused, ConnectError::Io { .. }), "{refused}");
    }
}

#[test]
fn an_oldstyle_server_is_called_by_its_name() {
    let refused = refusal(Style::Simple, |liar| {
        let size_and_flags = Bytes::new().u64(0x0000_4202_8186_1253).u64(SIZE).u32(1);
        liar.peer.try_send(Bytes::new().raw("NBDMAGIC").raw(size_and_flags).raw([0; 124]));
        liar.peer.drain(100);
    });
    assert!(refused.to_string().contains("oldstyle"), "{refused}");
}

#[test]
fn a_silent_server_is_not_waited_for() {
    type Silence = fn(&mut Liar);
    let silences: [(&str, Silence); 3] = [
        ("no greeting", |liar| {
            liar.peer.drain(100);
        }),
        ("no answer", |liar| {
            liar.greet();
            liar.peer.drain(1000);
        }),
        ("half an answer", |liar| {
            liar.greet();
            let (code, _) = liar.option().unwrap();
            let answer = reply(code, ERR_UNSUP, "no");
            liar.peer.try_send(&answer.0[..answer.0.len() - 1]);
            liar.peer.drain(1000);
        }),
    ];
    for (what, silence) in silences {
        let stage = Stage::new(Style::Simple, move |liar, _| silence(liar));
        let begin = Instant::now();
        let options = ClientOptions { connect_timeout: Duration::from_millis(300), ..options() };
        let refused = stage.connect_with(options).err().expect("nothing came");
        assert!(matches!(refused, ConnectError::TimedOut { .. }), "{what}: {refused}");
        assert!(begin.elapsed() < Duration::from_secs(3), "{what}");
        stage.end(None);
    }
}

#[test]
fn a_byte_at_a_time_is_understood() {
    let drip = |peer: &mut Peer, bytes: Bytes| bytes.0.into_iter().for_each(|byte| peer.try_send([byte]));
    let stage = Stage::new(Style::Extended, move |liar, _| {
        drip(&mut liar.peer, Bytes::new().raw("NBDMAGICIHAVEOPT\0\x03"));
        liar.peer.u32();
        while let Some((code, data)) = liar.option() {
            let answer = liar.good_answer(code, &data);
            drip(&mut liar.peer, answer);
            if code == 7 {
                break;
            }
        }
        while let Some(request) = liar.request() {
            let reply = liar.good_reply(&request);
            drip(&mut liar.peer, reply);
        }
    });
    let device = stage.connect().unwrap();
    assert_eq!(stage.read(&device, 4096, 1024).unwrap(), pattern(4096, 1024));
    stage.end(Some(device));
}

/// Answers option `at` with what `answer` makes of its code, and the others as it should.
fn spoil_answer(
    at: u32,
    answer: impl Fn(u32) -> Bytes + Send + Sync + 'static,
) -> impl Fn(&mut Liar) + Send + Sync + 'static {
    move |liar| {
        liar.greet();
        while let Some((code, data)) = liar.option() {
            let bytes = if code == at { answer(code) } else { liar.good_answer(code, &data) };
            liar.peer.try_send(bytes);
            if code == at {
                liar.peer.drain(1 << 20);
                return;
            }
        }
    }
}

#[test]
fn answers_that_break_the_protocol_are_not_believed() {
    let info = |item: Bytes| reply(7, INFO, item).raw(reply(7, ACK, ""));
    let context = |id: u32, name: &str| reply(10, META_CONTEXT, Bytes::new().u32(id).raw(name));
    let chosen = |first: Bytes, second: Bytes| first.raw(second).raw(reply(10, ACK, ""));
    let (base, locality) = ("base:allocation", "loam:locality");
    let answers: Vec<(&str, u32, Bytes)> = vec![
        ("a context that was not asked for", 10, chosen(context(1, base), context(2, "x-other:y"))),
        ("a context twice", 10, chosen(context(1, base), context(2, base))),
        ("two contexts of one id", 10, chosen(context(1, base), context(1, locality))),
        ("another magic number", 11, Bytes::new().u64(OPTION_REPLY ^ 1).u32(11).u32(ACK).u32(0)),
        ("an answer to another option", 11, reply(8, ACK, "")),
        ("four billion bytes", 11, Bytes::new().u64(OPTION_REPLY).u32(11).u32(ERR_UNSUP).u32(u32::MAX)),
        ("an ACK with data", 11, reply(11, ACK, "x")),
        ("an unknown reply", 11, reply(11, 77, "")),
        ("reply type 0", 11, reply(11, 0, "")),
        ("a context without a name's place", 10, reply(10, META_CONTEXT, "abc")),
        ("a context that is not UTF-8", 10, reply(10, META_CONTEXT, [0, 0, 0, 1, 0xff])),
        ("a context with a NUL", 10, reply(10, META_CONTEXT, "\0\0\0\x01base:\0")),
        ("success without size and flags", 7, reply(7, ACK, "")),
        ("information without a type", 7, info(Bytes::new().raw("x"))),
        ("half a size", 7, info(Bytes::new().u16(0).u32(7))),
        ("block size 0", 7, info(Bytes::new().u16(3).u32(0).u32(4096).u32(1 << 20))),
        ("block size 3", 7, info(Bytes::new().u16(3).u32(3).u32(4096).u32(1 << 20))),
        ("minimum above maximum", 7, info(Bytes::new().u16(3).u32(4096).u32(4096).u32(512))),
        ("all ones", 7, info(Bytes::new().u16(3).u32(u32::MAX).u32(u32::MAX).u32(u32::MAX))),
    ];
    for (what, at, answer) in answers {
        let refused = refusal(Style::Extended, spoil_answer(at, move |_| answer.clone()));
        assert!(matches!(refused, ConnectError::Protocol { .. }), "{what}: {refused}");
    }
}

#[test]
fn answers_that_never_end_are_ended() {
    for (at, kind, data) in [(7, INFO, &b"\0\x63"[..]), (10, META_CONTEXT, b"\0\0\0\x01base:allocation")] {
        let before = peak_memory();
        let refused = refusal(Style::Extended, move |liar| {
            liar.greet();
            while let Some((code, asked)) = liar.option() {
                if code == at {
                    let many = reply(code, kind, data).0.repeat(1000);
                    // The client hangs up: sending fails.
                    while std::io::Write::write_all(&mut liar.peer.stream, &many).is_ok() {}
                    return;
                }
                let answer = liar.good_answer(code, &asked);
                liar.peer.try_send(answer);
            }
        });
        assert!(matches!(refused, ConnectError::Protocol { .. }), "{refused}");
        assert!(peak_memory() - before < 16 << 20);
    }
}

#[test]
fn refusals_are_told_as_what_they_are() {
    let refused = |kind: u32, text: &'static [u8]| {
        refusal(Style::Extended, spoil_answer(7, move |code| reply(code, kind, text)))
    };
    assert!(matches!(refused(ERR_UNKNOWN, b""), ConnectError::NoSuchExport { .. }));
    assert!(matches!(refused((1 << 31) + 5, b""), ConnectError::TlsRequired { .. }));
    for kind in [ERR_POLICY, ERR_INVALID, ERR_TOO_BIG, (1 << 31) + 7, (1 << 31) + 8, (1 << 31) + 4242] {
        assert!(matches!(refused(kind, b"because"), ConnectError::Refused { .. }), "{kind:x}");
    }
    let text = refused(ERR_POLICY, b"because\x1b[31m of \xff \0 reasons").to_string();
    assert!(text.contains("because") && !text.contains(|c: char| c.is_control()), "{text:?}");
    let refused =
        refusal(Style::Extended, spoil_answer(7, |code| reply(code, ERR_POLICY, vec![b'x'; 60_000])));
    assert!(refused.to_string().len() < 5000, "an essay");
}

#[test]
fn a_server_that_knows_only_export_name_is_used() {
    for (flags, zeroes) in [(0_u16, 124), (1, 124), (2, 0), (3, 0)] {
        let stage = Stage::new(Style::Simple, move |liar, _| {
            liar.peer.send(Bytes::new().raw("NBDMAGICIHAVEOPT").u16(flags));
            assert_eq!(liar.peer.u32(), u32::from(flags));
            while let Some((code, data)) = liar.option() {
                assert!(code == 1 || flags & 1 == 1, "only fixed newstyle has options like {code}");
                if code == 1 {
                    assert_eq!(data, b"disk");
                    break;
                }
                liar.peer.try_send(reply(code, ERR_UNSUP, ""));
            }
            liar.peer.try_send(Bytes::new().u64(SIZE).u16(1).raw(vec![0; zeroes]));
            liar.behave();
        });
        let device = stage.connect().unwrap();
        assert_eq!(device.geometry().size, SIZE);
        assert_eq!(stage.read(&device, 0, 512).unwrap(), pattern(0, 512));
        stage.end(Some(device));
    }
}

#[test]
fn any_size_is_lived_with() {
    for size in [0, 1, 511, 1 << 63, u64::MAX] {
        let stage = Stage::new(Style::Extended, move |liar, _| {
            liar.greet();
            while let Some((code, data)) = liar.option() {
                let answer = match code {
                    7 => good_info(7, size, FLAGS).raw(reply(7, ACK, "")),
                    _ => liar.good_answer(code, &data),
                };
                liar.peer.try_send(answer);
                if code == 7 {
                    break;
                }
            }
            liar.behave();
        });
        let device = stage.connect().unwrap();
        let last = device.geometry().size / 512 * 512;
        for (offset, length) in
            [(0, 512), (last.saturating_sub(512), 512), (last, 512), (u64::MAX - 511, 512)]
        {
            let inside = offset.checked_add(length).is_some_and(|end| end <= device.geometry().size);
            let mut buffer = vec![0; length as usize];
            assert_eq!(stage.in_time(device.read(offset, &mut buffer)).is_ok(), inside, "{offset} of {size}");
            assert_eq!(
                stage.in_time(device.extents(offset, length, 10)).is_ok(),
                inside,
                "{offset} of {size}"
            );
            assert_eq!(stage.in_time(device.trim(offset, length)).is_ok(), inside, "{offset} of {size}");
        }
        stage.end(Some(device));
    }
}

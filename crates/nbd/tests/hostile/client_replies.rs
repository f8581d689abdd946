//! Servers that misbehave in the transmission phase. A reply that breaks the protocol fails the request and ends the
//! connection; an error that the protocol knows fails the request alone.

use std::time::{Duration, Instant};

use loam_block::{BlockDevice, ErrorKind, WriteFlags};
use loam_nbd::client::{ClientOptions, NbdDevice};

use crate::hostile::*;
use crate::liar::*;

/// Which request is answered badly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    /// A read of 8 KiB at 4 KiB.
    Read,
    Write,
    Flush,
    /// The extents of the first MiB.
    Extents,
}

impl On {
    fn command(self) -> u16 {
        match self {
            On::Read => 0,
            On::Write => 1,
            On::Flush => 3,
            On::Extents => 7,
        }
    }

    fn ask(self, stage: &Stage, device: &NbdDevice) -> Result<(), loam_block::Error> {
        match self {
            On::Read => stage.read(device, 4096, 8192).map(drop),
            On::Write => stage.in_time(device.write(4096, &[1; 8192], WriteFlags { fua: false })),
            On::Flush => stage.in_time(device.flush()),
            On::Extents => stage.in_time(device.extents(0, SIZE, 100)).map(drop),
        }
    }
}

type Answer = fn(&Liar, &Request) -> Bytes;

/// The request fails as a broken protocol, the client leaves, and a connection that behaves serves it again.
fn ends_the_connection(style: Style, on: On, what: &'static str, answer: Answer) {
    let stage = Stage::new(style, move |liar, number| {
        if !liar.haggle() {
            return;
        }
        if number > 0 {
            return liar.behave();
        }
        let request = liar.request().expect("a request");
        assert_eq!(request.command, on.command());
        let bytes = answer(liar, &request);
        liar.peer.try_send(bytes);
        liar.expect_left();
    });
    let device = stage.connect().unwrap();
    let begin = Instant::now();
    let error = on.ask(&stage, &device).expect_err(what);
    assert!(begin.elapsed() < Duration::from_secs(2), "{what}: only the time limit ended it");
    assert_eq!(error.kind(), ErrorKind::Io, "{style:?}, {what}: {error:?}");
    assert!(format!("{error:?}").contains("broke the protocol"), "{style:?}, {what}: {error:?}");
    assert_eq!(stage.read(&device, 512, 512).unwrap(), pattern(512, 512), "{what}: another connection");
    stage.end(Some(device));
}

/// The request fails with this error, and the same connection serves the next one.
fn fails_alone(style: Style, on: On, what: &'static str, kind: ErrorKind, answer: Answer) {
    let stage = Stage::new(style, move |liar, number| {
        assert_eq!(number, 0, "{what}: the client came again");
        assert!(liar.haggle());
        let request = liar.request().expect("a request");
        let bytes = answer(liar, &request);
        liar.peer.try_send(bytes);
        liar.behave();
    });
    let device = stage.connect().unwrap();
    let error = on.ask(&stage, &device).expect_err(what);
    assert_eq!(error.kind(), kind, "{style:?}, {what}: {error:?}");
    assert!(format!("{error}").len() < 6000, "an essay");
    assert_eq!(stage.read(&device, 512, 512).unwrap(), pattern(512, 512), "{what}: the connection goes on");
    stage.end(Some(device));
}

#[test]
fn simple_replies_to_what_was_not_asked() {
    let table: [(&str, Answer); 5] = [
        ("another magic number", |_, _| Bytes::new().u32(SIMPLE_REPLY ^ 0x100).raw([0; 16])),
        ("all zero", |_, _| Bytes::new().raw([0; 64])),
        ("a cookie of nobody", |liar, asked| {
            liar.simple(&Request { cookie: asked.cookie ^ 1 << 40, ..*asked }, 0).raw([0; 8192])
        }),
        ("a slot of nobody", |liar, asked| {
            liar.simple(&Request { cookie: asked.cookie ^ 0xffff_ffff, ..*asked }, 0).raw([0; 8192])
        }),
        ("a structured reply", |_, asked| {
            Bytes::new().u32(STRUCTURED_REPLY).u16(1).u16(0).u64(asked.cookie).u32(0)
        }),
    ];
    for (what, answer) in table {
        ends_the_connection(Style::Simple, On::Read, what, answer);
    }
}

#[test]
fn a_reply_that_comes_twice_is_not_taken_for_another() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let stage = Stage::new(style, move |liar, number| {
            if !liar.haggle() {
                return;
            }
            if number > 0 {
                return liar.behave();
            }
            let first = liar.request().expect("a request");
            let reply = liar.good_reply(&first);
            liar.peer.try_send(reply.0.repeat(2));
            liar.peer.drain(1 << 20);
        });
        let device = stage.connect().unwrap();
        assert_eq!(stage.read(&device, 0, 512).unwrap(), pattern(0, 512));
        // The second one is noticed at once, or by the next request, which it does not answer.
        match stage.read(&device, 512, 512) {
            Ok(bytes) => assert_eq!(bytes, pattern(512, 512)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "{error:?}"),
        }
        assert_eq!(stage.read(&device, 512, 512).unwrap(), pattern(512, 512));
        stage.end(Some(device));
    }
}

#[test]
fn chunks_that_break_the_protocol() {
    let table: [(&str, Answer); 18] = [
        ("another magic number", |_, _| Bytes::new().raw([0x66; 64])),
        ("a cookie of nobody", |liar, asked| {
            liar.good_reply(&Request { cookie: asked.cookie ^ 1 << 32, ..*asked })
        }),
        ("a simple reply to a read", |liar, asked| liar.simple(asked, 0).raw([0; 8192])),
        ("an unknown type", |liar, asked| liar.chunk(asked, 1, 3, "")),
        ("extents", |liar, asked| liar.status(asked, CONTEXT, &[(8192, 0)])),
        ("an empty reply", |liar, asked| liar.chunk(asked, 1, 0, "")),
        ("an end that is not the end", |liar, asked| liar.chunk(asked, 0, 0, "")),
        ("an end with a payload", |liar, asked| liar.chunk(asked, 1, 0, "x")),
        ("data without data", |liar, asked| liar.chunk(asked, 1, 1, Bytes::new().u64(4096))),
        ("data before what was asked", |liar, asked| liar.data(asked, 1, 4095, 8192)),
        ("data behind what was asked", |liar, asked| liar.data(asked, 1, 4097, 8192)),
        ("data around the end of numbers", |liar, asked| liar.data(asked, 1, u64::MAX - 99, 8)),
        ("four billion bytes", |liar, asked| liar.chunk_header(asked, 1, 1, u32::MAX.into()).u64(4096)),
        ("half of what was asked", |liar, asked| liar.data(asked, 1, 4096, 4096)),
        ("a gap", |liar, asked| liar.data(asked, 0, 4096, 4096).raw(liar.hole(asked, 1, 8193, 4095))),
        ("an overlap", |liar, asked| liar.data(asked, 0, 4096, 4097).raw(liar.data(asked, 1, 8192, 4096))),
        ("a hole in data", |liar, asked| liar.data(asked, 0, 4096, 8192).raw(liar.hole(asked, 1, 5000, 1))),
        ("the same twice", |liar, asked| {
            liar.data(asked, 0, 4096, 4096)
                .raw(liar.data(asked, 0, 4096, 4096))
                .raw(liar.chunk(asked, 1, 0, ""))
        }),
    ];
    for style in [Style::Structured, Style::Extended] {
        for (what, answer) in table {
            ends_the_connection(style, On::Read, what, answer);
        }
    }
}

#[test]
fn holes_and_errors_that_break_the_protocol() {
    let table: [(&str, Answer); 11] = [
        ("an empty hole", |liar, asked| liar.hole(asked, 1, 4096, 0)),
        ("a hole that is too long", |liar, asked| liar.hole(asked, 1, 4096, 8193)),
        ("a hole of four billion bytes", |liar, asked| liar.hole(asked, 1, 4096, u32::MAX)),
        ("a hole before what was asked", |liar, asked| liar.hole(asked, 1, 0, 4097)),
        ("half a hole's description", |liar, asked| liar.chunk(asked, 1, 2, [0; 11])),
        ("error 0", |liar, asked| liar.chunk(asked, 1, 0x8001, [0; 6])),
        ("an error without a message's length", |liar, asked| liar.chunk(asked, 1, 0x8001, [0, 0, 0, 5])),
        ("a message longer than its chunk", |liar, asked| {
            liar.chunk(asked, 1, 0x8001, Bytes::new().u32(5).u16(100).raw("short"))
        }),
        ("an offset that is not there", |liar, asked| {
            liar.chunk(asked, 1, 0x8002, Bytes::new().u32(5).u16(8).raw([0; 8]))
        }),
        ("an unknown error that is too short", |liar, asked| liar.chunk(asked, 1, 0x8042, "abc")),
        ("an error of four billion bytes", |liar, asked| {
            liar.chunk_header(asked, 1, 0x8001, u32::MAX.into())
        }),
    ];
    for style in [Style::Structured, Style::Extended] {
        for (what, answer) in table {
            ends_the_connection(style, On::Read, what, answer);
        }
    }
}

#[test]
fn replies_of_the_wrong_kind() {
    for style in [Style::Structured, Style::Extended] {
        for on in [On::Write, On::Flush] {
            ends_the_connection(style, on, "data", |liar, asked| liar.data(asked, 1, asked.offset, 512));
            ends_the_connection(style, on, "a hole", |liar, asked| liar.hole(asked, 1, asked.offset, 512));
            ends_the_connection(style, on, "extents", |liar, asked| liar.status(asked, CONTEXT, &[(512, 0)]));
        }
        ends_the_connection(style, On::Extents, "data", |liar, asked| liar.data(asked, 1, 0, 512));
        ends_the_connection(style, On::Extents, "nothing", |liar, asked| liar.chunk(asked, 1, 0, ""));
    }
    ends_the_connection(Style::Structured, On::Extents, "a simple reply", |liar, asked| {
        liar.simple(asked, 0)
    });
    ends_the_connection(Style::Structured, On::Extents, "64 bits", |liar, asked| {
        liar.chunk(asked, 1, 6, Bytes::new().u32(CONTEXT).u32(1).u64(512).u64(0))
    });
    ends_the_connection(Style::Extended, On::Extents, "32 bits", |liar, asked| {
        liar.chunk(asked, 1, 5, Bytes::new().u32(CONTEXT).u32(512).u32(0))
    });
    ends_the_connection(Style::Extended, On::Flush, "a simple reply", |liar, asked| liar.simple(asked, 0));
    ends_the_connection(Style::Extended, On::Read, "another offset", |liar, asked| {
        let mut bytes = liar.good_reply(asked);
        // The last byte of the header's offset; that in the payload stays right.
        bytes.0[23] ^= 1;
        bytes
    });
    ends_the_connection(Style::Extended, On::Flush, "a payload beyond 32 bits", |liar, asked| {
        liar.chunk_header(asked, 1, 0x8001, u64::MAX)
    });
}

#[test]
fn extents_that_break_the_protocol() {
    for style in [Style::Structured, Style::Extended] {
        let table: [(&str, Answer); 5] = [
            ("an empty extent", |liar, asked| liar.status(asked, CONTEXT, &[(512, 0), (0, 3), (512, 0)])),
            ("no extent", |liar, asked| liar.status(asked, CONTEXT, &[])),
            ("half an extent", |liar, asked| {
                let kind = if liar.style == Style::Extended { 6 } else { 5 };
                liar.chunk(asked, 1, kind, Bytes::new().u32(CONTEXT).u32(1).u32(512).u16(0))
            }),
            ("a million too many", |liar, asked| {
                let kind = if liar.style == Style::Extended { 6 } else { 5 };
                liar.chunk_header(asked, 1, kind, 8 + (16 << 20) + 16)
            }),
            ("the same context twice", |liar, asked| {
                let once = liar.status(asked, CONTEXT, &[(SIZE, 0)]);
                let mut first = once.clone();
                first.0[5] = 0;
                first.raw(once)
            }),
        ];
        for (what, answer) in table {
            ends_the_connection(style, On::Extents, what, answer);
        }
    }
    ends_the_connection(Style::Extended, On::Extents, "a false number of extents", |liar, asked| {
        liar.chunk(asked, 1, 6, Bytes::new().u32(CONTEXT).u32(u32::MAX).u64(512).u64(0))
    });
}

#[test]
fn extents_of_another_context_are_no_answer() {
    for style in [Style::Structured, Style::Extended] {
        let stage = Stage::new(style, |liar, number| {
            if !liar.haggle() || number > 0 {
                return liar.behave();
            }
            let request = liar.request().expect("a request");
            let bytes = liar.status(&request, CONTEXT ^ 1, &[(SIZE, 3)]);
            liar.peer.try_send(bytes);
            liar.behave();
        });
        let device = stage.connect().unwrap();
        let error = On::Extents.ask(&stage, &device).expect_err("nothing was said of base:allocation");
        assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
        assert!(stage.read(&device, 512, 512).is_ok());
        stage.end(Some(device));
    }
}

/// More than was asked, beyond the export, beyond all numbers: what lies outside is cut off.
#[test]
fn extents_that_reach_too_far_are_cut() {
    let far: [&[(u64, u64)]; 4] = [
        &[(u64::MAX, 3)],
        &[(512, 0), (u64::MAX, 3), (u64::MAX, 0)],
        &[(SIZE, 0), (SIZE, 3)],
        &[(512, 0), (512, 1), (512, 2), (512, 3), (1 << 31, 0)],
    ];
    for style in [Style::Structured, Style::Extended] {
        for extents in far {
            let stage = Stage::new(style, move |liar, _| {
                assert!(liar.haggle());
                while let Some(request) = liar.request() {
                    let bytes = liar.status(&request, CONTEXT, extents);
                    liar.peer.try_send(bytes);
                }
            });
            let device = stage.connect().unwrap();
            for limit in [1, 2, 100] {
                let got = stage.in_time(device.extents(4096, 65536, limit)).unwrap();
                assert!(!got.is_empty() && got.len() <= limit);
                assert_eq!(got[0].offset, 4096);
                assert!(got.windows(2).all(|pair| pair[0].offset + pair[0].length == pair[1].offset));
                assert!(got.iter().all(|extent| extent.length > 0));
                let last = got.last().unwrap();
                assert!(last.offset + last.length <= 4096 + 65536);
            }
            stage.end(Some(device));
        }
    }
}

#[test]
fn errors_fail_the_request_and_nothing_else() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let table: [(ErrorKind, Answer); 9] = [
            (ErrorKind::ReadOnly, |liar, asked| failure(liar, asked, 1)),
            (ErrorKind::Io, |liar, asked| failure(liar, asked, 5)),
            (ErrorKind::Io, |liar, asked| failure(liar, asked, 12)),
            (ErrorKind::Invalid, |liar, asked| failure(liar, asked, 22)),
            (ErrorKind::NoSpace, |liar, asked| failure(liar, asked, 28)),
            (ErrorKind::NotSupported, |liar, asked| failure(liar, asked, 95)),
            (ErrorKind::Invalid, |liar, asked| failure(liar, asked, 2)),
            (ErrorKind::Invalid, |liar, asked| failure(liar, asked, 0x7fff_ffff)),
            (ErrorKind::Invalid, |liar, asked| failure(liar, asked, u32::MAX)),
        ];
        for (kind, answer) in table {
            fails_alone(style, On::Read, "an error", kind, answer);
            fails_alone(style, On::Write, "an error", kind, answer);
        }
    }
}

fn failure(liar: &Liar, asked: &Request, error: u32) -> Bytes {
    match liar.style {
        Style::Simple => liar.simple(asked, error),
        _ => liar.chunk(asked, 1, 0x8001, Bytes::new().u32(error).u16(3).raw("bad")),
    }
}

#[test]
fn error_chunks_of_all_kinds_are_understood() {
    for style in [Style::Structured, Style::Extended] {
        let table: [(&str, Answer); 6] = [
            ("a message that is too long", |liar, asked| {
                liar.chunk(asked, 1, 0x8001, Bytes::new().u32(5).u16(60_000).raw([b'x'; 60_000]))
            }),
            ("a message that is no text", |liar, asked| {
                liar.chunk(asked, 1, 0x8001, Bytes::new().u32(5).u16(4).raw([0xff, 0, 0x1b, b'[']))
            }),
            ("an offset", |liar, asked| liar.chunk(asked, 1, 0x8002, Bytes::new().u32(5).u16(0).u64(4096))),
            ("an unknown kind of error", |liar, asked| {
                liar.chunk(asked, 1, 0xfffe, Bytes::new().u32(5).u16(1).raw("x and more"))
            }),
            ("an error after all data", |liar, asked| {
                liar.data(asked, 0, 4096, 8192).raw(liar.chunk(asked, 1, 0x8001, Bytes::new().u32(5).u16(0)))
            }),
            ("an error, data, an end", |liar, asked| {
                let error = liar.chunk(asked, 0, 0x8002, Bytes::new().u32(5).u16(0).u64(9000));
                error.raw(liar.data(asked, 0, 4096, 100)).raw(liar.chunk(asked, 1, 0, ""))
            }),
        ];
        for (what, answer) in table {
            fails_alone(style, On::Read, what, ErrorKind::Io, answer);
        }
    }
}

#[test]
fn chunks_in_any_order_with_flags_of_the_future_are_put_together() {
    for style in [Style::Structured, Style::Extended] {
        let stage = Stage::new(style, |liar, _| {
            assert!(liar.haggle());
            let asked = liar.request().expect("a request");
            let parts = [
                liar.data(&asked, 0x8000, 8192, 4096),
                liar.hole(&asked, 0, 5000, 1000),
                liar.data(&asked, 0, 6000, 2192),
                liar.data(&asked, 0, 4096, 904),
                liar.chunk(&asked, 1 | 0x4000, 0, ""),
            ];
            parts.into_iter().for_each(|part| liar.peer.try_send(part));
            liar.behave();
        });
        let device = stage.connect().unwrap();
        let mut expected = pattern(4096, 8192);
        expected[904..1904].fill(0);
        assert_eq!(stage.read(&device, 4096, 8192).unwrap(), expected);
        stage.end(Some(device));
    }
}

#[test]
fn a_reply_that_never_ends_does() {
    for style in [Style::Structured, Style::Extended] {
        let stage = Stage::new(style, |liar, _| {
            if !liar.haggle() {
                return;
            }
            let Some(asked) = liar.request() else { return };
            let error = liar.chunk(&asked, 0, 0x8001, Bytes::new().u32(5).u16(0)).0.repeat(100);
            while std::io::Write::write_all(&mut liar.peer.stream, &error).is_ok() {}
        });
        let request_timeout = Duration::from_millis(500);
        let limits = ClientOptions { request_timeout, reconnect_limit: Duration::ZERO, ..options() };
        let device = stage.connect_with(limits).unwrap();
        let before = peak_memory();
        assert!(stage.read(&device, 0, 512).is_err());
        assert!(peak_memory() - before < 16 << 20);
        stage.end(Some(device));
    }
}

#[test]
fn a_server_that_stops_in_mid_reply_is_left_and_tried_again() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        for keep in [0, 1, 15, 20, 32, 50, 8000] {
            let stage = Stage::new(style, move |liar, number| {
                if !liar.haggle() {
                    return;
                }
                if number > 0 {
                    return liar.behave();
                }
                let asked = liar.request().expect("a request");
                let reply = liar.good_reply(&asked);
                liar.peer.try_send(&reply.0[..keep]);
            });
            let device = stage.connect().unwrap();
            assert_eq!(stage.read(&device, 4096, 8192).unwrap(), pattern(4096, 8192), "{style:?} {keep}");
            stage.end(Some(device));
        }
    }
}

#[test]
fn a_server_that_shrinks_while_it_was_away_is_not_used() {
    let stage = Stage::new(Style::Extended, |liar, number| {
        liar.greet();
        while let Some((code, data)) = liar.option() {
            let size = if number == 0 { SIZE } else { SIZE / 2 };
            let answer = match code {
                7 => good_info(7, size, FLAGS).raw(reply(7, ACK, "")),
                _ => liar.good_answer(code, &data),
            };
            liar.peer.try_send(answer);
            if code == 7 && number == 0 {
                liar.request();
                return;
            } else if code == 7 {
                return liar.expect_left();
            }
        }
    });
    let device = stage.connect().unwrap();
    let error = stage.read(&device, 0, 512).expect_err("it is another export now");
    assert!(matches!(error.kind(), ErrorKind::Changed | ErrorKind::Unavailable | ErrorKind::Io), "{error:?}");
    stage.end(Some(device));
}

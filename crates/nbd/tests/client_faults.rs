//! The client against servers that answer oddly, late, by half, or not at all.

mod client_support;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};
use std::thread;
use std::time::{Duration, Instant};

use client_support::{ALLOCATION, FLAGS, Fake, options, runtime};
use loam_block::{BlockDevice, ErrorKind, Extent, ExtentKind, WriteFlags, ZeroFlags};
use loam_nbd::client::{ClientOptions, NbdDevice};
use loam_nbd::protocol::{Command, CommandFlags, HeaderStyle, TransmissionFlags};

const SIZE: u64 = 64 << 20;
const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

/// Runs `client` against `server`, which has a thread of its own.
fn meet<F: Future<Output = ()>>(
    fake: Fake,
    server: impl FnOnce(Fake) + Send + 'static,
    options: ClientOptions,
    client: impl FnOnce(NbdDevice) -> F,
) {
    let uri = fake.uri();
    let server = thread::spawn(move || server(fake));
    runtime().block_on(async {
        client(NbdDevice::connect(&uri, options).await.unwrap()).await;
    });
    server.join().unwrap();
}

async fn read(device: &NbdDevice, offset: u64, length: usize) -> loam_block::Result<Vec<u8>> {
    let mut buffer = vec![0xee; length];
    device.read(offset, &mut buffer).await.map(|()| buffer)
}

fn poll_once<T: Unpin>(io: &mut loam_block::Io<'_, T>) {
    let polled = std::pin::Pin::new(io).poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending());
}

#[test]
fn replies_in_any_order_find_their_requests() {
    for style in STYLES {
        let serve = move |fake: Fake| {
            let mut session = fake.accept();
            let mut requests: Vec<_> = (0..8).map(|_| session.expect(Command::Read)).collect();
            requests.reverse();
            for request in &requests {
                let data = vec![(request.offset >> 12) as u8; request.length as usize];
                match style {
                    HeaderStyle::Simple => session.simple(request, 0, &data),
                    _ => session.data(request, true, request.offset, &data),
                }
            }
            session.serve(0);
        };
        meet(Fake::new(style, SIZE, FLAGS), serve, options(), |device| async move {
            let reads = (0..8).map(|page| read(&device, page << 12, 4096 << (page % 3 * 4)));
            for (page, bytes) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
                assert!(bytes.unwrap().iter().all(|byte| *byte == page as u8), "{style:?} {page}");
            }
        });
    }
}

#[test]
fn chunks_come_in_any_order_and_between_those_of_others() {
    for style in [HeaderStyle::Structured, HeaderStyle::Extended] {
        let serve = |fake: Fake| {
            let mut session = fake.accept();
            let (a, b) = (session.expect(Command::Read), session.expect(Command::Read));
            session.data(&a, false, a.offset + 3000, &[3; 1096]);
            session.data(&b, false, b.offset, &[7; 4096]);
            session.hole(&a, false, a.offset + 1000, 2000);
            session.done(&b);
            session.data(&a, true, a.offset, &[1; 1000]);
            session.serve(0);
        };
        meet(Fake::new(style, SIZE, FLAGS), serve, options(), |device| async move {
            let (a, b) = futures_util::future::join(read(&device, 8192, 4096), read(&device, 0, 4096)).await;
            assert_eq!(a.unwrap(), [vec![1; 1000], vec![0; 2000], vec![3; 1096]].concat());
            assert_eq!(b.unwrap(), [7; 4096]);
        });
    }
}

#[test]
fn an_error_is_that_of_its_request_alone() {
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let (a, b) = (session.expect(Command::Read), session.expect(Command::Read));
        let error =
            [&5_u32.to_be_bytes()[..], &8_u16.to_be_bytes(), b"a scrape", &(a.offset + 9).to_be_bytes()];
        session.data(&a, false, a.offset, &[1; 4096]);
        session.chunk(&a, false, 0x8002, &error.concat());
        session.data(&b, true, b.offset, &[2; 4096]);
        session.done(&a);
        session.serve(9);
    };
    meet(Fake::new(HeaderStyle::Structured, SIZE, FLAGS), serve, options(), |device| async move {
        let (a, b) = futures_util::future::join(read(&device, 0, 4096), read(&device, 4096, 4096)).await;
        let error = a.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("a scrape"), "{error}");
        assert_eq!(b.unwrap(), [2; 4096]);
        assert_eq!(read(&device, 0, 10).await.unwrap(), [9; 10]);
    });
}

#[test]
fn a_server_that_knows_only_export_name_serves() {
    let mut fake = Fake::new(HeaderStyle::Simple, SIZE, FLAGS);
    fake.ancient = true;
    meet(
        fake,
        |fake| fake.accept().serve(4),
        options(),
        |device| async move {
            assert_eq!(device.geometry().size, SIZE);
            assert_eq!(read(&device, SIZE - 5, 5).await.unwrap(), [4; 5]);
            assert!(!device.capabilities().zero && !device.capabilities().extents);
            device.flush().await.unwrap();
        },
    );
}

#[test]
fn a_server_that_dies_in_the_middle_of_a_reply_and_comes_back_is_asked_again() {
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let (request, other) = (session.expect(Command::Read), session.expect(Command::Write));
        assert_eq!(other.length, 4096);
        session.chunk(&request, false, 1, &[&request.offset.to_be_bytes()[..], &[1; 100]].concat());
        drop(session);
        thread::sleep(Duration::from_millis(50));
        fake.accept().serve(2);
    };
    meet(Fake::new(HeaderStyle::Structured, SIZE, FLAGS), serve, options(), |device| async move {
        let write = device.write(0, &[3; 4096], WriteFlags::default());
        let (bytes, written) = futures_util::future::join(read(&device, 0, 1 << 20), write).await;
        assert!(bytes.unwrap().iter().all(|byte| *byte == 2));
        written.unwrap();
    });
}

#[test]
fn a_flush_after_a_lost_connection_says_once_what_may_be_gone() {
    let flags = FLAGS | TransmissionFlags::SEND_FLUSH;
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        for _ in 0..2 {
            let request = session.expect(Command::Write);
            session.done(&request);
        }
        session.expect(Command::Flush);
        drop(session);
        fake.accept().serve(0);
    };
    meet(Fake::new(HeaderStyle::Extended, SIZE, flags), serve, options(), |device| async move {
        for offset in [0, 8192] {
            device.write(offset, &[1; 5000], WriteFlags::default()).await.unwrap();
        }
        let error = device.flush().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WritesLost);
        assert!(error.to_string().contains("10000 bytes"), "{error}");
        device.write(0, &[1; 5000], WriteFlags::default()).await.unwrap();
        device.flush().await.unwrap();
    });
}

#[test]
fn what_was_flushed_or_forced_is_not_lost() {
    let flags = FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA;
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let commands = [Command::Write, Command::Flush, Command::Write];
        for command in commands {
            let request = session.expect(command);
            assert_eq!(request.flags.contains(CommandFlags::FUA), request.offset == 8192);
            session.simple(&request, 0, &[]);
        }
        session.expect(Command::Read);
        drop(session);
        fake.accept().serve(0);
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, flags), serve, options(), |device| async move {
        device.write(0, &[1; 4096], WriteFlags::default()).await.unwrap();
        device.flush().await.unwrap();
        device.write(8192, &[1; 4096], WriteFlags { fua: true }).await.unwrap();
        read(&device, 0, 4096).await.unwrap();
        device.flush().await.unwrap();
    });
}

#[test]
fn a_dropped_read_leaves_the_next_one_its_bytes() {
    for style in STYLES {
        let serve = move |fake: Fake| {
            let mut session = fake.accept();
            let request = session.expect(Command::Read);
            let data = vec![1; request.length as usize];
            match style {
                HeaderStyle::Simple => session.simple(&request, 0, &data),
                _ => session.data(&request, true, request.offset, &data),
            }
            session.serve(2);
        };
        meet(Fake::new(style, SIZE, FLAGS), serve, options(), |device| async move {
            let mut buffer = vec![0; 8 << 20];
            {
                let mut io = device.read(0, &mut buffer);
                // Long enough for some of the eight megabytes, which no socket holds at once.
                tokio::time::timeout(Duration::from_millis(3), &mut io).await.ok();
            }
            assert_eq!(read(&device, 4096, 4096).await.unwrap(), [2; 4096], "{style:?}");
        });
    }
}

#[test]
fn a_write_dropped_while_it_is_being_sent_costs_the_connection_only() {
    let serve = |fake: Fake| {
        let session = fake.accept();
        let mut other = fake.accept();
        other.serve(5);
        drop(session);
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, FLAGS), serve, options(), |device| async move {
        let data = vec![1; 16 << 20];
        let mut write = device.write(0, &data, WriteFlags::default());
        poll_once(&mut write);
        drop(write);
        let begin = Instant::now();
        assert_eq!(read(&device, 0, 4096).await.unwrap(), [5; 4096]);
        assert!(begin.elapsed() < Duration::from_secs(3), "no time-out was waited for");
    });
}

#[test]
fn a_future_that_is_not_polled_does_not_hold_up_another() {
    for (first, second) in [(4096, 4096), (1 << 20, 4096), (4096, 1 << 20)] {
        let serve = |fake: Fake| {
            let mut session = fake.accept();
            let requests = [session.expect(Command::Read), session.expect(Command::Read)];
            for request in requests {
                session.data(&request, true, request.offset, &vec![6; request.length as usize]);
            }
            session.serve(6);
        };
        meet(Fake::new(HeaderStyle::Structured, SIZE, FLAGS), serve, options(), |device| async move {
            let (mut a, mut b) = (vec![0; first], vec![0; second]);
            let mut idle = device.read(0, &mut a);
            poll_once(&mut idle);
            device.read(0, &mut b).await.unwrap();
            assert!(b.iter().all(|byte| *byte == 6));
            idle.await.unwrap();
            assert!(a.iter().all(|byte| *byte == 6), "what was received for it is right");
        });
    }
}

#[test]
fn a_silent_server_is_given_up_in_time() {
    let short = Duration::from_millis(200);
    let options = ClientOptions { request_timeout: short, reconnect_limit: Duration::ZERO, ..options() };
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        session.expect(Command::Read);
        drop(fake);
        session.stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut byte = [0; 1];
        assert_eq!(std::io::Read::read(&mut session.stream, &mut byte).unwrap(), 0, "the client went away");
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, FLAGS), serve, options, |device| async move {
        let begin = Instant::now();
        let error = read(&device, 0, 4096).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unavailable), "{error:?}");
        assert!(begin.elapsed() >= short && begin.elapsed() < Duration::from_secs(4));
    });
}

#[test]
fn an_export_that_changed_is_not_taken_for_the_old_one() {
    let serve = |mut fake: Fake| {
        let mut session = fake.accept();
        session.expect(Command::Read);
        drop(session);
        fake.size += 4096;
        fake.accept();
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, FLAGS), serve, options(), |device| async move {
        for _ in 0..2 {
            assert_eq!(read(&device, 0, 4096).await.unwrap_err().kind(), ErrorKind::Changed);
        }
    });
}

#[test]
fn what_is_not_offered_is_not_asked_for() {
    let flags = FLAGS | TransmissionFlags::SEND_FLUSH;
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let (request, data) = session.request();
            assert_eq!(request.flags, CommandFlags::empty());
            assert!(data.iter().all(|byte| *byte == 0));
            seen.push((request.command, request.offset, request.length));
            if request.command != Command::Disconnect {
                session.simple(&request, 0, &[]);
            }
        }
        assert_eq!(seen[0], (Command::Write, 0, 1 << 20), "zeroes are written");
        assert_eq!(seen[1], (Command::Write, 1 << 20, 512));
        assert_eq!(seen[2..4], [(Command::Write, 512, 512), (Command::Flush, 0, 0)], "FUA is a flush");
        assert_eq!(seen[4], (Command::Disconnect, 0, 0), "and a last word");
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, flags), serve, options(), |device| async move {
        let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
        let refused = device.write_zeroes(0, 4096, fast).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        device.write_zeroes(0, (1 << 20) + 512, ZeroFlags::default()).await.unwrap();
        device.trim(0, 4096).await.unwrap();
        device.prefetch(0, 4096).await.unwrap();
        device.write(512, &[0; 512], WriteFlags { fua: true }).await.unwrap();
        let extents = device.extents(0, 4096, 9).await.unwrap();
        assert_eq!(extents, [Extent { offset: 0, length: 4096, kind: ExtentKind::Data }]);
    });
}

#[test]
fn long_ranges_are_cut_where_lengths_have_32_bits() {
    let flags = FLAGS | TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_TRIM;
    for (style, pieces) in [(HeaderStyle::Simple, 5), (HeaderStyle::Extended, 1)] {
        let serve = move |fake: Fake| {
            let mut session = fake.accept();
            for command in [Command::WriteZeroes, Command::Trim] {
                let mut at = 4096;
                for _ in 0..pieces {
                    let request = session.expect(command);
                    assert_eq!(request.offset, at);
                    at += request.length;
                    match style {
                        HeaderStyle::Simple => session.simple(&request, 0, &[]),
                        _ => session.done(&request),
                    }
                }
                assert_eq!(at, 4096 + (9 << 29));
            }
            session.serve(0);
        };
        meet(Fake::new(style, 1 << 40, flags), serve, options(), |device| async move {
            device.write_zeroes(4096, 9 << 29, ZeroFlags::default()).await.unwrap();
            device.trim(4096, 9 << 29).await.unwrap();
        });
    }
}

#[test]
fn extents_are_those_of_the_answer_cut_to_the_question() {
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let answers: [&[(u32, u32)]; 4] = [
            &[(4096, 3), (4096, 0), (4096, 2), (1 << 30, 3)],
            &[(512, 1)],
            &[(1 << 20, 3)],
            &[(8192, 0), (8192, 0)],
        ];
        for (index, answer) in answers.into_iter().enumerate() {
            let request = session.expect(Command::BlockStatus);
            assert_eq!(request.flags.contains(CommandFlags::REQ_ONE), index == 2);
            let mut payload = ALLOCATION.to_be_bytes().to_vec();
            for (length, flags) in answer {
                payload.extend(length.to_be_bytes());
                payload.extend(flags.to_be_bytes());
            }
            session.chunk(&request, true, 5, &payload);
        }
        session.serve(0);
    };
    meet(Fake::new(HeaderStyle::Structured, SIZE, FLAGS), serve, options(), |device| async move {
        let extent = |offset, length, kind| Extent { offset, length, kind };
        assert_eq!(
            device.extents(4096, 16384, 99).await.unwrap(),
            [
                extent(4096, 4096, ExtentKind::Hole),
                extent(8192, 4096, ExtentKind::Data),
                extent(12288, 4096, ExtentKind::Zero),
                extent(16384, 4096, ExtentKind::Hole),
            ]
        );
        assert_eq!(device.extents(0, 4096, 99).await.unwrap(), [extent(0, 512, ExtentKind::Data)]);
        assert_eq!(device.extents(0, 4096, 1).await.unwrap(), [extent(0, 4096, ExtentKind::Hole)]);
        assert_eq!(device.extents(0, 1 << 20, 5).await.unwrap(), [extent(0, 16384, ExtentKind::Data)]);
    });
}

#[test]
fn a_breach_of_the_protocol_is_an_error_and_never_bytes() {
    type Breach = fn(&mut client_support::Session, &loam_nbd::protocol::Request);
    let breaches: [(&str, Breach); 7] = [
        ("a gap", |session, request| session.data(request, true, request.offset, &[1; 4095])),
        ("a byte outside", |session, request| session.data(request, true, request.offset + 1, &[1; 4096])),
        ("an overlap", |session, request| {
            session.data(request, false, request.offset, &[1; 4096]);
            session.hole(request, true, request.offset + 4095, 1);
        }),
        ("another cookie", |session, request| {
            let mut other = *request;
            other.cookie ^= 1 << 40;
            session.data(&other, true, request.offset, &[1; 4096]);
        }),
        ("a simple reply", |session, request| session.simple(request, 0, &[1; 4096])),
        ("no data", |session, request| session.done(request)),
        ("extents", |session, request| {
            session.chunk(request, true, 5, &[&7_u32.to_be_bytes()[..], &[0, 0, 16, 0, 0, 0, 0, 3]].concat());
        }),
    ];
    for (name, breach) in breaches {
        let serve = move |fake: Fake| {
            let mut session = fake.accept();
            let request = session.expect(Command::Read);
            breach(&mut session, &request);
            drop(session);
            fake.accept().serve(8);
        };
        meet(Fake::new(HeaderStyle::Structured, SIZE, FLAGS), serve, options(), |device| async move {
            let error = read(&device, 0, 4096).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{name}: {error:?}");
            assert!(error.to_string().contains("protocol"), "{name}: {error}");
            assert_eq!(read(&device, 0, 4096).await.unwrap(), [8; 4096], "{name}: another connection");
        });
    }
}

#[test]
fn a_server_that_stops_gracefully_is_waited_for() {
    let serve = |fake: Fake| {
        let mut session = fake.accept();
        let request = session.expect(Command::Read);
        session.simple(&request, 108, &[]);
        drop(session);
        fake.accept().serve(3);
    };
    meet(Fake::new(HeaderStyle::Simple, SIZE, FLAGS), serve, options(), |device| async move {
        let mut buffer = [0; 512];
        pin!(device.read(0, &mut buffer)).await.unwrap();
        assert_eq!(buffer, [3; 512]);
    });
}

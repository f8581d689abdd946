//! What is wrong with a message, and what must follow.

use loam_block::ErrorKind;

use super::super::*;
use super::{array, hex};

#[test]
fn bad_greetings_end_the_connection() {
    let magic = Greeting::parse(array("5353482d322e302d 4f70656e5353485f 392e"));
    assert!(matches!(magic, Err(ProtocolError::Magic { .. })));
    let old = Greeting::parse(array("4e42444d41474943 0000420281861253 0000"));
    assert_eq!(old, Err(ProtocolError::OldStyle));
    let offered = HandshakeFlags::FIXED_NEWSTYLE;
    assert!(ClientFlags::parse(array("00000001"), offered).is_ok());
    assert!(ClientFlags::parse(array("00000000"), offered).is_ok());
    for bits in [2_u32, 4, 0x10000, 0x8000_0001] {
        let refused = ClientFlags::parse(bits.to_be_bytes(), offered);
        assert_eq!(refused, Err(ProtocolError::ClientFlags { bits }));
    }
    assert!(matches!(OptionHeader::parse([0; 16]), Err(ProtocolError::Magic { .. })));
}

#[test]
fn the_length_of_an_option_decides_what_becomes_of_it() {
    let handling = |code, length| OptionHeader { code, length }.handling();
    assert_eq!(handling(OptionCode::Go, OPTION_DATA_MAX), Handling::Read);
    assert_eq!(handling(OptionCode::Go, OPTION_DATA_MAX + 1), Handling::Skip);
    assert_eq!(handling(OptionCode::Other(77), OPTION_SKIP_MAX), Handling::Skip);
    assert_eq!(handling(OptionCode::Go, OPTION_SKIP_MAX + 1), Handling::Close);
    assert_eq!(handling(OptionCode::Go, u32::MAX), Handling::Close);
    assert_eq!(handling(OptionCode::ExportName, OPTION_DATA_MAX + 1), Handling::Close);
}

fn refused(code: OptionCode, data: &[u8]) -> RefusalKind {
    OptionRequest::parse(code, data).expect_err("refused").kind
}

#[test]
fn malformed_options_get_the_error_that_the_protocol_names() {
    use RefusalKind::{Invalid, TooBig};
    for code in
        [OptionCode::List, OptionCode::StartTls, OptionCode::StructuredReply, OptionCode::ExtendedHeaders]
    {
        assert_eq!(refused(code, b"x"), Invalid, "{code:?} takes no data");
    }
    assert_eq!(OptionRequest::parse(OptionCode::Abort, b"why not"), Ok(OptionRequest::Abort));
    assert_eq!(OptionRequest::parse(OptionCode::Other(4), b"x"), Ok(OptionRequest::Unknown(4)));
    for data in [
        "",                   // nothing
        "00000000",           // no number of requests
        "00000001 0000",      // name takes the number's place
        "ffffffff 78 0000",   // name longer than all
        "00000000 0001",      // a request is missing
        "00000000 0000 00",   // a byte too many
        "00000002 7800 0000", // NUL in the name
        "00000001 ff 0000",   // not UTF-8
    ] {
        assert_eq!(refused(OptionCode::Go, &hex(data)), Invalid, "{data}");
        assert_eq!(refused(OptionCode::Info, &hex(data)), Invalid, "{data}");
    }
    let long = [&4097_u32.to_be_bytes()[..], &[b'x'; 4097], &[0, 0]].concat();
    assert_eq!(refused(OptionCode::Go, &long), Invalid);
    assert_eq!(refused(OptionCode::ExportName, &[b'x'; 4097]), Invalid);
    assert!(!OptionCode::ExportName.can_be_refused() && OptionCode::Go.can_be_refused());
    for data in [
        "",
        "00000000",
        "00000000 00000001",             // a query is missing
        "00000000 ffffffff",             // four billion are
        "00000000 00000001 ffffffff 78", // it is too short
        "00000000 00000000 00",          // a byte too many
        "00000000 00000001 00000001 00", // NUL
        "00000001 ff 00000000",          // not UTF-8
    ] {
        assert_eq!(refused(OptionCode::SetMetaContext, &hex(data)), Invalid, "{data}");
        assert_eq!(refused(OptionCode::ListMetaContext, &hex(data)), Invalid, "{data}");
    }
    let many = |count: usize| [&[0; 4][..], &(count as u32).to_be_bytes(), &vec![0; 4 * count]].concat();
    assert!(OptionRequest::parse(OptionCode::SetMetaContext, &many(META_QUERIES_MAX)).is_ok());
    assert_eq!(refused(OptionCode::SetMetaContext, &many(META_QUERIES_MAX + 1)), TooBig);
    let cut = many(META_QUERIES_MAX + 1);
    assert_eq!(refused(OptionCode::SetMetaContext, &cut[..cut.len() - 1]), Invalid, "malformed first");
}

#[test]
fn queries_select_contexts() {
    assert!(selects(BASE_ALLOCATION, BASE_ALLOCATION, false));
    assert!(selects("base:", BASE_ALLOCATION, true));
    assert!(!selects("base:", BASE_ALLOCATION, false));
    for query in ["", ":", "bas:", "base", "base:alloc", "base:allocation:", "x-base:", "BASE:ALLOCATION"] {
        assert!(!selects(query, BASE_ALLOCATION, true), "{query}");
    }
}

#[test]
fn bad_option_replies_end_the_connection() {
    let header = |text: &str| OptionReplyHeader::parse(array(text), OptionCode::List);
    assert!(header("0003e889045565a9 00000003 00000001 00010000").is_ok());
    assert!(matches!(
        header("0003e889045565a8 00000003 00000001 00000000"),
        Err(ProtocolError::Magic { .. })
    ));
    assert!(matches!(
        header("0003e889045565a9 00000007 00000001 00000000"),
        Err(ProtocolError::Content { .. })
    ));
    for length in ["00010001", "ffffffff"] {
        let refused = header(&format!("0003e889045565a9 00000003 00000002 {length}"));
        assert!(matches!(refused, Err(ProtocolError::Length { .. })), "{length}");
    }
    for (kind, data) in [
        (0, ""),
        (5, ""),
        (0x7fff_ffff, ""),
        (1, "00"),                              // ACK with data
        (2, "000000"),                          // SERVER without a length
        (2, "00000002 78"),                     // name longer than the reply
        (2, "00000001 00"),                     // NUL
        (3, "00"),                              // INFO without a type
        (3, "0000 0000000000001000"),           // EXPORT without flags
        (3, "0000 0000000000001000 0001 00"),   // a byte too many
        (3, "0001 ff"),                         // NAME not UTF-8
        (3, "0003 00000200 00001000"),          // BLOCK_SIZE without a maximum
        (3, "0003 00000000 00001000 02000000"), // minimum 0
        (3, "0003 00000003 00001000 02000000"), // not a power of two
        (3, "0003 00020000 00020000 02000000"), // minimum above 64 KiB
        (3, "0003 00001000 00000200 02000000"), // preferred below minimum
        (3, "0003 00001000 00001000 00000800"), // maximum below minimum
        (4, "000000"),                          // META_CONTEXT without an id
        (4, "00000001 ff"),                     // not UTF-8
    ] {
        assert!(OptionReply::parse(kind, &hex(data)).is_err(), "{kind:x} {data}");
    }
}

#[test]
fn messages_for_humans_are_made_harmless() {
    let refused = |data: &[u8]| match OptionReply::parse(0x8000_0003, data) {
        Ok(OptionReply::Refused(refusal)) => refusal.message,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(b"a\x1b[2Jb\0c\n"), "a\u{fffd}[2Jb\u{fffd}c");
    assert_eq!(refused(b"\xff"), "\u{fffd}");
    assert!(refused(&[b'x'; 60000]).len() <= STRING_BYTES_MAX);
    assert!(refused(&[0xff; 60000]).len() <= STRING_BYTES_MAX);
    let long = "ü".repeat(STRING_BYTES_MAX);
    let mut out = Vec::new();
    OptionReply::Refused(Refusal::new(RefusalKind::Policy, long.as_str())).encode(OptionCode::Go, &mut out);
    assert_eq!(out.len(), 20 + STRING_BYTES_MAX);
    out.clear();
    let request = request(Command::Read, 0, 0);
    encode_error(HeaderStyle::Structured, &request, NbdError::Io, &long, None, &mut out);
    assert_eq!(out.len(), 20 + 6 + STRING_BYTES_MAX);
}

#[test]
fn block_sizes_for_others_keep_all_rules() {
    let adjusted = |minimum, preferred, maximum| {
        let sizes = BlockSizes { minimum, preferred, maximum }.adjusted();
        (sizes.minimum, sizes.preferred, sizes.maximum)
    };
    assert_eq!(adjusted(512, 4096, 32 << 20), (512, 4096, 32 << 20));
    assert_eq!(adjusted(1, 1, 1), (1, 512, 512));
    assert_eq!(adjusted(0, 0, 0), (1, 512, 512));
    assert_eq!(adjusted(1 << 20, 1 << 20, 1 << 20), (1 << 16, 1 << 20, 1 << 20));
    assert_eq!(adjusted(4096, 512, u32::MAX), (4096, 4096, u32::MAX));
}

#[test]
fn bad_chunk_headers_end_the_connection() {
    let structured = |kind: u16, done: u16, length: u32| {
        let text = format!("668e33ef {done:04x} {kind:04x} 0000000000000001 {length:08x}");
        ChunkHeader::parse_structured(array(&text))
    };
    let extended = |kind: u16, length: u64| {
        let text = format!("6e8a278c 0001 {kind:04x} 0000000000000001 0000000000000000 {length:016x}");
        ChunkHeader::parse_extended(array(&text))
    };
    assert!(structured(0, 1, 0).is_ok() && structured(0, 0xffff, 0).is_ok(), "unknown flags are ignored");
    assert!(structured(0, 0, 0).is_err() && structured(0, 1, 1).is_err());
    assert!(structured(1, 0, 9).is_ok() && structured(1, 0, 8).is_err());
    assert!(structured(2, 0, 12).is_ok() && structured(2, 0, 11).is_err() && structured(2, 0, 13).is_err());
    assert!(structured(5, 1, 12).is_ok() && structured(5, 1, 4).is_err() && structured(5, 1, 13).is_err());
    assert!(structured(5, 1, 4 + (8 << 20)).is_ok() && structured(5, 1, 12 + (8 << 20)).is_err());
    assert!(structured(6, 1, 24).is_err(), "BLOCK_STATUS_EXT is for extended headers");
    assert!(extended(6, 24).is_ok() && extended(6, 8).is_err() && extended(6, 25).is_err());
    assert!(extended(6, 8 + (16 << 20)).is_ok() && extended(6, 24 + (16 << 20)).is_err());
    assert!(extended(5, 12).is_err(), "BLOCK_STATUS is not for extended headers");
    assert!(structured(0x8001, 1, 6).is_ok() && structured(0x8001, 1, 5).is_err());
    assert!(structured(0x8002, 1, 14).is_ok() && structured(0x8002, 1, 13).is_err());
    assert!(structured(0x8001, 1, u32::MAX).is_err() && structured(0xffff, 1, ERROR_PAYLOAD_MAX).is_ok());
    assert!(structured(3, 1, 0).is_err() && structured(0x7fff, 1, 0).is_err(), "unknown, and no error");
    assert!(extended(1, 1 << 32).is_err() && extended(1, u64::MAX).is_err());
    assert!(extended(1, u32::MAX.into()).is_ok(), "data is bounded by the request");
}

#[test]
fn bad_chunk_payloads_end_the_connection() {
    let parse = |kind: u16, payload: &str| {
        let payload = hex(payload);
        let head = format!("668e33ef 0001 {kind:04x} 0000000000000001 {:08x}", payload.len());
        let header = ChunkHeader::parse_structured(array(&head)).unwrap();
        Chunk::parse(&header, &payload).is_ok()
    };
    assert!(!parse(2, "0000000000000000 00000000"), "an empty hole");
    assert!(!parse(5, "00000001 00000000 00000000"), "an empty extent");
    assert!(!parse(5, "00000001 00000001 00000000 00000000 00000000"), "another after a good one");
    assert!(!parse(0x8001, "00000000 0000"), "error 0");
    assert!(!parse(0x8001, "00000005 0001"), "a message longer than the chunk");
    assert!(!parse(0x8001, "00000005 0000 00"), "a byte too many");
    assert!(!parse(0x8002, "00000005 0001 00000000 00000000"), "the offset's place is taken");
    assert!(parse(0x8002, "00000005 0001 61 0000000000000000"));
    assert!(!parse(0x9000, "00000005 0003 6162"), "even where the type is not known");
    assert!(parse(0x9000, "00000005 0001 61 626364"), "fields of types to come");
    let text = format!("6e8a278c 0001 0006 {:016x} {:016x} {:016x}", 1, 0, 24);
    let header = ChunkHeader::parse_extended(array(&text)).unwrap();
    for (count, good) in [("00000001", true), ("00000000", false), ("00000002", false), ("ffffffff", false)] {
        let payload = hex(&format!("00000001 {count} 0000000000000001 0000000000000000"));
        assert_eq!(Chunk::parse(&header, &payload).is_ok(), good, "{count}");
    }
    assert!(Chunk::parse(&header, &[0; 23]).is_err(), "another length than announced");
}

fn request(command: Command, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags::empty(), command, cookie: 1, offset, length }
}

fn terms() -> ExportTerms {
    ExportTerms {
        size: 1 << 20,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        minimum_block: 512,
        maximum_payload: 64 << 10,
        style: HeaderStyle::Extended,
        contexts: true,
    }
}

#[test]
fn requests_get_the_errors_that_the_protocol_names() {
    use Command::*;
    use NbdError::*;
    let paid = |request: Request| match request.command {
        Write => Request { flags: CommandFlags::PAYLOAD_LEN, ..request },
        _ => request,
    };
    let check = |command, offset, length| terms().check(&paid(request(command, offset, length)));
    for command in [Read, Write, Trim, Cache, WriteZeroes, BlockStatus] {
        let beyond = if matches!(command, Write | WriteZeroes) { NoSpace } else { Invalid };
        assert_eq!(check(command, 512, 512), Ok(()), "{command:?}");
        assert_eq!(check(command, 0, 0), Ok(()), "{command:?}: nothing");
        assert_eq!(check(command, 1 << 20, 512), Err(beyond), "{command:?}: beyond the end");
        assert_eq!(check(command, (1 << 20) - 512, 1024), Err(beyond), "{command:?}: across the end");
        assert_eq!(
            check(command, u64::MAX - 511, 1024),
            Err(beyond),
            "{command:?}: around the end of numbers"
        );
        assert_eq!(check(command, 1, 512), Err(Invalid), "{command:?}: offset not aligned");
        assert_eq!(check(command, 0, 511), Err(Invalid), "{command:?}: length not aligned");
    }
    assert_eq!(check(Trim, 0, u64::MAX), Err(Invalid));
    assert_eq!(check(Write, 0, (64 << 10) + 512), Err(Invalid), "too long a payload");
    assert_eq!(check(Read, 0, (64 << 10) + 512), Err(Overflow), "too long an answer");
    assert_eq!(check(Trim, 0, 1 << 20), Ok(()), "only payloads have that limit");
    assert_eq!(check(Flush, 0, 0), Ok(()));
    assert_eq!(check(Flush, 512, 0), Err(Invalid));
    assert_eq!(check(Flush, 0, 512), Err(Invalid));
    assert_eq!(check(Other(8), 0, 0), Err(Invalid));
    assert_eq!(check(Disconnect, 5, 5), Ok(()), "nobody could read an answer");
    let simple = ExportTerms { style: HeaderStyle::Simple, flags: TransmissionFlags::HAS_FLAGS, ..terms() };
    assert_eq!(
        simple.check(&request(Read, 0, 1 << 20)),
        Err(Invalid),
        "EOVERFLOW is for who has heard of DF"
    );
}

#[test]
fn what_was_not_advertised_is_refused() {
    use Command::*;
    let bare = ExportTerms { flags: TransmissionFlags::HAS_FLAGS, contexts: false, ..terms() };
    for command in [Flush, Trim, Cache, WriteZeroes, BlockStatus] {
        assert_eq!(bare.check(&request(command, 0, 0)), Err(NbdError::Invalid), "{command:?}");
    }
    let read_only = ExportTerms { flags: bare.flags | TransmissionFlags::READ_ONLY, ..bare };
    for command in [Write, Trim, WriteZeroes] {
        assert_eq!(read_only.check(&request(command, 0, 512)), Err(NbdError::NotPermitted), "{command:?}");
        assert_eq!(
            read_only.check(&request(command, 1, u64::MAX)),
            Err(NbdError::NotPermitted),
            "{command:?}"
        );
    }
    assert_eq!(read_only.check(&request(Read, 0, 512)), Ok(()));
}

/// Which flags each command takes when everything was advertised; the first column without extended headers.
#[test]
fn flags_are_taken_only_where_they_are_documented() {
    use Command::*;
    let table: [(Command, u16, u16); 7] = [
        (Read, 0b00_0101, 0b00_0101),
        (Write, 0b00_0001, 0b10_0001),
        (Flush, 0b00_0001, 0b00_0001),
        (Trim, 0b00_0001, 0b00_0001),
        (Cache, 0b00_0001, 0b00_0001),
        (WriteZeroes, 0b01_0011, 0b01_0011),
        (BlockStatus, 0b00_1001, 0b10_1001),
    ];
    for (command, structured, extended) in table {
        for (style, allowed) in [(HeaderStyle::Structured, structured), (HeaderStyle::Extended, extended)] {
            for bit in 0..16 {
                let mut flags = CommandFlags::from_bits_retain(1 << bit);
                if command == Write && style == HeaderStyle::Extended {
                    flags |= CommandFlags::PAYLOAD_LEN;
                }
                let taken =
                    ExportTerms { style, ..terms() }.check(&Request { flags, ..request(command, 0, 0) });
                assert_eq!(taken.is_ok(), allowed >> bit & 1 == 1, "{command:?} {style:?} bit {bit}");
            }
        }
    }
    let unpaid = terms().check(&request(Write, 0, 512));
    assert_eq!(unpaid, Ok(()), "an extended write of a client that does not say that it has a payload");
    let bare =
        ExportTerms { flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_WRITE_ZEROES, ..terms() };
    for (command, flag) in [
        (Read, CommandFlags::FUA),
        (Read, CommandFlags::DF),
        (WriteZeroes, CommandFlags::FAST_ZERO),
        (BlockStatus, CommandFlags::PAYLOAD_LEN),
    ] {
        let request = Request { flags: flag, ..request(command, 0, 512) };
        assert_eq!(bare.check(&request), Err(NbdError::Invalid), "{command:?} {flag:?} was not advertised");
    }
}

#[test]
fn the_payload_of_a_request_is_known_whatever_is_wrong_with_it() {
    use HeaderStyle::{Extended, Simple, Structured};
    let with = |command, flags| Request { flags, ..request(command, 0, 77) };
    for style in [Simple, Structured] {
        assert_eq!(with(Command::Write, CommandFlags::empty()).payload_length(style), 77);
        assert_eq!(with(Command::Read, CommandFlags::PAYLOAD_LEN).payload_length(style), 0);
    }
    for command in [Command::Write, Command::Read, Command::BlockStatus, Command::Other(99)] {
        assert_eq!(with(command, CommandFlags::PAYLOAD_LEN).payload_length(Extended), 77);
        let unsaid = if command == Command::Write { 77 } else { 0 };
        assert_eq!(with(command, CommandFlags::empty()).payload_length(Extended), unsaid, "{command:?}");
    }
}

#[test]
fn bad_filters_are_invalid() {
    for payload in ["", "00000000000000", "0000000000000001 00", "0000000000000001 00000001 00000001"] {
        assert_eq!(StatusFilter::parse(&hex(payload)), Err(NbdError::Invalid), "{payload}");
    }
    let most = [&[0; 8][..], &(0..64_u32).flat_map(u32::to_be_bytes).collect::<Vec<_>>()].concat();
    assert_eq!(most.len(), StatusFilter::LENGTH_MAX);
    assert!(StatusFilter::parse(&most).is_ok());
    assert!(StatusFilter::parse(&[&most[..], &[9; 4]].concat()).is_err());
    assert_eq!(StatusFilter::parse(&[0; 8]).map(|filter| filter.contexts), Ok(vec![]));
}

#[test]
fn errors_keep_their_meaning_across_the_wire() {
    for (kind, error) in [
        (ErrorKind::ReadOnly, NbdError::NotPermitted),
        (ErrorKind::Invalid, NbdError::Invalid),
        (ErrorKind::NoSpace, NbdError::NoSpace),
        (ErrorKind::NotSupported, NbdError::NotSupported),
        (ErrorKind::ShuttingDown, NbdError::Shutdown),
        (ErrorKind::Io, NbdError::Io),
    ] {
        assert_eq!(NbdError::from(kind), error);
        assert_eq!(ErrorKind::from(error), kind);
        assert_eq!(NbdError::from_code(error.code()), Some(error));
    }
    assert_eq!(NbdError::from(ErrorKind::OutOfBounds), NbdError::Invalid);
    assert_eq!(NbdError::from(ErrorKind::Corrupt), NbdError::Io);
    assert_eq!(NbdError::from_code(0), None);
}

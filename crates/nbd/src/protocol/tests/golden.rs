//! Each message beside the bytes that the specification gives it, written by hand.

use super::super::*;
use super::{array, hex};

#[test]
fn greeting_and_client_flags() {
    let bytes = array("4e42444d41474943 49484156454f5054 0003");
    let greeting = Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES };
    assert_eq!(greeting.encode(), bytes);
    assert_eq!(Greeting::parse(bytes), Ok(greeting));
    let odd = Greeting::parse(array("4e42444d41474943 49484156454f5054 8001")).unwrap();
    assert_eq!(odd.flags.bits(), 0x8001, "a client ignores flags that it does not know, but can see them");
    let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
    assert_eq!(flags.encode(), array("00000003"));
    assert_eq!(ClientFlags::parse(array("00000003"), greeting.flags), Ok(flags));
}

#[test]
fn the_answer_to_export_name_with_and_without_zeroes() {
    let reply = ExportNameReply {
        size: 0x0123_4567_89ab_cdef,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
    };
    let bytes: [u8; 10] = array("0123456789abcdef 0005");
    let mut out = Vec::new();
    reply.encode(ClientFlags::NO_ZEROES, &mut out);
    assert_eq!(out, bytes);
    out.clear();
    reply.encode(ClientFlags::FIXED_NEWSTYLE, &mut out);
    assert_eq!(out, [&bytes[..], &[0; 124]].concat());
    assert_eq!(ExportNameReply::parse(bytes), reply);
}

fn option(request: OptionRequest, bytes: &str) {
    let bytes = hex(bytes);
    let mut out = Vec::new();
    request.encode(&mut out);
    assert_eq!(out, bytes);
    let header = OptionHeader::parse(bytes[..16].try_into().unwrap()).unwrap();
    assert_eq!((header.code, header.length as usize), (request.code(), bytes.len() - 16));
    assert_eq!(header.encode(), bytes[..16]);
    assert_eq!(OptionRequest::parse(header.code, &bytes[16..]), Ok(request));
}

#[test]
fn options() {
    option(OptionRequest::ExportName("ab".into()), "49484156454f5054 00000001 00000002 6162");
    option(OptionRequest::Abort, "49484156454f5054 00000002 00000000");
    option(OptionRequest::List, "49484156454f5054 00000003 00000000");
    option(OptionRequest::StartTls, "49484156454f5054 00000005 00000000");
    option(OptionRequest::StructuredReply, "49484156454f5054 00000008 00000000");
    option(OptionRequest::ExtendedHeaders, "49484156454f5054 0000000b 00000000");
    option(OptionRequest::Unknown(4), "49484156454f5054 00000004 00000000");
    let info = InfoRequest {
        name: "x".into(),
        items: vec![InfoType::Export, InfoType::BlockSize, InfoType::Other(99)],
    };
    option(
        OptionRequest::Info(info.clone()),
        "49484156454f5054 00000006 0000000d 00000001 78 0003 0000 0003 0063",
    );
    option(OptionRequest::Go(info), "49484156454f5054 00000007 0000000d 00000001 78 0003 0000 0003 0063");
    let contexts = MetaContextRequest { export: "x".into(), queries: vec!["base:".into(), String::new()] };
    let data = "00000001 78 00000002 00000005 626173653a 00000000";
    option(
        OptionRequest::ListMetaContext(contexts.clone()),
        &format!("49484156454f5054 00000009 00000016 {data}"),
    );
    option(OptionRequest::SetMetaContext(contexts), &format!("49484156454f5054 0000000a 00000016 {data}"));
}

fn reply(reply: OptionReply, bytes: &str) {
    let bytes = hex(bytes);
    let mut out = Vec::new();
    reply.encode(OptionCode::Go, &mut out);
    assert_eq!(out, bytes);
    let header = OptionReplyHeader::parse(bytes[..20].try_into().unwrap(), OptionCode::Go).unwrap();
    assert_eq!(header.length as usize, bytes.len() - 20);
    assert_eq!(OptionReply::parse(header.kind, &bytes[20..]), Ok(reply));
}

#[test]
fn option_replies() {
    let head = "0003e889045565a9 00000007";
    reply(OptionReply::Ack, &format!("{head} 00000001 00000000"));
    reply(
        OptionReply::Server { name: "ab".into(), description: "c".into() },
        &format!("{head} 00000002 00000007 00000002 6162 63"),
    );
    let facts = ExportFacts { size: 4096, flags: TransmissionFlags::from_bits_retain(0x8001) };
    reply(
        OptionReply::Info(InfoItem::Export(facts)),
        &format!("{head} 00000003 0000000c 0000 0000000000001000 8001"),
    );
    reply(OptionReply::Info(InfoItem::Name("ab".into())), &format!("{head} 00000003 00000004 0001 6162"));
    reply(
        OptionReply::Info(InfoItem::Description("ab".into())),
        &format!("{head} 00000003 00000004 0002 6162"),
    );
    let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 32 << 20 };
    reply(
        OptionReply::Info(InfoItem::BlockSize(sizes)),
        &format!("{head} 00000003 0000000e 0003 00000200 00001000 02000000"),
    );
    reply(OptionReply::Info(InfoItem::Other(9)), &format!("{head} 00000003 00000002 0009"));
    reply(
        OptionReply::MetaContext { id: 7, name: "base:allocation".into() },
        &format!("{head} 00000004 00000013 00000007 626173653a616c6c6f636174696f6e"),
    );
    let kinds = [
        RefusalKind::Unsupported,
        RefusalKind::Policy,
        RefusalKind::Invalid,
        RefusalKind::Platform,
        RefusalKind::TlsRequired,
        RefusalKind::UnknownExport,
        RefusalKind::Shutdown,
        RefusalKind::BlockSizeRequired,
        RefusalKind::TooBig,
        RefusalKind::ExtendedHeadersRequired,
        RefusalKind::Other(0x8000_000b),
    ];
    for (number, kind) in (1..).zip(kinds) {
        reply(
            OptionReply::Refused(Refusal::new(kind, "no")),
            &format!("{head} {:08x} 00000002 6e6f", 0x8000_0000_u32 + number),
        );
    }
}

#[test]
fn requests() {
    let request = Request {
        flags: CommandFlags::FUA | CommandFlags::NO_HOLE | CommandFlags::from_bits_retain(0x8000),
        command: Command::WriteZeroes,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1112_1314_1516_1718,
        length: 0x2122_2324,
    };
    let bytes = array("25609513 8003 0006 0102030405060708 1112131415161718 21222324");
    assert_eq!(request.encode_compact(), Some(bytes));
    assert_eq!(Request::parse_compact(bytes), Ok(request));
    let bytes = array("21e41c71 8003 0006 0102030405060708 1112131415161718 0000000021222324");
    assert_eq!(request.encode_extended(), bytes);
    assert_eq!(Request::parse_extended(bytes), Ok(request));
    let long = Request { length: 1 << 32, ..request };
    assert_eq!(long.encode_compact(), None);
    assert_eq!(Request::parse_extended(long.encode_extended()), Ok(long));
    let commands = [
        Command::Read,
        Command::Write,
        Command::Disconnect,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
        Command::Other(8),
    ];
    for (code, command) in (0..).zip(commands) {
        assert_eq!((Command::from_code(code), command.code()), (command, code));
    }
    let filter = StatusFilter { length: 1 << 33, contexts: vec![1, 0x0a0b_0c0d] };
    assert_eq!(filter.encode(), hex("0000000200000000 00000001 0a0b0c0d"));
    assert_eq!(StatusFilter::parse(&filter.encode()), Ok(filter));
}

#[test]
fn simple_replies() {
    let bytes = array("67446698 00000000 0102030405060708");
    assert_eq!(*ReplyHead::simple(0x0102_0304_0506_0708, None), bytes);
    let reply = SimpleReply { error: None, cookie: 0x0102_0304_0506_0708 };
    assert_eq!(SimpleReply::parse(bytes), Ok(reply));
    let errors = [
        (1, NbdError::NotPermitted),
        (5, NbdError::Io),
        (12, NbdError::NoMemory),
        (22, NbdError::Invalid),
        (28, NbdError::NoSpace),
        (75, NbdError::Overflow),
        (95, NbdError::NotSupported),
        (108, NbdError::Shutdown),
    ];
    for (code, error) in errors {
        let bytes = array(&format!("67446698 {code:08x} 0000000000000009"));
        assert_eq!(*ReplyHead::simple(9, Some(error)), bytes);
        assert_eq!(SimpleReply::parse(bytes), Ok(SimpleReply { error: Some(error), cookie: 9 }));
    }
    let unknown = SimpleReply::parse(array("67446698 00000063 0000000000000009")).unwrap();
    assert_eq!(unknown.error, Some(NbdError::Invalid), "an error that is not known counts as EINVAL");
}

const REQUEST: Request = Request {
    flags: CommandFlags::empty(),
    command: Command::Read,
    cookie: 0x0102_0304_0506_0708,
    offset: 0x1000,
    length: 0x2000,
};

/// Checks a reply in both styles: type and payload (DONE set) as given.
fn chunk(
    structured: &[u8],
    extended: &[u8],
    kinds: (&str, &str),
    payloads: (&str, &str),
    expected: Chunk<'_>,
) {
    let (payload, payload_extended) = (hex(payloads.0), hex(payloads.1));
    let head = hex(&format!("668e33ef 0001 {} 0102030405060708 {:08x}", kinds.0, payload.len()));
    assert_eq!(structured, [&head[..], &payload].concat());
    let header = ChunkHeader::parse_structured(head.try_into().unwrap()).unwrap();
    assert_eq!((header.cookie, header.offset, header.done()), (REQUEST.cookie, None, true));
    assert_eq!(Chunk::parse(&header, &payload), Ok(expected.clone()));
    let head = hex(&format!(
        "6e8a278c 0001 {} 0102030405060708 0000000000001000 {:016x}",
        kinds.1,
        payload_extended.len()
    ));
    assert_eq!(extended, [&head[..], &payload_extended].concat());
    let header = ChunkHeader::parse_extended(head.try_into().unwrap()).unwrap();
    assert_eq!((header.cookie, header.offset, header.done()), (REQUEST.cookie, Some(0x1000), true));
    assert_eq!(Chunk::parse(&header, &payload_extended), Ok(expected));
}

#[test]
fn content_chunks() {
    use HeaderStyle::{Extended, Structured};
    let of = |head: ReplyHead, data: &[u8]| [&*head, data].concat();
    let done = |style| ReplyHead::done(style, &REQUEST);
    chunk(&done(Structured), &done(Extended), ("0000", "0000"), ("", ""), Chunk::None);
    let data = |style| of(ReplyHead::data(style, &REQUEST, ReplyFlags::DONE, 0x1200, 3), b"abc");
    let payload = "0000000000001200 616263";
    let expected = Chunk::Data { offset: 0x1200, data: b"abc" };
    chunk(&data(Structured), &data(Extended), ("0001", "0001"), (payload, payload), expected);
    let hole = |style| ReplyHead::hole(style, &REQUEST, ReplyFlags::DONE, 0x1200, 0x200);
    let payload = "0000000000001200 00000200";
    let expected = Chunk::Hole { offset: 0x1200, length: 0x200 };
    chunk(&hole(Structured), &hole(Extended), ("0002", "0002"), (payload, payload), expected);
    assert_eq!(*ReplyHead::success(Structured, &REQUEST), *ReplyHead::simple(REQUEST.cookie, None));
    assert_eq!(*ReplyHead::success(Extended, &REQUEST), *done(Extended));
}

#[test]
fn error_and_status_chunks() {
    use HeaderStyle::{Extended, Simple, Structured};
    let error = |style, offset| {
        let mut out = Vec::new();
        encode_error(style, &REQUEST, NbdError::Io, "bad", offset, &mut out);
        out
    };
    assert_eq!(error(Simple, Some(5)), *ReplyHead::simple(REQUEST.cookie, Some(NbdError::Io)));
    let expected = ErrorChunk { error: NbdError::Io, message: "bad".into(), offset: None };
    let payload = "00000005 0003 626164";
    let (structured, extended) = (error(Structured, None), error(Extended, None));
    chunk(&structured, &extended, ("8001", "8001"), (payload, payload), Chunk::Error(expected.clone()));
    let expected = ErrorChunk { offset: Some(0x1200), ..expected };
    let payload = "00000005 0003 626164 0000000000001200";
    let (structured, extended) = (error(Structured, Some(0x1200)), error(Extended, Some(0x1200)));
    chunk(&structured, &extended, ("8002", "8002"), (payload, payload), Chunk::Error(expected));

    let extents = [Status { length: 0x1000, flags: 3 }, Status { length: 0x400, flags: 0 }];
    let status = |style| {
        let mut out = Vec::new();
        encode_status(style, &REQUEST, ReplyFlags::DONE, 7, &extents, &mut out);
        out
    };
    let payload = "00000007 00001000 00000003 00000400 00000000";
    let long = "00000007 00000002 0000000000001000 0000000000000003 0000000000000400 0000000000000000";
    let expected = Chunk::Status(StatusChunk { context: 7, extents: extents.to_vec() });
    chunk(&status(Structured), &status(Extended), ("0005", "0006"), (payload, long), expected);
}

#[test]
fn status_that_does_not_fit_is_cut_where_the_protocol_lets_it() {
    let extents = [
        Status { length: 512, flags: 0 },
        Status { length: 1 << 33, flags: 3 },
        Status { length: 512, flags: 0 },
    ];
    let mut out = Vec::new();
    encode_status(HeaderStyle::Structured, &REQUEST, ReplyFlags::DONE, 1, &extents, &mut out);
    let header = ChunkHeader::parse_structured(out[..20].try_into().unwrap()).unwrap();
    let Ok(Chunk::Status(status)) = Chunk::parse(&header, &out[20..]) else { panic!("no status") };
    assert_eq!(status.extents, [extents[0], Status { length: 0xffff_0000, flags: 3 }]);
    let many = vec![Status { length: 1, flags: 0 }; STATUS_EXTENTS_MAX + 1];
    out.clear();
    encode_status(HeaderStyle::Structured, &REQUEST, ReplyFlags::DONE, 1, &many, &mut out);
    assert_eq!(out.len(), 20 + 4 + 8 * STATUS_EXTENTS_MAX);
}

#[test]
fn headers_have_the_lengths_that_their_magic_promises() {
    use HeaderStyle::{Extended, Simple, Structured};
    for (magic, style, length) in [
        ("67446698", Simple, Some(16)),
        ("67446698", Structured, Some(16)),
        ("67446698", Extended, None),
        ("668e33ef", Simple, None),
        ("668e33ef", Structured, Some(20)),
        ("668e33ef", Extended, None),
        ("6e8a278c", Structured, None),
        ("6e8a278c", Extended, Some(32)),
        ("96744668", Simple, None),
    ] {
        assert_eq!(style.reply_length(array(magic)).ok(), length, "{magic} {style:?}");
    }
    assert_eq!([Simple, Structured, Extended].map(HeaderStyle::request_length), [28, 28, 32]);
}

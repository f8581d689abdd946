//! Any bytes at all: no parser panics, what it takes it writes the same again, and it keeps no more than it was given.
//! `PROPTEST_CASES=1000000` makes an hour's fuzzing of it.

use proptest::prelude::*;

use super::super::*;

fn names() -> impl Strategy<Value = String> + Clone {
    "[^\0]{0,12}"
}

fn requests() -> impl Strategy<Value = OptionRequest> {
    let info = (names(), prop::collection::vec(any::<u16>().prop_map(InfoType::from_code), 0..6))
        .prop_map(|(name, items)| InfoRequest { name, items });
    let contexts = (names(), prop::collection::vec(names(), 0..6))
        .prop_map(|(export, queries)| MetaContextRequest { export, queries });
    prop_oneof![
        names().prop_map(OptionRequest::ExportName),
        Just(OptionRequest::Abort),
        Just(OptionRequest::List),
        Just(OptionRequest::StartTls),
        info.clone().prop_map(OptionRequest::Info),
        info.prop_map(OptionRequest::Go),
        Just(OptionRequest::StructuredReply),
        contexts.clone().prop_map(OptionRequest::ListMetaContext),
        contexts.prop_map(OptionRequest::SetMetaContext),
        Just(OptionRequest::ExtendedHeaders),
        (12_u32..).prop_map(OptionRequest::Unknown),
    ]
}

fn replies() -> impl Strategy<Value = OptionReply> {
    let text = "[a-zü€ ]{0,12}[a-z]";
    let item = prop_oneof![
        (any::<u64>(), any::<u16>()).prop_map(|(size, bits)| {
            InfoItem::Export(ExportFacts { size, flags: TransmissionFlags::from_bits_retain(bits) })
        }),
        names().prop_map(InfoItem::Name),
        text.prop_map(InfoItem::Description),
        any::<[u32; 3]>().prop_map(|[minimum, preferred, maximum]| {
            InfoItem::BlockSize(BlockSizes { minimum, preferred, maximum }.adjusted())
        }),
        (4_u16..).prop_map(InfoItem::Other),
    ];
    prop_oneof![
        Just(OptionReply::Ack),
        (names(), text).prop_map(|(name, description)| OptionReply::Server { name, description }),
        item.prop_map(OptionReply::Info),
        (any::<u32>(), names()).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
        (any::<u32>(), text).prop_map(|(code, message)| {
            OptionReply::Refused(Refusal::new(RefusalKind::from_code(code | 1 << 31), message))
        }),
    ]
}

/// Bytes with a few changed, and perhaps the end missing.
fn mutate(bytes: &mut Vec<u8>, changes: &[(usize, u8)], keep: usize) {
    for (at, value) in changes {
        if let Some(length) = bytes.len().checked_sub(1) {
            bytes[at % (length + 1)] ^= value;
        }
    }
    bytes.truncate(keep);
}

fn changes() -> impl Strategy<Value = (Vec<(usize, u8)>, usize)> {
    let keep = prop_oneof![Just(usize::MAX), 0_usize..80];
    (prop::collection::vec((any::<usize>(), any::<u8>()), 0..4), keep)
}

/// Whatever a parser took, its own bytes must mean the same.
fn option_again(code: OptionCode, data: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(request) = OptionRequest::parse(code, data) {
        let mut out = Vec::new();
        request.encode(&mut out);
        prop_assert!(out.len() <= OptionHeader::LENGTH + data.len());
        prop_assert_eq!(OptionRequest::parse(code, &out[16..]), Ok(request));
    }
    Ok(())
}

fn reply_again(kind: u32, data: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(reply) = OptionReply::parse(kind, data) {
        let mut out = Vec::new();
        reply.encode(OptionCode::Go, &mut out);
        // A replacement character has three bytes where there may have been one.
        prop_assert!(out.len() <= OptionReplyHeader::LENGTH + 3 * data.len());
        prop_assert_eq!(OptionReply::parse(kind, &out[20..]), Ok(reply));
    }
    Ok(())
}

fn chunk(header: Result<ChunkHeader, ProtocolError>, payload: &[u8]) {
    let Ok(mut header) = header else { return };
    let _ = Chunk::parse(&header, payload);
    header.length = payload.len() as u32;
    if let Ok(Chunk::Status(status)) = Chunk::parse(&header, payload) {
        assert!(status.extents.len() * 8 <= payload.len());
    }
}

proptest! {
    #[test]
    fn options_survive_the_wire_and_mutations(request in requests(), (changes, keep) in changes()) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let header = OptionHeader::parse(bytes[..16].try_into().unwrap()).unwrap();
        prop_assert_eq!(header.length as usize, bytes.len() - 16);
        prop_assert_eq!(OptionRequest::parse(header.code, &bytes[16..]), Ok(request));
        let mut data = bytes.split_off(16);
        mutate(&mut data, &changes, keep);
        option_again(header.code, &data)?;
    }

    #[test]
    fn any_data_of_any_option(code in 0_u32..13, data in prop::collection::vec(any::<u8>(), 0..200)) {
        option_again(OptionCode::from_code(code), &data)?;
    }

    #[test]
    fn replies_survive_the_wire_and_mutations(reply in replies(), (changes, keep) in changes()) {
        let mut bytes = Vec::new();
        reply.encode(OptionCode::Info, &mut bytes);
        let header = OptionReplyHeader::parse(bytes[..20].try_into().unwrap(), OptionCode::Info).unwrap();
        prop_assert_eq!(header.length as usize, bytes.len() - 20);
        prop_assert_eq!(OptionReply::parse(header.kind, &bytes[20..]), Ok(reply));
        let mut data = bytes.split_off(20);
        mutate(&mut data, &changes, keep);
        reply_again(header.kind, &data)?;
    }

    #[test]
    fn any_data_of_any_reply(kind in prop_oneof![0_u32..6, any::<u32>()], data in prop::collection::vec(any::<u8>(), 0..200)) {
        reply_again(kind, &data)?;
    }

    #[test]
    fn requests_keep_every_bit(compact in any::<[u8; 24]>(), extended in any::<[u8; 28]>()) {
        let mut bytes = [0; 28];
        bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        bytes[4..].copy_from_slice(&compact);
        prop_assert_eq!(Request::parse_compact(bytes).unwrap().encode_compact(), Some(bytes));
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&wire::EXTENDED_REQUEST_MAGIC.to_be_bytes());
        bytes[4..].copy_from_slice(&extended);
        prop_assert_eq!(Request::parse_extended(bytes).unwrap().encode_extended(), bytes);
    }

    /// What passes the check lies inside the export, so that whoever acts on it need not look again.
    #[test]
    fn a_request_that_passes_lies_inside(code in 0_u16..10, flags in 0_u16..64, offset: u64, length: u64, size: u64) {
        let flags = CommandFlags::from_bits_retain(flags);
        let request = Request { flags, command: Command::from_code(code), cookie: 0, offset, length };
        for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
            let flags = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
            let (minimum_block, maximum_payload) = (1, u32::MAX);
            let terms = ExportTerms { size, flags, minimum_block, maximum_payload, style, contexts: true };
            let elsewhere = request.command == Command::Disconnect
                || request.flags.contains(CommandFlags::PAYLOAD_LEN) && request.command == Command::BlockStatus;
            if terms.check(&request).is_ok() && !elsewhere {
                prop_assert!(offset.checked_add(length).is_some_and(|end| end <= size));
            }
        }
    }

    #[test]
    fn any_headers(bytes in any::<[u8; 32]>()) {
        let part = |length: usize| &bytes[..length];
        let _ = Greeting::parse(part(18).try_into().unwrap());
        let _ = OptionHeader::parse(part(16).try_into().unwrap());
        let _ = OptionReplyHeader::parse(part(20).try_into().unwrap(), OptionCode::Go);
        let _ = SimpleReply::parse(part(16).try_into().unwrap());
        let _ = Request::parse_compact(part(28).try_into().unwrap());
        let _ = Request::parse_extended(bytes);
    }

    #[test]
    fn any_chunk(
        header in any::<[u8; 28]>(),
        kind in prop_oneof![0_u16..8, 0x8000_u16..0x8004, any::<u16>()],
        length in prop_oneof![0_u32..64, any::<u32>()],
        payload in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let mut bytes = [0; 32];
        bytes[4..].copy_from_slice(&header);
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[..4].copy_from_slice(&wire::EXTENDED_REPLY_MAGIC.to_be_bytes());
        bytes[24..28].copy_from_slice(&[0; 4]);
        bytes[28..].copy_from_slice(&length.to_be_bytes());
        chunk(ChunkHeader::parse_extended(bytes), &payload);
        bytes[..4].copy_from_slice(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        chunk(ChunkHeader::parse_structured(bytes[..20].try_into().unwrap()), &payload);
        let _ = StatusFilter::parse(&payload);
    }
}

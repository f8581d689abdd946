//! The handshake.

use std::sync::Arc;

use loam_block::MemoryDevice;
use loam_nbd::protocol::{
    BlockSizes, ClientFlags, ExportNameReply, Greeting, HandshakeFlags, HeaderStyle, InfoItem, InfoType,
    MetaContextRequest, OptionReply, OptionRequest, RefusalKind, TransmissionFlags,
};
use loam_nbd::server::{Export, Server, ServerOptions};

use crate::peer::{Claims, connect, ended, export, facts, info, ready, refusal, server_of};

fn two() -> Arc<Server> {
    let exports =
        vec![export("a", Arc::new(MemoryDevice::new(4096))), export("b", Arc::new(MemoryDevice::new(8192)))];
    Server::new(exports, ServerOptions::default()).expect("two exports")
}

#[tokio::test]
async fn export_name_gives_size_flags_and_zeroes_unless_they_were_declined() {
    for (flags, zeroes) in
        [(ClientFlags::FIXED_NEWSTYLE, 124), (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES, 0)]
    {
        let (mut peer, _) = connect(&two());
        peer.greet_with(flags).await;
        let mut bytes = Vec::new();
        OptionRequest::ExportName("b".into()).encode(&mut bytes);
        peer.write(&bytes).await;
        let reply = ExportNameReply::parse(peer.read().await);
        assert_eq!(reply.size, 8192);
        assert!(!reply.flags.contains(TransmissionFlags::SEND_DF), "no structured replies, no DF");
        assert_eq!(peer.read_vec(zeroes).await, vec![0; zeroes]);
        peer.expect_alive().await;
    }
}

#[tokio::test]
async fn export_name_of_what_is_not_there_closes() {
    let (mut peer, _) = connect(&two());
    peer.greet().await;
    let mut bytes = Vec::new();
    OptionRequest::ExportName("c".into()).encode(&mut bytes);
    peer.write(&bytes).await;
    peer.expect_closed().await;
}

#[tokio::test]
async fn unknown_client_flags_close() {
    let (mut peer, _) = connect(&two());
    let greeting = Greeting::parse(peer.read().await).expect("a greeting");
    assert_eq!(greeting.flags, HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES);
    peer.write(&ClientFlags::from_bits_retain(8).encode()).await;
    peer.expect_closed().await;
}

#[tokio::test]
async fn without_fixed_newstyle_only_export_name_works() {
    let (mut peer, _) = connect(&two());
    peer.greet_with(ClientFlags::NO_ZEROES).await;
    assert_eq!(refusal(&peer.option(OptionRequest::List).await), Some(RefusalKind::Invalid));
    let mut bytes = Vec::new();
    OptionRequest::ExportName(String::new()).encode(&mut bytes);
    peer.write(&bytes).await;
    assert_eq!(ExportNameReply::parse(peer.read().await).size, 4096);
    peer.expect_alive().await;
}

#[tokio::test]
async fn list_info_and_go_know_all_exports_and_the_first_is_the_default() {
    let (mut peer, _) = connect(&two());
    peer.greet().await;
    let server =
        |name: &str| OptionReply::Server { name: name.into(), description: format!("the {name} export") };
    assert_eq!(peer.option(OptionRequest::List).await, [server("a"), server("b"), OptionReply::Ack]);
    let everything = [InfoType::Name, InfoType::Description, InfoType::BlockSize, InfoType::Other(99)];
    let replies = peer.option(OptionRequest::Info(info("", &everything))).await;
    assert_eq!(facts(&replies).size, 4096);
    assert!(replies.contains(&OptionReply::Info(InfoItem::Name("a".into()))));
    assert!(replies.contains(&OptionReply::Info(InfoItem::Description("the a export".into()))));
    let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };
    assert!(replies.contains(&OptionReply::Info(InfoItem::BlockSize(sizes))));
    assert_eq!(replies.last(), Some(&OptionReply::Ack));
    for option in [OptionRequest::Info(info("c", &[])), OptionRequest::Go(info("c", &[]))] {
        assert_eq!(refusal(&peer.option(option).await), Some(RefusalKind::UnknownExport));
    }
    assert_eq!(peer.go("b").await.size, 8192);
    peer.expect_alive().await;
}

#[tokio::test]
async fn what_a_device_can_do_is_what_is_advertised() {
    let mut device = Claims::of(MemoryDevice::new(1 << 20));
    device.geometry.minimum_block = 512;
    device.geometry.preferred_block = 64 << 10;
    device.geometry.maximum_block = 1 << 20;
    device.capabilities.rotational = Some(true);
    device.capabilities.multi_connection = false;
    device.capabilities.fast_zero = false;
    let server = server_of(device);
    let (mut peer, _) = connect(&server);
    peer.greet().await;
    let replies = peer.option(OptionRequest::Info(info("", &[InfoType::BlockSize]))).await;
    let sizes = BlockSizes { minimum: 512, preferred: 64 << 10, maximum: 1 << 20 };
    assert!(replies.contains(&OptionReply::Info(InfoItem::BlockSize(sizes))));
    let flags = facts(&replies).flags;
    assert!(flags.contains(TransmissionFlags::ROTATIONAL | TransmissionFlags::SEND_WRITE_ZEROES));
    assert!(!flags.intersects(
        TransmissionFlags::CAN_MULTI_CONN | TransmissionFlags::SEND_FAST_ZERO | TransmissionFlags::READ_ONLY
    ));

    let mut no_zeroes = Claims::of(MemoryDevice::new(1 << 20));
    no_zeroes.capabilities.zero = false;
    no_zeroes.capabilities.trim = false;
    let (mut peer, _) = connect(&server_of(no_zeroes));
    peer.greet().await;
    let flags = peer.go("").await.flags;
    let zeroes = TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_FAST_ZERO;
    assert!(!flags.intersects(zeroes | TransmissionFlags::SEND_TRIM));

    let read_only = Export { read_only: true, ..export("", Arc::new(MemoryDevice::new(4096))) };
    let server = Server::new(vec![read_only], ServerOptions::default()).expect("one export");
    let (mut peer, _) = connect(&server);
    peer.greet().await;
    let flags = peer.go("").await.flags;
    assert!(flags.contains(TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN));
    assert!(!flags.intersects(zeroes | TransmissionFlags::SEND_TRIM));
}

#[tokio::test]
async fn abort_is_acknowledged_whatever_comes_with_it() {
    let (mut peer, served) = connect(&two());
    peer.greet().await;
    assert_eq!(peer.raw_option(2, b"good bye").await, [OptionReply::Ack]);
    peer.expect_closed().await;
    ended(served).await.expect("a proper end");
}

#[tokio::test]
async fn malformed_and_unknown_options_are_refused_and_the_next_one_is_heard() {
    let (mut peer, _) = connect(&two());
    peer.greet().await;
    let cases: [(u32, &[u8], RefusalKind); 8] = [
        (3, b"x", RefusalKind::Invalid),
        (8, b"x", RefusalKind::Invalid),
        (11, b"x", RefusalKind::Invalid),
        (7, b"\0\0\0\xff", RefusalKind::Invalid),
        (9, b"\0\0\0\0\0\0\0\x01", RefusalKind::Invalid),
        (4, b"", RefusalKind::Unsupported),
        (0x7fff_ffff, &[7; 5000], RefusalKind::Unsupported),
        (3, &[0; 100_000], RefusalKind::TooBig),
    ];
    for (code, data, expected) in cases {
        assert_eq!(refusal(&peer.raw_option(code, data).await), Some(expected), "option {code}");
    }
    assert_eq!(refusal(&peer.option(OptionRequest::StartTls).await), Some(RefusalKind::Policy));
    peer.go("a").await;
    peer.expect_alive().await;
}

#[tokio::test]
async fn an_option_of_four_gigabytes_or_without_magic_closes() {
    for bytes in [*b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff", *b"HTTP/1.1 GET / \r"] {
        let (mut peer, _) = connect(&two());
        peer.greet().await;
        peer.write(&bytes).await;
        peer.expect_closed().await;
    }
}

#[tokio::test]
async fn metadata_contexts_need_chunks_and_are_those_that_were_asked_for() {
    let (mut peer, _) = connect(&two());
    peer.greet().await;
    let list = |queries: &[&str]| {
        let queries = queries.iter().map(|query| query.to_string()).collect();
        OptionRequest::ListMetaContext(MetaContextRequest { export: "a".into(), queries })
    };
    assert_eq!(refusal(&peer.option(list(&[])).await), Some(RefusalKind::Invalid));
    peer.negotiate(HeaderStyle::Structured).await;
    let names = |replies: Vec<OptionReply>| -> Vec<String> {
        let name = |reply| match reply {
            OptionReply::MetaContext { name, .. } => Some(name),
            _ => None,
        };
        replies.into_iter().filter_map(name).collect()
    };
    let both = ["base:allocation", "loam:locality"];
    assert_eq!(names(peer.option(list(&[])).await), both);
    assert_eq!(names(peer.option(list(&["base:"])).await), both[..1]);
    assert_eq!(names(peer.option(list(&["loam:locality", "qemu:dirty-bitmap:x"])).await), both[1..]);
    assert!(names(peer.option(list(&["base:other"])).await).is_empty());
    assert!(
        peer.set_contexts("a", &["base:", "x-none:at-all"]).await.is_empty(),
        "no wildcards when setting"
    );
    let ids = peer.set_contexts("a", &both).await;
    assert!(ids.len() == 2 && ids[0] != ids[1]);
    let unknown = MetaContextRequest { export: "c".into(), queries: vec![] };
    let replies = peer.option(OptionRequest::SetMetaContext(unknown)).await;
    assert_eq!(refusal(&replies), Some(RefusalKind::UnknownExport));
}

#[tokio::test]
async fn extended_headers_replace_structured_replies() {
    let (mut peer, _) = connect(&two());
    peer.greet().await;
    peer.negotiate(HeaderStyle::Structured).await;
    peer.negotiate(HeaderStyle::Extended).await;
    let replies = peer.option(OptionRequest::StructuredReply).await;
    assert_eq!(refusal(&replies), Some(RefusalKind::ExtendedHeadersRequired));
    peer.set_contexts("a", &["base:allocation"]).await;
    let flags = peer.go("a").await.flags;
    assert!(flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD | TransmissionFlags::SEND_DF));
    peer.expect_alive().await;
}

#[tokio::test]
async fn exports_that_cannot_be_named_are_refused() {
    let device = || Arc::new(MemoryDevice::new(4096));
    let server = |exports| Server::new(exports, ServerOptions::default());
    assert!(server(vec![]).is_err());
    assert!(server(vec![export("a", device()), export("a", device())]).is_err());
    assert!(server(vec![export(&"x".repeat(4097), device())]).is_err());
    assert!(server(vec![export("nul\0", device())]).is_err());
    // The empty name may be that of an export which is not the first.
    let second = server(vec![export("a", device()), export("", Arc::new(MemoryDevice::new(512)))]);
    let mut peer = ready(&second.expect("both can be named"), HeaderStyle::Simple).await;
    peer.expect_alive().await;
}

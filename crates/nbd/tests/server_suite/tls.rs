//! TLS: who may, who must, and who is not let in.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use loam_nbd::protocol::{HeaderStyle, OptionReply, OptionRequest, RefusalKind};
use loam_nbd::server::{Server, ServerOptions};
use loam_nbd::tls::{
    CA_CERTIFICATE, CLIENT_CERTIFICATE, CLIENT_KEY, ClientTls, SERVER_CERTIFICATE, SERVER_KEY, ServerTls,
    TlsPolicy,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::net::UnixStream;

use crate::peer::{Peer, connect, export, filled, info, refusal};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

/// Writes a certificate for 127.0.0.1 and `server.test`, and its key.
fn issue(by: &Authority, certificate: &Path, key: &Path, expired: bool) {
    let mut params = CertificateParams::new(vec!["server.test".into()]).expect("a name");
    params.subject_alt_names.push(SanType::IpAddress(IpAddr::from([127, 0, 0, 1])));
    if expired {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    }
    let pair = KeyPair::generate().expect("a key");
    std::fs::write(certificate, params.signed_by(&pair, by).expect("signed").pem()).expect("written");
    std::fs::write(key, pair.serialize_pem()).expect("written");
}

/// A directory as the tools want it; the client's certificate is of `client_by`.
fn directory(by: &Authority, client_by: Option<&Authority>, expired: bool) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at(CA_CERTIFICATE), by.pem()).expect("written");
    issue(by, &at(SERVER_CERTIFICATE), &at(SERVER_KEY), expired);
    if let Some(client_by) = client_by {
        issue(client_by, &at(CLIENT_CERTIFICATE), &at(CLIENT_KEY), false);
    }
    directory
}

fn server(tls: TlsPolicy) -> Arc<Server> {
    let options = ServerOptions { tls, ..ServerOptions::default() };
    Server::new(vec![export("", Arc::new(filled(1 << 20)))], options).expect("one export")
}

async fn greeted(server: &Arc<Server>) -> Peer {
    let (mut peer, _) = connect(server);
    peer.greet().await;
    peer
}

/// Starts TLS and uses it; an error is that of TLS, of either side.
async fn secured(server: &Arc<Server>, tls: &ClientTls, name: &str) -> std::io::Result<()> {
    let mut peer = greeted(server).await;
    assert_eq!(peer.option(OptionRequest::StartTls).await, [OptionReply::Ack]);
    let stream: UnixStream = peer.stream;
    let mut stream = tls.connect(name, stream).await?;
    // With TLS 1.3 the server judges the client after the client is through: it shows by the first answer.
    let mut header = [0; 20];
    let mut bytes = Vec::new();
    OptionRequest::List.encode(&mut bytes);
    tokio::io::AsyncWriteExt::write_all(&mut stream, &bytes).await?;
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut header).await?;
    let length = u32::from_be_bytes(header[16..].try_into().expect("four bytes"));
    let mut peer = Peer::over(stream);
    peer.read_vec(length as usize).await;
    assert_eq!(peer.option_replies(loam_nbd::protocol::OptionCode::List).await, [OptionReply::Ack]);
    let again = peer.option(OptionRequest::StartTls).await;
    assert_eq!(refusal(&again), Some(RefusalKind::Invalid), "TLS begins once");
    peer.negotiate(HeaderStyle::Extended).await;
    peer.go("").await;
    let read = loam_nbd::protocol::Command::Read;
    let reply = peer.ask(&crate::peer::request(read, 1, 5, 1 << 19), &[]).await;
    assert_eq!(reply.assemble(5, 1 << 19)[..3], [5, 7, 7]);
    Ok(())
}

#[tokio::test]
async fn required_tls_lets_nothing_else_through() {
    let certificates = directory(&authority(), None, false);
    let tls = ServerTls::from_directory(certificates.path(), false).expect("certificates");
    let server = server(TlsPolicy::Require(tls));
    let mut peer = greeted(&server).await;
    for option in [
        OptionRequest::List,
        OptionRequest::Info(info("", &[])),
        OptionRequest::Go(info("", &[])),
        OptionRequest::StructuredReply,
        OptionRequest::ExtendedHeaders,
        OptionRequest::Unknown(77),
    ] {
        assert_eq!(refusal(&peer.option(option).await), Some(RefusalKind::TlsRequired));
    }
    assert_eq!(refusal(&peer.raw_option(3, b"x").await), Some(RefusalKind::TlsRequired));
    assert_eq!(peer.option(OptionRequest::Abort).await, [OptionReply::Ack]);
    let mut peer = greeted(&server).await;
    let mut bytes = Vec::new();
    OptionRequest::ExportName(String::new()).encode(&mut bytes);
    peer.write(&bytes).await;
    peer.expect_closed().await;
    let client = ClientTls::from_directory(certificates.path(), true).expect("certificates");
    secured(&server, &client, "server.test").await.expect("TLS");
    secured(&server, &client, "127.0.0.1").await.expect("TLS");
}

#[tokio::test]
async fn allowed_tls_is_the_clients_choice_and_begins_from_nothing() {
    let certificates = directory(&authority(), None, false);
    let tls = ServerTls::from_directory(certificates.path(), false).expect("certificates");
    let server = server(TlsPolicy::Allow(tls));
    let mut plain = greeted(&server).await;
    plain.go("").await;
    plain.expect_alive().await;
    let client = ClientTls::from_directory(certificates.path(), true).expect("certificates");
    secured(&server, &client, "server.test").await.expect("TLS");

    let mut peer = greeted(&server).await;
    peer.negotiate(HeaderStyle::Extended).await;
    assert_eq!(peer.option(OptionRequest::StartTls).await, [OptionReply::Ack]);
    let mut peer = Peer::over(client.connect("server.test", peer.stream).await.expect("TLS"));
    let replies = peer.option(OptionRequest::StructuredReply).await;
    assert_eq!(replies, [OptionReply::Ack], "extended headers were forgotten");
}

#[tokio::test]
async fn what_follows_starttls_in_clear_is_not_heard() {
    let certificates = directory(&authority(), None, false);
    let tls = ServerTls::from_directory(certificates.path(), false).expect("certificates");
    let mut peer = greeted(&server(TlsPolicy::Allow(tls))).await;
    let mut bytes = Vec::new();
    OptionRequest::StartTls.encode(&mut bytes);
    OptionRequest::Go(info("", &[])).encode(&mut bytes);
    peer.write(&bytes).await;
    let replies = peer.option_replies(loam_nbd::protocol::OptionCode::StartTls).await;
    assert_eq!(replies, [OptionReply::Ack]);
    let mut rest = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut peer.stream, &mut rest).await;
    assert!(
        !rest.windows(8).any(|window| window == [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]),
        "answered in clear"
    );
}

#[tokio::test]
async fn expired_and_misnamed_servers_and_those_of_others_are_not_trusted() {
    let ours = authority();
    let expired = directory(&ours, None, true);
    let tls = ServerTls::from_directory(expired.path(), false).expect("certificates");
    let client = ClientTls::from_directory(expired.path(), true).expect("certificates");
    let error = secured(&server(TlsPolicy::Require(tls)), &client, "server.test").await.expect_err("expired");
    assert!(error.to_string().contains("xpired"), "{error}");

    let good = directory(&ours, None, false);
    let tls = ServerTls::from_directory(good.path(), false).expect("certificates");
    let server = server(TlsPolicy::Require(tls));
    let client = ClientTls::from_directory(good.path(), true).expect("certificates");
    let error = secured(&server, &client, "other.test").await.expect_err("another name");
    assert!(error.to_string().contains("not valid for"), "{error}");
    let any_name = ClientTls::from_directory(good.path(), false).expect("certificates");
    secured(&server, &any_name, "other.test").await.expect("the name does not matter");

    let theirs = directory(&authority(), None, false);
    let client = ClientTls::from_directory(theirs.path(), false).expect("certificates");
    secured(&server, &client, "server.test").await.expect_err("of an authority that is not trusted");
}

#[tokio::test]
async fn clients_must_show_a_certificate_of_the_right_authority() {
    let ours = authority();
    let good = directory(&ours, Some(&ours), false);
    let tls = ServerTls::from_directory(good.path(), true).expect("certificates");
    let server = server(TlsPolicy::Require(tls));
    let client = ClientTls::from_directory(good.path(), true).expect("certificates");
    secured(&server, &client, "server.test").await.expect("TLS");

    let ca = good.path().join(CA_CERTIFICATE);
    let nobody = ClientTls::from_files(&ca, None, true).expect("an authority");
    secured(&server, &nobody, "server.test").await.expect_err("no certificate");

    let other = directory(&authority(), None, false);
    let (certificate, key) = (other.path().join(SERVER_CERTIFICATE), other.path().join(SERVER_KEY));
    let stranger = ClientTls::from_files(&ca, Some((&certificate, &key)), true).expect("certificates");
    secured(&server, &stranger, "server.test").await.expect_err("of another authority");
}

#[test]
fn files_that_are_missing_or_something_else_are_named() {
    let good = directory(&authority(), None, false);
    let missing = ServerTls::from_directory(&good.path().join("nowhere"), false).expect_err("missing");
    assert!(missing.to_string().contains("nowhere/server-cert.pem"), "{missing}");
    std::fs::write(good.path().join(SERVER_CERTIFICATE), "no PEM").expect("written");
    let empty = ServerTls::from_directory(good.path(), false).expect_err("empty");
    assert!(empty.to_string().contains("holds no certificate"), "{empty}");
    std::fs::copy(good.path().join(CA_CERTIFICATE), good.path().join(SERVER_CERTIFICATE)).expect("copied");
    assert!(ServerTls::from_directory(good.path(), false).is_err(), "key and certificate do not match");
}

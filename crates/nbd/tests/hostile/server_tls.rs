//! A server that insists on TLS, and clients that would rather not.

use std::sync::Arc;
use std::time::Duration;

use loam_block::MemoryDevice;
use loam_nbd::server::ServerOptions;
use loam_nbd::tls::{ServerTls, TlsPolicy};

use crate::hostile::*;
use crate::session::*;

const STARTTLS: u32 = 5;
const ERR_TLS_REQD: u32 = (1 << 31) + 5;

fn forced() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = (directory.path().join("c.pem"), directory.path().join("k.pem"));
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(&certificate, signed.cert.pem()).unwrap();
    std::fs::write(&key, signed.signing_key.serialize_pem()).unwrap();
    let tls = TlsPolicy::Require(ServerTls::from_files(&certificate, &key, None).unwrap());
    let handshake_timeout = Duration::from_millis(1500);
    let options = ServerOptions { tls, handshake_timeout, ..ServerOptions::default() };
    Served::device(Arc::new(MemoryDevice::from_bytes(&content())), options)
}

#[test]
fn nothing_is_told_before_tls() {
    let served = forced();
    let mut session = served.connect();
    for (code, data) in [
        (3, Bytes::new()),
        (3, Bytes::new().raw("data where none belongs")),
        (6, info("disk", &[0])),
        (7, info("disk", &[3])),
        (7, info("nobody", &[])),
        (7, Bytes::new().raw("malformed")),
        (8, Bytes::new()),
        (9, contexts("disk", &[])),
        (10, contexts("disk", &["base:allocation"])),
        (11, Bytes::new()),
        (99, Bytes::new().raw("unknown")),
    ] {
        assert_eq!(session.ask(code, data), ERR_TLS_REQD, "option {code}");
    }
    assert_eq!(session.ask(STARTTLS, "x"), ERR_INVALID);
    assert_eq!(session.ask(2, ""), ACK, "leaving is free");
    session.peer.expect_closed();
    let mut session = served.connect();
    session.option(1, "disk");
    session.peer.expect_closed();
    // Without fixed newstyle there is no TLS, and no word of it, but no export either.
    let mut session = Session::bare(&served.path);
    session.peer.send(0_u32.to_be_bytes());
    assert_eq!(session.ask(3, ""), ERR_INVALID);
    assert_eq!(session.ask(STARTTLS, ""), ERR_INVALID);
    session.option(1, "disk");
    session.peer.expect_closed();
}

/// What is sent in the clear after STARTTLS is TLS or nothing: it must not be taken for what was said under its cover.
#[test]
fn options_in_the_clear_after_starttls_are_not_heard() {
    let served = forced();
    let smuggled = option(STARTTLS, "").raw(option(3, "")).raw(option(7, info("disk", &[3]))).raw([0; 600]);
    for bytes in [smuggled, option(STARTTLS, "").raw([0x16; 600]), option(STARTTLS, "").raw([0; 600])] {
        let mut session = served.connect();
        session.peer.send(bytes);
        assert_eq!(session.reply(STARTTLS).0, ACK);
        // At most a TLS alert.
        let said = session.peer.drain(1000);
        assert!(said < 20, "{said} bytes");
    }
}

#[test]
fn a_client_that_starts_tls_and_says_no_more_is_not_waited_for() {
    let served = forced();
    let mut session = served.connect();
    assert_eq!(session.ask(STARTTLS, ""), ACK);
    session.peer.expect_closed();
    let mut session = served.connect();
    assert_eq!(session.ask(STARTTLS, ""), ACK);
    session.peer.send([0x16, 3, 1, 2]);
    session.peer.drain(100);
}

//! TLS from the client's side: who is trusted, and who is not.

mod client_support;

use std::path::Path;
use std::sync::Arc;

use client_support::{Served, options};
use loam_block::{BlockDevice, MemoryDevice};
use loam_nbd::client::{ClientOptions, ConnectError, NbdDevice};
use loam_nbd::server::ServerOptions;
use loam_nbd::tls::{ClientTls, ServerTls, TlsPolicy};
use loam_nbd::uri::Uri;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// A directory with an authority and a server's certificate for `name` that ends in `year`.
fn certificates(name: &str, year: i32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let put = |file: &str, text: String| std::fs::write(directory.path().join(file), text).unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let mut server = CertificateParams::new(vec![name.to_owned()]).unwrap();
    server.not_before = date_time_ymd(2000, 1, 1);
    server.not_after = date_time_ymd(year, 1, 1);
    let key = KeyPair::generate().unwrap();
    put("ca-cert.pem", issuer.pem());
    put("server-cert.pem", server.signed_by(&key, &issuer).unwrap().pem());
    put("server-key.pem", key.serialize_pem());
    directory
}

fn serve(policy: TlsPolicy) -> Served {
    Served::new(
        Arc::new(MemoryDevice::new(1 << 20)),
        ServerOptions { tls: policy, ..ServerOptions::default() },
    )
}

fn required(directory: &Path) -> Served {
    serve(TlsPolicy::Require(ServerTls::from_directory(directory, false).unwrap()))
}

fn connect(served: &Served, tls: bool, trust: Option<&Path>) -> Result<NbdDevice, ConnectError> {
    let uri = Uri { tls, ..served.uri.clone() };
    let tls = trust.map(|directory| ClientTls::from_directory(directory, true).unwrap());
    served.runtime.block_on(NbdDevice::connect(&uri, ClientOptions { tls, ..options() }))
}

#[test]
fn a_trusted_server_is_read_and_written() {
    let directory = certificates("localhost", 4000);
    let served = required(directory.path());
    let device = connect(&served, true, Some(directory.path())).unwrap();
    assert!(device.export().tls);
    served.runtime.block_on(async {
        let data = vec![0x5a; 700_000];
        device.write(4096, &data, Default::default()).await.unwrap();
        let mut back = vec![0; data.len()];
        device.read(4096, &mut back).await.unwrap();
        assert!(back == data);
    });
    // Certificates in hand, a plain URI is encrypted as well.
    assert!(connect(&served, false, Some(directory.path())).unwrap().export().tls);
}

#[test]
fn expired_foreign_and_misnamed_certificates_are_refused() {
    let good = certificates("localhost", 4000);
    for (name, year, own) in
        [("localhost", 2001, true), ("elsewhere", 4000, true), ("localhost", 4000, false)]
    {
        let directory = certificates(name, year);
        let served = required(directory.path());
        let trust = if own { directory.path() } else { good.path() };
        let error = connect(&served, true, Some(trust)).err().expect("refused");
        assert!(matches!(error, ConnectError::TlsFailed { .. }), "{name} {year}: {error}");
    }
}

#[test]
fn a_server_without_tls_gets_nothing_and_one_with_it_says_so() {
    let directory = certificates("localhost", 4000);
    let plain = serve(TlsPolicy::Refuse);
    let error = connect(&plain, true, Some(directory.path())).err().expect("refused");
    assert!(matches!(error, ConnectError::TlsRefused { .. }), "{error}");
    assert!(!connect(&plain, false, Some(directory.path())).unwrap().export().tls);
    let error = connect(&required(directory.path()), false, None).err().expect("refused");
    assert!(matches!(error, ConnectError::TlsRequired { .. }), "{error}");
    let error = connect(&plain, true, None).err().expect("refused");
    assert!(matches!(error, ConnectError::NoCertificates { .. }), "{error}");
}

//! TLS of both sides: certificates, keys and whom to trust, from files as the other NBD tools lay them out.
//!
//! A directory holds `ca-cert.pem` (whom to trust), for a server `server-cert.pem` and `server-key.pem`, for a client
//! that has to show who it is `client-cert.pem` and `client-key.pem`. TLS 1.2 and 1.3, X.509 only.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Certificates of the authority that both sides trust, within a directory.
pub const CA_CERTIFICATE: &str = "ca-cert.pem";
/// The server's certificate, and those between it and the authority's.
pub const SERVER_CERTIFICATE: &str = "server-cert.pem";
/// The server's private key.
pub const SERVER_KEY: &str = "server-key.pem";
/// The client's certificate, and those between it and the authority's.
pub const CLIENT_CERTIFICATE: &str = "client-cert.pem";
/// The client's private key.
pub const CLIENT_KEY: &str = "client-key.pem";

/// Certificates or keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, or holds no PEM of the kind that is needed.
    #[error("cannot take {what} from {}: {source}", path.display())]
    File {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: rustls_pki_types::pem::Error,
    },
    /// A file holds no certificate at all.
    #[error("{} holds no certificate: expected PEM with BEGIN CERTIFICATE", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not belong together, or an authority's certificate is unusable.
    #[error("{} cannot be used: {source}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Whether a server speaks TLS.
#[derive(Debug, Clone, Default)]
pub enum TlsPolicy {
    /// Never.
    #[default]
    Refuse,
    /// With clients that ask for it.
    Allow(ServerTls),
    /// Always: who does not ask for it gets nothing else.
    Require(ServerTls),
}

/// A server's certificate and key, and the authority of its clients if they have to show a certificate.
#[derive(Clone)]
pub struct ServerTls {
    acceptor: TlsAcceptor,
}

impl ServerTls {
    /// Takes certificate chain, key and, for clients that must show a certificate, the authority that signed it from
    /// PEM files.
    ///
    /// # Errors
    /// When a file cannot be read, holds something else, or key and certificate do not belong together.
    pub fn from_files(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|source| unusable(certificate, source))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .build()
                    .map_err(|source| unusable(path, source))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(certificates(certificate)?, private_key(key)?)
            .map_err(|source| unusable(certificate, source))?;
        Ok(ServerTls { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// The same from a directory. With `verify_client` clients must show a certificate of the directory's authority.
    ///
    /// # Errors
    /// Those of [`ServerTls::from_files`].
    pub fn from_directory(directory: &Path, verify_client: bool) -> Result<Self, TlsError> {
        let authority = directory.join(CA_CERTIFICATE);
        let (certificate, key) = (directory.join(SERVER_CERTIFICATE), directory.join(SERVER_KEY));
        ServerTls::from_files(&certificate, &key, verify_client.then_some(authority.as_path()))
    }

    /// The server's side of the TLS handshake over `stream`.
    ///
    /// # Errors
    /// When the client speaks no TLS, shows no certificate although it must, or one that is not trusted.
    pub async fn accept<S>(&self, stream: S) -> io::Result<server::TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.acceptor.accept(stream).await
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

/// Whom a client trusts, and what it shows of itself.
#[derive(Clone)]
pub struct ClientTls {
    connector: TlsConnector,
}

impl ClientTls {
    /// Takes the authority to trust and, for servers that ask for it, certificate chain and key from PEM files. Without
    /// `verify_hostname` any certificate of the authority will do, whatever its name.
    ///
    /// # Errors
    /// When a file cannot be read, holds something else, or key and certificate do not belong together.
    pub fn from_files(
        ca: &Path,
        certificate_and_key: Option<(&Path, &Path)>,
        verify_hostname: bool,
    ) -> Result<Self, TlsError> {
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(authorities(ca)?), provider())
            .build()
            .map_err(|source| unusable(ca, source))?;
        let verifier: Arc<dyn ServerCertVerifier> =
            if verify_hostname { verifier } else { Arc::new(AnyName(verifier)) };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|source| unusable(ca, source))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let config = match certificate_and_key {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(certificates(certificate)?, private_key(key)?)
                .map_err(|source| unusable(certificate, source))?,
        };
        Ok(ClientTls { connector: TlsConnector::from(Arc::new(config)) })
    }

    /// The same from a directory; a certificate is shown if it holds one.
    ///
    /// # Errors
    /// Those of [`ClientTls::from_files`].
    pub fn from_directory(directory: &Path, verify_hostname: bool) -> Result<Self, TlsError> {
        let (certificate, key) = (directory.join(CLIENT_CERTIFICATE), directory.join(CLIENT_KEY));
        let own = certificate.exists().then_some((certificate.as_path(), key.as_path()));
        ClientTls::from_files(&directory.join(CA_CERTIFICATE), own, verify_hostname)
    }

    /// The client's side of the TLS handshake over `stream` with the server called `host` (a DNS name or an address).
    ///
    /// # Errors
    /// When the server's certificate is not trusted, expired, or of another name, or the server refuses ours.
    pub async fn connect<S>(&self, host: &str, stream: S) -> io::Result<client::TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
        self.connector.connect(name, stream).await
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").finish_non_exhaustive()
    }
}

/// Trusts what the authority signed, whatever name it carries.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        // The name is what the verifier looks at last: whoever fails by it passed all else.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            answer => answer,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn unusable(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> TlsError {
    TlsError::Unusable { path: path.to_owned(), source: Box::new(source) }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |source| TlsError::File { what: "a certificate", path: path.to_owned(), source };
    let chain: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(fail)?.collect::<Result<_, _>>().map_err(fail)?;
    if chain.is_empty() { Err(TlsError::Empty { path: path.to_owned() }) } else { Ok(chain) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::File {
        what: "a private key",
        path: path.to_owned(),
        source,
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| unusable(path, source))?;
    }
    Ok(roots)
}

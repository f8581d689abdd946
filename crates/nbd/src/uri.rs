//! NBD URIs, by <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>, and the addresses in them.
//!
//! ```text
//! nbd://HOST[:PORT]/EXPORT              nbd+unix:///EXPORT?socket=PATH
//! nbds://HOST[:PORT]/EXPORT             nbds+unix:///EXPORT?socket=PATH
//! ```
//! With `nbds` the connection fails where it cannot be encrypted; with `nbd` TLS is used where the user gave what it
//! needs. The export name is the path without its leading slash, which is not part of the name. Parameters:
//! `socket`, `tls-certificates` (a directory), `tls-hostname`, `tls-verify-peer` (0 or 1), `tls-type` (x509 alone).

use std::ffi::OsStr;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use crate::protocol::{DEFAULT_PORT, STRING_BYTES_MAX};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host by name or number (IPv6 without brackets), and a port.
    Tcp {
        /// Name or number.
        host: String,
        /// Port; 0 lets a listener choose.
        port: u16,
    },
    /// A Unix socket; a name that begins with a NUL byte is one of the abstract namespace.
    Unix(PathBuf),
}

/// An export of a server, and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// The connection must be encrypted.
    pub tls: bool,
    /// What the URI says about TLS beyond that.
    pub tls_parameters: TlsParameters,
    /// Names of parameters that are not understood: for the caller to warn of. Those that begin with `x-` are not
    /// listed, for the standard sets them apart for experiments. Not part of [`fmt::Display`].
    pub ignored: Vec<String>,
}

/// What a URI can say about TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct TlsParameters {
    /// Directory of certificates and keys.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must bear, where it is not that of the address.
    pub hostname: Option<String>,
    /// Whether the server's certificate is verified; the default is that it is.
    pub verify_peer: Option<bool>,
}

/// Why a string is no NBD URI or no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}: {why}")]
pub struct ParseUriError {
    text: String,
    why: String,
}

/// What stands as it is in a path or a parameter.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

impl Uri {
    /// A URI without TLS.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        let tls_parameters = TlsParameters::default();
        Uri { address, export: export.into(), tls: false, tls_parameters, ignored: Vec::new() }
    }
}

impl FromStr for Uri {
    type Err = ParseUriError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_uri(text).map_err(|why| ParseUriError { text: text.to_owned(), why })
    }
}

fn parse_uri(text: &str) -> Result<Uri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("not a URI: it has no ://")?;
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        "nbd+vsock" | "nbds+vsock" => {
            return Err("vsock is not supported: use nbd:// or nbd+unix://".into());
        }
        _ => return Err("the scheme must be nbd, nbds, nbd+unix or nbds+unix".into()),
    };
    if rest.contains('#') {
        return Err("a fragment means nothing here: write # as %23".into());
    }
    let (hierarchy, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = match hierarchy.find('/') {
        Some(slash) => (&hierarchy[..slash], &hierarchy[slash + 1..]),
        None => (hierarchy, ""),
    };
    let export = decode_text(path, "the export name")?;
    if export.len() > STRING_BYTES_MAX {
        return Err(format!("the export name is longer than {STRING_BYTES_MAX} bytes"));
    }
    let parameters = Parameters::parse(query)?;
    let address = match (unix, parameters.socket) {
        (true, Some(socket)) if authority.is_empty() => Address::Unix(socket),
        (true, Some(_)) => return Err("a Unix socket has no host: three slashes follow the scheme".into()),
        (true, None) => return Err("the parameter ?socket=PATH is missing".into()),
        (false, Some(_)) => return Err("the parameter socket needs the scheme nbd+unix or nbds+unix".into()),
        (false, None) => {
            let host_and_port = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
            let (host, port) = split_host(host_and_port)?;
            let host = if host.is_empty() { "localhost".to_owned() } else { host };
            let port = port.unwrap_or(DEFAULT_PORT);
            if port == 0 {
                return Err("port 0 cannot be connected to".into());
            }
            Address::Tcp { host, port }
        }
    };
    Ok(Uri { address, export, tls, tls_parameters: parameters.tls, ignored: parameters.ignored })
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    tls: TlsParameters,
    ignored: Vec<String>,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, String> {
        let mut parameters = Parameters::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "socket" => parameters.socket = Some(decode_socket(value)?),
                "tls-certificates" => {
                    parameters.tls.certificates = Some(decode_path(value, "tls-certificates")?);
                }
                "tls-hostname" => parameters.tls.hostname = Some(decode_text(value, "tls-hostname")?),
                "tls-verify-peer" => {
                    parameters.tls.verify_peer = Some(match value {
                        "0" | "false" => false,
                        "1" | "true" => true,
                        _ => return Err("tls-verify-peer must be 0 or 1".into()),
                    });
                }
                "tls-type" if value == "x509" => {}
                "tls-type" | "tls-psk-file" => {
                    return Err(
                        "only TLS with certificates (x509) is supported, not keys shared in advance (psk) \
                                or none (anon): use tls-certificates=DIRECTORY"
                            .into(),
                    );
                }
                other if other.starts_with("x-") => {}
                other => parameters.ignored.push(decode_text(other, "a parameter's name")?),
            }
        }
        Ok(parameters)
    }
}

/// Splits `host[:port]` with IPv6 in brackets.
fn split_host(text: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("the bracket of an IPv6 address is not closed")?;
        let host = decode_text(host, "the host")?;
        let number = host.split('%').next().unwrap_or_default();
        if number.parse::<Ipv6Addr>().is_err() {
            return Err("what stands in brackets is no IPv6 address".into());
        }
        match (rest, rest.strip_prefix(':')) {
            ("", _) => (host, None),
            (_, Some(port)) => (host, Some(port)),
            _ => return Err("after the bracket only :PORT may follow".into()),
        }
    } else {
        let (host, port) = match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address must stand in brackets".into());
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        };
        let host = decode_text(host, "the host")?;
        if host.contains(|c: char| c.is_control() || c.is_whitespace() || "[]/:@?#%".contains(c)) {
            return Err("the host contains a character that no host name has".into());
        }
        (host, port)
    };
    let port = match port {
        None | Some("") => None,
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(port.parse().map_err(|_| "the port is larger than 65535")?)
        }
        Some(_) => return Err("the port is not a number".into()),
    };
    Ok((host, port))
}

/// Undoes percent-encoding. A `+` is a plus: these are no forms of the web.
fn decode(text: &str, what: &str) -> Result<Vec<u8>, String> {
    for (at, _) in text.match_indices('%') {
        let digits = text.as_bytes().get(at + 1..at + 3);
        if !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            return Err(format!("{what}: a % must be followed by two hexadecimal digits (write % as %25)"));
        }
    }
    Ok(percent_decode_str(text).collect())
}

fn decode_text(text: &str, what: &str) -> Result<String, String> {
    let text = String::from_utf8(decode(text, what)?).map_err(|_| format!("{what} is not UTF-8"))?;
    if text.contains('\0') { Err(format!("{what} contains a NUL")) } else { Ok(text) }
}

fn decode_path(text: &str, what: &str) -> Result<PathBuf, String> {
    let bytes = decode(text, what)?;
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(format!("{what} is empty or contains a NUL"));
    }
    Ok(PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

fn decode_socket(text: &str) -> Result<PathBuf, String> {
    check_socket(&decode(text, "socket")?)
}

/// The name of a Unix socket; only its first byte may be NUL.
fn check_socket(bytes: &[u8]) -> Result<PathBuf, String> {
    if bytes.is_empty() || bytes == [0] || bytes[1..].contains(&0) {
        return Err("the socket's name is empty or contains a NUL".into());
    }
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

impl FromStr for Address {
    type Err = ParseUriError;

    /// Reads `unix:PATH` or `tcp:HOST[:PORT]`, with an IPv6 address in brackets.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_address(text).map_err(|why| ParseUriError { text: text.to_owned(), why })
    }
}

fn parse_address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return check_socket(path.as_bytes()).map(Address::Unix);
    }
    let rest = text.strip_prefix("tcp:").ok_or("an address is unix:PATH or tcp:HOST:PORT")?;
    let (host, port) = split_host(rest)?;
    if host.is_empty() {
        return Err("the host is missing: tcp:HOST:PORT".into());
    }
    Ok(Address::Tcp { host, port: port.unwrap_or(DEFAULT_PORT) })
}

/// A host as it stands before a port.
fn bracketed(host: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if host.contains(':') {
        write!(f, "[{}]", host.replace('%', "%25"))
    } else {
        write!(f, "{}", percent_encode(host.as_bytes(), ESCAPED))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } => {
                f.write_str("tcp:")?;
                bracketed(host, f)?;
                write!(f, ":{port}")
            }
        }
    }
}

impl fmt::Display for Uri {
    /// The URI, with its port only where it is not the default one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        let mut separator = '?';
        let mut parameter = |f: &mut fmt::Formatter<'_>, key: &str, value: &[u8]| {
            write!(f, "{separator}{key}={}", percent_encode(value, ESCAPED))?;
            separator = '&';
            Ok::<_, fmt::Error>(())
        };
        match &self.address {
            Address::Tcp { host, port } => {
                f.write_str("://")?;
                bracketed(host, f)?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{}", percent_encode(self.export.as_bytes(), ESCAPED))?;
            }
            Address::Unix(path) => {
                write!(f, "+unix:///{}", percent_encode(self.export.as_bytes(), ESCAPED))?;
                parameter(f, "socket", path.as_os_str().as_bytes())?;
            }
        }
        let tls = &self.tls_parameters;
        if let Some(path) = &tls.certificates {
            parameter(f, "tls-certificates", path.as_os_str().as_bytes())?;
        }
        if let Some(hostname) = &tls.hostname {
            parameter(f, "tls-hostname", hostname.as_bytes())?;
        }
        if let Some(verify) = tls.verify_peer {
            parameter(f, "tls-verify-peer", if verify { b"1" } else { b"0" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn the_export_names_of_the_standard() {
        for (text, export) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
            ("nbd://example.com/a+b%2Fc%C3%A9", "a+b/cé"),
            ("nbd+unix:////disk?socket=sock", "/disk"),
            ("nbd://example.com?x-y=1", ""),
        ] {
            assert_eq!(text.parse::<Uri>().map(|uri| uri.export), Ok(export.to_owned()), "{text}");
        }
    }

    #[test]
    fn hosts_ports_and_schemes() {
        for (text, address, tls) in [
            ("nbd://example.com", tcp("example.com", 10809), false),
            ("NBDS://example.com:1/", tcp("example.com", 1), true),
            ("nbd://[::1]:9/", tcp("::1", 9), false),
            ("nbd://[fe80::1%25eth0]/", tcp("fe80::1%eth0", 10809), false),
            ("nbd://127.0.0.1:/", tcp("127.0.0.1", 10809), false),
            ("nbd://me@host:2/", tcp("host", 2), false),
            ("nbd:///x", tcp("localhost", 10809), false),
            ("nbds+unix:///?socket=/run/a%20b", Address::Unix("/run/a b".into()), true),
            ("nbd+unix:///?socket=%00/abstract", Address::Unix("\0/abstract".into()), false),
        ] {
            let uri = text.parse::<Uri>().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((uri.address, uri.tls), (address, tls), "{text}");
        }
    }

    #[test]
    fn parameters_are_taken_refused_or_listed() {
        let text = "nbds://h/e?tls-certificates=/etc/pki%26x&tls-hostname=other&tls-verify-peer=0&tls-type=x509\
                    &x-mine=1&unheard=2";
        let uri = text.parse::<Uri>().unwrap();
        let expected = TlsParameters {
            certificates: Some("/etc/pki&x".into()),
            hostname: Some("other".into()),
            verify_peer: Some(false),
        };
        assert_eq!(uri.tls_parameters, expected);
        assert_eq!(uri.ignored, ["unheard"]);
        for (text, hint) in [
            ("nbds://h/?tls-psk-file=/keys", "psk"),
            ("nbds://h/?tls-type=anon", "anon"),
            ("nbds://h/?tls-verify-peer=2", "0 or 1"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
    }

    #[test]
    fn what_is_no_uri_says_why() {
        for (text, hint) in [
            ("disk.img", "://"),
            ("http://h/", "scheme"),
            ("nbd+vsock://2:10809/", "vsock"),
            ("nbd+unix:///x", "socket=PATH"),
            ("nbd+unix:///x?socket=", "empty"),
            ("nbd+unix:///x?socket=a%00b", "NUL"),
            ("nbd+unix://host/x?socket=s", "three slashes"),
            ("nbd://h/x?socket=s", "nbd+unix"),
            ("nbd://::1/", "brackets"),
            ("nbd://[::1/", "closed"),
            ("nbd://[host]/", "IPv6"),
            ("nbd://[::1]x/", ":PORT"),
            ("nbd://h:65536/", "65535"),
            ("nbd://h:0/", "port 0"),
            ("nbd://h:+1/", "number"),
            ("nbd://a b/", "host"),
            ("nbd://h/%zz", "%25"),
            ("nbd://h/%", "%25"),
            ("nbd://h/%ff", "UTF-8"),
            ("nbd://h/a%00", "NUL"),
            ("nbd://h/a#b", "%23"),
        ] {
            let error = text.parse::<Uri>().expect_err(text).to_string();
            assert!(error.contains(hint) && error.starts_with(text), "{error}");
        }
        assert!(format!("nbd://h/{}", "x".repeat(4097)).parse::<Uri>().is_err());
    }

    #[test]
    fn addresses() {
        for (text, address) in [
            ("unix:/run/d.sock", Address::Unix("/run/d.sock".into())),
            ("tcp:0.0.0.0:0", tcp("0.0.0.0", 0)),
            ("tcp:[::]:10809", tcp("::", 10809)),
            ("tcp:localhost", tcp("localhost", 10809)),
        ] {
            assert_eq!(text.parse::<Address>(), Ok(address), "{text}");
        }
        for text in ["", "unix:", "tcp:", "tcp::1", "/run/d.sock", "tcp:::1:9"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    fn uris() -> impl Strategy<Value = Uri> {
        let v6 = any::<u128>().prop_map(|bits| Ipv6Addr::from(bits).to_string());
        let host = prop_oneof!["[a-z0-9.-]{1,20}", v6];
        let path = prop::collection::vec(1u8.., 1..40);
        let path = path.prop_map(|bytes| PathBuf::from(std::ffi::OsString::from_vec(bytes)));
        let address = prop_oneof![
            (host, 1u16..).prop_map(|(host, port)| Address::Tcp { host, port }),
            path.clone().prop_map(Address::Unix),
        ];
        let name = "[^\0]{0,20}";
        let tls = (prop::option::of(path), prop::option::of(name), prop::option::of(any::<bool>()));
        (address, name, any::<bool>(), tls).prop_map(|(address, export, tls, parameters)| {
            let (certificates, hostname, verify_peer) = parameters;
            let tls_parameters = TlsParameters { certificates, hostname, verify_peer };
            Uri { address, export, tls, tls_parameters, ignored: Vec::new() }
        })
    }

    proptest! {
        #[test]
        fn a_uri_survives_being_written_and_read(uri in uris()) {
            let text = uri.to_string();
            prop_assert!(text.is_ascii(), "{}", text);
            prop_assert_eq!(text.parse::<Uri>(), Ok(uri.clone()));
            if let Address::Tcp { .. } = uri.address {
                prop_assert_eq!(uri.address.to_string().parse::<Address>(), Ok(uri.address));
            }
        }

        #[test]
        fn any_text_is_refused_or_read_the_same_again(text in r"(nbds?(\+unix)?://)?([^\x00]{0,30}|[\]\[:/?&=%@#a-z0-9]{0,40})") {
            if let Ok(mut uri) = text.parse::<Uri>() {
                uri.ignored.clear();
                prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
            }
            let _ = text.parse::<Address>();
        }
    }
}

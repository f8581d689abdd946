//! [`SourceUrl`]: where bytes come from, as a user writes it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A local file or an HTTP(S) object. Parsed from `file:PATH`, a plain path, `http://...` or `https://...`; `Display`
/// gives a text that parses to the same value. Serialised as that text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SourceUrl {
    /// A regular file (or block device).
    File(PathBuf),
    /// An object behind `http://` or `https://`; a valid URL with a host.
    Http(String),
}

impl SourceUrl {
    /// The same source with `suffix` appended to its path: `x.tar` gives `x.tar.loam`. A query stays behind the path.
    pub fn with_suffix(&self, suffix: &str) -> SourceUrl {
        match self {
            SourceUrl::File(path) => {
                let mut name = path.as_os_str().to_owned();
                name.push(suffix);
                SourceUrl::File(name.into())
            }
            SourceUrl::Http(url) => {
                let end = url.find(['?', '#']).unwrap_or(url.len());
                SourceUrl::Http(format!("{}{suffix}{}", &url[..end], &url[end..]))
            }
        }
    }

    /// The address as messages may show it: without user, password and query, which may hold a signature.
    pub fn shown(&self) -> String {
        let SourceUrl::Http(address) = self else { return self.to_string() };
        let end = address.find(['?', '#']).unwrap_or(address.len());
        let (address, rest) = address.split_at(end);
        let hidden = if rest.starts_with('?') { "?..." } else { "" };
        match address.split_once("://").and_then(|(scheme, rest)| {
            let host_end = rest.find('/').unwrap_or(rest.len());
            rest[..host_end].rfind('@').map(|at| format!("{scheme}://{}", &rest[at + 1..]))
        }) {
            Some(public) => public + hidden,
            None => format!("{address}{hidden}"),
        }
    }

    /// The path of a local file.
    pub fn as_path(&self) -> Option<&Path> {
        match self {
            SourceUrl::File(path) => Some(path),
            SourceUrl::Http(_) => None,
        }
    }
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceUrl::File(path) => write!(f, "file:{}", path.display()),
            SourceUrl::Http(url) => f.write_str(url),
        }
    }
}

impl From<SourceUrl> for String {
    fn from(url: SourceUrl) -> String {
        url.to_string()
    }
}

impl TryFrom<String> for SourceUrl {
    type Error = Error;

    fn try_from(text: String) -> Result<SourceUrl, Error> {
        text.parse()
    }
}

impl FromStr for SourceUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<SourceUrl, Error> {
        let bad = |why: &str| Error::BadUrl { url: text.to_owned(), why: why.to_owned() };
        if let Some(path) = text.strip_prefix("file:") {
            // `file:///x` and `file://localhost/x` are what other programs write for `file:/x`.
            let path = match path.strip_prefix("//") {
                Some(rest) if rest.starts_with('/') => rest,
                Some(rest) => match rest.strip_prefix("localhost/") {
                    Some(_) => &rest["localhost".len()..],
                    None => return Err(bad("a file: URL names no host but localhost")),
                },
                None => path,
            };
            return if path.is_empty() { Err(bad("no path")) } else { Ok(SourceUrl::File(path.into())) };
        }
        match text.split_once("://") {
            Some(("http" | "https", _)) => match reqwest::Url::parse(text) {
                Ok(url) if url.has_host() => Ok(SourceUrl::Http(text.to_owned())),
                Ok(_) => Err(bad("no host")),
                Err(error) => Err(bad(&error.to_string())),
            },
            Some((scheme, _)) if scheme.bytes().all(|c| c.is_ascii_alphanumeric() || b"+-.".contains(&c)) => {
                Err(bad("give a path, file:PATH, http://... or https://..."))
            }
            _ if text.is_empty() => Err(bad("it is empty")),
            _ => Ok(SourceUrl::File(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_shows() {
        for (text, shown) in [
            ("/x/y.tar", "file:/x/y.tar"),
            ("y.tar", "file:y.tar"),
            ("file:y.tar", "file:y.tar"),
            ("file:///x/y.tar", "file:/x/y.tar"),
            ("file://localhost/x", "file:/x"),
            ("http://h:81/a%20b?c#d", "http://h:81/a%20b?c#d"),
            ("https://user:pw@h/a", "https://user:pw@h/a"),
        ] {
            let url: SourceUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(url.to_string().parse::<SourceUrl>().unwrap(), url);
        }
        for bad in ["", "file:", "file://host/x", "ftp://h/x", "http://", "http://[::1/x", "s3://b/k"] {
            assert!(matches!(bad.parse::<SourceUrl>(), Err(Error::BadUrl { .. })), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        for (text, shown) in [
            ("https://user:pw@h:1/a@b?sig=1#x", "https://h:1/a@b?..."),
            ("http://h/a#x", "http://h/a"),
            ("http://user@h", "http://h"),
            ("/x/y?z", "file:/x/y?z"),
        ] {
            assert_eq!(text.parse::<SourceUrl>().unwrap().shown(), shown);
        }
    }

    #[test]
    fn suffix_goes_behind_the_path() {
        let suffixed = |text: &str| text.parse::<SourceUrl>().unwrap().with_suffix(".loam").to_string();
        assert_eq!(suffixed("http://h/x.tar?sig=1"), "http://h/x.tar.loam?sig=1");
        assert_eq!(suffixed("/x.tar"), "file:/x.tar.loam");
    }
}

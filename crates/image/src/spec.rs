//! `SOURCE` on the command line, as far as it has a file tree.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use loam_content::SourceUrl;

use crate::{Error, Result};

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSpec {
    /// A directory of this host: `dir:PATH`.
    Directory(PathBuf),
    /// A tar archive, plain or compressed: `tar:PATH-or-URL`.
    Tar(SourceUrl),
}

impl SourceSpec {
    /// The last part of the path or URL: what an index names its blob.
    pub fn blob_name(&self) -> String {
        let name = match self {
            SourceSpec::Directory(path) | SourceSpec::Tar(SourceUrl::File(path)) => {
                path.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
            SourceSpec::Tar(url) => {
                let text = url.to_string();
                let text = text.split(['?', '#']).next().unwrap_or_default();
                text.rsplit('/').next().unwrap_or_default().to_owned()
            }
        };
        if name.is_empty() { "archive".to_owned() } else { name }
    }
}

impl FromStr for SourceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let error = |reason: &str| Error::Spec { spec: text.to_owned(), reason: reason.to_owned() };
        let Some((kind, rest)) = text.split_once(':') else {
            return Err(error("names no kind of source"));
        };
        match kind {
            "dir" | "tar" if rest.is_empty() => Err(error("names no path")),
            "dir" => Ok(SourceSpec::Directory(Path::new(rest).to_owned())),
            "tar" => {
                let url = rest.parse().map_err(|cause| error(&format!("{cause}")))?;
                Ok(SourceSpec::Tar(url))
            }
            _ => Err(error("an image cannot be made of this kind of source")),
        }
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceSpec::Directory(path) => write!(f, "dir:{}", path.display()),
            SourceSpec::Tar(SourceUrl::File(path)) => write!(f, "tar:{}", path.display()),
            SourceSpec::Tar(url) => write!(f, "tar:{url}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        for text in ["dir:/srv/root", "tar:/srv/root.tar", "tar:http://host/a/root.tar.gz"] {
            assert_eq!(text.parse::<SourceSpec>().unwrap().to_string(), text);
        }
        let spec: SourceSpec = "tar:http://host/a/root.tar?key=1".parse().unwrap();
        assert_eq!(spec.blob_name(), "root.tar");
        assert_eq!("tar:/x/y.tar".parse::<SourceSpec>().unwrap().blob_name(), "y.tar");
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for text in ["", "root.tar", "oci:layout", "tar:", "dir:", "nbd://host/x"] {
            let message = text.parse::<SourceSpec>().unwrap_err().to_string();
            assert!(message.contains("dir:PATH"), "{message}");
        }
    }
}

//! Getting an image's index: from beside its source, or by reading the source through once; and keeping it in the pool
//! under its digest.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use loam_block::ByteSize;
use loam_content::{Cache, Digest, HttpClient, HttpOptions, Importer, SourceUrl};
use loam_image::{BuildOptions, ChunkSink, Index, SourceSpec};
use serde::Serialize;

use crate::device::{is_nbd_uri, parse_nbd_uri};
use crate::directory::{PoolDirectory, write_atomic};
use crate::error::{Context, Error, Result};

/// The suffix of an index beside its source.
pub(crate) const SUFFIX: &str = ".loam";

/// The longest index that is fetched, in bytes.
pub(crate) const MAX_INDEX_BYTES: u64 = loam_image::index::INDEX_BYTES_MAX;

/// An index and how it was come by.
pub(crate) struct Obtained {
    /// The index.
    pub(crate) index: Index,
    /// The content, where the source had to be read through and is not at hand for a second reading.
    pub(crate) import: Option<Importer>,
    /// Bytes received from the source.
    pub(crate) wire_bytes: u64,
}

/// Where long work tells how far it is, and learns whether anybody still waits for it.
pub trait Watch: Send + Sync {
    /// How far a step is; `total` is 0 where that is not known, `unit` is "bytes" or "files".
    fn progress(&self, step: &str, done: u64, total: u64, unit: &str);
    /// Something the user should know.
    fn note(&self, note: String);
    /// Whether to stop and undo.
    fn cancelled(&self) -> bool;
}

/// Gets the index of `source`: the one that was named, else the one beside it, else one made by reading the source once.
/// What is read then is kept in the cache.
pub(crate) async fn obtain(
    source: &SourceSpec,
    named: Option<&str>,
    cache: &Cache,
    http: &HttpClient,
    watch: Arc<dyn Watch>,
) -> Result<Obtained> {
    let (url, must_be_there) = match named {
        Some(named) => (parse_location(named)?, true),
        None => match beside(source) {
            Some(url) => (url, false),
            None => return read_through(source, cache, http, watch).await,
        },
    };
    match loam_content::fetch_whole(http, &url, MAX_INDEX_BYTES).await {
        Ok(fetched) => {
            let wire_bytes = fetched.wire.bytes;
            let index = Index::open(fetched.bytes).step(|| format!("index {url}"))?;
            Ok(Obtained { index, import: None, wire_bytes })
        }
        Err(loam_content::Error::NotFound { .. }) if !must_be_there => {
            let obtained = read_through(source, cache, http, watch.clone()).await?;
            watch.note(format!(
                "there is no index at {url}, so all of the source was read ({}); loam index makes one",
                ByteSize(obtained.wire_bytes)
            ));
            Ok(obtained)
        }
        Err(error) => Err(Error::step(format!("fetching index {url}"), error)),
    }
}

/// Where the index of a source lies unless told otherwise. A query string stays at the end.
fn beside(source: &SourceSpec) -> Option<SourceUrl> {
    match source {
        SourceSpec::Directory(path) | SourceSpec::Tar(SourceUrl::File(path)) => {
            let mut name = path.as_os_str().to_owned();
            name.push(SUFFIX);
            Some(SourceUrl::File(name.into()))
        }
        SourceSpec::Tar(url) => {
            let text = url.to_string();
            let (path, query) = text.split_at(text.find('?').unwrap_or(text.len()));
            SourceUrl::from_str(&format!("{path}{SUFFIX}{query}")).ok()
        }
    }
}

async fn read_through(
    source: &SourceSpec,
    cache: &Cache,
    http: &HttpClient,
    watch: Arc<dyn Watch>,
) -> Result<Obtained> {
    let chunk_bytes = loam_image::CHUNK_BYTES_DEFAULT;
    // A directory can be read again, piece by piece; an archive that was streamed is kept, so that it is not.
    let import = match source {
        SourceSpec::Directory(_) => None,
        SourceSpec::Tar(_) => Some(cache.import(chunk_bytes).step(|| "beginning an import".to_owned())?),
    };
    let import = import.map(|import| Arc::new(Mutex::new(Some(import))));
    let sink = import.clone().map(|import| Box::new(Sink(import)) as Box<dyn ChunkSink>);
    let built = build(source, sink, chunk_bytes, http, watch).await?;
    let wire_bytes = built.report.source_bytes;
    let index = Index::open(built.index).step(|| format!("index of {source}"))?;
    let import = import.and_then(|import| import.lock().unwrap_or_else(PoisonError::into_inner).take());
    Ok(Obtained { index, import, wire_bytes })
}

/// Puts chunks into the cache as they are read.
struct Sink(Arc<Mutex<Option<Importer>>>);

impl ChunkSink for Sink {
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> std::result::Result<(), loam_content::Error> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(import) => import.fill(number, bytes),
            None => Ok(()),
        }
    }
}

async fn build(
    source: &SourceSpec,
    sink: Option<Box<dyn ChunkSink>>,
    chunk_bytes: u32,
    http: &HttpClient,
    watch: Arc<dyn Watch>,
) -> Result<loam_image::Built> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (told, stop) = (watch.clone(), cancel.clone());
    let options = BuildOptions {
        progress: Some(Arc::new(move |progress: loam_image::Progress| {
            told.progress("reading", progress.bytes, 0, "bytes");
            stop.store(told.cancelled(), Ordering::Relaxed);
        })),
        cancel,
        chunk_bytes,
        http: Some(http.clone()),
        ..BuildOptions::default()
    };
    loam_image::build(source, &options, sink).await.step(|| format!("reading {source}"))
}

/// An index with a trace in place of its own. Paths that it does not have are told and left out: a trace outlives the
/// build that it was recorded on.
pub(crate) fn with_trace(index: &Index, text: &str, watch: &dyn Watch) -> Result<Index> {
    let traced = loam_image::trace::from_text(index, text).step(|| "the trace".to_owned())?;
    if let Some(first) = traced.unknown.first() {
        let count = traced.unknown.len();
        watch.note(format!("the trace names {count} files that the image does not have, such as {first}"));
    }
    let bytes = index.with_trace(&traced.runs).step(|| "the trace".to_owned())?;
    Index::open(bytes).step(|| "the trace".to_owned())
}

/// Where the pool keeps an index.
pub(crate) fn path_of(directory: &PoolDirectory, digest: &Digest) -> PathBuf {
    directory.indexes().join(format!("{digest}{SUFFIX}"))
}

/// Keeps an index in the pool, durably.
pub(crate) fn store(directory: &PoolDirectory, index: &Index) -> Result<()> {
    let path = path_of(directory, &index.digest());
    if path.exists() { Ok(()) } else { write_atomic(&path, index.as_bytes()) }
}

/// Reads an index that the pool keeps, and checks that it is the one.
pub(crate) fn load(directory: &PoolDirectory, digest: &Digest) -> Result<Index> {
    let path = path_of(directory, digest);
    let bytes = std::fs::read(&path).step(|| format!("reading {}", path.display()))?;
    let index = Index::open(bytes).step(|| format!("index {}", path.display()))?;
    if index.digest() != *digest {
        let why = format!("its digest is {}: the file has been altered", index.digest());
        return Err(Error::BadFile { path, why });
    }
    Ok(index)
}

/// The source of a range: a path, a URL or an NBD URI, made absolute so that the daemon finds it.
///
/// # Errors
/// What cannot be one.
pub fn absolute_bytes(source: &str) -> Result<String> {
    match is_nbd_uri(source) {
        true => Ok(parse_nbd_uri(source)?.to_string()),
        false => absolute_location(source),
    }
}

/// A path or URL, made absolute so that the daemon finds it.
///
/// # Errors
/// What cannot be a location.
pub fn absolute_location(location: &str) -> Result<String> {
    Ok(match parse_location(location)? {
        SourceUrl::File(path) => SourceUrl::File(absolute(&path)?).to_string(),
        url => url.to_string(),
    })
}

/// A source of an image, its path made absolute.
///
/// # Errors
/// What cannot be a source.
pub fn absolute_source(source: &str) -> Result<String> {
    Ok(match parse_source(source)? {
        SourceSpec::Directory(path) => SourceSpec::Directory(absolute(&path)?).to_string(),
        SourceSpec::Tar(SourceUrl::File(path)) => {
            SourceSpec::Tar(SourceUrl::File(absolute(&path)?)).to_string()
        }
        url => url.to_string(),
    })
}

/// Parses the source of an image.
pub(crate) fn parse_source(source: &str) -> Result<SourceSpec> {
    source.parse().map_err(|error: loam_image::Error| Error::invalid("source", error.to_string()))
}

/// Parses a path or URL.
pub(crate) fn parse_location(location: &str) -> Result<SourceUrl> {
    location.parse().map_err(|error| Error::invalid(format!("location {location:?}"), format!("{error}")))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).step(|| format!("path {}", path.display()))
}

/// How an index is to be made.
#[derive(Debug, Clone)]
pub struct IndexOptions {
    /// Where to write it; else where `add` and `mount` will look for it. The index of something on the network goes to the
    /// current directory under that name.
    pub output: Option<PathBuf>,
    /// A file that `loam trace` wrote.
    pub trace: Option<PathBuf>,
    /// What is fetched and verified at once: a power of two from 4 KiB to 4 MiB.
    pub chunk_bytes: u32,
}

/// What `loam index` made.
#[derive(Debug, Clone, Serialize)]
pub struct IndexMade {
    /// The file.
    pub index: PathBuf,
    /// Its digest.
    pub digest: String,
    /// Its bytes.
    pub index_bytes: u64,
    /// Bytes of the source as it is stored.
    pub source_bytes: u64,
    /// Entries of all kinds.
    pub files: u64,
    /// How long it took.
    pub elapsed_ns: u64,
}

/// Makes the index of a source and writes it, atomically.
///
/// # Errors
/// What is wrong with the source; what keeps the file from being written.
pub async fn make_index(source: &str, options: &IndexOptions, watch: Arc<dyn Watch>) -> Result<IndexMade> {
    let started = Instant::now();
    let spec = parse_source(source)?;
    let output = match (options.output.clone(), beside(&spec)) {
        (Some(path), _) | (None, Some(SourceUrl::File(path))) => path,
        (None, _) => PathBuf::from(format!("{}{SUFFIX}", spec.blob_name())),
    };
    let http = HttpClient::new(HttpOptions::default()).step(|| "setting up HTTP".to_owned())?;
    let built = build(&spec, None, options.chunk_bytes, &http, watch.clone()).await?;
    let mut index = Index::open(built.index).step(|| format!("index of {source}"))?;
    if let Some(path) = &options.trace {
        let text = std::fs::read_to_string(path).step(|| format!("reading {}", path.display()))?;
        index = with_trace(&index, &text, watch.as_ref())?;
    }
    let output = absolute(&output)?;
    write_atomic(&output, index.as_bytes())?;
    Ok(IndexMade {
        digest: index.digest().to_string(),
        index: output,
        index_bytes: index.as_bytes().len() as u64,
        source_bytes: built.report.source_bytes,
        files: built.report.entries,
        elapsed_ns: started.elapsed().as_nanos() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_lies_beside_its_source() {
        let beside = |source: &str| beside(&source.parse().unwrap()).unwrap().to_string();
        assert_eq!(beside("tar:http://host/a/root.tar"), "http://host/a/root.tar.loam");
        assert_eq!(beside("tar:http://host/root.tar?key=1"), "http://host/root.tar.loam?key=1");
        assert!(beside("tar:/srv/root.tar").ends_with("/srv/root.tar.loam"));
        assert!(beside("dir:/srv/root").ends_with("/srv/root.loam"));
    }

    #[test]
    fn sources_become_absolute() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute_source("dir:x").unwrap(), format!("dir:{}", here.join("x").display()));
        assert_eq!(absolute_source("tar:http://h/x.tar").unwrap(), "tar:http://h/x.tar");
        assert!(matches!(absolute_source("zip:x"), Err(Error::Invalid { .. })));
    }
}

//! Making an index: one pass over a source, forwards only, with nothing in memory but metadata and one chunk.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use loam_content::{ByteSource, HttpClient, HttpOptions, SourceUrl, WireTotals};
use tokio::sync::mpsc;

use crate::content::{ChunkSink, Content, Stored};
use crate::decode::{Compression, MAGIC_BYTES};
use crate::entry::INLINE_BYTES_MAX;
use crate::feed::{CHANNEL_BUFFERS, Feed, HashedFeed, READ_BYTES};
use crate::index::{Blob, BlobKind, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, IndexWriter};
use crate::spec::SourceSpec;
use crate::tar::{Input, Member, MemberKind, Segment, TarReader};
use crate::tree::{InodeKind, Tree, components};
use crate::{Error, Result, walk};

/// A cold start of python3 by its trace fetches 6.0 MB in chunks of 16 KiB, 6.8 in 32 and 7.9 in 64. Smaller ones would
/// make the digests, which are most of an index, twice as many.
pub const CHUNK_BYTES_DEFAULT: u32 = 16 << 10;
/// Files up to this are inline by default, bytes. Of a Debian root of 226 MB that is every seventh file but a thousandth
/// of the bytes, and an index of 274 KB; with 256 bytes it has 232 KB, with 1 KiB 481 KB, with 2 KiB 1.26 MB.
pub const INLINE_BYTES_DEFAULT: usize = 512;
/// Bytes behind the end-of-archive mark that are still decoded, so that a decoder's checksums at the end are seen.
const TRAILER_BYTES_MAX: u64 = 16 << 20;
/// Progress is told at most once for this many bytes or [`PROGRESS_ENTRIES`] entries.
const PROGRESS_BYTES: u64 = 8 << 20;
const PROGRESS_ENTRIES: u64 = 4096;

/// How far a build is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Entries seen.
    pub entries: u64,
    /// Bytes of the source read; decoded ones, where it is compressed.
    pub bytes: u64,
}

/// Told of progress, from the thread that works.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// How to build an index.
#[derive(Clone)]
pub struct BuildOptions {
    /// Bytes of a chunk: a power of two from 4 KiB to 4 MiB.
    pub chunk_bytes: u32,
    /// Files of at most this many bytes are kept in the index; at most [`INLINE_BYTES_MAX`].
    pub inline_bytes: usize,
    /// Connections for sources on the network; made when needed if there are none.
    pub http: Option<HttpClient>,
    /// Told now and then.
    pub progress: Option<ProgressFn>,
    /// Set from outside to end the build with [`Error::Cancelled`].
    pub cancel: Arc<AtomicBool>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        BuildOptions {
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            inline_bytes: INLINE_BYTES_DEFAULT,
            http: None,
            progress: None,
            cancel: Arc::default(),
        }
    }
}

/// A finished build.
#[derive(Debug, Clone)]
pub struct Built {
    /// The bytes of the index file.
    pub index: Bytes,
    /// What it took.
    pub report: BuildReport,
}

/// What a build took.
#[derive(Debug, Clone, Copy, Default)]
pub struct BuildReport {
    /// Entries in the tree, the root included.
    pub entries: u64,
    /// Bytes of the source as stored.
    pub source_bytes: u64,
    /// Bytes of the source when decoded; for a directory, of its files.
    pub read_bytes: u64,
    /// What crossed the network; nothing for a local source.
    pub wire: WireTotals,
    /// Length of the content's run of addresses, bytes.
    pub content_length: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Time from beginning to end.
    pub elapsed: Duration,
}

/// Reads the source once and makes its index; hands each materialised chunk to `sink` on the way.
///
/// # Errors
/// What the source does wrong ([`Error::Archive`], [`Error::Truncated`], [`Error::Changed`]), its failures
/// ([`Error::Os`], [`Error::Content`]), [`Error::Limit`], [`Error::Cancelled`].
pub async fn build(
    spec: &SourceSpec,
    options: &BuildOptions,
    sink: Option<Box<dyn ChunkSink>>,
) -> Result<Built> {
    let began = Instant::now();
    let valid = options.chunk_bytes.is_power_of_two()
        && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&options.chunk_bytes)
        && options.inline_bytes <= INLINE_BYTES_MAX;
    if !valid {
        let spec = spec.to_string();
        let reason = "chunks are powers of two from 4 KiB to 4 MiB, inline files at most 2 KiB".to_owned();
        return Err(Error::Spec { spec, reason });
    }
    let job = Job::new(options, sink);
    let name = Bytes::from(spec.blob_name().into_bytes());
    let (index, mut report) = match spec.clone() {
        SourceSpec::Directory(path) => blocking(move || job.directory(&path)).await?,
        SourceSpec::Tar(SourceUrl::File(path)) => blocking(move || job.tar_file(path, name)).await?,
        SourceSpec::Tar(url) => {
            let http = match &options.http {
                Some(http) => http.clone(),
                None => HttpClient::new(HttpOptions::default())?,
            };
            let source = loam_content::open(&http, &url, None).await?;
            tar_stream(job, source.as_ref(), name).await?
        }
    };
    report.index_bytes = index.len() as u64;
    report.elapsed = began.elapsed();
    Ok(Built { index: index.into(), report })
}

/// Reads an archive from the network: a task receives, a blocking thread decodes and hashes.
async fn tar_stream(job: Job, source: &dyn ByteSource, name: Bytes) -> Result<(Vec<u8>, BuildReport)> {
    let (sender, receiver) = mpsc::channel(CHANNEL_BUFFERS);
    let mut stream = source.stream(0, source.length());
    // Ends by itself when the job drops the receiver.
    let pump = async move {
        while let Some(item) = stream.next().await {
            let failed = item.is_err();
            if sender.send(item).await.is_err() || failed {
                break;
            }
        }
    };
    let work = blocking(move || job.tar(Feed::channel(receiver), name));
    let ((), built) = tokio::join!(pump, work);
    let (index, mut report) = built?;
    report.wire = source.wire();
    Ok((index, report))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(Error::Cancelled),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// What a build has gathered so far.
pub(crate) struct Job {
    pub(crate) tree: Tree,
    pub(crate) content: Content,
    pub(crate) blobs: Vec<Blob>,
    pub(crate) inline_bytes: usize,
    pub(crate) teller: Teller,
    chunk_bytes: u32,
}

/// Tells of progress, and hears the wish to stop.
pub(crate) struct Teller {
    progress: Option<ProgressFn>,
    cancel: Arc<AtomicBool>,
    entries: u64,
    told: Progress,
}

impl Teller {
    /// The source is read up to `bytes`.
    pub(crate) fn tell(&mut self, bytes: u64) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let due =
            bytes - self.told.bytes >= PROGRESS_BYTES || self.entries - self.told.entries >= PROGRESS_ENTRIES;
        if due && let Some(progress) = &self.progress {
            self.told = Progress { entries: self.entries, bytes };
            progress(self.told);
        }
        Ok(())
    }
}

impl Job {
    pub(crate) fn new(options: &BuildOptions, sink: Option<Box<dyn ChunkSink>>) -> Self {
        Job {
            tree: Tree::new(),
            content: Content::new(options.chunk_bytes, sink),
            blobs: Vec::new(),
            inline_bytes: options.inline_bytes,
            teller: Teller {
                progress: options.progress.clone(),
                cancel: options.cancel.clone(),
                entries: 0,
                told: Progress::default(),
            },
            chunk_bytes: options.chunk_bytes,
        }
    }

    /// Says that one more entry was seen, `bytes` into the source.
    pub(crate) fn step(&mut self, bytes: u64) -> Result<()> {
        self.teller.entries += 1;
        self.teller.tell(bytes)
    }

    fn directory(mut self, path: &Path) -> Result<(Vec<u8>, BuildReport)> {
        let read_bytes = walk::walk(path, &mut self)?;
        let report = BuildReport { source_bytes: read_bytes, read_bytes, ..BuildReport::default() };
        self.finish(report)
    }

    fn tar_file(self, path: PathBuf, name: Bytes) -> Result<(Vec<u8>, BuildReport)> {
        let file = File::open(&path).map_err(|error| Error::os("open", &path, error))?;
        let stat = |file: &File| file.metadata().map_err(|error| Error::os("stat", &path, error));
        let before = stat(&file)?;
        if !before.is_file() {
            let reason = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            return Err(Error::os("read as an archive (not a regular file)", &path, reason));
        }
        let second =
            file.try_clone().map_err(|error| Error::os("duplicate the descriptor of", &path, error))?;
        let built = self.tar(Feed::file(file), name)?;
        let after = stat(&second)?;
        let same = (before.len(), before.mtime(), before.mtime_nsec())
            == (after.len(), after.mtime(), after.mtime_nsec());
        if !same {
            return Err(Error::Changed { path });
        }
        Ok(built)
    }

    /// Reads an archive to its end.
    pub(crate) fn tar(mut self, feed: Feed, name: Bytes) -> Result<(Vec<u8>, BuildReport)> {
        let mut stored = HashedFeed::new(feed);
        let mut magic = [0; MAGIC_BYTES];
        let seen = stored.fill_buf().map_err(source_error)?;
        let count = seen.len().min(MAGIC_BYTES);
        magic[..count].copy_from_slice(&seen[..count]);
        let compression = Compression::detect(&magic[..count]);
        let kind = compression.map_or(BlobKind::Raw, BlobKind::Stream);
        let read_bytes = match compression {
            None => self.members(Input::new(&mut stored))?,
            Some(compression) => {
                let decoder = compression.decoder(&mut stored).map_err(source_error)?;
                self.members(Input::new(BufReader::with_capacity(READ_BYTES, decoder)))?
            }
        };
        let (length, digest) = stored.finish().map_err(source_error)?;
        self.blobs.push(Blob { kind, name, length, digest: Some(digest) });
        let report = BuildReport { source_bytes: length, read_bytes, ..BuildReport::default() };
        self.finish(report)
    }

    fn members(&mut self, input: Input<'_>) -> Result<u64> {
        let mut reader = TarReader::new(input);
        while let Some(member) = reader.next()? {
            self.step(reader.position())?;
            self.member(&mut reader, member)?;
        }
        reader.drain(TRAILER_BYTES_MAX)?;
        Ok(reader.position())
    }

    fn member(&mut self, reader: &mut TarReader<'_>, member: Member) -> Result<()> {
        let path = components(&member.path).map_err(|reason| reader.error(reason))?;
        let kind = match member.kind {
            MemberKind::Directory => InodeKind::Directory,
            MemberKind::File { size, segments } => self.file(reader, size, segments)?,
            MemberKind::Symlink(target) => {
                crate::tree::check_target(&target).map_err(|reason| reader.error(reason))?;
                InodeKind::Symlink(target.into())
            }
            MemberKind::HardLink(target) => return self.hard_link(reader, &path, &target),
            MemberKind::CharacterDevice(major, minor) => InodeKind::CharacterDevice(major, minor),
            MemberKind::BlockDevice(major, minor) => InodeKind::BlockDevice(major, minor),
            MemberKind::Fifo => InodeKind::Fifo,
        };
        let inode = self.tree.inode(kind, member.metadata)?;
        self.tree.place(&path, inode)?.map_err(|reason| reader.error(reason))
    }

    fn hard_link(&mut self, reader: &TarReader<'_>, path: &[&[u8]], target: &[u8]) -> Result<()> {
        let target_path =
            components(target).map_err(|reason| reader.error(format!("link target: {reason}")))?;
        let shown = String::from_utf8_lossy(target);
        let Some(node) = self.tree.find(&target_path) else {
            return Err(
                reader.error(format!("hard link to {shown:?}, which is not in the archive before it"))
            );
        };
        if matches!(self.tree.kind(node), InodeKind::Directory) {
            return Err(reader.error(format!("hard link to the directory {shown:?}")));
        }
        let inode = self.tree.inode_of(node);
        self.tree.place(path, inode)?.map_err(|reason| reader.error(reason))
    }

    fn file(
        &mut self,
        reader: &mut TarReader<'_>,
        size: u64,
        segments: Option<Vec<Segment>>,
    ) -> Result<InodeKind> {
        let segments = match segments {
            Some(segments) => segments,
            None if size == 0 => Vec::new(),
            None => vec![Segment { offset: 0, length: size }],
        };
        if size > 0 && size <= self.inline_bytes as u64 {
            let mut data = vec![0; size as usize];
            for segment in &segments {
                let mut at = segment.offset as usize;
                reader.data(segment.length, |bytes| {
                    data[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                    Ok(())
                })?;
            }
            return Ok(InodeKind::Inline(data.into()));
        }
        let mut position = reader.position();
        let teller = &mut self.teller;
        let placed = self.content.add_file(&segments, 0, Stored::Packed(position), |content, segment| {
            reader.data(segment.length, |bytes| {
                position += bytes.len() as u64;
                teller.tell(position)?;
                content.write(bytes)
            })
        })?;
        Ok(InodeKind::File { size, first: placed.first, count: placed.count })
    }

    fn finish(self, mut report: BuildReport) -> Result<(Vec<u8>, BuildReport)> {
        let (content_length, pieces, digests) = self.content.finish()?;
        let mut writer = IndexWriter::new();
        self.tree.write(&pieces, &mut writer)?;
        report.entries = writer.entries();
        report.content_length = content_length;
        debug_assert_eq!(report.entries, self.tree.len());
        let pieces = pieces.iter().map(|part| part.piece);
        let index = writer.finish(self.chunk_bytes, content_length, &self.blobs, pieces, &digests)?;
        Ok((index, report))
    }
}

fn source_error(error: std::io::Error) -> Error {
    crate::tar::from_io(0, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds from a tar of `files` empty files with room for `entries_max` entries, the root included.
    fn build_limited(files: u64, entries_max: u64) -> Result<(Vec<u8>, BuildReport)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("many.tar");
        let mut archive = tar::Builder::new(File::create(&path).unwrap());
        for number in 0..files {
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(0);
            archive.append_data(&mut header, format!("file{number}"), std::io::empty()).unwrap();
        }
        archive.finish().unwrap();
        let mut job = Job::new(&BuildOptions::default(), None);
        job.tree = Tree::with_limit(entries_max);
        job.tar_file(path, Bytes::from_static(b"many.tar"))
    }

    #[test]
    fn a_tar_of_too_many_entries_is_refused_with_the_limit() {
        assert_eq!(build_limited(9, 10).unwrap().1.entries, 10, "the root and nine files fit");
        let error = build_limited(10, 10).unwrap_err();
        assert!(matches!(error, Error::Limit { limit: 10, .. }), "{error}");
        const { assert!(crate::entry::ENTRIES_MAX < 10_000_000, "ten million entries are too many") };
    }
}

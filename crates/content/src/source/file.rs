//! [`FileSource`]: a local file, pinned by length, modification time and inode.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream;

use super::{ByteSource, ByteStream, Pin, WireCounters, WireTotals, out_of_bounds};
use crate::{Error, Result, SourceUrl};

/// Bytes of one piece of a stream.
const PIECE_BYTES: u64 = 1 << 20;

/// A file (or block device) that must stay as it is: before and after every read its length, modification time and inode
/// are compared with what they were.
pub struct FileSource(Arc<Shared>);

struct Shared {
    url: SourceUrl,
    path: PathBuf,
    file: File,
    pin: Pin,
    wire: WireCounters,
}

impl FileSource {
    /// Opens `path`. Blocks.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Io`]; [`Error::Changed`] if it is not the version that is `expected`.
    pub fn open(path: &Path, expected: Option<&Pin>) -> Result<FileSource> {
        let url = SourceUrl::File(path.to_owned());
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => Error::NotFound { url: url.shown() },
            _ => Error::io(format!("opening {}", path.display()), source),
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            let why = "it is a directory".to_owned();
            return Err(Error::BadUrl { url: url.shown(), why });
        }
        let pin = pin_of(&file).map_err(failed)?;
        if let Some(expected) = expected {
            compare(&url, expected, &pin)?;
        }
        let path = path.to_owned();
        Ok(FileSource(Arc::new(Shared { url, path, file, pin, wire: WireCounters::default() })))
    }
}

fn pin_of(file: &File) -> io::Result<Pin> {
    let metadata = file.metadata()?;
    // The length of a block device is not in its metadata.
    let length = match metadata.is_file() {
        true => metadata.len(),
        false => rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?,
    };
    Ok(Pin {
        length,
        modified_ns: Some(
            metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
        ),
        inode: Some(metadata.ino()),
        ..Pin::default()
    })
}

fn compare(url: &SourceUrl, expected: &Pin, found: &Pin) -> Result<()> {
    let differs = |a: Option<i64>, b: Option<i64>| a.is_some() && b.is_some() && a != b;
    let what = if expected.length != found.length {
        format!("it was {} bytes long, it is now {}", expected.length, found.length)
    } else if differs(expected.modified_ns, found.modified_ns) {
        "it was written to since".to_owned()
    } else if expected.inode.is_some() && expected.inode != found.inode {
        "another file has taken its place".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Changed { url: url.shown(), what })
}

impl Shared {
    /// Blocks.
    fn read(&self, offset: u64, length: u64) -> Result<Bytes> {
        let failed = |source| {
            Error::io(format!("reading {length} bytes at {offset} of {}", self.path.display()), source)
        };
        let mut bytes = BytesMut::zeroed(length as usize);
        let read = self.file.read_exact_at(&mut bytes, offset);
        // Compared after the read: what was read before a change is what was pinned.
        compare(&self.url, &self.pin, &pin_of(&self.file).map_err(failed)?)?;
        read.map_err(failed)?;
        self.wire.request();
        self.wire.received(length);
        Ok(bytes.freeze())
    }
}

impl FileSource {
    async fn read(shared: Arc<Shared>, offset: u64, length: u64) -> Result<Bytes> {
        out_of_bounds(&shared.url, offset, length, shared.pin.length)?;
        tokio::task::spawn_blocking(move || shared.read(offset, length))
            .await
            .unwrap_or_else(|_| Err(Error::ShuttingDown { what: "read of a file".to_owned() }))
    }
}

impl ByteSource for FileSource {
    fn url(&self) -> &SourceUrl {
        &self.0.url
    }

    fn length(&self) -> u64 {
        self.0.pin.length
    }

    fn read_at(&self, offset: u64, length: u64) -> BoxFuture<'_, Result<Bytes>> {
        Box::pin(FileSource::read(self.0.clone(), offset, length))
    }

    fn stream(&self, offset: u64, length: u64) -> ByteStream {
        let shared = self.0.clone();
        if let Err(error) = out_of_bounds(&shared.url, offset, length, shared.pin.length) {
            return Box::pin(stream::iter([Err(error)]));
        }
        let end = offset + length;
        Box::pin(stream::try_unfold(offset, move |at| {
            let shared = shared.clone();
            async move {
                if at == end {
                    return Ok(None);
                }
                let piece = PIECE_BYTES.min(end - at);
                let bytes = FileSource::read(shared, at, piece).await?;
                Ok(Some((bytes, at + piece)))
            }
        }))
    }

    fn pin(&self) -> Pin {
        self.0.pin.clone()
    }

    fn wire(&self) -> WireTotals {
        self.0.wire.totals()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    async fn collect(mut stream: ByteStream) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece?);
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn reads_streams_and_refuses_what_is_outside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let source = FileSource::open(&path, None).unwrap();
        assert_eq!(source.length(), bytes.len() as u64);
        assert_eq!(source.read_at(5, 70_000).await.unwrap(), bytes[5..70_005]);
        assert_eq!(collect(source.stream(17, 2_900_000)).await.unwrap(), bytes[17..2_900_017]);
        for (offset, length) in [(3_000_000, 1), (0, 3_000_001), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(matches!(source.read_at(offset, length).await, Err(Error::OutOfBounds { .. })));
            assert!(matches!(collect(source.stream(offset, length)).await, Err(Error::OutOfBounds { .. })));
        }
        assert!(matches!(FileSource::open(&dir.path().join("y"), None), Err(Error::NotFound { .. })));
        assert!(FileSource::open(dir.path(), None).is_err());
    }

    #[tokio::test]
    async fn a_changed_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, [1; 8192]).unwrap();
        let source = FileSource::open(&path, None).unwrap();
        let pin = source.pin();
        assert!(FileSource::open(&path, Some(&pin)).is_ok());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[2], 0).unwrap();
        assert!(matches!(source.read_at(0, 4096).await, Err(Error::Changed { .. })));
        assert!(matches!(FileSource::open(&path, Some(&pin)), Err(Error::Changed { .. })));
        let source = FileSource::open(&path, None).unwrap();
        std::fs::write(&path, [2; 100]).unwrap();
        assert!(matches!(source.read_at(0, 4096).await, Err(Error::Changed { .. })));
        assert!(matches!(FileSource::open(&path, Some(&Pin::of_length(101))), Err(Error::Changed { .. })));
        assert!(FileSource::open(&path, Some(&Pin::of_length(100))).is_ok());
    }
}

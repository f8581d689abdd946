//! [`DigestLog`]: the digests of chunks whose bytes nobody vouched for in advance, recorded durably at the first fetch,
//! before the first byte is served. What comes later and differs is refused: an address reads the same bytes for ever.
//!
//! ```text
//! file:   64-byte header, then frames
//! header: 0 8 "LOAMDGST" · 8 4 version, 1 · 12 4 bytes of a chunk · 16 8 bytes of the content · 24 36 zeros
//!         60 4 CRC32C of bytes 0..60
//! frame:  0 4 "DFRM" · 4 4 records, 1..=4096 · 8 8 frame's number from 0 · 16 4 CRC32C of bytes 0..16 and the records
//!         20 4 zeros · then records of 40 bytes: 0 8 chunk · 8 32 BLAKE3
//! ```
//! Little-endian. One frame is one commit: it is written and synced before the next one is written, so only the last one
//! can be torn; it was not relied upon, and goes. A bad frame before a good one is damage, and the content is refused
//! rather than trusted anew.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use loam_block::ErrorKind;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::Shape;
use super::sync::{lock, read, write};
use crate::{Digest, Error, Result};

const HEADER_BYTES: usize = 64;
const FRAME_BYTES: usize = 24;
const RECORD_BYTES: usize = 40;
/// Records of one frame, at most.
const FRAME_RECORDS: usize = 4096;
const FRAME_MAGIC: [u8; 4] = *b"DFRM";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    chunk_bytes: U32,
    length: U64,
    reserved: [u8; 36],
    checksum: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawFrame {
    magic: [u8; 4],
    records: U32,
    number: U64,
    checksum: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRecord {
    chunk: U64,
    digest: [u8; 32],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(size_of::<RawFrame>() == FRAME_BYTES);
const _: () = assert!(size_of::<RawRecord>() == RECORD_BYTES);

fn header(shape: Shape) -> RawHeader {
    let mut raw = RawHeader {
        magic: *b"LOAMDGST",
        version: 1.into(),
        chunk_bytes: (shape.chunk_bytes() as u32).into(),
        length: shape.length.into(),
        reserved: [0; 36],
        checksum: 0.into(),
    };
    raw.checksum = crc32c::crc32c(&raw.as_bytes()[..HEADER_BYTES - 4]).into();
    raw
}

fn frame(number: u64, records: &[RawRecord]) -> Vec<u8> {
    let mut head = RawFrame {
        magic: FRAME_MAGIC,
        records: (records.len() as u32).into(),
        number: number.into(),
        checksum: 0.into(),
        reserved: 0.into(),
    };
    let sum = crc32c::crc32c(&head.as_bytes()[..16]);
    head.checksum = crc32c::crc32c_append(sum, records.as_bytes()).into();
    [head.as_bytes(), records.as_bytes()].concat()
}

/// The number and the records of the frame that `bytes` begin with, if it is whole.
fn parse_frame(bytes: &[u8]) -> Option<(u64, &[RawRecord])> {
    let (head, rest) = RawFrame::ref_from_prefix(bytes).ok()?;
    let count = head.records.get() as usize;
    if head.magic != FRAME_MAGIC || !(1..=FRAME_RECORDS).contains(&count) {
        return None;
    }
    let (records, _) = <[RawRecord]>::ref_from_prefix_with_elems(rest, count).ok()?;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&head.as_bytes()[..16]), records.as_bytes());
    (sum == head.checksum.get()).then_some((head.number.get(), records))
}

/// What a log's frames say, and where the next one goes.
struct Recovered {
    known: HashMap<u64, Digest>,
    frames: u64,
    end: usize,
}

/// Reads frames up to the first that is not whole. `None` if that is damage rather than a torn tail.
fn recover(bytes: &[u8], chunks: u64) -> Option<Recovered> {
    let mut recovered = Recovered { known: HashMap::new(), frames: 0, end: HEADER_BYTES };
    while let Some((number, records)) = parse_frame(&bytes[recovered.end..]) {
        if number != recovered.frames || records.iter().any(|record| record.chunk.get() >= chunks) {
            return None;
        }
        for record in records {
            recovered.known.entry(record.chunk.get()).or_insert(Digest(record.digest));
        }
        recovered.frames += 1;
        recovered.end += FRAME_BYTES + RECORD_BYTES * records.len();
    }
    // Everything is a multiple of 8 long, so a later frame can only begin at one.
    let later = (recovered.end + 8..bytes.len())
        .step_by(8)
        .any(|at| parse_frame(&bytes[at..]).is_some_and(|(number, _)| number > recovered.frames));
    (!later).then_some(recovered)
}

#[derive(Debug)]
struct Log {
    file: Option<Arc<File>>,
    end: u64,
    frames: u64,
    /// Tickets below this one are on disk.
    durable: u64,
    /// A failed commit: tickets up to this one were not recorded. After a failed sync what is on disk is unknown, so
    /// nothing is promised any more, to no ticket; a disk that was full may have room again.
    failed: Option<(u64, Error)>,
}

#[derive(Debug, Default)]
struct Queue {
    records: Vec<(u64, Digest)>,
    /// The ticket of who comes next.
    next: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct DigestLog {
    path: PathBuf,
    shape: Shape,
    known: RwLock<HashMap<u64, Digest>>,
    queue: Mutex<Queue>,
    log: tokio::sync::Mutex<Log>,
}

impl DigestLog {
    /// Opens the log of the content in `directory`; without one, there are no digests yet.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Mismatch`]: nothing of the content can be trusted then.
    pub(crate) fn open(directory: &Path, key: &str, shape: Shape) -> Result<DigestLog> {
        let path = directory.join("digests");
        let failed = |source| Error::io(format!("opening {}", path.display()), source);
        let mut log = Log { file: None, end: HEADER_BYTES as u64, frames: 0, durable: 0, failed: None };
        let mut known = HashMap::new();
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(file) => {
                let mut bytes = vec![0; file.metadata().map_err(failed)?.len() as usize];
                file.read_exact_at(&mut bytes, 0).map_err(failed)?;
                // A header is synced before the first frame is written: a file that ends with or before it is one whose
                // making was cut short, and is made anew.
                if bytes.len() > HEADER_BYTES {
                    let recovered = Self::check(&path, key, shape, &bytes)?;
                    log.end = recovered.end as u64;
                    log.frames = recovered.frames;
                    log.file = Some(Arc::new(file));
                    known = recovered.known;
                }
            }
        }
        Ok(DigestLog {
            path,
            shape,
            known: RwLock::new(known),
            queue: Mutex::default(),
            log: tokio::sync::Mutex::new(log),
        })
    }

    fn check(path: &Path, key: &str, shape: Shape, bytes: &[u8]) -> Result<Recovered> {
        let damaged = |why: &str| Error::Damaged {
            path: path.display().to_string(),
            why: format!(
                "{why}; restore it from a backup, or remove the content and add it under a new name"
            ),
        };
        let ours = header(shape);
        let (raw, _) = RawHeader::ref_from_prefix(bytes).map_err(|_| damaged("it is too short"))?;
        if crc32c::crc32c(&raw.as_bytes()[..HEADER_BYTES - 4]) != raw.checksum.get()
            || raw.magic != ours.magic
        {
            return Err(damaged("its header does not check out"));
        }
        if raw.as_bytes() != ours.as_bytes() {
            let what = format!(
                "its digests are of version {}, {} bytes in chunks of {}; now they would be of version 1, {} in chunks of {}",
                raw.version,
                raw.length,
                raw.chunk_bytes,
                shape.length,
                shape.chunk_bytes()
            );
            return Err(Error::Mismatch { content: key.to_owned(), what });
        }
        recover(bytes, shape.chunks()).ok_or_else(|| damaged("a frame before the last does not check out"))
    }

    /// The digest that was recorded for a chunk.
    pub(crate) fn get(&self, chunk: u64) -> Option<Digest> {
        read(&self.known).get(&chunk).copied()
    }

    /// Digests recorded so far.
    pub(crate) fn len(&self) -> u64 {
        read(&self.known).len() as u64
    }

    /// Records digests of chunks that have none; they are on disk when this returns. Commits of many callers are one:
    /// while one frame is synced, the records of the next one gather. Not to be cancelled while it runs.
    ///
    /// # Errors
    /// [`Error::Io`]: nothing may be served on the strength of these digests.
    pub(crate) async fn record(&self, records: &[(u64, Digest)]) -> Result<()> {
        let ticket = {
            let mut queue = lock(&self.queue);
            queue.records.extend_from_slice(records);
            queue.next += 1;
            queue.next
        };
        let mut log = self.log.lock().await;
        if let Some((upto, error)) = &log.failed
            && ticket <= *upto
        {
            return Err(error.clone());
        }
        if log.durable >= ticket {
            return Ok(());
        }
        let (batch, upto) = {
            let mut queue = lock(&self.queue);
            (std::mem::take(&mut queue.records), queue.next)
        };
        match self.append(&mut log, &batch).await {
            Ok(()) => {
                write(&self.known).extend(batch);
                log.durable = upto;
                Ok(())
            }
            Err(error) => {
                let upto = if error.kind() == ErrorKind::NoSpace { upto } else { u64::MAX };
                log.failed = Some((upto, error.clone()));
                Err(error)
            }
        }
    }

    async fn append(&self, log: &mut Log, batch: &[(u64, Digest)]) -> Result<()> {
        let failed = |source| Error::io(format!("recording digests in {}", self.path.display()), source);
        for records in batch.chunks(FRAME_RECORDS) {
            let records: Vec<RawRecord> = records
                .iter()
                .map(|(chunk, digest)| RawRecord { chunk: (*chunk).into(), digest: digest.0 })
                .collect();
            let bytes = frame(log.frames, &records);
            let (file, path, shape, end) = (log.file.clone(), self.path.clone(), self.shape, log.end);
            let length = bytes.len() as u64;
            let written = tokio::task::spawn_blocking(move || {
                let file = match file {
                    Some(file) => file,
                    None => Arc::new(create(&path, shape)?),
                };
                // What a torn frame left behind this one's end must not be taken for damage later.
                file.set_len(end)?;
                file.write_all_at(&bytes, end)?;
                file.sync_data()?;
                io::Result::Ok(file)
            });
            match written.await {
                Ok(Ok(file)) => log.file = Some(file),
                Ok(Err(error)) => return Err(failed(error)),
                Err(_) => return Err(Error::ShuttingDown { what: "recording of digests".to_owned() }),
            }
            log.end += length;
            log.frames += 1;
        }
        Ok(())
    }
}

/// Makes an empty log that is there after a power cut too.
fn create(path: &Path, shape: Shape) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    file.write_all_at(header(shape).as_bytes(), 0)?;
    file.sync_all()?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()?;
    File::open(directory.join(".."))?.sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape::new(1 << 20, 4096).unwrap()
    }

    fn digest(n: u64) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    async fn three_frames(directory: &Path) -> Vec<u8> {
        let log = DigestLog::open(directory, "k", shape()).unwrap();
        log.record(&[(1, digest(1)), (2, digest(2))]).await.unwrap();
        log.record(&[(7, digest(7))]).await.unwrap();
        log.record(&[(9, digest(9))]).await.unwrap();
        std::fs::read(directory.join("digests")).unwrap()
    }

    /// Ends of the frames that [`three_frames`] writes, with the digests known from there on.
    const ENDS: [(usize, u64); 4] = [(64, 0), (64 + 104, 2), (64 + 168, 3), (64 + 232, 4)];

    #[tokio::test]
    async fn cut_at_every_byte_it_keeps_all_whole_frames_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let whole = three_frames(dir.path()).await;
        assert_eq!(whole.len(), ENDS[3].0);
        for cut in 0..=whole.len() {
            std::fs::write(dir.path().join("digests"), &whole[..cut]).unwrap();
            let log = DigestLog::open(dir.path(), "k", shape()).unwrap();
            let known = ENDS.iter().rev().find(|(end, _)| *end <= cut).map_or(0, |(_, known)| *known);
            assert_eq!(log.len(), known, "cut at {cut}");
            log.record(&[(100, digest(100))]).await.unwrap();
            drop(log);
            let log = DigestLog::open(dir.path(), "k", shape()).unwrap();
            assert_eq!((log.len(), log.get(100)), (known + 1, Some(digest(100))), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn a_damaged_byte_is_refused_or_was_in_the_last_frame() {
        let dir = tempfile::tempdir().unwrap();
        let whole = three_frames(dir.path()).await;
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(dir.path().join("digests"), &bad).unwrap();
            let opened = DigestLog::open(dir.path(), "k", shape());
            // The reserved bytes of a frame are not covered by its checksum.
            let reserved = ENDS.iter().any(|(end, _)| (end + 20..end + 24).contains(&at));
            match opened {
                Err(Error::Damaged { .. }) => assert!(at < ENDS[2].0, "byte {at}"),
                Ok(log) if at >= ENDS[2].0 => {
                    assert!(log.len() == 3 || reserved && log.len() == 4, "byte {at}")
                }
                Ok(log) => assert!(reserved && log.len() == 4, "byte {at}"),
                Err(error) => panic!("byte {at}: {error}"),
            }
        }
    }

    #[tokio::test]
    async fn another_shape_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        three_frames(dir.path()).await;
        let other = Shape::new(1 << 20, 8192).unwrap();
        assert!(matches!(DigestLog::open(dir.path(), "k", other), Err(Error::Mismatch { .. })));
    }

    #[tokio::test]
    async fn commits_of_many_callers_are_few_frames() {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(DigestLog::open(dir.path(), "k", shape()).unwrap());
        let tasks: Vec<_> = (0..200u64)
            .map(|n| {
                let log = log.clone();
                tokio::spawn(async move { log.record(&[(n, digest(n))]).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert!(log.log.lock().await.frames <= 100, "{} frames", log.log.lock().await.frames);
        drop(log);
        let log = DigestLog::open(dir.path(), "k", shape()).unwrap();
        assert_eq!((log.len(), log.get(199)), (200, Some(digest(199))));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            lengths in proptest::collection::vec(1usize..5, 0..5),
            edits in proptest::collection::vec((0usize..2000, 0u8..255), 0..8),
            rest in proptest::collection::vec(0u8..255, 0..100),
        ) {
            let mut bytes = header(shape()).as_bytes().to_vec();
            for (number, length) in lengths.iter().enumerate() {
                let record = RawRecord { chunk: (number as u64).into(), digest: [7; 32] };
                bytes.extend(frame(number as u64, &vec![record; *length]));
            }
            bytes.extend(rest);
            for (at, with) in edits {
                let at = at % bytes.len();
                bytes[at] = with;
            }
            if let Some(recovered) = recover(&bytes, shape().chunks()) {
                assert!(recovered.end <= bytes.len());
                assert!(recovered.known.iter().all(|(chunk, digest)| *chunk < 5 && digest.0 == [7; 32]));
            }
        }
    }
}

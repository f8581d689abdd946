//! The stored bytes of an archive, from a file or from the network, hashed as they pass.

use std::fs::File;
use std::io::{self, BufRead, Read};

use bytes::Bytes;
use loam_content::Digest;
use tokio::sync::mpsc;

/// Bytes read from a file at once.
pub(crate) const READ_BYTES: usize = 1 << 20;
/// Network buffers on the way from the runtime to the thread that decodes.
pub(crate) const CHANNEL_BUFFERS: usize = 32;

/// Where stored bytes come from.
pub(crate) enum Feed {
    /// A local file.
    File { file: File, buffer: Vec<u8>, filled: usize },
    /// Buffers sent by a task.
    Channel { receiver: mpsc::Receiver<Result<Bytes, loam_content::Error>>, current: Bytes },
}

impl Feed {
    pub(crate) fn file(file: File) -> Self {
        Feed::File { file, buffer: vec![0; READ_BYTES], filled: 0 }
    }

    pub(crate) fn channel(receiver: mpsc::Receiver<Result<Bytes, loam_content::Error>>) -> Self {
        Feed::Channel { receiver, current: Bytes::new() }
    }

    fn current(&self) -> &[u8] {
        match self {
            Feed::File { buffer, filled, .. } => &buffer[..*filled],
            Feed::Channel { current, .. } => current,
        }
    }

    /// Replaces the current bytes by the next ones; none at the end.
    fn advance(&mut self) -> io::Result<()> {
        match self {
            Feed::File { file, buffer, filled } => {
                *filled = 0;
                while *filled < buffer.len() {
                    match file.read(&mut buffer[*filled..]) {
                        Ok(0) => break,
                        Ok(count) => *filled += count,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            Feed::Channel { receiver, current } => loop {
                *current = match receiver.blocking_recv() {
                    None => Bytes::new(),
                    Some(Ok(bytes)) if bytes.is_empty() => continue,
                    Some(Ok(bytes)) => bytes,
                    Some(Err(error)) => return Err(io::Error::other(error)),
                };
                break;
            },
        }
        Ok(())
    }
}

/// Reads a [`Feed`], counting and hashing every byte once.
pub(crate) struct HashedFeed {
    feed: Feed,
    at: usize,
    /// Whether the feed's current bytes are already hashed.
    taken_in: bool,
    ended: bool,
    hasher: Option<blake3::Hasher>,
    length: u64,
}

impl HashedFeed {
    pub(crate) fn new(feed: Feed) -> Self {
        let hasher = Some(blake3::Hasher::new());
        HashedFeed { feed, at: 0, taken_in: false, ended: false, hasher, length: 0 }
    }

    /// The same without hashing.
    pub(crate) fn unhashed(feed: Feed) -> Self {
        HashedFeed { hasher: None, ..HashedFeed::new(feed) }
    }

    /// Reads to the end and gives the number and the digest of all stored bytes.
    pub(crate) fn finish(&mut self) -> io::Result<(u64, Digest)> {
        loop {
            let left = self.fill_buf()?.len();
            if left == 0 {
                break;
            }
            self.consume(left);
        }
        let digest = self.hasher.as_ref().map_or([0; 32], |hasher| *hasher.finalize().as_bytes());
        Ok((self.length, Digest(digest)))
    }
}

impl BufRead for HashedFeed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if !self.ended && self.taken_in && self.at == self.feed.current().len() {
            self.feed.advance()?;
            self.at = 0;
            self.taken_in = false;
        }
        if !self.taken_in {
            if self.feed.current().is_empty() {
                self.feed.advance()?;
            }
            let bytes = self.feed.current();
            self.ended = bytes.is_empty();
            self.length += bytes.len() as u64;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(bytes);
            }
            self.taken_in = true;
        }
        Ok(&self.feed.current()[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for HashedFeed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}

//! The decoded bytes of an archive, counted.

use std::io::{self, BufRead};

use crate::{Error, Result};

/// Reads forwards and knows where it is.
pub(crate) struct Input<'a> {
    inner: Box<dyn BufRead + 'a>,
    position: u64,
}

impl<'a> Input<'a> {
    pub(crate) fn new(inner: impl BufRead + 'a) -> Self {
        Input { inner: Box::new(inner), position: 0 }
    }

    /// Decoded bytes taken so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes, at most `limit`; empty at the end.
    fn available(&mut self, limit: u64) -> Result<&[u8]> {
        let position = self.position;
        let bytes = loop {
            match self.inner.fill_buf() {
                Ok(_) => break self.inner.fill_buf(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        let bytes = bytes.map_err(|error| from_io(position, error))?;
        Ok(&bytes[..bytes.len().min(usize::try_from(limit).unwrap_or(usize::MAX))])
    }

    fn consume(&mut self, count: usize) {
        self.inner.consume(count);
        self.position += count as u64;
    }

    /// Fills as much of `buffer` as there is and says how much that was.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let bytes = self.available((buffer.len() - filled) as u64)?;
            let count = bytes.len();
            if count == 0 {
                break;
            }
            buffer[filled..filled + count].copy_from_slice(bytes);
            self.consume(count);
            filled += count;
        }
        Ok(filled)
    }

    /// Hands exactly `length` bytes to `take`, in pieces as they come.
    pub(crate) fn copy(
        &mut self,
        length: u64,
        what: &str,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let bytes = self.available(left)?;
            let count = bytes.len();
            if count == 0 {
                let missing = format!("{left} bytes before the end of {what}");
                return Err(Error::Truncated { position: self.position, missing });
            }
            take(bytes)?;
            self.consume(count);
            left -= count as u64;
        }
        Ok(())
    }

    /// Takes at most `limit` bytes and drops them; ends early at the end.
    pub(crate) fn drain(&mut self, limit: u64) -> Result<()> {
        let mut left = limit;
        while left > 0 {
            let count = self.available(left)?.len();
            if count == 0 {
                break;
            }
            self.consume(count);
            left -= count as u64;
        }
        Ok(())
    }
}

/// An error of the reader below: one of loam's own that was carried through, a decoder's, or the system's.
pub(crate) fn from_io(position: u64, error: io::Error) -> Error {
    let own = error.get_ref().is_some_and(|inner| inner.is::<loam_content::Error>());
    if own {
        let inner = error.into_inner().and_then(|inner| inner.downcast::<loam_content::Error>().ok());
        return match inner {
            Some(inner) => Error::Content(*inner),
            None => Error::Truncated { position, missing: "unknown failure of the source".to_owned() },
        };
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::Truncated { position, missing: "in the middle of compressed data".to_owned() }
        }
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other
            if error.raw_os_error().is_none() =>
        {
            Error::Archive { entry: String::new(), position, reason: format!("does not decompress: {error}") }
        }
        _ => Error::os("read", "archive", error),
    }
}

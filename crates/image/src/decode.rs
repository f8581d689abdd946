//! Compressed archives: recognised by their first bytes, decoded as a stream.

use std::fmt;
use std::io::{self, BufRead, Read};

/// A compression format of whole archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip (RFC 1952), of one member or many.
    Gzip,
    /// zstd (RFC 8878), of one frame or many.
    Zstd,
    /// xz, of one stream or many.
    Xz,
    /// bzip2, of one stream or many.
    Bzip2,
}

/// Bytes that [`Compression::detect`] wants to see.
pub(crate) const MAGIC_BYTES: usize = 6;
/// Largest zstd window that is taken, as a power of two: what the `zstd` tool decodes with `--long`.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Most memory that the xz decoder may take, bytes: `xz -9` needs 65 MiB.
const XZ_MEMORY_MAX: u64 = 256 << 20;

impl Compression {
    /// The format that a file beginning with `magic` has; `None` for one that is not compressed.
    pub fn detect(magic: &[u8]) -> Option<Compression> {
        match magic {
            [0x1f, 0x8b, 0x08, ..] => Some(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some(Compression::Bzip2),
            _ => None,
        }
    }

    /// A reader of the decoded bytes.
    ///
    /// # Errors
    /// When the decoder cannot be set up.
    pub fn decoder<'a>(self, input: impl BufRead + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
        Ok(match self {
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
            Compression::Xz => {
                let flags = liblzma::stream::CONCATENATED;
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, flags)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
            }
            Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Bzip2 => "bzip2",
        })
    }
}

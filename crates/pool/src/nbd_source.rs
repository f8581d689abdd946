//! An export of an NBD server as the content of a range: read in chunks, cached, and held to the digests that were
//! recorded when its bytes were first seen. Of its version only the size is known.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt, stream};
use loam_block::BlockDevice;
use loam_content::{ChunkSender, ChunkSource, Digest, FetchCost, Pin, WireTotals};
use loam_nbd::client::{ClientOptions, NbdDevice};
use loam_nbd::uri::Uri;

use crate::device::not_connected;
use crate::error::{Error, Result};

/// Bytes of one request to the server, where it takes that much.
const REQUEST_BYTES: u64 = 1 << 20;

/// Requests of one fetch that are under way at once.
const REQUESTS: usize = 4;

/// An export, from its first byte to its last; zeroes up to a multiple of 4 KiB behind it.
pub(crate) struct NbdSource {
    name: String,
    device: Arc<dyn BlockDevice>,
    chunk_bytes: u32,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl NbdSource {
    /// Connects. With an `expected` version the export must have its size.
    pub(crate) async fn open(uri: &Uri, chunk_bytes: u32, expected: Option<&Pin>) -> Result<Self> {
        let device = NbdDevice::connect(uri, ClientOptions::default()).await.map_err(not_connected)?;
        let source = NbdSource::new(uri.to_string(), Arc::new(device), chunk_bytes)?;
        let found = source.size();
        if let Some(pin) = expected.filter(|pin| pin.length != found) {
            let why = format!("it had {} bytes when it was added, it has {found}", pin.length);
            return Err(Error::step(format!("opening {uri}"), why));
        }
        Ok(source)
    }

    fn new(name: String, device: Arc<dyn BlockDevice>, chunk_bytes: u32) -> Result<Self> {
        let geometry = device.geometry();
        if geometry.size == 0 {
            return Err(Error::invalid(name, "it is empty: there is nothing to map"));
        }
        if geometry.minimum_block > chunk_bytes {
            let why = format!("its blocks of {} bytes are larger than a chunk", geometry.minimum_block);
            return Err(Error::invalid(name, why));
        }
        Ok(NbdSource { name, device, chunk_bytes, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) })
    }

    /// Which version it is.
    pub(crate) fn pin(&self) -> Pin {
        Pin::of_length(self.size())
    }

    fn size(&self) -> u64 {
        self.device.geometry().size
    }

    /// What lies at `start..end`, of which what is beyond the export is zero.
    async fn read(&self, start: u64, end: u64) -> loam_content::Result<Vec<u8>> {
        let mut bytes = vec![0; (end - start) as usize];
        let there = end.min(self.size()).saturating_sub(start) as usize;
        let maximum = self.device.geometry().maximum_block as usize;
        let mut offset = start;
        for piece in bytes[..there].chunks_mut(maximum) {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let failed = |error: loam_block::Error| loam_content::Error::Source {
                kind: error.kind(),
                what: format!("{}: {}", self.name, Error::step("read", error).chain()),
            };
            self.device.read(offset, piece).await.map_err(failed)?;
            self.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            offset += piece.len() as u64;
        }
        Ok(bytes)
    }
}

impl ChunkSource for NbdSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn length(&self) -> u64 {
        self.size().next_multiple_of(loam_space::BLOCK)
    }

    fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    fn digest(&self, _chunk: u64) -> Option<Digest> {
        None
    }

    fn fetch(&self, first: u64, count: u64, out: ChunkSender) -> BoxFuture<'_, loam_content::Result<()>> {
        Box::pin(async move {
            let chunk_bytes = u64::from(self.chunk_bytes);
            let start = first * chunk_bytes;
            let end = (start + count * chunk_bytes).min(self.length());
            let step = REQUEST_BYTES.max(chunk_bytes);
            let pieces = stream::iter((start..end).step_by(step as usize));
            let read = |at: u64| self.read(at, (at + step).min(end));
            let mut read = pieces.map(read).buffered(REQUESTS);
            while let Some(piece) = read.try_next().await? {
                let piece = Bytes::from(piece);
                for at in (0..piece.len()).step_by(self.chunk_bytes as usize) {
                    let chunk = piece.slice(at..piece.len().min(at + self.chunk_bytes as usize));
                    out.send(chunk).await?;
                }
            }
            Ok(())
        })
    }

    fn fetch_cost(&self) -> FetchCost {
        FetchCost::RandomAccess
    }

    fn wire(&self) -> WireTotals {
        WireTotals {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use loam_block::{Capabilities, Geometry, Io, PatternDevice};
    use loam_content::collect_chunks;

    use super::*;

    /// A pattern whose requests are short.
    struct Short(PatternDevice);

    impl BlockDevice for Short {
        fn geometry(&self) -> Geometry {
            Geometry { maximum_block: 16 << 10, ..self.0.geometry() }
        }

        fn capabilities(&self) -> Capabilities {
            self.0.capabilities()
        }

        fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
            assert!(buffer.len() <= 16 << 10);
            self.0.read(offset, buffer)
        }
    }

    fn source(size: u64) -> NbdSource {
        NbdSource::new("test".to_owned(), Arc::new(Short(PatternDevice::new(size))), 64 << 10).unwrap()
    }

    #[tokio::test]
    async fn chunks_are_the_export_and_zeroes_behind_it() {
        let size = (3 << 20) + 8192 + 8;
        let source = source(size);
        assert_eq!(source.length(), (3 << 20) + 12_288);
        let chunks = collect_chunks(&source, 0, source.length().div_ceil(64 << 10)).await.unwrap();
        let bytes = chunks.concat();
        assert_eq!(bytes.len() as u64, source.length());
        PatternDevice::verify(0, &bytes[..size as usize]).unwrap();
        assert!(bytes[size as usize..].iter().all(|byte| *byte == 0));
        assert_eq!(source.wire().bytes, size);
        let middle = collect_chunks(&source, 5, 2).await.unwrap().concat();
        PatternDevice::verify(5 << 16, &middle).unwrap();
        assert_eq!(source.pin(), Pin::of_length(size));
    }

    #[test]
    fn what_cannot_be_a_content_is_refused() {
        let empty = NbdSource::new("test".to_owned(), Arc::new(PatternDevice::new(0)), 64 << 10);
        assert!(matches!(empty, Err(Error::Invalid { .. })));
    }
}

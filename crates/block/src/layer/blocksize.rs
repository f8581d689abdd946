//! `blocksize`: other block sizes above than below. Requests longer than a maximum go down in pieces, one after the other
//! (as nbdkit's filter does it, so that delays below add up the same) or some at once (`parallel`). Requests that do not
//! keep the minimum of the device below are aligned: reads are widened, the edges of writes and zeroes are read, changed
//! and written back, and the edges of trims are left as they are.
//!
//! An edge is changed under a lock of its range, which writes of whole blocks share, and in a task of its own: a caller
//! that goes away must not let go of the lock while the device still writes. Reads take no lock: of bytes that are being
//! written a reader may see either, and all others in the block are written back as they were.
//!
//! A fast zero whose edges would have to be written, or whose first piece is refused, is refused; once a piece is zeroed
//! the others are zeroed by whatever way.

use std::sync::Arc;

use super::forward::forward;
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use super::pieces::{change_all, pieces, read_all};
use super::range_lock::{Hold, RangeLock};
use crate::device::refuse;
use crate::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, Geometry, Io, Locality, MAXIMUM_BLOCK, Result,
    WriteFlags, ZeroFlags, check_extents_range, check_range,
};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "blocksize",
    summary: "longer requests are split, smaller ones aligned (nbdkit: blocksize)",
    parameters: &[
        parameter("minimum", "SIZE", "the device's", "the device gets multiples of this (nbdkit: minblock)"),
        parameter("maximum", "SIZE", "the device's", "and no longer reads and writes (nbdkit: maxdata)"),
        parameter("maximum-length", "SIZE", "", "nor longer requests without data (nbdkit: maxlen)"),
        parameter("parallel", "N", "1", "pieces of one request that go down at once"),
        parameter("offer", "SIZE", "1", "clients must keep this block size"),
        parameter("preferred", "SIZE", "the device's", "and are told to prefer this"),
    ],
};

/// The largest `minimum` and `offer`, as in nbdkit.
const MINIMUM_MAX: u64 = 64 << 10;
/// The largest `parallel`.
const PARALLEL_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    minimum: Option<u32>,
    preferred: Option<u32>,
    maximum: Option<u64>,
    maximum_length: Option<u64>,
    parallel: usize,
    offer: u32,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let power = |key, most: u64| match parameters.size(key)? {
            Some(size) if !size.is_power_of_two() || size > most => {
                let why = format!("write a power of two up to {}", crate::ByteSize(most));
                Err(parameters.wrong(key, parameters.text(key).unwrap_or_default(), why))
            }
            size => Ok(size.map(|size| size as u32)),
        };
        let parallel = parameters.get_with("parallel", |text| {
            text.parse().ok().filter(|n| (1..=PARALLEL_MAX).contains(n)).ok_or("write a number from 1 to 64")
        })?;
        Ok(Options {
            minimum: power("minimum", MINIMUM_MAX)?,
            preferred: power("preferred", u64::from(MAXIMUM_BLOCK))?,
            maximum: parameters.positive_size("maximum")?,
            maximum_length: parameters.positive_size("maximum-length")?,
            parallel: parallel.unwrap_or(1),
            offer: power("offer", MINIMUM_MAX)?.unwrap_or(1),
        })
    }
}

struct BlockSize {
    inner: Arc<dyn BlockDevice>,
    /// As offered above.
    geometry: Geometry,
    /// Below, in bytes.
    minimum: u64,
    maximum: u64,
    maximum_length: u64,
    parallel: usize,
    lock: Arc<RangeLock>,
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    let below = inner.geometry();
    let refuse = |why: String| Error::new(ErrorKind::Invalid, format!("layer blocksize: {why}"));
    let minimum = options.minimum.unwrap_or(below.minimum_block);
    if minimum < below.minimum_block {
        return Err(refuse(format!(
            "minimum={minimum} is less than the device's own {}",
            below.minimum_block
        )));
    }
    for block in [minimum, options.offer] {
        if !below.size.is_multiple_of(u64::from(block)) {
            return Err(refuse(format!("the device's {} bytes are no multiple of {block}", below.size)));
        }
    }
    let maximum = options.maximum.unwrap_or(u64::MAX).min(u64::from(below.maximum_block));
    let maximum_length = options.maximum_length.unwrap_or(u64::MAX / 2);
    let minimum_bytes = u64::from(minimum);
    for (key, size) in [("maximum", maximum), ("maximum-length", maximum_length)] {
        if size < minimum_bytes {
            return Err(refuse(format!("{key}={size} is less than the minimum of {minimum}")));
        }
    }
    let maximum_block = below.maximum_block.max(MAXIMUM_BLOCK);
    let preferred = options.preferred.unwrap_or(below.preferred_block.max(minimum)).max(options.offer);
    let geometry = Geometry {
        size: below.size,
        minimum_block: options.offer,
        preferred_block: preferred.min(maximum_block),
        maximum_block,
    };
    Ok(Arc::new(BlockSize {
        inner,
        geometry,
        minimum: minimum_bytes,
        maximum: maximum / minimum_bytes * minimum_bytes,
        maximum_length: maximum_length / minimum_bytes * minimum_bytes,
        parallel: options.parallel,
        lock: Arc::default(),
    }))
}

impl BlockSize {
    fn check(&self, operation: &str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry, operation, offset, length)
    }

    fn is_aligned(&self, offset: u64, length: u64) -> bool {
        (offset | length) & (self.minimum - 1) == 0
    }

    /// The range of whole blocks around one of bytes. The device ends with a block.
    fn widened(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = offset & !(self.minimum - 1);
        (start, (offset + length).next_multiple_of(self.minimum))
    }

    /// A change of whole blocks: beside others, but not beside one who changes an edge.
    fn beside_others<'a>(
        &'a self,
        offset: u64,
        length: u64,
        request: impl FnOnce() -> Io<'a, ()> + Send + 'a,
    ) -> Io<'a, ()> {
        if self.minimum <= u64::from(self.geometry.minimum_block) {
            return request();
        }
        let end = offset + length;
        match self.lock.try_lock(offset, end, Hold::Shared) {
            Some(_held) => match request() {
                // What is pending may not be polled for long: it holds nothing before.
                Io::Pending(future) => Io::pending(async move {
                    let _held = self.lock.lock(offset, end, Hold::Shared).await;
                    future.await
                }),
                ready => ready,
            },
            None => Io::pending(async move {
                let _held = self.lock.lock(offset, end, Hold::Shared).await;
                request().await
            }),
        }
    }

    /// What a task of its own needs of this layer.
    fn edges(&self) -> Edges {
        Edges {
            inner: self.inner.clone(),
            minimum: self.minimum,
            maximum: self.maximum,
            maximum_length: self.maximum_length,
            parallel: self.parallel,
        }
    }

    /// `change`, alone on the blocks around a range, carried out to its end even if nobody waits for it any more.
    fn alone<'a, F>(
        &'a self,
        offset: u64,
        length: u64,
        change: impl FnOnce(Edges) -> F + Send + 'a,
    ) -> Io<'a, ()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (start, end) = self.widened(offset, length);
        Io::pending(async move {
            let (lock, change) = (self.lock.clone(), change(self.edges()));
            let done = tokio::spawn(async move {
                let _held = lock.lock(start, end, Hold::Alone).await;
                change.await
            });
            done.await.unwrap_or_else(|gone| {
                Err(Error::with_source(ErrorKind::ShuttingDown, "a change of part of a block", gone))
            })
        })
    }

    fn read_aligned<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let maximum = self.maximum as usize;
        let offsets = (offset..).step_by(maximum);
        let pieces = offsets.zip(buffer.chunks_mut(maximum));
        read_all(pieces, self.parallel, move |(offset, piece)| self.inner.read(offset, piece))
    }
}

/// Changes of parts of blocks. Who calls holds the blocks alone.
struct Edges {
    inner: Arc<dyn BlockDevice>,
    minimum: u64,
    maximum: u64,
    maximum_length: u64,
    parallel: usize,
}

impl Edges {
    /// Writes bytes that begin or end within a block.
    async fn write(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<()> {
        let minimum = self.minimum;
        let start = offset & !(minimum - 1);
        let end = (offset + data.len() as u64).next_multiple_of(minimum);
        let mut blocks = vec![0; (end - start) as usize];
        let head = (offset - start) as usize;
        let tail = head + data.len();
        let last = blocks.len() - minimum as usize;
        if head > 0 {
            self.inner.read(start, &mut blocks[..minimum as usize]).await?;
        }
        if tail < blocks.len() && (last > 0 || head == 0) {
            self.inner.read(start + last as u64, &mut blocks[last..]).await?;
        }
        blocks[head..tail].copy_from_slice(data);
        let maximum = self.maximum as usize;
        let pieces = (start..).step_by(maximum).zip(blocks.chunks(maximum));
        change_all(pieces, self.parallel, |(offset, piece)| self.inner.write(offset, piece, flags)).await
    }

    async fn zero(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        let minimum = self.minimum;
        let end = offset + length;
        let (first, last) = (offset.next_multiple_of(minimum), end & !(minimum - 1));
        let write_flags = WriteFlags { fua: flags.fua };
        let zeroes = |from: u64, to: u64| vec![0; (to - from) as usize];
        if first > last {
            return self.write(offset, &zeroes(offset, end), write_flags).await;
        }
        if offset < first {
            self.write(offset, &zeroes(offset, first), write_flags).await?;
        }
        for (offset, length) in pieces(first, last - first, self.maximum_length) {
            self.inner.write_zeroes(offset, length, flags).await?;
        }
        if last < end {
            self.write(last, &zeroes(last, end), write_flags).await?;
        }
        Ok(())
    }
}

impl BlockDevice for BlockSize {
    forward!(inner: capabilities, flush);

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        let length = buffer.len() as u64;
        if let Err(error) = self.check("read", offset, length) {
            return Io::Ready(Err(error));
        }
        if self.is_aligned(offset, length) {
            return match length <= self.maximum {
                true => self.inner.read(offset, buffer),
                false => self.read_aligned(offset, buffer),
            };
        }
        let (start, end) = self.widened(offset, length);
        let within = (offset - start) as usize..(offset - start + length) as usize;
        let mut blocks = vec![0; (end - start) as usize];
        let at_hand = match self.read_aligned(start, &mut blocks) {
            Io::Ready(done) => Some(done),
            Io::Pending(_) => None,
        };
        if let Some(done) = at_hand {
            return Io::Ready(done.map(|()| buffer.copy_from_slice(&blocks[within])));
        }
        Io::pending(async move {
            self.read_aligned(start, &mut blocks).await?;
            buffer.copy_from_slice(&blocks[within]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        let length = data.len() as u64;
        if let Err(error) = self.check("write", offset, length) {
            return Io::Ready(Err(error));
        }
        if !self.inner.capabilities().write {
            return refuse(&self.geometry, "write", offset, length);
        }
        if data.is_empty() {
            return self.inner.write(offset & !(self.minimum - 1), data, flags);
        }
        if !self.is_aligned(offset, length) {
            return self.alone(offset, length, move |edges| {
                let data = data.to_vec();
                async move { edges.write(offset, &data, flags).await }
            });
        }
        self.beside_others(offset, length, move || {
            if length <= self.maximum {
                return self.inner.write(offset, data, flags);
            }
            let maximum = self.maximum as usize;
            let pieces = (offset..).step_by(maximum).zip(data.chunks(maximum));
            change_all(pieces, self.parallel, move |(offset, piece)| self.inner.write(offset, piece, flags))
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if let Err(error) = self.check("write of zeroes", offset, length) {
            return Io::Ready(Err(error));
        }
        if !self.inner.capabilities().write {
            return refuse(&self.geometry, "write of zeroes", offset, length);
        }
        if length == 0 {
            return self.inner.write_zeroes(offset & !(self.minimum - 1), 0, flags);
        }
        if !self.is_aligned(offset, length) {
            if flags.fast_only {
                let context =
                    format!("fast zeroes of {length} bytes at {offset}: parts of blocks are written");
                return Io::Ready(Err(Error::new(ErrorKind::NotSupported, context)));
            }
            return self
                .alone(offset, length, move |edges| async move { edges.zero(offset, length, flags).await });
        }
        self.beside_others(offset, length, move || {
            if length <= self.maximum_length {
                return self.inner.write_zeroes(offset, length, flags);
            }
            Io::pending(async move {
                let mut pieces = pieces(offset, length, self.maximum_length);
                if let Some((offset, length)) = pieces.next() {
                    self.inner.write_zeroes(offset, length, flags).await?;
                }
                change_all(pieces, self.parallel, move |(offset, length)| {
                    self.zero_anyhow(offset, length, flags)
                })
                .await
            })
        })
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = self.check("trim", offset, length) {
            return Io::Ready(Err(error));
        }
        let first = offset.next_multiple_of(self.minimum);
        let last = (offset + length) & !(self.minimum - 1);
        let length = last.saturating_sub(first);
        let first = first.min(self.geometry.size);
        self.beside_others(first, length, move || match length <= self.maximum_length {
            true => self.inner.trim(first, length),
            false => change_all(
                pieces(first, length, self.maximum_length),
                self.parallel,
                move |(offset, length)| self.inner.trim(offset, length),
            ),
        })
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        let (start, whole) = match self.question(offset, length) {
            Ok(range) => range,
            Err(error) => return Io::Ready(Err(error)),
        };
        let clip = move |extents: Vec<Extent>| {
            let clipped = extents.into_iter().filter_map(|extent| {
                let (offset, length) = clipped(offset, length, extent.offset, extent.length)?;
                Some(Extent { offset, length, ..extent })
            });
            // An extent of less than a block, and not the one that was meant: anything may lie there.
            let or = Extent { offset, length: length.min(whole), kind: ExtentKind::Data };
            or_else(clipped.collect(), or)
        };
        map(self.inner.extents(start, whole, limit), clip)
    }

    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        let (start, whole) = match self.question(offset, length) {
            Ok(range) => range,
            Err(error) => return Io::Ready(Err(error)),
        };
        let clip = move |runs: Vec<Locality>| {
            let clipped = runs.into_iter().filter_map(|run| {
                let (offset, length) = clipped(offset, length, run.offset, run.length)?;
                Some(Locality { offset, length, ..run })
            });
            or_else(clipped.collect(), Locality { offset, length: length.min(whole), local: false })
        };
        map(self.inner.locality(start, whole, limit), clip)
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        if let Err(error) = self.check("prefetch", offset, length) {
            return Io::Ready(Err(error));
        }
        let (start, end) = self.widened(offset, length);
        let pieces = pieces(start, end - start, self.maximum_length);
        read_all(pieces, self.parallel, move |(offset, length)| self.inner.prefetch(offset, length))
    }
}

impl BlockSize {
    /// Zeroes a piece after the first, which was zeroed: too late to refuse for slowness.
    fn zero_anyhow(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        Io::pending(async move {
            match self.inner.write_zeroes(offset, length, flags).await {
                Err(error) if flags.fast_only && error.kind() == ErrorKind::NotSupported => {
                    let flags = ZeroFlags { fast_only: false, ..flags };
                    self.inner.write_zeroes(offset, length, flags).await
                }
                done => done,
            }
        })
    }

    /// What to ask the device for a question about a range: whole blocks, and no more than its maximum.
    fn question(&self, offset: u64, length: u64) -> Result<(u64, u64)> {
        check_extents_range(&self.geometry, offset, length)?;
        let (start, end) = self.widened(offset, length);
        Ok((start, (end - start).min(self.maximum_length)))
    }
}

/// What of a run of blocks lies in `offset..offset + length`, if anything does.
fn clipped(offset: u64, length: u64, run_offset: u64, run_length: u64) -> Option<(u64, u64)> {
    let start = run_offset.max(offset);
    let end = (run_offset + run_length).min(offset + length);
    (start < end).then(|| (start, end - start))
}

fn or_else<T>(mut runs: Vec<T>, or: T) -> Vec<T> {
    if runs.is_empty() {
        runs.push(or);
    }
    runs
}

fn map<'a, T: Unpin + Send + 'a>(io: Io<'a, T>, then: impl FnOnce(T) -> T + Send + 'a) -> Io<'a, T> {
    match io {
        Io::Ready(result) => Io::Ready(result.map(then)),
        Io::Pending(future) => Io::pending(async move { future.await.map(then) }),
    }
}

#[cfg(test)]
mod tests;

//! [`NbdDevice`]: requests of a [`BlockDevice`] as commands of the protocol, in the sizes and with the flags that the
//! server offers, and what it does not offer made up for where that can be done.

use std::sync::{Arc, LazyLock};

use loam_block::{
    BlockDevice, Capabilities, Error, ErrorKind, Extent, ExtentKind, Geometry, Io, Locality, MAXIMUM_BLOCK,
    Result, WriteFlags, ZeroFlags, check_extents_range, check_range, whole_device_as,
};

use super::ClientOptions;
use super::error::ConnectError;
use super::exchange::{Body, Order};
use super::export::ExportInfo;
use super::failure::Failure;
use super::pool::{Pool, Trouble};
use crate::protocol::{AllocationFlags, Command, CommandFlags, LocalityFlags, NbdError, Status};
use crate::uri::Uri;

/// The longest range of one command without a payload where lengths have 32 bits, in bytes: servers that take them for
/// signed are many.
const COMPACT_EFFECT_MAX: u64 = 1 << 30;

/// Zeroes that are written where the server does not zero by itself. Never touched, so no memory.
static ZEROES: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 1 << 20]);

/// An export of an NBD server.
pub struct NbdDevice {
    pool: Arc<Pool>,
}

impl NbdDevice {
    /// Connects to an export.
    ///
    /// # Errors
    /// When the server cannot be reached, breaks the protocol, has no such export or does not agree on TLS.
    pub async fn connect(uri: &Uri, options: ClientOptions) -> Result<Self, ConnectError> {
        Ok(NbdDevice { pool: Pool::open(uri.clone(), options).await? })
    }

    /// What the server says of the export.
    pub fn export(&self) -> &ExportInfo {
        &self.pool.export
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.pool.connections()
    }

    fn context(&self, what: &str, offset: u64, length: u64) -> String {
        format!("{what} of {length} bytes at {offset} of {}", self.pool.uri)
    }

    fn check(&self, what: &'static str, offset: u64, length: u64) -> Result<()> {
        check_range(&self.geometry(), what, offset, length)
    }

    fn check_write(&self, what: &'static str, offset: u64, length: u64) -> Result<()> {
        self.check(what, offset, length)?;
        if self.export().flags.read_only {
            let context = format!("{}: the export is read-only", self.context(what, offset, length));
            return Err(Error::new(ErrorKind::ReadOnly, context));
        }
        Ok(())
    }

    /// The flag that makes a request durable, and whether a flush must do it instead.
    fn durably(&self, fua: bool) -> (CommandFlags, bool) {
        match (fua, self.export().flags.fua) {
            (true, true) => (CommandFlags::FUA, false),
            (true, false) => (CommandFlags::empty(), true),
            (false, _) => (CommandFlags::empty(), false),
        }
    }

    /// The longest range of a command without a payload.
    fn effect_max(&self) -> u64 {
        if self.export().extended { u64::MAX } else { COMPACT_EFFECT_MAX }
    }

    async fn read_all(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut at = offset;
        for part in buffer.chunks_mut(self.geometry().maximum_block as usize) {
            let length = part.len() as u64;
            let order = Order { command: Command::Read, flags: CommandFlags::empty(), offset: at, length };
            let result = self.pool.run(order, Body::Into(part)).await;
            result.map_err(|trouble| trouble.error(self.context("read", at, length)))?;
            at += length;
        }
        Ok(())
    }

    async fn write_all(&self, offset: u64, data: &[u8], flags: CommandFlags) -> Result<()> {
        let mut at = offset;
        for part in data.chunks(self.geometry().maximum_block as usize) {
            let length = part.len() as u64;
            let order = Order { command: Command::Write, flags, offset: at, length };
            let result = self.pool.run(order, Body::From(part)).await;
            let (link, _) = result.map_err(|trouble| trouble.error(self.context("write", at, length)))?;
            if !flags.contains(CommandFlags::FUA) {
                self.pool.wrote(&link, length);
            }
            at += length;
        }
        Ok(())
    }

    /// A command without payload over a range of any length, in pieces that the server takes.
    async fn cover(&self, what: &'static str, order: Order) -> Result<()> {
        let (mut at, end) = (order.offset, order.offset + order.length);
        let mut most = self.effect_max();
        if order.command == Command::Cache {
            most = self.geometry().maximum_block.into();
        }
        while at < end {
            let length = most.min(end - at);
            let payload_max = self.geometry().maximum_block.into();
            match self.pool.run(Order { offset: at, length, ..order }, Body::None).await {
                Ok((link, _)) => {
                    if order.command == Command::WriteZeroes && !order.flags.contains(CommandFlags::FUA) {
                        self.pool.wrote(&link, length);
                    }
                    at += length;
                }
                // It takes that many bytes only one payload at a time.
                Err(Trouble::Failed(Failure::Refused { error: NbdError::Overflow, .. }))
                    if length > payload_max =>
                {
                    most = payload_max;
                }
                Err(trouble) => return Err(trouble.error(self.context(what, at, length))),
            }
        }
        Ok(())
    }

    async fn write_zero_bytes(&self, offset: u64, length: u64, flags: CommandFlags) -> Result<()> {
        let block = u64::from(self.geometry().minimum_block);
        let most = (ZEROES.len() as u64).min(self.geometry().maximum_block.into()) / block * block;
        let mut at = offset;
        while at < offset + length {
            let part = most.min(offset + length - at);
            self.write_all(at, &ZEROES[..part as usize], flags).await?;
            at += part;
        }
        Ok(())
    }

    /// Asks for the status of a range in one context: the lengths and flags from `offset` on, as far as one answer goes,
    /// cut to the range and to blocks.
    async fn status(&self, offset: u64, length: u64, limit: usize, which: Which) -> Result<Vec<Status>> {
        let length = length.min(self.effect_max());
        let flags = if limit <= 1 { CommandFlags::REQ_ONE } else { CommandFlags::empty() };
        let order = Order { command: Command::BlockStatus, flags, offset, length };
        let context = || self.context("block status", offset, length);
        let answer = self.pool.run(order, Body::None).await;
        let (link, chunks) = answer.map_err(|trouble| trouble.error(context()))?;
        let id = match which {
            Which::Allocation => link.contexts.allocation,
            Which::Locality => link.contexts.locality,
        };
        let chunk = chunks.into_iter().find(|chunk| Some(chunk.context) == id).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("{}: the server left out the context", context()))
        })?;
        let mut left = length;
        let mut extents = chunk.extents;
        for extent in &mut extents {
            extent.length = extent.length.min(left);
            left -= extent.length;
        }
        extents.retain(|extent| extent.length > 0);
        Ok(extents)
    }
}

/// A metadata context.
#[derive(Clone, Copy)]
enum Which {
    Allocation,
    Locality,
}

impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        let export = self.export();
        let most = export.maximum_block.min(MAXIMUM_BLOCK) / export.minimum_block * export.minimum_block;
        Geometry {
            size: export.size,
            minimum_block: export.minimum_block,
            preferred_block: export.preferred_block.min(1 << most.ilog2()),
            maximum_block: most,
        }
    }

    fn capabilities(&self) -> Capabilities {
        let export = self.export();
        let write = !export.flags.read_only;
        Capabilities {
            write,
            trim: write && export.flags.trim,
            zero: write && export.flags.write_zeroes,
            fast_zero: write && export.flags.fast_zero,
            extents: export.has_extents(),
            multi_connection: export.flags.multi_connection,
            lazy: export.has_locality(),
            // Who does not set the flag may only not know.
            rotational: export.flags.rotational.then_some(true),
        }
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        match self.check("read", offset, buffer.len() as u64) {
            Ok(()) if buffer.is_empty() => Io::Ready(Ok(())),
            Ok(()) => Io::pending(self.read_all(offset, buffer)),
            Err(error) => Io::Ready(Err(error)),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        match self.check_write("write", offset, data.len() as u64) {
            Ok(()) if data.is_empty() => Io::Ready(Ok(())),
            Ok(()) => Io::pending(async move {
                let (flags, flush) = self.durably(flags.fua);
                self.write_all(offset, data, flags).await?;
                if flush { self.pool.flush().await } else { Ok(()) }
            }),
            Err(error) => Io::Ready(Err(error)),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let offered = self.export().flags;
        match self.check_write("write of zeroes", offset, length) {
            Ok(()) if length == 0 => return Io::Ready(Ok(())),
            Ok(()) => {}
            Err(error) => return Io::Ready(Err(error)),
        }
        if flags.fast_only && !offered.fast_zero {
            let context = format!(
                "{}: the server does not say what is fast",
                self.context("fast zero", offset, length)
            );
            return Io::Ready(Err(Error::new(ErrorKind::NotSupported, context)));
        }
        Io::pending(async move {
            let (mut command_flags, flush) = self.durably(flags.fua);
            if offered.write_zeroes {
                command_flags.set(CommandFlags::NO_HOLE, flags.no_hole);
                command_flags.set(CommandFlags::FAST_ZERO, flags.fast_only);
                let order = Order { command: Command::WriteZeroes, flags: command_flags, offset, length };
                self.cover("write of zeroes", order).await?;
            } else {
                self.write_zero_bytes(offset, length, command_flags).await?;
            }
            if flush { self.pool.flush().await } else { Ok(()) }
        })
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        match self.check_write("trim", offset, length) {
            // It is a hint: a server that takes none has nothing to be told.
            Ok(()) if length == 0 || !self.export().flags.trim => Io::Ready(Ok(())),
            Ok(()) => {
                let order = Order { command: Command::Trim, flags: CommandFlags::empty(), offset, length };
                Io::pending(self.cover("trim", order))
            }
            Err(error) => Io::Ready(Err(error)),
        }
    }

    fn flush(&self) -> Io<'_, ()> {
        if self.export().flags.read_only {
            return Io::Ready(Ok(()));
        }
        Io::pending(self.pool.flush())
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        if !self.export().has_extents() {
            return Io::Ready(whole_device_as(&self.geometry(), ExtentKind::Data, offset, length));
        }
        if let Err(error) = check_extents_range(&self.geometry(), offset, length) {
            return Io::Ready(Err(error));
        }
        Io::pending(async move {
            let status = self.status(offset, length, limit, Which::Allocation).await?;
            let block = self.geometry().minimum_block.into();
            let extents = runs(offset, &status, block, limit, ExtentKind::Data, kind_of);
            Ok(extents.into_iter().map(|(offset, length, kind)| Extent { offset, length, kind }).collect())
        })
    }

    fn locality(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Locality>> {
        if let Err(error) = check_extents_range(&self.geometry(), offset, length) {
            return Io::Ready(Err(error));
        }
        if !self.export().has_locality() {
            return Io::Ready(Ok(vec![Locality { offset, length, local: true }]));
        }
        Io::pending(async move {
            let status = self.status(offset, length, limit, Which::Locality).await?;
            let block = self.geometry().minimum_block.into();
            let is_local = |flags| !LocalityFlags::from_bits_retain(flags).contains(LocalityFlags::LAZY);
            let runs = runs(offset, &status, block, limit, false, is_local);
            Ok(runs.into_iter().map(|(offset, length, local)| Locality { offset, length, local }).collect())
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> Io<'_, ()> {
        match self.check("prefetch", offset, length) {
            Ok(()) if length == 0 || !self.export().flags.cache => Io::Ready(Ok(())),
            Ok(()) => {
                let order = Order { command: Command::Cache, flags: CommandFlags::empty(), offset, length };
                Io::pending(self.cover("prefetch", order))
            }
            Err(error) => Io::Ready(Err(error)),
        }
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.pool.close();
    }
}

/// What a status of `base:allocation` says. A hole that is not said to read as zeroes may hold anything.
fn kind_of(flags: u64) -> ExtentKind {
    let flags = AllocationFlags::from_bits_retain(flags);
    match (flags.contains(AllocationFlags::ZERO), flags.contains(AllocationFlags::HOLE)) {
        (true, true) => ExtentKind::Hole,
        (true, false) => ExtentKind::Zero,
        (false, _) => ExtentKind::Data,
    }
}

/// Runs of one kind on whole blocks, at most `limit` of them. A block in which the server sees a border is `mixed`.
fn runs<T: Copy + PartialEq>(
    offset: u64,
    status: &[Status],
    block: u64,
    limit: usize,
    mixed: T,
    kind: impl Fn(u64) -> T,
) -> Vec<(u64, u64, T)> {
    let mut runs: Vec<(u64, u64, T)> = Vec::new();
    let (mut at, mut end) = (offset, offset);
    for Status { length, flags } in status {
        end += length;
        let whole = end / block * block;
        let partial = end.div_ceil(block) * block;
        if end <= at {
            continue;
        }
        for (from, to, kind) in [(at, whole, kind(*flags)), (at.max(whole), partial, mixed)] {
            let full = runs.len() >= limit.max(1);
            match runs.last_mut() {
                _ if from >= to => {}
                Some((_, length, last)) if *last == kind => *length += to - from,
                _ if full => return runs,
                _ => runs.push((from, to - from, kind)),
            }
        }
        at = partial;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(runs: &[(u64, u64)]) -> Vec<Status> {
        runs.iter().map(|&(length, flags)| Status { length, flags }).collect()
    }

    #[test]
    fn borders_inside_of_a_block_make_it_data() {
        let found =
            status(&[(512, 3), (1024, 3), (100, 3), (100, 0), (824, 2), (600, 3), (3, 3), (2, 0), (419, 1)]);
        let runs = runs(1024, &found, 512, 9, ExtentKind::Data, kind_of);
        let expected = [
            (1024, 1536, ExtentKind::Hole),
            (2560, 512, ExtentKind::Data),
            (3072, 512, ExtentKind::Zero),
            (3584, 512, ExtentKind::Hole),
            (4096, 512, ExtentKind::Data),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn no_more_runs_than_the_limit() {
        let found = status(&[(512, 0), (512, 0), (512, 3), (512, 2)]);
        assert_eq!(runs(0, &found, 1, 1, ExtentKind::Data, kind_of), [(0, 1024, ExtentKind::Data)]);
        assert_eq!(runs(0, &found, 1, 0, ExtentKind::Data, kind_of).len(), 1);
        assert_eq!(runs(0, &found, 1, 5, ExtentKind::Data, kind_of).len(), 3);
    }
}

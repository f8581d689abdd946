//! The server against a socket that plays the kernel: messages stay apart on it as they do on /dev/fuse.

use std::sync::atomic::{AtomicU64, Ordering};

use loam_block::{
    Capabilities, Error as BlockError, ErrorKind, Extent, Geometry, PatternDevice, WriteFlags, ZeroFlags,
};
use loam_sys::fds;
use tokio::runtime::Runtime;
use zerocopy::FromBytes;

use super::*;
use crate::fuse::wire::{InHeader, InitIn, OutHeader, ReadIn, opcode};

/// Where the parts of the test device begin that behave in some way.
const SLOW: u64 = 1 << 40;
const BROKEN: u64 = 2 << 40;
const PANICKING: u64 = 3 << 40;
const PANICKING_LATER: u64 = 4 << 40;
const SIZE: u64 = 5 << 40;

struct TestDevice {
    pattern: PatternDevice,
    polled: AtomicU64,
}

impl BlockDevice for TestDevice {
    fn geometry(&self) -> Geometry {
        self.pattern.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.pattern.capabilities()
    }

    fn read<'a>(&'a self, offset: u64, buffer: &'a mut [u8]) -> Io<'a, ()> {
        match offset & !(SLOW - 1) {
            SLOW => Io::pending(async move {
                self.polled.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.pattern.read(offset, buffer).await
            }),
            BROKEN => Io::Ready(Err(BlockError::new(ErrorKind::Unmapped, "the test asks for it"))),
            PANICKING => panic!("the test asks for it"),
            PANICKING_LATER => Io::pending(async { panic!("the test asks for it") }),
            _ => self.pattern.read(offset, buffer),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], flags: WriteFlags) -> Io<'a, ()> {
        self.pattern.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.pattern.write_zeroes(offset, length, flags)
    }

    fn trim(&self, offset: u64, length: u64) -> Io<'_, ()> {
        self.pattern.trim(offset, length)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.pattern.flush()
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Io<'_, Vec<Extent>> {
        self.pattern.extents(offset, length, limit)
    }
}

/// A served socket, and the kernel's end of it.
struct Served {
    kernel: OwnedFd,
    device: Arc<TestDevice>,
    server: Server,
    runtime: Runtime,
}

impl Served {
    fn new(negotiated: Option<Negotiated>) -> Result<Served> {
        let (kernel, channel) = fds::message_pair()?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let device = Arc::new(TestDevice { pattern: PatternDevice::new(SIZE), polled: AtomicU64::new(0) });
        let (handle, options) = (runtime.handle().clone(), ServerOptions::default());
        let server = match negotiated {
            None => Server::start(channel, "file", device.clone(), handle, &options)?,
            Some(known) => Server::resume(channel, "file", device.clone(), handle, &options, known)?,
        };
        Ok(Served { kernel, device, server, runtime })
    }

    fn send(&self, opcode: u32, unique: u64, body: &[u8]) {
        let len = (size_of::<InHeader>() + body.len()) as u32;
        let header =
            InHeader { len, opcode, unique, nodeid: 2, uid: 0, gid: 0, pid: 0, total_extlen: 0, padding: 0 };
        fds::send(&self.kernel, &[header.as_bytes(), body].concat(), &[]).unwrap();
    }

    fn send_read(&self, unique: u64, offset: u64, size: u32) {
        let read = ReadIn { fh: 1, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
        self.send(opcode::READ, unique, read.as_bytes());
    }

    fn receive(&self) -> (OutHeader, Vec<u8>) {
        let mut buffer = vec![0; 2 << 20];
        let (length, _) = fds::receive(&self.kernel, &mut buffer).unwrap();
        let (header, body) = OutHeader::read_from_prefix(&buffer[..length]).unwrap();
        assert_eq!(header.len as usize, length);
        (header, body.to_vec())
    }

    fn end(mut self) -> Stats {
        let stats = self.server.stats();
        drop(self.kernel);
        assert!(self.server.wait(Duration::from_secs(5)));
        self.runtime.shutdown_timeout(Duration::from_secs(5));
        stats
    }
}

#[test]
fn a_connection_from_its_beginning_to_its_end() {
    let served = Served::new(None).unwrap();
    let offer =
        InitIn { major: 7, minor: 44, max_readahead: 0, flags: u32::MAX, flags2: u32::MAX, unused: [0; 11] };
    served.send(opcode::INIT, 1, offer.as_bytes());
    assert_eq!(served.receive().0.unique, 1);
    assert!(served.server.negotiated().unwrap().can_resend());
    for (unique, size) in [(2, 4096), (3, 65536), (4, MAX_READ / 8)] {
        served.send_read(unique, 4096, size);
        let (header, data) = served.receive();
        assert_eq!((header.unique, header.error, data.len()), (unique, 0, size as usize));
        PatternDevice::verify(4096, &data).unwrap();
    }
    served.send(opcode::FORGET, 5, &[0; 8]);
    let stats = served.end();
    assert_eq!((stats.hits, stats.misses, stats.errors, stats.protocol_errors), (3, 0, 0, 0));
    assert_eq!(stats.bytes, u64::from(4096 + 65536 + MAX_READ / 8));
}

#[test]
fn misses_are_read_once_and_overtaken_by_hits() {
    let served = Served::new(None).unwrap();
    for unique in 1..=50 {
        served.send_read(unique, SLOW + unique * 4096, 4096);
    }
    served.send_read(99, 0, 4096);
    assert_eq!(served.receive().0.unique, 99);
    for _ in 0..50 {
        let (header, data) = served.receive();
        assert_eq!(header.error, 0);
        PatternDevice::verify(SLOW + header.unique * 4096, &data).unwrap();
    }
    // A future that is dropped unpolled has read nothing.
    assert_eq!(served.device.polled.load(Ordering::Relaxed), 50);
    let stats = served.end();
    assert_eq!((stats.hits, stats.misses), (1, 50));
}

#[test]
fn failures_and_panics_are_told_as_errors() {
    let served = Served::new(None).unwrap();
    for (unique, offset) in [(1, BROKEN), (2, PANICKING), (3, PANICKING_LATER)] {
        served.send_read(unique, offset, 4096);
        let (header, data) = served.receive();
        assert_eq!((header.unique, header.error, data.len()), (unique, -EIO, 0));
    }
    served.send_read(4, 0, 4096);
    assert_eq!(served.receive().0.error, 0);
    assert_eq!(served.end().errors, 3);
}

#[test]
fn garbage_does_not_end_the_threads() {
    let served = Served::new(None).unwrap();
    for _ in 0..100 {
        fds::send(&served.kernel, &[0xff; 39], &[]).unwrap();
    }
    served.send_read(1, 0, 4096);
    assert_eq!(served.receive().0.unique, 1);
    assert_eq!(served.end().protocol_errors, 100);
}

#[test]
fn who_takes_over_asks_for_a_resend_and_needs_no_beginning() {
    let negotiated = Negotiated { minor: 44, flags: wire::init::HAS_RESEND };
    let served = Served::new(Some(negotiated)).unwrap();
    let (header, body) = served.receive();
    assert_eq!((header.unique, header.error, body.len()), (0, wire::NOTIFY_RESEND, 0));
    let unique = 7 | wire::UNIQUE_RESEND;
    served.send_read(unique, 0, 4096);
    assert_eq!(served.receive().0.unique, unique);
    served.end();
    let old = Negotiated { minor: 38, flags: 0 };
    assert!(matches!(Served::new(Some(old)), Err(Error::CannotResend)));
}

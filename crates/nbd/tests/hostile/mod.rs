//! What the hostile peers share: bytes put together by hand, by nothing that the crate itself has, so that a mistake
//! cannot be made on both sides at once.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A test that waits longer than this for bytes has failed.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_REPLY: u32 = 0x6e8a_278c;

pub(crate) const ACK: u32 = 1;
pub(crate) const SERVER: u32 = 2;
pub(crate) const INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;
pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
pub(crate) const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EOVERFLOW: u32 = 75;

/// Bytes on their way to a message.
#[derive(Default, Clone)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn new() -> Self {
        Bytes::default()
    }
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }
    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }
    pub(crate) fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }
    /// A string after its length in 32 bits.
    pub(crate) fn counted(self, text: impl AsRef<[u8]>) -> Self {
        self.u32(text.as_ref().len() as u32).raw(text)
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

pub(crate) fn option(code: u32, data: impl AsRef<[u8]>) -> Bytes {
    Bytes::new().u64(IHAVEOPT).u32(code).counted(data)
}

/// The data of INFO and GO.
pub(crate) fn info(name: &str, items: &[u16]) -> Bytes {
    let head = Bytes::new().counted(name).u16(items.len() as u16);
    items.iter().fold(head, |bytes, item| bytes.u16(*item))
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn contexts(export: &str, queries: &[&str]) -> Bytes {
    let head = Bytes::new().counted(export).u32(queries.len() as u32);
    queries.iter().fold(head, |bytes, query| bytes.counted(query))
}

pub(crate) fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A socket with patience and no sense of shame.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
}

impl Peer {
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Peer { stream }
    }

    pub(crate) fn connect(path: &Path) -> Self {
        Peer::new(UnixStream::connect(path).unwrap())
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// The same to a peer that may have had enough.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    pub(crate) fn read<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn read_vec(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.read())
    }
    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.read())
    }
    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.read())
    }

    /// The other side closes, without a word more.
    pub(crate) fn expect_closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Ok(_) => panic!("the peer said {byte:?} instead of closing"),
            Err(error) => panic!("the peer did not close: {error}"),
        }
    }

    /// Reads until the other side closes; how many bytes came. At most `limit` are taken.
    pub(crate) fn drain(&mut self, limit: usize) -> usize {
        let (mut total, mut buffer) = (0, [0; 16 << 10]);
        while total < limit {
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => total += length,
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    break;
                }
                Err(error) => panic!("the peer did not close: {error}"),
            }
        }
        total
    }

    pub(crate) fn hang_up_sending(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// Numbers that look random, the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// splitmix64.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// `good` with something wrong: bytes changed, a field set to an extreme, a run left out, doubled, or cut off.
    pub(crate) fn spoil(&mut self, good: &[u8]) -> Vec<u8> {
        let mut bytes = good.to_vec();
        for _ in 0..=self.below(3) {
            if bytes.is_empty() {
                break;
            }
            let at = self.below(bytes.len());
            let run = (1 + self.below(16)).min(bytes.len() - at);
            match self.below(7) {
                0 | 1 => bytes[at] = self.next() as u8,
                2 => bytes[at] ^= 1 << self.below(8),
                3 => bytes[at..at + run].fill([0, 0xff, 0x7f, 0x80][self.below(4)]),
                4 => drop(bytes.drain(at..at + run)),
                5 => {
                    let doubled = bytes[at..at + run].to_vec();
                    bytes.splice(at..at, doubled);
                }
                _ => bytes.truncate(at),
            }
        }
        bytes
    }
}

/// The most memory that this process ever held, in bytes: of use where each test has a process of its own, as in nextest.
pub(crate) fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() << 10
}

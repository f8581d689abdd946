//! The kernel's NBD client, told over netlink what nbd-client cannot tell it: to wait for a connection that died, and
//! which one replaces it. The messages are those of include/uapi/linux/nbd-netlink.h.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const NETLINK_HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
/// The family that tells the numbers of others, its question, and the attributes of name and number.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// The attribute's payload is attributes.
const NLA_F_NESTED: u16 = 1 << 15;

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// Seconds after which the kernel asks again what was not answered, and those that it waits for a new connection.
const REQUEST_TIMEOUT: u64 = 5;
const DEAD_CONNECTION_TIMEOUT: u64 = 120;

/// A device of the kernel's client, disconnected when dropped.
#[derive(Debug)]
pub struct KernelNbd {
    index: u32,
}

impl KernelNbd {
    /// Connects `/dev/nbdINDEX` to the default export on a Unix socket.
    pub fn connect(index: u32, socket: &Path) -> Self {
        let (stream, size, flags) = handshake(socket);
        let attributes = [
            attribute(NBD_ATTR_INDEX, &index.to_ne_bytes()),
            attribute(NBD_ATTR_SIZE_BYTES, &size.to_ne_bytes()),
            attribute(NBD_ATTR_BLOCK_SIZE_BYTES, &4096_u64.to_ne_bytes()),
            attribute(NBD_ATTR_TIMEOUT, &REQUEST_TIMEOUT.to_ne_bytes()),
            attribute(NBD_ATTR_DEAD_CONN_TIMEOUT, &DEAD_CONNECTION_TIMEOUT.to_ne_bytes()),
            attribute(NBD_ATTR_SERVER_FLAGS, &u64::from(flags).to_ne_bytes()),
            sockets(&stream),
        ];
        let device = KernelNbd { index };
        tell(NBD_CMD_CONNECT, &attributes.concat());
        device
    }

    /// Replaces the connection that died by a new one.
    pub fn reconnect(&self, socket: &Path) {
        let (stream, _, _) = handshake(socket);
        let attributes = [attribute(NBD_ATTR_INDEX, &self.index.to_ne_bytes()), sockets(&stream)];
        tell(NBD_CMD_RECONFIGURE, &attributes.concat());
    }

    /// `/dev/nbdINDEX`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }
}

impl Drop for KernelNbd {
    fn drop(&mut self) {
        if fs::exists(format!("/sys/block/nbd{}/pid", self.index)).unwrap_or(false) {
            tell(NBD_CMD_DISCONNECT, &attribute(NBD_ATTR_INDEX, &self.index.to_ne_bytes()));
        }
    }
}

/// A connection to the default export that is ready for requests, the export's size and its transmission flags.
fn handshake(socket: &Path) -> (UnixStream, u64, u16) {
    let mut stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    // Fixed newstyle without zeroes; EXPORT_NAME of no bytes: the default export.
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    let (size, flags) = export.split_at(8);
    let size = u64::from_be_bytes(size.try_into().unwrap());
    (stream, size, u16::from_be_bytes(flags.try_into().unwrap()))
}

fn sockets(stream: &UnixStream) -> Vec<u8> {
    let descriptor = u32::try_from(stream.as_raw_fd()).unwrap();
    let item = attribute(NBD_SOCK_ITEM | NLA_F_NESTED, &attribute(NBD_SOCK_FD, &descriptor.to_ne_bytes()));
    attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, &item)
}

/// Length, kind, payload, filled up to four bytes.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sends a command to the kernel's client and fails the test unless it agrees.
fn tell(command: u8, attributes: &[u8]) {
    let netlink = netlink();
    let family = family(&netlink);
    ask(&netlink, family, command, NLM_F_ACK, attributes);
    // What it answers comes before what it thinks of the question.
    let acknowledged = loop {
        let messages = receive(&netlink);
        if let Some((_, payload)) = messages.into_iter().find(|(kind, _)| *kind == NLMSG_ERROR) {
            break payload;
        }
    };
    let error = i32::from_ne_bytes(acknowledged[..4].try_into().unwrap());
    assert_eq!(error, 0, "NBD command {command}: {}", std::io::Error::from_raw_os_error(-error));
}

fn netlink() -> OwnedFd {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, Some(GENERIC)).expect("a netlink socket")
}

/// The number that the kernel gave the family of NBD.
fn family(netlink: &OwnedFd) -> u16 {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0");
    ask(netlink, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 0, &name);
    let answers = receive(netlink);
    let (kind, payload) = &answers[0];
    assert_eq!(*kind, GENL_ID_CTRL, "the nbd module is not loaded");
    let mut rest = &payload[GENERIC_HEADER..];
    while let [a, b, c, d, ..] = *rest {
        let (length, kind) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
        if kind == CTRL_ATTR_FAMILY_ID {
            return u16::from_ne_bytes([rest[4], rest[5]]);
        }
        rest = rest.get(usize::from(length).max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    panic!("the family of NBD has no number")
}

fn ask(netlink: &OwnedFd, family: u16, command: u8, flags: u16, attributes: &[u8]) {
    let length = u32::try_from(NETLINK_HEADER + GENERIC_HEADER + attributes.len()).unwrap();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence number and port: there is but one question at a time.
    message.extend_from_slice(&[0; 8]);
    // The command, the first version of the family, two spare bytes.
    message.extend_from_slice(&[command, 1, 0, 0]);
    message.extend_from_slice(attributes);
    rustix::net::sendto(netlink, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).expect("sent");
}

/// Kinds and payloads of the next messages.
fn receive(netlink: &OwnedFd) -> Vec<(u16, Vec<u8>)> {
    let mut answer = vec![0; 16 << 10];
    let (count, _) =
        rustix::net::recv(netlink, answer.as_mut_slice(), RecvFlags::empty()).expect("an answer");
    let mut rest = &answer[..count];
    let mut messages = Vec::new();
    while rest.len() >= NETLINK_HEADER {
        let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
        let kind = u16::from_ne_bytes(rest[4..6].try_into().unwrap());
        messages.push((kind, rest[NETLINK_HEADER..length].to_vec()));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

//! As much of NBD as load and an echo loop need, with nothing between it and the socket: the client's and the server's
//! handshake, a request, and where a reply ends. The specification is NetworkBlockDevice/nbd, doc/proto.md.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Fixed newstyle, no padding of zeroes: of server and client alike.
const HANDSHAKE_FLAGS: u16 = 3;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 1 << 31 | 1;
const INFO_EXPORT: u16 = 0;
/// HAS_FLAGS and CAN_MULTI_CONN.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 8;
/// The last chunk of a reply.
const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_IS_ERROR: u16 = 1 << 15;

/// The longest answer to an option that is taken.
const OPTION_MAX: usize = 1 << 16;

/// Bytes of a request without its data.
pub(crate) const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply without its data.
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
const CHUNK_BYTES: usize = 20;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Connects to an export and goes over to transmission; returns the connection and the export's size in bytes.
pub(crate) fn connect(socket: &Path, export: &str, structured: bool) -> Result<(UnixStream, u64)> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).context("the server's greeting")?;
    ensure!(be64(&greeting, 0) == NBD_MAGIC && be64(&greeting, 8) == OPTION_MAGIC, "no newstyle NBD server");
    stream.write_all(&u32::from(HANDSHAKE_FLAGS).to_be_bytes())?;
    if structured {
        option(&mut stream, OPTION_STRUCTURED_REPLY, &[])?;
        ensure!(answer(&mut stream)?.0 == REPLY_ACK, "the server has no structured replies");
    }
    let mut wanted = (export.len() as u32).to_be_bytes().to_vec();
    wanted.extend_from_slice(export.as_bytes());
    wanted.extend_from_slice(&0_u16.to_be_bytes());
    option(&mut stream, OPTION_GO, &wanted)?;
    let mut size = None;
    loop {
        let (kind, payload) = answer(&mut stream)?;
        match kind {
            REPLY_INFO if payload.len() >= 12 && be16(&payload, 0) == INFO_EXPORT => {
                size = Some(be64(&payload, 2));
            }
            REPLY_INFO => {}
            REPLY_ACK => return Ok((stream, size.context("the server did not say the export's size")?)),
            refused => bail!("export '{export}' was refused: {refused:#x}"),
        }
    }
}

fn option(stream: &mut UnixStream, option: u32, data: &[u8]) -> Result<()> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(data);
    Ok(stream.write_all(&message)?)
}

/// The kind of an answer to an option, and its payload.
fn answer(stream: &mut UnixStream) -> Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header).context("the server's answer to an option")?;
    let length = be32(&header, 16) as usize;
    ensure!(be64(&header, 0) == OPTION_REPLY_MAGIC && length <= OPTION_MAX, "no answer to an option");
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((be32(&header, 12), payload))
}

/// The server's side: any export that GO names is one of `size` bytes, and nothing else is offered.
pub(crate) fn accept(stream: &mut UnixStream, size: u64) -> Result<()> {
    let mut greeting = NBD_MAGIC.to_be_bytes().to_vec();
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (wanted, length) = (be32(&header, 8), be32(&header, 12) as usize);
        ensure!(be64(&header, 0) == OPTION_MAGIC && length <= OPTION_MAX, "no option");
        stream.read_exact(&mut vec![0; length])?;
        let reply = |kind: u32, payload: &[u8]| {
            let mut message = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            for word in [wanted, kind, payload.len() as u32] {
                message.extend_from_slice(&word.to_be_bytes());
            }
            message.extend_from_slice(payload);
            message
        };
        if wanted != OPTION_GO {
            stream.write_all(&reply(REPLY_UNSUPPORTED, &[]))?;
            continue;
        }
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&size.to_be_bytes());
        info.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
        return Ok(stream.write_all(&[reply(REPLY_INFO, &info), reply(REPLY_ACK, &[])].concat())?);
    }
}

/// A request as an echo loop looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    pub(crate) fn append_to(self, output: &mut Vec<u8>) {
        output.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        output.extend_from_slice(&0_u16.to_be_bytes());
        output.extend_from_slice(&self.command.to_be_bytes());
        output.extend_from_slice(&self.cookie.to_be_bytes());
        output.extend_from_slice(&self.offset.to_be_bytes());
        output.extend_from_slice(&self.length.to_be_bytes());
    }

    /// The request at the start of `bytes`; `None` if it is not there whole.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Request>> {
        let Some(bytes) = bytes.get(..REQUEST_BYTES) else { return Ok(None) };
        ensure!(be32(bytes, 0) == REQUEST_MAGIC, "no request: {:#x}", be32(bytes, 0));
        let (command, cookie) = (be16(bytes, 6), be64(bytes, 8));
        Ok(Some(Request { command, cookie, offset: be64(bytes, 16), length: be32(bytes, 24) }))
    }
}

/// The header of a reply without an error.
pub(crate) fn simple_reply(cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut reply = [0; SIMPLE_REPLY_BYTES];
    reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[8..].copy_from_slice(&cookie.to_be_bytes());
    reply
}

/// A reply, or one chunk of a structured one, as it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: bool,
    /// Nothing more comes for this request.
    pub(crate) done: bool,
    /// Bytes of the header; the rest of the message comes behind it.
    pub(crate) header: usize,
    /// Bytes behind the header; `None` for a simple reply: the request's length if it was a read that went well.
    pub(crate) payload: Option<usize>,
    /// The payload begins with an offset, behind which data lies.
    pub(crate) is_data: bool,
}

impl Reply {
    /// The reply at the start of `bytes`; `None` if its header is not there whole.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Reply>> {
        if bytes.len() < SIMPLE_REPLY_BYTES {
            return Ok(None);
        }
        let cookie = be64(bytes, 8);
        match be32(bytes, 0) {
            SIMPLE_REPLY_MAGIC => {
                let (error, header) = (be32(bytes, 4) != 0, SIMPLE_REPLY_BYTES);
                Ok(Some(Reply { cookie, error, done: true, header, payload: None, is_data: false }))
            }
            CHUNK_MAGIC if bytes.len() < CHUNK_BYTES => Ok(None),
            CHUNK_MAGIC => {
                let (flags, kind) = (be16(bytes, 4), be16(bytes, 6));
                Ok(Some(Reply {
                    cookie,
                    error: kind & CHUNK_IS_ERROR != 0,
                    done: flags & CHUNK_DONE != 0,
                    header: CHUNK_BYTES,
                    payload: Some(be32(bytes, 16) as usize),
                    is_data: kind == CHUNK_OFFSET_DATA,
                }))
            }
            magic => bail!("no reply: {magic:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_are_found_where_they_end() {
        let request = Request { command: WRITE, cookie: 7, offset: 1 << 40, length: 4096 };
        let mut bytes = Vec::new();
        request.append_to(&mut bytes);
        assert_eq!(bytes.len(), REQUEST_BYTES);
        assert_eq!(Request::parse(&bytes).unwrap(), Some(request));
        assert_eq!(Request::parse(&bytes[..27]).unwrap(), None);
        assert!(Reply::parse(&bytes).is_err() && Request::parse(&simple_reply(1).repeat(2)).is_err());

        let simple = Reply::parse(&simple_reply(9)).unwrap().unwrap();
        assert_eq!((simple.cookie, simple.error, simple.done, simple.payload), (9, false, true, None));
        let mut chunk = CHUNK_MAGIC.to_be_bytes().to_vec();
        chunk.extend_from_slice(&[0, 1, 0x80, 1]);
        chunk.extend_from_slice(&5_u64.to_be_bytes());
        assert_eq!(Reply::parse(&chunk).unwrap(), None);
        chunk.extend_from_slice(&6_u32.to_be_bytes());
        let chunk = Reply::parse(&chunk).unwrap().unwrap();
        assert_eq!((chunk.cookie, chunk.error, chunk.done, chunk.payload), (5, true, true, Some(6)));
    }

    #[test]
    fn both_handshakes_agree() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || accept(&mut listener.accept().unwrap().0, 123_456));
        let (_stream, size) = connect(&socket, "any", false).unwrap();
        assert_eq!(size, 123_456);
        server.join().unwrap().unwrap();
    }
}

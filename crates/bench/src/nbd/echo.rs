//! What the socket itself can do: a loop that answers NBD requests with prepared bytes, without any device. It reads
//! requests in bulk and answers all it found with one write; only cookies are filled in.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use loam_block::size::ByteSize;

use super::wire::{self, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES};

/// Requests, and the data of writes, are read this many bytes at a time.
const INPUT_BYTES: usize = 1 << 20;
/// The most bytes that are answered with one write, if it is more than one answer.
const OUTPUT_BYTES: usize = 8 << 20;

/// The longest request that is answered.
const LENGTH_MAX: usize = 32 << 20;

/// `loam bench nbd-echo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The Unix socket to make.
    socket: PathBuf,
    /// The size that it claims.
    size: ByteSize,
}

/// Serves until it is killed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let listener = UnixListener::bind(&options.socket);
    serve(
        &listener.with_context(|| format!("cannot listen on {}", options.socket.display()))?,
        options.size.0,
    );
    Ok(())
}

/// A thread for each connection; a connection that does not keep to the protocol ends.
pub(super) fn serve(listener: &UnixListener, size: u64) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            if let Err(error) = echo(stream, size) {
                eprintln!("loam bench: echo: {error:#}");
            }
        });
    }
}

/// Answers to reads of one length, prepared; only the cookies change.
struct Answers {
    bytes: Vec<u8>,
    /// Of an answer.
    length: usize,
    filled: usize,
}

impl Answers {
    fn new(data: usize) -> Self {
        let length = SIMPLE_REPLY_BYTES + data;
        let count = (OUTPUT_BYTES / length).max(1);
        Answers { bytes: vec![0; count * length], length, filled: 0 }
    }

    /// Adds an answer of `data` bytes; sends those before it if there is no room, or if they had another length.
    fn push(&mut self, stream: &mut UnixStream, cookie: u64, data: usize) -> Result<()> {
        if self.length != SIMPLE_REPLY_BYTES + data {
            self.send(stream)?;
            *self = Answers::new(data);
        }
        if self.filled == self.bytes.len() {
            self.send(stream)?;
        }
        let answer = &mut self.bytes[self.filled..self.filled + self.length];
        answer[..SIMPLE_REPLY_BYTES].copy_from_slice(&wire::simple_reply(cookie));
        self.filled += self.length;
        Ok(())
    }

    fn send(&mut self, stream: &mut UnixStream) -> Result<()> {
        stream.write_all(&self.bytes[..self.filled])?;
        self.filled = 0;
        Ok(())
    }
}

fn echo(mut stream: UnixStream, size: u64) -> Result<()> {
    wire::accept(&mut stream, size)?;
    let mut input = vec![0; INPUT_BYTES];
    let mut answers = Answers::new(0);
    let mut have = 0;
    // A write whose data has not come whole: its cookie, and how many bytes are to come.
    let mut write: Option<(u64, usize)> = None;
    loop {
        let count = stream.read(&mut input[have..])?;
        if count == 0 {
            return Ok(());
        }
        have += count;
        let mut taken = 0;
        loop {
            if let Some((cookie, left)) = write.take() {
                let here = left.min(have - taken);
                taken += here;
                if here < left {
                    write = Some((cookie, left - here));
                    break;
                }
                answers.push(&mut stream, cookie, 0)?;
            }
            let Some(request) = Request::parse(&input[taken..have])? else { break };
            taken += REQUEST_BYTES;
            let length = request.length as usize;
            ensure!(length <= LENGTH_MAX, "a request of {length} bytes");
            match request.command {
                wire::READ => answers.push(&mut stream, request.cookie, length)?,
                wire::WRITE => write = Some((request.cookie, length)),
                _ => return Ok(()),
            }
        }
        answers.send(&mut stream)?;
        input.copy_within(taken..have, 0);
        have -= taken;
    }
}

//! Raw load on an NBD server: a thread for each connection, blocking sockets, replies read in bulk, new requests sent in
//! one batch. What a full client costs would hide the server. Bytes that were written are stamped with their place, and
//! what is read is looked at, so that a server is not fast by being wrong.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use loam_block::size::ByteSize;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::wire::{self, Reply, Request, SIMPLE_REPLY_BYTES};

/// Each run of this many bytes, so aligned, begins with its own offset on the device, as a big-endian number.
pub(super) const STAMP_EVERY: u64 = 4096;
/// The rest of what is written.
const FILLER: u8 = 0x5a;
/// Replies are read this many bytes at a time, or two at least.
const INPUT_BYTES: usize = 1 << 20;
/// Writes up to this length lie in the batch of requests; longer ones are sent one by one from where they are.
const BATCHED_WRITE: usize = 16 << 10;
/// Cookies hold the number of the request's slot in these bits; above it a number that makes them differ.
const SLOT_BITS: u32 = 16;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Operation {
    /// Reads at random.
    Randread,
    /// Reads in order, from the start again at the end.
    Read,
    /// Writes at random.
    Randwrite,
    /// Writes in order, from the start again at the end.
    Write,
    /// Writes everything once.
    Fill,
}

impl Operation {
    fn is_write(self) -> bool {
        matches!(self, Operation::Randwrite | Operation::Write | Operation::Fill)
    }

    fn is_random(self) -> bool {
        matches!(self, Operation::Randread | Operation::Randwrite)
    }
}

/// `loam bench nbd-load`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The server's Unix socket.
    socket: PathBuf,
    operation: Operation,
    /// Bytes of a request.
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    block: ByteSize,
    /// Requests in flight on each connection.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=i64::from(u16::MAX)))]
    depth: u32,
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: u32,
    /// For how long new requests are made.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    #[arg(long, value_name = "NAME", default_value = "")]
    export: String,
    /// Ask for structured replies.
    #[arg(long)]
    structured: bool,
    /// Do not look at what is read: the server has no device.
    #[arg(long)]
    unverified: bool,
}

/// What a run came to.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Outcome {
    pub(super) requests: u64,
    pub(super) errors: u64,
    /// Blocks that did not hold what they should.
    pub(super) wrong: u64,
    pub(super) seconds: f64,
    /// At depth 1 only.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
}

/// Runs the load and prints [`Outcome`] as JSON.
pub(crate) fn run(options: &Options) -> Result<()> {
    println!("{}", serde_json::to_string(&load(options)?)?);
    Ok(())
}

/// What the command line of [`run`] is for a load on `socket`.
pub(super) fn arguments(
    socket: &Path,
    operation: Operation,
    (block, depth, connections): (u64, u32, u32),
    seconds: f64,
) -> Vec<String> {
    let operation = operation.to_possible_value().map_or_else(String::new, |value| value.get_name().into());
    let mut arguments = vec!["bench".into(), "nbd-load".into(), socket.display().to_string(), operation];
    arguments.extend([format!("--block={block}"), format!("--depth={depth}")]);
    arguments.extend([format!("--connections={connections}"), format!("--seconds={seconds}")]);
    arguments
}

fn load(options: &Options) -> Result<Outcome> {
    let block = options.block.0;
    ensure!(
        block.is_multiple_of(STAMP_EVERY) && block <= 32 << 20,
        "blocks are multiples of 4 KiB, up to 32 MiB"
    );
    let connections: Vec<_> = (0..options.connections)
        .map(|_| wire::connect(&options.socket, &options.export, options.structured))
        .collect::<Result<_>>()?;
    let barrier = Barrier::new(connections.len() + 1);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, (stream, size)) in (0..).zip(connections) {
            let mut worker = Worker::new(options, stream, size, number)?;
            let barrier = &barrier;
            threads.push(scope.spawn(move || {
                barrier.wait();
                worker.run().map(|()| worker)
            }));
        }
        // Taken before: on a busy machine this thread may run again only when the others have finished.
        let started = Instant::now();
        barrier.wait();
        let mut outcome = Outcome::default();
        let mut latencies = Vec::new();
        for thread in threads {
            let worker = thread.join().map_err(|_| anyhow!("a thread of the load panicked"))??;
            outcome.requests += worker.requests;
            outcome.errors += worker.errors;
            outcome.wrong += worker.wrong;
            latencies.extend(worker.latencies);
        }
        outcome.seconds = started.elapsed().as_secs_f64();
        latencies.sort_unstable();
        let quantile =
            |q: f64| latencies.get((latencies.len() as f64 * q) as usize).map(|ns| f64::from(*ns) / 1e3);
        (outcome.p50_us, outcome.p99_us) = (quantile(0.5), quantile(0.99));
        Ok(outcome)
    })
}

/// One connection and what is in flight on it.
struct Worker<'a> {
    options: &'a Options,
    stream: UnixStream,
    block: usize,
    blocks: u64,
    random: SmallRng,
    /// The next block in order.
    next: u64,
    /// Where requests in flight lie, by slot, and slots without one.
    offsets: Vec<u64>,
    free: Vec<u32>,
    issued: u64,
    sent: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
    data: Vec<u8>,
    requests: u64,
    errors: u64,
    wrong: u64,
    latencies: Vec<u32>,
}

impl<'a> Worker<'a> {
    fn new(options: &'a Options, stream: UnixStream, size: u64, number: u64) -> Result<Self> {
        let block = options.block.0 as usize;
        let blocks = size / options.block.0;
        ensure!(blocks > 0, "an export of {size} bytes has no block of {block}");
        Ok(Worker {
            options,
            stream,
            block,
            blocks,
            random: SmallRng::seed_from_u64(number),
            next: blocks / u64::from(options.connections) * number,
            offsets: vec![0; options.depth as usize],
            free: (0..options.depth).collect(),
            issued: 0,
            sent: Instant::now(),
            input: vec![0; INPUT_BYTES.max(2 * (block + 64))],
            output: Vec::new(),
            data: vec![FILLER; block],
            requests: 0,
            errors: 0,
            wrong: 0,
            latencies: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs_f64(self.options.seconds);
        let depth = self.offsets.len();
        let mut have = 0;
        loop {
            if Instant::now() < deadline || self.options.operation == Operation::Fill {
                self.send()?;
            }
            if self.free.len() == depth {
                break;
            }
            let count = self.stream.read(&mut self.input[have..]).context("reading replies")?;
            ensure!(count > 0, "the server hung up");
            have += count;
            let taken = self.take(have)?;
            self.input.copy_within(taken..have, 0);
            have -= taken;
        }
        let bye = Request { command: wire::DISCONNECT, cookie: 0, offset: 0, length: 0 };
        self.output.clear();
        bye.append_to(&mut self.output);
        Ok(self.stream.write_all(&self.output)?)
    }

    /// Fills every free slot, in one batch.
    fn send(&mut self) -> Result<()> {
        let is_write = self.options.operation.is_write();
        self.output.clear();
        while let Some(slot) = self.free.pop() {
            let Some(block) = self.choose() else {
                self.free.push(slot);
                break;
            };
            let offset = block * self.block as u64;
            self.offsets[slot as usize] = offset;
            let cookie = self.issued << SLOT_BITS | u64::from(slot);
            self.issued += 1;
            let command = if is_write { wire::WRITE } else { wire::READ };
            let request = Request { command, cookie, offset, length: self.block as u32 };
            request.append_to(&mut self.output);
            if is_write {
                stamp(offset, &mut self.data);
                if self.block <= BATCHED_WRITE {
                    self.output.extend_from_slice(&self.data);
                } else {
                    self.send_long()?;
                }
            }
        }
        self.sent = Instant::now();
        Ok(self.stream.write_all(&self.output)?)
    }

    /// Sends the batch so far with the data of its last request behind it.
    fn send_long(&mut self) -> Result<()> {
        let parts = [IoSlice::new(&self.output), IoSlice::new(&self.data)];
        let sent = self.stream.write_vectored(&parts)?;
        let header = self.output.len();
        self.stream.write_all(&self.output[sent.min(header)..])?;
        self.stream.write_all(&self.data[sent.saturating_sub(header)..])?;
        self.output.clear();
        Ok(())
    }

    fn choose(&mut self) -> Option<u64> {
        if self.options.operation.is_random() {
            return Some(self.random.random_range(0..self.blocks));
        }
        if self.options.operation == Operation::Fill && self.next == self.blocks {
            return None;
        }
        let block = self.next % self.blocks;
        self.next = block + 1;
        Some(block)
    }

    /// Takes whole replies off the first `have` bytes of the input; returns how many bytes they were.
    fn take(&mut self, have: usize) -> Result<usize> {
        let is_write = self.options.operation.is_write();
        let mut taken = 0;
        while let Some(reply) = Reply::parse(&self.input[taken..have])? {
            let answered = if is_write || reply.error { 0 } else { self.block };
            let payload = reply.payload.unwrap_or(answered);
            let end = taken + reply.header + payload;
            ensure!(
                end - taken <= self.input.len(),
                "a reply of {payload} bytes to a request of {}",
                self.block
            );
            if end > have {
                break;
            }
            let slot = (reply.cookie & ((1 << SLOT_BITS) - 1)) as u32;
            let offset = self.offsets.get(slot as usize).context("a reply to no request")?;
            if !self.options.unverified && payload > 0 && !reply.error {
                let (at, bytes) = match reply.header {
                    SIMPLE_REPLY_BYTES => (*offset, &self.input[taken + reply.header..end]),
                    _ => chunk(&self.input[taken + reply.header..end], reply)?,
                };
                self.wrong += count_wrong(at, bytes);
            }
            self.errors += u64::from(reply.error);
            taken = end;
            if reply.done {
                self.requests += 1;
                self.free.push(slot);
                if self.options.depth == 1 {
                    self.latencies.push(self.sent.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32);
                }
            }
        }
        Ok(taken)
    }
}

/// Where the data of a structured chunk lies on the device, and the data: none in a hole.
fn chunk(payload: &[u8], reply: Reply) -> Result<(u64, &[u8])> {
    let (offset, data) = payload.split_first_chunk().context("a chunk without an offset")?;
    Ok((u64::from_be_bytes(*offset), if reply.is_data { data } else { &[] }))
}

/// Writes the stamps of `data`, which lies at `offset`.
pub(super) fn stamp(offset: u64, data: &mut [u8]) {
    let places = (offset..).step_by(STAMP_EVERY as usize);
    for (place, piece) in places.zip(data.chunks_mut(STAMP_EVERY as usize)) {
        piece[..8].copy_from_slice(&place.to_be_bytes());
    }
}

/// How many stamps of `data`, which lies at `offset`, are not there.
fn count_wrong(offset: u64, data: &[u8]) -> u64 {
    let places = (offset..).step_by(STAMP_EVERY as usize);
    let wrong = |(place, piece): &(u64, &[u8])| !piece.starts_with(&place.to_be_bytes());
    places.zip(data.chunks(STAMP_EVERY as usize)).filter(wrong).count() as u64
}

/// Bytes as a run of `length` at `offset` holds them after a write.
pub(crate) fn stamped(offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![FILLER; length];
    stamp(offset, &mut data);
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::echo;

    fn options(socket: PathBuf, operation: Operation, block: u64, unverified: bool) -> Options {
        let (depth, connections, seconds) = (8, 2, 0.1);
        let (export, block) = (String::new(), ByteSize(block));
        Options {
            socket,
            operation,
            block,
            depth,
            connections,
            seconds,
            export,
            structured: false,
            unverified,
        }
    }

    #[test]
    fn load_on_an_echo_loop_is_answered_and_wrong_bytes_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || echo::serve(&listener, 8 << 20));
        for (operation, block) in [
            (Operation::Randread, 4096),
            (Operation::Read, 1 << 20),
            (Operation::Randwrite, 4096),
            (Operation::Write, 1 << 20),
        ] {
            let outcome = load(&options(socket.clone(), operation, block, true)).unwrap();
            assert!(outcome.requests > 8 && outcome.errors == 0 && outcome.wrong == 0, "{outcome:?}");
        }
        let fill =
            load(&Options { connections: 1, ..options(socket.clone(), Operation::Fill, 1 << 20, true) });
        assert_eq!(fill.unwrap().requests, 8);
        let wrong = load(&options(socket, Operation::Randread, 4096, false)).unwrap();
        assert!(wrong.wrong > wrong.requests / 2, "an echo loop has no device: {wrong:?}");
    }

    #[test]
    fn each_stamp_is_looked_at() {
        let mut data = stamped(8192, 12288);
        assert_eq!(count_wrong(8192, &data), 0);
        assert_eq!(count_wrong(4096, &data), 3);
        data[4096] ^= 1;
        assert_eq!(count_wrong(8192, &data), 1);
    }
}

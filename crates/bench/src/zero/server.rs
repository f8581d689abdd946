//! Servers in memory on which a write takes 20 ms for each 256 KiB, and what they tell of the commands they got.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::plan::Zeroing;
use crate::nbd::server::{Kind, loam};
use crate::nbd::wire::{self, Reply, Request, SIMPLE_REPLY_BYTES};
use crate::record::Metrics;

/// For each piece of data.
const WRITE_DELAY: &str = "20ms";
/// For each write of zeroes where zeroing is fast, however long.
const ZERO_DELAY: &str = "5ms";
/// The longest piece of data; where zeroing is slow, the longest piece of zeroes as well.
const PIECE: &str = "256k";
/// Bytes that are read at a time when a copy is checked.
const CHECK_BYTES: u64 = 256 << 10;

/// The command that serves `size` bytes of memory on `socket` and logs to `log`. Outermost first: commands are counted
/// as the client sent them, then they are refused, or split, and each piece takes its time. No extents are told, so that
/// no copier sees that the destination is zero already.
pub(super) fn command(kind: Kind, zeroing: Zeroing, size: u64, socket: &Path, log: &Path) -> Result<Command> {
    let zero_delay = if zeroing == Zeroing::Slow { WRITE_DELAY } else { ZERO_DELAY };
    if kind == Kind::Loam {
        return serve(zeroing, zero_delay, size, socket, log);
    }
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--unix"]).arg(socket);
    command.args(["log", "nozero", "blocksize", "delay", "noextents"].map(|name| format!("--filter={name}")));
    command.args(["memory", &size.to_string(), &format!("logfile={}", log.display())]);
    command.args([
        format!("delay-write={WRITE_DELAY}"),
        format!("delay-zero={zero_delay}"),
        format!("maxdata={PIECE}"),
    ]);
    match zeroing {
        Zeroing::Fast => command.args(["zeromode=plugin", "fastzeromode=default"]),
        Zeroing::Slow => command.args(["zeromode=plugin", "fastzeromode=slow", &format!("maxlen={PIECE}")]),
        Zeroing::None => command.arg("zeromode=none"),
    };
    Ok(command)
}

fn serve(zeroing: Zeroing, zero_delay: &str, size: u64, socket: &Path, log: &Path) -> Result<Command> {
    let (nozero, split) = match zeroing {
        Zeroing::Fast => ("nozero,zero=plugin,fast-zero=default", String::new()),
        Zeroing::Slow => ("nozero,zero=plugin,fast-zero=slow", format!(",maximum-length={PIECE}")),
        Zeroing::None => ("nozero,zero=none", String::new()),
    };
    let layers = [
        format!("log,file={}", log.display()),
        nozero.to_string(),
        format!("blocksize,maximum={PIECE}{split}"),
        format!("delay,write={WRITE_DELAY},zero={zero_delay}"),
        "noextents".to_string(),
    ];
    let mut command = loam()?;
    command.args(["serve", &format!("memory:{size}"), "--nbd", &format!("unix:{}", socket.display())]);
    for layer in layers {
        command.args(["--layer", &layer]);
    }
    Ok(command)
}

/// Commands that change something, as clients sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Commands {
    writes: u64,
    /// Writes of zeroes, fast ones among them.
    zeroes: u64,
    fast_zeroes: u64,
    /// Writes of zeroes that failed.
    refused_zeroes: u64,
    trims: u64,
}

impl Commands {
    /// Of the log of nbdkit's log filter, or of our layer, which has the same form.
    pub(super) fn of(log: &str) -> Commands {
        let mut found = Commands::default();
        for line in log.lines() {
            if line.contains("...Zero id=") {
                found.refused_zeroes += u64::from(line.contains(" return=-1"));
                continue;
            }
            let begins =
                |name: &str| line.contains(&format!(" {name} id=")) && line.trim_end().ends_with("...");
            found.writes += u64::from(begins("Write"));
            found.zeroes += u64::from(begins("Zero"));
            found.fast_zeroes += u64::from(begins("Zero") && line.contains(" fast=1"));
            found.trims += u64::from(begins("Trim"));
        }
        found
    }

    pub(super) fn metrics(self) -> Metrics {
        let Commands { writes, zeroes, fast_zeroes, refused_zeroes, trims } = self;
        let all = writes + zeroes + trims;
        let named = [
            ("commands", all),
            ("writes", writes),
            ("zeroes", zeroes),
            ("fast_zeroes", fast_zeroes),
            ("refused_zeroes", refused_zeroes),
            ("trims", trims),
        ];
        named.map(|(name, count)| (name.to_string(), count as f64)).into()
    }
}

/// Reads an export and fails unless it holds what `expected` says of a run at an offset of a length.
pub(super) fn check(socket: &Path, size: u64, expected: impl Fn(u64, usize) -> Vec<u8>) -> Result<()> {
    let (mut stream, found) = wire::connect(socket, "", false)?;
    ensure!(found == size, "the export has {found} bytes, not {size}");
    let mut reader = stream.try_clone()?;
    let length = |offset: u64| CHECK_BYTES.min(size - offset);
    let offsets = || (0..size).step_by(CHECK_BYTES as usize);
    // Requests go out beside: nobody waits for room in a socket.
    let sender = std::thread::spawn({
        let requests: Vec<Request> = offsets()
            .map(|offset| Request {
                command: wire::READ,
                cookie: offset,
                offset,
                length: length(offset) as u32,
            })
            .collect();
        move || {
            let mut bytes = Vec::new();
            requests.into_iter().for_each(|request| request.append_to(&mut bytes));
            stream.write_all(&bytes)
        }
    });
    for _ in offsets() {
        let mut header = [0; SIMPLE_REPLY_BYTES];
        reader.read_exact(&mut header)?;
        let reply = Reply::parse(&header)?.context("a simple reply")?;
        ensure!(!reply.error && reply.cookie < size, "reading the copy at {} failed", reply.cookie);
        let mut bytes = vec![0; length(reply.cookie) as usize];
        reader.read_exact(&mut bytes)?;
        ensure!(
            bytes == expected(reply.cookie, bytes.len()),
            "the copy differs in the {} bytes at {}",
            bytes.len(),
            reply.cookie
        );
    }
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    let mut bye = Vec::new();
    Request { command: wire::DISCONNECT, cookie: 0, offset: 0, length: 0 }.append_to(&mut bye);
    Ok(reader.write_all(&bye)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_counted_once() {
        let log = "\
2026-11-21 12:00:00.1 connection=1 Connect export=\"\" tls=0 ...
2026-11-21 12:00:00.2 connection=1 Zero id=1 offset=0x0 count=0x6400000 trim=1 fua=0 fast=1 ...
2026-11-21 12:00:00.2 connection=1 ...Zero id=1 return=-1 error=EOPNOTSUPP
2026-11-21 12:00:00.3 connection=1 Write id=2 offset=0x0 count=0x100000 fua=0 ...
2026-11-21 12:00:00.3 connection=1 Zero id=3 offset=0x100000 count=0x100000 trim=1 fua=0 fast=0 ...
2026-11-21 12:00:00.4 connection=1 ...Write id=2 return=0
1763729871.123456 Write id=7 offset=0x1000 count=0x40000 fua=1 ...
1763729871.144130 ...Zero id=8 return=-1 errno=95 us=30: zeroes of ...: memory has to be written
1763729871.144130 Read id=9 offset=0x0 count=0x1000 ...
";
        let expected = Commands { writes: 2, zeroes: 2, fast_zeroes: 1, refused_zeroes: 2, trims: 0 };
        assert_eq!(Commands::of(log), expected);
        assert_eq!(expected.metrics()["commands"], 4.0);
    }
}

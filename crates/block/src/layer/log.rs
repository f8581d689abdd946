//! `log`: a line when a request begins and one when it is answered, in the form of nbdkit's log filter, so that what
//! reads those logs reads these:
//!
//! ```text
//! 1763729871.123456 Write id=7 offset=0x1000 count=0x40000 fua=1 ...
//! 1763729871.144012 ...Write id=7 return=0 us=20556
//! 1763729871.144100 Zero id=8 offset=0x0 count=0x100000 fast=1 ...
//! 1763729871.144130 ...Zero id=8 return=-1 errno=95 us=30: zeroes of ...: memory has to be written
//! ```
//!
//! Times are seconds since 1970. A request that its caller abandons ends with `return=-1 abandoned`. Where the log cannot
//! be written, standard error is told once and requests go on.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use super::around::{Around, Layered, Operation, Request, TakeBack};
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use crate::{BlockDevice, Error, Io, Result};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "log",
    summary: "a line for each request and its answer (nbdkit: log)",
    parameters: &[
        parameter("file", "PATH", "standard error", "where to"),
        parameter("append", "true|false", "false", "keep what the file holds"),
    ],
};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    file: Option<PathBuf>,
    append: bool,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        let file = parameters.text("file").map(PathBuf::from);
        Ok(Options { file, append: parameters.yes("append", false)? })
    }
}

struct Sink {
    out: Box<dyn Write + Send>,
    failed: bool,
}

struct Log {
    sink: Mutex<Sink>,
    next_id: AtomicU64,
}

impl Log {
    fn write(&self, lines: &str) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let written = sink.out.write_all(lines.as_bytes());
        if let Err(error) = written
            && !std::mem::replace(&mut sink.failed, true)
        {
            let _ = writeln!(std::io::stderr(), "loam: log layer: lines are lost: {error}");
        }
    }

    fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// One request, to be written when it begins and when it ends.
struct Entry {
    id: u64,
    request: Request,
    begun: (SystemTime, Instant),
}

impl Entry {
    fn name(&self) -> &'static str {
        match self.request.operation {
            Operation::Read => "Read",
            Operation::Write => "Write",
            Operation::Zero => "Zero",
            Operation::Trim => "Trim",
            Operation::Flush => "Flush",
            Operation::Extents => "Extents",
            Operation::Prefetch => "Cache",
        }
    }

    fn beginning(&self, line: &mut String) {
        push_time(line, self.begun.0);
        let _ = write!(line, " {} id={}", self.name(), self.id);
        if self.request.operation != Operation::Flush {
            let _ = write!(line, " offset={:#x} count={:#x}", self.request.offset, self.request.length);
        }
        let flags = self.request.flags;
        for (set, word) in
            [(flags.fua, " fua=1"), (flags.no_hole, " no_hole=1"), (flags.fast_only, " fast=1")]
        {
            line.push_str(if set { word } else { "" });
        }
        line.push_str(" ...\n");
    }

    fn end(&self, line: &mut String, error: Option<&Error>) {
        push_time(line, SystemTime::now());
        let (name, id, us) = (self.name(), self.id, self.begun.1.elapsed().as_micros());
        let _ = match error {
            None => writeln!(line, " ...{name} id={id} return=0 us={us}"),
            Some(error) => {
                writeln!(line, " ...{name} id={id} return=-1 errno={} us={us}: {error}", error.errno())
            }
        };
    }

    fn abandoned(&self) -> String {
        let mut line = String::new();
        push_time(&mut line, SystemTime::now());
        let us = self.begun.1.elapsed().as_micros();
        let _ = writeln!(line, " ...{} id={} return=-1 abandoned us={us}", self.name(), self.id);
        line
    }
}

fn push_time(line: &mut String, time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let _ = write!(line, "{}.{:06}", since.as_secs(), since.subsec_micros());
}

impl Around for Log {
    fn around<'a, T: Send + Unpin + 'a>(
        &'a self,
        request: Request,
        run: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        let begun = (SystemTime::now(), Instant::now());
        match run() {
            Io::Ready(result) => {
                let entry = Entry { id: self.id(), request, begun };
                let mut lines = String::with_capacity(160);
                entry.beginning(&mut lines);
                entry.end(&mut lines, result.as_ref().err());
                self.write(&lines);
                Io::Ready(result)
            }
            // What is dropped unpolled was never made.
            Io::Pending(future) => Io::pending(async move {
                let entry = Entry { id: self.id(), request, begun };
                let mut line = String::with_capacity(160);
                entry.beginning(&mut line);
                self.write(&line);
                let abandoned = TakeBack::new(|| self.write(&entry.abandoned()));
                let result = future.await;
                abandoned.keep();
                line.clear();
                entry.end(&mut line, result.as_ref().err());
                self.write(&line);
                result
            }),
        }
    }
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    let out: Box<dyn Write + Send> = match &options.file {
        None => Box::new(std::io::stderr()),
        Some(path) => {
            let mut open = OpenOptions::new();
            open.create(true).append(options.append).write(true).truncate(!options.append);
            let file = open
                .open(path)
                .map_err(|source| Error::from_os(format!("layer log: opening {}", path.display()), source))?;
            Box::new(file)
        }
    };
    let sink = Mutex::new(Sink { out, failed: false });
    Ok(Arc::new(Layered::new(inner, Log { sink, next_id: AtomicU64::new(1) })))
}

#[cfg(test)]
mod tests {
    use crate::layer::{LayerSpec, wrap_all};
    use crate::{MemoryDevice, WriteFlags, ZeroFlags};
    use std::sync::Arc;

    #[tokio::test]
    async fn requests_and_their_answers() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("log");
        let layers: Vec<LayerSpec> = [format!("log,file={}", path.display()), "delay,trim=1ms".to_owned()]
            .iter()
            .map(|layer| layer.parse().expect("a layer"))
            .collect();
        let device = wrap_all(&layers, Arc::new(MemoryDevice::new(1 << 20))).expect("layers");
        assert!(device.write(4096, &[1; 512], WriteFlags { fua: true }).is_ready());
        let flags = ZeroFlags { fast_only: true, no_hole: true, fua: false };
        device.write_zeroes(0, 4096, flags).await.expect_err("memory does not");
        drop(device.trim(0, 4096));
        {
            let mut pending = std::pin::pin!(device.trim(0, 4096));
            assert!(futures_util::poll!(&mut pending).is_pending());
        }
        device.trim(0, 4096).await.expect("trim");
        device.flush().await.expect("flush");
        let text = std::fs::read_to_string(&path).expect("log");
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').expect("a time").1).collect();
        let begins = [
            "Write id=1 offset=0x1000 count=0x200 fua=1 ...",
            "...Write id=1 return=0 us=",
            "Zero id=2 offset=0x0 count=0x1000 no_hole=1 fast=1 ...",
            "...Zero id=2 return=-1 errno=95 us=",
            "Trim id=3 offset=0x0 count=0x1000 ...",
            "...Trim id=3 return=-1 abandoned us=",
            "Trim id=4 offset=0x0 count=0x1000 ...",
            "...Trim id=4 return=0 us=",
            "Flush id=5 ...",
            "...Flush id=5 return=0 us=",
        ];
        assert_eq!(lines.len(), begins.len(), "{text}");
        for (line, begin) in lines.iter().zip(begins) {
            assert!(line.starts_with(begin), "{line} begins with {begin}");
        }
    }

    #[test]
    fn a_log_that_cannot_be_made_is_an_error() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("missing/log");
        let layer: LayerSpec = format!("log,file={}", path.display()).parse().expect("a layer");
        let error = layer.wrap(Arc::new(MemoryDevice::new(4096))).err().expect("no such directory");
        assert!(error.to_string().contains("missing/log"));
    }
}

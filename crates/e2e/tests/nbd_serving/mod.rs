//! A running `loam serve`, and an eye on what it exports.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "shared by test files that each use a part of it"
)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use loam_block::BlockDevice;
use loam_e2e::Loam;
use loam_nbd::client::{ClientOptions, NbdDevice};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// How long a server may take to be ready, or to end.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running `loam serve`, killed when dropped.
pub struct Serving {
    pub child: Child,
    /// What it printed.
    pub line: String,
}

impl Serving {
    pub fn start<S: AsRef<std::ffi::OsStr>>(loam: &Loam, arguments: impl IntoIterator<Item = S>) -> Serving {
        let mut command = loam.command(["serve"]);
        command.args(arguments);
        Serving::of(command)
    }

    pub fn of(mut command: Command) -> Serving {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{command:?} ended: {}", child.wait().unwrap());
        Serving { child, line: line.trim_end().to_owned() }
    }

    pub fn uri(&self) -> &str {
        self.line.split(' ').next().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// Bytes of an export.
pub fn read_export(uri: &str, offset: u64, length: usize) -> Result<Vec<u8>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let device = NbdDevice::connect(&uri.parse().unwrap(), ClientOptions::default()).await;
        let device = device.map_err(|error| error.to_string())?;
        let mut bytes = vec![0; length];
        device.read(offset, &mut bytes).await.map_err(|error| format!("{error:?}"))?;
        Ok(bytes)
    })
}

pub fn extents(map: &Value) -> Vec<(u64, u64, String)> {
    let extents = map["extents"].as_array().unwrap_or_else(|| panic!("no extents in {map}"));
    let number = |value: &Value| value.as_u64().unwrap();
    let of = |extent: &Value| {
        (number(&extent["offset"]), number(&extent["length"]), extent["type"].as_str().unwrap().to_owned())
    };
    extents.iter().map(of).collect()
}

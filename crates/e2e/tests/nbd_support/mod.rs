//! The other NBD servers, as the tests' peers: [`nbdkit`], [`qemu_nbd`] and [`nbd_server`], each on a Unix socket of its
//! own, ready when the call returns and gone when the [`Peer`] is dropped. None of them needs root.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How long a server may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Where nbd-server says who it is.
const PID_FILE: &str = "pid";

/// A running server. Dropping it kills the process and removes its socket.
pub struct Peer {
    directory: tempfile::TempDir,
    command: Vec<String>,
    process: Process,
}

impl Peer {
    /// The URI of the default export.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// The URI of an export. `name` goes into the URI as it is.
    pub fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// A directory that lives as long as the server, for images and logs.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process, for `/proc/PID/stat`.
    pub fn pid(&self) -> u32 {
        match self.process {
            Process::Child(ref child) => child.id(),
            Process::Daemon(pid) => pid.as_raw_nonzero().get().unsigned_abs(),
        }
    }

    /// Kills the server as a crash would. The socket file stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the killed server again, on the same socket.
    pub fn restart(&mut self) {
        // A process id of the last life would be taken for that of the next.
        std::fs::remove_file(self.directory.path().join(PID_FILE)).ok();
        std::fs::remove_file(self.socket()).ok();
        self.process = start(&self.command, self.directory.path());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.process.kill();
    }
}

enum Process {
    Child(Child),
    /// nbd-server: in the foreground it serves one connection only. It leads a group of a process for each connection.
    Daemon(Pid),
}

impl Process {
    fn kill(&mut self) {
        match self {
            Process::Child(child) => {
                child.kill().ok();
                child.wait().ok();
            }
            Process::Daemon(pid) => {
                kill_process_group(*pid, Signal::KILL).ok();
            }
        }
    }
}

/// nbdkit with these arguments: `["memory", "64M"]`, `["--filter=delay", "memory", "64M", "wdelay=1ms"]`. Of TLS, threads
/// and everything else the arguments decide.
pub fn nbdkit<S: AsRef<OsStr>>(arguments: &[S]) -> Peer {
    Peer::start(|socket| {
        let mut command = words(["nbdkit", "--foreground", "--exit-with-parent", "--unix"]);
        command.push(socket.display().to_string());
        command.extend(arguments.iter().map(|argument| text(argument.as_ref()).to_string()));
        command
    })
}

/// qemu-nbd with these arguments, the image last: `["-f", "raw", "disk.img"]`. It takes 16 connections at once and stays
/// when the last one ends.
pub fn qemu_nbd<S: AsRef<OsStr>>(arguments: &[S]) -> Peer {
    Peer::start(|socket| {
        let mut command = words(["qemu-nbd", "--persistent", "--shared=16", "--socket"]);
        command.push(socket.display().to_string());
        command.extend(arguments.iter().map(|argument| text(argument.as_ref()).to_string()));
        command
    })
}

/// nbd-server with exports of these sections: `"[disk]\nexportname = /tmp/disk.img\nflush = true\n"`.
pub fn nbd_server(sections: &str) -> Peer {
    Peer::start(|socket| {
        let configuration = socket.with_file_name("nbd-server.conf");
        let generic = format!("[generic]\nunixsock = {}\nallowlist = true\n", socket.display());
        std::fs::write(&configuration, generic + sections).expect("configuration of nbd-server");
        let pid_file = socket.with_file_name(PID_FILE);
        let arguments =
            ["nbd-server", "-C", text(configuration.as_os_str()), "-p", text(pid_file.as_os_str())];
        words(arguments)
    })
}

impl Peer {
    fn start(command: impl FnOnce(&Path) -> Vec<String>) -> Peer {
        let directory = tempfile::tempdir().expect("a directory for a socket");
        let command = command(&directory.path().join("socket"));
        let process = start(&command, directory.path());
        Peer { directory, command, process }
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(String::from).to_vec()
}

fn text(argument: &OsStr) -> &str {
    argument.to_str().expect("arguments of servers are UTF-8")
}

/// Starts the server and waits until it takes connections.
fn start(command: &[String], directory: &Path) -> Process {
    let log = File::create(directory.join("log")).expect("a log");
    let child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}: is it installed?", command[0]));
    let mut process = Process::Child(child);
    let deadline = Instant::now() + START_LIMIT;
    let (socket, pid_file) = (directory.join("socket"), directory.join(PID_FILE));
    loop {
        if let Process::Child(child) = &mut process {
            let ended = child.try_wait().expect("wait");
            match std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok()) {
                Some(pid) => process = Process::Daemon(Pid::from_raw(pid).expect("a process id")),
                None if ended.is_some_and(|status| !status.success()) => break,
                None => {}
            }
        }
        let known = matches!(process, Process::Daemon(_)) || command[0] != "nbd-server";
        if known && UnixStream::connect(&socket).is_ok() {
            return process;
        }
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    process.kill();
    let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
    panic!("`{}` does not listen: {log}", command.join(" "));
}

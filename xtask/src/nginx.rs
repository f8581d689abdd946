//! A real web server for demo and benchmarks: nginx on a free port of loopback, with configuration, log and process id
//! of its own below target/demo. Its access log says what went over the wire.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::shell::command;

/// How long nginx may take to listen.
const START_LIMIT: Duration = Duration::from_secs(5);

/// What went over the wire.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wire {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
}

impl std::ops::Sub for Wire {
    type Output = Wire;

    fn sub(self, before: Wire) -> Wire {
        Wire { requests: self.requests - before.requests, bytes: self.bytes - before.bytes }
    }
}

/// The server; it ends when dropped.
pub(crate) struct Nginx {
    process: Child,
    prefix: PathBuf,
    port: u16,
}

impl Nginx {
    /// Serves the files of `root`, with everything of the server's own in `prefix`.
    pub(crate) fn start(prefix: &Path, root: &Path) -> Result<Self> {
        fs::create_dir_all(prefix)?;
        let log = prefix.join("access.log");
        fs::write(&log, "").context("emptying the access log")?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        fs::write(prefix.join("nginx.conf"), configuration(root, port))?;
        let mut server = command("nginx", &["-c", "nginx.conf", "-e", "error.log", "-p"]);
        server.arg(prefix).stdout(Stdio::null());
        let process = server.spawn().context("cannot start nginx: is it installed?")?;
        let mut nginx = Nginx { process, prefix: prefix.to_path_buf(), port };
        let deadline = Instant::now() + START_LIMIT;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline || nginx.process.try_wait()?.is_some() {
                let log = fs::read_to_string(prefix.join("error.log")).unwrap_or_default();
                bail!("nginx does not listen: {}", log.trim());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(nginx)
    }

    /// The URL of a file.
    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// What it has sent since it started, headers included.
    pub(crate) fn wire(&self) -> Wire {
        let log = fs::read_to_string(self.prefix.join("access.log")).unwrap_or_default();
        let sent = log.lines().filter_map(|line| line.split(' ').next()?.parse::<u64>().ok());
        sent.fold(Wire::default(), |wire, bytes| Wire {
            requests: wire.requests + 1,
            bytes: wire.bytes + bytes,
        })
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let mut stop = command("nginx", &["-c", "nginx.conf", "-e", "error.log", "-s", "stop", "-p"]);
        if !stop.arg(&self.prefix).status().is_ok_and(|status| status.success()) {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

fn configuration(root: &Path, port: u16) -> String {
    format!(
        "daemon off;
user root;
worker_processes 1;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 256; }}
http {{
    log_format wire '$bytes_sent $status $request_method $uri $http_range';
    access_log access.log wire;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    sendfile on; tcp_nodelay on;
    server {{
        listen 127.0.0.1:{port};
        root {};
    }}
}}
",
        root.display()
    )
}

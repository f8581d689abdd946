//! `serve`: devices by NBD, until a signal ends it.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::future::try_join_all;
use loam_block::layer::{LayerSpec, wrap_all};
use loam_nbd::server::{Export, Listener, Server, ServerOptions};
use loam_nbd::tls::{ServerTls, TlsPolicy};
use loam_nbd::uri::{Address, Uri};
use loam_pool::Error;
use loam_pool::device::{DeviceSpec, OpenOptions, Opened};
use serde::Serialize;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;

use super::{Context, Signals};
use crate::arguments::devices::{ServeDevice, Tls};
use crate::output;

/// What is printed once clients can connect.
#[derive(Serialize)]
struct Ready {
    uri: String,
    uris: Vec<String>,
    pid: u32,
    exports: Vec<ExportShown>,
}

#[derive(Serialize)]
struct ExportShown {
    name: String,
    device: String,
    size: u64,
    read_only: bool,
}

pub(crate) async fn run(context: &Context, options: ServeDevice) -> anyhow::Result<()> {
    let names = names(&options)?;
    let mut exports = Vec::new();
    let mut shown = Vec::new();
    // What must not be dropped while it is served.
    let mut open = Vec::new();
    for (name, named) in names.into_iter().zip(&options.devices) {
        let opened = open_device(context, &named.device, options.readonly).await?;
        let export = export(&name, &named.device, &opened, &options)?;
        let read_only = export.read_only || !export.device.capabilities().write;
        let (device, size) = (named.device.to_string(), export.device.geometry().size);
        shown.push(ExportShown { name, device, size, read_only });
        exports.push(export);
        open.push(opened);
    }
    let server = Server::new(exports, server_options(&options)?).map_err(|error| invalid(&error))?;
    let mut signals = Signals::catch().context("catching signals")?;
    if options.stdio {
        tokio::select! {
            served = serve_stdio(&server) => served.context("the connection on standard input")?,
            () = signals.received() => {}
        }
        return Ok(());
    }
    let listeners = listeners(&options).await?;
    let uris = uris(&listeners, &options, &shown);
    let (stop, stopped) = watch::channel(false);
    let serving = try_join_all(listeners.into_iter().map(|(listener, _)| {
        let mut stopped = stopped.clone();
        let server = server.clone();
        async move {
            // That the sender is gone means the same.
            server.serve(listener, async move { drop(stopped.wait_for(|stopped| *stopped).await) }).await
        }
    }));
    let _pid_file = options.pid_file.as_deref().map(PidFile::write).transpose()?;
    announce(context, uris, shown)?;
    let stopping = async {
        signals.received().await;
        let _ = stop.send(true);
        // A second one means at once.
        signals.received().await;
    };
    tokio::select! {
        served = serving => served.map(drop).context("serving"),
        () = stopping => Ok(()),
    }
}

/// The name of each export.
fn names(options: &ServeDevice) -> anyhow::Result<Vec<String>> {
    let invalid = |why: &str| Error::Invalid { what: "serve".into(), why: why.into() };
    match (options.devices.as_slice(), &options.export) {
        ([one], name) => match (&one.name, name) {
            (Some(_), Some(_)) => {
                Err(invalid("the export has two names: --export, and that before the =").into())
            }
            (given, name) => Ok(vec![given.clone().or_else(|| name.clone()).unwrap_or_default()]),
        },
        (_, Some(_)) => Err(invalid("--export names a single device; name several as NAME=DEVICE").into()),
        (several, None) => {
            let names: Option<Vec<String>> = several.iter().map(|one| one.name.clone()).collect();
            names.ok_or_else(|| invalid("several devices need a name each: NAME=DEVICE").into())
        }
    }
}

async fn open_device(context: &Context, device: &DeviceSpec, read_only: bool) -> anyhow::Result<Opened> {
    let options = OpenOptions { read_only, pool: Some(context.directory.clone()), ..OpenOptions::default() };
    Ok(device.open(&options).await?)
}

fn export(name: &str, spec: &DeviceSpec, opened: &Opened, options: &ServeDevice) -> anyhow::Result<Export> {
    let layers: &[LayerSpec] = &options.layers;
    let device = wrap_all(layers, opened.device.clone()).with_context(|| format!("layers of {spec}"))?;
    Ok(Export {
        name: name.to_owned(),
        description: options.description.clone(),
        device,
        read_only: options.readonly,
    })
}

fn server_options(options: &ServeDevice) -> anyhow::Result<ServerOptions> {
    let mut server = ServerOptions::default();
    if let Some(connections) = options.max_connections {
        server.max_connections = connections;
    }
    if let (Some(directory), false) = (&options.tls_certificates, options.tls == Tls::Off) {
        let tls = ServerTls::from_directory(directory, options.tls_verify_peer).map_err(|error| {
            Error::step("TLS", error).with_hint("docs/nbd.md shows how to make certificates in five commands")
        })?;
        server.tls = match options.tls {
            Tls::Off => TlsPolicy::Refuse,
            Tls::On => TlsPolicy::Allow(tls),
            Tls::Require => TlsPolicy::Require(tls),
        };
    }
    Ok(server)
}

fn invalid(error: &dyn std::error::Error) -> Error {
    Error::Invalid { what: "serve".into(), why: error.to_string() }
}

/// Where clients come in: what systemd passed, else what was asked for; with the host that was named.
async fn listeners(options: &ServeDevice) -> anyhow::Result<Vec<(Listener, Option<String>)>> {
    let passed = Listener::from_systemd().context("the sockets of LISTEN_FDS")?;
    if !passed.is_empty() {
        return Ok(passed.into_iter().map(|listener| (listener, None)).collect());
    }
    let mut listeners = Vec::new();
    for address in &options.nbd {
        listeners.push(match address {
            Address::Unix(path) => (Listener::bind_unix(path)?, None),
            Address::Tcp { host, port } => (Listener::bind_tcp(host, *port).await?, Some(host.clone())),
        });
    }
    Ok(listeners)
}

/// The URI of each export at each address.
fn uris(
    listeners: &[(Listener, Option<String>)],
    options: &ServeDevice,
    exports: &[ExportShown],
) -> Vec<String> {
    let mut uris = Vec::new();
    for (listener, host) in listeners {
        let address = match (listener.unix_path(), listener.tcp_address()) {
            (Some(path), _) => Address::Unix(std::path::absolute(&path).unwrap_or(path)),
            (None, Some(bound)) => {
                let anywhere = host.is_none() && bound.ip().is_unspecified()
                    || host
                        .as_deref()
                        .and_then(|host| host.parse::<IpAddr>().ok())
                        .is_some_and(|ip| ip.is_unspecified());
                let host = match (anywhere, host) {
                    (true, _) => "localhost".to_owned(),
                    (false, Some(host)) => host.clone(),
                    (false, None) => bound.ip().to_string(),
                };
                Address::Tcp { host, port: bound.port() }
            }
            // A Unix socket without a name: there is nothing to connect to.
            (None, None) => continue,
        };
        for export in exports {
            let mut uri = Uri::new(address.clone(), export.name.clone());
            uri.tls = options.tls == Tls::Require;
            uris.push(uri.to_string());
        }
    }
    uris
}

fn announce(context: &Context, uris: Vec<String>, exports: Vec<ExportShown>) -> anyhow::Result<()> {
    let uri = uris.first().cloned().unwrap_or_default();
    let ready = Ready { uri, uris, pid: std::process::id(), exports };
    output::print(context.json, &ready, |ready| ready.uris.join(" "))
}

/// Serves whoever is on standard input and output: a socket there is used as one, pipes as they are.
async fn serve_stdio(server: &Arc<Server>) -> std::io::Result<()> {
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    match rustix::net::sockopt::socket_domain(&input) {
        Ok(rustix::net::AddressFamily::UNIX) => {
            let stream = UnixStream::from_std(nonblocking(input)?.into())?;
            server.serve_stream(stream).await
        }
        Ok(rustix::net::AddressFamily::INET | rustix::net::AddressFamily::INET6) => {
            let stream = TcpStream::from_std(nonblocking(input)?.into())?;
            server.serve_stream(stream).await
        }
        _ => server.serve_stream(tokio::io::join(tokio::io::stdin(), tokio::io::stdout())).await,
    }
}

fn nonblocking(socket: OwnedFd) -> std::io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// A file with the process id, removed with this.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> anyhow::Result<Self> {
        // Whoever waits for the file finds the number in it.
        let temporary = path.with_added_extension("tmp");
        let written = fs::write(&temporary, format!("{}\n", std::process::id()))
            .and_then(|()| fs::rename(&temporary, path));
        written.with_context(|| format!("writing {}", path.display()))?;
        Ok(PidFile(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!("removing {}: {error}", self.0.display());
        }
    }
}

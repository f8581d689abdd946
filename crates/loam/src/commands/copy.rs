//! `copy`: any device to any other.

use std::path::PathBuf;
use std::pin::pin;

use anyhow::Context as _;
use loam_nbd::client::{CONNECTION_FILL, ClientOptions};
use loam_nbd::copy::{CopyError, CopyOptions, CopyReport, Phase, Progress, ProgressState, Stop};
use loam_pool::Error;
use loam_pool::device::{DeviceSpec, OpenOptions, Opened};

use super::{Context, Signals};
use crate::arguments::devices::{Connections, Copy};
use crate::output::{self, size};
use crate::progress::Bar;

pub(crate) async fn run(context: &Context, arguments: Copy) -> anyhow::Result<()> {
    let mut signals = Signals::catch().context("catching signals")?;
    tokio::select! {
        opened = open_both(context, &arguments) => {
            let (source, destination) = opened?;
            copy(context, arguments, source, destination, &mut signals).await
        }
        () = signals.received() => Err(Error::Interrupted("the copy".into()).into()),
    }
}

async fn open_both(context: &Context, arguments: &Copy) -> anyhow::Result<(Opened, Opened)> {
    let client = ClientOptions { fill: CONNECTION_FILL, ..client_options(&arguments.connections) };
    let options =
        |read_only| OpenOptions { read_only, pool: Some(context.directory.clone()), client: client.clone() };
    let source = arguments.source.open(&options(true)).await?;
    let destination = if arguments.create {
        arguments.destination.open_or_create(&options(false), source.device.geometry().size).await?
    } else {
        arguments.destination.open(&options(false)).await?
    };
    Ok((source, destination))
}

pub(super) fn client_options(connections: &Connections) -> ClientOptions {
    let mut options = ClientOptions::default();
    if let Some(connections) = connections.connections {
        options.connections = usize::from(connections);
    }
    options
}

async fn copy(
    context: &Context,
    arguments: Copy,
    source: Opened,
    destination: Opened,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let names = format!("copying {} to {}", arguments.source, arguments.destination);
    let stop = Stop::default();
    let options = copy_options(&arguments, &source, &destination, stop.clone())?;
    let resumable = options.resume.is_some();
    let bar = Bar::new(context.json);
    let progress = CopyBar(&bar);
    let mut copying =
        pin!(loam_nbd::copy::copy(source.device.clone(), destination.device.clone(), &options, &progress));
    let copied = loop {
        tokio::select! {
            copied = &mut copying => break copied,
            () = signals.received() => {
                if stop.is_stopped() {
                    bar.finish();
                    return Err(Error::Interrupted(names).into());
                }
                stop.stop();
            }
        }
    };
    bar.finish();
    let report = copied.map_err(|error| failed(names, error, resumable))?;
    output::print(context.json, &report, describe)
}

fn copy_options(
    arguments: &Copy,
    source: &Opened,
    destination: &Opened,
    stop: Stop,
) -> anyhow::Result<CopyOptions> {
    let request_bytes = match arguments.request_size {
        None => None,
        Some(size) => Some(u32::try_from(size.0).map_err(|_| Error::Invalid {
            what: "--request-size".into(),
            why: "a request has less than 4 GiB".into(),
        })?),
    };
    let resume = arguments.resume.clone().map(|file| file.unwrap_or_else(|| note_of(&arguments.destination)));
    Ok(CopyOptions {
        zero: arguments.zero,
        queue_depth: arguments.queue_depth,
        request_bytes,
        allocate: arguments.allocate,
        destination_is_zero: arguments.destination_is_zero || destination.created,
        verify: arguments.verify,
        resume,
        source_identity: source.identity.name(),
        destination_identity: match source.identity.is_same(&destination.identity) {
            true => source.identity.name(),
            false => destination.identity.name(),
        },
        stop,
        ..CopyOptions::default()
    })
}

/// Where it is noted how far a copy is, unless told otherwise.
fn note_of(destination: &DeviceSpec) -> PathBuf {
    match destination {
        DeviceSpec::Simple(loam_block::DeviceSpec::File(path)) if !path.starts_with("/dev") => {
            path.with_added_extension("resume")
        }
        other => {
            let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
            let mut name: String = other.to_string().chars().map(safe).collect();
            name.truncate(200);
            PathBuf::from(name).with_added_extension("resume")
        }
    }
}

/// The copier's error with what to do.
fn failed(names: String, error: CopyError, resumable: bool) -> Error {
    let hint = match &error {
        CopyError::Option { .. } => return Error::Invalid { what: names, why: error.to_string() },
        CopyError::Stopped { .. } | CopyError::Device { .. } | CopyError::LostTooOften { .. }
            if resumable =>
        {
            Some("the same command goes on there")
        }
        CopyError::Stopped { .. } => {
            Some("it begins anew; with --resume, the next one can be stopped and go on where it was")
        }
        CopyError::ReadOnly => Some("choose another destination, or have it served without --readonly"),
        _ => None,
    };
    let failed = Error::step(names, error);
    match hint {
        Some(hint) => failed.with_hint(hint),
        None => failed,
    }
}

fn describe(report: &CopyReport) -> String {
    let commands = &report.commands;
    let rate = report.bytes as f64 / report.seconds.max(1e-9);
    let verified = if report.verified { ", verified" } else { "" };
    format!(
        "{} copied ({} of data, {} of zeroes) in {:.2} s, {}/s{verified}\n{} reads, {} writes, {} zeroings, {} questions for extents",
        size(report.bytes),
        size(report.data_bytes),
        size(report.zero_bytes),
        report.seconds,
        size(rate as u64),
        commands.read,
        commands.write,
        commands.zero,
        commands.block_status,
    )
}

/// Shows a copy's progress.
struct CopyBar<'a>(&'a Bar);

impl Progress for CopyBar<'_> {
    fn update(&self, state: &ProgressState) {
        let step = match state.phase {
            Phase::Copy => "copying",
            Phase::Flush => "flushing",
            Phase::Verify => "verifying",
        };
        let unit = "bytes".to_owned();
        let progress = loam_pool::protocol::Progress {
            step: step.to_owned(),
            done: state.done,
            total: state.total,
            unit,
        };
        self.0.update(&progress);
    }
}

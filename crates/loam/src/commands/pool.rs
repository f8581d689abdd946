//! `init`, `up`, `down`, `status`, `check`, `evict`.

use std::fmt::Write as _;
use std::process::ExitCode;

use loam_pool::protocol::{Checked, EvictRequest, Evicted, Status};
use loam_pool::{CheckOptions, EngineChoice, InitOptions, UnmappedChoice, UpOptions, UpOutcome};

use super::Context;
use crate::arguments::{FuseEngine, Init, Unmapped, Up};
use crate::output::{self, seconds, size};

pub(crate) fn init(context: &Context, options: Init) -> anyhow::Result<()> {
    let made = loam_pool::init(
        &context.directory,
        &InitOptions {
            layout: options.layout.into(),
            virtual_size: options.virtual_size.0,
            local_size: options.local_size.0,
            local_device: options.local_device,
            cache_limit: options.cache_size.0,
            quota: options.quota.into(),
        },
    )?;
    output::print(context.json, &made, |made| {
        format!(
            "{}: a pool of {} in {}",
            made.pool.display(),
            size(made.virtual_size),
            seconds(made.elapsed_ns)
        )
    })
}

pub(crate) async fn up(context: &Context, options: Up) -> anyhow::Result<()> {
    let options = UpOptions {
        transport: options.serve.transport.into(),
        mount: options.mount,
        queues: options.serve.queues,
        data_path: options.serve.data_path.into(),
        unmapped: match options.unmapped {
            Unmapped::Error => UnmappedChoice::Error,
            Unmapped::Zeros => UnmappedChoice::Zeros,
        },
        engine: match options.fuse_engine {
            FuseEngine::Classic => EngineChoice::Classic,
            FuseEngine::IoUring => EngineChoice::IoUring,
        },
        foreground: options.foreground,
    };
    let outcome = loam_pool::up(&context.directory, &options).await?;
    let status: Status = context.client.get("/status").await?;
    output::print(context.json, &status, |status| {
        let mount = status.mount.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let already = if matches!(outcome, UpOutcome::AlreadyUp) { " already" } else { "" };
        format!("{}: up{already}, mounted on {mount}", status.pool.display())
    })
}

pub(crate) async fn down(context: &Context) -> anyhow::Result<()> {
    loam_pool::down(&context.directory).await?;
    Ok(())
}

pub(crate) async fn status(context: &Context) -> anyhow::Result<()> {
    let status = loam_pool::status(&context.directory).await?;
    output::print(context.json, &status, describe)
}

fn describe(status: &Status) -> String {
    let mut text = String::new();
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string())
    };
    let waiting = if status.state == "waiting" { " for a daemon: loam up starts one" } else { "" };
    let _ = writeln!(text, "pool       {} ({}{waiting})", status.pool.display(), status.state);
    let _ = writeln!(
        text,
        "virtual    {} in {} ranges, {} mapped",
        size(status.r#virtual.size),
        status.r#virtual.ranges,
        size(status.r#virtual.mapped_bytes)
    );
    if let Some(daemon) = &status.daemon {
        let _ = writeln!(
            text,
            "transport  {} on {}, {} queues, {}",
            status.transport.as_deref().unwrap_or("-"),
            path(&status.device),
            status.queues.unwrap_or_default(),
            status.data_path.as_deref().unwrap_or("-")
        );
        let _ = writeln!(text, "mount      {}", path(&status.mount));
        let _ = writeln!(
            text,
            "daemon     pid {}, up {}, {} restarts",
            daemon.pid,
            seconds(daemon.uptime_ns),
            daemon.restarts
        );
        let cache = &status.cache;
        let _ = writeln!(
            text,
            "cache      {} of {}; {} hits, {} misses, {} fetched, {} bad blocks",
            size(cache.bytes),
            size(cache.limit),
            cache.hits,
            cache.misses,
            size(cache.fetched_bytes),
            cache.bad_blocks
        );
        let _ = writeln!(text, "quota      {}", status.quota.as_deref().unwrap_or("-"));
        let _ = writeln!(text, "images     {}", status.images.len());
        let _ = writeln!(text, "containers {}", status.containers.len());
        let wrong: Vec<String> = status
            .errors
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let _ =
            writeln!(text, "errors     {}", if wrong.is_empty() { "none".into() } else { wrong.join(", ") });
    }
    text
}

pub(crate) async fn check(context: &Context, read_data: bool) -> anyhow::Result<ExitCode> {
    let checked = loam_pool::check(&context.directory, &CheckOptions { read_data }).await?;
    output::print(context.json, &checked, describe_check)?;
    Ok(if checked.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn describe_check(checked: &Checked) -> String {
    let mut text = String::new();
    for (what, count) in &checked.checked {
        let _ = writeln!(text, "{what}: {count} checked");
    }
    for (what, why) in &checked.skipped {
        let _ = writeln!(text, "{what}: not checked: {why}");
    }
    for finding in &checked.findings {
        let _ = writeln!(text, "{}: WRONG: {}", finding.part, finding.what);
    }
    let _ = writeln!(
        text,
        "{}",
        match checked.findings.len() {
            0 => "no errors found".to_owned(),
            count => format!("{count} errors found"),
        }
    );
    text
}

pub(crate) async fn evict(context: &Context, keep_bytes: u64) -> anyhow::Result<()> {
    let evicted: Evicted = context.client.post("/evict", &EvictRequest { keep_bytes }).await?;
    output::print(context.json, &evicted, |evicted| {
        format!("evicted {}, {} left", size(evicted.evicted_bytes), size(evicted.bytes))
    })
}

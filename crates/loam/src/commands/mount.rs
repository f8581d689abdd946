//! `mount` and `umount`: one image at one place.

use std::path::Path;

use loam_pool::{Error, MountOptions, Mounted};

use super::Context;
use crate::arguments::Mount;
use crate::output::{self, seconds, size};
use crate::progress::Bar;

pub(crate) async fn mount(context: &Context, options: Mount) -> anyhow::Result<()> {
    let foreground = options.foreground;
    let bar = Bar::new(context.json);
    let options = MountOptions {
        source: loam_pool::absolute_source(&options.source)?,
        directory: options.directory,
        index: options.index.map(|index| loam_pool::absolute_location(&index)).transpose()?,
        local: options.local,
        transport: options.serve.transport.into(),
        queues: options.serve.queues,
        data_path: options.serve.data_path.into(),
    };
    let mounted =
        super::unless_interrupted(loam_pool::mount_image(&context.directory, &options, bar.clone())).await;
    bar.finish();
    let mounted = mounted?;
    output::print(context.json, &mounted.report, |report| {
        format!(
            "{} on {}: {} entries, {}, in {} ({} from the source)",
            report.source,
            report.mount.display(),
            report.files,
            size(report.bytes),
            seconds(report.elapsed_ns),
            size(report.wire_bytes)
        )
    })?;
    if foreground { stay(mounted).await } else { Ok(()) }
}

/// Stays until the image is unmounted, which Ctrl-C and SIGTERM do; while it is in use they only say by whom.
async fn stay(mut mounted: Mounted) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            ended = mounted.ended() => return Ok(ended?),
            () = super::interrupted() => {}
        }
        match mounted.unmount().await {
            Err(error @ (Error::Busy { .. } | Error::Daemon { .. })) => {
                output::report(&error.into());
            }
            result => return Ok(result?),
        }
    }
}

pub(crate) async fn umount(context: &Context, directory: &Path) -> anyhow::Result<()> {
    loam_pool::unmount_image(&context.directory, directory).await?;
    Ok(())
}

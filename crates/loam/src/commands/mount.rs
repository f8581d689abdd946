//! `mount` and `umount`: one image at one place.

use std::path::Path;

use loam_pool::MountOptions;

use super::Context;
use crate::arguments::Mount;
use crate::output::{self, seconds, size};
use crate::progress::Bar;

pub(crate) async fn mount(context: &Context, options: Mount) -> anyhow::Result<()> {
    let bar = Bar::new(context.json);
    let options = MountOptions {
        source: loam_pool::absolute_source(&options.source)?,
        directory: options.directory,
        index: options.index.map(|index| loam_pool::absolute_location(&index)).transpose()?,
        local: options.local,
        transport: options.transport.into(),
        foreground: options.foreground,
    };
    let report = loam_pool::mount_image(&context.directory, &options, bar.clone()).await;
    bar.finish();
    output::print(context.json, &report?, |report| {
        format!(
            "{} on {}: {} entries, {}, in {} ({} from the source)",
            report.source,
            report.mount.display(),
            report.files,
            size(report.bytes),
            seconds(report.elapsed_ns),
            size(report.wire_bytes)
        )
    })
}

pub(crate) async fn umount(context: &Context, directory: &Path) -> anyhow::Result<()> {
    loam_pool::unmount_image(&context.directory, directory).await?;
    Ok(())
}

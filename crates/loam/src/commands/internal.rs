//! Processes that loam starts itself: the holder of descriptors, the daemon, and who mounts for it.

use std::process::ExitCode;

use loam_pool::UpOptions;

use super::Context;
use crate::arguments::Internal;

pub(crate) fn run(context: &Context, command: Internal) -> anyhow::Result<ExitCode> {
    match command {
        Internal::Holder { options } => {
            let options: UpOptions = serde_json::from_str(&options)?;
            Ok(loam_pool::holder_main(&context.directory, &options)?)
        }
        Internal::Mount { work } => Ok(loam_pool::mount_main(&context.directory, &work)?),
        Internal::Daemon { options } => {
            let options: UpOptions = serde_json::from_str(&options)?;
            tracing_subscriber::fmt()
                .with_env_filter(super::log_filter("info"))
                .with_writer(std::io::stderr)
                .with_ansi(false)
                .init();
            loam_pool::daemon_main(&context.directory, &options)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

//! The pool's virtual device by NBD, read-only, on a socket that only root can open: what `pool:` is while the pool is up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use loam_nbd::server::{Export, Listener, Server, ServerOptions};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Pool;
use crate::error::{Context, Result};
use crate::served::of_any_bytes;

/// The socket is served until this is told to stop.
pub(super) struct Serving {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Serving {
    /// Begins to listen.
    pub(super) fn begin(pool: &Pool) -> Result<Self> {
        let path = pool.directory.nbd_socket();
        let what = || format!("listening on {}", path.display());
        let export = Export {
            name: String::new(),
            description: format!("the virtual device of the pool {}", pool.directory.root().display()),
            device: of_any_bytes(pool.device.clone())?,
            read_only: true,
        };
        let server = Server::new(vec![export], ServerOptions::default()).step(what)?;
        let listener = Listener::bind_unix(&path).step(what)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).step(what)?;
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let shutdown = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
            if let Err(error) = Arc::clone(&server).serve(listener, shutdown).await {
                tracing::error!("the NBD socket is no longer served: {error}");
            }
        });
        Ok(Serving { stop, task })
    }

    /// Lets connections finish what they have begun, and closes them.
    pub(super) async fn end(self) {
        let _ = self.stop.send(true);
        if let Err(error) = self.task.await {
            tracing::error!("serving NBD: {error}");
        }
    }
}

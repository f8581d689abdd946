//! `pool:`: what a pool's daemon serves to the kernel. While the pool is up its daemon answers, on a socket of its own;
//! while it is down it is read from its files, and no daemon can start meanwhile.

use std::time::{Duration, Instant};

use loam_nbd::uri::{Address, Uri};
use loam_space::Unmapped;
use tokio::net::UnixStream;

use super::{OpenOptions, Opened, open_nbd};
use crate::config::Config;
use crate::directory::PoolDirectory;
use crate::error::{Error, Result};
use crate::launch::{hold_down, is_held};
use crate::served::{Served, of_any_bytes};

/// How long a pool may be on its way up or down.
const PATIENCE: Duration = Duration::from_secs(20);

/// Opens the virtual device.
pub(super) async fn open(directory: &PoolDirectory, options: &OpenOptions) -> Result<Opened> {
    let config = Config::load(directory)?;
    let began = Instant::now();
    loop {
        if UnixStream::connect(directory.nbd_socket()).await.is_ok() {
            let uri = Uri::new(Address::Unix(directory.nbd_socket()), "");
            return open_nbd(&uri, options.client.clone()).await;
        }
        // A holder is about to start the daemon again.
        let held = directory.run().exists() && is_held(directory)?;
        if !held && let Some(lock) = hold_down(directory)? {
            let served = Served::open(directory, config.cache_limit, Unmapped::Error)?;
            return Ok(Opened::new(of_any_bytes(served.device.clone())?).keeping((served, lock)));
        }
        if began.elapsed() > PATIENCE {
            return Err(Error::Locked(directory.root().to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

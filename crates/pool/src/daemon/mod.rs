//! The daemon: opens map and cache, attaches (or takes over) the virtual device, mounts the filesystem, and then answers
//! the control socket until it is told to go down.

mod api;
mod attach;
mod metrics;
mod nbd;
mod operations;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use loam_attach::FileAttachment;
use loam_attach::holder::FdStore;
use loam_attach::transport::Attachment;
use loam_block::BlockDevice;
use loam_space::{AddressSpace, Map, Unmapped};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use crate::apart;
use crate::catalog::Catalog;
use crate::config::{Config, LocalDevice, Purpose, UnmappedChoice};
use crate::content::{ContentSpec, Contents};
use crate::directory::{PoolDirectory, remove_if_there};
use crate::error::{Context, Error, Result};
use crate::launch::UpOptions;
use crate::served::Served;
use crate::state::AttachState;

/// How long a daemon waits for the lock of one that is just dying.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// A pool that is up.
pub(crate) struct Pool {
    directory: PoolDirectory,
    config: Config,
    map: Arc<Map>,
    space: Arc<AddressSpace>,
    contents: Arc<Contents>,
    device: Arc<dyn BlockDevice>,
    state: AttachState,
    attachment: Mutex<Attachment>,
    local: Mutex<Option<FileAttachment>>,
    store: FdStore,
    catalog: OnceLock<Catalog>,
    /// Names that are being added right now.
    reserved: Mutex<HashSet<String>>,
    /// Held while a container is made or a name removed: no image goes while it gets a container.
    changing: Mutex<()>,
    /// When groups of deleted subvolumes were removed.
    tidied: Mutex<Option<Instant>>,
    started: Instant,
    stop: Notify,
    _lock: File,
}

/// Runs the daemon until it is told to stop. Why it could not start is left in `run/failure` for whoever started it.
///
/// # Errors
/// What kept it from starting, or from ending cleanly.
pub fn daemon_main(directory: &PoolDirectory, options: &UpOptions) -> Result<()> {
    let result = serve(directory, options);
    if let Err(error) = &result {
        let hint = error.hint().map(|hint| format!("\n{hint}")).unwrap_or_default();
        // Whoever waits for the daemon reads this; that it cannot be written must not hide the error itself.
        let _ = fs::write(directory.failure(), format!("{}{hint}", error.chain()));
        tracing::error!("{}", error.chain());
    }
    result
}

fn serve(directory: &PoolDirectory, options: &UpOptions) -> Result<()> {
    let config = Config::load(directory)?;
    let lock = lock(directory)?;
    if let Err(error) = loam_sys::process::become_io_flusher() {
        tracing::debug!("memory reclaim may wait for this process: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("loam")
        .enable_all()
        .build()
        .step(|| "starting the runtime".to_owned())?;
    // From here on, so that a signal to a daemon that is starting takes it down once it is up.
    let signals = runtime.block_on(async { Signals::catch() })?;
    let pool = runtime
        .block_on(async { tokio::task::block_in_place(|| Pool::start(directory, config, options, lock)) });
    let pool = Arc::new(pool?);
    runtime.block_on(pool.clone().answer(signals))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

fn lock(directory: &PoolDirectory) -> Result<File> {
    let path = directory.lock();
    let file = File::create(&path).step(|| format!("making {}", path.display()))?;
    let began = Instant::now();
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Locked(directory.root().to_owned())),
            Err(error) => return Err(Error::step(format!("locking {}", path.display()), error)),
        }
    }
}

impl Pool {
    fn start(directory: &PoolDirectory, config: Config, options: &UpOptions, lock: File) -> Result<Self> {
        let started = Instant::now();
        let store = FdStore::from_environment().step(|| "asking for kept descriptors".to_owned())?;
        let unmapped = match options.unmapped {
            UnmappedChoice::Error => Unmapped::Error,
            UnmappedChoice::Zeros => Unmapped::Zeros,
        };
        let Served { map, space, contents, device } = Served::open(directory, config.cache_limit, unmapped)?;
        let (attachment, state) = attach::attach(directory, &config, options, device.clone(), &store)?;
        let local = attach::attach_local(&config)?;
        let pool = Pool {
            directory: directory.clone(),
            map,
            space,
            contents,
            device,
            attachment: Mutex::new(attachment),
            local: Mutex::new(local),
            store,
            catalog: OnceLock::new(),
            reserved: Mutex::default(),
            changing: Mutex::default(),
            tidied: Mutex::default(),
            started,
            stop: Notify::new(),
            state,
            config,
            _lock: lock,
        };
        if pool.config.purpose == Purpose::Mount {
            pool.open_contents();
        }
        if let Err(error) = pool.mount_filesystem() {
            // As far as nobody uses it already, nothing stays attached; the error that led here is what must be told.
            if let Err(left) = pool.unmount() {
                tracing::warn!("undoing: {}", left.chain());
            }
            return Err(error);
        }
        Ok(pool)
    }

    /// Opens contents before anybody reads them, so that what their traces name is on its way while the kernel mounts.
    fn open_contents(&self) {
        for (id, spec) in self.map.contents() {
            let contents = self.contents.clone();
            tokio::spawn(async move {
                let opened = async { contents.device(id, &ContentSpec::decode(&spec)?).await };
                if let Err(error) = opened.await {
                    tracing::warn!("opening content {id}: {}", error.chain());
                }
            });
        }
    }

    fn mount_filesystem(&self) -> Result<()> {
        self.mount_back()?;
        if self.config.purpose == Purpose::Pool {
            let catalog = Catalog::open(&self.state.mount, self.config.virtual_size)?;
            for removed in catalog.mend()? {
                tracing::warn!("removed {removed}");
            }
            let _ = self.catalog.set(catalog);
            self.tidy_groups();
        }
        Ok(())
    }

    /// Listens on the control socket until told to stop.
    async fn answer(self: Arc<Self>, signals: Signals) -> Result<()> {
        let socket = self.directory.control_socket();
        remove_if_there(&socket)?;
        let listener = UnixListener::bind(&socket).step(|| format!("listening on {}", socket.display()))?;
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))
            .step(|| format!("closing {}", socket.display()))?;
        let nbd = nbd::Serving::begin(&self)?;
        remove_if_there(&self.directory.failure())?;
        self.store.ready().step(|| "saying that the pool is up".to_owned())?;
        if !lock_of(&self.attachment).is_kept(&self.store) {
            tracing::warn!("nobody keeps the descriptors: readers get errors if this process dies");
        }
        tracing::info!(
            pool = %self.directory.root().display(),
            transport = %self.state.transport.transport(),
            device = %self.state.device.display(),
            mount = %self.state.mount.display(),
            restarts = self.state.restarts,
            ready_ms = self.started.elapsed().as_millis() as u64,
            "serving"
        );
        let terminated = tokio::spawn(self.clone().obey(signals));
        let watched = tokio::spawn(self.clone().watch_holder());
        let pool = self.clone();
        axum::serve(listener, api::router(self.clone()))
            .with_graceful_shutdown(async move { pool.stop.notified().await })
            .await
            .step(|| "answering the control socket".to_owned())?;
        terminated.abort();
        watched.abort();
        nbd.end().await;
        remove_if_there(&socket)?;
        tracing::info!("down");
        Ok(())
    }

    /// Without its holder the daemon serves on, but nobody starts another when it dies.
    async fn watch_holder(self: Arc<Self>) {
        if self.store.lost().await.is_ok() {
            tracing::error!(
                "the holder is gone: take the pool down and up again to be safe from crashes again"
            );
        }
    }

    /// SIGTERM and SIGINT mean: go down, unless that would break a reader.
    async fn obey(self: Arc<Self>, mut signals: Signals) {
        loop {
            signals.received().await;
            match tokio::task::block_in_place(|| self.unmount()) {
                Ok(()) => return self.stop(),
                Err(error) => tracing::error!("not going down: {}", error.chain()),
            }
        }
    }

    /// Unmounts and detaches everything; when something is busy, says what, and goes on as before.
    fn unmount(&self) -> Result<()> {
        let local = self.local_device();
        apart::unmount(&self.directory, &[&self.state.device, &local], &self.state.mount)?;
        let detached = self.detach();
        if matches!(detached, Err(Error::Busy { .. })) {
            // Somebody's mount namespace has a copy of the mount, so the filesystem lives on: it gets its place back, and
            // whoever reads it goes on reading.
            self.mount_back()?;
            return Err(Error::busy(&self.state.mount));
        }
        detached
    }

    fn mount_back(&self) -> Result<()> {
        apart::mount(&self.directory, &self.state.device, &self.local_device(), &self.state.mount)
    }

    /// The local block device.
    fn local_device(&self) -> PathBuf {
        match (&self.config.local, lock_of(&self.local).as_ref()) {
            (LocalDevice::File(_), Some(local)) => local.device_path(),
            (LocalDevice::File(path) | LocalDevice::Block(path), _) => path.clone(),
        }
    }

    fn detach(&self) -> Result<()> {
        lock_of(&self.attachment).detach(&self.store).map_err(|error| match error {
            loam_attach::Error::Busy { .. } => Error::busy(&self.state.mount),
            error => Error::step(format!("detaching {}", self.state.device.display()), error),
        })?;
        if let Some(local) = lock_of(&self.local).as_mut() {
            local.detach().step(|| "detaching the local device".to_owned())?;
        }
        remove_if_there(&self.directory.attach_state())
    }

    fn stop(&self) {
        // A holder that is not told would only see a clean exit, which it takes for the same.
        let _ = self.store.stopping();
        self.stop.notify_one();
    }

    /// The catalogue; a single mounted image has none.
    pub(crate) fn catalog(&self) -> Result<&Catalog> {
        self.catalog.get().ok_or_else(|| {
            Error::invalid(
                self.directory.root().display().to_string(),
                "a mounted image has no images or containers",
            )
        })
    }

    pub(crate) fn directory(&self) -> &PoolDirectory {
        &self.directory
    }

    pub(crate) fn map(&self) -> &Arc<Map> {
        &self.map
    }

    pub(crate) fn contents(&self) -> &Arc<Contents> {
        &self.contents
    }

    pub(crate) fn mount(&self) -> &Path {
        &self.state.mount
    }

    /// Keeps a name from being added twice at the same time.
    fn reserve(&self, name: &str) -> Result<Reservation<'_>> {
        if !lock_of(&self.reserved).insert(name.to_owned()) {
            return Err(Error::Exists { kind: "an image in the making", name: name.to_owned() });
        }
        Ok(Reservation { pool: self, name: name.to_owned() })
    }

    fn error_counters(&self) -> BTreeMap<String, u64> {
        let failed = self.contents.cache().stats().errors;
        let mut errors = BTreeMap::from([
            ("changed".to_owned(), failed.changed),
            ("corrupt".to_owned(), failed.corrupt),
            ("unavailable".to_owned(), failed.unavailable),
            ("timed_out".to_owned(), failed.timed_out),
            ("other".to_owned(), failed.other),
        ]);
        let space = self.space.counters();
        errors.insert("unmapped".to_owned(), space.unmapped_reads);
        errors.insert("unresolved".to_owned(), space.resolve_failures);
        let served = lock_of(&self.attachment).stats();
        errors.insert("reads_failed".to_owned(), served.errors);
        errors.insert("protocol".to_owned(), served.protocol_errors);
        errors
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn catch() -> Result<Self> {
        let catch = |kind| signal(kind).step(|| "catching signals".to_owned());
        Ok(Signals { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// A name that nobody else can add meanwhile.
struct Reservation<'a> {
    pool: &'a Pool,
    name: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock_of(&self.pool.reserved).remove(&self.name);
    }
}

/// Locks; what a panicking request leaves behind is whole, because nothing is changed in more than one step.
fn lock_of<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

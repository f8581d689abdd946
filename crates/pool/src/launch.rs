//! Bringing a pool up and taking it down, from the command's side: start the holder (which starts the daemon), wait until
//! the daemon answers, or say why it did not.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use loam_attach::holder::{self, Ended};
use loam_space::Map;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::client::Client;
use crate::config::{Config, EngineChoice, TransportChoice, UnmappedChoice};
use crate::directory::{PoolDirectory, remove_if_there};
use crate::error::{Context, Error, Result};
use crate::protocol::{CacheStatus, Status, VirtualStatus};
use crate::state::tear_down;

/// How long a daemon may take to answer: it opens map and cache, attaches, and mounts.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// How long `down` waits for a daemon that is being started again after a crash, and for one to end.
const DOWN_PATIENCE: Duration = Duration::from_secs(20);

/// How a pool is to be brought up. Travels as JSON to the processes that it starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpOptions {
    /// How the kernel gets the blocks.
    pub transport: TransportChoice,
    /// Where to mount it, unless where the pool's configuration says.
    pub mount: Option<PathBuf>,
    /// Threads that serve the kernel.
    pub threads: Option<u16>,
    /// What addresses without content read as.
    pub unmapped: UnmappedChoice,
    /// How requests come from FUSE.
    pub engine: EngineChoice,
    /// Do not go to the background.
    pub foreground: bool,
}

/// What `up` came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpOutcome {
    /// It is up now.
    Up,
    /// It was up before.
    AlreadyUp,
}

/// Brings the pool up. With `foreground` this process becomes the pool's and does not return.
///
/// # Errors
/// Why the daemon could not start, in its own words.
pub async fn up(directory: &PoolDirectory, options: &UpOptions) -> Result<UpOutcome> {
    Config::load(directory)?;
    let client = Client::new(directory);
    if client.is_up().await {
        return Ok(UpOutcome::AlreadyUp);
    }
    fs::create_dir_all(directory.run()).step(|| format!("making {}", directory.run().display()))?;
    remove_if_there(&directory.failure())?;
    let options = absolute(options)?;
    if options.foreground {
        // Under a service manager that keeps descriptors, that is the holder.
        let role = if std::env::var_os("NOTIFY_SOCKET").is_some() { "daemon" } else { "holder" };
        return Err(Error::step(
            "starting in the foreground",
            own_command(directory, role, &options)?.exec(),
        ));
    }
    let mut holder = spawn_holder(directory, &options)?;
    let began = Instant::now();
    loop {
        if client.is_up().await {
            return Ok(UpOutcome::Up);
        }
        if let Some(status) = holder.try_wait().step(|| "waiting for the daemon".to_owned())? {
            return Err(failure(directory, &status.to_string()));
        }
        if began.elapsed() > START_PATIENCE {
            let why = format!("it has not answered for {} seconds", START_PATIENCE.as_secs());
            return Err(Error::Control { pool: directory.root().to_owned(), why });
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn absolute(options: &UpOptions) -> Result<UpOptions> {
    let mut options = options.clone();
    if let Some(mount) = &mut options.mount {
        *mount = std::path::absolute(&mount).step(|| format!("path {}", mount.display()))?;
    }
    Ok(options)
}

/// This program in one of its own roles.
fn own_command(directory: &PoolDirectory, role: &str, options: &UpOptions) -> Result<Command> {
    let program = std::env::current_exe().step(|| "finding this program".to_owned())?;
    let options = serde_json::to_string(options).step(|| "encoding options".to_owned())?;
    let mut command = Command::new(program);
    command.arg("--pool").arg(directory.root()).args(["internal", role]).arg(options);
    Ok(command)
}

fn spawn_holder(directory: &PoolDirectory, options: &UpOptions) -> Result<Child> {
    let path = directory.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .step(|| format!("opening {}", path.display()))?;
    let mut command = own_command(directory, "holder", options)?;
    // Nothing of the caller's stays busy because of it.
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let isolation = loam_sys::process::Isolation { new_session: true, parent_death_signal: None };
    loam_sys::process::inherit(&mut command, Vec::new(), isolation);
    command.spawn().step(|| "starting the daemon".to_owned())
}

/// Why the daemon ended before it answered: its own words where it left any.
fn failure(directory: &PoolDirectory, status: &str) -> Error {
    match fs::read_to_string(directory.failure()) {
        Ok(text) => {
            let (message, hint) = match text.split_once('\n') {
                Some((message, hint)) => (message.to_owned(), Some(hint.to_owned())),
                None => (text, None),
            };
            Error::Daemon { message, hint }
        }
        Err(_) => {
            Error::Control { pool: directory.root().to_owned(), why: format!("it ended at once ({status})") }
        }
    }
}

/// The holder: keeps descriptors and starts the daemon, again and again if it dies.
///
/// # Errors
/// What keeps it from starting the daemon at all.
pub fn holder_main(directory: &PoolDirectory, options: &UpOptions) -> Result<ExitCode> {
    let _lock = hold(directory)?;
    // Fails here rather than in the closure, which cannot.
    own_command(directory, "daemon", options)?;
    let daemon =
        || own_command(directory, "daemon", options).unwrap_or_else(|_| Command::new("/proc/self/exe"));
    match holder::run(daemon).step(|| "holding the daemon".to_owned())? {
        Ended::Worker(status) if status.success() => Ok(ExitCode::SUCCESS),
        Ended::Worker(_) => Ok(ExitCode::FAILURE),
        Ended::GaveUp { deaths, last } => Err(Error::step(
            "holding the daemon",
            format!("it died {deaths} times in a row (at last: {last})"),
        )),
    }
}

fn holder_lock(directory: &PoolDirectory) -> Result<File> {
    let path = directory.run().join("holder.lock");
    File::create(&path).step(|| format!("making {}", path.display()))
}

fn hold(directory: &PoolDirectory) -> Result<File> {
    let file = holder_lock(directory)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => Error::Locked(directory.root().to_owned()),
        error => Error::step("locking run/holder.lock", error),
    })?;
    Ok(file)
}

/// Whether somebody starts the daemon again when it dies.
fn is_held(directory: &PoolDirectory) -> Result<bool> {
    Ok(matches!(hold(directory), Err(Error::Locked(_))))
}

/// Takes the pool down: the daemon unmounts and detaches; where there is none any more, this does. Harmless when the pool
/// is down already.
///
/// # Errors
/// [`Error::Busy`] with who is in the way: the pool is up then as before.
pub async fn down(directory: &PoolDirectory) -> Result<()> {
    let config = Config::load(directory)?;
    if !directory.run().exists() {
        return Ok(());
    }
    let client = Client::new(directory);
    let began = Instant::now();
    loop {
        match client.post::<(), ()>("/down", &()).await {
            Ok(()) => break,
            // It dies with its last answer on the way, or is being started again.
            Err(Error::Control { .. } | Error::NotUp(_))
                if is_held(directory)? && began.elapsed() < DOWN_PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(Error::Control { .. } | Error::NotUp(_)) => break,
            Err(error) => return Err(error),
        }
    }
    let lock = wait_for_end(directory, began).await?;
    tear_down(directory, &config)?;
    drop(lock);
    Ok(())
}

/// Waits until neither holder nor daemon are left, and keeps others from starting.
async fn wait_for_end(directory: &PoolDirectory, began: Instant) -> Result<(File, File)> {
    loop {
        if let Ok(holder) = hold(directory) {
            let path = directory.lock();
            let lock = File::create(&path).step(|| format!("making {}", path.display()))?;
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Ok((holder, lock));
            }
        }
        if began.elapsed() > DOWN_PATIENCE {
            return Err(Error::Locked(directory.root().to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The pool's status: the daemon's own, or what the files tell when it is down.
///
/// # Errors
/// [`Error::NoPool`], and what is wrong with the map.
pub async fn status(directory: &PoolDirectory) -> Result<Status> {
    let config = Config::load(directory)?;
    match Client::new(directory).get("/status").await {
        Err(Error::NotUp(_)) => {}
        answer => return answer,
    }
    let map = Map::open(directory.map()).step(|| "opening the map".to_owned())?.stats();
    Ok(Status {
        pool: directory.root().to_owned(),
        state: "down".to_owned(),
        transport: None,
        device: None,
        mount: None,
        daemon: None,
        r#virtual: VirtualStatus {
            size: config.virtual_size,
            ranges: map.ranges,
            mapped_bytes: map.mapped_bytes,
        },
        cache: CacheStatus { limit: config.cache_limit, ..CacheStatus::default() },
        images: Vec::new(),
        containers: Vec::new(),
        errors: BTreeMap::new(),
        requests: BTreeMap::new(),
    })
}

//! Bringing a pool up and taking it down, from the command's side: start the holder (which starts the daemon), wait until
//! the daemon answers, or say why it did not.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use loam_attach::holder::{self, Ended};
use loam_attach::ublk::DataPath;
use loam_space::Map;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use tokio::process::Child;

use crate::client::Client;
use crate::config::{Config, EngineChoice, TransportChoice, UnmappedChoice};
use crate::directory::{PoolDirectory, remove_if_there};
use crate::error::{Context, Error, Result};
use crate::protocol::{CacheStatus, Status, VirtualStatus};
use crate::state::{tear_down, waiting};

/// How long a daemon may take to answer: it opens map and cache, attaches, and mounts.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// How long `down` waits for a daemon that is being started again after a crash, and for one to end.
const DOWN_PATIENCE: Duration = Duration::from_secs(20);

/// How long somebody may hold the holder's lock who only looks whether it is free.
const LOOK_PATIENCE: Duration = Duration::from_millis(100);

/// How a pool is to be brought up. Travels as JSON to the processes that it starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpOptions {
    /// How the kernel gets the blocks.
    pub transport: TransportChoice,
    /// Where to mount it, unless where the pool's configuration says.
    pub mount: Option<PathBuf>,
    /// Threads that serve the kernel.
    pub queues: Option<u16>,
    /// How bytes get from ublk to the kernel.
    pub data_path: DataPath,
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

/// Brings the pool up. With `foreground` this process becomes the pool's and does not return. Dropping the future undoes
/// what it had begun.
///
/// # Errors
/// Why the daemon could not start, in its own words.
pub async fn up(directory: &PoolDirectory, options: &UpOptions) -> Result<UpOutcome> {
    Config::load(directory)?;
    if options.foreground && !Client::new(directory).is_up().await {
        prepare(directory)?;
        // A service manager that keeps descriptors (it says how many) is the holder itself.
        let kept = std::env::var("FDSTORE").is_ok_and(|number| number != "0");
        let role = if kept { "daemon" } else { "holder" };
        let mut command = own_command(directory, role, &absolute(options)?)?;
        return Err(Error::step("starting in the foreground", command.exec()));
    }
    Ok(match start(directory, options).await? {
        Some(_) => UpOutcome::Up,
        None => UpOutcome::AlreadyUp,
    })
}

/// Brings the pool up in the background; gives the holder unless it was up, or brought up by somebody else meanwhile.
pub(crate) async fn start(directory: &PoolDirectory, options: &UpOptions) -> Result<Option<Child>> {
    let client = Client::new(directory);
    if client.is_up().await {
        return Ok(None);
    }
    prepare(directory)?;
    let mut starting = Starting { directory, holder: Some(spawn_holder(directory, &absolute(options)?)?) };
    let began = Instant::now();
    loop {
        if client.is_up().await {
            return Ok(starting.holder.take());
        }
        if let Some(holder) = &mut starting.holder {
            if let Some(status) = holder.try_wait().step(|| "waiting for the daemon".to_owned())? {
                starting.holder = None;
                // Of several that start a pool at once, one becomes its holder; all wait for its daemon.
                if !is_held(directory)? {
                    return Err(failure(directory, &status.to_string()));
                }
            }
        } else if !is_held(directory)? && !client.is_up().await {
            return Err(failure(directory, "as did the one that another command started"));
        }
        if began.elapsed() > START_PATIENCE {
            let why = format!("it has not answered for {} seconds", START_PATIENCE.as_secs());
            return Err(Error::Control { pool: directory.root().to_owned(), why });
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn prepare(directory: &PoolDirectory) -> Result<()> {
    fs::create_dir_all(directory.run()).step(|| format!("making {}", directory.run().display()))?;
    remove_if_there(&directory.failure())
}

/// A pool that is coming up. When nobody waits for it any more, it goes down again.
struct Starting<'a> {
    directory: &'a PoolDirectory,
    holder: Option<Child>,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let Some(mut holder) = self.holder.take() else { return };
        if let Some(pid) = holder.id().and_then(|pid| Pid::from_raw(pid as i32)) {
            // It passes the signal on, and the daemon goes down as soon as it is up.
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let began = Instant::now();
        while began.elapsed() < DOWN_PATIENCE {
            if matches!(holder.try_wait(), Ok(Some(_))) {
                // What led here is what the user must see; what is left, the next up or down removes.
                let _ = Config::load(self.directory).and_then(|config| tear_down(self.directory, &config));
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
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
    own_commands(directory, role, options).map(|make| make())
}

/// The same, any number of times: what could fail is done before.
fn own_commands(directory: &PoolDirectory, role: &str, options: &UpOptions) -> Result<impl Fn() -> Command> {
    let program = std::env::current_exe().step(|| "finding this program".to_owned())?;
    let options = serde_json::to_string(options).step(|| "encoding options".to_owned())?;
    let (root, role) = (directory.root().to_owned(), role.to_owned());
    Ok(move || {
        let mut command = Command::new(&program);
        command.arg("--pool").arg(&root).args(["internal", &role]).arg(&options);
        command
    })
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
    tokio::process::Command::from(command).spawn().step(|| "starting the daemon".to_owned())
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
    let _lock = hold_soon(directory)?;
    let daemon = own_commands(directory, "daemon", options)?;
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

/// As [`hold`], past those who only look whether somebody else has it.
fn hold_soon(directory: &PoolDirectory) -> Result<File> {
    let began = Instant::now();
    loop {
        match hold(directory) {
            Err(Error::Locked(_)) if began.elapsed() < LOOK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

/// Whether somebody starts the daemon again when it dies.
pub(crate) fn is_held(directory: &PoolDirectory) -> Result<bool> {
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
    ask_down(directory).await?;
    let mut lock = keep_down(directory).await?;
    if waiting(directory, &config)?.is_some() {
        drop(lock);
        // Everybody died, and readers wait in the kernel. What they wait for, and what unmounting may need, a daemon has.
        match start(directory, &UpOptions::default()).await {
            Ok(_) => ask_down(directory).await?,
            Err(error) => tracing::warn!("going down without a daemon: {}", error.chain()),
        }
        lock = keep_down(directory).await?;
    }
    tear_down(directory, &config)?;
    drop(lock);
    Ok(())
}

/// Tells the daemon to go down; returns when it does, or when there is none.
async fn ask_down(directory: &PoolDirectory) -> Result<()> {
    let client = Client::new(directory);
    let began = Instant::now();
    loop {
        match client.post::<(), ()>("/down", &()).await {
            Ok(()) => return Ok(()),
            // It dies with its last answer on the way, or is being started again.
            Err(Error::Control { .. } | Error::NotUp(_))
                if is_held(directory)? && began.elapsed() < DOWN_PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(Error::Control { .. } | Error::NotUp(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Waits until neither holder nor daemon are left, and keeps others from starting until it is dropped.
async fn keep_down(directory: &PoolDirectory) -> Result<(File, File)> {
    let began = Instant::now();
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

/// Keeps a pool that is down from coming up while its files are read; `None` when it is up or coming up.
pub(crate) fn hold_down(directory: &PoolDirectory) -> Result<Option<File>> {
    let path = directory.lock();
    let lock = File::create(&path).step(|| format!("making {}", path.display()))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(Error::step(format!("locking {}", path.display()), error)),
    }
}

/// The pool's status: the daemon's own, or what the files tell when it is down.
///
/// # Errors
/// [`Error::NoPool`], and what is wrong with the map.
pub async fn status(directory: &PoolDirectory) -> Result<Status> {
    let config = Config::load(directory)?;
    let client = Client::new(directory);
    let began = Instant::now();
    let _lock = loop {
        match client.get("/status").await {
            Err(Error::NotUp(_)) => {}
            answer => return answer,
        }
        match hold_down(directory)? {
            Some(lock) => break lock,
            None if began.elapsed() > DOWN_PATIENCE => {
                return Err(Error::Locked(directory.root().to_owned()));
            }
            // It is on its way up or down.
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let left = waiting(directory, &config)?;
    let map = Map::open(directory.map()).step(|| "opening the map".to_owned())?.stats();
    Ok(Status {
        pool: directory.root().to_owned(),
        state: if left.is_some() { "waiting" } else { "down" }.to_owned(),
        transport: left.as_ref().map(|left| left.transport.transport().to_string()),
        queues: None,
        data_path: None,
        device: left.as_ref().map(|left| left.device.clone()),
        mount: left.map(|left| left.mount),
        daemon: None,
        r#virtual: VirtualStatus {
            size: config.virtual_size,
            ranges: map.ranges,
            mapped_bytes: map.mapped_bytes,
        },
        cache: CacheStatus { limit: config.cache_limit, ..CacheStatus::default() },
        quota: None,
        images: Vec::new(),
        containers: Vec::new(),
        errors: BTreeMap::new(),
        requests: BTreeMap::new(),
    })
}

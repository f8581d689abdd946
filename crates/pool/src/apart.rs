//! Mounting and unmounting in a process of their own.
//!
//! A mount reads the virtual device, which the daemon serves. Were it the daemon's own thread that waits for such a read
//! when the daemon is killed, neither could end: the thread not without the read, the process (and with it the ublk
//! device's other end, which the next daemon needs) not without the thread. So a child waits, which holds nothing of the
//! daemon's. When the daemon dies meanwhile, the child gets its read from the next daemon and goes on; the lock that it
//! holds keeps that one from mounting a second time.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use loam_sys::process::{Isolation, inherit};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::directory::PoolDirectory;
use crate::error::{Context, Error, Result};
use crate::kernel;
use crate::protocol::Failure;

/// What the child is to do: JSON on its command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Work {
    Mount { virtual_device: PathBuf, local_device: PathBuf, mount_point: PathBuf },
    Unmount { mount_point: PathBuf },
}

/// How it ended: JSON on its standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ended {
    Done,
    Busy,
    Failed(Failure),
}

/// Mounts the pool's filesystem unless it is mounted there already.
///
/// # Errors
/// The kernel's reason, and what to do about it.
pub(crate) fn mount(
    directory: &PoolDirectory,
    virtual_device: &Path,
    local_device: &Path,
    mount_point: &Path,
) -> Result<()> {
    let lock = lock(directory)?;
    if kernel::is_mounted(mount_point, &[virtual_device, local_device])? {
        return Ok(());
    }
    let work = Work::Mount {
        virtual_device: virtual_device.to_owned(),
        local_device: local_device.to_owned(),
        mount_point: mount_point.to_owned(),
    };
    run(directory, &work, lock, mount_point)
}

/// Unmounts what these devices have there, as often as it is mounted there.
///
/// # Errors
/// [`Error::Busy`] with who is in the way.
pub(crate) fn unmount(directory: &PoolDirectory, devices: &[&Path], mount_point: &Path) -> Result<()> {
    let lock = lock(directory)?;
    while kernel::is_mounted(mount_point, devices)? {
        let lock = lock.try_clone().step(|| "passing the lock of mounts on".to_owned())?;
        run(directory, &Work::Unmount { mount_point: mount_point.to_owned() }, lock, mount_point)?;
    }
    Ok(())
}

/// Held by who mounts or unmounts. Waits for a child whose daemon has died.
fn lock(directory: &PoolDirectory) -> Result<File> {
    let path = directory.mount_lock();
    let file = File::create(&path).step(|| format!("making {}", path.display()))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).step(|| format!("locking {}", path.display()))?;
    Ok(file)
}

fn run(directory: &PoolDirectory, work: &Work, lock: File, mount_point: &Path) -> Result<()> {
    let what = || format!("starting a process for {}", mount_point.display());
    let program = std::env::current_exe().step(what)?;
    let work = serde_json::to_string(work).step(what)?;
    let mut command = Command::new(program);
    command.arg("--pool").arg(directory.root()).args(["internal", "mount", &work]);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let isolation = Isolation { new_session: true, parent_death_signal: None };
    inherit(&mut command, vec![lock.into()], isolation);
    let child = command.spawn().step(what)?;
    drop(command);
    let output = child.wait_with_output().step(what)?;
    match serde_json::from_slice(&output.stdout) {
        Ok(Ended::Done) => Ok(()),
        Ok(Ended::Busy) => Err(Error::busy(mount_point)),
        Ok(Ended::Failed(Failure { error, hint })) => Err(Error::Daemon { message: error, hint }),
        Err(_) => Err(Error::step(
            format!("mount point {}", mount_point.display()),
            format!("the process for it ended without an answer ({})", output.status),
        )),
    }
}

/// The child's part.
///
/// # Errors
/// When it does not understand what it is to do, or cannot answer.
pub fn mount_main(directory: &PoolDirectory, work: &str) -> Result<ExitCode> {
    let config = Config::load(directory)?;
    let work = serde_json::from_str(work).step(|| "reading what is to be mounted".to_owned())?;
    let result = match &work {
        Work::Mount { virtual_device, local_device, mount_point } => {
            kernel::mount_pool(&config, virtual_device, local_device, mount_point)
        }
        Work::Unmount { mount_point } => kernel::unmount(mount_point),
    };
    let ended = match result {
        Ok(()) => Ended::Done,
        Err(Error::Busy { .. }) => Ended::Busy,
        Err(error) => Ended::Failed(Failure { error: error.chain(), hint: error.hint() }),
    };
    serde_json::to_writer(std::io::stdout(), &ended).step(|| "answering".to_owned())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_its_end_travel() {
        let work = Work::Mount {
            virtual_device: "/dev/ublkb0".into(),
            local_device: "/dev/loop0".into(),
            mount_point: "/mnt/a \"b\"".into(),
        };
        let text = serde_json::to_string(&work).unwrap();
        assert_eq!(serde_json::from_str::<Work>(&text).unwrap(), work);
        let failed = Ended::Failed(Failure { error: "no".into(), hint: Some("yes".into()) });
        for ended in [Ended::Done, Ended::Busy, failed] {
            let text = serde_json::to_string(&ended).unwrap();
            assert_eq!(serde_json::from_str::<Ended>(&text).unwrap(), ended);
        }
    }

    #[test]
    fn one_at_a_time_mounts() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = PoolDirectory::new(temporary.path()).unwrap();
        std::fs::create_dir(directory.run()).unwrap();
        let held = lock(&directory).unwrap();
        let other = File::create(directory.mount_lock()).unwrap();
        assert!(rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(held);
        assert!(rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok());
    }
}

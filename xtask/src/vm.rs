//! `cargo xtask vm`: runs a command in a virtual machine with a stock Debian kernel, which has the drivers that the
//! machine at hand may lack (ublk, nbd, brd, null_blk), as root and with this machine's own programs.
//!
//! The kernel comes from Debian's backports and is never installed; the guest's root is an overlay on read-only disks
//! made of the host's packages and of the kernel's modules. One virtual machine runs at a time: figures of two at once
//! would be worth nothing.

mod apt;
mod cpio;
mod emulator;
mod guest;
mod kernel;
mod system;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(crate) use kernel::Version;

use crate::setup;
use crate::shell::{output, root, target};

/// What a run may take unless `--timeout` says otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);

const MEMORY: &str = "4G";

/// How a command is run.
pub(crate) struct Options {
    pub(crate) kernel: Version,
    /// As QEMU's `-m` takes it.
    pub(crate) memory: String,
    /// The machine is killed when the command has not ended by then.
    pub(crate) timeout: Duration,
    /// Seen as /share by the guest; what it writes there comes back.
    pub(crate) share: Option<PathBuf>,
}

impl Options {
    /// The defaults on one kernel.
    pub(crate) fn new(kernel: Version) -> Options {
        Options { kernel, memory: MEMORY.into(), timeout: TIMEOUT, share: None }
    }
}

/// The task.
pub(crate) fn run_task(arguments: &[String]) -> Result<ExitCode> {
    let (options, command) = parse(arguments)?;
    setup::run_setup()?;
    run(&options, &command).map(ExitCode::from)
}

fn parse(arguments: &[String]) -> Result<(Options, Vec<String>)> {
    let mut options = Options::new(Version::NEWEST);
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            let command: Vec<String> = words.cloned().collect();
            if command.is_empty() {
                break;
            }
            return Ok((options, command));
        }
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (word.as_str(), None),
        };
        let mut value =
            || value.clone().or_else(|| words.next().cloned()).with_context(|| format!("{name} what?"));
        match name {
            "--kernel" => options.kernel = value()?.parse()?,
            "--memory" => options.memory = value()?,
            "--timeout" => {
                options.timeout = Duration::from_secs(value()?.parse().context("--timeout in seconds")?)
            }
            "--share" => options.share = Some(PathBuf::from(value()?)),
            other => bail!("unknown option '{other}'; the command stands behind `--`"),
        }
    }
    bail!("no command: cargo xtask vm [OPTIONS] -- COMMAND...")
}

/// Runs `command` in a virtual machine, its output to this process's own; returns its exit code.
pub(crate) fn run(options: &Options, command: &[String]) -> Result<u8> {
    if !cfg!(target_arch = "x86_64") {
        bail!("the virtual machine's kernels are those of amd64");
    }
    if let Some(share) = options.share.as_ref().filter(|share| !share.is_dir()) {
        bail!("--share {}: no such directory", share.display());
    }
    let directory = directory();
    let _lock = lock(&directory)?;
    let emulator = emulator::Emulator::find(&directory)?;
    let kernel = kernel::Kernel::find(&directory, options.kernel)?;
    let system = system::disk(&directory)?;
    let accelerator = emulator.accelerator(&directory, &kernel)?;
    let machine = guest::Machine { emulator: &emulator, kernel: &kernel, accelerator, directory: &directory };
    machine.run(options, &system, command)
}

/// Where everything of virtual machines is kept.
fn directory() -> PathBuf {
    target().join("vm")
}

/// One virtual machine at a time; the lock goes with the process.
fn lock(directory: &Path) -> Result<File> {
    fs::create_dir_all(directory)?;
    let path = directory.join("lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("vm: waiting for another virtual machine to end");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).context("locking against other virtual machines");
        }
    }
    Ok(file)
}

/// Makes what `make` writes appear at `path` whole or not at all.
fn whole(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.is_dir() {
        fs::remove_dir_all(&partial)?;
    } else if partial.exists() {
        fs::remove_file(&partial)?;
    }
    make(&partial)?;
    fs::rename(&partial, path).with_context(|| format!("renaming {}", partial.display()))
}

/// An ext4 image of the tree at `tree`, with `spare` bytes free. Debian always has its maker, and its kernels the
/// driver built in.
fn image(tree: &Path, path: &Path, spare: u64) -> Result<()> {
    let mut usage = std::process::Command::new("du");
    let text = output(usage.args(["-sk", "--apparent-size"]).arg(tree))?;
    let kilobytes: u64 =
        text.split_whitespace().next().unwrap_or_default().parse().context("du prints a number")?;
    let size = kilobytes + kilobytes / 5 + (32 << 10) + (spare >> 10);
    let mut make = std::process::Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-i", "8192", "-d"]);
    output(make.arg(tree).arg(path).arg(format!("{size}k")).current_dir(root()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Version, parse};

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_string).collect()
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let (options, command) = parse(&words("--kernel 6.12 --timeout=30 -- uname --kernel")).unwrap();
        assert_eq!((options.kernel, options.timeout.as_secs()), (Version::V6_12, 30));
        assert_eq!(command, ["uname", "--kernel"]);
        assert!(parse(&words("--kernel 6.12 --")).is_err());
        assert!(parse(&words("uname")).is_err());
        assert!(parse(&words("--kernel 5.4 -- true")).is_err());
        assert!(parse(&words("--share")).is_err());
    }
}

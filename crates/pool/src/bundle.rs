//! Running a program in a container: an OCI bundle whose root is the container's subvolume, and `runc` or `crun`
//! from PATH to run it, with the caller's terminal.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::directory::{PoolDirectory, remove_tree};
use crate::error::{Context, Error, Result};

/// The runtimes that are tried, in this order.
const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// The kernel's longest host name (`include/uapi/linux/utsname.h`); names of containers are ASCII.
const HOST_NAME_MAX: usize = 64;

/// What a program in a container may do as root there: the set that container engines give by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What to run in which container.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The container's name; also the runtime's.
    pub name: String,
    /// The container's subvolume.
    pub root: PathBuf,
    /// Program and arguments; a shell when empty.
    pub command: Vec<String>,
    /// Whether standard input is a terminal that the program gets.
    pub terminal: bool,
}

/// Runs the program and waits for it. The bundle is gone afterwards; the container stays. SIGINT, SIGTERM and SIGHUP go to
/// the program; it decides what they mean.
///
/// Returns the program's exit code (128 + signal when it was killed).
///
/// # Errors
/// No runtime in PATH, or the bundle cannot be written.
pub async fn run_container(directory: &PoolDirectory, options: &RunOptions) -> Result<i32> {
    let runtime = find_runtime()?;
    let bundle = directory.bundles().join(&options.name);
    fs::create_dir_all(&bundle).step(|| format!("making bundle {}", bundle.display()))?;
    let config = bundle.join("config.json");
    let text =
        serde_json::to_vec_pretty(&runtime_config(options)).step(|| "encoding config.json".to_owned())?;
    fs::write(&config, text).step(|| format!("writing {}", config.display()))?;
    let mut command = Command::new(&runtime);
    command.arg("--root").arg(directory.run().join("oci")).arg("run");
    command.arg("--bundle").arg(&bundle).arg(&options.name);
    let ended = wait_passing_signals(command, &runtime, options.terminal).await;
    let removed = fs::remove_dir_all(&bundle);
    let status = ended?;
    removed.step(|| format!("removing bundle {}", bundle.display()))?;
    use std::os::unix::process::ExitStatusExt;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

async fn wait_passing_signals(mut command: Command, runtime: &Path, terminal: bool) -> Result<ExitStatus> {
    let what = || format!("running {}", runtime.display());
    let catch = |kind| signal(kind).step(what);
    let mut interrupts = catch(SignalKind::interrupt())?;
    let mut terminations = catch(SignalKind::terminate())?;
    let mut hangups = catch(SignalKind::hangup())?;
    let mut child = command.spawn().step(what)?;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
    loop {
        let passed = tokio::select! {
            status = child.wait() => return status.step(what),
            _ = interrupts.recv() => Signal::INT,
            _ = terminations.recv() => Signal::TERM,
            _ = hangups.recv() => Signal::HUP,
        };
        // A terminal sends these to every process in front of it by itself.
        let already = terminal && passed != Signal::TERM;
        if let (Some(pid), false) = (pid, already) {
            // It may just have ended.
            let _ = rustix::process::kill_process(pid, passed);
        }
    }
}

fn find_runtime() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    RUNTIMES
        .iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |directory| directory.join(name)))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            Error::step("loam run", "neither runc nor crun is in PATH")
                .with_hint("install one of them, or chroot into the path that loam create prints")
        })
}

fn runtime_config(options: &RunOptions) -> Value {
    let shell = ["/bin/sh".to_owned()];
    let args = if options.command.is_empty() { &shell[..] } else { &options.command[..] };
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".into());
    json!({
        "ociVersion": "1.0.2",
        "hostname": options.name.get(..HOST_NAME_MAX).unwrap_or(&options.name),
        "root": { "path": options.root, "readonly": false },
        "process": {
            "terminal": options.terminal,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME=/root",
                format!("TERM={term}"),
            ],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
        },
        "mounts": mounts(),
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
            ],
            "readonlyPaths": [
                "/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

/// The mounts that every container has. The network is the host's, so `/sys` shows the host's and is read-only.
fn mounts() -> Value {
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
          "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
        { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
          "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
          "options": ["nosuid", "noexec", "nodev"] },
        { "destination": "/sys", "type": "none", "source": "/sys",
          "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] },
    ])
}

/// Removes what a runtime and `loam run` keep of containers, when none can be running any more.
pub(crate) fn remove_stale_state(directory: &PoolDirectory) -> Result<()> {
    for path in [directory.run().join("oci"), directory.bundles()] {
        remove_tree(&path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_names_root_and_program() {
        let options = RunOptions {
            name: "web1".into(),
            root: "/pool/mnt/containers/web1".into(),
            command: vec!["python3".into(), "-c".into(), "print(1)".into()],
            terminal: false,
        };
        let config = runtime_config(&options);
        assert_eq!(config["root"]["path"], "/pool/mnt/containers/web1");
        assert_eq!(config["process"]["args"], json!(["python3", "-c", "print(1)"]));
        assert_eq!(config["process"]["terminal"], false);
    }

    #[test]
    fn a_long_name_is_cut_to_a_host_name() {
        let name = "n".repeat(128);
        let options = RunOptions { name, root: "/x".into(), command: vec![], terminal: false };
        let host_name = runtime_config(&options)["hostname"].as_str().map(str::len);
        assert_eq!(host_name, Some(HOST_NAME_MAX));
    }

    #[test]
    fn nothing_is_granted_beyond_the_usual_set() {
        let options = RunOptions { name: "a".into(), root: "/x".into(), command: vec![], terminal: false };
        let config = runtime_config(&options);
        let capabilities = &config["process"]["capabilities"];
        for set in ["bounding", "effective", "permitted"] {
            assert_eq!(capabilities[set], json!(CAPABILITIES), "{set}");
        }
        assert!(capabilities.get("inheritable").is_none() && capabilities.get("ambient").is_none());
        assert!(!CAPABILITIES.contains(&"CAP_SYS_ADMIN"));
        assert_eq!(config["process"]["noNewPrivileges"], true);
    }

    #[test]
    fn without_a_program_there_is_a_shell() {
        let options = RunOptions { name: "a".into(), root: "/x".into(), command: vec![], terminal: true };
        assert_eq!(runtime_config(&options)["process"]["args"], json!(["/bin/sh"]));
    }
}

//! Who keeps a mount busy: `umount` says only EBUSY, so `/proc` is asked which processes have their root, their
//! directory, an open file or a mapping on the filesystem, and which mount namespaces hold a copy of the mount.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that uses a filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// The first part of its command line.
    pub command: String,
    /// What it holds: "its root", "its working directory", "an open file", "a mapped file", "a copy of the mount".
    pub holds: &'static str,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}: {})", self.command, self.pid, self.holds)
    }
}

/// Finds who uses the filesystem mounted at `mount_point`: best effort, as `/proc` may hide processes. Subvolumes
/// have device numbers of their own, so paths below the mount point are compared by prefix as well.
pub fn holders(mount_point: &Path) -> Vec<Holder> {
    // Where nothing is mounted (any more), the directory is on the filesystem of its parent, which everybody uses.
    let device_of = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    let above = mount_point.parent().and_then(device_of);
    let device = device_of(mount_point).filter(|&device| Some(device) != above);
    let own_namespace = fs::read_link("/proc/self/ns/mnt").ok();
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let proc = entry.path();
        let uses = |link: &Path| {
            fs::read_link(link).is_ok_and(|target| target.starts_with(mount_point))
                || device.is_some_and(|device| fs::metadata(link).is_ok_and(|meta| meta.dev() == device))
        };
        let holds = if uses(&proc.join("root")) {
            "its root"
        } else if uses(&proc.join("cwd")) {
            "its working directory"
        } else if any_entry(&proc.join("fd"), uses) {
            "an open file"
        } else if any_entry(&proc.join("map_files"), uses) {
            "a mapped file"
        } else if copies_mount(&proc, mount_point, own_namespace.as_deref()) {
            "a copy of the mount"
        } else {
            continue;
        };
        found.push(Holder { pid, command: command_of(&proc), holds });
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

fn any_entry(directory: &Path, uses: impl Fn(&Path) -> bool) -> bool {
    fs::read_dir(directory).is_ok_and(|entries| entries.flatten().any(|entry| uses(&entry.path())))
}

fn copies_mount(proc: &Path, mount_point: &Path, own_namespace: Option<&Path>) -> bool {
    let Ok(namespace) = fs::read_link(proc.join("ns/mnt")) else { return false };
    if Some(namespace.as_path()) == own_namespace {
        return false;
    }
    let Ok(mounts) = fs::read_to_string(proc.join("mountinfo")) else { return false };
    let wanted = mount_point.to_string_lossy();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(&wanted))
}

fn command_of(proc: &Path) -> String {
    fs::read_to_string(proc.join("comm")).map_or_else(|_| "?".into(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_its_directory_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let canonical = directory.path().canonicalize().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").current_dir(&canonical).spawn().unwrap();
        let by_path: Vec<Holder> =
            holders(&canonical).into_iter().filter(|holder| holder.pid == child.id()).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(by_path.len(), 1);
        assert_eq!(by_path[0].holds, "its working directory");
    }

    #[test]
    fn users_of_the_filesystem_below_are_not_in_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = directory.path().join("elsewhere");
        let empty = directory.path().join("empty");
        fs::create_dir(&elsewhere).unwrap();
        fs::create_dir(&empty).unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").current_dir(&elsewhere).spawn().unwrap();
        let found = holders(&empty.canonicalize().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.iter().all(|holder| holder.pid != child.id()), "{found:?}");
    }
}

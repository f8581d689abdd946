//! What tests of formatted images need of the machine: commands, loop devices, mounts, a recent btrfs-progs.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "shared by test files that each use a part of it"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

pub fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

pub fn must(command: &mut Command) -> String {
    let output = run(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// `btrfs` that knows simple quotas (6.7 and later): `LOAM_BTRFS`, or the one in PATH, or else the one from Debian's
/// backports, unpacked where cargo keeps tests' files.
pub fn btrfs() -> &'static Path {
    static BTRFS: OnceLock<PathBuf> = OnceLock::new();
    BTRFS.get_or_init(|| {
        let chosen = std::env::var_os("LOAM_BTRFS").map_or_else(|| "btrfs".into(), PathBuf::from);
        if knows_simple_quota(&chosen) {
            return chosen;
        }
        let unpacked = Path::new(env!("CARGO_TARGET_TMPDIR")).join("btrfs-progs");
        if !unpacked.exists() {
            let own = format!("{}.{}", unpacked.display(), std::process::id());
            must(Command::new("bash").args(["-euc", BACKPORT, "bash", &own]));
            // Whoever is first wins; the others' copies are as good.
            if fs::rename(format!("{own}/root"), &unpacked).is_err() {
                assert!(unpacked.exists());
            }
            fs::remove_dir_all(own).expect("clean up");
        }
        let chosen = ["bin/btrfs", "usr/bin/btrfs"].map(|path| unpacked.join(path));
        let chosen = chosen.into_iter().find(|path| path.exists()).expect("btrfs in the package");
        assert!(knows_simple_quota(&chosen), "set LOAM_BTRFS to btrfs-progs 6.7 or later");
        chosen
    })
}

/// Takes btrfs-progs from the backports suite of the machine's own mirror by way of a private apt root, `$1`.
const BACKPORT: &str = r#"
mkdir -p "$1/lists/partial" "$1/cache/archives/partial" "$1/etc"
uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -oE 'https?://[^ ]*/debian/? *$' | head -1)
. /etc/os-release
printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\nSigned-By: %s\n' "$uri" "$VERSION_CODENAME" \
    /usr/share/keyrings/debian-archive-keyring.gpg > "$1/etc/backports.sources"
options="-o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=$1/etc -o Dir::State::Lists=$1/lists"
options="$options -o Dir::Cache=$1/cache -o APT::Sandbox::User=root"
apt-get $options update
cd "$1"
apt-get $options download -t "$VERSION_CODENAME-backports" btrfs-progs
dpkg -x btrfs-progs_*.deb root
"#;

fn knows_simple_quota(btrfs: &Path) -> bool {
    let text = must(Command::new(btrfs).arg("--version"));
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('v')).expect("btrfs-progs vX.Y");
    let mut parts = version.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (6, 7)
}

/// A loop device that goes away with its value.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn attach(image: &Path) -> Self {
        // Others look for a free device at the same time, so the first one found may be taken.
        for _ in 0..20 {
            let output = run(Command::new("losetup").args(["-f", "--show"]).arg(image));
            if output.status.success() {
                return Loop(String::from_utf8(output.stdout).expect("a path").trim().into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("no loop device for {}", image.display());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("btrfs").args(["device", "scan", "--forget"]).arg(&self.0).output();
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mount that goes away with its value.
pub struct Mount(pub PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

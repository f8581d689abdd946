//! The end-to-end tests in virtual machines: the same test programs as on the host, on the kernels that loam is made
//! for, once with each transport. Which tests run where is nextest's configuration (`.config/nextest.toml`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::shell::{cargo, output, root, run, target};
use crate::vm::{self, Version};

/// What all tests on one kernel may take.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// The profile of nextest for each transport.
const TRANSPORTS: [&str; 2] = ["ublk", "loop"];

/// The guest's part. A run of no tests fails; with filters, it is enough that one transport has some.
const SCRIPT: &str = r#"
export LOAM_BIN=/share/loam RUST_BACKTRACE=1 NEXTEST_HIDE_PROGRESS_BAR=1
if [ -x /share/btrfs ]; then export LOAM_BTRFS=/share/btrfs; fi
# Random histories of quotas: a third of the host's.
export LOAM_QUOTA_STEPS=45
total=4
for transport in $TRANSPORTS; do
    echo "vm: Linux $(uname -r), $transport" >&2
    code=0
    LOAM_TRANSPORT=$transport ./cargo-nextest nextest run --profile "vm-$transport" --no-fail-fast --no-tests=fail \
        --cargo-metadata cargo-metadata.json --binaries-metadata binaries-metadata.json \
        --workspace-remap workspace --target-dir-remap target "$@" || code=$?
    if [ "$code" -eq 4 ] && [ $# -gt 0 ]; then continue; fi
    case "$total" in 0 | 4) total=$code ;; esac
done
exit "$total"
"#;

/// Runs the tests that match `filters` (all: none given) on `kernels`; returns the exit code of the first that failed.
pub(crate) fn run_tests(kernels: &[Version], filters: &[&str], started: Instant) -> Result<u8> {
    if kernels.is_empty() {
        return Ok(0);
    }
    let share = stage(started)?;
    for kernel in kernels {
        eprintln!("test: [{:>4.0} s] end-to-end tests on Linux {kernel}", started.elapsed().as_secs_f64());
        let mut options = vm::Options::new(*kernel);
        options.timeout = TIMEOUT;
        options.share = Some(share.clone());
        let script = SCRIPT.replace("$TRANSPORTS", &TRANSPORTS.join(" "));
        let mut command: Vec<String> = ["sh", "-uc", &script, "sh"].map(str::to_string).to_vec();
        command.extend(filters.iter().map(ToString::to_string));
        let code = vm::run(&options, &command)?;
        if code != 0 {
            eprintln!("test: end-to-end tests on Linux {kernel} failed");
            return Ok(code);
        }
    }
    Ok(0)
}

/// A folder with all that the guest needs: the binary, the test programs, nextest and what it wants to know of them.
fn stage(started: Instant) -> Result<PathBuf> {
    eprintln!(
        "test: [{:>4.0} s] the binary and the tests for virtual machines",
        started.elapsed().as_secs_f64()
    );
    let share = target().join("vm/test");
    if share.exists() {
        fs::remove_dir_all(&share)?;
    }
    let workspace = share.join("workspace");
    fs::create_dir_all(workspace.join("crates/e2e"))?;
    fs::create_dir_all(workspace.join(".config"))?;
    for file in ["Cargo.toml", ".config/nextest.toml", "crates/e2e/Cargo.toml"] {
        fs::copy(root().join(file), workspace.join(file)).with_context(|| format!("copying {file}"))?;
    }
    strip(&binary()?, &share.join("loam"))?;
    strip(&nextest()?, &share.join("cargo-nextest"))?;
    // A btrfs-progs that the tests took for themselves, because the machine's own, and so the guest's, is too old.
    let unpacked = target().join("tmp/btrfs-progs");
    for btrfs in ["bin/btrfs", "usr/bin/btrfs"].map(|path| unpacked.join(path)) {
        if btrfs.is_file() {
            strip(&btrfs, &share.join("btrfs"))?;
        }
    }
    let metadata = output(&mut cargo(&["metadata", "--format-version", "1", "--offline"]))?;
    fs::write(share.join("cargo-metadata.json"), metadata)?;
    // The test programs wait for loam and for the kernel: as they are built for the host they are good enough.
    let list = [
        "nextest",
        "list",
        "--package",
        "loam-e2e",
        "--list-type",
        "binaries-only",
        "--message-format",
        "json",
    ];
    let binaries = output(&mut cargo(&list))?;
    fs::write(share.join("binaries-metadata.json"), &binaries)?;
    let binaries: Value = serde_json::from_str(&binaries).context("nextest's list of binaries")?;
    let binaries = binaries["rust-binaries"].as_object().context("nextest's list of binaries")?;
    ensure!(!binaries.is_empty(), "there are no end-to-end tests");
    for binary in binaries.values() {
        let path = Path::new(binary["binary-path"].as_str().context("a test binary has a path")?);
        let name =
            path.strip_prefix(target()).with_context(|| format!("{} lies elsewhere", path.display()))?;
        strip(path, &share.join("target").join(name))?;
    }
    Ok(share)
}

/// The binary under test: `LOAM_BIN`, or one built now.
fn binary() -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("LOAM_BIN") {
        return Ok(PathBuf::from(binary));
    }
    run(&mut cargo(&["build", "-q", "--profile", "guest", "--package", "loam"]))?;
    Ok(target().join("guest/loam"))
}

/// A copy without debug information: the folder is packed and carried over at each run.
pub(crate) fn strip(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    output(Command::new("strip").args(["--strip-debug", "-o"]).arg(to).arg(from)).map(drop)
}

/// Where cargo finds its nextest.
fn nextest() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).chain(home.map(|home| home.join("bin")));
    let found = places.find_map(|place| Some(place.join("cargo-nextest")).filter(|path| path.is_file()));
    found.context("cargo-nextest is neither in PATH nor in cargo's own folder")
}

//! Debian packages of other suites than the machine's own, without touching its apt: a private set of sources, lists
//! and archives, whose mirror is the one that the machine itself uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image;
use crate::shell::{describe, output, run};

/// Where the kernels and QEMU 10 are.
const SUITES: &[&str] = &["bookworm", "bookworm-backports", "trixie-backports"];

/// What signs all of them; where it is missing, apt looks for its own.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A private apt.
pub(super) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// One with fresh lists.
    pub(super) fn open(directory: &Path) -> Result<Apt> {
        let apt = Apt { directory: directory.join("apt") };
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(apt.directory.join(part))?;
        }
        let mirror = image::mirror()?;
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let lines = SUITES.iter().map(|suite| format!("deb {signed}{mirror} {suite} main\n"));
        fs::write(apt.directory.join("sources.list"), lines.collect::<String>())?;
        eprintln!("vm: reading the lists of {}", SUITES.join(", "));
        output(apt.command("apt-get").args(["update", "-q"]))
            .context("the suites that have kernels and QEMU")?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let part = |name: &str| self.directory.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", part("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".into(),
            format!("Dir::State::Lists={}", part("lists")),
            format!("Dir::Cache={}", part("")),
            format!("Dir::Cache::Archives={}", part("archives")),
            "Acquire::Languages=none".into(),
            "APT::Sandbox::User=root".into(),
            "Debug::NoLocking=true".into(),
        ] {
            command.args(["-o", &option]);
        }
        command.stdin(std::process::Stdio::null());
        command
    }

    /// The newest package whose name begins and ends like this.
    pub(super) fn newest(&self, prefix: &str, suffix: &str) -> Result<String> {
        let names = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        let found = newest(names.lines(), prefix, suffix);
        found.with_context(|| format!("no package {prefix}*{suffix} in {}", SUITES.join(", ")))
    }

    /// Unpacks these packages, and nothing that they depend on, into `into`.
    pub(super) fn unpack(&self, packages: &[&str], into: &Path) -> Result<()> {
        let debs = self.fetch(|apt, into| run(apt.arg("download").args(packages).current_dir(into)))?;
        unpack(&debs, into)
    }

    /// Unpacks a package of `suite`, and what of its dependencies the machine lacks, into `into`.
    pub(super) fn unpack_closure(&self, package: &str, suite: &str, into: &Path) -> Result<()> {
        let debs = self.fetch(|apt, archives| {
            apt.args(["install", "-y", "--download-only", "--no-install-recommends", "-t", suite, package]);
            output(apt.arg("-o").arg(format!("Dir::Cache::Archives={}", archives.display()))).map(drop)
        })?;
        unpack(&debs, into)
    }

    /// Lets apt-get put packages into a directory of their own and returns them.
    fn fetch(&self, fetch: impl FnOnce(&mut Command, &Path) -> Result<()>) -> Result<Vec<PathBuf>> {
        let archives = self.directory.join("archives");
        fs::remove_dir_all(&archives)?;
        fs::create_dir_all(archives.join("partial"))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "-q"]);
        fetch(&mut command, &archives)?;
        let entries = fs::read_dir(&archives)?.flatten().map(|entry| entry.path());
        let debs: Vec<PathBuf> =
            entries.filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
        ensure!(!debs.is_empty(), "`{}` fetched nothing", describe(&command));
        Ok(debs)
    }
}

fn unpack(debs: &[PathBuf], into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    for deb in debs {
        output(Command::new("dpkg").arg("-x").arg(deb).arg(into))?;
        fs::remove_file(deb)?;
    }
    Ok(())
}

/// The newest of the names between `prefix` and `suffix`, where what stands between is a version alone.
fn newest<'a>(names: impl Iterator<Item = &'a str>, prefix: &str, suffix: &str) -> Option<String> {
    let version = |name: &'a str| {
        let version = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        (!version.contains('-')).then(|| parts(version))
    };
    let versions = names.filter_map(|name| Some((version(name)?, name)));
    versions.max().map(|(_, name)| name.to_string())
}

/// A version as its numbers, in order: `6.12.95+deb12.1` is 6, 12, 95, 12, 1.
fn parts(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn the_newest_is_by_number_and_has_the_flavour_asked_for() {
        let names = [
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64-dbg",
            "linux-image-6.12.95+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.96+deb12-rt-cloud-amd64",
            "linux-image-6.12.97+deb12-amd64",
            "linux-image-6.12.90+deb12.1-cloud-amd64",
        ];
        let found = newest(names.into_iter(), "linux-image-6.12.", "-cloud-amd64");
        assert_eq!(found.as_deref(), Some("linux-image-6.12.95+deb12-cloud-amd64"));
        assert_eq!(newest(names.into_iter(), "linux-image-7.2.", "-cloud-amd64"), None);
    }

    #[test]
    fn a_rebuild_is_newer_than_what_it_rebuilds() {
        let names = ["k-6.12.90+deb12-x", "k-6.12.90+deb12.1-x"];
        assert_eq!(newest(names.into_iter(), "k-", "-x").as_deref(), Some("k-6.12.90+deb12.1-x"));
    }
}

//! The guests' kernels: fetched from Debian's backports, unpacked, and made into an initramfs, which mounts the root,
//! and a disk of modules.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::cpio::Archive;
use super::{image, whole};
use crate::shell::output;

/// The kernel lines that are tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// The oldest that loam supports: long-term support.
    V6_12,
    /// The newest: ublk's zero copy.
    V7_2,
}

impl Version {
    /// Every line, the oldest first.
    pub(crate) const ALL: [Version; 2] = [Version::V6_12, Version::V7_2];
    /// What is used when nothing is said.
    pub(crate) const NEWEST: Version = Version::V7_2;

    fn name(self) -> &'static str {
        match self {
            Version::V6_12 => "6.12",
            Version::V7_2 => "7.2",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Version> {
        match Version::ALL.into_iter().find(|version| version.name() == text) {
            Some(version) => Ok(version),
            None => bail!("no kernel '{text}': there are {}", Version::ALL.map(Version::name).join(", ")),
        }
    }
}

/// What the initramfs loads to reach the root; everything else is in the disk of modules, for modprobe.
const BOOT_MODULES: &[&str] = &["virtio_blk", "ext4", "overlay"];

/// A kernel ready to boot.
pub(super) struct Kernel {
    /// As `uname -r` says.
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) initramfs: PathBuf,
    /// ext4, with /usr/lib/modules/RELEASE.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// The kernel of this line, fetched when it is not there. What is there is not refreshed: remove the folder for that.
    pub(super) fn find(directory: &Path, version: Version) -> Result<Kernel> {
        let directory = directory.join(format!("kernel-{version}"));
        if !directory.join("ready").exists() {
            let parent = directory.parent().context("a kernel has a folder")?;
            whole(&directory, |partial| make(parent, version, partial))
                .with_context(|| format!("fetching a kernel {version} for the virtual machine"))?;
        }
        let release = fs::read_to_string(directory.join("ready"))?;
        let part = |name: &str| directory.join(name);
        Ok(Kernel {
            release,
            image: part("vmlinuz"),
            initramfs: part("initramfs.cpio"),
            modules: part("modules.img"),
        })
    }
}

fn make(cache: &Path, version: Version, into: &Path) -> Result<()> {
    let apt = Apt::open(cache)?;
    let packages = match version {
        Version::V6_12 => vec![apt.newest("linux-image-6.12.", "-cloud-amd64")?],
        Version::V7_2 => {
            let binary = apt.newest("linux-binary-7.2.", "-cloud-amd64")?;
            let others = ["linux-modules", "linux-base"].map(|kind| binary.replace("linux-binary", kind));
            [vec![binary], others.to_vec()].concat()
        }
    };
    let names: Vec<&str> = packages.iter().map(String::as_str).collect();
    eprintln!("vm: fetching {}", names.join(", "));
    let unpacked = into.join("unpacked");
    apt.unpack(&names, &unpacked)?;
    let release =
        names[0].splitn(3, '-').nth(2).context("a kernel package's name holds its release")?.to_string();
    let tree = into.join("tree");
    let modules = tree.join("usr/lib/modules").join(&release);
    fs::create_dir_all(modules.parent().context("a path with folders")?)?;
    let places = ["lib/modules", "usr/lib/modules"].map(|place| unpacked.join(place).join(&release));
    let found = places.iter().find(|place| place.is_dir());
    fs::rename(found.with_context(|| format!("no modules in {}", names.join(", ")))?, &modules)?;
    let images = [unpacked.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let image_path = images.iter().find(|image| image.is_file());
    let image_path = image_path.with_context(|| format!("no kernel image in {}", names.join(", ")))?;
    fs::rename(image_path, into.join("vmlinuz"))?;
    output(Command::new("depmod").arg("-b").arg(tree.join("usr")).arg(&release))?;
    fs::write(into.join("initramfs.cpio"), initramfs(&modules)?)?;
    image(&tree, &into.join("modules.img"), 0)?;
    fs::remove_dir_all(&tree)?;
    fs::remove_dir_all(&unpacked)?;
    Ok(fs::write(into.join("ready"), release)?)
}

/// busybox, the modules that the root needs, and a script that mounts it.
fn initramfs(modules: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "modules", "vm", "system", "kernel", "upper", "root"] {
        archive.directory(directory);
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file());
    archive.file(
        "bin/busybox",
        true,
        &fs::read(busybox.context("no busybox: is busybox-static installed?")?)?,
    );
    archive.file("init", true, include_bytes!("init.sh"));
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let builtin = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut order = String::new();
    for file in closure(&dependencies, &builtin, BOOT_MODULES)? {
        let name = module_name(&file).to_string();
        archive.file(&format!("modules/{name}.ko"), false, &decompressed(&modules.join(&file))?);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", false, order.as_bytes());
    Ok(archive.finish())
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return Ok(fs::read(path)?),
    };
    let output = Command::new(program).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        bail!("{program} cannot decompress {}", path.display());
    }
    Ok(output.stdout)
}

/// `kernel/fs/x/some-name.ko.xz` is the module `some_name`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The files of `modules` and of everything they need, in the order in which they can be loaded, by the text of
/// `modules.dep` (`FILE: FILE...`, the nearest dependency first). Modules that are built in are left out.
fn closure(dependencies: &str, builtin: &str, modules: &[&str]) -> Result<Vec<String>> {
    let builtin: HashSet<String> = builtin.lines().map(module_name).collect();
    let mut order: Vec<String> = Vec::new();
    for module in modules.iter().filter(|module| !builtin.contains(**module)) {
        let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
        let line = lines.into_iter().find(|(file, _)| module_name(file) == *module);
        let (file, needs) = line.with_context(|| format!("the kernel has no module {module}"))?;
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_string());
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::{closure, module_name};

    const DEPENDENCIES: &str = "\
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/fs/ceph/ceph.ko.xz: kernel/lib/libceph.ko.xz kernel/lib/crc16.ko.xz
kernel/drivers/block/virtio_blk.ko.xz:
";

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let order = closure(DEPENDENCIES, "", &["ext4", "ceph"]).unwrap();
        let names: Vec<String> = order.iter().map(|file| module_name(file)).collect();
        assert_eq!(names, ["crc16", "jbd2", "ext4", "libceph", "ceph"]);
    }

    #[test]
    fn what_is_built_in_is_left_out_and_what_is_nowhere_is_an_error() {
        let builtin = "kernel/fs/ext4/ext4.ko\n";
        assert_eq!(closure(DEPENDENCIES, builtin, &["ext4", "virtio_blk"]).unwrap().len(), 1);
        assert!(closure(DEPENDENCIES, builtin, &["btrfs"]).is_err());
        assert_eq!(module_name("kernel/drivers/char/virtio-rng.ko.xz"), "virtio_rng");
    }
}

//! The image of demo and benchmarks: a real root filesystem, made by debootstrap once and kept under target/demo, as a
//! tar with owners as numbers, xattrs and ACLs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::{command, output, run, target};

const SUITE: &str = "bookworm";
/// What the image holds beyond a minimal system.
const INCLUDE: &str = "python3";

/// Where everything of the demo lies.
pub(crate) fn directory() -> PathBuf {
    target().join("demo")
}

/// A root filesystem as a tar, and a program in it with its output.
pub(crate) struct Image {
    pub(crate) tar: PathBuf,
    pub(crate) program: &'static [&'static str],
    pub(crate) expected: &'static str,
}

impl Image {
    /// Debian with python3.
    pub(crate) fn debian() -> Result<Image> {
        let tar = directory().join("www/root.tar");
        if !tar.exists() {
            let root = directory().join("rootfs");
            debootstrap(&root)?;
            pack(&root, &tar)?;
            fs::remove_dir_all(&root).context("removing the unpacked root filesystem")?;
        }
        Ok(Image { tar, program: &["python3", "-c", "print(1)"], expected: "1" })
    }

    /// busybox alone: made in a second, without a network.
    pub(crate) fn busybox() -> Result<Image> {
        let tar = directory().join("www/busybox.tar");
        if !tar.exists() {
            let root = directory().join("busybox");
            fs::create_dir_all(&root)?;
            loam_e2e::tarball::busybox_root(&root);
            pack(&root, &tar)?;
            fs::remove_dir_all(&root)?;
        }
        Ok(Image { tar, program: &["sh", "-c", "echo 1"], expected: "1" })
    }

    /// The tar's name on the web server.
    pub(crate) fn name(&self) -> String {
        self.tar.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The same tar compressed by `program` (gzip, xz), made once.
    pub(crate) fn compressed(&self, program: &str, suffix: &str) -> Result<PathBuf> {
        let path = PathBuf::from(format!("{}.{suffix}", self.tar.display()));
        if !path.exists() {
            let partial = path.with_extension("partial");
            let file = fs::File::create(&partial)?;
            let mut compressor = command(program, &["-c"]);
            run(compressor.arg(&self.tar).stdout(file))?;
            fs::rename(&partial, &path)?;
        }
        Ok(path)
    }
}

fn debootstrap(root: &Path) -> Result<()> {
    let mirror = mirror()?;
    eprintln!("image: debootstrap of {SUITE} with {INCLUDE} from this machine's own mirror");
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    fs::create_dir_all(root)?;
    let log = fs::File::create(directory().join("debootstrap.log"))?;
    let include = format!("--include={INCLUDE}");
    let mut bootstrap = command("debootstrap", &["--variant=minbase", &include, SUITE]);
    let result = run(bootstrap.arg(root).arg(&mirror).stdout(log));
    result.with_context(|| format!("see {}", directory().join("debootstrap.log").display()))?;
    run(Command::new("chroot").arg(root).args(["apt-get", "clean"]))?;
    // A minimal Debian has none of these; a tar that shows fidelity should.
    loam_e2e::tarball::shell(
        root,
        "mkdir srv/demo; cd srv/demo
        printf attributes > xattrs; setfattr -n user.demo -v value xattrs; setfacl -m u:1000:rw- xattrs
        truncate -s 8M sparse; printf middle | dd of=sparse bs=1 seek=4000000 conv=notrunc status=none
        ln xattrs hard-link; ln -s xattrs symbolic-link; mkfifo pipe
        touch -h -d '2001-02-03 04:05:06.123456789' sparse symbolic-link pipe",
    );
    Ok(())
}

/// The mirror that this machine's own apt uses for Debian's main archive.
pub(crate) fn mirror() -> Result<String> {
    let targets =
        output(&mut command("apt-get", &["indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"]))?;
    let mut candidates = targets.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (site, release, component) = (words.next()?, words.next()?, words.next()?);
        let other = ["security", "updates", "backports"].iter().any(|part| release.contains(part));
        (component == "main" && !other && site.contains("debian")).then(|| site.to_string())
    });
    match candidates.next() {
        Some(site) => Ok(site),
        None => bail!("apt on this machine has no Debian archive to take {SUITE} from"),
    }
}

fn pack(root: &Path, tar: &Path) -> Result<()> {
    let parent = tar.parent().context("a tar lies in a directory")?;
    fs::create_dir_all(parent)?;
    let partial = tar.with_extension("partial");
    loam_e2e::tarball::pack(root, &partial);
    Ok(fs::rename(&partial, tar)?)
}

//! A btrfs of its own on loop devices for tests of quotas, and the two judges of its accounts: `loam_seed::quota::verify`
//! and `btrfs check`.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "shared by test files that each use a part of it"
)]

#[path = "../seed_support/mod.rs"]
mod seed_support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use loam_e2e::require_root;
use loam_seed::quota::{self, ExplainOptions, Explanation, GroupId, Report};
use loam_seed::reader::Device;
use loam_sys::btrfs;
pub use seed_support::{Loop, Mount, must, run};

/// A filesystem on image files; unmounted and detached when dropped.
pub struct Filesystem {
    mount: Option<Mount>,
    loops: Vec<Loop>,
    pub directory: tempfile::TempDir,
    images: usize,
}

impl Filesystem {
    /// Formats `images` sparse files of `size` bytes as one filesystem and mounts it.
    pub fn new(images: usize, size: u64, mkfs: &[&str]) -> Self {
        require_root();
        let directory = tempfile::Builder::new().prefix("loam-quota-").tempdir().unwrap();
        let mut filesystem = Filesystem { mount: None, loops: Vec::new(), directory, images };
        for index in 0..images {
            File::create(filesystem.image(index)).unwrap().set_len(size).unwrap();
        }
        filesystem.attach();
        let devices = filesystem.loops.iter().map(|device| &device.0);
        must(Command::new("mkfs.btrfs").args(["-q", "-f"]).args(mkfs).args(devices));
        std::fs::create_dir(filesystem.root()).unwrap();
        filesystem.mount("");
        filesystem
    }

    fn attach(&mut self) {
        self.loops = (0..self.images).map(|index| Loop::attach(&self.image(index))).collect();
    }

    pub fn image(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("image{index}"))
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root().join(path)
    }

    pub fn open(&self, path: impl AsRef<Path>) -> File {
        File::open(self.path(path)).unwrap()
    }

    pub fn device(&self) -> &Path {
        &self.loops[0].0
    }

    /// Mounts with these options. Deleted subvolumes are cleaned away each second, not each half minute.
    pub fn mount(&mut self, options: &str) {
        let mut line = Command::new("mount");
        line.args(["-t", "btrfs", "-o", "commit=1"]);
        must(Command::new("btrfs").args(["device", "scan"]).args(self.loops.iter().map(|device| &device.0)));
        if !options.is_empty() {
            line.args(["-o", options]);
        }
        must(line.arg(self.device()).arg(self.root()));
        self.mount = Some(Mount(self.root()));
    }

    pub fn unmount(&mut self) {
        must(Command::new("umount").arg(self.root()));
        // Its drop would unmount once more.
        if let Some(mount) = self.mount.take() {
            std::mem::forget(mount);
        }
    }

    pub fn sync(&self) {
        btrfs::sync(self.open("")).unwrap();
    }

    /// Waits until deleted subvolumes are gone.
    pub fn clean(&self) {
        must(Command::new("btrfs").args(["subvolume", "sync"]).arg(self.root()));
        self.sync();
    }

    /// The group of the subvolume at a path.
    pub fn group(&self, path: impl AsRef<Path>) -> GroupId {
        GroupId::from_raw(btrfs::subvolume_info(self.open(path)).unwrap().id)
    }

    fn with_devices<T>(&self, look: impl FnOnce(&[Device<'_>]) -> T) -> T {
        // What is below a loop device goes through the page cache of its file: reading the file sees it.
        let files: Vec<File> = (0..self.images).map(|index| File::open(self.image(index)).unwrap()).collect();
        let devices: Vec<Device<'_>> = files.iter().map(|image| Device { name: "image", image }).collect();
        look(&devices)
    }

    /// What loam says of the accounts, mounted or not.
    pub fn verify(&self) -> Report {
        self.with_devices(|devices| {
            let mut refresh = || {
                if self.mount.is_some() {
                    self.sync();
                }
                Ok(())
            };
            quota::when_still(devices, &mut refresh, &mut || quota::verify(devices)).unwrap()
        })
    }

    pub fn explain(&self, group: GroupId) -> Explanation {
        self.sync();
        self.with_devices(|devices| quota::explain(devices, group, &ExplainOptions::default())).unwrap()
    }

    /// Unmounts, asks both judges, and mounts again: the errors of `btrfs check`, none if it is content.
    pub fn judge(&mut self, options: &str) -> (Report, Option<String>) {
        self.unmount();
        let report = self.verify();
        let output = run(Command::new(seed_support::btrfs()).arg("check").arg(self.device()));
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let complaint = !output.status.success() || text.contains("are different");
        self.mount(options);
        (report, complaint.then_some(text))
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        self.mount.take();
    }
}

/// Random numbers that a failure can be repeated with.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // xorshift64*.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 8) % limit.max(1)
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len() as u64) as usize].clone())
    }
}

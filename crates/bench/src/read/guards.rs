//! What has to be taken down again: mounts, loop devices, servers, in the opposite order of their making.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use loam_attach::FileAttachment;
use loam_sys::mount::{self, MountFlags};

/// A closer that looked at the device the moment before (udev) may keep it busy for so long.
const BUSY_TRIES: u32 = 40;
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// Things that go in the opposite order in which they were put here.
#[derive(Default)]
pub(super) struct Guards(Vec<Box<dyn std::any::Any>>);

impl Guards {
    pub(super) fn keep(&mut self, guard: impl std::any::Any) {
        self.0.push(Box::new(guard));
    }
}

impl Drop for Guards {
    fn drop(&mut self) {
        while let Some(guard) = self.0.pop() {
            drop(guard);
        }
    }
}

/// A mount, on a directory that it made.
pub(super) struct Mounted {
    directory: PathBuf,
    /// Members of a btrfs that the kernel shall forget: their names are given to others later.
    forget: Vec<PathBuf>,
}

impl Mounted {
    pub(super) fn mount(
        kind: &str,
        device: &Path,
        directory: &Path,
        options: &[&str],
        read_only: bool,
    ) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let flags = MountFlags { read_only, no_access_time: true, ..MountFlags::default() };
        mount::mount(kind, device, directory, options, flags)?;
        let forget = if kind == "btrfs" { vec![device.to_path_buf()] } else { Vec::new() };
        Ok(Mounted { directory: directory.to_path_buf(), forget })
    }

    /// Has the kernel forget another member too when this is unmounted.
    pub(super) fn with_member(mut self, device: &Path) -> Self {
        self.forget.push(device.to_path_buf());
        self
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut result = mount::unmount(&self.directory);
        for _ in 0..BUSY_TRIES {
            if result.is_ok() {
                break;
            }
            std::thread::sleep(BUSY_WAIT);
            result = mount::unmount(&self.directory);
        }
        if let Err(error) = result {
            eprintln!("loam bench: left behind: {error}");
        }
        for device in &self.forget {
            // Not known any more is as good.
            let _ = loam_sys::btrfs::forget_device(device);
        }
    }
}

/// A loop device on a file.
pub(super) struct OnLoop(FileAttachment);

impl OnLoop {
    pub(super) fn attach(file: &Path, read_only: bool) -> Result<Self> {
        let options = loam_attach::FileOptions { read_only, ..loam_attach::FileOptions::default() };
        let attachment = FileAttachment::attach(file, &options);
        Ok(OnLoop(attachment.with_context(|| format!("no loop device on {}", file.display()))?))
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.device_path()
    }
}

impl Drop for OnLoop {
    fn drop(&mut self) {
        if let Err(error) = self.0.detach() {
            eprintln!("loam bench: left behind: {error}");
        }
    }
}

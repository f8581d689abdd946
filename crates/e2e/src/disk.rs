//! Small filesystems that run full.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// A tmpfs of a few megabytes on a directory; unmounted when dropped.
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts a tmpfs of `bytes` on `path`, which is made if need be.
    pub fn mount(path: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        SmallDisk { path: path.to_path_buf() }
    }

    /// Changes the size of a mounted disk: the administrator makes room, or takes it.
    pub fn resize(&self, bytes: u64) {
        let options = format!("size={bytes}");
        rustix::mount::mount_remount(&self.path, MountFlags::empty(), options.as_str()).unwrap();
    }

    /// Its mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
    }
}

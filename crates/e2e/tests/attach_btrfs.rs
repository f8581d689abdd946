//! The wrapped btrfs ioctls and mount calls against a real filesystem, made by `mkfs.btrfs` on a local file under a loop
//! device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use loam_attach::{Error, FileAttachment, FileOptions};
use loam_e2e::require_root;
use loam_sys::btrfs::{self, InodeFlags, QuotaMode};
use loam_sys::mount::{self, MountFlags};

/// A mounted filesystem of its own; gone when dropped.
struct Filesystem {
    directory: tempfile::TempDir,
    attachment: FileAttachment,
}

impl Filesystem {
    fn new() -> Filesystem {
        require_root();
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        let output = Command::new("mkfs.btrfs").arg("-q").arg(&image).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let attachment = FileAttachment::attach(&image, &FileOptions::default()).unwrap();
        let filesystem = Filesystem { directory, attachment };
        let root = filesystem.root();
        std::fs::create_dir(&root).unwrap();
        let device = filesystem.attachment.device_path();
        mount::mount("btrfs", &device, &root, &["user_subvol_rm_allowed"], MountFlags::default()).unwrap();
        filesystem
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    fn open(&self, path: impl AsRef<Path>) -> File {
        File::open(self.root().join(path)).unwrap()
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        mount::unmount(&self.root()).unwrap();
        self.attachment.detach().unwrap();
    }
}

#[test]
fn subvolumes_and_snapshots() {
    let filesystem = Filesystem::new();
    let root = filesystem.open("");
    assert_eq!(btrfs::subvolume_info(&root).unwrap().id, btrfs::TOP_LEVEL);
    btrfs::create_subvolume(&root, "images").unwrap();
    let images = filesystem.open("images");
    assert_eq!(images.metadata().unwrap().ino(), btrfs::ROOT_INODE);
    btrfs::create_subvolume(&images, "debian").unwrap();
    let debian = filesystem.open("images/debian");
    std::fs::write(filesystem.root().join("images/debian/file"), "content").unwrap();
    let info = btrfs::subvolume_info(&debian).unwrap();
    assert_eq!((info.name.to_str(), info.read_only), (Some("debian"), false));
    assert_eq!(info.parent_id, btrfs::subvolume_info(&images).unwrap().id);

    btrfs::set_read_only(&debian, true).unwrap();
    assert!(btrfs::is_read_only(&debian).unwrap() && btrfs::subvolume_info(&debian).unwrap().read_only);
    let error = std::fs::write(filesystem.root().join("images/debian/file"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(30));

    btrfs::snapshot(&debian, &root, "container", false).unwrap();
    btrfs::snapshot(&debian, &root, "frozen", true).unwrap();
    let (container, frozen) = (filesystem.open("container"), filesystem.open("frozen"));
    assert!(!btrfs::is_read_only(&container).unwrap() && btrfs::is_read_only(&frozen).unwrap());
    assert_eq!(btrfs::subvolume_info(&container).unwrap().parent_uuid, info.uuid);
    assert_eq!(std::fs::read(filesystem.root().join("container/file")).unwrap(), b"content");

    let ids = [&images, &container, &frozen].map(|file| btrfs::subvolume_info(file).unwrap().id);
    assert_eq!(btrfs::children(&root).unwrap(), ids);
    assert_eq!(btrfs::children(&images).unwrap(), [info.id]);
    let error = btrfs::create_subvolume(&root, "frozen").unwrap_err();
    assert_eq!(error.errno(), Some(17), "{error}");
    assert_eq!(btrfs::create_subvolume(&root, "a/b").unwrap_err().errno(), Some(22));
    // One that holds another is not deleted.
    assert!(btrfs::delete_subvolume(&root, "images").is_err());
    drop((images, debian, container, frozen));
    btrfs::delete_subvolume(&root, "frozen").unwrap();
    btrfs::delete_subvolume_by_id(&root, ids[1]).unwrap();
    btrfs::delete_subvolume_by_id(&root, info.id).unwrap();
    btrfs::delete_subvolume(&root, "images").unwrap();
    assert_eq!(btrfs::children(&root).unwrap(), Vec::<u64>::new());
    assert_eq!(btrfs::delete_subvolume(&root, "images").unwrap_err().errno(), Some(2));
}

#[test]
fn more_children_than_one_answer_holds() {
    let filesystem = Filesystem::new();
    let root = filesystem.open("");
    for index in 0..600 {
        btrfs::create_subvolume(&root, format!("s{index}")).unwrap();
    }
    let children = btrfs::children(&root).unwrap();
    assert_eq!(children.len(), 600);
    assert!(children.is_sorted());
}

#[test]
fn clones_share_and_flags_stick() {
    let filesystem = Filesystem::new();
    let path = |name: &str| filesystem.root().join(name);
    std::fs::write(path("source"), vec![7; 1 << 20]).unwrap();
    let source = filesystem.open("source");
    let target = File::create(path("target")).unwrap();
    btrfs::clone_range(&source, 4096, 65536, &target, 8192).unwrap();
    let mut bytes = Vec::new();
    filesystem.open("target").read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), bytes[8191], bytes[8192]), (8192 + 65536, 0, 7));
    assert_eq!(btrfs::clone_range(&source, 1, 4096, &target, 0).unwrap_err().errno(), Some(22));

    let unsummed = File::create(path("unsummed")).unwrap();
    let flags = btrfs::inode_flags(&unsummed).unwrap();
    btrfs::set_inode_flags(&unsummed, flags | InodeFlags::NOCOW).unwrap();
    assert!(btrfs::inode_flags(&unsummed).unwrap().contains(InodeFlags::NOCOW));
    // Checksums on one side only: refused.
    assert_eq!(btrfs::clone_range(&source, 0, 4096, &unsummed, 0).unwrap_err().errno(), Some(22));
}

#[test]
fn simple_quotas_are_charged_and_limited() {
    let filesystem = Filesystem::new();
    let root = filesystem.open("");
    assert_eq!(btrfs::quota_mode(&root).unwrap(), None);
    assert!(btrfs::qgroup_usage(&root).is_err());
    btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
    btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
    assert_eq!(btrfs::quota_mode(&root).unwrap(), Some(QuotaMode::Simple));
    btrfs::create_subvolume(&root, "container").unwrap();
    let container = filesystem.open("container");
    btrfs::limit_subvolume(&container, Some(4 << 20)).unwrap();
    let mut file = File::create(filesystem.root().join("container/file")).unwrap();
    file.write_all(&vec![1; 2 << 20]).unwrap();
    file.sync_all().unwrap();
    btrfs::sync(&root).unwrap();
    let usage = btrfs::qgroup_usage(&container).unwrap();
    assert!((2 << 20..3 << 20).contains(&usage.referenced), "{usage:?}");
    assert_eq!(usage.limit, Some(4 << 20));
    let error = file.write_all(&vec![1; 8 << 20]).and_then(|()| file.sync_all()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(122), "{error}");
    btrfs::limit_subvolume(&container, None).unwrap();
    file.write_all(&vec![1; 8 << 20]).and_then(|()| file.sync_all()).unwrap();
    btrfs::sync(&root).unwrap();
    assert_eq!(btrfs::qgroup_usage(&container).unwrap().limit, None);
    btrfs::disable_quota(&root).unwrap();
    assert_eq!(btrfs::quota_mode(&root).unwrap(), None);
}

#[test]
fn devices_are_listed_and_scanned() {
    let filesystem = Filesystem::new();
    let root = filesystem.open("");
    let info = btrfs::filesystem_info(&root).unwrap();
    assert_eq!((info.devices, info.sector_size), (1, 4096));
    let device = btrfs::device_info(&root, 1).unwrap().unwrap();
    assert_eq!((device.path, device.total_bytes), (filesystem.attachment.device_path(), 512 << 20));
    assert_eq!(btrfs::device_info(&root, 2).unwrap(), None);
    let path = filesystem.attachment.device_path();
    btrfs::scan_device(&path).unwrap();
    assert!(btrfs::forget_device(&path).is_err(), "it is mounted");
}

#[test]
fn a_mounted_file_is_busy_and_the_table_of_mounts_shows_it() {
    let mut filesystem = Filesystem::new();
    assert!(matches!(filesystem.attachment.detach().unwrap_err(), Error::Busy { .. }));
    let root = filesystem.root().canonicalize().unwrap();
    let mounts = mount::mounts().unwrap();
    let entry = mounts.iter().find(|entry| entry.mount_point == root).unwrap();
    assert_eq!((entry.kind.as_str(), &entry.source), ("btrfs", &filesystem.attachment.device_path()));
    let held = filesystem.open("");
    assert_eq!(mount::unmount(&root).unwrap_err().errno(), Some(16));
    drop(held);
}

#[test]
fn a_mount_that_fails_says_why_in_the_kernels_words() {
    require_root();
    let directory = tempfile::tempdir().unwrap();
    let error =
        mount::mount("btrfs", Path::new("none"), directory.path(), &["nonsense"], MountFlags::default());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("the kernel says") && text.contains("nonsense"), "{text}");
    let error = mount::FsContext::open("no-such-filesystem").unwrap_err();
    assert_eq!(error.errno(), Some(19));
}

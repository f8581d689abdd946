//! Online creation on a real btrfs: an image's files, cloned from a stand-in for `.virtual-data`, against what GNU tar
//! extracts from the same archive.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use loam_e2e::tarball::{everything, must, pack, shell, unpack};
use loam_e2e::{compare, require_root};
use loam_image::create::{Control, Created, Target, create};
use loam_image::{BuildOptions, ChunkSink, Error, Index, SourceSpec, build};
use rustix::fs::IFlags;

/// Where in the stand-in the content begins: not at 0, so that a forgotten base shows.
const BASE: u64 = 3 << 20;
const CHUNK_BYTES: u32 = 64 << 10;

/// A btrfs of its own on a loop device, unmounted when dropped.
struct Btrfs {
    top: PathBuf,
    _directory: tempfile::TempDir,
}

impl Btrfs {
    fn new() -> Self {
        require_root();
        let directory = tempfile::tempdir().unwrap();
        let (image, top) = (directory.path().join("disk"), directory.path().join("mnt"));
        File::create(&image).unwrap().set_len(2 << 30).unwrap();
        fs::create_dir(&top).unwrap();
        must(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        must(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&top));
        let made = Btrfs { top, _directory: directory };
        fs::create_dir(made.path("staging")).unwrap();
        let staging = File::open(made.path("staging")).unwrap();
        loam_sys::btrfs::set_inode_flags(&staging, IFlags::NOCOW).unwrap();
        File::create_new(made.path("staging/virtual-data")).unwrap();
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.top.join(name)
    }

    /// Indexes a source while its content goes into the stand-in.
    fn index(&self, source: &str) -> Index {
        let spec: SourceSpec = source.parse().unwrap();
        let file = fs::OpenOptions::new().write(true).open(self.path("staging/virtual-data")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let options = BuildOptions { chunk_bytes: CHUNK_BYTES, ..BuildOptions::default() };
        let built = runtime.block_on(build(&spec, &options, Some(Box::new(Fill(file))))).unwrap();
        Index::open(built.index).unwrap()
    }

    fn create(&self, index: &Index, name: &str, control: &Control) -> Result<Created, Error> {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        let root = File::open(&path).unwrap();
        let staging = File::open(self.path("staging")).unwrap();
        let virtual_data = File::open(self.path("staging/virtual-data")).unwrap();
        let target = Target {
            root: root.as_fd(),
            staging: staging.as_fd(),
            virtual_data: virtual_data.as_fd(),
            base: BASE,
            path: &path,
        };
        create(index, &target, control)
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.top).status();
        assert!(
            status.is_ok_and(|status| status.success()) || std::thread::panicking(),
            "the btrfs stays mounted"
        );
    }
}

struct Fill(File);

impl ChunkSink for Fill {
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> Result<(), loam_content::Error> {
        self.0.write_all_at(bytes, BASE + number * u64::from(CHUNK_BYTES)).unwrap();
        Ok(())
    }
}

#[track_caller]
fn assert_same(left: &Path, right: &Path) -> compare::Report {
    let report = compare::trees(left, right, &[]).unwrap();
    assert!(report.differences.is_empty(), "{:#?}", report.differences);
    report
}

#[test]
fn everything_is_as_tar_extracts_it() {
    let btrfs = Btrfs::new();
    let (tree, tar) = (btrfs.path("tree"), btrfs.path("tree.tar"));
    everything(&tree);
    pack(&tree, &tar);
    unpack(&tar, &btrfs.path("extracted"));
    let index = btrfs.index(&format!("tar:{}", tar.display()));
    let created = btrfs.create(&index, "image", &Control::default()).unwrap();
    let report = assert_same(&btrfs.path("extracted"), &btrfs.path("image"));
    assert_eq!(report.entries, created.entries);
    assert!(created.clones > 0 && created.bytes > 0);
    // Again after everything went to disk and came back.
    must(Command::new("sync").arg("-f").arg(&btrfs.top));
    loam_e2e::drop_page_cache();
    assert_same(&btrfs.path("extracted"), &btrfs.path("image"));
}

#[test]
fn a_directory_is_as_it_was() {
    let btrfs = Btrfs::new();
    let tree = btrfs.path("tree");
    everything(&tree);
    shell(
        &tree,
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")' && touch -d @5 .",
    );
    let index = btrfs.index(&format!("dir:{}", tree.display()));
    btrfs.create(&index, "image", &Control::default()).unwrap();
    assert_same(&tree, &btrfs.path("image"));
}

#[test]
fn clones_take_no_space_and_holes_stay_holes() {
    let btrfs = Btrfs::new();
    let tree = btrfs.path("tree");
    everything(&tree);
    let index = btrfs.index(&format!("dir:{}", tree.display()));
    btrfs.create(&index, "image", &Control::default()).unwrap();
    let usage =
        must(Command::new("btrfs").args(["filesystem", "du", "-s", "--raw"]).arg(btrfs.path("image")));
    let line = usage.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
    let exclusive: u64 = line[1].parse().unwrap();
    assert!(exclusive < 64 << 10, "{usage}");
    let extents = must(Command::new("filefrag").arg(btrfs.path("image/all-hole")));
    assert!(extents.contains(" 0 extents"), "{extents}");
    must(Command::new("sync").arg("-f").arg(&btrfs.top));
}

#[test]
fn trees_deeper_than_the_open_descriptors() {
    let btrfs = Btrfs::new();
    let tree = btrfs.path("tree");
    fs::create_dir(&tree).unwrap();
    let deep = "d/".repeat(1500);
    shell(&tree, &format!("mkdir -p {deep}; echo bottom > {deep}file; ln {deep}file other"));
    shell(
        &tree,
        "cd d/d/d; mkdir e; echo x > e/f; find . -depth -type d | head -1000 | xargs touch -d @77.5 -h",
    );
    let (tar, extracted) = (btrfs.path("tree.tar"), btrfs.path("extracted"));
    pack(&tree, &tar);
    unpack(&tar, &extracted);
    let index = btrfs.index(&format!("tar:{}", tar.display()));
    btrfs.create(&index, "image", &Control::default()).unwrap();
    assert_same(&extracted, &btrfs.path("image"));
}

#[test]
fn what_is_in_the_way_is_an_error_with_path_and_step() {
    let btrfs = Btrfs::new();
    let tree = btrfs.path("tree");
    fs::create_dir_all(tree.join("dir")).unwrap();
    fs::write(tree.join("dir/file"), vec![1; 10_000]).unwrap();
    let index = btrfs.index(&format!("dir:{}", tree.display()));
    let outside = btrfs.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::create_dir(btrfs.path("image")).unwrap();
    std::os::unix::fs::symlink(&outside, btrfs.path("image/dir")).unwrap();
    let error = btrfs.create(&index, "image", &Control::default()).unwrap_err().to_string();
    assert!(error.contains("image/dir") && error.contains("make the directory"), "{error}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "something was made through the link");

    let staging = File::open(btrfs.path("staging")).unwrap();
    loam_sys::btrfs::set_inode_flags(&staging, IFlags::empty()).unwrap();
    let error = btrfs.create(&index, "other", &Control::default()).unwrap_err().to_string();
    assert!(error.contains("other/dir/file") && error.contains("clone 12288 bytes"), "{error}");
}

#[test]
fn progress_is_told_and_a_wish_to_stop_is_heard() {
    let btrfs = Btrfs::new();
    let tree = btrfs.path("tree");
    fs::create_dir(&tree).unwrap();
    shell(&tree, "for i in $(seq 3000); do : > $i; done");
    let index = btrfs.index(&format!("dir:{}", tree.display()));
    let (seen, cancel) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (told, stop) = (seen.clone(), cancel.clone());
    let progress: Arc<dyn Fn(u64) + Send + Sync> = Arc::new(move |entries| {
        told.store(entries, Ordering::Relaxed);
        stop.store(entries >= 2048, Ordering::Relaxed);
    });
    let control = Control { cancel, progress: Some(progress) };
    assert!(matches!(btrfs.create(&index, "image", &control), Err(Error::Cancelled)));
    assert_eq!(seen.load(Ordering::Relaxed), 2048);
}

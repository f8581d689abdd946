//! Formatted images against the two judges that count: `btrfs check` and the kernel. Needs root, loop devices and a
//! tmpfs at /dev/shm (virtual images are longer than ext4 takes).

mod seed_support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use loam_seed::{
    Attributes, FileTree, Layout, MemoryTree, NodeKind, OwnedKind, Record, Report, Run, SeedOptions,
    Subvolume, Timestamp, TreeFilter, VIRTUAL_BASE, Value, inline_max, inspect, verify, write,
};
use seed_support::{Loop, Mount, btrfs, must, run};

const SECTOR: u64 = 4096;
const TIB: u64 = 1 << 40;
/// Runs that several files are clones of: (address, bytes); the tests write a pattern there.
const FILLED: u64 = 1 << 20;

/// A formatted image in a folder of its own.
struct Seed {
    directory: tempfile::TempDir,
    options: SeedOptions,
    report: Report,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Options with an identity that nobody on this host has.
fn options() -> SeedOptions {
    let mut identity = [0; 32];
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let words = [now, std::process::id().into(), COUNTER.fetch_add(1, Ordering::Relaxed)];
    for (part, word) in identity.chunks_exact_mut(8).zip(words) {
        part.copy_from_slice(&word.to_le_bytes());
    }
    SeedOptions {
        local_size: 1 << 30,
        label: "loam".to_owned(),
        timestamp: Timestamp { seconds: 1_234_567_890, nanoseconds: 5 },
        ..SeedOptions::new(identity)
    }
}

fn image(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).expect("an image file")
}

impl Seed {
    fn make(options: SeedOptions, subvolumes: &[Subvolume<'_>]) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a folder on tmpfs");
        let mut virtual_image = image(&directory.path().join("virtual"));
        let mut local = image(&directory.path().join("local"));
        let with_local: Option<&mut dyn loam_seed::Image> =
            if options.layout == Layout::Pair { Some(&mut local) } else { None };
        let report = write(&options, subvolumes, &mut virtual_image, with_local).expect("formatted");
        if options.layout != Layout::Pair {
            local.set_len(options.local_size).expect("local");
        }
        Seed { directory, options, report }
    }

    fn virtual_path(&self) -> PathBuf {
        self.directory.path().join("virtual")
    }

    fn local_path(&self) -> PathBuf {
        self.directory.path().join("local")
    }

    fn attach(&self) -> (Loop, Loop) {
        (Loop::attach(&self.virtual_path()), Loop::attach(&self.local_path()))
    }

    /// `btrfs check` of the attached devices, which must find nothing.
    fn check(&self, devices: &(Loop, Loop)) {
        let is_pair = self.options.layout == Layout::Pair;
        let main = if is_pair { &devices.1 } else { &devices.0 };
        check(main, &devices.0);
        self.verify(is_pair);
    }

    /// The project's own verifier, which must find nothing either.
    fn verify(&self, with_local: bool) {
        let open = |path| File::open(path).expect("image");
        let (virtual_image, local) = (open(self.virtual_path()), open(self.local_path()));
        let local: Option<&dyn loam_seed::ReadAt> = if with_local { Some(&local) } else { None };
        let verification = verify(&virtual_image, local).expect("readable");
        let text: String = verification.findings.iter().map(|finding| format!("{finding}\n")).collect();
        assert!(verification.is_clean(), "{text}");
    }

    fn mount_pair(&self, devices: &(Loop, Loop), options: &str) -> Mount {
        let point = self.directory.path().join("mnt");
        fs::create_dir_all(&point).expect("a mount point");
        let options = format!("device={},noatime{options}", devices.0.0.display());
        must(Command::new("mount").args(["-t", "btrfs", "-o", &options]).arg(&devices.1.0).arg(&point));
        Mount(point)
    }

    /// Writes a pattern to `length` bytes of the virtual region.
    fn fill(&self, address: u64, length: u64) {
        let file = OpenOptions::new().write(true).open(self.virtual_path()).expect("virtual image");
        file.write_all_at(&pattern(address, length), VIRTUAL_BASE + address).expect("filled");
    }
}

fn check(device: &Loop, other: &Loop) {
    must(Command::new(btrfs()).args(["device", "scan"]).arg(&other.0));
    let output = run(Command::new(btrfs()).args(["check"]).arg(&device.0));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("no error found"), "{text}");
    for word in ["mismatch", "warning", "WARNING", "ERROR", "Counts for qgroup"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}

/// Every eight bytes hold their own address.
fn pattern(address: u64, length: u64) -> Vec<u8> {
    (0..length / 8).flat_map(|word| (address + 8 * word).to_be_bytes()).collect()
}

fn attributes(mode: u32, id: u32) -> Attributes {
    let time =
        |offset: i64, nanoseconds| Timestamp { seconds: 1_600_000_000 + i64::from(id) + offset, nanoseconds };
    Attributes {
        uid: 1000 + id,
        gid: 2000 + id,
        mode,
        atime: time(0, 123_456_789),
        mtime: time(10, 999_999_999),
        ctime: time(20, 1),
    }
}

/// One of everything that a file tree can hold.
fn everything(virtual_size: u64, node_size: u32) -> MemoryTree {
    let mut tree = MemoryTree::new(attributes(0o751, 0));
    let add = |tree: &mut MemoryTree, parent, name: &str, kind, mode| {
        let id = tree.len() as u32;
        tree.add(parent, name, kind, attributes(mode, id))
    };
    let run = |file_offset, address, length| Run { file_offset, address, length };
    let file = |size, runs: &[Run]| OwnedKind::File { size, runs: runs.to_vec() };
    let etc = add(&mut tree, 0, "etc", OwnedKind::Directory, 0o1777);
    let deep = add(&mut tree, etc, "deep", OwnedKind::Directory, 0o700);
    add(&mut tree, 0, "empty-directory", OwnedKind::Directory, 0o500);
    add(&mut tree, etc, "empty", file(0, &[]), 0o644);
    add(&mut tree, etc, "inline-empty", OwnedKind::Inline(Vec::new()), 0o644);
    add(&mut tree, etc, "inline", OwnedKind::Inline(b"root:x:0:0\n".to_vec()), 0o4755);
    add(&mut tree, etc, "inline-longest", OwnedKind::Inline(vec![b'i'; inline_max(node_size)]), 0o600);
    let plain = add(&mut tree, deep, "plain", file(10_000, &[run(0, 8192, 10_000)]), 0o644);
    add(&mut tree, deep, "same-run", file(10_000, &[run(0, 8192, 10_000)]), 0o640);
    add(&mut tree, deep, "all-hole", file(5 << 20, &[]), 0o644);
    let parts = [run(SECTOR, 3 * SECTOR, 2 * SECTOR), run(8 * SECTOR, 40 * SECTOR, 100)];
    add(&mut tree, deep, "holes", file(8 * SECTOR + 100, &parts), 0o644);
    let slices: Vec<Run> = (0..64).map(|index| run(2 * index * SECTOR, index * SECTOR, SECTOR)).collect();
    add(&mut tree, deep, "slices", file(127 * SECTOR, &slices), 0o644);
    let straight = [run(0, 0, SECTOR), run(SECTOR, SECTOR, SECTOR), run(2 * SECTOR, 2 * SECTOR, SECTOR)];
    add(&mut tree, deep, "three-runs-one-reference", file(3 * SECTOR, &straight), 0o644);
    if virtual_size > 128 * TIB {
        let edge = 128 * TIB - 2 * SECTOR;
        add(&mut tree, deep, "across-chunks", file(4 * SECTOR, &[run(0, edge, 4 * SECTOR)]), 0o644);
    }
    let end = virtual_size - SECTOR;
    add(&mut tree, deep, "last-sector", file(SECTOR, &[run(0, end, SECTOR)]), 0o644);
    add(&mut tree, 0, "link", OwnedKind::Symlink(b"etc/deep/plain".to_vec()), 0o777);
    add(&mut tree, 0, "long-link", OwnedKind::Symlink(vec![b'l'; inline_max(node_size)]), 0o777);
    add(&mut tree, 0, "null", OwnedKind::CharacterDevice { major: 1, minor: 3 }, 0o666);
    add(&mut tree, 0, "disk", OwnedKind::BlockDevice { major: 259, minor: 70_000 }, 0o660);
    add(&mut tree, 0, "fifo", OwnedKind::Fifo, 0o622);
    add(&mut tree, 0, "socket", OwnedKind::Socket, 0o755);
    add(&mut tree, etc, "hard", OwnedKind::HardLink(plain), 0);
    let next = tree.len() as u32 + 1;
    add(&mut tree, 0, "hard-before-its-node", OwnedKind::HardLink(next), 0);
    let many = add(&mut tree, deep, "many-names", file(SECTOR, &[run(0, 0, SECTOR)]), 0o644);
    for index in 0..1200 {
        add(&mut tree, deep, &format!("{:0>200}", index), OwnedKind::HardLink(many), 0);
    }
    // Pairs of names with one hash.
    let colliding = add(&mut tree, 0, "ue2r43xy", OwnedKind::Inline(b"1".to_vec()), 0o644);
    add(&mut tree, 0, "c54cvxdh", OwnedKind::Inline(b"2".to_vec()), 0o644);
    tree.set_xattr(colliding, "user.qmeo5att", "one");
    tree.set_xattr(colliding, "user.whdasbt4", "two");
    tree.set_xattr(colliding, "user.empty", "");
    tree.set_xattr(etc, "user.directory", vec![0xff; 1000]);
    tree.set_xattr(0, "trusted.root", "of the tree");
    tree.set_xattr(
        plain,
        "security.capability",
        vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    for index in 0..300 {
        add(
            &mut tree,
            0,
            &format!("file {index} \u{fc}\u{1f}"),
            file(SECTOR, &[run(0, index * SECTOR, SECTOR)]),
            0o644,
        );
    }
    tree
}

/// The path of a node below the root of its tree.
fn path_of(tree: &MemoryTree, mut index: usize) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let mut names = Vec::new();
    while index != 0 {
        let node = tree.node(index);
        names.push(std::ffi::OsStr::from_bytes(node.name).to_owned());
        index = node.parent as usize;
    }
    names.iter().rev().collect()
}

fn assert_time(what: &str, path: &Path, seconds: i64, nanoseconds: i64, expected: Timestamp) {
    assert_eq!(
        (seconds, nanoseconds),
        (expected.seconds, expected.nanoseconds.into()),
        "{what} of {}",
        path.display()
    );
}

/// Compares a mounted tree with the plan: every attribute, every byte that is short enough to read.
fn compare(tree: &MemoryTree, mounted: &Path, contents: bool) {
    let mut names: BTreeMap<usize, u64> = BTreeMap::new();
    for index in 0..tree.len() {
        let target = match tree.node(index).kind {
            NodeKind::HardLink(target) => target as usize,
            _ => index,
        };
        *names.entry(target).or_default() += 1;
    }
    let mut found = 0;
    for index in 0..tree.len() {
        let path = mounted.join(path_of(tree, index));
        let target = match tree.node(index).kind {
            NodeKind::HardLink(target) => target as usize,
            _ => index,
        };
        let node = tree.node(target);
        let is = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        found += 1;
        let a = node.attributes;
        assert_eq!((is.uid(), is.gid(), is.mode() & 0o7777), (a.uid, a.gid, a.mode), "{}", path.display());
        assert_time("atime", &path, is.atime(), is.atime_nsec(), a.atime);
        assert_time("mtime", &path, is.mtime(), is.mtime_nsec(), a.mtime);
        assert_time("ctime", &path, is.ctime(), is.ctime_nsec(), a.ctime);
        assert_eq!(is.nlink(), names[&target], "{}", path.display());
        let kind = is.file_type();
        match tree.kind(target) {
            OwnedKind::Directory => assert!(kind.is_dir()),
            OwnedKind::Symlink(to) => {
                assert_eq!(fs::read_link(&path).expect("readlink").as_os_str().as_encoded_bytes(), &to[..])
            }
            OwnedKind::Inline(data) => assert_eq!(&fs::read(&path).expect("read"), data),
            OwnedKind::File { size, runs } => {
                assert_eq!(is.size(), *size);
                let bytes: u64 = runs.iter().map(|run| run.length.next_multiple_of(SECTOR)).sum();
                assert_eq!(is.blocks() * 512, bytes, "{}", path.display());
                if contents {
                    let mut expected = vec![0; *size as usize];
                    for run in runs.iter().filter(|run| run.address < FILLED) {
                        let start = run.file_offset as usize;
                        let part = &mut expected[start..start + run.length as usize];
                        part.copy_from_slice(
                            &pattern(run.address, run.length.next_multiple_of(8))[..part.len()],
                        );
                    }
                    assert!(fs::read(&path).expect("read") == expected, "content of {}", path.display());
                }
            }
            OwnedKind::CharacterDevice { major, minor } | OwnedKind::BlockDevice { major, minor } => {
                assert!(kind.is_char_device() || kind.is_block_device());
                let device = rustix::fs::makedev(*major, *minor);
                assert_eq!(is.rdev(), device, "{}", path.display());
            }
            OwnedKind::Fifo => assert!(kind.is_fifo()),
            OwnedKind::Socket => assert!(kind.is_socket()),
            OwnedKind::HardLink(_) => unreachable!("resolved above"),
        }
        compare_xattrs(tree, target, &path);
    }
    let listed = must(Command::new("find").arg(mounted).args(["-printf", "x"]));
    assert_eq!(listed.len(), found);
}

fn compare_xattrs(tree: &MemoryTree, node: usize, path: &Path) {
    let mut value = vec![0; 4096];
    let mut list = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut list[..]).expect("llistxattr");
    let listed = list[..length].iter().filter(|&&byte| byte == 0).count();
    assert_eq!(listed, tree.xattrs_of(node).len(), "{}", path.display());
    for (name, expected) in tree.xattrs_of(node) {
        let name = std::str::from_utf8(name).expect("a name");
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("lgetxattr");
        assert_eq!(&value[..length], &expected[..], "{name} of {}", path.display());
    }
}

#[test]
fn pairs_pass_check_and_mount_with_everything_in_place() {
    for (virtual_size, node_size) in [
        (1 << 30, 4096),
        (TIB + (64 << 10), 16 << 10),
        (200 * TIB, 64 << 10),
        (4 << 60, 16 << 10),
        (7 << 60, 32 << 10),
    ] {
        let tree = everything(virtual_size, node_size);
        let empty = MemoryTree::new(attributes(0o755, 7));
        let subvolumes = [
            Subvolume { name: "image", tree: &tree, readonly: true },
            Subvolume { name: "empty", tree: &empty, readonly: false },
            Subvolume { name: "writable", tree: &tree, readonly: false },
        ];
        // A local device that is long enough for the third superblock has it.
        let local_size = if virtual_size == 4 << 60 { 300 << 30 } else { 1 << 30 };
        let options = SeedOptions { virtual_size, node_size, local_size, ..options() };
        let seed = Seed::make(options, &subvolumes);
        seed.fill(0, FILLED);
        let devices = seed.attach();
        seed.check(&devices);
        {
            let mount = seed.mount_pair(&devices, "");
            compare(&tree, &mount.0.join("image"), true);
            compare(&tree, &mount.0.join("writable"), false);
            compare(&empty, &mount.0.join("empty"), true);
            let refused = File::create(mount.0.join("image/new")).expect_err("read-only subvolume");
            assert_eq!(refused.raw_os_error(), Some(30));
            let writable = mount.0.join("writable");
            fs::write(writable.join("new"), vec![7; 1 << 20]).expect("write");
            let clone = OpenOptions::new().write(true).open(writable.join("etc/deep/plain")).expect("open");
            clone.write_all_at(b"overwritten", 5000).expect("overwrite a clone");
            fs::remove_file(writable.join("etc/deep/slices")).expect("remove");
            fs::remove_dir_all(mount.0.join("writable/empty-directory")).expect("remove");
            let by_id = must(Command::new("btrfs").args(["subvolume", "list"]).arg(&mount.0));
            for (id, subvolume) in seed.report.subvolume_ids.iter().zip(&subvolumes) {
                assert!(by_id.contains(&format!("ID {id} ")) && by_id.contains(subvolume.name), "{by_id}");
            }
            let virtual_data = fs::metadata(mount.0.join(".virtual-data")).expect("stat");
            assert_eq!((virtual_data.size(), virtual_data.mode()), (virtual_size, 0o100_400));
        }
        seed.check(&devices);
        let mount = seed.mount_pair(&devices, ",subvol=writable");
        assert_eq!(fs::read(mount.0.join("new")).expect("read"), vec![7; 1 << 20]);
        let mut expected = pattern(8192, 10_000);
        expected[5000..5011].copy_from_slice(b"overwritten");
        assert_eq!(fs::read(mount.0.join("etc/hard")).expect("read"), expected);
    }
}

#[test]
fn every_node_size_is_fine_with_and_without_quota() {
    let mut layouts = 0;
    for node_size in [4096, 8192, 16 << 10, 32 << 10, 64 << 10] {
        for simple_quota in [false, true] {
            let tree = everything(300 * TIB, node_size);
            let subvolume = Subvolume { name: "image", tree: &tree, readonly: false };
            let options = SeedOptions {
                virtual_size: 300 * TIB,
                node_size,
                simple_quota,
                local_size: 256 << 20,
                ..options()
            };
            let seed = Seed::make(options, &[subvolume]);
            let devices = seed.attach();
            seed.check(&devices);
            {
                let mount = seed.mount_pair(&devices, "");
                compare(&tree, &mount.0.join("image"), false);
                fs::write(mount.0.join("image/new"), vec![7; 10 << 20]).expect("write");
            }
            seed.check(&devices);
            layouts += 1;
        }
    }
    assert_eq!(layouts, 10);
}

/// Bytes that a mounted file system charges to a subvolume.
fn charged(mount: &Path, subvolume: u64) -> u64 {
    must(Command::new("btrfs").args(["filesystem", "sync"]).arg(mount));
    let text = must(Command::new("btrfs").args(["qgroup", "show", "--raw"]).arg(mount));
    let name = format!("0/{subvolume}");
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(&name));
    let line = line.unwrap_or_else(|| panic!("no group {name}: {text}"));
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn simple_quotas_charge_writes_and_never_virtual_data() {
    let tree = everything(4 << 60, 16 << 10);
    let subvolume = Subvolume { name: "image", tree: &tree, readonly: false };
    let seed = Seed::make(SeedOptions { simple_quota: true, ..options() }, &[subvolume]);
    let (id, devices) = (seed.report.subvolume_ids[0], seed.attach());
    {
        let mount = seed.mount_pair(&devices, "");
        let image = mount.0.join("image");
        assert_eq!((charged(&mount.0, 5), charged(&mount.0, id)), (0, 0));
        fs::write(image.join("new"), vec![7; 10 << 20]).expect("write");
        let after_write = charged(&mount.0, id);
        let metadata_max = 1 << 20;
        assert!((10 << 20..(10 << 20) + metadata_max).contains(&after_write), "{after_write}");
        fs::remove_file(image.join("etc/deep/slices")).expect("remove");
        fs::remove_file(image.join("etc/deep/last-sector")).expect("remove");
        let after_removal = charged(&mount.0, id);
        assert!(after_removal <= after_write + metadata_max && after_removal >= 10 << 20, "{after_removal}");
        fs::remove_file(image.join("new")).expect("remove");
        assert!(charged(&mount.0, id) < metadata_max);
        must(Command::new("btrfs").args(["qgroup", "limit", "5M", &format!("0/{id}")]).arg(&mount.0));
        let error = fs::write(image.join("too-large"), vec![7; 20 << 20]).expect_err("over the limit");
        assert_eq!(error.raw_os_error(), Some(122));
        must(Command::new("btrfs").args(["subvolume", "snapshot"]).arg(&image).arg(mount.0.join("snapshot")));
        must(Command::new("btrfs").args(["subvolume", "delete", "-c"]).arg(&image));
        must(Command::new("btrfs").args(["subvolume", "sync"]).arg(&mount.0));
    }
    seed.check(&devices);
}

#[test]
fn a_single_seed_is_sprouted_by_adding_a_device() {
    for (virtual_size, node_size) in [(1 << 30, 16 << 10), (1000 * TIB, 16 << 10), (4 << 60, 64 << 10)] {
        let tree = everything(virtual_size, node_size);
        let subvolume = Subvolume { name: "image", tree: &tree, readonly: false };
        let options = SeedOptions { layout: Layout::Single, virtual_size, node_size, ..options() };
        let seed = Seed::make(options, &[subvolume]);
        seed.fill(0, FILLED);
        let devices = seed.attach();
        seed.check(&devices);
        let point = seed.directory.path().join("mnt");
        fs::create_dir_all(&point).expect("a mount point");
        {
            must(Command::new("mount").args(["-o", "noatime"]).arg(&devices.0.0).arg(&point));
            let mount = Mount(point.clone());
            compare(&tree, &mount.0.join("image"), true);
            must(Command::new("btrfs").args(["device", "add", "-f"]).arg(&devices.1.0).arg(&mount.0));
            must(Command::new("mount").args(["-o", "remount,rw"]).arg(&mount.0));
            fs::write(mount.0.join("image/new"), b"sprouted").expect("write");
        }
        check(&devices.1, &devices.0);
        seed.verify(true);
        let mount = seed.mount_pair(&devices, ",subvol=image");
        assert_eq!(fs::read(mount.0.join("new")).expect("read"), b"sprouted");
    }
}

#[test]
fn a_mega_extent_mounts_up_to_the_kernels_limit_and_says_why_not_beyond() {
    for (virtual_size, fine) in [(200 * TIB, true), (4 << 60, false)] {
        let seed = Seed::make(SeedOptions { layout: Layout::MegaExtent, virtual_size, ..options() }, &[]);
        assert_eq!(seed.report.kernel_limit.is_none(), fine);
        let devices = seed.attach();
        if fine {
            seed.check(&devices);
        }
        let point = seed.directory.path().join("mnt");
        fs::create_dir_all(&point).expect("a mount point");
        let output = run(Command::new("mount").arg(&devices.0.0).arg(&point));
        assert_eq!(output.status.success(), fine, "{}", String::from_utf8_lossy(&output.stderr));
        let _mount = output.status.success().then(|| Mount(point));
    }
}

/// The reader sees the items that `dump-tree` sees.
#[test]
fn inspection_shows_the_items_that_dump_tree_shows() {
    let tree = everything(300 * TIB, 4096);
    let subvolume = Subvolume { name: "image", tree: &tree, readonly: false };
    let options = SeedOptions { virtual_size: 300 * TIB, node_size: 4096, simple_quota: true, ..options() };
    let seed = Seed::make(options, &[subvolume]);
    let devices = seed.attach();
    must(Command::new(btrfs()).args(["device", "scan"]).arg(&devices.0.0));
    let text = must(Command::new(btrfs()).args(["inspect-internal", "dump-tree"]).arg(&devices.1.0));
    let theirs: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("item ")).collect();
    let leaves = text.lines().filter(|line| line.starts_with("leaf ") && line.contains(" items ")).count();
    let local = File::open(seed.local_path()).expect("image");
    let (mut items, mut blocks) = (0, 0);
    inspect(&[("local", &local)], TreeFilter::All, &mut |record| {
        match record {
            Record::Item { .. } => items += 1,
            Record::Block { fields, .. } => {
                let level = fields.iter().find(|field| field.name == "level").expect("a level");
                blocks += usize::from(level.value == Value::Integer(0));
            }
            Record::Fault { .. } => panic!("{record}"),
            _ => {}
        }
        Ok(())
    })
    .expect("readable");
    assert_eq!((items, blocks), (theirs.len(), leaves));
    assert!(items > 5000, "{items}");
}

/// An unmount can come in the middle of a deletion, which is not damage.
#[test]
fn a_subvolume_that_is_being_deleted_is_no_damage() {
    for delay_ms in [0, 200] {
        let tree = loam_seed::SyntheticTree::new(100_000);
        let subvolume = Subvolume { name: "image", tree: &tree, readonly: false };
        let seed = Seed::make(SeedOptions { virtual_size: TIB, ..options() }, &[subvolume]);
        let devices = seed.attach();
        {
            let mount = seed.mount_pair(&devices, "");
            let snapshot = mount.0.join("snapshot");
            must(
                Command::new("btrfs")
                    .args(["subvolume", "snapshot"])
                    .arg(mount.0.join("image"))
                    .arg(&snapshot),
            );
            must(Command::new("btrfs").args(["subvolume", "delete", "-c"]).arg(mount.0.join("image")));
            std::thread::sleep(Duration::from_millis(delay_ms));
        }
        seed.check(&devices);
        {
            let mount = seed.mount_pair(&devices, "");
            must(Command::new("btrfs").args(["subvolume", "delete", "-c"]).arg(mount.0.join("snapshot")));
            std::thread::sleep(Duration::from_millis(delay_ms));
        }
        seed.check(&devices);
    }
}

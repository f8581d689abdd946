//! The accounts of simple quotas, recomputed: after random histories on a real kernel, of filesystems in use, of wrong
//! ones, and explained.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod quota_support;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use loam_seed::quota::{GroupId, Kind, Mode, Standing};
use loam_sys::btrfs::{self, QuotaMode, quota};
use quota_support::{Filesystem, Random, must};
use rustix::fs::FallocateFlags;

const MIB: u64 = 1 << 20;
/// Steps of one history, unless `LOAM_QUOTA_STEPS` says otherwise; `btrfs check` looks each so many steps, loam after every
/// one.
const STEPS: u64 = 150;
const CHECK_EACH: u64 = 15;

/// What a history has made so far.
struct History {
    filesystem: Filesystem,
    random: Random,
    subvolumes: Vec<String>,
    groups: Vec<u64>,
    memberships: Vec<(u64, u64)>,
    options: &'static str,
    made: u64,
    enabled_twice: bool,
    log: Vec<String>,
}

impl History {
    fn new(seed: u64, mkfs: &[&str]) -> Self {
        let history = History {
            filesystem: Filesystem::new(1, 2 << 30, mkfs),
            random: Random(seed),
            subvolumes: vec!["s0".to_owned()],
            groups: Vec::new(),
            memberships: Vec::new(),
            options: "",
            made: 1,
            enabled_twice: false,
            log: Vec::new(),
        };
        let root = history.filesystem.open("");
        btrfs::create_subvolume(&root, "s0").unwrap();
        std::fs::write(history.filesystem.path("s0/older"), vec![1; MIB as usize]).unwrap();
        btrfs::sync(&root).unwrap();
        btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
        history
    }

    fn name(&mut self, prefix: &str) -> String {
        self.made += 1;
        format!("{prefix}{}", self.made)
    }

    fn a_subvolume(&mut self) -> String {
        self.random.pick(&self.subvolumes).unwrap()
    }

    fn a_file(&mut self) -> Option<PathBuf> {
        let subvolume = self.a_subvolume();
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.filesystem.path(subvolume))
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_file())
            .map(|entry| entry.path())
            .collect();
        files.sort();
        self.random.pick(&files)
    }

    fn content(&mut self) -> Vec<u8> {
        let length = self.random.below(3 * MIB) as usize + 1;
        // Half of it can be compressed.
        (0..length).map(|index| if index % 8192 < 4096 { 7 } else { self.random.next() as u8 }).collect()
    }

    fn step(&mut self) {
        let kind = self.random.below(18);
        let what = match kind {
            0..=3 => self.write(),
            4..=5 => self.overwrite(),
            6..=7 => self.clone_file(),
            8 => self.snapshot(),
            9 => self.nested(),
            10..=11 => self.delete_file(),
            12 => self.delete_subvolume(),
            13 => self.truncate(),
            14 => self.allocate(),
            15 => self.group(),
            16 => self.remount(),
            _ => self.rarely(),
        };
        self.log.push(what.unwrap_or_else(|| format!("{kind}: nothing to do")));
    }

    fn write(&mut self) -> Option<String> {
        let (subvolume, name, content) = (self.a_subvolume(), self.name("f"), self.content());
        std::fs::write(self.filesystem.path(&subvolume).join(&name), &content).unwrap();
        Some(format!("write {subvolume}/{name}, {} bytes", content.len()))
    }

    fn overwrite(&mut self) -> Option<String> {
        let file = self.a_file()?;
        let content = self.content();
        let length = std::fs::metadata(&file).unwrap().len();
        let at = self.random.below(length + 1);
        OpenOptions::new().write(true).open(&file).unwrap().write_all_at(&content, at).unwrap();
        Some(format!("overwrite {} at {at}, {} bytes", file.display(), content.len()))
    }

    fn clone_file(&mut self) -> Option<String> {
        let (file, subvolume, name) = (self.a_file()?, self.a_subvolume(), self.name("c"));
        let target = self.filesystem.path(&subvolume).join(&name);
        // Between files with and without checksums it copies.
        must(Command::new("cp").arg("--reflink=auto").arg(&file).arg(&target));
        Some(format!("clone {} to {subvolume}/{name}", file.display()))
    }

    fn snapshot(&mut self) -> Option<String> {
        let (subvolume, name) = (self.a_subvolume(), self.name("s"));
        let source = self.filesystem.open(&subvolume);
        btrfs::snapshot(source, self.filesystem.open(""), &name, false).unwrap();
        self.subvolumes.push(name.clone());
        Some(format!("snapshot {subvolume} as {name}"))
    }

    /// A subvolume in another: the kernel makes it a member of the other's groups by itself.
    fn nested(&mut self) -> Option<String> {
        let (subvolume, name) = (self.a_subvolume(), self.name("n"));
        btrfs::create_subvolume(self.filesystem.open(&subvolume), &name).unwrap();
        let (outer, path) = (self.filesystem.group(&subvolume).raw(), format!("{subvolume}/{name}"));
        let id = self.filesystem.group(&path).raw();
        let inherited: Vec<u64> =
            self.memberships.iter().filter(|(member, _)| *member == outer).map(|(_, group)| *group).collect();
        self.memberships.extend(inherited.into_iter().map(|group| (id, group)));
        self.subvolumes.push(path.clone());
        Some(format!("subvolume {path}"))
    }

    fn delete_file(&mut self) -> Option<String> {
        let file = self.a_file()?;
        std::fs::remove_file(&file).unwrap();
        Some(format!("delete {}", file.display()))
    }

    fn delete_subvolume(&mut self) -> Option<String> {
        let leaves: Vec<String> = self
            .subvolumes
            .iter()
            .filter(|path| !self.subvolumes.iter().any(|other| other.starts_with(&format!("{path}/"))))
            .cloned()
            .collect();
        let path = self.random.pick(&leaves).filter(|_| self.subvolumes.len() > 2)?;
        let id = self.filesystem.group(&path).raw();
        btrfs::delete_subvolume_by_id(self.filesystem.open(""), id).unwrap();
        self.subvolumes.retain(|other| *other != path);
        self.memberships.retain(|(member, _)| *member != id);
        let wait = self.random.below(2) == 0;
        if wait {
            self.filesystem.clean();
        }
        Some(format!("delete subvolume {path}, waiting: {wait}"))
    }

    fn truncate(&mut self) -> Option<String> {
        let file = self.a_file()?;
        let length = self.random.below(2 * MIB);
        OpenOptions::new().write(true).open(&file).unwrap().set_len(length).unwrap();
        Some(format!("truncate {} to {length}", file.display()))
    }

    fn allocate(&mut self) -> Option<String> {
        let file = self.a_file()?;
        let handle = OpenOptions::new().write(true).open(&file).unwrap();
        let (at, length) = (self.random.below(4 * MIB), self.random.below(4 * MIB) + 1);
        let flags = match self.random.below(3) {
            0 => FallocateFlags::empty(),
            1 => FallocateFlags::KEEP_SIZE,
            _ => FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
        };
        rustix::fs::fallocate(&handle, flags, at, length).unwrap();
        Some(format!("fallocate {} {at} {length} {flags:?}", file.display()))
    }

    /// A group of level 1, with a new member, or one member less.
    fn group(&mut self) -> Option<String> {
        let root = self.filesystem.open("");
        if self.groups.len() < 3 {
            let group = GroupId::new(1, 100 + self.groups.len() as u64).unwrap();
            quota::create_group(&root, group.raw()).unwrap();
            self.groups.push(group.raw());
        }
        if let Some((member, group)) =
            self.random.pick(&self.memberships).filter(|_| self.made.is_multiple_of(3))
        {
            quota::unassign_group(&root, member, group).unwrap();
            self.memberships.retain(|membership| *membership != (member, group));
            return Some(format!("{member} leaves {}", GroupId::from_raw(group)));
        }
        let subvolume = self.a_subvolume();
        let (member, group) = (self.filesystem.group(&subvolume).raw(), self.random.pick(&self.groups)?);
        if self.memberships.contains(&(member, group)) {
            return None;
        }
        quota::assign_group(&root, member, group).unwrap();
        self.memberships.push((member, group));
        Some(format!("{member} enters {}", GroupId::from_raw(group)))
    }

    fn remount(&mut self) -> Option<String> {
        self.options = self.random.pick(&["", "compress-force=zstd", "compress=lzo", "nodatacow"]).unwrap();
        self.filesystem.unmount();
        self.filesystem.mount(self.options);
        Some(format!("remount with \"{}\"", self.options))
    }

    fn rarely(&mut self) -> Option<String> {
        if self.random.below(2) == 0 {
            // Kernels before 7.1 abort the transaction when an extent is moved whose owner was deleted before quotas were
            // enabled again: it has no group ("failed to run delayed ref ... -2").
            if self.enabled_twice {
                return None;
            }
            must(
                Command::new("btrfs")
                    .args(["balance", "start", "--full-balance"])
                    .arg(self.filesystem.root()),
            );
            return Some("balance".to_owned());
        }
        let root = self.filesystem.open("");
        btrfs::disable_quota(&root).unwrap();
        self.write();
        assert_eq!(self.filesystem.verify().mode, Mode::Off);
        btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
        (self.groups, self.memberships) = (Vec::new(), Vec::new());
        self.enabled_twice = true;
        Some("disable, write, enable".to_owned())
    }

    #[track_caller]
    fn agree(&mut self, with_check: bool) {
        let report = self.filesystem.verify();
        let log = || self.log.join("\n");
        assert!(report.verified && report.is_clean(), "{:#?}\nafter\n{}", report.findings, log());
        if with_check {
            let (report, complaint) = self.filesystem.judge(self.options);
            assert!(report.is_clean(), "{:#?}\nunmounted, after\n{}", report.findings, self.log.join("\n"));
            assert_eq!(complaint, None, "after\n{}", self.log.join("\n"));
        }
    }
}

fn history(seed: u64, mkfs: &[&str]) {
    let mut history = History::new(seed, mkfs);
    let steps = std::env::var("LOAM_QUOTA_STEPS").map_or(STEPS, |text| text.parse().unwrap());
    for step in 1..=steps {
        history.step();
        history.agree(step % CHECK_EACH == 0);
    }
}

/// `LOAM_QUOTA_SEED` repeats a history; without it each run has its own, and a failure's log says what happened.
fn seed(default: u64) -> u64 {
    std::env::var("LOAM_QUOTA_SEED").ok().map_or(default, |text| text.parse().unwrap())
}

#[test]
fn any_history_is_charged_right_with_nodes_of_16_kib() {
    history(seed(1), &[]);
}

#[test]
fn any_history_is_charged_right_with_nodes_of_4_kib() {
    history(seed(2), &["-n", "4096", "-m", "single"]);
}

#[test]
fn any_history_is_charged_right_with_nodes_of_64_kib() {
    history(seed(3), &["-n", "65536"]);
}

#[test]
fn several_devices_are_verified_in_any_order() {
    let mut filesystem = Filesystem::new(2, 512 << 20, &["-d", "raid1", "-m", "raid1"]);
    btrfs::enable_quota(filesystem.open(""), QuotaMode::Simple).unwrap();
    btrfs::create_subvolume(filesystem.open(""), "a").unwrap();
    std::fs::write(filesystem.path("a/file"), vec![1; 10 << 20]).unwrap();
    let group = filesystem.group("a");
    let (report, complaint) = filesystem.judge("");
    assert!(report.is_clean() && complaint.is_none(), "{:?} {complaint:?}", report.findings);
    let charged = report.groups.iter().find(|report| report.group == group).unwrap();
    assert_eq!((charged.data_bytes, charged.metadata_bytes), (10 * MIB, 16384));
}

#[test]
fn both_judges_find_a_wrong_charge() {
    let mut filesystem = Filesystem::new(1, 512 << 20, &["-m", "single"]);
    btrfs::enable_quota(filesystem.open(""), QuotaMode::Simple).unwrap();
    btrfs::create_subvolume(filesystem.open(""), "a").unwrap();
    std::fs::write(filesystem.path("a/file"), vec![1; 3 << 20]).unwrap();
    let group = filesystem.group("a");
    filesystem.sync();
    let right =
        filesystem.verify().groups.iter().find(|report| report.group == group).unwrap().expected_bytes;
    filesystem.unmount();
    let image = OpenOptions::new().read(true).write(true).open(filesystem.image(0)).unwrap();
    let patched = wrong_charge(&image, right, right + 4096);
    assert_eq!(patched, 1, "leaves of the quota tree that say {right}");
    let report = filesystem.verify();
    let finding = report.findings.iter().find(|finding| finding.kind == Kind::WrongCharge).unwrap();
    assert_eq!((finding.group, finding.difference_bytes), (Some(group), Some(4096)));
    filesystem.mount("");
    let (_, complaint) = filesystem.judge("");
    assert!(complaint.is_some_and(|text| text.contains("are different")));
}

/// Replaces a pair of `referenced` and `exclusive` in all current leaves of the quota tree.
fn wrong_charge(image: &File, right: u64, wrong: u64) -> usize {
    use loam_seed::disk::object;
    use loam_seed::reader::{Device, Filesystem, Walk};
    let devices = [Device { name: "image", image }];
    let filesystem = Filesystem::open(&devices).unwrap();
    let mut walk = Walk::new(&filesystem, filesystem.root(object::QUOTA_TREE).unwrap());
    let mut places = Vec::new();
    while let Some(visited) = walk.next() {
        let chunk = filesystem.chunks().find(visited.bytenr).unwrap();
        places.push(chunk.stripes[0].physical + visited.bytenr - chunk.logical);
    }
    let mut patched = 0;
    for place in places {
        let mut block = vec![0; filesystem.node_size() as usize];
        image.read_exact_at(&mut block, place).unwrap();
        // struct btrfs_qgroup_info_item: generation, rfer, rfer_cmpr, excl, excl_cmpr.
        let found = (0..block.len() - 24).find(|&at| {
            block[at..at + 8] == right.to_le_bytes() && block[at + 16..at + 24] == right.to_le_bytes()
        });
        let Some(at) = found else { continue };
        block[at..at + 8].copy_from_slice(&wrong.to_le_bytes());
        block[at + 16..at + 24].copy_from_slice(&wrong.to_le_bytes());
        let mut crc = crc32c_of(&block[32..]).to_le_bytes().to_vec();
        crc.resize(32, 0);
        block[..32].copy_from_slice(&crc);
        image.write_all_at(&block, place).unwrap();
        patched += 1;
    }
    image.sync_all().unwrap();
    patched
}

/// CRC-32C, bit by bit: a test of a block or two has time.
fn crc32c_of(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| {
                if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }
            },
        )
    })
}

#[test]
fn full_qgroups_are_not_verified_and_said_to_be_full() {
    let filesystem = Filesystem::new(1, 512 << 20, &[]);
    btrfs::enable_quota(filesystem.open(""), QuotaMode::Full).unwrap();
    let report = filesystem.verify();
    assert_eq!((report.mode, report.verified, report.is_clean()), (Mode::Full, false, true));
}

#[test]
fn what_a_deleted_original_still_costs_is_explained() {
    let filesystem = Filesystem::new(1, 512 << 20, &[]);
    let root = filesystem.open("");
    btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
    std::fs::create_dir(filesystem.path("tenants")).unwrap();
    btrfs::create_subvolume(filesystem.open("tenants"), "creator").unwrap();
    btrfs::create_subvolume(&root, "copier").unwrap();
    let original = filesystem.path("tenants/creator/original");
    let mut file = File::create(&original).unwrap();
    file.write_all(&vec![1; 8 << 20]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    std::fs::create_dir_all(filesystem.path("copier/deep/down")).unwrap();
    must(
        Command::new("cp")
            .arg("--reflink=always")
            .arg(&original)
            .arg(filesystem.path("copier/deep/down/copy")),
    );
    std::fs::write(filesystem.path("tenants/creator/own"), vec![2; 1 << 20]).unwrap();
    let (creator, copier) = (filesystem.group("tenants/creator"), filesystem.group("copier"));

    let before = filesystem.explain(creator);
    assert_eq!((before.kept_by_others_bytes, before.data_bytes), (0, 9 * MIB));
    assert_eq!(before.extents[0].standing, Standing::Shared);
    assert_eq!(before.extents.last().unwrap().standing, Standing::Own);
    assert_eq!(before.subvolumes[&creator.raw()].as_deref(), Some("tenants/creator"));

    std::fs::remove_file(&original).unwrap();
    let after = filesystem.explain(creator);
    assert_eq!((after.kept_by_others_bytes, after.data_bytes), (8 * MIB, 9 * MIB));
    let largest = &after.extents[0];
    assert_eq!(largest.standing, Standing::KeptByOthers);
    let reference = &largest.references[0];
    assert_eq!((reference.subvolume, reference.subvolume_path.as_deref()), (copier.raw(), Some("copier")));
    assert_eq!(reference.path.as_deref(), Some("deep/down/copy"));
    assert!(
        after.advice[0].contains("8 MiB") && after.advice[0].contains("--reflink=never"),
        "{:?}",
        after.advice
    );
    assert_eq!(filesystem.explain(copier).data_bytes, 0, "the copy costs its owner nothing");

    drop(root);
    btrfs::delete_subvolume(filesystem.open("tenants"), "creator").unwrap();
    filesystem.clean();
    let gone = filesystem.explain(creator);
    assert_eq!((gone.data_bytes, gone.kept_by_others_bytes), (8 * MIB, 8 * MIB));
    assert_eq!(gone.extents[0].standing, Standing::KeptAfterDeletion);
    assert!(filesystem.verify().is_clean());

    // The advice, followed.
    let copy = filesystem.path("copier/deep/down/copy");
    must(Command::new("cp").arg("--reflink=never").arg(&copy).arg(copy.with_extension("new")));
    std::fs::rename(copy.with_extension("new"), &copy).unwrap();
    filesystem.sync();
    assert_eq!(filesystem.explain(copier).data_bytes, 8 * MIB);
    let report = filesystem.verify();
    assert!(report.is_clean(), "{:?}", report.findings);
    let left = report.groups.iter().find(|report| report.group == creator);
    assert!(left.is_none_or(|report| report.expected_bytes == 0), "{left:?}");
}

#[test]
fn what_an_overwrite_in_the_middle_wastes_is_explained() {
    let filesystem = Filesystem::new(1, 512 << 20, &[]);
    btrfs::enable_quota(filesystem.open(""), QuotaMode::Simple).unwrap();
    btrfs::create_subvolume(filesystem.open(""), "a").unwrap();
    let path = filesystem.path("a/file");
    std::fs::write(&path, vec![1; 4 << 20]).unwrap();
    filesystem.sync();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![2; 2 << 20], 1 << 20).unwrap();
    let explanation = filesystem.explain(filesystem.group("a"));
    assert_eq!(explanation.data_bytes, 6 * MIB, "the old extent stays whole");
    let largest = &explanation.extents[0];
    assert_eq!(
        (largest.bytes, largest.used_bytes, largest.standing),
        (4 * MIB, Some(2 * MIB), Standing::Own)
    );
    assert!(
        explanation.advice.iter().any(|advice| advice.contains("only as a whole")),
        "{:?}",
        explanation.advice
    );
}

#[test]
fn a_subvolume_may_go_while_its_accounts_are_read() {
    let filesystem = Filesystem::new(1, 1 << 30, &[]);
    let root = filesystem.open("");
    btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
    for index in 0..8 {
        btrfs::create_subvolume(&root, format!("s{index}")).unwrap();
        for file in 0..200 {
            std::fs::write(filesystem.path(format!("s{index}/f{file}")), vec![1; 8192]).unwrap();
        }
    }
    filesystem.sync();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for index in 0..8 {
                btrfs::delete_subvolume(&root, format!("s{index}")).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(30));
            }
        });
        for _ in 0..20 {
            let report = filesystem.verify();
            assert!(report.is_clean(), "{:?}", report.findings);
        }
    });
    filesystem.clean();
    assert!(filesystem.verify().is_clean());
}

/// `LOAM_QUOTA_EXTENTS` asks for more than the hundred thousand of each run; what is demanded grows with them.
#[test]
fn many_extents_take_little_time() {
    let count: u64 = std::env::var("LOAM_QUOTA_EXTENTS").map_or(100_000, |text| text.parse().unwrap());
    let filesystem = Filesystem::new(1, (count * 8192).max(1 << 30) + (4 << 30), &[]);
    let root = filesystem.open("");
    btrfs::enable_quota(&root, QuotaMode::Simple).unwrap();
    for subvolume in 0..10 {
        btrfs::create_subvolume(&root, format!("s{subvolume}")).unwrap();
        let file = File::create(filesystem.path(format!("s{subvolume}/file"))).unwrap();
        for extent in 0..count / 10 {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), extent * 8192, 4096).unwrap();
        }
    }
    filesystem.sync();
    let started = Instant::now();
    let report = filesystem.verify();
    let elapsed = started.elapsed();
    assert!(report.is_clean(), "{:?}", report.findings);
    assert!(report.counts.data_extents >= count, "{:?}", report.counts);
    println!("{:?} in {elapsed:?}, peak RSS {} KiB", report.counts, peak_rss_kib());
    // 5 s for a million in a build that is optimised; this one need not be.
    let limit = 5.0 * (count as f64 / 1e6).max(0.2) * if cfg!(debug_assertions) { 5.0 } else { 1.0 };
    assert!(elapsed.as_secs_f64() < limit, "{elapsed:?}, at most {limit} s");
    assert!(peak_rss_kib() < 500 << 10, "{} KiB", peak_rss_kib());
    let started = Instant::now();
    let explanation = filesystem.explain(filesystem.group("s3"));
    println!("explained in {:?}, peak RSS {} KiB", started.elapsed(), peak_rss_kib());
    assert_eq!(explanation.data_bytes, count / 10 * 4096);
}

fn peak_rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

//! Quotas through the library on a real kernel: limits and where they hold, groups, and the bad days.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod quota_support;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use loam_e2e::require_root;
use loam_pool::quota::{
    self, Error, ExplainOptions, GroupId, Limit, LimitKind, LimitOutcome, Mode, Source, Target, assign,
    contain, create_group, disable, enable, limit, release, remove_group, remove_stale, show, unassign,
    usage,
};
use loam_sys::btrfs;
use quota_support::{Filesystem, must};

const MIB: u64 = 1 << 20;
const EDQUOT: i32 = 122;
const ENOSPC: i32 = 28;

fn simple(size: u64) -> Filesystem {
    let filesystem = Filesystem::new(1, size, &[]);
    let enabled = enable(&filesystem.root(), Mode::Simple).unwrap();
    assert!(enabled.changed && enabled.enable_generation.is_some());
    filesystem
}

fn subvolume(filesystem: &Filesystem, path: &str) -> GroupId {
    let path = filesystem.path(path);
    let parent = File::open(path.parent().unwrap()).unwrap();
    btrfs::create_subvolume(parent, path.file_name().unwrap()).unwrap();
    filesystem.group(&path)
}

/// Writes MiB by MiB until it fails: how many bytes were written, and the error.
fn fill(path: &Path, most: u64) -> (u64, Option<io::Error>) {
    let mut file = match File::create(path) {
        Ok(file) => file,
        Err(error) => return (0, Some(error)),
    };
    let mut written = 0;
    let chunk = vec![5; MIB as usize];
    while written < most {
        if let Err(error) = file.write_all(&chunk).and_then(|()| file.sync_data()) {
            return (written, Some(error));
        }
        written += MIB;
    }
    (written, None)
}

fn set(path: &Path, text: &str) -> LimitOutcome {
    limit(path, &Target::Subvolume, text.parse().unwrap(), LimitKind::Referenced).unwrap()
}

#[test]
fn a_limit_stops_writes_and_nothing_else() {
    let filesystem = simple(1 << 30);
    let group = subvolume(&filesystem, "a");
    let (path, file) = (filesystem.path("a"), filesystem.path("a/file"));
    let outcome = set(&path, "20MiB");
    assert_eq!((outcome.group, outcome.limit_bytes, outcome.over_limit), (group, Some(20 * MIB), false));
    let (written, error) = fill(&file, 64 * MIB);
    assert_eq!(error.unwrap().raw_os_error(), Some(EDQUOT));
    assert!((18 * MIB..=20 * MIB).contains(&written), "{written}");
    assert_eq!(
        std::fs::read(&file).unwrap().len() as u64 / MIB,
        std::fs::metadata(&file).unwrap().len() / MIB
    );
    let used = usage(&path, true).unwrap().unwrap();
    assert!(used.referenced_bytes <= 20 * MIB && used.free_bytes.unwrap() < 2 * MIB, "{used:?}");
    assert_eq!(used.limited_by, Some(group));

    // Deleting works at the limit, and makes room.
    std::fs::remove_file(&file).unwrap();
    filesystem.sync();
    assert_eq!(fill(&file, 10 * MIB).0, 10 * MIB);
    // Relative to what is used now, then lifted.
    let outcome = set(&path, "+5MiB");
    assert_eq!(outcome.limit_bytes, Some(outcome.used_bytes + 5 * MIB));
    let (more, error) = fill(&filesystem.path("a/more"), 20 * MIB);
    assert!((3 * MIB..=5 * MIB).contains(&more) && error.is_some(), "{more}");
    assert_eq!(set(&path, "none").limit_bytes, None);
    assert_eq!(fill(&filesystem.path("a/more"), 20 * MIB).0, 20 * MIB);
    assert_eq!(usage(&path, true).unwrap().unwrap().free_bytes, None);
    assert!(filesystem.verify().is_clean());
}

#[test]
fn a_limit_below_what_is_used_is_set_and_said() {
    let filesystem = simple(1 << 30);
    subvolume(&filesystem, "a");
    let (path, file) = (filesystem.path("a"), filesystem.path("a/file"));
    fill(&file, 10 * MIB);
    let outcome = set(&path, "4MiB");
    assert!(outcome.over_limit && outcome.used_bytes > 10 * MIB, "{outcome:?}");
    assert_eq!(usage(&path, false).unwrap().unwrap().free_bytes, Some(0));
    assert_eq!(fill(&filesystem.path("a/b"), MIB).1.unwrap().raw_os_error(), Some(EDQUOT));
    assert_eq!(std::fs::read(&file).unwrap().len() as u64, 10 * MIB, "what is there stays");
    // Nearly all of it is gone over the limit, so one can get back under it.
    std::fs::write(filesystem.path("small"), "elsewhere").unwrap();
    std::fs::remove_file(&file).unwrap();
    filesystem.sync();
    assert_eq!(fill(&file, 2 * MIB).0, 2 * MIB);
    assert!(set(&path, "1MiB").over_limit);
    // Quotas go off over the limit as they do under it.
    assert!(disable(&filesystem.root()).unwrap());
    assert_eq!(fill(&filesystem.path("a/b"), 20 * MIB).0, 20 * MIB);
    assert!(!disable(&filesystem.root()).unwrap(), "twice is harmless");
    assert_eq!(quota::mode(&path).unwrap(), None);
    // And come back without the limit, with what is there for free.
    assert!(enable(&filesystem.root(), Mode::Simple).unwrap().changed);
    let shown = usage(&path, true).unwrap().unwrap();
    assert_eq!((shown.limit_referenced_bytes, shown.referenced_bytes < MIB), (None, true), "{shown:?}");
    assert!(filesystem.verify().is_clean());
}

/// Newer kernels count the change of a limit against the subvolume that it is asked through.
#[test]
fn a_limit_is_raised_from_within_a_full_subvolume() {
    let filesystem = simple(1 << 30);
    let group = subvolume(&filesystem, "a");
    let path = filesystem.path("a");
    set(&path, "64KiB");
    for index in 0..1000 {
        if std::fs::write(path.join(format!("file{index}")), [1; 4096]).is_err() {
            break;
        }
    }
    filesystem.sync();
    assert_eq!(set(&path, "0").limit_bytes, Some(0));
    assert_eq!(std::fs::write(path.join("more"), "x").unwrap_err().raw_os_error(), Some(EDQUOT));
    let tenant = GroupId::new(1, 1).unwrap();
    create_group(&path, tenant).unwrap();
    assign(&path, group, tenant).unwrap();
    limit(&path, &Target::Group(tenant), Limit::Absolute(64 * MIB), LimitKind::Referenced).unwrap();
    unassign(&path, group, tenant).unwrap();
    remove_group(&path, tenant).unwrap();
    set(&path, "8MiB");
    std::fs::write(path.join("more"), "x").unwrap();
    assert!(filesystem.verify().is_clean());
}

/// What docs/quotas.md says of a balance.
#[test]
fn a_balance_charges_tree_blocks_that_were_free_and_data_not() {
    let filesystem = Filesystem::new(1, 2 << 30, &[]);
    subvolume(&filesystem, "a");
    fill(&filesystem.path("a/file"), 4 * MIB);
    enable(&filesystem.root(), Mode::Simple).unwrap();
    assert_eq!(usage(&filesystem.path("a"), true).unwrap().unwrap().referenced_bytes, 0);
    must(Command::new("btrfs").args(["balance", "start", "--full-balance"]).arg(filesystem.root()));
    let charged = usage(&filesystem.path("a"), true).unwrap().unwrap().referenced_bytes;
    assert!((16 << 10..MIB).contains(&charged), "{charged}");
    let report = filesystem.verify();
    assert!(report.is_clean(), "{:?}", report.findings);
    let group = report.groups.iter().find(|report| report.group == filesystem.group("a")).unwrap();
    assert_eq!(group.data_bytes, 0);
}

#[test]
fn limits_beyond_32_bits_are_kept() {
    let filesystem = simple(1 << 30);
    subvolume(&filesystem, "a");
    let path = filesystem.path("a");
    for (text, bytes) in
        [("4GiB", 1u64 << 32), ("5GiB", 5 << 30), ("4EiB", 4 << 60), ("9223372036854775807", (1 << 63) - 1)]
    {
        assert_eq!(set(&path, text).limit_bytes, Some(bytes));
        assert_eq!(usage(&path, true).unwrap().unwrap().limit_referenced_bytes, Some(bytes));
        assert_eq!(fill(&filesystem.path("a/file"), MIB).0, MIB, "{text} is far away");
    }
    fill(&filesystem.path("a/file"), MIB);
    let error =
        limit(&path, &Target::Subvolume, Limit::Relative((1 << 63) - 1), LimitKind::Referenced).unwrap_err();
    assert!(matches!(error, Error::LimitTooLarge { .. }), "{error}");
    assert!("8EiB".parse::<Limit>().is_err() && "99999999999EiB".parse::<Limit>().is_err());
}

#[test]
fn exclusive_limits_hold_too() {
    let filesystem = simple(1 << 30);
    subvolume(&filesystem, "a");
    let path = filesystem.path("a");
    let outcome = limit(&path, &Target::Subvolume, Limit::Absolute(8 * MIB), LimitKind::Exclusive).unwrap();
    assert_eq!((outcome.kind, outcome.limit_bytes), (LimitKind::Exclusive, Some(8 * MIB)));
    let (written, error) = fill(&filesystem.path("a/file"), 32 * MIB);
    assert_eq!(error.unwrap().raw_os_error(), Some(EDQUOT));
    assert!(written <= 8 * MIB);
    let shown = usage(&path, true).unwrap().unwrap();
    assert_eq!((shown.limit_referenced_bytes, shown.limit_exclusive_bytes), (None, Some(8 * MIB)));
}

#[test]
fn a_tenant_of_many_containers_has_one_limit() {
    let filesystem = simple(1 << 30);
    let root = filesystem.root();
    let tenant = GroupId::new(1, 1000).unwrap();
    create_group(&root, tenant).unwrap();
    let members: Vec<GroupId> = (0..3).map(|index| subvolume(&filesystem, &format!("c{index}"))).collect();
    for member in &members {
        assign(&root, *member, tenant).unwrap();
        assign(&root, *member, tenant).unwrap();
    }
    let outcome =
        limit(&root, &Target::Group(tenant), Limit::Absolute(24 * MIB), LimitKind::Referenced).unwrap();
    assert_eq!(outcome.group, tenant);
    assert_eq!(fill(&filesystem.path("c0/file"), 10 * MIB).0, 10 * MIB);
    assert_eq!(fill(&filesystem.path("c1/file"), 10 * MIB).0, 10 * MIB);
    let (written, error) = fill(&filesystem.path("c2/file"), 10 * MIB);
    assert!(
        written < 5 * MIB && error.is_some_and(|error| error.raw_os_error() == Some(EDQUOT)),
        "{written}"
    );

    let shown = show(&root, true).unwrap();
    let group = shown.group(tenant).unwrap();
    assert_eq!(group.members, members);
    let sum: u64 = members.iter().map(|member| shown.group(*member).unwrap().referenced_bytes).sum();
    assert_eq!(group.referenced_bytes, sum);
    let container = shown.group(members[2]).unwrap();
    assert_eq!((container.limited_by, container.path.as_deref()), (Some(tenant), Some(Path::new("c2"))));
    let rows: Vec<(usize, GroupId)> = shown.rows().iter().map(|row| (row.depth, row.group.group)).collect();
    assert_eq!(rows[..4], [(0, tenant), (1, members[0]), (1, members[1]), (1, members[2])]);
    assert!(filesystem.verify().is_clean());

    // A group in use stays; one without members goes.
    assert!(matches!(remove_group(&root, tenant), Err(Error::GroupInUse(_))));
    for member in &members {
        unassign(&root, *member, tenant).unwrap();
        unassign(&root, *member, tenant).unwrap();
    }
    assert!(filesystem.verify().is_clean());
    remove_group(&root, tenant).unwrap();
    assert!(matches!(remove_group(&root, tenant), Err(Error::NoGroup { .. })));
}

#[test]
fn what_a_container_makes_counts_for_it() {
    let filesystem = simple(1 << 30);
    let root = filesystem.root();
    // Without a group of level 1 a nested subvolume escapes: the trap that contain() is there for.
    subvolume(&filesystem, "loose");
    set(&filesystem.path("loose"), "4MiB");
    subvolume(&filesystem, "loose/inner");
    assert_eq!(fill(&filesystem.path("loose/inner/file"), 16 * MIB).0, 16 * MIB);

    let web = subvolume(&filesystem, "web");
    let outcome = contain(&filesystem.path("web"), Limit::Absolute(16 * MIB)).unwrap();
    assert_eq!(outcome.group, GroupId::new(1, web.number()).unwrap());
    let inner = subvolume(&filesystem, "web/inner");
    let deepest = subvolume(&filesystem, "web/inner/deepest");
    must(
        Command::new("btrfs")
            .args(["subvolume", "snapshot"])
            .arg(filesystem.path("web/inner"))
            .arg(filesystem.path("web/copy")),
    );
    let copy = filesystem.group("web/copy");
    let shown = show(&root, true).unwrap();
    assert_eq!(shown.group(outcome.group).unwrap().members, [web, inner, deepest, copy]);
    assert_eq!(shown.group(outcome.group).unwrap().path.as_deref(), Some(Path::new("web")));
    assert_eq!(shown.group(deepest).unwrap().path.as_deref(), Some(Path::new("web/inner/deepest")));
    let (written, error) = fill(&filesystem.path("web/inner/deepest/file"), 32 * MIB);
    assert_eq!(error.unwrap().raw_os_error(), Some(EDQUOT));
    assert!(written <= 16 * MIB, "{written}");
    // Again with more room.
    assert_eq!(contain(&filesystem.path("web"), Limit::Absolute(40 * MIB)).unwrap().group, outcome.group);
    assert_eq!(fill(&filesystem.path("web/file"), 8 * MIB).0, 8 * MIB);
    let report = filesystem.verify();
    assert!(report.is_clean(), "{:?}", report.findings);
    release(&root, web.number()).unwrap();
    release(&root, web.number()).unwrap();
    assert!(show(&root, false).unwrap().group(outcome.group).is_none());
}

#[test]
fn a_group_that_is_somebody_elses_is_not_taken() {
    let filesystem = simple(1 << 30);
    let (web, other) = (subvolume(&filesystem, "web"), subvolume(&filesystem, "other"));
    let group = GroupId::new(1, web.number()).unwrap();
    create_group(&filesystem.root(), group).unwrap();
    assign(&filesystem.root(), other, group).unwrap();
    let error = contain(&filesystem.path("web"), Limit::Absolute(MIB)).unwrap_err();
    assert!(matches!(error, Error::GroupExists(taken) if taken == group), "{error}");
}

#[test]
fn subvolumes_are_born_limited() {
    use btrfs::quota::{Inherit, QgroupLimits, create_subvolume_in, snapshot_in};
    let filesystem = simple(1 << 30);
    let root = filesystem.open("");
    let tenant = GroupId::new(1, 7).unwrap();
    create_group(&filesystem.root(), tenant).unwrap();
    subvolume(&filesystem, "image");
    fill(&filesystem.path("image/file"), 8 * MIB);
    let limits = QgroupLimits { referenced: Some(4 * MIB), exclusive: None };
    let inherit = Inherit { groups: vec![tenant.raw()], limits };
    let started = Instant::now();
    snapshot_in(filesystem.open("image"), &root, "container", &inherit).unwrap();
    println!("snapshot, membership and limit: {:?}", started.elapsed());
    create_subvolume_in(&root, "empty", &inherit).unwrap();
    let shown = show(&filesystem.root(), true).unwrap();
    for name in ["container", "empty"] {
        let group = shown.group(filesystem.group(name)).unwrap();
        assert_eq!(
            (group.limit_referenced_bytes, &group.parents[..]),
            (Some(4 * MIB), &[tenant][..]),
            "{name}"
        );
        assert!(group.referenced_bytes < MIB, "{group:?}");
        let (written, error) = fill(&filesystem.path(name).join("new"), 16 * MIB);
        assert!(written <= 4 * MIB && error.is_some(), "{name}: {written}");
    }
    let missing = Inherit { groups: vec![tenant.raw() + 1], limits: QgroupLimits::default() };
    assert_eq!(snapshot_in(filesystem.open("image"), &root, "not", &missing).unwrap_err().errno(), Some(2));
    let report = filesystem.verify();
    assert!(report.is_clean(), "{:?}", report.findings);
}

#[test]
fn foreign_layouts_are_refused_and_enabling_twice_is_harmless() {
    let filesystem = Filesystem::new(1, 1 << 30, &[]);
    let root = filesystem.root();
    subvolume(&filesystem, "a");
    let error = show(&root, true).unwrap_err();
    assert!(matches!(&error, Error::Off(_)) && error.hint().unwrap().contains("quota enable"), "{error}");
    let error =
        limit(&filesystem.path("a"), &Target::Subvolume, Limit::None, LimitKind::Referenced).unwrap_err();
    assert!(matches!(error, Error::Off(_)), "{error}");
    assert_eq!(usage(&filesystem.path("a"), false).unwrap(), None);

    assert!(enable(&root, Mode::Full).unwrap().changed);
    assert!(!enable(&root, Mode::Full).unwrap().changed);
    let shown = show(&root, true).unwrap();
    assert_eq!((shown.mode, shown.inconsistent, shown.rescanning), (Mode::Full, false, false));
    let error = enable(&root, Mode::Simple).unwrap_err();
    let hint = error.hint().unwrap();
    assert!(
        matches!(error, Error::OtherMode { on: Mode::Full, .. }) && hint.contains("quota disable"),
        "{hint}"
    );
    assert!(disable(&root).unwrap());
    assert!(enable(&root, Mode::Simple).unwrap().changed);
    let again = enable(&root, Mode::Simple).unwrap();
    assert!(!again.changed && again.enable_generation.is_some());
    assert!(matches!(enable(&root, Mode::Full), Err(Error::OtherMode { on: Mode::Simple, .. })));
}

#[test]
fn paths_without_quotas_say_so() {
    require_root();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    for result in [
        enable(elsewhere.path(), Mode::Simple).map(drop),
        disable(elsewhere.path()).map(drop),
        show(elsewhere.path(), true).map(drop),
        set_result(elsewhere.path()),
    ] {
        assert!(matches!(result, Err(Error::NotBtrfs(_))), "{result:?}");
    }
    assert!(matches!(show(&elsewhere.path().join("nothing"), true), Err(Error::Open { .. })));

    let mut filesystem = simple(1 << 30);
    subvolume(&filesystem, "a");
    std::fs::create_dir(filesystem.path("a/directory")).unwrap();
    std::fs::write(filesystem.path("a/file"), "x").unwrap();
    for name in ["a/directory", "a/file"] {
        let error = set_result(&filesystem.path(name)).unwrap_err();
        assert!(
            matches!(&error, Error::NotASubvolume { within: Some(within), .. } if within == Path::new("/a")),
            "{error:?}"
        );
    }
    let nobody = GroupId::new(1, 1).unwrap();
    let error = limit(&filesystem.root(), &Target::Group(nobody), Limit::None, LimitKind::Referenced);
    assert!(matches!(error, Err(Error::NoGroup { group, .. }) if group == nobody));
    assert!(matches!(assign(&filesystem.root(), filesystem.group("a"), nobody), Err(Error::NoGroup { .. })));
    assert!(matches!(assign(&filesystem.root(), nobody, nobody), Err(Error::LevelsFall { .. })));
    assert!(matches!(create_group(&filesystem.root(), GroupId::from_raw(999)), Err(Error::LevelZero(_))));

    filesystem.unmount();
    filesystem.mount("ro");
    let error = set_result(&filesystem.path("a")).unwrap_err();
    assert!(matches!(&error, Error::ReadOnly(_)) && error.hint().is_some(), "{error:?}");
    assert!(matches!(disable(&filesystem.root()), Err(Error::ReadOnly(_))));
    assert_eq!(show(&filesystem.root(), true).unwrap().mode, Mode::Simple, "reading works");
    assert!(quota::verify(&Source::open(&[filesystem.root()]).unwrap()).unwrap().is_clean());
}

fn set_result(path: &Path) -> Result<(), Error> {
    limit(path, &Target::Subvolume, Limit::Absolute(MIB), LimitKind::Referenced).map(drop)
}

#[test]
fn a_disk_that_is_full_first_says_so() {
    let filesystem = simple(256 << 20);
    subvolume(&filesystem, "a");
    let path = filesystem.path("a");
    set(&path, "1GiB");
    let (_, error) = fill(&filesystem.path("a/file"), 512 * MIB);
    assert_eq!(error.unwrap().raw_os_error(), Some(ENOSPC), "the disk, not the limit");
    std::fs::remove_file(filesystem.path("a/file")).unwrap();
    filesystem.sync();
    assert_eq!(fill(&filesystem.path("a/file"), 8 * MIB).0, 8 * MIB);
    assert!(filesystem.verify().is_clean());
}

#[test]
fn a_mount_a_device_and_an_image_tell_the_same() {
    let mut filesystem = simple(1 << 30);
    let group = subvolume(&filesystem, "a");
    fill(&filesystem.path("a/file"), 5 * MIB);
    let reports = [filesystem.path("a"), filesystem.device().to_owned(), filesystem.image(0)]
        .map(|path| quota::verify(&Source::open(&[path]).unwrap()).unwrap());
    assert!(reports.iter().all(|report| report.is_clean()));
    assert_eq!(reports[0].groups, reports[1].groups);
    assert_eq!(reports[0].groups, reports[2].groups);
    let source = Source::open(&[filesystem.path("a")]).unwrap();
    let explanation = quota::explain(&source, None, &ExplainOptions::default()).unwrap();
    assert_eq!((explanation.group, explanation.data_bytes), (group, 5 * MIB));
    drop(source);
    // Overwritten since the device was read first: a page cache would not see it.
    let file = OpenOptions::new().write(true).open(filesystem.path("a/file")).unwrap();
    file.write_all_at(&vec![9; 3 << 20], 4 << 20).unwrap();
    drop(file);
    filesystem.sync();
    let source = Source::open(&[filesystem.device().to_owned()]).unwrap();
    let report = quota::verify(&source).unwrap();
    let data = report.groups.iter().find(|report| report.group == group).unwrap().data_bytes;
    assert!(report.is_clean() && data >= 7 * MIB, "{data}");
    drop(source);
    filesystem.unmount();
    assert!(quota::verify(&Source::open(&[filesystem.image(0)]).unwrap()).unwrap().is_clean());
    filesystem.mount("");
}

#[test]
fn a_busy_filesystem_is_read_or_given_up() {
    let filesystem = simple(1 << 30);
    subvolume(&filesystem, "a");
    let source = Source::open(&[filesystem.root()]).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                fill(&filesystem.path("a/file"), 2 * MIB);
                filesystem.sync();
            }
        });
        for _ in 0..5 {
            match quota::verify(&source) {
                Ok(report) => assert!(report.is_clean(), "{:?}", report.findings),
                Err(error) => assert!(error.to_string().contains("attempts"), "{error}"),
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(quota::verify(&source).unwrap().is_clean());
}

#[test]
fn a_thousand_containers_are_quick_to_make_and_show() {
    let filesystem = simple(2 << 30);
    subvolume(&filesystem, "image");
    fill(&filesystem.path("image/file"), 4 * MIB);
    std::fs::create_dir(filesystem.path("containers")).unwrap();
    let (image, directory) = (filesystem.open("image"), filesystem.open("containers"));
    let started = Instant::now();
    for index in 0..1000 {
        let name = format!("c{index}");
        btrfs::snapshot(&image, &directory, &name, false).unwrap();
        let path = filesystem.path("containers").join(&name);
        btrfs::quota::limit_group(File::open(&path).unwrap(), 0, Some(Some(2 << 30)), None).unwrap();
    }
    let made = started.elapsed();
    filesystem.sync();
    let started = Instant::now();
    let shown = show(&filesystem.root(), false).unwrap();
    let elapsed = started.elapsed();
    println!("1000 limited snapshots in {made:?}, shown in {elapsed:?}");
    assert!(shown.groups.len() >= 1002);
    assert_eq!(shown.groups.last().unwrap().path.as_deref(), Some(Path::new("containers/c999")));
    assert!(made.as_secs() < 30 && elapsed.as_secs_f64() < 1.0, "{made:?}, {elapsed:?}");
}

#[test]
fn groups_of_deleted_subvolumes_are_tidied_away() {
    let filesystem = simple(1 << 30);
    let (gone, kept) = (subvolume(&filesystem, "gone"), subvolume(&filesystem, "kept"));
    fill(&filesystem.path("kept/file"), 2 * MIB);
    subvolume(&filesystem, "copier");
    must(
        Command::new("cp")
            .arg("--reflink=always")
            .arg(filesystem.path("kept/file"))
            .arg(filesystem.path("copier/file")),
    );
    for name in ["gone", "kept"] {
        btrfs::delete_subvolume(filesystem.open(""), name).unwrap();
    }
    filesystem.clean();
    // Newer kernels remove the first by themselves.
    remove_stale(&filesystem.root()).unwrap();
    assert_eq!(remove_stale(&filesystem.root()).unwrap(), 0);
    let shown = show(&filesystem.root(), true).unwrap();
    assert!(shown.group(gone).is_none());
    let left = shown.group(kept).unwrap();
    assert!(left.deleted && left.referenced_bytes >= 2 * MIB, "{left:?}");
    assert!(filesystem.verify().is_clean());
}

//! Quotas of a pool's containers: what they are charged for, where a limit holds, and what goes on at it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use loam_e2e::{FileServer, Loam, drop_page_cache, read_direct, tarball};
use rustix::fs::XattrFlags;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const EDQUOT: i32 = 122;

/// Bytes of the image's file; quotas in these tests are smaller.
const LARGE: usize = 24 << 20;

/// An image "debian" with one large file and 50 small ones.
fn with_image(loam: &Loam, server: &FileServer) -> PathBuf {
    let tree = loam.path("tree");
    fs::create_dir_all(tree.join("small")).unwrap();
    fs::write(tree.join("large"), tarball::noise(7, LARGE)).unwrap();
    for index in 0..50 {
        fs::write(tree.join(format!("small/{index}")), tarball::noise(index, 5000)).unwrap();
    }
    let source = loam.publish(server, &tree, "debian");
    loam.run(["add", "debian", &source]).ok();
    loam.path_of("debian")
}

fn create(loam: &Loam, name: &str, quota: &str) -> PathBuf {
    PathBuf::from(loam.run(["create", name, "debian", "--quota", quota]).ok())
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

#[track_caller]
fn assert_edquot(error: Option<io::Error>) {
    assert_eq!(error.expect("a limit").raw_os_error(), Some(EDQUOT));
}

fn sync(path: &Path) {
    tarball::shell(path, "sync -f .");
}

/// The object of this name in a list.
fn named<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|entry| entry["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}"))
}

fn bytes(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no integer"))
}

fn quota_groups(loam: &Loam) -> Vec<Value> {
    let mount = loam.mount().display().to_string();
    loam.run(["quota", "show", &mount, "--json"]).json()["groups"].as_array().unwrap().clone()
}

fn has_group(loam: &Loam, group: &str) -> bool {
    quota_groups(loam).iter().any(|found| found["group"] == group)
}

fn metrics(loam: &Loam) -> String {
    let mut socket = UnixStream::connect(loam.pool().join("run/control.sock")).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: pool\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_container_reads_all_of_its_image_and_writes_as_much_as_its_quota() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let image = with_image(&loam, &server);
    let (web1, web2) = (create(&loam, "web1", "8MiB"), create(&loam, "web2", "5GiB"));
    let free = PathBuf::from(loam.run(["create", "free", "debian"]).ok());
    assert!(read_direct(&web1.join("large")).unwrap() == tarball::noise(7, LARGE), "three times the quota");
    let listed = loam.run(["ls", "--json"]).json();
    let container = named(&listed["containers"], "web1");
    assert_eq!(container["limit_bytes"], 8 * MIB);
    assert!(bytes(&container["written_bytes"]) < MIB / 4, "reading is free: {container}");
    assert_eq!(named(&listed["containers"], "web2")["limit_bytes"], 5u64 << 30, "not cut to 32 bits");
    assert!(named(&listed["containers"], "free")["limit_bytes"].is_null());
    let metadata = bytes(&named(&listed["images"], "debian")["metadata_bytes"]);
    assert!((16 << 10..MIB).contains(&metadata), "the image's own: {metadata}");

    let (written, error) = fill(&web1.join("file"), 64 * MIB);
    assert_edquot(error);
    assert!((6 * MIB..=8 * MIB).contains(&written), "{written}");
    // Only there.
    for other in [&web2, &free] {
        assert_eq!(fill(&other.join("file"), 12 * MIB).0, 12 * MIB);
    }
    let status = loam.status();
    assert_eq!(status["quota"], "simple");
    for (name, written) in [("web1", written), ("web2", 12 * MIB), ("free", 12 * MIB)] {
        let counted = bytes(&named(&status["containers"], name)["written_bytes"]);
        assert!((written..=written + 2 * MIB).contains(&counted), "{name}: {written}, counted {counted}");
    }
    let shown = loam.run(["show", "web1", "--json"]).json();
    assert!(shown["at_limit"].as_str().unwrap().contains("EDQUOT"), "{shown}");
    assert!(bytes(&shown["free_bytes"]) <= 2 * MIB, "{shown}");
    assert_eq!(shown["metadata_bytes"], metadata);
    assert!(loam.run(["show", "web1"]).ok().contains("at limit"));
    assert!(loam.run(["show", "web2", "--json"]).json()["at_limit"].is_null());
    let scraped = metrics(&loam);
    for line in [
        "loam_container_limit_bytes{container=\"web1\"} 8388608",
        "loam_image_metadata_bytes{image=\"debian\"}",
    ] {
        assert!(scraped.contains(line), "{line} in {scraped}");
    }

    // At the limit lazy reads go on, deletes work and make room, and more room can be had.
    loam.run(["evict"]).ok();
    drop_page_cache();
    assert!(read_direct(&web1.join("large")).unwrap() == tarball::noise(7, LARGE));
    fs::remove_file(web1.join("small/1")).unwrap();
    fs::remove_file(web1.join("file")).unwrap();
    sync(&web1);
    assert_eq!(fill(&web1.join("again"), 5 * MIB).0, 5 * MIB);
    loam.run(["quota", "limit", &web1.display().to_string(), "+16MiB"]).ok();
    assert_eq!(fill(&web1.join("more"), 12 * MIB).0, 12 * MIB);
    assert!(read_direct(&image.join("large")).unwrap() == tarball::noise(7, LARGE));

    let checked = loam.run(["check", "--json"]).json();
    assert!(bytes(&checked["checked"]["quota groups"]) >= 6, "{checked}");
    // All of it is still there when the pool comes up again.
    loam.run(["down"]).ok();
    let checked = loam.run(["check", "--json"]).json();
    assert!(bytes(&checked["checked"]["quota groups"]) >= 6, "{checked}");
    let devices = ["virtual.img", "local.img"].map(|name| loam.pool().join(name).display().to_string());
    assert_eq!(loam.run(["quota", "verify", &devices[0], &devices[1]]).ok(), "");
    loam.run(["up"]).ok();
    assert_edquot(fill(&web1.join("last"), 64 * MIB).1);
}

#[test]
fn subvolumes_made_in_a_container_are_under_its_quota_and_go_with_it() {
    let (loam, server) = (Loam::up(), FileServer::start());
    with_image(&loam, &server);
    let web = create(&loam, "web", "8MiB");
    let group = loam.run(["show", "web", "--json"]).json()["quota_group"].as_str().unwrap().to_owned();
    assert!(group.starts_with("1/"), "{group}");
    let inner = web.join("inner");
    tarball::must(Command::new("btrfs").args(["subvolume", "create"]).arg(&inner));
    tarball::must(Command::new("btrfs").args(["subvolume", "create"]).arg(inner.join("deeper")));
    let (written, error) = fill(&inner.join("deeper/file"), 64 * MIB);
    assert_edquot(error);
    assert!(written <= 8 * MIB, "{written}");
    assert_edquot(fill(&web.join("file"), 8 * MIB).1);
    sync(&web);
    let listed = loam.run(["ls", "--json"]).json();
    assert!(bytes(&listed["containers"][0]["written_bytes"]) >= written, "{listed}");
    loam.run(["check"]).ok();
    // The kernel wants room in a subvolume to delete what was made in it; there is none.
    loam.run(["rm", "web"]).ok();
    assert!(!web.exists() && !has_group(&loam, &group));
    // Nor under a limit of its own that was set by hand, and is below what it uses.
    let plain = PathBuf::from(loam.run(["create", "plain", "debian"]).ok());
    tarball::must(Command::new("btrfs").args(["subvolume", "create"]).arg(plain.join("inner")));
    loam.run(["quota", "limit", &plain.display().to_string(), "1"]).ok();
    let refused =
        Command::new("btrfs").args(["subvolume", "delete"]).arg(plain.join("inner")).output().unwrap();
    println!("deleting in a full subvolume: {}", String::from_utf8_lossy(&refused.stderr).trim());
    loam.run(["rm", "plain"]).ok();
    assert!(!plain.exists());
    loam.run(["check"]).ok();
}

#[test]
fn a_tenant_of_many_containers_has_one_limit() {
    let (loam, server) = (Loam::up(), FileServer::start());
    with_image(&loam, &server);
    let mount = loam.mount().display().to_string();
    let containers: Vec<PathBuf> = ["a", "b", "c"].map(|name| create(&loam, name, "1GiB")).to_vec();
    let paths: Vec<String> = containers.iter().map(|path| path.display().to_string()).collect();
    loam.run(["quota", "group", "create", &mount, "2/7", "--limit", "12MiB"]).ok();
    loam.run(["quota", "group", "add", &mount, "2/7", &paths[0], &paths[1]]).ok();
    assert_eq!(fill(&containers[0].join("file"), 6 * MIB).0, 6 * MIB);
    let (written, error) = fill(&containers[1].join("file"), 64 * MIB);
    assert_edquot(error);
    assert!((3 * MIB..=6 * MIB).contains(&written), "{written}");
    assert_eq!(fill(&containers[2].join("file"), 16 * MIB).0, 16 * MIB, "of another tenant");
    let why = loam.run(["show", "a", "--json"]).json()["at_limit"].as_str().unwrap().to_owned();
    assert!(why.contains("2/7") && why.contains("--group 2/7"), "{why}");
    let tree = loam.run(["quota", "show", &mount]).ok();
    assert!(tree.contains("2/7") && tree.contains("    0/"), "{tree}");
    loam.run(["quota", "limit", &mount, "+20MiB", "--group", "2/7"]).ok();
    assert_eq!(fill(&containers[1].join("file"), 12 * MIB).0, 12 * MIB);
    loam.run(["quota", "verify", &mount]).ok();
    assert!(loam.run(["quota", "group", "rm", &mount, "2/7"]).fails().contains("in use"));
    loam.run(["rm", "a", "b"]).ok();
    loam.run(["quota", "group", "rm", &mount, "2/7"]).ok();
    loam.run(["check"]).ok();
}

#[test]
fn an_add_that_a_quota_stops_leaves_nothing_behind() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let tree = loam.path("many");
    fs::create_dir(&tree).unwrap();
    // Large attributes fill tree blocks with few files: near a limit the kernel commits for each of them.
    for index in 0..400 {
        let path = tree.join(format!("file{index}"));
        fs::write(&path, "x").unwrap();
        rustix::fs::setxattr(&path, "user.large", &[b'x'; 3000], XattrFlags::empty()).unwrap();
    }
    let source = loam.publish(&server, &tree, "many");
    let mount = loam.mount().display().to_string();
    // What is made in the top level is a member of its groups.
    loam.run(["quota", "group", "create", &mount, "1/100", "--limit", "512KiB"]).ok();
    loam.run(["quota", "group", "add", &mount, "1/100", "0/5"]).ok();
    let before = quota_groups(&loam).len();
    let error = loam.run(["add", "many", &source]).fails();
    assert!(
        error.contains("quota exceeded") && error.contains("hint:") && error.contains("quota show"),
        "{error}"
    );
    let building = fs::read_dir(loam.mount().join(".loam/building")).unwrap().count();
    assert_eq!(building, 0, "nothing is left");
    assert_eq!(loam.run(["ls", "--json"]).json()["images"].as_array().unwrap().len(), 0);
    loam.run(["check"]).ok();
    loam.run(["quota", "limit", &mount, "none", "--group", "1/100"]).ok();
    loam.run(["add", "many", &source]).ok();
    assert_eq!(fs::read_dir(loam.path_of("many")).unwrap().count(), 400);
    assert!(quota_groups(&loam).len() <= before + 2);
    loam.run(["check"]).ok();
}

#[test]
fn quotas_of_a_pool_that_was_made_without_come_later() {
    let (loam, server) = (Loam::new(), FileServer::start());
    loam.run(["init", "--local-size", "4GiB", "--quota", "off"]).ok();
    loam.run(["up"]).ok();
    loam.remember_device();
    with_image(&loam, &server);
    let mount = loam.mount().display().to_string();
    assert_eq!(loam.status()["quota"], "off");
    let error = loam.run(["create", "web", "debian", "--quota", "8MiB"]).fails();
    assert!(
        error.contains("not enabled") && error.contains(&format!("loam quota enable {mount}")),
        "{error}"
    );
    let old = PathBuf::from(loam.run(["create", "old", "debian"]).ok());
    assert_eq!(fill(&old.join("file"), 4 * MIB).0, 4 * MIB);
    let checked = loam.run(["check", "--json"]).json();
    assert!(checked["skipped"]["quota"].is_string(), "{checked}");

    loam.run(["quota", "enable", &mount, "--full"]).ok();
    let error = loam.run(["create", "web", "debian", "--quota", "8MiB"]).fails();
    assert!(error.contains("full qgroups") && error.contains("loam quota disable"), "{error}");
    assert_eq!(loam.status()["quota"], "full");
    loam.run(["quota", "disable", &mount]).ok();
    assert_eq!(loam.run(["quota", "enable", &mount, "--json"]).json()["changed"], true);
    assert_eq!(loam.run(["quota", "enable", &mount, "--json"]).json()["changed"], false);
    let web = create(&loam, "web", "8MiB");
    assert_edquot(fill(&web.join("file"), 64 * MIB).1);
    assert!(read_direct(&web.join("large")).unwrap() == tarball::noise(7, LARGE), "still free");
    // What was written before is not charged, but it was written.
    assert_eq!(fill(&old.join("more"), 2 * MIB).0, 2 * MIB);
    sync(&old);
    let listed = loam.run(["ls", "--json"]).json();
    let container = named(&listed["containers"], "old");
    assert!((6 * MIB..7 * MIB).contains(&bytes(&container["written_bytes"])), "{container}");
    assert!(loam.run(["ls"]).ok().contains("LIMIT"));
    loam.run(["rm", "old", "web"]).ok();
}

#[test]
fn a_program_that_runs_is_told_and_its_quota_goes_with_it() {
    let (loam, server) = (Loam::up(), FileServer::start());
    let root = loam.path("root");
    tarball::busybox_root(&root);
    let source = loam.publish(&server, &root, "busybox");
    loam.run(["add", "busybox", &source]).ok();
    let groups = quota_groups(&loam).len();
    let script =
        "dd if=/dev/zero of=/data/x bs=1M count=64 conv=fsync; cat /data/large >/dev/null && echo read";
    let outcome = loam.run(["run", "busybox", "--quota", "4MiB", "--", "/bin/sh", "-c", script]);
    assert!(outcome.stderr.contains("uota exceeded"), "{outcome:?}");
    assert!(outcome.stdout.contains("read"), "{outcome:?}");
    let level_1 = quota_groups(&loam).into_iter().filter(|group| group["level"] == 1).count();
    assert_eq!(level_1, 0);
    assert!(quota_groups(&loam).len() <= groups + 1, "its own may be there until the kernel has cleaned up");
    for wrong in ["8EiB", "+1GiB", "none", "-1", "2GB"] {
        let outcome = loam.run(["create", "x", "busybox", &format!("--quota={wrong}")]);
        assert_eq!(outcome.status.code(), Some(2), "{wrong}: {}", outcome.stderr);
    }
}

#[test]
fn a_pool_of_the_single_layout_has_quotas_too() {
    let (loam, server) = (Loam::new(), FileServer::start());
    loam.run(["init", "--local-size", "4GiB", "--layout", "single", "--quota", "on"]).ok();
    loam.run(["up"]).ok();
    loam.remember_device();
    with_image(&loam, &server);
    let web = create(&loam, "web", "8MiB");
    assert!(read_direct(&web.join("large")).unwrap() == tarball::noise(7, LARGE));
    assert_edquot(fill(&web.join("file"), 64 * MIB).1);
    loam.run(["check"]).ok();
    loam.run(["down"]).ok();
    loam.run(["check"]).ok();
    let elsewhere = loam.path("elsewhere");
    let mega = ["init", "--layout", "mega-extent", "--quota", "on", "--pool", elsewhere.to_str().unwrap()];
    let error = loam.run(mega).fails();
    assert!(error.contains("mega-extent"), "{error}");
    assert!(!elsewhere.exists(), "a pool that is refused leaves nothing");
}

#[test]
fn a_local_device_that_is_full_before_the_limit_says_so() {
    let (loam, server) = (Loam::new(), FileServer::start());
    loam.run(["init", "--local-size", "512MiB"]).ok();
    loam.run(["up"]).ok();
    loam.remember_device();
    with_image(&loam, &server);
    let web = create(&loam, "web", "4GiB");
    let error = fill(&web.join("file"), 1 << 30).1.expect("the disk is full");
    assert_eq!(error.raw_os_error(), Some(28), "ENOSPC and not EDQUOT");
    assert!(loam.run(["show", "web", "--json"]).json()["at_limit"].is_null());
    fs::remove_file(web.join("file")).unwrap();
    sync(&web);
    assert_eq!(fill(&web.join("file"), 8 * MIB).0, 8 * MIB);
    loam.run(["check"]).ok();
}

/// The figures of many containers, and that nothing grows with their number that must not.
#[test]
fn a_thousand_containers_are_made_listed_and_removed() {
    let (loam, server) = (Loam::up(), FileServer::start());
    with_image(&loam, &server);
    let mount = loam.mount().display().to_string();
    let started = Instant::now();
    let mut longest = std::time::Duration::ZERO;
    for index in 0..1000 {
        let outcome = loam.run(["create", &format!("c{index}"), "debian", "--quota", "2GiB"]);
        longest = longest.max(outcome.elapsed);
        outcome.ok();
    }
    let made = started.elapsed();
    let listed = loam.run(["ls", "--json"]);
    let shown = loam.run(["quota", "show", &mount, "--json"]);
    let one = loam.run(["show", "c999", "--json"]);
    println!(
        "1000 containers with a quota: {made:?} ({:?} each, longest {longest:?}); ls {:?}, quota show {:?}, show {:?}",
        made / 1000,
        listed.elapsed,
        shown.elapsed,
        one.elapsed
    );
    let times = [listed.elapsed, shown.elapsed, one.elapsed];
    let listed = listed.json();
    assert_eq!(listed["containers"].as_array().unwrap().len(), 1000);
    assert!(listed["containers"].as_array().unwrap().iter().all(|c| c["limit_bytes"] == 2u64 << 30));
    assert_eq!(shown.json()["groups"].as_array().unwrap().iter().filter(|g| g["level"] == 1).count(), 1000);
    one.ok();
    // The promises are 30 s and 1 s on a quiet machine, for a release build.
    assert!(made.as_secs() < 90, "{made:?}");
    assert!(times.iter().all(|time| time.as_secs() < 3), "{times:?}");
    let started = Instant::now();
    let names: Vec<String> = (0..1000).map(|index| format!("c{index}")).collect();
    loam.run(["rm".to_owned()].into_iter().chain(names)).ok();
    println!("removed in {:?}", started.elapsed());
    assert!(!quota_groups(&loam).iter().any(|group| group["level"] == 1));
}

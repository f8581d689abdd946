//! The verifier against a file system that it has nothing to do with. Needs root and loop devices.

mod seed_support;

use std::fs::{self, File};
use std::process::Command;

use loam_seed::reader::Device;
use loam_seed::verify_filesystem;
use seed_support::{Loop, Mount, btrfs, must};

/// A file system that mkfs and the kernel made, with whatever the formatter never writes: shared blocks, full back
/// references, checksums, compression, two copies of metadata.
#[test]
fn a_foreign_file_system_verifies() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a folder on tmpfs");
    let (path, point) = (directory.path().join("image"), directory.path().join("mnt"));
    File::create(&path).and_then(|file| file.set_len(2 << 30)).expect("image");
    fs::create_dir_all(&point).expect("a mount point");
    let beside = btrfs().parent().expect("a folder").join("../sbin/mkfs.btrfs");
    let mkfs = if beside.exists() { beside } else { "mkfs.btrfs".into() };
    must(Command::new(mkfs).args(["-q", "-m", "dup"]).arg(&path));
    let device = Loop::attach(&path);
    {
        must(Command::new("mount").args(["-t", "btrfs", "-o", "compress=zstd"]).arg(&device.0).arg(&point));
        let mount = Mount(point);
        let script = r#"
            btrfs subvolume create "$1/a"
            cp -a /etc /usr/include "$1/a"
            head -c 20000000 /dev/urandom > "$1/a/random"
            btrfs subvolume create "$1/a/nested"
            for i in 1 2 3 4; do btrfs subvolume snapshot "$1/a" "$1/s$i"; echo "$i" > "$1/s$i/etc/passwd"; done
            rm -rf "$1/a/include" "$1/s1/include/linux"
            fallocate -l 10M "$1/a/preallocated"
            btrfs balance start -m "$1"
            btrfs subvolume delete "$1/s2" && btrfs subvolume sync "$1"
        "#;
        must(Command::new("bash").args(["-ec", script, "bash"]).arg(&mount.0));
    }
    let file = File::open(&path).expect("image");
    let verification = verify_filesystem(&[Device { name: "foreign", image: &file }]).expect("readable");
    // mkfs leaves free space of the chunk behind that it began with, which the kernel does not mind.
    let text: Vec<String> = verification
        .findings
        .iter()
        .filter(|finding| finding.field != "free space")
        .map(ToString::to_string)
        .collect();
    assert!(text.is_empty() && verification.findings.len() < 4, "{text:#?}");
    assert!(verification.counts.checked_bytes > 20_000_000, "{:?}", verification.counts);
}

//! Trees and tars to feed to loam: one with every kind of file and metadata a tar can carry, one with nothing but a
//! static busybox, and files of any size with bytes that can be predicted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Runs a command that has to succeed.
#[track_caller]
pub fn must(command: &mut Command) -> String {
    crate::harness::run(command).ok()
}

/// Runs a shell script in `directory`; it has to succeed.
#[track_caller]
pub fn shell(directory: &Path, script: &str) -> String {
    must(Command::new("sh").args(["-euc", script]).current_dir(directory))
}

/// `length` bytes that differ from block to block and from `seed` to `seed`, and do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A tar of `directory` by GNU tar, with owners as numbers, xattrs, ACLs and nanoseconds (PAX).
pub fn pack(directory: &Path, tar: &Path) {
    let arguments =
        ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--sort=name"];
    must(
        Command::new("tar")
            .args(arguments)
            .arg("--format=pax")
            .arg("-cf")
            .arg(tar)
            .arg("-C")
            .arg(directory)
            .arg("."),
    );
}

/// What GNU tar makes of a tar: the reference for fidelity.
pub fn unpack(tar: &Path, directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    let arguments =
        ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--same-permissions", "--same-owner"];
    must(Command::new("tar").args(arguments).arg("-xf").arg(tar).arg("-C").arg(directory));
}

/// A root filesystem in which `/bin/sh` and every busybox applet runs.
pub fn busybox_root(directory: &Path) {
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "data"] {
        fs::create_dir_all(directory.join(name)).unwrap();
    }
    let binary = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file());
    let binary = binary.expect("busybox-static is installed (cargo xtask setup)");
    fs::copy(binary, directory.join("bin/busybox")).unwrap();
    fs::set_permissions(directory.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for applet in ["sh", "cat", "echo", "ls", "dd", "sha256sum", "sleep", "touch", "true", "wc", "sync"] {
        std::os::unix::fs::symlink("busybox", directory.join("bin").join(applet)).unwrap();
    }
    fs::write(directory.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    for (name, length) in [("small", 100), ("medium", 300_000), ("large", 8 << 20)] {
        fs::write(directory.join("data").join(name), noise(length as u64, length)).unwrap();
    }
}

/// A tree with one of everything that a tar can carry.
pub fn everything(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    shell(
        directory,
        "
        mkdir -p dir/deep/deeper sticky; chmod 1777 sticky; chmod 0750 dir/deep
        printf hello > dir/small; : > dir/empty; chmod 4755 dir/small; chmod 0000 dir/empty
        head -c 4096 /dev/urandom > dir/block; head -c 4097 /dev/urandom > dir/block-and-one
        head -c 1000001 /dev/urandom > dir/odd; head -c 5000000 /dev/urandom > dir/big
        ln dir/big dir/deep/hard; ln dir/big other-hard
        ln -s ../dir/big dir/symlink; ln -s /absolute/nowhere dangling
        ln -s $(head -c 300 /dev/zero | tr '\\0' l) long-target
        mknod char c 1 3; mknod block b 7 200; mkfifo fifo
        truncate -s 40M sparse; printf middle | dd of=sparse bs=1 seek=20000000 conv=notrunc status=none
        truncate -s 3M all-hole
        truncate -s 1M tail; printf end >> tail
        long=$(head -c 250 /dev/zero | tr '\\0' n); printf x > $long
        mkdir -p long/$long/$long
        printf deep > long/$long/$long/file
        printf utf > 'sp ace é ☃'; printf nl > 'new
line'; printf quote > 'quo\"te\\'
        chown 1234:4321 dir/odd; chown 4294967294:4000000000 dir/block; chown -h 77:88 dir/symlink
        setfattr -n user.plain -v value dir/odd; setfattr -n user.empty dir/odd
        setfattr -n user.binary -v 0x00ff0a00 dir/odd; setfattr -n trusted.secret -v t dir/deep
        setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 dir/big
        setfacl -m u:1000:rwx,g:2000:r-x dir/block; setfacl -d -m u:1001:rw- dir/deep
        touch -h -d '2001-02-03 04:05:06.123456789' dir/odd dir/symlink fifo char
        touch -d '1969-12-31 23:59:59.5' dir/small; touch -d '2100-01-01 00:00:00.000000001' dir/block
        touch -d '2010-10-10 10:10:10.101010101' dir/deep/deeper dir/deep dir sticky
        ",
    );
}

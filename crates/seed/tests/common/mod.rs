//! Images in memory that have one of everything.
#![allow(dead_code, unreachable_pub, reason = "each test file uses what it needs")]

use loam_seed::{
    Attributes, FileTree, Layout, MemoryImage, MemoryTree, OwnedKind, Run, SeedOptions, Subvolume, Timestamp,
    Verification, verify, write,
};

pub const SECTOR: u64 = 4096;

/// A virtual and a local image.
pub struct Pair {
    pub virtual_image: MemoryImage,
    pub local: Option<MemoryImage>,
}

impl Pair {
    pub fn verify(&self) -> Verification {
        verify(&self.virtual_image, self.local.as_ref().map(|local| local as _)).expect("readable")
    }

    /// The image that carries the trees.
    pub fn trees(&mut self) -> &mut MemoryImage {
        self.local.as_mut().unwrap_or(&mut self.virtual_image)
    }
}

pub fn format(options: &SeedOptions, subvolumes: &[Subvolume<'_>]) -> loam_seed::Result<Pair> {
    let mut virtual_image = MemoryImage::new();
    let mut local = (options.layout == Layout::Pair).then(MemoryImage::new);
    write(options, subvolumes, &mut virtual_image, local.as_mut().map(|local| local as _))?;
    Ok(Pair { virtual_image, local })
}

pub fn small_options() -> SeedOptions {
    SeedOptions {
        virtual_size: 300 << 40,
        local_size: 1 << 30,
        timestamp: Timestamp { seconds: 1_700_000_000, nanoseconds: 7 },
        label: "test".to_owned(),
        ..SeedOptions::new([7; 32])
    }
}

pub fn attributes(mode: u32) -> Attributes {
    let time = Timestamp { seconds: -5, nanoseconds: 999_999_999 };
    Attributes { uid: 1, gid: 2, mode, atime: time, mtime: time, ctime: time }
}

/// One of every kind of item that a subvolume can hold.
pub fn everything() -> MemoryTree {
    let mut tree = MemoryTree::new(attributes(0o755));
    let run = |file_offset, address, length| Run { file_offset, address, length };
    let directory = tree.add(0, "directory", OwnedKind::Directory, attributes(0o700));
    let runs = vec![run(0, 8192, 8192), run(16384, (128 << 40) - 4096, 12288)];
    let file = tree.add(directory, "file", OwnedKind::File { size: 28_672, runs }, attributes(0o644));
    let short = vec![run(0, 0, 100)];
    tree.add(directory, "short", OwnedKind::File { size: 100, runs: short }, attributes(0o644));
    tree.add(0, "inline", OwnedKind::Inline(b"content".to_vec()), attributes(0o600));
    tree.add(0, "symlink", OwnedKind::Symlink(b"directory/file".to_vec()), attributes(0o777));
    tree.add(0, "null", OwnedKind::CharacterDevice { major: 1, minor: 3 }, attributes(0o666));
    tree.add(0, "fifo", OwnedKind::Fifo, attributes(0o666));
    tree.add(0, "socket", OwnedKind::Socket, attributes(0o666));
    tree.add(0, "hole", OwnedKind::File { size: 1 << 40, runs: Vec::new() }, attributes(0o666));
    tree.add(directory, "hard", OwnedKind::HardLink(file), Attributes::default());
    for index in 0..40 {
        tree.add(directory, format!("{index:0>200}"), OwnedKind::HardLink(file), Attributes::default());
    }
    // Names of one hash.
    let one = tree.add(0, "ue2r43xy", OwnedKind::Fifo, attributes(0o644));
    tree.add(0, "c54cvxdh", OwnedKind::Socket, attributes(0o644));
    tree.set_xattr(one, "user.qmeo5att", "one");
    tree.set_xattr(one, "user.whdasbt4", "two");
    assert!(!tree.is_empty());
    tree
}

/// A pair with one of everything, small blocks and simple quotas.
pub fn full_pair(layout: Layout) -> Pair {
    let tree = everything();
    let subvolumes = [
        Subvolume { name: "one", tree: &tree, readonly: true },
        Subvolume { name: "two", tree: &tree, readonly: false },
    ];
    let options = SeedOptions { layout, node_size: 4096, simple_quota: true, ..small_options() };
    format(&options, &subvolumes).expect("formatted")
}

pub fn show(verification: &Verification) -> String {
    verification.findings.iter().map(|finding| format!("{finding}\n")).collect()
}

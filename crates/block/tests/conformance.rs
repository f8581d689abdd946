//! Every device of the crate keeps the contract of `BlockDevice`.

use loam_block::conformance::{Contents, Profile, read_located, run};
use loam_block::{
    Access, BlockDevice, FileDevice, FileOptions, MemoryDevice, NullDevice, PatternDevice, WriteFlags,
};

const SEEDS: std::ops::Range<u64> = 0..4;

fn run_seeds(contents: Contents, device: impl Fn() -> Box<dyn BlockDevice>) {
    for seed in SEEDS {
        run(&*device(), &Profile { contents, seed, ..Profile::default() });
    }
}

/// A directory on a file system that stores (`/tmp` may be memory), and one that is memory.
fn directories() -> [tempfile::TempDir; 2] {
    ["/var/tmp", "/dev/shm"].map(|parent| tempfile::tempdir_in(parent).expect("temporary directory"))
}

#[test]
fn memory() {
    run_seeds(Contents::Stored, || Box::new(MemoryDevice::new(1 << 20)));
}

#[test]
fn memory_of_the_largest_size() {
    run_seeds(Contents::Stored, || Box::new(MemoryDevice::new(u64::MAX / 4096 * 4096)));
}

#[test]
fn null() {
    run_seeds(Contents::Fixed, || Box::new(NullDevice::new(4 << 60)));
}

#[test]
fn pattern() {
    run_seeds(Contents::Fixed, || Box::new(PatternDevice::new(u64::MAX / 4096 * 4096)));
}

#[test]
fn buffered_file() {
    for directory in directories() {
        let path = directory.path().join("file");
        let new = || {
            let _ = std::fs::remove_file(&path);
            Box::new(FileDevice::create(&path, 1 << 20, FileOptions::default()).expect("file")) as _
        };
        run_seeds(Contents::Stored, new);
    }
}

#[test]
fn file_in_memory() {
    run_seeds(Contents::Stored, || Box::new(FileDevice::in_memory(1 << 20).expect("memory")));
}

#[test]
fn files_say_where_their_bytes_lie_and_memory_does_not() {
    let [directory, _] = directories();
    for direct in [false, true] {
        let path = directory.path().join(format!("direct-{direct}"));
        std::fs::write(&path, [7; 64 << 10]).expect("file");
        let device = FileDevice::open(&path, FileOptions { direct, read_only: true }).expect("file");
        for access in [Access::Seen, Access::Unseen] {
            assert_eq!(read_located(&device, 8192, 4096, access), Some(vec![7; 4096]));
        }
    }
    let memory: [&dyn BlockDevice; 3] =
        [&MemoryDevice::new(1 << 20), &NullDevice::new(1 << 20), &PatternDevice::new(1 << 20)];
    assert!(memory.iter().all(|device| device.locate(0, 4096, Access::Seen).is_none()));
}

#[test]
fn direct_file() {
    let [directory, _] = directories();
    let path = directory.path().join("file");
    let options = FileOptions { direct: true, ..FileOptions::default() };
    let device = FileDevice::create(&path, 1 << 20, options).expect("file");
    run_seeds(Contents::Stored, || Box::new(FileDevice::open(device.path(), options).expect("file")));
}

#[test]
fn read_only_file() {
    for directory in directories() {
        let path = directory.path().join("file");
        let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i >> 7) as u8).collect();
        std::fs::write(&path, bytes).expect("file");
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        run_seeds(Contents::Fixed, || Box::new(FileDevice::open(&path, options).expect("file")));
    }
}

#[tokio::test]
async fn holes_of_a_file_are_found_and_punched() {
    let [directory, _] = directories();
    let device =
        FileDevice::create(directory.path().join("file"), 1 << 20, FileOptions::default()).expect("file");
    let data = vec![1; 64 << 10];
    for offset in [128 << 10, 512 << 10] {
        device.write(offset, &data, WriteFlags::default()).await.expect("write");
    }
    let kinds = |extents: Vec<loam_block::Extent>| {
        extents.iter().map(|e| (e.offset >> 10, e.length >> 10, e.kind)).collect::<Vec<_>>()
    };
    use loam_block::ExtentKind::{Data, Hole};
    let all = device.extents(0, 1 << 20, 16).await.expect("extents");
    assert_eq!(
        kinds(all),
        [(0, 128, Hole), (128, 64, Data), (192, 320, Hole), (512, 64, Data), (576, 448, Hole)]
    );
    let again = device.extents(0, 1 << 20, 16).await.expect("extents");
    assert_eq!(kinds(again).len(), 5, "what is remembered is no more than what was found");
    let inside = device.extents(514 << 10, 4 << 10, 1);
    assert!(inside.is_ready(), "a run of data is remembered");
    assert_eq!(kinds(inside.await.expect("extents")), [(514, 4, Data)]);
    let flags = loam_block::ZeroFlags { fast_only: true, ..Default::default() };
    device.write_zeroes(512 << 10, 64 << 10, flags).await.expect("punched");
    let rest = device.extents(192 << 10, 832 << 10, 16).await.expect("extents");
    assert_eq!(kinds(rest), [(192, 832, Hole)]);
    let limited = device.extents(0, 1 << 20, 2).await.expect("extents");
    assert_eq!(kinds(limited), [(0, 128, Hole), (128, 64, Data)]);
}

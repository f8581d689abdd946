//! The file device on a block device, which a machine has none of to spare: a loop device over a sparse file.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use loam_block::conformance::{Contents, Profile, run};
use loam_block::{BlockDevice, ErrorKind, FileDevice, FileOptions, WriteFlags, ZeroFlags};
use loam_e2e::require_root;
use loam_sys::loopdev::{LoopConfig, LoopDevice, attach};

const SIZE: u64 = 4 << 20;

/// A loop device; detached when both are dropped (autoclear), the file going with its directory.
struct Loop {
    _directory: tempfile::TempDir,
    backing: File,
    device: LoopDevice,
}

fn loop_device() -> Loop {
    require_root();
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("backing");
    let backing = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    backing.set_len(SIZE).unwrap();
    let config = LoopConfig {
        backing: backing.as_fd(),
        read_only: false,
        direct_io: false,
        autoclear: true,
        block_size: 512,
        offset: 0,
        size_limit: 0,
    };
    let device = attach(&config).unwrap();
    Loop { _directory: directory, backing, device }
}

#[test]
fn a_block_device_keeps_the_contract_buffered_and_direct() {
    let target = loop_device();
    for direct in [false, true] {
        let options = FileOptions { direct, read_only: false };
        let device = FileDevice::open(target.device.path(), options).unwrap();
        assert_eq!((device.geometry().size, device.geometry().minimum_block), (SIZE, 512));
        for seed in 0..2 {
            run(&device, &Profile { contents: Contents::Stored, seed, operations: 200 });
        }
    }
}

#[tokio::test]
async fn zeroes_and_trims_of_a_block_device_punch_holes_below_it() {
    let target = loop_device();
    let device = FileDevice::open(target.device.path(), FileOptions::default()).unwrap();
    let allocated = || target.backing.metadata().unwrap().blocks() * 512;
    device.write(0, &vec![1; SIZE as usize], WriteFlags { fua: true }).await.unwrap();
    assert!(allocated() >= SIZE);
    let fast = ZeroFlags { fast_only: true, fua: true, no_hole: false };
    device.write_zeroes(0, SIZE / 2, fast).await.unwrap();
    device.trim(SIZE / 2, SIZE / 4).await.unwrap();
    device.flush().await.unwrap();
    assert!(allocated() <= SIZE / 4 + 65536, "{} bytes", allocated());
    let mut bytes = vec![9; SIZE as usize];
    device.read(0, &mut bytes).await.unwrap();
    assert!(bytes[..SIZE as usize / 2].iter().all(|byte| *byte == 0));
    assert!(bytes[SIZE as usize * 3 / 4..].iter().all(|byte| *byte == 1));

    // To keep it allocated, zero bytes would have to be written: slow, so refused where only fast will do.
    let slow = ZeroFlags { fast_only: true, fua: false, no_hole: true };
    let error = device.write_zeroes(0, 4096, slow).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    device.write_zeroes(0, 4096, ZeroFlags { fast_only: false, ..slow }).await.unwrap();
}

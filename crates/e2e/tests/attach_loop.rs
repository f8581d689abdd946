//! The loop transport on a real kernel: what is read is what the device holds, errors are told and get over, misses do
//! not stand before hits, and nothing is left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attach_common;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use attach_common::{Aligned, HUGE, TestDevice, VIRTUAL_BASE, open_direct, read_pattern, resources, runtime};
use loam_attach::holder::FdStore;
use loam_attach::{AttachOptions, Error, FileAttachment, FileOptions, LoopTransport};
use loam_block::BlockDevice;
use loam_e2e::{require_root, wait_until};

#[test]
fn a_device_of_four_exbibytes_reads_right_and_detaches_without_a_trace() {
    require_root();
    let runtime = runtime();
    let device: Arc<dyn BlockDevice> = Arc::new(TestDevice::new(HUGE));
    // Threads of the runtime are started lazily; the second round shows what attaching itself leaves.
    let mut before = resources();
    for round in 0..3 {
        let mut attachment = LoopTransport::attach(
            device.clone(),
            runtime.handle().clone(),
            &AttachOptions::default(),
            &FdStore::none(),
        )
        .unwrap();
        assert_eq!(LoopTransport::find(attachment.state()).unwrap(), Some(attachment.state().loop_number));
        let path = attachment.device_path();
        let file = open_direct(&path);
        for length in [4096, 65536, 1 << 20] {
            let mut buffer = Aligned::new(length);
            let end = HUGE - length as u64;
            for offset in [0, 4096, VIRTUAL_BASE - 4096, VIRTUAL_BASE, HUGE / 2, end] {
                read_pattern(&file, offset, &mut buffer).unwrap();
            }
        }
        let stats = attachment.stats();
        assert!(stats.hits > 0 && stats.errors == 0 && stats.protocol_errors == 0, "{stats:?}");
        drop(file);
        let state = attachment.state().clone();
        attachment.detach(&FdStore::none()).unwrap();
        drop(attachment);
        assert_eq!(LoopTransport::find(&state).unwrap(), None);
        assert!(!LoopTransport::remove(&state).unwrap());
        if round == 0 {
            before = resources();
        }
        assert_eq!(resources(), before, "descriptors and threads");
    }
}

#[test]
fn an_error_of_the_device_reaches_the_reader_and_a_later_read_succeeds() {
    require_root();
    let runtime = runtime();
    let device = Arc::new(TestDevice::new(HUGE));
    let mut attachment = LoopTransport::attach(
        device.clone(),
        runtime.handle().clone(),
        &AttachOptions::default(),
        &FdStore::none(),
    )
    .unwrap();
    let file = open_direct(&attachment.device_path());
    let mut buffer = Aligned::new(4096);
    for flag in [&device.broken, &device.panics] {
        flag.store(true, Ordering::Relaxed);
        let error = read_pattern(&file, VIRTUAL_BASE, &mut buffer).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
        flag.store(false, Ordering::Relaxed);
        read_pattern(&file, VIRTUAL_BASE, &mut buffer).unwrap();
    }
    assert!(attachment.stats().errors >= 2);
    drop(file);
    attachment.detach(&FdStore::none()).unwrap();
}

#[test]
fn writes_are_refused() {
    require_root();
    let runtime = runtime();
    let device = Arc::new(TestDevice::new(HUGE));
    let mut attachment =
        LoopTransport::attach(device, runtime.handle().clone(), &AttachOptions::default(), &FdStore::none())
            .unwrap();
    let path = attachment.device_path();
    match OpenOptions::new().write(true).open(&path) {
        // EPERM, EACCES or EROFS, depending on the kernel.
        Err(error) => assert!(matches!(error.raw_os_error(), Some(1 | 13 | 30)), "{error}"),
        Ok(file) => {
            let error = file.write_all_at(&[0; 4096], 0).and_then(|()| file.sync_all()).unwrap_err();
            assert!(matches!(error.raw_os_error(), Some(1 | 5 | 30)), "{error}");
        }
    }
    attachment.detach(&FdStore::none()).unwrap();
}

#[test]
fn a_device_that_is_held_is_not_detached_and_goes_on() {
    require_root();
    let runtime = runtime();
    let device = Arc::new(TestDevice::new(HUGE));
    let mut attachment =
        LoopTransport::attach(device, runtime.handle().clone(), &AttachOptions::default(), &FdStore::none())
            .unwrap();
    let path = attachment.device_path();
    // What a mount does: claim it exclusively.
    let claim = {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = (rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::EXCL).bits() as i32;
        OpenOptions::new().read(true).custom_flags(flags).open(&path).unwrap()
    };
    assert!(matches!(attachment.detach(&FdStore::none()).unwrap_err(), Error::Busy { .. }));
    assert!(matches!(LoopTransport::remove(attachment.state()).unwrap_err(), Error::Busy { .. }));
    read_pattern(&claim, VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
    drop(claim);
    attachment.detach(&FdStore::none()).unwrap();
}

#[test]
fn misses_do_not_stand_before_hits() {
    require_root();
    let runtime = runtime();
    let device = Arc::new(TestDevice {
        slow_from: VIRTUAL_BASE,
        delay: Duration::from_secs(2),
        ..TestDevice::new(HUGE)
    });
    let mut attachment = LoopTransport::attach(
        device.clone(),
        runtime.handle().clone(),
        &AttachOptions::default(),
        &FdStore::none(),
    )
    .unwrap();
    let path = attachment.device_path();
    std::thread::scope(|scope| {
        // Many more than there are threads that serve.
        let misses: Vec<_> = (0..32)
            .map(|index| {
                let path = &path;
                scope.spawn(move || {
                    read_pattern(&open_direct(path), VIRTUAL_BASE + index * 65536, &mut Aligned::new(4096))
                })
            })
            .collect();
        while device.under_way.load(Ordering::Relaxed) < 32 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let file = open_direct(&path);
        for index in 0..100 {
            read_pattern(&file, index * 4096, &mut Aligned::new(4096)).unwrap();
        }
        assert_eq!(device.under_way.load(Ordering::Relaxed), 32, "the hits were answered first");
        for miss in misses {
            miss.join().unwrap().unwrap();
        }
    });
    // A miss is counted as over just after its reader was answered.
    wait_until("no miss waits", Duration::from_secs(2), || attachment.stats().waiting == 0);
    let stats = attachment.stats();
    assert!(stats.misses >= 32, "{stats:?}");
    attachment.detach(&FdStore::none()).unwrap();
}

#[test]
fn a_flood_of_slow_reads_is_bounded() {
    require_root();
    const READERS: u64 = 64;
    const READS: u64 = 100_000 / READERS;
    let runtime = runtime();
    let device = Arc::new(TestDevice {
        slow_from: VIRTUAL_BASE,
        delay: Duration::from_millis(1),
        ..TestDevice::new(HUGE)
    });
    let mut attachment = LoopTransport::attach(
        device.clone(),
        runtime.handle().clone(),
        &AttachOptions::default(),
        &FdStore::none(),
    )
    .unwrap();
    let path = attachment.device_path();
    let before = resident_bytes();
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let path = &path;
            scope.spawn(move || {
                let file = open_direct(path);
                let mut buffer = Aligned::new(4096);
                for index in 0..READS {
                    let offset = VIRTUAL_BASE + (reader << 40) + index * 4096;
                    read_pattern(&file, offset, &mut buffer).unwrap();
                }
            });
        }
    });
    let grown = resident_bytes().saturating_sub(before);
    let stats = attachment.stats();
    assert_eq!((stats.misses >= READERS * READS, stats.waiting, stats.errors), (true, 0, 0), "{stats:?}");
    assert!(device.most_under_way.load(Ordering::Relaxed) <= 300);
    assert!(grown < 64 << 20, "grew by {grown} bytes");
    attachment.detach(&FdStore::none()).unwrap();
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_size_that_loop_would_cut_is_refused() {
    require_root();
    let runtime = runtime();
    for size in [0, 4097, 1 << 63] {
        let device = Arc::new(TestDevice::new(size));
        let result = LoopTransport::attach(
            device,
            runtime.handle().clone(),
            &AttachOptions::default(),
            &FdStore::none(),
        );
        assert!(matches!(result, Err(Error::Unsuitable(_))), "{size}");
    }
}

#[test]
fn a_local_file_is_attached_found_and_detached() {
    require_root();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("local.img");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    assert!(FileAttachment::find(&path).unwrap().is_none());
    let mut attachment = FileAttachment::attach(&path, &FileOptions::default()).unwrap();
    let mut file = OpenOptions::new().write(true).open(attachment.device_path()).unwrap();
    file.write_all(&[7; 4096]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(std::fs::read(&path).unwrap()[..4096], [7; 4096]);
    let found = FileAttachment::find(&path).unwrap().unwrap();
    assert_eq!(found.device_path(), attachment.device_path());
    drop(found);
    attachment.detach().unwrap();
    attachment.detach().unwrap();
    assert!(FileAttachment::find(&path).unwrap().is_none());
}

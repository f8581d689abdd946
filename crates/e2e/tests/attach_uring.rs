//! The loop transport with FUSE over io_uring: the same promises as without, but for taking over. One test, because the
//! switch is one for the whole machine.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attach_common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use attach_common::{Aligned, HUGE, TestDevice, VIRTUAL_BASE, open_direct, read_pattern, resources, runtime};
use loam_attach::fuse::{Engine, ServerOptions};
use loam_attach::holder::FdStore;
use loam_attach::{AttachOptions, LoopTransport};
use loam_e2e::{require_root, wait_until};

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Switches FUSE over io_uring, and back when dropped.
struct Switched(String);

impl Switched {
    fn to(value: &str) -> Switched {
        let before = std::fs::read_to_string(SWITCH).unwrap();
        std::fs::write(SWITCH, value).unwrap();
        Switched(before)
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        let _ = std::fs::write(SWITCH, &self.0);
    }
}

fn options() -> AttachOptions {
    let server = ServerOptions { engine: Engine::Uring, ..ServerOptions::default() };
    AttachOptions { server, ..AttachOptions::default() }
}

#[test]
fn by_io_uring_where_the_kernel_has_it() {
    require_root();
    if !Path::new(SWITCH).exists() {
        println!("this kernel has no FUSE over io_uring: nothing to test");
        return;
    }
    {
        let _off = Switched::to("N");
        let runtime = runtime();
        let device = Arc::new(TestDevice::new(HUGE));
        let mut attachment =
            LoopTransport::attach(device, runtime.handle().clone(), &options(), &FdStore::none()).unwrap();
        assert_eq!(attachment.engine(), Engine::Classic);
        read_pattern(&open_direct(&attachment.device_path()), VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
        attachment.detach(&FdStore::none()).unwrap();
    }
    let _on = Switched::to("Y");
    let mut before = resources();
    for round in 0..3 {
        everything();
        if round == 0 {
            before = resources();
        }
        assert_eq!(resources(), before, "descriptors and threads");
    }
}

fn everything() {
    let runtime = runtime();
    let device = Arc::new(TestDevice {
        slow_from: HUGE / 2,
        delay: Duration::from_millis(1500),
        ..TestDevice::new(HUGE)
    });
    let store = FdStore::none();
    let mut attachment =
        LoopTransport::attach(device.clone(), runtime.handle().clone(), &options(), &store).unwrap();
    assert_eq!(attachment.engine(), Engine::Uring);
    let path = attachment.device_path();
    let file = open_direct(&path);
    for length in [4096, 65536, 1 << 20] {
        for offset in [0, 4096, VIRTUAL_BASE - 4096, VIRTUAL_BASE, HUGE - length as u64] {
            read_pattern(&file, offset, &mut Aligned::new(length)).unwrap();
        }
    }
    for flag in [&device.broken, &device.panics] {
        flag.store(true, Ordering::Relaxed);
        let error = read_pattern(&file, VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
        flag.store(false, Ordering::Relaxed);
        read_pattern(&file, VIRTUAL_BASE, &mut Aligned::new(4096)).unwrap();
    }
    std::thread::scope(|scope| {
        let misses: Vec<_> = (0..16)
            .map(|index| {
                let path = &path;
                scope.spawn(move || {
                    let offset = HUGE / 2 + index * 65536;
                    read_pattern(&open_direct(path), offset, &mut Aligned::new(4096))
                })
            })
            .collect();
        while device.under_way.load(Ordering::Relaxed) < 16 {
            std::thread::sleep(Duration::from_millis(1));
        }
        for index in 0..100 {
            read_pattern(&file, index * 4096, &mut Aligned::new(4096)).unwrap();
        }
        assert_eq!(device.under_way.load(Ordering::Relaxed), 16, "the hits were answered first");
        for miss in misses {
            miss.join().unwrap().unwrap();
        }
    });
    drop(file);
    // A miss is counted as over just after its reader was answered.
    wait_until("no miss waits", Duration::from_secs(2), || attachment.stats().waiting == 0);
    let stats = attachment.stats();
    assert!(stats.hits > 100 && stats.misses >= 16, "{stats:?}");
    assert_eq!(stats.protocol_errors, 0, "{stats:?}");
    attachment.detach(&store).unwrap();
}

//! The client against the other servers: nbdkit with filters that make it odd, qemu-nbd (extended headers), nbd-server
//! (simple replies). None of it needs root.

mod nbd_support;

use std::path::Path;
use std::time::Duration;

use loam_block::conformance::{Contents, Profile, run};
use loam_block::{BlockDevice, ErrorKind, ExtentKind, WriteFlags, ZeroFlags};
use loam_nbd::client::{ClientOptions, NbdDevice, list};
use nbd_support::{Peer, nbd_server, nbdkit, qemu_nbd};
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn connect(runtime: &Runtime, uri: &str) -> NbdDevice {
    let options = ClientOptions { reconnect_limit: Duration::from_secs(10), ..ClientOptions::default() };
    runtime.block_on(NbdDevice::connect(&uri.parse().unwrap(), options)).unwrap()
}

fn conforms(peer: &Peer, uri: &str, operations: u32) -> (Runtime, NbdDevice) {
    let runtime = runtime();
    let device = connect(&runtime, uri);
    assert!(Path::new(&format!("/proc/{}", peer.pid())).exists());
    run(&device, &Profile { contents: Contents::Stored, operations, ..Profile::default() });
    (runtime, device)
}

fn image(peer_size: u64) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(peer_size).unwrap();
    image
}

#[test]
fn nbdkit_memory_conforms() {
    let peer = nbdkit(&["memory", "2M"]);
    let (_runtime, device) = conforms(&peer, &peer.uri(), 400);
    assert!(device.export().structured && !device.export().extended);
    assert!(device.connections() > 1 && device.capabilities().fast_zero && device.capabilities().extents);
}

#[test]
fn nbdkit_with_odd_filters_conforms() {
    let image = image(2 * MIB);
    let path = image.path().to_str().unwrap();
    let sets: [&[&str]; 6] = [
        &["--filter=nozero", "memory", "2M"],
        &["--filter=noextents", "--filter=nocache", "memory", "2M"],
        &["--filter=multi-conn", "memory", "2M", "multi-conn-mode=disable"],
        &["--filter=fua", "file", path],
        &["--filter=blocksize", "file", path, "minblock=4096", "maxdata=64k"],
        &["--filter=delay", "memory", "2M", "rdelay=1ms", "wdelay=2ms"],
    ];
    for arguments in sets {
        let peer = nbdkit(arguments);
        let (runtime, device) = conforms(&peer, &peer.uri(), 150);
        let capabilities = device.capabilities();
        match arguments[0] {
            "--filter=nozero" => assert!(!capabilities.zero),
            "--filter=noextents" => {
                let extents = runtime.block_on(device.extents(0, 2 * MIB, 100)).unwrap();
                assert!(extents.iter().all(|run| run.kind == ExtentKind::Data), "{extents:?}");
            }
            "--filter=multi-conn" => assert_eq!(device.connections(), 1),
            "--filter=fua" => assert!(!device.export().flags.fua),
            _ => {}
        }
    }
}

#[test]
fn block_sizes_that_nbdkit_insists_on_are_kept() {
    let policy = [
        "--filter=blocksize-policy",
        "memory",
        "2M",
        "blocksize-minimum=512",
        "blocksize-preferred=4096",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    ];
    let peer = nbdkit(&policy);
    let (runtime, device) = conforms(&peer, &peer.uri(), 200);
    let geometry = device.geometry();
    assert_eq!(
        (geometry.minimum_block, geometry.preferred_block, geometry.maximum_block),
        (512, 4096, 65536)
    );
    runtime.block_on(async {
        // Longer than one request may be.
        let data: Vec<u8> = (0..MIB as u32).map(|byte| (byte >> 9) as u8).collect();
        device.write(512, &data, WriteFlags::default()).await.unwrap();
        let mut back = vec![0; data.len()];
        device.read(512, &mut back).await.unwrap();
        assert!(data == back);
    });
}

#[test]
fn errors_of_nbdkit_arrive_with_their_meaning() {
    let errors =
        ["--filter=error", "memory", "2M", "error-pwrite=ENOSPC", "error-pread=EIO", "error-pread-rate=50%"];
    let peer = nbdkit(&[&errors[..], &["error-pwrite-rate=100%"]].concat());
    let runtime = runtime();
    let device = connect(&runtime, &peer.uri());
    runtime.block_on(async {
        let refused = device.write(0, &[1; 4096], WriteFlags::default()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NoSpace);
        let (mut good, mut bad) = (0, 0);
        for offset in 0..200 {
            let mut buffer = [7; 512];
            match device.read(offset * 512, &mut buffer).await {
                Ok(()) => good += usize::from(buffer == [0; 512]),
                Err(error) => bad += usize::from(error.kind() == ErrorKind::Io),
            }
        }
        assert!(good > 20 && bad > 20 && good + bad == 200, "{good} good, {bad} bad");
    });
}

#[test]
fn qemu_nbd_conforms_with_extended_headers() {
    let image = image(4 * MIB);
    let peer = qemu_nbd(&["-f", "raw", "--discard=unmap", image.path().to_str().unwrap()]);
    let (runtime, device) = conforms(&peer, &peer.uri(), 300);
    assert!(device.export().extended && device.capabilities().extents && device.connections() > 1);
    runtime.block_on(async {
        device.write_zeroes(0, 4 * MIB, ZeroFlags::default()).await.unwrap();
        device.write(MIB, &vec![1; MIB as usize], WriteFlags { fua: true }).await.unwrap();
        let (mut at, mut found) = (0, Vec::new());
        while at < 4 * MIB {
            let extents = device.extents(at, 4 * MIB - at, 100).await.unwrap();
            at = extents.last().map(|last| last.offset + last.length).unwrap();
            found.extend(extents);
        }
        let data: u64 = found.iter().filter(|run| run.kind == ExtentKind::Data).map(|run| run.length).sum();
        assert!((MIB..=2 * MIB).contains(&data), "{found:?}");
    });
}

#[test]
fn nbd_server_conforms_with_simple_replies() {
    let image = image(2 * MIB);
    let path = image.path().display();
    let peer = nbd_server(&format!("[disk]\nexportname = {path}\nflush = true\nfua = true\ntrim = true\n"));
    let (runtime, device) = conforms(&peer, &peer.uri_of("disk"), 200);
    assert!(!device.export().structured);
    let uri = peer.uri().parse().unwrap();
    let exports = runtime.block_on(list(&uri, &ClientOptions::default())).unwrap();
    assert_eq!(exports[0].name, "disk");
}

#[test]
fn a_peer_that_is_killed_and_comes_back_is_waited_for() {
    let image = image(8 * MIB);
    let mut peer = nbdkit(&["file", image.path().to_str().unwrap()]);
    let runtime = runtime();
    let device = connect(&runtime, &peer.uri());
    runtime.block_on(async {
        device.write(0, &vec![5; MIB as usize], WriteFlags::default()).await.unwrap();
        peer.kill();
        let mut buffer = vec![0; MIB as usize];
        let restart = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            peer.restart();
        };
        let (read, ()) = tokio::join!(device.read(0, &mut buffer), restart);
        read.unwrap();
        assert!(buffer.iter().all(|byte| *byte == 5));
        assert_eq!(device.flush().await.unwrap_err().kind(), ErrorKind::WritesLost);
        device.flush().await.unwrap();
    });
}

//! The client over our own server: the conformance suite, many requests at once, and lists.

mod client_support;

use std::sync::Arc;

use client_support::{Served, options};
use loam_block::conformance::{Contents, Profile, run};
use loam_block::{BlockDevice, FileDevice, FileOptions, MemoryDevice, PatternDevice, WriteFlags};
use loam_nbd::client::{ClientOptions, list};
use loam_nbd::server::ServerOptions;

fn conforms(device: Arc<dyn BlockDevice>, contents: Contents, connections: usize) {
    let served = Served::new(device, ServerOptions::default());
    let device = served.connect(ClientOptions { connections, ..options() });
    assert_eq!(device.connections(), connections);
    run(&device, &Profile { contents, ..Profile::default() });
}

#[test]
fn memory_over_one_connection_conforms() {
    conforms(Arc::new(MemoryDevice::new(1 << 20)), Contents::Stored, 1);
}

#[test]
fn memory_over_four_connections_conforms() {
    conforms(Arc::new(MemoryDevice::new(1 << 20)), Contents::Stored, 4);
}

#[test]
fn a_file_conforms() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let device = FileDevice::open(file.path(), FileOptions::default()).unwrap();
    conforms(Arc::new(device), Contents::Stored, 2);
}

#[test]
fn what_cannot_be_written_conforms() {
    conforms(Arc::new(PatternDevice::new(1 << 30)), Contents::Fixed, 1);
}

#[test]
fn many_requests_of_many_sizes_at_once_get_their_own_bytes() {
    let served = Served::new(Arc::new(MemoryDevice::new(64 << 20)), ServerOptions::default());
    let device = Arc::new(served.connect(ClientOptions { connections: 2, ..options() }));
    let pattern = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        let source = PatternDevice::new(1 << 40);
        assert!(source.read(offset, &mut bytes).is_ready());
        bytes
    };
    served.runtime.block_on(async {
        let sizes = [512, 4096, 24 << 10, 100 << 10, 1 << 20];
        let mut tasks = Vec::new();
        for round in 0..60_u64 {
            let (device, length) = (device.clone(), sizes[round as usize % sizes.len()]);
            tasks.push(tokio::spawn(async move {
                let offset = round << 20;
                let data = pattern(offset, length);
                device.write(offset, &data, WriteFlags { fua: round % 7 == 0 }).await.unwrap();
                // Several in one task, polled together.
                let mut buffers: Vec<Vec<u8>> = vec![vec![1; length / 4]; 4];
                let reads = buffers
                    .iter_mut()
                    .enumerate()
                    .map(|(index, buffer)| device.read(offset + (index * (length / 4)) as u64, buffer));
                for result in futures_util::future::join_all(reads).await {
                    result.unwrap();
                }
                assert_eq!(buffers.concat(), data, "{length} bytes at {offset}");
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn exports_are_listed_and_described() {
    let served = Served::new(Arc::new(MemoryDevice::new(1 << 20)), ServerOptions::default());
    let exports = served.runtime.block_on(list(&served.uri, &options())).unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!((exports[0].name.as_str(), exports[0].size), ("disk", 1 << 20));
    assert_eq!(exports[0].description, "a disk");
    let device = served.connect(options());
    assert!(device.export().extended && device.export().has_extents());
    assert!(exports[0].contexts.iter().any(|name| name == "base:allocation"), "{exports:?}");
}

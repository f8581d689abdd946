//! The chunk cache on a disk that is full: what is fetched is served, what cannot be kept is counted, and when there is
//! room again it is kept again. Needs root for a small tmpfs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use loam_block::BlockDevice;
use loam_content::{Cache, CacheOptions, FileSource, WholeSource};
use loam_e2e::require_root;
use rustix::mount::{MountFlags, UnmountFlags};

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 64;

struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, bytes: u64) -> SmallDisk<'a> {
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        rustix::mount::mount("tmpfs", at, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        SmallDisk(at)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_slows_down_but_serves() {
    require_root();
    let bytes: Vec<u8> =
        (0..(CHUNK * CHUNKS) as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("content");
    std::fs::write(&file, &bytes).unwrap();
    let at = dir.path().join("small");
    std::fs::create_dir(&at).unwrap();
    // Half of the content, one chunk and the tables.
    let disk = SmallDisk::mount(&at, (CHUNK * (CHUNKS / 2 + 1)) as u64 + (64 << 10));
    {
        let cache = Cache::open(at.join("cache"), CacheOptions::default()).unwrap();
        let source = Arc::new(FileSource::open(&file, None).unwrap());
        let device = cache.device("x", Arc::new(WholeSource::new(source, CHUNK as u32).unwrap())).unwrap();
        // The digests of all chunks are recorded while there is room: without that nothing new may be served.
        for round in 0..3 {
            if round == 2 {
                std::fs::remove_file(at.join("ballast")).unwrap();
            }
            for chunk in 0..CHUNKS {
                let mut buffer = vec![0; CHUNK];
                device.read((chunk * CHUNK) as u64, &mut buffer).await.unwrap();
                assert!(buffer == bytes[chunk * CHUNK..][..CHUNK], "round {round}, chunk {chunk}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            let stats = cache.stats();
            assert_eq!(stats.bytes, device.local_bytes());
            assert_eq!(stats.bad_blocks, 0, "{stats:?}");
            match round {
                0 => {
                    assert!(stats.uncached_chunks > 0, "{stats:?}");
                    // Nothing at all goes in any more.
                    cache.evict(0);
                    let rest = vec![1; CHUNK * CHUNKS];
                    let ballast = std::fs::File::create(at.join("ballast")).unwrap();
                    let mut filled = 0;
                    while let Ok(1..) = std::os::unix::fs::FileExt::write_at(&ballast, &rest[..4096], filled)
                    {
                        filled += 4096;
                    }
                }
                1 => assert_eq!(stats.bytes, 0, "{stats:?}"),
                _ => assert!(stats.bytes >= (CHUNK * CHUNKS / 4) as u64, "{stats:?}"),
            }
        }
    }
    drop(disk);
}

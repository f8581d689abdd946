//! What a pool serves: its map, its contents and the virtual device that they make. The daemon opens it, and so does
//! whoever reads a pool that is down.

use std::path::Path;
use std::sync::Arc;

use loam_block::layer::LayerSpec;
use loam_block::{BlockDevice, FileDevice, FileOptions};
use loam_content::{Cache, CacheOptions, HttpClient, HttpOptions};
use loam_space::{AddressSpace, Map, Unmapped, VirtualDevice};

use crate::content::Contents;
use crate::directory::PoolDirectory;
use crate::error::{Context, Result};

/// Map, cache and contents of a pool, open.
pub(crate) struct Served {
    pub(crate) map: Arc<Map>,
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) contents: Arc<Contents>,
    /// The formatted prefix, then the address space.
    pub(crate) device: Arc<dyn BlockDevice>,
}

impl Served {
    /// Opens them. The caller holds the pool's lock.
    pub(crate) fn open(directory: &PoolDirectory, cache_limit: u64, unmapped: Unmapped) -> Result<Self> {
        let map = Map::open(directory.map()).step(|| "opening the map".to_owned())?;
        let cache_options = CacheOptions { limit_bytes: cache_limit, ..CacheOptions::default() };
        let cache = Cache::open(directory.cache(), cache_options).step(|| "opening the cache".to_owned())?;
        Served::new(directory, Arc::new(map), cache, unmapped, &directory.virtual_image())
    }

    /// The same of a map and a cache that are open, with the prefix that lies in `prefix`.
    pub(crate) fn new(
        directory: &PoolDirectory,
        map: Arc<Map>,
        cache: Cache,
        unmapped: Unmapped,
        prefix: &Path,
    ) -> Result<Self> {
        let http = HttpClient::new(HttpOptions::default()).step(|| "setting up HTTP".to_owned())?;
        let contents = Arc::new(Contents::new(directory, cache, http));
        let space = Arc::new(AddressSpace::new(map.clone(), contents.clone(), unmapped));
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let prefix = FileDevice::open(prefix, options).step(|| format!("opening {}", prefix.display()))?;
        let device = Arc::new(VirtualDevice::new(Arc::new(prefix), space.clone()));
        Ok(Served { map, space, contents, device })
    }
}

/// The virtual device for clients that ask for any bytes: contents are kept in whole blocks, and a request that is not of
/// whole blocks is widened to them.
pub(crate) fn of_any_bytes(device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    let layer: LayerSpec = "blocksize,minimum=4096".parse().step(|| "a layer of its own".to_owned())?;
    layer.wrap(device).step(|| "aligning requests to blocks".to_owned())
}

//! What the contents of the map are: each is described by a small JSON text in the map, and turned into a cached device
//! when it is first read. A content's description never changes; neither do its bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use loam_block::{BlockDevice, ErrorKind, Io};
use loam_content::{Cache, ChunkSource, Digest, HttpClient, Pin, WholeSource};
use loam_image::{ImageSource, Index};
use loam_space::{ContentId, Map, Resolver};
use serde::{Deserialize, Serialize};

use crate::device::{is_nbd_uri, parse_nbd_uri};
use crate::directory::PoolDirectory;
use crate::error::{Context, Error, Result};
use crate::indexes;
use crate::nbd_source::NbdSource;
use crate::trace::Traced;

/// Bytes of a chunk of a file or URL that has no index.
const WHOLE_CHUNK_BYTES: u32 = 64 << 10;

/// Ranges begin at multiples of this, so that a chunk never belongs to two contents.
const RANGE_ALIGNMENT: u64 = 1 << 20;

/// What a content is, as the map keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum ContentSpec {
    /// The files of an image.
    Image {
        /// The digest of its index, kept in the pool.
        index: Digest,
        /// Where its data is.
        source: String,
    },
    /// The bytes of one file or URL.
    Bytes {
        /// Where they are.
        source: String,
        /// Which version they are.
        pin: Pin,
    },
}

impl ContentSpec {
    /// Reads what the map keeps.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| Error::step("a content of the map", error))
    }

    fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).step(|| "encoding a content".to_owned())
    }

    /// "image", "bytes".
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            ContentSpec::Image { .. } => "image",
            ContentSpec::Bytes { .. } => "bytes",
        }
    }

    /// Where it comes from.
    pub(crate) fn source(&self) -> &str {
        match self {
            ContentSpec::Image { source, .. } | ContentSpec::Bytes { source, .. } => source,
        }
    }

    /// The name of its part of the cache.
    pub(crate) fn cache_key(&self, id: ContentId) -> String {
        match self {
            ContentSpec::Image { .. } => format!("image-{id}"),
            ContentSpec::Bytes { .. } => format!("bytes-{id}"),
        }
    }
}

/// All contents of a pool, as devices.
pub(crate) struct Contents {
    directory: PoolDirectory,
    cache: Cache,
    http: HttpClient,
    devices: Mutex<HashMap<ContentId, Arc<Traced>>>,
}

impl Contents {
    pub(crate) fn new(directory: &PoolDirectory, cache: Cache, http: HttpClient) -> Self {
        Contents { directory: directory.clone(), cache, http, devices: Mutex::default() }
    }

    /// The connections that all contents share.
    pub(crate) fn http(&self) -> &HttpClient {
        &self.http
    }

    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The device of a content. The first time, what its index says will be read first begins to be fetched.
    pub(crate) async fn device(&self, id: ContentId, spec: &ContentSpec) -> Result<Arc<Traced>> {
        if let Some(device) = self.known().get(&id) {
            return Ok(device.clone());
        }
        match spec {
            ContentSpec::Image { index, .. } => {
                let (directory, digest) = (self.directory.clone(), *index);
                let index = tokio::task::spawn_blocking(move || indexes::load(&directory, &digest))
                    .await
                    .step(|| format!("index {digest}"))??;
                self.open_image(id, spec, &index).await
            }
            ContentSpec::Bytes { source, pin } if is_nbd_uri(source) => {
                let uri = parse_nbd_uri(source)?;
                let source = NbdSource::open(&uri, WHOLE_CHUNK_BYTES, Some(pin)).await?;
                self.insert(id, spec, Arc::new(source), Vec::new())
            }
            ContentSpec::Bytes { source, pin } => {
                let what = || format!("opening {source}");
                let url = indexes::parse_location(source)?;
                let bytes = loam_content::open(&self.http, &url, Some(pin)).await.step(what)?;
                let source = WholeSource::new(bytes, WHOLE_CHUNK_BYTES).step(what)?;
                self.insert(id, spec, Arc::new(source), Vec::new())
            }
        }
    }

    /// Which version of a file, URL or export there is now.
    pub(crate) async fn pin(&self, source: &str) -> Result<Pin> {
        if is_nbd_uri(source) {
            return Ok(NbdSource::open(&parse_nbd_uri(source)?, WHOLE_CHUNK_BYTES, None).await?.pin());
        }
        let url = indexes::parse_location(source)?;
        let bytes = loam_content::open(&self.http, &url, None).await.step(|| format!("opening {source}"))?;
        Ok(bytes.pin())
    }

    /// The device of a content if somebody has read it already.
    pub(crate) fn opened(&self, id: ContentId) -> Option<Arc<Traced>> {
        self.known().get(&id).cloned()
    }

    fn insert(
        &self,
        id: ContentId,
        spec: &ContentSpec,
        source: Arc<dyn ChunkSource>,
        trace: Vec<Range<u64>>,
    ) -> Result<Arc<Traced>> {
        let mut known = self.known();
        if let Some(device) = known.get(&id) {
            return Ok(device.clone());
        }
        let device = self
            .cache
            .device(&spec.cache_key(id), source)
            .step(|| format!("opening the cache of {}", spec.source()))?;
        if !trace.is_empty() {
            let (device, source) = (device.clone(), spec.source().to_owned());
            tokio::spawn(async move {
                if let Err(error) = device.replay(&trace).await {
                    tracing::warn!(source, "fetching ahead by the trace ended early: {error}");
                }
            });
        }
        let traced = Arc::new(Traced::new(device));
        known.insert(id, traced.clone());
        Ok(traced)
    }

    /// Opens an image whose index is at hand. Nothing is asked of a source on the network before its data is read: the
    /// index says how long it is, and what its bytes are.
    pub(crate) async fn open_image(
        &self,
        id: ContentId,
        spec: &ContentSpec,
        index: &Index,
    ) -> Result<Arc<Traced>> {
        let what = || format!("opening {}", spec.source());
        let source = indexes::parse_source(spec.source())?;
        let chunks = ImageSource::open(Arc::new(index.clone()), &source, &self.http).await.step(what)?;
        self.insert(id, spec, Arc::new(chunks), index.trace().to_vec())
    }

    /// Gives back the cached chunks of a content, pinned ones too; they are fetched again if they are read again. Its
    /// source need not be there any more.
    pub(crate) async fn drop_chunks(self: &Arc<Self>, id: ContentId, spec: &ContentSpec) -> Result<()> {
        let what = || format!("evicting {}", spec.source());
        let (contents, key) = (self.clone(), spec.cache_key(id));
        let evict = move || contents.cache.evict_content(&key);
        // What is not pinned needs no device.
        tokio::task::spawn_blocking(evict.clone()).await.step(what)?;
        if self.local_bytes(id, spec) == 0 {
            return Ok(());
        }
        let traced = self.device(id, spec).await?;
        let device = traced.device();
        let whole = 0..device.source().length();
        device.unpin(&[whole]).await.step(what)?;
        tokio::task::spawn_blocking(evict).await.step(what)?;
        Ok(())
    }

    /// Bytes of a content that are in the cache.
    pub(crate) fn local_bytes(&self, id: ContentId, spec: &ContentSpec) -> u64 {
        let key = spec.cache_key(id);
        let contents = self.cache.contents();
        let found = contents.binary_search_by(|(known, _)| known.as_str().cmp(&key));
        found.map_or(0, |place| contents[place].1)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<ContentId, Arc<Traced>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolver for Contents {
    fn resolve<'a>(&'a self, content: ContentId, spec: &'a [u8]) -> Io<'a, Arc<dyn BlockDevice>> {
        Io::pending(async move {
            let resolved = async { self.device(content, &ContentSpec::decode(spec)?).await };
            match resolved.await {
                Ok(device) => Ok(device as Arc<dyn BlockDevice>),
                Err(error) => Err(loam_block::Error::new(ErrorKind::Unavailable, error.chain())),
            }
        })
    }
}

/// The range of a content, which is given one now if it is not in the map yet. Contents are told apart by their whole
/// description: the same index from the same source is the same content.
pub(crate) fn place(map: &Map, spec: &ContentSpec, length: u64) -> Result<(ContentId, loam_space::Range)> {
    let encoded = spec.encode()?;
    if let Some(range) = find(map, &encoded) {
        return Ok((range.content, range));
    }
    let what = || format!("giving {} a range of {length} bytes", spec.source());
    let id = map.add_content(&encoded).step(what)?;
    let range = map.allocate(id, length, RANGE_ALIGNMENT).step(what)?;
    Ok((id, range))
}

fn find(map: &Map, encoded: &[u8]) -> Option<loam_space::Range> {
    let (id, _) = map.contents().into_iter().find(|(_, known)| known == encoded)?;
    map.ranges().find(|range| range.content == id)
}

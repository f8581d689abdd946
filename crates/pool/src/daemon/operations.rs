//! What a pool that is up can be asked to do, one method for each request of the control socket.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_space::ContentId;

use super::{Pool, lock_of};
use crate::accounts::Accounts;
use crate::catalog::{ContainerRecord, ImageRecord, Kind};
use crate::config::Purpose;
use crate::content::{ContentSpec, place};
use crate::error::{Context, Error, Result};
use crate::indexes::{self, Watch};
use crate::protocol::{
    AddRangeRequest, AddRequest, Added, CacheStatus, Checked, ContainerStatus, CreateRequest, DaemonStatus,
    Evicted, Listing, PinRequest, Pinned, RangeStatus, Ranges, Shown, Status, Trace, VirtualStatus,
};
use crate::quota;
use crate::{check, containers, images, pins};

/// Quota groups of deleted subvolumes are looked for at most this often.
const TIDY_INTERVAL: Duration = Duration::from_secs(60);

impl Pool {
    /// Everything that `loam status` shows.
    pub(crate) fn status(&self) -> Result<Status> {
        let cache = self.contents.cache().stats();
        let map = self.map.stats();
        let (served, queues, data_path) = {
            let attachment = lock_of(&self.attachment);
            (attachment.stats(), attachment.queues(), attachment.data_path())
        };
        let Listing { images, containers } = if self.catalog.get().is_some() {
            self.list()?
        } else {
            Listing { images: vec![], containers: vec![] }
        };
        let quota = match quota::mode(self.mount())? {
            Some(quota::Mode::Simple) => "simple",
            Some(quota::Mode::Full) => "full",
            None => "off",
        };
        let requests = BTreeMap::from([
            ("local".to_owned(), served.hits),
            ("waited".to_owned(), served.misses),
            ("failed".to_owned(), served.errors),
            ("waiting".to_owned(), served.waiting),
        ]);
        Ok(Status {
            pool: self.directory.root().to_owned(),
            state: "up".to_owned(),
            transport: Some(self.state.transport.transport().to_string()),
            queues: Some(queues),
            data_path: Some(data_path),
            device: Some(self.state.device.clone()),
            mount: Some(self.state.mount.clone()),
            daemon: Some(DaemonStatus {
                pid: std::process::id(),
                uptime_ns: self.started.elapsed().as_nanos() as u64,
                restarts: self.state.restarts,
            }),
            r#virtual: VirtualStatus {
                size: self.map.size(),
                ranges: map.ranges,
                mapped_bytes: map.mapped_bytes,
            },
            cache: CacheStatus {
                bytes: cache.bytes,
                limit: cache.limit,
                hits: cache.hits,
                misses: cache.misses,
                fetched_bytes: cache.fetched_bytes,
                bad_blocks: cache.bad_blocks,
            },
            quota: Some(quota.to_owned()),
            images,
            containers,
            errors: self.error_counters(),
            requests,
        })
    }

    /// Images and containers.
    pub(crate) fn list(&self) -> Result<Listing> {
        let mut shown = Vec::new();
        let accounts = Accounts::open(self.mount())?;
        for name in self.catalog()?.names(Kind::Image)? {
            match images::status(self, &name, accounts.as_ref()) {
                Ok(image) => shown.push(image),
                Err(error) if self.catalog()?.taken(&name).is_some() => return Err(error),
                // Removed meanwhile.
                Err(_) => {}
            }
        }
        Ok(Listing { images: shown, containers: containers::list(self.catalog()?, accounts.as_ref())? })
    }

    /// Adds an image.
    pub(crate) async fn add_image(
        self: &Arc<Self>,
        request: &AddRequest,
        watch: Arc<dyn Watch>,
    ) -> Result<Added> {
        let _reserved = self.reserve(&request.name)?;
        images::add(self, request, watch).await
    }

    /// Makes a container.
    pub(crate) fn create_container(&self, request: &CreateRequest) -> Result<ContainerStatus> {
        let _reserved = self.reserve(&request.name)?;
        let _alone = lock_of(&self.changing);
        containers::create(self.catalog()?, request)
    }

    /// Everything about one name.
    pub(crate) fn show(&self, name: &str) -> Result<Shown> {
        let catalog = self.catalog()?;
        self.commit();
        let accounts = Accounts::open(self.mount())?;
        let accounts = accounts.as_ref();
        let (kind, image_name, written, account) = match catalog.taken(name) {
            Some(Kind::Image) => (Kind::Image, name.to_owned(), None, None),
            Some(Kind::Container) => {
                let (container, account) = containers::status(catalog, name, accounts)?;
                (Kind::Container, container.image, Some(container.written_bytes), account)
            }
            None => return Err(Error::NotFound { kind: "image or container", name: name.to_owned() }),
        };
        let image: ImageRecord = catalog.read(Kind::Image, &image_name)?;
        let path = catalog.subvolume(kind, name);
        let at_limit =
            accounts.zip(account).and_then(|(accounts, account)| accounts.at_limit(&account, &path));
        let metadata_bytes = images::status(self, &image_name, accounts)?.metadata_bytes;
        Ok(Shown {
            kind: kind.name().to_owned(),
            name: name.to_owned(),
            path,
            image: (kind == Kind::Container).then_some(image_name),
            files: image.files,
            bytes: image.bytes,
            local_bytes: self.local_bytes(image.content)? + written.unwrap_or(0),
            written_bytes: written,
            limit_bytes: account.and_then(|account| account.limit_bytes),
            free_bytes: account.and_then(|account| account.free_bytes),
            quota_group: account.map(|account| account.group.to_string()),
            at_limit,
            metadata_bytes,
            lazy: image.lazy,
            index: image.index,
            address: image.address,
            length: image.length,
            source: image.source,
        })
    }

    /// Has what was written counted. Of one name the numbers are to be exact; where nothing can be committed they are those
    /// of the last time that it could.
    fn commit(&self) {
        let committed = File::open(self.mount()).map(loam_sys::btrfs::sync);
        if !matches!(committed, Ok(Ok(()))) {
            tracing::warn!("committing {}: {committed:?}", self.mount().display());
        }
    }

    /// Removes the groups that deleted subvolumes have left, now and then: the kernel cleans up behind a deletion in its own
    /// time, so those of this removal are for the next.
    pub(super) fn tidy_groups(&self) {
        let mut last = lock_of(&self.tidied);
        if last.is_some_and(|last| last.elapsed() < TIDY_INTERVAL) {
            return;
        }
        *last = Some(Instant::now());
        match quota::remove_stale_later(self.mount()) {
            Ok(0) => {}
            Ok(count) => tracing::info!("{count} quota groups of deleted subvolumes removed"),
            Err(error) => tracing::warn!("removing quota groups of deleted subvolumes: {error}"),
        }
    }

    /// Removes an image or container. An image's range stays in the map, because its data may have been cloned to
    /// elsewhere in the pool; its cached chunks go.
    pub(crate) async fn remove(self: &Arc<Self>, name: String) -> Result<()> {
        let pool = self.clone();
        let content = tokio::task::spawn_blocking(move || {
            let _alone = lock_of(&pool.changing);
            pool.tidy_groups();
            match pool.catalog()?.taken(&name) {
                Some(Kind::Image) => images::remove(pool.catalog()?, &name),
                Some(Kind::Container) => pool.catalog()?.remove(Kind::Container, &name).map(|()| None),
                None => Err(Error::NotFound { kind: "image or container", name }),
            }
        })
        .await
        .step(|| "removing".to_owned())??;
        if let Some(id) = content.map(ContentId) {
            // The name is gone; what is left in the cache is only a matter of room.
            let dropped = match self.spec(id) {
                Ok(spec) => self.contents.drop_chunks(id, &spec).await,
                Err(error) => Err(error),
            };
            if let Err(error) = dropped {
                tracing::warn!("giving back the cache of a removed image: {}", error.chain());
            }
        }
        Ok(())
    }

    /// The image behind a name, which may be a container's.
    pub(crate) fn image_of(&self, name: &str) -> Result<(String, ImageRecord)> {
        let catalog = self.catalog()?;
        let image = match catalog.taken(name) {
            Some(Kind::Container) => catalog.read::<ContainerRecord>(Kind::Container, name)?.image,
            Some(Kind::Image) => name.to_owned(),
            None => return Err(Error::NotFound { kind: "image or container", name: name.to_owned() }),
        };
        let record = catalog.read(Kind::Image, &image)?;
        Ok((image, record))
    }

    /// What a content of the map is.
    pub(crate) fn spec(&self, id: ContentId) -> Result<ContentSpec> {
        let bytes =
            self.map.spec(id).ok_or_else(|| Error::step(format!("content {id}"), "not in the map"))?;
        ContentSpec::decode(&bytes)
    }

    /// Bytes of an image's content that are in the cache.
    pub(crate) fn local_bytes(&self, content: Option<u32>) -> Result<u64> {
        let Some(id) = content.map(ContentId) else { return Ok(0) };
        Ok(self.contents.local_bytes(id, &self.spec(id)?))
    }

    /// Fetches all of an image, or some paths of it, and keeps it.
    pub(crate) async fn pin(self: &Arc<Self>, request: &PinRequest, watch: Arc<dyn Watch>) -> Result<Pinned> {
        let (image, record) = self.image_of(&request.name)?;
        let Some(id) = record.content.map(ContentId) else {
            return Ok(Pinned { name: image, pinned_bytes: 0, fetched_bytes: 0 });
        };
        let digest = record.index.parse().step(|| format!("the record of image {image}"))?;
        let index = indexes::load(&self.directory, &digest)?;
        let (ranges, pinned_bytes) = pins::ranges_of(&index, &request.paths)?;
        let traced = self.contents.device(id, &self.spec(id)?).await?;
        let device = traced.device();
        let before = self.contents.cache().stats().fetched_bytes;
        let told = move |progress: loam_content::Progress| {
            watch.progress("fetching", progress.done_bytes, progress.total_bytes, "bytes");
        };
        device.pin(&ranges, &told).await.step(|| format!("pinning {}", request.name))?;
        let fetched_bytes = self.contents.cache().stats().fetched_bytes - before;
        Ok(Pinned { name: request.name.clone(), pinned_bytes, fetched_bytes })
    }

    /// What was read first of an image since the daemon started, as text; of a single mounted image without a name.
    pub(crate) fn trace(&self, name: &str) -> Result<Trace> {
        let content = match self.config.purpose {
            Purpose::Mount => self.map.contents().first().map(|(id, _)| *id),
            Purpose::Pool => self.image_of(name)?.1.content.map(ContentId),
        };
        let Some((id, traced)) = content.and_then(|id| Some((id, self.contents.opened(id)?))) else {
            return Ok(Trace { trace: String::new(), runs: 0 });
        };
        let ContentSpec::Image { index, .. } = self.spec(id)? else {
            return Ok(Trace { trace: String::new(), runs: 0 });
        };
        let runs = traced.runs();
        let index = indexes::load(&self.directory, &index)?;
        let trace = loam_image::trace::to_text(&index, &runs).step(|| format!("the trace of {name}"))?;
        Ok(Trace { trace, runs: runs.len() as u64 })
    }

    /// Evicts until at most `keep_bytes` are left.
    pub(crate) async fn evict(self: &Arc<Self>, keep_bytes: u64) -> Result<Evicted> {
        let pool = self.clone();
        let evicted = tokio::task::spawn_blocking(move || pool.contents.cache().evict(keep_bytes));
        let evicted_bytes = evicted.await.step(|| "evicting".to_owned())?;
        Ok(Evicted { evicted_bytes, bytes: self.contents.cache().stats().bytes })
    }

    /// Gives a file or URL a range.
    pub(crate) async fn add_range(&self, request: &AddRangeRequest) -> Result<RangeStatus> {
        let pin = self.contents.pin(&request.source).await?;
        let length = pin.length.next_multiple_of(loam_space::BLOCK);
        let spec = ContentSpec::Bytes { source: request.source.clone(), pin };
        let (_, range) = place(&self.map, &spec, length)?;
        Ok(RangeStatus {
            address: range.start.0,
            length: range.length,
            source: request.source.clone(),
            kind: spec.kind().to_owned(),
        })
    }

    /// All ranges.
    pub(crate) fn ranges(&self) -> Result<Ranges> {
        let mut ranges = Vec::new();
        for range in self.map.ranges() {
            let spec = self.spec(range.content)?;
            ranges.push(RangeStatus {
                address: range.start.0,
                length: range.length,
                source: spec.source().to_owned(),
                kind: spec.kind().to_owned(),
            });
        }
        Ok(Ranges { ranges })
    }

    /// Checks what can be checked while the pool is up.
    pub(crate) async fn check(self: &Arc<Self>, read_data: bool) -> Result<Checked> {
        let pool = self.clone();
        let mut checked = tokio::task::spawn_blocking(move || check::clones(&pool))
            .await
            .step(|| "checking".to_owned())??;
        check::contents(&self.contents, &self.map, read_data, &mut checked).await?;
        let pool = self.clone();
        let quotas = tokio::task::spawn_blocking(move || {
            pool.commit();
            let paths = [pool.directory.virtual_image(), pool.local_device()];
            check::quotas(&paths, &mut checked);
            checked
        });
        let checked = quotas.await.step(|| "checking quotas".to_owned())?;
        Ok(checked)
    }
}

//! `/metrics`: the numbers of the status in the OpenMetrics text format, for Prometheus.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::protocol::Status;

/// The status as OpenMetrics text. A registry is made for each scrape: the counters live where they are counted.
pub(super) fn text(status: &Status) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("loam");
    let cache = &status.cache;
    gauge(&mut registry, "cache_bytes", "Bytes in the chunk cache", cache.bytes);
    gauge(&mut registry, "cache_limit_bytes", "Most bytes that the chunk cache may hold", cache.limit);
    counter(&mut registry, "cache_hits", "Reads answered from the cache", cache.hits);
    counter(&mut registry, "cache_misses", "Reads that had to fetch", cache.misses);
    counter(&mut registry, "fetched_bytes", "Bytes received from sources", cache.fetched_bytes);
    counter(&mut registry, "bad_blocks", "Blocks whose checksum was wrong", cache.bad_blocks);
    gauge(
        &mut registry,
        "virtual_mapped_bytes",
        "Bytes of the address space with content",
        status.r#virtual.mapped_bytes,
    );
    gauge(&mut registry, "virtual_ranges", "Ranges handed out", status.r#virtual.ranges);
    gauge(&mut registry, "images", "Images", status.images.len() as u64);
    gauge(&mut registry, "containers", "Containers", status.containers.len() as u64);
    if let Some(daemon) = &status.daemon {
        counter(
            &mut registry,
            "daemon_restarts",
            "Times the daemon took over from one that died",
            daemon.restarts,
        );
        gauge(
            &mut registry,
            "daemon_uptime_seconds",
            "Seconds since the daemon started",
            daemon.uptime_ns / 1_000_000_000,
        );
    }
    if let (Some(transport), Some(data_path)) = (&status.transport, &status.data_path) {
        let labels = [("transport", transport), ("data_path", data_path)];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.clone())).to_vec();
        registry.register("transport", "How the kernel gets the blocks", Info::new(labels));
    }
    if let Some(queues) = status.queues {
        gauge(&mut registry, "transport_queues", "Threads that serve the kernel", u64::from(queues));
    }
    labelled(&mut registry, "errors", "What went wrong, by kind", "kind", &status.errors);
    labelled(&mut registry, "requests", "Requests of the kernel, by outcome", "outcome", &status.requests);
    let written = status.containers.iter().map(|c| (c.name.clone(), c.written_bytes)).collect();
    labelled_gauge(
        &mut registry,
        "container_written_bytes",
        "Bytes written by a container",
        "container",
        &written,
    );
    let limits = status.containers.iter().filter_map(|c| Some((c.name.clone(), c.limit_bytes?))).collect();
    labelled_gauge(
        &mut registry,
        "container_limit_bytes",
        "Most bytes that a container may write",
        "container",
        &limits,
    );
    let metadata = status.images.iter().filter_map(|i| Some((i.name.clone(), i.metadata_bytes?))).collect();
    labelled_gauge(
        &mut registry,
        "image_metadata_bytes",
        "Bytes of an image's tree blocks on the local device",
        "image",
        &metadata,
    );
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

type Labels = Vec<(String, String)>;
type Values = std::collections::BTreeMap<String, u64>;

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64, AtomicU64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

fn labelled(registry: &mut Registry, name: &str, help: &str, label: &str, values: &Values) {
    let family = Family::<Labels, Counter>::default();
    for (key, value) in values {
        family.get_or_create(&vec![(label.to_owned(), key.clone())]).inc_by(*value);
    }
    registry.register(name, help, family);
}

fn labelled_gauge(registry: &mut Registry, name: &str, help: &str, label: &str, values: &Values) {
    let family = Family::<Labels, Gauge>::default();
    for (key, value) in values {
        let value = i64::try_from(*value).unwrap_or(i64::MAX);
        family.get_or_create(&vec![(label.to_owned(), key.clone())]).set(value);
    }
    registry.register(name, help, family);
}

//! What goes over the control socket: the JSON of requests and answers, which is also what `--json` prints.
//! Bytes and nanoseconds are integers; lists stand under a plural name; fields are added, never renamed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `GET /status`, `loam status --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// The pool's directory.
    pub pool: PathBuf,
    /// "up", "down", or "waiting": it is mounted, and who reads it waits for a daemon, which `loam up` starts.
    pub state: String,
    /// "ublk" or "loop"; absent when down, as device and mount are.
    pub transport: Option<String>,
    /// Threads that serve the kernel; absent when down.
    pub queues: Option<u16>,
    /// How bytes reach the kernel: "fuse", "fuse-io-uring", or ublk's "copy", "user-copy", "zero-copy".
    pub data_path: Option<String>,
    /// The virtual block device.
    pub device: Option<PathBuf>,
    /// The mount point.
    pub mount: Option<PathBuf>,
    /// The daemon.
    pub daemon: Option<DaemonStatus>,
    /// The address space.
    pub r#virtual: VirtualStatus,
    /// The chunk cache.
    pub cache: CacheStatus,
    /// How the filesystem counts what is written: "simple", "full", or "off"; absent when down.
    #[serde(default)]
    pub quota: Option<String>,
    /// Images, by name.
    pub images: Vec<ImageStatus>,
    /// Containers, by name.
    pub containers: Vec<ContainerStatus>,
    /// Counters of what went wrong since the daemon started; all zero when all is well.
    pub errors: BTreeMap<String, u64>,
    /// Reads that the kernel has sent, by outcome.
    pub requests: BTreeMap<String, u64>,
}

/// The daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process.
    pub pid: u32,
    /// Since it started.
    pub uptime_ns: u64,
    /// How often it took over from one that died, since the pool came up.
    pub restarts: u64,
}

/// The address space.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VirtualStatus {
    /// Bytes of the virtual region.
    pub size: u64,
    /// Ranges handed out.
    pub ranges: u64,
    /// Bytes that they cover.
    pub mapped_bytes: u64,
}

/// The chunk cache.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Bytes held.
    pub bytes: u64,
    /// Most bytes that it may hold.
    pub limit: u64,
    /// Reads answered from it.
    pub hits: u64,
    /// Reads that had to fetch.
    pub misses: u64,
    /// Bytes received from sources.
    pub fetched_bytes: u64,
    /// Blocks whose checksum was wrong.
    pub bad_blocks: u64,
}

/// An image in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Its name.
    pub name: String,
    /// Where its content comes from.
    pub source: String,
    /// Its subvolume.
    pub path: PathBuf,
    /// Entries of all kinds.
    pub files: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes of it that are in the cache.
    pub local_bytes: u64,
    /// Bytes of tree blocks on the local device that its names, attributes and extent lists take; absent where quotas are
    /// off.
    #[serde(default)]
    pub metadata_bytes: Option<u64>,
    /// `true`, or why its data cannot be fetched bit by bit.
    pub lazy: Lazy,
}

/// A container in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// The image that it was made from.
    pub image: String,
    /// Its subvolume.
    pub path: PathBuf,
    /// Bytes on the local device that it is charged for: data and metadata that it, and subvolumes made in it, wrote. Where
    /// quotas are off, or were when it was made: bytes of file data that were written to it.
    pub written_bytes: u64,
    /// Most bytes that it may be charged; absent where there is no limit.
    pub limit_bytes: Option<u64>,
}

/// `loam show NAME --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shown {
    /// "image" or "container".
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Where its content comes from (of a container: its image's source).
    pub source: String,
    /// Of a container: its image.
    pub image: Option<String>,
    /// Its subvolume.
    pub path: PathBuf,
    /// Entries of all kinds in the image.
    pub files: u64,
    /// Bytes of all the image's files.
    pub bytes: u64,
    /// Bytes that are local: an image's cached bytes; a container's cached and written bytes.
    pub local_bytes: u64,
    /// Of a container: bytes written to it.
    pub written_bytes: Option<u64>,
    /// Of a container: most bytes that it may be charged.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    /// Of a container with quotas: bytes that may still be charged to it, under its own limit and those of the groups that
    /// it is in.
    #[serde(default)]
    pub free_bytes: Option<u64>,
    /// Of a container: its quota group.
    #[serde(default)]
    pub quota_group: Option<String>,
    /// Of a container that is at a limit: which one, what that means, and what to do.
    #[serde(default)]
    pub at_limit: Option<String>,
    /// Bytes of the image's tree blocks on the local device; absent where quotas are off.
    #[serde(default)]
    pub metadata_bytes: Option<u64>,
    /// `true`, or why not.
    pub lazy: Lazy,
    /// The BLAKE3 digest of its index.
    pub index: String,
    /// First address of its range.
    pub address: u64,
    /// Bytes of its range.
    pub length: u64,
}

/// Whether data is fetched on first read: `true`, or the reason why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Lazy {
    /// Always `true`.
    Yes(bool),
    /// Why not.
    No(String),
}

/// `POST /images`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddRequest {
    /// The image's name.
    pub name: String,
    /// Its source, with an absolute path where it is local.
    pub source: String,
    /// Where its index is, if not beside the source.
    pub index: Option<String>,
    /// A trace, as text, in place of the index's own: what to fetch ahead.
    #[serde(default)]
    pub prefetch: Option<String>,
}

/// A line of the answer to a long request: any number of `progress`, then one `done` or `failed`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobLine<T> {
    /// How far it is.
    Progress(Progress),
    /// Something the user should know.
    Note(String),
    /// The result.
    Done(T),
    /// Why it failed.
    Failed(Failure),
}

/// How far a long request is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done: "reading", "creating files", "fetching".
    pub step: String,
    /// Units done.
    pub done: u64,
    /// Units in all; 0 where that is not known.
    pub total: u64,
    /// "bytes" or "files".
    pub unit: String,
}

/// An error as the daemon tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What and why.
    pub error: String,
    /// What to do.
    pub hint: Option<String>,
}

/// What adding an image came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Added {
    /// The image's name.
    pub name: String,
    /// Where it comes from.
    pub source: String,
    /// Its subvolume.
    pub path: PathBuf,
    /// Entries of all kinds.
    pub files: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes that came over the wire or from the source to add it.
    pub wire_bytes: u64,
    /// `true`, or why not.
    pub lazy: Lazy,
    /// Fetching or making the index.
    pub index_ns: u64,
    /// Creating the files.
    pub create_ns: u64,
    /// All of it.
    pub elapsed_ns: u64,
}

/// `POST /containers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The container's name.
    pub name: String,
    /// The image to start from.
    pub image: String,
    /// The process that owns it: it is removed when that is gone and the pool comes up again.
    pub ephemeral_owner: Option<u32>,
    /// Most bytes that it, and the subvolumes that are made in it, may be charged.
    #[serde(default)]
    pub quota_bytes: Option<u64>,
}

/// `POST /pin`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PinRequest {
    /// An image or a container.
    pub name: String,
    /// Paths in it; all of it when empty.
    pub paths: Vec<String>,
}

/// What pinning came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pinned {
    /// The image.
    pub name: String,
    /// Bytes that are local now and stay so.
    pub pinned_bytes: u64,
    /// Bytes that were fetched for it.
    pub fetched_bytes: u64,
}

/// `GET /trace/NAME`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trace {
    /// What was read first, in order, in the text form that `loam index --trace` takes.
    pub trace: String,
    /// How many runs that is.
    pub runs: u64,
}

/// `POST /evict`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EvictRequest {
    /// Bytes that may stay.
    pub keep_bytes: u64,
}

/// What evicting came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Evicted {
    /// Bytes given back.
    pub evicted_bytes: u64,
    /// Bytes still held.
    pub bytes: u64,
}

/// `POST /ranges`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddRangeRequest {
    /// A `file:` or `http(s):` source.
    pub source: String,
}

/// A range of the address space.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RangeStatus {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Where its content comes from.
    pub source: String,
    /// "image" or "bytes".
    pub kind: String,
}

/// `GET /ranges`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ranges {
    /// By address.
    pub ranges: Vec<RangeStatus>,
}

/// `GET /list`, `loam ls --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listing {
    /// Images, by name.
    pub images: Vec<ImageStatus>,
    /// Containers, by name.
    pub containers: Vec<ContainerStatus>,
}

/// One thing that `check` found wrong.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finding {
    /// "seed", "map", "cache", "clones", "quota".
    pub part: String,
    /// What is wrong, where.
    pub what: String,
}

/// `loam check --json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Checked {
    /// What was checked, with counts.
    pub checked: BTreeMap<String, u64>,
    /// What was not, and why.
    pub skipped: BTreeMap<String, String>,
    /// Empty when all is well.
    pub findings: Vec<Finding>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn keys(value: &Value) -> Vec<&str> {
        let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    fn image() -> ImageStatus {
        ImageStatus {
            name: "debian".into(),
            source: "tar:http://host/root.tar".into(),
            path: "/p/mnt/images/debian".into(),
            files: 3,
            bytes: 10,
            local_bytes: 4096,
            metadata_bytes: Some(16384),
            lazy: Lazy::Yes(true),
        }
    }

    fn container() -> ContainerStatus {
        ContainerStatus {
            name: "web".into(),
            image: "debian".into(),
            path: "/p/mnt/containers/web".into(),
            written_bytes: 1,
            limit_bytes: None,
        }
    }

    /// The names are a promise to scripts: additions are fine, renames are not.
    #[test]
    fn the_status_has_the_promised_names() {
        let status = Status {
            pool: "/p".into(),
            state: "up".into(),
            transport: Some("loop".into()),
            queues: Some(2),
            data_path: Some("fuse".into()),
            device: Some("/dev/loop1".into()),
            mount: Some("/p/mnt".into()),
            daemon: Some(DaemonStatus { pid: 7, uptime_ns: 8, restarts: 0 }),
            r#virtual: VirtualStatus { size: 4 << 60, ranges: 1, mapped_bytes: 4096 },
            cache: CacheStatus::default(),
            quota: Some("simple".into()),
            images: vec![image()],
            containers: vec![container()],
            errors: BTreeMap::from([("changed".to_owned(), 0)]),
            requests: BTreeMap::new(),
        };
        let value = serde_json::to_value(&status).unwrap();
        for name in [
            "pool",
            "transport",
            "device",
            "mount",
            "daemon",
            "virtual",
            "cache",
            "images",
            "containers",
            "errors",
        ] {
            assert!(value.get(name).is_some(), "{name}");
        }
        assert_eq!(value["daemon"]["pid"], 7);
        assert_eq!(value["daemon"]["uptime_ns"], 8);
        assert_eq!(value["virtual"], json!({ "size": 4u64 << 60, "ranges": 1, "mapped_bytes": 4096 }));
        assert_eq!(
            keys(&value["cache"]),
            ["bad_blocks", "bytes", "fetched_bytes", "hits", "limit", "misses"]
        );
        let container = json!({
            "name": "web", "image": "debian", "path": "/p/mnt/containers/web", "written_bytes": 1, "limit_bytes": null,
        });
        assert_eq!(value["containers"], json!([container]));
        assert_eq!(value["images"][0]["lazy"], true);
    }

    #[test]
    fn what_is_shown_of_one_name_has_the_promised_names() {
        let shown = Shown {
            kind: "image".into(),
            name: "debian".into(),
            source: "dir:/srv".into(),
            image: None,
            path: "/p/mnt/images/debian".into(),
            files: 1,
            bytes: 2,
            local_bytes: 3,
            written_bytes: None,
            limit_bytes: None,
            free_bytes: None,
            quota_group: None,
            at_limit: None,
            metadata_bytes: None,
            lazy: Lazy::No("a compressed archive".into()),
            index: "00".into(),
            address: 0,
            length: 4096,
        };
        let value = serde_json::to_value(&shown).unwrap();
        for name in ["kind", "source", "path", "files", "bytes", "local_bytes", "lazy"] {
            assert!(value.get(name).is_some(), "{name}");
        }
        assert_eq!(value["lazy"], "a compressed archive");
    }

    #[test]
    fn lines_of_long_work_go_there_and_back() {
        let lines = [
            JobLine::Progress(Progress { step: "reading".into(), done: 1, total: 0, unit: "bytes".into() }),
            JobLine::Note("so it is".into()),
            JobLine::Done(image()),
            JobLine::Failed(Failure { error: "no".into(), hint: None }),
        ];
        for (line, tag) in lines.iter().zip(["progress", "note", "done", "failed"]) {
            let text = serde_json::to_string(line).unwrap();
            assert!(text.starts_with(&format!("{{\"{tag}\":")), "{text}");
            let back: JobLine<ImageStatus> = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&back).unwrap(), text);
        }
    }
}

//! Images and containers: `index`, `add`, `create`, `run`, `ls`, `show`, `rm`, `pin`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;

use loam_pool::protocol::{
    AddRequest, Added, ContainerStatus, CreateRequest, ImageStatus, Lazy, Listing, PinRequest, Pinned, Shown,
    Trace,
};
use loam_pool::{Client, IndexOptions, RunOptions};

use super::Context;
use crate::arguments::{Index, Run};
use crate::output::{self, seconds, size};
use crate::progress::Bar;

pub(crate) async fn index(context: &Context, arguments: Index) -> anyhow::Result<()> {
    let bar = Bar::new(context.json);
    let options = IndexOptions {
        output: arguments.output,
        trace: arguments.trace,
        chunk_bytes: u32::try_from(arguments.chunk_size.0).unwrap_or(u32::MAX),
    };
    let made = loam_pool::make_index(&arguments.source, &options, bar.clone()).await;
    bar.finish();
    output::print(context.json, &made?, |made| {
        format!(
            "{}: {} entries, {} of {} ({:.2} %) in {}",
            made.index.display(),
            made.files,
            size(made.index_bytes),
            size(made.source_bytes),
            100.0 * made.index_bytes as f64 / made.source_bytes.max(1) as f64,
            seconds(made.elapsed_ns)
        )
    })
}

pub(crate) async fn trace(context: &Context, name: &str, output: Option<PathBuf>) -> anyhow::Result<()> {
    let mounted = if Path::new(name).is_dir() {
        loam_pool::directory_of_mount(&context.directory, Path::new(name))?
    } else {
        None
    };
    let found: Trace = match mounted {
        Some(directory) => Client::new(&directory).get("/trace/image").await?,
        None => context.client.get(&format!("/trace/{}", url_safe(name)?)).await?,
    };
    match output {
        Some(path) => {
            std::fs::write(&path, &found.trace).with_context(|| format!("writing {}", path.display()))
        }
        None => output::print(context.json, &found, |found| found.trace.clone()),
    }
}

pub(crate) async fn add(
    context: &Context,
    name: String,
    source: String,
    index: Option<String>,
    prefetch: Option<PathBuf>,
) -> anyhow::Result<()> {
    let read =
        |path: PathBuf| std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()));
    let prefetch = prefetch.map(read).transpose()?;
    loam_pool::check_name(&name)?;
    let source = loam_pool::absolute_source(&source)?;
    let index = index.map(|index| loam_pool::absolute_location(&index)).transpose()?;
    let bar = Bar::new(context.json);
    let added: loam_pool::Result<Added> =
        context.client.job("/images", &AddRequest { name, source, index, prefetch }, bar.as_ref()).await;
    bar.finish();
    output::print(context.json, &added?, |added| {
        format!(
            "{}: {} entries, {}, at {} in {} ({} from the source{})",
            added.name,
            added.files,
            size(added.bytes),
            added.path.display(),
            seconds(added.elapsed_ns),
            size(added.wire_bytes),
            match &added.lazy {
                Lazy::Yes(_) => String::new(),
                Lazy::No(why) => format!("; not lazy: {why}"),
            }
        )
    })
}

pub(crate) async fn create(
    context: &Context,
    name: String,
    image: String,
    quota_bytes: Option<u64>,
) -> anyhow::Result<()> {
    loam_pool::check_name(&name)?;
    let request = CreateRequest { name, image, ephemeral_owner: None, quota_bytes };
    let made: ContainerStatus = context.client.post("/containers", &request).await?;
    output::print(context.json, &made, |made| made.path.display().to_string())
}

pub(crate) async fn run(context: &Context, options: Run) -> anyhow::Result<ExitCode> {
    let pid = std::process::id();
    let name = options.name.unwrap_or_else(|| format!("{}-{pid}", options.image));
    loam_pool::check_name(&name)?;
    let request = CreateRequest {
        name: name.clone(),
        image: options.image,
        ephemeral_owner: (!options.keep).then_some(pid),
        quota_bytes: options.quota,
    };
    let container: ContainerStatus = context.client.post("/containers", &request).await?;
    let run = RunOptions {
        name: name.clone(),
        root: container.path,
        command: options.command,
        terminal: std::io::stdin().is_terminal() && std::io::stdout().is_terminal(),
    };
    let ended = loam_pool::run_container(&context.directory, &run).await;
    if !options.keep {
        context.client.delete(&format!("/names/{name}")).await?;
    }
    Ok(ExitCode::from(u8::try_from(ended?).unwrap_or(1)))
}

pub(crate) async fn list(context: &Context) -> anyhow::Result<()> {
    let listing: Listing = context.client.get("/list").await?;
    output::print(context.json, &listing, |listing| {
        let mut text = String::new();
        if !listing.images.is_empty() {
            let row = |image: &ImageStatus| {
                let metadata = image.metadata_bytes.map_or_else(|| "-".to_owned(), size);
                let numbers = [image.files.to_string(), size(image.bytes), size(image.local_bytes), metadata];
                [vec![image.name.clone()], numbers.to_vec(), vec![image.source.clone()]].concat()
            };
            let rows: Vec<_> = listing.images.iter().map(row).collect();
            text.push_str(&output::table(&["IMAGE", "FILES", "SIZE", "LOCAL", "METADATA", "SOURCE"], &rows));
        }
        if !listing.containers.is_empty() {
            let row = |container: &ContainerStatus| {
                let written = size(container.written_bytes);
                let limit = container.limit_bytes.map_or_else(|| "-".to_owned(), size);
                vec![
                    container.name.clone(),
                    container.image.clone(),
                    written,
                    limit,
                    container.path.display().to_string(),
                ]
            };
            let rows: Vec<_> = listing.containers.iter().map(row).collect();
            text.push_str(&output::table(&["CONTAINER", "IMAGE", "WRITTEN", "LIMIT", "PATH"], &rows));
        }
        text
    })
}

pub(crate) async fn show(context: &Context, name: &str) -> anyhow::Result<()> {
    let shown: Shown = context.client.get(&format!("/names/{}", url_safe(name)?)).await?;
    output::print(context.json, &shown, |shown| {
        let mut rows = vec![
            ("name", shown.name.clone()),
            ("kind", shown.kind.clone()),
            ("source", shown.source.clone()),
            ("path", shown.path.display().to_string()),
            ("files", shown.files.to_string()),
            ("size", size(shown.bytes)),
            ("local", size(shown.local_bytes)),
        ];
        if let Some(image) = &shown.image {
            rows.push(("image", image.clone()));
        }
        if let Some(written) = shown.written_bytes {
            rows.push(("written", size(written)));
        }
        if let Some(limit) = shown.limit_bytes {
            rows.push(("limit", size(limit)));
        }
        if let Some(free) = shown.free_bytes {
            rows.push(("free", size(free)));
        }
        if let Some(group) = &shown.quota_group {
            rows.push(("group", group.clone()));
        }
        if let Some(why) = &shown.at_limit {
            rows.push(("at limit", why.clone()));
        }
        if let Some(metadata) = shown.metadata_bytes {
            rows.push(("metadata", format!("{} (the image's own, on the local device)", size(metadata))));
        }
        rows.push((
            "lazy",
            match &shown.lazy {
                Lazy::Yes(_) => "yes".to_owned(),
                Lazy::No(why) => format!("no: {why}"),
            },
        ));
        rows.push(("addresses", format!("{} + {}", shown.address, shown.length)));
        rows.push(("index", shown.index.clone()));
        rows.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
    })
}

pub(crate) async fn remove(context: &Context, names: &[String]) -> anyhow::Result<()> {
    for name in names {
        context.client.delete(&format!("/names/{}", url_safe(name)?)).await?;
    }
    Ok(())
}

pub(crate) async fn pin(context: &Context, name: String, paths: Vec<String>) -> anyhow::Result<()> {
    let bar = Bar::new(context.json);
    let pinned: loam_pool::Result<Pinned> =
        context.client.job("/pin", &PinRequest { name, paths }, bar.as_ref()).await;
    bar.finish();
    output::print(context.json, &pinned?, |pinned| {
        format!(
            "{}: {} pinned, {} fetched",
            pinned.name,
            size(pinned.pinned_bytes),
            size(pinned.fetched_bytes)
        )
    })
}

/// Names that need no quoting go into the request's path; the daemon checks them again.
fn url_safe(name: &str) -> anyhow::Result<&str> {
    loam_pool::check_name(name)?;
    Ok(name)
}

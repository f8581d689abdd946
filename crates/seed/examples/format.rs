//! Formats a pair in a folder and prints what it took:
//! `cargo run --release -p loam-seed --example format -- DIR [FILES [VIRTUAL_SIZE_BYTES]]`

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use loam_seed::{SeedOptions, Subvolume, SyntheticTree, write};

fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
}

/// Peak resident set of this process in KiB.
fn peak_rss_kib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    line.trim_start_matches("VmHWM:").trim().to_owned()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = Path::new(arguments.first().ok_or("usage: format DIR [FILES [VIRTUAL_SIZE]]")?);
    let files = arguments.get(1).map_or(Ok(0), |text| text.parse())?;
    let mut options = SeedOptions::new([1; 32]);
    if let Some(size) = arguments.get(2) {
        options.virtual_size = size.parse()?;
    }
    let (mut virtual_image, mut local) =
        (create(&directory.join("virtual.img"))?, create(&directory.join("local.img"))?);
    let tree = SyntheticTree::new(files);
    let subvolume = Subvolume { name: "files", tree: &tree, readonly: false };
    let subvolumes = if files == 0 { &[][..] } else { std::slice::from_ref(&subvolume) };
    let start = Instant::now();
    let report = write(&options, subvolumes, &mut virtual_image, Some(&mut local))?;
    let seconds = start.elapsed().as_secs_f64();
    let on_disk = (virtual_image.metadata()?.blocks() + local.metadata()?.blocks()) * 512;
    println!(
        "files {files}, seconds {seconds:.3}, peak RSS {}, metadata {} bytes, on disk {on_disk} bytes",
        peak_rss_kib(),
        report.metadata_bytes
    );
    Ok(())
}

//! Verifies images and prints what it took: `cargo run --release -p loam-seed --example verify -- VIRTUAL [LOCAL]`

use std::fs::File;
use std::time::Instant;

use loam_seed::{ReadAt, verify};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let virtual_image = File::open(arguments.next().ok_or("usage: verify VIRTUAL [LOCAL]")?)?;
    let local = arguments.next().map(File::open).transpose()?;
    let start = Instant::now();
    let verification = verify(&virtual_image, local.as_ref().map(|local| local as &dyn ReadAt))?;
    for finding in &verification.findings {
        println!("{finding}");
    }
    for note in &verification.notes {
        println!("note: {note}");
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!("{:?}, seconds {:.3}, {peak}", verification.counts, start.elapsed().as_secs_f64());
    Ok(())
}

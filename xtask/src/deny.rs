//! `cargo xtask deny`: licences, sources and banned crates, as `deny.toml` says. Advisories are left out: their
//! database is fetched from the network, which a build machine may not have.

use anyhow::{Result, bail};

use crate::shell::{cargo, installed, run};

/// The task: no options.
pub(crate) fn run_task(arguments: &[String]) -> Result<()> {
    if let Some(unknown) = arguments.first() {
        bail!("unknown option '{unknown}'");
    }
    if !installed("cargo-deny") {
        eprintln!("deny: cargo-deny is not installed, nothing checked (cargo install --locked cargo-deny)");
        return Ok(());
    }
    run(&mut cargo(&["deny", "check", "licenses", "bans", "sources"]))
}

//! `range`: the address space by hand.

use loam_pool::protocol::{AddRangeRequest, RangeStatus, Ranges};

use super::Context;
use crate::arguments::Range;
use crate::output;

pub(crate) async fn run(context: &Context, command: Range) -> anyhow::Result<()> {
    match command {
        Range::Add { source } => {
            let source = loam_pool::absolute_bytes(&source)?;
            let range: RangeStatus = context.client.post("/ranges", &AddRangeRequest { source }).await?;
            output::print(context.json, &range, |range| format!("{} {}", range.address, range.length))
        }
        Range::Ls => {
            let ranges: Ranges = context.client.get("/ranges").await?;
            output::print(context.json, &ranges, |ranges| {
                let row = |range: &RangeStatus| {
                    vec![
                        range.address.to_string(),
                        range.length.to_string(),
                        range.kind.clone(),
                        range.source.clone(),
                    ]
                };
                let rows: Vec<_> = ranges.ranges.iter().map(row).collect();
                output::table(&["ADDRESS", "LENGTH", "KIND", "SOURCE"], &rows)
            })
        }
        Range::Clone { address, length, file } => {
            loam_pool::clone_range(&context.directory, address.0, length.0, &file).await?;
            Ok(())
        }
    }
}

//! The report of reads.
use anyhow::Result;

use crate::record::Record;
use crate::report::Section;

pub(crate) const SECTION: Section = Section {
    takes: |record| record.bench == "read" && !record.options.is_empty(),
    text: |_| Ok(String::new()),
    html: |_| Ok(String::new()),
};
fn _unused(_: &[&Record]) -> Result<()> {
    Ok(())
}

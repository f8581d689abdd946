//! `info` and `map`: what a device is, and where it has data.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};

use loam_block::{BlockDevice, Extent, ExtentKind, Locality};
use loam_nbd::client::{ClientOptions, ExportInfo};
use loam_pool::Error;
use loam_pool::device::{DeviceSpec, OpenOptions, Opened};
use serde::Serialize;

use super::Context;
use crate::arguments::devices::{Info, Map};
use crate::output::{self, size};

/// Extents that are asked for at once; what is kept in memory of a map.
const EXTENTS_AT_ONCE: usize = 4096;

/// What `info` tells of any device.
#[derive(Serialize)]
struct Facts {
    device: String,
    size: u64,
    minimum_block: u32,
    preferred_block: u32,
    maximum_block: u32,
    read_only: bool,
    capabilities: Abilities,
    /// What the server says, of an NBD export.
    #[serde(skip_serializing_if = "Option::is_none")]
    export: Option<ExportInfo>,
}

#[derive(Serialize)]
struct Abilities {
    write: bool,
    trim: bool,
    zero: bool,
    fast_zero: bool,
    extents: bool,
    multi_connection: bool,
    lazy: bool,
    rotational: Option<bool>,
}

/// What `info --list` tells.
#[derive(Serialize)]
struct Exports {
    uri: String,
    exports: Vec<ExportInfo>,
}

pub(crate) async fn info(context: &Context, arguments: Info) -> anyhow::Result<()> {
    super::unless_interrupted(async {
        match (&arguments.device, arguments.list) {
            (DeviceSpec::Nbd(uri), true) => {
                let exports = loam_nbd::client::list(uri, &ClientOptions::default()).await;
                let exports = exports.map_err(loam_pool::device::not_connected)?;
                output::print(context.json, &Exports { uri: uri.to_string(), exports }, describe_list)
            }
            (_, true) => {
                let why = "only an NBD server has a list of exports: give a URI";
                Err(Error::Invalid { what: "--list".into(), why: why.into() }.into())
            }
            (device, false) => {
                let opened = open(context, device).await?;
                output::print(context.json, &facts(device, &opened), describe)
            }
        }
    })
    .await
}

async fn open(context: &Context, device: &DeviceSpec) -> anyhow::Result<Opened> {
    let options =
        OpenOptions { read_only: true, pool: Some(context.directory.clone()), ..OpenOptions::default() };
    Ok(device.open(&options).await?)
}

fn facts(spec: &DeviceSpec, opened: &Opened) -> Facts {
    let geometry = opened.device.geometry();
    let can = opened.device.capabilities();
    Facts {
        device: spec.to_string(),
        size: geometry.size,
        minimum_block: geometry.minimum_block,
        preferred_block: geometry.preferred_block,
        maximum_block: geometry.maximum_block,
        read_only: !can.write,
        capabilities: Abilities {
            write: can.write,
            trim: can.trim,
            zero: can.zero,
            fast_zero: can.fast_zero,
            extents: can.extents,
            multi_connection: can.multi_connection,
            lazy: can.lazy,
            rotational: can.rotational,
        },
        export: opened.nbd.as_ref().map(|nbd| nbd.export().clone()),
    }
}

fn describe(facts: &Facts) -> String {
    let mut text = String::new();
    let can = &facts.capabilities;
    let abilities = [
        ("write", can.write),
        ("trim", can.trim),
        ("zero", can.zero),
        ("fast-zero", can.fast_zero),
        ("extents", can.extents),
        ("multi-connection", can.multi_connection),
        ("lazy", can.lazy),
        ("rotational", can.rotational == Some(true)),
    ];
    let names: Vec<&str> = abilities.iter().filter(|(_, can)| *can).map(|(name, _)| *name).collect();
    let _ = writeln!(text, "device     {}", facts.device);
    let _ = writeln!(text, "size       {} ({} bytes)", size(facts.size), facts.size);
    let _ = writeln!(
        text,
        "blocks     {} at least, {} preferred, {} at most",
        size(facts.minimum_block.into()),
        size(facts.preferred_block.into()),
        size(facts.maximum_block.into())
    );
    let _ =
        writeln!(text, "can        {}", if names.is_empty() { "read".to_owned() } else { names.join(", ") });
    if let Some(export) = &facts.export {
        describe_export(&mut text, export);
    }
    text
}

/// What a server says of an export: what is true of it, then a line for each other fact.
fn describe_export(text: &mut String, export: &ExportInfo) {
    let Ok(serde_json::Value::Object(facts)) = serde_json::to_value(export) else { return };
    let is_flag = |value: &serde_json::Value| value.is_boolean();
    let flags: Vec<String> = facts
        .iter()
        .filter(|(_, value)| value.as_bool() == Some(true))
        .map(|(name, _)| name.replace('_', "-"))
        .collect();
    let _ = writeln!(text, "  {:<16} {}", "server says", flags.join(", "));
    for (name, value) in facts.iter().filter(|(_, value)| !is_flag(value)) {
        let value = match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Array(items) => {
                let items =
                    items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
                items.collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        if !value.is_empty() {
            let _ = writeln!(text, "  {:<16} {value}", name.replace('_', " "));
        }
    }
}

fn describe_list(list: &Exports) -> String {
    let mut text = String::new();
    for export in &list.exports {
        let _ = writeln!(text, "export {:?}: {} ({} bytes)", export.name, size(export.size), export.size);
        describe_export(&mut text, export);
    }
    text
}

pub(crate) async fn map(context: &Context, arguments: Map) -> anyhow::Result<()> {
    super::unless_interrupted(async {
        let opened = open(context, &arguments.device).await?;
        let out = BufWriter::new(io::stdout().lock());
        let mut shown: Box<dyn Shown> = match context.json {
            true => Box::new(Json { out, any: false }),
            false => Box::new(Table { out, locality: arguments.locality }),
        };
        match walk(&arguments, &*opened.device, &mut *shown).await {
            // A reader that has seen enough is no error.
            Err(error) if is_broken_pipe(&error) => Ok(()),
            result => result,
        }
    })
    .await
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A row of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Row {
    offset: u64,
    length: u64,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<bool>,
}

/// Shows rows as they come, so that a map of any size takes no more memory than a small one.
async fn walk(arguments: &Map, device: &dyn BlockDevice, shown: &mut dyn Shown) -> anyhow::Result<()> {
    let failed = |error| Error::step(format!("map of {}", arguments.device), error);
    let end = device.geometry().size;
    let mut joined = Joined { last: None, shown };
    joined.shown.begin()?;
    let mut offset = 0;
    while offset < end {
        let extents = device.extents(offset, end - offset, EXTENTS_AT_ONCE).await.map_err(failed)?;
        for extent in extents {
            if arguments.locality {
                split(device, extent, &mut joined).await?;
            } else {
                joined.push(row(extent, extent.offset, extent.length, None))?;
            }
            offset = extent.offset + extent.length;
        }
    }
    joined.flush()?;
    Ok(joined.shown.end()?)
}

/// Shows an extent in runs that are local or not.
async fn split(device: &dyn BlockDevice, extent: Extent, joined: &mut Joined<'_>) -> anyhow::Result<()> {
    let end = extent.offset + extent.length;
    let mut offset = extent.offset;
    while offset < end {
        let runs = device.locality(offset, end - offset, EXTENTS_AT_ONCE).await;
        let runs = runs.map_err(|error| Error::step("what is local", error))?;
        for Locality { offset: start, length, local } in runs {
            joined.push(row(extent, start, length, Some(local)))?;
            offset = start + length;
        }
    }
    Ok(())
}

fn row(extent: Extent, offset: u64, length: u64, local: Option<bool>) -> Row {
    let r#type = match extent.kind {
        ExtentKind::Data => "data",
        ExtentKind::Zero => "zero",
        ExtentKind::Hole => "hole",
    };
    Row { offset, length, r#type, local }
}

/// Joins rows that a device told of in pieces.
struct Joined<'a> {
    last: Option<Row>,
    shown: &'a mut dyn Shown,
}

impl Joined<'_> {
    fn push(&mut self, row: Row) -> io::Result<()> {
        match &mut self.last {
            Some(last) if last.r#type == row.r#type && last.local == row.local => last.length += row.length,
            _ => {
                self.flush()?;
                self.last = Some(row);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.last.take().map_or(Ok(()), |row| self.shown.row(&row))
    }
}

/// Where rows go.
trait Shown {
    fn begin(&mut self) -> io::Result<()>;
    fn row(&mut self, row: &Row) -> io::Result<()>;
    fn end(&mut self) -> io::Result<()>;
}

struct Table<W: Write> {
    out: W,
    locality: bool,
}

impl<W: Write> Shown for Table<W> {
    fn begin(&mut self) -> io::Result<()> {
        let locality = if self.locality { "  LOCALITY" } else { "" };
        writeln!(self.out, "{:>19}  {:>19}  TYPE{locality}", "OFFSET", "LENGTH")
    }

    fn row(&mut self, row: &Row) -> io::Result<()> {
        let locality = match row.local {
            None => "",
            Some(true) => "  local",
            Some(false) => "  lazy",
        };
        writeln!(self.out, "{:>19}  {:>19}  {}{locality}", row.offset, row.length, row.r#type)
    }

    fn end(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

struct Json<W: Write> {
    out: W,
    any: bool,
}

impl<W: Write> Shown for Json<W> {
    fn begin(&mut self) -> io::Result<()> {
        self.out.write_all(b"{\"extents\":[")
    }

    fn row(&mut self, row: &Row) -> io::Result<()> {
        if self.any {
            self.out.write_all(b",")?;
        }
        self.any = true;
        Ok(serde_json::to_writer(&mut self.out, row)?)
    }

    fn end(&mut self) -> io::Result<()> {
        self.out.write_all(b"]}\n")?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use loam_block::{Capabilities, Geometry, Io, MemoryDevice, NullDevice, WriteFlags};

    use super::*;

    /// All holes, told in pieces of 4 KiB, of which every other is local.
    struct Pieces;

    impl BlockDevice for Pieces {
        fn geometry(&self) -> Geometry {
            Geometry { size: 65536, minimum_block: 1, preferred_block: 4096, maximum_block: 4096 }
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }

        fn read<'a>(&'a self, _offset: u64, _buffer: &'a mut [u8]) -> Io<'a, ()> {
            Io::Ready(Ok(()))
        }

        fn extents(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Extent>> {
            Io::Ready(Ok(vec![Extent { offset, length: length.min(4096), kind: ExtentKind::Hole }]))
        }

        fn locality(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<Locality>> {
            Io::Ready(Ok(vec![Locality { offset, length, local: (offset / 4096).is_multiple_of(2) }]))
        }
    }

    #[tokio::test]
    async fn what_is_told_in_pieces_is_shown_as_one_unless_it_differs() {
        let whole = serde_json::json!({ "extents": [{ "offset": 0, "length": 65536, "type": "hole" }] });
        assert_eq!(shown(&Pieces, false).await, whole);
        assert_eq!(shown(&Pieces, true).await["extents"].as_array().unwrap().len(), 16);
    }

    async fn shown(device: &dyn BlockDevice, locality: bool) -> serde_json::Value {
        let arguments = Map { device: "null:1".parse().unwrap(), locality };
        let mut out = Vec::new();
        walk(&arguments, device, &mut Json { out: &mut out, any: false }).await.unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[tokio::test]
    async fn a_map_covers_the_device_and_neighbours_are_joined() {
        let device = MemoryDevice::new(4 << 60);
        for offset in [0, 1 << 20, (1 << 20) + 65536, 2 << 60] {
            device.write(offset, &[1; 65536], WriteFlags::default()).await.unwrap();
        }
        let map = shown(&device, false).await;
        let rows = map["extents"].as_array().unwrap();
        let mut end = 0;
        for row in rows {
            assert_eq!(row["offset"], end);
            assert!(row.get("local").is_none());
            end += row["length"].as_u64().unwrap();
        }
        assert_eq!(end, 4 << 60);
        let types: Vec<&str> = rows.iter().map(|row| row["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["data", "hole", "data", "hole", "data", "hole"]);
        assert_eq!(shown(&device, true).await["extents"][0]["local"], true);
        assert_eq!(shown(&NullDevice::new(0), true).await, serde_json::json!({ "extents": [] }));
    }
}

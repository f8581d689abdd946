//! What `serve`, `copy`, `info` and `map` take: commands that know devices and need no pool.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use loam_block::layer::LayerSpec;
use loam_block::size::ByteSize;
use loam_nbd::copy::ZeroStrategy;
use loam_nbd::uri::Address;
use loam_pool::device::DeviceSpec;

/// What a device may be; shown by the help of each command that takes one.
pub(crate) const DEVICE_HELP: &str = "\
DEVICE is one of
  PATH, file:PATH            a file or block device
  memory:SIZE                sparse memory, empty at first
  null:SIZE                  zeroes; writes are forgotten
  pattern:SIZE               each 8 bytes hold their own offset
  nbd://HOST[:PORT]/EXPORT   an NBD export; nbds:// with TLS
  nbd+unix:///EXPORT?socket=PATH
                             the same over a Unix socket; nbds+unix:// with TLS
  pool:                      the virtual device of the pool (--pool), read-only
  index:FILE[?source=SOURCE&cache=DIR&virtual-size=SIZE&virtual=FILE]
                             the virtual device of one image, read-only
NBD URIs take tls-certificates=DIR, tls-hostname=NAME and tls-verify-peer=0|1.";

/// A device, and the name under which it is served.
#[derive(Debug, Clone)]
pub(crate) struct NamedDevice {
    /// What stands before the `=`, if anything does.
    pub(crate) name: Option<String>,
    /// The device.
    pub(crate) device: DeviceSpec,
}

/// Reads `[NAME=]DEVICE`. A name has letters, digits, `.`, `_` and `-`; a file with a `=` in its name is `file:a=b`.
fn named_device(text: &str) -> Result<NamedDevice, String> {
    let is_name = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    match text.split_once('=') {
        Some((name, device)) if is_name(name) => {
            Ok(NamedDevice { name: Some(name.to_owned()), device: self::device(device)? })
        }
        _ => Ok(NamedDevice { name: None, device: self::device(text)? }),
    }
}

fn device(text: &str) -> Result<DeviceSpec, String> {
    text.parse().map_err(|error: loam_pool::Error| error.chain())
}

fn with_cause<T: std::str::FromStr>(text: &str) -> Result<T, String>
where
    T::Err: std::error::Error,
{
    use std::error::Error as _;
    text.parse().map_err(|error: T::Err| match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })
}

#[derive(Debug, Args)]
#[command(after_long_help = serve_help())]
pub(crate) struct ServeDevice {
    /// What is served; several with a name each: NAME=DEVICE.
    #[arg(value_name = "[NAME=]DEVICE", required = true, value_parser = named_device)]
    pub(crate) devices: Vec<NamedDevice>,
    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0: one that is free). May be given more than once.
    #[arg(long, value_name = "ADDRESS", default_value = "tcp:localhost:10809", value_parser = with_cause::<Address>)]
    pub(crate) nbd: Vec<Address>,
    /// The name of a single export [default: the empty name, which clients use that name none].
    #[arg(long, value_name = "NAME")]
    pub(crate) export: Option<String>,
    /// What a list of exports says about it, for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) description: String,
    /// Wrap the devices, as delay,write=20ms; the first is the outermost.
    #[arg(long = "layer", value_name = "L[,k=v...]", value_parser = with_cause::<LayerSpec>)]
    pub(crate) layers: Vec<LayerSpec>,
    /// Refuse writes.
    #[arg(long, visible_alias = "read-only")]
    pub(crate) readonly: bool,
    /// Serve one connection on standard input and output, then end.
    #[arg(long, conflicts_with_all = ["nbd", "pid_file"])]
    pub(crate) stdio: bool,
    /// Write the process id there once clients can connect; removed at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Most connections at once; one more is closed as soon as it is made.
    #[arg(long, value_name = "N")]
    pub(crate) max_connections: Option<usize>,
    /// Whether clients can, or must, use TLS.
    #[arg(long, value_enum, default_value_t, value_name = "off|on|require")]
    pub(crate) tls: Tls,
    /// A directory with server-cert.pem, server-key.pem and, for --tls-verify-peer, ca-cert.pem.
    #[arg(long, value_name = "DIR", required_if_eq_any = [("tls", "on"), ("tls", "require")])]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Clients must show a certificate that ca-cert.pem signed.
    #[arg(long, requires = "tls_certificates")]
    pub(crate) tls_verify_peer: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tls {
    /// No TLS.
    #[default]
    Off,
    /// With clients that ask for it.
    On,
    /// With every client.
    Require,
}

fn serve_help() -> String {
    format!(
        "\
One line with the URI to connect to is printed when clients can connect; with several exports or
addresses all URIs, separated by spaces. Ctrl-C or SIGTERM stop gracefully: what is being done
is done, then connections are closed; a second one stops at once. Sockets that systemd passes
(LISTEN_FDS) are used in place of --nbd.

Examples:
  loam serve disk.img --nbd unix:/run/d.sock
  loam serve pool: --nbd tcp:0.0.0.0:10809 --tls require --tls-certificates /etc/pki/loam
  loam serve root=root.img swap=memory:1GiB --nbd unix:/run/d.sock
  loam serve memory:1GiB --layer log --layer delay,write=20ms --nbd tcp:localhost:0
  nbdcopy -- [ loam serve disk.img ] copy.img

{DEVICE_HELP}

Layers, of which a request meets the first first:
{}",
        loam_block::layer::help_text()
    )
}

/// How NBD servers are talked to.
#[derive(Debug, Args)]
pub(crate) struct Connections {
    /// Most connections to an NBD server that allows several.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) connections: Option<u16>,
}

#[derive(Debug, Args)]
#[command(after_long_help = copy_help())]
pub(crate) struct Copy {
    /// What is read.
    #[arg(value_name = "SRC", value_parser = device)]
    pub(crate) source: DeviceSpec,
    /// What is written; at least as long as the source.
    #[arg(value_name = "DST", value_parser = device)]
    pub(crate) destination: DeviceSpec,
    /// How zeroes get to the destination. auto finds out what is fastest there; the others are what qemu-img did at one
    /// time: write them, zero all first, zero each hole, zero all first if that is said to be fast.
    #[arg(long, value_name = "auto|write|prezero|guess|fast", default_value = "auto", value_parser = with_cause::<ZeroStrategy>)]
    pub(crate) zero: ZeroStrategy,
    #[command(flatten)]
    pub(crate) connections: Connections,
    /// Requests in flight at once.
    #[arg(long, value_name = "N", default_value_t = loam_nbd::copy::QUEUE_DEPTH_DEFAULT)]
    pub(crate) queue_depth: usize,
    /// Bytes of one request for data [default: what suits the run of data].
    #[arg(long, value_name = "SIZE")]
    pub(crate) request_size: Option<ByteSize>,
    /// Make DST, a sparse file of the source's size, where there is none.
    #[arg(long)]
    pub(crate) create: bool,
    /// Read both ends again afterwards and compare them.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Leave no holes: what reads as zeroes gets room, too.
    #[arg(long)]
    pub(crate) allocate: bool,
    /// DST reads as zeroes already: leave it alone where the source does.
    #[arg(long)]
    pub(crate) destination_is_zero: bool,
    /// Keep note of how far the copy is, so that the same command goes on there after it was stopped. The note is FILE
    /// [default: DST.resume beside a file, else a file in the current directory]; it is removed when the copy is done.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[allow(clippy::option_option, reason = "a flag that may have a value")]
    pub(crate) resume: Option<Option<PathBuf>>,
}

fn copy_help() -> String {
    format!(
        "\
Holes and zeroes of the source are not read, and become holes of DST. Ctrl-C stops in good
order: what is in flight is finished and flushed, and the offset up to which DST is complete is
printed; a second one stops at once.

Examples:
  loam copy nbd+unix:///?socket=/run/d.sock out.img --create
  loam copy disk.img nbd://host/disk --connections 4 --verify
  loam copy nbds://host/disk?tls-certificates=/etc/pki/loam disk.img --create --resume
  loam copy /dev/vg/lv nbd://host/lv --destination-is-zero

{DEVICE_HELP}"
    )
}

#[derive(Debug, Args)]
#[command(after_long_help = info_help())]
pub(crate) struct Info {
    /// The device, or any export of an NBD server.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub(crate) device: DeviceSpec,
    /// All exports of an NBD server.
    #[arg(long)]
    pub(crate) list: bool,
}

fn info_help() -> String {
    format!(
        "\
Examples:
  loam info nbd://host/disk
  loam info --list nbd+unix:///?socket=/run/d.sock
  loam info --json pool:

{DEVICE_HELP}"
    )
}

#[derive(Debug, Args)]
#[command(after_long_help = map_help())]
pub(crate) struct Map {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub(crate) device: DeviceSpec,
    /// Also tell what is local and what would be fetched from elsewhere.
    #[arg(long)]
    pub(crate) locality: bool,
}

fn map_help() -> String {
    format!(
        "\
data may be anything, zero reads as zeroes and has room, hole reads as zeroes and has none. With
--locality, lazy is what a read would fetch first. What is read is never more than the map
itself.

Examples:
  loam map disk.img
  loam map --locality pool:
  loam map --json nbd://host/disk | jq '[.extents[] | select(.type == \"data\") | .length] | add'

{DEVICE_HELP}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_from_a_device() {
        let named = |text: &str| named_device(text).unwrap();
        assert_eq!(named("root=disk.img").name.as_deref(), Some("root"));
        assert_eq!(named("a.b-c_1=memory:4K").name.as_deref(), Some("a.b-c_1"));
        for text in ["disk.img", "/x/a=b", "file:a=b", "nbd+unix:///?socket=/x", "index:/x?source=dir:/y"] {
            assert_eq!(named(text).name, None, "{text}");
        }
        assert_eq!(named("root=index:/x?source=dir:/y").name.as_deref(), Some("root"));
        assert!(named_device("a=ramdisk:1").unwrap_err().contains("file:ramdisk:1"));
    }
}

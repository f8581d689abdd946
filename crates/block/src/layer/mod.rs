//! Layers: devices that wrap a device, composable in any order, from the command line too.
//!
//! [`LayerSpec`] is a layer as it is written there, `delay,write=20ms,zero=5ms`; [`help`] is the table of all layers and
//! their parameters. In a list of layers the first is the outermost, which requests meet first, as in nbdkit's `--filter`.
//!
//! Every layer passes on what it has no business with: capabilities, block sizes, extents, locality, fast zeroes, flushes
//! and errors. What is ready below is ready above, unless the layer's business is to wait (`delay`, `rate`) or to make
//! several requests of one that changes bytes (`blocksize`, `nozero` that emulates): those are pending, because a request
//! that is dropped unpolled must not be half done. Locations pass through `nozero`, `noextents` and `readonly`; the other
//! layers have to see the bytes, or the request, and name none.
//!
//! | layer | business |
//! |---|---|
//! | `nozero` | no efficient zeroes, or slow or dishonest ones |
//! | `delay` | time before each request |
//! | `log` | a line for each request and its answer |
//! | `stats` | counts, bytes and times, as text or JSON |
//! | `blocksize` | other block sizes: splits, aligns |
//! | `noextents` | all is data |
//! | `readonly` | no writes |
//! | `fault` | errors |
//! | `rate` | bytes per second |
//!
//! ```
//! # use std::sync::Arc;
//! # use loam_block::{BlockDevice, MemoryDevice, ZeroFlags, ErrorKind};
//! # use loam_block::layer::LayerSpec;
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layer: LayerSpec = "nozero,zero=plugin,fast-zero=slow".parse()?;
//! let device = layer.wrap(Arc::new(MemoryDevice::new(1 << 20)))?;
//! let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
//! let refused = device.write_zeroes(0, 4096, fast).await.map_err(|error| error.kind());
//! assert_eq!(refused, Err(ErrorKind::NotSupported));
//! # Ok(())
//! # }
//! ```

mod around;
mod blocksize;
mod delay;
mod fault;
mod forward;
mod log;
mod noextents;
mod nozero;
mod parameters;
mod pieces;
mod range_lock;
mod rate;
mod readonly;
pub mod stats;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use around::Operation;
pub use parameters::{LayerHelp, ParameterHelp, ParseLayerError};

use crate::{BlockDevice, Result};
use parameters::Parameters;

/// All layers, in the order of the help.
static LAYERS: [&LayerHelp; 9] = [
    &nozero::HELP,
    &delay::HELP,
    &log::HELP,
    &stats::HELP,
    &blocksize::HELP,
    &noextents::HELP,
    &readonly::HELP,
    &fault::HELP,
    &rate::HELP,
];

/// The layers that there are, with their parameters.
pub fn help() -> &'static [&'static LayerHelp] {
    &LAYERS
}

/// The same as text for a terminal, each line at most about 100 columns.
pub fn help_text() -> String {
    let mut text = String::new();
    for layer in help() {
        text += &format!("{}: {}\n", layer.name, layer.summary);
        for parameter in layer.parameters {
            let key = format!("{}={}", parameter.name, parameter.value);
            let default = match parameter.default {
                "" => String::new(),
                default => format!(" [default: {default}]"),
            };
            text += &format!("    {key:<28} {}{default}\n", parameter.help);
        }
    }
    text
}

/// A layer with its parameters, known to be right. Prints as it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    text: Parameters,
    options: Options,
}

#[derive(Debug, Clone, PartialEq)]
enum Options {
    NoZero(nozero::Options),
    Delay(delay::Options),
    Log(log::Options),
    Stats(stats::Options),
    BlockSize(blocksize::Options),
    NoExtents,
    ReadOnly,
    Fault(fault::Options),
    Rate(rate::Options),
}

impl LayerSpec {
    /// The layer's name: the first word.
    pub fn name(&self) -> &'static str {
        self.text.layer.name
    }

    /// `device` with this layer around it.
    ///
    /// # Errors
    /// When the layer cannot stand on this device (`blocksize`, `nozero`), or a file that it writes cannot be made.
    pub fn wrap(&self, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
        match &self.options {
            Options::NoZero(options) => nozero::wrap(options, device),
            Options::Delay(options) => Ok(delay::wrap(options, device)),
            Options::Log(options) => log::wrap(options, device),
            Options::Stats(options) => stats::wrap(options, device),
            Options::BlockSize(options) => blocksize::wrap(options, device),
            Options::NoExtents => Ok(noextents::wrap(device)),
            Options::ReadOnly => Ok(readonly::wrap(device)),
            Options::Fault(options) => Ok(fault::wrap(options, device)),
            Options::Rate(options) => Ok(rate::wrap(options, device)),
        }
    }
}

/// `device` with all of `layers` around it, the first the outermost.
///
/// # Errors
/// Those of [`LayerSpec::wrap`].
pub fn wrap_all(layers: &[LayerSpec], device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    layers.iter().rev().try_fold(device, |device, layer| layer.wrap(device))
}

impl FromStr for LayerSpec {
    type Err = ParseLayerError;

    fn from_str(text: &str) -> Result<Self, ParseLayerError> {
        let text = Parameters::parse(text, &LAYERS)?;
        let options = match text.layer.name {
            "nozero" => Options::NoZero(nozero::Options::parse(&text)?),
            "delay" => Options::Delay(delay::Options::parse(&text)?),
            "log" => Options::Log(log::Options::parse(&text)?),
            "stats" => Options::Stats(stats::Options::parse(&text)?),
            "blocksize" => Options::BlockSize(blocksize::Options::parse(&text)?),
            "noextents" => Options::NoExtents,
            "readonly" => Options::ReadOnly,
            "fault" => Options::Fault(fault::Options::parse(&text)?),
            "rate" => Options::Rate(rate::Options::parse(&text)?),
            name => unreachable!("{name} is in the table of layers and not here"),
        };
        Ok(LayerSpec { text, options })
    }
}

impl fmt::Display for LayerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_of_the_table_has_its_options() {
        for layer in help() {
            let needs = match layer.name {
                "delay" => ",read=1ms",
                "rate" => ",total=1M",
                _ => "",
            };
            let spec: LayerSpec = format!("{}{needs}", layer.name).parse().expect(layer.name);
            assert_eq!(spec.name(), layer.name);
        }
    }

    #[test]
    fn specs_print_as_they_were_written() {
        for text in ["delay,write=20ms,zero=5ms", "noextents", "fault,on=read+write,rate=1%,error=ENOSPC"] {
            let spec: LayerSpec = text.parse().expect(text);
            assert_eq!(spec.to_string(), text);
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        let spaced: LayerSpec = "rate, total = 1M".parse().expect("spaces do not matter");
        assert_eq!(spaced.to_string(), "rate,total=1M");
    }

    #[test]
    fn refusals_say_what_to_write() {
        let message = |text: &str| text.parse::<LayerSpec>().expect_err(text).to_string();
        assert!(message("dealy,read=1ms").contains("nozero, delay, log"));
        assert!(message("").contains("is not a layer"));
        assert!(message("delay,reads=1ms").contains("it has read, write, "));
        assert!(message("noextents,x=1").contains("it takes none"));
        assert!(message("delay,read").contains("write read=TIME"));
        assert!(message("delay,read=").contains("write read=TIME"));
        assert!(message("delay,read=1ms,read=2ms").contains("twice"));
        assert!(message("delay,read=fast").contains("20ms"));
        assert!(message("delay").contains("delay,read=20ms"));
        assert!(message("nozero,zero=maybe").contains("emulate"));
        assert!(message("fault,error=EPONY").contains("ENOSPC"));
        assert!(message("fault,on=sing").contains("extents"));
        assert!(message("rate").contains("total="));
        assert!(message("blocksize,maximum=1KB").contains("KiB"));
    }

    #[test]
    fn the_help_names_every_parameter() {
        let text = help_text();
        for layer in help() {
            assert!(text.contains(&format!("{}: ", layer.name)));
            assert!(
                layer.parameters.iter().all(|parameter| text.contains(&format!("    {}=", parameter.name)))
            );
        }
        let longest = text.lines().max_by_key(|line| line.len()).expect("lines");
        assert!(longest.len() <= 140, "{longest}");
    }
}

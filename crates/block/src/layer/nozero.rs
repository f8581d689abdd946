//! `nozero`: a device whose zeroes are not efficient, or slow, or not what they promise: for measuring what zeroes are
//! worth to a client and how it falls back. The words of the parameters are those of nbdkit's filter of that name:
//!
//! | here | nbdkit |
//! |---|---|
//! | `zero=none`, `emulate`, `notrim`, `plugin` | `zeromode=` the same |
//! | `fast-zero=none`, `slow`, `ignore`, `default` | `fastzeromode=` the same |
//!
//! Emulation happens in this layer, so it does what it says wherever the layer stands.

use std::str::FromStr;
use std::sync::Arc;

use super::forward::forward;
use super::parameters::{LayerHelp, Parameters, ParseLayerError, parameter};
use super::pieces::{change_all, pieces};
use crate::{BlockDevice, Capabilities, Error, ErrorKind, Io, Result, WriteFlags, ZeroFlags, check_range};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "nozero",
    summary: "zeroes are refused, written out, or not fast (nbdkit: nozero)",
    parameters: &[
        parameter(
            "zero",
            "none|emulate|notrim|plugin",
            "none",
            "not offered; written as data; passed on without holes; passed on",
        ),
        parameter(
            "fast-zero",
            "none|slow|ignore|default",
            "default",
            "not offered; refused; done though slow; as the device (emulated: refused)",
        ),
    ],
};

/// Zeroes that are written at once.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Zero {
    None,
    Emulate,
    NoTrim,
    Plugin,
}

impl FromStr for Zero {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "none" => Ok(Zero::None),
            "emulate" => Ok(Zero::Emulate),
            "notrim" => Ok(Zero::NoTrim),
            "plugin" => Ok(Zero::Plugin),
            _ => Err("write none, emulate, notrim or plugin"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum FastZero {
    None,
    Slow,
    Ignore,
    Default,
}

impl FromStr for FastZero {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "none" => Ok(FastZero::None),
            "slow" => Ok(FastZero::Slow),
            "ignore" => Ok(FastZero::Ignore),
            "default" => Ok(FastZero::Default),
            _ => Err("write none, slow, ignore or default"),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    zero: Zero,
    fast_zero: FastZero,
}

impl Options {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, ParseLayerError> {
        Ok(Options {
            zero: parameters.get("zero")?.unwrap_or(Zero::None),
            fast_zero: parameters.get("fast-zero")?.unwrap_or(FastZero::Default),
        })
    }
}

struct NoZero {
    inner: Arc<dyn BlockDevice>,
    options: Options,
    capabilities: Capabilities,
    /// Bytes of zeroes in one write.
    piece: u64,
}

pub(super) fn wrap(options: &Options, inner: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
    let (geometry, below) = (inner.geometry(), inner.capabilities());
    if matches!(options.zero, Zero::NoTrim | Zero::Plugin) && below.write && !below.zero {
        let context = "layer nozero: zeroes are to be passed on to a device that has none; write zero=none or \
                       zero=emulate";
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let zero = match options.zero {
        Zero::None => false,
        Zero::Emulate => below.write,
        Zero::NoTrim | Zero::Plugin => below.zero,
    };
    let fast_zero = match (options.fast_zero, options.zero) {
        (FastZero::None, _) => false,
        (FastZero::Slow | FastZero::Ignore, _) | (FastZero::Default, Zero::Emulate) => true,
        (FastZero::Default, _) => below.fast_zero,
    };
    let capabilities = Capabilities { zero, fast_zero: zero && fast_zero, ..below };
    let piece = (ZEROES.len() as u64).min(u64::from(geometry.maximum_block));
    let piece = piece / u64::from(geometry.minimum_block) * u64::from(geometry.minimum_block);
    Ok(Arc::new(NoZero { inner, options: options.clone(), capabilities, piece }))
}

impl NoZero {
    /// What is not to be passed on at all.
    fn refusal(&self, flags: ZeroFlags) -> Option<&'static str> {
        if self.options.zero == Zero::None {
            return Some("the nozero layer offers none");
        }
        let slow = match self.options.fast_zero {
            FastZero::None | FastZero::Slow => true,
            FastZero::Ignore => false,
            FastZero::Default => self.options.zero == Zero::Emulate,
        };
        (flags.fast_only && slow).then_some("the nozero layer says that they would not be fast")
    }

    fn emulate(&self, offset: u64, length: u64, fua: bool) -> Io<'_, ()> {
        let write =
            move |(offset, length)| self.inner.write(offset, &ZEROES[..length as usize], WriteFlags { fua });
        match length <= self.piece {
            true => write((offset, length)),
            false => change_all(pieces(offset, length, self.piece), 1, write),
        }
    }
}

impl BlockDevice for NoZero {
    forward!(inner: geometry, read, write, trim, flush, extents, locality, prefetch, locate, settle);

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn write_zeroes(&self, offset: u64, length: u64, mut flags: ZeroFlags) -> Io<'_, ()> {
        if !self.capabilities.write {
            return self.inner.write_zeroes(offset, length, flags);
        }
        if let Err(error) = check_range(&self.geometry(), "write of zeroes", offset, length) {
            return Io::Ready(Err(error));
        }
        if length > 0
            && let Some(why) = self.refusal(flags)
        {
            let context = format!("zeroes of {length} bytes at {offset}: {why}");
            return Io::Ready(Err(Error::new(ErrorKind::NotSupported, context)));
        }
        flags.fast_only &= self.options.fast_zero != FastZero::Ignore;
        flags.no_hole |= self.options.zero == Zero::NoTrim;
        match self.options.zero {
            Zero::Emulate => self.emulate(offset, length, flags.fua),
            // Only an empty request comes here.
            Zero::None => Io::Ready(Ok(())),
            Zero::NoTrim | Zero::Plugin => self.inner.write_zeroes(offset, length, flags),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::layer::LayerSpec;
    use crate::{ErrorKind, ExtentKind, MemoryDevice, ZeroFlags};
    use std::sync::Arc;

    const FAST: ZeroFlags = ZeroFlags { fua: false, no_hole: false, fast_only: true };
    const PLAIN: ZeroFlags = ZeroFlags { fua: false, no_hole: false, fast_only: false };

    /// zero, fast zero as capabilities; whether zeroes work; whether fast zeroes work.
    async fn behaviour(layer: &str) -> (bool, bool, bool, bool) {
        let layer: LayerSpec = layer.parse().expect(layer);
        let device = layer.wrap(Arc::new(MemoryDevice::from_bytes(&[7; 8 << 20]))).expect("a layer");
        let (zero, fast_zero) = (device.capabilities().zero, device.capabilities().fast_zero);
        let mut works = Vec::new();
        for (offset, flags) in [(0, PLAIN), (4 << 20, FAST)] {
            let length = (2 << 20) + 4096;
            let result = device.write_zeroes(offset, length, flags).await;
            let mut bytes = vec![1; length as usize];
            device.read(offset, &mut bytes).await.expect("read");
            let expected = if result.is_ok() { 0 } else { 7 };
            assert!(bytes.iter().all(|byte| *byte == expected), "{layer}: {result:?}");
            assert!(
                result.as_ref().is_ok() || result.is_err_and(|error| error.kind() == ErrorKind::NotSupported)
            );
            works.push(expected == 0);
        }
        (zero, fast_zero, works[0], works[1])
    }

    #[tokio::test]
    async fn the_modes_of_the_case_study() {
        let cases = [
            ("nozero", (false, false, false, false)),
            ("nozero,zero=none,fast-zero=ignore", (false, false, false, false)),
            ("nozero,zero=plugin,fast-zero=ignore", (true, true, true, true)),
            ("nozero,zero=plugin,fast-zero=none", (true, false, true, false)),
            ("nozero,zero=plugin,fast-zero=default", (true, true, true, true)),
            ("nozero,zero=plugin,fast-zero=slow", (true, true, true, false)),
            ("nozero,zero=emulate", (true, true, true, false)),
            ("nozero,zero=emulate,fast-zero=ignore", (true, true, true, true)),
            ("nozero,zero=emulate,fast-zero=none", (true, false, true, false)),
            // Memory refuses fast zeroes that keep the room.
            ("nozero,zero=notrim", (true, true, true, false)),
        ];
        for (layer, expected) in cases {
            assert_eq!(behaviour(layer).await, expected, "{layer}");
        }
    }

    #[tokio::test]
    async fn emulated_zeroes_are_data_below() {
        let layer: LayerSpec = "nozero,zero=emulate".parse().expect("a layer");
        let memory = Arc::new(MemoryDevice::new(4 << 20));
        let device = layer.wrap(memory.clone()).expect("a layer");
        device.write_zeroes(0, 3 << 20, PLAIN).await.expect("zeroes");
        assert_eq!(memory.allocated_bytes(), 3 << 20);
        assert!(device.write_zeroes(0, 4096, PLAIN).is_ready(), "a short one is one write");
        let extents = device.extents(0, 4 << 20, 8).await.expect("extents");
        assert_eq!(
            extents.iter().map(|extent| extent.kind).collect::<Vec<_>>(),
            [ExtentKind::Data, ExtentKind::Hole]
        );
    }

    #[test]
    fn zeroes_that_are_not_there_cannot_be_passed_on() {
        let none: LayerSpec = "nozero".parse().expect("a layer");
        let plugin: LayerSpec = "nozero,zero=plugin".parse().expect("a layer");
        let device = none.wrap(Arc::new(MemoryDevice::new(1 << 20))).expect("a layer");
        let error = plugin.wrap(device).err().expect("refused");
        assert!(error.to_string().contains("zero=emulate"), "{error}");
    }
}

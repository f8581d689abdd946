//! Parameters of layers: `name,key=value,key=value`, checked against the table that `--help` prints.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::size::{ByteSize, ParseSizeError};

/// What a layer is and takes.
#[derive(Debug)]
pub struct LayerHelp {
    /// As it is written first.
    pub name: &'static str,
    /// One line.
    pub summary: &'static str,
    /// What may follow.
    pub parameters: &'static [ParameterHelp],
}

/// A parameter of a layer.
#[derive(Debug)]
pub struct ParameterHelp {
    /// The key.
    pub name: &'static str,
    /// What its value looks like.
    pub value: &'static str,
    /// What holds where it is not given; empty where that says itself.
    pub default: &'static str,
    /// One line.
    pub help: &'static str,
}

/// A row of a layer's table.
pub(super) const fn parameter(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> ParameterHelp {
    ParameterHelp { name, value, default, help }
}

/// Why a text is no layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLayerError {
    /// The first word is none.
    #[error("`{name}` is not a layer: there are {known}")]
    UnknownLayer {
        /// The word.
        name: String,
        /// Those there are.
        known: String,
    },
    /// A key that the layer does not have.
    #[error("layer {layer} has no parameter `{key}`: {known}")]
    UnknownParameter {
        /// The layer.
        layer: &'static str,
        /// The word.
        key: String,
        /// What it has.
        known: String,
    },
    /// A key without a value.
    #[error("`{key}` of layer {layer} needs a value: write {key}={value}")]
    NoValue {
        /// The layer.
        layer: &'static str,
        /// The key.
        key: &'static str,
        /// What its value looks like.
        value: &'static str,
    },
    /// A key twice.
    #[error("`{key}` of layer {layer} is given twice")]
    Twice {
        /// The layer.
        layer: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A value that is none.
    #[error("{key}={value} of layer {layer}: {why}")]
    Value {
        /// The layer.
        layer: &'static str,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// Parameters that do not go together, or one that is missing.
    #[error("layer {layer}: {why}")]
    Combination {
        /// The layer.
        layer: &'static str,
        /// What to do.
        why: String,
    },
}

/// The parameters of one layer as given, each key known and given once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) layer: &'static LayerHelp,
    given: Vec<(&'static str, String)>,
}

impl Parameters {
    pub(super) fn parse(text: &str, layers: &'static [&'static LayerHelp]) -> Result<Self, ParseLayerError> {
        let mut words = text.split(',');
        let name = words.next().unwrap_or_default().trim();
        let layer = layers.iter().find(|layer| layer.name == name).ok_or_else(|| {
            let known = list(layers.iter().map(|layer| layer.name));
            ParseLayerError::UnknownLayer { name: name.to_owned(), known }
        })?;
        let mut given: Vec<(&'static str, String)> = Vec::new();
        for word in words {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (word.trim(), None),
            };
            let known = layer.parameters.iter().find(|parameter| parameter.name == key);
            let Some(known) = known else { return Err(unknown_parameter(layer, key)) };
            if given.iter().any(|(other, _)| *other == known.name) {
                return Err(ParseLayerError::Twice { layer: layer.name, key: known.name });
            }
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                let (key, value) = (known.name, known.value);
                return Err(ParseLayerError::NoValue { layer: layer.name, key, value });
            };
            given.push((known.name, value.to_owned()));
        }
        Ok(Parameters { layer, given })
    }

    /// The value of a key that the layer's table has.
    pub(super) fn text(&self, key: &'static str) -> Option<&str> {
        debug_assert!(self.layer.parameters.iter().any(|parameter| parameter.name == key), "{key}");
        self.given.iter().find(|(other, _)| *other == key).map(|(_, value)| value.as_str())
    }

    /// The same, made what `parse` makes of it.
    pub(super) fn get_with<T, E: fmt::Display>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, ParseLayerError> {
        let Some(value) = self.text(key) else { return Ok(None) };
        let parsed = parse(value).map_err(|why| self.wrong(key, value, why.to_string()))?;
        Ok(Some(parsed))
    }

    pub(super) fn get<T: FromStr<Err: fmt::Display>>(
        &self,
        key: &'static str,
    ) -> Result<Option<T>, ParseLayerError> {
        self.get_with(key, str::parse)
    }

    pub(super) fn size(&self, key: &'static str) -> Result<Option<u64>, ParseLayerError> {
        self.get_with(key, |text| Ok::<_, ParseSizeError>(text.parse::<ByteSize>()?.0))
    }

    /// A size that is at least 1.
    pub(super) fn positive_size(&self, key: &'static str) -> Result<Option<u64>, ParseLayerError> {
        let size = self.size(key)?;
        match size {
            Some(0) => Err(self.wrong(key, "0", "it must be more than nothing".to_owned())),
            size => Ok(size),
        }
    }

    pub(super) fn duration(&self, key: &'static str) -> Result<Option<Duration>, ParseLayerError> {
        self.get_with(key, parse_duration)
    }

    pub(super) fn yes(&self, key: &'static str, default: bool) -> Result<bool, ParseLayerError> {
        let yes = self.get_with(key, |text| match text {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err("write true or false"),
        })?;
        Ok(yes.unwrap_or(default))
    }

    pub(super) fn wrong(&self, key: &'static str, value: &str, why: String) -> ParseLayerError {
        ParseLayerError::Value { layer: self.layer.name, key, value: value.to_owned(), why }
    }

    pub(super) fn combination(&self, why: impl Into<String>) -> ParseLayerError {
        ParseLayerError::Combination { layer: self.layer.name, why: why.into() }
    }
}

impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.layer.name)?;
        self.given.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

impl PartialEq for LayerHelp {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for LayerHelp {}

fn unknown_parameter(layer: &'static LayerHelp, key: &str) -> ParseLayerError {
    let known = match layer.parameters {
        [] => "it takes none".to_owned(),
        parameters => format!("it has {}", list(parameters.iter().map(|parameter| parameter.name))),
    };
    ParseLayerError::UnknownParameter { layer: layer.name, key: key.to_owned(), known }
}

/// `a, b and c`
pub(super) fn list(words: impl Iterator<Item = &'static str>) -> String {
    let words: Vec<_> = words.collect();
    match words.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// `20ms`, `1.5s`, `100us`; a number alone is seconds, as other tools read it.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write a time: a number with one of ns, us, ms, s, m (20ms, 1.5s)".to_owned();
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let seconds = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let cases = [
            ("20ms", Duration::from_millis(20)),
            ("1.5s", Duration::from_millis(1500)),
            ("2", Duration::from_secs(2)),
            ("100us", Duration::from_micros(100)),
            ("7ns", Duration::from_nanos(7)),
            ("1m", Duration::from_secs(60)),
            ("0", Duration::ZERO),
        ];
        for (text, duration) in cases {
            assert_eq!(parse_duration(text), Ok(duration), "{text}");
        }
        for text in ["", "ms", "-1s", "1h", "1.2.3s", "1e9s", "20 ms", "99999999999999999999999s", "."] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}

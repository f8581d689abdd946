//! Results: one JSON object on a line for each case of each round, appended when it is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Set by Ctrl-C and SIGTERM.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Ctrl-C and SIGTERM no longer end this process at once, so that what it mounted is unmounted: the child that runs
/// gets the terminal's Ctrl-C itself, and no further case begins.
pub(crate) fn stop_between_cases_when_interrupted() -> Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&INTERRUPTED)).context("cannot handle signals")?;
    }
    Ok(())
}

/// What one case came to in one round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// `start`, `seed`, `read`, `clone`.
    pub bench: String,
    /// What all cases of a comparison have in common, such as the link.
    pub setting: String,
    /// What is compared.
    pub case: String,
    /// From 0.
    pub round: u32,
    /// The options that make the case what it is, of benchmarks that run a matrix: what a report groups by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// Values by name; the name ends in the unit (`total_seconds`, `wire_bytes`).
    pub metrics: BTreeMap<String, f64>,
    /// What was found out about the case while it was measured.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
    /// Why this machine cannot run the case. Such a record has no metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
    /// Seconds since the epoch.
    pub time: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Processors that could be used.
    pub processors: usize,
    /// loam's version and profile.
    pub loam: String,
}

/// The metrics of one case: name and value.
pub(crate) type Metrics = BTreeMap<String, f64>;

/// What is measured: names it in the results, and tells whether they have it already.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Case {
    /// As [`Record::bench`].
    pub(crate) bench: &'static str,
    /// As [`Record::setting`].
    pub(crate) setting: String,
    /// As [`Record::case`].
    pub(crate) case: String,
    /// As [`Record::round`].
    pub(crate) round: u32,
    /// As [`Record::options`].
    pub(crate) options: BTreeMap<String, String>,
}

/// What makes two records measurements of the same: kernels are compared, so each has its own.
type Key = (String, String, String, u32, BTreeMap<String, String>, String);

/// Appends records to a file and knows which ones it has.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    done: BTreeSet<Key>,
    /// Cases that could not be run, and why.
    unavailable: BTreeSet<(Key, String)>,
    kernel: String,
}

impl Recorder {
    /// Opens or makes the file. A last line that was cut off by a crash is left out.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds something else.
    pub fn open(path: &Path) -> Result<Self> {
        let (mut done, mut unavailable) = (BTreeSet::new(), BTreeSet::new());
        for record in if path.exists() { load(path)? } else { Vec::new() } {
            let Record { bench, setting, case, round, options, kernel, .. } = record;
            let key = (bench, setting, case, round, options, kernel);
            match record.unavailable {
                None => _ = done.insert(key),
                Some(reason) => _ = unavailable.insert((key, reason)),
            }
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path);
        if let (Ok(file), Ok(text)) = (&mut file, std::fs::read(path))
            && text.last().is_some_and(|last| *last != b'\n')
        {
            file.write_all(b"\n")?;
        }
        let file = file.with_context(|| format!("cannot append to {}", path.display()))?;
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(Recorder { file, done, unavailable, kernel })
    }

    fn key(&self, case: &Case) -> Key {
        let Case { bench, setting, case, round, options } = case.clone();
        (bench.to_string(), setting, case, round, options, self.kernel.clone())
    }

    /// Whether this round of this case was measured already, under this kernel.
    pub(crate) fn has(&self, case: &Case) -> bool {
        self.done.contains(&self.key(case))
    }

    /// Measures a case that has no options.
    ///
    /// # Errors
    /// As [`Recorder::measure_with_facts`].
    pub(crate) fn measure(
        &mut self,
        (bench, setting, case, round): (&'static str, &str, &str, u32),
        measure: impl FnOnce() -> Result<Metrics>,
    ) -> Result<()> {
        let (setting, case) = (setting.to_string(), case.to_string());
        let case = Case { bench, setting, case, round, options: BTreeMap::new() };
        self.measure_case(&case, measure)
    }

    /// Measures a case of which nothing else is to be noted.
    ///
    /// # Errors
    /// As [`Recorder::measure_with_facts`].
    pub(crate) fn measure_case(
        &mut self,
        case: &Case,
        measure: impl FnOnce() -> Result<Metrics>,
    ) -> Result<()> {
        self.measure_with_facts(case, &BTreeMap::new(), measure)
    }

    /// Measures a case unless the file has it, appends it with what is known of it, and says so on stderr.
    ///
    /// # Errors
    /// Those of `measure`, with the case's name, and those of writing.
    pub(crate) fn measure_with_facts(
        &mut self,
        case: &Case,
        facts: &BTreeMap<String, String>,
        measure: impl FnOnce() -> Result<Metrics>,
    ) -> Result<()> {
        if self.has(case) {
            return Ok(());
        }
        stop_if_interrupted()?;
        let name = format!("{}, {}, {}, round {}", case.bench, case.setting, case.case, case.round);
        let metrics = measure().with_context(|| name.clone())?;
        let shown = metrics.iter().filter(|(name, _)| !is_of_a_curve(name));
        let shown: Vec<_> = shown.map(|(name, value)| format!("{name} {value:.4}")).collect();
        eprintln!("{name}: {}", shown.join(", "));
        self.append(case, facts.clone(), metrics, None)?;
        self.done.insert(self.key(case));
        Ok(())
    }

    /// Notes that this machine cannot run a case, once for each reason.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn unavailable(&mut self, case: &Case, reason: &str) -> Result<()> {
        if !self.has(case) && self.unavailable.insert((self.key(case), reason.to_string())) {
            eprintln!("{}, {}, {}: not available: {reason}", case.bench, case.setting, case.case);
            self.append(case, BTreeMap::new(), Metrics::new(), Some(reason.to_string()))?;
        }
        Ok(())
    }

    fn append(
        &mut self,
        case: &Case,
        facts: BTreeMap<String, String>,
        metrics: Metrics,
        unavailable: Option<String>,
    ) -> Result<()> {
        let Case { bench, setting, case, round, options } = case.clone();
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        let record = Record {
            bench: bench.to_string(),
            setting,
            case,
            round,
            options,
            metrics,
            facts,
            unavailable,
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            kernel: self.kernel.clone(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            loam: format!("{} {profile}", env!("CARGO_PKG_VERSION")),
        };
        let mut line = serde_json::to_string(&record)?;
        line.push('\n');
        Ok(self.file.write_all(line.as_bytes())?)
    }
}

/// Whether a metric is a point of a curve that a line of text has no room for: a percentile but for the median and the
/// 99th.
fn is_of_a_curve(metric: &str) -> bool {
    let last = metric.strip_suffix("_us").and_then(|name| name.rsplit('_').next());
    let percentile = last.and_then(|name| name.strip_prefix('p'));
    percentile.is_some_and(|number| number.parse::<f64>().is_ok() && number != "50" && number != "99")
}

/// Whether Ctrl-C or SIGTERM came: no further case begins.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// For long cases, whose results would be of no use.
///
/// # Errors
/// Ctrl-C or SIGTERM came.
pub(crate) fn stop_if_interrupted() -> Result<()> {
    if interrupted() {
        bail!("interrupted; the same command goes on from here");
    }
    Ok(())
}

/// Reads all records of a file. A last line that was cut off is left out.
///
/// # Errors
/// The file cannot be read, or a line before the last is no record.
pub fn load(path: &Path) -> Result<Vec<Record>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let lines: Vec<String> = BufReader::new(file).lines().collect::<Result<_, _>>()?;
    let mut records = Vec::with_capacity(lines.len());
    for (number, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(error) if error.is_eof() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("{}:{}: no record", path.display(), number + 1));
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_percentiles_two_are_shown() {
        for (metric, hidden) in
            [("p99.9_us", true), ("sync_p95_us", true), ("sync_p99_us", false), ("p50_us", false)]
        {
            assert_eq!(is_of_a_curve(metric), hidden, "{metric}");
        }
        assert!(!is_of_a_curve("commit_us_per_write") && !is_of_a_curve("rename_mean_us"));
    }

    #[test]
    fn a_run_goes_on_where_it_was_even_after_a_torn_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("results.jsonl");
        let mut runs = 0;
        let mut measure = |recorder: &mut Recorder, round| {
            recorder
                .measure(("start", "link", "case", round), || {
                    runs += 1;
                    Ok(Metrics::from([("total_seconds".to_string(), 0.5)]))
                })
                .unwrap();
        };
        measure(&mut Recorder::open(&path).unwrap(), 0);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"bench\":\"sta");
        std::fs::write(&path, torn).unwrap();
        let mut recorder = Recorder::open(&path).unwrap();
        measure(&mut recorder, 0);
        measure(&mut recorder, 1);
        assert_eq!(runs, 2);
        assert_eq!(load(&path).unwrap().len(), 2);
    }
}

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
    /// `start`, `seed` or `read`.
    pub bench: String,
    /// What all cases of a comparison have in common, such as the link.
    pub setting: String,
    /// What is compared.
    pub case: String,
    /// From 0.
    pub round: u32,
    /// Values by name; the name ends in the unit (`total_seconds`, `wire_bytes`).
    pub metrics: BTreeMap<String, f64>,
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

/// Appends records to a file and knows which ones it has.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    done: BTreeSet<(String, String, String, u32)>,
}

impl Recorder {
    /// Opens or makes the file. A last line that was cut off by a crash is left out.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds something else.
    pub fn open(path: &Path) -> Result<Self> {
        let done = match path.exists() {
            true => load(path)?.into_iter().map(|r| (r.bench, r.setting, r.case, r.round)).collect(),
            false => BTreeSet::new(),
        };
        let mut file = OpenOptions::new().create(true).append(true).open(path);
        if let (Ok(file), Ok(text)) = (&mut file, std::fs::read(path))
            && text.last().is_some_and(|last| *last != b'\n')
        {
            file.write_all(b"\n")?;
        }
        Ok(Recorder { file: file.with_context(|| format!("cannot append to {}", path.display()))?, done })
    }

    /// Whether this round of this case was measured already.
    pub fn has(&self, bench: &str, setting: &str, case: &str, round: u32) -> bool {
        self.done.contains(&(bench.to_string(), setting.to_string(), case.to_string(), round))
    }

    /// Measures a case unless the file has it, appends it and says so on stderr.
    ///
    /// # Errors
    /// Those of `measure`, with the case's name, and those of writing.
    pub(crate) fn measure(
        &mut self,
        (bench, setting, case, round): (&str, &str, &str, u32),
        measure: impl FnOnce() -> Result<Metrics>,
    ) -> Result<()> {
        if self.has(bench, setting, case, round) {
            return Ok(());
        }
        if INTERRUPTED.load(Ordering::SeqCst) {
            bail!("interrupted; the same command goes on from here");
        }
        let metrics = measure().with_context(|| format!("{bench}, {setting}, {case}, round {round}"))?;
        let shown: Vec<_> = metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        eprintln!("{bench}, {setting}, {case}, round {round}: {}", shown.join(", "));
        let record = Record {
            bench: bench.to_string(),
            setting: setting.to_string(),
            case: case.to_string(),
            round,
            metrics,
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            loam: format!(
                "{} {}",
                env!("CARGO_PKG_VERSION"),
                if cfg!(debug_assertions) { "debug" } else { "release" }
            ),
        };
        let mut line = serde_json::to_string(&record)?;
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        self.done.insert((record.bench, record.setting, record.case, record.round));
        Ok(())
    }
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

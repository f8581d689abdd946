//! Progress bars on standard error, when that is a terminal and no JSON is asked for.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use loam_pool::Watch;
use loam_pool::protocol::Progress;

/// The bar of one long command.
pub(crate) struct Bar {
    bar: ProgressBar,
    step: Mutex<String>,
}

impl Bar {
    /// A bar that shows nothing until it is told something.
    pub(crate) fn new(json: bool) -> Arc<Self> {
        let visible = !json && std::io::stderr().is_terminal();
        let target =
            if visible { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        Arc::new(Bar { bar: ProgressBar::with_draw_target(None, target), step: Mutex::default() })
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Shows how far it is.
    pub(crate) fn update(&self, progress: &Progress) {
        let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        if *step != progress.step {
            step.clone_from(&progress.step);
            self.bar.reset();
            self.bar.set_style(style(progress));
            self.bar.set_message(progress.step.clone());
            self.bar.enable_steady_tick(Duration::from_millis(100));
        }
        if progress.total > 0 {
            self.bar.set_length(progress.total);
        }
        self.bar.set_position(progress.done);
    }
}

impl Watch for Bar {
    fn progress(&self, step: &str, done: u64, total: u64, unit: &str) {
        self.update(&Progress { step: step.to_owned(), done, total, unit: unit.to_owned() });
    }

    fn note(&self, note: String) {
        self.bar.suspend(|| eprintln!("loam: {note}"));
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn style(progress: &Progress) -> ProgressStyle {
    let template = match (progress.unit.as_str(), progress.total > 0) {
        ("bytes", true) => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        ("bytes", false) => "{msg} {spinner} {bytes} {bytes_per_sec}",
        (_, true) => "{msg} {wide_bar} {human_pos}/{human_len} {per_sec} {eta}",
        (_, false) => "{msg} {spinner} {human_pos}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

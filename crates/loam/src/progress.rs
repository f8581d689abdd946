//! Progress bars on standard error, when that is a terminal and no JSON is asked for.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use loam_pool::protocol::Progress;

/// The bar of one long command.
pub(crate) struct Bar {
    bar: ProgressBar,
    step: String,
}

impl Bar {
    /// A bar that shows nothing until it is told something.
    pub(crate) fn new(json: bool) -> Self {
        let visible = !json && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        Bar { bar: ProgressBar::with_draw_target(None, target), step: String::new() }
    }

    /// Shows how far it is.
    pub(crate) fn update(&mut self, progress: &Progress) {
        if self.step != progress.step {
            self.step.clone_from(&progress.step);
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

    /// Prints a note above the bar.
    pub(crate) fn note(&self, note: &str) {
        self.bar.suspend(|| eprintln!("loam: {note}"));
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
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

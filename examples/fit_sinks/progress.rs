//! What can be seen while the student learns.

use indicatif::{ProgressBar, ProgressStyle};

use crate::fit::Step;

/// A live line in a terminal; elsewhere, as in a log, a plain line for every tenth of the steps.
pub struct Progress {
    bar: ProgressBar,
    steps: usize,
    done: usize,
}

impl Progress {
    pub fn new(steps: usize) -> Self {
        let bar = ProgressBar::new(steps as u64);
        let style = ProgressStyle::with_template("{bar:20} {percent:>3}% {wide_msg}").expect("a valid template");
        bar.set_style(style.progress_chars("=> "));
        Progress { bar, steps, done: 0 }
    }

    pub fn update(&mut self, step: &Step) {
        let tenths = |done| 10 * done / self.steps;
        let next_tenth = tenths(self.done + 1) > tenths(self.done);
        self.done += 1;
        if self.bar.is_hidden() && !next_tenth {
            return;
        }
        let sinks: Vec<String> = step.sink_logits.iter().map(|sink| format!("{sink:.2}")).collect();
        // Short enough for a line of 80 columns.
        let status = format!("loss {:.1e}, sink logits {}", step.loss, sinks.join(" "));
        if self.bar.is_hidden() {
            eprintln!("{:>3}% {status}", 100 * self.done / self.steps);
        } else {
            self.bar.set_position(self.done as u64);
            self.bar.set_message(status);
        }
    }

    /// Leaves the last line standing.
    pub fn finish(self) {
        self.bar.abandon();
    }
}

//! What can be seen while the stream runs.

use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::stream::Stream;

/// Often enough for the eye, seldom enough to cost nothing.
const REDRAW: Duration = Duration::from_millis(100);

/// A live line in a terminal; elsewhere, as in a log, a plain line for every tenth of the stream.
pub struct Progress {
    bar: ProgressBar,
    tokens: usize,
    /// Where this process began.
    from: usize,
    tenths: usize,
    started: Instant,
    drawn: Instant,
    memory: Option<Memory>,
}

/// The process's resident memory.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// After the first tenth of the stream, or the first chunk if that is longer.
    pub first: u64,
    /// After the last chunk.
    pub last: u64,
}

impl Progress {
    pub fn new(from: usize, tokens: usize) -> Self {
        let bar = ProgressBar::new(tokens as u64);
        let style = ProgressStyle::with_template("{bar:6} {percent:>3}% {wide_msg}").expect("a valid template");
        bar.set_style(style.progress_chars("=> "));
        let now = Instant::now();
        let tenths = 10 * from / tokens.max(1);
        Progress { bar, tokens, from, tenths, started: now, drawn: now, memory: None }
    }

    pub fn update(&mut self, stream: &Stream<'_>) {
        let done = stream.position;
        let tenths = 10 * done / self.tokens;
        let next_tenth = tenths > self.tenths;
        self.tenths = tenths;
        if !next_tenth && (self.bar.is_hidden() || self.drawn.elapsed() < REDRAW) {
            return;
        }
        let resident = memory_stats::memory_stats().map(|stats| stats.physical_mem as u64);
        if let Some(last) = resident.filter(|_| next_tenth) {
            self.memory = Some(Memory { first: self.memory.map_or(last, |memory| memory.first), last });
        }
        let status = self.status(stream, resident);
        if self.bar.is_hidden() {
            eprintln!("{:>3}% {status}", 10 * tenths);
        } else {
            self.bar.set_position(done as u64);
            self.bar.set_message(status);
            self.drawn = Instant::now();
        }
    }

    fn status(&self, stream: &Stream<'_>, resident: Option<u64>) -> String {
        let lanes = stream.lanes.iter().filter(|lane| !lane.has_ended(&stream.scene, stream.position));
        let sizes = lanes.filter_map(|lane| {
            let last = lane.record.series.stretches.last()?.mean();
            Some(format!(", {} {:.3}", lane.policy.name(), last.size.sqrt()))
        });
        // Short enough for a line of 80 columns.
        format!(
            "{} tokens/s, {}, rms{}",
            HumanCount(self.rate(stream.position) as u64),
            resident.map_or("memory unknown".into(), |bytes| HumanBytes(bytes).to_string()),
            sizes.collect::<String>().trim_start_matches(','),
        )
    }

    /// Tokens a second of this process.
    pub fn rate(&self, position: usize) -> f64 {
        (position - self.from) as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// Leaves the last line standing. Memory is `None` where the system does not tell it.
    pub fn finish(self) -> Option<Memory> {
        self.bar.abandon();
        self.memory
    }
}

pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

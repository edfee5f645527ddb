//! The figures: a table for people, and an object for programs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use sink_attention::plan::Pass;
use sink_attention::timing::{Clock, Series};
use sink_attention::{Attention, Problem, SinkLogits};

use super::measure::{Direction, Timing};
use super::peaks::Peaks;

/// All measurements.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    pub device: String,
    /// The reason for this device.
    pub device_reason: String,
    /// Empty if there is no driver, or if it does not say.
    driver: String,
    clock: String,
    /// Sequences are shorter than they would be on a GPU.
    shortened: bool,
    pub rows: Vec<Row>,
    #[serde(skip)]
    pub peaks: Option<Peaks>,
}

/// One pass of one problem.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seq_q: usize,
    seq_k: usize,
    head_dim: usize,
    value_dim: usize,
    causal: bool,
    /// Keys visible up to the query's own one, itself included.
    window: Option<usize>,
    sink_tokens: usize,
    sink_logits: bool,
    pub dtype: String,
    pub pass: &'static str,
    problem: String,
    #[serde(flatten)]
    pub figures: Option<Figures>,
    /// The reason why there are no figures.
    skipped: Option<String>,
}

/// The figures of a pass.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// The micro-kernels, or the CPU path.
    kernel: String,
    #[serde(flatten)]
    times: Times,
    pub tflops: f64,
    gb_per_s: f64,
    /// Shares of the device's peaks, if these are known.
    peak_share: Option<f64>,
    bandwidth_share: Option<f64>,
    /// The time to compose and compile the kernels, without help and with a persistent pipeline cache.
    first_call_ms: Option<f64>,
    cached_first_call_ms: Option<f64>,
    kernels: Vec<KernelTimes>,
}

#[derive(Debug, Serialize)]
struct KernelTimes {
    kernel: String,
    /// The plan in short: micro-kernel, tiles, registers, workgroup memory and workgroups.
    plan: String,
    /// The micro-kernel and its tiles, in the form of --tiles. None if the kernel has no tiles.
    tiles: Option<String>,
    /// The time of the kernel by itself, if that was asked for.
    #[serde(flatten)]
    times: Option<Times>,
}

#[derive(Debug, Serialize)]
struct Times {
    /// The median, in milliseconds.
    ms: f64,
    min_ms: f64,
    max_ms: f64,
    runs: usize,
    /// The maximum is over 1.5 times the minimum.
    disturbed: bool,
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Times {
    fn new(series: &Series) -> Self {
        Times {
            ms: milliseconds(series.median()),
            min_ms: milliseconds(series.min()),
            max_ms: milliseconds(series.max()),
            runs: series.runs(),
            disturbed: series.disturbed(),
        }
    }
}

impl KernelTimes {
    fn new(pass: &Pass, series: Option<&Series>) -> Self {
        let run = match (pass.variant.sanitize, pass.variant.fallback) {
            (true, _) => " again",
            (_, Some(_)) => " fallback",
            _ => "",
        };
        KernelTimes {
            kernel: format!("{}{run}", pass.variant.kernel.name()),
            plan: pass.to_string(),
            tiles: pass.variant.tiling.map(|tiling| tiling.to_string()),
            times: series.map(Times::new),
        }
    }
}

impl Report {
    pub fn new(attention: &Attention, clock: Option<Clock>, shortened: bool) -> Self {
        let info = attention.device().map(|device| device.wgpu().adapter_info());
        Report {
            version: env!("CARGO_PKG_VERSION"),
            device: attention.device_name(),
            device_reason: attention.device_reason().to_string(),
            peaks: info.as_ref().and_then(|info| Peaks::of(&info.name)),
            driver: info.map_or(String::new(), |info| format!("{} {}", info.driver, info.driver_info).trim().into()),
            clock: clock.map_or("wall clock of the CPU path".into(), |clock| clock.to_string()),
            shortened,
            rows: Vec::new(),
        }
    }

    /// An error if no row has figures, which must not look like a success.
    pub fn verdict(&self) -> Result<(), String> {
        let skipped = |row: &Row| row.skipped.clone();
        match self.rows.iter().map(skipped).collect::<Option<Vec<_>>>().as_deref() {
            Some([reason, ..]) => Err(format!("nothing could be measured on {}: {reason}", self.device)),
            _ => Ok(()),
        }
    }
}

impl Row {
    pub fn new(
        name: &str,
        problem: &Problem,
        direction: Direction,
        timing: Result<Timing, String>,
        peaks: Option<Peaks>,
    ) -> Self {
        let (shape, options) = (problem.shape(), problem.options());
        let (timing, skipped) = match timing {
            Ok(timing) => (Some(timing), None),
            Err(reason) => (None, Some(reason)),
        };
        Row {
            name: name.into(),
            batch: shape.batch,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            seq_q: shape.seq_q,
            seq_k: shape.seq_k,
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            causal: options.causal,
            window: options.window.left.map(|left| left + 1),
            sink_tokens: options.sink_tokens,
            sink_logits: options.sink_logits != SinkLogits::None,
            dtype: options.dtype.to_string(),
            pass: direction.name(),
            problem: problem.to_string(),
            figures: timing.map(|timing| Figures::new(problem, direction, &timing, peaks)),
            skipped,
        }
    }
}

impl Figures {
    fn new(problem: &Problem, direction: Direction, timing: &Timing, peaks: Option<Peaks>) -> Self {
        let times = Times::new(&timing.series);
        // A clock that is too coarse gives no rate.
        let rate = |work: f64, unit: f64| if times.ms > 0.0 { work / (times.ms * 1e-3) / unit } else { 0.0 };
        let (tflops, gb_per_s) = (rate(direction.flops(problem), 1e12), rate(direction.bytes(problem), 1e9));
        let kernels = timing.kernels.iter();
        Figures {
            kernel: timing.kernel.clone(),
            tflops,
            gb_per_s,
            peak_share: peaks.map(|peaks| tflops / peaks.tflops(problem.options().dtype)),
            bandwidth_share: peaks.map(|peaks| gb_per_s / peaks.bandwidth),
            first_call_ms: timing.first_call.map(|first| milliseconds(first.cold)),
            cached_first_call_ms: timing.first_call.and_then(|first| first.warm).map(milliseconds),
            kernels: kernels.map(|(pass, series)| KernelTimes::new(pass, series.as_ref())).collect(),
            times,
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} ms)", short(self.tflops), short(self.times.ms))
    }
}

/// A number with three significant digits, or fewer for a small one.
fn short(x: f64) -> String {
    let decimals = if x >= 100.0 || x == 0.0 { 0 } else { (2 - x.log10().floor() as i32).clamp(0, 4) };
    format!("{x:.0$}", decimals as usize)
}

fn percent(share: Option<f64>) -> String {
    share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share))
}

const HEAD: [&str; 12] =
    ["shape", "dtype", "pass", "ms", "min", "max", "TFLOP/s", "of peak", "GB/s", "of peak", "first ms", "cached ms"];

impl Row {
    /// A line of the table, and one for each kernel.
    fn lines(&self) -> Vec<[String; 12]> {
        let Some(figures) = &self.figures else { return Vec::new() };
        let times = |times: &Times| {
            let mark = if times.disturbed { "*" } else { "" };
            [short(times.ms), short(times.min_ms), short(times.max_ms) + mark]
        };
        let first = |ms: Option<f64>| ms.map_or(String::new(), short);
        let [ms, min, max] = times(&figures.times);
        let mut lines = vec![[
            self.name.clone(),
            self.dtype.clone(),
            self.pass.into(),
            ms,
            min,
            max,
            short(figures.tflops),
            percent(figures.peak_share),
            short(figures.gb_per_s),
            percent(figures.bandwidth_share),
            first(figures.first_call_ms),
            first(figures.cached_first_call_ms),
        ]];
        for kernel in &figures.kernels {
            let Some(alone) = &kernel.times else { continue };
            let [ms, min, max] = times(alone);
            let mut line = [const { String::new() }; 12];
            [line[2], line[3], line[4], line[5]] = [format!("- {}", kernel.kernel), ms, min, max];
            lines.push(line);
        }
        lines
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Device: {}: {}", self.device, self.device_reason)?;
        if !self.driver.is_empty() {
            writeln!(f, "Driver: {}", self.driver)?;
        }
        writeln!(f, "Times:  {}, the median first", self.clock)?;
        if self.shortened {
            writeln!(
                f,
                "Note:   no GPU, so the sequences are 32 times shorter (as by --quick); --seq-k sets a length"
            )?;
        }
        writeln!(f)?;
        let mut names: Vec<(&str, &str)> =
            self.rows.iter().map(|row| (row.name.as_str(), row.problem.as_str())).collect();
        names.dedup();
        for (name, problem) in names {
            writeln!(f, "{name}: {problem}")?;
        }
        let lines: Vec<[String; 12]> = self.rows.iter().flat_map(Row::lines).collect();
        if !lines.is_empty() {
            let width = |column: usize| {
                let cells = lines.iter().map(|line| line[column].len());
                cells.max().unwrap_or(0).max(HEAD[column].len())
            };
            let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
            let mut line = |cells: [&str; 12], fill: char| {
                for (column, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
                    let space = fill.to_string().repeat(width - cell.len());
                    let [before, after] = if column < 3 { ["", &*space] } else { [&*space, ""] };
                    write!(f, "| {before}{cell}{after} ")?;
                }
                writeln!(f, "|")
            };
            line(HEAD, ' ')?;
            line([""; 12], '-')?;
            for cells in &lines {
                line(cells.each_ref().map(String::as_str), ' ')?;
            }
        }
        for row in &self.rows {
            for kernel in row.figures.iter().flat_map(|figures| &figures.kernels) {
                writeln!(f, "{} {} {}: {}", row.name, row.dtype, row.pass, kernel.plan)?;
            }
            if let Some(reason) = &row.skipped {
                writeln!(f, "left out: {} {} {}: {reason}", row.name, row.dtype, row.pass)?;
            }
        }
        if lines.iter().any(|line| line[5].ends_with('*')) {
            writeln!(f, "* over 1.5 times the minimum: the series was disturbed, measure again")?;
        }
        if lines.iter().all(|line| line[10].is_empty()) {
            return Ok(());
        }
        write!(
            f,
            "first ms: composing and compiling the kernels; cached ms: the same from a persistent pipeline cache. The \
             driver's own cache may help both."
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sink_attention::{Options, Shape};

    use super::*;

    /// A size that does not fit has its reason in the report, and spoils nothing. A report of such sizes alone is no success.
    #[test]
    fn what_is_left_out_has_its_reason() {
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 64, seq_k: 64, head_dim: 8, value_dim: 8 };
        let problem = Problem::new(shape, Options::new()).unwrap();
        let row = |timing| Row::new("some", &problem, Direction::Forward, timing, Peaks::of("NVIDIA H200"));
        let mut report = Report::new(&Attention::cpu(), None, false);
        report.rows.push(row(Err("too large".into())));
        assert!(report.verdict().unwrap_err().contains("too large"));
        let series = Series::new([1, 2].map(Duration::from_millis).into()).unwrap();
        let timing = Timing { kernel: "portable".into(), series, kernels: Vec::new(), first_call: None };
        report.rows.push(row(Ok(timing)));
        assert_eq!(report.verdict(), Ok(()));
        let text = report.to_string();
        assert!(text.contains("left out: some f32 forward: too large"), "{text}");
        assert!(text.contains("2.00* |") && text.contains("the series was disturbed"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["rows"][0]["skipped"], json["rows"][0].get("ms")), (&"too large".into(), None));
        let share = 2.0 * 64.0 * 64.0 * 16.0 / 2e-3 / 67e12;
        assert!((json["rows"][1]["peak_share"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{json}");
    }

    #[test]
    fn three_digits() {
        for (x, text) in [
            (0.0, "0"),
            (0.00012, "0.0001"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1234.5, "1234"),
        ] {
            assert_eq!(short(x), text);
        }
    }
}

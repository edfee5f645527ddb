//! `sink-attention bench`: how fast this device is.

mod decode;
mod measure;
mod peaks;
mod picture;
mod report;

use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use serde::Serialize;
use sink_attention::cache::DecodeTiling;
use sink_attention::device::is_software;
use sink_attention::plan::{Kernel, Preference, Tiling};
use sink_attention::timing::Timer;
use sink_attention::{
    Attention, Axes as PairAxes, DType, Layout, Lengths, Options, Problem, Shape, SinkLogits, Window,
};

use self::measure::{Direction, Effort, on_cpu, on_gpu};
use self::report::{Report, Row};
use crate::plan::{Axes, Sinks, at_least_one};
use crate::shared::{DeviceArgs, ElementType, Progress, check_writable, print, write_file};

/// Long sequences are this many times shorter on devices without GPU.
const QUICK: usize = 32;
/// A series that takes longer than this is cut short.
const MOST: Duration = Duration::from_secs(3);
const MOST_QUICK: Duration = Duration::from_millis(500);

/// Measure how fast this device is, forward and backward
///
/// Without arguments: layers of GPT-OSS (with and without its window of 128 keys) and Llama 3, and a small one, with one
/// sequence, causal, with sink logits. Any number given changes all of them or, without --shape, replaces them by one
/// shape. Times are the GPU's own timestamps after a warm-up, or the wall clock where there are none. FLOPs are counted
/// by the field's convention: two for each multiply-add of both matrix products over the visible pairs, and 2.5 times
/// that backward. GB/s count each operand and result once.
#[derive(Debug, Args)]
pub struct Bench {
    #[command(flatten, next_help_heading = "Device")]
    device: DeviceArgs,

    /// Element types to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TYPES", default_value = "f32")]
    dtype: Vec<ElementType>,

    /// Passes to measure
    #[arg(long, value_enum, default_value_t)]
    pass: PassArg,

    /// Measure each kernel of a pass by itself, too
    #[arg(long)]
    passes: bool,

    /// Tiles of a kernel, for measuring them: "forward=cooperative 4x3x1x2" (subgroups, row and column fragments, stages), or "d_q=portable
    /// 64x32 (16x8 threads of 4x4), k_step 32, n_step 16"; both may end with hints for loops, such as ", loops keep inner unroll"; once
    /// for each kernel
    #[arg(long, value_name = "KERNEL=TILES", value_parser = kernel_tiles)]
    tiles: Vec<(Kernel, Tiling)>,

    /// Measure decoding from caches instead: few queries (--seq-q, 1 by default) against cached keys, contiguous and paged; GB/s
    /// count keys and values once. Without arguments: gpt-oss with 131072 keys, one sequence and eight, and with 4096 keys. A
    /// step is an append of the queries' own keys and values with a rotary embedding, and the decoding
    #[arg(long, conflicts_with_all = ["pass", "passes", "tiles", "svg", "shape", "with", "full", "layout"])]
    decode: bool,

    /// Tokens of a page of the paged caches
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", default_values_t = [16, 128], requires = "decode")]
    page_size: Vec<usize>,

    /// Caches of q8_0: blocks of 32 with a scale
    #[arg(long, requires = "decode")]
    quantised: bool,

    /// Decode with ALiBi
    #[arg(long, requires = "decode")]
    alibi: bool,

    /// Decode with a mask among the new tokens, a tree in which each has two successors; the caches have no rotary embedding then
    #[arg(long, requires = "decode")]
    tree: bool,

    /// How the decode kernel divides its work: "32x8 rows 8, steps 4 by 2, splits 330" (threads of a workgroup x threads that
    /// share a key, rows of a workgroup, keys that a thread loads at a time and exchanges at once, splits of the keys at most)
    #[arg(long, value_name = "TILING", requires = "decode")]
    decode_tiling: Option<DecodeTiling>,

    /// Runs in a series
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,

    /// Sequences 32 times shorter, and fewer runs; chosen by itself on devices without GPU where no length is given
    #[arg(long)]
    quick: bool,

    /// Write the figures to this file as a JSON object; "-" prints it instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the figures into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    shape: ShapeArgs,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum PassArg {
    Forward,
    Backward,
    #[default]
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Named {
    /// H=64 G=8 D=64 N=8192
    GptOss,
    /// The same with a window of 128 keys
    Window,
    /// H=32 G=8 D=128 N=8192
    Llama,
    /// H=16 G=16 D=64 N=4096
    Seed,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Shape")]
struct ShapeArgs {
    /// Only these of the default shapes
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    shape: Vec<Named>,

    /// Sequences in the batch, B
    #[arg(long, value_name = "B")]
    batch: Option<usize>,

    /// Query heads, H
    #[arg(long, value_name = "H")]
    heads: Option<usize>,

    /// Key/value heads, G
    #[arg(long, value_name = "G")]
    kv_heads: Option<usize>,

    /// Queries, M [default: as many as keys]
    #[arg(long, value_name = "M")]
    seq_q: Option<usize>,

    /// Keys, N
    #[arg(long, value_name = "N")]
    seq_k: Option<usize>,

    /// Width of q and k, D
    #[arg(long, value_name = "D")]
    head_dim: Option<usize>,

    /// Width of v and o, E [default: as q and k]
    #[arg(long, value_name = "E")]
    value_dim: Option<usize>,

    /// No key after the query's position, which is the default
    #[arg(long, conflicts_with = "full")]
    causal: bool,

    /// Every key, before and after
    #[arg(long)]
    full: bool,

    /// Keys visible up to the query's position, its own included
    #[arg(long, value_name = "KEYS", value_parser = at_least_one, conflicts_with = "full")]
    window: Option<usize>,

    /// First keys that stay visible under a window
    #[arg(long, value_name = "KEYS", default_value_t = 0)]
    sink_tokens: usize,

    /// Sink logits: learned numbers in the softmax's denominator
    #[arg(long, value_enum, value_name = "KIND", default_value = "per-head")]
    sinks: Sinks,

    /// Order of the axes of the operands
    #[arg(long, value_enum, default_value_t)]
    layout: Axes,

    /// Measure each shape with each of these, too, beside itself without
    #[arg(long, value_enum, value_delimiter = ',', value_name = "OPTIONS")]
    with: Vec<With>,
}

/// An option to measure a shape with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum With {
    /// Scores capped at 30
    Softcap,
    /// ALiBi, with the gradient of its slopes
    Alibi,
    /// A bias for each pair of a query and a key, the same for every head, with its gradient
    Bias,
    /// A boolean mask for each pair, the same for every head, that is causal, in place of the causal option; TFLOP/s count what it
    /// hides, too
    Mask,
    /// A boolean mask for each pair, the same for every head, that hides one pair in 256, so that no tile is wholly hidden or
    /// visible
    Scattered,
    /// The batch's sequences one after the other (thd), in a list of lengths
    Lengths,
    /// The largest score of each row as a result of the forward pass
    RowMax,
}

fn kernel_tiles(text: &str) -> Result<(Kernel, Tiling), String> {
    let (name, tiling) = text.split_once('=').ok_or("want KERNEL=TILES, such as \"forward=cooperative 4x3x1x2\"")?;
    let known = Kernel::TILED.map(Kernel::name);
    let kernel = Kernel::TILED.into_iter().find(|kernel| kernel.name() == name);
    let kernel = kernel.ok_or_else(|| format!("unknown kernel {name:?}; known: {}", known.join(", ")))?;
    Ok((kernel, tiling.parse()?))
}

/// A shape to measure.
#[derive(Debug, Clone)]
struct Case {
    name: String,
    shape: Shape,
    options: Options,
    with: Option<With>,
}

impl Case {
    fn problem(&self, dtype: DType) -> sink_attention::Result<Problem> {
        let (shape, options) = (self.shape, self.options.dtype(dtype));
        let pairs = PairAxes::KEYS.seq_q();
        let options = match self.with {
            None | Some(With::RowMax) => options,
            Some(With::Softcap) => options.softcap(30.0),
            Some(With::Alibi) => options.alibi(true),
            Some(With::Bias) => options.bias(pairs).bias_dtype(dtype),
            Some(With::Mask) => options.causal(false).mask(pairs),
            Some(With::Scattered) => options.mask(pairs),
            Some(With::Lengths) => {
                let starts = |seq: usize| (0..=shape.batch).map(|n| (n * seq) as u32).collect::<Vec<_>>();
                let (q, k) = (starts(shape.seq_q), starts(shape.seq_k));
                let [seq_q, seq_k] = [shape.seq_q, shape.seq_k].map(|seq| seq * shape.batch);
                let lengths = Lengths::Cumulative { q: &q, k: &k };
                let shape = Shape { batch: 1, seq_q, seq_k, ..shape };
                return Problem::with_lengths(shape, options.layout(Layout::Thd), lengths);
            }
        };
        Problem::new(shape, options)
    }
}

impl ShapeArgs {
    /// The shapes that the arguments ask for. Sequences are shortened if no length is given.
    fn cases(&self, quick: bool) -> Vec<Case> {
        let sizes =
            [self.batch, self.heads, self.kv_heads, self.seq_q, self.seq_k, self.head_dim, self.value_dim, self.window];
        let custom = sizes.iter().any(Option::is_some) || self.full || self.causal;
        let of = |name: Option<&Named>| {
            let (label, [heads, kv_heads, width, seq], window) = match name {
                Some(Named::GptOss) => ("gpt-oss", [64, 8, 64, 8192], None),
                Some(Named::Window) => ("window", [64, 8, 64, 8192], Some(128)),
                Some(Named::Llama) => ("llama", [32, 8, 128, 8192], None),
                Some(Named::Seed) => ("seed", [16, 16, 64, 4096], None),
                None => ("custom", [32, 8, 64, 8192], None),
            };
            let heads = self.heads.unwrap_or(heads);
            let seq_k = self.seq_k.unwrap_or(if quick { seq / QUICK } else { seq });
            let head_dim = self.head_dim.unwrap_or(width);
            let shape = Shape {
                batch: self.batch.unwrap_or(1),
                heads,
                kv_heads: self.kv_heads.unwrap_or(if heads.is_multiple_of(kv_heads) { kv_heads } else { heads }),
                seq_q: self.seq_q.unwrap_or(seq_k),
                seq_k,
                head_dim,
                value_dim: self.value_dim.unwrap_or(head_dim),
            };
            let window = self.window.or(window).filter(|_| !self.full);
            let options = Options::new()
                .causal(!self.full)
                .window(window.map_or(Window::FULL, Window::keys))
                .sink_tokens(self.sink_tokens)
                .sink_logits(SinkLogits::from(self.sinks))
                .layout(Layout::from(self.layout));
            Case { name: label.into(), shape, options, with: None }
        };
        let cases: Vec<Case> = match (&self.shape[..], custom) {
            ([], true) => vec![of(None)],
            ([], false) => Named::value_variants().iter().map(|name| of(Some(name))).collect(),
            (named, _) => named.iter().map(|name| of(Some(name))).collect(),
        };
        let with = |case: Case| {
            let named = |with: With| {
                let option = with.to_possible_value().map(|value| value.get_name().to_string());
                let name = format!("{} + {}", case.name, option.unwrap_or_default());
                Case { name, with: Some(with), ..case.clone() }
            };
            let others: Vec<Case> = self.with.iter().copied().map(named).collect();
            std::iter::once(case).chain(others)
        };
        cases.into_iter().flat_map(with).collect()
    }
}

impl Bench {
    /// Measures and reports. It is an error if nothing could be measured.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.device.check()?;
        for path in self.json.iter().filter(|path| path.as_os_str() != "-").chain(&self.svg) {
            check_writable(path)?;
        }
        if self.device.is_cpu() && !self.tiles.is_empty() {
            let message = "the argument '--tiles <KERNEL=TILES>' cannot be used with '--backend cpu'";
            return Err(clap::Error::raw(ErrorKind::ArgumentConflict, message).into());
        }
        if self.decode {
            self.device.check_full_precision("--decode")?;
        }
        // The CPU path measures neither.
        let needs_gpu = self.decode || !self.tiles.is_empty();
        let attention = if needs_gpu { self.device.open_gpu() } else { self.device.open() }?;
        let timer = attention.device().map(Timer::new).transpose()?;
        if self.decode {
            return decode::execute(&self, &attention);
        }
        let slow = attention.device().is_none_or(|d| is_software(&d.wgpu().adapter_info()));
        let shortened = slow && self.shape.seq_k.is_none() && self.shape.seq_q.is_none() && !self.quick;
        let quick = self.quick || shortened;
        // Wrong numbers are refused before anything is measured.
        let mut problems = Vec::new();
        let cases = self.shape.cases(quick);
        for case in &cases {
            for dtype in self.dtype.iter().map(|dtype| DType::from(*dtype)) {
                problems.push((case, case.problem(dtype)?));
            }
        }
        let directions: &[Direction] = match self.pass {
            PassArg::Forward => &[Direction::Forward],
            PassArg::Backward => &[Direction::Backward],
            PassArg::Both => &[Direction::Forward, Direction::Backward],
        };
        let mut effort = Effort {
            runs: self.runs as usize,
            most: if quick { MOST_QUICK } else { MOST },
            passes: self.passes,
            row_max: false,
        };
        if quick {
            effort.runs = effort.runs.min(5);
        }
        let mut report = Report::new(&attention, timer.as_ref().map(Timer::clock), shortened);
        report.peaks = report.peaks.map(|peaks| peaks.in_precision(self.device.precision()));
        let progress = Progress::new(problems.len())?;
        let mut failed = None;
        'problems: for (Case { name, with, .. }, problem) in &problems {
            progress.begin(format!("{name}: {problem}"));
            effort.row_max = *with == Some(With::RowMax);
            let timings = self.measure(&attention, timer.as_ref(), problem, directions, effort);
            for (direction, timing) in directions.iter().zip(timings) {
                match timing {
                    Ok(timing) => report.rows.push(Row::new(name, problem, *direction, timing, report.peaks)),
                    Err(error) => {
                        failed = Some(error);
                        break 'problems;
                    }
                }
            }
            progress.end();
        }
        progress.finish();
        // Measurements before a failure are reported, too.
        if failed.is_none() || !report.rows.is_empty() {
            self.write(&report, || picture::draw(&report))?;
        }
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(report.verdict()?),
        }
    }

    fn measure(
        &self,
        attention: &Attention,
        timer: Option<&Timer>,
        problem: &Problem,
        directions: &[Direction],
        effort: Effort,
    ) -> Vec<sink_attention::Result<Result<measure::Timing, String>>> {
        let preference = Preference::default()
            .micro_kernel(self.device.micro_kernel())
            .precision(self.device.precision())
            .tiles(&self.tiles)
            .tuning(attention.tuning());
        match timer {
            Some(timer) => on_gpu(attention, timer, problem, directions, effort, &preference),
            None if !self.tiles.is_empty() => vec![Err(sink_attention::Error::NeedsGpu { call: "--tiles" })],
            None => on_cpu(attention, problem, directions, effort),
        }
    }

    /// Prints the figures, and writes the files that were asked for. A failure of one does not stop the next one.
    fn write<R: fmt::Display + Serialize, P: AsRef<str>>(
        &self,
        report: &R,
        picture: impl FnOnce() -> Result<P, Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let text = self.json.as_ref().map(|_| serde_json::to_string(report)).transpose()?;
        let json = self.json.as_ref().zip(text);
        let (printed, written) = match json {
            Some((path, text)) if path.as_os_str() == "-" => (print(text), Ok(())),
            Some((path, text)) => (print(report), write_file(path, &text)),
            None => (print(report), Ok(())),
        };
        let drawn = self
            .svg
            .as_ref()
            .map_or(Ok(()), |path| -> Result<(), Box<dyn Error>> { Ok(write_file(path, picture()?.as_ref())?) });
        printed?;
        written?;
        drawn
    }
}

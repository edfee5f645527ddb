//! `sink-attention tune`: the tiles that are best on this device, measured.

use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use sink_attention::half::{bf16, f16};
use sink_attention::plan::MicroKernel;
use sink_attention::plan::{Kernel, Pass, Tiling};
use sink_attention::testing::buffers::{GpuGradients, GpuOperands, too_large};
use sink_attention::testing::compare;
use sink_attention::testing::operands::Operands;
use sink_attention::timing::{Series, Timer};
use sink_attention::tuning::{MaskClass, Tuning, TuningKey};
use sink_attention::{
    Attention, DType, Device, Element, Options, Prepared, Problem, Shape, SinkLogits, Upstream, Window,
};

use crate::report_file::ReportFile;
use crate::shared::{DeviceArgs, ElementType, Progress, check_writable, print_summary, write_file};

/// Most time of a forward pass of the largest problem, estimated from the problem before.
const LARGEST: Duration = Duration::from_millis(30);
/// Candidates that are this many times slower than the built-in tiles at the smallest size are not tried at a larger one.
const SLOW: u32 = 3;
/// A smaller difference is noise, and the built-in tiles stay.
const GAIN: f64 = 0.98;
const RUNS: usize = 7;
const WARM_UP: Duration = Duration::from_millis(60);
/// Time of the first search, whatever the budget is. A loaded machine may need all of the budget to get ready, and a run that measures
/// nothing is of no use.
const FIRST: Duration = Duration::from_secs(1);

/// Find the fastest tiles for this device and write them to a file
///
/// Measures the built-in tiles and others for each kernel, width and class of masks (long sequences, narrow windows, short
/// sequences), for f16 and bf16 those of cooperative kernels, too (one of them with --kernel), holds the results of each
/// winner against those of the built-in portable tiles, and writes a tuning file, which --tuning, the environment variable
/// SINK_ATTENTION_TUNING and Attention::with_tuning take; it decides on the micro-kernel, too. Entries of an existing file
/// for the same device are kept where they are not measured again.
#[derive(Debug, Args)]
pub struct Tune {
    #[command(flatten, next_help_heading = "Device")]
    device: DeviceArgs,

    /// Seconds to spend, about; shared between all that is to be measured, the first of which is measured in any case
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    budget: u64,

    /// Tuning file to write
    #[arg(long, value_name = "FILE", default_value = "sink-attention.tuning")]
    out: PathBuf,

    /// Widths D = E to measure; they stand for all up to 32, 64, 128 or 256
    #[arg(long, value_name = "WIDTHS", value_delimiter = ',', default_values_t = [64, 128])]
    head_dim: Vec<usize>,

    /// Element types to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TYPES", default_value = "f32")]
    dtype: Vec<ElementType>,

    /// Kernels to tune
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KERNELS", default_values = ["forward", "exact_delta", "d_q", "d_kv"])]
    kernels: Vec<Tunable>,

    /// Classes of masks to measure
    #[arg(long, value_enum, value_delimiter = ',', value_name = "CLASSES", default_values = ["long", "window", "short"])]
    masks: Vec<Masks>,

    /// Print the summary as a JSON object
    #[arg(long)]
    json: bool,

    /// Add tiles and times to this file, too, which `check --report` adds to; it is a tuning file as well
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Tunable {
    Forward,
    /// Part of the backward pass in f16 and bf16
    #[value(name = "exact_delta")]
    ExactDelta,
    #[value(name = "d_q")]
    DQ,
    #[value(name = "d_kv")]
    DKv,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Masks {
    Long,
    Window,
    Short,
}

impl Tunable {
    fn kernel(self) -> Kernel {
        match self {
            Tunable::Forward => Kernel::FORWARD,
            Tunable::ExactDelta => Kernel::EXACT_DELTA,
            Tunable::DQ => Kernel::D_Q,
            Tunable::DKv => Kernel::D_KV,
        }
    }
}

impl Masks {
    fn class(self) -> MaskClass {
        match self {
            Masks::Long => MaskClass::Long,
            Masks::Window => MaskClass::Window,
            Masks::Short => MaskClass::Short,
        }
    }

    /// Heads, key/value heads and keys of the smallest problem, and of ever larger ones. A device goes on to the next size as long as it is
    /// fast.
    fn sizes(self) -> ([usize; 3], &'static [[usize; 3]]) {
        match self {
            Masks::Short => ([4, 1, 512], &[[32, 8, 512]]),
            Masks::Long | Masks::Window => ([4, 1, 1024], &[[16, 4, 2048], [32, 8, 4096], [32, 8, 8192]]),
        }
    }

    fn problem(self, size: [usize; 3], width: usize, dtype: DType) -> sink_attention::Result<Problem> {
        let [heads, kv_heads, seq] = size;
        let shape = Shape { batch: 1, heads, kv_heads, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width };
        let window = if self.class() == MaskClass::Window { Window::keys(128) } else { Window::FULL };
        Problem::new(shape, Options::new().causal(true).window(window).sink_logits(SinkLogits::PerHead).dtype(dtype))
    }
}

/// A problem on the GPU, ready to be measured.
struct Stand {
    problem: Problem,
    operands: GpuOperands,
    gradients: GpuGradients,
}

impl Stand {
    fn new(attention: &Attention, device: &Device, timer: &Timer, problem: Problem) -> sink_attention::Result<Self> {
        let operands = GpuOperands::new(device, &problem)?;
        let gradients = GpuGradients::new(device, &problem)?;
        // The backward kernels need the results of a real forward pass.
        let forward = attention.prepare_forward(&problem, &operands.buffers())?;
        timer.time(1, |pass| forward.encode_in(pass))?;
        Ok(Stand { problem, operands, gradients })
    }

    /// A pass with a kernel of the given tiles, and the places of the kernels to time. These are the kernel and its fallback, and in a
    /// forward pass also the kernels that prepare them. In a backward pass all kernels share that preparation, which runs here, so that
    /// each finds its token scales.
    fn prepare(
        &self,
        attention: &Attention,
        timer: &Timer,
        kernel: Kernel,
        tiles: Tiling,
    ) -> sink_attention::Result<(Prepared, Vec<usize>)> {
        let tiles = [(kernel, tiles)];
        let forward = self.operands.buffers();
        if kernel == Kernel::FORWARD {
            let prepared = attention.prepare_forward_with(&self.problem, &forward, &tiles)?;
            let places = (0..prepared.plan().passes.len()).collect();
            return Ok((prepared, places));
        }
        let mut backward = self.gradients.buffers(&self.operands);
        if kernel == Kernel::EXACT_DELTA {
            // A plan with o_lo has no such kernel.
            backward.forward.o_lo = None;
        }
        let prepared = attention.prepare_backward_with(&self.problem, &backward, &tiles)?;
        let places_of = |kernel| {
            let passes = prepared.plan().passes.iter().enumerate();
            passes.filter(|(_, pass)| pass.variant.kernel == kernel).map(|(place, _)| place).collect::<Vec<_>>()
        };
        let scales = [places_of(Kernel::KEY_SCALES), places_of(Kernel::QUERY_SCALES)].concat();
        timer.time(1, |pass| scales.iter().for_each(|place| prepared.encode_pass_in(pass, *place)))?;
        let places = places_of(kernel);
        Ok((prepared, places))
    }

    /// The shorter of two runs.
    fn glance(
        &self,
        attention: &Attention,
        timer: &Timer,
        kernel: Kernel,
        tiles: Tiling,
    ) -> sink_attention::Result<Duration> {
        let (prepared, places) = self.prepare(attention, timer, kernel, tiles)?;
        let times = timer.time(2, |pass| places.iter().for_each(|place| prepared.encode_pass_in(pass, *place)))?;
        Ok(times.into_iter().min().unwrap_or_default())
    }

    /// Measures a series, unless two runs show that the tiles cannot beat `best`.
    fn measure(
        &self,
        attention: &Attention,
        timer: &Timer,
        kernel: Kernel,
        tiles: Tiling,
        best: Option<Duration>,
    ) -> sink_attention::Result<Option<Series>> {
        let (prepared, places) = self.prepare(attention, timer, kernel, tiles)?;
        let time =
            |runs| timer.time(runs, |pass| places.iter().for_each(|place| prepared.encode_pass_in(pass, *place)));
        let once = time(2)?.into_iter().min().unwrap_or_default();
        if best.is_some_and(|best| once > 2 * best) {
            return Ok(None);
        }
        let runs = |span: Duration| (span.as_secs_f64() / once.as_secs_f64().max(1e-6)) as usize;
        time(runs(WARM_UP).min(500))?;
        let count = runs(Duration::from_secs(1)).clamp(3, RUNS);
        let series = Series::new(time(count)?);
        match series {
            // The series is repeated once: the usual cause is that the clock has dropped.
            Some(series) if series.disturbed() => Ok(Series::new(time(count)?)),
            series => Ok(series),
        }
    }
}

/// The smallest and the largest problem of a class that this device computes in good time.
struct Bench {
    small: Stand,
    large: Option<Stand>,
}

impl Bench {
    fn new(
        attention: &Attention,
        device: &Device,
        timer: &Timer,
        masks: Masks,
        width: usize,
        dtype: DType,
    ) -> sink_attention::Result<Self> {
        let problem = |size: &[usize; 3]| masks.problem(*size, width, dtype);
        let (smallest, larger) = masks.sizes();
        let small = Stand::new(attention, device, timer, problem(&smallest)?)?;
        let mut large = None;
        for size in larger {
            let on: &Stand = large.as_ref().unwrap_or(&small);
            let tiles = attention.plan_forward(&on.problem)?.passes.first().and_then(|pass| pass.variant.tiling);
            let Some(tiles) = tiles else { break };
            let next = problem(size)?;
            let growth = next.forward_flops() / on.problem.forward_flops();
            let time = on.glance(attention, timer, Kernel::FORWARD, tiles)?;
            if time.mul_f64(growth) > LARGEST || too_large(&next, device.capabilities()).is_some() {
                break;
            }
            large = Some(Stand::new(attention, device, timer, next)?);
        }
        Ok(Bench { small, large })
    }

    fn large(&self) -> &Stand {
        self.large.as_ref().unwrap_or(&self.small)
    }
}

impl Tune {
    /// Measures, checks, writes, and prints a summary.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.device.check()?;
        // An entry of a tuning is of full precision: its key names none.
        self.device.check_full_precision("tune")?;
        check_writable(&self.out)?;
        if self.report.as_ref() == Some(&self.out) {
            return Err(format!("--report and --out both name {}", self.out.display()).into());
        }
        let start = Instant::now();
        // Candidates are compared with the built-in table, whatever the environment prefers.
        let attention = self.device.open_gpu_untuned()?;
        let device = attention.device().ok_or("tune needs a GPU: the CPU path has no tiles")?.clone();
        let timer = Timer::new(&device)?;
        let mut tuning = self.table(&device)?;
        let mut report = self.report.as_deref().map(|path| ReportFile::open(path, &attention)).transpose()?;
        self.write(&tuning)?;
        let mut summary = Summary {
            device: attention.device_name(),
            device_reason: attention.device_reason().to_string(),
            clock: timer.clock().to_string(),
            file: self.out.display().to_string(),
            entries: Vec::new(),
            dropped: Vec::new(),
            not_measured: Vec::new(),
        };
        let deadline = start + Duration::from_secs(self.budget);
        let stands = self.dtype.len() * self.head_dim.len() * self.masks.len();
        let progress = Progress::new(stands * self.kernels.len())?;
        for dtype in self.dtype.iter().map(|dtype| DType::from(*dtype)) {
            for &width in &self.head_dim {
                for masks in &self.masks {
                    progress.prepare(format!("{dtype} {width} wide, {}", masks.class()));
                    let bench = Bench::new(&attention, &device, &timer, *masks, width, dtype)?;
                    for kernel in self.kernels.iter().map(|kernel| kernel.kernel()) {
                        let problem = &bench.large().problem;
                        let key = TuningKey::of(kernel, problem).ok_or("a problem without a class")?;
                        progress.begin(key.to_string());
                        let least = if summary.entries.is_empty() { FIRST } else { Duration::ZERO };
                        let left = deadline.saturating_duration_since(Instant::now());
                        let jobs = progress.left().max(1);
                        let micro_kernel = self.device.micro_kernel();
                        let choice = Choice::new(&attention, problem, kernel, micro_kernel)?;
                        match choice {
                            // No problem of this type uses the kernel.
                            None => {}
                            Some(_) if left.max(least).is_zero() => summary.not_measured.push(key.to_string()),
                            Some(choice) => {
                                let until = Instant::now() + left.div_f64(jobs as f64).max(least);
                                let dropped = &mut summary.dropped;
                                let entry = search(&attention, &timer, &bench, choice, until, dropped, right)?;
                                tuning.insert(key, entry.tiles);
                                // Measurements are written at once, so that they stay whatever happens next.
                                self.write(&tuning)?;
                                let tiles = entry.tiles;
                                summary.entries.push(entry.named(key));
                                if let Some(report) = &mut report {
                                    report.insert(key, tiles);
                                    report.write(&summary)?;
                                }
                            }
                        }
                        progress.end();
                    }
                }
            }
        }
        progress.finish();
        if let Some(report) = &mut report {
            report.write(&summary)?;
        }
        print_summary(&summary, self.json)
    }

    /// The entries that the file already holds, if it is of this device.
    fn table(&self, device: &Device) -> Result<Tuning, Box<dyn Error>> {
        let name = &device.capabilities().name;
        if !self.out.exists() {
            let info = device.wgpu().adapter_info();
            return Ok(Tuning::new(name, &format!("{} {}", info.driver, info.driver_info)));
        }
        // A report is a tuning, too, but this would replace it with less.
        if sink_attention::file::read(&self.out, u64::MAX).is_ok_and(|bytes| bytes.trim_ascii_start().starts_with(b"{"))
        {
            return Err(
                format!("{} is a report: name it by --report, and a tuning file by --out", self.out.display()).into()
            );
        }
        let tuning = Tuning::load(&self.out)?;
        let other = |error| format!("{}: {error}; name another file by --out", self.out.display());
        tuning.check_device(name).map_err(other)?;
        Ok(tuning)
    }

    fn write(&self, tuning: &Tuning) -> Result<(), String> {
        write_file(&self.out, &tuning.to_string())
    }
}

/// Checks whether a kernel computes right with these tiles.
type Judge = fn(&Attention, &Problem, Kernel, Tiling) -> Result<(), String>;

/// The tiles to choose from for a kernel.
struct Choice {
    kernel: Kernel,
    /// The tiles that run without a tuning.
    built_in: Tiling,
    /// All other tiles.
    candidates: Vec<Tiling>,
}

impl Choice {
    /// `None` if the problem does not use the kernel.
    fn new(
        attention: &Attention,
        problem: &Problem,
        kernel: Kernel,
        micro_kernel: MicroKernel,
    ) -> Result<Option<Self>, Box<dyn Error>> {
        let capabilities = attention.device().ok_or("no GPU")?.capabilities();
        let plan = match kernel == Kernel::FORWARD {
            true => attention.plan_forward(problem),
            false => attention.plan_backward(problem),
        }?;
        let Some(pass) = plan.passes.into_iter().find(|pass| pass.variant.kernel == kernel) else { return Ok(None) };
        let built_in = pass.variant.tiling.ok_or("a kernel without tiles")?;
        let mut candidates = Tiling::candidates(kernel, problem, capabilities, micro_kernel);
        candidates.retain(|tiling| *tiling != built_in);
        Ok(Some(Choice { kernel, built_in, candidates }))
    }

    /// The first candidate of the micro-kernel that does not run untuned, if there is one.
    fn rival(&self) -> Option<Tiling> {
        self.candidates.iter().find(|tiling| tiling.micro_kernel() != self.built_in.micro_kernel()).copied()
    }
}

/// Measures candidates until the time is up. Returns the fastest one that computes right.
fn search(
    attention: &Attention,
    timer: &Timer,
    bench: &Bench,
    choice: Choice,
    until: Instant,
    dropped: &mut Vec<String>,
    judge: Judge,
) -> Result<Found, Box<dyn Error>> {
    let rival = choice.rival();
    let Choice { kernel, built_in: first, mut candidates } = choice;
    let (small, large) = (&bench.small, bench.large());
    let capabilities = attention.device().ok_or("no GPU")?.capabilities();
    let default = large.measure(attention, timer, kernel, first, None)?.ok_or("nothing was timed")?;
    let glance = |_| small.glance(attention, timer, kernel, first);
    let default_small = bench.large.as_ref().map(glance).transpose()?;
    // The micro-kernel with the faster first choice goes first, in case the time does not suffice for both. An error of the rival is
    // reported when its turn comes.
    let time = |tiling| small.glance(attention, timer, kernel, tiling).unwrap_or(Duration::MAX);
    let faster = match rival {
        Some(rival) if time(rival) < time(first) => rival.micro_kernel(),
        _ => first.micro_kernel(),
    };
    // The choice between the micro-kernels is made in any case.
    candidates.sort_by_key(|tiling| (Some(*tiling) != rival, tiling.micro_kernel() != faster));
    let is_over = |tiling: &Tiling| Some(*tiling) != rival && Instant::now() >= until;
    let mut measured: Vec<(Duration, Tiling)> = vec![(default.median(), first)];
    'time: for batch in candidates.chunks(rayon::current_num_threads().max(2)) {
        if batch.iter().all(is_over) {
            break;
        }
        // Candidates are compiled in parallel. One that does not compile fails below, by itself.
        let passes = batch.iter().map(|tiles| Pass::with_tiles(kernel, &large.problem, capabilities, *tiles));
        let _ = attention.precompile(&passes.filter_map(Result::ok).collect());
        for &tiles in batch {
            if is_over(&tiles) {
                break 'time;
            }
            let best = measured.iter().map(|(time, _)| *time).min();
            // The small problem comes first: a candidate that crawls there would block the device with the large one.
            let crawls = match default_small {
                Some(default) => small.glance(attention, timer, kernel, tiles).map(|time| time > SLOW * default),
                None => Ok(false),
            };
            let series = crawls.and_then(|crawls| match crawls {
                true => Ok(None),
                false => large.measure(attention, timer, kernel, tiles, best),
            });
            match series {
                Ok(Some(series)) => measured.push((series.median(), tiles)),
                Ok(None) => measured.push((Duration::MAX, tiles)),
                Err(error) => dropped.push(format!("{} {tiles}: {error}", kernel.name())),
            }
        }
    }
    let tried = measured.len();
    measured.sort_by_key(|(time, _)| *time);
    let enough = default.median().mul_f64(GAIN);
    for (time, tiles) in measured {
        if tiles == first || time > enough {
            break;
        }
        match judge(attention, &small.problem, kernel, tiles) {
            Ok(()) => return Ok(Found { tiles, time, default: default.median(), tried }),
            Err(reason) => dropped.push(format!("{} {tiles}: {reason}", kernel.name())),
        }
    }
    Ok(Found { tiles: first, time: default.median(), default: default.median(), tried })
}

/// Compares the results of a kernel with those of the portable micro-kernel with the built-in tiles.
fn right(attention: &Attention, problem: &Problem, kernel: Kernel, tiles: Tiling) -> Result<(), String> {
    match problem.options().dtype {
        DType::F32 => right_with::<f32>(attention, problem, kernel, tiles, 1e-5),
        DType::F16 => right_with::<f16>(attention, problem, kernel, tiles, 2e-3),
        DType::Bf16 => right_with::<bf16>(attention, problem, kernel, tiles, 1e-2),
        dtype => Err(format!("the element type {dtype} is not known to this command")),
    }
}

fn right_with<T: Element>(
    attention: &Attention,
    problem: &Problem,
    kernel: Kernel,
    tiles: Tiling,
    bound: f64,
) -> Result<(), String> {
    let key = TuningKey::of(kernel, problem).ok_or("a problem without a class")?;
    let device = attention.device().ok_or("no GPU")?;
    let mut tuning = Tuning::new(&device.capabilities().name, "");
    tuning.insert(key, tiles);
    let tuned = attention.clone().with_tuning(tuning).map_err(|error| error.to_string())?;
    let portable = attention.clone().with_micro_kernel(MicroKernel::Portable);
    let operands = Operands::timed(problem).cast::<T>();
    let inputs = operands.inputs();
    let compute = || -> sink_attention::Result<_> {
        let mut expected = portable.forward(problem, &inputs)?;
        if kernel == Kernel::FORWARD {
            let actual = tuned.forward(problem, &inputs)?;
            return Ok((Some([actual.lse, expected.lse]), vec![[actual.o, expected.o]]));
        }
        if kernel == Kernel::EXACT_DELTA {
            expected.o_lo = None;
        }
        let upstream = Upstream::new(&expected.o);
        let of = |attention: &Attention| attention.backward(problem, &inputs, &expected, &upstream);
        let (a, b) = (of(&tuned)?, of(&portable)?);
        Ok((None, vec![[a.d_q, b.d_q], [a.d_k, b.d_k], [a.d_v, b.d_v]]))
    };
    let (lse, results) = compute().map_err(|error| error.to_string())?;
    if let Some([actual, expected]) = &lse {
        compare::lse(actual, expected, 1e-5).map_err(|error| format!("wrong lse: {error}"))?;
    }
    for [actual, expected] in &results {
        compare::tensor(actual, expected, bound).map_err(|error| format!("wrong results: {error}"))?;
    }
    Ok(())
}

/// The best tiles of a kernel.
struct Found {
    tiles: Tiling,
    time: Duration,
    default: Duration,
    tried: usize,
}

impl Found {
    fn named(&self, key: TuningKey) -> Entry {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        Entry {
            key: key.to_string(),
            tiles: self.tiles.to_string(),
            built_in_ms: milliseconds(self.default),
            ms: milliseconds(self.time),
            tried: self.tried,
        }
    }
}

/// The tiles that were found, and the ones that were not.
#[derive(Debug, Serialize)]
struct Summary {
    device: String,
    device_reason: String,
    clock: String,
    file: String,
    entries: Vec<Entry>,
    /// Candidates that failed or computed something else, with the reason.
    dropped: Vec<String>,
    /// Entries for which there was not enough time.
    not_measured: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Entry {
    key: String,
    tiles: String,
    built_in_ms: f64,
    ms: f64,
    /// Candidates that were measured, including the built-in one.
    tried: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Device: {}: {}\nTimes:  {}\n", self.device, self.device_reason, self.clock)?;
        let width = self.entries.iter().map(|entry| entry.key.len()).max().unwrap_or(0);
        writeln!(
            f,
            "{:<width$} {:>11} {:>9} {:>6} {:>5}  tiles",
            "kernel", "built-in ms", "tuned ms", "gain", "tried"
        )?;
        for Entry { key, tiles, built_in_ms, ms, tried } in &self.entries {
            let gain = built_in_ms / ms.max(f64::MIN_POSITIVE);
            writeln!(f, "{key:<width$} {built_in_ms:>11.3} {ms:>9.3} {gain:>5.2}x {tried:>5}  {tiles}")?;
        }
        for dropped in &self.dropped {
            writeln!(f, "dropped: {dropped}")?;
        }
        for key in &self.not_measured {
            writeln!(f, "not measured, as the time was up: {key}; a larger --budget helps")?;
        }
        write!(
            f,
            "\nWritten to {0}: use it by --tuning {0}, SINK_ATTENTION_TUNING or Attention::with_tuning",
            self.file
        )
    }
}

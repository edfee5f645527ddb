//! Many kernels, a line each: what a driver makes of them, in numbers that drivers share.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::str::FromStr;

use sink_attention::cache::{CacheConfig, CacheKind, Decode, Quantisation};
use sink_attention::plan::{
    Capabilities, Kernel, LoopHints, MicroKernel, OptionalOperands, Pass, Plan, PortableTile, Preference, Tiling,
    Variant,
};
use sink_attention::{Axes, DType, Options, Problem, Shape, SinkLogits, Window};

use crate::Driver;

/// The list to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    /// The kernels of the standard problems.
    Standard,
    /// Portable tiles for many widths.
    Sweep,
    /// The kernels of every option and type.
    Every,
}

impl FromStr for List {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "standard" => Ok(List::Standard),
            "sweep" => Ok(List::Sweep),
            "every" => Ok(List::Every),
            _ => Err(format!("no list {text}; known: standard, sweep, every")),
        }
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// The shapes of `sink-attention bench`: a name, query heads, width, and the window.
const STANDARD: [(&str, usize, usize, Option<usize>); 3] =
    [("gpt-oss", 64, 64, None), ("window", 64, 64, Some(128)), ("llama", 32, 128, None)];

impl List {
    pub fn print(self, capabilities: &Capabilities, driver: &Driver) -> Result<(), Box<dyn Error>> {
        match self {
            List::Standard => standard(capabilities, driver),
            List::Sweep => sweep(capabilities, driver),
            List::Every => every(capabilities, driver),
        }
    }
}

/// What a driver says of a kernel, in numbers that drivers share.
#[derive(Debug, Clone, Copy)]
struct Summary {
    /// 32-bit registers of a thread.
    registers: u32,
    /// Registers in memory, or instructions that move them there. NVK also keeps scalar registers in those of lanes, which costs little.
    spills: u32,
    /// Subgroups at a time: of a SIMD (RADV), a core (Honeykrisp, Turnip), a multiprocessor (NVK).
    waves: u32,
    instructions: u32,
    /// Cycles of a subgroup by ACO's estimate.
    cycles: Option<f64>,
}

impl Summary {
    fn new(statistics: &[(String, String)]) -> Result<Self, Box<dyn Error>> {
        let get = |name: &str| -> Option<f64> {
            statistics.iter().find(|(key, _)| key == name).and_then(|(_, value)| value.parse().ok())
        };
        let first = |names: &[&str]| names.iter().find_map(|name| get(name)).map(|number| number as u32);
        let all = |names: &[&str]| names.iter().filter_map(|name| get(name)).sum::<f64>() as u32;
        // Honeykrisp counts halves of registers, Turnip vectors of four, and the first has threads for subgroups of 32.
        let registers = first(&["VGPRs", "Number of GPRs"])
            .or_else(|| Some(first(&["GPRs"])?.div_ceil(2)))
            .or_else(|| Some(first(&["Registers used"])? * 4 + first(&["Half-registers used"])? * 2));
        let waves = first(&["Subgroups per SIMD", "Max Waves Per Core", "Max warps/SM"])
            .or_else(|| Some(first(&["Threads"])? / 32));
        let instructions = first(&["Instructions", "Instruction Count", "Instruction count"]);
        let (Some(registers), Some(waves), Some(instructions)) = (registers, waves, instructions) else {
            return Err(format!("statistics of a driver that this program does not know: {statistics:?}").into());
        };
        let spills = ["Spilled SGPRs", "Spilled VGPRs", "Spills", "Spills to memory", "STP Count"];
        Ok(Summary { registers, spills: all(&spills), waves, instructions, cycles: get("Inverse Throughput") })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} registers, {} spills, {} waves", self.registers, self.spills, self.waves)
    }
}

/// Kernels that were compiled, by name.
struct Compiled<'a> {
    driver: &'a Driver,
    known: HashMap<String, Summary>,
}

impl Compiled<'_> {
    fn get(&mut self, variant: &Variant) -> Result<Summary, Box<dyn Error>> {
        if let Some(known) = self.known.get(&variant.name()) {
            return Ok(*known);
        }
        let failed = |error| format!("{}: {error}", variant.name());
        let summary = Summary::new(&self.driver.measure(variant, None).map_err(failed)?)?;
        self.known.insert(variant.name(), summary);
        Ok(summary)
    }
}

fn problem(heads: usize, width: usize, options: Options) -> sink_attention::Result<Problem> {
    let (batch, kv_heads, seq) = (1, 8, 8192);
    Problem::new(Shape { batch, heads, kv_heads, seq_q: seq, seq_k: seq, head_dim: width, value_dim: width }, options)
}

/// The passes of both directions of a training step.
fn passes(
    problem: &Problem,
    capabilities: &Capabilities,
    optional: OptionalOperands,
) -> sink_attention::Result<Vec<Pass>> {
    let preference = Preference::default();
    let mut passes = Plan::forward_with(problem, optional, capabilities, &preference)?.passes;
    passes.extend(Plan::backward_with(problem, optional, capabilities, &preference)?.passes);
    Ok(passes)
}

/// The kernels with tiles of a training step and of a decoding step.
fn standard(capabilities: &Capabilities, driver: &Driver) -> Result<(), Box<dyn Error>> {
    let mut compiled = Compiled { driver, known: HashMap::new() };
    for ((name, heads, width, window), dtype) in STANDARD.iter().flat_map(|shape| DTYPES.map(|dtype| (*shape, dtype))) {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(dtype);
        let banded = options.window(window.map_or(Window::FULL, Window::keys));
        let optional = OptionalOperands::default().o_lo(dtype.has_rounding_error());
        let mut all = passes(&problem(heads, width, banded)?, capabilities, optional)?;
        all.retain(|pass| pass.variant.tiling.is_some());
        if window.is_none() {
            let config = CacheConfig::new(CacheKind::Contiguous { capacity: 131_072 }, 1, 8, width).dtype(dtype);
            all.extend(Plan::decode(&config, &Decode::new(heads, options), capabilities, MicroKernel::Auto)?.passes);
        }
        for pass in all {
            println!("{name} {}: {}", pass.variant.name(), compiled.get(&pass.variant)?);
        }
    }
    Ok(())
}

/// Portable tiles: the planner's choice and others for each kernel and width. The cost is that of a useful multiply-add in the innermost loops:
/// ACO's cycles of a subgroup, elsewhere instructions. Environment variables choose: SWEEP_DTYPES and SWEEP_WIDTHS (lists with commas), SWEEP_REGISTERS
/// (the largest estimate), and SWEEP_CHOSEN the planner's choice alone.
fn sweep(capabilities: &Capabilities, driver: &Driver) -> Result<(), Box<dyn Error>> {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    let numbers = |name: &str, default: &str| -> Vec<u32> {
        setting(name, default).split(',').filter_map(|number| number.parse().ok()).collect()
    };
    let most = numbers("SWEEP_REGISTERS", "200").first().copied().unwrap_or(u32::MAX);
    let mut compiled = Compiled { driver, known: HashMap::new() };
    println!("kernel dtype width tiles\testimate\tregisters\tspills\twaves\tinstructions\tcost\tchosen\tbytes\tlocal");
    let dtypes = setting("SWEEP_DTYPES", "f16");
    for dtype in DTYPES.into_iter().filter(|dtype| dtypes.split(',').any(|name| name == dtype.to_string())) {
        for width in numbers("SWEEP_WIDTHS", "32,64,128,256") {
            let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(dtype);
            let problem = problem(32, width as usize, options)?;
            let preference = Preference::default().micro_kernel(MicroKernel::Portable);
            let optional = OptionalOperands::default();
            let mut planned = Plan::forward_with(&problem, optional, capabilities, &preference)?.passes;
            planned.extend(Plan::backward_with(&problem, optional, capabilities, &preference)?.passes);
            for kernel in [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV] {
                let chosen = planned.iter().find(|pass| pass.variant.kernel == kernel).and_then(|p| p.variant.tiling);
                let mut tilings: Vec<Tiling> = chosen.into_iter().collect();
                if std::env::var_os("SWEEP_CHOSEN").is_none() {
                    tilings.extend(grid().map(Tiling::from).filter(|tiling| Some(*tiling) != chosen));
                }
                for tiling in tilings {
                    let Ok(pass) = Pass::with_tiles(kernel, &problem, capabilities, tiling) else { continue };
                    let (Tiling::Portable(tiles), Some(estimate)) = (tiling, pass.variant.registers()) else {
                        continue;
                    };
                    if estimate > most && Some(tiling) != chosen {
                        continue;
                    }
                    let summary = compiled.get(&pass.variant)?;
                    let adds = multiply_adds(kernel, tiles, width);
                    let cost = summary.cycles.map_or(f64::from(summary.instructions), |cycles| cycles / 100.0) / adds;
                    println!(
                        "{} {dtype} {width} {tiles}\t{estimate}\t{}\t{}\t{}\t{}\t{cost:.3}\t{}\t{}\t{:.2}",
                        kernel.name(),
                        summary.registers,
                        summary.spills,
                        summary.waves,
                        summary.instructions,
                        if Some(tiling) == chosen { "*" } else { "" },
                        pass.variant.workgroup_bytes(),
                        2.0 / f64::from(tiles.rows) + 0.5 / f64::from(tiles.quads),
                    );
                }
            }
        }
    }
    Ok(())
}

/// Portable tiles of many forms.
fn grid() -> impl Iterator<Item = PortableTile> {
    let threads = [[4, 16], [8, 8], [8, 16], [16, 8], [16, 16], [8, 32], [4, 32], [32, 8]];
    let thread = [[1, 1], [2, 1], [4, 1], [2, 2], [4, 2], [8, 1]];
    let steps = [[8, 16], [4, 16], [4, 8]];
    threads.into_iter().flat_map(move |[threads_r, threads_c]| {
        thread.into_iter().flat_map(move |[rows, quads]| {
            steps.map(|[k_step, n_step]| PortableTile {
                threads_r,
                threads_c,
                rows,
                quads,
                k_step,
                n_step,
                loops: LoopHints::NONE,
            })
        })
    })
}

/// Useful multiply-adds in one turn of each innermost loop of a thread.
fn multiply_adds(kernel: Kernel, tiles: PortableTile, width: u32) -> f64 {
    let products = if kernel == Kernel::FORWARD { 1.0 } else { 2.0 };
    let accumulations = if kernel == Kernel::D_KV { 2.0 } else { 1.0 };
    let [rows, quads] = [tiles.rows, tiles.quads].map(f64::from);
    let features = f64::from(width) / f64::from(tiles.threads_c);
    products * 32.0 * rows * quads + accumulations * 4.0 * rows * features
}

/// Compiles the kernels of every option and type, and of caches, and prints those with spills.
fn every(capabilities: &Capabilities, driver: &Driver) -> Result<(), Box<dyn Error>> {
    let mut compiled = Compiled { driver, known: HashMap::new() };
    let pairs = Axes::ALL;
    let causal = Options::new().causal(true);
    let sinks = causal.sink_logits(SinkLogits::PerHead);
    let all = sinks.softcap(30.0).alibi(true).mask(pairs);
    let options = [
        Options::new(),
        causal.sink_logits(SinkLogits::OffByOne).window(Window::keys(128)).sink_tokens(4),
        sinks,
        sinks.softcap(30.0),
        sinks.alibi(true),
        sinks.bias(pairs),
        sinks.mask(pairs),
        all,
        all.bias(pairs),
    ];
    for (options, dtype) in options.iter().flat_map(|options| DTYPES.map(|dtype| (*options, dtype))) {
        let options = options.dtype(dtype);
        for width in [32, 64, 128, 256] {
            let problem = problem(16, width, options)?;
            let optional = OptionalOperands::default().d_bias(options.bias.is_some()).d_alibi_slopes(options.alibi);
            let halves = dtype.has_rounding_error().then_some(optional.o_lo(true));
            for optional in [Some(optional), halves].into_iter().flatten() {
                for pass in passes(&problem, capabilities, optional)? {
                    compiled.get(&pass.variant)?;
                }
            }
        }
    }
    let kinds = [
        CacheKind::Contiguous { capacity: 8192 },
        CacheKind::Paged { page_size: 64, pages: 256, sequence_pages: 128 },
        CacheKind::Rolling { sink_tokens: 4, window: 1024, queries: 4 },
    ];
    for (kind, dtype) in kinds.iter().flat_map(|kind| DTYPES.map(|dtype| (*kind, dtype))) {
        for (width, quantised) in [32, 64, 128, 256].into_iter().flat_map(|width| [(width, false), (width, true)]) {
            let quantisation = quantised.then_some(Quantisation::Q8_0);
            let config = CacheConfig::new(kind, 2, 8, width).dtype(dtype).quantisation(quantisation);
            for (queries, options) in [(1, sinks), (4, sinks), (1, sinks.softcap(30.0)), (4, sinks.alibi(true))] {
                let decode = Decode::new(32, options.dtype(dtype)).queries(queries);
                for pass in Plan::decode(&config, &decode, capabilities, MicroKernel::Auto)?.passes {
                    compiled.get(&pass.variant)?;
                }
            }
        }
    }
    let mut spilled: Vec<_> = compiled.known.iter().filter(|(_, summary)| summary.spills > 0).collect();
    spilled.sort_by_key(|(name, _)| *name);
    spilled.iter().for_each(|(name, summary)| println!("{name}: {summary}"));
    println!("{} kernels, {} with spills", compiled.known.len(), spilled.len());
    Ok(())
}

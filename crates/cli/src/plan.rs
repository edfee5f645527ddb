//! `sink-attention plan`: how a problem would be computed, and what that takes.

use std::error::Error;
use std::fmt;

use clap::{Args, ValueEnum};
use serde::Serialize;
use sink_attention::cache::{CacheConfig, CacheKind, Decode, Quantisation};
use sink_attention::device::{Selection, adapters, describe};
use sink_attention::plan::{Capabilities, ElementLayout, Kernel, OptionalOperands, Pass, Plan, Preference};
use sink_attention::plan::{CooperativeMatrices, MicroKernel};
use sink_attention::tuning::Tuning;
use sink_attention::{Alignment, DType, DeviceChoice, Layout, Options, Problem, Shape, SinkLogits, Window};

use crate::shared::{DeviceArgs, ElementType, bytes, print_summary, with_elements};

/// Explain how a problem would be computed: kernel, tiles, work and memory
///
/// Nothing is computed. With --device the answer is for a device that need not be here.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Explain the passes of the backward pass, too
    #[arg(long)]
    backward: bool,

    /// Plan f16 and bf16 without o_lo, what rounding takes from o, which the backward pass then makes up for
    #[arg(long, requires = "backward")]
    without_o_lo: bool,

    /// Explain a decoding step from a cache of --seq-k keys instead; --seq-q is then 1, unless it is given
    #[arg(long, conflicts_with_all = ["backward", "align", "q_offset"])]
    decode: bool,

    /// Tokens of a page of the cache [default: a contiguous cache]
    #[arg(long, value_name = "TOKENS", requires = "decode")]
    page_size: Option<usize>,

    /// Keep the cache in 8 bits, blocks of 32 numbers with a scale each
    #[arg(long, requires = "decode")]
    quantised: bool,

    /// Print the plan as a JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    shape: ShapeArgs,

    #[command(flatten)]
    options: OptionArgs,

    #[command(flatten, next_help_heading = "Device")]
    target: DeviceArgs,

    /// Plan for a device that is known to the program, by its short name or a part of its name in any case: m1, rx7900xtx, adreno740, "H200" or
    /// "WebGPU defaults", for example; an unknown name lists them
    #[arg(long, value_name = "SAMPLE", conflicts_with_all = ["backend", "adapter"])]
    device: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Shape")]
struct ShapeArgs {
    /// Sequences in the batch, B
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: usize,

    /// Query heads, H
    #[arg(long, value_name = "H", default_value_t = 32)]
    heads: usize,

    /// Key/value heads, G [default: 8 for 32 heads, else as many as query heads]
    #[arg(long, value_name = "G")]
    kv_heads: Option<usize>,

    /// Queries, M [default: as many as keys]
    #[arg(long, value_name = "M")]
    seq_q: Option<usize>,

    /// Keys, N
    #[arg(long, value_name = "N", default_value_t = 8192)]
    seq_k: usize,

    /// Width of q and k, D
    #[arg(long, value_name = "D", default_value_t = 64)]
    head_dim: usize,

    /// Width of v and o, E [default: as q and k]
    #[arg(long, value_name = "E")]
    value_dim: Option<usize>,
}

impl ShapeArgs {
    fn shape(&self, decode: bool) -> Shape {
        Shape {
            batch: self.batch,
            heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(if self.heads == 32 { 8 } else { self.heads }),
            seq_q: self.seq_q.unwrap_or(if decode { 1 } else { self.seq_k }),
            seq_k: self.seq_k,
            head_dim: self.head_dim,
            value_dim: self.value_dim.unwrap_or(self.head_dim),
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Attention")]
struct OptionArgs {
    /// No key after the query's position
    #[arg(long)]
    causal: bool,

    /// Keys visible before the query's position
    #[arg(long, value_name = "KEYS")]
    window_left: Option<usize>,

    /// Keys visible after the query's position
    #[arg(long, value_name = "KEYS")]
    window_right: Option<usize>,

    /// Keys visible up to the query's position, its own included: a left window of one less, and causal
    #[arg(long, value_name = "KEYS", conflicts_with_all = ["window_left", "window_right"], value_parser = at_least_one)]
    window: Option<usize>,

    /// First keys that stay visible whatever the window's left bound
    #[arg(long, value_name = "KEYS", default_value_t = 0)]
    sink_tokens: usize,

    /// Sink logits: learned numbers in the softmax's denominator
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    sinks: Sinks,

    /// Element type of q, k, v, o and their gradients
    #[arg(long, value_enum, default_value_t)]
    dtype: ElementType,

    /// Order of the axes of the operands
    #[arg(long, value_enum, default_value_t)]
    layout: Axes,

    /// Where query 0 stands when M and N differ
    #[arg(long, value_enum, default_value_t)]
    align: Align,

    /// Position of query 0 among the keys, instead of --align
    #[arg(long, value_name = "POSITION", allow_negative_numbers = true)]
    q_offset: Option<i64>,

    /// Factor on q.k [default: 1 / sqrt(D)]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    scale: Option<f32>,
}

/// The kinds of the option, under the names that conformance files use.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum Sinks {
    #[default]
    None,
    PerHead,
    OffByOne,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum Axes {
    #[default]
    Bshd,
    Bhsd,
}

impl From<Sinks> for SinkLogits {
    fn from(sinks: Sinks) -> Self {
        match sinks {
            Sinks::None => SinkLogits::None,
            Sinks::PerHead => SinkLogits::PerHead,
            Sinks::OffByOne => SinkLogits::OffByOne,
        }
    }
}

impl From<Axes> for Layout {
    fn from(axes: Axes) -> Self {
        match axes {
            Axes::Bshd => Layout::Bshd,
            Axes::Bhsd => Layout::Bhsd,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Align {
    #[default]
    BottomRight,
    TopLeft,
}

pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("a window holds at least the query's own key".into()),
        number => number.map_err(|error| error.to_string()),
    }
}

impl OptionArgs {
    fn options(&self) -> Options {
        let window = Window { left: self.window_left, right: self.window_right };
        let options = Options::new()
            .causal(self.causal)
            .window(self.window.map_or(window, Window::keys))
            .sink_tokens(self.sink_tokens)
            .sink_logits(self.sinks.into())
            .dtype(self.dtype.into())
            .layout(self.layout.into())
            .alignment(match self.align {
                Align::BottomRight => Alignment::BottomRight,
                Align::TopLeft => Alignment::TopLeft,
            });
        let options = self.q_offset.map_or(options, |offset| options.query_offset(offset));
        self.scale.map_or(options, |scale| options.scale(scale))
    }
}

impl PlanArgs {
    /// Plans, and prints the plan.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.target.check()?;
        let problem = Problem::new(self.shape.shape(self.decode), self.options.options())?;
        if self.decode {
            self.target.check_full_precision("--decode")?;
            return self.explain_decoding(&problem);
        }
        let o_lo = self.backward && !self.without_o_lo && problem.options().dtype.has_rounding_error();
        let operands = operands(&problem, self.backward, o_lo);
        let (device, capabilities) = self.capabilities()?;
        let explanation = match capabilities {
            Some(capabilities) => {
                check_limits(&operands, &capabilities)?;
                let tuning = self.tuning(&capabilities)?;
                let preference = Preference::default()
                    .micro_kernel(self.target.micro_kernel())
                    .precision(self.target.precision())
                    .tuning(tuning.as_ref());
                let optional = OptionalOperands::default().o_lo(o_lo);
                let mut plans = vec![Plan::forward_with(&problem, optional, &capabilities, &preference)?];
                if self.backward {
                    plans.push(Plan::backward_with(&problem, optional, &capabilities, &preference)?);
                }
                let mut launches = Vec::new();
                for plan in plans {
                    let dispatches = plan.dispatches(&problem, &capabilities, None)?;
                    let passes = plan.passes.iter().zip(dispatches);
                    launches.extend(passes.map(|(pass, n)| Launch::new(&problem, pass, &capabilities, n)));
                }
                Explanation::new(&problem, device, self.backward, operands, launches)
            }
            None if let Some(call) = self.target.special() => {
                return Err(sink_attention::Error::NeedsGpu { call }.into());
            }
            None => Explanation::new(&problem, device, self.backward, operands, Vec::new()),
        };
        print_summary(&explanation, self.json)
    }

    /// Explains a decoding step of a cache whose sequences are full.
    fn explain_decoding(&self, problem: &Problem) -> Result<(), Box<dyn Error>> {
        let (s, options) = (problem.shape(), problem.options());
        let kind = match self.page_size {
            None => CacheKind::Contiguous { capacity: s.seq_k },
            Some(page_size) => {
                let sequence_pages = s.seq_k.div_ceil(page_size.max(1));
                CacheKind::Paged { page_size, pages: sequence_pages.saturating_mul(s.batch), sequence_pages }
            }
        };
        let config = CacheConfig::new(kind, s.batch, s.kv_heads, s.head_dim)
            .value_dim(s.value_dim)
            .dtype(options.dtype)
            .quantisation(self.quantised.then_some(Quantisation::Q8_0));
        config.check()?;
        let decode = Decode::new(s.heads, *options).queries(s.seq_q);
        let words = |bytes: u64| (bytes / 4, DType::F32);
        let mut operands = operands(problem, false, false);
        for ((name, elements, dtype), bytes) in operands.iter_mut().skip(1).zip(config.bytes()) {
            *name = if *name == "k" { "cached keys" } else { "cached values" };
            (*elements, *dtype) = words(bytes);
        }
        let (device, capabilities) = self.capabilities()?;
        let mut launches = Vec::new();
        match capabilities {
            Some(capabilities) => {
                check_limits(&operands, &capabilities)?;
                let plan = Plan::decode(&config, &decode, &capabilities, self.target.micro_kernel())?;
                launches.extend(plan.passes.iter().map(|pass| Launch::new(problem, pass, &capabilities, 1)));
            }
            None if self.target.micro_kernel() != MicroKernel::Auto => {
                return Err(sink_attention::Error::NeedsGpu { call: "--kernel" }.into());
            }
            None => {}
        }
        print_summary(&Explanation::new(problem, device, false, operands, launches), self.json)
    }

    /// The measured tiles to plan with. A device that need not be here takes none from the environment.
    fn tuning(&self, capabilities: &Capabilities) -> sink_attention::Result<Option<Tuning>> {
        if self.device.is_some() && !self.target.has_tuning() {
            return Ok(None);
        }
        let tuning = self.target.tuning()?;
        tuning.as_ref().map_or(Ok(()), |tuning| tuning.check_device(&capabilities.name))?;
        Ok(tuning)
    }

    /// The device to plan for: its name, the reason for it, and its capabilities. `None` is the CPU.
    fn capabilities(&self) -> Result<(String, Option<Capabilities>), Box<dyn Error>> {
        if let Some(wanted) = &self.device {
            let known = Capabilities::known();
            let wanted_lower = wanted.to_lowercase();
            let name = |(short, device): &(Option<&str>, Capabilities)| match short {
                Some(short) => format!("{short} ({})", device.name),
                None => device.name.clone(),
            };
            let names: Vec<String> = known.iter().map(name).collect();
            // A short name comes before a part of another name.
            let found = known.iter().find(|(short, _)| *short == Some(wanted_lower.as_str()));
            let found =
                found.or_else(|| known.iter().find(|(_, device)| device.name.to_lowercase().contains(&wanted_lower)));
            let (_, sample) =
                found.ok_or_else(|| format!("no device matches {wanted:?}; known: {}", names.join(", ")))?;
            let sample = sample.clone();
            return Ok((format!("{} (sample)", sample.name), Some(sample)));
        }
        let choice = self.target.choice();
        // The CPU needs no look at drivers, which may be slow.
        let adapters = if choice == DeviceChoice::Cpu { Vec::new() } else { adapters() };
        let infos: Vec<_> = adapters.iter().map(|adapter| adapter.get_info()).collect();
        let Selection { adapter, reason, .. } = choice.select(&infos)?;
        Ok(match adapter {
            Some(index) => {
                let adapter = &adapters[index];
                let elements = ElementLayout::of_adapter(adapter).ok();
                let bf16 = CooperativeMatrices::bf16_of_adapter(adapter).ok();
                let capabilities = with_elements(Capabilities::of_adapter(adapter), elements, bf16);
                (format!("{}: {reason}", describe(&infos[index])), Some(capabilities))
            }
            None => (format!("CPU ({} threads): {reason}", rayon::current_num_threads()), None),
        })
    }
}

/// The operands that a call binds, with the number of elements and their type.
fn operands(problem: &Problem, backward: bool, o_lo: bool) -> Vec<(&'static str, u64, DType)> {
    let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let dtype = problem.options().dtype;
    let mut operands = vec![
        ("q", elements(&problem.q_shape()), dtype),
        ("k", elements(&problem.k_shape()), dtype),
        ("v", elements(&problem.v_shape()), dtype),
        ("o", elements(&problem.o_shape()), dtype),
        ("lse", elements(&problem.lse_shape()), DType::F32),
    ];
    if problem.options().sink_logits == SinkLogits::PerHead {
        operands.push(("sink_logits", problem.shape().heads as u64, DType::F32));
    }
    if backward {
        // Every operand but lse has a gradient here. d_lse is optional and left out.
        let gradients = operands.iter().filter(|(name, ..)| *name != "lse").map(|&(name, n, dtype)| match name {
            "q" => ("d_q", n, dtype),
            "k" => ("d_k", n, dtype),
            "v" => ("d_v", n, dtype),
            "o" => ("d_o", n, dtype),
            _ => ("d_sink_logits", n, dtype),
        });
        let gradients: Vec<_> = gradients.collect();
        operands.extend(gradients);
        if o_lo {
            operands.push(("o_lo", elements(&problem.o_shape()), dtype));
        }
        operands.push(("delta", elements(&problem.lse_shape()), DType::F32));
        if problem.options().sink_logits == SinkLogits::PerHead && (!dtype.has_rounding_error() || o_lo) {
            let shape = problem.shape();
            let partials = (shape.batch * shape.heads * shape.seq_q.div_ceil(32)) as u64;
            operands.push(("sink_partials", partials, DType::F32));
        }
    }
    operands
}

/// Bytes of an operand in whole words, as kernels bind it.
fn size(elements: u64, dtype: DType) -> u64 {
    elements.saturating_mul(dtype.bytes() as u64).checked_next_multiple_of(4).unwrap_or(u64::MAX)
}

/// The errors that a call would meet on the device, if each operand had a buffer of its own.
fn check_limits(operands: &[(&'static str, u64, DType)], capabilities: &Capabilities) -> sink_attention::Result<()> {
    use sink_attention::Error;
    for &(operand, elements, dtype) in operands {
        let bytes = size(elements, dtype);
        if bytes > capabilities.buffer_bytes {
            return Err(Error::BufferTooLarge { operand, bytes, limit: capabilities.buffer_bytes });
        }
    }
    Ok(())
}

/// Everything that can be said before anything runs.
#[derive(Debug, Serialize)]
struct Explanation {
    problem: String,
    dtype: String,
    device: String,
    /// Counts one head of one sequence, as the next field does.
    visible_pairs: u64,
    visible_share: f64,
    flops: f64,
    operands: Vec<Operand>,
    operand_bytes: u64,
    /// One for each pass. There are none on the CPU.
    launches: Vec<Launch>,
}

#[derive(Debug, Serialize)]
struct Operand {
    name: &'static str,
    bytes: u64,
}

impl Explanation {
    fn new(
        problem: &Problem,
        device: String,
        backward: bool,
        operands: Vec<(&'static str, u64, DType)>,
        launches: Vec<Launch>,
    ) -> Self {
        let shape = problem.shape();
        let visible_pairs = problem.sequences().next().map_or(0, |sequence| sequence.band.visible_pairs());
        let operands: Vec<_> =
            operands.into_iter().map(|(name, n, dtype)| Operand { name, bytes: size(n, dtype) }).collect();
        Explanation {
            problem: problem.to_string(),
            dtype: problem.options().dtype.to_string(),
            device,
            visible_pairs,
            visible_share: visible_pairs as f64 / (shape.seq_q as f64 * shape.seq_k as f64),
            flops: problem.forward_flops() + if backward { problem.backward_flops() } else { 0.0 },
            operand_bytes: operands.iter().fold(0, |sum, operand| sum.saturating_add(operand.bytes)),
            operands,
            launches,
        }
    }
}

/// A kernel, and how often it runs.
#[derive(Debug, Serialize)]
struct Launch {
    kernel: String,
    /// Absent if the kernel reads no rows.
    vec4: Option<bool>,
    /// Absent for kernels that only sum along rows.
    tiles: Option<Tiles>,
    /// The share of a workgroup, for a kernel that decodes.
    decode_tiles: Option<String>,
    workgroup_bytes: u32,
    workgroup_bytes_offered: u32,
    threads: u32,
    /// Workgroups that run on a multiprocessor at a time, limited by the memory and the registers that they share. None if these are not
    /// known.
    resident_workgroups: Option<u32>,
    workgroups: u64,
    grid: [u32; 3],
    /// More than one if operands exceed a binding, or the time a budget.
    dispatches: usize,
}

/// The tiles of a kernel, and how many of them are visited.
#[derive(Debug, Serialize)]
struct Tiles {
    /// The micro-kernel and its tiles, in the form of `bench --tiles`.
    shape: String,
    /// Built-in table or tuning.
    origin: String,
    rows: u32,
    columns: u32,
    registers: u32,
    /// Registers of a thread that the class of the device has, and subgroups of an execution unit by the estimate. None on the CPU.
    registers_offered: Option<u32>,
    subgroups: Option<u32>,
    /// Counts one head of one sequence, as the next two fields do.
    all: u64,
    visited: u64,
    /// Counted only if rows are queries.
    masked: Option<u64>,
}

impl Launch {
    fn new(problem: &Problem, pass: &Pass, capabilities: &Capabilities, dispatches: usize) -> Self {
        let variant = &pass.variant;
        Launch {
            kernel: variant.name(),
            vec4: (variant.value_dim > 0).then_some(variant.vec4),
            tiles: variant.tile().and_then(|tile| Tiles::new(problem, pass, tile, capabilities)),
            decode_tiles: variant.decode_tiles().map(|tiles| tiles.to_string()),
            workgroup_bytes: variant.workgroup_bytes(),
            workgroup_bytes_offered: capabilities.workgroup_bytes,
            threads: variant.threads(),
            resident_workgroups: pass.resident_workgroups(capabilities),
            workgroups: pass.workgroups,
            grid: pass.grid,
            dispatches,
        }
    }
}

impl Tiles {
    fn new(problem: &Problem, pass: &Pass, tile: [u32; 2], capabilities: &Capabilities) -> Option<Self> {
        let variant = &pass.variant;
        let (shape, mask) = (problem.shape(), problem.sequences().next()?.band);
        let rows_are_keys = variant.kernel == Kernel::D_KV;
        let [seq_rows, seq_columns] =
            if rows_are_keys { [shape.seq_k, shape.seq_q] } else { [shape.seq_q, shape.seq_k] };
        let [rows, columns] = tile.map(|n| n as usize);
        let (mut visited, mut masked) = (0, 0);
        for start in (0..seq_rows).step_by(rows) {
            let range = start..(start + rows).min(seq_rows);
            if rows_are_keys {
                visited += mask.query_tiles(&range, columns).len() as u64;
            } else {
                let count = mask.key_tiles(&range, columns).count();
                visited += count as u64;
                masked += (count - mask.full_tiles(&range, columns)) as u64;
            }
        }
        let registers = variant.registers().unwrap_or(0);
        let file = capabilities.class.register_file();
        Some(Tiles {
            shape: variant.tiling.map_or(String::new(), |tiling| tiling.to_string()),
            origin: pass.tiles_origin.to_string(),
            rows: tile[0],
            columns: tile[1],
            registers,
            registers_offered: file.map(|file| file.thread),
            subgroups: file.map(|file| file.waves(registers)),
            all: seq_rows.div_ceil(rows) as u64 * seq_columns.div_ceil(columns) as u64,
            visited,
            masked: (!rows_are_keys).then_some(masked),
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<String> = self.operands.iter().map(|o| format!("{} {}", o.name, bytes(o.bytes))).collect();
        writeln!(f, "problem    {}", self.problem)?;
        writeln!(f, "device     {}", self.device)?;
        writeln!(
            f,
            "visible    {} pairs of query and key a head, {} of the full matrix",
            self.visible_pairs,
            percent(self.visible_share)
        )?;
        writeln!(f, "work       {}, two operations for each multiply-add of a visible pair", flops(self.flops))?;
        writeln!(f, "operands   {}: {} in all", sizes.join(", "), bytes(self.operand_bytes))?;
        if self.launches.is_empty() {
            return write!(f, "kernel     the CPU path");
        }
        let launches: Vec<String> = self.launches.iter().map(Launch::to_string).collect();
        write!(f, "{}", launches.join("\n"))
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        let loads = self
            .vec4
            .map(|vec4| if vec4 { "four at a time" } else { "one by one, as the widths are no multiples of 4" });
        writeln!(f, "kernel     {}", self.kernel)?;
        if let Some(loads) = loads {
            writeln!(f, "loads      {loads}")?;
        }
        if let Some(tiles) = &self.decode_tiles {
            writeln!(f, "tiles      {tiles}")?;
        }
        if let Some(tiles) = &self.tiles {
            writeln!(
                f,
                "tiles      {} ({} x {}), about {} registers a thread, from the {}",
                tiles.shape, tiles.rows, tiles.columns, tiles.registers, tiles.origin
            )?;
            if let (Some(offered), Some(subgroups)) = (tiles.registers_offered, tiles.subgroups) {
                let spills = if tiles.registers > offered { ": the compiler moves some to memory" } else { "" };
                writeln!(
                    f,
                    "registers  {offered} offered{spills}; about {subgroups} subgroups fit the registers of an execution unit"
                )?;
            }
            let share = percent(tiles.visited as f64 / tiles.all as f64);
            write!(f, "visits     {} of {} tiles a head ({share})", tiles.visited, tiles.all)?;
            match tiles.masked {
                Some(masked) => writeln!(f, ", {masked} of them masked, the others wholly visible")?,
                None => writeln!(f, ", for each query head of the group")?,
            }
        }
        write!(
            f,
            "workgroup  {} threads, {} of {} workgroup memory",
            self.threads,
            bytes(self.workgroup_bytes.into()),
            bytes(self.workgroup_bytes_offered.into()),
        )?;
        match self.resident_workgroups {
            Some(count) => writeln!(f, ", {count} at a time on a multiprocessor")?,
            None => writeln!(f)?,
        }
        match self.dispatches {
            1 if z > 1 => write!(f, "grid       {} workgroups as {x} x {y} x {z}", self.workgroups),
            1 => write!(f, "grid       {} workgroups as {x} x {y}", self.workgroups),
            n => write!(f, "grid       {} workgroups in {n} dispatches", self.workgroups),
        }
    }
}

fn percent(share: f64) -> String {
    // There are enough digits that a narrow window of a long sequence is not 0.0 %.
    let decimals = if share >= 0.01 || share == 0.0 { 1 } else { 4 };
    format!("{:.decimals$} %", 100.0 * share)
}

fn flops(flops: f64) -> String {
    let units = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"];
    let unit = if flops < 1.0 { 0 } else { (flops.log10() / 3.0) as usize }.min(units.len() - 1);
    format!("{:.1} {}", flops / 1000f64.powi(unit as i32), units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(percent(0.5), "50.0 %");
        assert_eq!(percent(0.00123), "0.1230 %");
        assert_eq!(flops(0.0), "0.0 FLOP");
        assert_eq!(flops(1234.5), "1.2 kFLOP");
        assert_eq!(flops(2e18), "2000.0 PFLOP");
    }
}

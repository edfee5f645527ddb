//! Timing one pass of one problem.

use std::time::{Duration, Instant};

use sink_attention::device::DeviceBuffer;
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{OptionalOperands, Pass, Plan, Preference};
use sink_attention::timing::{Series, Timer};
use sink_attention::{Attention, DType, Device, Element, Error, Prepared, Problem, Result, SinkLogits, Upstream, wgpu};

use sink_attention::testing::buffers::{GpuGradients, GpuOperands, too_large};
use sink_attention::testing::operands::Operands;

/// Forward or backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Backward,
}

impl Direction {
    pub fn name(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        }
    }

    /// Operations by the field's convention.
    pub fn flops(self, problem: &Problem) -> f64 {
        match self {
            Direction::Forward => problem.forward_flops(),
            Direction::Backward => problem.backward_flops(),
        }
    }

    /// Bytes of operands and results, each counted once.
    pub fn bytes(self, problem: &Problem) -> f64 {
        let elements = |shape: &[usize]| shape.iter().map(|n| *n as f64).product::<f64>();
        let [q, k, v, o] =
            [problem.q_shape(), problem.k_shape(), problem.v_shape(), problem.o_shape()].map(|s| elements(&s));
        let wide = problem.options().dtype.bytes() as f64;
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        let sinks = if per_head { problem.shape().heads as f64 } else { 0.0 };
        let rest = if problem.options().dtype.has_rounding_error() { wide * o } else { 0.0 };
        let (bias, mask) = (problem.bias_shape(), problem.mask_shape());
        let [bias, mask] = [bias, mask].map(|shape| shape.map_or(0.0, |shape| elements(&shape)));
        let pairs = problem.options().bias_dtype.bytes() as f64 * bias + mask;
        let forward = wide * (q + k + v + o) + rest + 4.0 * (elements(&problem.lse_shape()) + sinks) + pairs;
        match self {
            Direction::Forward => forward,
            // The operands and results of the forward pass are read again, and all but lse have a gradient.
            Direction::Backward => forward + wide * (q + k + v + o) + 4.0 * (sinks + bias),
        }
    }

    fn plan(self, device: &Device, problem: &Problem, row_max: bool, preference: &Preference<'_>) -> Result<Plan> {
        let capabilities = device.capabilities();
        let optional = OptionalOperands::for_training(problem);
        match self {
            Direction::Forward => Plan::forward_with(problem, optional.row_max(row_max), capabilities, preference),
            Direction::Backward => Plan::backward_with(problem, optional, capabilities, preference),
        }
    }
}

/// How a pass is timed: how long a series may take, how many runs there are, and which results are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub runs: usize,
    pub most: Duration,
    /// Measures each kernel by itself, too.
    pub passes: bool,
    /// The forward pass writes the largest score of each row, too.
    pub row_max: bool,
}

/// The times of one pass of a problem.
#[derive(Debug)]
pub struct Timing {
    /// The micro-kernels, or the CPU path.
    pub kernel: String,
    pub series: Series,
    /// The kernels, each with its own time if that was asked for.
    pub kernels: Vec<(Pass, Option<Series>)>,
    /// The time to compose and compile the kernels.
    pub first_call: Option<FirstCall>,
}

/// The time to compile a plan's kernels: without help, and with a persistent pipeline cache that holds them.
#[derive(Debug, Clone, Copy)]
pub struct FirstCall {
    pub cold: Duration,
    /// None if the device has no pipeline cache.
    pub warm: Option<Duration>,
}

/// Whether a problem is left out for its size or kind, and not for a failure.
pub fn unfit(error: &Error) -> bool {
    matches!(
        error,
        Error::NoKernel { .. }
            | Error::TooManyWorkgroups { .. }
            | Error::BindingTooLarge { .. }
            | Error::BufferTooLarge { .. }
            | Error::IndexOverflow { .. }
            | Error::OutOfMemory(_)
    )
}

/// Times passes of a problem on a GPU. Each has a timing, or the reason why there is none.
pub fn on_gpu(
    attention: &Attention,
    timer: &Timer,
    problem: &Problem,
    directions: &[Direction],
    effort: Effort,
    preference: &Preference<'_>,
) -> Vec<Result<Result<Timing, String>>> {
    let mut made: Option<GpuOperands> = None;
    let mut timings = Vec::new();
    for &direction in directions {
        let timing = one(attention, timer, problem, direction, effort, preference, &mut made);
        timings.push(match timing {
            Err(error) if unfit(&error) => Ok(Err(error.to_string())),
            timing => timing,
        });
    }
    timings
}

fn one(
    attention: &Attention,
    timer: &Timer,
    problem: &Problem,
    direction: Direction,
    effort: Effort,
    preference: &Preference<'_>,
    made: &mut Option<GpuOperands>,
) -> Result<Result<Timing, String>> {
    let device = attention.device().ok_or(Error::NeedsGpu { call: "timing" })?;
    // The plan comes before anything is allocated.
    let plan = direction.plan(device, problem, effort.row_max, preference)?;
    if let Some(reason) = too_large(problem, device.capabilities()) {
        return Ok(Err(reason));
    }
    let first_call = first_call(attention, device, &plan)?;
    let operands = match made {
        Some(operands) => operands,
        None => made.insert(GpuOperands::new(device, problem)?),
    };
    let row_max = effort.row_max.then(|| device.zeros("row_max", DType::F32, &problem.lse_shape())).transpose()?;
    let buffers = operands.buffers().row_max(row_max.as_ref().map(DeviceBuffer::view));
    let forward = attention.prepare_forward_with(problem, &buffers, preference.tiles)?;
    let gradients;
    let prepared: Prepared = match direction {
        Direction::Forward => forward,
        Direction::Backward => {
            // The backward pass reads the results of the forward pass.
            timer.time(1, |pass| forward.encode_in(pass))?;
            gradients = GpuGradients::new(device, problem)?;
            let buffers = gradients.buffers(operands);
            attention.prepare_backward_with(problem, &buffers, preference.tiles)?
        }
    };
    let series = timer.measure(effort.runs, effort.most, |pass| prepared.encode_in(pass))?;
    let mut kernels = Vec::new();
    for (index, pass) in prepared.plan().passes.iter().enumerate() {
        let alone = || timer.measure(effort.runs, effort.most, |pass| prepared.encode_pass_in(pass, index));
        kernels.push((*pass, effort.passes.then(alone).transpose()?));
    }
    // Kernels without tiles, and the fallback, take next to no time.
    let heavy = kernels.iter().map(|(pass, _)| pass.variant).filter(|v| v.tiling.is_some() && v.fallback.is_none());
    let mut kinds: Vec<String> = heavy.map(|variant| variant.micro_kernel.to_string()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let kernel = kinds.join(" and ");
    Ok(Ok(Timing { kernel, series, kernels, first_call: Some(first_call) }))
}

/// Compiles twice, with two operators that share nothing but a file.
fn first_call(attention: &Attention, device: &Device, plan: &Plan) -> Result<FirstCall> {
    let compile = |operator: &Attention| {
        let start = Instant::now();
        operator.precompile(plan).map(|()| start.elapsed())
    };
    let fresh = || Attention::on(device.clone());
    if !device.wgpu().features().contains(wgpu::Features::PIPELINE_CACHE) {
        let cold = compile(&fresh())?;
        attention.precompile(plan)?;
        return Ok(FirstCall { cold, warm: None });
    }
    let path = std::env::temp_dir().join(format!("sink-attention-bench-{}.cache", std::process::id()));
    // A process of the same number may have left this file.
    let _ = std::fs::remove_file(&path);
    let first_call = || {
        let first = fresh().with_pipeline_cache(&path)?;
        let cold = compile(&first)?;
        first.save_pipeline_cache()?;
        let warm = compile(&fresh().with_pipeline_cache(&path)?)?;
        Ok(FirstCall { cold, warm: Some(warm) })
    };
    let measured = first_call();
    let _ = std::fs::remove_file(&path);
    measured
}

/// Times passes of a problem on the CPU, by the wall clock.
pub fn on_cpu(
    attention: &Attention,
    problem: &Problem,
    directions: &[Direction],
    effort: Effort,
) -> Vec<Result<Result<Timing, String>>> {
    let of = |direction: &Direction| match problem.options().dtype {
        DType::F32 => on_cpu_with::<f32>(attention, problem, *direction, effort),
        DType::F16 => on_cpu_with::<f16>(attention, problem, *direction, effort),
        DType::Bf16 => on_cpu_with::<bf16>(attention, problem, *direction, effort),
        dtype => Ok(Err(format!("the element type {dtype} is not known to this command"))),
    };
    directions.iter().map(of).collect()
}

fn on_cpu_with<T: Element>(
    attention: &Attention,
    problem: &Problem,
    direction: Direction,
    effort: Effort,
) -> Result<Result<Timing, String>> {
    let operands = Operands::timed(problem).cast::<T>();
    let inputs = operands.inputs();
    // This run is also the warm-up.
    let saved = attention.forward(problem, &inputs)?;
    let upstream = Upstream::new(&saved.o);
    let (mut times, began) = (Vec::new(), Instant::now());
    while times.is_empty() || (times.len() < effort.runs && began.elapsed() < effort.most) {
        let start = Instant::now();
        match direction {
            Direction::Forward if effort.row_max => drop(attention.forward_with_row_max(problem, &inputs)?),
            Direction::Forward => drop(attention.forward(problem, &inputs)?),
            Direction::Backward => drop(attention.backward(problem, &inputs, &saved, &upstream)?),
        }
        times.push(start.elapsed());
    }
    let timing =
        Series::new(times).map(|series| Timing { kernel: "cpu".into(), series, kernels: Vec::new(), first_call: None });
    Ok(timing.ok_or_else(|| "no run was timed".into()))
}

//! Forward and backward pass: `cargo bench --bench attention [-- FILTER]`.
//!
//! On a GPU the times are the GPU's own timestamps around the kernels: no uploads, downloads or submissions.
//! Without a GPU, or with `SINK_ATTENTION_ADAPTER=cpu`, they are wall-clock times of the CPU path.
//! criterion's elements are floating-point operations, so its "Gelem/s" are GFLOP/s: two operations for each
//! multiply-add of both matrix products, over the visible pairs only; 2.5 times as many for the backward pass, by the
//! field's convention, though it does seven products.
//!
//! - `forward`, `backward`: full, causal and windowed attention, with sink logits, on the shapes below or on those in
//!   `SINK_ATTENTION_BENCH_SHAPES`, for example `"H=64 G=8 N=8192 D=64; H=16 N=4096 D=128"`
//!   (of B G M N D E, absent ones are B=1, G=H, M=N, E=D).
//! - `window forward`, `window backward`: a window of 128 keys over ever longer sequences. The cost grows linearly with N where the
//!   throughput stays the same.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use sink_attention::testing::buffers::{GpuGradients, GpuOperands, too_large};
use sink_attention::testing::operands::Operands;
use sink_attention::timing::Timer;
use sink_attention::{
    Attention, Device, DeviceChoice, Options, Prepared, Problem, Shape, SinkLogits, Upstream, Window, wgpu,
};

const SHAPES_VARIABLE: &str = "SINK_ATTENTION_BENCH_SHAPES";
const WINDOW: usize = 128;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let attention = Attention::open(&DeviceChoice::from_env())?;
    let timer = attention.device().map(Timer::new).transpose()?;
    announce(&attention, timer.as_ref());
    let sizes = Sizes::of(&attention);
    let shapes = shapes(&sizes)?;

    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let sinks = Options::new().sink_logits(SinkLogits::PerHead);
    let window = sinks.window(Window::keys(WINDOW));

    for direction in [Direction::Forward, Direction::Backward] {
        let mut group = criterion.benchmark_group(direction.name());
        group.sampling_mode(SamplingMode::Flat);
        for &shape in &shapes {
            for (name, options) in [("full", sinks), ("causal", sinks.causal(true)), ("window 128", window)] {
                let id = BenchmarkId::new(name, shape);
                measure(&mut group, id, Problem::new(shape, options)?, direction, &attention, &timer);
            }
        }
        group.finish();

        let mut group = criterion.benchmark_group(format!("window {}", direction.name()));
        group.sampling_mode(SamplingMode::Flat);
        for &n in &sizes.window {
            let shape = Shape { batch: 1, heads: 32, kv_heads: 8, seq_q: n, seq_k: n, head_dim: 64, value_dim: 64 };
            let id = BenchmarkId::new("128", shape);
            measure(&mut group, id, Problem::new(shape, window)?, direction, &attention, &timer);
        }
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Direction {
    Forward,
    Backward,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        }
    }
}

fn announce(attention: &Attention, timer: Option<&Timer>) {
    println!("Device: {}", attention.device_description());
    match (attention.device(), timer) {
        (Some(device), Some(timer)) => {
            let info = device.wgpu().adapter_info();
            println!("Driver: {} {}", info.driver, info.driver_info);
            println!("Times:  {}", timer.clock());
        }
        _ => println!("Times:  wall clock of the CPU path; no GPU was found or asked for"),
    }
    println!("Elements are floating-point operations: Gelem/s are GFLOP/s\n");
}

/// Sequence lengths that end in reasonable time.
struct Sizes {
    forward: usize,
    window: Vec<usize>,
}

impl Sizes {
    fn of(attention: &Attention) -> Self {
        let (forward, shortest, longest) =
            match attention.device().map(|device| device.wgpu().adapter_info().device_type) {
                Some(wgpu::DeviceType::DiscreteGpu) => (8192, 2048, 131_072),
                None | Some(wgpu::DeviceType::Cpu) => (512, 512, 4096),
                Some(_) => (2048, 2048, 32_768),
            };
        let doublings = std::iter::successors(Some(shortest), |n| Some(n * 2)).take_while(|&n| n <= longest);
        Sizes { forward, window: doublings.collect() }
    }
}

fn shapes(sizes: &Sizes) -> Result<Vec<Shape>, String> {
    if let Ok(text) = std::env::var(SHAPES_VARIABLE) {
        return text.split(';').filter(|shape| !shape.trim().is_empty()).map(parse).collect();
    }
    // GPT-OSS, Llama 3 and the latter with narrow heads.
    let widths = [(64, 64), (32, 128), (32, 64)];
    let shape = |(heads, width)| Shape {
        batch: 1,
        heads,
        kv_heads: 8,
        seq_q: sizes.forward,
        seq_k: sizes.forward,
        head_dim: width,
        value_dim: width,
    };
    Ok(widths.map(shape).to_vec())
}

fn parse(text: &str) -> Result<Shape, String> {
    let wrong = |what: &str| format!("{SHAPES_VARIABLE}: {what} in {:?}; want H=64 G=8 N=8192 D=64", text.trim());
    let unknown = |field: &str| wrong(&format!("{field:?}"));
    let mut values = [None; 7];
    const NAMES: [&str; 7] = ["B", "H", "G", "M", "N", "D", "E"];
    for field in text.split_whitespace() {
        let (name, value) = field.split_once('=').ok_or_else(|| unknown(field))?;
        let index = NAMES.iter().position(|known| *known == name).ok_or_else(|| unknown(field))?;
        values[index] = Some(value.parse().map_err(|_| unknown(field))?);
    }
    let [batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim] = values;
    let (heads, seq_k, head_dim) = match (heads, seq_k, head_dim) {
        (Some(heads), Some(seq_k), Some(head_dim)) => (heads, seq_k, head_dim),
        _ => return Err(wrong("H, N or D is missing")),
    };
    Ok(Shape {
        batch: batch.unwrap_or(1),
        heads,
        kv_heads: kv_heads.unwrap_or(heads),
        seq_q: seq_q.unwrap_or(seq_k),
        seq_k,
        head_dim,
        value_dim: value_dim.unwrap_or(head_dim),
    })
}

/// Buffers and kernels are made when the benchmark runs, so that one which is filtered out costs nothing.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    problem: Problem,
    direction: Direction,
    attention: &Attention,
    timer: &Option<Timer>,
) {
    let flops = match direction {
        Direction::Forward => problem.forward_flops(),
        Direction::Backward => problem.backward_flops(),
    };
    group.throughput(Throughput::Elements(flops as u64));
    let (Some(device), Some(timer)) = (attention.device(), timer) else {
        return measure_on_the_host(group, id, &problem, direction, attention);
    };
    if let Some(reason) = too_large(&problem, device.capabilities()) {
        println!("left out: {problem}: {reason}");
        return;
    }
    let mut prepared = None;
    group.bench_function(id, |b| {
        let prepared = prepared.get_or_insert_with(|| prepare(attention, device, timer, &problem, direction));
        b.iter_custom(|runs| {
            let times = timer.time(runs as usize, |pass| prepared.encode_in(pass));
            times.expect("a device that is still there").iter().sum()
        });
    });
}

fn prepare(attention: &Attention, device: &Device, timer: &Timer, problem: &Problem, direction: Direction) -> Prepared {
    let run =
        |prepared: &Prepared| timer.time(1, |pass| prepared.encode_in(pass)).expect("a device that is still there");
    let operands = GpuOperands::new(device, problem).expect("operands that fit");
    let mut prepared = attention.prepare_forward(problem, &operands.buffers()).expect("a problem that fits");
    // Drivers finish compiling in the first pass, from which criterion would guess the length of all; and the
    // backward pass wants the forward pass's results.
    run(&prepared);
    if direction == Direction::Backward {
        let gradients = GpuGradients::new(device, problem).expect("gradients that fit");
        prepared = attention.prepare_backward(problem, &gradients.buffers(&operands)).expect("a problem that fits");
        run(&prepared);
    }
    prepared
}

fn measure_on_the_host(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    problem: &Problem,
    direction: Direction,
    attention: &Attention,
) {
    let mut made = None;
    group.bench_function(id, |b| {
        let (operands, saved) = made.get_or_insert_with(|| {
            let operands = Operands::timed(problem);
            let saved = attention.forward(problem, &operands.inputs()).expect("operands that fit the problem");
            (operands, saved)
        });
        let upstream = Upstream::new(&saved.o);
        b.iter(|| match direction {
            Direction::Forward => {
                attention.forward(problem, &operands.inputs()).expect("operands that fit the problem");
            }
            Direction::Backward => {
                let inputs = operands.inputs();
                attention.backward(problem, &inputs, saved, &upstream).expect("operands that fit the problem");
            }
        });
    });
}

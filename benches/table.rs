//! The table of benches/results/: `cargo bench --bench table`, in a minute or two on a discrete GPU.
//!
//! Forward and backward pass in f32 with sink logits: median, minimum and maximum of GPU timestamps, TFLOP/s by the
//! field's convention (2.5 times the forward's operations for the backward pass) and by the matrix products that are
//! really done; the growth of a window's cost with N; and the memory that forward and backward take together.

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::time::Duration;

use sink_attention::{Attention, Device, DeviceChoice, Options, Prepared, Problem, Shape, SinkLogits, Window};
use support::{GpuGradients, GpuOperands, Timer, too_large};

/// Long enough for the clock to rise from idle.
const WARM_UP: Duration = Duration::from_millis(300);
const PASSES: u64 = 11;

fn main() -> Result<(), Box<dyn Error>> {
    let choice = match DeviceChoice::from_env() {
        DeviceChoice::Auto => DeviceChoice::Gpu,
        choice => choice,
    };
    let attention = Attention::open(&choice)?;
    let device = attention.device().ok_or("the table is of a GPU")?;
    let timer = Timer::new(device).ok_or("the device takes no timestamps")?;
    let info = device.wgpu().adapter_info();
    println!("Device: {}, driver {} {}", attention.device_name(), info.driver, info.driver_info);
    println!("f32, B=1, sink logits; milliseconds by GPU timestamps, {PASSES} passes\n");
    let software = info.device_type == sink_attention::wgpu::DeviceType::Cpu;
    let scale = if software { 32 } else { 1 };

    println!("| H | G | N | D | mask | pass | median | min | max | TFLOP/s | products done |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let sinks = Options::new().sink_logits(SinkLogits::PerHead);
    let causal = sinks.causal(true);
    let window = sinks.window(Window::keys(128));
    let shape = |heads, n: usize, width| {
        let n = n / scale;
        Shape { batch: 1, heads, kv_heads: 8, seq_q: n, seq_k: n, head_dim: width, value_dim: width }
    };
    for (shape, mask, options) in [
        (shape(32, 8192, 64), "causal", causal),
        (shape(32, 8192, 128), "causal", causal),
        (shape(32, 8192, 64), "full", sinks),
        (shape(64, 8192, 64), "causal", causal),
        (shape(64, 8192, 64), "window 128", window),
    ] {
        rows(&attention, device, &timer, Problem::new(shape, options)?, mask)?;
    }
    let mut n = 2048;
    while n <= 131_072 {
        rows(&attention, device, &timer, Problem::new(shape(32, n, 64), window)?, "window 128")?;
        n *= 2;
    }

    let problem = Problem::new(shape(64, 8192, 64), causal)?;
    let s = problem.shape();
    let [q, kv, lse] = [s.heads * s.seq_q * s.head_dim, s.kv_heads * s.seq_k * s.head_dim, s.heads * s.seq_q];
    let mib = |elements: usize| elements as f64 * 4.0 / f64::from(1 << 20);
    println!("\nMemory of forward + backward, {problem}, f32:");
    println!("operands q, k, v, o: {:.0} MiB; their gradients: the same again", mib(2 * q + 2 * kv));
    println!("saved for backward besides o: lse, {:.0} MiB; scratch: delta, {:.0} MiB", mib(lse), mib(lse));
    println!("in all: {:.0} MiB, the sum of all buffers", mib(4 * q + 4 * kv + 2 * lse + lse / 32));
    println!(
        "Hugging Face's eager attention on an H200, f32: 49862 MiB forward, 66540 MiB forward + backward (measured)"
    );
    Ok(())
}

/// Measures both passes of a problem and prints a row for each.
fn rows(
    attention: &Attention,
    device: &Device,
    timer: &Timer,
    problem: Problem,
    mask: &str,
) -> Result<(), Box<dyn Error>> {
    let s = problem.shape();
    let shape = format!("| {} | {} | {} | {} | {mask}", s.heads, s.kv_heads, s.seq_k, s.head_dim);
    if let Some(reason) = too_large(&problem, device.capabilities()) {
        println!("{shape} | left out: {reason} |");
        return Ok(());
    }
    let operands = GpuOperands::new(device, &problem);
    let gradients = GpuGradients::new(device, &problem);
    let forward = attention.prepare_forward(&problem, &operands.buffers())?;
    let row = |name: &str, prepared: &Prepared, flops: f64, done: f64| -> Result<(), Box<dyn Error>> {
        let times = measure(timer, prepared)?;
        let median = times[times.len() / 2];
        let rate = |flops: f64| flops / median * 1e-9;
        println!(
            "{shape} | {name} | {median:.3} | {:.3} | {:.3} | {:.2} | {:.2} |",
            times[0],
            times[times.len() - 1],
            rate(flops),
            rate(done)
        );
        Ok(())
    };
    row("forward", &forward, problem.forward_flops(), problem.forward_flops())?;
    let backward = attention.prepare_backward(&problem, &gradients.buffers(&operands))?;
    row("backward", &backward, problem.backward_flops(), 3.5 * problem.forward_flops())
}

/// Sorted milliseconds.
fn measure(timer: &Timer, prepared: &Prepared) -> Result<Vec<f64>, Box<dyn Error>> {
    let once = timer.time(1, |pass| prepared.encode_in(pass))?;
    let warm_up = WARM_UP.as_secs_f64() / once[0].as_secs_f64().max(1e-6);
    timer.time((warm_up as u64).clamp(1, 2000), |pass| prepared.encode_in(pass))?;
    let mut times = timer.time(PASSES, |pass| prepared.encode_in(pass))?;
    times.sort();
    Ok(times.iter().map(|time| time.as_secs_f64() * 1e3).collect())
}

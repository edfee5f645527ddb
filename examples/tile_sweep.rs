//! Measures many tile shapes of each kernel on this device and prints them, the fastest first.
//!
//! `cargo run --release --example tile_sweep -- [--short] [D,E,H,G,N,full|causal ...]`
//! Times are GPU timestamps in milliseconds: minimum, median and maximum of five passes.

#[path = "../benches/support/mod.rs"]
mod support;

use std::error::Error;
use std::time::Duration;

use sink_attention::{Attention, DeviceChoice, Kernel, Options, Pass, Prepared, Problem, Shape, SinkLogits, Tiles};
use support::{GpuGradients, GpuOperands, Timer};

const PASSES: u64 = 5;

/// Sorted milliseconds of some runs of one pass.
fn time(timer: &Timer, passes: u64, prepared: &Prepared, index: usize) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut times = timer.time(passes, |pass| prepared.encode_pass_in(pass, index))?;
    times.sort();
    Ok(times.iter().map(Duration::as_secs_f64).map(|seconds| seconds * 1e3).collect())
}

fn candidates(kernel: Kernel, head_dim: u32, value_dim: u32, short: bool) -> Vec<Tiles> {
    let mut all = Vec::new();
    for [threads_r, threads_c] in [[8, 8], [16, 8], [32, 8], [8, 16], [16, 16], [8, 4], [16, 4], [32, 4]] {
        for [rows, quads] in [[2, 1], [4, 1], [8, 1], [4, 2], [8, 2]] {
            for chunk in [2, 4, 8] {
                for slab in [8, 16, 32] {
                    let t = Tiles { threads_r, threads_c, rows, quads, chunk, slab };
                    let sensible = t.tile_rows() >= 32
                        && (slab >= 16 || t.tile_columns() == 16)
                        && t.tile_columns().is_multiple_of(slab)
                        && (64..=220).contains(&t.registers(kernel, head_dim, value_dim))
                        && t.threads() >= 64
                        && (!short || (chunk == 8 && slab == 16 && t.threads() >= 128 && rows >= 4));
                    if sensible {
                        all.push(t);
                    }
                }
            }
        }
    }
    all
}

fn main() -> Result<(), Box<dyn Error>> {
    let attention = Attention::open(&DeviceChoice::Gpu)?;
    let device = attention.device().ok_or("no GPU")?;
    println!("device: {} {}", attention.device_name(), device.wgpu().adapter_info().driver_info);
    let mut shapes: Vec<String> = std::env::args().skip(1).collect();
    let short = shapes.first().is_some_and(|first| first == "--short");
    if short {
        shapes.remove(0);
    }
    if shapes.is_empty() {
        shapes = vec!["64,64,32,8,8192,causal".into(), "128,128,32,8,8192,causal".into()];
    }
    let timer = Timer::new(device).ok_or("the device takes no timestamps")?;
    for text in shapes {
        let fields: Vec<&str> = text.split(',').collect();
        let [d, e, h, g, n, kind] = fields[..] else { return Err("want D,E,H,G,N,full|causal".into()) };
        let (d, e, h, g, n): (usize, usize, usize, usize, usize) =
            (d.parse()?, e.parse()?, h.parse()?, g.parse()?, n.parse()?);
        let shape = Shape { batch: 1, heads: h, kv_heads: g, seq_q: n, seq_k: n, head_dim: d, value_dim: e };
        let options = Options::new().causal(kind == "causal").sink_logits(SinkLogits::PerHead);
        let problem = Problem::new(shape, options)?;
        let operands = GpuOperands::new(device, &problem);
        let gradients = GpuGradients::new(device, &problem);
        let (forward, backward) = (operands.buffers(), gradients.buffers(&operands));
        // The backward kernels want a forward pass's real results.
        let first = attention.prepare_forward(&problem, &forward)?;
        timer.time(1, |pass| first.encode_in(pass))?;
        let whole = attention.prepare_backward(&problem, &backward)?;
        timer.time(1, |pass| whole.encode_in(pass))?;
        for (name, index) in [("delta", 0), ("d_sink_logits", 1)] {
            let times = time(&timer, PASSES, &whole, index)?;
            println!("{name}: {:.3} ms", times[times.len() / 2]);
        }
        // Matrix products a kernel really does, of the forward pass's two.
        for (kernel, products, index) in [(Kernel::Forward, 2.0, 0), (Kernel::DQ, 3.0, 2), (Kernel::DKv, 4.0, 3)] {
            let all = candidates(kernel, d as u32, e as u32, short);
            let total = all.len();
            let mut rows = Vec::new();
            let mut best = f64::INFINITY;
            for tiles in all {
                if Pass::with_tiles(kernel, &problem, true, device.capabilities(), tiles).is_err() {
                    continue;
                }
                let start = std::time::Instant::now();
                let choice = [(kernel, tiles)];
                let prepared = if kernel == Kernel::Forward {
                    pollster::block_on(attention.prepare_forward_with(&problem, &forward, &choice))?
                } else {
                    pollster::block_on(attention.prepare_backward_with(&problem, &backward, &choice))?
                };
                let compile = start.elapsed().as_secs_f64();
                let time = |passes| time(&timer, passes, &prepared, index);
                if compile < 0.05 {
                    // Software drivers compile at the first dispatch.
                    time(1)?;
                }
                let first = time(1)?;
                let times = if first[0] > 2.0 * best { first } else { time(PASSES)? };
                best = best.min(times[0]);
                rows.push((times[times.len() / 2], times[0], times[times.len() - 1], compile, tiles));
            }
            rows.sort_by(|a, b| a.0.total_cmp(&b.0));
            println!("\n{problem} {kernel:?}: {} of {total} candidates fit", rows.len());
            println!(
                "{:>7} {:>8} {:>8} {:>8} {:>5} {:>6} {:>5}  tiles",
                "TFLOP/s", "median", "min", "max", "comp", "bytes", "regs"
            );
            for (median, min, max, compile, tiles) in rows {
                println!(
                    "{:7.2} {median:8.3} {min:8.3} {max:8.3} {compile:5.2} {:6} {:5}  {tiles}",
                    problem.forward_flops() * products / 2.0 / median * 1e-9,
                    tiles.workgroup_bytes(kernel, d as u32, e as u32),
                    tiles.registers(kernel, d as u32, e as u32),
                );
            }
        }
    }
    Ok(())
}

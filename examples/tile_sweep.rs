//! Measures many tile shapes of each kernel on this device and prints them, the fastest first.
//!
//! `cargo run --release --example tile_sweep -- [--short] [D,E,H,G,N,full|causal ...]`
//! Times are GPU timestamps in milliseconds: minimum, median and maximum of five passes.

use std::error::Error;

use sink_attention::{
    Attention, BackwardBuffers, DeviceChoice, ForwardBuffers, Kernel, Options, Pass, Problem, Shape, SinkLogits,
    TensorView, Tiles, wgpu,
};

const PASSES: u32 = 5;

struct Timer {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read: wgpu::Buffer,
}

impl Timer {
    fn new(device: &wgpu::Device) -> Self {
        let count = 2 * PASSES;
        let size = u64::from(count) * 8;
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        Timer {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count,
            }),
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            read: buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ),
        }
    }

    /// Sorted milliseconds of each pass.
    fn time(
        &self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        passes: u32,
        encode: impl Fn(&mut wgpu::ComputePass<'_>),
    ) -> Result<Vec<f64>, Box<dyn Error>> {
        for n in 0..passes {
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                    query_set: &self.queries,
                    beginning_of_pass_write_index: Some(2 * n),
                    end_of_pass_write_index: Some(2 * n + 1),
                }),
            });
            encode(&mut pass);
            drop(pass);
            queue.submit([encoder.finish()]);
        }
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.resolve_query_set(&self.queries, 0..2 * passes, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.read, 0, u64::from(passes) * 16);
        queue.submit([encoder.finish()]);
        self.read.map_async(wgpu::MapMode::Read, .., |_| {});
        device.poll(wgpu::PollType::wait_indefinitely())?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&self.read.get_mapped_range(..)?);
        self.read.unmap();
        let period = f64::from(queue.get_timestamp_period()) * 1e-6;
        let mut times: Vec<f64> =
            ticks.chunks(2).take(passes as usize).map(|t| (t[1] - t[0]) as f64 * period).collect();
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
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
    let (gpu, queue) = (device.wgpu(), device.queue());
    println!("device: {} {}", attention.device_name(), gpu.adapter_info().driver_info);
    let mut shapes: Vec<String> = std::env::args().skip(1).collect();
    let short = shapes.first().is_some_and(|first| first == "--short");
    if short {
        shapes.remove(0);
    }
    if shapes.is_empty() {
        shapes = vec!["64,64,32,8,8192,causal".into(), "128,128,32,8,8192,causal".into()];
    }
    let timer = Timer::new(gpu);
    for text in shapes {
        let fields: Vec<&str> = text.split(',').collect();
        let [d, e, h, g, n, kind] = fields[..] else { return Err("want D,E,H,G,N,full|causal".into()) };
        let (d, e, h, g, n): (usize, usize, usize, usize, usize) =
            (d.parse()?, e.parse()?, h.parse()?, g.parse()?, n.parse()?);
        let shape = Shape { batch: 1, heads: h, kv_heads: g, seq_q: n, seq_k: n, head_dim: d, value_dim: e };
        let options = Options::new().causal(kind == "causal").sink_logits(SinkLogits::PerHead);
        let problem = Problem::new(shape, options)?;
        let buffer = |elements: usize, seed: u32| {
            let mut state = seed;
            let data: Vec<f32> = (0..elements)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            let buffer = gpu.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: elements as u64 * 4,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&data));
            buffer
        };
        let elements = |shape: [usize; 4]| shape.iter().product();
        let q = buffer(elements(problem.q_shape()), 1);
        let k = buffer(elements(problem.k_shape()), 2);
        let v = buffer(elements(problem.v_shape()), 3);
        let o = buffer(elements(problem.o_shape()), 4);
        let lse = buffer(h * n, 5);
        let sinks = buffer(h, 6);
        let d_o = buffer(elements(problem.o_shape()), 7);
        let d_q = buffer(elements(problem.q_shape()), 8);
        let d_k = buffer(elements(problem.k_shape()), 9);
        let d_v = buffer(elements(problem.v_shape()), 10);
        let d_sinks = buffer(h, 11);
        let forward = ForwardBuffers {
            q: TensorView::new(&q),
            k: TensorView::new(&k),
            v: TensorView::new(&v),
            sink_logits: Some(TensorView::new(&sinks)),
            o: TensorView::new(&o),
            lse: TensorView::new(&lse),
        };
        let backward = BackwardBuffers {
            forward,
            d_o: TensorView::new(&d_o),
            d_lse: None,
            d_q: TensorView::new(&d_q),
            d_k: TensorView::new(&d_k),
            d_v: TensorView::new(&d_v),
            d_sink_logits: Some(TensorView::new(&d_sinks)),
        };
        // The backward kernels want a forward pass's real results.
        let first = attention.prepare_forward(&problem, &forward)?;
        timer.time(gpu, queue, 1, |pass| first.encode_in(pass))?;
        let whole = attention.prepare_backward(&problem, &backward)?;
        timer.time(gpu, queue, 1, |pass| whole.encode_in(pass))?;
        for (name, index) in [("delta", 0), ("d_sink_logits", 1)] {
            let times = timer.time(gpu, queue, PASSES, |pass| whole.encode_pass_in(pass, index))?;
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
                let time = |passes| timer.time(gpu, queue, passes, |pass| prepared.encode_pass_in(pass, index));
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

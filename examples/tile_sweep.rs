//! Measures many tile shapes of the forward kernel on this device and prints them, the fastest first.
//!
//! `cargo run --release --example tile_sweep -- [D,E,H,G,N,full|causal ...]`
//! Times are GPU timestamps in milliseconds: minimum, median and maximum of nine passes.

use std::error::Error;

use sink_attention::{
    Attention, DeviceChoice, ForwardBuffers, Options, Plan, Problem, Shape, SinkLogits, TensorView, Tiles, wgpu,
};

const PASSES: u32 = 9;

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

fn candidates(head_dim: u32, value_dim: u32) -> Vec<Tiles> {
    let mut all = Vec::new();
    for (threads_q, threads_k) in
        [(8, 8), (16, 8), (4, 16), (8, 16), (16, 16), (32, 8), (4, 8), (2, 32), (4, 32), (8, 32)]
    {
        for rows in [4, 8, 16] {
            for quads in [1, 2, 4] {
                for chunk in [4, 8, 16, 32] {
                    for v_chunk in [8, 16, 32, 64] {
                        for (q_resident, v_apart) in [(false, false), (true, false), (true, true)] {
                            let t = Tiles { threads_q, threads_k, rows, quads, chunk, v_chunk, q_resident, v_apart };
                            let registers = t.registers(value_dim);
                            let reach = t.tile_q() >= 32 && t.tile_k() >= 32 && t.tile_k() <= 128;
                            let waste = t.value_quads(value_dim) * threads_k * 4 > value_dim;
                            let v_fits = v_chunk == t.tile_k().min(64) || (!v_apart && v_chunk == 16);
                            if reach
                                && !waste
                                && v_fits
                                && (90..=250).contains(&registers)
                                && chunk * 4 <= head_dim
                                && t.threads() >= 64
                            {
                                all.push(t);
                            }
                        }
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
        let buffers = ForwardBuffers {
            q: TensorView::new(&q),
            k: TensorView::new(&k),
            v: TensorView::new(&v),
            sink_logits: Some(TensorView::new(&sinks)),
            o: TensorView::new(&o),
            lse: TensorView::new(&lse),
        };
        let mut rows = Vec::new();
        let all = candidates(d as u32, e as u32);
        let total = all.len();
        let mut best = f64::INFINITY;
        for tiles in all {
            if Plan::with_tiles(&problem, true, device.capabilities(), tiles).is_err() {
                continue;
            }
            let start = std::time::Instant::now();
            let prepared = pollster::block_on(attention.prepare_forward_with(&problem, &buffers, Some(tiles)))?;
            let compile = start.elapsed().as_secs_f64();
            let first = timer.time(gpu, queue, 1, |pass| prepared.encode_in(pass))?[0];
            let passes = if first > 3.0 * best { 1 } else { PASSES };
            let times =
                if passes > 1 { timer.time(gpu, queue, passes, |pass| prepared.encode_in(pass))? } else { vec![first] };
            best = best.min(times[0]);
            rows.push((times[times.len() / 2], times[0], times[times.len() - 1], compile, tiles));
        }
        rows.sort_by(|a, b| a.0.total_cmp(&b.0));
        println!("\n{problem}: {} of {total} candidates fit", rows.len());
        println!(
            "{:>7} {:>8} {:>8} {:>8} {:>5} {:>6} {:>5}  tiles",
            "TFLOP/s", "median", "min", "max", "comp", "bytes", "regs"
        );
        for (median, min, max, compile, tiles) in rows {
            println!(
                "{:7.2} {median:8.3} {min:8.3} {max:8.3} {compile:5.2} {:6} {:5}  {tiles}",
                problem.forward_flops() / median * 1e-9,
                tiles.workgroup_bytes(d as u32, e as u32),
                tiles.registers(e as u32),
            );
        }
    }
    Ok(())
}

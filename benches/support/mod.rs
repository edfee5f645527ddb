//! Shared by the benches and `examples/tile_sweep.rs`: GPU timestamps, and random operands.

#![allow(dead_code, reason = "each user takes its own part")]

use std::error::Error;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::{
    BackwardBuffers, Capabilities, Device, ForwardBuffers, Inputs, Problem, SinkLogits, TensorView, wgpu,
};

/// Passes between two readings of the timestamps.
const BATCH: u32 = 128;

/// Times compute passes by the GPU's own clock.
pub struct Timer {
    device: Device,
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read: wgpu::Buffer,
}

impl Timer {
    /// `None` where the device takes no timestamps.
    pub fn new(device: &Device) -> Option<Self> {
        if !device.capabilities().timestamps {
            return None;
        }
        let label = Some("timer");
        let buffer = |usage| {
            let size = u64::from(2 * BATCH) * 8;
            device.wgpu().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
        };
        Some(Timer {
            device: device.clone(),
            queries: device.wgpu().create_query_set(&wgpu::QuerySetDescriptor {
                label,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * BATCH,
            }),
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            read: buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ),
        })
    }

    /// Runs the pass `passes` times, submissions back to back so that the clock stays up, and gives the
    /// duration of each.
    pub fn time(
        &self,
        passes: u64,
        encode: impl Fn(&mut wgpu::ComputePass<'_>),
    ) -> Result<Vec<Duration>, Box<dyn Error>> {
        let mut times = Vec::new();
        let mut left = passes;
        while left > 0 {
            let count = left.min(u64::from(BATCH)) as u32;
            times.extend(self.batch(count, &encode)?);
            left -= u64::from(count);
        }
        Ok(times)
    }

    fn batch(&self, passes: u32, encode: impl Fn(&mut wgpu::ComputePass<'_>)) -> Result<Vec<Duration>, Box<dyn Error>> {
        let (device, queue) = (self.device.wgpu(), self.device.queue());
        for n in 0..passes {
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("timed"),
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
        // Fails where the mapping did.
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&self.read.get_mapped_range(..)?);
        self.read.unmap();
        let nanoseconds = f64::from(queue.get_timestamp_period());
        ticks
            .chunks_exact(2)
            .take(passes as usize)
            .map(|t| {
                let ticks = t[1].checked_sub(t[0]).ok_or("the GPU's timestamps run backwards")?;
                Ok(Duration::from_secs_f64(ticks as f64 * nanoseconds * 1e-9))
            })
            .collect()
    }
}

/// What stands in the way of a problem's buffers, if anything.
pub fn too_large(problem: &Problem, capabilities: &Capabilities) -> Option<String> {
    let limit = capabilities.binding_bytes.min(capabilities.buffer_bytes);
    let shapes =
        [("q", problem.q_shape()), ("k", problem.k_shape()), ("v", problem.v_shape()), ("o", problem.o_shape())];
    shapes.into_iter().find_map(|(operand, shape)| {
        let bytes = shape.iter().product::<usize>() as u64 * 4;
        (bytes > limit).then(|| format!("{operand} takes {bytes} bytes, the device binds {limit}"))
    })
}

/// Operands and results of a forward pass in GPU buffers, the operands with random numbers in [-1, 1).
pub struct GpuOperands {
    q: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    sink_logits: Option<wgpu::Buffer>,
    o: wgpu::Buffer,
    lse: wgpu::Buffer,
}

impl GpuOperands {
    pub fn new(device: &Device, problem: &Problem) -> Self {
        let operands = [problem.q_shape(), problem.k_shape(), problem.v_shape(), [1, 1, 1, problem.shape().heads]];
        let [q, k, v, sink_logits] = filled(device, operands);
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        GpuOperands {
            q,
            k,
            v,
            sink_logits: per_head.then_some(sink_logits),
            o: buffer(device, problem.o_shape().iter().product(), wgpu::BufferUsages::STORAGE),
            lse: buffer(device, problem.lse_shape().iter().product(), wgpu::BufferUsages::STORAGE),
        }
    }

    pub fn buffers(&self) -> ForwardBuffers<'_> {
        ForwardBuffers {
            q: TensorView::new(&self.q),
            k: TensorView::new(&self.k),
            v: TensorView::new(&self.v),
            sink_logits: self.sink_logits.as_ref().map(TensorView::new),
            o: TensorView::new(&self.o),
            lse: TensorView::new(&self.lse),
        }
    }
}

/// Operands and results of a backward pass beyond those of the forward pass.
pub struct GpuGradients {
    d_o: wgpu::Buffer,
    d_q: wgpu::Buffer,
    d_k: wgpu::Buffer,
    d_v: wgpu::Buffer,
    d_sink_logits: wgpu::Buffer,
}

impl GpuGradients {
    pub fn new(device: &Device, problem: &Problem) -> Self {
        let [d_o] = filled(device, [problem.o_shape()]);
        let result = |shape: [usize; 4]| buffer(device, shape.iter().product(), wgpu::BufferUsages::STORAGE);
        GpuGradients {
            d_o,
            d_q: result(problem.q_shape()),
            d_k: result(problem.k_shape()),
            d_v: result(problem.v_shape()),
            d_sink_logits: result([1, 1, 1, problem.shape().heads]),
        }
    }

    /// The forward pass must have run: its results are read.
    pub fn buffers<'a>(&'a self, operands: &'a GpuOperands) -> BackwardBuffers<'a> {
        let forward = operands.buffers();
        BackwardBuffers {
            forward,
            d_o: TensorView::new(&self.d_o),
            d_lse: None,
            d_q: TensorView::new(&self.d_q),
            d_k: TensorView::new(&self.d_k),
            d_v: TensorView::new(&self.d_v),
            d_sink_logits: forward.sink_logits.map(|_| TensorView::new(&self.d_sink_logits)),
        }
    }
}

/// Buffers of random numbers. Large ones repeat one block of numbers, each from another place in it; the odd
/// length keeps rows from repeating.
fn filled<const N: usize>(device: &Device, shapes: [[usize; 4]; N]) -> [wgpu::Buffer; N] {
    let noise = random(&mut StdRng::seed_from_u64(0), (1 << 20) + 7);
    let source = buffer(device, noise.len(), wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST);
    device.queue().write_buffer(&source, 0, bytemuck::cast_slice(&noise));
    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
    let buffers = std::array::from_fn(|n| {
        let elements: usize = shapes[n].iter().product();
        let target = buffer(device, elements, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST);
        let (mut from, mut done) = (n * noise.len() / N, 0);
        while done < elements {
            let count = (noise.len() - from).min(elements - done);
            let [from_byte, to_byte, bytes] = [from, done, count].map(|n| n as u64 * 4);
            encoder.copy_buffer_to_buffer(&source, from_byte, &target, to_byte, bytes);
            done += count;
            from = 0;
        }
        target
    });
    device.queue().submit([encoder.finish()]);
    buffers
}

fn buffer(device: &Device, elements: usize, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let label = Some("operand");
    let size = elements as u64 * 4;
    device.wgpu().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
}

/// The operands of a forward pass on the host.
pub struct HostOperands {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sink_logits: Option<Vec<f32>>,
}

impl HostOperands {
    pub fn new(problem: &Problem) -> Self {
        let mut rng = StdRng::seed_from_u64(0);
        let mut filled = |elements| random(&mut rng, elements);
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        HostOperands {
            q: filled(problem.q_shape().iter().product()),
            k: filled(problem.k_shape().iter().product()),
            v: filled(problem.v_shape().iter().product()),
            sink_logits: per_head.then(|| filled(problem.shape().heads)),
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, sink_logits: self.sink_logits.as_deref() }
    }
}

fn random(rng: &mut StdRng, elements: usize) -> Vec<f32> {
    (0..elements).map(|_| rng.random_range(-1.0..1.0)).collect()
}

//! Random operands for timing, on the GPU and on the host. The benches include this file.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::half::{bf16, f16};
use sink_attention::{
    BackwardBuffers, Bias, Capabilities, DType, Device, Element, ForwardBuffers, Inputs, MaskData, Problem, Result,
    SinkLogits, TensorView, wgpu,
};

/// What stands in the way of a problem's buffers, if anything.
pub fn too_large(problem: &Problem, capabilities: &Capabilities) -> Option<String> {
    let limit = capabilities.buffer_bytes;
    let [batch, heads, seq] = problem.lse_shape();
    let (element, lse) = (problem.options().dtype.bytes(), [batch, heads, seq, 1]);
    let operands = [
        ("q", problem.q_shape(), element),
        ("k", problem.k_shape(), element),
        ("v", problem.v_shape(), element),
        ("o", problem.o_shape(), element),
        ("lse", lse, 4),
    ];
    operands.into_iter().find_map(|(operand, shape, element)| {
        let bytes = shape.iter().product::<usize>() as u128 * element as u128;
        (bytes > u128::from(limit))
            .then(|| format!("{operand} takes {bytes} bytes, a buffer of the device {limit} at most"))
    })
}

/// Operands and results of a forward pass in GPU buffers, o_rest among them, as training wants it; the operands with random
/// numbers in [-1, 1).
pub struct GpuOperands {
    q: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    sink_logits: Option<wgpu::Buffer>,
    alibi_slopes: Option<wgpu::Buffer>,
    bias: Option<wgpu::Buffer>,
    mask: Option<wgpu::Buffer>,
    o: wgpu::Buffer,
    o_rest: Option<wgpu::Buffer>,
    lse: wgpu::Buffer,
}

impl GpuOperands {
    pub fn new(device: &Device, problem: &Problem) -> Result<Self> {
        let dtype = problem.options().dtype;
        let create = || {
            let [q, k, v] = filled(device, dtype, [problem.q_shape(), problem.k_shape(), problem.v_shape()]);
            let per_head = problem.options().sink_logits == SinkLogits::PerHead;
            let one = |dtype, shape| {
                let [buffer] = filled(device, dtype, [shape]);
                buffer
            };
            let each_head = || one(DType::F32, [1, 1, 1, problem.shape().heads]);
            let bias_dtype = problem.options().bias_dtype;
            let written = |bytes: &[u8]| {
                let size = bytes.len() as u64;
                let target = buffer(device, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST);
                device.queue().write_buffer(&target, 0, bytes);
                target
            };
            let mask = |_| written(&mask_of(problem, &mut StdRng::seed_from_u64(0)));
            let [batch, heads, seq] = problem.lse_shape();
            GpuOperands {
                q,
                k,
                v,
                sink_logits: per_head.then(each_head),
                alibi_slopes: problem.options().alibi.then(|| written(bytemuck::cast_slice(&slopes(problem)))),
                bias: problem.bias_shape().map(|shape| one(bias_dtype, shape)),
                mask: problem.mask_shape().map(mask),
                o: result(device, dtype, problem.o_shape()),
                o_rest: (dtype != DType::F32).then(|| result(device, dtype, problem.o_shape())),
                lse: result(device, DType::F32, [batch, heads, seq, 1]),
            }
        };
        pollster::block_on(device.scoped("creating operands", create))
    }

    pub fn buffers(&self) -> ForwardBuffers<'_> {
        ForwardBuffers {
            sink_logits: self.sink_logits.as_ref().map(TensorView::new),
            alibi_slopes: self.alibi_slopes.as_ref().map(TensorView::new),
            bias: self.bias.as_ref().map(TensorView::new),
            mask: self.mask.as_ref().map(TensorView::new),
            o_rest: self.o_rest.as_ref().map(TensorView::new),
            ..ForwardBuffers::new(
                TensorView::new(&self.q),
                TensorView::new(&self.k),
                TensorView::new(&self.v),
                TensorView::new(&self.o),
                TensorView::new(&self.lse),
            )
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
    d_alibi_slopes: wgpu::Buffer,
    d_bias: wgpu::Buffer,
}

impl GpuGradients {
    pub fn new(device: &Device, problem: &Problem) -> Result<Self> {
        let dtype = problem.options().dtype;
        let create = || {
            let [d_o] = filled(device, dtype, [problem.o_shape()]);
            GpuGradients {
                d_o,
                d_q: result(device, dtype, problem.q_shape()),
                d_k: result(device, dtype, problem.k_shape()),
                d_v: result(device, dtype, problem.v_shape()),
                d_sink_logits: result(device, DType::F32, [1, 1, 1, problem.shape().heads]),
                d_alibi_slopes: result(device, DType::F32, [1, 1, 1, problem.shape().heads]),
                d_bias: result(device, DType::F32, problem.bias_shape().unwrap_or([1; 4])),
            }
        };
        pollster::block_on(device.scoped("creating gradients", create))
    }

    /// The forward pass must have run: its results are read.
    pub fn buffers<'a>(&'a self, operands: &'a GpuOperands) -> BackwardBuffers<'a> {
        let forward = operands.buffers();
        BackwardBuffers {
            d_sink_logits: forward.sink_logits.map(|_| TensorView::new(&self.d_sink_logits)),
            d_alibi_slopes: forward.alibi_slopes.map(|_| TensorView::new(&self.d_alibi_slopes)),
            d_bias: forward.bias.map(|_| TensorView::new(&self.d_bias)),
            ..BackwardBuffers::new(
                forward,
                TensorView::new(&self.d_o),
                TensorView::new(&self.d_q),
                TensorView::new(&self.d_k),
                TensorView::new(&self.d_v),
            )
        }
    }
}

/// Buffers of random numbers. Large ones repeat one block of numbers, each from another place in it; the odd
/// length keeps rows from repeating.
pub fn filled<const N: usize>(device: &Device, dtype: DType, shapes: [[usize; 4]; N]) -> [wgpu::Buffer; N] {
    let noise = random(&mut StdRng::seed_from_u64(0), (1 << 20) + 14);
    let noise: Vec<u8> = match dtype {
        DType::F16 => bytemuck::cast_slice(&f16::narrow(noise)).to_vec(),
        DType::Bf16 => bytemuck::cast_slice(&bf16::narrow(noise)).to_vec(),
        _ => bytemuck::cast_slice(&noise).to_vec(),
    };
    // Halves and singles alike are copied in words.
    let words = noise.len() as u64 / 4;
    let source = buffer(device, 4 * words, wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST);
    device.queue().write_buffer(&source, 0, &noise);
    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
    let buffers = std::array::from_fn(|n| {
        let size = bytes(dtype, shapes[n]);
        let target = buffer(device, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST);
        let (mut from, mut done) = (n as u64 * words / N as u64, 0);
        while 4 * done < size {
            let count = (words - from).min(size / 4 - done);
            encoder.copy_buffer_to_buffer(&source, 4 * from, &target, 4 * done, 4 * count);
            done += count;
            from = 0;
        }
        target
    });
    device.queue().submit([encoder.finish()]);
    buffers
}

/// Whole words.
fn bytes(dtype: DType, shape: [usize; 4]) -> u64 {
    (shape.iter().product::<usize>() * dtype.bytes()).next_multiple_of(4) as u64
}

pub fn result(device: &Device, dtype: DType, shape: [usize; 4]) -> wgpu::Buffer {
    buffer(device, bytes(dtype, shape), wgpu::BufferUsages::STORAGE)
}

fn buffer(device: &Device, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let label = Some("operand");
    device.wgpu().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
}

/// The operands of a forward pass on the host.
pub struct HostOperands<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    sink_logits: Option<Vec<f32>>,
    alibi_slopes: Option<Vec<f32>>,
    bias: Option<Vec<T>>,
    mask: Option<Vec<u8>>,
}

impl<T: Element> HostOperands<T> {
    pub fn new(problem: &Problem) -> Self {
        let mut rng = StdRng::seed_from_u64(0);
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        let sink_logits = per_head.then(|| random(&mut rng, problem.shape().heads));
        let alibi_slopes = problem.options().alibi.then(|| slopes(problem));
        let bias = problem.bias_shape().map(|shape| T::narrow(random(&mut rng, shape.iter().product())));
        let mask = problem.mask_shape().map(|shape| {
            let mut mask = mask_of(problem, &mut rng);
            mask.truncate(shape.iter().product());
            mask
        });
        let mut filled = |shape: [usize; 4]| T::narrow(random(&mut rng, shape.iter().product()));
        HostOperands {
            q: filled(problem.q_shape()),
            k: filled(problem.k_shape()),
            v: filled(problem.v_shape()),
            sink_logits,
            alibi_slopes,
            bias,
            mask,
        }
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        let inputs = Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref());
        let inputs = inputs.alibi_slopes(self.alibi_slopes.as_deref()).bias(self.bias.as_deref().map(Bias::Operand));
        inputs.mask(self.mask.as_deref().map(MaskData::Bytes))
    }
}

/// The slopes of ALiBi's authors for so many heads: 2^(-8 h / H), h from 1 (Press et al., arXiv:2108.12409).
fn slopes(problem: &Problem) -> Vec<f32> {
    let heads = problem.shape().heads;
    (1..=heads).map(|h| (-8.0 * h as f32 / heads as f32).exp2()).collect()
}

/// A boolean mask in bytes, in whole words: causal where the problem is not, else one that hides one pair in 256.
fn mask_of(problem: &Problem, rng: &mut StdRng) -> Vec<u8> {
    let Some(shape @ [.., keys]) = problem.mask_shape() else { return Vec::new() };
    let (rows, total) = (shape[2], shape.iter().product::<usize>());
    let causal = problem.options().causal;
    let shows = |at: usize, rng: &mut StdRng| match causal {
        true => rng.random_range(0..256) > 0,
        false => at % keys <= at / keys % rows + keys.saturating_sub(rows),
    };
    let mut mask: Vec<u8> = (0..total).map(|at| u8::from(shows(at, rng))).collect();
    mask.resize(total.next_multiple_of(4), 1);
    mask
}

fn random(rng: &mut StdRng, elements: usize) -> Vec<f32> {
    (0..elements).map(|_| rng.random_range(-1.0..1.0)).collect()
}

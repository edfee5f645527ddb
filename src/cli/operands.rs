//! Random operands for timing, on the GPU and on the host. The benches include this file.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sink_attention::half::{bf16, f16};
use sink_attention::{
    BackwardBuffers, Bias, BufferType, Capabilities, DType, Device, DeviceBuffer, Element, ForwardBuffers, Inputs,
    MaskData, Problem, Result, SinkLogits,
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

/// Operands and results of a forward pass in GPU buffers, o_lo among them, as training wants it; the operands with random
/// numbers in [-1, 1).
pub struct GpuOperands {
    q: DeviceBuffer,
    k: DeviceBuffer,
    v: DeviceBuffer,
    sink_logits: Option<DeviceBuffer>,
    alibi_slopes: Option<DeviceBuffer>,
    bias: Option<DeviceBuffer>,
    mask: Option<DeviceBuffer>,
    o: DeviceBuffer,
    o_lo: Option<DeviceBuffer>,
    lse: DeviceBuffer,
}

impl GpuOperands {
    pub fn new(device: &Device, problem: &Problem) -> Result<Self> {
        let dtype = problem.options().dtype;
        let [q, k, v] = filled(device, dtype, [problem.q_shape(), problem.k_shape(), problem.v_shape()])?;
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        let one = |dtype, shape| filled(device, dtype, [shape]).map(|[buffer]| buffer);
        let each_head = || one(DType::F32, [1, 1, 1, problem.shape().heads]);
        let mask = |_| device.upload("mask", &mask_of(problem, &mut StdRng::seed_from_u64(0)));
        Ok(GpuOperands {
            q,
            k,
            v,
            sink_logits: per_head.then(each_head).transpose()?,
            alibi_slopes: problem
                .options()
                .alibi
                .then(|| device.upload("alibi_slopes", &slopes(problem)))
                .transpose()?,
            bias: problem.bias_shape().map(|shape| one(problem.options().bias_dtype, shape)).transpose()?,
            mask: problem.mask_shape().map(mask).transpose()?,
            o: device.zeros("o", dtype, &problem.o_shape())?,
            o_lo: (dtype != DType::F32)
                .then(|| device.zeros("o_lo", BufferType::I16, &problem.o_shape()))
                .transpose()?,
            lse: device.zeros("lse", DType::F32, &problem.lse_shape())?,
        })
    }

    pub fn buffers(&self) -> ForwardBuffers<'_> {
        ForwardBuffers {
            sink_logits: self.sink_logits.as_ref().map(DeviceBuffer::view),
            alibi_slopes: self.alibi_slopes.as_ref().map(DeviceBuffer::view),
            bias: self.bias.as_ref().map(DeviceBuffer::view),
            mask: self.mask.as_ref().map(DeviceBuffer::view),
            o_lo: self.o_lo.as_ref().map(DeviceBuffer::view),
            ..ForwardBuffers::new(&self.q, &self.k, &self.v, &self.o, &self.lse)
        }
    }
}

/// Operands and results of a backward pass beyond those of the forward pass.
pub struct GpuGradients {
    d_o: DeviceBuffer,
    d_q: DeviceBuffer,
    d_k: DeviceBuffer,
    d_v: DeviceBuffer,
    d_sink_logits: DeviceBuffer,
    d_alibi_slopes: DeviceBuffer,
    d_bias: DeviceBuffer,
}

impl GpuGradients {
    pub fn new(device: &Device, problem: &Problem) -> Result<Self> {
        let (dtype, heads) = (problem.options().dtype, problem.shape().heads);
        let [d_o] = filled(device, dtype, [problem.o_shape()])?;
        Ok(GpuGradients {
            d_o,
            d_q: device.zeros("d_q", dtype, &problem.q_shape())?,
            d_k: device.zeros("d_k", dtype, &problem.k_shape())?,
            d_v: device.zeros("d_v", dtype, &problem.v_shape())?,
            d_sink_logits: device.zeros("d_sink_logits", DType::F32, &[heads])?,
            d_alibi_slopes: device.zeros("d_alibi_slopes", DType::F32, &[heads])?,
            d_bias: device.zeros("d_bias", DType::F32, &problem.bias_shape().unwrap_or([1; 4]))?,
        })
    }

    /// The forward pass must have run: its results are read.
    pub fn buffers<'a>(&'a self, operands: &'a GpuOperands) -> BackwardBuffers<'a> {
        let forward = operands.buffers();
        BackwardBuffers {
            d_sink_logits: forward.sink_logits.map(|_| self.d_sink_logits.view()),
            d_alibi_slopes: forward.alibi_slopes.map(|_| self.d_alibi_slopes.view()),
            d_bias: forward.bias.map(|_| self.d_bias.view()),
            ..BackwardBuffers::new(forward, &self.d_o, &self.d_q, &self.d_k, &self.d_v)
        }
    }
}

/// Buffers of random numbers. Large ones repeat one block of numbers, each from another place in it; the odd
/// length keeps rows from repeating.
pub fn filled<const N: usize>(device: &Device, dtype: DType, shapes: [[usize; 4]; N]) -> Result<[DeviceBuffer; N]> {
    let noise = random(&mut StdRng::seed_from_u64(0), (1 << 20) + 14);
    let source = match dtype {
        DType::F16 => device.upload("noise", &f16::narrow(noise))?,
        DType::Bf16 => device.upload("noise", &bf16::narrow(noise))?,
        _ => device.upload("noise", &noise)?,
    };
    let mut buffers = Vec::with_capacity(N);
    for shape in shapes {
        buffers.push(device.zeros("operand", dtype, &shape)?);
    }
    let copy = || {
        let mut encoder = device.wgpu().create_command_encoder(&Default::default());
        // Halves and singles alike are copied in words.
        let words = source.wgpu().size() / 4;
        for (n, target) in buffers.iter().enumerate() {
            let size = target.wgpu().size();
            let (mut from, mut done) = (n as u64 * words / N as u64, 0);
            while 4 * done < size {
                let count = (words - from).min(size / 4 - done);
                encoder.copy_buffer_to_buffer(source.wgpu(), 4 * from, target.wgpu(), 4 * done, 4 * count);
                done += count;
                from = 0;
            }
        }
        device.queue().submit([encoder.finish()]);
    };
    pollster::block_on(device.scoped("creating operands", copy))?;
    let none = || sink_attention::Error::Gpu { during: "creating operands", message: "one is missing".into() };
    buffers.try_into().map_err(|_| none())
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

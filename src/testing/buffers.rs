//! Operands and results in buffers of a GPU, for timing.

use half::{bf16, f16};

use super::operands::{MaskValues, slopes, timed_mask};
use super::random::Random;
use crate::device::BufferType;
use crate::device::DeviceBuffer;
use crate::plan::Capabilities;
use crate::{BackwardBuffers, DType, Device, Element, Error, ForwardBuffers, Problem, Result, SinkLogits};

/// The reason why the buffers of a problem are too large for a device, if they are.
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

/// Operands and results of a forward pass in GPU buffers. They include o_lo, which training needs. The operands are random numbers in [-1,
/// 1).
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
        let mask = |mask: MaskValues| match mask {
            // Bytes are padded to whole words.
            MaskValues::Bytes(mut bytes) => {
                bytes.resize(bytes.len().next_multiple_of(4), 1);
                device.upload("mask", &bytes)
            }
            MaskValues::Bits(words) => device.upload("mask", &words),
        };
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
            mask: timed_mask(problem).map(mask).transpose()?,
            o: device.zeros("o", dtype, &problem.o_shape())?,
            o_lo: dtype
                .has_rounding_error()
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

    /// The buffers of the backward pass. The forward pass must have run, because its results are read.
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

/// Buffers of random numbers. Large buffers repeat one block of numbers, each from another place in it. The odd length keeps rows from
/// repeating.
pub fn filled<const N: usize>(device: &Device, dtype: DType, shapes: [[usize; 4]; N]) -> Result<[DeviceBuffer; N]> {
    let noise = Random::new(0, "timed").numbers((1 << 20) + 14);
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
        // Halves and singles are both copied in words.
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
    pollster::block_on(device.scoped_async("creating operands", copy))?;
    let none = || Error::Gpu { during: "creating operands", message: "one is missing".into() };
    buffers.try_into().map_err(|_| none())
}

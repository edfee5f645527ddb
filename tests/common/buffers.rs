//! GPU buffers of the caller's, and devices with other limits.

use sink_attention::plan::MicroKernel;
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, BackwardBuffers, Device, ForwardBuffers, Gradients, Output, Prepared, Problem, TensorView,
};

use super::gpu;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::Operands;

/// A second device on the adapter of [`gpu`](super::gpu), requested with other limits.
pub fn gpu_with(edit: impl FnOnce(&mut wgpu::Limits)) -> Option<Attention> {
    let wanted = gpu()?.device()?.wgpu().adapter_info();
    let adapters = sink_attention::device::adapters();
    let same = |adapter: &wgpu::Adapter| {
        let info = adapter.get_info();
        (info.name, info.backend) == (wanted.name.clone(), wanted.backend)
    };
    let adapter = adapters.into_iter().find(same).expect("the adapter is still there");
    let mut descriptor = sink_attention::device::device_descriptor(&adapter);
    edit(&mut descriptor.required_limits);
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Some(Attention::on(Device::from_wgpu_on(&adapter, device, queue)).with_micro_kernel(MicroKernel::Portable))
}

/// A buffer that holds `data`, for any use.
pub fn buffer(device: &Device, data: &[f32]) -> wgpu::Buffer {
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    let buffer = empty(device, size_of_val(data) as u64, usage);
    device.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(data));
    buffer
}

/// A buffer of zeros.
pub fn empty(device: &Device, size: u64, usage: BufferUsages) -> wgpu::Buffer {
    device.wgpu().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

/// What a buffer holds once everything submitted is done.
pub fn read(device: &Device, buffer: &wgpu::Buffer) -> Vec<f32> {
    let staging = empty(device, buffer.size(), BufferUsages::MAP_READ | BufferUsages::COPY_DST);
    submit(device, |encoder| encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size()));
    staging.map_async(wgpu::MapMode::Read, .., |result| result.unwrap());
    device.wgpu().poll(wgpu::PollType::wait_indefinitely()).unwrap();
    bytemuck::pod_collect_to_vec(&staging.get_mapped_range(..).unwrap())
}

/// Encodes and submits.
pub fn submit(device: &Device, encode: impl FnOnce(&mut wgpu::CommandEncoder)) {
    let mut encoder = device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encode(&mut encoder);
    device.queue().submit([encoder.finish()]);
}

/// All operands of a forward pass, each densely packed in a buffer of its own.
#[derive(Debug)]
pub struct Buffers {
    pub q: wgpu::Buffer,
    pub k: wgpu::Buffer,
    pub v: wgpu::Buffer,
    pub sink_logits: Option<wgpu::Buffer>,
    pub o: wgpu::Buffer,
    pub lse: wgpu::Buffer,
}

impl Buffers {
    /// Uploads the operands; the results' buffers hold NaN until they are written.
    pub fn new(device: &Device, problem: &Problem, operands: &Operands) -> Self {
        Buffers {
            q: buffer(device, &operands.q),
            k: buffer(device, &operands.k),
            v: buffer(device, &operands.v),
            sink_logits: operands.sink_logits.as_ref().map(|data| buffer(device, data)),
            o: buffer(device, &vec![f32::NAN; problem.o_shape().iter().product()]),
            lse: buffer(device, &vec![f32::NAN; problem.lse_shape().iter().product()]),
        }
    }

    pub fn views(&self) -> ForwardBuffers<'_> {
        ForwardBuffers::new(
            TensorView::new(&self.q),
            TensorView::new(&self.k),
            TensorView::new(&self.v),
            TensorView::new(&self.o),
            TensorView::new(&self.lse),
        )
        .sink_logits(self.sink_logits.as_ref().map(TensorView::new))
    }

    /// Runs a pass that was prepared with these buffers and reads its results.
    pub fn run(&self, device: &Device, prepared: &Prepared) -> Output {
        submit(device, |encoder| prepared.encode(encoder));
        Output::new(read(device, &self.o), read(device, &self.lse))
    }
}

/// All operands of a backward pass, each densely packed in a buffer of its own.
#[derive(Debug)]
pub struct GradientBuffers {
    pub forward: Buffers,
    pub d_o: wgpu::Buffer,
    pub d_lse: Option<wgpu::Buffer>,
    pub d_q: wgpu::Buffer,
    pub d_k: wgpu::Buffer,
    pub d_v: wgpu::Buffer,
    pub d_sink_logits: Option<wgpu::Buffer>,
}

impl GradientBuffers {
    /// Uploads the operands; the buffers of all results, o and lse among them, hold NaN until they are written.
    pub fn new(device: &Device, problem: &Problem, backward: &Backward) -> Self {
        let operands = &backward.operands;
        let result = |len| buffer(device, &vec![f32::NAN; len]);
        GradientBuffers {
            forward: Buffers::new(device, problem, operands),
            d_o: buffer(device, &backward.d_o),
            d_lse: backward.d_lse.as_ref().map(|data| buffer(device, data)),
            d_q: result(operands.q.len()),
            d_k: result(operands.k.len()),
            d_v: result(operands.v.len()),
            d_sink_logits: operands.sink_logits.as_ref().map(|data| result(data.len())),
        }
    }

    /// Stands in for a forward pass.
    pub fn save(&self, device: &Device, saved: &Output) {
        for (buffer, data) in [(&self.forward.o, &saved.o), (&self.forward.lse, &saved.lse)] {
            device.queue().write_buffer(buffer, 0, bytemuck::cast_slice(data));
        }
    }

    pub fn views(&self) -> BackwardBuffers<'_> {
        BackwardBuffers::new(
            self.forward.views(),
            TensorView::new(&self.d_o),
            TensorView::new(&self.d_q),
            TensorView::new(&self.d_k),
            TensorView::new(&self.d_v),
        )
        .d_lse(self.d_lse.as_ref().map(TensorView::new))
        .d_sink_logits(self.d_sink_logits.as_ref().map(TensorView::new))
    }

    /// Runs a pass that was prepared with these buffers and reads the gradients.
    pub fn run(&self, device: &Device, prepared: &Prepared) -> Gradients {
        submit(device, |encoder| prepared.encode(encoder));
        self.read(device)
    }

    /// The gradients as they are now.
    pub fn read(&self, device: &Device) -> Gradients {
        Gradients::new(read(device, &self.d_q), read(device, &self.d_k), read(device, &self.d_v))
            .d_sink_logits(self.d_sink_logits.as_ref().map(|buffer| read(device, buffer)))
    }
}

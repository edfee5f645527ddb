//! GPU buffers of the caller's, and devices with other limits.

use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{Attention, Device, ForwardBuffers, Output, Prepared, Problem, TensorView};

use super::gpu;
use super::operands::Operands;

/// A second device on the adapter of [`gpu`](super::gpu), requested with other limits.
pub fn gpu_with(edit: impl FnOnce(&mut wgpu::Limits)) -> Option<Attention> {
    let wanted = gpu()?.device()?.wgpu().adapter_info();
    let adapters = pollster::block_on(sink_attention::adapters());
    let same = |adapter: &wgpu::Adapter| {
        let info = adapter.get_info();
        (info.name, info.backend) == (wanted.name.clone(), wanted.backend)
    };
    let adapter = adapters.into_iter().find(same).expect("the adapter is still there");
    let mut descriptor = sink_attention::device_descriptor(&adapter);
    edit(&mut descriptor.required_limits);
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Some(Attention::on(Device::from_wgpu(device, queue)))
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
        ForwardBuffers {
            q: TensorView::new(&self.q),
            k: TensorView::new(&self.k),
            v: TensorView::new(&self.v),
            sink_logits: self.sink_logits.as_ref().map(TensorView::new),
            o: TensorView::new(&self.o),
            lse: TensorView::new(&self.lse),
        }
    }

    /// Runs a pass that was prepared with these buffers and reads its results.
    pub fn run(&self, device: &Device, prepared: &Prepared) -> Output {
        submit(device, |encoder| prepared.encode(encoder));
        Output { o: read(device, &self.o), lse: read(device, &self.lse) }
    }
}

//! Typed views of GPU buffers, and the way of host slices there and back.

use bytemuck::Pod;

use crate::device::{Device, note_buffer};
use crate::error::{Error, Result};
use crate::pieces::{View, WORD, Window};
use crate::problem::Layout;
use crate::shader::Binding;

/// An operand in a buffer of the caller's, of the problem's element type; lse, the sink logits and their gradients are
/// f32.
///
/// Kernels bind whole words of four bytes: a buffer of f16, bf16 or a mask in bytes must hold the whole of the word in which it
/// ends. What else lies in that word is kept.
///
/// The last axis is contiguous; the others may have any strides. By default the operand is densely
/// packed in the problem's layout and starts at the buffer's first element.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The buffer, of the operator's own device; it needs [`wgpu::BufferUsages::STORAGE`].
    pub buffer: &'a wgpu::Buffer,
    /// First element, counted in elements.
    pub offset: u64,
    /// Strides of batch, head and sequence, in elements, whatever the layout; `None` is densely packed.
    pub strides: Option<[u64; 3]>,
}

impl<'a> TensorView<'a> {
    /// A densely packed operand at the start of `buffer`.
    pub fn new(buffer: &'a wgpu::Buffer) -> Self {
        TensorView { buffer, offset: 0, strides: None }
    }

    /// Starts at element `offset`.
    pub fn offset(self, offset: u64) -> Self {
        TensorView { offset, ..self }
    }

    /// Strides of batch, head and sequence, in elements.
    pub fn strides(self, strides: [u64; 3]) -> Self {
        TensorView { strides: Some(strides), ..self }
    }
}

impl<'a> From<&'a wgpu::Buffer> for TensorView<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        TensorView::new(buffer)
    }
}

/// A view that has been checked against its buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed<'a> {
    buffer: &'a wgpu::Buffer,
    pub(crate) view: View,
}

impl<'a> Placed<'a> {
    /// Checks a view of an operand against its buffer.
    pub(crate) fn new(
        binding: Binding,
        view: &TensorView<'a>,
        extents: [usize; 4],
        layout: Layout,
        element: usize,
    ) -> Result<Self> {
        let (operand, buffer) = (binding.name(), view.buffer);
        let [_, heads, seq, width] = extents;
        let strides = view.strides.unwrap_or_else(|| layout.strides(heads, seq, width));
        let view = View::new(binding, view.offset, strides, extents, element);
        // With every byte countable, so is every stride.
        let (last_element, most) = (view.last_element(), (u64::MAX - WORD) / element as u64 - 1);
        if last_element > u128::from(most) {
            return Err(Error::IndexOverflow { operand, last_element, most });
        }
        let end = ((last_element as u64 + 1) * view.element).next_multiple_of(WORD);
        if end > buffer.size() {
            return Err(Error::BufferTooSmall { operand, needed: end, actual: buffer.size() });
        }
        let needed = wgpu::BufferUsages::STORAGE;
        if !buffer.usage().contains(needed) {
            return Err(Error::BufferUsage { operand, needed, actual: buffer.usage() });
        }
        Ok(Placed { buffer, view })
    }

    pub(crate) fn binding(&self, window: Window) -> wgpu::BindingResource<'a> {
        resource(self.buffer, window)
    }

    /// No two elements of a result may fall on one place.
    pub(crate) fn check_distinct(&self) -> Result<()> {
        let View { binding, strides, extents, .. } = self.view;
        let mut axes: Vec<(u64, u64)> = (0..3).filter(|&a| extents[a] > 1).map(|a| (strides[a], extents[a])).collect();
        axes.sort_unstable();
        let mut reach = extents[3];
        for (stride, extent) in axes {
            if stride < reach {
                return Err(Error::OverlappingStrides { operand: binding.name(), strides });
            }
            reach += stride * (extent - 1);
        }
        Ok(())
    }
}

/// A window of a buffer, to be bound.
pub(crate) fn resource(buffer: &wgpu::Buffer, window: Window) -> wgpu::BindingResource<'_> {
    let (offset, size) = (window.start, wgpu::BufferSize::new(window.len));
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
}

/// A new buffer that holds a host slice.
pub(crate) fn upload<T: Pod>(device: &Device, operand: &'static str, data: &[T]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
    let buffer = allocate::<T>(device, operand, data.len(), usage)?;
    // Writes are of whole words.
    let (words, rest) = bytemuck::cast_slice::<T, u8>(data).as_chunks::<4>();
    device.queue().write_buffer(&buffer, 0, words.as_flattened());
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        device.queue().write_buffer(&buffer, 4 * words.len() as u64, &last);
    }
    Ok(buffer)
}

/// A new buffer for elements of a type, padded to whole words.
pub(crate) fn allocate<T>(
    device: &Device,
    operand: &'static str,
    elements: usize,
    usage: wgpu::BufferUsages,
) -> Result<wgpu::Buffer> {
    let bytes = (elements * size_of::<T>()).next_multiple_of(4) as u64;
    let limit = device.capabilities().buffer_bytes;
    if bytes > limit {
        return Err(Error::BufferTooLarge { operand, bytes, limit });
    }
    note_buffer(operand, bytes);
    Ok(device.wgpu().create_buffer(&wgpu::BufferDescriptor {
        label: Some(operand),
        size: bytes,
        usage,
        mapped_at_creation: false,
    }))
}

/// What a failed download was about.
const READING: &str = "reading results back";

/// A buffer that is mapped for reading.
#[derive(Debug)]
pub(crate) struct Mapped {
    device: Device,
    buffer: wgpu::Buffer,
}

impl Mapped {
    /// The first `elements` elements.
    pub(crate) async fn read<T: Pod>(&self, elements: usize) -> Result<Vec<T>> {
        let mapped = self.buffer.get_mapped_range(..).map(|view| bytemuck::pod_collect_to_vec(&view));
        let mut data: Vec<T> = match mapped {
            Ok(data) => data,
            Err(error) => return Err(self.device.failure(READING, error.to_string()).await),
        };
        // Buffers end in whole words.
        data.truncate(elements);
        Ok(data)
    }
}

/// Encodes `work`, submits it, and maps copies of whole buffers.
pub(crate) async fn download<const N: usize>(
    device: &Device,
    buffers: [&wgpu::Buffer; N],
    work: impl FnOnce(&mut wgpu::CommandEncoder),
) -> Result<[Mapped; N]> {
    const LABEL: &str = "sink-attention download";
    let label = Some(LABEL);
    let staging = device
        .scoped("running a kernel", || {
            let mut encoder = device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            work(&mut encoder);
            let staging = buffers.map(|buffer| {
                note_buffer(LABEL, buffer.size());
                let staging = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                    label,
                    size: buffer.size(),
                    usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
                staging
            });
            device.queue().submit([encoder.finish()]);
            staging
        })
        .await?;
    let map = |buffer: &wgpu::Buffer| {
        let (sender, receiver) = futures_channel::oneshot::channel();
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone only when this whole future was dropped.
            let _ = sender.send(result);
        });
        receiver
    };
    let mapped = device.scoped(READING, || staging.each_ref().map(map)).await?;
    let finished = async {
        wait(device).await?;
        for receiver in mapped {
            receiver.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        }
        Ok::<_, String>(())
    };
    match finished.await {
        Ok(()) => Ok(staging.map(|buffer| Mapped { device: device.clone(), buffer })),
        Err(message) => Err(device.failure(READING, message).await),
    }
}

/// Waits for the queue on a thread of its own, so that the caller's executor is free meanwhile.
#[cfg(not(target_family = "wasm"))]
async fn wait(device: &Device) -> Result<(), String> {
    let device = device.clone();
    let (sender, receiver) = futures_channel::oneshot::channel();
    let wait = move || {
        // The receiver is gone only when this whole future was dropped.
        let _ = sender.send(device.wait());
    };
    std::thread::Builder::new().spawn(wait).map_err(|e| e.to_string())?;
    receiver.await.map_err(|e| e.to_string())?
}

/// Browsers drive the queue by themselves.
#[cfg(target_family = "wasm")]
async fn wait(_device: &Device) -> Result<(), String> {
    Ok(())
}

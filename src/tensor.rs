//! Typed views of GPU buffers, and the way of host slices there and back.

use bytemuck::Pod;

use crate::capabilities::Capabilities;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::problem::Layout;

/// An operand in a buffer of the caller's, of the problem's element type; lse, the sink logits and their gradients are
/// f32.
///
/// Kernels bind whole words of four bytes: a buffer of f16 or bf16 must hold the whole of the word in which its operand
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

/// Bytes of what bindings are counted in.
const WORD: u64 = 4;

/// Number of elements along batch, head, sequence and width.
pub(crate) type Extents = [usize; 4];

/// A view with its place in the buffer worked out and checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed<'a> {
    buffer: &'a wgpu::Buffer,
    /// Where the binding starts, aligned down as the device wants, and its length in whole words, in bytes.
    start: u64,
    len: u64,
    /// First element, counted from the binding's start.
    pub(crate) offset: u32,
    pub(crate) strides: [u32; 3],
    width: u32,
    /// Bytes of an element.
    element: u64,
}

impl<'a> Placed<'a> {
    /// Checks a view of an operand against its buffer and the device.
    pub(crate) fn new(
        operand: &'static str,
        view: &TensorView<'a>,
        extents: Extents,
        layout: Layout,
        element: usize,
        capabilities: &Capabilities,
    ) -> Result<Self> {
        let element = element as u64;
        let [_, heads, seq, width] = extents;
        let mut strides = view.strides.unwrap_or_else(|| layout.strides(heads, seq, width));
        // The stride of an axis with one element leads nowhere: it may be anything, and prevents nothing.
        for (stride, &extent) in strides.iter_mut().zip(&extents) {
            *stride = if extent == 1 { 0 } else { *stride };
        }
        let last =
            (0..3).fold(width as u128 - 1, |sum, axis| sum + strides[axis] as u128 * (extents[axis] as u128 - 1));
        let last_element = last + u128::from(view.offset);
        let most = u64::from(u32::MAX);
        // With every element within reach, every stride is too.
        if last_element > u128::from(most) {
            return Err(Error::IndexOverflow { operand, last_element, most });
        }
        let end = ((view.offset + last as u64 + 1) * element).next_multiple_of(WORD);
        if end > view.buffer.size() {
            return Err(Error::BufferTooSmall { operand, needed: end, actual: view.buffer.size() });
        }
        let needed = wgpu::BufferUsages::STORAGE;
        if !view.buffer.usage().contains(needed) {
            return Err(Error::BufferUsage { operand, needed, actual: view.buffer.usage() });
        }
        let alignment = u64::from(capabilities.offset_alignment).max(WORD);
        let start = view.offset * element / alignment * alignment;
        if end - start > capabilities.binding_bytes {
            return Err(Error::BindingTooLarge { operand, bytes: end - start, limit: capabilities.binding_bytes });
        }
        Ok(Placed {
            buffer: view.buffer,
            start,
            len: end - start,
            offset: (view.offset - start / element) as u32,
            strides: strides.map(|s| s as u32),
            width: width as u32,
            element,
        })
    }

    /// Whether rows can be read four neighbours at a time.
    pub(crate) fn vec4(&self) -> bool {
        self.start.is_multiple_of(4 * self.element)
            && [self.offset, self.width].iter().chain(&self.strides).all(|n| n.is_multiple_of(4))
    }

    pub(crate) fn binding(&self) -> wgpu::BindingResource<'a> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: self.buffer,
            offset: self.start,
            size: wgpu::BufferSize::new(self.len),
        })
    }

    /// No two elements of a result may fall on one place.
    pub(crate) fn check_distinct(&self, operand: &'static str, extents: Extents) -> Result<()> {
        let mut axes: Vec<(u64, u64)> =
            (0..3).filter(|&a| extents[a] > 1).map(|a| (u64::from(self.strides[a]), extents[a] as u64)).collect();
        axes.sort_unstable();
        let mut reach = u64::from(self.width);
        for (stride, extent) in axes {
            if stride < reach {
                return Err(Error::OverlappingStrides { operand, strides: self.strides.map(u64::from) });
            }
            reach += stride * (extent - 1);
        }
        Ok(())
    }
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
    let label = Some("sink-attention download");
    let staging = device
        .scoped("running a kernel", || {
            let mut encoder = device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            work(&mut encoder);
            let staging = buffers.map(|buffer| {
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

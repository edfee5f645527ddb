//! GPU buffers that know what they hold, typed views of buffers, and the way of host slices there and back.

use std::ops::Range;

use bytemuck::Pod;

use crate::device::open::{Device, note_buffer};
use crate::problem::element::{BufferType, sealed};
use crate::problem::error::{Error, Result};

/// An element of a host slice that goes to a GPU buffer or comes from one. Nothing else implements it.
pub trait BufferElement: sealed::Sealed + Pod {
    /// Its type as a value.
    const TYPE: BufferType;
}

macro_rules! buffer_element {
    ($($element:ty => $name:ident),*) => {
        $(impl BufferElement for $element {
            const TYPE: BufferType = BufferType::$name;
        })*
    };
}

buffer_element!(f32 => F32, half::f16 => F16, half::bf16 => Bf16, i16 => I16, u32 => U32, u8 => U8);

/// A GPU buffer of this crate's making that knows its element type and length, so that nobody counts bytes: made by
/// [`Device::upload`] and [`Device::zeros`], read by [`download`](Self::download), and an operand like any
/// [`wgpu::Buffer`], see [`TensorView`]. Cheap to clone; clones are the same buffer.
///
/// ```
/// use sink_attention::{Attention, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: 3, seq_k: 3, head_dim: 4, value_dim: 4 };
/// let problem = Problem::new(shape, Options::new().causal(true))?;
///
/// let q = device.upload("q", &[0.5; 3 * 2 * 4])?; // [batch, seq, heads, width]
/// let k = device.upload("k", &[0.1; 3 * 4])?;
/// let v = device.upload("v", &[2.0; 3 * 4])?;
/// let o = device.zeros("o", DType::F32, &problem.o_shape())?;
/// let lse = device.zeros("lse", DType::F32, &problem.lse_shape())?;
///
/// let forward = attention.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &v, &o, &lse))?;
/// let mut encoder = device.wgpu().create_command_encoder(&Default::default());
/// forward.encode(&mut encoder);
/// device.queue().submit([encoder.finish()]);
/// assert!(o.download::<f32>()?.iter().all(|x| (x - 2.0).abs() < 1e-6)); // means of equal values
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct DeviceBuffer {
    device: Device,
    buffer: wgpu::Buffer,
    operand: &'static str,
    element: BufferType,
    len: usize,
}

impl DeviceBuffer {
    /// The wgpu buffer, with the usages `STORAGE`, `COPY_SRC` and `COPY_DST`. Its size is that of the elements in whole words
    /// of four bytes, and never zero.
    pub fn wgpu(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// The whole buffer as an operand; [`TensorView::offset`] and [`TensorView::strides`] for parts of it.
    pub fn view(&self) -> TensorView<'_> {
        self.into()
    }

    /// Its element type.
    pub fn element(&self) -> BufferType {
        self.element
    }

    /// Its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes a host slice from element `offset` on, for what is submitted afterwards.
    ///
    /// # Errors
    /// [`Error::BufferType`] for a slice of another type; [`Error::BufferRange`] where it does not fit behind `offset`, or, of
    /// types shorter than four bytes, begins within a word or ends in one that holds other elements;
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn write<T: BufferElement>(&self, offset: usize, data: &[T]) -> Result<()> {
        pollster::block_on(self.write_async(offset, data))
    }

    /// As [`write`](Self::write), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_async<T: BufferElement>(&self, offset: usize, data: &[T]) -> Result<()> {
        let end = offset.saturating_add(data.len());
        self.check::<T>(&(offset..end))?;
        let words = 4 / T::TYPE.bytes();
        if !offset.is_multiple_of(words) || !(end.is_multiple_of(words) || end == self.len) {
            let reason = "a write begins and ends with a word of four bytes, or ends with the buffer";
            return Err(self.range(offset..end, reason));
        }
        let (bytes, start) = (bytemuck::cast_slice(data), (offset * T::TYPE.bytes()) as u64);
        self.device.scoped_async("writing a buffer", || write(&self.device, &self.buffer, start, bytes)).await
    }

    /// Its elements once everything submitted is done; blocks until they are there.
    ///
    /// # Errors
    /// [`Error::BufferType`] for another type; [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the
    /// driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn download<T: BufferElement>(&self) -> Result<Vec<T>> {
        pollster::block_on(self.download_async())
    }

    /// As [`download`](Self::download), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`download`](Self::download).
    pub async fn download_async<T: BufferElement>(&self) -> Result<Vec<T>> {
        let [data] = self.device.download_async([(self, 0..self.len)]).await?;
        Ok(data)
    }

    /// The slice is of the buffer's type, and the range of elements lies within it.
    fn check<T: BufferElement>(&self, range: &Range<usize>) -> Result<()> {
        if T::TYPE != self.element {
            return Err(Error::BufferType { operand: self.operand, needed: T::TYPE, actual: self.element });
        }
        if range.start > range.end || range.end > self.len {
            return Err(self.range(range.clone(), "they must lie within it"));
        }
        Ok(())
    }

    fn range(&self, Range { start, end }: Range<usize>, reason: &'static str) -> Error {
        Error::BufferRange { operand: self.operand, start, end, len: self.len, reason }
    }
}

/// The way between the host and buffers of the device.
impl Device {
    /// A new buffer that holds a host slice; `operand` names it in errors and in wgpu's tools.
    ///
    /// # Errors
    /// [`Error::BufferTooLarge`]; [`Error::OutOfMemory`], [`Error::DeviceLost`] and [`Error::Gpu`] for what the driver
    /// reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn upload<T: BufferElement>(&self, operand: &'static str, data: &[T]) -> Result<DeviceBuffer> {
        pollster::block_on(self.upload_async(operand, data))
    }

    /// As [`upload`](Self::upload), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub async fn upload_async<T: BufferElement>(&self, operand: &'static str, data: &[T]) -> Result<DeviceBuffer> {
        let buffer = self.zeros_async(operand, T::TYPE, &[data.len()]).await?;
        buffer.write_async(0, data).await?;
        Ok(buffer)
    }

    /// A new buffer of zeros, for a result: of an element type, a [`DType`](crate::DType) or another [`BufferType`], and a shape, such as
    /// [`Problem::o_shape`](crate::Problem::o_shape).
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    #[cfg(not(target_family = "wasm"))]
    pub fn zeros(
        &self,
        operand: &'static str,
        element: impl Into<BufferType>,
        shape: &[usize],
    ) -> Result<DeviceBuffer> {
        pollster::block_on(self.zeros_async(operand, element, shape))
    }

    /// As [`zeros`](Self::zeros), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub async fn zeros_async(
        &self,
        operand: &'static str,
        element: impl Into<BufferType>,
        shape: &[usize],
    ) -> Result<DeviceBuffer> {
        let element = element.into();
        let len = shape.iter().fold(1usize, |len, &axis| len.saturating_mul(axis));
        let bytes = len.saturating_mul(element.bytes()).max(1);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer = self.scoped_async("creating a buffer", || allocate::<u8>(self, operand, bytes, usage)).await??;
        Ok(DeviceBuffer { device: self.clone(), buffer, operand, element, len })
    }

    /// Ranges of elements of buffers once everything submitted is done, in one submission; blocks until they are there.
    ///
    /// # Errors
    /// [`Error::BufferRange`] for elements that are not there; those of [`DeviceBuffer::download`].
    #[cfg(not(target_family = "wasm"))]
    pub fn download<T: BufferElement, const N: usize>(
        &self,
        parts: [(&DeviceBuffer, Range<usize>); N],
    ) -> Result<[Vec<T>; N]> {
        pollster::block_on(self.download_async(parts))
    }

    /// As [`download`](Self::download), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`download`](Self::download).
    pub async fn download_async<T: BufferElement, const N: usize>(
        &self,
        parts: [(&DeviceBuffer, Range<usize>); N],
    ) -> Result<[Vec<T>; N]> {
        parts.iter().try_for_each(|(buffer, range)| buffer.check::<T>(range))?;
        let bytes = |range: &Range<usize>| [range.start, range.end].map(|n| n * T::TYPE.bytes());
        let words = parts.each_ref().map(|(buffer, range)| {
            let [start, end] = bytes(range);
            // A copy is never empty, nor is a buffer.
            let (start, end) = (start / 4 * 4, end.next_multiple_of(4));
            let start = if start == end { 0 } else { start };
            (&buffer.buffer, start as u64..end.max(4) as u64)
        });
        let starts = words.each_ref().map(|(_, words)| words.start as usize);
        let mapped = download_words(self, words, |_| ()).await?;
        let mut results = std::array::from_fn(|_| Vec::new());
        for (n, result) in results.iter_mut().enumerate() {
            let [start, _] = bytes(&parts[n].1);
            *result = mapped[n].read_from(start.saturating_sub(starts[n]), parts[n].1.len()).await?;
        }
        Ok(results)
    }
}

/// An operand in a buffer of the caller's, of the problem's element type; lse, the sink logits and their gradients are
/// f32.
///
/// Kernels bind whole words of four bytes: a buffer of f16, bf16 or a mask in bytes must hold the whole of the word in which it
/// ends. Other elements in that word are kept.
///
/// The last axis is contiguous; the others may have any strides. By default the operand is densely
/// packed in the problem's layout and starts at the buffer's first element.
///
/// ```
/// use sink_attention::{Attention, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 2, seq_k: 2, head_dim: 2, value_dim: 2 };
/// let problem = Problem::new(shape, Options::new().causal(true))?;
/// // A fused projection: for each of two tokens q, k and v in one row of six.
/// let qkv = device.upload("qkv", &[0.0, 0.0, 1.0, 1.0, 2.0, 4.0, 0.0, 0.0, 1.0, 1.0, 4.0, 8.0])?;
/// let part = |first| qkv.view().offset(first).strides([12, 2, 6]); // of batch, head and sequence
/// let [o, lse] = [device.zeros("o", DType::F32, &[2, 2])?, device.zeros("lse", DType::F32, &[2])?];
/// let forward = attention.prepare_forward(&problem, &ForwardBuffers::new(part(0), part(2), part(4), &o, &lse))?;
/// let mut encoder = device.wgpu().create_command_encoder(&Default::default());
/// forward.encode(&mut encoder);
/// device.queue().submit([encoder.finish()]);
/// for (o, mean) in o.download::<f32>()?.iter().zip([2.0, 4.0, 3.0, 6.0]) {
///     assert!((o - mean).abs() < 1e-5); // the first token sees itself, the second one both
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The buffer, of the operator's own device; it needs [`wgpu::BufferUsages::STORAGE`].
    pub buffer: &'a wgpu::Buffer,
    /// First element, counted in elements.
    pub offset: u64,
    /// Strides of batch, head and sequence, in elements, whatever the layout; `None` is densely packed.
    pub strides: Option<[u64; 3]>,
    /// Element type of the buffer, where it is known, as that of a [`DeviceBuffer`] is: another one than the operand's is an
    /// error.
    pub element: Option<BufferType>,
}

impl<'a> TensorView<'a> {
    /// A densely packed operand at the start of `buffer`.
    pub fn new(buffer: &'a wgpu::Buffer) -> Self {
        TensorView { buffer, offset: 0, strides: None, element: None }
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

impl<'a> From<&'a DeviceBuffer> for TensorView<'a> {
    fn from(buffer: &'a DeviceBuffer) -> Self {
        TensorView { element: Some(buffer.element), ..TensorView::new(&buffer.buffer) }
    }
}

/// A new buffer that holds a host slice.
pub(crate) fn upload<T: Pod>(device: &Device, operand: &'static str, data: &[T]) -> Result<wgpu::Buffer> {
    upload_with(device, operand, data, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST)
}

/// As [`upload`], in a buffer with these usages.
pub(crate) fn upload_with<T: Pod>(
    device: &Device,
    operand: &'static str,
    data: &[T],
    usage: wgpu::BufferUsages,
) -> Result<wgpu::Buffer> {
    let buffer = allocate::<T>(device, operand, data.len(), usage)?;
    write(device, &buffer, 0, bytemuck::cast_slice(data));
    Ok(buffer)
}

/// Writes bytes from a word's start on, and zeros into the rest of the last word.
fn write(device: &Device, buffer: &wgpu::Buffer, start: u64, bytes: &[u8]) {
    // Writes are of whole words.
    let (words, rest) = bytes.as_chunks::<4>();
    device.queue().write_buffer(buffer, start, words.as_flattened());
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        device.queue().write_buffer(buffer, start + 4 * words.len() as u64, &last);
    }
}

/// A new buffer for elements of a type, padded to whole words.
pub(crate) fn allocate<T>(
    device: &Device,
    operand: &'static str,
    elements: usize,
    usage: wgpu::BufferUsages,
) -> Result<wgpu::Buffer> {
    let bytes = (elements as u64).saturating_mul(size_of::<T>() as u64);
    let bytes = bytes.checked_next_multiple_of(4).unwrap_or(u64::MAX);
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

/// The call that a failed download names.
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
        self.read_from(0, elements).await
    }

    /// `elements` elements from byte `start` on.
    async fn read_from<T: Pod>(&self, start: usize, elements: usize) -> Result<Vec<T>> {
        // Buffers end in whole words.
        let bytes = start..start + elements * size_of::<T>();
        let mapped = self.buffer.get_mapped_range(..);
        match mapped.map(|view| bytemuck::pod_collect_to_vec(view.get(bytes).unwrap_or_default())) {
            Ok(data) => Ok(data),
            Err(error) => Err(self.device.failure(READING, error.to_string()).await),
        }
    }
}

/// Encodes `work`, submits it, and maps copies of whole buffers.
pub(crate) async fn download<'a>(
    device: &Device,
    buffers: impl IntoIterator<Item = &'a wgpu::Buffer>,
    work: impl FnOnce(&mut wgpu::CommandEncoder),
) -> Result<Vec<Mapped>> {
    download_words(device, buffers.into_iter().map(|buffer| (buffer, 0..buffer.size())), work).await
}

/// As [`download`], of parts of buffers in bytes, which are whole words.
async fn download_words<'a>(
    device: &Device,
    parts: impl IntoIterator<Item = (&'a wgpu::Buffer, Range<u64>)>,
    work: impl FnOnce(&mut wgpu::CommandEncoder),
) -> Result<Vec<Mapped>> {
    const LABEL: &str = "sink-attention download";
    let label = Some(LABEL);
    let staging = device
        .scoped_async("running a kernel", || {
            let mut encoder = device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            work(&mut encoder);
            let copy = |(buffer, Range { start, end })| {
                note_buffer(LABEL, end - start);
                let staging = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                    label,
                    size: end - start,
                    usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                encoder.copy_buffer_to_buffer(buffer, start, &staging, 0, end - start);
                staging
            };
            let staging: Vec<_> = parts.into_iter().map(copy).collect();
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
    let mapped = device.scoped_async(READING, || staging.iter().map(map).collect::<Vec<_>>()).await?;
    let finished = async {
        wait(device).await?;
        for receiver in mapped {
            receiver.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        }
        Ok::<_, String>(())
    };
    match finished.await {
        Ok(()) => Ok(staging.into_iter().map(|buffer| Mapped { device: device.clone(), buffer }).collect()),
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

//! The bindings of a dispatch: parameters, and binding_ranges of buffers.

use crate::device::Device;
use crate::exec::bound_operand::resource;
use crate::exec::pipeline::Pipeline;
use crate::kernel::params::{Operand, Params, ParamsLayout};
use crate::kernel::{Binding, Variant};
use crate::plan::operand::{BindingRange, OperandLayout};

impl Operand {
    /// Place of an operand, counted in `width` elements from the start of its range. Shaders count in u32, which wraps around as often as
    /// needed to return to an index within the range.
    pub(crate) fn new(view: &OperandLayout, range: BindingRange, width: u64) -> Self {
        let [batch, head, seq] = view.strides.map(|stride| (stride / width) as u32);
        let offset = (view.offset / width).wrapping_sub(range.start / view.element / width) as u32;
        Operand { offset, batch, head, seq }
    }
}

/// The bind groups of some dispatches of a kernel, which differ in their parameters. `find(n, operand)` gives the resource of an operand of
/// the n-th dispatch.
pub(crate) fn bind_groups<'a>(
    device: &Device,
    pipeline: &Pipeline,
    variant: &Variant,
    params: impl IntoIterator<Item = Params>,
    find: impl Fn(usize, Binding) -> Option<wgpu::BindingResource<'a>>,
) -> Vec<wgpu::BindGroup> {
    let (buffer, count) = upload_params(device, &pipeline.params, params);
    let bindings = variant.bindings();
    let group = |n: usize| {
        let resource = |binding| match binding {
            Binding::Params => Some(params_of(&buffer, &pipeline.params, n)),
            _ => find(n, binding),
        };
        let entries: Vec<_> = bindings
            .iter()
            .filter_map(|(b, _)| Some(wgpu::BindGroupEntry { binding: b.slot(), resource: resource(*b)? }))
            .collect();
        device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("sink-attention"),
            layout: &pipeline.layout,
            entries: &entries,
        })
    };
    (0..count).map(group).collect()
}

/// Bytes from the parameters of one dispatch to those of the next. No device needs a larger alignment of offsets.
const PARAMS_ALIGNMENT: usize = 256;

/// A uniform buffer with the parameters of several dispatches of a kernel, and how many these are.
fn upload_params(
    device: &Device,
    layout: &ParamsLayout,
    params: impl IntoIterator<Item = Params>,
) -> (wgpu::Buffer, usize) {
    let (mut bytes, mut count) = (Vec::new(), 0);
    for params in params {
        count += 1;
        bytes.extend(layout.bytes(&params));
        bytes.resize(bytes.len().next_multiple_of(PARAMS_ALIGNMENT), 0);
    }
    // create_buffer_init is not used, because it panics if the device is lost.
    let buffer = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
        label: Some("sink-attention params"),
        size: bytes.len() as u64,
        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    device.queue().write_buffer(&buffer, 0, &bytes);
    (buffer, count)
}

/// The parameters of the n-th dispatch.
fn params_of<'a>(buffer: &'a wgpu::Buffer, layout: &ParamsLayout, n: usize) -> wgpu::BindingResource<'a> {
    let stride = layout.len().next_multiple_of(PARAMS_ALIGNMENT);
    resource(buffer, BindingRange { start: (n * stride) as u64, len: layout.len() as u64 })
}

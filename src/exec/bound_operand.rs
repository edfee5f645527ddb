//! Views of operands in GPU buffers, after a check.

pub use crate::device::buffer::TensorView;
use crate::kernel::Binding;
use crate::plan::operand::{BindingRange, OperandLayout, WORD};
use crate::problem::element::DType;
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, Options};

/// A view that has been checked against its buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BoundOperand<'a> {
    buffer: &'a wgpu::Buffer,
    pub(crate) view: OperandLayout,
}

impl<'a> BoundOperand<'a> {
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
        let view = OperandLayout::new(binding, view.offset, strides, extents, element);
        // If every byte can be counted, every stride can be, too.
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
        Ok(BoundOperand { buffer, view })
    }

    pub(crate) fn binding(&self, range: BindingRange) -> wgpu::BindingResource<'a> {
        resource(self.buffer, range)
    }

    /// Checks that no two elements of a result are in one place.
    pub(crate) fn check_distinct(&self) -> Result<()> {
        let OperandLayout { binding, strides, extents, .. } = self.view;
        let mut axes: Vec<(u64, u64)> = (0..3).filter(|&a| extents[a] > 1).map(|a| (strides[a], extents[a])).collect();
        axes.sort_unstable();
        let mut span = extents[3];
        for (stride, extent) in axes {
            if stride < span {
                return Err(Error::OverlappingStrides { operand: binding.name(), strides });
            }
            span += stride * (extent - 1);
        }
        Ok(())
    }
}

/// A range of a buffer as a binding.
pub(crate) fn resource(buffer: &wgpu::Buffer, range: BindingRange) -> wgpu::BindingResource<'_> {
    let (offset, size) = (range.start, wgpu::BufferSize::new(range.len));
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
}

/// Checks that a buffer that knows its element type has the type of the operand.
pub(crate) fn check_element_type(
    binding: Binding,
    view: &TensorView<'_>,
    dtype: DType,
    options: &Options,
) -> Result<()> {
    let needed = binding.element_type(dtype, options);
    match view.element {
        Some(actual) if actual != needed => Err(Error::BufferType { operand: binding.name(), needed, actual }),
        _ => Ok(()),
    }
}

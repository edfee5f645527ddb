//! Operands on the host, in buffers of the device.

use crate::device::Device;
use crate::device::buffer::{TensorView, upload};
use crate::exec::prepared::ForwardBuffers;
use crate::problem::element::Element;
use crate::problem::error::Result;
use crate::problem::{Bias, Inputs, MaskData};

/// Operands that go with options, in buffers of their own.
pub(crate) struct OptionalBuffers {
    pub(crate) sink_logits: Option<wgpu::Buffer>,
    pub(crate) alibi_slopes: Option<wgpu::Buffer>,
    pub(crate) bias: Option<wgpu::Buffer>,
    pub(crate) mask: Option<wgpu::Buffer>,
}

impl OptionalBuffers {
    /// Of q, k and v of the inputs nothing is read.
    pub(crate) fn new<T: Element>(device: &Device, inputs: &Inputs<'_, T>) -> Result<Self> {
        let optional = |name, slice: Option<&[f32]>| slice.map(|s| upload(device, name, s)).transpose();
        Ok(OptionalBuffers {
            sink_logits: optional("sink_logits", inputs.sink_logits)?,
            alibi_slopes: optional("alibi_slopes", inputs.alibi_slopes)?,
            bias: match inputs.bias {
                Some(Bias::F32(bias)) => Some(upload(device, "bias", bias)?),
                Some(Bias::Operand(bias)) => Some(upload(device, "bias", bias)?),
                None => None,
            },
            mask: match inputs.mask {
                Some(MaskData::Bytes(mask)) => Some(upload(device, "mask", mask)?),
                Some(MaskData::Bits(mask)) => Some(upload(device, "mask", mask)?),
                None => None,
            },
        })
    }
}

/// The operands of a forward pass in buffers of their own.
pub(super) struct Uploaded {
    q: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    optional: OptionalBuffers,
}

impl Uploaded {
    pub(super) fn new<T: Element>(device: &Device, inputs: &Inputs<'_, T>) -> Result<Self> {
        Ok(Uploaded {
            q: upload(device, "q", inputs.q)?,
            k: upload(device, "k", inputs.k)?,
            v: upload(device, "v", inputs.v)?,
            optional: OptionalBuffers::new(device, inputs)?,
        })
    }

    pub(super) fn buffers<'a>(
        &'a self,
        o: &'a wgpu::Buffer,
        o_lo: Option<&'a wgpu::Buffer>,
        lse: &'a wgpu::Buffer,
    ) -> ForwardBuffers<'a> {
        ForwardBuffers {
            sink_logits: self.optional.sink_logits.as_ref().map(TensorView::new),
            alibi_slopes: self.optional.alibi_slopes.as_ref().map(TensorView::new),
            bias: self.optional.bias.as_ref().map(TensorView::new),
            mask: self.optional.mask.as_ref().map(TensorView::new),
            o_lo: o_lo.map(TensorView::new),
            ..ForwardBuffers::new(&self.q, &self.k, &self.v, o, lse)
        }
    }
}

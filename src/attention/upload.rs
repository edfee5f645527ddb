//! Host slices in buffers of the device, and results back from there. Each is known by its line of the table of operands.

use bytemuck::{Pod, cast_slice};

use crate::device::Device;
use crate::device::buffer::{Mapped, TensorView, allocate, download, upload_with};
use crate::exec::buffers::{BackwardBuffers, ForwardBuffers};
use crate::kernel::Binding;
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::{Bias, Gradients, Inputs, MaskData, Output, Problem, Upstream};

/// An operand on the host, where it is there.
pub(crate) type HostOperand<'a> = (Binding, Option<&'a [u8]>);

/// The operands of a forward pass.
pub(crate) fn of_inputs<'a, T: Element>(inputs: &Inputs<'a, T>) -> [HostOperand<'a>; 7] {
    let Inputs { q, k, v, sink_logits, alibi_slopes, bias, mask } = *inputs;
    let bias = bias.map(|bias| match bias {
        Bias::F32(bias) => cast_slice(bias),
        Bias::Operand(bias) => cast_slice(bias),
    });
    let mask = mask.map(|mask| match mask {
        MaskData::Bytes(mask) => mask,
        MaskData::Bits(mask) => cast_slice(mask),
    });
    [
        (Binding::Q, Some(cast_slice(q))),
        (Binding::K, Some(cast_slice(k))),
        (Binding::V, Some(cast_slice(v))),
        (Binding::SinkLogits, sink_logits.map(cast_slice)),
        (Binding::AlibiSlopes, alibi_slopes.map(cast_slice)),
        (Binding::Bias, bias),
        (Binding::Mask, mask),
    ]
}

/// The other operands of a backward pass: the results of the forward pass, and the gradients that flow into them.
pub(crate) fn of_results<'a, T: Element>(saved: &'a Output<T>, upstream: &Upstream<'a, T>) -> [HostOperand<'a>; 5] {
    let (Output { o, o_lo, lse }, Upstream { d_o, d_lse }) = (saved, *upstream);
    [
        (Binding::O, Some(cast_slice(o))),
        (Binding::OLo, o_lo.as_deref().map(cast_slice)),
        (Binding::Lse, Some(cast_slice(lse))),
        (Binding::DO, Some(cast_slice(d_o))),
        (Binding::DLse, d_lse.map(cast_slice)),
    ]
}

/// The gradients by these operands.
pub(crate) fn gradients_of<T>(inputs: &Inputs<'_, T>) -> impl Iterator<Item = Binding> {
    let Inputs { q: _, k: _, v: _, sink_logits, alibi_slopes, bias, mask: _ } = inputs;
    let optional = [
        (Binding::DSinkLogits, sink_logits.is_some()),
        (Binding::DAlibiSlopes, alibi_slopes.is_some()),
        (Binding::DBias, bias.is_some()),
    ];
    let wanted = optional.into_iter().filter(|(_, is_wanted)| *is_wanted).map(|(binding, _)| binding);
    [Binding::DQ, Binding::DK, Binding::DV].into_iter().chain(wanted)
}

/// The operands and results of a call on host slices, in buffers of their own.
pub(crate) struct HostBuffers<'a> {
    device: &'a Device,
    /// With the bytes of what they hold.
    buffers: Vec<(Binding, wgpu::Buffer, usize)>,
    /// Those that are read back.
    results: Vec<Binding>,
}

impl<'a> HostBuffers<'a> {
    pub(crate) fn new(device: &'a Device) -> Self {
        HostBuffers { device, buffers: Vec::new(), results: Vec::new() }
    }

    /// With what is there of some operands.
    pub(crate) fn upload<'b>(mut self, operands: impl IntoIterator<Item = HostOperand<'b>>) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        for (binding, bytes) in operands {
            if let Some(bytes) = bytes {
                self.buffers.push((binding, upload_with(self.device, binding.name(), bytes, usage)?, bytes.len()));
            }
        }
        Ok(self)
    }

    /// With results of a problem, densely packed.
    pub(crate) fn results(self, problem: &Problem, results: impl IntoIterator<Item = Binding>) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        results.into_iter().try_fold(self, |buffers, binding| {
            let (extents, _, element) = binding.extents(problem);
            buffers.result(binding, extents.iter().product::<usize>() * element, usage)
        })
    }

    /// With a result of so many bytes.
    pub(crate) fn result(mut self, binding: Binding, bytes: usize, usage: wgpu::BufferUsages) -> Result<Self> {
        self.buffers.push((binding, allocate::<u8>(self.device, binding.name(), bytes, usage)?, bytes));
        self.results.push(binding);
        Ok(self)
    }

    /// With an operand that is changed where it lies, and is read back.
    pub(crate) fn changed(mut self, binding: Binding) -> Self {
        self.results.push(binding);
        self
    }

    pub(crate) fn buffer(&self, binding: Binding) -> Option<&wgpu::Buffer> {
        self.buffers.iter().find(|(b, ..)| *b == binding).map(|(_, buffer, _)| buffer)
    }

    pub(crate) fn view(&self, binding: Binding) -> Option<TensorView<'_>> {
        self.buffer(binding).map(TensorView::new)
    }

    /// An operand that every such call has.
    pub(crate) fn given(&self, binding: Binding) -> Result<TensorView<'_>> {
        self.view(binding).ok_or(Error::MissingOperand { operand: binding.name() })
    }

    /// As the operands of a forward pass.
    pub(crate) fn forward(&self) -> Result<ForwardBuffers<'_>> {
        Ok(ForwardBuffers {
            q: self.given(Binding::Q)?,
            k: self.given(Binding::K)?,
            v: self.given(Binding::V)?,
            sink_logits: self.view(Binding::SinkLogits),
            alibi_slopes: self.view(Binding::AlibiSlopes),
            bias: self.view(Binding::Bias),
            mask: self.view(Binding::Mask),
            mask_scratch: None,
            o: self.given(Binding::O)?,
            o_lo: self.view(Binding::OLo),
            lse: self.given(Binding::Lse)?,
            row_max: self.view(Binding::RowMax),
        })
    }

    /// As the operands of a backward pass.
    pub(crate) fn backward(&self) -> Result<BackwardBuffers<'_>> {
        Ok(BackwardBuffers {
            forward: self.forward()?,
            d_o: self.given(Binding::DO)?,
            d_lse: self.view(Binding::DLse),
            d_q: self.given(Binding::DQ)?,
            d_k: self.given(Binding::DK)?,
            d_v: self.given(Binding::DV)?,
            d_sink_logits: self.view(Binding::DSinkLogits),
            d_alibi_slopes: self.view(Binding::DAlibiSlopes),
            d_bias: self.view(Binding::DBias),
        })
    }

    /// Encodes `work`, submits it, and maps copies of the results.
    pub(crate) async fn download(&self, work: impl FnOnce(&mut wgpu::CommandEncoder)) -> Result<Results> {
        let results = || self.buffers.iter().filter(|(binding, ..)| self.results.contains(binding));
        let mapped = download(self.device, results().map(|(_, buffer, _)| buffer), work).await?;
        Ok(Results(results().zip(mapped).map(|((binding, _, bytes), mapped)| (*binding, *bytes, mapped)).collect()))
    }
}

/// Results of a call, mapped for reading.
pub(crate) struct Results(Vec<(Binding, usize, Mapped)>);

impl Results {
    /// A result, where it is there.
    pub(crate) async fn optional<T: Pod>(&self, binding: Binding) -> Result<Option<Vec<T>>> {
        match self.0.iter().find(|(b, ..)| *b == binding) {
            Some((_, bytes, mapped)) => mapped.read(bytes / size_of::<T>()).await.map(Some),
            None => Ok(None),
        }
    }

    /// A result that every such call has.
    pub(crate) async fn read<T: Pod>(&self, binding: Binding) -> Result<Vec<T>> {
        self.optional(binding).await?.ok_or(Error::MissingOperand { operand: binding.name() })
    }

    /// Those of a forward pass.
    pub(crate) async fn output<T: Element>(&self) -> Result<Output<T>> {
        Ok(Output {
            o: self.read(Binding::O).await?,
            o_lo: self.optional(Binding::OLo).await?,
            lse: self.read(Binding::Lse).await?,
        })
    }

    /// Those of a backward pass.
    pub(crate) async fn gradients<T: Element>(&self) -> Result<Gradients<T>> {
        Ok(Gradients {
            d_q: self.read(Binding::DQ).await?,
            d_k: self.read(Binding::DK).await?,
            d_v: self.read(Binding::DV).await?,
            d_sink_logits: self.optional(Binding::DSinkLogits).await?,
            d_alibi_slopes: self.optional(Binding::DAlibiSlopes).await?,
            d_bias: self.optional(Binding::DBias).await?,
        })
    }
}

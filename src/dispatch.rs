//! From a plan to commands.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::device::Device;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::pipeline::{Pipeline, Pipelines};
use crate::plan::{OptionalOperands, Plan, Preference};
use crate::problem::{Layout, Problem, SinkLogits};
use crate::shader::{Binding, DELTA_ROWS, MAXIMA_PARTS, RANGED_OPERANDS};
use crate::tensor::{Extents, Placed, TensorView, allocate};

/// Place of an operand, in the shader's load width; `Operand` in shaders/params.wgsl.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Operand {
    offset: u32,
    batch: u32,
    head: u32,
    seq: u32,
}

impl Operand {
    fn new(placed: &Placed<'_>, width: u32) -> Self {
        let [batch, head, seq] = placed.strides.map(|s| s / width);
        Operand { offset: placed.offset / width, batch, head, seq }
    }
}

/// What changes between calls; `Params` in shaders/params.wgsl.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    q: Operand,
    k: Operand,
    v: Operand,
    o: Operand,
    d_o: Operand,
    d_q: Operand,
    d_k: Operand,
    d_v: Operand,
    o_rest: Operand,
    heads: u32,
    kv_heads: u32,
    seq_q: u32,
    seq_k: u32,
    lower: i32,
    upper: i32,
    sink_tokens: u32,
    workgroups: u32,
    lse_offset: u32,
    d_lse_offset: u32,
    sink_offset: u32,
    d_sink_offset: u32,
    batch: u32,
    scale: f32,
    scale_sign: f32,
    scale_size: f32,
    negative_infinity: f32,
    padding: [u32; 3],
}

/// The operands of a forward pass in buffers of the caller's.
#[derive(Debug, Clone, Copy)]
pub struct ForwardBuffers<'a> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    /// One logit per query head, where the options say [`SinkLogits::PerHead`]; densely packed.
    pub sink_logits: Option<TensorView<'a>>,
    /// Result: attention outputs.
    pub o: TensorView<'a>,
    /// Result, in f16 and bf16 only, where the backward pass is to have it: what rounding took from o, an i16 in the place
    /// of each of its elements, see [`Element::rest`](crate::Element::rest). Views are as those of o, two bytes an element.
    pub o_rest: Option<TensorView<'a>>,
    /// Result: log of the denominators, `[batch, heads, seq_q]`, densely packed.
    pub lse: TensorView<'a>,
}

/// The operands of a backward pass in buffers of the caller's: those of the forward pass, its results,
/// the gradients that flow into these, and the gradients to compute.
#[derive(Debug, Clone, Copy)]
pub struct BackwardBuffers<'a> {
    /// The forward pass's operands and results. o rounded to half precision would be too coarse: there it is read together
    /// with o_rest, which makes it f32 again, or not at all. Without o_rest two more matrix products are computed.
    pub forward: ForwardBuffers<'a>,
    /// Gradient by o.
    pub d_o: TensorView<'a>,
    /// Gradient by lse, densely packed; `None` is zero. Ignored where lse is -inf.
    pub d_lse: Option<TensorView<'a>>,
    /// Result: gradient by q.
    pub d_q: TensorView<'a>,
    /// Result: gradient by k.
    pub d_k: TensorView<'a>,
    /// Result: gradient by v.
    pub d_v: TensorView<'a>,
    /// Result: gradient by the sink logits, `[heads]`, where the options say [`SinkLogits::PerHead`]; densely packed.
    pub d_sink_logits: Option<TensorView<'a>>,
}

/// The operands of a call, each checked and with its place.
struct Operands<'a> {
    problem: &'a Problem,
    device: &'a Device,
    placed: Vec<(Binding, TensorView<'a>, Placed<'a>)>,
}

impl<'a> Operands<'a> {
    fn new(problem: &'a Problem, device: &'a Device) -> Self {
        Operands { problem, device, placed: Vec::new() }
    }

    /// Extents of an operand, and whether it must be densely packed; those that must are f32 whatever the others are.
    fn extents(&self, binding: Binding) -> (Extents, bool) {
        let s = self.problem.shape();
        match binding {
            Binding::Q | Binding::DQ => ([s.batch, s.heads, s.seq_q, s.head_dim], false),
            Binding::K | Binding::DK => ([s.batch, s.kv_heads, s.seq_k, s.head_dim], false),
            Binding::V | Binding::DV => ([s.batch, s.kv_heads, s.seq_k, s.value_dim], false),
            Binding::O | Binding::ORest | Binding::DO => ([s.batch, s.heads, s.seq_q, s.value_dim], false),
            Binding::SinkLogits | Binding::DSinkLogits => ([1, 1, s.heads, 1], true),
            _ => ([s.batch, s.heads, s.seq_q, 1], true),
        }
    }

    fn add(&mut self, binding: Binding, view: &TensorView<'a>) -> Result<()> {
        let (extents, dense) = self.extents(binding);
        let name = binding.name();
        if dense && view.strides.is_some() {
            let reason = "must be densely packed; give an offset, but no strides".into();
            return Err(Error::InvalidOption { option: name, reason });
        }
        let options = self.problem.options();
        let (layout, dtype) = if dense { (Layout::Bhsd, DType::F32) } else { (options.layout, options.dtype) };
        let placed = Placed::new(name, view, extents, layout, dtype, self.device.capabilities())?;
        self.placed.push((binding, *view, placed));
        Ok(())
    }

    /// An operand that goes with [`SinkLogits::PerHead`], and with nothing else.
    fn add_per_head(&mut self, binding: Binding, view: Option<&TensorView<'a>>) -> Result<()> {
        let operand = binding.name();
        match (self.problem.options().sink_logits, view) {
            (SinkLogits::PerHead, Some(view)) => self.add(binding, view),
            (SinkLogits::PerHead, None) => Err(Error::MissingOperand { operand }),
            (_, None) => Ok(()),
            (_, Some(_)) => {
                Err(Error::UnexpectedOperand { operand, hint: "set Options::sink_logits to SinkLogits::PerHead" })
            }
        }
    }

    /// No result may lie in a buffer that another operand uses, nor overlap itself.
    fn check_results(&self, results: &[Binding]) -> Result<()> {
        for (binding, view, placed) in self.placed.iter().filter(|(b, ..)| results.contains(b)) {
            let others = self.placed.iter().filter(|(b, ..)| b != binding);
            if let Some((other, ..)) = others.into_iter().find(|(_, o, _)| o.buffer == view.buffer) {
                return Err(Error::Aliasing { output: binding.name(), other: other.name() });
            }
            placed.check_distinct(binding.name(), self.extents(*binding).0)?;
        }
        Ok(())
    }

    fn find(&self, binding: Binding) -> Option<&Placed<'a>> {
        self.placed.iter().find(|(b, ..)| *b == binding).map(|(.., placed)| placed)
    }

    fn vec4(&self) -> bool {
        let wide = self.placed.iter().filter(|(b, ..)| !self.extents(*b).1);
        wide.into_iter().all(|(.., placed)| placed.vec4())
    }

    fn params(&self, vec4: bool, workgroups: u32) -> Params {
        let (s, mask) = (self.problem.shape(), self.problem.sequence(0).band);
        let operand = |binding| match self.find(binding) {
            Some(placed) => Operand::new(placed, if vec4 { 4 } else { 1 }),
            None => Operand::zeroed(),
        };
        let offset = |binding| self.find(binding).map_or(0, |placed| placed.offset);
        Params {
            q: operand(Binding::Q),
            k: operand(Binding::K),
            v: operand(Binding::V),
            o: operand(Binding::O),
            d_o: operand(Binding::DO),
            d_q: operand(Binding::DQ),
            d_k: operand(Binding::DK),
            d_v: operand(Binding::DV),
            o_rest: operand(Binding::ORest),
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            seq_q: s.seq_q as u32,
            seq_k: s.seq_k as u32,
            lower: mask.lower(),
            upper: mask.upper(),
            sink_tokens: mask.sink_tokens(),
            workgroups,
            lse_offset: offset(Binding::Lse),
            d_lse_offset: offset(Binding::DLse),
            sink_offset: offset(Binding::SinkLogits),
            d_sink_offset: offset(Binding::DSinkLogits),
            batch: s.batch as u32,
            scale: self.problem.scale(),
            scale_sign: if self.problem.scale() < 0.0 { -1.0 } else { 1.0 },
            scale_size: self.problem.scale().abs(),
            negative_infinity: f32::NEG_INFINITY,
            padding: [0; 3],
        }
    }
}

/// A forward or backward pass that is ready to be encoded, as often as wanted: nothing is allocated,
/// submitted or waited for after this point. Keeps the buffers it was prepared with alive.
#[derive(Debug, Clone)]
pub struct Prepared {
    plan: Plan,
    dispatches: Vec<(Arc<Pipeline>, wgpu::BindGroup)>,
}

impl Prepared {
    pub(crate) async fn forward(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &ForwardBuffers<'_>,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        let mut operands = Operands::new(problem, device);
        add_forward(&mut operands, buffers)?;
        operands.check_results(&[Binding::O, Binding::ORest, Binding::Lse])?;
        let optional = OptionalOperands { d_lse: false, o_rest: buffers.o_rest.is_some() };
        let plan = Plan::forward_with(problem, operands.vec4(), optional, device.capabilities(), preference)?;
        Prepared::new(pipelines, operands, plan).await
    }

    pub(crate) async fn backward(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &BackwardBuffers<'_>,
        preference: &Preference<'_>,
    ) -> Result<Self> {
        let mut operands = Operands::new(problem, device);
        add_forward(&mut operands, &buffers.forward)?;
        operands.add(Binding::DO, &buffers.d_o)?;
        if let Some(d_lse) = &buffers.d_lse {
            operands.add(Binding::DLse, d_lse)?;
        }
        operands.add(Binding::DQ, &buffers.d_q)?;
        operands.add(Binding::DK, &buffers.d_k)?;
        operands.add(Binding::DV, &buffers.d_v)?;
        operands.add_per_head(Binding::DSinkLogits, buffers.d_sink_logits.as_ref())?;
        operands.check_results(&[Binding::DQ, Binding::DK, Binding::DV, Binding::DSinkLogits])?;
        let optional = OptionalOperands { d_lse: buffers.d_lse.is_some(), o_rest: buffers.forward.o_rest.is_some() };
        let plan = Plan::backward_with(problem, operands.vec4(), optional, device.capabilities(), preference)?;
        Prepared::new(pipelines, operands, plan).await
    }

    async fn new(pipelines: &Pipelines, operands: Operands<'_>, plan: Plan) -> Result<Self> {
        let device = operands.device;
        let scratch = device.scoped("allocating scratch", || scratch(&operands, &plan)).await??;
        let compiled = pipelines.get_all(device, &plan).await?;
        let mut dispatches = Vec::with_capacity(plan.passes.len());
        for (pass, pipeline) in plan.passes.iter().zip(compiled) {
            let params = operands.params(operands.vec4(), pass.workgroups);
            let bind_group = device
                .scoped("binding operands", || {
                    let label = Some("sink-attention");
                    // Not create_buffer_init, which panics where the device is lost.
                    let buffer = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                        label,
                        size: size_of::<Params>() as u64,
                        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                        mapped_at_creation: false,
                    });
                    device.queue().write_buffer(&buffer, 0, bytemuck::bytes_of(&params));
                    let resource = |binding| match binding {
                        Binding::Params => Some(buffer.as_entire_binding()),
                        _ => {
                            let own = scratch.iter().find(|(b, _)| *b == binding);
                            own.map(|(_, buffer)| buffer.as_entire_binding())
                                .or_else(|| operands.find(binding).map(|placed| placed.binding()))
                        }
                    };
                    let entries: Vec<_> = pass
                        .variant
                        .bindings()
                        .into_iter()
                        .filter_map(|(b, _)| Some(wgpu::BindGroupEntry { binding: b.slot(), resource: resource(b)? }))
                        .collect();
                    device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor {
                        label,
                        layout: &pipeline.layout,
                        entries: &entries,
                    })
                })
                .await?;
            dispatches.push((pipeline, bind_group));
        }
        Ok(Prepared { plan, dispatches })
    }

    /// What will run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Records all passes into the caller's encoder.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention"), timestamp_writes: None };
        self.encode_in(&mut encoder.begin_compute_pass(&descriptor));
    }

    /// Records all passes into a compute pass of the caller's, for example one that takes timestamps.
    pub fn encode_in(&self, compute: &mut wgpu::ComputePass<'_>) {
        for index in 0..self.dispatches.len() {
            self.encode_pass_in(compute, index);
        }
    }

    /// Records one pass of the [`plan`](Self::plan), for measuring it alone; nothing where there is no such pass.
    pub fn encode_pass_in(&self, compute: &mut wgpu::ComputePass<'_>, index: usize) {
        let (Some((pipeline, bind_group)), Some(pass)) = (self.dispatches.get(index), self.plan.passes.get(index))
        else {
            return;
        };
        let [x, y] = pass.grid;
        compute.set_pipeline(&pipeline.pipeline);
        compute.set_bind_group(0, bind_group, &[]);
        compute.dispatch_workgroups(x, y, 1);
    }
}

fn add_forward<'a>(operands: &mut Operands<'a>, buffers: &ForwardBuffers<'a>) -> Result<()> {
    operands.add(Binding::Q, &buffers.q)?;
    operands.add(Binding::K, &buffers.k)?;
    operands.add(Binding::V, &buffers.v)?;
    operands.add_per_head(Binding::SinkLogits, buffers.sink_logits.as_ref())?;
    operands.add(Binding::O, &buffers.o)?;
    if let Some(o_rest) = &buffers.o_rest {
        operands.problem.check_rest()?;
        operands.add(Binding::ORest, o_rest)?;
    }
    operands.add(Binding::Lse, &buffers.lse)
}

/// What the kernels of a plan hand to each other.
fn scratch(operands: &Operands<'_>, plan: &Plan) -> Result<Vec<(Binding, wgpu::Buffer)>> {
    let s = operands.problem.shape();
    let sequences = s.batch * s.heads;
    let mut scratch = Vec::new();
    let reports =
        plan.passes.iter().filter(|pass| pass.variant.fragments().is_some()).map(|pass| pass.workgroups as usize);
    for (binding, elements) in [
        (Binding::Repairs, reports.max().unwrap_or(0)),
        (Binding::Maxima, (RANGED_OPERANDS * MAXIMA_PARTS) as usize),
        (Binding::Ranges, RANGED_OPERANDS as usize),
        (Binding::Delta, sequences * s.seq_q),
        (Binding::SinkPartials, sequences * s.seq_q.div_ceil(DELTA_ROWS as usize)),
    ] {
        if plan.passes.iter().any(|pass| pass.variant.bindings().iter().any(|(b, _)| *b == binding)) {
            let usage = wgpu::BufferUsages::STORAGE;
            scratch.push((binding, allocate::<f32>(operands.device, binding.name(), elements, usage)?));
        }
    }
    Ok(scratch)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use naga::TypeInner;

    use super::*;
    use crate::capabilities::Capabilities;
    use crate::problem::{Options, Shape};

    /// Name and offset of each member, and the size of the whole.
    type Members = (Vec<(String, usize)>, usize);

    macro_rules! members {
        ($type:ty: $($field:ident)*) => {
            (vec![$((stringify!($field).to_string(), offset_of!($type, $field))),*], size_of::<$type>())
        };
    }

    fn in_the_shader(module: &naga::Module, name: &str) -> Members {
        let (_, found) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name)).unwrap();
        let TypeInner::Struct { members, span } = &found.inner else { panic!("{name} is a struct") };
        let members = members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect();
        // Uniform buffers are padded to 16 bytes.
        (members, span.next_multiple_of(16) as usize)
    }

    #[test]
    fn params_lie_as_in_the_shader() {
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 1, head_dim: 4, value_dim: 4 };
        let problem = Problem::new(shape, Options::new()).unwrap();
        let plan = Plan::forward(&problem, true, &Capabilities::webgpu_defaults()).unwrap();
        let module = naga::front::wgsl::parse_str(&plan.passes[0].variant.wgsl().unwrap()).unwrap();
        assert_eq!(members!(Operand: offset batch head seq), in_the_shader(&module, "Operand"));
        let params = members!(Params: q k v o d_o d_q d_k d_v o_rest heads kv_heads seq_q seq_k lower upper sink_tokens
            workgroups lse_offset d_lse_offset sink_offset d_sink_offset batch scale scale_sign scale_size
            negative_infinity);
        assert_eq!(params, in_the_shader(&module, "Params"));
    }
}

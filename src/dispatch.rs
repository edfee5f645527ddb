//! From a plan to commands.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use wgpu::util::DeviceExt;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::pipeline::{Pipeline, Pipelines};
use crate::plan::Plan;
use crate::problem::{Layout, Problem, SinkLogits};
use crate::shader::Binding;
use crate::tensor::{Placed, TensorView};
use crate::tiles::Tiles;

/// Place of an operand, in the shader's load width; `Operand` in shaders/params.wgsl.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Operand {
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
pub(crate) struct Params {
    q: Operand,
    k: Operand,
    v: Operand,
    o: Operand,
    heads: u32,
    kv_heads: u32,
    seq_q: u32,
    seq_k: u32,
    lower: i32,
    upper: i32,
    sink_tokens: u32,
    workgroups: u32,
    lse_offset: u32,
    sink_offset: u32,
    scale_log2: f32,
    negative_infinity: f32,
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
    /// Result: log of the denominators, `[batch, heads, seq_q]`, densely packed.
    pub lse: TensorView<'a>,
}

/// A forward pass that is ready to be encoded, as often as wanted: nothing is allocated, submitted
/// or waited for after this point. Keeps the buffers it was prepared with alive.
#[derive(Debug, Clone)]
pub struct PreparedForward {
    plan: Plan,
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
}

impl PreparedForward {
    pub(crate) async fn new(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &ForwardBuffers<'_>,
        tiles: Option<Tiles>,
    ) -> Result<Self> {
        let s = problem.shape();
        let capabilities = device.capabilities();
        let layout = problem.options().layout;
        let q = Placed::new("q", &buffers.q, [s.batch, s.heads, s.seq_q, s.head_dim], layout, capabilities)?;
        let k = Placed::new("k", &buffers.k, [s.batch, s.kv_heads, s.seq_k, s.head_dim], layout, capabilities)?;
        let v = Placed::new("v", &buffers.v, [s.batch, s.kv_heads, s.seq_k, s.value_dim], layout, capabilities)?;
        let o_extents = [s.batch, s.heads, s.seq_q, s.value_dim];
        let o = Placed::new("o", &buffers.o, o_extents, layout, capabilities)?;
        // lse and the sink logits are rows of their own: one "sequence" of width 1 each.
        let lse_extents = [s.batch, s.heads, s.seq_q, 1];
        let dense = |operand, view: &TensorView<'_>| match view.strides {
            None => Ok(()),
            Some(_) => {
                Err(Error::InvalidOption { option: operand, reason: "must be densely packed, without strides".into() })
            }
        };
        dense("lse", &buffers.lse)?;
        let lse = Placed::new("lse", &buffers.lse, lse_extents, Layout::Bhsd, capabilities)?;
        let sinks = match (problem.options().sink_logits, &buffers.sink_logits) {
            (SinkLogits::PerHead, Some(view)) => {
                dense("sink_logits", view)?;
                Some(Placed::new("sink_logits", view, [1, 1, s.heads, 1], Layout::Bhsd, capabilities)?)
            }
            (SinkLogits::PerHead, None) => return Err(Error::MissingOperand { operand: "sink_logits" }),
            (_, Some(_)) => {
                return Err(Error::UnexpectedOperand {
                    operand: "sink_logits",
                    hint: "set Options::sink_logits to SinkLogits::PerHead",
                });
            }
            (_, None) => None,
        };
        let mut inputs = vec![("q", buffers.q.buffer), ("k", buffers.k.buffer), ("v", buffers.v.buffer)];
        inputs.extend(buffers.sink_logits.map(|view| ("sink_logits", view.buffer)));
        lse.check_output("lse", lse_extents, &inputs)?;
        inputs.push(("lse", buffers.lse.buffer));
        o.check_output("o", o_extents, &inputs)?;

        let vec4 = [&q, &k, &v, &o].iter().all(|placed| placed.vec4());
        let plan = match tiles {
            None => Plan::forward(problem, vec4, capabilities)?,
            Some(tiles) => Plan::with_tiles(problem, vec4, capabilities, tiles)?,
        };
        let pipeline = pipelines.get(device, &plan.variant).await?;

        let width = if vec4 { 4 } else { 1 };
        let mask = problem.mask();
        let params = Params {
            q: Operand::new(&q, width),
            k: Operand::new(&k, width),
            v: Operand::new(&v, width),
            o: Operand::new(&o, width),
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            seq_q: s.seq_q as u32,
            seq_k: s.seq_k as u32,
            lower: mask.lower(),
            upper: mask.upper(),
            sink_tokens: mask.sink_tokens(),
            workgroups: plan.workgroups,
            lse_offset: lse.offset,
            sink_offset: sinks.map_or(0, |p| p.offset),
            scale_log2: problem.scale() * std::f32::consts::LOG2_E,
            negative_infinity: f32::NEG_INFINITY,
        };
        let bind_group = device
            .scoped("preparing a forward pass", || {
                let label = Some("sink-attention forward");
                let params = device.wgpu().create_buffer_init(&wgpu::util::BufferInitDescriptor {
                    label,
                    contents: bytemuck::bytes_of(&params),
                    usage: wgpu::BufferUsages::UNIFORM,
                });
                let mut entries = Vec::new();
                for binding in plan.variant.bindings() {
                    let resource = match binding {
                        Binding::Params => Some(params.as_entire_binding()),
                        Binding::Q => Some(q.binding()),
                        Binding::K => Some(k.binding()),
                        Binding::V => Some(v.binding()),
                        Binding::O => Some(o.binding()),
                        Binding::Lse => Some(lse.binding()),
                        Binding::SinkLogits => sinks.map(|p| p.binding()),
                    };
                    entries.extend(resource.map(|resource| wgpu::BindGroupEntry { binding: binding.slot(), resource }));
                }
                device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor {
                    label,
                    layout: &pipeline.layout,
                    entries: &entries,
                })
            })
            .await?;
        Ok(PreparedForward { plan, pipeline, bind_group })
    }

    /// What will run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Records the pass into the caller's encoder.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention forward"), timestamp_writes: None };
        self.encode_in(&mut encoder.begin_compute_pass(&descriptor));
    }

    /// Records the dispatch into a compute pass of the caller's, for example one that takes timestamps.
    pub fn encode_in(&self, pass: &mut wgpu::ComputePass<'_>) {
        let [x, y] = self.plan.grid;
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(x, y, 1);
    }
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
        (members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect(), *span as usize)
    }

    #[test]
    fn params_lie_as_in_the_shader() {
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 1, head_dim: 4, value_dim: 4 };
        let problem = Problem::new(shape, Options::new()).unwrap();
        let plan = Plan::forward(&problem, true, &Capabilities::webgpu_defaults()).unwrap();
        let module = naga::front::wgsl::parse_str(&plan.variant.wgsl().unwrap()).unwrap();
        assert_eq!(members!(Operand: offset batch head seq), in_the_shader(&module, "Operand"));
        let params = members!(Params: q k v o heads kv_heads seq_q seq_k lower upper sink_tokens workgroups
            lse_offset sink_offset scale_log2 negative_infinity);
        assert_eq!(params, in_the_shader(&module, "Params"));
    }
}

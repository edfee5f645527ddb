//! From a plan to commands.

use std::sync::Arc;
use std::time::Duration;

use crate::device::Device;
use crate::device::buffer::{TensorView, allocate, upload};
use crate::exec::bind::bind_groups;
use crate::exec::bound_operand::{BoundOperand, check_element_type, resource};
use crate::exec::buffers::{BackwardBuffers, ForwardBuffers, MergeBuffers};
use crate::exec::pipeline::{Pipeline, Pipelines};
use crate::kernel::params::{Operand, Params};
use crate::kernel::spec::mask_blocks;
use crate::kernel::{Binding, SEQUENCE_WORDS, Variant};
use crate::plan::operand::{OperandLayout, scratch_view};
use crate::plan::slice::{Part, Slice, Slices};
use crate::plan::{OptionalOperands, Pass, Plan, Preference};
use crate::problem::error::{Error, Result};
use crate::problem::varlen::Sequence;
use crate::problem::{Problem, SinkLogits};

/// The operands of a call, each checked and with its place.
struct Operands<'a> {
    problem: &'a Problem,
    device: &'a Device,
    placed: Vec<(TensorView<'a>, BoundOperand<'a>)>,
    /// The caller's buffer for the results of the mask's kernel.
    mask_scratch: Option<&'a wgpu::Buffer>,
}

impl<'a> Operands<'a> {
    fn new(problem: &'a Problem, device: &'a Device) -> Self {
        Operands { problem, device, placed: Vec::new(), mask_scratch: None }
    }

    fn add(&mut self, binding: Binding, view: &TensorView<'a>) -> Result<()> {
        if !binding.is_strided() && view.strides.is_some() {
            let reason = "must be densely packed; give an offset, but no strides".into();
            return Err(Error::InvalidOption { option: binding.name(), reason });
        }
        check_element_type(binding, view, self.problem.options().dtype, self.problem.options())?;
        let (extents, layout, element) = binding.extents(self.problem);
        self.placed.push((*view, BoundOperand::new(binding, view, extents, layout, element)?));
        Ok(())
    }

    /// Adds an operand that goes with an option, and with nothing else.
    fn add_with(
        &mut self,
        binding: Binding,
        wanted: bool,
        hint: &'static str,
        view: Option<&TensorView<'a>>,
    ) -> Result<()> {
        let operand = binding.name();
        match (wanted, view) {
            (true, Some(view)) => self.add(binding, view),
            (true, None) => Err(Error::MissingOperand { operand }),
            (false, None) => Ok(()),
            (false, Some(_)) => Err(Error::UnexpectedOperand { operand, hint }),
        }
    }

    /// Adds an operand that goes with [`SinkLogits::PerHead`].
    fn add_per_head(&mut self, binding: Binding, view: Option<&TensorView<'a>>) -> Result<()> {
        let wanted = self.problem.options().sink_logits == SinkLogits::PerHead;
        self.add_with(binding, wanted, "set Options::sink_logits to SinkLogits::PerHead", view)
    }

    /// Checks that no result overlaps itself or shares a buffer with another operand. The gradients by q, k and v may be next to each other
    /// in one buffer, as those of a fused projection are.
    fn check_results(&self, results: &[Binding]) -> Result<()> {
        for (view, placed) in self.placed.iter().filter(|(_, p)| results.contains(&p.view.binding)) {
            let binding = placed.view.binding;
            let mut others = self.placed.iter().filter(|(_, p)| p.view.binding != binding);
            let fused = [Binding::DQ, Binding::DK, Binding::DV];
            let is_apart = |other: &OperandLayout| {
                fused.contains(&binding) && fused.contains(&other.binding) && placed.view.is_apart_from(other)
            };
            if let Some((_, other)) = others.find(|(o, p)| o.buffer == view.buffer && !is_apart(&p.view)) {
                return Err(Error::Aliasing { output: binding.name(), other: other.view.binding.name() });
            }
            placed.check_distinct()?;
        }
        Ok(())
    }

    fn find(&self, binding: Binding) -> Option<&BoundOperand<'a>> {
        self.placed.iter().map(|(_, placed)| placed).find(|placed| placed.view.binding == binding)
    }

    fn vec4(&self) -> bool {
        let by_width = |view: &OperandLayout| view.binding.has_width();
        // A bias of another number of keys is read one by one anyway.
        let by_keys = |view: &OperandLayout| view.binding == Binding::Bias && view.extents[3].is_multiple_of(4);
        self.placed.iter().filter(|(_, p)| by_width(&p.view) || by_keys(&p.view)).all(|(_, p)| p.view.vec4())
    }

    /// Whether rows of the operands whose tiles are staged can be read eight neighbours at a time.
    fn vec8(&self) -> bool {
        [Binding::Q, Binding::K, Binding::V, Binding::DO].iter().filter_map(|b| self.find(*b)).all(|p| p.view.vec8())
    }

    /// The layout of an operand of a pass, which is the caller's or the crate's own.
    fn view(&self, binding: Binding, plan: &Plan) -> Option<OperandLayout> {
        let own = || scratch_view(binding, self.problem, &plan.passes);
        self.find(binding).map(|placed| placed.view).or_else(own)
    }

    fn views(&self, pass: &Pass, plan: &Plan) -> Vec<OperandLayout> {
        let bindings = pass.variant.bindings().into_iter().map(|(binding, _)| binding);
        let packed = pass.variant.packed.then_some(Binding::DV);
        bindings.chain(packed).filter_map(|binding| self.view(binding, plan)).collect()
    }

    fn params(&self, variant: &Variant, views: &[OperandLayout], slice: &Slice) -> Params {
        let (problem, s, o) = (self.problem, self.problem.shape(), self.problem.options());
        let band = problem.sequence(0).band;
        let operand = |binding: Binding| {
            let view = views.iter().find(|view| view.binding == binding);
            let window = slice.binding_ranges.iter().find(|(b, _)| *b == binding);
            let width = variant.neighbours(binding);
            // A pass does not read the place of an operand that it does not bind.
            view.zip(window).map_or(Operand::default(), |(view, (_, window))| Operand::new(view, *window, width))
        };
        let offset = |binding| operand(binding).offset;
        let [_, _, pair_rows, pair_keys] = problem.pairs_shape().map(|n| n as u32);
        let [_, _, mask_rows, mask_keys] = o.mask.unwrap_or_default().of(problem.pairs_shape());
        let [mask_words, mask_block_rows, mask_groups] = mask_blocks(mask_rows, mask_keys);
        let mask_bits = operand(Binding::MaskBits);
        let key_words = if mask_rows > 1 { mask_keys * mask_block_rows } else { 0 };
        let Part { axes: [entries, heads, tiles] } = &slice.part;
        let [[slice_batch, slice_batches], [slice_head, slice_heads], [slice_tile, slice_tiles]] =
            [entries, heads, tiles].map(|range| [range.start as u32, (range.end - range.start) as u32]);
        // Scores that are formed beforehand enter the softmax unchanged.
        let score_scale = if problem.modifies_scores() { 1.0 } else { problem.scale() };
        Params {
            // The bits by keys follow the bits of each head.
            mask_key_bits: Operand {
                offset: mask_bits.offset.wrapping_add((mask_rows * mask_words) as u32),
                seq: mask_block_rows as u32,
                ..mask_bits
            },
            mask_classes: Operand {
                offset: mask_bits.offset.wrapping_add((mask_rows * mask_words + key_words) as u32),
                seq: if mask_rows > 1 { mask_groups as u32 } else { 0 },
                ..mask_bits
            },
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            seq_q: s.seq_q as u32,
            seq_k: s.seq_k as u32,
            lower: band.lower(),
            upper: band.upper(),
            // Only ALiBi needs the offset, and it was checked there.
            offset: band.offset() as i32,
            sink_tokens: band.sink_tokens(),
            workgroups: slice.workgroups,
            slice_batch,
            slice_batches,
            slice_head,
            slice_heads,
            slice_tile,
            slice_tiles,
            slice_cells: slice.cells,
            sink_offset: offset(Binding::SinkLogits),
            d_sink_offset: offset(Binding::DSinkLogits),
            slope_offset: offset(Binding::AlibiSlopes),
            d_slope_offset: offset(Binding::DAlibiSlopes),
            slope_row: s.seq_q as u32,
            work_at: problem.sequence_count() as u32 * SEQUENCE_WORDS,
            batch: s.batch as u32,
            sequence_count: problem.sequence_count() as u32,
            mask_rows: mask_rows as u32,
            mask_keys: mask_keys as u32,
            pair_rows: if o.bias.is_some_and(|axes| axes.seq_q) { pair_rows } else { 1 },
            pair_keys,
            softcap: o.softcap.unwrap_or(0.0),
            scale: problem.scale(),
            score_scale,
            scale_sign: if score_scale < 0.0 { -1.0 } else { 1.0 },
            scale_size: score_scale.abs(),
            negative_infinity: f32::NEG_INFINITY,
            ..Params::of_operands(operand)
        }
    }
}

/// The bindings of a dispatch, and its grid.
type Dispatch = (wgpu::BindGroup, [u32; 2]);

/// A forward or backward pass that is ready to be encoded, as often as wanted: nothing is allocated,
/// submitted or waited for after this point. Keeps the buffers it was prepared with alive.
///
/// ```
/// use sink_attention::{Attention, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: 2, head_dim: 1, value_dim: 1 };
/// let problem = Problem::new(shape, Options::new())?;
/// let [q, k, v] = [device.upload("q", &[0.0])?, device.upload("k", &[5.0, 7.0])?, device.upload("v", &[0.0, 0.0])?];
/// let [o, lse] = [device.zeros("o", DType::F32, &[1])?, device.zeros("lse", DType::F32, &[1])?];
/// let forward = attention.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &v, &o, &lse))?;
/// assert!(forward.dispatches().eq([1])); // one pass, in one dispatch
/// for values in [[1.0, 3.0], [4.0, 8.0]] {
///     v.write(0, &values)?; // new numbers, the same commands
///     let mut encoder = device.wgpu().create_command_encoder(&Default::default());
///     forward.encode(&mut encoder);
///     device.queue().submit([encoder.finish()]);
///     assert!((o.download::<f32>()?[0] - (values[0] + values[1]) / 2.0).abs() < 1e-5);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Prepared {
    plan: Plan,
    /// The pipeline and the dispatches of each pass.
    dispatches: Vec<(Arc<Pipeline>, Vec<Dispatch>)>,
}

impl Prepared {
    pub(crate) async fn forward(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &ForwardBuffers<'_>,
        preference: &Preference<'_>,
        budget: Duration,
    ) -> Result<Self> {
        let mut operands = Operands::new(problem, device);
        add_forward(&mut operands, buffers)?;
        if let Some(row_max) = &buffers.row_max {
            operands.add(Binding::RowMax, row_max)?;
        }
        operands.check_results(&[Binding::O, Binding::OLo, Binding::Lse, Binding::RowMax])?;
        let optional = OptionalOperands {
            o_lo: buffers.o_lo.is_some(),
            row_max: buffers.row_max.is_some(),
            scalar: !operands.vec4(),
            quads: !operands.vec8(),
            ..OptionalOperands::default()
        };
        let plan = Plan::forward_with(problem, optional, device.capabilities(), preference)?;
        Prepared::new(pipelines, operands, plan, budget).await
    }

    pub(crate) async fn backward(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &BackwardBuffers<'_>,
        preference: &Preference<'_>,
        budget: Duration,
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
        let o = problem.options();
        for (binding, wanted, hint, view) in [
            (Binding::DAlibiSlopes, o.alibi, "set Options::alibi", &buffers.d_alibi_slopes),
            (Binding::DBias, o.bias.is_some(), "set Options::bias", &buffers.d_bias),
        ] {
            if view.is_some() {
                operands.add_with(binding, wanted, hint, view.as_ref())?;
            }
        }
        operands.check_results(&[
            Binding::DQ,
            Binding::DK,
            Binding::DV,
            Binding::DSinkLogits,
            Binding::DAlibiSlopes,
            Binding::DBias,
        ])?;
        let optional = OptionalOperands {
            d_lse: buffers.d_lse.is_some(),
            o_lo: buffers.forward.o_lo.is_some(),
            d_alibi_slopes: buffers.d_alibi_slopes.is_some(),
            d_bias: buffers.d_bias.is_some(),
            mask_bits: buffers.forward.mask_scratch.is_some(),
            packed: buffers.d_k.buffer == buffers.d_v.buffer,
            row_max: false,
            scalar: !operands.vec4(),
            quads: !operands.vec8(),
        };
        let plan = Plan::backward_with(problem, optional, device.capabilities(), preference)?;
        Prepared::new(pipelines, operands, plan, budget).await
    }

    /// Prepares a merge. `problem` is a merge, too: its key axis counts partial states (see [`Problem::merging`]).
    pub(crate) async fn merge(
        device: &Device,
        pipelines: &Pipelines,
        problem: &Problem,
        buffers: &MergeBuffers<'_>,
        budget: Duration,
    ) -> Result<Self> {
        let mut operands = Operands::new(problem, device);
        operands.add(Binding::States, &buffers.states)?;
        operands.add(Binding::StatesLse, &buffers.states_lse)?;
        operands.add_per_head(Binding::SinkLogits, buffers.sink_logits.as_ref())?;
        operands.add(Binding::O, &buffers.o)?;
        operands.add(Binding::Lse, &buffers.lse)?;
        if buffers.states_lo.is_some() || buffers.o_lo.is_some() {
            problem.check_o_lo()?;
            for (binding, view) in [(Binding::StatesLo, buffers.states_lo), (Binding::OLo, buffers.o_lo)] {
                let view = view.ok_or(Error::MissingOperand { operand: binding.name() })?;
                operands.add(binding, &view)?;
            }
        }
        if buffers.states_row_max.is_some() || buffers.row_max.is_some() {
            for (binding, view) in [(Binding::StatesRowMax, buffers.states_row_max), (Binding::RowMax, buffers.row_max)]
            {
                let view = view.ok_or(Error::MissingOperand { operand: binding.name() })?;
                operands.add(binding, &view)?;
            }
        }
        operands.check_results(&[Binding::O, Binding::OLo, Binding::Lse, Binding::RowMax])?;
        let optional = OptionalOperands {
            o_lo: buffers.o_lo.is_some(),
            row_max: buffers.row_max.is_some(),
            scalar: !operands.vec4(),
            ..OptionalOperands::default()
        };
        let plan = Plan::merging(problem, optional, device.capabilities())?;
        Prepared::new(pipelines, operands, plan, budget).await
    }

    async fn new(pipelines: &Pipelines, operands: Operands<'_>, plan: Plan, budget: Duration) -> Result<Self> {
        let (device, problem) = (operands.device, operands.problem);
        let cut = |pass: &Pass| {
            let views = operands.views(pass, &plan);
            let slices = pass.slices(problem, &views, device.capabilities(), budget)?;
            Ok((views, slices))
        };
        let slices = plan.passes.iter().map(cut).collect::<Result<Vec<_>>>()?;
        let scratch = device.scoped_async("allocating scratch", || scratch(&operands, &plan)).await??;
        let compiled = pipelines.get_all(device, &plan).await?;
        let mut dispatches = Vec::with_capacity(plan.passes.len());
        for ((pass, pipeline), (views, Slices { list, work })) in plan.passes.iter().zip(compiled).zip(slices) {
            let params = list.iter().map(|slice| operands.params(&pass.variant, &views, slice));
            let sequences = pass.variant.lengths.then(|| sequence_table(problem, work));
            let bind = || -> Result<_> {
                let sequences = sequences.map(|words| upload(device, Binding::Sequences.name(), &words)).transpose()?;
                let find = |n: usize, binding| {
                    if binding == Binding::Sequences {
                        return sequences.as_ref().map(|buffer| buffer.as_entire_binding());
                    }
                    let (_, window) = list[n].binding_ranges.iter().find(|(b, _)| *b == binding)?;
                    let own = scratch.iter().find(|(b, _)| *b == binding);
                    own.map(|(_, buffer)| resource(buffer, *window))
                        .or_else(|| operands.find(binding).map(|placed| placed.binding(*window)))
                };
                let groups = bind_groups(device, &pipeline, &pass.variant, params, find);
                Ok(groups.into_iter().zip(list.iter().map(|slice| slice.grid)).collect::<Vec<_>>())
            };
            let groups = device.scoped_async("binding operands", bind).await??;
            dispatches.push((pipeline, groups));
        }
        Ok(Prepared { plan, dispatches })
    }

    /// The plan: the passes that will run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Records all passes into the caller's encoder. Where a buffer was destroyed or mapped meanwhile, or the device lost, wgpu
    /// reports that of the encoder's end or of the submission, to the caller: see [`Device::scoped`].
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

    /// Records one pass of the [`plan`](Self::plan), for measuring it alone; nothing where the plan has no pass of this index.
    pub fn encode_pass_in(&self, compute: &mut wgpu::ComputePass<'_>, index: usize) {
        let Some((pipeline, groups)) = self.dispatches.get(index) else { return };
        compute.set_pipeline(&pipeline.pipeline);
        for (group, [x, y]) in groups {
            compute.set_bind_group(0, group, &[]);
            compute.dispatch_workgroups(*x, *y, 1);
        }
    }

    /// Dispatches of each pass of the [`plan`](Self::plan): one, but where operands exceed a binding, where the time exceeds
    /// the [budget](crate::Attention::with_dispatch_budget), or where a dispatch cannot number all workgroups.
    pub fn dispatches(&self) -> impl ExactSizeIterator<Item = usize> {
        self.dispatches.iter().map(|(_, groups)| groups.len())
    }
}

fn add_forward<'a>(operands: &mut Operands<'a>, buffers: &ForwardBuffers<'a>) -> Result<()> {
    operands.add(Binding::Q, &buffers.q)?;
    operands.add(Binding::K, &buffers.k)?;
    operands.add(Binding::V, &buffers.v)?;
    operands.add_per_head(Binding::SinkLogits, buffers.sink_logits.as_ref())?;
    let o = operands.problem.options();
    operands.add_with(Binding::AlibiSlopes, o.alibi, "set Options::alibi", buffers.alibi_slopes.as_ref())?;
    operands.add_with(Binding::Bias, o.bias.is_some(), "set Options::bias", buffers.bias.as_ref())?;
    operands.add_with(Binding::Mask, o.mask.is_some(), "set Options::mask", buffers.mask.as_ref())?;
    operands.mask_scratch = buffers.mask_scratch;
    operands.add(Binding::O, &buffers.o)?;
    if let Some(o_lo) = &buffers.o_lo {
        operands.problem.check_o_lo()?;
        operands.add(Binding::OLo, o_lo)?;
    }
    operands.add(Binding::Lse, &buffers.lse)
}

/// The table that kernels of sequences of different lengths read: the sequences, then the list of tiles.
fn sequence_table(problem: &Problem, work: Vec<[u32; 2]>) -> Vec<u32> {
    let sequences = problem.sequences().flat_map(|sequence| {
        let Sequence { entry, q_start, q_rows, k_start, k_rows, band } = sequence;
        // A sequence without rows begins where there is something to read.
        let start = |start, rows| if rows == 0 { 0 } else { start as u32 };
        let words: [u32; SEQUENCE_WORDS as usize] = [
            entry as u32,
            start(q_start, q_rows),
            q_rows as u32,
            band.seq_q() as u32,
            start(k_start, k_rows),
            k_rows as u32,
            band.seq_k() as u32,
            band.sink_tokens(),
            band.lower() as u32,
            band.upper() as u32,
            band.offset() as u32,
        ];
        words
    });
    sequences.chain(work.into_flattened()).collect()
}

/// The buffers in which the kernels of a plan leave data for each other.
fn scratch(operands: &Operands<'_>, plan: &Plan) -> Result<Vec<(Binding, wgpu::Buffer)>> {
    let mut scratch: Vec<(Binding, wgpu::Buffer)> = Vec::new();
    for (binding, _) in plan.passes.iter().flat_map(|pass| pass.variant.bindings()) {
        let Some(view) = scratch_view(binding, operands.problem, &plan.passes) else { continue };
        if scratch.iter().all(|(b, _)| *b != binding) {
            let bytes = (view.last_element() + 1) as usize * view.element as usize;
            let usage = wgpu::BufferUsages::STORAGE;
            if let (Binding::MaskBits, Some(buffer)) = (binding, operands.mask_scratch) {
                let (operand, needed, actual) = ("mask_scratch", bytes as u64, buffer.size());
                if actual < needed {
                    return Err(Error::BufferTooSmall { operand, needed, actual });
                }
                if !buffer.usage().contains(usage) {
                    return Err(Error::BufferUsage { operand, needed: usage, actual: buffer.usage() });
                }
                if let Some((_, other)) = operands.placed.iter().find(|(view, _)| view.buffer == buffer) {
                    return Err(Error::Aliasing { output: operand, other: other.view.binding.name() });
                }
                scratch.push((binding, buffer.clone()));
                continue;
            }
            scratch.push((binding, allocate::<u8>(operands.device, binding.name(), bytes, usage)?));
        }
    }
    Ok(scratch)
}

//! From a plan to commands.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::pipeline::{Pipeline, Pipelines};
use crate::plan::{OptionalOperands, Pass, Plan, Preference, repair_slots, work_list};
use crate::problem::{Layout, MaskPacking, Problem, SinkLogits};
use crate::sequences::Sequence;
use crate::shader::{
    Binding, DELTA_ROWS, MASK_BLOCK_ROWS, MASK_BLOCK_WORDS, MAXIMA_PARTS, RANGED_OPERANDS, SEQUENCE_WORDS,
};
use crate::tensor::{Extents, Placed, TensorView, allocate, upload};

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
    lse: Operand,
    d_lse: Operand,
    row_terms: Operand,
    bias: Operand,
    d_bias: Operand,
    mask: Operand,
    mask_bits: Operand,
    mask_classes: Operand,
    heads: u32,
    kv_heads: u32,
    seq_q: u32,
    seq_k: u32,
    lower: i32,
    upper: i32,
    offset: i32,
    sink_tokens: u32,
    workgroups: u32,
    sink_offset: u32,
    d_sink_offset: u32,
    slope_offset: u32,
    d_slope_offset: u32,
    slopes_at: u32,
    work_at: u32,
    batch: u32,
    sequence_count: u32,
    mask_heads: u32,
    mask_rows: u32,
    mask_keys: u32,
    pair_rows: u32,
    pair_keys: u32,
    softcap: f32,
    scale: f32,
    score_scale: f32,
    scale_sign: f32,
    scale_size: f32,
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
    /// One slope per query head, f32, where the options say [`Options::alibi`](crate::Options::alibi); densely packed.
    pub alibi_slopes: Option<TensorView<'a>>,
    /// Added to the scores, of the element type that the options name, see [`Problem::bias_shape`]. Strides are those of batch,
    /// head and query.
    pub bias: Option<TensorView<'a>>,
    /// Which keys may be seen, see [`Problem::mask_shape`]. Offset and strides (of batch, head and query) count bytes, or words
    /// where it is packed.
    pub mask: Option<TensorView<'a>>,
    /// Result: attention outputs.
    pub o: TensorView<'a>,
    /// Result, in f16 and bf16 only, where the backward pass is to have it: what rounding took from o, an i16 in the place
    /// of each of its elements, see [`Element::rest`](crate::Element::rest). Views are as those of o, two bytes an element.
    pub o_rest: Option<TensorView<'a>>,
    /// Result: log of the denominators, `[batch, heads, seq_q]`, densely packed.
    pub lse: TensorView<'a>,
}

impl<'a> ForwardBuffers<'a> {
    /// What every forward pass has; what goes with options is `None`.
    pub fn new(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
        o: impl Into<TensorView<'a>>,
        lse: impl Into<TensorView<'a>>,
    ) -> Self {
        let (q, k, v, o, lse) = (q.into(), k.into(), v.into(), o.into(), lse.into());
        ForwardBuffers { q, k, v, sink_logits: None, alibi_slopes: None, bias: None, mask: None, o, o_rest: None, lse }
    }
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
    /// Result: gradient by the ALiBi slopes, `[heads]`, f32, densely packed; `None` where it is not wanted.
    pub d_alibi_slopes: Option<TensorView<'a>>,
    /// Result: gradient by the bias, f32, densely packed in the bias' shape; `None` where it is not wanted, which saves two of
    /// nine matrix products.
    pub d_bias: Option<TensorView<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// What every backward pass has; what goes with options is `None`.
    pub fn new(
        forward: ForwardBuffers<'a>,
        d_o: impl Into<TensorView<'a>>,
        d_q: impl Into<TensorView<'a>>,
        d_k: impl Into<TensorView<'a>>,
        d_v: impl Into<TensorView<'a>>,
    ) -> Self {
        let (d_o, d_q, d_k, d_v) = (d_o.into(), d_q.into(), d_k.into(), d_v.into());
        let (d_lse, d_sink_logits, d_alibi_slopes, d_bias) = (None, None, None, None);
        BackwardBuffers { forward, d_o, d_lse, d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias }
    }
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

    /// Extents of an operand, and what is to be known of its elements.
    fn extents(&self, binding: Binding) -> (Extents, Kind) {
        let s = self.problem.shape();
        let pairs = |shape: Option<Extents>| shape.unwrap_or([1; 4]);
        match binding {
            Binding::Q | Binding::DQ => ([s.batch, s.heads, s.seq_q, s.head_dim], Kind::Wide),
            Binding::K | Binding::DK => ([s.batch, s.kv_heads, s.seq_k, s.head_dim], Kind::Wide),
            Binding::V | Binding::DV => ([s.batch, s.kv_heads, s.seq_k, s.value_dim], Kind::Wide),
            Binding::O | Binding::ORest | Binding::DO => ([s.batch, s.heads, s.seq_q, s.value_dim], Kind::Wide),
            Binding::SinkLogits | Binding::DSinkLogits | Binding::AlibiSlopes | Binding::DAlibiSlopes => {
                ([1, 1, s.heads, 1], Kind::Dense)
            }
            Binding::Bias => (pairs(self.problem.bias_shape()), Kind::Pairs(self.problem.options().bias_dtype.bytes())),
            Binding::DBias => (pairs(self.problem.bias_shape()), Kind::Dense),
            Binding::Mask => {
                let bytes = if self.problem.options().mask_packing == MaskPacking::Bits { 4 } else { 1 };
                (pairs(self.problem.mask_shape()), Kind::Pairs(bytes))
            }
            _ => ([s.batch, s.heads, s.seq_q, 1], Kind::Dense),
        }
    }

    fn add(&mut self, binding: Binding, view: &TensorView<'a>) -> Result<()> {
        let (extents, kind) = self.extents(binding);
        let name = binding.name();
        if kind == Kind::Dense && view.strides.is_some() {
            let reason = "must be densely packed; give an offset, but no strides".into();
            return Err(Error::InvalidOption { option: name, reason });
        }
        let options = self.problem.options();
        let (layout, element) = match kind {
            Kind::Wide => (options.layout, options.dtype.bytes()),
            Kind::Dense => (Layout::Bhsd, 4),
            Kind::Pairs(bytes) => (Layout::Bhsd, bytes),
        };
        let placed = Placed::new(name, view, extents, layout, element, self.device.capabilities())?;
        self.placed.push((binding, *view, placed));
        Ok(())
    }

    /// An operand that goes with an option, and with nothing else.
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

    /// An operand that goes with [`SinkLogits::PerHead`].
    fn add_per_head(&mut self, binding: Binding, view: Option<&TensorView<'a>>) -> Result<()> {
        let wanted = self.problem.options().sink_logits == SinkLogits::PerHead;
        self.add_with(binding, wanted, "set Options::sink_logits to SinkLogits::PerHead", view)
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
        let wide = self.placed.iter().filter(|(b, ..)| self.extents(*b).1 == Kind::Wide);
        wide.into_iter().all(|(.., placed)| placed.vec4())
    }

    fn params(&self, vec4: bool, pass: &Pass) -> Params {
        let (problem, s, o) = (self.problem, self.problem.shape(), self.problem.options());
        let band = problem.sequence(0).band;
        let operand = |binding| match self.find(binding) {
            Some(placed) => Operand::new(placed, if vec4 { 4 } else { 1 }),
            None => Operand::zeroed(),
        };
        let narrow = |binding| self.find(binding).map_or(Operand::zeroed(), |placed| Operand::new(placed, 1));
        let offset = |binding| self.find(binding).map_or(0, |placed| placed.offset);
        let rows = |offset| Operand { offset, batch: (s.heads * s.seq_q) as u32, head: s.seq_q as u32, seq: 1 };
        let [_, _, pair_rows, pair_keys] = problem.pairs_shape().map(|n| n as u32);
        let mask = MaskPlaces::new(problem);
        // Scores that are formed beforehand come to the softmax as they are.
        let score_scale = if problem.modifies_scores() { 1.0 } else { problem.scale() };
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
            lse: rows(offset(Binding::Lse)),
            d_lse: rows(offset(Binding::DLse)),
            row_terms: rows(0),
            bias: narrow(Binding::Bias),
            d_bias: narrow(Binding::DBias),
            mask: narrow(Binding::Mask),
            mask_bits: mask.bits,
            mask_classes: mask.classes,
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            seq_q: s.seq_q as u32,
            seq_k: s.seq_k as u32,
            lower: band.lower(),
            upper: band.upper(),
            // Needed with ALiBi only, where it was checked.
            offset: band.offset() as i32,
            sink_tokens: band.sink_tokens(),
            workgroups: pass.workgroups,
            sink_offset: offset(Binding::SinkLogits),
            d_sink_offset: offset(Binding::DSinkLogits),
            slope_offset: offset(Binding::AlibiSlopes),
            d_slope_offset: offset(Binding::DAlibiSlopes),
            slopes_at: (s.batch * s.heads * s.seq_q) as u32,
            work_at: problem.sequence_count() as u32 * SEQUENCE_WORDS,
            batch: s.batch as u32,
            sequence_count: problem.sequence_count() as u32,
            mask_heads: mask.shape[1] as u32,
            mask_rows: mask.shape[2] as u32,
            mask_keys: mask.shape[3] as u32,
            pair_rows: if o.bias.is_some_and(|axes| axes.seq_q) { pair_rows } else { 1 },
            pair_keys,
            softcap: o.softcap.unwrap_or(0.0),
            scale: problem.scale(),
            score_scale,
            scale_sign: if score_scale < 0.0 { -1.0 } else { 1.0 },
            scale_size: score_scale.abs(),
            negative_infinity: f32::NEG_INFINITY,
        }
    }
}

/// What an operand's elements are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// Rows of features, of the problem's element type.
    Wide,
    /// f32, densely packed.
    Dense,
    /// Of pairs of queries and keys, of so many bytes.
    Pairs(usize),
}

/// Where the boolean mask's bits, and the classes of its blocks behind them, lie in words.
struct MaskPlaces {
    /// Batch, heads, rows and keys of the mask's own.
    shape: [usize; 4],
    bits: Operand,
    classes: Operand,
    /// Words of all.
    words: usize,
}

impl MaskPlaces {
    fn new(problem: &Problem) -> Self {
        let axes = problem.options().mask.unwrap_or_default();
        let shape @ [batch, heads, rows, keys] = axes.of(problem.pairs_shape());
        let of = |offset: usize, rows: usize, words: usize| {
            // An axis that is not its own leads nowhere.
            let stride = |own: bool, stride: usize| if own { stride as u32 } else { 0 };
            Operand {
                offset: offset as u32,
                batch: stride(axes.batch, heads * rows * words),
                head: stride(axes.heads, rows * words),
                seq: stride(axes.seq_q, words),
            }
        };
        let row_words = keys.div_ceil(32);
        let [block_rows, blocks] =
            [rows.div_ceil(MASK_BLOCK_ROWS as usize), row_words.div_ceil(MASK_BLOCK_WORDS as usize)];
        let bits = batch * heads * rows * row_words;
        // A tile may reach beyond the last key; what is read there is hidden by the band.
        let end = bits + batch * heads * block_rows * blocks;
        let words = end + MASK_READ_BEYOND;
        MaskPlaces { shape, bits: of(0, rows, row_words), classes: of(bits, block_rows, blocks), words }
    }
}

/// Words that kernels may read behind the last row of a mask's bits: columns of the widest tile.
const MASK_READ_BEYOND: usize = 512;

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
        let optional = OptionalOperands { o_rest: buffers.o_rest.is_some(), ..OptionalOperands::default() };
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
            o_rest: buffers.forward.o_rest.is_some(),
            d_alibi_slopes: buffers.d_alibi_slopes.is_some(),
            d_bias: buffers.d_bias.is_some(),
        };
        let plan = Plan::backward_with(problem, operands.vec4(), optional, device.capabilities(), preference)?;
        Prepared::new(pipelines, operands, plan).await
    }

    async fn new(pipelines: &Pipelines, operands: Operands<'_>, plan: Plan) -> Result<Self> {
        let device = operands.device;
        let scratch = device.scoped("allocating scratch", || scratch(&operands, &plan)).await??;
        let compiled = pipelines.get_all(device, &plan).await?;
        let mut dispatches = Vec::with_capacity(plan.passes.len());
        for (pass, pipeline) in plan.passes.iter().zip(compiled) {
            let params = operands.params(operands.vec4(), pass);
            let sequences = pass.variant.lengths.then(|| sequence_table(operands.problem, pass));
            let bind_group = device
                .scoped("binding operands", || -> Result<_> {
                    let label = Some("sink-attention");
                    // Not create_buffer_init, which panics where the device is lost.
                    let buffer = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                        label,
                        size: size_of::<Params>() as u64,
                        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                        mapped_at_creation: false,
                    });
                    device.queue().write_buffer(&buffer, 0, bytemuck::bytes_of(&params));
                    let sequences =
                        sequences.map(|words| upload(device, Binding::Sequences.name(), &words)).transpose()?;
                    let resource = |binding| match binding {
                        Binding::Params => Some(buffer.as_entire_binding()),
                        Binding::Sequences => sequences.as_ref().map(|buffer| buffer.as_entire_binding()),
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
                    Ok(device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor {
                        label,
                        layout: &pipeline.layout,
                        entries: &entries,
                    }))
                })
                .await??;
            dispatches.push((pipeline, bind_group));
        }
        Ok(Prepared { plan, dispatches })
    }

    /// What will run.
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
    let o = operands.problem.options();
    operands.add_with(Binding::AlibiSlopes, o.alibi, "set Options::alibi", buffers.alibi_slopes.as_ref())?;
    operands.add_with(Binding::Bias, o.bias.is_some(), "set Options::bias", buffers.bias.as_ref())?;
    operands.add_with(Binding::Mask, o.mask.is_some(), "set Options::mask", buffers.mask.as_ref())?;
    operands.add(Binding::O, &buffers.o)?;
    if let Some(o_rest) = &buffers.o_rest {
        operands.problem.check_rest()?;
        operands.add(Binding::ORest, o_rest)?;
    }
    operands.add(Binding::Lse, &buffers.lse)
}

/// The table that kernels of sequences of different lengths read: the sequences, then the list of tiles.
fn sequence_table(problem: &Problem, pass: &Pass) -> Vec<u32> {
    let sequences = problem.sequences().flat_map(|sequence| {
        let Sequence { entry, q_start, q_rows, k_start, k_rows, band } = sequence;
        // What is empty begins where there is something to read.
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
    // Tiles of the bias' gradient are those of the bias.
    let work = if pass.variant.axes.is_some() { Vec::new() } else { work_list(pass, problem) };
    sequences.chain(work.into_flattened()).collect()
}

/// What the kernels of a plan hand to each other.
fn scratch(operands: &Operands<'_>, plan: &Plan) -> Result<Vec<(Binding, wgpu::Buffer)>> {
    let (problem, s) = (operands.problem, operands.problem.shape());
    let rows = s.batch * s.heads * s.seq_q;
    let mut scratch = Vec::new();
    let reports = plan.passes.iter().filter(|pass| pass.variant.fragments().is_some());
    let reports = reports.map(|pass| repair_slots(pass, problem));
    let mask = MaskPlaces::new(problem);
    for (binding, words) in [
        (Binding::Repairs, reports.max().unwrap_or(0)),
        (Binding::Maxima, (RANGED_OPERANDS * MAXIMA_PARTS) as usize),
        (Binding::Ranges, RANGED_OPERANDS as usize),
        // Two numbers a row, and the slopes.
        (Binding::RowTerms, 2 * (rows + if problem.options().alibi { s.heads } else { 0 })),
        (Binding::SinkPartials, s.batch * s.heads * s.seq_q.div_ceil(DELTA_ROWS as usize)),
        (Binding::AlibiMoments, rows),
        (Binding::MaskBits, mask.words),
    ] {
        if plan.passes.iter().any(|pass| pass.variant.bindings().iter().any(|(b, _)| *b == binding)) {
            let usage = wgpu::BufferUsages::STORAGE;
            let limit = operands.device.capabilities().binding_bytes;
            let (operand, bytes) = (binding.name(), 4 * words as u64);
            if bytes > limit {
                return Err(Error::BindingTooLarge { operand, bytes, limit });
            }
            if words as u64 > u64::from(u32::MAX) {
                let most = u32::MAX.into();
                return Err(Error::IndexOverflow { operand, last_element: words as u128, most });
            }
            scratch.push((binding, allocate::<f32>(operands.device, operand, words, usage)?));
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
        let params = members!(Params: q k v o d_o d_q d_k d_v o_rest lse d_lse row_terms bias d_bias mask mask_bits
            mask_classes heads kv_heads seq_q seq_k lower upper offset sink_tokens workgroups sink_offset d_sink_offset
            slope_offset d_slope_offset slopes_at work_at batch sequence_count mask_heads mask_rows mask_keys pair_rows
            pair_keys softcap scale score_scale scale_sign scale_size negative_infinity);
        assert_eq!(params, in_the_shader(&module, "Params"));
    }
}

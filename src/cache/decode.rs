//! Decoding from a cache: prepared once, recorded as often as wanted.

use std::sync::Arc;

use super::append::table_positions;
use super::bind::{Bound, Given, check_result, params};
use super::gpu::KvCache;
use super::step::{Step, StepPass, Ticket};
use crate::device::buffer::{TensorView, allocate, upload};
use crate::kernel::Binding;
use crate::kernel::params::{Operand, Params};
use crate::plan::decode::{Decode, DecodePlan};
use crate::plan::splits::DecodeTiling;
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, SinkLogits};

/// The operands of a decoding step in buffers of the caller's.
///
/// ```
/// use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers};
/// use sink_attention::{Attention, DType, DeviceChoice, Error, Options, SinkLogits};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let mut cache = attention.create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 1))?;
/// let [q, k, v] = [device.upload("q", &[1.0])?, device.upload("k", &[0.0, 0.0])?, device.upload("v", &[1.0, 3.0])?];
/// let sink_logits = device.upload("sink_logits", &[2f32.ln()])?;
/// let [o, lse] = [device.zeros("o", DType::F32, &[1])?, device.zeros("lse", DType::F32, &[1])?];
/// let append = cache.prepare_append(&[2], &AppendBuffers::new(&k, &v))?;
/// let buffers = DecodeBuffers::new(&q, &o, &lse).sink_logits(sink_logits.view());
/// let decode = cache.prepare_decode(&Decode::new(1, Options::new().sink_logits(SinkLogits::PerHead)), &buffers)?;
/// let mut step = attention.step()?;
/// append.encode(&mut cache, &mut step)?;
/// decode.encode(&cache, &mut step)?; // sees the tokens that were appended before it
/// step.submit()?;
/// assert!((o.download::<f32>()?[0] - 1.0).abs() < 1e-5); // (1 * 1 + 1 * 3) / (1 + 1 + 2)
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct DecodeBuffers<'a> {
    /// Queries, `[B, M, H, D]` or in the options' layout; rotated already.
    pub q: TensorView<'a>,
    /// Result: attention outputs, `[B, M, H, E]` or in the options' layout.
    pub o: TensorView<'a>,
    /// Result: log of the denominators, `[B, H, M]`, f32, densely packed.
    pub lse: TensorView<'a>,
    /// One logit per query head, where the options say [`SinkLogits::PerHead`]; densely packed.
    pub sink_logits: Option<TensorView<'a>>,
    /// One slope per query head, f32, where the options say [`Options::alibi`](crate::Options::alibi); densely packed.
    pub alibi_slopes: Option<TensorView<'a>>,
    /// The words of [`Decode::tree_mask`], `[M]` or `[B, M]`, u32, densely packed. They are read when the step runs, so a later tree may
    /// have been written by then. Any bits are valid.
    pub tree_mask: Option<TensorView<'a>>,
    /// The table of [`AppendBuffers::cos_sin`](crate::cache::AppendBuffers::cos_sin), where keys are rotated as they are read.
    pub cos_sin: Option<&'a wgpu::Buffer>,
    /// Result, where it is wanted: the largest score of each row, f32, `[B, H, M]` as lse, densely packed; see
    /// [`Attention::forward_with_row_max`](crate::Attention::forward_with_row_max).
    pub row_max: Option<TensorView<'a>>,
}

impl<'a> DecodeBuffers<'a> {
    /// The operands and results of every step. Those that go with options are `None`.
    pub fn new(q: impl Into<TensorView<'a>>, o: impl Into<TensorView<'a>>, lse: impl Into<TensorView<'a>>) -> Self {
        DecodeBuffers {
            q: q.into(),
            o: o.into(),
            lse: lse.into(),
            sink_logits: None,
            alibi_slopes: None,
            tree_mask: None,
            cos_sin: None,
            row_max: None,
        }
    }
}

setters! {
    impl['a] DecodeBuffers['a]
    into {
        q: TensorView<'a>,
        o: TensorView<'a>,
        lse: TensorView<'a>,
    }
    optional {
        sink_logits: TensorView<'a>,
        alibi_slopes: TensorView<'a>,
        tree_mask: TensorView<'a>,
        row_max: TensorView<'a>,
        cos_sin: &'a wgpu::Buffer,
    }
}

impl KvCache {
    /// Prepares a decoding step: a few queries of each sequence against the keys that its cache holds by then. Allocates the
    /// scratch that its two kernels share.
    ///
    /// # Errors
    /// [`Error::CacheElementType`] unless the options name the cache's element type; [`Error::SequenceOutOfRange`];
    /// [`Error::DimensionTooLarge`] for more than 16 queries; [`Error::InvalidOption`] for options that decoding does not take;
    /// those of [`Problem::new`](crate::Problem::new) and of [`Attention::prepare_forward`](crate::Attention::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_decode(&self, decode: &Decode, buffers: &DecodeBuffers<'_>) -> Result<PreparedDecode> {
        pollster::block_on(PreparedDecode::new(self, decode, buffers))
    }

    /// As [`prepare_decode`](Self::prepare_decode), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_decode`](Self::prepare_decode).
    pub async fn prepare_decode_async(&self, decode: &Decode, buffers: &DecodeBuffers<'_>) -> Result<PreparedDecode> {
        PreparedDecode::new(self, decode, buffers).await
    }
}

/// A decoding step that is ready to be recorded, as often as wanted: nothing is allocated, submitted or waited for after this
/// point.
#[derive(Debug, Clone)]
pub struct PreparedDecode {
    keys: wgpu::Buffer,
    entries: Vec<usize>,
    /// Whose queries appends must have rotated.
    rotated_heads: Option<usize>,
    plan: DecodePlan,
    /// One for each pass of the plan.
    kernels: Vec<Bound>,
}

impl PreparedDecode {
    pub(crate) async fn new(cache: &KvCache, decode: &Decode, buffers: &DecodeBuffers<'_>) -> Result<Self> {
        let (config, device) = (&cache.config, &cache.device);
        let capabilities = device.capabilities();
        let (problem, bounds) = decode.problem(config)?;
        let entries = decode.entries(config)?;
        let (s, options) = (problem.shape(), problem.options());
        let element = config.dtype.bytes();
        let place = |binding, view, [batch, heads, seq, width]: [usize; 4], layout, element| {
            Given::new(cache, binding, view, [batch, heads, seq, width], layout, element)
        };
        let q = place(Binding::Q, &buffers.q, [s.batch, s.heads, s.seq_q, s.head_dim], options.layout, element)?;
        let o = place(Binding::O, &buffers.o, [s.batch, s.heads, s.seq_q, s.value_dim], options.layout, element)?;
        for (binding, view) in [
            (Binding::Lse, Some(&buffers.lse)),
            (Binding::SinkLogits, buffers.sink_logits.as_ref()),
            (Binding::AlibiSlopes, buffers.alibi_slopes.as_ref()),
            (Binding::TreeMask, buffers.tree_mask.as_ref()),
            (Binding::RowMax, buffers.row_max.as_ref()),
        ] {
            if view.is_some_and(|view| view.strides.is_some()) {
                let reason = "must be densely packed; give an offset, but no strides".into();
                return Err(Error::InvalidOption { option: binding.name(), reason });
            }
        }
        let rows = |binding, view| place(binding, view, [s.batch, s.heads, s.seq_q, 1], Layout::Bhsd, 4);
        let lse = rows(Binding::Lse, &buffers.lse)?;
        let row_max = buffers.row_max.as_ref().map(|view| rows(Binding::RowMax, view)).transpose()?;
        let optional = |binding: Binding, view: Option<_>, is_wanted, extents, hint| match (view, is_wanted) {
            (Some(view), true) => place(binding, view, extents, Layout::Bhsd, 4).map(Some),
            (None, false) => Ok(None),
            (None, true) => Err(Error::MissingOperand { operand: binding.name() }),
            (Some(_), false) => Err(Error::UnexpectedOperand { operand: binding.name(), hint }),
        };
        let (per_head, hint) = ([1, 1, 1, s.heads], "set Options::sink_logits to SinkLogits::PerHead");
        let has_sinks = options.sink_logits == SinkLogits::PerHead;
        let sinks = optional(Binding::SinkLogits, buffers.sink_logits.as_ref(), has_sinks, per_head, hint)?;
        let (view, hint) = (buffers.alibi_slopes.as_ref(), "set Options::alibi");
        let slopes = optional(Binding::AlibiSlopes, view, options.alibi, per_head, hint)?;
        let [trees, words] = decode.tree_mask.map_or([1, 1], |mask| mask.shape(s.batch, s.seq_q));
        let (view, hint) = (buffers.tree_mask.as_ref(), "set Decode::tree_mask");
        let tree = optional(Binding::TreeMask, view, decode.tree_mask.is_some(), [trees, 1, 1, words], hint)?;
        let optional = [sinks.as_ref(), slopes.as_ref(), tree.as_ref()];
        check_result(&o, &[&[Some(&q), Some(&lse)], &optional[..]].concat())?;
        check_result(&lse, &[&[Some(&q), Some(&o)], &optional[..]].concat())?;
        if let Some(row_max) = &row_max {
            check_result(row_max, &[&[Some(&q), Some(&o), Some(&lse)], &optional[..]].concat())?;
        }
        match (config.rotary.filter(|_| config.is_relative()), buffers.cos_sin) {
            (Some(rotary), table) => {
                let (positions, rows) = (table_positions(cache, &rotary, table)?, config.kind.rows());
                if rows > positions {
                    return Err(Error::RotaryPosition { sequence: 0, position: rows - 1, positions });
                }
            }
            (None, Some(_)) => {
                let hint = "keys have been rotated as they were appended";
                return Err(Error::UnexpectedOperand { operand: "cos_sin", hint });
            }
            (None, None) => {}
        }

        let vec4 = |binding| [&q, &o].into_iter().all(|given| given.view().binding != binding || given.view().vec4());
        let micro_kernel = cache.attention.micro_kernel();
        let plan = DecodePlan::new(config, decode, micro_kernel, vec4, row_max.is_some(), capabilities)?;
        let width = |given: &Given<'_>| if given.view().vec4() { 4 } else { 1 };
        let params = Params {
            q: q.operand(width(&q)),
            o: o.operand(width(&o)),
            heads: s.heads as u32,
            queries: s.seq_q as u32,
            slice_batches: s.batch as u32,
            slice_heads: s.heads as u32,
            slice_tiles: s.seq_q as u32,
            slice_cells: 1,
            workgroups: (s.batch * s.heads * s.seq_q) as u32,
            left: bounds.left,
            right: bounds.right,
            sink_tokens: bounds.sink_tokens,
            groups: (entries.len() * config.kv_heads) as u32,
            row_tiles: plan.row_tiles,
            splits: plan.split.splits,
            most_splits: plan.split.most,
            long_tiles: plan.split.long_tiles,
            least_tiles: plan.split.least_tiles,
            lse_offset: lse.operand(1).offset,
            row_max: row_max.as_ref().map_or(Operand::default(), |row_max| row_max.operand(1)),
            sink_offset: sinks.as_ref().map_or(0, |sinks| sinks.operand(1).offset),
            slope_offset: slopes.as_ref().map_or(0, |slopes| slopes.operand(1).offset),
            tree_offset: tree.as_ref().map_or(0, |tree| tree.operand(1).offset),
            // One tree is for all sequences.
            tree_batch: if trees > 1 { words as u32 } else { 0 },
            scale: problem.scale(),
            softcap: options.softcap.unwrap_or(0.0),
            ..params(config)
        };
        let scratch = || -> Result<_> {
            let list: Vec<u32> = entries.iter().map(|sequence| *sequence as u32).collect();
            let partials = allocate::<[f32; 4]>(device, "partials", plan.partials(), wgpu::BufferUsages::STORAGE)?;
            Ok((partials, upload(device, "entries", &list)?))
        };
        let (partials, list) = device.scoped_async("allocating scratch", scratch).await??;
        let mut operands = vec![
            (Binding::Q, q.resource()),
            (Binding::O, o.resource()),
            (Binding::Lse, lse.resource()),
            (Binding::Partials, partials.as_entire_binding()),
            (Binding::Entries, list.as_entire_binding()),
        ];
        operands.extend(row_max.as_ref().map(|row_max| (Binding::RowMax, row_max.resource())));
        for given in [&sinks, &slopes, &tree].into_iter().flatten() {
            operands.push((given.view().binding, given.resource()));
        }
        operands.extend(buffers.cos_sin.map(|table| (Binding::CosSin, table.as_entire_binding())));
        let mut kernels = Vec::with_capacity(plan.passes.len());
        for pass in &plan.passes {
            kernels.push(Bound::new(cache, &pass.variant, &params, &operands).await?);
        }
        let rotated_heads = decode.rotated_heads(config);
        Ok(PreparedDecode { keys: cache.keys.clone(), entries, rotated_heads, plan, kernels })
    }

    /// The division of the kernel's work.
    pub fn tiling(&self) -> DecodeTiling {
        self.plan.tiling
    }

    /// Workgroups of the kernel that reads the cache, for the lengths of now.
    pub fn workgroups(&self, cache: &KvCache) -> u64 {
        let [x, y, z] = self.grid(cache);
        u64::from(x) * u64::from(y) * u64::from(z)
    }

    /// The grid of the kernel that reads the cache.
    fn grid(&self, cache: &KvCache) -> [u32; 3] {
        let of = |sequence: &usize| self.plan.splits(cache.block_table().keys(*sequence));
        let splits = self.entries.iter().map(of).max().unwrap_or(0);
        let [y, z] = self.plan.groups;
        [splits * self.plan.row_tiles, y, z]
    }

    /// Records it for the sequences as they are by then in the step.
    ///
    /// # Errors
    /// [`Error::OtherCache`], [`Error::CacheBusy`], [`Error::OtherDevice`]; [`Error::CacheEvicted`] for several queries of a rolling
    /// cache that has taken tokens back, where the first of them would not find its window whole;
    /// [`Error::QueriesNotRotated`] where the cache has a rotary embedding and [`AppendBuffers::q`](crate::cache::AppendBuffers::q) was not given with the last
    /// tokens, or had another number of heads.
    pub fn encode(&self, cache: &KvCache, step: &mut Step) -> Result<()> {
        self.check(cache, step.ticket())?;
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention decode"), timestamp_writes: None };
        self.dispatch(cache, &mut step.encoder().begin_compute_pass(&descriptor));
        Ok(())
    }

    /// The same into a compute pass of the step, for example one that takes timestamps.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_in(&self, cache: &KvCache, pass: &mut StepPass<'_>) -> Result<()> {
        self.check(cache, pass.ticket())?;
        self.dispatch(cache, pass.pass());
        Ok(())
    }

    fn check(&self, cache: &KvCache, step: &Arc<Ticket>) -> Result<()> {
        if cache.keys != self.keys {
            return Err(Error::OtherCache);
        }
        cache.read_in(step)?;
        let queries = self.plan.problem.shape().seq_q;
        for &sequence in &self.entries {
            cache.block_table().check_queries(sequence, queries, self.plan.bounds.left as usize)?;
            if let Some(heads) = self.rotated_heads {
                cache.block_table().check_rotated(sequence, queries, heads)?;
            }
        }
        Ok(())
    }

    fn dispatch(&self, cache: &KvCache, pass: &mut wgpu::ComputePass<'_>) {
        let current = cache.book().current;
        for (bound, planned) in self.kernels.iter().zip(&self.plan.passes) {
            // The plan assumes that sequences are full.
            let grid = if planned.variant.decode_tiles().is_some() { self.grid(cache) } else { planned.grid };
            if grid[0] > 0 {
                bound.dispatch(pass, current, grid);
            }
        }
    }
}

//! Decoding from a cache: prepared once, recorded as often as wanted.

use std::sync::Arc;

use super::append::table_positions;
use super::bind::{Bound, Given, check_result, params};
use super::config::{CacheConfig, MOST_QUERIES};
use super::format::Bounds;
use super::gpu::KvCache;
use super::plan::{self, DecodeTiling, Split};
use super::shader::{CacheBinding, CacheKernel, CacheVariant};
use super::step::{Step, StepPass, Ticket};
use crate::device::buffer::{TensorView, allocate, upload};
use crate::device::capabilities::DeviceClass;
use crate::kernel::params::Params;
use crate::kernel::{Binding, MicroKernel};
use crate::plan::pass::fold;
use crate::problem::error::{Error, Result};
use crate::problem::{Layout, Options, Problem, Shape, SinkLogits};

/// What a decoding step computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Decode {
    /// H, query heads.
    pub heads: usize,
    /// M, queries of each sequence, 1 to 16: those of its last tokens, which have been appended.
    pub queries: usize,
    /// The sequences, a batch in this order; `None` is all of the cache.
    pub sequences: Option<Vec<usize>>,
    /// Window, sink tokens, sink logits, scale and softcap as in a forward pass. Several queries see each other's keys unless they
    /// are causal. `layout` and `dtype` are those of q and o, `dtype` the cache's. A rolling cache implies its window and sink
    /// tokens.
    pub options: Options,
    /// How the kernel divides its work; `None` leaves that to the planner.
    pub tiling: Option<DecodeTiling>,
    /// The caller has rotated q. Else, where the cache has a rotary embedding, the appends must have rotated the queries of the
    /// last tokens, of as many heads ([`AppendBuffers::q`](crate::AppendBuffers::q)), or decoding is an error.
    pub q_rotated: bool,
}

impl Decode {
    /// One query of each sequence.
    pub fn new(heads: usize, options: Options) -> Self {
        Decode { heads, queries: 1, sequences: None, options, tiling: None, q_rotated: false }
    }

    /// Sets [`Decode::queries`].
    pub fn queries(self, queries: usize) -> Self {
        Decode { queries, ..self }
    }

    /// Sets [`Decode::q_rotated`].
    pub fn q_rotated(self, q_rotated: bool) -> Self {
        Decode { q_rotated, ..self }
    }

    /// Sets [`Decode::sequences`].
    pub fn sequences(self, sequences: impl Into<Vec<usize>>) -> Self {
        Decode { sequences: Some(sequences.into()), ..self }
    }

    /// The heads whose queries appends must have rotated, if any.
    pub(super) fn rotated_heads(&self, config: &CacheConfig) -> Option<usize> {
        config.rotary.filter(|_| !self.q_rotated).map(|_| self.heads)
    }

    /// The sequences of the batch; checked.
    pub(super) fn entries(&self, config: &CacheConfig) -> Result<Vec<usize>> {
        let Some(entries) = &self.sequences else { return Ok((0..config.sequences).collect()) };
        match entries.iter().find(|sequence| **sequence >= config.sequences) {
            Some(&sequence) => Err(Error::SequenceOutOfRange { sequence, sequences: config.sequences }),
            None => Ok(entries.clone()),
        }
    }

    /// The same as a forward pass over as many keys as there can be, which checks options and sizes.
    pub(super) fn problem(&self, config: &CacheConfig) -> Result<(Problem, Bounds)> {
        if self.options.dtype != config.dtype {
            return Err(Error::CacheElementType { operands: self.options.dtype, cache: config.dtype });
        }
        if self.queries > MOST_QUERIES {
            let (value, most) = (self.queries as u64, MOST_QUERIES as u64);
            return Err(Error::DimensionTooLarge { dimension: "queries", value, most });
        }
        let bounds = config.bounds(self.queries, &self.options)?;
        let shape = Shape {
            batch: self.sequences.as_ref().map_or(config.sequences, Vec::len),
            heads: self.heads,
            kv_heads: config.kv_heads,
            seq_q: self.queries,
            seq_k: config.most_keys(),
            head_dim: config.head_dim,
            value_dim: config.value_dim,
        };
        Ok((Problem::new(shape, self.options)?, bounds))
    }
}

/// The operands of a decoding step in buffers of the caller's.
#[derive(Debug, Clone, Copy)]
pub struct DecodeBuffers<'a> {
    /// Queries, `[B, M, H, D]` or in the options' layout; rotated already.
    pub q: TensorView<'a>,
    /// Result: attention outputs, `[B, M, H, E]` or in the options' layout.
    pub o: TensorView<'a>,
    /// Result: log of the denominators, `[B, H, M]`, f32, densely packed.
    pub lse: TensorView<'a>,
    /// One logit per query head, where the options say [`SinkLogits::PerHead`]; densely packed.
    pub sink_logits: Option<TensorView<'a>>,
    /// The table of [`AppendBuffers::cos_sin`](crate::AppendBuffers::cos_sin), where keys are rotated as they are read.
    pub cos_sin: Option<&'a wgpu::Buffer>,
}

impl<'a> DecodeBuffers<'a> {
    /// What every step has; what goes with options is `None`.
    pub fn new(q: impl Into<TensorView<'a>>, o: impl Into<TensorView<'a>>, lse: impl Into<TensorView<'a>>) -> Self {
        DecodeBuffers { q: q.into(), o: o.into(), lse: lse.into(), sink_logits: None, cos_sin: None }
    }
}

impl KvCache {
    /// Prepares a decoding step: a few queries of each sequence against the keys that its cache holds by then. Allocates what
    /// its two kernels hand to each other.
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
    queries: usize,
    /// Whose queries appends must have rotated.
    rotated_heads: Option<usize>,
    /// Workgroups along y and z: a key head of a sequence each.
    groups: [u32; 2],
    bounds: Bounds,
    tiling: DecodeTiling,
    /// Keys of a tile.
    tile: u32,
    split: Split,
    row_tiles: u32,
    kernel: Bound,
    combine: Bound,
    combine_grid: [u32; 2],
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
        for (binding, view) in [(Binding::Lse, Some(&buffers.lse)), (Binding::SinkLogits, buffers.sink_logits.as_ref())]
        {
            if view.is_some_and(|view| view.strides.is_some()) {
                let reason = "must be densely packed; give an offset, but no strides".into();
                return Err(Error::InvalidOption { option: binding.name(), reason });
            }
        }
        let lse = place(Binding::Lse, &buffers.lse, [s.batch, s.heads, s.seq_q, 1], Layout::Bhsd, 4)?;
        let sinks = match (&buffers.sink_logits, options.sink_logits == SinkLogits::PerHead) {
            (Some(view), true) => Some(place(Binding::SinkLogits, view, [1, 1, 1, s.heads], Layout::Bhsd, 4)?),
            (None, false) => None,
            (None, true) => return Err(Error::MissingOperand { operand: "sink_logits" }),
            (Some(_), false) => {
                let hint = "set Options::sink_logits to SinkLogits::PerHead";
                return Err(Error::UnexpectedOperand { operand: "sink_logits", hint });
            }
        };
        check_result(&o, &[Some(&q), Some(&lse), sinks.as_ref()])?;
        check_result(&lse, &[Some(&q), Some(&o), sinks.as_ref()])?;
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

        let rows = problem.group() * s.seq_q;
        let group_count = entries.len() * config.kv_heads;
        let cooperative = || DecodeTiling::cooperative(config, rows, group_count, s.seq_q > 1, capabilities);
        let portable = || DecodeTiling::portable(config, rows, group_count, capabilities);
        let tiling = match (decode.tiling, cache.attention.micro_kernel()) {
            (Some(tiling), _) => tiling,
            // A wide row that one head reads alone is faster without matrices (H200, benches/results/).
            (None, MicroKernel::Auto)
                if capabilities.class == DeviceClass::Nvidia && (rows > 1 || s.head_dim.max(s.value_dim) <= 64) =>
            {
                cooperative().unwrap_or_else(|_| portable())
            }
            (None, MicroKernel::Auto | MicroKernel::Portable) => portable(),
            (None, MicroKernel::Cooperative) => cooperative()
                .map_err(|reason| Error::NoKernel { problem: "decoding on cooperative matrices".into(), reason })?,
        };
        let variant = CacheVariant {
            kernel: CacheKernel::Decode {
                tiles: tiling.tiles,
                matrices: capabilities.cooperative,
                several: s.seq_q > 1,
                softcap: options.softcap.is_some(),
            },
            addressing: config.addressing(),
            format: config.format(),
            head_dim: s.head_dim as u32,
            value_dim: s.value_dim as u32,
            vec4: q.view().vec4(),
            rotary: config.rotary.filter(|_| config.is_relative()),
            indexed: decode.sequences.is_some(),
        };
        tiling.check(config, &variant, capabilities)?;
        let tile = variant.tile();
        let row_tiles = rows.div_ceil(tiling.tiles.rows() as usize);
        let total_rows = s.batch as u128 * s.heads as u128 * s.seq_q as u128;
        // Vectors of what a split leaves for a row.
        let partial = s.value_dim.div_ceil(4) as u128 + 1;
        let fitting =
            u128::from(capabilities.binding_bytes.min(capabilities.buffer_bytes)) / (16 * partial * total_rows);
        let by_grid = u128::from(capabilities.grid_dimension.min(65535));
        if row_tiles as u128 > by_grid {
            return Err(Error::TooManyWorkgroups { workgroups: row_tiles as u128, most: by_grid as u64 });
        }
        let fitting = fitting.min(by_grid / row_tiles as u128) as u32;
        if fitting == 0 {
            let (operand, bytes) = ("partial results", (16 * partial * total_rows).min(u64::MAX.into()) as u64);
            return Err(Error::BindingTooLarge { operand, bytes, limit: capabilities.binding_bytes });
        }
        let split = tiling.split(config, tile, capabilities, fitting);
        let (_, groups) = fold(entries.len() as u128 * config.kv_heads as u128, capabilities.grid_dimension)?;
        let (workgroups, combine_grid) = fold(total_rows, capabilities.grid_dimension)?;
        let width = |given: &Given<'_>| if given.view().vec4() { 4 } else { 1 };
        let params = Params {
            q: q.operand(width(&q)),
            o: o.operand(width(&o)),
            heads: s.heads as u32,
            queries: s.seq_q as u32,
            workgroups,
            left: bounds.left,
            right: bounds.right,
            sink_tokens: bounds.sink_tokens,
            groups: group_count as u32,
            row_tiles: row_tiles as u32,
            splits: split.splits,
            most_splits: split.most,
            long_tiles: split.long_tiles,
            least_tiles: split.least_tiles,
            lse_offset: lse.operand(1).offset,
            sink_offset: sinks.as_ref().map_or(0, |sinks| sinks.operand(1).offset),
            scale: problem.scale(),
            softcap: options.softcap.unwrap_or(0.0),
            ..params(config)
        };
        let scratch = || -> Result<_> {
            let elements = (partial * total_rows * u128::from(split.most)) as usize;
            let list: Vec<u32> = entries.iter().map(|sequence| *sequence as u32).collect();
            let partials = allocate::<[f32; 4]>(device, "partials", elements, wgpu::BufferUsages::STORAGE)?;
            Ok((partials, upload(device, "entries", &list)?))
        };
        let (partials, list) = device.scoped("allocating scratch", scratch).await??;
        let mut operands = vec![
            (CacheBinding::Q, q.resource()),
            (CacheBinding::O, o.resource()),
            (CacheBinding::Lse, lse.resource()),
            (CacheBinding::Partials, partials.as_entire_binding()),
            (CacheBinding::Entries, list.as_entire_binding()),
        ];
        operands.extend(sinks.as_ref().map(|sinks| (CacheBinding::SinkLogits, sinks.resource())));
        operands.extend(buffers.cos_sin.map(|table| (CacheBinding::CosSin, table.as_entire_binding())));
        let combine = CacheVariant {
            kernel: CacheKernel::Combine { tile, sink_logits: options.sink_logits },
            head_dim: 0,
            vec4: o.view().vec4(),
            rotary: None,
            ..variant
        };
        Ok(PreparedDecode {
            keys: cache.keys.clone(),
            entries,
            queries: s.seq_q,
            rotated_heads: decode.rotated_heads(config),
            groups,
            bounds,
            tiling,
            tile,
            split,
            row_tiles: row_tiles as u32,
            kernel: Bound::new(cache, &variant, &params, &operands).await?,
            combine: Bound::new(cache, &combine, &params, &operands).await?,
            combine_grid,
        })
    }

    /// How the kernel divides its work.
    pub fn tiling(&self) -> DecodeTiling {
        self.tiling
    }

    /// Workgroups of the kernel that reads the cache, for the lengths of now.
    pub fn workgroups(&self, cache: &KvCache) -> u64 {
        let [x, y, z] = self.grid(cache);
        u64::from(x) * u64::from(y) * u64::from(z)
    }

    fn grid(&self, cache: &KvCache) -> [u32; 3] {
        let of = |sequence: &usize| {
            plan::splits(cache.places().keys(*sequence), self.queries, &self.bounds, self.tile, &self.split)
        };
        let splits = self.entries.iter().map(of).max().unwrap_or(0);
        let [y, z] = self.groups;
        [splits * self.row_tiles, y, z]
    }

    /// Records it for the sequences as they are by then in the step.
    ///
    /// # Errors
    /// [`Error::OtherCache`], [`Error::CacheBusy`], [`Error::OtherDevice`]; [`Error::CacheEvicted`] for several queries of a rolling
    /// cache that has taken tokens back, where the first of them would not find its window whole;
    /// [`Error::QueriesNotRotated`] where the cache has a rotary embedding and [`AppendBuffers::q`](crate::AppendBuffers::q) was not given with the last
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
        for &sequence in &self.entries {
            cache.places().check_queries(sequence, self.queries, self.bounds.left as usize)?;
            if let Some(heads) = self.rotated_heads {
                cache.places().check_rotated(sequence, self.queries, heads)?;
            }
        }
        Ok(())
    }

    fn dispatch(&self, cache: &KvCache, pass: &mut wgpu::ComputePass<'_>) {
        let (grid, current) = (self.grid(cache), cache.book().current);
        if grid[0] > 0 {
            self.kernel.dispatch(pass, current, grid);
        }
        let [x, y] = self.combine_grid;
        self.combine.dispatch(pass, current, [x, y, 1]);
    }
}

//! Appending to a cache, and decoding from it: prepared once, recorded as often as wanted.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::batch::check_total;
use super::gather::Gathered;
use super::gpu::{KvCache, table_row};
use super::plan::{self, Bounds, DecodeTiling, Split};
use super::shader::{CacheBinding, CacheKernel, CacheVariant, ROW_THREADS};
use super::step::{Step, StepPass, Ticket};
use super::{CacheConfig, CacheKind, MOST_QUERIES, Rotary, RotaryPositions};
use crate::capabilities::DeviceClass;
use crate::dispatch::{Operand, params_of, upload_params};
use crate::error::{Error, Result};
use crate::pieces::{View, Window};
use crate::pipeline::Pipeline;
use crate::plan::fold;
use crate::problem::{Layout, Options, Problem, Shape, SinkLogits};
use crate::shader::{Binding, MicroKernel};
use crate::tensor::{Placed, TensorView, allocate, check_element_type, upload};

/// What changes between calls; `Params` in shaders/cache/params.wgsl.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    q: Operand,
    k: Operand,
    v: Operand,
    o: Operand,
    heads: u32,
    kv_heads: u32,
    queries: u32,
    workgroups: u32,
    sequences: u32,
    current: u32,
    next: u32,
    table: u32,
    table_row: u32,
    block_rows: u32,
    block_shift: u32,
    kept_rows: u32,
    ring_rows: u32,
    gathered_rows: u32,
    tokens: u32,
    left: i32,
    right: i32,
    sink_tokens: u32,
    groups: u32,
    row_tiles: u32,
    splits: u32,
    most_splits: u32,
    long_tiles: u32,
    least_tiles: u32,
    lse_offset: u32,
    sink_offset: u32,
    scale: f32,
    softcap: f32,
    scale_size: f32,
    negative_infinity: f32,
}

impl Params {
    fn new(config: &CacheConfig) -> Self {
        let rows = config.kind.rows();
        let [kept, ring] = match config.kind {
            CacheKind::Rolling { sink_tokens, .. } => [sink_tokens, rows - sink_tokens],
            _ => [0, 0],
        };
        Params {
            kv_heads: config.kv_heads as u32,
            sequences: config.sequences as u32,
            table: 2 * config.sequences as u32,
            table_row: table_row(config) as u32,
            block_rows: rows as u32,
            block_shift: rows.trailing_zeros(),
            kept_rows: kept as u32,
            ring_rows: ring as u32,
            scale_size: 1.0,
            negative_infinity: f32::NEG_INFINITY,
            ..Params::zeroed()
        }
    }

    /// Of kernels between a cache and what is gathered from it.
    pub(super) fn moving(config: &CacheConfig, workgroups: u32, gathered_rows: usize) -> Self {
        Params { workgroups, gathered_rows: gathered_rows as u32, ..Params::new(config) }
    }

    /// For either list of lengths.
    fn of_lists(&self) -> [Params; 2] {
        [0, 1].map(|current| {
            let [current, next] = [current, 1 - current].map(|list| list * self.sequences);
            Params { current, next, ..*self }
        })
    }
}

/// New tokens in buffers of the caller's, of the cache's element type. The tokens of all sequences lie one after the other,
/// `[tokens, heads, width]`, sequence by sequence; views may have any strides of head and token (those of batch do not count).
#[derive(Debug, Clone, Copy)]
pub struct AppendBuffers<'a> {
    /// Keys, `[tokens, G, D]`.
    pub k: TensorView<'a>,
    /// Values, `[tokens, G, E]`.
    pub v: TensorView<'a>,
    /// Queries of the same tokens, `[tokens, H, D]`, and H: they are rotated where they lie, with a rotary embedding. In a buffer
    /// that holds neither k nor v.
    ///
    /// With [`RotaryPositions::Absolute`] the query of a token is rotated by the token's position. With
    /// [`RotaryPositions::CacheRelative`] it is rotated by the place that its token would have if it were the last one that the
    /// cache holds: the smaller of its position and the last place. Of n tokens that are appended together, in a cache that is
    /// full by then, all n queries are so rotated by the last place, as only the last of them is there when it is decoded:
    /// the query of the last token is the one to decode, and those of the other n - 1, whose tokens have moved to places before
    /// the last, fit no decoding step of this cache.
    pub q: Option<(TensorView<'a>, usize)>,
    /// Cosines and sines of the rotary embedding, f32, `[positions, dim]`: dim / 2 cosines, then dim / 2 sines for each position.
    pub cos_sin: Option<&'a wgpu::Buffer>,
}

impl<'a> AppendBuffers<'a> {
    /// What every append has; what goes with a rotary embedding is `None`.
    pub fn new(k: impl Into<TensorView<'a>>, v: impl Into<TensorView<'a>>) -> Self {
        AppendBuffers { k: k.into(), v: v.into(), q: None, cos_sin: None }
    }
}

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
    /// last tokens, of as many heads ([`AppendBuffers::q`]), or decoding is an error.
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
    /// The table of [`AppendBuffers::cos_sin`], where keys are rotated as they are read.
    pub cos_sin: Option<&'a wgpu::Buffer>,
}

impl<'a> DecodeBuffers<'a> {
    /// What every step has; what goes with options is `None`.
    pub fn new(q: impl Into<TensorView<'a>>, o: impl Into<TensorView<'a>>, lse: impl Into<TensorView<'a>>) -> Self {
        DecodeBuffers { q: q.into(), o: o.into(), lse: lse.into(), sink_logits: None, cos_sin: None }
    }
}

/// A kernel with what it binds, for either list of lengths.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pipeline: Arc<Pipeline>,
    groups: [wgpu::BindGroup; 2],
}

impl Bound {
    /// Operands that are not given are the cache's.
    pub(super) async fn new(
        cache: &KvCache,
        variant: &CacheVariant,
        params: &Params,
        operands: &[(CacheBinding, wgpu::BindingResource<'_>)],
    ) -> Result<Self> {
        let device = &cache.device;
        let pipeline = cache.pipelines.get_cache(device, variant).await?;
        let bind = || {
            let label = Some("sink-attention cache");
            let buffer = upload_params(device, params.of_lists());
            [0, 1].map(|list| {
                let given =
                    |binding| operands.iter().find(|(b, _)| *b == binding).map(|(_, resource)| resource.clone());
                let find = |binding| match binding {
                    CacheBinding::Params => Some(params_of::<Params>(&buffer, list)),
                    _ if given(binding).is_some() => given(binding),
                    CacheBinding::Keys => Some(cache.keys.as_entire_binding()),
                    CacheBinding::Values => Some(cache.values.as_entire_binding()),
                    CacheBinding::State => Some(cache.state.as_entire_binding()),
                    _ => None,
                };
                let entries: Vec<_> = variant
                    .bindings()
                    .into_iter()
                    .filter_map(|(b, _)| Some(wgpu::BindGroupEntry { binding: b.slot(), resource: find(b)? }))
                    .collect();
                let layout = &pipeline.layout;
                device.wgpu().create_bind_group(&wgpu::BindGroupDescriptor { label, layout, entries: &entries })
            })
        };
        let groups = device.scoped("binding operands", bind).await?;
        Ok(Bound { pipeline, groups })
    }

    pub(super) fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>, list: usize, [x, y, z]: [u32; 3]) {
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &self.groups[list], &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// An operand of the caller's, checked, and what a kernel binds of it.
struct Given<'a> {
    placed: Placed<'a>,
    window: Window,
    buffer: &'a wgpu::Buffer,
}

impl<'a> Given<'a> {
    fn new(
        cache: &KvCache,
        binding: Binding,
        view: &TensorView<'a>,
        extents: [usize; 4],
        layout: Layout,
        element: usize,
    ) -> Result<Self> {
        check_element_type(binding, view, cache.config.dtype, &Options::new())?;
        let placed = Placed::new(binding, view, extents, layout, element)?;
        let window = placed.view.window(placed.view.whole(), cache.device.capabilities())?;
        for (other, buffer) in [("the cache's keys", &cache.keys), ("the cache's values", &cache.values)] {
            if view.buffer == buffer {
                return Err(Error::Aliasing { output: binding.name(), other });
            }
        }
        Ok(Given { placed, window, buffer: view.buffer })
    }

    fn view(&self) -> &View {
        &self.placed.view
    }

    /// Counted in vectors of so many elements.
    fn operand(&self, width: u64) -> Operand {
        Operand::new(self.view(), self.window, width)
    }

    fn resource(&self) -> wgpu::BindingResource<'a> {
        self.placed.binding(self.window)
    }
}

/// A result needs distinct places in a buffer that no other operand uses.
fn check_result(result: &Given<'_>, others: &[Option<&Given<'_>>]) -> Result<()> {
    let output = result.view().binding.name();
    match others.iter().flatten().find(|other| other.buffer == result.buffer) {
        Some(other) => Err(Error::Aliasing { output, other: other.view().binding.name() }),
        None => result.placed.check_distinct(),
    }
}

/// Rows of a table of cosines and sines.
fn table_positions(cache: &KvCache, rotary: &Rotary, table: Option<&wgpu::Buffer>) -> Result<usize> {
    let (operand, needed) = ("cos_sin", wgpu::BufferUsages::STORAGE);
    let Some(table) = table else { return Err(Error::MissingOperand { operand }) };
    let row = 4 * u64::from(rotary.dim);
    if !table.usage().contains(needed) {
        return Err(Error::BufferUsage { operand, needed, actual: table.usage() });
    }
    if table.size() < row {
        return Err(Error::BufferTooSmall { operand, needed: row, actual: table.size() });
    }
    let (bytes, limit) = (table.size(), cache.device.capabilities().binding_bytes);
    if bytes > limit {
        return Err(Error::BindingTooLarge { operand, bytes, limit });
    }
    Ok((table.size() / row) as usize)
}

/// Tokens that are ready to be appended, as often as wanted: each time the same number for each sequence, from the same buffers.
#[derive(Debug, Clone)]
pub struct PreparedAppend {
    /// Tells the cache it was made for.
    keys: wgpu::Buffer,
    pub(super) counts: Vec<usize>,
    /// H, where it rotates queries.
    q_heads: Option<usize>,
    /// Positions that the table of cosines and sines knows, where it is used.
    positions: Option<usize>,
    /// None where there is nothing to append.
    kernel: Option<(Bound, [u32; 2])>,
}

impl PreparedAppend {
    pub(crate) async fn new(cache: &KvCache, tokens: &[usize], buffers: &AppendBuffers<'_>) -> Result<Self> {
        let config = &cache.config;
        check_total(config, tokens)?;
        let (keys, counts) = (cache.keys.clone(), tokens.to_vec());
        let hint = "set CacheConfig::rotary";
        let positions = match (&config.rotary, buffers.cos_sin.is_some() || buffers.q.is_some()) {
            (None, true) if buffers.q.is_some() => return Err(Error::UnexpectedOperand { operand: "q", hint }),
            (None, true) => return Err(Error::UnexpectedOperand { operand: "cos_sin", hint }),
            (Some(rotary), _) if rotary.positions == RotaryPositions::Absolute || buffers.q.is_some() => {
                Some(table_positions(cache, rotary, buffers.cos_sin)?)
            }
            _ => None,
        };
        let kernel = Self::bind(cache, tokens, buffers, None).await?;
        let q_heads = buffers.q.map(|(_, heads)| heads);
        Ok(PreparedAppend { keys, counts, q_heads, positions, kernel })
    }

    /// The kernel and its grid; none where there is nothing to append. The tokens go into the cache, or behind what was gathered
    /// from it, of which the rows of the first new key of each sequence are told.
    pub(super) async fn bind(
        cache: &KvCache,
        tokens: &[usize],
        buffers: &AppendBuffers<'_>,
        behind: Option<(&Gathered, Vec<u32>)>,
    ) -> Result<Option<(Bound, [u32; 2])>> {
        let config = &cache.config;
        let total = check_total(config, tokens)?;
        if total == 0 {
            return Ok(None);
        }
        let (layout, element) = (Layout::Bshd, config.dtype.bytes());
        let place = |binding, view, heads: usize, width| {
            Given::new(cache, binding, view, [1, heads, total, width], layout, element)
        };
        let k = place(Binding::K, &buffers.k, config.kv_heads, config.head_dim)?;
        let v = place(Binding::V, &buffers.v, config.kv_heads, config.value_dim)?;
        // Queries are rotated once.
        let given_q = buffers.q.filter(|_| behind.is_none());
        let q = match &given_q {
            Some((_, 0)) => return Err(Error::ZeroDimension { dimension: "heads" }),
            Some((view, heads)) => Some(place(Binding::Q, view, *heads, config.head_dim)?),
            None => None,
        };
        if let Some(q) = &q {
            check_result(q, &[Some(&k), Some(&v)])?;
        }
        let heads = given_q.map_or(0, |(_, heads)| heads);
        let vec4 = [Some(&k), Some(&v), q.as_ref()].into_iter().flatten().all(|given| given.view().vec4());
        let width = if vec4 { 4 } else { 1 };
        let variant = CacheVariant {
            kernel: CacheKernel::Append { rotates_q: q.is_some(), gathered: behind.is_some() },
            addressing: config.addressing(),
            format: config.format(),
            head_dim: config.head_dim as u32,
            value_dim: config.value_dim as u32,
            vec4,
            // Keys that are rotated as they are read come as they are.
            rotary: config.rotary.filter(|_| q.is_some() || !config.is_relative()),
            indexed: false,
        };

        let rows = total as u128 * (2 * config.kv_heads + heads) as u128;
        let workgroups = rows.div_ceil((ROW_THREADS / variant.append_lanes()).into());
        let (workgroups, grid) = fold(workgroups, cache.device.capabilities().grid_dimension)?;
        if rows > 1 << 31 {
            return Err(Error::TooManyWorkgroups { workgroups: rows, most: 1 << 31 });
        }
        let params = Params {
            q: q.as_ref().map_or(Operand::zeroed(), |q| q.operand(width)),
            k: k.operand(width),
            v: v.operand(width),
            heads: heads as u32,
            tokens: total as u32,
            workgroups,
            gathered_rows: behind.as_ref().map_or(0, |(gathered, _)| gathered.rows as u32),
            ..Params::new(config)
        };
        // How many each sequence gets, or its first row, then of each token its sequence and its number there.
        let (gathered, mut list) = match behind {
            Some((gathered, rows)) => (Some(gathered), rows),
            None => (None, tokens.iter().map(|n| *n as u32).collect()),
        };
        list.extend(
            tokens.iter().enumerate().flat_map(|(n, count)| (0..*count).flat_map(move |i| [n as u32, i as u32])),
        );
        let device = &cache.device;
        let list = device.scoped("uploading a list of tokens", || upload(device, "tokens", &list)).await??;
        let mut operands = vec![
            (CacheBinding::K, k.resource()),
            (CacheBinding::V, v.resource()),
            (CacheBinding::Tokens, list.as_entire_binding()),
        ];
        operands.extend(q.as_ref().map(|q| (CacheBinding::Q, q.resource())));
        operands.extend(buffers.cos_sin.map(|table| (CacheBinding::CosSin, table.as_entire_binding())));
        operands.extend(
            gathered.into_iter().flat_map(|gathered| gathered.bind([CacheBinding::Keys, CacheBinding::Values])),
        );
        Ok(Some((Bound::new(cache, &variant, &params, &operands).await?, grid)))
    }

    /// Records one more append of the same numbers of tokens.
    ///
    /// # Errors
    /// [`Error::CacheFull`], [`Error::PagesExhausted`], [`Error::RotaryPosition`], [`Error::OtherCache`], [`Error::CacheBusy`],
    /// [`Error::OtherDevice`]: nothing has changed then.
    pub fn encode(&self, cache: &mut KvCache, step: &mut Step) -> Result<()> {
        self.open(cache, step.ticket())?;
        self.check(cache)?;
        let changes = cache.book.places.reserve(&self.counts)?;
        let encoder = step.encoder();
        cache.record(encoder, &changes);
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention append"), timestamp_writes: None };
        self.dispatch(cache, &mut encoder.begin_compute_pass(&descriptor));
        Ok(())
    }

    /// The same into a compute pass of the step, where nothing can be copied: a paged cache needs its pages beforehand, see
    /// [`KvCache::reserve`].
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and [`Error::PagesNotReserved`].
    pub fn encode_in(&self, cache: &mut KvCache, pass: &mut StepPass<'_>) -> Result<()> {
        self.open(cache, pass.ticket())?;
        self.check(cache)?;
        cache.places().check_reserved(&self.counts)?;
        self.dispatch(cache, pass.pass());
        Ok(())
    }

    /// Opens the book of its cache for a step.
    pub(super) fn open(&self, cache: &mut KvCache, step: &Arc<Ticket>) -> Result<()> {
        if cache.keys != self.keys {
            return Err(Error::OtherCache);
        }
        cache.write_in(step).map(|_| ())
    }

    pub(super) fn check(&self, cache: &KvCache) -> Result<()> {
        let Some(positions) = self.positions else { return Ok(()) };
        for (sequence, added) in self.counts.iter().enumerate().filter(|(_, added)| **added > 0) {
            let end = cache.places().lengths()[sequence].saturating_add(*added);
            let end = if cache.config.is_relative() { end.min(cache.config.kind.rows()) } else { end };
            if end > positions {
                return Err(Error::RotaryPosition { sequence, position: end - 1, positions });
            }
        }
        Ok(())
    }

    pub(super) fn dispatch(&self, cache: &mut KvCache, pass: &mut wgpu::ComputePass<'_>) {
        let Some((bound, [x, y])) = &self.kernel else { return };
        let book = &mut cache.book;
        bound.dispatch(pass, book.current, [*x, *y, 1]);
        book.current = 1 - book.current;
        book.places.advance(&self.counts, self.q_heads);
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
            ..Params::new(config)
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
    /// [`Error::QueriesNotRotated`] where the cache has a rotary embedding and [`AppendBuffers::q`] was not given with the last
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

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use naga::TypeInner;

    use super::*;
    use crate::cache::plan::RowFormat;
    use crate::cache::shader::Addressing;
    use crate::element::DType;

    #[test]
    fn params_lie_as_in_the_shader() {
        let variant = CacheVariant {
            kernel: CacheKernel::Combine { tile: 16, sink_logits: SinkLogits::None },
            addressing: Addressing::Contiguous,
            format: RowFormat { dtype: DType::F32, quantisation: None },
            head_dim: 0,
            value_dim: 64,
            vec4: true,
            rotary: None,
            indexed: false,
        };
        let module = naga::front::wgsl::parse_str(&variant.wgsl().unwrap()).unwrap();
        let (_, found) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some("Params")).unwrap();
        let TypeInner::Struct { members, span } = &found.inner else { panic!("Params is a struct") };
        let there: Vec<_> = members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect();
        macro_rules! members {
            ($($field:ident)*) => { vec![$((stringify!($field).to_string(), offset_of!(Params, $field))),*] };
        }
        let here = members!(q k v o heads kv_heads queries workgroups sequences current next table table_row block_rows
            block_shift kept_rows ring_rows gathered_rows tokens left right sink_tokens groups row_tiles splits most_splits long_tiles least_tiles lse_offset
            sink_offset scale softcap scale_size negative_infinity);
        assert_eq!(here, there);
        assert_eq!(size_of::<Params>().next_multiple_of(16), span.next_multiple_of(16) as usize);
    }
}

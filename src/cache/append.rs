//! Appending to a cache: prepared once, recorded as often as wanted.

use std::sync::Arc;

use super::batch::check_total;
use super::gather::Gathered;
use super::gpu::KvCache;
use super::step::{Step, StepPass, Ticket};
use crate::device::buffer::{TensorView, upload};
use crate::kernel::cache::CacheOptions;
use crate::kernel::params::{Operand, Params};
use crate::kernel::sizes::ROW_THREADS;
use crate::kernel::{Binding, Kernel, Variant};
use crate::plan::pass::fold;
use crate::problem::Layout;
use crate::problem::cache::{Rotary, RotaryPositions};
use crate::problem::error::{Error, Result};

use super::bind::{Bound, Given, check_result, params};

/// New tokens in buffers of the caller's, of the cache's element type. The tokens of all sequences lie one after the other,
/// `[tokens, heads, width]`, sequence by sequence; views may have any strides of head and token (those of batch do not count).
///
/// ```
/// use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
/// use sink_attention::{Attention, DeviceChoice, Error};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let rotary = Rotary { dim: 2, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute };
/// let config = CacheConfig::new(CacheKind::Contiguous { capacity: 2 }, 1, 1, 2).rotary(rotary);
/// let mut cache = attention.create_cache(&config)?;
/// // Position 0 does not turn, position 1 turns by a right angle.
/// let cos_sin = device.upload("cos_sin", &[1.0, 0.0, 0.0, 1.0])?;
/// let [k, v] = [device.upload("k", &[1.0, 0.0, 1.0, 0.0])?, device.upload("v", &[0.0; 4])?];
/// let q = device.upload("q", &[1.0, 0.0, 1.0, 0.0])?; // two tokens of one head
/// let tokens = AppendBuffers::new(&k, &v).q((q.view(), 1)).cos_sin(cos_sin.wgpu());
/// let mut step = attention.step()?;
/// cache.prepare_append(&[2], &tokens)?.encode(&mut cache, &mut step)?;
/// step.submit()?;
/// assert_eq!(q.download::<f32>()?, [1.0, 0.0, 0.0, 1.0]); // the query of token 1 has turned
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
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
    /// The operands of every append; those of a rotary embedding are `None`.
    pub fn new(k: impl Into<TensorView<'a>>, v: impl Into<TensorView<'a>>) -> Self {
        AppendBuffers { k: k.into(), v: v.into(), q: None, cos_sin: None }
    }
}

setters! {
    impl['a] AppendBuffers['a]
    into {
        k: TensorView<'a>,
        v: TensorView<'a>,
    }
    optional {
        q: (TensorView<'a>, usize),
        cos_sin: &'a wgpu::Buffer,
    }
}

/// Rows of a table of cosines and sines.
pub(super) fn table_positions(cache: &KvCache, rotary: &Rotary, table: Option<&wgpu::Buffer>) -> Result<usize> {
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

impl KvCache {
    /// Prepares appending so many tokens to each sequence of this cache.
    ///
    /// # Errors
    /// [`Error::OperandLength`] unless there is a number for each sequence; [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`] for operands that do not go with the cache's rotary embedding; those of
    /// [`Attention::prepare_forward`](crate::Attention::prepare_forward) for operands that cannot be bound.
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_append(&self, tokens: &[usize], buffers: &AppendBuffers<'_>) -> Result<PreparedAppend> {
        pollster::block_on(PreparedAppend::new(self, tokens, buffers))
    }

    /// As [`prepare_append`](Self::prepare_append), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_append`](Self::prepare_append).
    pub async fn prepare_append_async(&self, tokens: &[usize], buffers: &AppendBuffers<'_>) -> Result<PreparedAppend> {
        PreparedAppend::new(self, tokens, buffers).await
    }
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

    /// The kernel and its grid. None if there is nothing to append. The tokens go into the cache, or into the buffers that were gathered
    /// from it: `behind` has these buffers, and the row of each sequence's first new key.
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
        // Queries are rotated only once, with the append to the cache.
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
        let options = CacheOptions {
            rotates_q: q.is_some(),
            gathered: behind.is_some(),
            // Keys that are rotated as they are read are stored without rotation.
            rotary: config.rotary.filter(|_| q.is_some() || !config.is_relative()),
            ..CacheOptions::new(config, vec4)
        };

        let rows = total as u128 * (2 * config.kv_heads + heads) as u128;
        let workgroups = rows.div_ceil((ROW_THREADS / options.append_lanes()).into());
        let (workgroups, grid) = fold(workgroups, cache.device.capabilities().grid_dimension)?;
        if rows > 1 << 31 {
            return Err(Error::TooManyWorkgroups { workgroups: rows, most: 1 << 31 });
        }
        let params = Params {
            q: q.as_ref().map_or(Operand::default(), |q| q.operand(width)),
            k: k.operand(width),
            v: v.operand(width),
            heads: heads as u32,
            tokens: total as u32,
            workgroups,
            gathered_rows: behind.as_ref().map_or(0, |(gathered, _)| gathered.rows as u32),
            ..params(config)
        };
        // The list has a word for each sequence (the number of its tokens, or its first row), then for each token its sequence and its
        // number there.
        let (gathered, mut list) = match behind {
            Some((gathered, rows)) => (Some(gathered), rows),
            None => (None, tokens.iter().map(|n| *n as u32).collect()),
        };
        list.extend(
            tokens.iter().enumerate().flat_map(|(n, count)| (0..*count).flat_map(move |i| [n as u32, i as u32])),
        );
        let device = &cache.device;
        let list = device.scoped_async("uploading a list of tokens", || upload(device, "tokens", &list)).await??;
        let mut operands =
            vec![(Binding::K, k.resource()), (Binding::V, v.resource()), (Binding::Tokens, list.as_entire_binding())];
        operands.extend(q.as_ref().map(|q| (Binding::Q, q.resource())));
        operands.extend(buffers.cos_sin.map(|table| (Binding::CosSin, table.as_entire_binding())));
        operands.extend(
            gathered.into_iter().flat_map(|gathered| gathered.bind([Binding::CachedKeys, Binding::CachedValues])),
        );
        let variant = Variant::of_cache(Kernel::APPEND, options);
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
        let changes = cache.book.block_table.reserve(&self.counts)?;
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
        cache.block_table().check_reserved(&self.counts)?;
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
            let end = cache.block_table().lengths()[sequence].saturating_add(*added);
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
        book.block_table.advance(&self.counts, self.q_heads);
    }
}

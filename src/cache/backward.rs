//! Gradients through contiguous and paged caches, in their layout.

use super::batch::{Chunk, Prefill, PrefillBatch};
use super::gather::{Dispatch, Gathered, Source, given, record};
use super::gpu::{GivenBuffer, KvCache};
use super::step::Step;
use crate::device::buffer::TensorView;
use crate::exec::buffers::{BackwardBuffers as PassBuffers, ForwardBuffers};
use crate::exec::prepared::Prepared;
use crate::problem::error::{Error, Result};

/// The operands of the backward pass of a prefill in buffers of the caller's; tokens lie as in
/// [`PrefillBuffers`](crate::cache::PrefillBuffers).
///
/// ```
/// use sink_attention::cache::{AppendBuffers, BackwardBuffers, CacheConfig, CacheKind, Prefill};
/// use sink_attention::{Attention, DType, DeviceChoice, Error, Options};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let config = CacheConfig::new(CacheKind::Contiguous { capacity: 2 }, 1, 1, 4);
/// let mut cache = attention.create_cache(&config)?;
/// let [q, k] = [device.zeros("q", DType::F32, &[1, 1, 4])?, device.zeros("k", DType::F32, &[1, 1, 4])?];
/// let v = device.upload("v", &[1.0, 2.0, 3.0, 4.0])?;
/// let mut step = attention.step()?;
/// cache.prepare_append(&[1], &AppendBuffers::new(&k, &v))?.encode(&mut cache, &mut step)?;
/// // As a prefill leaves them: the one key has all the weight, and its score is 0.
/// let [o, lse] = [device.upload("o", &[1.0, 2.0, 3.0, 4.0])?, device.upload("lse", &[0.0])?];
/// let [d_o, d_q] = [device.upload("d_o", &[1.0; 4])?, device.zeros("d_q", DType::F32, &[1, 1, 4])?];
/// let like_cache = |name, bytes| device.zeros(name, DType::F32, &[bytes as usize / 4]);
/// let [d_keys, d_values] = [like_cache("d_keys", config.bytes()[0])?, like_cache("d_values", config.bytes()[1])?];
/// let results = [d_keys.wgpu(), d_values.wgpu()];
/// let buffers = BackwardBuffers::new([q.view(), o.view(), lse.view()], &d_o, &d_q, results);
/// cache.prepare_backward(&Prefill::new(1, [1], Options::new()), &buffers)?.encode(&cache, &mut step)?;
/// step.submit()?;
/// for (d_value, expected) in d_values.download::<f32>()?.iter().zip([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]) {
///     assert!((d_value - expected).abs() < 1e-5); // d_o, and an empty row
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct BackwardBuffers<'a> {
    /// Queries as the forward pass had them, rotated where there is a rotary embedding, `[tokens, H, D]`.
    pub q: TensorView<'a>,
    /// o of the forward pass, `[tokens, H, E]`.
    pub o: TensorView<'a>,
    /// See [`BackwardBuffers::forward`](crate::BackwardBuffers::forward).
    pub o_lo: Option<TensorView<'a>>,
    /// lse of the forward pass, `[H, tokens]`, f32, densely packed.
    pub lse: TensorView<'a>,
    /// See [`ForwardBuffers::sink_logits`].
    pub sink_logits: Option<TensorView<'a>>,
    /// See [`ForwardBuffers::alibi_slopes`].
    pub alibi_slopes: Option<TensorView<'a>>,
    /// See [`Prefill::options`] for its shape.
    pub bias: Option<TensorView<'a>>,
    /// See [`Prefill::options`] for its shape.
    pub mask: Option<TensorView<'a>>,
    /// Gradient by o.
    pub d_o: TensorView<'a>,
    /// See [`BackwardBuffers::d_lse`](crate::BackwardBuffers::d_lse).
    pub d_lse: Option<TensorView<'a>>,
    /// Result: gradient by q, `[tokens, H, D]`.
    pub d_q: TensorView<'a>,
    /// Result: gradient by the keys, in a buffer like [`KvCache::keys`] that has [`wgpu::BufferUsages::COPY_DST`], too. A page that
    /// several sequences share has the sum over them, in their order, summed in f32 from what rounding left of each; rows
    /// that no sequence with tokens uses are 0.
    pub d_keys: &'a wgpu::Buffer,
    /// Result: gradient by the values, like [`KvCache::values`], as that by the keys.
    pub d_values: &'a wgpu::Buffer,
    /// Result: see [`BackwardBuffers::d_sink_logits`](crate::BackwardBuffers::d_sink_logits).
    pub d_sink_logits: Option<TensorView<'a>>,
    /// Result: see [`BackwardBuffers::d_alibi_slopes`](crate::BackwardBuffers::d_alibi_slopes).
    pub d_alibi_slopes: Option<TensorView<'a>>,
    /// Result: see [`BackwardBuffers::d_bias`](crate::BackwardBuffers::d_bias).
    pub d_bias: Option<TensorView<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// The operands and results of every backward pass: q, o and lse; d_o; d_q; and the gradients by keys and values. Those that go
    /// with options are `None`.
    pub fn new(
        [q, o, lse]: [TensorView<'a>; 3],
        d_o: impl Into<TensorView<'a>>,
        d_q: impl Into<TensorView<'a>>,
        [d_keys, d_values]: [&'a wgpu::Buffer; 2],
    ) -> Self {
        BackwardBuffers {
            q,
            o,
            o_lo: None,
            lse,
            sink_logits: None,
            alibi_slopes: None,
            bias: None,
            mask: None,
            d_o: d_o.into(),
            d_lse: None,
            d_q: d_q.into(),
            d_keys,
            d_values,
            d_sink_logits: None,
            d_alibi_slopes: None,
            d_bias: None,
        }
    }

    fn operands(&self) -> [GivenBuffer<'a>; 10] {
        [
            given("q", self.q),
            given("o", self.o),
            given("o_lo", self.o_lo),
            given("lse", self.lse),
            given("sink_logits", self.sink_logits),
            given("alibi_slopes", self.alibi_slopes),
            given("bias", self.bias),
            given("mask", self.mask),
            given("d_o", self.d_o),
            given("d_lse", self.d_lse),
        ]
    }

    /// The results that are not in the cache's layout.
    fn results(&self) -> [GivenBuffer<'a>; 4] {
        [
            given("d_q", self.d_q),
            given("d_sink_logits", self.d_sink_logits),
            given("d_alibi_slopes", self.d_alibi_slopes),
            given("d_bias", self.d_bias),
        ]
    }
}

setters! {
    impl['a] BackwardBuffers['a]
    into {
        q: TensorView<'a>,
        o: TensorView<'a>,
        lse: TensorView<'a>,
        d_o: TensorView<'a>,
        d_q: TensorView<'a>,
        d_keys: &'a wgpu::Buffer,
        d_values: &'a wgpu::Buffer,
    }
    optional {
        o_lo: TensorView<'a>,
        sink_logits: TensorView<'a>,
        alibi_slopes: TensorView<'a>,
        bias: TensorView<'a>,
        mask: TensorView<'a>,
        d_lse: TensorView<'a>,
        d_sink_logits: TensorView<'a>,
        d_alibi_slopes: TensorView<'a>,
        d_bias: TensorView<'a>,
    }
}

/// The backward pass of a prefill that is ready to be recorded, as often as wanted: for the lengths and pages that the
/// sequences had as it was prepared.
#[derive(Debug, Clone)]
pub struct PreparedBackward {
    /// Tells the cache it was made for.
    keys: wgpu::Buffer,
    gradients: [wgpu::Buffer; 2],
    bytes: [u64; 2],
    entries: Vec<Chunk>,
    /// Of each entry.
    pages: Vec<Vec<u32>>,
    gather: Option<Dispatch>,
    backward: Prepared,
    scatter: Option<Dispatch>,
}

impl KvCache {
    /// Prepares the backward pass of a prefill: of the queries of the last tokens of each sequence, which the contiguous or paged
    /// cache holds, by q and by all keys and values that their sequences hold. Of several chunks the last one comes first;
    /// [`truncate`](Self::truncate) makes the one before it the last. It is for the lengths and pages of now.
    ///
    /// Gradients are those by keys and values as the cache holds them, and by q as the pass was given it: with a rotary
    /// embedding, by what has been rotated. Allocates what [`Attention::prepare_backward`](crate::Attention::prepare_backward) does and, but for one sequence
    /// of a contiguous cache, keys, values and their gradients one after the other, twice
    /// [`prefill_scratch_bytes`](Self::prefill_scratch_bytes).
    ///
    /// # Errors
    /// As [`prepare_prefill`](Self::prepare_prefill); [`Error::InvalidOption`], too, for rolling and for quantised caches, and for
    /// more tokens than a sequence has; [`Error::ZeroDimension`] for no tokens at all; those of [`Attention::prepare_backward`](crate::Attention::prepare_backward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_backward(&self, prefill: &Prefill, buffers: &BackwardBuffers<'_>) -> Result<PreparedBackward> {
        pollster::block_on(PreparedBackward::new(self, prefill, buffers))
    }

    /// As [`prepare_backward`](Self::prepare_backward), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    pub async fn prepare_backward_async(
        &self,
        prefill: &Prefill,
        buffers: &BackwardBuffers<'_>,
    ) -> Result<PreparedBackward> {
        PreparedBackward::new(self, prefill, buffers).await
    }
}

impl PreparedBackward {
    pub(crate) async fn new(cache: &KvCache, prefill: &Prefill, buffers: &BackwardBuffers<'_>) -> Result<Self> {
        let config = &cache.config;
        let batch = PrefillBatch::held(config, prefill, cache.block_table())?;
        let (keys, bytes) = (cache.keys.clone(), config.bytes());
        let into = [buffers.d_keys, buffers.d_values];
        for (output, buffer, needed) in [("d_keys", into[0], bytes[0]), ("d_values", into[1], bytes[1])] {
            if buffer.size() < needed {
                return Err(Error::BufferTooSmall { operand: output, needed, actual: buffer.size() });
            }
            let needed = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            if !buffer.usage().contains(needed) {
                return Err(Error::BufferUsage { operand: output, needed, actual: buffer.usage() });
            }
            cache.check_apart((output, Some(buffer)), buffers.operands().into_iter().chain(buffers.results()))?;
        }
        cache.check_apart(("d_keys", Some(into[0])), [("d_values", Some(into[1]))])?;
        buffers.results().into_iter().try_for_each(|result| cache.check_apart(result, []))?;
        let gradients = into.map(Clone::clone);

        let places = [cache.in_place(&batch, [&cache.keys, &cache.values]), cache.in_place(&batch, into)];
        let (operands, results) = match places {
            [Some(operands), Some(results)] => (Source::Cache(operands), Source::Cache(results)),
            _ => {
                let operands = Gathered::allocate(cache, &batch).await?;
                let results = Gathered::allocate(cache, &batch).await?;
                (Source::Gathered(operands), Source::Gathered(results))
            }
        };
        let (mut gather, mut scatter) = (None, None);
        if let (Source::Gathered(operands), Source::Gathered(results)) = (&operands, &results) {
            gather = operands.gather(cache, &batch.runs(cache.block_table())).await?;
            scatter = results.scatter(cache, &batch.sums(cache.block_table()), into).await?;
        }
        let ([k, v], [d_k, d_v]) = (operands.views(), results.views());
        let forward = ForwardBuffers {
            sink_logits: buffers.sink_logits,
            alibi_slopes: buffers.alibi_slopes,
            bias: buffers.bias,
            mask: buffers.mask,
            o_lo: buffers.o_lo,
            ..ForwardBuffers::new(buffers.q, k, v, buffers.o, buffers.lse)
        };
        let backward = PassBuffers {
            d_lse: buffers.d_lse,
            d_sink_logits: buffers.d_sink_logits,
            d_alibi_slopes: buffers.d_alibi_slopes,
            d_bias: buffers.d_bias,
            ..PassBuffers::new(forward, buffers.d_o, buffers.d_q, d_k, d_v)
        };
        let backward = cache.attention.prepare_backward_async(&batch.problem, &backward).await?;
        let pages = batch.entries.iter().map(|entry| used_pages(cache, entry).to_vec()).collect();
        Ok(PreparedBackward { keys, gradients, bytes, entries: batch.entries, pages, gather, backward, scatter })
    }

    /// The backward pass: which kernels, which tiles.
    pub fn backward(&self) -> &Prepared {
        &self.backward
    }

    /// Records it.
    ///
    /// # Errors
    /// [`Error::OtherCache`]; [`Error::CacheChanged`] where a sequence has another length, or other pages, than as it was
    /// prepared; [`Error::CacheBusy`], [`Error::OtherDevice`].
    pub fn encode(&self, cache: &KvCache, step: &mut Step) -> Result<()> {
        if cache.keys != self.keys {
            return Err(Error::OtherCache);
        }
        cache.read_in(step.ticket())?;
        cache.check_lengths(&self.entries)?;
        for (entry, pages) in self.entries.iter().zip(&self.pages) {
            let actual = used_pages(cache, entry);
            if actual != pages {
                let reason = format!("it had pages {pages:?}, it has {actual:?}");
                return Err(Error::CacheChanged { sequence: entry.sequence, reason });
            }
        }
        let encoder = step.encoder();
        for (buffer, bytes) in self.gradients.iter().zip(self.bytes) {
            encoder.clear_buffer(buffer, 0, Some(bytes));
        }
        let descriptor =
            wgpu::ComputePassDescriptor { label: Some("sink-attention cache backward"), timestamp_writes: None };
        let mut pass = encoder.begin_compute_pass(&descriptor);
        record(&self.gather, &mut pass, cache);
        self.backward.encode_in(&mut pass);
        record(&self.scatter, &mut pass, cache);
        Ok(())
    }
}

/// The pages that hold the keys of a sequence.
fn used_pages<'a>(cache: &'a KvCache, entry: &Chunk) -> &'a [u32] {
    let pages = cache.pages(entry.sequence);
    &pages[..entry.keys.div_ceil(cache.config.kind.rows()).min(pages.len())]
}

//! Tokens into a cache, and their queries against all that it holds by then: prompts, whole or in chunks.

use super::append::{AppendBuffers, PreparedAppend};
use super::batch::{Chunk, Prefill, PrefillBatch};
use super::gather::{Dispatch, Gathered, Source, given, record};
use super::gpu::{GivenBuffer, KvCache};
use super::step::{Step, StepPass};
use crate::device::buffer::TensorView;
use crate::exec::buffers::ForwardBuffers;
use crate::exec::prepared::Prepared;
use crate::problem::cache::CacheKind;
use crate::problem::error::{Error, Result};

/// The operands of a prefill in buffers of the caller's, of the cache's element type where nothing else is said. The tokens of
/// all sequences lie one after the other, sequence by sequence; views may have any strides of head and token (those of batch do
/// not count).
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind, Prefill, PrefillBuffers};
/// use sink_attention::{Attention, DType, DeviceChoice, Error, Options};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let mut cache = attention.create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 2, 1, 1))?;
/// // Two tokens of the first sequence, then one of the second. Queries of zero give means of values.
/// let [q, k] = [device.zeros("q", DType::F32, &[3, 1, 1])?, device.zeros("k", DType::F32, &[3, 1, 1])?];
/// let v = device.upload("v", &[2.0, 4.0, 7.0])?;
/// let [o, lse] = [device.zeros("o", DType::F32, &[3, 1, 1])?, device.zeros("lse", DType::F32, &[1, 3])?];
/// let prefill = Prefill::new(1, [2, 1], Options::new().causal(true));
/// let scratch = device.zeros("scratch", DType::F32, &[cache.prefill_scratch_bytes(&prefill)? as usize / 4])?;
/// let buffers = PrefillBuffers::new(&q, &k, &v, &o, &lse).scratch(scratch.wgpu()); // for the next chunks, too
/// let mut step = attention.step()?;
/// cache.prepare_prefill(&prefill, &buffers)?.encode(&mut cache, &mut step)?;
/// step.submit()?;
/// for (o, mean) in o.download::<f32>()?.iter().zip([2.0, 3.0, 7.0]) {
///     assert!((o - mean).abs() < 1e-5);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct PrefillBuffers<'a> {
    /// Queries, `[tokens, H, D]`. With a rotary embedding they are rotated where they lie, in a buffer that holds neither k nor v.
    pub q: TensorView<'a>,
    /// Keys of the new tokens, `[tokens, G, D]`.
    pub k: TensorView<'a>,
    /// Their values, `[tokens, G, E]`.
    pub v: TensorView<'a>,
    /// Cosines and sines, see [`AppendBuffers::cos_sin`].
    pub cos_sin: Option<&'a wgpu::Buffer>,
    /// See [`ForwardBuffers::sink_logits`].
    pub sink_logits: Option<TensorView<'a>>,
    /// See [`ForwardBuffers::alibi_slopes`].
    pub alibi_slopes: Option<TensorView<'a>>,
    /// See [`Prefill::options`] for its shape.
    pub bias: Option<TensorView<'a>>,
    /// See [`Prefill::options`] for its shape.
    pub mask: Option<TensorView<'a>>,
    /// Result: attention outputs, `[tokens, H, E]`.
    pub o: TensorView<'a>,
    /// Result: see [`ForwardBuffers::o_lo`].
    pub o_lo: Option<TensorView<'a>>,
    /// Result: log of the denominators, `[H, tokens]`, f32, densely packed.
    pub lse: TensorView<'a>,
    /// Scratch for the keys and values that are gathered from the cache, [`KvCache::prefill_scratch_bytes`] long: one buffer does for
    /// all chunks. `None`: a buffer of its own, where one is needed.
    pub scratch: Option<&'a wgpu::Buffer>,
}

impl<'a> PrefillBuffers<'a> {
    /// The operands and results of every prefill. Those that go with options are `None`.
    pub fn new(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
        o: impl Into<TensorView<'a>>,
        lse: impl Into<TensorView<'a>>,
    ) -> Self {
        let (q, k, v, o, lse) = (q.into(), k.into(), v.into(), o.into(), lse.into());
        PrefillBuffers {
            q,
            k,
            v,
            cos_sin: None,
            sink_logits: None,
            alibi_slopes: None,
            bias: None,
            mask: None,
            o,
            o_lo: None,
            lse,
            scratch: None,
        }
    }

    fn operands(&self) -> [GivenBuffer<'a>; 8] {
        [
            given("q", self.q),
            given("k", self.k),
            given("v", self.v),
            ("cos_sin", self.cos_sin),
            given("sink_logits", self.sink_logits),
            given("alibi_slopes", self.alibi_slopes),
            given("bias", self.bias),
            given("mask", self.mask),
        ]
    }

    fn results(&self) -> [GivenBuffer<'a>; 3] {
        [given("o", self.o), given("o_lo", self.o_lo), given("lse", self.lse)]
    }
}

setters! {
    impl['a] PrefillBuffers['a]
    into {
        q: TensorView<'a>,
        k: TensorView<'a>,
        v: TensorView<'a>,
        o: TensorView<'a>,
        lse: TensorView<'a>,
    }
    optional {
        sink_logits: TensorView<'a>,
        alibi_slopes: TensorView<'a>,
        bias: TensorView<'a>,
        mask: TensorView<'a>,
        o_lo: TensorView<'a>,
        cos_sin: &'a wgpu::Buffer,
        scratch: &'a wgpu::Buffer,
    }
}

/// A prefill that is ready to be recorded: for the lengths that the sequences had as it was prepared.
#[derive(Debug, Clone)]
pub struct PreparedPrefill {
    append: PreparedAppend,
    /// The passes of the prefill. `None` if there are no tokens.
    passes: Option<Passes>,
}

#[derive(Debug, Clone)]
struct Passes {
    entries: Vec<Chunk>,
    /// Dispatches before the cache gives up keys: the gathering, and the new tokens behind the gathered rows.
    before: [Option<Dispatch>; 2],
    after: Option<Dispatch>,
    forward: Prepared,
}

impl KvCache {
    /// Prepares a prefill: appends so many tokens to each sequence, and attends with their queries to all that the sequences
    /// hold by then, in a rolling cache also to what they evict. It is for the lengths of now: of several chunks, each is
    /// prepared once the one before has been recorded.
    ///
    /// The forward pass is the ordinary one, with the operator's kernels and tiles. One sequence of a contiguous cache that is
    /// not quantised is read where it lies. Else keys and values of all sequences with tokens are gathered first, one after the
    /// other in the element type, in [`prefill_scratch_bytes`](Self::prefill_scratch_bytes). That reads and writes each key and value
    /// once, whereas the arithmetic on them is repeated for each query. For very few queries [`prepare_decode`](Self::prepare_decode) reads
    /// less. Quantised keys and values are rounded to the element type as they are gathered, which decoding does not do.
    ///
    /// # Errors
    /// [`Error::OperandLength`] unless there is a number of tokens for each sequence; [`Error::CacheElementType`] unless the
    /// options name the cache's element type; [`Error::CacheFull`], [`Error::RotaryPosition`]; [`Error::InvalidOption`] for options
    /// that a cache of its kind does not take, and for cache-relative rotary embeddings; [`Error::CacheTooLarge`] where what is
    /// gathered does not fit bindings; those of [`prepare_append`](Self::prepare_append),
    /// [`Problem::new`](crate::Problem::new) and [`Attention::prepare_forward`](crate::Attention::prepare_forward).
    #[cfg(not(target_family = "wasm"))]
    pub fn prepare_prefill(&self, prefill: &Prefill, buffers: &PrefillBuffers<'_>) -> Result<PreparedPrefill> {
        pollster::block_on(self.prepare_prefill_async(prefill, buffers))
    }

    /// As [`prepare_prefill`](Self::prepare_prefill), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prepare_prefill`](Self::prepare_prefill).
    pub async fn prepare_prefill_async(
        &self,
        prefill: &Prefill,
        buffers: &PrefillBuffers<'_>,
    ) -> Result<PreparedPrefill> {
        let rolls = matches!(self.config.kind, CacheKind::Rolling { .. });
        if rolls && prefill.options.alibi && self.config.seen(&prefill.options)?.sink_tokens > 0 {
            let reason = "distances to the sink tokens of a rolling cache need slopes on the host: HostCache takes it";
            return Err(Error::InvalidOption { option: "alibi", reason: reason.into() });
        }
        PreparedPrefill::new(self, prefill, buffers).await
    }

    /// Bytes of [`PrefillBuffers::scratch`] for the lengths of now; 0 where none is needed. Keys and values of the sequences with
    /// tokens, the new ones among them: for each key and head, D and E elements, rows padded to 16 bytes. What is enough for all
    /// tokens of a prompt at once is enough for each of its chunks.
    ///
    /// # Errors
    /// As [`prepare_prefill`](Self::prepare_prefill), as far as they do not concern buffers.
    pub fn prefill_scratch_bytes(&self, prefill: &Prefill) -> Result<u64> {
        let batch = PrefillBatch::appended(&self.config, prefill, self.block_table())?;
        let gathered = batch.filter(|batch| self.in_place(batch, [&self.keys, &self.values]).is_none());
        gathered.map_or(Ok(0), |batch| Gathered::scratch_bytes(self, &batch))
    }
}

impl PreparedPrefill {
    pub(crate) async fn new(cache: &KvCache, prefill: &Prefill, buffers: &PrefillBuffers<'_>) -> Result<Self> {
        let config = &cache.config;
        let batch = PrefillBatch::appended(config, prefill, cache.block_table())?;
        let rotated = config.rotary.map(|_| (buffers.q, prefill.heads));
        let operands =
            AppendBuffers { q: rotated, cos_sin: buffers.cos_sin, ..AppendBuffers::new(buffers.k, buffers.v) };
        let append = PreparedAppend::new(cache, &prefill.tokens, &operands).await?;
        append.check(cache)?;
        let Some(batch) = batch else { return Ok(PreparedPrefill { append, passes: None }) };

        buffers.results().into_iter().try_for_each(|result| cache.check_apart(result, []))?;
        let source = match (cache.in_place(&batch, [&cache.keys, &cache.values]), buffers.scratch) {
            (Some(views), _) => Source::Cache(views),
            (None, Some(scratch)) => {
                check_scratch(cache, &batch, scratch, buffers)?;
                Source::Gathered(Gathered::within(cache, &batch, scratch)?)
            }
            (None, None) => Source::Gathered(Gathered::allocate(cache, &batch).await?),
        };
        let (mut before, mut after) = ([None, None], None);
        match (&source, config.kind) {
            (Source::Cache(_), _) => {}
            (Source::Gathered(gathered), CacheKind::Rolling { .. }) => {
                let mut first = vec![0; config.sequences];
                for entry in &batch.entries {
                    first[entry.sequence] = (entry.first_row + entry.cached) as u32;
                }
                let runs = batch.runs(cache.block_table());
                let behind = PreparedAppend::bind(cache, &prefill.tokens, &operands, Some((gathered, first))).await?;
                before = [gathered.gather(cache, &runs).await?, behind];
            }
            (Source::Gathered(gathered), _) => {
                // The new tokens are gathered, too, because they have been appended by then.
                let held = |entry: &Chunk| Chunk { cached: entry.keys, ..*entry };
                let held = PrefillBatch { entries: batch.entries.iter().map(held).collect(), ..batch.clone() };
                after = gathered.gather(cache, &held.runs(cache.block_table())).await?;
            }
        }
        let [k, v] = source.views();
        let forward = ForwardBuffers {
            sink_logits: buffers.sink_logits,
            alibi_slopes: buffers.alibi_slopes,
            bias: buffers.bias,
            mask: buffers.mask,
            o_lo: buffers.o_lo,
            ..ForwardBuffers::new(buffers.q, k, v, buffers.o, buffers.lse)
        };
        let forward = cache.attention.prepare_forward_async(&batch.problem, &forward).await?;
        let passes = Some(Passes { entries: batch.entries, before, after, forward });
        Ok(PreparedPrefill { append, passes })
    }

    /// The forward pass: which kernels, which tiles. `None` where there are no tokens.
    pub fn forward(&self) -> Option<&Prepared> {
        self.passes.as_ref().map(|passes| &passes.forward)
    }

    /// Records it: the tokens are in the cache for what is recorded after in the step.
    ///
    /// # Errors
    /// [`Error::CacheChanged`] where a sequence has another length than as it was prepared; those of [`PreparedAppend::encode`].
    /// Nothing has changed then.
    pub fn encode(&self, cache: &mut KvCache, step: &mut Step) -> Result<()> {
        self.append.open(cache, step.ticket())?;
        self.check(cache)?;
        let changes = cache.book.block_table.reserve(&self.append.counts)?;
        let encoder = step.encoder();
        cache.record(encoder, &changes);
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention prefill"), timestamp_writes: None };
        self.dispatch(cache, &mut encoder.begin_compute_pass(&descriptor));
        Ok(())
    }

    /// The same into a compute pass of the step; a paged cache needs its pages beforehand, see [`KvCache::reserve`].
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and [`Error::PagesNotReserved`].
    pub fn encode_in(&self, cache: &mut KvCache, pass: &mut StepPass<'_>) -> Result<()> {
        self.append.open(cache, pass.ticket())?;
        self.check(cache)?;
        cache.block_table().check_reserved(&self.append.counts)?;
        self.dispatch(cache, pass.pass());
        Ok(())
    }

    fn check(&self, cache: &KvCache) -> Result<()> {
        self.append.check(cache)?;
        cache.check_lengths(self.passes.iter().flat_map(|passes| &passes.entries))
    }

    fn dispatch(&self, cache: &mut KvCache, pass: &mut wgpu::ComputePass<'_>) {
        let Some(Passes { before, after, forward, .. }) = &self.passes else { return };
        before.iter().for_each(|dispatch| record(dispatch, pass, cache));
        self.append.dispatch(cache, pass);
        record(after, pass, cache);
        forward.encode_in(pass);
    }
}

/// Checks a buffer of the caller's for gathered keys and values.
fn check_scratch(
    cache: &KvCache,
    batch: &PrefillBatch,
    scratch: &wgpu::Buffer,
    buffers: &PrefillBuffers<'_>,
) -> Result<()> {
    let (operand, needed) = ("scratch", Gathered::scratch_bytes(cache, batch)?);
    if scratch.size() < needed {
        return Err(Error::BufferTooSmall { operand, needed, actual: scratch.size() });
    }
    let usage = wgpu::BufferUsages::STORAGE;
    if !scratch.usage().contains(usage) {
        return Err(Error::BufferUsage { operand, needed: usage, actual: scratch.usage() });
    }
    cache.check_apart((operand, Some(scratch)), buffers.operands().into_iter().chain(buffers.results()))
}

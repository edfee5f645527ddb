//! A cache that is used with host slices: the same calls on a GPU and on the CPU.

use bytemuck::cast_slice;

use super::append::AppendBuffers;
use super::backward::BackwardBuffers;
use super::batch::{Prefill, PrefillBatch, PrefillOperands, check_total};
use super::cpu;
use super::decode::DecodeBuffers;
use super::gpu::KvCache;
use super::prefill::{PrefillBuffers, PreparedPrefill};
use super::step::Step;
use crate::attention::{Attention, HostBuffers, HostOperand, gradients_of, of_inputs, of_results};
use crate::exec::buffers::ForwardBuffers;
use crate::kernel::Binding;
use crate::plan::decode::{Decode, DecodeOperands};
use crate::problem::cache::CacheConfig;
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::{Gradients, Inputs, Output, Upstream, check_length};

/// Keys and values of a number of sequences on the device of the operator, a GPU or the CPU, with operands and results in host
/// memory: the same calls on both.
///
/// On a GPU every call uploads its operands, submits, and waits for its results. A loop that must not wait for the host keeps its
/// operands in buffers: [`gpu`](Self::gpu) is the cache for that, and both kinds of calls may take turns.
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands};
/// use sink_attention::{Attention, Options};
///
/// // Two sequences of one key/value head, with the first token and the last two.
/// let kind = CacheKind::Rolling { sink_tokens: 1, window: 2, queries: 1 };
/// let attention = Attention::new()?;
/// let mut cache = attention.create_host_cache::<f32>(&CacheConfig::new(kind, 2, 1, 2).value_dim(1))?;
/// for token in 0..5 {
///     // One token for the second sequence, none for the first.
///     cache.append(&[0, 1], &[0.0, 0.0], &[token as f32], None, None)?;
/// }
/// assert_eq!(cache.lengths(), [0, 5]);
///
/// // Keys of zero weigh the same: the mean of the values 0, 3 and 4 that are left.
/// let decode = Decode::new(1, Options::new()).sequences([1]);
/// let output = cache.decode(&decode, &[1.0, 1.0], &DecodeOperands::default())?;
/// assert!((output.o[0] - 7.0 / 3.0).abs() < 1e-6);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct HostCache<T> {
    pub(super) on: On<T>,
}

#[derive(Debug)]
pub(super) enum On<T> {
    Cpu(Box<cpu::KvCache<T>>),
    Gpu(Box<KvCache>),
}

impl Attention {
    /// An empty cache of keys and values on the device of this operator, for calls on host slices.
    ///
    /// # Errors
    /// Those of [`CacheConfig::check`]; [`Error::CacheElementType`] unless `T` is of the config's element type; on a GPU those of
    /// [`create_cache`](Self::create_cache).
    #[cfg(not(target_family = "wasm"))]
    pub fn create_host_cache<T: Element>(&self, config: &CacheConfig) -> Result<HostCache<T>> {
        pollster::block_on(self.create_host_cache_async(config))
    }

    /// As [`create_host_cache`](Self::create_host_cache), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`create_host_cache`](Self::create_host_cache).
    pub async fn create_host_cache_async<T: Element>(&self, config: &CacheConfig) -> Result<HostCache<T>> {
        if T::DTYPE != config.dtype {
            return Err(Error::CacheElementType { operands: T::DTYPE, cache: config.dtype });
        }
        let on = match self.device() {
            None => On::Cpu(Box::new(cpu::KvCache::new(config)?)),
            Some(_) => On::Gpu(Box::new(self.create_cache_async(config).await?)),
        };
        Ok(HostCache { on })
    }
}

impl<T: Element> HostCache<T> {
    /// Its kind and sizes.
    pub fn config(&self) -> &CacheConfig {
        match &self.on {
            On::Cpu(cache) => cache.config(),
            On::Gpu(cache) => cache.config(),
        }
    }

    /// Tokens of each sequence: all that were appended, also those that a ring has given up.
    pub fn lengths(&self) -> &[usize] {
        match &self.on {
            On::Cpu(cache) => cache.lengths(),
            On::Gpu(cache) => cache.lengths(),
        }
    }

    /// Pages of a sequence in the order of its tokens; none where the cache is not paged.
    pub fn pages(&self, sequence: usize) -> &[u32] {
        match &self.on {
            On::Cpu(cache) => cache.pages(sequence),
            On::Gpu(cache) => cache.pages(sequence),
        }
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        match &self.on {
            On::Cpu(cache) => cache.free_pages(),
            On::Gpu(cache) => cache.free_pages(),
        }
    }

    /// The cache on the GPU, for steps on buffers; `None` on the CPU.
    pub fn gpu(&mut self) -> Option<&mut KvCache> {
        match &mut self.on {
            On::Cpu(_) => None,
            On::Gpu(cache) => Some(cache),
        }
    }

    /// Appends so many tokens to each sequence: keys `[tokens, G, D]` and values `[tokens, G, E]`, sequence by sequence. `q`,
    /// `[tokens, H, D]`, is rotated where it lies. `cos_sin` is the table of [`AppendBuffers::cos_sin`].
    ///
    /// # Errors
    /// As [`cpu::KvCache::append`](crate::cpu::KvCache::append), and on a GPU what the driver reports. Nothing has changed then; but
    /// where reading q back fails, the tokens are in the cache.
    #[cfg(not(target_family = "wasm"))]
    pub fn append(
        &mut self,
        tokens: &[usize],
        k: &[T],
        v: &[T],
        q: Option<&mut [T]>,
        cos_sin: Option<&[f32]>,
    ) -> Result<()> {
        pollster::block_on(self.append_async(tokens, k, v, q, cos_sin))
    }

    /// As [`append`](Self::append), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub async fn append_async(
        &mut self,
        tokens: &[usize],
        k: &[T],
        v: &[T],
        q: Option<&mut [T]>,
        cos_sin: Option<&[f32]>,
    ) -> Result<()> {
        let cache = match &mut self.on {
            On::Cpu(cache) => return cache.append(tokens, k, v, q, cos_sin),
            On::Gpu(cache) => cache,
        };
        let total = check_tokens(&cache.config, tokens, [k, v])?;
        let heads = check_queries(&cache.config, total, q.as_deref())?;
        let device = cache.device.clone();
        let q = q.filter(|q| !q.is_empty());
        let operands = [(Binding::Q, q.as_deref()), (Binding::K, Some(k)), (Binding::V, Some(v))]
            .map(|(binding, numbers)| (binding, numbers.map(cast_slice)));
        let create = || {
            let operands = operands.into_iter().chain([table(cos_sin)]);
            HostBuffers::new(&device).upload(operands).map(|buffers| buffers.changed(Binding::Q))
        };
        let buffers = device.scoped_async("uploading operands", create).await??;
        let operands = AppendBuffers {
            q: buffers.view(Binding::Q).map(|q| (q, heads)),
            cos_sin: buffers.buffer(Binding::CosSin),
            ..AppendBuffers::new(buffers.given(Binding::K)?, buffers.given(Binding::V)?)
        };
        let prepared = cache.prepare_append_async(tokens, &operands).await?;
        let mut step = step(cache, "append")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        if let Some(q) = q {
            q.copy_from_slice(&buffers.download(|_| ()).await?.read::<T>(Binding::Q).await?);
        }
        Ok(())
    }

    /// Appends `k`, `[tokens, G, D]`, and `v`, `[tokens, G, E]`, and attends with `q`, `[tokens, H, D]`, which is rotated where it lies
    /// if the cache has a rotary embedding. o of the result is `[tokens, H, E]`, lse `[H, tokens]`. Without tokens there is nothing in
    /// either.
    ///
    /// # Errors
    /// As [`cpu::KvCache::prefill`](crate::cpu::KvCache::prefill), and on a GPU what the driver reports. Nothing has changed then; but
    /// where reading the results back fails, the tokens are in the cache.
    #[cfg(not(target_family = "wasm"))]
    pub fn prefill(
        &mut self,
        prefill: &Prefill,
        q: &mut [T],
        kv: [&[T]; 2],
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Output<T>> {
        pollster::block_on(self.prefill_async(prefill, q, kv, operands))
    }

    /// As [`prefill`](Self::prefill), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub async fn prefill_async(
        &mut self,
        prefill: &Prefill,
        q: &mut [T],
        kv: [&[T]; 2],
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Output<T>> {
        let cache = match &mut self.on {
            On::Cpu(cache) => return cache.prefill(prefill, q, kv, operands),
            On::Gpu(cache) => cache,
        };
        let config = cache.config;
        let total = check_tokens(&config, &prefill.tokens, kv)?;
        let batch = PrefillBatch::appended(&config, prefill, cache.block_table())?;
        let Some(batch) = batch else {
            check_length("q", q.len(), &[total, prefill.heads, config.head_dim])?;
            return Ok(Output { o: vec![], o_lo: None, lse: vec![] });
        };
        let alibi_of_sinks = batch.alibi_of_sinks(operands.alibi_slopes);
        let operands = batch.operands(operands, alibi_of_sinks.as_deref())?;
        check_length("q", q.len(), &batch.problem.q_shape())?;
        batch.problem.check_optional_inputs(&operands.inputs(q, kv))?;
        let device = cache.device.clone();
        let rounding_error = T::DTYPE.has_rounding_error().then_some(Binding::OLo);
        let results = [Binding::O, Binding::Lse].into_iter().chain(rounding_error);
        let create = || {
            let given = of_inputs(&operands.inputs(q, kv)).into_iter().chain([table(operands.cos_sin)]);
            let buffers = HostBuffers::new(&device).upload(given)?.results(&batch.problem, results)?;
            Ok(if config.rotary.is_some() { buffers.changed(Binding::Q) } else { buffers })
        };
        let buffers = device.scoped_async("uploading operands", create).await??;
        let ForwardBuffers { q: queries, k, v, sink_logits, alibi_slopes, bias, mask, o, o_lo, lse, .. } =
            buffers.forward()?;
        let given = PrefillBuffers {
            q: queries,
            k,
            v,
            cos_sin: buffers.buffer(Binding::CosSin),
            sink_logits,
            alibi_slopes,
            bias,
            mask,
            o,
            o_lo,
            lse,
            scratch: None,
        };
        let prepared = PreparedPrefill::new(cache, prefill, &given).await?;
        let mut step = step(cache, "prefill")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let results = buffers.download(|_| ()).await?;
        if config.rotary.is_some() {
            q.copy_from_slice(&results.read::<T>(Binding::Q).await?);
        }
        results.output().await
    }

    /// The backward pass of a prefill: of the queries of the last tokens of each sequence. q and d_q of the result are as q of
    /// [`prefill`](Self::prefill), rotated where there is a rotary embedding. The gradients by keys and values are `[blocks, G, rows,
    /// width]` without padding, of all blocks of the cache: sequences or pages.
    ///
    /// # Errors
    /// As [`cpu::KvCache::backward`](crate::cpu::KvCache::backward), and on a GPU what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn backward(
        &self,
        prefill: &Prefill,
        q: &[T],
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Gradients<T>> {
        pollster::block_on(self.backward_async(prefill, q, saved, upstream, operands))
    }

    /// As [`backward`](Self::backward), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub async fn backward_async(
        &self,
        prefill: &Prefill,
        q: &[T],
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
        operands: &PrefillOperands<'_, T>,
    ) -> Result<Gradients<T>> {
        let cache = match &self.on {
            On::Cpu(cache) => return cache.backward(prefill, q, saved, upstream, operands),
            On::Gpu(cache) => cache,
        };
        if operands.cos_sin.is_some() {
            let hint = "keys have been rotated as they were appended";
            return Err(Error::UnexpectedOperand { operand: "cos_sin", hint });
        }
        let config = cache.config;
        let problem = PrefillBatch::held(&config, prefill, cache.block_table())?.problem;
        check_length("q", q.len(), &problem.q_shape())?;
        let inputs = operands.inputs(q, [&[]; 2]);
        problem.check_optional_inputs(&inputs)?;
        problem.check_upstream(saved, upstream)?;
        let device = cache.device.clone();
        let of_cache = |binding: Binding| [Binding::K, Binding::V, Binding::DK, Binding::DV].contains(&binding);
        let create = || {
            let given = of_inputs(&inputs).into_iter().chain(of_results(saved, upstream));
            let given = given.filter(|(binding, _)| !of_cache(*binding));
            let results = gradients_of(&inputs).filter(|binding| !of_cache(*binding));
            let buffers = HostBuffers::new(&device).upload(given)?.results(&problem, results)?;
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let [key_bytes, value_bytes] = config.bytes().map(|bytes| bytes as usize);
            buffers.result(Binding::DK, key_bytes, usage)?.result(Binding::DV, value_bytes, usage)
        };
        let buffers = device.scoped_async("uploading operands", create).await??;
        let given = BackwardBuffers {
            q: buffers.given(Binding::Q)?,
            o: buffers.given(Binding::O)?,
            o_lo: buffers.view(Binding::OLo),
            lse: buffers.given(Binding::Lse)?,
            sink_logits: buffers.view(Binding::SinkLogits),
            alibi_slopes: buffers.view(Binding::AlibiSlopes),
            bias: buffers.view(Binding::Bias),
            mask: buffers.view(Binding::Mask),
            d_o: buffers.given(Binding::DO)?,
            d_lse: buffers.view(Binding::DLse),
            d_q: buffers.given(Binding::DQ)?,
            d_keys: buffers.given(Binding::DK)?.buffer,
            d_values: buffers.given(Binding::DV)?.buffer,
            d_sink_logits: buffers.view(Binding::DSinkLogits),
            d_alibi_slopes: buffers.view(Binding::DAlibiSlopes),
            d_bias: buffers.view(Binding::DBias),
        };
        let prepared = cache.prepare_backward_async(prefill, &given).await?;
        let mut step = step(cache, "backward")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let gradients: Gradients<T> = buffers.download(|_| ()).await?.gradients().await?;
        let [key_row, value_row] = config.row_vectors().map(|vectors| 16 * vectors as usize / config.dtype.bytes());
        Ok(Gradients {
            d_k: unpadded(&gradients.d_k, key_row, config.head_dim),
            d_v: unpadded(&gradients.d_v, value_row, config.value_dim),
            ..gradients
        })
    }

    /// A decoding step: q, and o of the result, `[B, M, H, D]` or in the options' layout; lse is `[B, H, M]`.
    ///
    /// # Errors
    /// As [`cpu::KvCache::decode`](crate::cpu::KvCache::decode), and on a GPU what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn decode(&self, decode: &Decode, q: &[T], operands: &DecodeOperands<'_>) -> Result<Output<T>> {
        pollster::block_on(self.decode_async(decode, q, operands))
    }

    /// As [`decode`](Self::decode), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub async fn decode_async(&self, decode: &Decode, q: &[T], operands: &DecodeOperands<'_>) -> Result<Output<T>> {
        Ok(self.decode_whole(decode, q, operands, false).await?.0)
    }

    /// As [`decode`](Self::decode), and the largest score of each row, `[B, H, M]`; see
    /// [`Attention::forward_with_row_max`].
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    #[cfg(not(target_family = "wasm"))]
    pub fn decode_with_row_max(
        &self,
        decode: &Decode,
        q: &[T],
        operands: &DecodeOperands<'_>,
    ) -> Result<(Output<T>, Vec<f32>)> {
        pollster::block_on(self.decode_with_row_max_async(decode, q, operands))
    }

    /// As [`decode_with_row_max`](Self::decode_with_row_max), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub async fn decode_with_row_max_async(
        &self,
        decode: &Decode,
        q: &[T],
        operands: &DecodeOperands<'_>,
    ) -> Result<(Output<T>, Vec<f32>)> {
        let (output, row_max) = self.decode_whole(decode, q, operands, true).await?;
        Ok((output, row_max.unwrap_or_default()))
    }

    /// The results of a decoding step, and row_max where it is wanted.
    async fn decode_whole(
        &self,
        decode: &Decode,
        q: &[T],
        operands: &DecodeOperands<'_>,
        has_row_max: bool,
    ) -> Result<(Output<T>, Option<Vec<f32>>)> {
        let cache = match &self.on {
            On::Cpu(cache) => {
                let (output, row_max) = cache.decode_with_row_max(decode, q, operands)?;
                return Ok((output, has_row_max.then_some(row_max)));
            }
            On::Gpu(cache) => cache,
        };
        let (problem, _) = decode.problem(&cache.config)?;
        decode.entries(&cache.config)?;
        check_length("q", q.len(), &problem.q_shape())?;
        let DecodeOperands { sink_logits, alibi_slopes, tree_mask, cos_sin } = *operands;
        problem.check_optional_inputs(&Inputs::new(q, &[], &[]).sink_logits(sink_logits).alibi_slopes(alibi_slopes))?;
        decode.check_tree_mask(problem.shape().batch, tree_mask.map(<[u32]>::len))?;
        let device = cache.device.clone();
        let given = [
            (Binding::Q, Some(cast_slice(q))),
            (Binding::SinkLogits, sink_logits.map(cast_slice)),
            (Binding::AlibiSlopes, alibi_slopes.map(cast_slice)),
            (Binding::TreeMask, tree_mask.map(cast_slice)),
            table(cos_sin),
        ];
        let row_max = has_row_max.then_some(Binding::RowMax);
        let results = [Binding::O, Binding::Lse].into_iter().chain(row_max);
        let create = || HostBuffers::new(&device).upload(given)?.results(&problem, results);
        let buffers = device.scoped_async("uploading operands", create).await??;
        let given = DecodeBuffers {
            sink_logits: buffers.view(Binding::SinkLogits),
            alibi_slopes: buffers.view(Binding::AlibiSlopes),
            tree_mask: buffers.view(Binding::TreeMask),
            cos_sin: buffers.buffer(Binding::CosSin),
            row_max: buffers.view(Binding::RowMax),
            ..DecodeBuffers::new(buffers.given(Binding::Q)?, buffers.given(Binding::O)?, buffers.given(Binding::Lse)?)
        };
        let prepared = cache.prepare_decode_async(decode, &given).await?;
        let mut step = step(cache, "decode")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let results = buffers.download(|_| ()).await?;
        Ok((results.output().await?, results.optional(Binding::RowMax).await?))
    }

    /// Forgets the tokens of a sequence from `length` on; with 0 it is empty, and its pages are free.
    ///
    /// # Errors
    /// As [`KvCache::truncate`].
    #[cfg(not(target_family = "wasm"))]
    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        pollster::block_on(self.truncate_async(sequence, length))
    }

    /// As [`truncate`](Self::truncate), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub async fn truncate_async(&mut self, sequence: usize, length: usize) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.truncate(sequence, length),
            On::Gpu(cache) => {
                let mut step = step(cache, "truncate")?;
                cache.truncate(&mut step, sequence, length)?;
                step.submit_async().await.map(|_| ())
            }
        }
    }

    /// Of the tokens from `first` on, keeps those with these ascending numbers, which count from `first`, and forgets the others.
    ///
    /// # Errors
    /// As [`KvCache::keep`].
    #[cfg(not(target_family = "wasm"))]
    pub fn keep(&mut self, sequence: usize, first: usize, numbers: &[usize]) -> Result<()> {
        pollster::block_on(self.keep_async(sequence, first, numbers))
    }

    /// As [`keep`](Self::keep), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub async fn keep_async(&mut self, sequence: usize, first: usize, numbers: &[usize]) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.keep(sequence, first, numbers),
            On::Gpu(cache) => {
                let mut step = step(cache, "keep")?;
                cache.keep(&mut step, sequence, first, numbers)?;
                step.submit_async().await.map(|_| ())
            }
        }
    }

    /// Makes sequence `to` a copy of `from`. In a paged cache they share pages until one of them writes to a shared one.
    ///
    /// # Errors
    /// As [`KvCache::fork`].
    #[cfg(not(target_family = "wasm"))]
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        pollster::block_on(self.fork_async(from, to))
    }

    /// As [`fork`](Self::fork), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`fork`](Self::fork).
    pub async fn fork_async(&mut self, from: usize, to: usize) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.fork(from, to),
            On::Gpu(cache) => {
                let mut step = step(cache, "fork")?;
                cache.fork(&mut step, from, to)?;
                step.submit_async().await.map(|_| ())
            }
        }
    }

    /// Gives a sequence of a paged cache pages of the caller's choice, which others may hold, too, and which hold `length`
    /// tokens of it.
    ///
    /// # Errors
    /// As [`KvCache::assign`].
    #[cfg(not(target_family = "wasm"))]
    pub fn assign(&mut self, sequence: usize, pages: &[u32], length: usize) -> Result<()> {
        pollster::block_on(self.assign_async(sequence, pages, length))
    }

    /// As [`assign`](Self::assign), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`assign`](Self::assign).
    pub async fn assign_async(&mut self, sequence: usize, pages: &[u32], length: usize) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.assign(sequence, pages, length),
            On::Gpu(cache) => {
                let mut step = step(cache, "assign")?;
                cache.assign(&mut step, sequence, pages, length)?;
                step.submit_async().await.map(|_| ())
            }
        }
    }
}

fn step(cache: &KvCache, label: &str) -> Result<Step> {
    Ok(cache.attention.step()?.label(label))
}

/// The table of a rotary embedding.
fn table(cos_sin: Option<&[f32]>) -> HostOperand<'_> {
    (Binding::CosSin, cos_sin.map(cast_slice))
}

/// Checks new keys and values. Returns the number of tokens of all sequences.
fn check_tokens<T>(config: &CacheConfig, tokens: &[usize], [k, v]: [&[T]; 2]) -> Result<usize> {
    let total = check_total(config, tokens)?;
    check_length("k", k.len(), &[total, config.kv_heads, config.head_dim])?;
    check_length("v", v.len(), &[total, config.kv_heads, config.value_dim])?;
    Ok(total)
}

/// Checks queries that are to be rotated. Returns their number of heads.
fn check_queries<T>(config: &CacheConfig, total: usize, q: Option<&[T]>) -> Result<usize> {
    let Some(q) = q else { return Ok(0) };
    let heads = q.len() / (total.max(1) * config.head_dim);
    let heads = if total > 0 { heads.max(1) } else { 0 };
    check_length("q", q.len(), &[total, heads, config.head_dim])?;
    Ok(heads)
}

/// Rows without the padding that they have in the cache.
fn unpadded<T: Element>(rows: &[T], from: usize, to: usize) -> Vec<T> {
    rows.chunks_exact(from).flat_map(|row| &row[..to]).copied().collect()
}

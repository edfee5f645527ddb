//! A cache that is used with host slices: the same calls on a GPU and on the CPU.

use super::append::AppendBuffers;
use super::backward::BackwardBuffers;
use super::batch::{Batch, Prefill, PrefillOperands, check_total};
use super::cpu;
use super::decode::DecodeBuffers;
use super::gpu::KvCache;
use super::prefill::PrefillBuffers;
use super::step::Step;
use crate::attention::{Attention, OptionalBuffers};
use crate::device::Device;
use crate::device::buffer::{Mapped, TensorView, allocate, download, upload, upload_with};
use crate::plan::decode::Decode;
use crate::problem::cache::CacheConfig;
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::{Bias, Gradients, Output, Upstream, check_length};

/// Keys and values of a number of sequences on the device of the operator, a GPU or the CPU, with operands and results in host
/// memory: the same calls on both.
///
/// On a GPU every call uploads its operands, submits, and waits for its results. A loop that must not wait for the host keeps its
/// operands in buffers: [`gpu`](Self::gpu) is the cache for that, and both kinds of calls may take turns.
///
/// ```
/// use sink_attention::cache::{CacheConfig, CacheKind, Decode};
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
/// let output = cache.decode(&Decode::new(1, Options::new()).sequences([1]), &[1.0, 1.0], None, None)?;
/// assert!((output.o[0] - 7.0 / 3.0).abs() < 1e-6);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct HostCache<T> {
    on: On<T>,
}

#[derive(Debug)]
enum On<T> {
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
        let create = || -> Result<_> {
            let q = q.as_deref().filter(|q| !q.is_empty()).map(|q| rotated(&device, q)).transpose()?;
            Ok(([upload(&device, "k", k)?, upload(&device, "v", v)?], q, table(&device, cos_sin)?))
        };
        let ([k, v], rotated, cos_sin) = device.scoped("uploading operands", create).await??;
        let buffers = AppendBuffers {
            q: rotated.as_ref().map(|q| (TensorView::new(q), heads)),
            cos_sin: cos_sin.as_ref(),
            ..AppendBuffers::new(&k, &v)
        };
        let prepared = cache.prepare_append_async(tokens, &buffers).await?;
        let mut step = step(cache, "append")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        if let (Some(q), Some(rotated)) = (q, &rotated) {
            let [read] = download(&device, [rotated], |_| ()).await?;
            q.copy_from_slice(&read.read::<T>(q.len()).await?);
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
        let batch = Batch::appended(&config, prefill, cache.block_table())?;
        let Some(batch) = batch else {
            check_length("q", q.len(), &[total, prefill.heads, config.head_dim])?;
            return Ok(Output { o: vec![], o_lo: None, lse: vec![] });
        };
        check_length("q", q.len(), &batch.problem.q_shape())?;
        batch.problem.check_optional_inputs(&operands.inputs(q, &Default::default()))?;
        let device = cache.device.clone();
        let [o_len, lse_len] = [total * prefill.heads * config.value_dim, total * prefill.heads];
        let rounds = T::DTYPE.has_rounding_error();
        let create = || -> Result<_> {
            let [k, v] = kv;
            Ok((
                [rotated(&device, q)?, upload(&device, "k", k)?, upload(&device, "v", v)?],
                OptionalBuffers::new(&device, &operands.inputs(q, &Default::default()))?,
                table(&device, operands.cos_sin)?,
                [result::<T>(&device, "o", o_len)?, result::<f32>(&device, "lse", lse_len)?],
                // One element in f32, so that there is a buffer to read.
                result::<i16>(&device, "o_lo", if rounds { o_len } else { 1 })?,
            ))
        };
        let (qkv, uploaded, cos_sin, [o, lse], o_lo) = device.scoped("uploading operands", create).await??;
        let [q_buffer, k, v] = &qkv;
        let buffers = PrefillBuffers {
            cos_sin: cos_sin.as_ref(),
            sink_logits: uploaded.sink_logits.as_ref().map(TensorView::new),
            alibi_slopes: uploaded.alibi_slopes.as_ref().map(TensorView::new),
            bias: uploaded.bias.as_ref().map(TensorView::new),
            mask: uploaded.mask.as_ref().map(TensorView::new),
            o_lo: rounds.then(|| TensorView::new(&o_lo)),
            ..PrefillBuffers::new(q_buffer, k, v, &o, &lse)
        };
        let prepared = cache.prepare_prefill_async(prefill, &buffers).await?;
        let mut step = step(cache, "prefill")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let [turned, o, o_lo, lse] = download(&device, [q_buffer, &o, &o_lo, &lse], |_| ()).await?;
        if config.rotary.is_some() {
            q.copy_from_slice(&turned.read::<T>(q.len()).await?);
        }
        let o_lo = if rounds { Some(o_lo.read(o_len).await?) } else { None };
        Ok(Output { o: o.read(o_len).await?, o_lo, lse: lse.read(lse_len).await? })
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
        let problem = Batch::held(&config, prefill, cache.block_table())?.problem;
        check_length("q", q.len(), &problem.q_shape())?;
        problem.check_optional_inputs(&operands.inputs(q, &Default::default()))?;
        problem.check_upstream(saved, upstream)?;
        let device = cache.device.clone();
        let bias_len = operands.bias.as_ref().map(Bias::len);
        let create = || -> Result<_> {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let [keys, values] =
                config.bytes().map(|bytes| allocate::<u8>(&device, "gradients", bytes as usize, usage));
            let optional = |name, len: Option<usize>| result::<f32>(&device, name, len.unwrap_or(1));
            Ok((
                [upload(&device, "q", q)?, upload(&device, "o", &saved.o)?, upload(&device, "d_o", upstream.d_o)?],
                upload(&device, "lse", &saved.lse)?,
                saved.o_lo.as_ref().map(|o_lo| upload(&device, "o_lo", o_lo)).transpose()?,
                upstream.d_lse.map(|d_lse| upload(&device, "d_lse", d_lse)).transpose()?,
                OptionalBuffers::new(&device, &operands.inputs(q, &Default::default()))?,
                [
                    result::<T>(&device, "d_q", q.len())?,
                    keys?,
                    values?,
                    optional("d_sink_logits", operands.sink_logits.map(<[f32]>::len))?,
                    optional("d_alibi_slopes", operands.alibi_slopes.map(<[f32]>::len))?,
                    optional("d_bias", bias_len)?,
                ],
            ))
        };
        let ([q_buffer, o, d_o], lse, o_lo, d_lse, uploaded, results) =
            device.scoped("uploading operands", create).await??;
        let [d_q, d_keys, d_values, d_sink_logits, d_alibi_slopes, d_bias] = &results;
        let wanted = |given: bool, buffer| given.then(|| TensorView::new(buffer));
        let buffers = BackwardBuffers {
            o_lo: o_lo.as_ref().map(TensorView::new),
            sink_logits: uploaded.sink_logits.as_ref().map(TensorView::new),
            alibi_slopes: uploaded.alibi_slopes.as_ref().map(TensorView::new),
            bias: uploaded.bias.as_ref().map(TensorView::new),
            mask: uploaded.mask.as_ref().map(TensorView::new),
            d_lse: d_lse.as_ref().map(TensorView::new),
            d_sink_logits: wanted(operands.sink_logits.is_some(), d_sink_logits),
            d_alibi_slopes: wanted(operands.alibi_slopes.is_some(), d_alibi_slopes),
            d_bias: wanted(bias_len.is_some(), d_bias),
            ..BackwardBuffers::new([&q_buffer, &o, &lse].map(TensorView::new), &d_o, d_q, [d_keys, d_values])
        };
        let prepared = cache.prepare_backward_async(prefill, &buffers).await?;
        let mut step = step(cache, "backward")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let [d_q, d_k, d_v, d_sink_logits, d_alibi_slopes, d_bias] =
            download(&device, results.each_ref(), |_| ()).await?;
        let optional = async |mapped: Mapped, len: Option<usize>| match len {
            Some(len) => mapped.read(len).await.map(Some),
            None => Ok(None),
        };
        let [key_row, value_row] = config.row_vectors().map(|vectors| 16 * vectors as usize / config.dtype.bytes());
        let rows = config.blocks() * config.kv_heads * config.kind.rows();
        Ok(Gradients {
            d_q: d_q.read(q.len()).await?,
            d_k: unpadded(&d_k.read(rows * key_row).await?, key_row, config.head_dim),
            d_v: unpadded(&d_v.read(rows * value_row).await?, value_row, config.value_dim),
            d_sink_logits: optional(d_sink_logits, operands.sink_logits.map(<[f32]>::len)).await?,
            d_alibi_slopes: optional(d_alibi_slopes, operands.alibi_slopes.map(<[f32]>::len)).await?,
            d_bias: optional(d_bias, bias_len).await?,
        })
    }

    /// A decoding step: q, and o of the result, `[B, M, H, D]` or in the options' layout; lse is `[B, H, M]`. `cos_sin` where keys
    /// are rotated as they are read.
    ///
    /// # Errors
    /// As [`cpu::KvCache::decode`](crate::cpu::KvCache::decode), and on a GPU what the driver reports.
    #[cfg(not(target_family = "wasm"))]
    pub fn decode(
        &self,
        decode: &Decode,
        q: &[T],
        sink_logits: Option<&[f32]>,
        cos_sin: Option<&[f32]>,
    ) -> Result<Output<T>> {
        pollster::block_on(self.decode_async(decode, q, sink_logits, cos_sin))
    }

    /// As [`decode`](Self::decode), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub async fn decode_async(
        &self,
        decode: &Decode,
        q: &[T],
        sink_logits: Option<&[f32]>,
        cos_sin: Option<&[f32]>,
    ) -> Result<Output<T>> {
        let cache = match &self.on {
            On::Cpu(cache) => return cache.decode(decode, q, sink_logits, cos_sin),
            On::Gpu(cache) => cache,
        };
        let (problem, _) = decode.problem(&cache.config)?;
        decode.entries(&cache.config)?;
        check_length("q", q.len(), &problem.q_shape())?;
        problem.check_sink_logits(sink_logits)?;
        let device = cache.device.clone();
        let [o_len, lse_len] = [&problem.o_shape()[..], &problem.lse_shape()[..]].map(|shape| shape.iter().product());
        let create = || -> Result<_> {
            Ok((
                upload(&device, "q", q)?,
                sink_logits.map(|sink_logits| upload(&device, "sink_logits", sink_logits)).transpose()?,
                table(&device, cos_sin)?,
                [result::<T>(&device, "o", o_len)?, result::<f32>(&device, "lse", lse_len)?],
            ))
        };
        let (q, sink_logits, cos_sin, [o, lse]) = device.scoped("uploading operands", create).await??;
        let buffers = DecodeBuffers {
            sink_logits: sink_logits.as_ref().map(TensorView::new),
            cos_sin: cos_sin.as_ref(),
            ..DecodeBuffers::new(&q, &o, &lse)
        };
        let prepared = cache.prepare_decode_async(decode, &buffers).await?;
        let mut step = step(cache, "decode")?;
        prepared.encode(cache, &mut step)?;
        step.submit_async().await?;
        let [o, lse] = download(&device, [&o, &lse], |_| ()).await?;
        Ok(Output { o: o.read(o_len).await?, o_lo: None, lse: lse.read(lse_len).await? })
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

    /// The cache as a safetensors file, which [`restore`](Self::restore) of either device reads.
    ///
    /// # Errors
    /// As [`KvCache::to_safetensors`].
    #[cfg(all(feature = "safetensors", not(target_family = "wasm")))]
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        pollster::block_on(self.to_safetensors_async())
    }

    /// As [`to_safetensors`](Self::to_safetensors), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`to_safetensors`](Self::to_safetensors).
    #[cfg(feature = "safetensors")]
    pub async fn to_safetensors_async(&self) -> Result<Vec<u8>> {
        match &self.on {
            On::Cpu(cache) => cache.to_safetensors(),
            On::Gpu(cache) => cache.to_safetensors_async().await,
        }
    }

    /// Replaces what the cache holds by what such a file does.
    ///
    /// # Errors
    /// As [`KvCache::restore`].
    #[cfg(all(feature = "safetensors", not(target_family = "wasm")))]
    pub fn restore(&mut self, file: &[u8]) -> Result<()> {
        pollster::block_on(self.restore_async(file))
    }

    /// As [`restore`](Self::restore), for browsers and async hosts.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    #[cfg(feature = "safetensors")]
    pub async fn restore_async(&mut self, file: &[u8]) -> Result<()> {
        match &mut self.on {
            On::Cpu(cache) => cache.restore(file),
            On::Gpu(cache) => cache.restore_async(file).await,
        }
    }
}

fn step(cache: &KvCache, label: &str) -> Result<Step> {
    Ok(cache.attention.step()?.label(label))
}

/// A buffer that is read back.
fn result<T>(device: &Device, operand: &'static str, elements: usize) -> Result<wgpu::Buffer> {
    // A buffer is never empty.
    allocate::<T>(device, operand, elements.max(1), wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC)
}

/// Queries that are rotated where they lie, and read back.
fn rotated<T: Element>(device: &Device, q: &[T]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    upload_with(device, "q", q, usage)
}

/// The table of a rotary embedding.
fn table(device: &Device, cos_sin: Option<&[f32]>) -> Result<Option<wgpu::Buffer>> {
    cos_sin.map(|cos_sin| upload(device, "cos_sin", cos_sin)).transpose()
}

/// Checks new keys and values; the tokens of all sequences.
fn check_tokens<T>(config: &CacheConfig, tokens: &[usize], [k, v]: [&[T]; 2]) -> Result<usize> {
    let total = check_total(config, tokens)?;
    check_length("k", k.len(), &[total, config.kv_heads, config.head_dim])?;
    check_length("v", v.len(), &[total, config.kv_heads, config.value_dim])?;
    Ok(total)
}

/// Checks queries that are to be rotated; their heads.
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

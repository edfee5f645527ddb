//! FlashAttention with attention sinks, on every GPU that `wgpu` reaches and on the CPU.
//!
//! One operator, exact up to rounding, in memory linear in the sequence length: scores are computed tile by tile and
//! never stored. This version computes the forward and the backward pass, and decodes from caches, in f32, f16 and bf16.
//!
//! ```
//! use sink_attention::{Attention, Inputs, Options, Problem, Shape, SinkLogits, Window};
//!
//! // A sliding-window layer with grouped heads and one learned sink logit per query head.
//! let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 100, seq_k: 100, head_dim: 16, value_dim: 16 };
//! let options = Options::new().window(Window::keys(32)).sink_logits(SinkLogits::PerHead);
//! let problem = Problem::new(shape, options)?;
//!
//! let q = vec![0.1f32; problem.q_shape().iter().product()];
//! let k = vec![0.2; problem.k_shape().iter().product()];
//! let v = vec![0.5; problem.v_shape().iter().product()];
//! let inputs = Inputs::new(&q, &k, &v).sink_logits(&[0.0, -1.0, 0.0, 1.0][..]);
//!
//! let attention = Attention::new()?; // the best GPU, or the CPU where there is none but software
//! let output = attention.forward(&problem, &inputs)?;
//! assert_eq!(output.o.len(), q.len());
//!
//! // Query 0 of head 0 sees one key, with score 16 * 0.1 * 0.2 / sqrt(16), and the sink logit 0.
//! let lse = (0.08f32.exp() + 1.0).ln();
//! assert!((output.lse[0] - lse).abs() < 1e-5);
//! assert!((output.o[0] - 0.5 * (0.08 - lse).exp()).abs() < 1e-5);
//! # Ok::<(), sink_attention::Error>(())
//! ```
//!
//! # Symbols and shapes
//!
//! B batch, H query heads, G key/value heads, M queries, N keys, D width of q and k, E width of v and o; i counts
//! queries, j keys. H is a multiple of G, and query head h reads key head h / (H / G): multi-head attention is
//! G = H, multi-query attention is G = 1.
//!
//! | operand | [`Layout::Bshd`] | [`Layout::Bhsd`] | [`Layout::Thd`] |
//! |---|---|---|---|
//! | q | `[B, M, H, D]` | `[B, H, M, D]` | `[queries, H, D]` |
//! | k | `[B, N, G, D]` | `[B, G, N, D]` | `[keys, G, D]` |
//! | v | `[B, N, G, E]` | `[B, G, N, E]` | `[keys, G, E]` |
//! | o | `[B, M, H, E]` | `[B, H, M, E]` | `[queries, H, E]` |
//! | lse, row_max | `[B, H, M]` | `[B, H, M]` | `[H, queries]` |
//! | sink logits, ALiBi slopes | `[H]` | `[H]` | `[H]` |
//! | bias, mask | `[B or 1, H or 1, M or 1, N]` | the same | the same, of the longest sequence |
//!
//! Sequences of different lengths lie one after the other ([`Layout::Thd`] with cumulative lengths), or each in a padded
//! batch with a length of its own: [`Problem::with_lengths`]. Positions, windows, sink tokens, bias and mask count from the
//! start of a sequence; either side of one may be empty.
//!
//! Host slices are densely packed. GPU operands may start anywhere in a buffer and have any strides for batch,
//! head and sequence, see [`TensorView`]; that way a cache, or q, k and v interleaved, needs no copy.
//!
//! # Which keys a query sees
//!
//! Query i stands at position p = i + offset among the keys. The offset is N - M by default, so that the last
//! query stands at the last key ([`Alignment::BottomRight`]); it is 0 with [`Alignment::TopLeft`], and
//! [`Options::query_offset`] sets it for streams and caches.
//!
//! ```text
//! visible(i, j) = (no right bound or j <= p + right)
//!             and (no left bound  or j >= p - left  or j < sink_tokens)
//!             and (no mask or mask_ij is set)  and  (no bias or bias_ij > -infinity)
//! ```
//!
//! The bounds are those of [`Window`], inclusive as in FlashAttention's `window_size=(left, right)`. Causal is
//! right = 0. A window of W keys that ends at the query's own is [`Window::keys`].
//!
//! # Two things are called a sink
//!
//! - **Sink tokens** ([`Options::sink_tokens`], StreamingLLM): the first keys of the sequence, which stay visible
//!   when a window has left them behind. They are exempt from the left bound only.
//! - **Sink logits** ([`SinkLogits`], GPT-OSS): a number per query head that enters the softmax's denominator
//!   and has no value, so that a head can attend to nothing. In natural-log units, never scaled, counted once.
//!
//! # Equations
//!
//! ```text
//! s_ij  = scale * (q_i . k_j)                        scale is 1 / sqrt(D) unless set
//! s_ij  = softcap * tanh(s_ij / softcap)             with Options::softcap
//! s_ij  = s_ij - slope_h * |p - j|                   with Options::alibi
//! s_ij  = s_ij + bias_ij                             with Options::bias
//! lse_i = log(sum over visible j of exp(s_ij)  +  exp(sink_logit_h))
//! o_i   = sum over visible j of exp(s_ij - lse_i) * v_j
//! row_max_i = max over visible j of s_ij              where it is asked for
//! ```
//!
//! lse is in natural-log units and includes the sink logit. A query that sees nothing gives o = 0 exactly and
//! lse = its sink logit, or -infinity without sink logits. A hidden key changes nothing, even where it holds NaN
//! or infinity.
//!
//! row_max is f32, in natural-log units, without the sink logit: the largest score itself, not the maximum that an online softmax keeps,
//! which may be stale. [`Attention::forward_with_row_max`], [`ForwardBuffers::row_max`], [`MergeBuffers::row_max`],
//! [`DecodeBuffers::row_max`] and [`PartialState::row_max`] give it; nobody else pays for it. A query that sees nothing has
//! row_max = -infinity, one that sees a NaN score NaN, one that sees a score beyond f32 +infinity, as lse. No gradient flows through it.
//!
//! Given the gradients d_o and, optionally, d_lse of the two results, the backward pass computes
//!
//! ```text
//! delta_i = d_o_i . o_i - d_lse_i
//! p_ij    = exp(s_ij - lse_i) where j is visible, else 0
//! d_s_ij  = p_ij * (d_o_i . v_j - delta_i)
//! d_x_ij  = d_s_ij * (1 - tanh(scale * (q_i . k_j) / softcap)^2)      d_s_ij without softcap
//! d_q_i   = scale * sum_j d_x_ij * k_j
//! d_k_j   = scale * sum_i d_x_ij * q_i             d_k and d_v of a key head
//! d_v_j   = sum_i p_ij * d_o_i                     sum over its H / G query heads
//! d_bias_ij = d_s_ij, summed over the axes that the bias does not have of its own
//! d_slope_h = - sum over batch, i and j of |p - j| * d_s_ij
//! d_sink_logit_h = - sum over batch and i of exp(sink_logit_h - lse_i) * delta_i
//! ```
//!
//! All gradients of a query that sees nothing are exactly 0, but that of its sink logit.
//!
//! # Precision
//!
//! q, k, v, o, d_o and the gradients of q, k and v are f32, f16 or bf16, see [`Options::dtype`]; lse, the sink logits
//! and the gradients of both are f32. Products, the softmax's running maximum and sum, and accumulators are f32 in
//! every case, and results are rounded once: to nearest, ties to even, too large numbers to infinity.
//! [`cpu::reference`] is the definition in f64, and the tests hold every other path to these bounds:
//!
//! | quantity | f32 | f16 | bf16 | error |
//! |---|---|---|---|---|
//! | o, d_q, d_k, d_v | 1e-5 | 1.5e-3 | 6e-3 | norm of x - exact over norm of exact |
//! | gradient of sink logits | 1e-5 | 1e-5 | 1e-5 | the same |
//! | lse | 1e-5 | 1e-5 | 1e-5 | of each element, absolute plus relative |
//! | row_max | 1e-5 | 1e-5 | 1e-5 | of each element, relative to max(1, size of exact) |
//! | gradient of ALiBi slopes | 1e-4 | 1e-4 | 1e-4 | as o |
//!
//! On cooperative matrices ([`MicroKernel::Cooperative`], [`MicroKernel::Fragments`]) P and d_s are rounded to f16 before they are multiplied. Results stay
//! within the bounds above, but with o_lo the gradients of the sink logits and of a bias have the bound of o, and those of ALiBi
//! slopes twice as much, and row_max of capped scores may be off by 2^-19 of the cap besides. Cases outside the bounds, rules of scales and their derivations: docs/precision.md in the repository.
//!
//! f32 is multiplied in full, unless [`Attention::with_precision`] asks for [`Precision::Split`]: then cooperative matrices multiply each
//! number as two halves, within the bounds of f32.
//!
//! There are no float atomics: equal inputs give equal bits on the same device, driver and version of this crate. Across
//! devices the order of sums differs.
//!
//! In half precision the forward pass also returns the rounding error of o, [`Output::o_lo`] or
//! [`ForwardBuffers::o_lo`], two bytes an element: o with o_lo is o in f32, and delta is as precise as in f32. A
//! backward pass without o_lo does not read the saved o: delta comes from the probabilities,
//! sum_j p_ij (d_o_i . v_j) - d_lse_i, which takes two matrix products more.
//!
//! The unseen changes no bit of a query's results, whatever it holds, NaN and infinity included: masked keys, keys
//! outside the window, later ones, other sequences, everything beyond a length. Where a query sees nothing, its q and d_o count
//! as unseen; its d_lse still reaches its sink logit.
//!
//! A row that sees a score of +infinity has lse = +infinity and o = NaN, for its weights are not known; o is right where the
//! scale alone takes a score beyond f32. A sink logit of +infinity takes all the weight of finite scores. A state of
//! lse = +infinity makes a merge NaN, with lse = +infinity. Gradients of rows with lse = +infinity mean nothing. Sums in f32
//! overflow where bf16 or f32 operands come within a factor of their number of terms to 3.4e38. Devices may take subnormal
//! numbers for zero: an element of f16 loses up to 6.1e-5, of bf16 or f32 up to 1.2e-38.
//!
//! Where every key that a row sees has a bias of -1e9 or less, each of the n keys with the row's largest bias has the probability
//! 1 / n, as an eager softmax in f32 has it.
//!
//! # Partial states
//!
//! A shard of the keys gives o and lse of its own, without the sink logit ([`Attention::attend_partial`]); states of disjoint
//! shards merge into that of all their keys ([`Attention::merge`]), and the sink logit enters last, once
//! ([`Attention::finish`]):
//!
//! ```text
//! lse = log(sum over shards of exp(lse_n)),   o = sum over shards of exp(lse_n - lse) * o_n
//! lse' = log(exp(lse) + exp(sink_logit_h)),   o' = o * exp(lse - lse')
//! ```
//!
//! A [`PartialState`] is f32, whatever the operands are. Any cut of the keys, and any order, gives the whole within the bounds
//! above. Which keys are visible is the whole's business: a shard knows where its keys lie ([`Problem::shard`]).
//!
//! ```
//! use sink_attention::{Attention, Inputs, Output, Problem};
//!
//! type Shard<'a> = (std::ops::Range<usize>, &'a [f32], &'a [f32]); // its keys' numbers, k and v
//!
//! fn attend(on: &[Attention], whole: &Problem, q: &[f32], shards: &[Shard<'_>]) -> sink_attention::Result<Output> {
//!     let mut states = Vec::new();
//!     for (attention, (keys, k, v)) in on.iter().zip(shards) {
//!         states.push(attention.attend_partial(whole, keys.clone(), &Inputs::new(q, k, v))?); // no sink logits here
//!     }
//!     let state = on[0].merge(whole, &states.iter().collect::<Vec<_>>())?;
//!     on[0].finish(whole, &state, Some(&[0.0; 8])) // but here, once
//! }
//! ```
//!
//! The backward pass of a shard, with the final o, o_lo and lse of all keys, gives its share of the
//! gradients ([`Attention::backward_partial`]). In half precision without o_lo it does not: delta is then a sum over the keys
//! at hand.
//!
//! # Two ways to call
//!
//! - [`Attention::forward`] and [`Attention::backward`]: host slices in, host vectors out, on the GPU or the CPU.
//! - [`Attention::prepare_forward`] and [`Attention::prepare_backward`]: on the caller's device ([`Attention::on`])
//!   and buffers. They check, plan and compile once; [`Prepared::encode`] then records into the caller's encoder as
//!   often as wanted.
//!
//! ```
//! use sink_attention::{Attention, DType, Device, ForwardBuffers, Options, Problem, Shape, wgpu};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Some(adapter) = sink_attention::device::adapters().into_iter().next() else { return Ok(()) };
//! # let descriptor = sink_attention::device::device_descriptor(&adapter);
//! # let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
//! let shape = Shape { batch: 1, heads: 4, kv_heads: 4, seq_q: 64, seq_k: 64, head_dim: 32, value_dim: 32 };
//! let problem = Problem::new(shape, Options::new().causal(true))?;
//! let ours = Device::from_wgpu(device.clone(), queue.clone());
//! let q = ours.upload("q", &[0.5; 64 * 4 * 32])?; // or any wgpu::Buffer with BufferUsages::STORAGE
//! let k = ours.upload("k", &[0.1; 64 * 4 * 32])?;
//! let v = ours.upload("v", &[2.0; 64 * 4 * 32])?;
//! let o = ours.zeros("o", DType::F32, &problem.o_shape())?;
//! let lse = ours.zeros("lse", DType::F32, &problem.lse_shape())?;
//!
//! let attention = Attention::on(ours);
//! let forward = attention.prepare_forward(
//!     &problem,
//!     &ForwardBuffers::new(&q, &k, &v, &o, &lse),
//! )?;
//! let mut encoder = device.create_command_encoder(&Default::default());
//! for _ in 0..3 {
//!     forward.encode(&mut encoder);
//! }
//! queue.submit([encoder.finish()]);
//! assert!(o.download::<f32>()?.iter().all(|x| (x - 2.0).abs() < 1e-6));
//! # Ok(())
//! # }
//! ```
//!
//! [`Device::upload`], [`Device::zeros`] and [`DeviceBuffer::download`] are the way between the host and buffers, in all element
//! types: they count bytes, pad to whole words, and check types and lengths. Blocking calls are absent in WebAssembly, where they
//! would stop the page for good: each has a twin that ends in `_async`.
//!
//! # Caches
//!
//! A [`KvCache`] holds keys and values of many sequences of different lengths: in rows of their own, in pages that sequences may
//! share, or in a ring behind the sink tokens ([`CacheKind`]). [`KvCache::prepare_append`] and [`KvCache::prepare_decode`] are as
//! the calls above, recorded into a [`Step`], whose submission makes the cache have them; [`cpu::KvCache`] is the same on the CPU. Queries of a decoding step are those of the last tokens; positions,
//! windows and sink tokens count from the start of a sequence. A rolling cache of sink tokens S and window W shows the query at
//! position p the keys j with p - W < j <= p, and j < S; narrower windows are possible, wider ones an error.
//!
//! Several continuations of a sequence are decoded in one step: [`Decode::tree_mask`] says which new tokens see each other, and
//! [`KvCache::keep`] keeps those that were accepted.
//!
//! The keys of a sequence are split over workgroups, by its length on the GPU; splits are put together in a fixed order, in f32,
//! and the sink logit enters once. Results depend on the lengths, the [`DecodeTiling`] and the cache's sequences, not on what
//! lies in other sequences; the kinds of cache give the same bits only where they have the same capacity.
//!
//! One query of each sequence meets contiguous keys (of a capacity that holds a tile) and paged ones in f16, of widths that are
//! multiples of 16 up to 128, on cooperative matrices: by itself on NVIDIA's (but for rows wider than 64 that one head
//! reads alone), elsewhere where [`Attention::with_micro_kernel`] asks
//! for them, which is an error for other caches. Weights are rounded to f16 then.
//!
//! A chunk of a prompt is more queries than a decoding step takes: [`KvCache::prepare_prefill`] appends its tokens and attends with
//! them to what their sequences hold, by the ordinary forward pass with its kernels and options. In a rolling cache each query
//! sees its own window, whatever the chunk evicts. Chunks give what the whole gives, within rounding, but for quantised keys
//! and values in half precision, which a prefill reads rounded to the element type. [`KvCache::prepare_backward`] is the backward
//! pass of the last chunk through a contiguous or paged cache; gradients by keys and values have the cache's layout.
//!
//! ```
//! use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers};
//! use sink_attention::{Attention, DType, DeviceChoice, Error, Options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let attention = match Attention::open(&DeviceChoice::Gpu) {
//! #     Err(Error::NoAdapter) => return Ok(()),
//! #     opened => opened?,
//! # };
//! # /*
//! let attention = Attention::open(&DeviceChoice::Gpu)?; // cpu::KvCache is the same on the CPU
//! # */
//! let Some(device) = attention.device() else { return Ok(()) };
//! let kind = CacheKind::Paged { page_size: 16, pages: 32, sequence_pages: 16 };
//! let mut cache = attention.create_cache(&CacheConfig::new(kind, 2, 2, 32))?; // 2 sequences, 2 key heads, 32 wide
//!
//! let [k, v] = [device.upload("k", &[0.1; 2 * 2 * 32])?, device.upload("v", &[2.0; 2 * 2 * 32])?];
//! let q = device.upload("q", &[0.5; 2 * 4 * 32])?;
//! let o = device.zeros("o", DType::F32, &[2, 1, 4, 32])?;
//! let lse = device.zeros("lse", DType::F32, &[2, 1, 4])?;
//! let append = cache.prepare_append(&[1, 1], &AppendBuffers::new(&k, &v))?; // one token of each sequence
//! let decode = cache.prepare_decode(&Decode::new(4, Options::new()), &DecodeBuffers::new(&q, &o, &lse))?;
//! let mut step = attention.step()?;
//! for _ in 0..20 {
//!     append.encode(&mut cache, &mut step)?;
//!     decode.encode(&cache, &mut step)?;
//! }
//! step.submit()?;
//! assert_eq!(cache.lengths(), [20, 20]);
//! let mut fork = attention.step()?;
//! cache.fork(&mut fork, 0, 1)?; // the second goes on as the first
//! drop(fork); // never submitted: it has not happened
//! assert_ne!(cache.pages(0), cache.pages(1));
//! assert!(o.download::<f32>()?.iter().all(|x| (x - 2.0).abs() < 1e-6));
//! # Ok(())
//! # }
//! ```
//!
//! A prompt goes through a cache whole or in chunks, one of each sequence, with any number of tokens:
//!
//! ```
//! use sink_attention::cache::{KvCache, Prefill, PrefillBuffers, Step};
//! use sink_attention::device::DeviceBuffer;
//! use sink_attention::{DType, Options};
//!
//! fn prompt(cache: &mut KvCache, step: &mut Step, [q, k, v, o, lse]: [&DeviceBuffer; 5]) -> sink_attention::Result<()> {
//!     // 700 tokens of sequence 0, none of sequence 1, 300 of sequence 2, one after the other: [1000, heads, width].
//!     let options = Options::new().causal(true).dtype(DType::F16);
//!     let prefill = Prefill::new(64, [700, 0, 300], options);
//!     cache.prepare_prefill(&prefill, &PrefillBuffers::new(q, k, v, o, lse))?.encode(cache, step)
//! }
//! ```
//!
//! # Speed and size
//!
//! Tiles come from a table, or from a [`Tuning`] that `sink-attention tune` has measured on the device
//! ([`Attention::with_tuning`]). Kernels compile on first use or by [`Attention::precompile`], and on Vulkan are kept in a
//! file on request ([`Attention::with_pipeline_cache`]). [`Timer`] times passes by the GPU's own clock.
//!
//! A pass is one dispatch where it can be. It is cut into several where an operand exceeds a binding (128 MiB in browsers) or
//! 2^32 elements, or where it may take longer than 250 ms by an estimate ([`Attention::with_dispatch_budget`]): systems reset a
//! GPU that does not answer for some two seconds. The results' bits do not depend on how a pass is cut. [`Error::BindingTooLarge`]
//! is left for tiles that need more than a binding. [`Prepared::dispatches`] and `sink-attention plan` show the number. Slices of
//! a pass follow each other in the caller's encoder; a system that counts the time of a submission wants long passes in an
//! encoder of their own ([`Prepared::encode_pass_in`]). Limits: docs/choosing.md in the repository.
//!
//! # Errors
//!
//! Every fallible call returns [`Error`], whose message carries the numbers needed to mend the call. Shapes, lengths,
//! strides, buffer usages and device limits are checked before anything is dispatched; what a driver reports
//! later comes back as [`Error::Gpu`], [`Error::OutOfMemory`] or [`Error::DeviceLost`]. After the last of these the
//! operator is opened anew; after any other error it, its device and its kernels are as good as before.
//!
//! One operator serves any number of threads at once; results are the same bits as alone. What wgpu reports of an encoder and
//! a submission of the caller's goes to the caller's error scopes, such as [`Device::scoped`].
//!
//! # Features
//!
//! - `safetensors`: caches saved to files and loaded from them; `Values`, the typed numbers of a tensor of
//!   such a file; and `file::case`, which reads and writes conformance files.
//! - `testing`: the module `testing`, with problems, operands and comparisons for tests. Unstable: not part of semantic
//!   versioning.
//! - `checked-shaders`: compile shaders with run-time bounds checks. Without it they run unchecked, since the
//!   host has checked every size.
//!
//! # Environment variables
//!
//! - [`SINK_ATTENTION_ADAPTER`](device::ADAPTER_VARIABLE): the device of [`Attention::new`], an index or a part of a name, or
//!   `cpu`, or `gpu` for the best adapter, be it software.
//! - [`SINK_ATTENTION_TUNING`](tuning::TUNING_VARIABLE): a file of [`Tuning`] that [`Attention::new`] and [`Attention::open`]
//!   load.
//! - [`SINK_ATTENTION_DUMP_SHADERS`](plan::DUMP_VARIABLE): an existing folder that receives every composed shader.
//!
//! [`CacheKind`]: cache::CacheKind
//! [`Decode::tree_mask`]: field@cache::Decode::tree_mask
//! [`DecodeBuffers::row_max`]: cache::DecodeBuffers::row_max
//! [`DecodeTiling`]: cache::DecodeTiling
//! [`DeviceBuffer::download`]: device::DeviceBuffer::download
//! [`KvCache`]: cache::KvCache
//! [`KvCache::keep`]: cache::KvCache::keep
//! [`KvCache::prepare_append`]: cache::KvCache::prepare_append
//! [`KvCache::prepare_backward`]: cache::KvCache::prepare_backward
//! [`KvCache::prepare_decode`]: cache::KvCache::prepare_decode
//! [`KvCache::prepare_prefill`]: cache::KvCache::prepare_prefill
//! [`MicroKernel::Cooperative`]: plan::MicroKernel::Cooperative
//! [`MicroKernel::Fragments`]: plan::MicroKernel::Fragments
//! [`Precision::Split`]: plan::Precision::Split
//! [`Step`]: cache::Step
//! [`Timer`]: timing::Timer
//! [`Tuning`]: tuning::Tuning

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(feature = "gpu"),
    allow(dead_code, unused_imports, reason = "the operator uses what problems and plans alone do not")
)]

/// Setters of a builder: `plain` fields take a value, those of `into` what becomes one, `optional` ones a value or an option.
macro_rules! setters {
    (
        impl[$($generics:tt)*] $type:ident[$($arguments:tt)*]
        $(plain { $($plain:ident: $plain_type:ty,)* })?
        $(into { $($into:ident: $into_type:ty,)* })?
        $(optional { $($optional:ident: $optional_type:ty,)* })?
    ) => {
        impl<$($generics)*> $type<$($arguments)*> {
            $($(
                #[doc = concat!("Sets [`", stringify!($type), "::", stringify!($plain), "`](field@Self::", stringify!($plain), ").")]
                pub fn $plain(self, $plain: $plain_type) -> Self {
                    Self { $plain, ..self }
                }
            )*)?
            $($(
                #[doc = concat!("Sets [`", stringify!($type), "::", stringify!($into), "`](field@Self::", stringify!($into), ").")]
                pub fn $into(self, $into: impl Into<$into_type>) -> Self {
                    Self { $into: $into.into(), ..self }
                }
            )*)?
            $($(
                #[doc = concat!("Sets [`", stringify!($type), "::", stringify!($optional), "`](field@Self::", stringify!($optional), ").")]
                pub fn $optional(self, $optional: impl Into<Option<$optional_type>>) -> Self {
                    Self { $optional: $optional.into(), ..self }
                }
            )*)?
        }
    };
}

// Each imports only from those above it; docs/architecture.md.
#[cfg(feature = "gpu")]
mod attention;
pub mod cache;
#[cfg(feature = "cpu")]
pub mod cpu;
pub mod device;
#[cfg(feature = "gpu")]
mod exec;
pub mod file;
mod kernel;
pub mod plan;
mod problem;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(all(feature = "gpu", not(target_family = "wasm")))]
pub mod timing;

/// Tiles that were measured on a device, and the file that keeps them.
pub mod tuning {
    pub use crate::plan::tuning::{MaskClass, REPORT_FORMAT, TUNING_VARIABLE, Tuning, TuningError, TuningKey};
}

#[cfg(feature = "gpu")]
pub use attention::Attention;
#[cfg(feature = "gpu")]
pub use device::{Device, DeviceChoice, TensorView};
#[cfg(feature = "gpu")]
pub use exec::buffers::{BackwardBuffers, ForwardBuffers, MergeBuffers};
#[cfg(feature = "gpu")]
pub use exec::prepared::Prepared;
pub use half;
pub use problem::element::{DType, Element};
pub use problem::error::{Error, Result};
pub use problem::varlen::Lengths;
pub use problem::{
    Alignment, Axes, Bias, Gradients, Inputs, Layout, MaskData, MaskPacking, Options, Output, PartialState, Problem,
    Shape, SinkLogits, Upstream, Window,
};
#[cfg(feature = "gpu")]
pub use wgpu;

/// The code in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

//! Prefills of the caches under test, and their gradients, against the dense reference.

use sink_attention::cache::{
    BackwardBuffers as CacheBackwardBuffers, CacheConfig, CacheKind, Decode, DecodeOperands, KvCache, Prefill,
    PrefillBuffers,
};
use sink_attention::cpu::{PrefillOperands, reference};
use sink_attention::testing::compare::accepted;
use sink_attention::{
    Axes, Bias, DType, Element, Gradients, Inputs, Layout, Lengths, MaskData, Options, Output, Problem, Shape,
    SinkLogits, TensorView, Upstream, wgpu,
};

use super::caches::{Both, Token, filled, numbers, quantised, read, step_on, turned, wide};
use super::{compare, compare_lse, gpu};

/// Operands that go with options, in f32.
#[derive(Debug, Clone)]
pub struct Extras {
    sinks: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    mask: Option<Vec<u8>>,
}

impl Extras {
    /// Sink logits, and nothing else.
    pub fn sinks(sinks: Vec<f32>) -> Self {
        Extras { sinks: Some(sinks), slopes: None, bias: None, mask: None }
    }

    fn operands<'a, T>(&'a self, cos_sin: Option<&'a [f32]>) -> PrefillOperands<'a, T> {
        PrefillOperands::default()
            .sink_logits(self.sinks.as_deref())
            .alibi_slopes(self.slopes.as_deref())
            .bias(self.bias.as_deref().map(Bias::F32))
            .mask(self.mask.as_deref().map(MaskData::Bytes))
            .cos_sin(cos_sin)
    }
}

/// What a prefill was given and what it gave, on either device.
#[derive(Debug)]
pub struct Prefilled<T> {
    pub prefill: Prefill,
    /// Rotated, where there is a rotary embedding.
    pub q: Vec<T>,
    pub extras: Extras,
    pub cpu: Output<T>,
    pub gpu: Option<Output<T>>,
}

impl<T: Element> Both<T> {
    /// Random tokens and queries, to both caches and the model, and what comes of them against the reference.
    pub fn prefill(&mut self, prefill: &Prefill) -> Prefilled<T> {
        self.try_prefill(prefill).unwrap()
    }

    /// The same; where it fails, both caches say the same, and nothing has changed.
    pub fn try_prefill(&mut self, prefill: &Prefill) -> Result<Prefilled<T>, String> {
        let CacheConfig { kv_heads, head_dim, value_dim, rotary, .. } = self.config;
        let total: usize = prefill.tokens.iter().sum();
        let [q, k, v] = [prefill.heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
            .map(|width| T::narrow(numbers(&mut self.rng, total * width)));
        let extras = self.extras(prefill);
        let lengths = self.cpu.lengths().to_vec();
        let mut turned_q = q.clone();
        let table = self.table.clone();
        let operands = extras.operands(table.as_deref());
        let cpu = self.cpu.prefill(prefill, &mut turned_q, [&k, &v], &operands).map_err(|error| error.to_string());
        let gpu = self.gpu.as_mut().map(|cache| prefill_on(cache, prefill, [&q, &k, &v], &extras, table.as_deref()));
        if let (Some(Err(error)), Ok(_)) | (Some(Ok(_)), Err(error)) = (&gpu, &cpu) {
            panic!("on one device only: {error} of {prefill:?}, {:?}, lengths {lengths:?}", self.config);
        }
        if let (Some(Err(on_gpu)), Err(on_cpu)) = (&gpu, &cpu) {
            assert_eq!(on_gpu, on_cpu, "{:?} {prefill:?}", self.config);
            assert_eq!(self.gpu.as_ref().unwrap().lengths(), lengths);
        }
        if let Some(cache) = &self.gpu {
            assert_eq!(cache.lengths(), self.cpu.lengths());
            assert_eq!(cache.free_pages(), self.cpu.free_pages());
        }
        let cpu = cpu?;
        let gpu = gpu.transpose()?;

        let (q_wide, k, v) = (wide(&q), wide(&k), wide(&v));
        let mut expected_q = q_wide.clone();
        let mut token = 0;
        for (sequence, n) in prefill.tokens.iter().enumerate() {
            for number in 0..*n {
                let of = |x: &[f32], width: usize| x[token * width..(token + 1) * width].to_vec();
                let new = Token { k: of(&k, kv_heads * head_dim), v: of(&v, kv_heads * value_dim) };
                self.model.sequences[sequence].push(new);
                if let (Some(rotary), Some(table)) = (&rotary, &self.table) {
                    for row in token * prefill.heads..(token + 1) * prefill.heads {
                        let row = row * head_dim..(row + 1) * head_dim;
                        let turned = turned(&q_wide[row.clone()], rotary, table, lengths[sequence] + number);
                        expected_q[row].copy_from_slice(&turned);
                    }
                }
                token += 1;
            }
        }
        // Last bits of rotated ones differ by device.
        let one = if T::DTYPE == DType::F32 { 1e-6 } else { accepted(T::DTYPE) };
        if total > 0 {
            compare(&turned_q, &expected_q, one).unwrap();
        }
        let expected = self.expected_prefill(prefill, &turned_q, &extras);
        let (o_bound, lse_bound) = self.bounds();
        let compared = |what: &str, output: &Output<T>| {
            if total == 0 {
                assert!(output.o.is_empty() && output.lse.is_empty());
                return;
            }
            let about = || format!("{what}: {prefill:?} of {:?}, lengths {lengths:?}", self.config);
            compare(&output.o, &expected.o, o_bound).unwrap_or_else(|error| panic!("{}: o {error}", about()));
            compare_lse(&output.lse, &expected.lse, lse_bound)
                .unwrap_or_else(|error| panic!("{}: lse {error}", about()));
        };
        compared("CPU", &cpu);
        let gpu = gpu.map(|(q, output)| {
            if total > 0 {
                compare(&q, &turned_q, one).unwrap();
            }
            compared("GPU", &output);
            output
        });
        Ok(Prefilled { prefill: prefill.clone(), q: turned_q, extras, cpu, gpu })
    }

    fn extras(&mut self, prefill: &Prefill) -> Extras {
        let Prefill { heads, tokens, options, .. } = prefill;
        let active = || tokens.iter().zip(self.cpu.lengths()).filter(|(tokens, _)| **tokens > 0);
        let most = |n: Option<usize>| n.unwrap_or(0);
        let shape =
            [active().count(), *heads, most(tokens.iter().copied().max()), most(active().map(|(n, l)| n + l).max())];
        let len = |axes: Axes| {
            let own = |own: bool, n: usize| if own { n } else { 1 };
            own(axes.batch, shape[0]) * own(axes.heads, shape[1]) * own(axes.seq_q, shape[2]) * shape[3]
        };
        let per_head = options.sink_logits == SinkLogits::PerHead;
        Extras {
            sinks: per_head.then(|| numbers(&mut self.rng, *heads)),
            slopes: options.alibi.then(|| (0..*heads).map(|head| 0.5 / (head + 1) as f32).collect()),
            bias: options.bias.map(|axes| numbers(&mut self.rng, len(axes))),
            mask: options.mask.map(|axes| (0..len(axes)).map(|n| u8::from(n % 3 > 0)).collect()),
        }
    }

    fn expected_prefill(&self, prefill: &Prefill, q: &[T], extras: &Extras) -> Output<f64, f64> {
        let CacheConfig { head_dim, kind, .. } = self.config;
        let Prefill { heads, tokens, options, .. } = prefill;
        let total: usize = tokens.iter().sum();
        if !matches!(kind, CacheKind::Rolling { .. }) && total > 0 {
            let (problem, k, v) = self.dense(prefill);
            return reference::forward(&problem, &inputs(q, [&k, &v], extras)).unwrap();
        }
        // Each sequence by itself, by positions.
        let mut o = Vec::new();
        let mut lse = vec![0.0; heads * total];
        let mut token = 0;
        for (sequence, n) in tokens.iter().copied().enumerate().filter(|(_, n)| *n > 0) {
            let decode = Decode::new(*heads, options.layout(Layout::Bshd)).queries(n);
            let q = &q[token * heads * head_dim..(token + n) * heads * head_dim];
            let output =
                self.expected(&decode, &[sequence], q, &DecodeOperands::default().sink_logits(extras.sinks.as_deref()));
            o.extend(output.o);
            for (row, x) in output.lse.into_iter().enumerate() {
                lse[row / n * total + token + row % n] = x;
            }
            token += n;
        }
        Output::new(o, lse)
    }

    /// The last tokens of some sequences against all of their tokens, as sequences of different lengths: the problem, the keys as
    /// the cache holds them, and the values.
    fn dense(&self, prefill: &Prefill) -> (Problem, Vec<T>, Vec<T>) {
        let CacheConfig { kv_heads, head_dim, value_dim, rotary, quantisation, .. } = self.config;
        let (mut starts, mut keys, mut values) = ([vec![0u32], vec![0u32]], Vec::new(), Vec::new());
        for (sequence, n) in prefill.tokens.iter().enumerate().filter(|(_, n)| **n > 0) {
            let tokens = &self.model.sequences[sequence];
            for (list, n) in starts.iter_mut().zip([*n, tokens.len()]) {
                list.push(list.last().unwrap() + n as u32);
            }
            for (position, token) in tokens.iter().enumerate() {
                for head in 0..kv_heads {
                    let mut key = token.k[head * head_dim..(head + 1) * head_dim].to_vec();
                    let mut value = token.v[head * value_dim..(head + 1) * value_dim].to_vec();
                    if let (Some(rotary), Some(table)) = (&rotary, &self.table) {
                        key = turned(&key, rotary, table, position);
                    }
                    if quantisation.is_some() {
                        (key, value) = (quantised(&key), quantised(&value));
                    }
                    keys.extend(key);
                    values.extend(value);
                }
            }
        }
        let [q, k] = &starts;
        let [seq_q, seq_k] = [q, k].map(|list| *list.last().unwrap() as usize);
        let shape = Shape { batch: 1, heads: prefill.heads, kv_heads, seq_q, seq_k, head_dim, value_dim };
        let options = prefill.options.layout(Layout::Thd);
        let problem = Problem::with_lengths(shape, options, Lengths::Cumulative { q, k }).unwrap();
        (problem, T::narrow(keys), T::narrow(values))
    }

    /// The gradients of a prefill of the last tokens, through both caches, against the reference's.
    pub fn backward(&mut self, of: &Prefilled<T>) {
        let CacheConfig { kv_heads, head_dim, value_dim, kind, .. } = self.config;
        let Prefilled { prefill, q, extras, .. } = of;
        let (problem, k, v) = self.dense(prefill);
        let d_o = T::narrow(numbers(&mut self.rng, of.cpu.o.len()));
        let d_lse = numbers(&mut self.rng, of.cpu.lse.len());
        let upstream = Upstream::new(&d_o).d_lse(&d_lse[..]);
        let expected = reference::backward(&problem, &inputs(q, [&k, &v], extras), &upstream).unwrap();
        let (blocks, rows) = match kind {
            CacheKind::Contiguous { capacity } => (self.config.sequences, capacity),
            CacheKind::Paged { page_size, pages, .. } => (pages, page_size),
            CacheKind::Rolling { .. } => unreachable!("it has no gradients"),
        };
        let in_layout = |gradient: &[f64], width: usize| {
            let mut held = vec![0.0; blocks * kv_heads * rows * width];
            let mut token = 0;
            for (sequence, _) in prefill.tokens.iter().enumerate().filter(|(_, n)| **n > 0) {
                for place in 0..self.cpu.lengths()[sequence] {
                    let block = match kind {
                        CacheKind::Paged { .. } => self.cpu.pages(sequence)[place / rows] as usize,
                        _ => sequence,
                    };
                    for head in 0..kv_heads {
                        let to = ((block * kv_heads + head) * rows + place % rows) * width;
                        for d in 0..width {
                            held[to + d] += gradient[(token * kv_heads + head) * width + d];
                        }
                    }
                    token += 1;
                }
            }
            held
        };
        let [d_k, d_v] = [in_layout(&expected.d_k, head_dim), in_layout(&expected.d_v, value_dim)];
        let bound = accepted(T::DTYPE);
        let compared = |what: &str, actual: &Gradients<T>| {
            let about = |name, error| format!("{what}: {name} {error} of {prefill:?}, {:?}", self.config);
            let agree = |name, actual: &[T], expected: &[f64]| {
                compare(actual, expected, bound).unwrap_or_else(|error| panic!("{}", about(name, error.to_string())));
            };
            agree("d_q", &actual.d_q, &expected.d_q);
            agree("d_k", &actual.d_k, &d_k);
            agree("d_v", &actual.d_v, &d_v);
            // What no sequence uses is 0, and what one of them does is not.
            for (actual, expected) in [(&actual.d_k, &d_k), (&actual.d_v, &d_v)] {
                assert!(actual.iter().zip(expected).all(|(a, e)| *e != 0.0 || a.to_f32() == 0.0), "{what}");
            }
            for (name, actual, expected) in [
                ("d_sink_logits", &actual.d_sink_logits, &expected.d_sink_logits),
                ("d_alibi_slopes", &actual.d_alibi_slopes, &expected.d_alibi_slopes),
                ("d_bias", &actual.d_bias, &expected.d_bias),
            ] {
                assert_eq!(actual.is_some(), expected.is_some(), "{name}");
                if let (Some(actual), Some(expected)) = (actual, expected) {
                    compare(actual, expected, bound.max(1e-4))
                        .unwrap_or_else(|error| panic!("{}", about(name, error.to_string())));
                }
            }
        };
        let on_cpu = self.cpu.backward(prefill, q, &of.cpu, &upstream, &extras.operands(None)).unwrap();
        compared("CPU", &on_cpu);
        if let (Some(cache), Some(saved)) = (&self.gpu, &of.gpu) {
            let first = backward_on(cache, prefill, q, saved, &upstream, extras).unwrap();
            compared("GPU", &first);
            let second = backward_on(cache, prefill, q, saved, &upstream, extras).unwrap();
            assert!(first == second, "the same bits twice");
        }
    }
}

fn inputs<'a, T>(q: &'a [T], [k, v]: [&'a [T]; 2], extras: &'a Extras) -> Inputs<'a, T> {
    let PrefillOperands { sink_logits, alibi_slopes, bias, mask, .. } = extras.operands(None);
    Inputs::new(q, k, v).sink_logits(sink_logits).alibi_slopes(alibi_slopes).bias(bias).mask(mask)
}

fn device() -> &'static sink_attention::Device {
    gpu().unwrap().device().unwrap()
}

/// Operands of options in buffers.
struct Uploaded {
    sinks: Option<wgpu::Buffer>,
    slopes: Option<wgpu::Buffer>,
    bias: Option<wgpu::Buffer>,
    mask: Option<wgpu::Buffer>,
}

impl Uploaded {
    fn new(extras: &Extras) -> Self {
        let f32s = |data: &Option<Vec<f32>>| data.as_ref().map(|data| filled(device(), data));
        let mask = extras.mask.as_ref().map(|mask| {
            let mut words = vec![0f32; mask.len().div_ceil(4)];
            bytemuck::cast_slice_mut::<f32, u8>(&mut words)[..mask.len()].copy_from_slice(mask);
            filled(device(), &words)
        });
        Uploaded { sinks: f32s(&extras.sinks), slopes: f32s(&extras.slopes), bias: f32s(&extras.bias), mask }
    }
}

fn view(buffer: &Option<wgpu::Buffer>) -> Option<TensorView<'_>> {
    buffer.as_ref().map(TensorView::new)
}

/// A prefill of host slices, submitted: q as it is then, and the result.
pub fn prefill_on<T: Element>(
    cache: &mut KvCache,
    prefill: &Prefill,
    [q, k, v]: [&[T]; 3],
    extras: &Extras,
    table: Option<&[f32]>,
) -> Result<(Vec<T>, Output<T>), String> {
    let device = device();
    let total: usize = prefill.tokens.iter().sum();
    let (o_len, lse_len) = (total * prefill.heads * cache.config().value_dim, total * prefill.heads);
    let o = filled(device, &vec![T::from_f32(777.0); o_len]);
    let o_lo = filled(device, &vec![T::from_f32(777.0); o_len]);
    let lse = filled(device, &vec![777f32; lse_len]);
    let uploaded = Uploaded::new(extras);
    let table = table.map(|table| filled(device, table));
    let q_len = q.len();
    let [q, k, v] = [q, k, v].map(|x| filled(device, x));
    // Of the caller's, or not.
    let bytes = cache.prefill_scratch_bytes(prefill).map_err(|error| error.to_string())?;
    let scratch = (total % 2 == 1).then(|| filled(device, &vec![777f32; bytes as usize / 4]));
    let buffers = PrefillBuffers::new(&q, &k, &v, &o, &lse)
        .scratch(scratch.as_ref())
        .cos_sin(table.as_ref())
        .sink_logits(view(&uploaded.sinks))
        .alibi_slopes(view(&uploaded.slopes))
        .bias(view(&uploaded.bias))
        .mask(view(&uploaded.mask))
        .o_lo(T::DTYPE.has_rounding_error().then(|| TensorView::new(&o_lo)));
    let prepared = cache.prepare_prefill(prefill, &buffers).map_err(|error| error.to_string())?;
    let mut step = step_on(device);
    let result = prepared.encode(cache, &mut step);
    step.submit().map_err(|error| error.to_string())?;
    result.map_err(|error| error.to_string())?;
    let rest: Vec<T> = read(device, &o_lo, o_len);
    let o_lo = T::DTYPE.has_rounding_error().then(|| bytemuck::pod_collect_to_vec(&rest));
    Ok((read(device, &q, q_len), Output::new(read(device, &o, o_len), read(device, &lse, lse_len)).o_lo(o_lo)))
}

/// The backward pass of host slices, submitted; gradients by keys and values without the padding of rows.
fn backward_on<T: Element>(
    cache: &KvCache,
    prefill: &Prefill,
    q: &[T],
    saved: &Output<T>,
    upstream: &Upstream<'_, T>,
    extras: &Extras,
) -> Result<Gradients<T>, String> {
    let device = device();
    let uploaded = Uploaded::new(extras);
    let result = |len: usize| filled(device, &vec![T::from_f32(777.0); len]);
    let f32s = |data: &Option<Vec<f32>>| data.as_ref().map(|data| filled(device, &vec![777f32; data.len()]));
    let rest = saved.o_lo.as_ref().map(|rest| {
        let rest: Vec<T> = bytemuck::pod_collect_to_vec(rest);
        filled(device, &rest)
    });
    let [o, q_given, d_o] = [&saved.o, q, upstream.d_o].map(|x| filled(device, x));
    let [lse, d_lse] = [&saved.lse[..], upstream.d_lse.unwrap()].map(|x| filled(device, x));
    let d_q = result(q.len());
    let [d_keys, d_values] = [cache.keys(), cache.values()].map(|of| result(of.size() as usize / size_of::<T>()));
    let (d_sinks, d_slopes, d_bias) = (f32s(&extras.sinks), f32s(&extras.slopes), f32s(&extras.bias));
    let buffers =
        CacheBackwardBuffers::new([&q_given, &o, &lse].map(TensorView::new), &d_o, &d_q, [&d_keys, &d_values])
            .o_lo(view(&rest))
            .sink_logits(view(&uploaded.sinks))
            .alibi_slopes(view(&uploaded.slopes))
            .bias(view(&uploaded.bias))
            .mask(view(&uploaded.mask))
            .d_lse(TensorView::new(&d_lse))
            .d_sink_logits(view(&d_sinks))
            .d_alibi_slopes(view(&d_slopes))
            .d_bias(view(&d_bias));
    let prepared = cache.prepare_backward(prefill, &buffers).map_err(|error| error.to_string())?;
    let mut step = step_on(device);
    prepared.encode(cache, &mut step).map_err(|error| error.to_string())?;
    step.submit().map_err(|error| error.to_string())?;
    let packed = |buffer: &wgpu::Buffer, width: usize| {
        let padded = width.next_multiple_of(16 / size_of::<T>());
        let rows: Vec<T> = read(device, buffer, usize::MAX);
        assert!(rows.chunks(padded).all(|row| row[width..].iter().all(|x| x.to_f32() == 0.0)), "padding is 0");
        rows.chunks(padded).flat_map(|row| row[..width].to_vec()).collect::<Vec<T>>()
    };
    let optional = |buffer: &Option<wgpu::Buffer>, data: &Option<Vec<f32>>| {
        buffer.as_ref().zip(data.as_ref()).map(|(buffer, data)| read::<f32>(device, buffer, data.len()))
    };
    Ok(Gradients::new(
        read(device, &d_q, q.len()),
        packed(&d_keys, cache.config().head_dim),
        packed(&d_values, cache.config().value_dim),
    )
    .d_sink_logits(optional(&d_sinks, &extras.sinks))
    .d_alibi_slopes(optional(&d_slopes, &extras.slopes))
    .d_bias(optional(&d_bias, &extras.bias)))
}

/// Options of a prompt: causal, of an element type.
pub fn causal<T: Element>() -> Options {
    Options::new().causal(true).dtype(T::DTYPE)
}

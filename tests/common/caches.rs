//! A cache on the GPU and on the CPU, side by side with a list of all tokens, which the dense reference attends to.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::cache::{
    AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeOperands, KvCache, Rotary, RotaryPositions,
    RotaryStyle, Step, TreeMask,
};
use sink_attention::cpu::{self, reference};
use sink_attention::half::f16;
use sink_attention::{
    Attention, Axes, Bias, DType, Device, Element, Error, Inputs, Output, Problem, Shape, SinkLogits, TensorView,
    Window, wgpu,
};

use super::{compare, compare_lse, gpu};

/// Three sequences without rotary embedding.
pub fn config<T: Element>(kind: CacheKind, kv_heads: usize, [head_dim, value_dim]: [usize; 2]) -> CacheConfig {
    CacheConfig::new(kind, 3, kv_heads, head_dim).value_dim(value_dim).dtype(T::DTYPE)
}

/// Cosines and sines of the usual frequencies.
pub fn rotary_table(rotary: &Rotary, positions: usize) -> Vec<f32> {
    let half = rotary.dim as usize / 2;
    let angle = |position: usize, i: usize| position as f32 * 10000f32.powf(-(i as f32) / half as f32);
    (0..positions)
        .flat_map(|position| {
            let of = move |turn: fn(f32) -> f32| (0..half).map(move |i| turn(angle(position, i)));
            of(f32::cos).chain(of(f32::sin))
        })
        .collect()
}

/// A token of one sequence: what was appended of it, in f32.
#[derive(Debug, Clone)]
pub struct Token {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The plain model: every token of every sequence, for ever.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub sequences: Vec<Vec<Token>>,
}

/// The caches under test with the model.
#[derive(Debug)]
pub struct Both<T> {
    pub config: CacheConfig,
    pub model: Model,
    pub cpu: cpu::KvCache<T>,
    pub gpu: Option<KvCache>,
    pub table: Option<Vec<f32>>,
    pub rng: StdRng,
}

pub fn numbers(rng: &mut StdRng, len: usize) -> Vec<f32> {
    let half_width = 3f32.sqrt();
    (0..len).map(|_| rng.random_range(-half_width..half_width)).collect()
}

/// Random operands of a decoding step.
#[derive(Debug)]
pub struct Random {
    sinks: Vec<f32>,
    slopes: Vec<f32>,
    words: Vec<u32>,
}

impl Random {
    pub fn new(rng: &mut StdRng, decode: &Decode, sequences: usize) -> Self {
        let Decode { heads, queries, options, tree_mask, .. } = decode;
        let sinks = numbers(rng, *heads);
        let slopes = if options.alibi { (0..*heads).map(|_| rng.random_range(-0.02..0.2)).collect() } else { vec![] };
        let trees = match tree_mask {
            Some(TreeMask::PerSequence) => sequences,
            Some(TreeMask::Shared) => 1,
            None => 0,
        };
        let mut tree = |n: usize| -> Vec<u32> {
            // A tree, and any bits.
            if n.is_multiple_of(2) {
                let parents: Vec<Option<usize>> =
                    (0..*queries).map(|token| rng.random_range(0..=token).checked_sub(1)).collect();
                TreeMask::of_parents(&parents).unwrap()
            } else {
                (0..*queries).map(|_| rng.random()).collect()
            }
        };
        let words = (0..trees).flat_map(&mut tree).collect();
        Random { sinks, slopes, words }
    }

    pub fn operands(&self, decode: &Decode) -> DecodeOperands<'_> {
        DecodeOperands::default()
            .sink_logits((decode.options.sink_logits == SinkLogits::PerHead).then_some(&self.sinks[..]))
            .alibi_slopes(decode.options.alibi.then_some(&self.slopes[..]))
            .tree_mask(decode.tree_mask.map(|_| &self.words[..]))
    }
}

pub fn wide<T: Element>(x: &[T]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// Pairs turned in f64.
pub fn turned(x: &[f32], rotary: &Rotary, table: &[f32], position: usize) -> Vec<f32> {
    let mut y: Vec<f32> = x.to_vec();
    let dim = rotary.dim as usize;
    for i in 0..dim / 2 {
        let [a, b] = match rotary.style {
            RotaryStyle::HalfSplit => [i, i + dim / 2],
            RotaryStyle::Interleaved => [2 * i, 2 * i + 1],
        };
        let [cos, sin] = [table[position * dim + i], table[position * dim + dim / 2 + i]].map(f64::from);
        let [p, q] = [x[a], x[b]].map(f64::from);
        y[a] = (p * cos - q * sin) as f32;
        y[b] = (q * cos + p * sin) as f32;
    }
    y
}

/// What q8_0 leaves of a row.
pub fn quantised(x: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let most = block.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
        let scale = f64::from(f16::from_f64(most / 127.0));
        let number = move |x: &f32| if scale > 0.0 { (f64::from(*x) / scale).round_ties_even() } else { 0.0 };
        block.iter().map(|x| (number(x).clamp(-127.0, 127.0) * scale) as f32).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

impl<T: Element> Both<T> {
    pub fn new(config: CacheConfig) -> Self {
        let gpu = gpu().map(|attention| attention.create_cache(&config).unwrap());
        let sequences = vec![Vec::new(); config.sequences];
        let table = config.rotary.map(|rotary| rotary_table(&rotary, 600));
        let cpu = cpu::KvCache::new(&config).unwrap();
        Both { config, model: Model { sequences }, cpu, gpu, table, rng: StdRng::seed_from_u64(7) }
    }

    /// Random tokens, to all three.
    pub fn append(&mut self, tokens: &[usize]) {
        self.try_append(tokens).unwrap();
    }

    /// The same; where it fails, both caches say the same, and nothing has changed.
    pub fn try_append(&mut self, tokens: &[usize]) -> Result<(), String> {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        let total: usize = tokens.iter().sum();
        let k = T::narrow(numbers(&mut self.rng, total * kv_heads * head_dim));
        let v = T::narrow(numbers(&mut self.rng, total * kv_heads * value_dim));
        self.append_numbers(tokens, &k, &v)
    }

    /// These tokens, as `try_append` does.
    pub fn append_numbers(&mut self, tokens: &[usize], k: &[T], v: &[T]) -> Result<(), String> {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = self.config;
        // Keys that are rotated as they are read come without a table.
        let table = self.table.as_deref().filter(|_| !is_relative(&self.config));
        let on_cpu = self.cpu.append(tokens, k, v, None, table).map_err(|error| error.to_string());
        if let (Some(cache), Some(attention)) = (&mut self.gpu, gpu()) {
            let on_gpu = append_on(attention.device().unwrap(), cache, tokens, k, v, table);
            assert_eq!(on_gpu.map_err(|error| error.to_string()), on_cpu, "{:?} {tokens:?}", self.config);
            assert_eq!(cache.lengths(), self.cpu.lengths());
            assert_eq!(cache.free_pages(), self.cpu.free_pages());
        }
        on_cpu?;
        let (k, v) = (wide(k), wide(v));
        let mut token = 0;
        for (sequence, n) in tokens.iter().enumerate() {
            for _ in 0..*n {
                let of = |x: &[f32], width: usize| x[token * kv_heads * width..(token + 1) * kv_heads * width].to_vec();
                self.model.sequences[sequence].push(Token { k: of(&k, head_dim), v: of(&v, value_dim) });
                token += 1;
            }
        }
        Ok(())
    }

    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<(), String> {
        let on_cpu = self.cpu.truncate(sequence, length).map_err(|error| error.to_string());
        let on_gpu = self.record(|cache, step| cache.truncate(step, sequence, length));
        assert!(on_gpu.is_none_or(|on_gpu| on_gpu == on_cpu));
        on_cpu?;
        self.model.sequences[sequence].truncate(length);
        Ok(())
    }

    pub fn keep(&mut self, sequence: usize, first: usize, numbers: &[usize]) -> Result<(), String> {
        let on_cpu = self.cpu.keep(sequence, first, numbers).map_err(|error| error.to_string());
        let on_gpu = self.record(|cache, step| cache.keep(step, sequence, first, numbers));
        assert!(on_gpu.is_none_or(|on_gpu| on_gpu == on_cpu));
        assert!(self.gpu.as_ref().is_none_or(|gpu| gpu.lengths() == self.cpu.lengths()));
        assert!(self.gpu.as_ref().is_none_or(|gpu| gpu.free_pages() == self.cpu.free_pages()));
        on_cpu?;
        let tokens = &mut self.model.sequences[sequence];
        let kept: Vec<Token> = numbers.iter().map(|n| tokens[first + n].clone()).collect();
        tokens.truncate(first);
        tokens.extend(kept);
        Ok(())
    }

    pub fn fork(&mut self, from: usize, to: usize) -> Result<(), String> {
        let on_cpu = self.cpu.fork(from, to).map_err(|error| error.to_string());
        let on_gpu = self.record(|cache, step| cache.fork(step, from, to));
        assert!(on_gpu.is_none_or(|on_gpu| on_gpu == on_cpu));
        on_cpu?;
        self.model.sequences[to] = self.model.sequences[from].clone();
        Ok(())
    }

    fn record(
        &mut self,
        work: impl FnOnce(&mut KvCache, &mut Step) -> Result<(), Error>,
    ) -> Option<Result<(), String>> {
        let cache = self.gpu.as_mut()?;
        let mut step = gpu()?.step().unwrap();
        let result = work(cache, &mut step);
        step.submit().unwrap();
        Some(result.map_err(|error| error.to_string()))
    }

    /// Whether both refuse the step for what a ring has given up, and say the same.
    pub fn refuses(&self, decode: &Decode) -> bool {
        let decode = &decode.clone().q_rotated(true);
        let entries = decode.sequences.as_ref().map_or(self.config.sequences, Vec::len);
        let rows = entries * decode.heads * decode.queries;
        let (q, lens) = (vec![T::default(); rows * self.config.head_dim], [rows * self.config.value_dim, rows]);
        let none = DecodeOperands::default();
        let on_cpu = self.cpu.decode(decode, &q, &none).err();
        assert!(on_cpu.as_ref().is_none_or(|error| matches!(error, Error::CacheEvicted { .. })), "{on_cpu:?}");
        let on_cpu = on_cpu.map(|error| error.to_string());
        if let (Some(cache), Some(attention)) = (&self.gpu, gpu()) {
            let on_gpu = decode_on(attention.device().unwrap(), cache, decode, &q, lens, &none).err();
            assert_eq!(on_gpu.map(|error| error.to_string()), on_cpu, "{decode:?} {:?}", self.config);
        }
        on_cpu.is_some()
    }

    /// A decoding step with random queries on both, against the reference over the tokens that the model says are seen.
    pub fn check(&mut self, decode: &Decode) {
        // Queries are random, not those of the tokens.
        let decode = &decode.clone().q_rotated(true);
        let entries = decode.sequences.clone().unwrap_or_else(|| (0..self.config.sequences).collect());
        let CacheConfig { head_dim, value_dim, .. } = self.config;
        let Decode { heads, queries, .. } = *decode;
        let q = T::narrow(numbers(&mut self.rng, entries.len() * heads * queries * head_dim));
        let random = Random::new(&mut self.rng, decode, entries.len());
        let table = self.table.as_deref().filter(|_| is_relative(&self.config));
        let operands = random.operands(decode).cos_sin(table);
        let expected = self.expected(decode, &entries, &q, &operands);
        let (o_bound, lse_bound) = self.bounds();
        let compared = |what: &str, output: &Output<T>| {
            let about = || format!("{what}: {decode:?} of {:?}, lengths {:?}", self.config, self.cpu.lengths());
            compare(&output.o, &expected.o, o_bound).unwrap_or_else(|error| panic!("{}: o {error}", about()));
            compare_lse(&output.lse, &expected.lse, lse_bound)
                .unwrap_or_else(|error| panic!("{}: lse {error}", about()));
        };
        compared("CPU", &self.cpu.decode(decode, &q, &operands).unwrap());
        if let (Some(cache), Some(attention)) = (&self.gpu, gpu()) {
            let shape = [entries.len() * heads * queries * value_dim, entries.len() * heads * queries];
            let first = decode_on(attention.device().unwrap(), cache, decode, &q, shape, &operands).unwrap();
            compared("GPU", &first);
            let second = decode_on(attention.device().unwrap(), cache, decode, &q, shape, &operands).unwrap();
            assert!(first == second, "the same bits twice");
        }
    }

    /// Of the errors of o and of lse.
    pub fn bounds(&self) -> (f64, f64) {
        let (o_bound, lse_bound) = match T::DTYPE {
            DType::F32 => (1e-5, 1e-5),
            DType::F16 => (1.5e-3, 1e-5),
            _ => (6e-3, 1e-5),
        };
        // Rotated keys are rounded by a different last bit.
        let lse_bound = if self.table.is_some() && T::DTYPE.has_rounding_error() { 2e-2 } else { lse_bound };
        let o_bound = if self.table.is_some() && T::DTYPE.has_rounding_error() { 2.0 * o_bound } else { o_bound };
        // A last bit before it was quantised may be a step after; the CPU rounds to the element type besides.
        match (self.config.quantisation, T::DTYPE) {
            (None, _) => (o_bound, lse_bound),
            (Some(_), DType::F32) => (1e-3, 1e-3),
            (Some(_), _) => (1e-2, 1e-2),
        }
    }

    /// The largest scores of a decoding step with random queries on both; o and lse have the bits that they have without.
    pub fn check_row_max(&mut self, decode: &Decode) {
        let decode = &decode.clone().q_rotated(true);
        let entries = decode.sequences.clone().unwrap_or_else(|| (0..self.config.sequences).collect());
        let rows = entries.len() * decode.heads * decode.queries;
        let q = T::narrow(numbers(&mut self.rng, rows * self.config.head_dim));
        let random = Random::new(&mut self.rng, decode, entries.len());
        let operands = random.operands(decode);
        let (_, expected) = self.expected_with_row_max(decode, &entries, &q, &operands);
        let compared = |what: &str, row_max: &[f32]| {
            assert_eq!(row_max.len(), expected.len());
            for (n, (&actual, &expected)) in row_max.iter().zip(&expected).enumerate() {
                let error = (f64::from(actual) - expected).abs();
                assert!(
                    f64::from(actual) == expected || error <= 1e-5 * expected.abs().max(1.0),
                    "{what}: {decode:?} of {:?}: row_max[{n}] is {actual}, not {expected}",
                    self.config
                );
            }
        };
        let (output, row_max) = self.cpu.decode_with_row_max(decode, &q, &operands).unwrap();
        assert_eq!(output, self.cpu.decode(decode, &q, &operands).unwrap());
        compared("CPU", &row_max);
        if let (Some(cache), Some(attention)) = (&self.gpu, gpu()) {
            let device = attention.device().unwrap();
            let lens = [rows * self.config.value_dim, rows];
            let row_max = filled(device, &vec![777f32; rows]);
            let with = Some(TensorView::new(&row_max));
            let output = decode_with(device, cache, decode, &q, lens, &operands, with).unwrap();
            compared("GPU", &read::<f32>(device, &row_max, rows));
            let without = decode_on(device, cache, decode, &q, lens, &operands).unwrap();
            assert!(output == without, "other bits with row_max: {decode:?}");
        }
    }

    /// Each sequence by itself, each query by itself: the visible tokens in the order of time.
    pub fn expected(
        &self,
        decode: &Decode,
        entries: &[usize],
        q: &[T],
        operands: &DecodeOperands<'_>,
    ) -> Output<f64, f64> {
        self.expected_with_row_max(decode, entries, q, operands).0
    }

    fn expected_with_row_max(
        &self,
        decode: &Decode,
        entries: &[usize],
        q: &[T],
        operands: &DecodeOperands<'_>,
    ) -> (Output<f64, f64>, Vec<f64>) {
        let sinks = operands.sink_logits;
        let CacheConfig { kv_heads, head_dim, value_dim, kind, rotary, quantisation, .. } = self.config;
        let Decode { heads, queries, options, .. } = *decode;
        let (q_strides, o_strides) =
            (options.layout.strides(heads, queries, head_dim), options.layout.strides(heads, queries, value_dim));
        let mut o = vec![0.0; entries.len() * heads * queries * value_dim];
        let mut lse = vec![f64::NEG_INFINITY; entries.len() * heads * queries];
        let mut row_max = lse.clone();
        for (entry, &sequence) in entries.iter().enumerate() {
            let tokens = &self.model.sequences[sequence];
            let first = tokens.len() as i64 - queries as i64;
            // The word of a new token, by its number.
            let word = |n: i64| match (operands.tree_mask?, decode.tree_mask?) {
                (words, TreeMask::Shared) => Some(words[n as usize]),
                (words, TreeMask::PerSequence) => Some(words[entry * queries + n as usize]),
            };
            // A new token stands behind those that it sees, and all before them.
            let position_of = |t: i64| match (t - first, word((t - first).max(0))) {
                (n @ 0.., Some(word)) => {
                    first + (0..queries as i64).filter(|j| *j != n && word >> j & 1 == 1).count() as i64
                }
                _ => t,
            };
            for m in 0..queries {
                let position = position_of(first + m as i64);
                let (mut left, mut sink_tokens) = (options.window.left, options.sink_tokens);
                if let (CacheKind::Rolling { sink_tokens: kept, window, .. }, None) = (kind, left) {
                    (left, sink_tokens) = (Some(window - 1), kept);
                }
                let right = if options.causal { Some(0) } else { options.window.right };
                let seen: Vec<usize> = (0..tokens.len())
                    .filter(|&t| {
                        let (n, j) = (t as i64 - first, position_of(t as i64));
                        let hidden = n >= 0 && word(m as i64).is_some_and(|word| word >> n & 1 == 0);
                        !hidden
                            && right.is_none_or(|right| j <= position + right as i64)
                            && (left.is_none_or(|left| j >= position - left as i64) || j < sink_tokens as i64)
                    })
                    .collect();
                // What a rolling cache has kept, if keys are rotated by their place there.
                let place = |t: usize| match kind {
                    CacheKind::Rolling { sink_tokens, .. } if is_relative(&self.config) && t >= sink_tokens => {
                        t - tokens.len().saturating_sub(kind_rows(kind))
                    }
                    _ => t,
                };
                for head in 0..heads {
                    let row =
                        (entry as u64 * q_strides[0] + head as u64 * q_strides[1] + m as u64 * q_strides[2]) as usize;
                    let o_row =
                        (entry as u64 * o_strides[0] + head as u64 * o_strides[1] + m as u64 * o_strides[2]) as usize;
                    let lse_row = (entry * heads + head) * queries + m;
                    if seen.is_empty() {
                        lse[lse_row] = match options.sink_logits {
                            SinkLogits::PerHead => sinks.unwrap()[head].into(),
                            SinkLogits::OffByOne => 0.0,
                            SinkLogits::None => f64::NEG_INFINITY,
                        };
                        continue;
                    }
                    let g = head / (heads / kv_heads);
                    let key = |&t: &usize| {
                        let key = &tokens[t].k[g * head_dim..(g + 1) * head_dim];
                        let key = match (rotary, &self.table) {
                            (Some(rotary), Some(table)) => turned(key, &rotary, table, place(t)),
                            _ => key.to_vec(),
                        };
                        if quantisation.is_some() { quantised(&key) } else { key }
                    };
                    let value = |&t: &usize| {
                        let value = &tokens[t].v[g * value_dim..(g + 1) * value_dim];
                        if quantisation.is_some() { quantised(value) } else { value.to_vec() }
                    };
                    let keys: Vec<f32> = seen.iter().flat_map(key).collect();
                    let values: Vec<f32> = seen.iter().flat_map(value).collect();
                    let shape =
                        Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1, seq_k: seen.len(), head_dim, value_dim };
                    let dense =
                        options.window(Window::FULL).causal(false).sink_tokens(0).dtype(DType::F32).alibi(false);
                    let bias: Option<Vec<f32>> = operands.alibi_slopes.map(|slopes| {
                        let distance = |t: &usize| (position - position_of(*t as i64)).abs() as f64;
                        seen.iter().map(|t| (-f64::from(slopes[head]) * distance(t)) as f32).collect()
                    });
                    let dense = if bias.is_some() { dense.bias(Axes::KEYS) } else { dense };
                    let problem = Problem::new(shape, dense).unwrap();
                    let query = wide(&q[row..row + head_dim]);
                    let inputs = Inputs::new(&query, &keys, &values)
                        .sink_logits(sinks.map(|sinks| &sinks[head..=head]))
                        .bias(bias.as_deref().map(Bias::F32));
                    let output = reference::forward(&problem, &inputs).unwrap();
                    o[o_row..o_row + value_dim].copy_from_slice(&output.o);
                    lse[lse_row] = output.lse[0];
                    row_max[lse_row] = reference::row_max(&problem, &inputs).unwrap()[0];
                }
            }
        }
        (Output::new(o, lse), row_max)
    }
}

pub fn is_relative(config: &CacheConfig) -> bool {
    config.rotary.is_some_and(|rotary| rotary.positions == RotaryPositions::CacheRelative)
}

fn kind_rows(kind: CacheKind) -> usize {
    match kind {
        CacheKind::Rolling { sink_tokens, window, queries } => sink_tokens + window + queries - 1,
        _ => usize::MAX,
    }
}

/// A buffer with the bytes of a slice, of whole words and never empty.
pub fn filled<T: Element>(device: &Device, data: &[T]) -> wgpu::Buffer {
    let mut bytes = bytemuck::cast_slice::<T, u8>(data).to_vec();
    bytes.resize(bytes.len().next_multiple_of(4).max(16), 0);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let size = bytes.len() as u64;
    let buffer =
        device.wgpu().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    device.queue().write_buffer(&buffer, 0, &bytes);
    buffer
}

/// The first elements of a buffer.
pub fn read<T: Element>(device: &Device, buffer: &wgpu::Buffer, elements: usize) -> Vec<T> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let size = buffer.size();
    let staging =
        device.wgpu().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    let mut encoder = device.wgpu().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, size);
    device.queue().submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |result| result.unwrap());
    device.wgpu().poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let mut data: Vec<T> = bytemuck::pod_collect_to_vec(&staging.get_mapped_range(..).unwrap());
    data.truncate(elements);
    data
}

/// A step of any operator on the device.
pub fn step_on(device: &Device) -> Step {
    Attention::on(device.clone()).step().unwrap()
}

/// Records into a step, and submits it.
pub fn submit(device: &Device, record: impl FnOnce(&mut Step)) {
    let mut step = step_on(device);
    record(&mut step);
    step.submit().unwrap();
}

/// An append of host slices, submitted.
pub fn append_on<T: Element>(
    device: &Device,
    cache: &mut KvCache,
    tokens: &[usize],
    k: &[T],
    v: &[T],
    table: Option<&[f32]>,
) -> Result<(), Error> {
    let [k, v] = [k, v].map(|x| filled(device, x));
    let table = table.map(|table| filled(device, table));
    let buffers = AppendBuffers::new(&k, &v).cos_sin(table.as_ref());
    let prepared = cache.prepare_append(tokens, &buffers)?;
    let mut step = step_on(device);
    let result = prepared.encode(cache, &mut step);
    step.submit()?;
    result
}

/// A decoding step on host slices.
pub fn decode_on<T: Element>(
    device: &Device,
    cache: &KvCache,
    decode: &Decode,
    q: &[T],
    [o_len, lse_len]: [usize; 2],
    operands: &DecodeOperands<'_>,
) -> Result<Output<T>, Error> {
    decode_with(device, cache, decode, q, [o_len, lse_len], operands, None)
}

/// The same, with a view for row_max.
fn decode_with<T: Element>(
    device: &Device,
    cache: &KvCache,
    decode: &Decode,
    q: &[T],
    [o_len, lse_len]: [usize; 2],
    operands: &DecodeOperands<'_>,
    row_max: Option<TensorView<'_>>,
) -> Result<Output<T>, Error> {
    let q = filled(device, q);
    // What is not written stays.
    let o = filled(device, &vec![T::from_f32(777.0); o_len]);
    let lse = filled(device, &vec![777f32; lse_len]);
    let [sinks, slopes, table] = [operands.sink_logits, operands.alibi_slopes, operands.cos_sin]
        .map(|operand| operand.map(|operand| filled(device, operand)));
    let words = operands.tree_mask.map(|words| device.upload("tree_mask", words).unwrap());
    let buffers = DecodeBuffers::new(&q, &o, &lse)
        .sink_logits(sinks.as_ref().map(TensorView::new))
        .alibi_slopes(slopes.as_ref().map(TensorView::new))
        .tree_mask(words.as_ref().map(TensorView::from))
        .cos_sin(table.as_ref())
        .row_max(row_max);
    let prepared = cache.prepare_decode(decode, &buffers)?;
    let mut step = step_on(device);
    prepared.encode(cache, &mut step)?;
    step.submit()?;
    Ok(Output::new(read(device, &o, o_len), read(device, &lse, lse_len)))
}

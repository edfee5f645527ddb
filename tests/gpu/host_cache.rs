//! The same calls on host slices do the same on a GPU and on the CPU.

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sink_attention::cache::{
    CacheConfig, CacheKind, Decode, DecodeOperands, HostCache, Prefill, PrefillOperands, Rotary, RotaryPositions,
    RotaryStyle,
};
use sink_attention::cpu::reference;
use sink_attention::half::f16;
use sink_attention::{Attention, DType, Element, Error, Inputs, Options, Output, Problem, Shape, SinkLogits, Upstream};

use crate::common::caches::{config, numbers, rotary_table, wide};
use crate::common::gpu;

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 40 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 12, sequence_pages: 3 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 2, window: 9, queries: 1 };
const HEADS: usize = 4;

/// Both caches with the numbers they are given.
struct Pair<T> {
    caches: [HostCache<T>; 2],
    rng: StdRng,
    sinks: Vec<f32>,
    table: Option<Vec<f32>>,
    bound: f32,
}

impl<T: Element> Pair<T> {
    fn new(gpu: &Attention, config: CacheConfig) -> Self {
        let create = |attention: &Attention| attention.create_host_cache::<T>(&config).unwrap();
        let mut caches = [create(&Attention::cpu()), create(gpu)];
        let [on_cpu, on_gpu] = &mut caches;
        assert!(on_cpu.gpu().is_none() && on_gpu.gpu().is_some());
        let mut rng = StdRng::seed_from_u64(3);
        let sinks = numbers(&mut rng, HEADS);
        let table = config.rotary.map(|rotary| rotary_table(&rotary, 64));
        let bound = if T::DTYPE == DType::F32 { 2e-5 } else { 8e-3 };
        Pair { caches, rng, sinks, table, bound }
    }

    fn numbers(&mut self, len: usize) -> Vec<T> {
        T::narrow(numbers(&mut self.rng, len))
    }

    fn options() -> Options {
        Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(T::DTYPE)
    }

    fn same(&self, what: &str, [on_cpu, on_gpu]: [&[f32]; 2]) {
        assert_eq!(on_cpu.len(), on_gpu.len(), "{what}");
        for (n, (on_cpu, on_gpu)) in on_cpu.iter().zip(on_gpu).enumerate() {
            let same = on_cpu == on_gpu || (on_cpu - on_gpu).abs() <= self.bound * on_cpu.abs().max(1.0);
            assert!(same, "{what} {n}: {on_cpu} on the CPU, {on_gpu} on the GPU");
        }
    }

    fn same_output(&self, what: &str, [on_cpu, on_gpu]: &[Output<T>; 2]) {
        self.same(what, [&wide(&on_cpu.o), &wide(&on_gpu.o)]);
        self.same(what, [&on_cpu.lse, &on_gpu.lse]);
    }

    fn append(&mut self, tokens: &[usize]) {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = *self.caches[0].config();
        let total: usize = tokens.iter().sum();
        let (k, v) = (self.numbers(total * kv_heads * head_dim), self.numbers(total * kv_heads * value_dim));
        let q = self.table.is_some().then(|| self.numbers(total * HEADS * head_dim));
        let table = self.table.clone();
        let turned = self.caches.each_mut().map(|cache| {
            let mut q = q.clone();
            cache.append(tokens, &k, &v, q.as_deref_mut(), table.as_deref()).unwrap();
            wide(&q.unwrap_or_default())
        });
        assert_ne!(
            self.table.is_some(),
            turned[0] == wide(&q.unwrap_or_default()),
            "queries are rotated by a table alone"
        );
        self.same("q", turned.each_ref().map(Vec::as_slice));
        assert_eq!(self.caches[0].lengths(), self.caches[1].lengths());
    }

    fn decode(&mut self) {
        let config = *self.caches[0].config();
        let decode = Decode::new(HEADS, Self::options()).sequences([2, 0]);
        let q = self.numbers(2 * HEADS * config.head_dim);
        let results = self
            .caches
            .each_ref()
            .map(|cache| cache.decode(&decode, &q, &DecodeOperands::default().sink_logits(&self.sinks[..])).unwrap());
        assert!(results[0].o.iter().any(|x| x.to_f32() != 0.0), "there is something to attend to");
        self.same_output("decode", &results);
    }

    fn prefill(&mut self, tokens: [usize; 3], backward: bool) {
        let CacheConfig { kv_heads, head_dim, value_dim, .. } = *self.caches[0].config();
        let total: usize = tokens.iter().sum();
        let prefill = Prefill::new(HEADS, tokens, Self::options());
        let (k, v) = (self.numbers(total * kv_heads * head_dim), self.numbers(total * kv_heads * value_dim));
        let q = self.numbers(total * HEADS * head_dim);
        let (sinks, table) = (self.sinks.clone(), self.table.clone());
        let operands = PrefillOperands::default().sink_logits(&sinks[..]).cos_sin(table.as_deref());
        let mut queries = [q.clone(), q];
        let [cpu_q, gpu_q] = &mut queries;
        let [on_cpu, on_gpu] = &mut self.caches;
        let results = [(on_cpu, cpu_q), (on_gpu, gpu_q)]
            .map(|(cache, q)| cache.prefill(&prefill, q, [&k, &v], &operands).unwrap());
        self.same("q", [&wide(&queries[0]), &wide(&queries[1])]);
        self.same_output("prefill", &results);
        if !backward {
            return;
        }
        let d_o = self.numbers(total * HEADS * value_dim);
        let d_lse = numbers(&mut self.rng, total * HEADS);
        let upstream = Upstream::new(&d_o).d_lse(&d_lse[..]);
        let operands = operands.cos_sin(None);
        let [cpu, gpu] =
            [0, 1].map(|n| self.caches[n].backward(&prefill, &queries[0], &results[0], &upstream, &operands).unwrap());
        self.same("d_q", [&wide(&cpu.d_q), &wide(&gpu.d_q)]);
        self.same("d_k", [&wide(&cpu.d_k), &wide(&gpu.d_k)]);
        self.same("d_v", [&wide(&cpu.d_v), &wide(&gpu.d_v)]);
        self.same("d_sink_logits", [&cpu.d_sink_logits.unwrap(), &gpu.d_sink_logits.unwrap()]);
    }
}

#[test]
fn appends_prefills_and_steps() {
    let Some(gpu) = gpu() else { return };
    let rotary = Rotary { dim: 8, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute };
    // Widths with padding in the rows of the cache.
    for (kind, rotary) in [(CONTIGUOUS, None), (PAGED, Some(rotary)), (ROLLING, None)] {
        let mut pair = Pair::<f32>::new(gpu, config::<f32>(kind, 2, [10, 6]).rotary(rotary));
        pair.prefill([5, 0, 7], !matches!(kind, CacheKind::Rolling { .. }));
        pair.append(&[1, 0, 1]);
        if rotary.is_none() {
            pair.decode();
        }
        for cache in &mut pair.caches {
            cache.fork(0, 1).unwrap();
            cache.truncate(2, 7).unwrap();
            assert_eq!(cache.lengths(), [6, 6, 7]);
        }
        assert_eq!(pair.caches[0].free_pages(), pair.caches[1].free_pages());
        assert_eq!(pair.caches[0].pages(1), pair.caches[1].pages(1));
        pair.append(&[0, 1, 2]);
        // Nothing at all is nothing on either.
        for cache in &mut pair.caches {
            let lengths = cache.lengths().to_vec();
            let prefill = Prefill::new(HEADS, [0, 0, 0], Pair::<f32>::options());
            let operands = PrefillOperands::default().sink_logits(&pair.sinks[..]).cos_sin(pair.table.as_deref());
            let output = cache.prefill(&prefill, &mut [], [&[], &[]], &operands).unwrap();
            assert!(output.o.is_empty() && output.lse.is_empty());
            cache.append(&[0, 0, 0], &[], &[], None, pair.table.as_deref()).unwrap();
            assert_eq!(cache.lengths(), lengths);
        }
    }
    let mut pair = Pair::<f16>::new(gpu, config::<f16>(CONTIGUOUS, 2, [16, 16]));
    pair.prefill([3, 1, 2], true);
    pair.decode();
}

/// The largest score of each row: of ragged sequences, of one without tokens, and of several queries.
#[test]
fn row_max_is_the_definition() {
    const KV_HEADS: usize = 2;
    const WIDTH: usize = 16;
    let Some(gpu) = gpu() else { return };
    for (kind, queries) in [(CONTIGUOUS, 1), (PAGED, 3)] {
        let mut pair = Pair::<f32>::new(gpu, config::<f32>(kind, KV_HEADS, [WIDTH; 2]));
        let lengths = [33, 0, 5];
        let [k, v] = [0, 1].map(|_| pair.numbers(lengths.iter().sum::<usize>() * KV_HEADS * WIDTH));
        for cache in &mut pair.caches {
            cache.append(&lengths, &k, &v, None, None).unwrap();
        }
        // The second has no token for three queries.
        let entries: &[usize] = if queries == 1 { &[0, 1, 2] } else { &[0, 2] };
        let decode = Decode::new(HEADS, Pair::<f32>::options()).queries(queries).sequences(entries.to_vec());
        let row = queries * HEADS * WIDTH;
        let q = pair.numbers(entries.len() * row);
        let sinks = Some(&pair.sinks[..]);
        let results = pair.caches.each_ref().map(|cache| {
            cache.decode_with_row_max(&decode, &q, &DecodeOperands::default().sink_logits(sinks)).unwrap()
        });
        for (cache, (output, _)) in pair.caches.iter().zip(&results) {
            assert!(
                *output == cache.decode(&decode, &q, &DecodeOperands::default().sink_logits(sinks)).unwrap(),
                "{kind:?}: other bits with row_max"
            );
        }
        let expected = entries.iter().zip(q.chunks(row)).flat_map(|(&sequence, q)| {
            let of = |n: usize| lengths[..n].iter().sum::<usize>() * KV_HEADS * WIDTH;
            let (keys, range) = (lengths[sequence], of(sequence)..of(sequence + 1));
            if keys == 0 {
                return vec![f64::NEG_INFINITY; HEADS];
            }
            let shape = Shape {
                batch: 1,
                heads: HEADS,
                kv_heads: KV_HEADS,
                seq_q: queries,
                seq_k: keys,
                head_dim: WIDTH,
                value_dim: WIDTH,
            };
            let problem = Problem::new(shape, Pair::<f32>::options()).unwrap();
            reference::row_max(&problem, &Inputs::new(q, &k[range.clone()], &v[range]).sink_logits(sinks)).unwrap()
        });
        let expected: Vec<f32> = expected.map(|x| x as f32).collect();
        let close = |what: &str, actual: &[f32], expected: &[f32]| {
            assert_eq!(actual.len(), expected.len(), "{what}");
            for (n, (actual, expected)) in actual.iter().zip(expected).enumerate() {
                let is_close = actual == expected || (actual - expected).abs() <= 1e-5 * expected.abs().max(1.0);
                assert!(is_close, "{kind:?}, {what}: row_max[{n}] is {actual}, not {expected}");
            }
        };
        let [(_, on_cpu), (_, on_gpu)] = &results;
        close("on the CPU", on_cpu, &expected);
        close("on the GPU", on_gpu, &expected);
        close("on the GPU as on the CPU", on_gpu, on_cpu);
    }
}

#[test]
fn files_go_from_one_device_to_the_other() {
    let Some(gpu) = gpu() else { return };
    let mut pair = Pair::<f32>::new(gpu, config::<f32>(PAGED, 2, [8, 8]));
    pair.append(&[3, 0, 20]);
    let [on_cpu, on_gpu] = pair.caches.each_ref().map(|cache| cache.to_safetensors().unwrap());
    assert_eq!(on_cpu, on_gpu);
    pair.append(&[1, 1, 1]);
    let [cpu, gpu] = &mut pair.caches;
    cpu.restore(&on_gpu).unwrap();
    gpu.restore(&on_cpu).unwrap();
    assert_eq!((cpu.lengths(), gpu.lengths()), (&[3, 0, 20][..], &[3, 0, 20][..]));
    pair.decode();
}

#[test]
fn mistakes_are_the_same_errors_and_change_nothing() {
    let Some(gpu) = gpu() else { return };
    let config = config::<f32>(CONTIGUOUS, 2, [8, 8]);
    let error = gpu.create_host_cache::<f16>(&config).unwrap_err();
    assert!(matches!(error, Error::CacheElementType { .. }), "{error}");
    let mut errors = [Attention::cpu(), gpu.clone()].map(|attention| {
        let mut cache = attention.create_host_cache::<f32>(&config).unwrap();
        let mut q = [0.0; 32];
        let decode = Decode::new(HEADS, Pair::<f32>::options());
        let prefill = Prefill::new(HEADS, [1, 0, 0], Pair::<f32>::options());
        let operands = PrefillOperands::default();
        let errors = vec![
            cache.append(&[1, 0], &[0.0; 16], &[0.0; 16], None, None).unwrap_err().to_string(),
            cache.append(&[1, 0, 0], &[0.0; 15], &[0.0; 16], None, None).unwrap_err().to_string(),
            cache.append(&[1, 0, 0], &[0.0; 16], &[0.0; 16], Some(&mut q), None).unwrap_err().to_string(),
            cache.append(&[41, 0, 0], &[0.0; 41 * 16], &[0.0; 41 * 16], None, None).unwrap_err().to_string(),
            cache
                .decode(&decode, &q, &DecodeOperands::default().sink_logits(&[0.0; HEADS][..]))
                .unwrap_err()
                .to_string(),
            cache.decode(&decode, &[0.0; 96], &DecodeOperands::default()).unwrap_err().to_string(),
            cache.prefill(&prefill, &mut q, [&[0.0; 16], &[0.0; 16]], &operands).unwrap_err().to_string(),
            cache.prefill(&prefill, &mut q[1..], [&[0.0; 16], &[0.0; 16]], &operands).unwrap_err().to_string(),
            cache.truncate(3, 0).unwrap_err().to_string(),
            cache.truncate(0, 1).unwrap_err().to_string(),
            cache.fork(0, 3).unwrap_err().to_string(),
            cache.assign(0, &[0], 1).unwrap_err().to_string(),
        ];
        assert_eq!(cache.lengths(), [0; 3]);
        errors
    });
    let [on_cpu, on_gpu] = &mut errors;
    assert_eq!(on_cpu, on_gpu);
}

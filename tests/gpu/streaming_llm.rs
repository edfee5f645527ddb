//! StreamingLLM: a sequence in chunks of any size through a rolling cache, against the definition of the whole sequence in f64.

use crate::common::gpu;
use crate::common::shards::rows;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use sink_attention::cache::{CacheConfig, CacheKind, HostCache, Prefill, PrefillOperands};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::operands::{Operands, agree, problem};
use sink_attention::{Attention, Axes, Bias, DType, Element, Error, Options, Output, Problem, SinkLogits, Window};

const TOKENS: usize = 61;
const BATCH: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const VALUE_DIM: usize = 12;

/// Whole sequences of which a cache gets chunk after chunk.
struct Whole<T> {
    problem: Problem,
    operands: Operands<T>,
    expected: Output<f64, f64>,
}

impl<T: Element> Whole<T> {
    /// The window and the sink tokens of the options are those of the cache.
    fn new(options: Options) -> Self {
        let problem =
            problem([BATCH, HEADS, KV_HEADS], [TOKENS, TOKENS], [HEAD_DIM, VALUE_DIM], options.dtype(T::DTYPE));
        let operands = Operands::random(&problem, 5).cast();
        let expected = reference::forward(&problem, &operands.inputs()).unwrap();
        Whole { problem, operands, expected }
    }

    fn config(&self) -> CacheConfig {
        let Options { window, sink_tokens, dtype, .. } = *self.problem.options();
        let kind = CacheKind::Rolling { sink_tokens, window: window.left.unwrap() + 1, queries: 1 };
        CacheConfig::new(kind, BATCH, KV_HEADS, HEAD_DIM).value_dim(VALUE_DIM).dtype(dtype)
    }

    fn cache(&self, attention: &Attention) -> HostCache<T> {
        attention.create_host_cache(&self.config()).unwrap()
    }

    /// The window and the sink tokens are the cache's: nothing else has to say them.
    fn prefill(&self, tokens: usize) -> Prefill {
        let options = self.problem.options().window(Window::FULL).sink_tokens(0);
        Prefill::new(HEADS, [tokens; BATCH], options)
    }

    fn operands(&self) -> PrefillOperands<'_, T> {
        PrefillOperands::default()
            .sink_logits(self.operands.sink_logits.as_deref())
            .alibi_slopes(self.operands.alibi_slopes.as_deref())
    }

    /// q, k and v of the next tokens, as many of each sequence.
    fn chunk(&self, cache: &HostCache<T>, tokens: usize) -> [Vec<T>; 3] {
        let range = cache.lengths()[0]..cache.lengths()[0] + tokens;
        let rows = |x: &[T], width| rows(&self.problem, x, width, &range);
        let (q, k, v) = (&self.operands.q, &self.operands.k, &self.operands.v);
        // Rows have as many heads as those of k.
        [rows(q, HEADS / KV_HEADS * HEAD_DIM), rows(k, HEAD_DIM), rows(v, VALUE_DIM)]
    }

    fn next(&self, cache: &mut HostCache<T>, tokens: usize) -> Output<T> {
        let [mut q, k, v] = self.chunk(cache, tokens);
        let end = cache.lengths()[0] + tokens;
        let output = cache.prefill(&self.prefill(tokens), &mut q, [&k, &v], &self.operands()).unwrap();
        assert_eq!(cache.lengths(), [end; BATCH]);
        output
    }

    /// Holds the results of the last tokens of the cache against the definition's.
    fn check(&self, cache: &HostCache<T>, tokens: usize, output: &Output<T>) -> Result<(), String> {
        let range = cache.lengths()[0] - tokens..cache.lengths()[0];
        let o = rows(&self.problem, &self.expected.o, HEADS / KV_HEADS * VALUE_DIM, &range);
        // [H, tokens] of a prefill; [B, H, M] of the definition.
        let of = |head: usize, batch: usize| &self.expected.lse[(batch * HEADS + head) * TOKENS..][range.clone()];
        let lse = (0..HEADS).flat_map(|head| (0..BATCH).flat_map(move |batch| of(head, batch).to_vec())).collect();
        assert_eq!(output.o_lo.is_some(), T::DTYPE != DType::F32);
        agree(output, &Output::new(o, lse)).map_err(|error| format!("{range:?}: {error}"))
    }
}

fn options() -> [Options; 6] {
    let per_head = Options::new().sink_logits(SinkLogits::PerHead).causal(true);
    [
        per_head.window(Window::keys(9)).sink_tokens(3),
        per_head.window(Window::keys(17)),
        Options::new().causal(true).window(Window::left(0)).sink_tokens(2).sink_logits(SinkLogits::OffByOne),
        // Longer than the sequence.
        Options::new().causal(true).window(Window::keys(200)).sink_tokens(100),
        // Distances count from true positions, over what the ring has given up.
        per_head.window(Window::keys(5)).sink_tokens(10).alibi(true).softcap(2.0).scale(0.5),
        // Without sink tokens all distances are those of places.
        per_head.window(Window::keys(5)).alibi(true),
    ]
}

fn follows_the_definition<T: Element>(turn: usize) {
    for (n, options) in options().into_iter().enumerate() {
        let whole = Whole::<T>::new(options);
        let paths = [Some(Attention::cpu()), gpu().cloned().filter(|_| n >= 4 || n % 3 == turn)];
        for attention in paths.iter().flatten() {
            for chunks in [&[61][..], &[1, 1, 1, 7, 0, 20, 1, 30], &[2, 2, 2, 55]] {
                let mut cache = whole.cache(attention);
                for &tokens in chunks {
                    let output = whole.next(&mut cache, tokens);
                    if tokens > 0 {
                        whole.check(&cache, tokens, &output).unwrap();
                    }
                }
                assert_eq!(cache.lengths(), [TOKENS; BATCH]);
            }
        }
    }
}

#[test]
fn f32_follows_the_definition() {
    follows_the_definition::<f32>(0);
}

#[test]
fn f16_follows_the_definition() {
    follows_the_definition::<f16>(1);
}

#[test]
fn bf16_follows_the_definition() {
    follows_the_definition::<bf16>(2);
}

#[test]
fn any_chunks() {
    let config = Config { rng_seed: RngSeed::Fixed(9), failure_persistence: None, ..Config::with_cases(60) };
    let cases = (1..70usize, 0..70usize, any::<bool>(), prop::collection::vec(0..20usize, 1..12));
    let run = |(keys, sink_tokens, alibi, chunks): (usize, usize, bool, Vec<usize>)| {
        let window = Options::new().causal(true).window(Window::keys(keys));
        let whole = Whole::<f32>::new(window.sink_tokens(sink_tokens).alibi(alibi));
        let mut cache = whole.cache(&Attention::cpu());
        for tokens in chunks {
            let tokens = tokens.min(TOKENS - cache.lengths()[0]);
            let output = whole.next(&mut cache, tokens);
            if tokens > 0 {
                whole.check(&cache, tokens, &output).map_err(TestCaseError::fail)?;
            }
        }
        Ok(())
    };
    TestRunner::new(config).run(&cases, run).unwrap_or_else(|error| panic!("{error}"));
}

/// Sequences that have come to different lengths have distances of their own.
#[test]
fn alibi_of_sequences_of_different_lengths() {
    let whole = Whole::<f32>::new(options()[4]);
    for attention in [Attention::cpu()].iter().chain(gpu()) {
        let mut cache = whole.cache(attention);
        whole.next(&mut cache, 20);
        // 5 tokens of the second sequence alone, then 7 of both: what each gives alone.
        let mut alone = whole.cache(attention);
        whole.next(&mut alone, 20);
        let [q, k, v] = whole.chunk(&cache, 7);
        let second = |x: &[f32], tokens: usize| x[x.len() / 2..][..x.len() / 2 / 7 * tokens].to_vec();
        let mut one = whole.prefill(0);
        one.tokens = vec![0, 5];
        for cache in [&mut cache, &mut alone] {
            cache.prefill(&one, &mut second(&q, 5), [&second(&k, 5), &second(&v, 5)], &whole.operands()).unwrap();
        }
        let both = cache.prefill(&whole.prefill(7), &mut q.clone(), [&k, &v], &whole.operands()).unwrap();
        one.tokens = vec![0, 7];
        let second = |x: &[f32]| x[x.len() / 2..].to_vec();
        let only = alone.prefill(&one, &mut second(&q), [&second(&k), &second(&v)], &whole.operands()).unwrap();
        let of_both = second(&both.o);
        assert_eq!(of_both.len(), only.o.len());
        let apart = of_both.iter().zip(&only.o).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-5, "{apart}");
        // The first sequence has the results of the definition.
        let range = 20..27;
        let expected = rows(&whole.problem, &whole.expected.o, HEADS / KV_HEADS * VALUE_DIM, &range);
        let first = both.o.iter().zip(&expected).take(both.o.len() / 2);
        let apart = first.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-5, "{apart}");
    }
}

#[test]
fn a_failed_call_loses_nothing() {
    let whole = Whole::<f16>::new(options()[4]);
    for attention in [Attention::cpu()].iter().chain(gpu()) {
        let mut cache = whole.cache(attention);
        whole.next(&mut cache, 20);
        let [q, k, v] = whole.chunk(&cache, 5);
        let (operands, bias) = (whole.operands(), vec![0.0; 1000]);
        let attempts = [
            ("q", &q[1..], &k[..], &v[..], operands),
            ("k", &q, &k[1..], &v, operands),
            ("v", &q, &k, &[], operands),
            ("k", &q, &[], &v, operands),
            ("sink_logits", &q, &k, &v, operands.sink_logits(None)),
            ("sink_logits", &q, &k, &v, operands.sink_logits(&[0.0][..])),
            ("alibi_slopes", &q, &k, &v, operands.alibi_slopes(None)),
            ("alibi_slopes", &q, &k, &v, operands.alibi_slopes(&[0.0; 3][..])),
            ("bias", &q, &k, &v, operands.bias(Bias::F32(&bias))),
        ];
        for (operand, q, k, v, operands) in attempts {
            let error = cache.prefill(&whole.prefill(5), &mut q.to_vec(), [k, v], &operands).unwrap_err().to_string();
            assert!(error.contains(operand), "{operand}: {error}");
            assert_eq!(cache.lengths(), [20; BATCH]);
        }
        let output = whole.next(&mut cache, 5);
        whole.check(&cache, 5, &output).unwrap();
    }
}

#[test]
fn options_that_a_rolling_cache_does_not_take() {
    let whole = Whole::<f32>::new(options()[0]);
    let good = whole.prefill(5);
    for attention in [Attention::cpu()].iter().chain(gpu()) {
        let mut cache = whole.cache(attention);
        let [q, k, v] = whole.chunk(&cache, 5);
        for (options, option) in [
            (good.options.window(Window::keys(10)), "window"),
            (good.options.window(Window::keys(9)).sink_tokens(4), "sink_tokens"),
            (good.options.query_offset(0), "alignment"),
            (good.options.bias(Axes::KEYS), "bias"),
            (good.options.mask(Axes::KEYS), "mask"),
            (good.options.softcap(-1.0), "softcap"),
        ] {
            let prefill = good.clone().options(options);
            let error = cache.prefill(&prefill, &mut q.clone(), [&k, &v], &whole.operands()).unwrap_err();
            assert!(matches!(error, Error::InvalidOption { option: o, .. } if o == option), "{option}: {error}");
        }
        assert_eq!(cache.lengths(), [0; BATCH]);
    }
}

/// Saved anywhere, it goes on with the same bits on the same path, and within the bounds on another.
#[cfg(feature = "safetensors")]
#[test]
fn it_goes_on_elsewhere() {
    fn goes_on<T: Element>() {
        for options in [options()[0], options()[1], options()[4]] {
            let whole = Whole::<T>::new(options);
            for attention in [Attention::cpu()].iter().chain(gpu()) {
                let mut cache = whole.cache(attention);
                for tokens in [1, 2, 13, 20] {
                    whole.next(&mut cache, tokens);
                    let file = cache.to_safetensors().unwrap();
                    let resume = |attention: &Attention| {
                        let mut resumed = whole.cache(attention);
                        resumed.restore(&file).unwrap();
                        resumed
                    };
                    let [mut resumed, mut again] = [resume(attention), resume(attention)];
                    assert_eq!(whole.next(&mut resumed, 5), whole.next(&mut again, 5), "the same bits");
                    let elsewhere = gpu().cloned().filter(|_| !attention.is_gpu()).unwrap_or(Attention::cpu());
                    let mut other = resume(&elsewhere);
                    let output = whole.next(&mut other, 5);
                    whole.check(&other, 5, &output).unwrap();
                }
            }
        }
    }
    goes_on::<f32>();
    goes_on::<f16>();
    goes_on::<bf16>();
}

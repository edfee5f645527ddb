//! What a query does not see of the tokens that went into a cache changes no bit of its results: by decoding steps and prefills of
//! the cache on the CPU, and prefills of the one on the GPU. Decoding there is held to it by the rows of its buffers, in
//! tests/cache_hidden.rs.

use crate::cache_hidden::noise;
use crate::common::caches::{append_on, config, numbers};
use crate::common::gpu;
use crate::common::prefills::{Extras, prefill_on};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeOperands, Prefill, Quantisation};
use sink_attention::cpu::{self, PrefillOperands};
use sink_attention::half::{bf16, f16};
use sink_attention::{Element, Options, Output, SinkLogits, Window};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 75 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 15, sequence_pages: 5 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 2, window: 12, queries: 3 };
/// Tokens of each sequence, all told: many, some, and so few that windows hide none of them.
const LENGTHS: [usize; 3] = [61, 33, 5];
/// Of each sequence, appended and taken back before all else, so that rows hold what belongs to nobody.
const STALE: usize = 70;

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Path {
    CpuDecode,
    CpuPrefill,
    GpuPrefill,
}

/// A cache, and what is asked of it.
#[derive(Debug)]
struct Setting {
    path: Path,
    config: CacheConfig,
    options: Options,
    /// Queries of each sequence: its last tokens.
    counts: [usize; 3],
}

/// The numbers of all tokens of each sequence, `[tokens, G, width]`; queries, `[queries, H, D]`, sequence by sequence; stale keys
/// and values.
#[derive(Clone)]
struct Given<T> {
    k: [Vec<T>; 3],
    v: [Vec<T>; 3],
    q: Vec<T>,
    stale: Option<[Vec<T>; 2]>,
}

/// Numbers of any bits.
fn bits<T: Element>(rng: &mut StdRng, len: usize) -> Vec<T> {
    let words: Vec<u32> = (0..len).map(|_| noise(rng)).collect();
    let mut numbers: Vec<T> = bytemuck::pod_collect_to_vec(&words);
    numbers.truncate(len);
    numbers
}

impl Setting {
    fn heads(&self) -> usize {
        2 * self.config.kv_heads
    }

    fn sinks(&self) -> Vec<f32> {
        (0..self.heads()).map(|head| 0.3 - head as f32).collect()
    }

    fn widths(&self) -> [usize; 2] {
        [self.config.head_dim, self.config.value_dim].map(|width| self.config.kv_heads * width)
    }

    /// Whether the query at a position sees a key of its sequence.
    fn sees(&self, position: usize, key: usize) -> bool {
        let (mut left, mut kept) = (self.options.window.left, self.options.sink_tokens);
        if let (CacheKind::Rolling { sink_tokens, window, .. }, None) = (self.config.kind, left) {
            (left, kept) = (Some(window - 1), sink_tokens);
        }
        let right = if self.options.causal { Some(0) } else { self.options.window.right };
        right.is_none_or(|right| key <= position + right)
            && (left.is_none_or(|left| key + left >= position) || key < kept)
    }

    /// Keys and values of a range of tokens of each sequence, one after the other.
    fn tokens<T: Element>(&self, given: &Given<T>, from: [usize; 3], to: [usize; 3]) -> [Vec<T>; 2] {
        let mut taken = [Vec::new(), Vec::new()];
        for ((taken, sequences), width) in taken.iter_mut().zip([&given.k, &given.v]).zip(self.widths()) {
            for (sequence, numbers) in sequences.iter().enumerate() {
                taken.extend_from_slice(&numbers[from[sequence] * width..to[sequence] * width]);
            }
        }
        taken
    }

    /// Appends stale tokens, which are taken back, and those up to an end; in chunks, as rings keep what they cannot hold of one no
    /// longer than that.
    fn fill<T: Element, C>(
        &self,
        given: &Given<T>,
        end: [usize; 3],
        cache: &mut C,
        append: impl Fn(&mut C, &[usize], &[Vec<T>; 2]),
        empty: impl Fn(&mut C, usize),
    ) {
        if let Some(stale) = &given.stale {
            append(cache, &[STALE; 3], stale);
            (0..3).for_each(|sequence| empty(cache, sequence));
        }
        let mut from = [0; 3];
        while from != end {
            let to: [usize; 3] = std::array::from_fn(|n| end[n].min(from[n] + 7));
            let counts: [usize; 3] = std::array::from_fn(|n| to[n] - from[n]);
            append(cache, &counts, &self.tokens(given, from, to));
            from = to;
        }
    }

    fn run<T: Element>(&self, given: &Given<T>) -> Output<T> {
        let sinks = self.sinks();
        let before: [usize; 3] = std::array::from_fn(|n| LENGTHS[n] - self.counts[n]);
        let prefill = Prefill::new(self.heads(), self.counts, self.options);
        let [k, v] = self.tokens(given, before, LENGTHS);
        if self.path == Path::GpuPrefill {
            let attention = gpu().unwrap();
            let device = attention.device().unwrap();
            let mut cache = attention.create_cache(&self.config).unwrap();
            let append = |cache: &mut _, counts: &[usize], [k, v]: &[Vec<T>; 2]| {
                append_on(device, cache, counts, k, v, None).unwrap();
            };
            self.fill(given, before, &mut cache, append, |cache, sequence| {
                let mut step = attention.step().unwrap();
                cache.truncate(&mut step, sequence, 0).unwrap();
                step.submit().unwrap();
            });
            return prefill_on(&mut cache, &prefill, [&given.q, &k, &v], &Extras::sinks(sinks), None).unwrap().1;
        }
        let mut cache = cpu::KvCache::<T>::new(&self.config).unwrap();
        let end = if self.path == Path::CpuDecode { LENGTHS } else { before };
        let append = |cache: &mut cpu::KvCache<T>, counts: &[usize], [k, v]: &[Vec<T>; 2]| {
            cache.append(counts, k, v, None, None).unwrap();
        };
        self.fill(given, end, &mut cache, append, |cache, sequence| cache.truncate(sequence, 0).unwrap());
        if self.path == Path::CpuDecode {
            let decode = Decode::new(self.heads(), self.options).queries(self.counts[0]);
            return cache.decode(&decode, &given.q, &DecodeOperands::default().sink_logits(&sinks[..])).unwrap();
        }
        let operands = PrefillOperands::default().sink_logits(&sinks[..]);
        cache.prefill(&prefill, &mut given.q.clone(), [&k, &v], &operands).unwrap()
    }

    /// o and lse of query `n` of a sequence, in bits.
    fn row<T: Element>(&self, output: &Output<T>, sequence: usize, n: usize) -> [Vec<u32>; 2] {
        let (heads, token) = (self.heads(), self.token(sequence, n));
        let width = heads * self.config.value_dim;
        let o = output.o[token * width..(token + 1) * width].iter().map(|x| x.to_f32().to_bits());
        let total: usize = self.counts.iter().sum();
        let lse = |head| match self.path {
            Path::CpuDecode => output.lse[(sequence * heads + head) * self.counts[0] + n],
            _ => output.lse[head * total + token],
        };
        [o.collect(), (0..heads).map(|head| lse(head).to_bits()).collect()]
    }

    /// A query's place among all of them.
    fn token(&self, sequence: usize, n: usize) -> usize {
        self.counts[..sequence].iter().sum::<usize>() + n
    }

    /// Each `step`th query by itself, all that it does not see filled with noise; then one number that it sees is changed.
    fn holds<T: Element>(&self, step: usize) {
        let mut rng = StdRng::seed_from_u64(12);
        let [key, value] = self.widths();
        let query = self.heads() * self.config.head_dim;
        let mut random = |len| T::narrow(numbers(&mut rng, len));
        let plain = Given {
            k: LENGTHS.map(|length| random(length * key)),
            v: LENGTHS.map(|length| random(length * value)),
            q: random(self.counts.iter().sum::<usize>() * query),
            stale: None,
        };
        let expected = self.run(&plain);
        let queries = (0..3).flat_map(|sequence| (0..self.counts[sequence]).map(move |n| (sequence, n)));
        for (sequence, n) in queries.step_by(step) {
            let about = || format!("query {n} of sequence {sequence}, {self:?}");
            let expected = self.row(&expected, sequence, n);
            assert!(expected.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{}", about());
            let position = LENGTHS[sequence] - self.counts[sequence] + n;
            let is_seen = |of: usize, key: usize| of == sequence && self.sees(position, key);
            let mut noisy = plain.clone();
            for (sequences, width) in [(&mut noisy.k, key), (&mut noisy.v, value)] {
                for (of, numbers) in sequences.iter_mut().enumerate() {
                    for (key, row) in numbers.chunks_mut(width).enumerate().filter(|(key, _)| !is_seen(of, *key)) {
                        assert!(key < LENGTHS[of]);
                        row.copy_from_slice(&bits(&mut rng, width));
                    }
                }
            }
            for (other, row) in noisy.q.chunks_mut(query).enumerate() {
                if other != self.token(sequence, n) {
                    row.copy_from_slice(&bits(&mut rng, query));
                }
            }
            noisy.stale = Some([key, value].map(|width| bits(&mut rng, 3 * STALE * width)));
            assert!(self.row(&self.run(&noisy), sequence, n) == expected, "hidden numbers show in {}", about());
            // It can fail: the same for one number of a key and of a value that are seen.
            let last = (0..LENGTHS[sequence]).rfind(|key| is_seen(sequence, *key)).unwrap();
            for of_values in [false, true] {
                let mut changed = noisy.clone();
                let (numbers, width) =
                    if of_values { (&mut changed.v[sequence], value) } else { (&mut changed.k[sequence], key) };
                let number = &mut numbers[last * width];
                *number = T::from_f32(3.0 - number.to_f32());
                let found = self.row(&self.run(&changed), sequence, n);
                assert!(found != expected, "a seen number does not show in {}: of a value: {of_values}", about());
            }
        }
    }
}

fn of<T: Element>(kind: CacheKind, widths: [usize; 2]) -> CacheConfig {
    config::<T>(kind, 2, widths)
}

fn options<T: Element>() -> Options {
    Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(T::DTYPE)
}

fn narrow<T: Element>() -> Options {
    options::<T>().window(Window::keys(7)).sink_tokens(1)
}

/// All kinds of caches, with what options make them see; the last keys that are seen may come after the query.
fn on_the_cpu<T: Element>(path: Path, counts: [usize; 3], step: usize) {
    let looking_ahead = options::<T>().causal(false).window(Window::new(5, 2)).sink_tokens(1).softcap(2.0);
    for kind in [CONTIGUOUS, PAGED, ROLLING] {
        for options in [options::<T>(), narrow::<T>(), looking_ahead] {
            for quantisation in [None, Some(Quantisation::Q8_0)] {
                let config = of::<T>(kind, [40, 9]).quantisation(quantisation);
                Setting { path, config, options, counts }.holds::<T>(step);
            }
        }
    }
}

#[test]
fn hidden_tokens_change_no_bit_of_decoding_on_the_cpu() {
    on_the_cpu::<f32>(Path::CpuDecode, [3; 3], 1);
    on_the_cpu::<f32>(Path::CpuDecode, [1; 3], 1);
    on_the_cpu::<f16>(Path::CpuDecode, [3; 3], 2);
    on_the_cpu::<bf16>(Path::CpuDecode, [3; 3], 2);
}

#[test]
fn hidden_tokens_change_no_bit_of_prefills_on_the_cpu() {
    on_the_cpu::<f32>(Path::CpuPrefill, [20, 4, 5], 3);
    on_the_cpu::<f16>(Path::CpuPrefill, [20, 4, 5], 4);
    on_the_cpu::<bf16>(Path::CpuPrefill, [20, 4, 5], 4);
}

#[test]
fn hidden_tokens_change_no_bit_of_prefills_on_the_gpu() {
    if gpu().is_none() {
        return;
    }
    let holds = |config, options, counts| Setting { path: Path::GpuPrefill, config, options, counts };
    // One sequence of a contiguous cache is read where it lies, the others are gathered.
    holds(of::<f32>(CONTIGUOUS, [8, 8]), options::<f32>(), [20, 0, 0]).holds::<f32>(9);
    holds(of::<f32>(CONTIGUOUS, [8, 8]), narrow::<f32>(), [20, 4, 5]).holds::<f32>(7);
    holds(of::<f32>(ROLLING, [8, 8]), options::<f32>(), [20, 4, 5]).holds::<f32>(7);
    holds(of::<f16>(PAGED, [8, 8]), narrow::<f16>(), [20, 4, 5]).holds::<f16>(7);
    holds(of::<bf16>(ROLLING, [8, 8]), options::<bf16>(), [20, 4, 5]).holds::<bf16>(7);
    let quantised = of::<f32>(PAGED, [8, 8]).quantisation(Quantisation::Q8_0);
    holds(quantised, narrow::<f32>(), [20, 4, 5]).holds::<f32>(7);
}

//! Decoding with ALiBi, and with a mask among the new tokens: trees of tokens.

use crate::common::caches::{Both, config, filled, rotary_table};
use crate::common::gpu;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::cache::{
    CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeOperands, DecodeTiling, HostCache, Quantisation, Rotary,
    RotaryPositions, RotaryStyle, TreeMask,
};
use sink_attention::half::{bf16, f16};
use sink_attention::{Attention, DeviceChoice, Element, Error, Options, SinkLogits, TensorView, Window};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 400 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 80, sequence_pages: 25 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 37, queries: 16 };

/// Sequences of many tokens, of few, and of fewer than queries, with and without trees.
fn decodes<T: Element>(config: CacheConfig, heads: usize, queries: &[usize], options: Options) {
    let mut both = Both::<T>::new(config);
    let options = options.dtype(T::DTYPE);
    // The ring has given up nothing at first.
    for tokens in [[23, 20, 5], [120, 9, 0], [147, 0, 1]] {
        both.append(&tokens);
        for &queries in queries {
            let plain = Decode::new(heads, options).queries(queries);
            both.check(&plain);
            both.check(&plain.clone().tree_mask(TreeMask::PerSequence));
            both.check(&plain.sequences([2, 0]).tree_mask(TreeMask::Shared));
        }
    }
}

#[test]
fn alibi_and_trees_of_every_kind() {
    let sinks = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    decodes::<f32>(config::<f32>(CONTIGUOUS, 2, [16, 16]), 4, &[1, 2, 16], sinks.alibi(true));
    decodes::<f16>(config::<f16>(PAGED, 1, [64, 64]), 8, &[1, 5], sinks.alibi(true));
    decodes::<bf16>(config::<bf16>(PAGED, 1, [32, 48]), 3, &[1, 7], sinks.layout(sink_attention::Layout::Bhsd));
    decodes::<f32>(config::<f32>(ROLLING, 1, [24, 8]), 2, &[1, 3, 16], sinks.alibi(true));
    decodes::<f16>(config::<f16>(ROLLING, 2, [32, 32]), 4, &[1, 4], Options::new().causal(true).alibi(true));
}

#[test]
fn quantised_rows() {
    let of = |kind, widths| config::<f32>(kind, 1, widths).quantisation(Quantisation::Q8_0);
    let causal = Options::new().causal(true).alibi(true);
    decodes::<f32>(of(PAGED, [32, 40]), 4, &[1, 6], causal);
    decodes::<f32>(of(CONTIGUOUS, [64, 64]), 2, &[9], causal.sink_logits(SinkLogits::OffByOne));
}

/// Windows and sink tokens count by the positions of a tree. Without causality only the mask hides new tokens.
#[test]
fn what_queries_of_a_tree_see() {
    for options in [
        Options::new(),
        Options::new().alibi(true).scale(-0.7),
        Options::new().causal(true).window(Window::keys(3)).sink_tokens(2).alibi(true),
        Options::new().causal(true).window(Window::keys(20)).sink_tokens(150),
        Options::new().window(Window::new(9, 1)).softcap(1.5).alibi(true),
        Options::new().causal(true).window(Window::keys(1)).sink_logits(SinkLogits::PerHead),
    ] {
        decodes::<f32>(config::<f32>(CONTIGUOUS, 1, [8, 8]), 3, &[6], options);
    }
}

#[test]
fn largest_scores() {
    let mut both = Both::<f32>::new(config::<f32>(CONTIGUOUS, 1, [8, 8]));
    both.append(&[130, 9, 0]);
    let options = Options::new().causal(true).alibi(true).sink_logits(SinkLogits::PerHead);
    both.check_row_max(&Decode::new(2, options));
    both.check_row_max(&Decode::new(2, options.softcap(2.0)).queries(4).tree_mask(TreeMask::PerSequence));
}

#[test]
fn any_tiling_gives_the_same() {
    let mut both = Both::<f16>::new(config::<f16>(PAGED, 1, [32, 24]));
    both.append(&[290, 40, 0]);
    let options = Options::new().dtype(sink_attention::DType::F16).causal(true).alibi(true);
    for tiling in [
        "32x4 rows 1, steps 2 by 1, splits 1000",
        "64x16 rows 4, steps 4 by 4, splits 3",
        "128x32 rows 16, steps 1 by 1, splits 2",
        "32x32 rows 2, steps 8 by 2, splits 1",
    ] {
        let tiling: DecodeTiling = tiling.parse().unwrap();
        for queries in [1, 4] {
            let plain = Decode::new(5, options).queries(queries).tiling(tiling);
            both.check(&plain);
            both.check(&plain.tree_mask(TreeMask::PerSequence));
        }
    }
}

/// A host cache on each path, with the same tokens.
fn host_caches<T: Element>(config: &CacheConfig) -> Vec<HostCache<T>> {
    let cpu = Attention::open(&DeviceChoice::Cpu).unwrap();
    [Some(&cpu), gpu()].into_iter().flatten().map(|on| on.create_host_cache(config).unwrap()).collect()
}

/// New tokens that are hidden from a query may be no numbers: its results have the same bits.
fn hides<T: Element>(kind: CacheKind, widths: [usize; 2], alibi: bool) {
    hides_in(kind, widths, alibi, host_caches::<T>);
}

fn hides_in<T: Element>(
    kind: CacheKind,
    widths: [usize; 2],
    alibi: bool,
    caches: impl Fn(&CacheConfig) -> Vec<HostCache<T>>,
) {
    let [head_dim, value_dim] = widths;
    let (heads, kv_heads, queries, before) = (4, 2, 6, 45);
    let config = CacheConfig::new(kind, 1, kv_heads, head_dim).value_dim(value_dim).dtype(T::DTYPE);
    let mut rng = StdRng::seed_from_u64(3);
    let mut random = |len: usize| -> Vec<T> { (0..len).map(|_| T::from_f32(rng.random_range(-1.0..1.0))).collect() };
    let [k, v] = widths.map(|width| random((before + queries) * kv_heads * width));
    let q = random(queries * heads * head_dim);
    // Two chains, and a token that sees nothing new, not even itself.
    let mut words = TreeMask::of_parents(&[None, None, Some(0), Some(1), Some(2), None]).unwrap();
    words[5] = 0;
    let options = Options::new().causal(true).dtype(T::DTYPE).alibi(alibi);
    let decode = Decode::new(heads, options).queries(queries).tree_mask(TreeMask::Shared);
    let operands =
        DecodeOperands::default().tree_mask(&words[..]).alibi_slopes(alibi.then_some(&[0.5, 0.1, 0.0, -0.1][..]));
    let run = |cache: &mut HostCache<T>, k: &[T], v: &[T]| {
        cache.truncate(0, 0).unwrap();
        cache
            .append(&[before], &k[..before * kv_heads * head_dim], &v[..before * kv_heads * value_dim], None, None)
            .unwrap();
        cache
            .append(&[queries], &k[before * kv_heads * head_dim..], &v[before * kv_heads * value_dim..], None, None)
            .unwrap();
        let output = cache.decode(&decode, &q, &operands).unwrap();
        let bits = |query: usize| -> Vec<u32> {
            let o = output.o[query * heads * value_dim..][..heads * value_dim].iter().map(|x| x.to_f32().to_bits());
            o.chain((0..heads).map(|head| output.lse[head * queries + query].to_bits())).collect()
        };
        (0..queries).map(bits).collect::<Vec<_>>()
    };
    for cache in &mut caches(&config) {
        let plain = run(cache, &k, &v);
        assert!(plain.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{kind:?}");
        for token in 0..queries {
            for (of_key, bad) in [(true, f32::NAN), (false, f32::NAN), (true, f32::INFINITY), (false, f32::INFINITY)] {
                let [mut bad_k, mut bad_v] = [k.clone(), v.clone()];
                let (spoilt, width) = if of_key { (&mut bad_k, head_dim) } else { (&mut bad_v, value_dim) };
                spoilt[(before + token) * kv_heads * width..][..kv_heads * width].fill(T::from_f32(bad));
                let with = run(cache, &bad_k, &bad_v);
                for (query, (with, plain)) in with.iter().zip(&plain).enumerate() {
                    let sees = words[query] >> token & 1 == 1;
                    assert_eq!(with != plain, sees, "{kind:?} {} query {query}, {bad} in token {token}", T::DTYPE);
                }
            }
        }
    }
}

/// On fragments; for tests/gpu/fragments.rs.
pub fn hold_on_fragments(attention: &Attention, widths: [usize; 2]) {
    hides_in::<f16>(CONTIGUOUS, widths, true, |config| vec![attention.create_host_cache(config).unwrap()]);
}

#[test]
fn hidden_new_tokens_change_no_bit() {
    hides::<f32>(CONTIGUOUS, [16, 8], false);
    hides::<f16>(PAGED, [32, 32], true);
    hides::<bf16>(CONTIGUOUS, [16, 16], true);
    hides::<f32>(ROLLING, [16, 8], true);
}

/// Guesses after some tokens; some of them are kept, more are appended, and so on.
fn keeps<T: Element>(config: CacheConfig, lengths: [usize; 2]) {
    let mut both = Both::<T>::new(config);
    let options = Options::new().causal(true).dtype(T::DTYPE).alibi(true);
    let tree = Decode::new(2 * config.kv_heads, options).queries(5).tree_mask(TreeMask::PerSequence);
    let one = Decode::new(2 * config.kv_heads, options);
    both.append(&[lengths[0], lengths[1], 3]);
    for numbers in [&[1, 3][..], &[0, 2, 4], &[4], &[1], &[0, 1, 2, 3, 4], &[2, 3, 4]] {
        both.append(&[5, 5, 0]);
        both.check(&tree);
        for sequence in [0, 1] {
            let first = both.cpu.lengths()[sequence] - 5;
            both.keep(sequence, first, numbers).unwrap();
        }
        both.check(&one);
    }
}

#[test]
fn an_accepted_path_is_kept() {
    keeps::<f32>(config::<f32>(CONTIGUOUS, 2, [16, 8]), [30, 0]);
    // Within a page, and from one to the next.
    keeps::<f16>(config::<f16>(PAGED, 1, [16, 24]), [13, 33]);
    keeps::<bf16>(config::<bf16>(ROLLING, 1, [16, 16]), [100, 2]);
    keeps::<f32>(config::<f32>(PAGED, 1, [32, 64]).quantisation(Quantisation::Q8_0), [30, 14]);
}

/// A fork keeps another path than the sequence that it shares pages with.
#[test]
fn forks_keep_what_they_want() {
    let mut both = Both::<f32>::new(config::<f32>(PAGED, 1, [8, 8]));
    both.append(&[14, 0, 0]);
    both.append(&[5, 0, 0]);
    both.fork(0, 1).unwrap();
    both.fork(0, 2).unwrap();
    both.keep(1, 14, &[1, 3, 4]).unwrap();
    both.keep(2, 14, &[2]).unwrap();
    both.keep(0, 14, &[]).unwrap();
    let decode = Decode::new(1, Options::new());
    both.check(&decode);
    both.append(&[1, 1, 1]);
    both.check(&decode);
}

#[test]
fn what_cannot_be_kept() {
    let refused = |both: &mut Both<f32>, [sequence, first]: [usize; 2], numbers: &[usize], text: &str| {
        let lengths = both.cpu.lengths().to_vec();
        let error = both.keep(sequence, first, numbers).unwrap_err();
        assert!(error.contains(text), "{error}, expected: {text}");
        assert_eq!(both.cpu.lengths(), lengths);
        both.check(&Decode::new(1, Options::new()));
    };
    let mut both = Both::<f32>::new(config::<f32>(CONTIGUOUS, 1, [4, 4]));
    both.append(&[9, 0, 3]);
    refused(&mut both, [3, 0], &[0], "sequence 3 is out of range");
    refused(&mut both, [0, 10], &[], "cannot have the length 10, the most is 9");
    refused(&mut both, [0, 5], &[1, 1], "1 before 1; their numbers ascend");
    refused(&mut both, [0, 5], &[2, 0], "2 before 0; their numbers ascend");
    refused(&mut both, [0, 5], &[0, 4], "4; sequence 0 has 4 tokens from 5 on");
    refused(&mut both, [0, 0], &[usize::MAX], "sequence 0 has 9 tokens from 0 on");
    let mut both = Both::<f32>::new(config::<f32>(CONTIGUOUS, 1, [4, 4]).rotary(Rotary {
        dim: 4,
        style: RotaryStyle::HalfSplit,
        positions: RotaryPositions::Absolute,
    }));
    both.append(&[9, 0, 3]);
    refused(&mut both, [0, 5], &[0, 2], "so token 2 cannot become token 1");
    both.keep(0, 5, &[0, 1]).unwrap();
    // The ring has given up what would move, or what would come back.
    let ring = CacheKind::Rolling { sink_tokens: 2, window: 4, queries: 3 };
    let mut both = Both::<f32>::new(config::<f32>(ring, 1, [4, 4]));
    both.append(&[20, 0, 0]);
    refused(&mut both, [0, 13], &[1, 2, 3, 4, 5, 6], "cannot go back to 13 tokens, the least is 14");
    refused(&mut both, [0, 17], &[], "cannot go back to 17 tokens, the least is 18");
    both.keep(0, 17, &[2]).unwrap();
    both.check(&Decode::new(1, Options::new()));
    // Two free pages do not do for copies of three shared ones.
    let pages = CacheKind::Paged { page_size: 16, pages: 5, sequence_pages: 4 };
    let mut both = Both::<f32>::new(config::<f32>(pages, 1, [4, 4]));
    both.append(&[40, 0, 0]);
    both.fork(0, 1).unwrap();
    let all: Vec<usize> = (1..40).collect();
    refused(&mut both, [0, 0], &all, "the cache needs 3 pages more, 2 of its 5 are free");
    both.keep(0, 20, &all[..18]).unwrap();
    both.check(&Decode::new(1, Options::new()));
}

fn says<T>(result: Result<T, Error>, text: &str) {
    match result {
        Ok(_) => panic!("no error, expected: {text}"),
        Err(error) => assert!(error.to_string().contains(text), "{error}, expected: {text}"),
    }
}

#[test]
fn mistakes() {
    let config = CacheConfig::new(CONTIGUOUS, 2, 1, 4);
    let plain = Decode::new(2, Options::new().causal(true)).queries(3);
    let alibi = Decode::new(2, Options::new().alibi(true)).queries(3);
    let [shared, own] = [TreeMask::Shared, TreeMask::PerSequence].map(|mask| plain.clone().tree_mask(mask));
    let none = DecodeOperands::default();
    for cache in &mut host_caches::<f32>(&config) {
        let decode = |decode: &Decode, operands: DecodeOperands<'_>, text: &str| {
            says(cache.decode(decode, &[0.0; 2 * 3 * 2 * 4], &operands), text);
        };
        decode(&shared, none, "tree_mask, but none was given");
        decode(
            &plain,
            none.tree_mask(&[1, 3, 7][..]),
            "tree_mask was given, but the options do not use it: set Decode::tree_mask",
        );
        decode(&shared, none.tree_mask(&[1; 6][..]), "tree_mask has 6 elements, its shape [1, 3] needs 3");
        decode(&own, none.tree_mask(&[1; 3][..]), "tree_mask has 3 elements, its shape [2, 3] needs 6");
        decode(&own.clone().queries(17), none, "queries is 17, the most is 16");
        decode(&alibi, none, "alibi_slopes, but none was given");
        decode(
            &plain,
            none.alibi_slopes(&[0.5; 2][..]),
            "alibi_slopes was given, but the options do not use it: set Options::alibi",
        );
        decode(&alibi, none.alibi_slopes(&[0.5; 3][..]), "alibi_slopes has 3 elements, its shape [2] needs 2");
    }
    let rotary = |positions| Rotary { dim: 4, style: RotaryStyle::Interleaved, positions };
    let absolute = config.rotary(rotary(RotaryPositions::Absolute));
    let ring = CacheKind::Rolling { sink_tokens: 2, window: 8, queries: 1 };
    let relative = config.kind(ring).rotary(rotary(RotaryPositions::CacheRelative));
    let table = rotary_table(&rotary(RotaryPositions::CacheRelative), 9);
    for cache in &host_caches::<f32>(&absolute) {
        let words = none.tree_mask(&[1, 3, 7][..]);
        let text = "appends to this cache rotate new tokens by their places, not by their depths in a tree";
        says(cache.decode(&shared.clone().q_rotated(true), &[0.0; 48], &words), text);
    }
    for cache in &host_caches::<f32>(&relative) {
        let operands = none.cos_sin(&table[..]);
        let text = "this cache rotates keys by their places as they are read";
        says(cache.decode(&alibi.clone().queries(1), &[0.0; 16], &operands.alibi_slopes(&[0.5; 2][..])), text);
    }

    let Some((attention, device)) = gpu().and_then(|gpu| Some((gpu, gpu.device()?))) else { return };
    let cache = attention.create_cache(&config).unwrap();
    let [q, o, lse, slopes] = [48, 48, 12, 2].map(|len| filled(device, &vec![0f32; len]));
    let words = device.upload("tree_mask", &[1u32, 3, 7]).unwrap();
    let buffers = DecodeBuffers::new(&q, &o, &lse);
    let prepare =
        |decode: &Decode, buffers: DecodeBuffers<'_>, text: &str| says(cache.prepare_decode(decode, &buffers), text);
    prepare(&shared, buffers, "tree_mask, but none was given");
    prepare(
        &plain,
        buffers.tree_mask(TensorView::from(&words)),
        "tree_mask was given, but the options do not use it: set Decode::tree_mask",
    );
    prepare(&own, buffers.tree_mask(TensorView::from(&words)), "buffer of tree_mask has");
    prepare(&shared, buffers.tree_mask(TensorView::from(&words).offset(2)), "buffer of tree_mask has");
    prepare(&shared, buffers.tree_mask(TensorView::from(&words).strides([3, 3, 1])), "must be densely packed");
    let floats = device.upload("floats", &[1f32, 3.0, 7.0]).unwrap();
    prepare(&shared, buffers.tree_mask(TensorView::from(&floats)), "u32");
    prepare(&shared, buffers.tree_mask(TensorView::new(&o)), "o shares its buffer with tree_mask");
    prepare(&alibi, buffers, "alibi_slopes, but none was given");
    prepare(
        &plain,
        buffers.alibi_slopes(TensorView::new(&slopes)),
        "alibi_slopes was given, but the options do not use it: set Options::alibi",
    );
    prepare(&alibi, buffers.alibi_slopes(TensorView::new(&lse)), "lse shares its buffer with alibi_slopes");
    // Nothing hides from one query, but the planner's kernel for several is the one with a mask.
    let cooperative: DecodeTiling = "cooperative rows 8, columns 1, ahead 1, splits 1".parse().unwrap();
    let one = plain.clone().queries(1).tree_mask(TreeMask::Shared).tiling(cooperative);
    let refused = cache.prepare_decode(&one, &buffers.tree_mask(TensorView::from(&words)));
    assert!(matches!(refused, Err(Error::NoKernel { .. })), "{refused:?}");
}

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
    for cache in &mut host_caches::<T>(&config) {
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

#[test]
fn hidden_new_tokens_change_no_bit() {
    hides::<f32>(CONTIGUOUS, [16, 8], false);
    hides::<f16>(PAGED, [32, 32], true);
    hides::<bf16>(CONTIGUOUS, [16, 16], true);
    hides::<f32>(ROLLING, [16, 8], true);
}

/// Two guesses after a token, of which the second is taken: its tokens are appended again, behind what was there before the guesses.
#[test]
fn an_accepted_path_is_appended_again() {
    let config = CacheConfig::new(CONTIGUOUS, 1, 1, 4);
    let mut rng = StdRng::seed_from_u64(5);
    let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let [k, v, q] = [random(4 * 34), random(4 * 34), random(2 * 4 * 4)];
    let rows = |x: &[f32], rows: &[usize]| rows.iter().flat_map(|row| x[4 * row..][..4].to_vec()).collect::<Vec<_>>();
    let options = Options::new().causal(true).alibi(true);
    let operands = DecodeOperands::default().alibi_slopes(&[0.4, 0.05][..]);
    for cache in &mut host_caches::<f32>(&config) {
        cache.append(&[34], &k, &v, None, None).unwrap();
        let words = TreeMask::of_parents(&[None, None, Some(0), Some(1)]).unwrap();
        let tree = Decode::new(2, options).queries(4).tree_mask(TreeMask::Shared);
        let guesses = cache.decode(&tree, &q, &operands.tree_mask(&words[..])).unwrap();
        cache.truncate(0, 30).unwrap();
        cache.append(&[2], &rows(&k, &[31, 33]), &rows(&v, &[31, 33]), None, None).unwrap();
        let accepted: Vec<f32> = [1, 3].iter().flat_map(|query| q[8 * query..][..8].to_vec()).collect();
        let chain = cache.decode(&Decode::new(2, options).queries(2), &accepted, &operands).unwrap();
        for (n, query) in [1, 3].into_iter().enumerate() {
            for i in 0..8 {
                let [a, b] = [guesses.o[8 * query + i], chain.o[8 * n + i]];
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
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
        decode(&shared, none.tree_mask(&[1; 6][..]), "tree_mask has 6 elements, shape [1, 3] needs 3");
        decode(&own, none.tree_mask(&[1; 3][..]), "tree_mask has 3 elements, shape [2, 3] needs 6");
        decode(&own.clone().queries(17), none, "queries is 17, the most is 16");
        decode(&alibi, none, "alibi_slopes, but none was given");
        decode(
            &plain,
            none.alibi_slopes(&[0.5; 2][..]),
            "alibi_slopes was given, but the options do not use it: set Options::alibi",
        );
        decode(&alibi, none.alibi_slopes(&[0.5; 3][..]), "alibi_slopes has 3 elements, shape [2] needs 2");
    }
    let rotary = |positions| Rotary { dim: 4, style: RotaryStyle::HalfSplit, positions };
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
    prepare(&own, buffers.tree_mask(TensorView::from(&words)), "buffer of tree_mask has 12 bytes");
    prepare(&shared, buffers.tree_mask(TensorView::from(&words).offset(1)), "buffer of tree_mask has 12 bytes");
    prepare(&shared, buffers.tree_mask(TensorView::from(&words).strides([3, 3, 1])), "tree_mask");
    let floats = device.upload("floats", &[1f32, 3.0, 7.0]).unwrap();
    prepare(&shared, buffers.tree_mask(TensorView::from(&floats)), "tree_mask");
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

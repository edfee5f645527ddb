//! Caches on the GPU and on the CPU against the dense reference.

use crate::common::caches::{Both, append_on, config, decode_on, filled, read, rotary_table, step_on, submit, turned};
use crate::common::{compare, gpu, with_others};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sink_attention::cache::{
    AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeOperands, Prefill, Quantisation, Rotary,
    RotaryFrequencies, RotaryPositions, RotaryScaling, RotaryStyle, Yarn,
};
use sink_attention::half::{bf16, f16};
use sink_attention::{
    DType, Element, Error, ForwardBuffers, Layout, Lengths, Options, Problem, Shape, SinkLogits, Window, cpu,
};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 300 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 60, sequence_pages: 20 };
const LARGE_PAGES: CacheKind = CacheKind::Paged { page_size: 64, pages: 20, sequence_pages: 5 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 37, queries: 4 };

/// Ragged lengths, an empty sequence among them, in several appends, with decoding in between.
fn grows<T: Element>(config: CacheConfig, heads: usize, options: Options) {
    let options = options.dtype(T::DTYPE);
    let mut both = Both::<T>::new(config);
    for tokens in [[0, 1, 5], [17, 0, 1], [130, 1, 40], [0, 0, 0], [1, 1, 1], [3, 64, 2]] {
        both.append(&tokens);
        both.check(&Decode::new(heads, options));
    }
    let several = Decode::new(heads, options).queries(3);
    for decode in
        with_others([several.clone().sequences([2, 0])], [several, Decode::new(heads, options).sequences([2, 0])])
    {
        both.check(&decode);
    }
}

#[test]
fn ragged_lengths_of_every_kind() {
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    grows::<f32>(config::<f32>(CONTIGUOUS, 2, [16, 16]), 4, options);
    grows::<f16>(config::<f16>(PAGED, 2, [64, 64]), 16, options);
    grows::<bf16>(config::<bf16>(LARGE_PAGES, 1, [32, 48]), 3, options.layout(Layout::Bhsd));
    grows::<f16>(config::<f16>(ROLLING, 2, [32, 32]), 4, options);
}

#[test]
fn every_element_type_of_a_rolling_cache() {
    grows::<f32>(config::<f32>(ROLLING, 1, [24, 8]), 2, Options::new());
    grows::<bf16>(config::<bf16>(ROLLING, 1, [16, 16]), 1, Options::new().sink_logits(SinkLogits::OffByOne));
}

#[test]
fn quantised_rows() {
    let quantisation = Some(Quantisation::Q8_0);
    let rotary = rotary(40, RotaryStyle::HalfSplit, RotaryPositions::Absolute);
    let options = Options::new().causal(true);
    grows::<f32>(config::<f32>(CONTIGUOUS, 2, [64, 64]).quantisation(quantisation), 8, options);
    grows::<f32>(config::<f32>(ROLLING, 1, [40, 33]).quantisation(quantisation).rotary(rotary), 2, options);
    grows::<f16>(config::<f16>(PAGED, 1, [96, 5]).quantisation(quantisation), 1, options);
    // Scales of more than eight blocks.
    let mut both = Both::<bf16>::new(config::<bf16>(LARGE_PAGES, 1, [300, 260]).quantisation(quantisation));
    both.append(&[70, 0, 1]);
    both.check(&Decode::new(2, options.dtype(DType::Bf16)));
}

/// Scales of every size that f16 has come back; larger numbers, and those that are none, spoil their block alone.
#[test]
fn sizes_of_quantised_numbers() {
    let quantisation = Some(Quantisation::Q8_0);
    let config = config::<f32>(CONTIGUOUS, 1, [4, 64]).sequences(1).quantisation(quantisation);
    let mut on_cpu = cpu::KvCache::new(&config).unwrap();
    for (size, whole) in [
        (1.0, true),
        (1e-3, true),
        (2e-5, true),
        (0.0, true),
        (8.3e6, true),
        (9e6, false),
        (f32::INFINITY, false),
        (f32::NAN, false),
    ] {
        let mut value: Vec<f32> = (0..64).map(|n| (n % 32) as f32 / 31.0).collect();
        value[..32].iter_mut().for_each(|x| *x *= size);
        let decode = Decode::new(1, Options::new());
        on_cpu.truncate(0, 0).unwrap();
        on_cpu.append(&[1], &[0.0; 4], &value, None, None).unwrap();
        let mut outputs = vec![on_cpu.decode(&decode, &[1.0; 4], &DecodeOperands::default()).unwrap().o];
        if let Some(attention) = gpu() {
            let device = attention.device().unwrap();
            let mut cache = attention.create_cache(&config).unwrap();
            append_on(device, &mut cache, &[1], &[0.0; 4], &value, None).unwrap();
            outputs.push(decode_on(device, &cache, &decode, &[1.0; 4], [64, 1], &DecodeOperands::default()).unwrap().o);
        }
        for o in outputs {
            for (n, (o, value)) in o.iter().zip(&value).enumerate() {
                let step = if n < 32 { size } else { 1.0 } / 254.0;
                match whole || n >= 32 {
                    // Half a step, and half a unit of the smallest scale for each of them.
                    true => {
                        assert!((o - value).abs() <= step * 1.01 + 127.0 * 2f32.powi(-25), "{size}: {n} {o} {value}")
                    }
                    false => assert!(o.is_nan(), "{size}: {n} {o}"),
                }
            }
        }
    }
}

#[test]
fn narrow_and_uneven_widths() {
    grows::<f32>(config::<f32>(PAGED, 1, [1, 1]), 1, Options::new());
    grows::<f16>(config::<f16>(CONTIGUOUS, 2, [5, 7]), 6, Options::new().causal(true));
    grows::<bf16>(config::<bf16>(ROLLING, 2, [9, 3]), 2, Options::new().causal(true));
}

#[test]
fn wide_heads() {
    // One sequence: these kernels take long to build in software.
    fn once<T: Element>(kind: CacheKind, widths: [usize; 2], heads: usize) {
        let mut both = Both::<T>::new(config::<T>(kind, 1, widths).sequences(1));
        both.append(&[75]);
        both.check(&Decode::new(heads, Options::new().dtype(T::DTYPE)));
    }
    once::<f16>(CONTIGUOUS, [128, 128], 4);
    once::<f32>(PAGED, [80, 40], 20);
    once::<f16>(ROLLING, [256, 256], 8);
    once::<f32>(LARGE_PAGES, [256, 72], 2);
    once::<bf16>(CONTIGUOUS, [512, 8], 2);
}

#[test]
fn what_queries_see() {
    let mut both = Both::<f32>::new(config::<f32>(CONTIGUOUS, 1, [8, 8]));
    both.append(&[290, 40, 3]);
    for options in [
        Options::new(),
        Options::new().causal(true).scale(-0.7),
        Options::new().window(Window::keys(20)).sink_tokens(5),
        Options::new().window(Window::keys(100)).sink_tokens(70).softcap(2.0),
        Options::new().window(Window::new(9, 1)).sink_logits(SinkLogits::OffByOne),
        Options::new().window(Window::left(30)).sink_tokens(300),
        Options::new().window(Window::keys(1)),
    ] {
        for queries in [1, 2, 16] {
            both.check(&Decode::new(3, options).queries(queries));
        }
    }
}

#[test]
fn any_tiling_gives_the_same() {
    let mut both = Both::<f16>::new(config::<f16>(PAGED, 1, [32, 24]));
    both.append(&[290, 40, 0]);
    for tiling in [
        "32x4 rows 1, steps 2 by 1, splits 1000",
        "64x16 rows 4, steps 4 by 4, splits 3",
        "128x32 rows 16, steps 1 by 1, splits 2",
        "32x32 rows 2, steps 8 by 2, splits 1",
    ] {
        let tiling = Some(tiling.parse().unwrap());
        both.check(&Decode::new(5, Options::new().dtype(DType::F16)).tiling(tiling));
    }
    for text in [
        "",
        "32x4 rows 1, steps 2 by 1",
        "32x4 rows 1, steps 2 by 1, splits x",
        "99999999999999x1 rows 1, steps 2 by 1, splits 1",
    ] {
        assert!(text.parse::<sink_attention::cache::DecodeTiling>().is_err(), "{text}");
    }
    let (Some(cache), Some(device)) = (&both.gpu, gpu().and_then(|gpu| gpu.device())) else { return };
    for unfit in [
        "32x3 rows 1, steps 2 by 1, splits 1",
        "32x64 rows 1, steps 2 by 1, splits 1",
        "32x8 rows 17, steps 2 by 1, splits 1",
        "32x8 rows 1, steps 3 by 1, splits 1",
        "32x8 rows 1, steps 2 by 4, splits 1",
        "32x8 rows 1, steps 2 by 2, splits 0",
        "128x4 rows 1, steps 8 by 2, splits 1",
        "1024x4 rows 16, steps 1 by 1, splits 1",
    ] {
        let decode = Decode::new(5, Options::new().dtype(DType::F16))
            .tiling(unfit.parse::<sink_attention::cache::DecodeTiling>().unwrap());
        let q = vec![f16::ZERO; 3 * 5 * 32];
        let error = decode_on(device, cache, &decode, &q, [3 * 5 * 24, 15], &DecodeOperands::default()).unwrap_err();
        assert!(matches!(error, Error::NoKernel { .. }) && error.to_string().contains(unfit), "{unfit}: {error}");
    }
}

#[test]
fn a_ring_gives_up_all_but_the_sinks() {
    for (sink_tokens, window) in [(2, 1), (0, 5), (20, 16)] {
        let kind = CacheKind::Rolling { sink_tokens, window, queries: 1 };
        let mut both = Both::<f32>::new(config::<f32>(kind, 1, [8, 8]));
        for tokens in [[1, 2, 0], [1, 90, 1], [1, 1, 1], [39, 1, 1]] {
            both.append(&tokens);
            both.check(&Decode::new(1, Options::new()));
        }
    }
}

#[test]
fn a_ring_takes_back_what_was_speculated() {
    let mut both = Both::<f32>::new(config::<f32>(ROLLING, 1, [8, 8]));
    both.append(&[100, 100, 30]);
    for (sequence, length) in [(0, 97), (1, 99), (2, 20)] {
        both.truncate(sequence, length).unwrap();
    }
    both.check(&Decode::new(2, Options::new().causal(true)));
    both.append(&[2, 3, 0]);
    both.check(&Decode::new(2, Options::new().causal(true)).queries(2));
    let error = both.truncate(0, 96).unwrap_err();
    assert!(error.contains("cannot go back to 96 tokens, the least is 97"), "{error}");
    both.truncate(0, 0).unwrap();
    both.append(&[3, 0, 0]);
    both.check(&Decode::new(2, Options::new().causal(true)));
    // Narrower than the cache, with fewer sink tokens.
    both.check(&Decode::new(2, Options::new().window(Window::keys(10)).sink_tokens(2)).queries(4));
}

fn rotary(dim: u32, style: RotaryStyle, positions: RotaryPositions) -> Option<Rotary> {
    Some(Rotary { dim, style, positions })
}

#[test]
fn keys_are_rotated_as_they_are_appended() {
    use RotaryPositions::Absolute;
    let cases = [
        (CONTIGUOUS, 16, rotary(16, RotaryStyle::HalfSplit, Absolute)),
        (PAGED, 20, rotary(14, RotaryStyle::HalfSplit, Absolute)),
        (ROLLING, 16, rotary(10, RotaryStyle::Interleaved, Absolute)),
    ];
    for (kind, width, rotary) in cases {
        let options = Options::new().causal(true);
        grows::<f32>(config::<f32>(kind, 2, [width, 8]).rotary(rotary), 2, options);
        let mut both = Both::<f16>::new(config::<f16>(kind, 1, [width + 1, 8]).rotary(rotary));
        both.append(&[20, 0, 1]);
        both.check(&Decode::new(2, options.dtype(DType::F16)));
    }
}

#[test]
fn keys_are_rotated_as_they_are_read() {
    use RotaryPositions::CacheRelative;
    let kind = CacheKind::Rolling { sink_tokens: 4, window: 21, queries: 1 };
    let cases = [
        (32, rotary(32, RotaryStyle::HalfSplit, CacheRelative)),
        (40, rotary(16, RotaryStyle::HalfSplit, CacheRelative)),
        (16, rotary(6, RotaryStyle::Interleaved, CacheRelative)),
    ];
    for (width, rotary) in cases {
        let mut both = Both::<f32>::new(config::<f32>(kind, 1, [width, 8]).rotary(rotary));
        let mut half = Both::<bf16>::new(config::<bf16>(kind, 1, [width, 8]).rotary(rotary));
        for tokens in [[3, 25, 0], [30, 1, 1], [1, 1, 1]] {
            both.append(&tokens);
            both.check(&Decode::new(2, Options::new()));
            half.append(&tokens);
            half.check(&Decode::new(2, Options::new().dtype(DType::Bf16)));
        }
    }
}

/// The table of a model that another implementation has recorded, YaRN's: `examples/gpt_oss_layer`.
#[test]
fn yarn_is_as_recorded() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpt_oss_tiny");
    let file = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    let recorded = |name| bytemuck::pod_collect_to_vec::<u8, f32>(file.tensor(name).unwrap().data());
    let (cos, sin) = (recorded("rope_cos"), recorded("rope_sin"));
    let expected: Vec<f32> = cos.chunks(16).zip(sin.chunks(16)).flat_map(|(cos, sin)| [cos, sin].concat()).collect();
    // As in its config.json.
    let yarn = Yarn::new(8.0, 512.0).truncate(false);
    let frequencies = RotaryFrequencies::new(150_000.0).scaling(RotaryScaling::Yarn(yarn));
    compare(&frequencies.table(32, 75).unwrap(), &expected, 1e-6).unwrap();
    for other in [yarn.truncate(true), yarn.attention_factor(1.0), Yarn::new(4.0, 512.0).truncate(false)] {
        let frequencies = frequencies.scaling(RotaryScaling::Yarn(other));
        assert!(compare(&frequencies.table(32, 75).unwrap(), &expected, 1e-4).is_err(), "{other:?}");
    }
}

/// q in the same pass, on both devices.
fn rotates_q<T: Element>(kind: CacheKind, width: usize, rotary: Rotary, places: [usize; 4], bound: f64) {
    let config = config::<T>(kind, 1, [width, 4]).rotary(rotary).sequences(2);
    let table = rotary_table(&rotary, 100);
    let relative = rotary.positions == RotaryPositions::CacheRelative;
    let numbers = |n: usize| T::narrow((0..n).map(|n| ((n * 37 % 101) as f32 - 50.0) / 30.0).collect());
    let (heads, tokens) = (3, [3, 1]);
    let (k, v, q) = (numbers(4 * width), numbers(4 * 4), numbers(4 * heads * width));
    let wide: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
    let expected: Vec<f32> =
        wide.chunks(width).enumerate().flat_map(|(row, q)| turned(q, &rotary, &table, places[row / heads])).collect();
    let first = [numbers(20 * width), numbers(20 * 4)];

    let mut on_cpu = cpu::KvCache::<T>::new(&config).unwrap();
    on_cpu.append(&[20, 0], &first[0], &first[1], None, Some(&table).filter(|_| !relative).map(|t| &t[..])).unwrap();
    let mut turned_q = q.clone();
    on_cpu.append(&tokens, &k, &v, Some(&mut turned_q), Some(&table)).unwrap();
    compare(&turned_q, &expected, bound).unwrap();

    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let mut cache = attention.create_cache(&config).unwrap();
    append_on(device, &mut cache, &[20, 0], &first[0], &first[1], Some(&table).filter(|_| !relative).map(|t| &t[..]))
        .unwrap();
    let [k, v, q] = [k, v, q].map(|x| filled(device, &x));
    let cos_sin = filled(device, &table);
    let buffers = AppendBuffers::new(&k, &v).q(((&q).into(), heads)).cos_sin(&cos_sin);
    let append = cache.prepare_append(&tokens, &buffers).unwrap();
    submit(device, |step| append.encode(&mut cache, step).unwrap());
    compare(&read::<T>(device, &q, 4 * heads * width), &expected, bound).unwrap();
}

#[test]
fn queries_are_rotated_in_the_same_pass() {
    let of = |dim, style, positions| Rotary { dim, style, positions };
    let absolute = [20, 21, 22, 0];
    let halves = of(16, RotaryStyle::HalfSplit, RotaryPositions::Absolute);
    rotates_q::<f32>(CONTIGUOUS, 16, halves, absolute, 1e-6);
    // Rows of an odd width: two threads write halves of one word.
    rotates_q::<f16>(PAGED, 17, halves, absolute, 1e-3);
    rotates_q::<f32>(PAGED, 21, of(10, RotaryStyle::HalfSplit, RotaryPositions::Absolute), absolute, 1e-6);
    rotates_q::<bf16>(ROLLING, 8, of(8, RotaryStyle::Interleaved, RotaryPositions::Absolute), absolute, 5e-3);
    let ring = CacheKind::Rolling { sink_tokens: 4, window: 10, queries: 1 };
    let relative = of(16, RotaryStyle::HalfSplit, RotaryPositions::CacheRelative);
    rotates_q::<f32>(ring, 16, relative, [13, 13, 13, 0], 1e-6);
}

#[test]
fn what_is_hidden_may_be_nan() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let config = config::<f32>(CONTIGUOUS, 1, [4, 4]).sequences(1);
    let mut cache = attention.create_cache(&config).unwrap();
    let [one, nan] = [[1f32; 4], [f32::NAN; 4]];
    let append = |cache: &mut _, rows: &[[f32; 4]]| {
        append_on(device, cache, &[rows.len()], rows.as_flattened(), rows.as_flattened(), None).unwrap();
    };
    append(&mut cache, &[one; 20]);
    append(&mut cache, &[nan; 9]);
    submit(device, |step| cache.truncate(step, 0, 20).unwrap());
    let decode = Decode::new(1, Options::new().causal(true));
    let output = decode_on(device, &cache, &decode, &one, [4, 1], &DecodeOperands::default()).unwrap();
    assert_eq!(output.o, one, "behind the end");

    // The second query sees the NaN, the first does not.
    append(&mut cache, &[one, nan]);
    let output =
        decode_on(device, &cache, &decode.clone().queries(2), &[1.0; 8], [8, 2], &DecodeOperands::default()).unwrap();
    assert_eq!(output.o[..4], one, "a key of the next query's");
    assert!(output.o[4..].iter().all(|x| x.is_nan()));
    append(&mut cache, &[one; 3]);
    let windowed = Decode::new(1, Options::new().window(Window::keys(3)).sink_tokens(2));
    let output = decode_on(device, &cache, &windowed, &one, [4, 1], &DecodeOperands::default()).unwrap();
    assert_eq!(output.o, one, "outside of the window");
}

#[test]
fn forks_share_pages_until_they_part() {
    let mut both = Both::<f32>::new(config::<f32>(PAGED, 1, [8, 8]));
    both.append(&[40, 0, 0]);
    assert_eq!(both.cpu.free_pages(), 57);
    both.fork(0, 1).unwrap();
    both.fork(0, 2).unwrap();
    assert_eq!(both.cpu.free_pages(), 57);
    assert_eq!(both.cpu.pages(0), both.cpu.pages(2));
    // Two of the three write to the page that all share: it is copied twice.
    both.append(&[0, 1, 30]);
    assert_eq!(both.cpu.free_pages(), 57 - 2 - 2);
    assert_eq!(both.cpu.pages(0)[..2], both.cpu.pages(1)[..2]);
    both.check(&Decode::new(2, Options::new()));
    both.truncate(2, 0).unwrap();
    both.append(&[1, 0, 5]);
    both.check(&Decode::new(2, Options::new()));
    both.fork(1, 1).unwrap();
    both.check(&Decode::new(2, Options::new()));
}

#[test]
fn other_kinds_fork_by_copies() {
    for kind in [CONTIGUOUS, ROLLING] {
        let mut both = Both::<f16>::new(config::<f16>(kind, 2, [8, 8]));
        both.append(&[70, 3, 0]);
        both.fork(0, 2).unwrap();
        both.append(&[1, 0, 2]);
        both.check(&Decode::new(2, Options::new().dtype(DType::F16)));
    }
}

#[test]
fn large_blocks_are_copied_in_pieces() {
    // 5 MiB a sequence, of which the last token lies behind the fourth.
    let kind = CacheKind::Contiguous { capacity: 20_000 };
    let mut both = Both::<f32>::new(config::<f32>(kind, 1, [64, 64]));
    both.append(&[17_000, 0, 0]);
    both.fork(0, 2).unwrap();
    both.check(&Decode::new(1, Options::new().window(Window::keys(5))).sequences([2]));
}

#[test]
fn pages_of_the_callers_choice() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let config = config::<f32>(PAGED, 1, [4, 4]).sequences(2);
    let mut cache = attention.create_cache(&config).unwrap();
    submit(device, |step| cache.assign(step, 0, &[50, 3], 0).unwrap());
    let rows: Vec<f32> = (0..80).map(|n| (n / 4) as f32).collect();
    append_on(device, &mut cache, &[20, 0], &[0.0; 80], &rows, None).unwrap();
    assert_eq!(cache.pages(0), [50, 3]);
    assert_eq!(cache.free_pages(), 58);
    // The second page alone, with the tokens 16 to 19.
    submit(device, |step| cache.assign(step, 1, &[3], 4).unwrap());
    let decode = Decode::new(1, Options::new());
    let output = decode_on(device, &cache, &decode, &[1.0; 8], [8, 2], &DecodeOperands::default()).unwrap();
    compare(&output.o, &[9.5, 9.5, 9.5, 9.5, 17.5, 17.5, 17.5, 17.5], 1e-6).unwrap();

    let mut step = step_on(device);
    let error = cache.assign(&mut step, 0, &[60], 1).unwrap_err();
    assert!(matches!(error, Error::PageOutOfRange { page: 60, pages: 60 }), "{error}");
    let error = cache.assign(&mut step, 0, &[1], 17).unwrap_err();
    assert!(matches!(error, Error::CacheLength { sequence: 0, length: 17, most: 16 }), "{error}");
    let error = cache.assign(&mut step, 2, &[1], 1).unwrap_err();
    assert!(matches!(error, Error::SequenceOutOfRange { sequence: 2, sequences: 2 }), "{error}");
    assert_eq!(cache.pages(0), [50, 3]);
}

#[test]
fn many_tokens_in_one_step() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    for kind in [CONTIGUOUS, PAGED, CacheKind::Rolling { sink_tokens: 1, window: 6, queries: 1 }] {
        let config = config::<f32>(kind, 1, [4, 4]).sequences(2);
        let mut cache = attention.create_cache(&config).unwrap();
        let mut on_cpu = cpu::KvCache::new(&config).unwrap();
        let k: Vec<f32> = (0..8).map(|n| n as f32 / 5.0).collect();
        let [kv, q, o, lse] = [&k[..], &[0.5; 8], &[0.0; 8], &[0.0; 2]].map(|x| filled(device, x));
        let v = filled(device, &k);
        let append = cache.prepare_append(&[1, 1], &AppendBuffers::new(&kv, &v)).unwrap();
        let decode = Decode::new(1, Options::new().sink_logits(SinkLogits::OffByOne));
        let prepared = cache.prepare_decode(&decode, &DecodeBuffers::new(&q, &o, &lse)).unwrap();
        submit(device, |step| {
            for _ in 0..35 {
                append.encode(&mut cache, step).unwrap();
                prepared.encode(&cache, step).unwrap();
            }
        });
        for _ in 0..35 {
            on_cpu.append(&[1, 1], &k, &k, None, None).unwrap();
        }
        assert_eq!(cache.lengths(), [35, 35]);
        let expected = on_cpu.decode(&decode, &[0.5; 8], &DecodeOperands::default()).unwrap();
        compare(&read::<f32>(device, &o, 8), &expected.o, 1e-6).unwrap();
    }
}

/// A contiguous cache is an operand of the forward pass: a prompt in chunks.
#[test]
fn prompts_in_chunks_by_the_forward_pass() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let config = config::<f32>(CacheKind::Contiguous { capacity: 64 }, 1, [8, 8]).sequences(2);
    let mut cache = attention.create_cache(&config).unwrap();
    let mut on_cpu = cpu::KvCache::new(&config).unwrap();
    let numbers = |n: usize| (0..n).map(|n| ((n * 53 % 97) as f32 - 48.0) / 40.0).collect::<Vec<_>>();
    for tokens in [[30, 16], [16, 16]] {
        let (k, v) = (numbers(tokens.iter().sum::<usize>() * 8), numbers(tokens.iter().sum::<usize>() * 8));
        append_on(device, &mut cache, &tokens, &k, &v, None).unwrap();
        on_cpu.append(&tokens, &k, &v, None, None).unwrap();
    }
    let shape = Shape { batch: 2, heads: 2, kv_heads: 1, seq_q: 16, seq_k: 64, head_dim: 8, value_dim: 8 };
    let used: Vec<u32> = cache.lengths().iter().map(|n| *n as u32).collect();
    let options = Options::new().causal(true);
    let problem = Problem::with_lengths(shape, options, Lengths::Used { q: None, k: Some(&used) }).unwrap();
    let [q, o, lse] = [numbers(2 * 16 * 2 * 8), vec![0.0; 2 * 16 * 2 * 8], vec![0.0; 64]].map(|x| filled(device, &x));
    let [k, v] = cache.views().unwrap();
    let forward = attention.prepare_forward(&problem, &ForwardBuffers::new(&q, k, v, &o, &lse)).unwrap();
    submit(device, |step| forward.encode(step.encoder()));
    let decode = Decode::new(2, options).queries(16);
    let expected = on_cpu.decode(&decode, &numbers(2 * 16 * 2 * 8), &DecodeOperands::default()).unwrap();
    compare(&read::<f32>(device, &o, 512), &expected.o, 1e-5).unwrap();
    compare(&read::<f32>(device, &lse, 64), &expected.lse, 1e-5).unwrap();
}

/// What may happen to a cache.
#[derive(Debug, Clone)]
enum Step {
    Append([usize; 3]),
    Prefill([usize; 3]),
    Truncate(usize, usize),
    Fork(usize, usize),
    Decode(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tokens = || prop_oneof![2 => Just(0usize), 3 => Just(1), 2 => 2usize..20, 1 => 20usize..70];
    let step = prop_oneof![
        3 => [tokens(), tokens(), tokens()].prop_map(Step::Append),
        2 => [tokens(), tokens(), tokens()].prop_map(Step::Prefill),
        1 => (0usize..4, 0usize..80).prop_map(|(sequence, length)| Step::Truncate(sequence, length)),
        1 => (0usize..4, 0usize..4).prop_map(|(from, to)| Step::Fork(from, to)),
        3 => (1usize..=3).prop_map(Step::Decode),
    ];
    proptest::collection::vec(step, 1..14)
}

/// Tokens that were taken back have cost a ring its oldest keys: as many queries fewer find their windows whole.
#[test]
fn queries_after_tokens_were_taken_back() {
    let kind = CacheKind::Rolling { sink_tokens: 2, window: 13, queries: 3 };
    let mut both = Both::<f32>::new(config::<f32>(kind, 1, [8, 8]));
    both.append(&[40, 16, 40]);
    both.truncate(0, 38).unwrap();
    // Its ring has not gone round.
    both.truncate(1, 3).unwrap();
    let decode = |queries| Decode::new(2, Options::new().causal(true)).queries(queries);
    both.check(&decode(1));
    both.check(&decode(3).sequences([1, 2]));
    for queries in [2, 3] {
        assert!(both.refuses(&decode(queries)), "{queries}");
        let error =
            both.cpu.decode(&decode(queries), &vec![0.0; 48 * queries], &DecodeOperands::default()).unwrap_err();
        let text = "sequence 0 of the rolling cache cannot go back to";
        assert_eq!(error.to_string(), format!("{text} {} tokens, the least is 38, or 0", 39 - queries));
    }
    // A narrower window has what it needs.
    let narrow = decode(3).options.window(Window::keys(11));
    both.check(&decode(3).options(narrow));
    assert!(both.refuses(&decode(3).options(narrow.window(Window::keys(12)))));
    both.append(&[1, 0, 0]);
    both.check(&decode(2));
    assert!(both.refuses(&decode(3)));
    both.append(&[1, 0, 0]);
    both.check(&decode(3));
}

/// Any sequence of steps: both caches agree with the plain model, or say the same error and have not changed.
#[test]
fn any_sequence_of_steps() {
    // Few pages, so that they run out.
    let kinds = [
        CacheKind::Contiguous { capacity: 90 },
        CacheKind::Paged { page_size: 16, pages: 11, sequence_pages: 6 },
        CacheKind::Rolling { sink_tokens: 2, window: 13, queries: 3 },
    ];
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    runner
        .run(&(0usize..3, steps()), |(kind, steps)| {
            let mut both = Both::<f32>::new(config::<f32>(kinds[kind], 1, [8, 8]));
            for step in steps {
                match step {
                    Step::Append(tokens) => drop(both.try_append(&tokens)),
                    Step::Prefill(tokens) => {
                        drop(both.try_prefill(&Prefill::new(2, tokens, Options::new().causal(true))));
                    }
                    Step::Truncate(sequence, length) => drop(both.truncate(sequence, length)),
                    Step::Fork(from, to) => drop(both.fork(from, to)),
                    Step::Decode(queries) => {
                        let decode = Decode::new(2, Options::new().causal(true)).queries(queries);
                        // One query is never too many.
                        if queries == 1 || !both.refuses(&decode) {
                            both.check(&decode);
                        }
                    }
                }
                let lengths: Vec<usize> = both.model.sequences.iter().map(Vec::len).collect();
                prop_assert_eq!(both.cpu.lengths(), lengths);
            }
            both.check(&Decode::new(2, Options::new().causal(true)));
            for sequence in 0..3 {
                both.truncate(sequence, 0).unwrap();
            }
            if let CacheKind::Paged { pages, .. } = kinds[kind] {
                prop_assert_eq!(both.cpu.free_pages(), pages);
            }
            Ok(())
        })
        .unwrap();
}

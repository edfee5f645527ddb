//! Caches saved and restored: on the GPU, on the CPU, and from one to the other.

use crate::common::caches::{Both, config, decode_on, is_relative, rotary_table};
use crate::common::gpu;
use crate::common::saved::{EarlierCache, each_earlier_cache, saved};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use sink_attention::cache::{
    CacheConfig, CacheKind, Decode, DecodeOperands, Quantisation, Rotary, RotaryPositions, RotaryStyle,
};
use sink_attention::half::{bf16, f16};
use sink_attention::{DType, Element, Error, Options, Output, SinkLogits, cpu};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 90 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 30, sequence_pages: 6 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 17, queries: 2 };
const STREAMING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 17, queries: 1 };

fn rotary(positions: RotaryPositions) -> Option<Rotary> {
    Some(Rotary { dim: 16, style: RotaryStyle::HalfSplit, positions })
}

fn empty<T: Element>(config: &CacheConfig) -> cpu::KvCache<T> {
    cpu::KvCache::new(config).unwrap()
}

/// Two query heads to a key head, all sequences.
fn on_cpu<T: Element>(cache: &cpu::KvCache<T>) -> Output<T> {
    let (decode, q, table) = step::<T>(cache.config());
    cache
        .decode(
            &decode,
            &q,
            &DecodeOperands::default().sink_logits(&[0.5; 4][..2 * cache.config().kv_heads]).cos_sin(table.as_deref()),
        )
        .unwrap()
}

fn on_gpu<T: Element>(cache: &sink_attention::cache::KvCache) -> Output<T> {
    let (decode, q, table) = step::<T>(cache.config());
    let config = cache.config();
    let lens = [decode.heads * config.sequences * config.value_dim, decode.heads * config.sequences];
    let device = gpu().unwrap().device().unwrap();
    decode_on(
        device,
        cache,
        &decode,
        &q,
        lens,
        &DecodeOperands::default().sink_logits(&[0.5; 4][..decode.heads]).cos_sin(table.as_deref()),
    )
    .unwrap()
}

fn step<T: Element>(config: &CacheConfig) -> (Decode, Vec<T>, Option<Vec<f32>>) {
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(T::DTYPE);
    let decode = Decode::new(2 * config.kv_heads, options).q_rotated(true);
    let q = (0..config.sequences * decode.heads * config.head_dim).map(|n| T::from_f32((n as f32 * 0.7).sin()));
    let table = config.rotary.filter(|_| is_relative(config)).map(|rotary| rotary_table(&rotary, 100));
    (decode, q.collect(), table)
}

/// Saves both caches, restores each from either file, and goes on with those of the other.
fn goes_on<T: Element>(both: &mut Both<T>) {
    let config = both.config;
    let file = both.cpu.to_safetensors().unwrap();
    let before = on_cpu(&both.cpu);
    let mut restored = empty::<T>(&config);
    restored
        .append(
            &vec![1; config.sequences],
            &junk(&config, config.head_dim),
            &junk(&config, config.value_dim),
            None,
            config.rotary.filter(|_| !is_relative(&config)).map(|rotary| rotary_table(&rotary, 1)).as_deref(),
        )
        .unwrap();
    restored.restore(&file).unwrap();
    assert_eq!(restored.lengths(), both.cpu.lengths());
    assert_eq!(restored.free_pages(), both.cpu.free_pages());
    for sequence in 0..config.sequences {
        assert_eq!(restored.pages(sequence), both.cpu.pages(sequence));
    }
    assert!(on_cpu(&restored) == before, "the same bits");
    both.cpu = restored;
    let (Some(attention), Some(cache)) = (gpu(), &mut both.gpu) else { return };
    let from_gpu = cache.to_safetensors().unwrap();
    // Rotated keys may differ in their last bit.
    if config.rotary.is_none_or(|_| is_relative(&config)) {
        assert!(from_gpu == file, "one file for both");
    }
    let before = on_gpu::<T>(cache);
    let mut restored = attention.create_cache(&config).unwrap();
    restored.restore(&from_gpu).unwrap();
    assert!(on_gpu::<T>(&restored) == before, "the same bits on the GPU");
    assert!(restored.to_safetensors().unwrap() == from_gpu);
    // From one to the other, and back.
    let mut crossed = empty::<T>(&config);
    crossed.restore(&from_gpu).unwrap();
    assert!(crossed.to_safetensors().unwrap() == from_gpu, "nothing is lost on the CPU");
    cache.restore(&file).unwrap();
    assert!(cache.to_safetensors().unwrap() == file, "nothing is lost on the GPU");
    restored.restore(&crossed.to_safetensors().unwrap()).unwrap();
    assert!(on_gpu::<T>(&restored) == before, "the same bits after both");
    both.cpu = crossed;
}

fn junk<T: Element>(config: &CacheConfig, width: usize) -> Vec<T> {
    vec![T::from_f32(777.0); config.sequences * config.kv_heads * width]
}

fn saved_half_way<T: Element>(config: CacheConfig) {
    let mut both = Both::<T>::new(config);
    goes_on(&mut both);
    let options = Options::new().causal(true).dtype(T::DTYPE);
    for (n, tokens) in [[5, 0, 17], [30, 1, 18], [1, 1, 1]].into_iter().enumerate() {
        both.append(&tokens);
        if n == 1 {
            both.fork(2, 1).unwrap();
            both.truncate(0, 34).or_else(|_| both.truncate(0, 35)).unwrap();
        }
        goes_on(&mut both);
        both.check(&Decode::new(2 * config.kv_heads, options));
    }
}

#[test]
fn every_kind() {
    saved_half_way::<f32>(config::<f32>(CONTIGUOUS, 2, [16, 24]));
    saved_half_way::<f16>(config::<f16>(PAGED, 2, [16, 16]));
    saved_half_way::<bf16>(config::<bf16>(ROLLING, 1, [9, 16]));
}

#[test]
fn rotated_keys() {
    let positions = RotaryPositions::Absolute;
    saved_half_way::<f32>(config::<f32>(PAGED, 1, [16, 16]).rotary(rotary(positions)));
    let rotary = rotary(RotaryPositions::CacheRelative);
    saved_half_way::<f32>(config::<f32>(STREAMING, 1, [16, 16]).rotary(rotary));
}

#[test]
fn quantised_numbers() {
    let quantisation = Some(Quantisation::Q8_0);
    saved_half_way::<f32>(config::<f32>(CONTIGUOUS, 1, [40, 64]).quantisation(quantisation));
    saved_half_way::<f16>(config::<f16>(ROLLING, 1, [32, 33]).quantisation(quantisation));
    saved_half_way::<bf16>(config::<bf16>(PAGED, 2, [16, 300]).quantisation(quantisation));
}

/// Whatever numbers were quantised: on the CPU they are kept as what they stand for, and saved as what they are.
#[test]
fn any_quantised_numbers() {
    fn of<T: Element>(numbers: &[f32]) -> Result<(), TestCaseError> {
        let quantisation = Some(Quantisation::Q8_0);
        let kind = CacheKind::Contiguous { capacity: 2 };
        let config = config::<T>(kind, 1, [4, 64]).sequences(1).quantisation(quantisation);
        let mut cache = empty::<T>(&config);
        let value: Vec<T> = numbers.iter().map(|x| T::from_f32(*x)).collect();
        cache.append(&[1], &[T::default(); 4], &value, None, None).unwrap();
        let file = cache.to_safetensors().unwrap();
        let mut restored = empty::<T>(&config);
        restored.restore(&file).unwrap();
        prop_assert!(restored.to_safetensors().unwrap() == file);
        let [a, b] = [&cache, &restored].map(|cache| {
            let decode = Decode::new(1, Options::new().dtype(T::DTYPE));
            let output = cache.decode(&decode, &[T::default(); 4], &DecodeOperands::default()).unwrap();
            output.o.iter().map(|x| x.to_f32().to_bits() & 0x7fff_ffff).collect::<Vec<_>>()
        });
        prop_assert_eq!(a, b);
        Ok(())
    }
    // Of any size, some of them none.
    let number = prop_oneof![
        20 => (-1f32..1.0, -30..17).prop_map(|(x, e)| x * 2f32.powi(e)),
        1 => prop::sample::select(vec![0.0, -0.0, f32::INFINITY, f32::NAN, 65504.0, 1e7, 1e30, 1e-40]),
    ];
    let config = Config { rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..Config::with_cases(300) };
    let run = |numbers: Vec<f32>| of::<f32>(&numbers).and(of::<f16>(&numbers)).and(of::<bf16>(&numbers));
    TestRunner::new(config).run(&prop::collection::vec(number, 64), run).unwrap_or_else(|error| panic!("{error}"));
}

/// Three sequences, two of which share pages.
fn shared() -> cpu::KvCache<f32> {
    let mut both = Both::<f32>::new(config::<f32>(PAGED, 1, [4, 8]));
    both.append(&[40, 3, 0]);
    both.fork(0, 2).unwrap();
    both.append(&[0, 0, 1]);
    both.cpu
}

#[test]
fn other_tools_read_it() {
    let file = shared().to_safetensors().unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let words = |name| bytemuck::pod_collect_to_vec::<u8, u32>(read.tensor(name).unwrap().data());
    assert_eq!(words("lengths"), [40, 3, 41]);
    assert_eq!(words("page_counts"), [3, 1, 3]);
    // The third page was copied.
    assert_eq!(words("pages")[..2], words("pages")[4..6]);
    assert_ne!(words("pages")[2], words("pages")[6]);
    // Shared pages once: 32 tokens, then 8, 3 and 9.
    assert_eq!(read.tensor("keys").unwrap().shape(), [32 + 8 + 3 + 9, 1, 4]);
    assert_eq!(read.tensor("values").unwrap().shape(), [52, 1, 8]);

    // What was forgotten is in no file.
    let mut cache = empty::<f32>(&config::<f32>(CONTIGUOUS, 1, [4, 4]));
    cache.append(&[2, 0, 0], &[1.0, 1.0, 1.0, 1.0, 7.0, 7.0, 7.0, 7.0], &[2.0; 8], None, None).unwrap();
    cache.truncate(0, 1).unwrap();
    let file = cache.to_safetensors().unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let keys: Vec<f32> = bytemuck::pod_collect_to_vec(read.tensor("keys").unwrap().data());
    assert_eq!(keys, [1.0; 4]);
}

#[test]
fn damage_is_an_error() {
    let cache = shared();
    let file = cache.to_safetensors().unwrap();
    let mut into = empty::<f32>(cache.config());
    into.append(&[1, 2, 3], &[1.0; 24], &[1.0; 48], None, None).unwrap();
    let before = into.to_safetensors().unwrap();
    let mut load = |bytes: &[u8]| {
        let error = into.restore(bytes).unwrap_err();
        assert_eq!(into.lengths(), [1, 2, 3]);
        error
    };
    for end in 0..file.len() {
        assert!(matches!(load(&file[..end]), Error::SavedDamaged { what: "cache", .. }), "cut after {end} bytes");
    }
    for at in 0..file.len() {
        let mut spoiled = file.clone();
        spoiled[at] ^= if at % 2 == 0 { 1 } else { 0x80 };
        let error = load(&spoiled);
        // A number of the config may have become another one.
        let typed = matches!(error, Error::SavedDamaged { .. } | Error::SavedMismatch { .. });
        assert!(typed, "byte {at}: {error}");
    }
    // Sound by themselves, but for their numbers: in the file's order, keys and values come last.
    let header = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let place =
        |name: &str| header + read.tensor(name).unwrap().data().as_ptr().addr() - file[header..].as_ptr().addr();
    for (name, number, value, message) in [
        ("lengths", 0, 97, "sequence 0 has 97 tokens and room for 96"),
        ("lengths", 1, u32::MAX, "sequence 1 has 4294967295 tokens"),
        ("lengths", 1, 17, "sequence 1 of the cache cannot have the length 17, the most is 16"),
        ("lengths", 0, 39, "tensor keys has 832 bytes, not 816"),
        ("pages", 0, 30, "page 30 is out of range, the cache has 30 pages"),
        ("pages", 0, 7, "tensor keys has 832 bytes, not"),
        ("page_counts", 2, 4, "tensor pages has 28 bytes, not 32"),
        ("page_counts", 0, u32::MAX, "tensor pages has 28 bytes, not"),
        ("keys", 0, 0, "checksum"),
    ] {
        let mut spoiled = file.clone();
        let at = place(name) + 4 * number;
        spoiled[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = load(&spoiled).to_string();
        assert!(error.starts_with("not a saved cache, or damaged: ") && error.contains(message), "{name}: {error}");
    }
    assert!(into.to_safetensors().unwrap() == before);

    if let Some(attention) = gpu() {
        let mut on_gpu = attention.create_cache(cache.config()).unwrap();
        on_gpu.restore(&file).unwrap();
        let error = on_gpu.restore(&file[..file.len() - 1]).unwrap_err();
        assert!(matches!(error, Error::SavedDamaged { .. }), "{error}");
        assert!(on_gpu.to_safetensors().unwrap() == file);
    }
}

#[test]
fn a_ring_that_cannot_be() {
    let config = config::<f32>(ROLLING, 1, [4, 4]);
    let mut cache = empty::<f32>(&config);
    cache.append(&[30, 0, 1], &[1.0; 124], &[1.0; 124], None, None).unwrap();
    let file = cache.to_safetensors().unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let at = read.tensor("written").unwrap().data().as_ptr().addr() - file.as_ptr().addr();
    for (value, message) in [(29u32, "29 tokens were written to sequence 0, which has 30"), (u32::MAX, "4294967295")] {
        let mut spoiled = file.clone();
        spoiled[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = cache.restore(&spoiled).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn caches_of_another_config_are_errors() {
    let config = config::<f32>(CacheKind::Rolling { sink_tokens: 3, window: 17, queries: 1 }, 2, [32, 16])
        .rotary(rotary(RotaryPositions::Absolute));
    let file = empty::<f32>(&config).to_safetensors().unwrap();
    let rolling = |sink_tokens, window, queries| CacheKind::Rolling { sink_tokens, window, queries };
    for (other, message) in [
        (config.kind(CONTIGUOUS), "kind rolling, wanted is contiguous"),
        (config.kind(rolling(4, 17, 1)), "sink_tokens 3, wanted is 4"),
        (config.kind(rolling(3, 16, 1)), "window 17, wanted is 16"),
        (config.kind(rolling(3, 17, 2)), "queries 1, wanted is 2"),
        (config.sequences(1), "sequences 3, wanted is 1"),
        (config.kv_heads(1), "kv_heads 2, wanted is 1"),
        (config.head_dim(64), "head_dim 32, wanted is 64"),
        (config.value_dim(8), "value_dim 16, wanted is 8"),
        (config.rotary(None), "rotary 16:half-split:absolute, wanted is none"),
        (
            config.rotary(rotary(RotaryPositions::CacheRelative)),
            "rotary 16:half-split:absolute, wanted is 16:half-split:cache-relative",
        ),
        (config.quantisation(Quantisation::Q8_0), "quantisation none, wanted is q8_0"),
    ] {
        let error = empty::<f32>(&other).restore(&file).unwrap_err();
        assert!(matches!(error, Error::SavedMismatch { what: "cache", .. }), "{error}");
        assert_eq!(error.to_string(), format!("the saved cache has {message}"));
    }
    let error = empty::<f16>(&config.dtype(DType::F16)).restore(&file).unwrap_err();
    assert_eq!(error.to_string(), "the saved cache has dtype f32, wanted is f16");
}

#[test]
fn files_are_whole_or_untouched() {
    let folder = std::env::temp_dir().join(format!("sink-attention-cache-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("cache.safetensors");
    let cache = shared();
    let mut loaded = empty::<f32>(cache.config());
    for _ in 0..2 {
        cache.save(&path).unwrap();
        loaded.load(&path).unwrap();
        assert!(loaded.to_safetensors().unwrap() == cache.to_safetensors().unwrap());
        if let Some(attention) = gpu() {
            let mut on_gpu = attention.create_cache(cache.config()).unwrap();
            on_gpu.load(&path).unwrap();
            on_gpu.save(&path).unwrap();
        }
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
    let error = cache.save(folder.join("none").join("cache")).unwrap_err();
    assert!(matches!(&error, Error::SavedFile { what: "cache", .. }), "{error}");
    let error = loaded.load(folder.join("none")).unwrap_err();
    assert!(matches!(error, Error::SavedFile { .. }) && loaded.lengths() == cache.lengths(), "{error}");
    std::fs::write(&path, b"nothing").unwrap();
    let error = loaded.load(&path).unwrap_err().to_string();
    assert!(error.contains("cache.safetensors: 7 bytes"), "{error}");
    std::fs::remove_dir_all(&folder).unwrap();
}

struct OnTheGpu<'a>(&'a sink_attention::Attention);

impl EarlierCache for OnTheGpu<'_> {
    fn check<T: Element>(&self, name: &str, expected: &cpu::KvCache<T>) {
        let mut cache = self.0.create_cache(expected.config()).unwrap();
        cache.load(saved(name)).unwrap();
        assert!(cache.to_safetensors().unwrap() == std::fs::read(saved(name)).unwrap(), "{name}");
    }
}

#[test]
fn caches_of_earlier_versions_load() {
    if let Some(attention) = gpu() {
        each_earlier_cache(&OnTheGpu(attention));
    }
}

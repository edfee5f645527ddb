//! What the files in tests/saved hold: small caches, filled with numbers of a simple rule.

use super::caches::config;
use sink_attention::cache::{CacheConfig, CacheKind, Quantisation, Rotary, RotaryPositions, RotaryStyle};
use sink_attention::half::{bf16, f16};
use sink_attention::{Element, cpu};

pub const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 24 };
pub const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 6, sequence_pages: 2 };
pub const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 2, window: 7, queries: 1 };

pub fn of<T: Element>(kind: CacheKind, head_dim: usize) -> CacheConfig {
    config::<T>(kind, 2, [head_dim, 4]).sequences(2)
}

/// A file in tests/saved.
pub fn saved(name: &str) -> String {
    format!("{}/tests/saved/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// What is checked of each cache in tests/saved.
pub trait EarlierCache {
    /// A file, and the cache that it holds.
    fn check<T: Element>(&self, name: &str, expected: &cpu::KvCache<T>);
}

/// Checks each cache in tests/saved.
pub fn each_earlier_cache(check: &impl EarlierCache) {
    check.check("contiguous_f32.cache", &filled_cache::<f32>(&of::<f32>(CONTIGUOUS, 8)));
    let quantised = of::<f32>(CONTIGUOUS, 40).quantisation(Quantisation::Q8_0);
    check.check("contiguous_q8_0.cache", &filled_cache::<f32>(&quantised));
    let mut paged = filled_cache::<f16>(&of::<f16>(PAGED, 8));
    paged.fork(0, 1).unwrap();
    check.check("paged_f16.cache", &paged);
    let rotary = Rotary { dim: 16, style: RotaryStyle::HalfSplit, positions: RotaryPositions::CacheRelative };
    let rolling = of::<bf16>(ROLLING, 16).rotary(rotary);
    check.check("rolling_bf16.cache", &filled_cache::<bf16>(&rolling));
}

/// Numbers that f16 and bf16 hold exactly, different at each place.
fn numbers<T: Element>(len: usize, step: usize) -> Vec<T> {
    (0..len).map(|n| T::from_f32(((n * step + step) % 251) as f32 / 4.0 - 31.0)).collect()
}

/// A cache of two sequences after two appends.
pub fn filled_cache<T: Element>(config: &CacheConfig) -> cpu::KvCache<T> {
    let mut cache = cpu::KvCache::new(config).unwrap();
    for (tokens, step) in [([5, 2], 7), ([19, 1], 13)] {
        let rows = tokens.iter().sum::<usize>() * config.kv_heads;
        let (k, v) = (numbers(rows * config.head_dim, step), numbers(rows * config.value_dim, step + 4));
        cache.append(&tokens, &k, &v, None, None).unwrap();
    }
    cache
}

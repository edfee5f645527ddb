//! What the files in tests/saved hold: small caches and streams, filled with numbers of a simple rule.

use sink_attention::{Attention, CacheConfig, Element, Inputs, Options, SinkLogits, Stream, StreamShape, Window, cpu};

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

/// The shape of the streams.
pub const STREAM_SHAPE: StreamShape = StreamShape { batch: 2, heads: 2, kv_heads: 1, head_dim: 4, value_dim: 3 };

/// The options of the streams, up to their layout and element type.
pub fn stream_options() -> Options {
    Options::new().causal(true).window(Window::keys(6)).sink_tokens(2).sink_logits(SinkLogits::PerHead)
}

/// A stream of so many tokens.
pub fn filled_stream<T: Element>(options: Options, tokens: usize) -> Stream<T> {
    let mut stream = Stream::new(STREAM_SHAPE, options).unwrap();
    let StreamShape { batch, heads, kv_heads, head_dim, value_dim } = STREAM_SHAPE;
    let q = numbers(batch * heads * tokens * head_dim, 3);
    let (k, v) = (numbers(batch * kv_heads * tokens * head_dim, 5), numbers(batch * kv_heads * tokens * value_dim, 11));
    let inputs = Inputs::new(&q, &k, &v).sink_logits(&[0.5, -1.0][..]);
    stream.update(&Attention::cpu(), &inputs).unwrap();
    stream
}

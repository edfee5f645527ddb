//! Caches on the GPU and on the CPU against the dense reference.

mod common;

use common::caches::{Both, config};
use sink_attention::half::{bf16, f16};
use sink_attention::{CacheConfig, CacheKind, DType, Decode, Element, Layout, Options, SinkLogits};

fn kinds() -> [CacheKind; 4] {
    [
        CacheKind::Contiguous { capacity: 300 },
        CacheKind::Paged { page_size: 16, pages: 60, sequence_pages: 20 },
        CacheKind::Paged { page_size: 64, pages: 20, sequence_pages: 5 },
        CacheKind::Rolling { sink_tokens: 3, window: 37, queries: 4 },
    ]
}

/// Ragged lengths, an empty sequence among them, in several appends, with decoding in between.
fn grows<T: Element>(config: CacheConfig, heads: usize, options: Options) {
    let mut both = Both::<T>::new(config);
    for tokens in [[0, 1, 5], [17, 0, 1], [130, 1, 40], [0, 0, 0], [1, 1, 1], [3, 64, 2]] {
        both.append(&tokens);
        for queries in [1, 3] {
            both.check(&Decode::new(heads, options).queries(queries));
        }
    }
    both.check(&Decode::new(heads, options.causal(true)).sequences([2, 0]));
}

#[test]
fn ragged_lengths_of_every_kind_and_type() {
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for kind in kinds() {
        grows::<f32>(config::<f32>(kind, 2, [16, 16]), 4, options);
        grows::<f16>(config::<f16>(kind, 2, [64, 64]), 16, options.dtype(DType::F16));
        grows::<bf16>(config::<bf16>(kind, 1, [32, 48]), 3, options.dtype(DType::Bf16).layout(Layout::Bhsd));
    }
}

#[test]
fn widths_and_groups() {
    let options = Options::new().causal(true);
    for (at, (width, heads)) in [
        ([1, 1], [1, 1]),
        ([5, 7], [6, 2]),
        ([80, 40], [4, 4]),
        ([128, 128], [8, 2]),
        ([256, 256], [8, 1]),
        ([512, 8], [2, 1]),
        ([72, 200], [20, 1]),
    ]
    .into_iter()
    .enumerate()
    {
        let [heads, kv_heads] = heads;
        let kind = kinds()[at % 4];
        grows::<f32>(config::<f32>(kind, kv_heads, width), heads, options);
        grows::<f16>(config::<f16>(kinds()[(at + 1) % 4], kv_heads, width), heads, options.dtype(DType::F16));
    }
}

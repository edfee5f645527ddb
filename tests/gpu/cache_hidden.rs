//! What a query does not see of a cache changes no bit of its results, whatever bits it has.

use crate::common::caches::{append_on, config, filled, numbers, read};
use crate::common::gpu;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeTiling, KvCache, Quantisation};
use sink_attention::half::{bf16, f16};
use sink_attention::{Attention, Element, Options, SinkLogits, TensorView, Window};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 75 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 32, pages: 12, sequence_pages: 3 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 2, window: 12, queries: 3 };
/// Tokens of each sequence: one whose keys lie in several tiles, one that is not decoded, one of a few tokens.
const LENGTHS: [usize; 3] = [61, 33, 5];
const DECODED: [usize; 2] = [2, 0];

/// Any bits; not a number in each format, infinities and the largest numbers among them.
pub fn noise(rng: &mut StdRng) -> u32 {
    const SPECIAL: [u32; 9] = [
        0x7fc0_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7e00_fe00,
        0x7c00_fc00,
        0x7fc0_ff80,
        0x7f7f_ffff,
        0x7bff_fbff,
        0xffff_ffff,
    ];
    let bits = rng.random::<u32>();
    if bits.is_multiple_of(3) { SPECIAL[bits as usize / 3 % SPECIAL.len()] } else { rng.random() }
}

/// The row of a token in the cache's buffers, but for its head; none where a ring has given it up.
fn row(cache: &KvCache, sequence: usize, position: usize) -> Option<[usize; 2]> {
    match cache.config().kind {
        CacheKind::Paged { page_size, .. } => {
            Some([cache.pages(sequence)[position / page_size] as usize, position % page_size])
        }
        CacheKind::Rolling { sink_tokens, window, queries } if position >= sink_tokens => {
            let ring = window + queries - 1;
            let is_there = position + ring >= cache.lengths()[sequence];
            is_there.then(|| [sequence, sink_tokens + (position - sink_tokens) % ring])
        }
        _ => Some([sequence, position]),
    }
}

/// Each query of a decoding step by itself, all that it does not see filled with noise, several times; then one number that it
/// sees is changed.
pub fn holds<T: Element>(
    attention: &Attention,
    config: CacheConfig,
    queries: usize,
    options: Options,
    tiling: Option<DecodeTiling>,
) {
    let device = attention.device().unwrap();
    let mut rng = StdRng::seed_from_u64(11);
    let heads = 2 * config.kv_heads;
    let options = options.dtype(T::DTYPE).causal(true).sink_logits(SinkLogits::PerHead);
    let mut cache = attention.create_cache(&config).unwrap();
    let total: usize = LENGTHS.iter().sum();
    let mut random = |len| T::narrow(numbers(&mut rng, len));
    let (k, v) =
        (random(total * config.kv_heads * config.head_dim), random(total * config.kv_heads * config.value_dim));
    append_on(device, &mut cache, &LENGTHS, &k, &v, None).unwrap();
    let q = random(DECODED.len() * queries * heads * config.head_dim);
    let o_row = heads * config.value_dim;
    let o_len = DECODED.len() * queries * o_row;
    let lse_len = DECODED.len() * heads * queries;
    let [q, o] = [filled(device, &q), filled(device, &vec![T::default(); o_len])];
    let (lse, sinks) = (filled(device, &vec![0f32; lse_len]), filled(device, &vec![0.3f32; heads]));
    let slopes = filled(device, &vec![0.1f32; heads]);
    let decode = Decode::new(heads, options).queries(queries).sequences(DECODED).tiling(tiling);
    let buffers = DecodeBuffers::new(&q, &o, &lse)
        .sink_logits(TensorView::new(&sinks))
        .alibi_slopes(options.alibi.then(|| TensorView::new(&slopes)));
    let prepared = cache.prepare_decode(&decode, &buffers).unwrap();
    let words = [cache.keys(), cache.values()]
        .map(|buffer| read::<f32>(device, buffer, usize::MAX).iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let blocks = match config.kind {
        CacheKind::Paged { pages, .. } => pages,
        _ => config.sequences,
    };
    let rows = match config.kind {
        CacheKind::Contiguous { capacity } => capacity,
        CacheKind::Paged { page_size, .. } => page_size,
        CacheKind::Rolling { sink_tokens, window, queries } => sink_tokens + window + queries - 1,
    };
    let all_rows = blocks * config.kv_heads * rows;
    // All words of a row of keys and of one of values.
    let row_words = [words[0].len() / all_rows, words[1].len() / all_rows];

    // o and lse of a query, in bits.
    let run = |images: &[Vec<u32>; 2], entry: usize, query: usize| -> (Vec<u32>, Vec<u32>) {
        for (buffer, image) in [cache.keys(), cache.values()].into_iter().zip(images) {
            device.queue().write_buffer(buffer, 0, bytemuck::cast_slice(image));
        }
        let mut step = attention.step().unwrap();
        prepared.encode(&cache, &mut step).unwrap();
        step.submit().unwrap();
        let o = read::<T>(device, &o, o_len);
        let lse = read::<f32>(device, &lse, lse_len);
        let o = o[(entry * queries + query) * o_row..][..o_row].iter().map(|x| x.to_f32().to_bits()).collect();
        (o, (0..heads).map(|head| lse[(entry * heads + head) * queries + query].to_bits()).collect())
    };
    for (entry, sequence) in DECODED.into_iter().enumerate() {
        for query in 0..queries {
            let position = LENGTHS[sequence] - queries + query;
            let (mut left, mut kept) = (options.window.left, options.sink_tokens);
            if let (CacheKind::Rolling { sink_tokens, window, .. }, None) = (config.kind, left) {
                (left, kept) = (Some(window - 1), sink_tokens);
            }
            let mut seen = vec![false; all_rows];
            let mut last = 0;
            for j in (0..=position).filter(|j| left.is_none_or(|left| j + left >= position) || *j < kept) {
                let [block, row] = row(&cache, sequence, j).expect("a key that is seen is there");
                for head in 0..config.kv_heads {
                    last = (block * config.kv_heads + head) * rows + row;
                    seen[last] = true;
                }
            }
            let before = run(&words, entry, query);
            let about = || format!("query {query} of sequence {sequence}, {queries} queries, {config:?}, {tiling:?}");
            assert!(before.0.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{}", about());
            for _ in 0..2 {
                let mut images = words.clone();
                for (image, row_words) in images.iter_mut().zip(row_words) {
                    for (row, words) in image.chunks_exact_mut(row_words).enumerate().filter(|(row, _)| !seen[*row]) {
                        assert!(row < all_rows);
                        words.iter_mut().for_each(|word| *word = noise(&mut rng));
                    }
                }
                assert!(run(&images, entry, query) == before, "hidden rows show in {}", about());
            }
            // It can fail: the same for one number of a key and of a value that are seen.
            for n in 0..2 {
                let mut images = words.clone();
                images[n][last * row_words[n]] ^= 0x4000_4000;
                assert!(run(&images, entry, query) != before, "{n} does not show in {}", about());
            }
        }
    }
}

fn of<T: Element>(kind: CacheKind, widths: [usize; 2]) -> CacheConfig {
    config::<T>(kind, 2, widths)
}

#[test]
fn hidden_rows_change_no_bit() {
    let Some(attention) = gpu() else { return };
    let full = Options::new();
    let narrow = full.window(Window::keys(7)).sink_tokens(1);
    holds::<f32>(attention, of::<f32>(CONTIGUOUS, [8, 8]), 1, full, None);
    holds::<f32>(attention, of::<f32>(PAGED, [8, 8]), 3, narrow, None);
    holds::<f32>(attention, of::<f32>(ROLLING, [8, 8]), 3, full, None);
    holds::<f16>(attention, of::<f16>(PAGED, [16, 8]), 1, narrow, None);
    holds::<f16>(attention, of::<f16>(CONTIGUOUS, [16, 8]), 3, narrow.softcap(2.0), None);
    holds::<f16>(attention, of::<f16>(ROLLING, [16, 8]), 1, full, None);
    holds::<bf16>(attention, of::<bf16>(ROLLING, [16, 8]), 3, full, None);
    holds::<f32>(attention, of::<f32>(ROLLING, [8, 8]), 3, full.alibi(true), None);
    holds::<bf16>(attention, of::<bf16>(PAGED, [16, 8]), 1, narrow, None);
    let quantisation = Quantisation::Q8_0;
    holds::<f32>(attention, of::<f32>(CONTIGUOUS, [32, 32]).quantisation(quantisation), 3, narrow, None);
    holds::<f16>(attention, of::<f16>(PAGED, [32, 40]).quantisation(quantisation), 1, full, None);
    holds::<bf16>(attention, of::<bf16>(ROLLING, [32, 32]).quantisation(quantisation), 1, full, None);
}

/// On matrices; for tests/cooperative.rs.
pub fn hold_on_matrices(attention: &Attention) {
    let narrow = Options::new().window(Window::keys(7)).sink_tokens(1);
    holds::<f16>(attention, of::<f16>(CONTIGUOUS, [16, 16]), 1, Options::new(), None);
    holds::<f16>(attention, of::<f16>(PAGED, [16, 16]), 1, narrow, None);
    holds::<f16>(attention, of::<f16>(PAGED, [16, 16]), 1, narrow.alibi(true), None);
}

/// On fragments; for tests/gpu/fragments.rs.
pub fn hold_on_fragments(attention: &Attention, widths: [usize; 2]) {
    let narrow = Options::new().window(Window::keys(7)).sink_tokens(1);
    let shared = "fragments 2x2 rows 8, columns 1, ahead 1, splits 3".parse().unwrap();
    holds::<f16>(attention, of::<f16>(CONTIGUOUS, widths), 1, Options::new(), None);
    holds::<f16>(attention, of::<f16>(PAGED, widths), 3, narrow, Some(shared));
}

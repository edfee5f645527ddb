//! Prompts through caches, whole and in chunks, and gradients through them, against the dense reference.

use crate::common;
use std::ops::Range;

use crate::common::caches::{Both, config, filled, read, step_on};
use crate::common::prefills::causal;
use crate::common::{gpu, with_others};
use sink_attention::cache::{
    CacheConfig, CacheKind, Decode, Prefill, PrefillBuffers, Quantisation, Rotary, RotaryPositions, RotaryStyle,
};
use sink_attention::cpu::{self, PrefillOperands};
use sink_attention::half::{bf16, f16};
use sink_attention::{Axes, Element, Options, SinkLogits, TensorView, Window};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 150 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 40, sequence_pages: 10 };
const LARGE_PAGES: CacheKind = CacheKind::Paged { page_size: 64, pages: 12, sequence_pages: 3 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 21, queries: 2 };

/// Ragged chunks of one and of several sequences, a single token and none among them, with decoding in between.
fn fills<T: Element>(config: CacheConfig, heads: usize, options: Options) {
    let mut both = Both::<T>::new(config);
    for tokens in [[0, 70, 5], [30, 0, 1], [0, 0, 0], [1, 0, 0], [2, 40, 33]] {
        both.prefill(&Prefill::new(heads, tokens, options));
        both.check(&Decode::new(heads, options));
    }
    both.append(&[1, 0, 1]);
    both.check(&Decode::new(heads, options));
}

// Shapes and options are few but where all are wanted: a software driver takes a second or more for each kernel.
fn sinks<T: Element>() -> Options {
    causal::<T>().sink_logits(SinkLogits::PerHead)
}

#[test]
fn chunks_of_every_kind() {
    for kind in [CONTIGUOUS, PAGED, ROLLING] {
        fills::<f32>(config::<f32>(kind, 2, [8, 8]), 4, sinks::<f32>());
    }
    fills::<f16>(config::<f16>(PAGED, 2, [8, 8]), 4, sinks::<f16>());
    fills::<bf16>(config::<bf16>(LARGE_PAGES, 1, [9, 5]), 3, causal::<bf16>());
    for kind in with_others([], [CONTIGUOUS, PAGED, ROLLING]) {
        fills::<f32>(config::<f32>(kind, 2, [16, 16]), 4, sinks::<f32>());
        fills::<f16>(config::<f16>(kind, 1, [16, 16]), 2, causal::<f16>());
        fills::<bf16>(config::<bf16>(kind, 1, [8, 16]), 3, causal::<bf16>());
    }
}

#[test]
fn chunks_of_quantised_caches() {
    let quantisation = Some(Quantisation::Q8_0);
    for kind in [CONTIGUOUS, PAGED] {
        fills::<f32>(config::<f32>(kind, 2, [8, 8]).quantisation(quantisation), 4, sinks::<f32>());
    }
    // Several blocks, the last one not whole.
    fills::<f16>(config::<f16>(ROLLING, 1, [40, 33]).quantisation(quantisation), 1, causal::<f16>());
    for kind in with_others([], [CONTIGUOUS, PAGED, ROLLING]) {
        fills::<f32>(config::<f32>(kind, 1, [40, 33]).quantisation(quantisation), 2, causal::<f32>());
    }
}

#[test]
fn chunks_are_rotated() {
    let rotary = |dim, style| Some(Rotary { dim, style, positions: RotaryPositions::Absolute });
    let half_split = rotary(8, RotaryStyle::HalfSplit);
    for kind in [CONTIGUOUS, ROLLING] {
        let config = config::<f32>(kind, 2, [8, 8]);
        fills::<f32>(config.rotary(half_split), 4, sinks::<f32>());
    }
    let quantisation = Some(Quantisation::Q8_0);
    let config = config::<f32>(ROLLING, 2, [8, 8]);
    fills::<f32>(config.quantisation(quantisation).rotary(half_split), 4, sinks::<f32>());
    // Rows of an odd width, padded.
    let rotary = rotary(6, RotaryStyle::Interleaved);
    let config = common::caches::config::<bf16>(ROLLING, 1, [9, 5]);
    fills::<bf16>(config.rotary(rotary), 3, causal::<bf16>());
}

/// What the chunk's first queries see of a ring is what its last ones evict.
#[test]
fn a_ring_shows_what_the_chunk_evicts() {
    for (sink_tokens, window, queries) in [(2, 1, 1), (0, 5, 1), (20, 16, 3)] {
        let kind = CacheKind::Rolling { sink_tokens, window, queries };
        let mut both = Both::<f32>::new(config::<f32>(kind, 1, [8, 8]));
        for tokens in [[1, 2, 0], [90, 3, 1], [1, 60, 1], [39, 1, 1], [7, 7, 7]] {
            both.prefill(&Prefill::new(1, tokens, causal::<f32>()));
            both.check(&Decode::new(1, Options::new()));
        }
        // What was taken back lies in the ring still.
        if queries > 1 {
            both.truncate(0, 136).unwrap();
            both.prefill(&Prefill::new(1, [9, 0, 2], causal::<f32>()));
        }
        // Narrower than the cache, with fewer sink tokens, and not causal.
        let narrow = Options::new().window(Window::new(window / 2, 2)).sink_tokens(sink_tokens / 2);
        both.prefill(&Prefill::new(1, [20, 0, 30], narrow.softcap(3.0)));
    }
}

#[test]
fn what_queries_of_a_chunk_see() {
    for kind in [CONTIGUOUS, PAGED] {
        let mut both = Both::<f32>::new(config::<f32>(kind, 1, [8, 8]));
        both.append(&[20, 33, 0]);
        for (options, tokens) in [
            (Options::new().sink_logits(SinkLogits::OffByOne), [5, 17, 0]),
            (Options::new().window(Window::keys(9)).sink_tokens(5).scale(-0.7), [0, 8, 8]),
            (Options::new().window(Window::new(4, 3)).softcap(2.0), [0, 0, 8]),
            (causal::<f32>().alibi(true).bias(Axes::ALL), [9, 17, 0]),
            (causal::<f32>().mask(Axes::KEYS.batch()).bias(Axes::KEYS.heads()), [0, 11, 0]),
            (causal::<f32>().mask(Axes::ALL), [6, 0, 3]),
        ] {
            both.prefill(&Prefill::new(3, tokens, options));
        }
    }
}

/// The same tokens whole and in chunks, on the GPU in one step with one scratch buffer, from one buffer that holds q, k and v
/// side by side: the same rows, as far as the order of sums goes.
#[test]
fn chunks_give_what_the_whole_gives() {
    const CHUNKS: [[usize; 3]; 5] = [[1, 7, 0], [30, 0, 0], [0, 0, 0], [9, 49, 0], [20, 2, 0]];
    let numbers = |n: usize| (0..n).map(|n| ((n * 53 % 97) as f32 - 48.0) / 40.0).collect::<Vec<_>>();
    for kind in [CONTIGUOUS, PAGED, ROLLING] {
        let config = config::<f32>(kind, 2, [8, 8]);
        let all: [usize; 3] = std::array::from_fn(|n| CHUNKS.iter().map(|chunk| chunk[n]).sum());
        let total: usize = all.iter().sum();
        let sink_logits = [0.5, -1.0, 0.0, 2.0];
        let operands = PrefillOperands::default().sink_logits(&sink_logits[..]);
        // Rows of q, then k, then v of each token, in the order of the whole.
        let fused = numbers(total * 64);
        let part =
            |range: Range<usize>| fused.chunks(64).flat_map(|row| row[range.clone()].to_vec()).collect::<Vec<_>>();
        let (mut q, k, v) = (part(0..32), part(32..48), part(48..64));
        let mut on_cpu = cpu::KvCache::new(&config).unwrap();
        let whole = Prefill::new(4, all, sinks::<f32>());
        let expected = on_cpu.prefill(&whole, &mut q, [&k, &v], &operands).unwrap();
        let firsts = [0, all[0]];

        let mut on_cpu = cpu::KvCache::new(&config).unwrap();
        let gpu = gpu().map(|attention| (attention.device().unwrap(), attention.create_cache(&config).unwrap()));
        let mut on_gpu = gpu.map(|(device, cache)| {
            let bytes = cache.prefill_scratch_bytes(&whole).unwrap();
            let scratch = filled(device, &vec![0f32; bytes as usize / 4]);
            (device, cache, scratch, step_on(device), Vec::new())
        });
        let mut done = [0; 3];
        let mut results = Vec::new();
        for tokens in CHUNKS {
            // The rows of this chunk's tokens among those of the whole.
            let rows: Vec<usize> = (0..2).flat_map(|n| firsts[n] + done[n]..firsts[n] + done[n] + tokens[n]).collect();
            let of = |x: &[f32], width: usize| {
                rows.iter().flat_map(|row| x[row * width..(row + 1) * width].to_vec()).collect::<Vec<_>>()
            };
            let prefill = Prefill::new(4, tokens, sinks::<f32>());
            let chunk = on_cpu.prefill(&prefill, &mut of(&q, 32), [&of(&k, 16), &of(&v, 16)], &operands).unwrap();
            if !rows.is_empty() {
                common::compare(&chunk.o, &of(&expected.o, 32), 1e-6).unwrap();
            }
            if let Some((device, cache, scratch, step, kept)) = &mut on_gpu {
                let [qkv, o, lse, sinks] =
                    [&of(&fused, 64)[..], &vec![0.0; rows.len() * 32], &vec![0.0; rows.len() * 4], &sink_logits]
                        .map(|x| filled(device, x));
                let view = |offset| TensorView::new(&qkv).offset(offset).strides([0, 8, 64]);
                let buffers = PrefillBuffers::new(view(0), view(32), view(48), &o, &lse)
                    .sink_logits(TensorView::new(&sinks))
                    .scratch(&*scratch);
                cache.prepare_prefill(&prefill, &buffers).unwrap().encode(cache, step).unwrap();
                kept.push(o.clone());
            }
            results.push(of(&expected.o, 32));
            (0..3).for_each(|n| done[n] += tokens[n]);
        }
        let Some((device, cache, _, step, kept)) = on_gpu else { continue };
        assert_eq!(cache.lengths(), all);
        step.submit().unwrap();
        for (o, expected) in kept.iter().zip(results).filter(|(_, expected)| !expected.is_empty()) {
            common::compare(&read::<f32>(device, o, expected.len()), &expected, 1e-6).unwrap();
        }
    }
}

/// After what was appended before; several sequences, then one, as far as wanted.
fn gradients<T: Element>(config: CacheConfig, heads: usize, options: Options, chunks: &[[usize; 3]]) {
    let mut both = Both::<T>::new(config);
    both.append(&[3, 40, 0]);
    for tokens in chunks {
        let prefilled = both.prefill(&Prefill::new(heads, *tokens, options));
        both.backward(&prefilled);
    }
}

#[test]
fn gradients_in_the_caches_layout() {
    let chunks = [[20, 7, 0], [0, 0, 33], [1, 0, 30]];
    for kind in [CONTIGUOUS, PAGED] {
        gradients::<f32>(config::<f32>(kind, 2, [8, 8]), 4, sinks::<f32>(), &chunks);
    }
    gradients::<f16>(config::<f16>(PAGED, 2, [8, 8]), 4, sinks::<f16>(), &chunks[2..]);
    // Rows of an odd width, padded.
    gradients::<bf16>(config::<bf16>(CONTIGUOUS, 1, [9, 5]), 3, causal::<bf16>(), &chunks[1..2]);
    let options = causal::<f32>().window(Window::keys(12)).sink_tokens(2).alibi(true).bias(Axes::ALL);
    gradients::<f32>(config::<f32>(LARGE_PAGES, 1, [8, 8]), 1, options, &chunks[..1]);
    for kind in with_others([], [CONTIGUOUS, PAGED]) {
        gradients::<f16>(config::<f16>(kind, 1, [16, 8]), 2, sinks::<f16>(), &chunks);
        gradients::<bf16>(config::<bf16>(kind, 1, [9, 5]), 2, causal::<bf16>(), &chunks);
    }
}

/// Pages that sequences share get the sum over them.
#[test]
fn gradients_of_shared_pages() {
    let mut both = Both::<f32>::new(config::<f32>(PAGED, 2, [8, 8]));
    both.append(&[40, 0, 0]);
    both.fork(0, 1).unwrap();
    both.fork(0, 2).unwrap();
    both.truncate(1, 20).unwrap();
    let prefilled = both.prefill(&Prefill::new(4, [1, 30, 12], sinks::<f32>()));
    assert_eq!(both.cpu.pages(0)[0], both.cpu.pages(1)[0]);
    assert_eq!(both.cpu.pages(0)[..2], both.cpu.pages(2)[..2]);
    both.backward(&prefilled);
    // Two of the three.
    let prefilled = both.prefill(&Prefill::new(4, [3, 0, 1], sinks::<f32>()));
    both.backward(&prefilled);
}

/// Chunks are differentiated from the last to the first, of which the ones behind are taken back.
#[test]
fn gradients_of_chunks() {
    for kind in [CONTIGUOUS, PAGED] {
        let rotary = Some(Rotary { dim: 8, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute });
        let mut both = Both::<f32>::new(config::<f32>(kind, 2, [8, 8]).rotary(rotary));
        let first = both.prefill(&Prefill::new(4, [0, 30, 0], sinks::<f32>()));
        let second = both.prefill(&Prefill::new(4, [0, 20, 0], sinks::<f32>()));
        both.backward(&second);
        both.truncate(1, 30).unwrap();
        both.backward(&first);
    }
}

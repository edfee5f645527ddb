//! What a cache refuses, on the host, with the numbers in it.

use crate::common;
use crate::common::buffers::gpu_with;
use crate::common::caches::{Both, append_on, config, decode_on, filled, step_on};
use crate::common::gpu;
use sink_attention::cache::{
    AppendBuffers, BackwardBuffers as CacheBackwardBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers,
    DecodeOperands, KvCache, Prefill, PrefillBuffers, Quantisation, Rotary, RotaryPositions, RotaryStyle,
};
use sink_attention::cpu::PrefillOperands;
use sink_attention::half::f16;
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, Axes, DType, Error, Layout, Options, Output, Result, SinkLogits, TensorView, Upstream, Window, cpu,
};

const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 10 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 4, sequence_pages: 3 };
const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 2, window: 5, queries: 2 };

#[track_caller]
fn says<T>(result: Result<T>, text: &str) {
    match result {
        Ok(_) => panic!("is accepted, wanted {text:?}"),
        Err(error) => assert!(error.to_string().contains(text), "{error}, wanted {text:?}"),
    }
}

#[test]
fn configs() {
    let good = config::<f32>(CONTIGUOUS, 2, [8, 8]);
    good.check().unwrap();
    let rotary = |dim, positions| Some(Rotary { dim, style: RotaryStyle::HalfSplit, positions });
    use RotaryPositions::{Absolute, CacheRelative};
    let paged = |page_size, pages, sequence_pages| CacheKind::Paged { page_size, pages, sequence_pages };
    let rolling = |window, queries| CacheKind::Rolling { sink_tokens: 1, window, queries };
    for (config, text) in [
        (good.sequences(0), "sequences is 0"),
        (good.kv_heads(0), "kv_heads is 0"),
        (good.head_dim(513), "head_dim is 513, the most is 512"),
        (good.value_dim(0), "value_dim is 0"),
        (good.kind(CacheKind::Contiguous { capacity: 0 }), "capacity is 0"),
        (good.kind(CacheKind::Contiguous { capacity: usize::MAX }), "the most is 536870912"),
        (good.kind(CacheKind::Contiguous { capacity: 1 << 29 }), "reaches element"),
        (good.kind(paged(24, 4, 4)), "24; it must be a power of two from 16 up"),
        (good.kind(paged(8, 4, 4)), "8; it must be a power of two from 16 up"),
        (good.kind(paged(16, 0, 4)), "pages is 0"),
        (good.kind(paged(16, 4, 0)), "sequence_pages is 0"),
        (good.kind(rolling(0, 1)), "window is 0"),
        (good.kind(rolling(5, 0)), "queries is 0"),
        (good.kind(rolling(5, 17)), "queries is 17, the most is 16"),
        (
            good.kind(CacheKind::Rolling { sink_tokens: usize::MAX, window: 1, queries: 1 }),
            "sink_tokens is 18446744073709551615",
        ),
        (good.rotary(rotary(0, Absolute)), "0 features of 8"),
        (good.rotary(rotary(7, Absolute)), "7 features of 8"),
        (good.rotary(rotary(10, Absolute)), "10 features of 8"),
        (good.rotary(rotary(8, CacheRelative)), "those of a rolling cache"),
        (good.rotary(rotary(8, CacheRelative)).kind(rolling(5, 2)), "one query at a time, not 2"),
        (good.rotary(rotary(8, CacheRelative)).kind(rolling(5, 1)).dtype(DType::F16), "a multiple of 8 in f16"),
        (
            good.rotary(rotary(8, CacheRelative))
                .kind(rolling(5, 1))
                .quantisation(sink_attention::cache::Quantisation::Q8_0),
            "quantised keys are rotated as they are appended",
        ),
    ] {
        says(config.check(), text);
        says(cpu::KvCache::<f32>::new(&config), text);
        if let Some(attention) = gpu() {
            says(attention.create_cache(&config), text);
        }
    }
    says(cpu::KvCache::<f16>::new(&good), "the operands are f16, the cache holds f32");
    says(Attention::cpu().create_cache(&good), "create_cache needs a GPU");
    if let Some(attention) = gpu() {
        let limit = attention.device().unwrap().capabilities().binding_bytes;
        let capacity = (limit / 32 / 6 + 1) as usize;
        let config = config::<f32>(CONTIGUOUS, 2, [8, 8]).kind(CacheKind::Contiguous { capacity });
        says(attention.create_cache(&config), &format!("the cache's keys take {} bytes", capacity * 32 * 6));
    }
}

#[test]
fn full_caches() {
    let mut both = Both::<f32>::new(config::<f32>(CONTIGUOUS, 1, [4, 4]));
    both.append(&[9, 0, 0]);
    let error = both.try_append(&[2, 1, 0]).unwrap_err();
    assert_eq!(error, "sequence 0 of the cache has 9 tokens and room for 10; 2 more do not fit");
    both.append(&[1, 0, 0]);
    both.check(&Decode::new(1, Options::new()));

    let mut both = Both::<f32>::new(config::<f32>(PAGED, 1, [4, 4]));
    both.append(&[33, 0, 0]);
    let error = both.try_append(&[16, 0, 0]).unwrap_err();
    assert_eq!(error, "sequence 0 of the cache has 33 tokens and room for 48; 16 more do not fit");
    let error = both.try_append(&[0, 16, 1]).unwrap_err();
    assert_eq!(error, "the cache needs 2 pages more, 1 of its 4 are free");
    both.append(&[0, 16, 0]);
    both.fork(1, 2).unwrap();
    // The page is full: nobody writes to it.
    let error = both.try_append(&[0, 0, 1]).unwrap_err();
    assert_eq!(error, "the cache needs 1 pages more, 0 of its 4 are free");
    both.check(&Decode::new(1, Options::new()));
    assert!(both.truncate(3, 0).unwrap_err().contains("sequence 3 is out of range, the cache has 3"));
    assert!(both.truncate(1, 17).unwrap_err().contains("cannot have the length 17, the most is 16"));
    assert!(both.fork(0, 3).unwrap_err().contains("sequence 3 is out of range"));
}

/// A cache on the GPU with 3 sequences, and buffers that are large enough.
fn with_gpu(work: impl FnOnce(&sink_attention::Device, KvCache, &[wgpu::Buffer; 4]), config: &CacheConfig) {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let cache = attention.create_cache(config).unwrap();
    work(device, cache, &[0; 4].map(|_| filled(device, &[0f32; 512])));
}

#[test]
fn appends() {
    let config = config::<f32>(CONTIGUOUS, 1, [4, 4]);
    with_gpu(
        |device, mut cache, [k, v, q, _]| {
            let buffers = AppendBuffers::new(k, v);
            says(cache.prepare_append(&[1, 1], &buffers), "has 2 elements, its shape [3] needs 3");
            says(cache.prepare_append(&[200, 0, 0], &buffers), "buffer of k has 2048 bytes");
            says(cache.prepare_append(&[usize::MAX, usize::MAX, 0], &buffers), "the most is 536870912");
            says(cache.prepare_append(&[1, 0, 0], &buffers.q((q.into(), 1))), "q was given");
            says(cache.prepare_append(&[1, 0, 0], &buffers.cos_sin(q)), "cos_sin was given");
            let keys = cache.keys().clone();
            says(
                cache.prepare_append(&[1, 0, 0], &AppendBuffers::new(&keys, v)),
                "k shares its buffer with the cache's keys",
            );
            let usage = BufferUsages::COPY_DST;
            let no_storage = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 64,
                usage,
                mapped_at_creation: false,
            });
            says(cache.prepare_append(&[1, 0, 0], &AppendBuffers::new(k, &no_storage)), "buffer of v lacks usage");

            let append = cache.prepare_append(&[6, 0, 0], &buffers).unwrap();
            let mut step = step_on(device);
            append.encode(&mut cache, &mut step).unwrap();
            says(append.encode(&mut cache, &mut step), "has 6 tokens and room for 10; 6 more do not fit");
            assert_eq!(cache.lengths(), [6, 0, 0]);
            let mut other = gpu().unwrap().create_cache(&config).unwrap();
            says(append.encode(&mut other, &mut step), "prepared for another cache");
            // Nothing to append is nothing to do.
            let empty = cache.prepare_append(&[0; 3], &buffers).unwrap();
            empty.encode(&mut cache, &mut step).unwrap();
            step.submit().unwrap();
        },
        &config,
    );
}

#[test]
fn pages_in_a_compute_pass() {
    with_gpu(
        |device, mut cache, [k, v, ..]| {
            let append = cache.prepare_append(&[17, 1, 0], &AppendBuffers::new(k, v)).unwrap();
            let mut step = step_on(device);
            says(
                append.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default())),
                "sequence 0 of the cache has 0 tokens and pages of its own for 0 more; 17 in a compute pass",
            );
            says(cache.reserve(&mut step, &[1]), "needs 3");
            says(cache.reserve(&mut step, &[32, 32, 16]), "needs 5 pages more, 4 of its 4 are free");
            cache.reserve(&mut step, &[17, 1, 0]).unwrap();
            append.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default())).unwrap();
            assert_eq!((cache.lengths(), cache.free_pages()), (&[17, 1, 0][..], 1));
            // A shared page is written by nobody until it is copied.
            cache.fork(&mut step, 1, 2).unwrap();
            let one = cache.prepare_append(&[0, 1, 0], &AppendBuffers::new(k, v)).unwrap();
            says(
                one.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default())),
                "sequence 1 of the cache has 1 tokens and pages of its own for 0 more",
            );
            step.submit().unwrap();
        },
        &config::<f32>(PAGED, 1, [4, 4]),
    );
}

#[test]
fn rotary_embeddings() {
    let rotary = Some(Rotary { dim: 4, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute });
    let config = config::<f32>(CONTIGUOUS, 1, [4, 4]).rotary(rotary);
    let mut on_cpu = cpu::KvCache::new(&config).unwrap();
    let (token, table) = ([0.0; 8], [0.0; 12]);
    says(on_cpu.append(&[2, 0, 0], &token, &token, None, None), "cos_sin, but none was given");
    says(on_cpu.append(&[2, 0, 0], &token, &token, None, Some(&table[..11])), "cos_sin has 11 elements");
    says(
        on_cpu.append(&[2, 0, 0], &token, &token[..7], None, Some(&table)),
        "v has 7 elements, its shape [2, 1, 4] needs 8",
    );
    says(on_cpu.append(&[2, 0, 0], &token, &token, Some(&mut [0.0; 5]), Some(&table)), "q has 5 elements");
    on_cpu.append(&[2, 0, 0], &token, &token, None, Some(&table)).unwrap();
    let beyond = "sequence 0 needs the rotary embedding of position 3, the table has 3 positions";
    says(on_cpu.append(&[2, 0, 0], &token, &token, None, Some(&table)), beyond);
    assert_eq!(on_cpu.lengths(), [2, 0, 0]);
    with_gpu(
        |device, mut cache, [k, v, q, _]| {
            let cos_sin = filled(device, &table);
            let buffers = AppendBuffers::new(k, v).cos_sin(&cos_sin);
            says(cache.prepare_append(&[1, 0, 0], &AppendBuffers::new(k, v)), "cos_sin, but none was given");
            says(cache.prepare_append(&[1, 0, 0], &buffers.q((q.into(), 0))), "heads is 0");
            says(cache.prepare_append(&[1, 0, 0], &buffers.q((k.into(), 1))), "q shares its buffer with k");
            let overlapping = TensorView::new(q).strides([0, 0, 4]);
            says(
                cache.prepare_append(&[1, 0, 0], &buffers.q((overlapping, 2))),
                "strides [0, 0, 0] of q let elements overlap",
            );
            let append = cache.prepare_append(&[2, 0, 0], &buffers).unwrap();
            let mut step = step_on(device);
            append.encode(&mut cache, &mut step).unwrap();
            says(append.encode(&mut cache, &mut step), beyond);
            let decode = Decode::new(1, Options::new());
            let operands = DecodeBuffers::new(q, k, v).cos_sin(&cos_sin);
            says(cache.prepare_decode(&decode, &operands), "cos_sin was given");
            step.submit().unwrap();
        },
        &config,
    );
    let rotary = Some(Rotary { dim: 8, style: RotaryStyle::Interleaved, positions: RotaryPositions::CacheRelative });
    let kind = CacheKind::Rolling { sink_tokens: 1, window: 3, queries: 1 };
    let config = common::caches::config::<f32>(CONTIGUOUS, 1, [8, 4]).kind(kind).rotary(rotary);
    let on_cpu = cpu::KvCache::<f32>::new(&config).unwrap();
    let decode = Decode::new(1, Options::new());
    says(on_cpu.decode(&decode, &[0.0; 24], &DecodeOperands::default()), "cos_sin, but none was given");
    says(
        on_cpu.decode(&decode, &[0.0; 24], &DecodeOperands::default().cos_sin(&[0.0; 24][..])),
        "of position 3, the table has 3 positions",
    );
    with_gpu(
        |device, cache, [q, o, lse, _]| {
            let short = filled(device, &[0f32; 24]);
            let operands = DecodeBuffers::new(q, o, lse);
            says(cache.prepare_decode(&decode, &operands), "cos_sin, but none was given");
            let operands = operands.cos_sin(&short);
            says(cache.prepare_decode(&decode, &operands), "of position 3, the table has 3 positions");
        },
        &config,
    );
}

#[test]
fn decoding() {
    let config = config::<f32>(ROLLING, 2, [4, 4]);
    let on_cpu = cpu::KvCache::<f32>::new(&config).unwrap();
    let options = Options::new();
    let per_head = options.sink_logits(SinkLogits::PerHead);
    for (decode, text) in [
        (Decode::new(2, options.dtype(DType::F16)), "the operands are f16, the cache holds f32"),
        (Decode::new(3, options), "heads (3) must be a multiple of kv_heads (2)"),
        (Decode::new(0, options), "heads is 0"),
        (Decode::new(2, options).queries(0), "seq_q is 0"),
        (Decode::new(2, options).queries(17), "queries is 17, the most is 16"),
        (Decode::new(2, options).queries(3), "3; the rolling cache was made for 2 at most"),
        (Decode::new(2, options).sequences([0, 3]), "sequence 3 is out of range, the cache has 3 sequences"),
        (Decode::new(2, options).sequences([]), "batch is 0"),
        (Decode::new(2, options.window(Window::keys(6))), "5 keys to the left; the rolling cache keeps 4"),
        (Decode::new(2, options.window(Window::keys(3)).sink_tokens(3)), "3; the rolling cache keeps 2"),
        (Decode::new(2, options.bias(Axes::KEYS)), "option bias"),
        (Decode::new(2, options.mask(Axes::KEYS)), "Decode::tree_mask is a mask among new tokens"),
        (Decode::new(2, options.query_offset(3)), "option alignment"),
        (Decode::new(2, options.scale(f32::NAN)), "NaN is not finite"),
        (Decode::new(2, options.softcap(0.0)), "option softcap"),
        (Decode::new(2, options.layout(Layout::Thd)), "option layout"),
    ] {
        says(on_cpu.decode(&decode, &[0.0; 24], &DecodeOperands::default()), text);
        with_gpu(
            |_, cache, [q, o, lse, _]| says(cache.prepare_decode(&decode, &DecodeBuffers::new(q, o, lse)), text),
            &config,
        );
    }
    says(on_cpu.decode(&Decode::new(2, options), &[0.0; 23], &DecodeOperands::default()), "q has 23 elements");
    says(
        on_cpu.decode(&Decode::new(2, per_head), &[0.0; 24], &DecodeOperands::default()),
        "sink_logits, but none was given",
    );
    says(
        on_cpu.decode(&Decode::new(2, options), &[0.0; 24], &DecodeOperands::default().sink_logits(&[0.0; 2][..])),
        "sink_logits was given",
    );
    with_gpu(
        |device, cache, [q, o, lse, sinks]| {
            let good = DecodeBuffers::new(q, o, lse);
            let with_sinks = good.sink_logits(TensorView::new(sinks));
            let decode = Decode::new(2, options);
            says(cache.prepare_decode(&Decode::new(2, per_head), &good), "sink_logits, but none was given");
            says(cache.prepare_decode(&decode, &with_sinks), "sink_logits was given");
            says(cache.prepare_decode(&decode, &DecodeBuffers::new(q, q, lse)), "o shares its buffer with q");
            says(cache.prepare_decode(&decode, &DecodeBuffers::new(q, o, q)), "lse shares its buffer with q");
            let strided = TensorView::new(lse).strides([2, 1, 1]);
            says(cache.prepare_decode(&decode, &DecodeBuffers::new(q, o, strided)), "must be densely packed");
            let values = cache.values().clone();
            says(cache.prepare_decode(&decode, &DecodeBuffers::new(q, &values, lse)), "the cache's values");
            let late = TensorView::new(q).offset(500);
            says(cache.prepare_decode(&decode, &DecodeBuffers::new(late, o, lse)), "buffer of q has 2048 bytes");
            let prepared = cache.prepare_decode(&decode, &good).unwrap();
            let other = gpu().unwrap().create_cache(cache.config()).unwrap();
            let mut step = step_on(device);
            says(prepared.encode(&other, &mut step), "prepared for another cache");
        },
        &config,
    );
}

#[test]
fn prefills() {
    let options = Options::new();
    let rolling = config::<f32>(ROLLING, 2, [4, 4]);
    let contiguous = config::<f32>(CONTIGUOUS, 2, [4, 4]);
    let relative = Some(Rotary { dim: 4, style: RotaryStyle::Interleaved, positions: RotaryPositions::CacheRelative });
    let kind = CacheKind::Rolling { sink_tokens: 2, window: 5, queries: 1 };
    let relative = rolling.kind(kind).rotary(relative);
    let new = |tokens: [usize; 3], options| Prefill::new(2, tokens, options);
    for (config, prefill, text) in [
        (&contiguous, Prefill::new(2, [1, 1], options), "has 2 elements, its shape [3] needs 3"),
        (&contiguous, new([usize::MAX, 1, 0], options), "tokens is 18446744073709551615, the most is 536870912"),
        (&contiguous, new([11, 0, 0], options), "sequence 0 of the cache has 0 tokens and room for 10; 11 more"),
        (&contiguous, new([1, 0, 0], options.dtype(DType::F16)), "the operands are f16, the cache holds f32"),
        (&contiguous, Prefill::new(3, [1, 0, 0], options), "heads (3) must be a multiple of kv_heads (2)"),
        (&contiguous, Prefill::new(0, [0, 0, 0], options), "heads is 0"),
        (&contiguous, new([1, 0, 0], options.layout(Layout::Bhsd)), "option layout: bhsd"),
        (&contiguous, new([1, 0, 0], options.query_offset(1)), "option alignment"),
        (&contiguous, new([1, 0, 0], options.scale(f32::NAN)), "NaN is not finite"),
        (&rolling, new([1, 0, 0], options.window(Window::keys(6))), "5 keys to the left; the rolling cache keeps 4"),
        (&rolling, new([1, 0, 0], options.window(Window::keys(3)).sink_tokens(3)), "3; the rolling cache keeps 2"),
        (&rolling, new([1, 0, 0], options.bias(Axes::KEYS)), "option bias: a rolling cache does not take it"),
        (&rolling, new([1, 0, 0], options.mask(Axes::KEYS)), "option mask: a rolling cache does not take it"),
        (&relative, new([1, 0, 0], options), "option rotary: keys that are rotated by their place as they are read"),
    ] {
        let mut on_cpu = cpu::KvCache::<f32>::new(config).unwrap();
        says(on_cpu.prefill(&prefill, &mut [0.0; 8], [&[0.0; 8]; 2], &PrefillOperands::default()), text);
        let prepare = |_: &sink_attention::Device, cache: KvCache, [x, y, z, o]: &[wgpu::Buffer; 4]| {
            says(cache.prepare_prefill(&prefill, &PrefillBuffers::new(x, y, y, z, o)), text);
            says(cache.prefill_scratch_bytes(&prefill), text);
        };
        with_gpu(prepare, config);
    }
    // On the CPU and in a HostCache it is an option as others, tests/gpu/streaming_llm.rs.
    let prepare = |_: &sink_attention::Device, cache: KvCache, [x, y, z, o]: &[wgpu::Buffer; 4]| {
        let prefill = new([1, 0, 0], options.alibi(true));
        let buffers = PrefillBuffers::new(x, y, y, z, o).alibi_slopes(TensorView::new(x));
        says(
            cache.prepare_prefill(&prefill, &buffers),
            "option alibi: distances to the sink tokens of a rolling cache",
        );
    };
    with_gpu(prepare, &rolling);
    let mut on_cpu = cpu::KvCache::<f32>::new(&contiguous).unwrap();
    let (one, none) = (new([1, 0, 0], options), PrefillOperands::default());
    says(
        on_cpu.prefill(&one, &mut [0.0; 7], [&[0.0; 8]; 2], &none),
        "q has 7 elements, its shape [1, 1, 2, 4] needs 8",
    );
    says(on_cpu.prefill(&one, &mut [0.0; 8], [&[0.0; 8], &[0.0; 9]], &none), "v has 9 elements, its shape [1, 2, 4]");
    let table = none.cos_sin(&[0.0; 4][..]);
    says(on_cpu.prefill(&one, &mut [0.0; 8], [&[0.0; 8]; 2], &table), "cos_sin was given");
    says(on_cpu.prefill(&new([0; 3], options), &mut [0.0; 8], [&[]; 2], &none), "q has 8 elements");
    assert_eq!(on_cpu.lengths(), [0, 0, 0]);
    with_gpu(
        |device, mut cache, [x, y, o, lse]| {
            let good = PrefillBuffers::new(x, y, y, o, lse);
            let (keys, values) = (cache.keys().clone(), cache.values().clone());
            let small = filled(device, &[0f32; 16]);
            for (buffers, text) in [
                (good.o(&values), "o shares its buffer with the cache's values"),
                (good.lse(&keys), "lse shares its buffer with the cache's keys"),
                (good.o(x), "o shares its buffer with q"),
                (good.k(&keys), "k shares its buffer with the cache's keys"),
                (good.sink_logits(TensorView::new(x)), "sink_logits was given"),
                (good.scratch(x), "scratch shares its buffer with q"),
                (good.scratch(&keys), "scratch shares its buffer with the cache's keys"),
                (good.scratch(&small), "buffer of scratch has 64 bytes, offset, shape and"),
            ] {
                says(cache.prepare_prefill(&new([1, 2, 0], options), &buffers), text);
            }
            assert_eq!(cache.prefill_scratch_bytes(&new([1, 2, 0], options)).unwrap(), 352);
            assert_eq!(cache.prefill_scratch_bytes(&new([0, 9, 0], options)).unwrap(), 0, "read in place");
            let scratch = filled(device, &[0f32; 88]);
            let own = good.scratch(&scratch);
            let [one, both] = [[0, 1, 0], [1, 2, 0]].map(|n| cache.prepare_prefill(&new(n, options), &own).unwrap());
            let mut step = step_on(device);
            one.encode(&mut cache, &mut step).unwrap();
            let changed =
                "sequence 1 of the cache has changed since the operation was prepared: it had 0 tokens, it has 1";
            says(both.encode(&mut cache, &mut step), changed);
            says(both.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default())), changed);
            assert_eq!(cache.lengths(), [0, 1, 0]);
            let mut other = gpu().unwrap().create_cache(cache.config()).unwrap();
            says(both.encode(&mut other, &mut step), "prepared for another cache");
            let none = cache.prepare_prefill(&new([0; 3], options), &good).unwrap();
            none.encode(&mut cache, &mut step).unwrap();
            step.submit().unwrap();
        },
        &contiguous,
    );
    let paged = |device: &sink_attention::Device, mut cache: KvCache, [x, y, o, lse]: &[wgpu::Buffer; 4]| {
        let prefill = |n| cache.prepare_prefill(&new(n, options), &PrefillBuffers::new(x, y, y, o, lse)).unwrap();
        let [many, few] = [prefill([33, 16, 1]), prefill([5, 0, 0])];
        let mut step = step_on(device);
        says(many.encode(&mut cache, &mut step), "the cache needs 5 pages more, 4 of its 4 are free");
        let in_pass = few.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default()));
        says(in_pass, "5 in a compute pass need KvCache::reserve before it");
        assert_eq!((cache.lengths(), cache.free_pages()), (&[0, 0, 0][..], 4));
        cache.reserve(&mut step, &[5, 0, 0]).unwrap();
        few.encode_in(&mut cache, &mut step.begin_compute_pass(&Default::default())).unwrap();
        step.submit().unwrap();
    };
    with_gpu(paged, &config::<f32>(PAGED, 1, [4, 4]));
}

/// Pages that sequences share fit a binding; each sequence's own copy of them does not.
#[test]
fn what_is_gathered_may_be_too_large() {
    let Some(attention) = gpu_with(|limits| limits.max_storage_buffer_binding_size = 1 << 16) else { return };
    let device = attention.device().unwrap();
    let config = config::<f32>(PAGED, 1, [4, 4]).head_dim(128).value_dim(4);
    let mut cache = attention.create_cache(&config).unwrap();
    let mut step = step_on(device);
    (0..3).for_each(|sequence| cache.assign(&mut step, sequence, &[0, 1, 2], 44).unwrap());
    let [x, y, z, o, lse] = [0; 5].map(|_| filled(device, &[0f32; 6144]));
    let prefill = Prefill::new(1, [1, 1, 1], Options::new());
    let large = "the cache's gathered keys take 69120 bytes, the device binds 65536 at most";
    says(cache.prepare_prefill(&prefill, &PrefillBuffers::new(&x, &y, &y, &o, &lse)), large);
    let [d_keys, d_values] = [0; 2].map(|_| filled(device, &[0f32; 8192]));
    let buffers = CacheBackwardBuffers::new([(&x).into(), (&o).into(), (&lse).into()], &y, &z, [&d_keys, &d_values]);
    says(cache.prepare_backward(&prefill, &buffers), "gathered keys take 67584 bytes");
}

#[test]
fn gradients() {
    let options = Options::new();
    let contiguous = config::<f32>(CONTIGUOUS, 1, [4, 4]);
    let quantised = contiguous.quantisation(Quantisation::Q8_0);
    let saved = Output::new(vec![0.0; 4], vec![0.0]);
    let upstream = Upstream::new(&[0.0; 4]);
    let one = Prefill::new(1, [1, 0, 0], options);
    for (config, text) in [
        (config::<f32>(ROLLING, 1, [4, 4]), "it gives up keys whose gradients are wanted"),
        (quantised, "option quantisation: Q8_0"),
        (contiguous, "option tokens: 1 of sequence 0, which has 0"),
    ] {
        let on_cpu = cpu::KvCache::<f32>::new(&config).unwrap();
        says(on_cpu.backward(&one, &[0.0; 4], &saved, &upstream, &PrefillOperands::default()), text);
        let prepare = |_: &sink_attention::Device, cache: KvCache, [x, y, z, o]: &[wgpu::Buffer; 4]| {
            let buffers = CacheBackwardBuffers::new([x.into(); 3], x, y, [z, o]);
            says(cache.prepare_backward(&one, &buffers), text);
        };
        with_gpu(prepare, &config);
    }
    let mut on_cpu = cpu::KvCache::<f32>::new(&contiguous).unwrap();
    on_cpu.append(&[2, 0, 0], &[0.0; 8], &[0.0; 8], None, None).unwrap();
    let none = PrefillOperands::default();
    let zero = Prefill::new(1, [0, 0, 0], options);
    says(on_cpu.backward(&zero, &[], &saved, &upstream, &none), "tokens is 0");
    says(on_cpu.backward(&one, &[0.0; 5], &saved, &upstream, &none), "q has 5 elements");
    says(on_cpu.backward(&one, &[0.0; 4], &saved, &Upstream::new(&[0.0; 3]), &none), "d_o has 3");
    let table = none.cos_sin(&[0.0; 4][..]);
    says(on_cpu.backward(&one, &[0.0; 4], &saved, &upstream, &table), "cos_sin was given");

    let paged =
        |device: &sink_attention::Device, mut cache: KvCache, [x, d_q, d_keys, d_values]: &[wgpu::Buffer; 4]| {
            append_on(device, &mut cache, &[20, 5, 0], &[0.5; 100], &[0.5; 100], None).unwrap();
            let good = CacheBackwardBuffers::new([x.into(); 3], x, d_q, [d_keys, d_values]);
            let (keys, small) = (cache.keys().clone(), filled(device, &[0f32; 8]));
            let no_copy = device.wgpu().create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 2048,
                usage: BufferUsages::STORAGE,
                mapped_at_creation: false,
            });
            for (buffers, text) in [
                (good.d_keys(&small), "buffer of d_keys has 32 bytes"),
                (good.d_values(&no_copy), "buffer of d_values lacks usage"),
                (good.d_values(d_keys), "d_keys shares its buffer with d_values"),
                (good.d_values(&keys), "d_values shares its buffer with the cache's keys"),
                (good.d_keys(d_q), "d_keys shares its buffer with d_q"),
                (good.d_q(&keys), "d_q shares its buffer with the cache's keys"),
                (good.d_sink_logits(TensorView::new(d_q)), "d_sink_logits was given"),
            ] {
                says(cache.prepare_backward(&Prefill::new(1, [1, 1, 0], options), &buffers), text);
            }
            let prepared = cache.prepare_backward(&Prefill::new(1, [1, 1, 0], options), &good).unwrap();
            let mut step = step_on(device);
            // Pages behind the tokens are no matter.
            cache.reserve(&mut step, &[13, 0, 0]).unwrap();
            prepared.encode(&cache, &mut step).unwrap();
            cache.assign(&mut step, 1, &[0], 5).unwrap();
            says(
                prepared.encode(&cache, &mut step),
                "sequence 1 of the cache has changed since the operation was prepared: it had pages [2], it has [0]",
            );
            cache.truncate(&mut step, 0, 19).unwrap();
            says(prepared.encode(&cache, &mut step), "it had 20 tokens, it has 19");
            let other = gpu().unwrap().create_cache(cache.config()).unwrap();
            says(prepared.encode(&other, &mut step), "prepared for another cache");
            step.submit().unwrap();
        };
    with_gpu(paged, &config::<f32>(CacheKind::Paged { page_size: 16, pages: 4, sequence_pages: 3 }, 1, [4, 4]));
}

#[test]
fn a_failed_append_changes_nothing() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let mut cache = attention.create_cache(&config::<f32>(PAGED, 1, [4, 4])).unwrap();
    append_on(device, &mut cache, &[17, 17, 0], &[1.0; 34 * 4], &[2.0; 34 * 4], None).unwrap();
    let error = append_on(device, &mut cache, &[16, 0, 0], &[3.0; 64], &[3.0; 64], None).unwrap_err();
    assert!(matches!(error, Error::PagesExhausted { needed: 1, free: 0, pages: 4 }), "{error}");
    let decode = Decode::new(1, Options::new());
    let output = decode_on(device, &cache, &decode, &[1.0; 12], [12, 3], &DecodeOperands::default()).unwrap();
    assert_eq!(output.o, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(output.lse[2], f32::NEG_INFINITY);
}

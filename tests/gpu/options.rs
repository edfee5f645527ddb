//! What makes scores more than products (softcap, ALiBi, bias), hides single pairs (boolean mask, bias) and sequences of
//! different lengths, on the GPU against the definition: both passes, every element type, every micro-kernel.

use crate::common::buffers::{GradientBuffers, buffer, empty, read, submit};
use crate::common::{all_cases, compare, cooperative, every, gpu};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{Kernel, Pass};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{BiasValues, MaskValues, agree, row};
use sink_attention::{
    Attention, Axes, DType, Element, Error, Layout, Lengths, MaskPacking, Options, Problem, Shape, SinkLogits,
    TensorView, Window, wgpu,
};

/// Every option with every other one, and each kind of broadcasting.
fn score_options() -> Vec<Options> {
    let new = Options::new();
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let keys = Axes::KEYS;
    vec![
        new.softcap(1.5),
        per_head.alibi(true).causal(true),
        new.bias(Axes::ALL),
        new.mask(Axes::ALL),
        per_head.bias(keys).causal(true),
        new.bias(keys.seq_q()).layout(Layout::Bhsd),
        new.bias(keys.heads()).window(Window::keys(30)).sink_tokens(3),
        per_head.bias(keys.batch().seq_q()).softcap(0.7),
        per_head.mask(keys).causal(true),
        new.mask(keys.batch()).mask_packing(MaskPacking::Bits),
        new.mask(keys.heads().seq_q()).window(Window::new(20, 50)).mask_packing(MaskPacking::Bits),
        per_head.mask(keys.seq_q()).layout(Layout::Bhsd),
        per_head.alibi(true).softcap(2.0).window(Window::keys(40)).query_offset(-7),
        per_head.alibi(true).bias(Axes::ALL).mask(keys.batch().heads()).softcap(1.1).causal(true).scale(-0.4),
        new.mask(Axes::ALL).window(Window::keys(20)).sink_tokens(70),
    ]
}

fn shape(seq: [usize; 2], width: [usize; 2]) -> Shape {
    let ([seq_q, seq_k], [head_dim, value_dim]) = (seq, width);
    Shape { batch: 2, heads: 4, kv_heads: 2, seq_q, seq_k, head_dim, value_dim }
}

/// Dense problems. Drivers take their time for every kernel, so sizes and element types of the bias take turns.
fn dense<T: Element>(turn: usize) -> Vec<Problem> {
    let sizes = [([113, 203], [32, 48]), ([1, 130], [33, 16]), ([70, 64], [64, 64])];
    let problem = |(n, options): (usize, Options)| {
        let (seq, width) = sizes[(n + turn) % sizes.len()];
        let bias_dtype = if (n + turn).is_multiple_of(2) { T::DTYPE } else { DType::F32 };
        Problem::new(shape(seq, width), options.dtype(T::DTYPE).bias_dtype(bias_dtype)).unwrap()
    };
    score_options().into_iter().enumerate().map(problem).collect()
}

/// Sequences of different lengths, empty ones among them, with and without what changes scores.
fn lengths<T: Element>(turn: usize) -> Vec<Problem> {
    let new = Options::new().dtype(T::DTYPE);
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let options = [
        new,
        per_head.causal(true),
        per_head.window(Window::keys(17)).sink_tokens(3),
        new.alibi(true).causal(true),
        per_head.bias(Axes::ALL),
        per_head.mask(Axes::KEYS.batch()).softcap(1.3),
        new.bias(Axes::KEYS.heads()).mask(Axes::KEYS.seq_q()).alibi(true),
    ];
    let thd = |options: Options, q: &[u32], k: &[u32]| {
        let last = |n: &[u32]| *n.last().unwrap() as usize;
        let shape = Shape { batch: 1, ..shape([last(q), last(k)], [32, 48]) };
        Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q, k }).unwrap()
    };
    let padded = |options: Options, q: Option<&[u32]>, k: Option<&[u32]>| {
        Problem::with_lengths(shape([80, 100], [32, 48]), options, Lengths::Used { q, k }).unwrap()
    };
    let of = |(n, options): (usize, Options)| match (n + turn) % 3 {
        0 => [
            thd(options, &[0, 70, 70, 71, 200, 233], &[0, 90, 100, 100, 229, 262]),
            padded(options, None, Some(&[0, 100])),
        ],
        1 => [
            thd(options, &[0, 1, 2, 3, 40], &[0, 0, 5, 6, 6]),
            padded(options.layout(Layout::Bhsd), Some(&[75, 3]), Some(&[100, 60])),
        ],
        _ => [thd(options, &[0, 100, 140], &[0, 20, 180]), padded(options, Some(&[0, 80]), None)],
    };
    options.into_iter().enumerate().flat_map(of).collect()
}

/// Holds both passes against the definition, the backward pass without what rounding took from o, and with it where o is no
/// sum of rounded weights.
fn check<T: Element>(attention: &Attention, problem: &Problem, seed: u64, with_o_lo: bool) {
    let case: Backward<T> = Backward::random(problem, seed).cast();
    let inputs = case.operands.inputs();
    let output = attention.forward(problem, &inputs).unwrap_or_else(|error| panic!("{problem}: {error}"));
    agree(&output, &reference::forward(problem, &inputs).unwrap()).unwrap_or_else(|error| panic!("{problem}: {error}"));
    let expected = case.expected(problem);
    let exact = output.clone().o_lo(None);
    for saved in [&exact, &output].into_iter().take(if with_o_lo { 2 } else { 1 }) {
        let gradients = case.run_with(attention, problem, saved);
        case.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

/// Keys beyond a padded sequence's end or hidden by a mask, and queries that see nothing, hold NaN: it must not show, whatever
/// scores are made of. Softcap's derivative would be NaN there, too.
fn hidden_nan<T: Element>(attention: &Attention) {
    let new = Options::new().dtype(T::DTYPE).softcap(1.2);
    let shape = shape([80, 100], [32, 48]);
    let lengths = Lengths::Used { q: Some(&[75, 3]), k: Some(&[100, 60]) };
    let problems = [
        Problem::with_lengths(shape, new.alibi(true).causal(true), lengths).unwrap(),
        Problem::with_lengths(shape, new.bias(Axes::KEYS.heads()), lengths).unwrap(),
        Problem::new(shape, new.mask(Axes::KEYS.batch())).unwrap(),
    ];
    for problem in every(if T::DTYPE == DType::F32 { 1 } else { 2 }, problems) {
        let mut case: Backward<T> = Backward::random(&problem, 3).cast();
        let nan = T::from_f32(f32::NAN);
        let mask = match &case.operands.mask {
            Some(MaskValues::Bytes(mask)) => mask.clone(),
            _ => vec![1; 200],
        };
        for (b, sequence) in problem.sequences().enumerate() {
            let hidden = |j: &usize| *j >= sequence.band.seq_k() || mask[b * 100 + j] == 0;
            for (j, g) in (0..100).filter(hidden).flat_map(|j| [(j, 0), (j, 1)]) {
                case.operands.key(&problem, b, g, j).fill(nan);
                case.operands.value(&problem, b, g, j).fill(nan);
            }
            for (i, h) in (sequence.band.seq_q()..80).flat_map(|i| (0..4).map(move |h| (i, h))) {
                case.operands.q[row(&problem, [4, 80, 32], [b, h, i])].fill(nan);
                case.d_o[row(&problem, [4, 80, 48], [b, h, i])].fill(nan);
            }
        }
        let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
        let expected = reference::forward(&problem, &case.operands.inputs()).unwrap();
        agree(&output, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
        let exact = output.o_lo(None);
        let gradients = case.run_with(attention, &problem, &exact);
        case.agree(&gradients, &case.expected(&problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

#[test]
fn hidden_nan_does_not_show() {
    if let Some(attention) = gpu() {
        hidden_nan::<f32>(attention);
        hidden_nan::<bf16>(attention);
    }
    hidden_nan::<f32>(&Attention::cpu());
    if let Some(attention) = cooperative() {
        hidden_nan::<f16>(&attention);
    }
}

/// A row whose scores are at the end of the cap: 1 - tanh^2 must not be what is left of 1.
#[test]
fn capped_scores_have_gradients() {
    for attention in [Some(Attention::cpu()), gpu().cloned()].into_iter().flatten() {
        let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 5, seq_k: 7, head_dim: 1, value_dim: 3 };
        let problem = Problem::new(shape, Options::new().softcap(1.0).scale(1.0)).unwrap();
        let mut case = Backward::random(&problem, 1);
        // Scores between 4 and 6, of either sign.
        case.operands.q.iter_mut().for_each(|x| *x = x.signum());
        case.operands.k.iter_mut().for_each(|x| *x = x.signum() * (4.0 + x.abs()));
        case.check(&attention, &problem);
        let (gradients, expected) = (case.run(&attention, &problem), case.expected(&problem));
        // By their own norm, however small they are.
        compare(&gradients.d_k, &expected.d_k, 1e-5).unwrap();
    }
}

/// Masks of more blocks than share a word of classes, with long runs of hidden, of visible and of mixed ones, which tiles leave and
/// enter in either direction.
fn long_masks<T: Element>(attention: &Attention) {
    let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 1100, seq_k: 2300, head_dim: 16, value_dim: 16 };
    let new = Options::new().dtype(T::DTYPE).mask(Axes::KEYS.seq_q());
    for (seed, options) in
        [new, new.window(Window::keys(1400)).sink_tokens(300), new.alibi(true).causal(true)].into_iter().enumerate()
    {
        let problem = Problem::new(shape, options).unwrap();
        let mut case: Backward<T> = Backward::random(&problem, seed as u64).cast();
        let Some(MaskValues::Bytes(mask)) = &mut case.operands.mask else { panic!("a mask in bytes") };
        for (i, row) in mask.chunks_mut(2300).enumerate() {
            // Runs end within blocks and at their edges, and one hides all that a tile of queries would see.
            match i / 256 {
                0 => row[130..1856].fill(0),
                1 => row[..1100].fill(1),
                2 => row.fill(0),
                _ => row[1024..].fill(u8::from(i < 900)),
            }
        }
        let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
        let expected = reference::forward(&problem, &case.operands.inputs()).unwrap();
        agree(&output, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
        let gradients = case.run_with(attention, &problem, &output.o_lo(None));
        case.agree(&gradients, &case.expected(&problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

#[test]
fn masks_of_many_blocks() {
    if let Some(attention) = gpu() {
        long_masks::<f32>(attention);
    }
}

#[test]
fn cooperative_masks_of_many_blocks() {
    if let Some(attention) = cooperative() {
        long_masks::<f16>(&attention);
    }
}

/// Bias and mask lie in larger buffers, and the backward pass works with the mask's bits that the forward pass has left.
#[test]
fn views_and_a_shared_mask_scratch() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    let options = Options::new().mask(Axes::KEYS.batch().seq_q()).bias(Axes::KEYS.heads());
    let problem = Problem::new(shape([113, 203], [32, 48]), options.sink_logits(SinkLogits::PerHead)).unwrap();
    let case = Backward::random(&problem, 9);
    let buffers = GradientBuffers::new(device, &problem, &case);
    let (Some(MaskValues::Bytes(mask)), Some(BiasValues::F32(bias))) = (&case.operands.mask, &case.operands.bias)
    else {
        unreachable!("the options above")
    };
    // Each row 3 elements longer, and 5 before the first.
    let padded = |size: usize, width: usize, copy: &mut dyn FnMut(usize, usize)| {
        (0..size).for_each(|n| copy(n, 5 + n / width * (width + 3) + n % width));
    };
    let mut mask_bytes = vec![1u8; (5_usize + 2 * 113 * 206).next_multiple_of(4)];
    padded(mask.len(), 203, &mut |from, to| mask_bytes[to] = mask[from]);
    let mut wide_bias = vec![f32::NAN; 5 + 4 * 206];
    padded(bias.len(), 203, &mut |from, to| wide_bias[to] = bias[from]);
    let (mask, bias) = (buffer(device, bytemuck::cast_slice(&mask_bytes)), buffer(device, &wide_bias));
    let d_bias = buffer(device, &[f32::NAN; 4 * 203]);
    let run = |scratch: Option<&wgpu::Buffer>| {
        let forward = buffers
            .forward
            .views()
            .mask(TensorView::new(&mask).offset(5).strides([113 * 206, 0, 206]))
            .bias(TensorView::new(&bias).offset(5).strides([0, 206, 0]))
            .mask_scratch(scratch);
        let views = buffers.views().forward(forward).d_bias(TensorView::new(&d_bias));
        let forward = attention.prepare_forward(&problem, &forward)?;
        let backward = attention.prepare_backward(&problem, &views)?;
        let packs = |pass: &Pass| pass.variant.kernel == Kernel::MASK_BITS;
        assert!(forward.plan().passes.iter().any(packs));
        assert_eq!(backward.plan().passes.iter().any(packs), scratch.is_none());
        submit(device, |encoder| {
            forward.encode(encoder);
            backward.encode(encoder);
        });
        Ok(buffers.read(device).d_bias(read(device, &d_bias)))
    };
    let expected = case.run(attention, &problem);
    let bytes = Attention::mask_scratch_bytes(&problem).unwrap();
    let of = |bytes| empty(device, bytes, wgpu::BufferUsages::STORAGE);
    assert_eq!(run(None).unwrap(), expected);
    assert_eq!(run(Some(&of(bytes))).unwrap(), expected);

    let error: Error = run(Some(&of(bytes - 4))).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { operand: "mask_scratch", .. }), "{error}");
    assert!(error.to_string().contains(&bytes.to_string()), "{error}");
    let error: Error = run(Some(&mask)).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { .. } | Error::Aliasing { .. }), "{error}");
    let without = Problem::new(*problem.shape(), Options::new()).unwrap();
    assert_eq!(Attention::mask_scratch_bytes(&without), None);
}

/// Equal inputs give equal bits.
#[test]
fn same_bits_every_time() {
    let Some(attention) = gpu() else { return };
    let options = Options::new().bias(Axes::KEYS.seq_q()).mask(Axes::KEYS.batch()).alibi(true).softcap(1.3);
    let problem = Problem::new(shape([113, 203], [32, 48]), options).unwrap();
    let case = Backward::random(&problem, 5);
    let first = case.run(attention, &problem);
    for _ in 0..3 {
        assert_eq!(case.run(attention, &problem), first);
    }
}

fn check_all<T: Element>(problems: Vec<Problem>) {
    if let Some(attention) = gpu() {
        // What scores are made of is the same text in every element type: in half precision every eighth will do.
        let problems = every(if T::DTYPE == DType::F32 { 3 } else { 8 }, problems);
        check_on::<T>(attention, problems, true);
    }
}

fn check_cooperative<T: Element>(turn: usize) {
    let Some(attention) = cooperative() else { return };
    // Compiling a cooperative kernel takes llvmpipe seconds: those with the most in them, and the others in turns.
    let from = |start: usize| if all_cases() { 0 } else { start + turn };
    let dense = every(2, dense::<T>(turn).into_iter().skip(from(11)));
    let lengths = every(4, lengths::<T>(turn).into_iter().skip(from(7)));
    check_on::<T>(&attention, [dense, lengths].concat(), false);
}

fn check_on<T: Element>(attention: &Attention, problems: Vec<Problem>, with_o_lo: bool) {
    for (seed, problem) in problems.into_iter().enumerate() {
        check::<T>(attention, &problem, seed as u64, with_o_lo);
    }
}

#[test]
fn options_in_f32() {
    check_all::<f32>(dense::<f32>(0));
}

#[test]
fn options_in_f16() {
    check_all::<f16>(dense::<f16>(1));
}

#[test]
fn options_in_bf16() {
    check_all::<bf16>(dense::<bf16>(2));
}

#[test]
fn lengths_in_f32() {
    check_all::<f32>(lengths::<f32>(0));
}

#[test]
fn lengths_in_f16() {
    check_all::<f16>(lengths::<f16>(1));
}

#[test]
fn lengths_in_bf16() {
    check_all::<bf16>(lengths::<bf16>(2));
}

#[test]
fn cooperative_in_f16() {
    check_cooperative::<f16>(1);
}

#[test]
fn cooperative_in_bf16() {
    check_cooperative::<bf16>(2);
}

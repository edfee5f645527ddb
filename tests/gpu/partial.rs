//! Partial states: shards of the keys in any number, size and order, against the definition of the whole in f64.

use crate::common;
use std::ops::Range;

use crate::common::buffers::{buffer, empty, read, submit};
use crate::common::shards::{ranges, shard, states, with_sinks};
use crate::common::{another_gpu, compare, compare_lse, gpu};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{BOUND, Operands, agree, problem};
use sink_attention::wgpu::BufferUsages;
use sink_attention::{
    Alignment, Attention, Axes, DType, Element, Error, ForwardBuffers, Gradients, Inputs, Layout, Lengths, MaskPacking,
    MergeBuffers, Options, PartialState, Problem, Shape, SinkLogits, TensorView, Window, cpu,
};

/// The CPU and, where there is one, the GPU.
fn paths() -> impl Iterator<Item = Attention> {
    [Attention::cpu()].into_iter().chain(gpu().cloned())
}

/// The same for one of several cases: the GPU compiles kernels for each, so element types take turns there.
fn paths_of<T: Element>(case: usize) -> impl Iterator<Item = Attention> {
    let turn = [DType::F32, DType::F16, DType::Bf16].iter().position(|dtype| *dtype == T::DTYPE);
    paths().filter(move |path| !path.is_gpu() || turn == Some(case % 3))
}

/// All orders of the numbers below n.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let with = |order: Vec<usize>| {
        (0..n).map(move |at| {
            let mut order = order.clone();
            order.insert(at, n - 1);
            order
        })
    };
    orders(n - 1).into_iter().flat_map(with).collect()
}

/// Finishes a merged state and holds it against the definition.
fn check_finished<T: Element>(
    attention: &Attention,
    problem: &Problem,
    operands: &Operands<T>,
    state: &PartialState,
) -> Result<(), String> {
    let expected = reference::forward(problem, &operands.inputs()).unwrap();
    let output = attention.finish::<T>(problem, state, operands.sink_logits.as_deref()).unwrap();
    assert_eq!(output.o_lo.is_some(), T::DTYPE.has_rounding_error());
    agree(&output, &expected)
}

fn options() -> Vec<Options> {
    let new = Options::new();
    let per_head = new.sink_logits(SinkLogits::PerHead);
    vec![
        per_head.causal(true),
        per_head.window(Window::keys(9)).sink_tokens(5),
        new.causal(true).sink_logits(SinkLogits::OffByOne).alignment(Alignment::TopLeft).layout(Layout::Bhsd),
        per_head.window(Window::new(4, 3)).sink_tokens(12).query_offset(7).layout(Layout::Bhsd),
        // Nothing but sink tokens is left.
        new.window(Window::keys(3)).sink_tokens(2).query_offset(100),
        // The first queries see nothing.
        per_head.causal(true).query_offset(-8),
        per_head.alibi(true).softcap(3.0).causal(true).bias(Axes::ALL).mask(Axes::KEYS),
        new.mask(Axes::ALL).mask_packing(MaskPacking::Bits).bias(Axes::KEYS.heads()).window(Window::left(20)),
    ]
}

fn merges_to_the_whole<T: Element>() {
    let cuts: [&[usize]; 7] = [&[], &[1], &[16, 30], &[0, 15], &[7, 7, 39], &[1, 2], &[40, 41]];
    for (n, options) in options().into_iter().enumerate() {
        let options = options.dtype(T::DTYPE).bias_dtype(if n % 2 == 0 { T::DTYPE } else { DType::F32 });
        let problem = problem([2, 4, 2], [19, 41], [16, 12], options);
        let operands = Operands::random(&problem, n as u64).cast::<T>();
        for attention in paths_of::<T>(n) {
            let cuts = if attention.is_gpu() { vec![cuts[n % 3 + 2], cuts[5]] } else { cuts.to_vec() };
            for cuts in cuts {
                let shards = ranges(cuts, 41);
                let states = states(&attention, &problem, &operands, &shards);
                for order in orders(states.len()) {
                    let ordered: Vec<&PartialState> = order.iter().map(|&n| &states[n]).collect();
                    let at_once = attention.merge(&problem, &ordered).unwrap();
                    let one_by_one = ordered.iter().fold(PartialState::empty(&problem), |whole, state| {
                        attention.merge(&problem, &[&whole, state]).unwrap()
                    });
                    for whole in [&at_once, &one_by_one] {
                        check_finished(&attention, &problem, &operands, whole)
                            .unwrap_or_else(|error| panic!("{problem} {shards:?} {order:?}: {error}"));
                    }
                    assert_eq!(at_once, attention.merge(&problem, &ordered).unwrap(), "the same bits");
                }
            }
        }
    }
}

#[test]
fn f32_shards_merge_to_the_whole() {
    merges_to_the_whole::<f32>();
}

#[test]
fn f16_shards_merge_to_the_whole() {
    merges_to_the_whole::<f16>();
}

#[test]
fn bf16_shards_merge_to_the_whole() {
    merges_to_the_whole::<bf16>();
}

/// The keys one by one, each of which is a state of lse = score.
#[test]
fn shards_of_one_key() {
    let options = Options::new().window(Window::keys(6)).sink_tokens(2).sink_logits(SinkLogits::PerHead);
    let problem = problem([1, 2, 1], [11, 17], [8, 3], options);
    let operands = Operands::random(&problem, 3);
    let cuts: Vec<usize> = (1..17).collect();
    for attention in paths() {
        let states = states(&attention, &problem, &operands, &ranges(&cuts, 17));
        let states: Vec<&PartialState> = states.iter().rev().collect();
        let whole = attention.merge(&problem, &states).unwrap();
        check_finished(&attention, &problem, &operands, &whole).unwrap();
    }
}

/// A state is that of the definition: without the sink logit, in f32 whatever the operands are.
#[test]
fn a_state_is_the_shard_without_the_sink_logit() {
    fn check<T: Element>() {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(T::DTYPE);
        let problem = problem([1, 2, 1], [20, 33], [16, 16], options);
        let operands = Operands::random(&problem, 8).cast::<T>();
        let keys = 5..30;
        let part = shard(&problem, &operands, &keys);
        let definition = problem.shard(keys.clone()).unwrap().without_sink_logits();
        let expected = reference::forward(&definition, &part.inputs()).unwrap();
        let cpu = Attention::cpu().attend_partial(&problem, keys.clone(), &part.inputs()).unwrap();
        // Nothing is rounded to the operands' type on the way.
        compare(&cpu.o, &expected.o, BOUND).unwrap();
        compare_lse(&cpu.lse, &expected.lse, BOUND).unwrap();
        let Some(gpu) = gpu() else { return };
        let gpu = gpu.clone().with_micro_kernel(sink_attention::plan::MicroKernel::Portable);
        let state = gpu.attend_partial(&problem, keys, &part.inputs()).unwrap();
        compare(&state.o, &expected.o, BOUND).unwrap();
        compare_lse(&state.lse, &expected.lse, BOUND).unwrap();
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

/// What an empty shard holds is nothing, whatever stands in its o.
#[test]
fn empty_states_change_nothing() {
    let problem = problem([1, 2, 2], [5, 9], [4, 7], Options::new().sink_logits(SinkLogits::PerHead));
    let operands = Operands::random(&problem, 1);
    for attention in paths() {
        let [state] = &states(&attention, &problem, &operands, &ranges(&[], 9))[..] else { unreachable!() };
        let mut empty = PartialState::empty(&problem);
        assert_eq!(
            empty,
            attention.attend_partial(&problem, 4..4, &shard(&problem, &operands, &(4..4)).inputs()).unwrap()
        );
        empty.o.fill(f32::NAN);
        let alone = attention.merge(&problem, &[state]).unwrap();
        assert_eq!(alone, attention.merge(&problem, &[&empty, state, &empty]).unwrap());
        compare(&alone.o, &state.o, 1e-6).unwrap();
        let nothing = PartialState::empty(&problem);
        assert_eq!(attention.merge(&problem, &[]).unwrap(), nothing);
        assert_eq!(attention.merge(&problem, &[&empty, &empty]).unwrap(), nothing);

        // Rows that see nothing are left to the sink.
        let sinks = operands.sink_logits.as_deref();
        let output = attention.finish::<f32>(&problem, &empty, sinks).unwrap();
        assert_eq!(output.o, nothing.o);
        let heads: Vec<f32> = sinks.unwrap().iter().flat_map(|&sink| [sink; 5]).collect();
        assert_eq!(output.lse, heads);
        // A sink of -infinity takes nothing, one of +infinity everything.
        let output = attention.finish::<f32>(&problem, state, Some(&[f32::NEG_INFINITY; 2])).unwrap();
        compare(&output.o, &state.o, 1e-6).unwrap();
        let output = attention.finish::<f32>(&problem, &empty, Some(&[f32::NEG_INFINITY; 2])).unwrap();
        assert_eq!((output.o, output.lse), (nothing.o.clone(), nothing.lse.clone()));
        let output = attention.finish::<f32>(&problem, state, Some(&[f32::INFINITY; 2])).unwrap();
        assert_eq!((output.o, output.lse), (nothing.o, vec![f32::INFINITY; 10]));
    }
}

/// Scores so far apart that all but one state vanish, and sums beyond what f32 holds on the way.
#[test]
fn extreme_states() {
    let problem = problem([1, 1, 1], [4, 3], [4, 4], Options::new());
    let state = |lse: f32, o: f32| PartialState::new(vec![o; 16], vec![lse; 4]);
    for attention in paths() {
        let merge = |states: &[&PartialState]| attention.merge(&problem, states).unwrap();
        assert_eq!(merge(&[&state(-3e38, 1.0), &state(3e38, 2.0)]), state(3e38, 2.0));
        assert_eq!(merge(&[&state(700.0, 1.0), &state(-900.0, f32::MAX)]), state(700.0, 1.0));
        let huge = merge(&[&state(0.0, 3e38), &state(0.0, 3e38), &state(0.0, 3e38), &state(0.0, 3e38)]);
        compare(&huge.o, &[3e38; 16], 1e-6).unwrap();
        compare_lse(&huge.lse, &[4f32.ln(); 4], 1e-6).unwrap();
        // NaN is no number to be lost.
        let lost = merge(&[&state(f32::NAN, 1.0), &state(0.0, 1.0)]);
        assert!(lost.o.iter().chain(&lost.lse).all(|x| x.is_nan()), "{lost:?}");
    }
}

fn sum_of_shards<T: Element>(
    attention: &Attention,
    problem: &Problem,
    whole: &Backward<T>,
    shards: &[Range<usize>],
    sink_shard: usize,
) -> Gradients<f64, f64> {
    let states = states(attention, problem, &whole.operands, shards);
    let state = attention.merge(problem, &states.iter().collect::<Vec<_>>()).unwrap();
    let saved = attention.finish::<T>(problem, &state, whole.operands.sink_logits.as_deref()).unwrap();
    let s = problem.shape();
    let zeros = |shape: [usize; 4]| vec![0.0; shape.iter().product()];
    let mut sum = Gradients::new(zeros(problem.q_shape()), zeros(problem.k_shape()), zeros(problem.v_shape()))
        .d_alibi_slopes(problem.options().alibi.then(|| vec![0.0; s.heads]))
        .d_bias(problem.bias_shape().map(zeros));
    for (n, keys) in shards.iter().enumerate() {
        let part = shard(problem, &whole.operands, keys);
        let inputs = if n == sink_shard { with_sinks(&part, &whole.operands) } else { part.inputs() };
        let gradients = attention.backward_partial(problem, keys.clone(), &inputs, &saved, &whole.upstream()).unwrap();
        let add = |sum: &mut [f64], x: &[f64]| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        let wide = |x: &[T]| x.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        let wide32 = |x: &[f32]| x.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        add(&mut sum.d_q, &wide(&gradients.d_q));
        // Each key's place, in whole operands of which the shard is these rows.
        let numbers = |len: usize| (0..len).collect::<Vec<_>>();
        for (all, x, width) in [(&mut sum.d_k, gradients.d_k, s.head_dim), (&mut sum.d_v, gradients.d_v, s.value_dim)] {
            let places = common::shards::rows(problem, &numbers(all.len()), width, keys);
            assert_eq!(places.len(), x.len());
            places.into_iter().zip(x).for_each(|(place, x)| all[place] = x.into());
        }
        if let Some(x) = gradients.d_alibi_slopes {
            add(sum.d_alibi_slopes.as_mut().unwrap(), &wide32(&x));
        }
        if let (Some(all), Some(x)) = (&mut sum.d_bias, gradients.d_bias) {
            let places = numbers(all.len());
            let places = places.chunks(s.seq_k).flat_map(|row| row[keys.clone()].to_vec());
            places.zip(x).for_each(|(place, x)| all[place] = x.into());
        }
        assert_eq!(gradients.d_sink_logits.is_some(), n == sink_shard && whole.operands.sink_logits.is_some());
        sum.d_sink_logits = gradients.d_sink_logits.map(|x| wide32(&x)).or(sum.d_sink_logits);
    }
    sum
}

/// Rounded once more, to be held against the definition as a path's own gradients are.
fn narrow<T: Element>(x: Gradients<f64, f64>) -> Gradients<T> {
    let f32s = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<_>>();
    Gradients::new(T::narrow(f32s(x.d_q)), T::narrow(f32s(x.d_k)), T::narrow(f32s(x.d_v)))
        .d_sink_logits(x.d_sink_logits.map(f32s))
        .d_alibi_slopes(x.d_alibi_slopes.map(f32s))
        .d_bias(x.d_bias.map(f32s))
}

fn gradients_add_up<T: Element>() {
    for (n, options) in options().into_iter().enumerate() {
        let options = options.dtype(T::DTYPE).bias_dtype(DType::F32);
        let problem = problem([2, 4, 2], [19, 41], [16, 12], options);
        let whole = Backward::random(&problem, n as u64).cast::<T>();
        let expected = whole.expected(&problem);
        let shards = ranges([&[16, 30][..], &[1, 1, 40]][n % 2], 41);
        for attention in paths_of::<T>(n) {
            // Any shard may hold the sink logits, an empty one too.
            let sum = sum_of_shards(&attention, &problem, &whole, &shards, 1);
            whole.agree(&narrow::<T>(sum), &expected).unwrap_or_else(|error| panic!("{problem} {shards:?}: {error}"));
        }
    }
}

#[test]
fn f32_gradients_of_shards_add_up() {
    gradients_add_up::<f32>();
}

#[test]
fn f16_gradients_of_shards_add_up() {
    gradients_add_up::<f16>();
}

#[test]
fn bf16_gradients_of_shards_add_up() {
    gradients_add_up::<bf16>();
}

/// Sequences of different lengths, cut anywhere among the rows of all of them.
#[test]
fn shards_of_sequences_of_different_lengths() {
    let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 40, seq_k: 60, head_dim: 8, value_dim: 8 };
    let options = Options::new().window(Window::keys(7)).sink_tokens(3).sink_logits(SinkLogits::PerHead);
    let lengths = Lengths::Cumulative { q: &[0, 10, 10, 30, 40], k: &[0, 25, 30, 30, 60] };
    let thd = Problem::with_lengths(shape, options.layout(Layout::Thd), lengths).unwrap();
    let padded_shape = Shape { batch: 3, seq_q: 20, seq_k: 33, ..shape };
    let used = Lengths::Used { q: Some(&[20, 0, 7]), k: Some(&[33, 20, 11]) };
    let padded = Problem::with_lengths(padded_shape, options, used).unwrap();
    // With no window, the lengths alone hide what lies beyond them.
    let bias = Options::new().sink_logits(SinkLogits::PerHead).bias(Axes::ALL).alibi(true);
    let biased = Problem::with_lengths(padded_shape, bias, used).unwrap();
    for (problem, cuts) in [(thd, [20, 27, 50]), (padded, [5, 11, 30]), (biased, [1, 12, 20])] {
        let whole = Backward::random(&problem, 4);
        let shards = ranges(&cuts, problem.shape().seq_k);
        for attention in paths() {
            let states = states(&attention, &problem, &whole.operands, &shards);
            let state = attention.merge(&problem, &states.iter().collect::<Vec<_>>()).unwrap();
            check_finished(&attention, &problem, &whole.operands, &state).unwrap();
            let sum = sum_of_shards(&attention, &problem, &whole, &shards, 0);
            whole.agree(&narrow::<f32>(sum), &whole.expected(&problem)).unwrap();
        }
    }
}

/// Buffers of the caller's: each pass writes its state into its place among them, and one kernel merges.
#[test]
fn states_in_buffers_of_the_callers() {
    let Some(attention) = another_gpu() else { return };
    let device = attention.device().unwrap();
    // Budget 0: a dispatch for each tile of rows of each head.
    let cut = attention.clone().with_dispatch_budget(std::time::Duration::ZERO);
    for (width, layout) in [([8, 8], Layout::Bshd), ([8, 5], Layout::Bhsd)] {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).layout(layout);
        let problem = problem([2, 4, 2], [37, 50], width, options);
        let operands = Operands::random(&problem, 6);
        let expected = reference::forward(&problem, &operands.inputs()).unwrap();
        let shards = ranges(&[13, 20, 49], 50);
        let [o_len, lse_len] =
            [&problem.o_shape()[..], &problem.lse_shape()].map(|shape| shape.iter().product::<usize>());
        let nan = |len: usize| buffer(device, &vec![f32::NAN; len]);
        let (stacked, stacked_lse) = (nan(shards.len() * o_len), nan(shards.len() * lse_len));
        let q = buffer(device, &operands.q);
        let sink_logits = buffer(device, operands.sink_logits.as_ref().unwrap());
        for (n, keys) in shards.iter().enumerate() {
            let part = shard(&problem, &operands, keys);
            let (k, v) = (buffer(device, &part.k), buffer(device, &part.v));
            let o = TensorView::new(&stacked).offset((n * o_len) as u64);
            let lse = TensorView::new(&stacked_lse).offset((n * lse_len) as u64);
            let buffers = ForwardBuffers::new(&q, &k, &v, o, lse);
            let prepared = attention.prepare_partial(&problem, keys.clone(), &buffers).unwrap();
            submit(device, |encoder| prepared.encode(encoder));
        }
        let mut bits = Vec::new();
        for attention in [&attention, &cut] {
            let (o, lse) = (nan(o_len), nan(lse_len));
            let merged = MergeBuffers::new(&stacked, &stacked_lse, &o, &lse);
            let buffers = merged.sink_logits(TensorView::new(&sink_logits));
            let prepared = attention.prepare_finish(&problem, shards.len(), &buffers).unwrap();
            assert_eq!(prepared.dispatches().eq([1]), !std::ptr::eq(attention, &cut));
            submit(device, |encoder| prepared.encode(encoder));
            compare(&read(device, &o), &expected.o, BOUND).unwrap();
            compare_lse(&read(device, &lse), &expected.lse, BOUND).unwrap();
            bits.push((read(device, &o), read(device, &lse)));
            // The same in two steps.
            let (half, half_lse) = (nan(o_len), nan(lse_len));
            let step = MergeBuffers::new(&stacked, &stacked_lse, &half, &half_lse);
            let merge = attention.prepare_merge(&problem, shards.len(), &step).unwrap();
            let last = MergeBuffers::new(&half, &half_lse, &o, &lse);
            let last = last.sink_logits(TensorView::new(&sink_logits));
            let finish = attention.prepare_finish(&problem, 1, &last).unwrap();
            submit(device, |encoder| {
                merge.encode(encoder);
                finish.encode(encoder);
            });
            compare(&read(device, &o), &expected.o, BOUND).unwrap();
            compare_lse(&read(device, &lse), &expected.lse, BOUND).unwrap();
        }
        assert_eq!(bits[0], bits[1], "cut or not");
    }
}

/// Halves with what rounding took from them are merged as in f32, at any width; without it they are rounded between.
#[test]
fn states_in_halves() {
    fn check<T: Element>(width: usize) {
        let Some(attention) = another_gpu() else { return };
        let device = attention.device().unwrap();
        let problem = problem([1, 2, 1], [9, 1], [4, width], Options::new().dtype(T::DTYPE));
        let operands = Operands::random(&problem, 2);
        let [o_len, lse_len] = [18 * width, 18];
        let states: Vec<PartialState> = (0..3)
            .map(|n| {
                PartialState::new(
                    (0..o_len).map(|i| ((i * 7 + n * 13) as f32).sin()).collect(),
                    (0..lse_len).map(|i| ((i + 5 * n) as f32).cos()).collect(),
                )
            })
            .collect();
        let expected = cpu::merge(&problem, &states.iter().collect::<Vec<_>>()).unwrap();
        let all: Vec<f32> = states.iter().flat_map(|state| state.o.clone()).collect();
        let rest: Vec<i16> = all.iter().map(|&x| T::lo(x)).collect();
        let halves = T::narrow(all);
        let bytes = |x: &[u8]| {
            let mut words = x.to_vec();
            words.resize(words.len().next_multiple_of(4), 0);
            buffer(device, &bytemuck::pod_collect_to_vec::<u8, f32>(&words))
        };
        let (states_buffer, rest_buffer) = (bytes(bytemuck::cast_slice(&halves)), bytes(bytemuck::cast_slice(&rest)));
        let lse: Vec<f32> = states.iter().flat_map(|state| state.lse.clone()).collect();
        let states_lse = buffer(device, &lse);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let size = ((2 * o_len) as u64).next_multiple_of(4);
        let (o, o_lo, lse) = (empty(device, size, usage), empty(device, size, usage), empty(device, 72, usage));
        let plain = MergeBuffers::new(&states_buffer, &states_lse, &o, &lse);
        let with_o_lo = plain.states_lo(TensorView::new(&rest_buffer)).o_lo(TensorView::new(&o_lo));
        let run = |buffers: &MergeBuffers<'_>| {
            let prepared = attention.prepare_merge(&problem, 3, buffers).unwrap();
            submit(device, |encoder| prepared.encode(encoder));
            let o: Vec<T> = bytemuck::pod_collect_to_vec(&read(device, &o))[..o_len].to_vec();
            (o, bytemuck::pod_collect_to_vec::<f32, i16>(&read(device, &o_lo))[..o_len].to_vec())
        };
        let (rounded, rest) = run(&with_o_lo);
        let whole: Vec<f32> = rounded.iter().zip(&rest).map(|(o, &rest)| o.with_lo(rest)).collect();
        compare(&whole, &expected.o, BOUND).unwrap();
        compare_lse(&read(device, &lse), &expected.lse, BOUND).unwrap();
        let wide = |x: &[T]| x.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        let bound = sink_attention::testing::compare::accepted(T::DTYPE);
        compare(&wide(&rounded), &expected.o, bound).unwrap();
        compare(&wide(&run(&plain).0), &expected.o, bound).unwrap();
        drop(operands);
    }
    for width in [8, 5] {
        check::<f16>(width);
        check::<bf16>(width);
    }
}

/// Any problem, cut anywhere.
#[derive(Debug, Clone)]
struct Case {
    heads: [usize; 3],
    seq: [usize; 2],
    cuts: Vec<usize>,
    options: Options,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    use prop::option::of;
    use prop::sample::select;
    let heads = (1..3usize, 1..4usize, 1..4usize).prop_map(|(batch, kv, group)| [batch, kv * group, kv]);
    let masks = (any::<bool>(), [of(0..50usize), of(0..20usize)], 0..30usize, of(-30..90i64), any::<bool>());
    let scores = (
        of(1..9u8),
        any::<bool>(),
        of(any::<[bool; 3]>()),
        of(any::<[bool; 3]>()),
        select(vec![SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead]),
    );
    let rest = (
        select(vec![Layout::Bshd, Layout::Bhsd]),
        select(vec![DType::F32, DType::F16, DType::Bf16]),
        any::<u64>(),
        prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    );
    (heads, [1..60usize, 1..90usize], masks, scores, rest).prop_map(|(heads, seq, masks, scores, rest)| {
        let (causal, [left, right], sink_tokens, query_offset, top_left) = masks;
        let (softcap, alibi, bias, mask, sink_logits) = scores;
        let (layout, dtype, seed, cuts) = rest;
        let axes = |[batch, heads, seq_q]: [bool; 3]| Axes { batch, heads, seq_q };
        let mut options = Options::new().causal(causal).window(Window { left, right }).sink_tokens(sink_tokens);
        options.query_offset = query_offset;
        options.alignment = if top_left { Alignment::TopLeft } else { Alignment::BottomRight };
        options.softcap = softcap.map(f32::from);
        options.bias = bias.map(axes);
        options.mask = mask.map(axes);
        let options = options.alibi(alibi).sink_logits(sink_logits).layout(layout).dtype(dtype);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.index(seq[1] + 1)).collect();
        cuts.sort_unstable();
        Case { heads, seq, cuts, options, seed }
    })
}

fn holds<T: Element>(attention: &Attention, case: &Case) -> Result<(), String> {
    let problem = problem(case.heads, case.seq, [16, 8], case.options);
    let whole = Backward::random(&problem, case.seed).cast::<T>();
    let shards = ranges(&case.cuts, case.seq[1]);
    let states = states(attention, &problem, &whole.operands, &shards);
    // Last first.
    let state = attention.merge(&problem, &states.iter().rev().collect::<Vec<_>>()).unwrap();
    check_finished(attention, &problem, &whole.operands, &state)?;
    let sum = sum_of_shards(attention, &problem, &whole, &shards, shards.len() - 1);
    whole.agree(&narrow::<T>(sum), &whole.expected(&problem))
}

fn any_cut(attention: &Attention, cases_by_default: u32) {
    let mut config =
        Config { rng_seed: RngSeed::Fixed(6), failure_persistence: None, ..Config::with_cases(cases_by_default) };
    if let Some(cases) = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()) {
        config.cases = cases;
    }
    let run = |case: Case| {
        let held = match case.options.dtype {
            DType::F16 => holds::<f16>(attention, &case),
            DType::Bf16 => holds::<bf16>(attention, &case),
            _ => holds::<f32>(attention, &case),
        };
        held.map_err(TestCaseError::fail)
    };
    TestRunner::new(config).run(&cases(), run).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn any_cut_on_the_cpu() {
    any_cut(&Attention::cpu(), 200);
}

#[test]
fn any_cut_on_the_gpu() {
    if let Some(gpu) = gpu() {
        any_cut(gpu, common::this_many(6, 24));
    }
}

#[test]
fn mistakes_are_errors() {
    let options = Options::new().sink_logits(SinkLogits::PerHead).dtype(DType::F16);
    let problem = problem([1, 2, 1], [3, 9], [4, 4], options);
    let operands = Operands::random(&problem, 1).cast::<f16>();
    let state = PartialState::empty(&problem);
    let message = |error: Error| error.to_string();
    for attention in paths() {
        for keys in [Range { start: 5, end: 4 }, 8..10, 10..10] {
            let inputs = Inputs::new(&operands.q, &operands.k, &operands.v);
            let error = attention.attend_partial(&problem, keys.clone(), &inputs).unwrap_err();
            assert!(matches!(error, Error::InvalidShard { seq_k: 9, .. }), "{error}");
            let text = message(error);
            assert_eq!(text, format!("keys {}..{} are no range of the problem's 9 keys", keys.start, keys.end));
            assert!(matches!(problem.shard(keys), Err(Error::InvalidShard { .. })));
        }
        assert!(matches!(problem.shard(4..4), Err(Error::ZeroDimension { dimension: "seq_k" })));
        let part = shard(&problem, &operands, &(2..6));
        let error = attention.attend_partial(&problem, 2..6, &with_sinks(&part, &operands)).unwrap_err();
        assert!(matches!(error, Error::UnexpectedOperand { operand: "sink_logits", .. }), "{error}");
        // k and v are the shard's.
        let error = attention.attend_partial(&problem, 2..7, &part.inputs()).unwrap_err();
        assert!(matches!(error, Error::OperandLength { operand: "k", expected: 20, actual: 16, .. }), "{error}");
        let error = attention.attend_partial(&problem, 2..2, &part.inputs()).unwrap_err();
        assert!(matches!(error, Error::OperandLength { operand: "k", expected: 0, actual: 16, .. }), "{error}");
        let wide = shard(&problem, &Operands::random(&problem, 1), &(2..2));
        let error = attention.attend_partial(&problem, 2..2, &wide.inputs()).unwrap_err();
        assert!(matches!(error, Error::WrongElementType { .. }), "{error}");

        let short = state.clone().lse(vec![0.0; 5]);
        let error = attention.merge(&problem, &[&state, &short]).unwrap_err();
        assert_eq!(message(error), "lse of a partial state has 5 elements, its shape [1, 2, 3] needs 6");
        let error = attention.merge(&problem, &[&state.clone().o(vec![0.0; 25])]).unwrap_err();
        assert_eq!(message(error), "o of a partial state has 25 elements, its shape [1, 3, 2, 4] needs 24");
        let error = attention.finish::<f16>(&problem, &state, None).unwrap_err();
        assert!(matches!(error, Error::MissingOperand { operand: "sink_logits" }), "{error}");
        let error = attention.finish::<f16>(&problem, &state, Some(&[0.0])).unwrap_err();
        assert!(matches!(error, Error::OperandLength { operand: "sink_logits", expected: 2, .. }), "{error}");
        let error = attention.finish::<bf16>(&problem, &state, Some(&[0.0; 2])).unwrap_err();
        assert!(matches!(error, Error::WrongElementType { .. }), "{error}");
        let plain = problem.clone().without_sink_logits();
        let error = attention.finish::<f16>(&plain, &state, Some(&[0.0; 2])).unwrap_err();
        assert!(matches!(error, Error::UnexpectedOperand { operand: "sink_logits", .. }), "{error}");

        let backward = Backward::random(&problem, 1).cast::<f16>();
        let mut saved = attention.finish::<f16>(&problem, &state, operands.sink_logits.as_deref()).unwrap();
        saved.o_lo = None;
        let error =
            attention.backward_partial(&problem, 2..6, &part.inputs(), &saved, &backward.upstream()).unwrap_err();
        assert!(matches!(error, Error::MissingOperand { operand: "o_lo" }), "{error}");
    }
}

#[test]
fn shards_that_cannot_be_told() {
    let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 4, seq_k: 8, head_dim: 4, value_dim: 4 };
    let lengths = Lengths::Cumulative { q: &[0, 2, 4], k: &[0, 3, 8] };
    for (options, option) in
        [(Options::new().bias(Axes::KEYS), "bias"), (Options::new().bias(Axes::ALL).mask(Axes::KEYS.heads()), "mask")]
    {
        let problem = Problem::with_lengths(shape, options.layout(Layout::Thd), lengths).unwrap();
        let error = problem.shard(2..5).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: o, .. } if o == option), "{error}");
    }
    let far = Options::new().alibi(true).query_offset(-(1 << 30));
    let error = Problem::new(shape, far).unwrap().shard(2..5).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "query_offset", .. }), "{error}");
}

#[test]
fn mistakes_with_buffers_are_errors() {
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    let problem = problem([1, 2, 1], [3, 9], [4, 4], options);
    let usage = BufferUsages::STORAGE;
    let cpu_only = |error: Error| assert!(matches!(error, Error::NeedsGpu { .. }), "{error}");
    let Some(attention) = another_gpu() else { return };
    let device = attention.device().unwrap();
    let new = |elements: u64| empty(device, 4 * elements, usage);
    let (states, lses, o, lse, sinks) = (new(2 * 24), new(2 * 6), new(24), new(6), new(2));
    let plain = MergeBuffers::new(&states, &lses, &o, &lse);
    cpu_only(Attention::cpu().prepare_merge(&problem, 2, &plain).unwrap_err());
    attention.prepare_merge(&problem, 2, &plain).unwrap();
    let error = attention.prepare_merge(&problem, 3, &plain).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { operand: "states", needed: 288, actual: 192 }), "{error}");
    let error = attention.prepare_merge(&problem, 0, &plain).unwrap_err();
    assert!(matches!(error, Error::ZeroDimension { dimension: "states" }), "{error}");
    for states in [1 << 30, usize::MAX] {
        assert!(attention.prepare_merge(&problem, states, &plain).is_err());
    }
    let error = attention.prepare_finish(&problem, 2, &plain).unwrap_err();
    assert!(matches!(error, Error::MissingOperand { operand: "sink_logits" }), "{error}");
    let with_sinks = plain.sink_logits(TensorView::new(&sinks));
    attention.prepare_finish(&problem, 2, &with_sinks).unwrap();
    let error = attention.prepare_merge(&problem, 2, &with_sinks).unwrap_err();
    assert!(matches!(error, Error::UnexpectedOperand { operand: "sink_logits", .. }), "{error}");
    let error = attention.prepare_merge(&problem, 1, &plain.o(&states)).unwrap_err();
    assert!(matches!(error, Error::Aliasing { output: "o", other: "states" }), "{error}");
    let error = attention.prepare_merge(&problem, 2, &plain.o_lo(TensorView::new(&o))).unwrap_err();
    assert!(matches!(error, Error::UnexpectedOperand { operand: "o_lo", .. }), "{error}");
    let half = Problem::new(*problem.shape(), options.dtype(DType::F16)).unwrap();
    let rest = new(24);
    let error = attention.prepare_merge(&half, 2, &plain.o_lo(TensorView::new(&rest))).unwrap_err();
    assert!(matches!(error, Error::MissingOperand { operand: "states_lo" }), "{error}");

    let (q, k) = (new(24), new(36));
    let buffers = ForwardBuffers::new(&q, &k, &k, &o, &lse);
    let error = attention.prepare_partial(&problem, 3..3, &buffers).unwrap_err();
    assert!(matches!(error, Error::ZeroDimension { dimension: "seq_k" }), "{error}");
    let with_sinks = buffers.sink_logits(TensorView::new(&sinks));
    let error = attention.prepare_partial(&problem, 3..5, &with_sinks).unwrap_err();
    assert!(matches!(error, Error::UnexpectedOperand { operand: "sink_logits", .. }), "{error}");
}

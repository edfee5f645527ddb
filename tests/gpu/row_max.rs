//! row_max, the largest score of each row, against the definition in f64: every path, through slices, states and caches.

use std::time::Duration;

use crate::common::buffers::{Buffers, buffer, gpu_with, read, submit};
use crate::common::caches::{Both, config};
use crate::common::shards::{ranges, shard};
use crate::common::{cooperative, every, gpu};
use sink_attention::cache::{CacheKind, Decode};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{Kernel, MicroKernel};
use sink_attention::testing::operands::{self, MaskValues, Operands, SIZES, problem, row};
use sink_attention::{
    Attention, Axes, DType, Element, Error, Layout, Lengths, MaskPacking, MergeBuffers, Options, PartialState, Problem,
    Shape, SinkLogits, TensorView, Window,
};

/// The CPU and, where there is one, the portable kernels of the GPU.
fn paths() -> impl Iterator<Item = Attention> {
    [Attention::cpu()].into_iter().chain(portable())
}

fn portable() -> Option<Attention> {
    gpu().cloned().map(|gpu| gpu.with_micro_kernel(MicroKernel::Portable))
}

/// Scores that are more than products, or hidden one by one.
fn score_options() -> Vec<Options> {
    let (new, keys) = (Options::new(), Axes::KEYS);
    let per_head = new.sink_logits(SinkLogits::PerHead);
    vec![
        new.softcap(1.5).scale(-0.4),
        per_head.alibi(true).causal(true),
        new.bias(Axes::ALL),
        per_head.mask(Axes::ALL).window(Window::keys(20)).sink_tokens(7),
        new.mask(keys.heads().seq_q()).mask_packing(MaskPacking::Bits).layout(Layout::Bhsd),
        per_head.alibi(true).bias(keys.heads()).mask(keys.batch()).softcap(1.1).causal(true).scale(-0.4),
    ]
}

/// Sequences of different lengths, empty ones among them.
fn lengths(mut options: Options) -> [Problem; 2] {
    options.query_offset = None;
    let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 233, seq_k: 262, head_dim: 32, value_dim: 16 };
    let (q, k) = (&[0, 70, 70, 71, 200, 233], &[0, 90, 100, 100, 229, 262]);
    let thd = Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q, k });
    let shape = Shape { batch: 2, heads: 4, kv_heads: 2, seq_q: 80, seq_k: 100, head_dim: 32, value_dim: 16 };
    let padded = Problem::with_lengths(shape, options, Lengths::Used { q: Some(&[75, 3]), k: Some(&[100, 60]) });
    [thd.unwrap(), padded.unwrap()]
}

/// 1e-5, relative to max(1, |row_max|); where a driver's exponential makes capped scores, 2^-19 of the cap besides.
fn close(actual: &[f32], expected: &[f64], cap: f64) -> Result<(), String> {
    assert_eq!(actual.len(), expected.len());
    for (n, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let alike = f64::from(actual) == expected || actual.is_nan() && expected.is_nan();
        let error = (f64::from(actual) - expected).abs();
        if !(alike || error <= 1e-5 * expected.abs().max(1.0) + cap * 2f64.powi(-19)) {
            return Err(format!("row_max[{n}] is {actual}, not {expected}"));
        }
    }
    Ok(())
}

/// Holds row_max to the definition, and o and lse to the bits that they have without it.
fn check<T: Element>(attention: &Attention, problem: &Problem, operands: &Operands<T>) {
    let inputs = operands.inputs();
    let (output, row_max) = attention.forward_with_row_max(problem, &inputs).unwrap();
    let cooperative = attention
        .plan_forward(problem)
        .is_ok_and(|plan| plan.passes.iter().any(|pass| pass.variant.micro_kernel == MicroKernel::Cooperative));
    let cap = problem.options().softcap.filter(|_| cooperative).map_or(0.0, f64::from);
    close(&row_max, &reference::row_max(problem, &inputs).unwrap(), cap)
        .unwrap_or_else(|error| panic!("{problem}: {error}"));
    // lse is the logarithm of a sum whose largest term is that of row_max, or the sink logit.
    for (row_max, lse) in row_max.iter().zip(&output.lse) {
        let is_below = *row_max == f32::NEG_INFINITY || *row_max <= lse + 1e-4 * lse.abs().max(1.0);
        assert!(is_below || row_max.is_nan() && lse.is_nan(), "{problem}: {row_max} beyond {lse}");
    }
}

fn same_bits<T: Element>(attention: &Attention, problem: &Problem, operands: &Operands<T>) {
    let (with, _) = attention.forward_with_row_max(problem, &operands.inputs()).unwrap();
    assert!(with == attention.forward(problem, &operands.inputs()).unwrap(), "{problem}: other bits with row_max");
}

#[test]
fn the_cpu_agrees_with_the_definition() {
    fn all<T: Element>() {
        let cpu = Attention::cpu();
        for (n, options) in operands::options().into_iter().chain(score_options()).enumerate() {
            for (size, seq) in SIZES.into_iter().enumerate() {
                let problem = problem([2, 4, 2], seq, [24, 9], options.dtype(T::DTYPE));
                check(&cpu, &problem, &Operands::random(&problem, (n + size) as u64).cast::<T>());
            }
            for problem in lengths(options.dtype(T::DTYPE)) {
                check(&cpu, &problem, &Operands::random(&problem, n as u64).cast::<T>());
            }
        }
    }
    all::<f32>();
    all::<f16>();
    all::<bf16>();
}

/// Portable kernels: element types take turns, as a driver takes its time for each kernel.
#[test]
fn portable_kernels_agree_with_the_definition() {
    fn one<T: Element>(gpu: &Attention, turn: usize, options: Options) {
        let options = options.dtype(T::DTYPE);
        let seq = [[113, 203], [1, 257], [70, 64]][turn % 3];
        let problem = problem([2, 4, 2], seq, [[32, 48], [33, 16]][turn % 2], options);
        let operands = Operands::random(&problem, turn as u64).cast::<T>();
        check(gpu, &problem, &operands);
        if turn.is_multiple_of(4) {
            same_bits(gpu, &problem, &operands);
        }
        if turn.is_multiple_of(5) {
            let [thd, padded] = lengths(options);
            for problem in [thd, padded] {
                check(gpu, &problem, &Operands::random(&problem, turn as u64).cast::<T>());
            }
        }
    }
    let Some(gpu) = portable() else { return };
    for (turn, options) in operands::options().into_iter().chain(score_options()).enumerate() {
        match turn % 3 {
            0 => one::<f32>(&gpu, turn, options),
            1 => one::<f16>(&gpu, turn, options),
            _ => one::<bf16>(&gpu, turn, options),
        }
    }
    // Each of them in f32, too.
    for (turn, options) in every(2, score_options()).into_iter().enumerate() {
        one::<f32>(&gpu, turn, options);
    }
}

fn cooperative_agrees<T: Element>() {
    let Some(gpu) = cooperative() else { return };
    let window = Options::new().sink_logits(SinkLogits::PerHead).window(Window::keys(30)).sink_tokens(3);
    let steep = Options::new().scale(-2.5);
    for (turn, options) in every(3, [window, steep].into_iter().chain(score_options())).into_iter().enumerate() {
        let problem = problem([1, 4, 2], [70, 203], [32, 48], options.dtype(T::DTYPE));
        let mut operands = Operands::random(&problem, turn as u64).cast::<T>();
        // Scores that grow from key to key, so that the maximum of the softmax lags behind; values of other sizes.
        for (j, g) in (0..203).flat_map(|j| [(j, 0), (j, 1)]) {
            let grows = |x: &mut T| *x = T::from_f32(x.to_f32() * (0.2 + j as f32 / 60.0));
            operands.key(&problem, 0, g, j).iter_mut().for_each(grows);
            let shrinks = |x: &mut T| *x = T::from_f32(x.to_f32() * 2f32.powi(-(j as i32 % 7)));
            operands.value(&problem, 0, g, j).iter_mut().for_each(shrinks);
        }
        check(&gpu, &problem, &operands);
    }
    let [thd, _] = lengths(Options::new().causal(true).dtype(T::DTYPE));
    check(&gpu, &thd, &Operands::random(&thd, 1).cast::<T>());
    nan::<T>(&gpu);
}

#[test]
fn cooperative_f16_agrees_with_the_definition() {
    cooperative_agrees::<f16>();
}

#[test]
fn cooperative_bf16_agrees_with_the_definition() {
    cooperative_agrees::<bf16>();
}

/// Hidden keys hold NaN, and one key that a part of the queries sees does: those rows alone are NaN. Another part sees an infinite
/// score, and some see nothing. The rows that are computed again by another kernel are among them.
fn nan<T: Element>(attention: &Attention) {
    let options = Options::new().causal(true).query_offset(-5).mask(Axes::KEYS).dtype(T::DTYPE);
    let problem = problem([1, 2, 1], [60, 90], [16, 16], options);
    let mut operands = Operands::random(&problem, 2).cast::<T>();
    let mask: Vec<u8> = (0..90).map(|j| u8::from(j % 4 != 1)).collect();
    operands.mask = Some(MaskValues::Bytes(mask.clone()));
    for j in (0..90).filter(|j| mask[*j] == 0 || *j == 40 || *j >= 55) {
        operands.key(&problem, 0, 0, j).fill(T::from_f32(f32::NAN));
        operands.value(&problem, 0, 0, j).fill(T::from_f32(f32::NAN));
    }
    // 0 times infinity would be NaN.
    operands.key(&problem, 0, 0, 28).fill(T::from_f32(f32::INFINITY));
    let q = |i: usize| row(&problem, [2, 60, 16], [0, 1, i]);
    (30..45).for_each(|i| operands.q[q(i)].fill(T::from_f32(0.5)));
    let (output, row_max) = attention.forward_with_row_max(&problem, &operands.inputs()).unwrap();
    close(&row_max, &reference::row_max(&problem, &operands.inputs()).unwrap(), 0.0).unwrap();
    for (n, (row_max, lse)) in row_max.iter().zip(&output.lse).enumerate() {
        let i = n % 60;
        assert_eq!(*row_max == f32::NEG_INFINITY, i < 5, "{n}: {row_max}");
        assert_eq!(row_max.is_nan(), lse.is_nan(), "{n}: {row_max} {lse}");
        assert_eq!(*row_max == f32::INFINITY, *lse == f32::INFINITY, "{n}: {row_max} {lse}");
    }
    assert!(row_max[60 + 35] == f32::INFINITY && row_max[60 + 50].is_nan(), "{row_max:?}");
}

#[test]
fn hidden_nan_does_not_show_and_a_seen_one_does() {
    paths().for_each(|attention| nan::<f32>(&attention));
    paths().for_each(|attention| nan::<f16>(&attention));
    nan::<bf16>(&Attention::cpu());
}

/// Slices of dispatches have the bits of the whole.
#[test]
fn slices() {
    let Some(whole) = portable() else { return };
    let cut = whole.clone().with_dispatch_budget(Duration::ZERO);
    let small = gpu_with(|limits| limits.max_storage_buffer_binding_size = 64 << 10).unwrap();
    let options = Options::new().sink_logits(SinkLogits::PerHead).window(Window::keys(20)).sink_tokens(3);
    let problems = [problem([3, 4, 2], [300, 300], [16, 16], options.layout(Layout::Bhsd))];
    for problem in problems.into_iter().chain(lengths(options)) {
        let operands = Operands::random(&problem, 4);
        check(&cut, &problem, &operands);
        let bits = |attention: &Attention| attention.forward_with_row_max(&problem, &operands.inputs()).unwrap();
        assert!(bits(&whole) == bits(&cut) && bits(&whole) == bits(&small), "{problem}");
    }
}

/// The states of shards, merged in any order, at once and one by one, have the row_max of the whole; one that has none leaves none.
#[test]
fn merged_states() {
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    let wide = options.alibi(true).softcap(3.0).causal(true).mask(Axes::KEYS);
    let all = [options.window(Window::keys(9)).sink_tokens(5), options.causal(true).query_offset(-8).scale(-0.3), wide];
    for (n, options) in all.into_iter().enumerate() {
        let problem = problem([2, 4, 2], [19, 41], [16, 12], options);
        let operands = Operands::random(&problem, n as u64);
        let expected = reference::row_max(&problem, &operands.inputs()).unwrap();
        for attention in paths() {
            let state = |keys: &std::ops::Range<usize>, asks: bool| {
                let part = shard(&problem, &operands, keys);
                match asks {
                    true => attention.attend_partial_with_row_max(&problem, keys.clone(), &part.inputs()).unwrap(),
                    false => attention.attend_partial(&problem, keys.clone(), &part.inputs()).unwrap(),
                }
            };
            let shards = ranges(&[7, 7, 30], 41);
            let states: Vec<PartialState> = shards.iter().map(|keys| state(keys, true)).collect();
            let forth: Vec<&PartialState> = states.iter().collect();
            let back: Vec<&PartialState> = states.iter().rev().collect();
            let one_by_one = back.iter().fold(PartialState::empty(&problem), |whole, state| {
                attention.merge(&problem, &[&whole, state]).unwrap()
            });
            for whole in
                [attention.merge(&problem, &forth).unwrap(), attention.merge(&problem, &back).unwrap(), one_by_one]
            {
                close(whole.row_max.as_ref().unwrap(), &expected, 0.0).unwrap_or_else(|e| panic!("{problem}: {e}"));
                attention.finish::<f32>(&problem, &whole, operands.sink_logits.as_deref()).unwrap();
            }
            let without = state(&shards[0], false);
            assert_eq!(without.row_max, None);
            let mixed = attention.merge(&problem, &[&without, &states[3]]).unwrap();
            assert_eq!(mixed.row_max, None);
            let same = attention.merge(&problem, &[&states[0], &states[3]]).unwrap();
            assert_eq!((mixed.o, mixed.lse), (same.o, same.lse));
        }
    }
}

/// What a merge makes of states that saw nothing, of NaN and of infinity.
#[test]
fn merges_of_no_numbers() {
    let problem = problem([1, 1, 1], [4, 3], [4, 4], Options::new());
    let state =
        |lse: [f32; 4], row_max: [f32; 4]| PartialState::new(vec![1.0; 16], lse.to_vec()).row_max(row_max.to_vec());
    let (none, nan, infinity) = (f32::NEG_INFINITY, f32::NAN, f32::INFINITY);
    let a = state([none, nan, infinity, none], [5.0, nan, infinity, none]);
    let b = state([1.0, 2.0, 3.0, none], [-1.0, 1.0, 2.0, nan]);
    for attention in paths() {
        for states in [[&a, &b], [&b, &a]] {
            let merged = attention.merge(&problem, &states).unwrap().row_max.unwrap();
            assert!(merged[1].is_nan(), "{merged:?}");
            assert_eq!([merged[0], merged[2], merged[3]], [-1.0, infinity, none]);
        }
        let short = a.clone().row_max(vec![0.0; 3]);
        let error = attention.merge(&problem, &[&short]).unwrap_err();
        assert!(matches!(error, Error::OperandLength { operand: "row_max of a partial state", .. }), "{error}");
    }
}

/// Caches of each kind, on the GPU and on the CPU: ragged lengths and an empty sequence, keys in splits.
fn decodes<T: Element>(kind: CacheKind, widths: [usize; 2], heads: usize, options: Options) {
    let options = options.dtype(T::DTYPE);
    let mut both = Both::<T>::new(config::<T>(kind, 2, widths));
    both.append(&[0, 130, 2]);
    both.append(&[0, 40, 1]);
    both.check_row_max(&Decode::new(heads, options));
    both.check_row_max(&Decode::new(heads, options.causal(true)).queries(3).sequences([1, 0]));
}

const ROLLING: CacheKind = CacheKind::Rolling { sink_tokens: 3, window: 37, queries: 4 };

#[test]
fn decoding_from_caches() {
    let options = Options::new().sink_logits(SinkLogits::PerHead);
    let paged = CacheKind::Paged { page_size: 16, pages: 60, sequence_pages: 20 };
    decodes::<f32>(CacheKind::Contiguous { capacity: 300 }, [16, 16], 4, options);
    decodes::<f16>(paged, [64, 64], 16, options.scale(-0.4));
    decodes::<f32>(ROLLING, [24, 8], 4, Options::new().softcap(4.0));
    decodes::<bf16>(ROLLING, [32, 32], 4, options.layout(Layout::Bhsd));
    decodes::<f32>(
        CacheKind::Contiguous { capacity: 300 },
        [4, 3],
        2,
        Options::new().window(Window::keys(50)).sink_tokens(2),
    );
}

/// A buffer each, and what is wrong with others.
#[test]
fn buffers_and_errors() {
    let Some(attention) = portable() else { return };
    let device = attention.device().unwrap();
    let problem = problem([1, 2, 1], [20, 30], [16, 16], Options::new().causal(true));
    let operands = Operands::random(&problem, 3);
    let buffers = Buffers::new(device, &problem, &operands);
    // Behind an offset, with what is not written left as it is.
    let row_max = buffer(device, &[7.0; 64]);
    let view = TensorView::new(&row_max).offset(10);
    let with = |row_max| buffers.views().row_max(row_max);
    let prepared = attention.prepare_forward(&problem, &with(view)).unwrap();
    submit(device, |encoder| prepared.encode(encoder));
    let written = read(device, &row_max);
    close(&written[10..50], &reference::row_max(&problem, &operands.inputs()).unwrap(), 0.0).unwrap();
    assert!(written[..10].iter().chain(&written[50..]).all(|x| *x == 7.0));

    let error = |row_max| attention.prepare_forward(&problem, &with(row_max)).unwrap_err();
    let aliased = error(TensorView::new(&buffers.lse));
    assert!(matches!(aliased, Error::Aliasing { .. }), "{aliased}");
    let short = error(TensorView::new(&row_max).offset(30));
    assert!(matches!(short, Error::BufferTooSmall { operand: "row_max", .. }), "{short}");
    let strided = error(TensorView::new(&row_max).strides([1, 2, 3]));
    assert!(matches!(strided, Error::InvalidOption { option: "row_max", .. }), "{strided}");

    let merge = MergeBuffers::new(&buffers.q, &buffers.lse, &buffers.o, &buffers.lse).states_row_max(view);
    let error = attention.prepare_merge(&problem, 1, &merge).unwrap_err();
    assert!(matches!(error, Error::MissingOperand { operand: "row_max" }), "{error}");
}

/// A device with 8 storage buffers computes row_max beside o_lo and one option, and says what is too much.
#[test]
fn storage_buffers() {
    let least = sink_attention::plan::Capabilities::webgpu_defaults();
    let plan = |options: Options, o_lo: bool| {
        let problem = problem([1, 2, 1], [100, 100], [64, 64], options);
        let optional = sink_attention::plan::OptionalOperands::default().o_lo(o_lo).row_max(true);
        let preference = sink_attention::plan::Preference::default();
        sink_attention::plan::Plan::forward_with(&problem, optional, &least, &preference)
    };
    let (f16, sinks) = (Options::new().dtype(DType::F16), SinkLogits::PerHead);
    let has_row_max = plan(f16.sink_logits(sinks), true)
        .unwrap()
        .passes
        .iter()
        .any(|pass| pass.variant.kernel == Kernel::FORWARD && pass.variant.row_max);
    assert!(has_row_max);
    plan(Options::new().sink_logits(sinks).bias(Axes::ALL), false).unwrap();
    let error = plan(f16.sink_logits(sinks).alibi(true), true).unwrap_err().to_string();
    assert!(error.contains("needs 9 storage buffers, the device offers 8"), "{error}");
}

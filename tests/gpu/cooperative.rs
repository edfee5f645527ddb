//! The cooperative micro-kernel (tensor cores) against the definition, and against what rounding p and d_s explains.
//!
//! It takes an adapter with cooperative matrices: tests/software-vulkan.sh installs one that needs no GPU, and
//! `SINK_ATTENTION_REQUIRE_COOPERATIVE=1` makes these tests fail where there is none.

use crate::common::caches::{Both, config, filled};
use crate::common::prefills::causal;
use crate::common::views::run_at;
use crate::common::{all_cases, compare, compare_low_precision, cooperative, gpu, low_precision, with_others};
use sink_attention::cache::{CacheKind, Decode, DecodeBuffers, DecodeTiles, Prefill, PrefillBuffers};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::plan::MicroKernel;
use sink_attention::plan::{Capabilities, Kernel, LoopHints, OptionalOperands, Plan, Preference, Tiling};
use sink_attention::testing::compare::accepted;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{SIZES, agree, options, problem, rows_agree};
use sink_attention::{
    Attention, DType, Device, Element, Error, Gradients, Layout, Options, Output, Problem, SinkLogits, Window,
};

/// A test for both types.
macro_rules! both {
    ($($(#[$meta:meta])* $name:ident)*) => {$(
        $(#[$meta])*
        mod $name {
            #[test]
            fn f16() {
                super::with_matrices(super::$name::<super::f16>);
            }

            #[test]
            fn bf16() {
                super::with_matrices(super::$name::<super::bf16>);
            }
        }
    )*};
}

both! {
    sizes_and_options
    widths
    heads_and_batches
    views_with_offsets_and_strides
    fragments_of_every_shape
    what_rounding_took_from_o
    large_scores
    the_range_of_the_type
    weights_beyond_halves
    hidden_keys_never_come_through
    visible_keys_do
    nan_stays_in_its_row
    larger_scores_before_a_nan
    same_bits_every_time
    through_caches
}

fn with_matrices(test: fn(&Attention)) {
    if let Some(attention) = cooperative() {
        test(&attention);
    }
}

/// Every kernel that has tiles is cooperative, run again without what is not finite where it mixes columns, and followed by the
/// portable one that fallback.
fn is_cooperative(plan: &Plan) -> bool {
    is_on_matrices(plan, MicroKernel::Cooperative)
}

/// The same of a micro-kernel on cooperative matrices.
pub fn is_on_matrices(plan: &Plan, micro_kernel: MicroKernel) -> bool {
    let of = |kernel| plan.passes.iter().filter(move |pass| pass.variant.kernel == kernel);
    [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV].into_iter().all(|kernel| {
        let passes: Vec<_> = of(kernel)
            .map(|pass| (pass.variant.micro_kernel, pass.variant.sanitize, pass.variant.fallback.is_some()))
            .collect();
        let (first, again) = ((micro_kernel, false, false), (micro_kernel, true, false));
        let fallback = (MicroKernel::Portable, false, true);
        passes.is_empty()
            || passes
                == if kernel == Kernel::EXACT_DELTA { vec![first, fallback] } else { vec![first, again, fallback] }
    })
}

/// The problem in an element type, with operands.
pub fn random<T: Element>(problem: &Problem, seed: u64) -> (Problem, Backward<T>) {
    let problem = Problem::new(*problem.shape(), problem.options().dtype(T::DTYPE)).unwrap();
    let operands = Backward::random(&problem, seed).cast();
    (problem, operands)
}

/// Holds both passes against the definition: by norm, and by element as far as low precision explains. `explain` is
/// off where no element has more than rounding noise.
fn check<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>, explain: bool) -> Output<T> {
    let output = check_forward(attention, problem, case);
    let gradients = case.run_with(attention, problem, &exact(&output));
    let expected = case.rows_agree(accepted(T::DTYPE), problem, &gradients);
    case.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    if explain {
        explained(problem, case, &output, &gradients);
    }
    output
}

fn check_forward<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) -> Output<T> {
    assert!(is_cooperative(&attention.plan_forward(problem).unwrap()), "{problem}");
    assert!(is_cooperative(&attention.plan_backward(problem).unwrap()), "{problem}");
    forward_agrees(attention, problem, case)
}

/// Holds the forward pass against the definition by norm, row by row.
pub fn forward_agrees<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) -> Output<T> {
    let inputs = case.operands.inputs();
    let output = attention.forward(problem, &inputs).unwrap();
    let (expected, _, magnitudes) = reference::with_magnitudes(problem, &inputs, None).unwrap();
    agree(&output, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    let (width, bound) = (problem.shape().value_dim, accepted(T::DTYPE));
    rows_agree(problem, "o", &output.o, &expected.o, &magnitudes.o, width, bound);
    output
}

/// Holds every element to twice the worst error of a computation that rounds p and d_s, too.
pub fn explained<T: Element>(problem: &Problem, case: &Backward<T>, output: &Output<T>, gradients: &Gradients<T>) {
    let (inputs, round) = (case.operands.inputs(), low_precision::to_half::<T>);
    let low_o = low_precision::forward_with(problem, &inputs, round).o;
    let low = low_precision::backward_with(problem, &inputs, &case.upstream(), round);
    let (o, expected) = (reference::forward(problem, &inputs).unwrap().o, case.expected(problem));
    for (name, actual, low, expected) in [
        ("o", &output.o, &low_o, &o),
        ("d_q", &gradients.d_q, &low.d_q, &expected.d_q),
        ("d_k", &gradients.d_k, &low.d_k, &expected.d_k),
        ("d_v", &gradients.d_v, &low.d_v, &expected.d_v),
    ] {
        // Where terms cancel to nothing, two orders of f32 sums may be a few roundings apart.
        if expected.iter().any(|x| x.abs() >= 1e-6) {
            compare_low_precision(actual, low, expected).unwrap_or_else(|error| panic!("{problem}: {name}: {error}"));
        }
    }
}

/// Without what rounding took from o, so that delta is summed anew, as precise as f32.
pub fn exact<T: Element>(output: &Output<T>) -> Output<T> {
    output.clone().o_lo(None)
}

/// With what rounding took from o, delta is as precise as o was in f32: p has been rounded on its way there, which the
/// gradients of the sink logits show. Otherwise they have the bound of f32.
fn what_rounding_took_from_o<T: Element>(attention: &Attention) {
    for (seed, options) in (0..).zip(options()) {
        let (problem, case) = random::<T>(&problem([1, 2, 1], [63, 65], [16, 16], options), seed);
        let (mut gradients, mut expected) = (case.run(attention, &problem), case.expected(&problem));
        assert_eq!(gradients.d_sink_logits.is_some(), expected.d_sink_logits.is_some());
        if let (Some(actual), Some(expected)) = (gradients.d_sink_logits.take(), expected.d_sink_logits.take()) {
            compare(&actual, &expected, accepted(T::DTYPE)).unwrap_or_else(|error| panic!("{problem}: {error}"));
        }
        case.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

fn sizes_and_options<T: Element>(attention: &Attention) {
    for (seed, size) in (0..).zip(SIZES) {
        for options in options() {
            let (problem, case) = random::<T>(&problem([1, 2, 1], size, [16, 16], options), seed);
            check(attention, &problem, &case, true);
        }
    }
}

fn widths<T: Element>(attention: &Attention) {
    let equal = with_others([16, 64, 20, 33], [128, 256]).into_iter().map(|width| [width, width]);
    let unequal = with_others([[16, 64], [128, 8], [256, 16], [36, 20], [1, 3], [16, 256]], [[192, 16], [192, 128]]);
    // A software driver compiles wide kernels for many seconds: both types only where they differ, in how they are read, and
    // the widest by turns.
    let both = |width: [usize; 2]| match T::DTYPE {
        _ if all_cases() => true,
        DType::F16 => width != [16, 256],
        _ => [[16, 16], [33, 33], [36, 20], [16, 256]].contains(&width),
    };
    for (seed, width) in (0..).zip(equal.into_iter().chain(unequal)).filter(|(_, width)| both(*width)) {
        let layout = if seed % 2 == 0 { Layout::Bshd } else { Layout::Bhsd };
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).layout(layout);
        let (problem, case) = random::<T>(&problem([1, 2, 1], [63, 65], width, options), seed);
        check(attention, &problem, &case, true);
    }
}

fn heads_and_batches<T: Element>(attention: &Attention) {
    for (seed, heads) in (0..).zip([[1, 8, 1], [3, 6, 2], [2, 5, 5], [7, 1, 1]]) {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let options = Options::new().sink_logits(SinkLogits::PerHead).layout(layout);
            let (problem, case) = random::<T>(&problem(heads, [35, 37], [16, 16], options), seed);
            check(attention, &problem, &case, true);
        }
    }
}

fn views_with_offsets_and_strides<T: Element>(attention: &Attention) {
    let options = Options::new().window(Window::keys(9)).sink_tokens(2).sink_logits(SinkLogits::PerHead);
    let narrow = problem([2, 2, 1], [19, 19], [5, 3], options.layout(Layout::Bhsd));
    let by_fours = problem([2, 4, 2], [33, 33], [16, 8], options);
    for (seed, problem) in (1..).zip([narrow, by_fours]) {
        let (problem, case) = random::<T>(&problem, seed);
        for place in [[0, 0], [1, 0], [2, 2], [3, 1], [4, 4], [8, 0], [129, 3], [132, 4]] {
            run_at(attention, &problem, &case, place, &[], false);
        }
    }
}

/// Subgroups, rows and columns of fragments, and stages: what hardware gets, and what nobody would pick.
fn fragments_of_every_shape<T: Element>(attention: &Attention) {
    let shapes = [[2, 2, 2, 2], [3, 1, 3, 1], [1, 3, 1, 2]];
    // The types differ in how operands are read, not in what becomes of fragments.
    let shapes = if T::DTYPE == DType::F16 { &shapes[..] } else { &shapes[..1] };
    for (seed, &[subgroups, rows, columns, stages]) in (0..).zip(shapes) {
        let options = Options::new().window(Window::keys(30)).sink_tokens(3).sink_logits(SinkLogits::PerHead);
        let (problem, case) = random::<T>(&problem([1, 4, 2], [70, 90], [16, 20], options), seed);
        let tiling = Tiling::Cooperative { subgroups, rows, columns, stages, loops: LoopHints::NONE };
        let kernels = [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV];
        run_at(attention, &problem, &case, [0, 0], &kernels.map(|kernel| (kernel, tiling)), false);
    }
}

/// Maxima grow along the keys, so that outputs are rescaled again and again; and they come first, so that few are. Keys of
/// one sign have much in common, and d_q is what is left of larger terms: then no more is asked than low precision can give.
fn large_scores<T: Element>(attention: &Attention) {
    for (seed, options) in (0..).zip([Options::new(), Options::new().sink_logits(SinkLogits::PerHead).causal(true)]) {
        for [grows, cancels] in [[true, false], [false, false], [true, true], [false, true]] {
            let (problem, mut case) = random::<T>(&problem([1, 2, 1], [50, 130], [16, 16], options), seed);
            let change = |x: &mut [T], change: &dyn Fn(f32) -> f32| {
                x.iter_mut().for_each(|x| *x = T::from_f32(change(x.to_f32())));
            };
            for (i, q) in case.operands.q.chunks_mut(32).enumerate() {
                // Some rows rescale, their neighbours do not.
                let size = if i % 3 == 0 { 1.0 } else { 4.0 };
                change(q, &|q| if cancels { 2.0 * size * q.abs() } else { size * q });
            }
            for j in 0..130 {
                let size = if grows { j } else { 130 - j } as f32 / 16.0;
                let k = case.operands.key(&problem, 0, 0, j);
                change(k, &|k| if cancels { k.abs() + size } else { size * k });
            }
            if cancels {
                let output = check_forward(attention, &problem, &case);
                let gradients = case.run_with(attention, &problem, &exact(&output));
                explained(&problem, &case, &output, &gradients);
            } else {
                check(attention, &problem, &case, true);
            }
        }
    }
}

/// Powers of two that leave the scores as they are, and scale o alone.
fn the_range_of_the_type<T: Element>(attention: &Attention) {
    // Products of three operands stay well within f32, too.
    let powers: &[[i32; 2]] = if T::DTYPE == DType::F16 { &[[5, 5]] } else { &[[100, 20], [10, 108]] };
    for (sign, &[along, values]) in powers.iter().flat_map(|powers| [(1, powers), (-1, powers)]) {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let (problem, mut case) = random::<T>(&problem([1, 2, 1], [40, 70], [16, 16], options), 6);
        let operands = &mut case.operands;
        for (operand, power) in [(&mut operands.q, along), (&mut operands.k, -along), (&mut operands.v, values)] {
            operand.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * 2f32.powi(sign * power)));
        }
        check(attention, &problem, &case, false);
    }
}

/// The unit of a row's weights does not foresee these: later queries have gradients 2^25 (f16) or 2^80 (bf16) times as large as those that
/// set it; values cancel, so that o says nothing of d_o . v.
fn weights_beyond_halves<T: Element>(attention: &Attention) {
    let scaled = |x: &mut [T], factor: f32| x.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * factor));
    let both = |problem: &Problem, case: &Backward<T>| {
        check(attention, problem, case, false);
        // With o_lo delta, and the unit of d_q with it, is another kernel's.
        case.rows_agree(accepted(T::DTYPE), problem, &case.run(attention, problem));
    };
    let [low, high] = if T::DTYPE == DType::F16 { [-12, 13] } else { [-40, 40] };
    let (problem, mut case) = random::<T>(&problem([1, 2, 1], [48, 48], [16, 16], Options::new().causal(true)), 3);
    for (i, d_o) in case.d_o.chunks_mut(2 * 16).enumerate() {
        scaled(d_o, 2f32.powi(if i < 32 { low } else { high }));
    }
    both(&problem, &case);

    let (problem, mut case) = random::<T>(&self::problem([1, 2, 1], [20, 64], [16, 16], Options::new()), 4);
    case.operands.q.fill(T::from_f32(0.0));
    for pair in case.operands.v.chunks_mut(2 * 16) {
        let (first, second) = pair.split_at_mut(16);
        second.iter_mut().zip(first).for_each(|(second, first)| *second = T::from_f32(-first.to_f32()));
    }
    both(&problem, &case);
}

/// Weights of hidden keys are zeros in a fragment, and zero times NaN is NaN: such tiles are reported, and the portable
/// kernel computes them again.
fn hidden_keys_never_come_through<T: Element>(attention: &Attention) {
    let options = Options::new().window(Window::keys(9)).query_offset(-10).layout(Layout::Bhsd);
    for sinks in [SinkLogits::None, SinkLogits::PerHead] {
        let (problem, mut case) = random::<T>(&problem([1, 2, 1], [70, 70], [16, 16], options.sink_logits(sinks)), 4);
        let run = |attention: &Attention, case: &Backward<T>| {
            let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
            let gradients = case.run_with(attention, &problem, &exact(&output));
            (output, gradients)
        };
        let (clean, clean_gradients) = run(attention, &case);
        // The last query sees keys up to 59.
        for j in 60..70 {
            let bad = T::from_f32([f32::NAN, f32::INFINITY, f32::NEG_INFINITY][j % 3]);
            case.operands.key(&problem, 0, 0, j).fill(bad);
            case.operands.value(&problem, 0, 0, j).fill(bad);
        }
        let (output, gradients) = run(attention, &case);
        agree(&output, &clean).unwrap_or_else(|error| panic!("{problem}: {error}"));
        agree(&output, &reference::forward(&problem, &case.operands.inputs()).unwrap()).unwrap();
        case.agree(&gradients, &clean_gradients).unwrap_or_else(|error| panic!("{problem}: {error}"));
        // They keep their bits: nothing that a row does not see has a part in them.
        let numbers = |x: &[T]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        assert_eq!(numbers(&output.o), numbers(&clean.o), "{problem}");
        assert_eq!(output.lse, clean.lse, "{problem}");
        for (found, clean) in [
            (&gradients.d_q, &clean_gradients.d_q),
            (&gradients.d_k, &clean_gradients.d_k),
            (&gradients.d_v, &clean_gradients.d_v),
        ] {
            assert_eq!(numbers(found), numbers(clean), "{problem}");
        }
    }
}

/// What the portable kernel makes of operands that are not finite, up to rounding.
fn as_portable<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) -> Output<T> {
    let portable = gpu().unwrap().clone().with_micro_kernel(MicroKernel::Portable);
    let output = attention.forward(problem, &case.operands.inputs()).unwrap();
    let expected = portable.forward(problem, &case.operands.inputs()).unwrap();
    agree(&output, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    output
}

/// What a visible key holds does reach the results, whatever it is.
fn visible_keys_do<T: Element>(attention: &Attention) {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for in_values in [false, true] {
            let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
            let (problem, mut case) = random::<T>(&problem([1, 2, 1], [40, 40], [16, 16], options), 3);
            let operands = &mut case.operands;
            let row = if in_values { operands.value(&problem, 0, 0, 20) } else { operands.key(&problem, 0, 0, 20) };
            row[3] = T::from_f32(bad);
            let output = as_portable(attention, &problem, &case);
            assert!(output.o.iter().any(|o| !o.to_f32().is_finite()), "{bad} in_values={in_values}");
        }
    }
}

/// A query that holds NaN spoils its own row only, though it shares fragments with others.
fn nan_stays_in_its_row<T: Element>(attention: &Attention) {
    let (problem, mut case) = random::<T>(&problem([1, 1, 1], [40, 40], [16, 16], Options::new()), 5);
    case.operands.q[11 * 16 + 2] = T::from_f32(f32::NAN);
    case.operands.q[12 * 16 + 2] = T::from_f32(f32::INFINITY);
    let output = as_portable(attention, &problem, &case);
    assert!(output.lse[11].is_nan() && output.lse[10].is_finite());
}

/// The `max` of WGSL may return either number if one is NaN. The loop that raises maxima ends all the same, and rows that do not see the NaN
/// keep finite results.
fn larger_scores_before_a_nan<T: Element>(attention: &Attention) {
    for bad in [17, 18, 20, 21, 24, 30] {
        let (problem, mut case) = random::<T>(&problem([1, 1, 1], [40, 40], [16, 16], Options::new().causal(true)), 7);
        case.operands.q.fill(T::from_f32(3.0));
        for j in 16..32 {
            case.operands.key(&problem, 0, 0, j).fill(T::from_f32(0.5 * (32 - j) as f32));
        }
        case.operands.key(&problem, 0, 0, bad).fill(T::from_f32(f32::NAN));
        let output = as_portable(attention, &problem, &case);
        assert!(output.lse[bad].is_nan() && output.lse[..bad].iter().all(|lse| lse.is_finite()), "{bad}");
    }
}

fn same_bits_every_time<T: Element>(attention: &Attention) {
    for width in [16, 31] {
        let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let (problem, case) = random::<T>(&problem([2, 4, 2], [150, 150], [width, width], options), 1);
        let bits = || {
            let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
            let gradients = case.run_with(attention, &problem, &output);
            let without = case.run_with(attention, &problem, &exact(&output));
            let halves = [output.o, gradients.d_q, gradients.d_k, gradients.d_v, without.d_q, without.d_k].concat();
            let singles = [output.lse, gradients.d_sink_logits.unwrap(), without.d_sink_logits.unwrap()].concat();
            (bytemuck::cast_slice::<T, u16>(&halves).to_vec(), bytemuck::cast_slice::<f32, u32>(&singles).to_vec())
        };
        let first = bits();
        assert!((0..3).all(|_| bits() == first));
    }
}

/// A cache's prefills and gradients are the operator's own passes.
fn through_caches<T: Element>(attention: &Attention) {
    let paged = CacheKind::Paged { page_size: 16, pages: 12, sequence_pages: 6 };
    for kind in [paged, CacheKind::Rolling { sink_tokens: 3, window: 21, queries: 2 }] {
        let config = config::<T>(kind, 1, [32, 32]);
        let cache = attention.create_cache(&config).unwrap();
        let device = attention.device().unwrap();
        let [q, k, v, o] = [80, 40, 40, 80].map(|rows| filled(device, &vec![T::default(); rows * 32]));
        let lse = filled(device, &[0f32; 80]);
        let prefill = Prefill::new(2, [40, 0, 0], causal::<T>());
        let prepared = cache.prepare_prefill(&prefill, &PrefillBuffers::new(&q, &k, &v, &o, &lse)).unwrap();
        assert!(is_cooperative(prepared.forward().unwrap().plan()));
        let mut both = Both::<T>::new(config);
        both.gpu = Some(cache);
        if kind == paged {
            let prefilled = both.prefill(&prefill);
            both.backward(&prefilled);
        } else {
            both.append(&[40, 0, 0]);
            both.prefill(&Prefill::new(2, [25, 33, 0], causal::<T>()));
        }
    }
}

/// One query against contiguous and paged keys of every length, whatever hides some of them, and whatever lies beyond the last.
fn decodes_from_caches(attention: &Attention) {
    let matrices = attention.device().unwrap().capabilities().cooperative.unwrap();
    let paged = CacheKind::Paged { page_size: 32, pages: 40, sequence_pages: 20 };
    // Of 8 rows, of more, and of several workgroups; the last tile of the contiguous cache lies across its end.
    for (kind, heads, kv_heads, widths) in
        [(CacheKind::Contiguous { capacity: 301 }, 4, 2, [16, 32]), (paged, 4, 2, [16, 16]), (paged, 20, 1, [16, 16])]
    {
        let mut both = Both::<f16>::new(config::<f16>(kind, kv_heads, widths));
        both.gpu = Some(attention.create_cache(&both.config).unwrap());
        let buffers =
            [heads * 3, heads * 3].map(|rows| filled(attention.device().unwrap(), &vec![f16::ZERO; rows * 48]));
        let lse = filled(attention.device().unwrap(), &vec![0f32; heads * 3]);
        let decode = Decode::new(heads, Options::new().dtype(DType::F16));
        let cache = both.gpu.as_ref().unwrap();
        let prepared = cache.prepare_decode(&decode, &DecodeBuffers::new(&buffers[0], &buffers[1], &lse)).unwrap();
        assert!(matches!(prepared.tiling().tiles, DecodeTiles::Cooperative { .. }));
        both.append(&[301, 17, 0]);
        // What was there is no number.
        let nan = |len: usize| vec![f16::NAN; len];
        both.append_numbers(&[0, 3, 2], &nan(5 * kv_heads * widths[0]), &nan(5 * kv_heads * widths[1])).unwrap();
        both.truncate(1, 17).unwrap();
        both.truncate(2, 0).unwrap();
        let new = Options::new().dtype(DType::F16);
        let per_head = new.sink_logits(SinkLogits::PerHead);
        for options in [
            per_head,
            new.scale(-0.7),
            per_head.window(Window::keys(100)).sink_tokens(3),
            new.softcap(1.1).window(Window::keys(10)),
            per_head.alibi(true).scale(-0.7),
            new.alibi(true).softcap(1.1),
        ] {
            both.check(&Decode::new(heads, options));
        }
        both.check_row_max(&Decode::new(heads, per_head.alibi(true)));
        // Drivers take their time for every kernel.
        let tilings = if kind == paged { &[(1, 3, 2)][..] } else { &[(2, 2, 3), (1, 1, 1)] };
        let shared = |columns: u32| (columns * matrices.side / 4).is_multiple_of(matrices.lanes / 8);
        for (columns, ahead, splits) in tilings.iter().filter(|(columns, ..)| shared(*columns)) {
            let tiling = format!("cooperative rows 8, columns {columns}, ahead {ahead}, splits {splits}");
            both.check(
                &Decode::new(heads, per_head).tiling(tiling.parse::<sink_attention::cache::DecodeTiling>().unwrap()),
            );
        }
        both.append(&[0, 200, 14]);
        both.check(&Decode::new(heads, per_head).sequences([2, 1]));
    }
}

#[test]
fn decoding() {
    with_matrices(decodes_from_caches);
}

#[test]
fn decoding_sees_nothing_that_is_hidden() {
    with_matrices(crate::cache_hidden::hold_on_matrices);
}

/// A device that has none, a type, a width, a pass: the planner names what stands in the way. Needs no device.
#[test]
fn what_has_no_kernel_says_why() {
    let samples = Capabilities::samples();
    let sample = |name: &str| samples.iter().find(|device| device.name.contains(name)).unwrap();
    let preference = Preference::default().micro_kernel(MicroKernel::Cooperative);
    let forward = |dtype, width, device: &Capabilities| {
        let problem = problem([1, 2, 1], [64, 64], width, Options::new().dtype(dtype));
        let backward = Plan::backward_with(&problem, OptionalOperands::default().scalar(true), device, &preference);
        (Plan::forward_with(&problem, OptionalOperands::default().scalar(true), device, &preference), backward)
    };
    let refused = |plan: sink_attention::Result<Plan>, reason: &str| match plan {
        Err(error @ Error::NoKernel { .. }) => assert!(error.to_string().contains(reason), "{error}"),
        other => panic!("{reason}: {other:?}"),
    };
    for device in ["H200", "M2", "llvmpipe"].map(sample) {
        for dtype in [DType::F16, DType::Bf16] {
            for width in [[64, 64], [128, 128], [1, 1]] {
                let (forward, backward) = forward(dtype, width, device);
                [forward, backward].into_iter().for_each(|plan| assert!(is_cooperative(&plan.unwrap())));
            }
        }
        refused(forward(DType::F32, [64, 64], device).0, "f32 operands need the portable micro-kernel");
        refused(forward(DType::F32, [64, 64], device).1, "f32 operands need the portable micro-kernel");
        for width in [[257, 64], [64, 512]] {
            let reason = format!("widths up to 256, not {}", width[0].max(width[1]));
            refused(forward(DType::F16, width, device).0, &reason);
            refused(forward(DType::F16, width, device).1, &reason);
        }
    }
    // What NVIDIA's driver gives a workgroup, and Apple's.
    let with_kib = |name, kib: u32| sample(name).clone().workgroup_bytes(kib << 10);
    let [nvidia, apple] = [with_kib("H200", 48), with_kib("M2", 32)];
    for (width, device) in [([256, 256], &nvidia), ([192, 128], &nvidia), ([192, 128], &apple), ([256, 256], &apple)] {
        let (forward, backward) = forward(DType::Bf16, width, device);
        [forward, backward].into_iter().for_each(|plan| assert!(is_cooperative(&plan.unwrap()), "{width:?}"));
    }
    let least = with_kib("M2", 12);
    refused(forward(DType::F16, [256, 256], &least).0, "bytes of workgroup memory, the device offers 12288");
    let (forward, backward) = forward(DType::F16, [64, 64], sample("Arc"));
    refused(forward, "Intel Arc A770 has no cooperative matrices of f16 with sums in f32");
    refused(backward, "Intel Arc A770 has no cooperative matrices of f16 with sums in f32");
}

/// A device that is wrapped without its adapter does not know of cooperative matrices: `Auto` goes without them.
#[test]
fn a_device_without_matrices() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().unwrap();
    let bare = Attention::on(Device::from_wgpu(device.wgpu().clone(), device.queue().clone()));
    let (problem, case) = random::<f16>(&problem([1, 2, 1], [20, 20], [16, 16], Options::new()), 0);
    let forward = |kernel| bare.clone().with_micro_kernel(kernel).forward(&problem, &case.operands.inputs());
    assert_eq!(forward(MicroKernel::Auto).unwrap(), forward(MicroKernel::Portable).unwrap());
    let error = forward(MicroKernel::Cooperative).unwrap_err();
    assert!(error.to_string().contains("has no cooperative matrices"), "{error}");
}
